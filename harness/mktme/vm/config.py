# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest as its user asks for it, and whether there can be such a one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import Policy
from mktme.engine.dram import REGION_ALIGN_BYTES
from mktme.engine.keys import KeyMode
from mktme.engine.xts import PAGE_BYTES, Algorithm
from mktme.vm.disk_images import DiskImage
from mktme.vm.guest_map import DIMM_STEP_BYTES
from mktme.vm.hardware import USUAL_HARDWARE, Firmware, Hardware
from mktme.vm.host import UsageError
from mktme.vm.images import GuestImage
from mktme.vm.pages import GuestPages
from mktme.vm.sizes import parse_size
from mktme.vm.ssh import check_port

# An instruction and its operands, page tables, and a device's buffers at once, many times over.
MIN_WINDOW_BYTES: Final = 4 << 20
MIN_MEMORY_BYTES: Final = 192 << 20  # with less, Linux has too little left for the workload
BOOT_TIMEOUT_S: Final = 120.0
"""For a guest whose kernel QEMU loads."""
DISK_BOOT_TIMEOUT_S: Final = 600.0
"""For one that boots its disk, to ssh."""
MIN_DISK_MEMORY_BYTES: Final = 256 << 20
# libvirt gives x86 guests their memory in steps of 1 MiB (qemuDomainGetMemorySizeAlignment).
_MEMORY_STEP_BYTES: Final = 1 << 20
# Where memory may come above 4 GiB, Linux keeps as much for devices that do not reach there.
_SWIOTLB_BYTES: Final = 64 << 20
MAX_DIMMS: Final = 7  # with an NVDIMM, the plugin's MKTME_MAX_MODULES
_NVDIMM_HINT: Final = "write it as FILE:SIZE, such as pmem.img:64M; sizes are whole 2 MiB"


@dataclass(frozen=True, slots=True)
class Nvdimm:
    """An NVDIMM as asked for: memory that outlives its guest.

    Attributes:
        path: its image, with a description and MACs beside it; made if it is not there.
        size_bytes: its size, whole 2 MiB.
        shared: whether it is under the TME key (KeyID 0) and not under the guest's.
    """

    path: Path
    size_bytes: int
    shared: bool = False


def parse_nvdimm(text: str) -> Nvdimm:
    """An NVDIMM as people write it: FILE:SIZE.

    Raises:
        UsageError: it is none.
    """
    path, _, size = text.rpartition(":")
    if not path:
        raise UsageError(f"{text!r} is no NVDIMM", hint=_NVDIMM_HINT)
    nvdimm = Nvdimm(Path(path), parse_size(size))
    _check_nvdimm(nvdimm)
    return nvdimm


def _check_nvdimm(nvdimm: Nvdimm) -> None:
    if nvdimm.size_bytes <= 0 or nvdimm.size_bytes % REGION_ALIGN_BYTES:
        raise UsageError(
            f"{nvdimm.size_bytes} bytes of NVDIMM are not whole 2 MiB", hint=_NVDIMM_HINT
        )


