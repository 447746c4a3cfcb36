# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots of a running guest, kept by its own QEMU in a qcow2 file.

::

    with vm.held():
        snapshots = Snapshots(vm.domain, Path("state.qcow2"))
        snapshots.save("before")
    ...
    snapshots.load("before")

QEMU reads and writes guest memory for that as a device does, so it goes through the data path. The
file has the memory as the guest sees it: plaintext. A guest's disk is not a part of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mktme.vm.domain import Domain

_TIMEOUT_S: Final = 120.0
_FILE: Final = "mktme-state-file"
_NODE: Final = "mktme-state"


class Snapshots:
    """The snapshots of one guest; its QEMU has the file open for as long as it runs.

    Args:
        domain: the guest.
        path: the file; it is made anew.

    Raises:
        VmError: QEMU could not make it, or has such a file open already; or the guest has a TPM.
    """

    def __init__(self, domain: Domain, path: Path) -> None:
        domain.require_state()
        self._domain = domain
        path.touch(mode=0o600)
        domain.qmp("blockdev-add", driver="file", filename=str(path), **{"node-name": _FILE})
        # It has no contents of its own but what snapshots bring: any size will do.
        options = {"driver": "qcow2", "file": _FILE, "size": 1 << 20}
        domain.run_job("blockdev-create", _TIMEOUT_S, options=options)
        domain.qmp("blockdev-add", driver="qcow2", file=_FILE, **{"node-name": _NODE})

    def save(self, tag: str) -> None:
        """Save the guest's memory and devices as they are now; it is held meanwhile.

        Raises:
            VmError: QEMU could not.
        """
        self._run("snapshot-save", tag)

    def load(self, tag: str) -> None:
        """Have the guest be again what it was when `tag` was saved.

        Raises:
            VmError: QEMU could not; the guest is then not to be used any more.
        """
        self._run("snapshot-load", tag)

    def _run(self, command: str, tag: str) -> None:
        self._domain.run_job(command, _TIMEOUT_S, tag=tag, vmstate=_NODE, devices=[_NODE])
