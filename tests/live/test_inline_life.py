# SPDX-License-Identifier: GPL-2.0-or-later
"""What else happens to a guest's memory in its life: all of it goes through the data path.

Ballooning, free page reporting, DMA, reset, reboot, snapshots. Firmware and kernel, too: QEMU puts
both into guest memory through the firmware configuration device's DMA, at each boot after the
userfaultfd is there, so a guest that boots, and one that boots again, has shown that.

Each is done to an `inline` guest whose window is a small part of its memory, and to a `shadow` one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import pytest

from mktme.datapath.kinds import DataPath
from mktme.proof.confidentiality import Canary, search_dram
from mktme.proof.guest_ram import memory_of
from mktme.proof.residency import sampled
from mktme.proof.transparency import compare_memory, run_workload
from mktme.pytest_plugin import vm_config
from mktme.vm.config import BOOT_TIMEOUT_S
from mktme.vm.console import Console
from mktme.vm.images import GuestImage
from mktme.vm.platform import Platform, Vm
from mktme.vm.snapshots import Snapshots

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB: Final = 1 << 20
PAGE: Final = 4096
LINE: Final = 64
MEMORY: Final = 256 * MIB
WINDOW: Final = 24 * MIB
BIG: Final = 120 * MIB
TIMEOUT_S: Final = 120.0
POLL_S: Final = 0.05
BALLOON_DRIVER: Final = "modprobe -a virtio_pci virtio_balloon"
DISK_DRIVER: Final = "modprobe -a virtio_pci virtio_blk"

data_paths = pytest.mark.parametrize(
    "datapath", ["inline", pytest.param("shadow", marks=pytest.mark.nightly)]
)


@contextlib.contextmanager
def guest(
    datapath: str, disk: Path | None = None, track: str = ""
) -> Iterator[tuple[Platform, Vm]]:
    """A guest that has booted; if it is an inline one, its window holds throughout."""
    inline = datapath == "inline"
    config = vm_config(
        memory=f"{MEMORY >> 20}M",
        datapath=datapath,
        track=track,
        window=f"{WINDOW >> 20}M" if inline else None,
    )
    # By default Debian's kernel has its CPU clear every page that is allocated: what a device then
    # writes to it would have been stored to, too.
    assert isinstance(config.image, GuestImage)
    image = dataclasses.replace(config.image, cmdline=f"{config.image.cmdline} init_on_alloc=0")
    config = dataclasses.replace(config, image=image, disk=disk)
    with Platform(MEMORY) as platform, platform.launch(config, boot=False) as vm, bounded(vm):
        vm.domain.boot(BOOT_TIMEOUT_S)
        yield platform, vm


@contextlib.contextmanager
def bounded(vm: Vm) -> Iterator[None]:
    """Sample an inline guest's memory for as long as the `with` lasts: never over the window."""
    if vm.config.datapath is DataPath.SHADOW:
        yield
        return
    with sampled(vm, WINDOW) as bound:
        yield
    assert bound.passed, bound
    assert bound.peak_bytes > WINDOW // 2


def check_memory(vm: Vm) -> None:
    with vm.held() as engine:
        found = compare_memory(vm, engine)
    assert found.passed, found


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody tells of."""
    never = threading.Event()
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        never.wait(POLL_S)


def pages_vanished(vm: Vm) -> int:
    """Pages that the guest gave back and that DRAM has forgotten; of a shadow VM, at a flush."""
    if vm.config.datapath is DataPath.SHADOW:
        vm.require_engine().flush(vm.uuid)
    status = vm.status()
    if status.paging is not None:
        return status.paging.pages_vanished
    assert status.traffic is not None
    return status.traffic.pages_vanished


def meminfo(console: Console, field: str) -> int:
    """A field of /proc/meminfo, in bytes."""
    line = console.run(f"grep ^{field}: /proc/meminfo", timeout_s=30).output
    kib = int(line.split()[1])
    return kib << 10


def fill(console: Console, path: str, mib: int) -> None:
    """Fill a file with copies of the canary page."""
    # A process for each page would take longer than all the rest.
    double = "for i in $(seq 8); do cat /tmp/mib /tmp/mib >/tmp/more; mv /tmp/more /tmp/mib; done"
    console.run(f"cp /run/canary /tmp/mib; {double}", TIMEOUT_S)
    console.run(f"for i in $(seq {mib}); do cat /tmp/mib; done >{path}; rm /tmp/mib", TIMEOUT_S)


def find(vm: Vm, canary: Canary) -> list[int]:
    """RAM offsets of a held guest's pages that are the canary page."""
    with memory_of(vm) as memory:
        return list(memory.find_pages(canary.page))


