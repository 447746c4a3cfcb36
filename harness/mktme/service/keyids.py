# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose KeyIDs are whose, and which pages they are for: what a hypervisor keeps account of.

Everything here goes through PCONFIG, so what firmware did not allow cannot be programmed. KeyIDs
are given and taken, and pages change hands, one request at a time; raw PCONFIGs that come in
between find the key table locked (DEVICE_BUSY), as another logical processor would.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final
from uuid import UUID

from mktme.attest.claims import KeySource
from mktme.datapath.shadow import ShadowDataPath
from mktme.engine import pconfig
from mktme.engine.controller import BATCH_PAGES
from mktme.engine.errors import AddressError, DramError, KeyIdError, KeyMaterialError, MktmeError
from mktme.engine.keys import KeyMode, read_key_file
from mktme.engine.package import Package
from mktme.engine.pconfig import Command, Status
from mktme.engine.xts import PAGE_BYTES, Algorithm, wipe
from mktme.service import wire
from mktme.service.drains import Drains
from mktme.service.vms import Vm

_COMMANDS: Final = {
    KeyMode.DIRECT: Command.SET_KEY_DIRECT,
    KeyMode.RANDOM: Command.SET_KEY_RANDOM,
    KeyMode.NO_ENCRYPT: Command.NO_ENCRYPT,
}


