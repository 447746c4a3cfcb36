# SPDX-License-Identifier: GPL-2.0-or-later
"""What each request does to the platform; who may send it is decided in `mktme.service.server`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import numpy as np

from mktme.attest.identity import Identity
from mktme.datapath.inline import InlineDataPath
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.dram import REGION_ALIGN_BYTES, Dram, Region
from mktme.engine.errors import AddressError, MktmeError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.integrity import ENTRY_BYTES
from mktme.engine.keys import KeyMode
from mktme.engine.line_key import LineKey
from mktme.engine.nvdimm import Nvdimm
from mktme.engine.package import Package, PowerEvent
from mktme.engine.sidecar import sidecar_path, write_sidecar
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES, Algorithm
from mktme.service import wire
from mktme.service.attestation import Attestation
from mktme.service.captures import Captures
from mktme.service.custody import Custody
from mktme.service.drains import Drains, unlink
from mktme.service.keyids import KeyIds
from mktme.service.registers import Registers
from mktme.service.vms import Vm, describe, own_memory, vm_status
from mktme.service.vtpm import Vtpm, VtpmError


class Requests:
    """A platform's package, DRAM and VMs, and the requests about them.

    Args:
        dram: the DRAM image; this process is its only writer.
        config: what firmware sets up.
        custody: what is told of this process's memory.
        drains: how a VM's writes get into DRAM.
        announce: tells the control clients of an event.
        identity: who signs evidence; None for one that a CA of its own certifies.
        make_vtpm: makes a TPM for a VM.

    Attributes:
        captures: those of this DRAM.
        registers: what guests see of the package.
    """

    def __init__(
        self,
        dram: Dram,
        config: PlatformConfig,
        custody: Custody,
        drains: Drains,
        announce: Callable[[wire.Event], None],
        identity: Identity | None = None,
        make_vtpm: Callable[[UUID], Awaitable[Vtpm]] | None = None,
    ) -> None:
        self.dram = dram
        self.package = Package(dram, config)
        self.controller = self.package.controller
        self.vms: dict[UUID, Vm] = {}
        self._custody = custody
        self._drains = drains
        self._make_vtpm = make_vtpm
        self._keyids = KeyIds(self.package, self.vms, drains)
        self._attestation = Attestation(
            identity or Identity.create(), self.package, self.vms, self._keyids
        )
        self.registers = Registers(self.package, self._keyids, self.vms, drains)
        self.captures = Captures(
            dram,
            lambda vms: describe(dram, self.package, vms),
            self.vms,
            drains,
            self._keyids.lock,
            announce,
        )

    async def handle(self, request: wire.Command, client: object) -> wire.Reply:
        """Do what is asked.

        Args:
            request: what.
            client: who asks; `leave` when it is gone.

        Raises:
            MktmeError: it is refused, or failed.
        """
        match request:
            case wire.GetStatus():
                return self._status()
            case wire.AddVm():
                async with self._keyids.lock:
                    return await self._add_vm(request)
            case wire.AddVtpm(vm=uuid):
                return await self._add_vtpm(self._vm(uuid))
            case wire.RemoveVm(vm=uuid):
                async with self._keyids.lock:
                    leaving = self._vm(uuid)
                    await self._drains.persist(leaving)
                    await self._before_taken_out(leaving)
                    self._remove_vm(leaving)
                if leaving.vtpm is not None:
                    await leaving.vtpm.close()
            case wire.FlushVm(vm=uuid):
                await self._drains.flush(self._vm(uuid))
            case wire.ReadVm():
                return self._read_vm(request)
            case wire.ReadDram(address=address, size_bytes=size, keyid=keyid):
                return self._read(address, size, keyid)
            case wire.WriteDram(address=address, data=data, keyid=keyid):
                self.controller.write(address, data, keyid)
            case wire.ReadMarks():
                return self._marks(request)
            case wire.WriteSidecar():
                return self._write_sidecar()
            case wire.StartCapture(path=path, vms=uuids):
                return wire.CaptureStarted(capture=self.captures.start(path, uuids, client))
            case wire.VmsHeld(capture=number, problem=problem):
                await self.captures.vms_held(number, problem)
            case wire.VmsReleased(capture=number, pause_ns=pause_ns):
                self.captures.vms_released(number, pause_ns)
            case wire.CancelCapture(capture=number):
                self.captures.cancel(number)
            case wire.DecryptLines():
                return self._decrypt(request)
            case wire.ReadMsr(msr=msr):
                return wire.MsrValue(value=self.package.rdmsr(msr))
            case wire.WriteMsr(msr=msr, value=value):
                self.package.wrmsr(msr, value)
                self.registers.show_all()
            case wire.ExecutePconfig():
                return wire.PconfigDone(status=self._keyids.execute(request))
            case wire.ProgramKey():
                vm = None if request.vm is None else self._vm(request.vm)
                async with self._keyids.lock:
                    keyid = self._keyids.program(
                        request.mode, request.algorithm, request.key_file, request.keyid, vm
                    )
                    return wire.KeyProgrammed(keyid=keyid)
            case wire.ClearKey(keyid=keyid):
                async with self._keyids.lock:
                    self._keyids.clear(keyid)
            case wire.AssignPages():
                async with self._keyids.lock:
                    await self._keyids.assign(self._vm(request.vm), request)
            case wire.ReleasePage():
                self._release(request)
            case wire.DiscardMemory():
                await self._discard(request)
            case wire.PowerPlatform(event=event):
                async with self._keyids.lock:
                    leaving_vms = tuple(self.vms.values())
                    for one in leaving_vms:
                        await self._drains.persist(one)
                        await self._before_taken_out(one)
                    self._power(event)
                for one in leaving_vms:
                    if one.vtpm is not None:
                        await one.vtpm.close()
            case wire.DescribeDomain(vm=uuid, xml=xml):
                vm = self._vm(uuid)
                if vm.link is not None:
                    raise MktmeError(f"VM {vm.name} is linked: its domain is what it is")
                vm.domain = xml
            case wire.GetEvidence():
                return await self._attestation.evidence(request)
            case wire.GetIdentity():
                return self._attestation.identity()
            case wire.ReleaseKey():
                async with self._keyids.lock:
                    return await self._attestation.release(request)
        return wire.Done()

    def leave(self, client: object) -> None:
        """End what a client began and nobody waits for any more."""
        self.captures.leave(client)

    def close(self) -> None:
        """End every link, and every TPM."""
        for vm in self.vms.values():
            unlink(vm)
            self._take_out(vm)
            if vm.vtpm is not None:
                vm.vtpm.kill()

    def _vm(self, uuid: UUID) -> Vm:
        try:
            return self.vms[uuid]
        except KeyError:
            raise MktmeError(f"no VM {uuid} on this platform") from None

    async def _add_vm(self, request: wire.AddVm) -> wire.VmAdded:
        if request.vm in self.vms:
            raise MktmeError(f"VM {request.vm} is there already")
        if not request.name.isprintable():  # it gets into logs
            raise MktmeError("a VM's name is printable text")
        if request.memory_bytes <= 0 or request.memory_bytes % PAGE_BYTES:
            raise AddressError("memory is not whole pages", address=request.memory_bytes)
        if request.dimm_bytes % PAGE_BYTES:
            raise AddressError("DIMMs are not whole pages", address=request.dimm_bytes)
        _check_data_path(request)
        with ExitStack() as undo:
            nvdimm = self._known_nvdimm(request.nvdimm)
            if nvdimm is not None:
                undo.callback(nvdimm.close)
            region = await self._allocate(request, nvdimm)
            undo.callback(self.dram.free, region)
            keyid = 0
            # Without KeyIDs there is TME alone, or nothing: the VM is under the TME key.
            if request.mode is not KeyMode.PLATFORM or self.package.tme.mktme_keyids:
                keyid = self._keyids.program(request.mode, request.algorithm, request.key_file)
                undo.callback(self._keyids.clear, keyid)
            self.controller.assign(region.base, region.size_bytes, keyid)
            undo.callback(self.controller.assign, region.base, region.size_bytes, 0)
            if request.nvdimm is not None:
                wanted, base = request.nvdimm, region.base + request.memory_bytes
                if wanted.shared:
                    self.controller.assign(base, wanted.size_bytes, 0)
                algorithm = self._algorithm_at(base)
                if nvdimm is None:
                    nvdimm = Nvdimm.create(Path(wanted.path), wanted.size_bytes, base, algorithm)
                    undo.callback(nvdimm.close)
                nvdimm.check_algorithm(algorithm)
                self.dram.attach(base, nvdimm.cells)
            undo.pop_all()
        self.vms[request.vm] = Vm(
            uuid=request.vm,
            name=request.name,
            memory_bytes=request.memory_bytes,
            datapath=request.datapath,
            track=request.track,
            keyid=keyid,
            region=region,
            window_bytes=request.window_bytes or 0,
            policy=request.policy,
            nvdimm=nvdimm,
            dimm_bytes=request.dimm_bytes,
            visible=request.visible,
        )
        return wire.VmAdded(keyid=keyid, base=region.base)

    async def _add_vtpm(self, vm: Vm) -> wire.VtpmAdded:
        if self._make_vtpm is None or vm.vtpm is not None or vm.link is not None:
            raise VtpmError(f"VM {vm.name} has a TPM already, or runs without")
        vtpm = await self._make_vtpm(vm.uuid)
        if self.vms.get(vm.uuid) is not vm or vm.vtpm is not None or vm.link is not None:
            await vtpm.close()
            raise VtpmError(f"VM {vm.name} is another by now")
        vm.vtpm = vtpm
        return wire.VtpmAdded(socket=str(vtpm.socket), endorsement_key=vtpm.endorsement_key)

    def _known_nvdimm(self, wanted: wire.NvdimmFile | None) -> Nvdimm | None:
        """The NVDIMM that a VM asks for, if it was made before."""
        if wanted is None:
            return None
        path = Path(wanted.path)
        if not path.is_absolute() or wanted.size_bytes % REGION_ALIGN_BYTES:
            raise MktmeError("an NVDIMM is an absolute path and whole 2 MiB")
        try:
            is_known = path.exists() or sidecar_path(path).exists()
        except (OSError, ValueError) as error:  # ValueError: what no path can be
            raise MktmeError(f"no NVDIMM can be kept there: {error}") from error
        return Nvdimm.open(path, wanted.size_bytes) if is_known else None

    def _algorithm_at(self, address: int) -> Algorithm | None:
        """What the KeyID at an address, and all around it, is encrypted with."""
        keyid = self.controller.keyid_at(address)
        if keyid == 0 and self.package.tme.exclusion is not None:
            raise MktmeError("KeyID 0's encryption has an exclusion range: no NVDIMM is under it")
        cipher = self.package.keys.cipher(keyid)
        return None if cipher is None else cipher.algorithm

    async def _allocate(self, request: wire.AddVm, nvdimm: Nvdimm | None) -> Region:
        """Set aside a VM's RAM, and right behind it its NVDIMM, which lies where it always did."""
        size_bytes = request.memory_bytes + request.dimm_bytes
        if request.nvdimm is not None:
            size_bytes += request.nvdimm.size_bytes
        base = None
        if nvdimm is not None:
            base = nvdimm.base - request.memory_bytes
            if base < 0 or base + size_bytes > self.dram.size_bytes:
                raise AddressError(
                    f"{nvdimm.path} lies at {nvdimm.base:#x} of DRAM, and of"
                    f" {self.dram.size_bytes} bytes of it there are not {request.memory_bytes}"
                    f" below and {size_bytes - request.memory_bytes} above",
                    address=nvdimm.base,
                    hint="give the guest the memory that it had, or make DRAM larger",
                )
        await self.captures.save(self.dram.find_free(size_bytes, base))
        return self.dram.allocate(size_bytes, base)

    async def _before_taken_out(self, vm: Vm) -> None:
        if vm.nvdimm is not None:
            base = vm.region.base + vm.memory_bytes
            await self.captures.save(Region(base, vm.nvdimm.cells.size_bytes))

    def _take_out(self, vm: Vm) -> None:
        """Take a VM's NVDIMM, if it has one, out of DRAM."""
        if vm.nvdimm is not None:
            self.dram.detach(vm.nvdimm.cells)
            vm.nvdimm.close()

    def _remove_vm(self, vm: Vm) -> None:
        unlink(vm)
        self._take_out(vm)
        self._keyids.release(vm)
        self.dram.free(vm.region)
        del self.vms[vm.uuid]

    def _release(self, request: wire.ReleasePage) -> None:
        vm = self._vm(request.vm)
        if not isinstance(vm.path, InlineDataPath):
            raise MktmeError(f"VM {vm.name} has no window")
        vm.path.release(request.ram_offset // PAGE_BYTES)

    async def _discard(self, request: wire.DiscardMemory) -> None:
        vm, offset, size = self._vm(request.vm), request.ram_offset, request.size_bytes
        first = vm.region.size_bytes - vm.dimm_bytes
        if offset < first or size <= 0 or offset + size > vm.region.size_bytes:
            raise AddressError("no memory that could be unplugged", address=offset)
        if offset % PAGE_BYTES or size % PAGE_BYTES:
            raise AddressError("what is unplugged is whole pages", address=offset)
        async with vm.lock:
            await self.captures.save(Region(vm.region.base + offset, size))
            if vm.path is None:
                raise MktmeError(f"VM {vm.name} is not linked")
            vm.path.discard(offset // PAGE_BYTES, size // PAGE_BYTES)

    def _power(self, event: PowerEvent) -> None:
        for vm in tuple(self.vms.values()):
            unlink(vm)
            self._take_out(vm)
            self.dram.free(vm.region)
        self.vms.clear()
        self.package.power(event)

    def _status(self) -> wire.Status:
        pages = self.controller.page_counts()
        keys = self.package.keys.describe()
        return wire.Status(
            platform=self.package.config,
            custody=self._custody,
            keys=tuple(
                wire.KeyStatus(
                    keyid=one.keyid,
                    mode=one.mode,
                    algorithm=one.algorithm,
                    vm=self._keyids.owner(one.keyid),
                    pages=pages[one.keyid],
                )
                for one in keys
            ),
            keyids_free=self.package.tme.mktme_keyids - len(keys) + 1,
            vms=tuple(vm_status(vm, self.controller) for vm in self.vms.values()),
            dram_bytes=self.dram.size_bytes,
            memory=own_memory(),
            cpu_s=time.process_time(),
        )

    def _read_vm(self, request: wire.ReadVm) -> wire.Data:
        vm = self._vm(request.vm)
        offset, size = request.ram_offset, request.size_bytes
        if offset < 0 or offset + size > vm.region.size_bytes:
            raise AddressError(f"no read of {size} bytes at RAM offset {offset:#x}", address=offset)
        return self._read(vm.region.base + offset, size, request.keyid)

    def _read(self, address: int, size_bytes: int, keyid: int | None) -> wire.Data:
        if address < 0 or size_bytes <= 0 or address % PAGE_BYTES or size_bytes % PAGE_BYTES:
            raise AddressError("a read is of whole pages", address=address)
        if size_bytes > wire.READ_MAX_BYTES:
            raise AddressError(f"{size_bytes} bytes are too many for one read", address=address)
        plaintext = self.controller.read_pages(
            address // PAGE_BYTES, size_bytes // PAGE_BYTES, keyid=keyid
        )
        return wire.Data(data=plaintext.tobytes())

    def _decrypt(self, request: wire.DecryptLines) -> wire.Decrypted:
        if not request.data or len(request.data) % LINE_BYTES or request.address % LINE_BYTES:
            raise AddressError("what is decrypted is whole lines", address=request.address)
        lines = np.frombuffer(request.data, "<u8").reshape(-1, LINE_BYTES // 8).copy()
        addresses = request.address + np.arange(len(lines), dtype=np.uint64) * LINE_BYTES
        key = LineKey(
            self.package.keys.cipher(request.keyid), self.package.keys.macs(request.keyid)
        )
        entries = None
        if request.entries is not None:
            if len(request.entries) != len(lines) * ENTRY_BYTES:
                raise AddressError("a line has one MAC", address=request.address)
            entries = np.frombuffer(request.entries, "<u4")
        bad = key.decrypt(lines, addresses, entries)
        return wire.Decrypted(data=lines.tobytes(), bad=b"" if bad is None else bad.tobytes())

    def _marks(self, request: wire.ReadMarks) -> wire.Data:
        vm = self._vm(request.vm)
        first, count = request.first_page, request.page_count
        if first < 0 or not 0 < count <= wire.READ_MAX_BYTES // 8:
            raise AddressError(f"no {count} pages of marks at page {first}", address=first)
        if first + count > vm.region.size_bytes // PAGE_BYTES:
            raise AddressError("marks past the end of RAM", address=first)
        if vm.path is None:
            raise MktmeError(f"VM {vm.name} is not linked")
        return wire.Data(data=vm.path.line_marks(first, count).tobytes())

    def _write_sidecar(self) -> wire.SidecarWritten:
        path = sidecar_path(self.dram.path)
        write_sidecar(path, describe(self.dram, self.package, self.vms.values()))
        return wire.SidecarWritten(path=str(path))


def _check_data_path(request: wire.AddVm) -> None:
    """Check what a VM asks of its data path.

    Raises:
        MktmeError: it does not go together.
    """
    window = request.window_bytes
    if request.datapath is DataPath.SHADOW:
        if request.track is None or window is not None:
            raise MktmeError("the shadow data path has a tracker and no window")
        return
    if request.track not in (None, Track.STORES):
        raise MktmeError("the inline data path needs no page tracker")
    if window is None or window % PAGE_BYTES or not 0 < window <= request.memory_bytes:
        raise AddressError("a window is whole pages, and no more than RAM", address=window or 0)
