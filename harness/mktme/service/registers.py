# SPDX-License-Identifier: GPL-2.0-or-later
"""The platform's registers for guests that see them.

The package alone knows the rules: what a guest reads was asked of it beforehand, and what a guest
writes is asked of it then. A guest has its own VM's part in KeyIDs, no more: `KeyIds.execute_for`.
"""

from __future__ import annotations

import logging
from typing import Final
from uuid import UUID

from mktme.datapath.link import LinkError
from mktme.datapath.registers import (
    GENERAL_PROTECTION,
    Call,
    Operation,
    RegisterPage,
    encode_answer,
)
from mktme.engine.errors import KeyMaterialError
from mktme.engine.package import Package
from mktme.engine.pconfig import Status
from mktme.engine.tme import MSR_NAMES, GeneralProtection
from mktme.service.audit import AuditError, AuditLog, Peer
from mktme.service.drains import Drains
from mktme.service.keyids import KeyIds
from mktme.service.vms import Vm

log = logging.getLogger(__name__)

_VISIBLE: Final = tuple(MSR_NAMES)


class Registers:
    """Shows a package's registers to guests, and executes what they do to them.

    Args:
        package: has the registers.
        keyids: whose KeyIDs are whose.
        vms: the platform's VMs, by UUID.
        drains: ends VMs that cannot be told.
    """

    def __init__(
        self,
        package: Package,
        keyids: KeyIds,
        vms: dict[UUID, Vm],
        drains: Drains,
    ) -> None:
        self._package = package
        self._keyids = keyids
        self._vms = vms
        self._drains = drains

    def show(self, page: RegisterPage) -> None:
        """Write the registers as they are now to a VM's page.

        Raises:
            LinkError: QEMU does not let it be written.
        """
        page.write(self._package.tme.cpuid(), {msr: self._read(msr) for msr in _VISIBLE})

    def show_all(self) -> None:
        """As `show`, to every VM that has a page; one that cannot be told is ended."""
        for vm in self._vms.values():
            if vm.registers is None:
                continue
            try:
                self.show(vm.registers)
            except LinkError as error:
                self._drains.cut(vm, str(error))

    def execute(self, vm: Vm, call: Call, peer: Peer, audit: AuditLog) -> bytes:
        """Execute one of a guest's instructions and record it; returns the answer to its vCPU.

        Args:
            vm: whose guest.
            call: the instruction.
            peer: its QEMU.
            audit: where it is recorded; nothing is done that cannot be.
        """
        match call.operation:
            case Operation.WRMSR:
                return self._wrmsr(vm, call, peer, audit)
            case Operation.PCONFIG:
                return self._pconfig(vm, call, peer, audit)

    def _read(self, msr: int) -> int | None:
        try:
            return self._package.rdmsr(msr)
        except GeneralProtection:
            return None

    def _wrmsr(self, vm: Vm, call: Call, peer: Peer, audit: AuditLog) -> bytes:
        try:
            audit.require_room()
            self._package.wrmsr(call.number, call.value)
        except (GeneralProtection, AuditError) as error:
            audit.guest_call(peer, vm.uuid, "WRMSR", error, msr=call.number)
            return GENERAL_PROTECTION
        audit.guest_call(peer, vm.uuid, "WRMSR", None, msr=call.number)
        self.show_all()
        return encode_answer()

    def _pconfig(self, vm: Vm, call: Call, peer: Peer, audit: AuditLog) -> bytes:
        keyid = int.from_bytes(call.program[:2], "little")
        try:
            audit.require_room()
            status = self._keyids.execute_for(vm, call.number, call.value, call.program)
        except AuditError:
            status = Status.DEVICE_BUSY
        except (GeneralProtection, KeyMaterialError) as error:
            # A key that must not be used is one that the structure must not hold.
            audit.guest_call(peer, vm.uuid, "PCONFIG", error, keyid=keyid)
            return GENERAL_PROTECTION
        audit.guest_call(peer, vm.uuid, "PCONFIG", None, keyid=keyid, status=status)
        return encode_answer(rax=status, zf=status.zf)