def sum_of(console: Console, path: str) -> str:
    return console.run(f"sha256sum <{path}", TIMEOUT_S).output.split()[0]


def compute(console: Console) -> None:
    """Have a guest go on, with something that is known: as much as tells whether it still can."""
    expected = hashlib.sha256(b"".join(b"%d\n" % number for number in range(1, 30_001)))
    output = console.run("seq 30000 | gzip | gunzip | sha256sum", TIMEOUT_S).output
    assert output.split()[0] == expected.hexdigest()


def boot_id(console: Console) -> str:
    return console.run("cat /proc/sys/kernel/random/boot_id", timeout_s=30).output.strip()


class PhysicalMemory:
    """A guest's memory by physical address, as its CPU sees it: /proc/kcore (proc(5)).

    Its free pages can be read there, too. KASLR has its direct map somewhere else at each boot.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        # struct elf64_phdr: type, flags, offset, vaddr, paddr, filesz, memsz, align (elf(5)).
        size = struct.calcsize("<IIQQQQQQ")
        header = self._bytes("head -c 64 /proc/kcore")
        (table,), (count,) = (
            struct.unpack_from("<Q", header, 0x20),
            struct.unpack_from("<H", header, 0x38),
        )
        headers = self._bytes(f"head -c {table + count * size} /proc/kcore")[table:]
        loaded = [one for one in struct.iter_unpack("<IIQQQQQQ", headers) if one[0] == 1]
        # What is mapped elsewhere has -1 for a physical address.
        self._maps: list[tuple[int, int, int]] = [
            (one[4], one[5], one[2]) for one in loaded if one[4] != (1 << 64) - 1
        ]

    def sums(self, addresses: list[int]) -> list[str]:
        """The SHA-256 of pages, by their addresses."""
        numbers = " ".join(str(self._offset(address) // PAGE) for address in addresses)
        command = "dd if=/proc/kcore bs=4096 count=1 skip=$n 2>/dev/null | sha256sum"
        output = self._console.run(f"for n in {numbers}; do {command}; done", TIMEOUT_S).output
        return [line.split()[0] for line in output.splitlines()]

    def _offset(self, address: int) -> int:
        """Where a physical address is in the file; the kernel's text is there twice."""
        return next(
            offset + address - start
            for start, size, offset in self._maps
            if start <= address < start + size
        )

    def _bytes(self, command: str) -> bytes:
        output = self._console.run(f"{command} | od -An -v -tx1", timeout_s=30).output
        return bytes.fromhex("".join(output.split()))


def sum_of_page(page: bytes) -> str:
    return hashlib.sha256(page).hexdigest()


# --- given back -----------------------------------------------------------------------------------


@data_paths
def test_ballooned_memory_is_gone(datapath: str) -> None:
    """What the balloon takes vanishes from DRAM as well, and what it leaves stays as it was."""
    kept, freed = Canary.random(), Canary.random()
    with guest(datapath) as (platform, vm):
        console = vm.domain.console
        console.run(BALLOON_DRIVER, timeout_s=30)
        freed.plant(console)
        fill(console, "/tmp/freed", 64)
        kept.plant(console)
        fill(console, "/tmp/kept", 16)
        kept_sum = sum_of(console, "/tmp/kept")
        total = meminfo(console, "MemTotal")
        with vm.held():
            held_before = find(vm, freed)
        assert len(held_before) >= 64 * MIB // PAGE
        before = pages_vanished(vm)
        dram_before = os.stat(platform.dram_path).st_blocks * 512

        target = MEMORY - 128 * MIB
        console.run("rm /tmp/freed", timeout_s=30)
        vm.domain.balloon(target, TIMEOUT_S)

        assert meminfo(console, "MemTotal") == total - 128 * MIB
        assert meminfo(console, "MemAvailable") < BIG
        assert sum_of(console, "/tmp/kept") == kept_sum
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed
            left = find(vm, freed)
            gone = sorted(set(held_before) - set(left))
            assert len(gone) > len(held_before) * 3 // 4
            if datapath == "inline":
                with platform.dram_path.open("rb") as dram:
                    never_written = [
                        offset for offset in gone if is_never_written(dram, vm.base + offset)
                    ]
                assert len(never_written) > len(gone) * 3 // 4
                assert engine.read(vm.uuid, never_written[0], PAGE) == bytes(PAGE)
        # The rest of the 128 MiB was not in use, or reported as free before.
        assert pages_vanished(vm) - before >= 64 * MIB // PAGE
        if datapath == "inline":
            dram_now = os.stat(platform.dram_path).st_blocks * 512
            assert dram_now < dram_before - 48 * MIB

        vm.domain.balloon(MEMORY, TIMEOUT_S)
        assert meminfo(console, "MemTotal") == total
        # More than it had left a moment ago.
        console.run(f"head -c {BIG} /dev/zero | tr '\\0' a >/tmp/big", TIMEOUT_S)
        assert sum_of(console, "/tmp/big") == hashlib.sha256(b"a" * BIG).hexdigest()
        console.run("rm /tmp/big", timeout_s=30)
        assert sum_of(console, "/tmp/kept") == kept_sum
        compute(console)
        check_memory(vm)


