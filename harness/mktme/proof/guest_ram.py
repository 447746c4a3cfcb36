# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM as QEMU has it, read behind the engine's back.

A proof that asked the engine for both sides would prove nothing, so this reads the RAM memfd of
the QEMU process itself. Of an `inline` VM that is the window; the rest of its memory exists in DRAM
alone (`memory_of`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from mktme.datapath.kinds import DataPath
from mktme.engine.errors import MktmeError
from mktme.engine.xts import PAGE_BYTES
from mktme.vm.console import VmError
from mktme.vm.platform import Vm

CHUNK_BYTES: Final = 4 << 20
_RAM_MEMFD: Final = "/memfd:memory-backend-memfd"


class GuestRamError(MktmeError):
    """A QEMU process's RAM cannot be read."""


class GuestRam:
    """The RAM of one guest; a context manager.

    Args:
        qemu_pid: the process, on this machine.
        size_bytes: how much RAM the guest is known to have.

    Raises:
        GuestRamError: the process has no RAM memfds of that size, or may not be looked into.
    """

    def __init__(self, qemu_pid: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._files: list[tuple[int, int]] = []
        inodes: set[int] = set()
        try:
            # QEMU opens its memory backends in the order in which RAM offsets follow each other.
            links = sorted(Path(f"/proc/{qemu_pid}/fd").iterdir(), key=lambda link: int(link.name))
            for link in links:
                with suppress(FileNotFoundError):  # a descriptor that was closed meanwhile
                    if os.readlink(link).startswith(_RAM_MEMFD) and _add(inodes, link):
                        descriptor = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                        self._files.append((descriptor, os.fstat(descriptor).st_size))
        except OSError as error:
            self.close()
            raise GuestRamError(f"QEMU process {qemu_pid}: {error.strerror}") from error
        total = sum(size for _descriptor, size in self._files)
        if total != size_bytes:
            self.close()
            raise GuestRamError(
                f"QEMU process {qemu_pid} has {total} bytes of RAM, not {size_bytes}"
            )

    def read(self, ram_offset: int, size_bytes: int) -> bytes:
        """Read from RAM offset `ram_offset`; pages that were never touched are zeros."""
        parts = []
        start = 0
        for descriptor, size in self._files:
            low, high = max(ram_offset, start), min(ram_offset + size_bytes, start + size)
            if low < high:
                parts.append(os.pread(descriptor, high - low, low - start))
            start += size
        return b"".join(parts)

    def allocated_bytes(self) -> int:
        """How much of it is in memory now."""
        return sum(os.fstat(descriptor).st_blocks * 512 for descriptor, _size in self._files)

    def populated(self, ram_offset: int, size_bytes: int) -> npt.NDArray[np.bool_]:
        """Which pages of a range are in memory: shape (size_bytes / 4096,)."""
        pages = np.zeros(size_bytes // PAGE_BYTES, np.bool_)
        start = 0
        for descriptor, size in self._files:
            low, high = max(ram_offset, start), min(ram_offset + size_bytes, start + size)
            for data, hole in _data_runs(descriptor, low - start, high - start):
                first = (start + data - ram_offset) // PAGE_BYTES
                pages[first : first + (hole - data) // PAGE_BYTES] = True
            start += size
        return pages

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """All of it, as (RAM offset, bytes) of at most `CHUNK_BYTES`, whole pages each."""
        for ram_offset in range(0, self.size_bytes, CHUNK_BYTES):
            yield ram_offset, self.read(ram_offset, min(CHUNK_BYTES, self.size_bytes - ram_offset))

    def find_pages(self, page: bytes) -> Iterator[int]:
        """RAM offsets of the pages that are exactly `page`."""
        return _find_pages(self.chunks(), page)

    def close(self) -> None:
        """Give back the descriptors."""
        while self._files:
            os.close(self._files.pop()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class EngineMemory:
    """The memory of a held VM as its accesses would find it: DRAM, decrypted by the engine.

    Of an `inline` VM there is no other: RAM is the window. A context manager, as `GuestRam` is.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._engine = vm.require_engine()

    def read(self, ram_offset: int, size_bytes: int) -> bytes:
        """As `GuestRam.read`, of whole pages."""
        return self._engine.read(self._vm.uuid, ram_offset, size_bytes)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """As `GuestRam.chunks`."""
        size = self._vm.config.all_bytes
        for ram_offset in range(0, size, CHUNK_BYTES):
            yield ram_offset, self.read(ram_offset, min(CHUNK_BYTES, size - ram_offset))

    def find_pages(self, page: bytes) -> Iterator[int]:
        """As `GuestRam.find_pages`."""
        return _find_pages(self.chunks(), page)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Nothing to give back."""


def memory_of(vm: Vm) -> GuestRam | EngineMemory:
    """All of a held VM's memory: its RAM, or what stands behind it.

    Raises:
        VmError: its QEMU is not linked to the engine.
        GuestRamError: its RAM cannot be read.
    """
    return EngineMemory(vm) if vm.config.datapath is DataPath.INLINE else ram_of(vm)


def _find_pages(chunks: Iterator[tuple[int, bytes]], page: bytes) -> Iterator[int]:
    expected = np.frombuffer(page, dtype=np.uint64)
    for ram_offset, chunk in chunks:
        pages = np.frombuffer(chunk, dtype=np.uint64).reshape(-1, PAGE_BYTES // 8)
        for candidate in np.flatnonzero(pages[:, 0] == expected[0]).tolist():
            if np.array_equal(pages[candidate], expected):
                yield ram_offset + int(candidate) * PAGE_BYTES


def _data_runs(descriptor: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Runs of a file's range that are not holes (lseek(2))."""
    while low < high:
        try:
            data = os.lseek(descriptor, low, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        if data >= high:
            return
        low = min(high, os.lseek(descriptor, data, os.SEEK_HOLE))
        yield data, low


def _add(inodes: set[int], link: Path) -> bool:
    """Whether a descriptor's file is none of those yet: a memory backend may be open twice."""
    inode = link.stat().st_ino
    known = inode in inodes
    inodes.add(inode)
    return not known


def ram_of(vm: Vm) -> GuestRam:
    """The RAM of a VM that an engine follows.

    Raises:
        VmError: its QEMU is not linked to the engine.
        GuestRamError: its RAM cannot be read.
    """
    pid = vm.status().qemu_pid
    if pid is None:
        raise VmError(f"{vm.name} is not linked to the engine")
    return GuestRam(pid, vm.config.all_bytes)
