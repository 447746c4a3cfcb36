# SPDX-License-Identifier: GPL-2.0-or-later
"""Our own programs in a guest: `workload`, `canary` and `verify-memory`, shell scripts all of them.

Guest `tiny` has them in its initramfs. A guest that boots its disk gets them where Debian leaves
room for a site's own, /usr/local, over ssh; none of its packages has a file there.
"""

from __future__ import annotations

from typing import Final

from mktme.vm.disk_images import DiskImage
from mktme.vm.images import RECIPES_DIR
from mktme.vm.platform import Vm

_TOOLS: Final = ("canary", "verify-memory", "workload")
_TIMEOUT_S: Final = 60.0


def equip(vm: Vm) -> None:
    """Put our programs into a guest that has booted, if it has not had them from the start.

    Raises:
        VmError: the guest does not take them.
    """
    if isinstance(vm.config.image, DiskImage):
        for tool in _TOOLS:
            script = (RECIPES_DIR / "tiny" / tool).read_bytes()
            vm.domain.ssh.put(f"/usr/local/bin/{tool}", script, _TIMEOUT_S)