@dataclass(frozen=True, slots=True)
class VmConfig:
    """A guest as asked for.

    Attributes:
        image: what it boots.
        memory_bytes: its RAM.
        vcpus: how many.
        datapath: how its memory reaches the engine.
        track: `shadow`: what tells of writes, None for plain QEMU without plugin or engine.
            `inline`: stores, to count them, or None.
        window_bytes: `inline`: the most plaintext there may be; None for a quarter of its RAM.
        policy: `inline`: which pages leave a full window.
        algorithm: of its KeyID.
        mode: how its KeyID is programmed; `KeyMode.PLATFORM` on a platform that has no KeyIDs.
        key_file: the known key, for `KeyMode.DIRECT`.
        pages: ranges of its pages that are under another KeyID than its own.
        check_tlb: have the plugin compare each translation it caches with QEMU's.
        disk: a raw image for it to have as a virtio disk, None for a guest without.
        hardware: its chipset, firmware and further devices.
        ssh_port: of the loopback interface, for a guest that boots its disk; None for any.
        authorized_keys: who else may log in to such a guest: lines of authorized_keys.
        boot_timeout_s: how long it may take to its shell; None for what is plenty.
        nvdimm: memory that outlives it, None for a guest without.
        dimms: sizes of memory that can be plugged in while it runs (`Vm.plug_in`).
        visible: whether it sees the platform's memory encryption (`mktme.vm.visible`).
    """

    image: GuestImage | DiskImage
    memory_bytes: int = 512 << 20
    vcpus: int = 1
    datapath: DataPath = DataPath.SHADOW
    track: Track | None = Track.STORES_AND_PAGES
    window_bytes: int | None = None
    policy: Policy = Policy.TWO_QUEUES
    algorithm: Algorithm = Algorithm.AES_XTS_128
    mode: KeyMode = KeyMode.RANDOM
    key_file: Path | None = None
    pages: tuple[GuestPages, ...] = ()
    check_tlb: bool = False
    disk: Path | None = None
    hardware: Hardware = USUAL_HARDWARE
    ssh_port: int | None = None
    authorized_keys: tuple[str, ...] = ()
    boot_timeout_s: float | None = None
    nvdimm: Nvdimm | None = None
    dimms: tuple[int, ...] = ()
    visible: bool = False

    @property
    def boot_deadline_s(self) -> float:
        """How long it may take to its shell: many times what it takes on an idle machine."""
        if self.boot_timeout_s is not None:
            return self.boot_timeout_s
        return BOOT_TIMEOUT_S if isinstance(self.image, GuestImage) else DISK_BOOT_TIMEOUT_S

    @property
    def nvdimm_bytes(self) -> int:
        """Size of its NVDIMM, 0 without one."""
        return 0 if self.nvdimm is None else self.nvdimm.size_bytes

    @property
    def all_bytes(self) -> int:
        """Its RAM, NVDIMM and DIMMs, plugged in or not: what it takes of DRAM."""
        return self.memory_bytes + self.nvdimm_bytes + sum(self.dimms)

    @property
    def plain(self) -> bool:
        """Whether it runs without plugin and engine."""
        return self.datapath is DataPath.SHADOW and self.track is None


def check_config(config: VmConfig) -> None:
    """Check what a guest is asked to be before anything is started.

    Raises:
        UsageError: with the nearest value that would do.
    """
    check_sizes(config.memory_bytes, config.vcpus)
    if (config.mode is KeyMode.DIRECT) != (config.key_file is not None):
        raise UsageError("a known key and key mode direct go together")
    check_data_path(config.datapath, config.track, config.window_bytes, config.memory_bytes)
    for pages in config.pages:
        pages.ram_offset(config.memory_bytes, config.hardware.machine)
    if isinstance(config.image, GuestImage):
        if (
            config.ssh_port is not None
            or config.authorized_keys
            or config.hardware.firmware is not Firmware.BIOS
        ):
            raise UsageError(
                f"{config.image.name} boots from no disk: it has neither firmware nor ssh",
                hint="--guest debian-12, or --image FILE",
            )
    elif config.memory_bytes < MIN_DISK_MEMORY_BYTES:
        raise UsageError(
            f"{config.memory_bytes >> 20} MiB are too little for {config.image.name}",
            hint=f"--memory {MIN_DISK_MEMORY_BYTES >> 20}M or more",
        )
    if config.hardware.vtpm and (config.plain or config.hardware.firmware is not Firmware.UEFI):
        raise UsageError(
            "a vTPM is the engine's, and measures a boot by UEFI",
            hint="--guest debian-12 --firmware uefi",
        )
    if config.ssh_port is not None:
        check_port(config.ssh_port)
    if config.pages and config.plain:
        raise UsageError("pages of a plain guest have no KeyIDs")
    if config.visible and config.plain:
        raise UsageError("a plain guest has no platform to see")
    if config.nvdimm is not None:
        if config.plain:
            raise UsageError("an NVDIMM of a plain guest would not be encrypted")
        _check_nvdimm(config.nvdimm)
    if any(size <= 0 or size % DIMM_STEP_BYTES for size in config.dimms):
        raise UsageError(
            "a DIMM is whole 128 MiB: Linux takes no less", hint="give multiples of 128M"
        )
    if len(config.dimms) > MAX_DIMMS:
        raise UsageError(f"at most {MAX_DIMMS} DIMMs can be plugged in")
    if config.dimms and config.plain:
        raise UsageError("DIMMs are for guests with an engine")
    least = MIN_MEMORY_BYTES + _SWIOTLB_BYTES
    if (config.nvdimm is not None or config.dimms) and config.memory_bytes < least:
        raise UsageError(
            f"{config.memory_bytes >> 20} MiB are too little for a guest with memory devices",
            hint=f"--memory {least >> 20}M or more",
        )


