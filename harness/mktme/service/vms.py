# SPDX-License-Identifier: GPL-2.0-or-later
"""What the engine process holds of each VM, and how it describes that to others."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import msgspec

from mktme.datapath.link import VmLink
from mktme.datapath.shadow import DrainPacer, ShadowDataPath, Track
from mktme.engine.controller import MemoryController
from mktme.engine.dram import Dram, GuestSegment, PlatformRecord, Region, Sidecar, VmRecord
from mktme.engine.keys import KeyTable
from mktme.service import wire


@dataclass(slots=True)
class Vm:
    """One VM of the platform; `link` and `path` are there while its QEMU is."""

    uuid: UUID
    name: str
    memory_bytes: int
    track: Track
    keyid: int
    region: Region
    link: VmLink | None = None
    path: ShadowDataPath | None = None
    follower: asyncio.Task[None] | None = None
    connection: socket.socket | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    pacer: DrainPacer = field(default_factory=DrainPacer)
    drain_s: float = 0.0
    full: bool = False
    fault: str | None = None


def describe(
    dram: Dram, controller: MemoryController, keys: KeyTable, vms: Iterable[Vm]
) -> Sidecar:
    """All that it takes, besides the keys, to read the DRAM image as it is now."""
    return Sidecar(
        platform=PlatformRecord(
            maxphyaddr=controller.maxphyaddr,
            keyid_bits=keys.keyid_bits,
            dram_bytes=dram.size_bytes,
        ),
        keys=keys.describe(),
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
        pages=controller.page_ranges(),
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


def vm_status(vm: Vm) -> wire.VmStatus:
    """What control clients are told of a VM."""
    status = wire.VmStatus(
        vm=vm.uuid,
        name=vm.name,
        keyid=vm.keyid,
        base=vm.region.base,
        memory_bytes=vm.memory_bytes,
        track=vm.track,
        linked=vm.link is not None,
        fault=vm.fault,
    )
    if vm.link is None or vm.path is None:
        return status
    counters = vm.link.counters()
    return msgspec.structs.replace(
        status,
        qemu_pid=vm.link.qemu_pid,
        plugin_api=vm.link.hello.plugin_api,
        segments=_segments(vm.link),
        traffic=wire.Traffic(
            drain_s=vm.drain_s,
            interval_s=vm.pacer.interval_s,
            pending_pages=vm.path.pending_pages,
            **dataclasses.asdict(vm.path.counters),
            **({} if counters is None else dataclasses.asdict(counters)),
        ),
    )


def _segments(link: VmLink) -> tuple[GuestSegment, ...]:
    return tuple(GuestSegment(**dataclasses.asdict(segment)) for segment in link.hello.segments)
