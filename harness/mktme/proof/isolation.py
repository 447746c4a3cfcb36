# SPDX-License-Identifier: GPL-2.0-or-later
"""Isolation: a VM's memory makes sense under its own KeyID and under no other VM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import Canary, find_canary
from mktme.vm.platform import Vm


@dataclass(frozen=True, slots=True)
class IsolationMatrix:
    """Which VM's canary page is readable under which VM's KeyID.

    Attributes:
        names: the VMs, in the order of rows and columns.
        keyids: their KeyIDs.
        readable: row i, column j: the page of VM i, read with the KeyID of VM j, is the canary.
    """

    names: tuple[str, ...]
    keyids: tuple[int, ...]
    readable: tuple[tuple[bool, ...], ...]

    @property
    def passed(self) -> bool:
        """Whether exactly the diagonal is readable, and there is something beside it."""
        return len(self.names) > 1 and all(
            readable == (row == column)
            for row, cells in enumerate(self.readable)
            for column, readable in enumerate(cells)
        )


def isolation_matrix(vms: Sequence[Vm], canary: Canary) -> IsolationMatrix:
    """Read each held VM's canary page with each VM's KeyID."""
    rows = []
    for vm in vms:
        ram_offset = find_canary(vm, canary)
        engine = vm.require_engine()
        rows.append(
            tuple(
                engine.read(vm.uuid, ram_offset, PAGE_BYTES, keyid=other.keyid) == canary.page
                for other in vms
            )
        )
    return IsolationMatrix(
        names=tuple(vm.name for vm in vms),
        keyids=tuple(vm.keyid for vm in vms),
        readable=tuple(rows),
    )