def check_data_path(
    datapath: DataPath, track: Track | None, window_bytes: int | None, memory_bytes: int
) -> None:
    """Check a guest's data path, as `check_config` does."""
    if datapath is DataPath.SHADOW:
        if window_bytes is not None:
            raise UsageError("the shadow data path has no window", hint="--datapath inline")
        return
    if track is not None and track is not Track.STORES:
        raise UsageError(
            "the inline data path needs no page tracker", hint="--track stores, or leave it out"
        )
    if window_bytes is not None and (
        window_bytes % PAGE_BYTES or not MIN_WINDOW_BYTES <= window_bytes <= memory_bytes
    ):
        if window_bytes % PAGE_BYTES:
            what = f"not whole pages of {PAGE_BYTES} bytes"
        elif window_bytes < MIN_WINDOW_BYTES:
            what = "too small for a guest to run in"
        else:
            what = f"larger than the guest's {memory_bytes >> 20}M of memory"
        raise UsageError(
            f"a window of {window_bytes} bytes is {what}",
            hint=f"--window {MIN_WINDOW_BYTES >> 20}M to {memory_bytes >> 20}M, in whole pages,"
            " or a share such as 25%",
        )


def with_window(config: VmConfig) -> VmConfig:
    """Give an `inline` guest that has none the window that is usual: a quarter of its RAM."""
    if config.datapath is DataPath.SHADOW or config.window_bytes is not None:
        return config
    return dataclasses.replace(config, window_bytes=config.memory_bytes // 4)


def check_sizes(memory_bytes: int, vcpus: int) -> None:
    """Check a guest's memory and vCPUs, as `check_config` does."""
    nearest = max(MIN_MEMORY_BYTES, memory_bytes) >> 20
    if memory_bytes % PAGE_BYTES:
        raise UsageError(
            f"{memory_bytes} bytes of memory are not whole pages of {PAGE_BYTES} bytes",
            hint=f"--memory {nearest}M",
        )
    if memory_bytes % _MEMORY_STEP_BYTES:
        raise UsageError(
            f"{memory_bytes} bytes of memory are not whole MiB, and libvirt gives no less",
            hint=f"--memory {nearest}M",
        )
    if memory_bytes < MIN_MEMORY_BYTES:
        raise UsageError(
            f"{memory_bytes >> 20} MiB are too little for a guest",
            hint=f"--memory {MIN_MEMORY_BYTES >> 20}M or more",
        )
    if not 1 <= vcpus <= 255:
        raise UsageError(f"{vcpus} vCPUs", hint="--vcpus 1 to 255")


def region_bytes(memory_bytes: int) -> int:
    """What a guest takes of DRAM: its RAM, up to the allocator's next boundary."""
    return -(-memory_bytes // REGION_ALIGN_BYTES) * REGION_ALIGN_BYTES