def is_never_written(dram: BinaryIO, address: int) -> bool:
    """Whether a page of DRAM holds nothing, not even ciphertext of zeros."""
    return os.pread(dram.fileno(), PAGE, address) == bytes(PAGE)


@data_paths
def test_reported_free_pages_read_as_zeros(datapath: str) -> None:
    """A free page that Linux reported is zeros when its CPU looks at it, and works when reused."""
    canary = Canary.random()
    with guest(datapath) as (_platform, vm):
        console = vm.domain.console
        console.run(BALLOON_DRIVER, timeout_s=30)
        canary.plant(console)
        fill(console, "/tmp/fill", 64)
        with vm.held():
            found = find(vm, canary)
        physical = PhysicalMemory(console)
        some = random.Random(0).sample(found, 64)
        # Some are free already: of what was copied.
        pages = [
            page
            for page, its_sum in zip(some, physical.sums(some), strict=True)
            if its_sum == sum_of_page(canary.page)
        ]
        assert len(pages) > 48
        before = pages_vanished(vm)

        console.run("rm /tmp/fill", timeout_s=30)
        # Of what is free, Linux reports blocks of 2 MiB, of which a part of the file's pages are.
        until(lambda: pages_vanished(vm) - before > 24 * MIB // PAGE)

        sums = physical.sums(pages)
        assert sums.count(sum_of_page(bytes(PAGE))) > len(sums) // 4
        with vm.held() as engine:
            in_dram = [engine.read(vm.uuid, page, PAGE) for page in pages]
            assert in_dram.count(bytes(PAGE)) > len(pages) // 4
            assert compare_memory(vm, engine).passed
        # Reused, they are the guest's memory as any.
        canary = Canary.random()
        canary.plant(console)
        fill(console, "/tmp/fill", 96)
        assert sum_of(console, "/tmp/fill") == hashlib.sha256(canary.page * (96 * 256)).hexdigest()
        console.run("rm /tmp/fill", timeout_s=30)
        compute(console)
        check_memory(vm)


# --- written by devices ---------------------------------------------------------------------------


@pytest.mark.parametrize(("datapath", "track"), [("inline", "stores"), ("shadow", "stores+pages")])
def test_dma_of_a_disk(datapath: str, track: str, tmp_path: Path) -> None:
    """A disk's DMA puts more than the window into memory, and takes it from there."""
    size = 48 * MIB
    data = random.Random(1).randbytes(size)
    disk = tmp_path / "disk.img"
    disk.write_bytes(data)
    canary = Canary.random()
    with guest(datapath, disk, track) as (platform, vm):
        console = vm.domain.console
        console.run(DISK_DRIVER, timeout_s=30)
        check_memory(vm)
        before = lines_no_vcpu_stored(vm)
        # The first time, the device writes it to the page cache; then that is what is read.
        assert sum_of(console, "/dev/vda") == hashlib.sha256(data).hexdigest()
        check_memory(vm)
        assert lines_no_vcpu_stored(vm) - before >= size // LINE * 9 // 10
        assert sum_of(console, "/dev/vda") == hashlib.sha256(data).hexdigest()
        # And the way back: what the guest computed, the device reads.
        canary.plant(console)
        fill(console, "/tmp/fill", 48)
        console.run("dd if=/tmp/fill of=/dev/vda bs=1M conv=fsync", TIMEOUT_S)
        assert disk.read_bytes() == canary.page * (size // PAGE)
        with vm.held():
            assert search_dram(vm, canary, platform.dram_path).passed
        console.run("rm /tmp/fill; echo 3 >/proc/sys/vm/drop_caches", TIMEOUT_S)
        compute(console)
        check_memory(vm)


def lines_no_vcpu_stored(vm: Vm) -> int:
    """Lines that changed in DRAM and that no store of a vCPU had marked."""
    status = vm.status()
    if status.paging is not None:
        return status.paging.lines_written - status.paging.lines_stored
    assert status.traffic is not None
    return status.traffic.lines_other


# --- from the start -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", pytest.param("reboot", marks=pytest.mark.nightly)])
@data_paths
def test_guest_boots_again_through_firmware_and_kernel_loading(datapath: str, how: str) -> None:
    with guest(datapath) as (platform, vm):
        console = vm.domain.console
        qemu, first = vm.status().qemu_pid, boot_id(console)
        console.run("head -c 100000000 /dev/zero | tr '\\0' a >/tmp/fill", TIMEOUT_S)
        getattr(vm.domain, how)(BOOT_TIMEOUT_S)
        assert boot_id(console) != first
        assert vm.status().qemu_pid == qemu
        assert platform.fault(vm.uuid) is None
        check_memory(vm)
        compute(console)
        check_memory(vm)


# --- taken along ----------------------------------------------------------------------------------


def memory_sum(vm: Vm) -> str:
    """The SHA-256 of a held guest's memory."""
    digest = hashlib.sha256()
    with memory_of(vm) as memory:
        for _ram_offset, chunk in memory.chunks():
            digest.update(chunk)
    return digest.hexdigest()


@data_paths
def test_guest_is_what_it_was_at_its_snapshot(datapath: str, tmp_path: Path) -> None:
    then, later = Canary.random(), Canary.random()
    with guest(datapath) as (platform, vm):
        console = vm.domain.console
        then.plant(console)
        fill(console, "/tmp/fill", 64)
        file_then = sum_of(console, "/tmp/fill")
        with vm.held():
            snapshots = Snapshots(vm.domain, tmp_path / "state.qcow2")
            snapshots.save("then")
            memory_then = memory_sum(vm)
        later.plant(console)
        fill(console, "/tmp/fill", 96)
        assert sum_of(console, "/tmp/fill") != file_then
        with vm.held() as engine:
            assert memory_sum(vm) != memory_then
            snapshots.load("then")
            engine.flush(vm.uuid)
            assert memory_sum(vm) == memory_then
            assert compare_memory(vm, engine).passed
            assert search_dram(vm, then, platform.dram_path).passed
        assert sum_of(console, "/tmp/fill") == file_then
        assert sum_of(console, "/run/canary") == sum_of_page(then.page)
        # And so of a guest that runs, which goes on by itself.
        console.run("rm /tmp/fill", TIMEOUT_S)
        snapshots.save("running")
        compute(console)
        snapshots.load("running")
        run_workload(console)
        check_memory(vm)


@data_paths
def test_saved_guest_goes_on_in_another_qemu(datapath: str, tmp_path: Path) -> None:
    canary = Canary.random()
    with guest(datapath) as (platform, vm):
        console = vm.domain.console
        canary.plant(console)
        fill(console, "/tmp/fill", 64)
        expected, booted = sum_of(console, "/tmp/fill"), boot_id(console)
        qemu = vm.status().qemu_pid
        vm.domain.save(tmp_path / "state")
        platform.restore(vm, tmp_path / "state")
        with bounded(vm):
            assert vm.status().qemu_pid not in (qemu, None)
            assert boot_id(console) == booted
            assert sum_of(console, "/tmp/fill") == expected
            with vm.held() as engine:
                assert compare_memory(vm, engine).passed
                assert search_dram(vm, canary, platform.dram_path).passed
            console.run("rm /tmp/fill", TIMEOUT_S)
            compute(console)
            check_memory(vm)
