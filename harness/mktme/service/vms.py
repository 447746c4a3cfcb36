# SPDX-License-Identifier: GPL-2.0-or-later
"""What the engine process holds of each VM, and how it describes that to others."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from mktme.attest.claims import Launch
from mktme.attest.measure import Observation
from mktme.datapath.inline import InlineDataPath, Poison
from mktme.datapath.kinds import DataPath
from mktme.datapath.link import VmLink
from mktme.datapath.registers import RegisterPage
from mktme.datapath.shadow import DrainPacer, ShadowDataPath, Track
from mktme.datapath.window import Policy
from mktme.engine.controller import MemoryController
from mktme.engine.dram import Dram, Region, mac_path
from mktme.engine.nvdimm import Nvdimm
from mktme.engine.package import Package
from mktme.engine.pages import first_line
from mktme.engine.sidecar import (
    ExclusionRecord,
    GuestSegment,
    IntegrityRecord,
    ModuleRecord,
    PlatformRecord,
    Sidecar,
    VmRecord,
)
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.service import wire
from mktme.service.vtpm import Vtpm

AnyDataPath: TypeAlias = ShadowDataPath | InlineDataPath


def _new_recipient() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(slots=True)
class Vm:
    """One VM of the platform; `link` and `path` are there while its QEMU is.

    Its region is its RAM, `memory_bytes`, then its NVDIMM if it has one, then `dimm_bytes` for what
    can be plugged in. Whoever encrypts to `recipient` knows that nobody but this engine reads it.
    A `visible` one's guest sees the platform's registers.
    """

    uuid: UUID
    name: str
    memory_bytes: int
    datapath: DataPath
    track: Track | None
    keyid: int
    region: Region
    window_bytes: int = 0
    policy: Policy = Policy.TWO_QUEUES
    nvdimm: Nvdimm | None = None
    dimm_bytes: int = 0
    vtpm: Vtpm | None = None
    visible: bool = False
    further_keyids: list[int] = field(default_factory=list)
    link: VmLink | None = None
    registers: RegisterPage | None = None
    path: AnyDataPath | None = None
    follower: asyncio.Task[None] | None = None
    connection: socket.socket | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    pacer: DrainPacer = field(default_factory=DrainPacer)
    drain_s: float = 0.0
    full: bool = False
    fault: str | None = None
    domain: str | None = None  # libvirt's XML
    observation: Observation | None = None
    launch: Launch | None = None  # once it was measured
    unmeasured: str = "its QEMU is not linked"  # why there is no observation
    recipient: ec.EllipticCurvePrivateKey = field(default_factory=_new_recipient, repr=False)

    def renew_recipient(self) -> None:
        """Make another recipient key: what was encrypted to the old one is lost with it."""
        self.recipient = _new_recipient()

    @property
    def nvdimm_pages(self) -> tuple[int, int]:
        """Its NVDIMM's first page and how many there are, in RAM offsets."""
        size_bytes = 0 if self.nvdimm is None else self.nvdimm.size_bytes
        return self.memory_bytes // PAGE_BYTES, size_bytes // PAGE_BYTES

    def poisoned(self, poison: Poison) -> wire.PagePoisoned:
        """What control clients are told of a page whose integrity check failed."""
        address = self.region.base + poison.page * PAGE_BYTES
        return wire.PagePoisoned(
            vm=self.uuid,
            ram_offset=poison.page * PAGE_BYTES,
            address=address + first_line(poison.lines) * LINE_BYTES,
            keyid=poison.keyid,
            lines=poison.lines,
            kind=poison.kind,
        )


def describe(dram: Dram, package: Package, vms: Collection[Vm]) -> Sidecar:
    """All that it takes, besides the keys, to read the DRAM image as it is now."""
    exclusion = package.tme.exclusion
    keys = package.keys.describe()
    has_integrity = any(one.algorithm and one.algorithm.has_integrity for one in keys)
    return Sidecar(
        platform=PlatformRecord(
            maxphyaddr=package.controller.maxphyaddr,
            keyid_bits=package.keys.keyid_bits,
            dram_bytes=dram.size_bytes,
        ),
        keys=keys,
        exclusion=None
        if exclusion is None
        else ExclusionRecord(mask=exclusion.mask, base=exclusion.base),
        vms=tuple(
            VmRecord(
                uuid=vm.uuid,
                name=vm.name,
                base=vm.region.base,
                size_bytes=vm.region.size_bytes,
                keyid=vm.keyid,
                segments=() if vm.link is None else _segments(vm.link),
            )
            for vm in vms
        ),
        pages=package.controller.page_ranges(),
        integrity=IntegrityRecord(file=mac_path(dram.path).name) if has_integrity else None,
        modules=tuple(
            ModuleRecord(base=one.base, size_bytes=one.size_bytes, file=str(one.path))
            for one in (vm.nvdimm for vm in vms)
            if one is not None
        ),
    )


def own_memory() -> wire.Memory:
    """This process's memory as the kernel accounts for it (proc(5), /proc/PID/status)."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0]) * 1024
    return wire.Memory(
        anonymous=fields["RssAnon"],
        file=fields["RssFile"],
        shared=fields["RssShmem"],
        peak=fields["VmHWM"],
    )


def vm_status(vm: Vm, controller: MemoryController) -> wire.VmStatus:
    """What control clients are told of a VM."""
    status = wire.VmStatus(
        vm=vm.uuid,
        name=vm.name,
        keyid=vm.keyid,
        base=vm.region.base,
        memory_bytes=vm.memory_bytes,
        datapath=vm.datapath,
        track=vm.track,
        linked=vm.link is not None,
        further_keyids=tuple(vm.further_keyids),
        pages=controller.page_ranges(vm.region)[: wire.PAGE_RANGES_MAX],
        fault=vm.fault,
    )
    if vm.link is None or vm.path is None:
        return status
    status = msgspec.structs.replace(
        status,
        qemu_pid=vm.link.qemu_pid,
        plugin_api=vm.link.hello.plugin_api,
        segments=_segments(vm.link),
    )
    counters = vm.link.counters()
    stores = {} if counters is None else dataclasses.asdict(counters)
    if isinstance(vm.path, InlineDataPath):
        window = vm.path.window
        paging = wire.Paging(
            service_s=vm.drain_s,
            policy=window.policy,
            window_bytes=window.capacity_pages * PAGE_BYTES,
            resident_bytes=window.resident_pages * PAGE_BYTES,
            peak_bytes=window.peak_pages * PAGE_BYTES,
            fault_median_s=vm.path.service_times.percentile(0.5),
            fault_p99_s=vm.path.service_times.percentile(0.99),
            **dataclasses.asdict(vm.path.counters),
            **stores,
        )
        return msgspec.structs.replace(status, paging=paging)
    traffic = wire.Traffic(
        drain_s=vm.drain_s,
        interval_s=vm.pacer.interval_s,
        pending_pages=vm.path.pending_pages,
        **dataclasses.asdict(vm.path.counters),
        **stores,
    )
    return msgspec.structs.replace(status, traffic=traffic)


def _segments(link: VmLink) -> tuple[GuestSegment, ...]:
    return tuple(GuestSegment(**dataclasses.asdict(segment)) for segment in link.hello.segments)
