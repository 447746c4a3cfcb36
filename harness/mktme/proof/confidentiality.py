# SPDX-License-Identifier: GPL-2.0-or-later
"""Confidentiality: what the guest holds in memory is nowhere in DRAM.

The guest fills a page with a random canary. The check looks for any one 16-byte block of it (the
cipher's block; nothing shorter is worth more to an attacker) in the DRAM file, at each alignment.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.proof.guest_ram import ram_of
from mktme.vm.console import Console, VmError
from mktme.vm.platform import Vm

BLOCK_BYTES: Final = 16
_CHUNK_BYTES: Final = 8 << 20
_PLANT_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Canary:
    """A random line that guests repeat through a page of their memory."""

    line: bytes

    @classmethod
    def random(cls) -> Canary:
        """A new one."""
        return cls(secrets.token_bytes(LINE_BYTES))

    @property
    def page(self) -> bytes:
        """The page that the guest holds."""
        return self.line * (PAGE_BYTES // LINE_BYTES)

    def plant(self, console: Console) -> None:
        """Have the guest make its canary page (a file in its tmpfs)."""
        console.run(f"canary {self.line.hex()}", _PLANT_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class CanarySearch:
    """Where a canary was found.

    Attributes:
        ram_offset: of the guest's canary page in its RAM.
        dram_bytes_searched: how much of DRAM was not a hole and was searched.
        dram_hits: how often a 16-byte block of the canary is in DRAM.
        first_hit: DRAM address of the first one.
    """

    ram_offset: int
    dram_bytes_searched: int
    dram_hits: int
    first_hit: int | None

    @property
    def passed(self) -> bool:
        """Whether the guest holds the canary and DRAM, searched, does not show it."""
        return self.dram_hits == 0 and self.dram_bytes_searched > 0


def find_canary(vm: Vm, canary: Canary) -> int:
    """RAM offset of a held guest's canary page.

    Raises:
        VmError: it is not there, and then no search of DRAM would mean anything.
    """
    with ram_of(vm) as ram:
        ram_offset = ram.find_page(canary.page)
    if ram_offset is None:
        raise VmError(f"{vm.name} does not hold its canary page")
    return ram_offset


def search_dram(vm: Vm, canary: Canary, dram: Path) -> CanarySearch:
    """Look for a held guest's canary in its RAM and in the DRAM file."""
    ram_offset = find_canary(vm, canary)
    blocks = [canary.line[at : at + BLOCK_BYTES] for at in range(0, LINE_BYTES, BLOCK_BYTES)]
    hits: list[int] = []
    searched = 0
    with dram.open("rb", buffering=0) as file:
        for start, stop in _data_ranges(file.fileno()):
            searched += stop - start
            for position in range(start, stop, _CHUNK_BYTES):
                # Chunks overlap, so that nothing hides on a border.
                length = min(_CHUNK_BYTES + BLOCK_BYTES - 1, stop - position)
                data = os.pread(file.fileno(), length, position)
                hits += [position + at for block in blocks for at in _find_all(data, block)]
    return CanarySearch(ram_offset, searched, len(set(hits)), min(hits, default=None))


def _find_all(data: bytes, block: bytes) -> list[int]:
    found = []
    at = data.find(block)
    while at != -1:
        found.append(at)
        at = data.find(block, at + 1)
    return found


def _data_ranges(descriptor: int) -> list[tuple[int, int]]:
    """The file's ranges that are not holes (lseek(2), SEEK_DATA)."""
    ranges = []
    end = os.fstat(descriptor).st_size
    position = 0
    while position < end:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: holes from here on
            break
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        ranges.append((start, position))
    return ranges
