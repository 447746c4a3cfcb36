# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM as QEMU has it, read behind the engine's back.

A proof that asked the engine for both sides would prove nothing, so this reads the RAM memfd of
the QEMU process itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import numpy as np

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

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """All of it, as (RAM offset, bytes) of at most `CHUNK_BYTES`, whole pages each."""
        for ram_offset in range(0, self.size_bytes, CHUNK_BYTES):
            yield ram_offset, self.read(ram_offset, min(CHUNK_BYTES, self.size_bytes - ram_offset))

    def find_page(self, page: bytes) -> int | None:
        """RAM offset of the first page that is exactly `page`, None if there is none."""
        expected = np.frombuffer(page, dtype=np.uint64)
        for ram_offset, chunk in self.chunks():
            pages = np.frombuffer(chunk, dtype=np.uint64).reshape(-1, PAGE_BYTES // 8)
            for candidate in np.flatnonzero(pages[:, 0] == expected[0]).tolist():
                if np.array_equal(pages[candidate], expected):
                    return ram_offset + int(candidate) * PAGE_BYTES
        return None

    def close(self) -> None:
        """Give back the descriptors."""
        while self._files:
            os.close(self._files.pop()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


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
    return GuestRam(pid, vm.config.memory_bytes)