class KeyIds:
    """The KeyIDs of a platform.

    Args:
        package: programs them.
        vms: the platform's VMs, by UUID.
        drains: how a VM's writes get into DRAM.
    """

    def __init__(self, package: Package, vms: dict[UUID, Vm], drains: Drains) -> None:
        self._package = package
        self._vms = vms
        self._drains = drains
        self._released: set[int] = set()  # programmed with a key that a broker gave
        self.lock = asyncio.Lock()
        """Held while KeyIDs or pages change hands."""

    def program(
        self,
        mode: KeyMode,
        algorithm: Algorithm,
        key_file: str | None,
        keyid: int | None = None,
        owner: Vm | None = None,
    ) -> int:
        """Program a KeyID, `lock` held; returns which.

        Args:
            mode: how.
            algorithm: what for.
            key_file: the key, for mode direct.
            keyid: which; None for the first that is free.
            owner: with whom it goes, beside its own.

        Raises:
            MktmeError: it is not possible, or not allowed; nothing changed.
        """
        command = _COMMANDS.get(mode)
        if command is None:
            raise MktmeError(f"no KeyID is programmed as {mode.value}", hint="clear it instead")
        if (mode is KeyMode.DIRECT) != (key_file is not None):
            raise MktmeError("mode direct needs a key file, and no other mode has one")
        if keyid is None:
            keyid = self._find_free()
        else:
            self._check_unused(keyid)
        key = None if key_file is None else read_key_file(Path(key_file), algorithm)
        try:
            self._package.program(keyid, command, algorithm, key)
        finally:
            if key is not None:
                wipe(key)
        self._released.discard(keyid)
        self._disown(keyid)
        if owner is not None:
            owner.further_keyids.append(keyid)
        return keyid

    def clear(self, keyid: int) -> None:
        """Clear a KeyID that nobody uses, `lock` held.

        Raises:
            KeyIdError: it is none that can be cleared, or in use.
        """
        self._check_unused(keyid)
        if not self._package.keys.is_programmed(keyid):
            raise KeyIdError(f"KeyID {keyid} has no key of its own", keyid=keyid)
        self._clear(keyid)
        self._disown(keyid)

    def source(self, keyid: int) -> KeySource:
        """Where a KeyID's key comes from, as the key table has it now."""
        for one in self._package.keys.describe():
            if one.keyid == keyid and one.mode is KeyMode.RANDOM:
                return KeySource.RANDOM
            if one.keyid == keyid and one.mode is KeyMode.DIRECT:
                return KeySource.BROKER if keyid in self._released else KeySource.FILE
        return KeySource.NONE

    def owner(self, keyid: int) -> UUID | None:
        """The VM that a KeyID was programmed for; KeyID 0 is nobody's."""
        if keyid == 0:
            return None
        for vm in self._vms.values():
            if keyid in (vm.keyid, *vm.further_keyids):
                return vm.uuid
        return None

    def release(self, vm: Vm) -> None:
        """Clear all KeyIDs of a VM that goes; its ciphertext stays, and no key reads it."""
        region = vm.region
        self._package.controller.assign(region.base, region.size_bytes, 0)
        for keyid in (vm.keyid, *vm.further_keyids):
            if self._package.keys.is_programmed(keyid):  # unless a raw PCONFIG cleared it
                self._clear(keyid)

    async def assign(self, vm: Vm, request: wire.AssignPages) -> None:
        """Give some of a VM's pages to another KeyID, `lock` held.

        What the VM has written goes to DRAM under the old KeyID first: that is the flush that
        336907, section 7.5, demands before a page changes its KeyID.

        Raises:
            AddressError: the range is not whole pages of the VM's.
            KeyIdError: the KeyID is not for this VM's pages.
            DramError: DRAM failed; what it lacks is written again by the next drains.
        """
        offset, size = request.ram_offset, request.size_bytes
        if offset < 0 or size <= 0 or offset % PAGE_BYTES or size % PAGE_BYTES:
            raise AddressError("KeyIDs are for whole pages of 4096 bytes", address=offset)
        if offset + size > vm.memory_bytes:
            raise AddressError(
                f"VM {vm.name} has {vm.memory_bytes} bytes of RAM", address=offset + size
            )
        keyid = vm.keyid if request.keyid is None else request.keyid
        self._check_usable(vm, keyid)
        async with vm.lock:
            if vm.path is not None:
                await self._drains.run(vm, lambda path: path.drain())
            with self._package.keys.lock:
                self._check_usable(vm, keyid)  # a raw PCONFIG may have come in between
                await self._rekey(vm, offset // PAGE_BYTES, size // PAGE_BYTES, keyid)

    async def adopt(self, vm: Vm, algorithm: Algorithm, key: memoryview) -> int:
        """Give a VM a key that was released to it, `lock` held; returns its new KeyID.

        All pages that were under the VM's own KeyID are under the new one then, NVDIMM and what
        can be plugged in included. The old one is cleared, unless another VM's pages are under it.

        Args:
            vm: whose own KeyID it becomes.
            algorithm: what for.
            key: data key, then tweak key.

        Raises:
            KeyIdError: every KeyID is taken.
            KeyMaterialError: the key must not be used.
            DramError: DRAM failed; the VM then has pages under both KeyIDs, and keeps its own.
        """
        keyid, old = self._find_free(), vm.keyid
        self._package.program(keyid, Command.SET_KEY_DIRECT, algorithm, key)
        self._disown(keyid)
        self._released.add(keyid)
        vm.further_keyids.append(keyid)  # it goes with the VM, whatever comes
        first = vm.region.base // PAGE_BYTES
        async with vm.lock:
            if vm.path is not None:
                await self._drains.run(vm, lambda path: path.drain())
            with self._package.keys.lock:
                self._check_usable(vm, keyid)
                for run in self._package.controller.page_ranges(vm.region):
                    if run.keyid == old:
                        start, count = run.base // PAGE_BYTES - first, run.size_bytes // PAGE_BYTES
                        await self._rekey(vm, start, count, keyid)
        vm.further_keyids.remove(keyid)
        vm.keyid = keyid
        if self._package.keys.is_programmed(old) and not self._users(old):
            self._clear(old)
        return keyid

    async def _rekey(self, vm: Vm, first: int, count: int, keyid: int) -> None:
        """Encrypt pages of a VM's anew, for another KeyID."""
        first_in_dram = vm.region.base // PAGE_BYTES + first
        for start in range(0, count, BATCH_PAGES):
            length = min(BATCH_PAGES, count - start)
            try:
                self._package.controller.rekey_pages(first_in_dram + start, length, keyid)
            except DramError as error:
                if isinstance(vm.path, ShadowDataPath):
                    vm.path.renew(first + start, length)
                elif vm.path is not None:  # DRAM was the only copy
                    self._drains.cut(vm, f"its pages changed hands in part: {error}")
                raise
            await asyncio.sleep(0)

    def execute(self, request: wire.ExecutePconfig) -> Status:
        """Execute a raw PCONFIG; a VM whose KeyID it changes is stopped, for its memory is lost.

        Raises:
            GeneralProtection: #GP(0).
            KeyMaterialError: the structure holds key bytes, or the key must not be used.
        """
        program = bytearray(request.program)
        try:
            if len(program) != pconfig.STRUCT_BYTES:
                raise MktmeError(f"MKTME_KEY_PROGRAM_STRUCT has {pconfig.STRUCT_BYTES} bytes")
            if any(program[pconfig.KEY_FIELD_1 :]):
                raise KeyMaterialError(
                    "no key crosses this socket",
                    hint="leave the key fields zero and name a file: key_file",
                )
            algorithm = pconfig.named_algorithm(program)
            if request.key_file is not None and algorithm is not None:
                key = read_key_file(Path(request.key_file), algorithm)
                try:
                    pconfig.place_key(program, algorithm, key)
                finally:
                    wipe(key)
            status = self._package.pconfig(request.leaf, request.address, program)
        finally:
            wipe(program)
        if status is Status.PROG_SUCCESS:
            keyid = int.from_bytes(request.program[:2], "little")
            self._released.discard(keyid)
            for vm in self._users(keyid):
                self._drains.cut(vm, f"PCONFIG changed its KeyID {keyid}: its memory is lost")
        return status

    def execute_for(
        self, vm: Vm, leaf: int, address: int, program: bytes | bytearray | memoryview
    ) -> Status:
        """Execute a PCONFIG of a VM's guest.

        A KeyID that memory is encrypted with, be it the VM's own, or that others programmed, is
        busy: no guest can destroy a VM's memory, or know another's key. What it programs is its
        VM's, and goes with it.

        Args:
            vm: whose guest.
            leaf: EAX.
            address: RBX.
            program: the 192 bytes there; may hold a key, which the caller wipes.

        Raises:
            GeneralProtection: #GP(0).
            KeyMaterialError: the key must not be used.
        """
        keyid = int.from_bytes(program[:2], "little")
        keys = self._package.keys
        with contextlib.ExitStack() as stack:
            if not keys.lock.locked() and (self.lock.locked() or self._is_taken(keyid, vm)):
                # As if another logical processor had it: DEVICE_BUSY, if nothing else is wrong.
                stack.enter_context(keys.lock)
            status = self._package.pconfig(leaf, address, program)
        if status is Status.PROG_SUCCESS:
            self._released.discard(keyid)
            self._disown(keyid)
            if keys.is_programmed(keyid):
                vm.further_keyids.append(keyid)
        return status

    def _is_taken(self, keyid: int, vm: Vm) -> bool:
        """Whether a KeyID is none that a VM's guest may program."""
        if not 0 < keyid <= self._package.tme.mktme_keyids:
            return False
        if self._package.keys.is_programmed(keyid) and self.owner(keyid) != vm.uuid:
            return True
        return bool(self._users(keyid))

    def _find_free(self) -> int:
        count = self._package.tme.mktme_keyids
        if count == 0:
            raise KeyIdError(
                "the platform has no KeyIDs", keyid=0, hint="set keyid-bits in platform.toml"
            )
        for keyid in range(1, count + 1):
            if not self._package.keys.is_programmed(keyid) and not self._users(keyid):
                return keyid
        raise KeyIdError("every KeyID is taken", keyid=count, hint="remove a VM or clear one")

    def _clear(self, keyid: int) -> None:
        # CLEAR_KEY too wants an activated algorithm, though it does not use it.
        self._package.program(keyid, Command.CLEAR_KEY, self._package.tme.algorithms[0])
        self._released.discard(keyid)

    def _disown(self, keyid: int) -> None:
        for vm in self._vms.values():
            if keyid in vm.further_keyids:
                vm.further_keyids.remove(keyid)

    def _users(self, keyid: int) -> list[Vm]:
        """VMs whose own KeyID it is, or that have pages of it."""
        return [
            vm
            for vm in self._vms.values()
            if keyid == vm.keyid or self._package.controller.is_used(keyid, vm.region)
        ]

    def _check_unused(self, keyid: int) -> None:
        if not 0 < keyid <= self._package.tme.mktme_keyids:
            raise KeyIdError(
                f"KeyID {keyid} cannot be programmed: 1 to {self._package.tme.mktme_keyids} can",
                keyid=keyid,
            )
        users = self._users(keyid)
        if users:
            names = ", ".join(vm.name for vm in users)
            raise KeyIdError(
                f"KeyID {keyid} is in use by {names}: its memory would be lost",
                keyid=keyid,
                hint="give its pages another KeyID first, or remove the VM",
            )

    def _check_usable(self, vm: Vm, keyid: int) -> None:
        if keyid == 0:
            return
        for other in self._vms.values():
            if other is not vm and keyid in (other.keyid, *other.further_keyids):
                raise KeyIdError(f"KeyID {keyid} is {other.name}'s", keyid=keyid)
        if not self._package.keys.is_programmed(keyid):
            raise KeyIdError(
                f"KeyID {keyid} has no key of its own",
                keyid=keyid,
                hint="program it first, or use KeyID 0 to share pages",
            )
