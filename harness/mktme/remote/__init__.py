# SPDX-License-Identifier: GPL-2.0-or-later
"""A platform on another host, over ssh, and guests that move there.

::

    there = RemotePlatform("qemu+ssh://root@host/system", SIZE)
    with Platform(SIZE, connect="qemu:///system") as here, there:
        with here.launch(config) as vm, Migration(vm, here, there) as moved:
            moved.vm.run("workload 1", timeout_s=120)

The engine has to run beside QEMU, so a process of ours does there: ``mktme receive``, which ssh
starts. It has a platform of its own, meets the guest, and answers for it as long as the connection
lasts; with that the guest ends. See docs/adr/0012.
"""

from mktme.remote.platform import RemotePlatform, RemoteVm, check_can_move

__all__ = ["RemotePlatform", "RemoteVm", "check_can_move"]
