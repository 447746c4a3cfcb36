# SPDX-License-Identifier: GPL-2.0-or-later
"""Confidentiality: what the guest holds in memory is nowhere in DRAM.

The guest fills a page with a random canary. The check looks for any one 16-byte block of it (the
cipher's block; nothing shorter is worth more to an attacker) in the DRAM file, at each alignment.
Pages that were given to a KeyID without encryption are what they are asked to be, and left out.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.proof.guest_ram import memory_of
from mktme.service.wire import Status, VmStatus
from mktme.vm.console import VmError
from mktme.vm.platform import Vm
from mktme.vm.shell import Shell

BLOCK_BYTES: Final = 16
_CHUNK_BYTES: Final = 8 << 20
_PLANT_TIMEOUT_S: Final = 60.0
_PLANT_SHARE: Final = 8  # a guest fills an eighth of its memory with canaries, not more


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

    def plant(self, shell: Shell) -> None:
        """Have the guest make its canary page (a file in its tmpfs)."""
        shell.run(f"canary {self.line.hex()}", _PLANT_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class CanarySearch:
    """Where a canary was found.

    Attributes:
        ram_offset: of the guest's canary page in its RAM.
        dram_bytes_searched: how much of DRAM was not a hole and was searched.
        dram_hits: how often a 16-byte block of the canary is in DRAM.
        first_hit: DRAM address of the first one.
        clear_bytes: how much of the VMs' memory was not searched, since it is not to be encrypted
            though the VM it belongs to is.
    """

    ram_offset: int
    dram_bytes_searched: int
    dram_hits: int
    first_hit: int | None
    clear_bytes: int = 0

    @property
    def passed(self) -> bool:
        """Whether the guest holds the canary and DRAM, searched, does not show it."""
        return self.dram_hits == 0 and self.dram_bytes_searched > 0


def plant_canary(vm: Vm, canary: Canary) -> None:
    """Have a guest hold a canary page under its own KeyID.

    Which page it is, is Linux's choice. While it is one that was given to another KeyID, the guest
    keeps twice as many.

    Raises:
        VmError: there is none, as far as that goes.
    """
    shell = vm.domain.shell
    canary.plant(shell)
    if not vm.config.pages:
        return
    size_bytes = PAGE_BYTES
    while not _holds_its_own(vm, canary):
        if 2 * size_bytes > vm.config.memory_bytes // _PLANT_SHARE:
            raise VmError(
                f"{vm.name} gets no page under its own KeyID for its canary",
                hint="leave more of its memory to it with --pages",
            )
        # All of them stay: a page that is free again may be anything soon.
        more = f"/run/canary-{size_bytes}"
        shell.run(f"cat /run/canary* >/run/more && mv /run/more {more}", _PLANT_TIMEOUT_S)
        size_bytes *= 2


def find_canary(vm: Vm, canary: Canary) -> int:
    """RAM offset of a held guest's canary page: of one under its own KeyID, if there is one.

    Raises:
        VmError: it is not there, and then no search of DRAM would mean anything.
    """
    with memory_of(vm) as memory:
        found = list(memory.find_pages(canary.page))
    if not found:
        raise VmError(f"{vm.name} does not hold its canary page")
    own = _ranges(vm.status(), {vm.keyid})
    return next((offset for offset in found if _is_in(vm.base + offset, own)), found[0])


def search_dram(vm: Vm, canary: Canary, dram: Path) -> CanarySearch:
    """Look for a held guest's canary in its RAM and in the DRAM file.

    Raises:
        VmError: it does not hold it, or in plaintext only, and that would be no proof.
    """
    ram_offset = find_canary(vm, canary)
    clear = _clear_ranges(vm.require_engine().status())
    if _is_in(vm.base + ram_offset, clear):
        raise VmError(f"{vm.name} holds its canary in pages alone that are not to be encrypted")
    found = search_dram_for(canary.line, dram, clear)
    clear_bytes = sum(stop - start for start, stop in clear)
    first = min(found.hits, default=None)
    return CanarySearch(ram_offset, found.bytes_searched, len(found.hits), first, clear_bytes)


@dataclass(frozen=True, slots=True)
class LineSearch:
    """Where the blocks of a line are in a DRAM file.

    Attributes:
        bytes_searched: how much of it is no hole, and was searched.
        hits: addresses.
    """

    bytes_searched: int
    hits: frozenset[int]


def search_dram_for(
    line: bytes, dram: Path, out: list[tuple[int, int]] | None = None
) -> LineSearch:
    """Look for any one 16-byte block of a line in a DRAM file, at each alignment.

    Args:
        line: whole blocks.
        dram: the file.
        out: addresses, first and after the last, of what is left out.
    """
    blocks = [line[at : at + BLOCK_BYTES] for at in range(0, len(line), BLOCK_BYTES)]
    hits: set[int] = set()
    searched = 0
    with dram.open("rb", buffering=0) as file:
        for start, stop in _without(_data_ranges(file.fileno()), out or []):
            searched += stop - start
            for position in range(start, stop, _CHUNK_BYTES):
                # Chunks overlap, so that nothing hides on a border.
                length = min(_CHUNK_BYTES + BLOCK_BYTES - 1, stop - position)
                data = os.pread(file.fileno(), length, position)
                hits.update(position + at for block in blocks for at in _find_all(data, block))
    return LineSearch(searched, frozenset(hits))


def _holds_its_own(vm: Vm, canary: Canary) -> bool:
    with vm.held():
        return _is_in(vm.base + find_canary(vm, canary), _ranges(vm.status(), {vm.keyid}))


def _ranges(vm: VmStatus, keyids: set[int]) -> list[tuple[int, int]]:
    """DRAM addresses, first and after the last, of a VM's pages under some KeyIDs."""
    return [(one.base, one.base + one.size_bytes) for one in vm.pages if one.keyid in keyids]


def _clear_ranges(status: Status) -> list[tuple[int, int]]:
    """Pages that another KeyID than their VM's own leaves in plaintext, or may.

    Of all VMs, for those that are searched side by side hold the same canary.
    """
    keyids = {key.keyid for key in status.keys if key.algorithm is None}
    if status.platform.exclusion is not None:
        keyids.add(0)  # somewhere
    return [found for vm in status.vms for found in _ranges(vm, keyids - {vm.keyid})]


def _is_in(address: int, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= address < stop for start, stop in ranges)


def _without(ranges: list[tuple[int, int]], out: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Parts of some ranges that are in none of others."""
    for low, high in out:
        parts = [
            part
            for start, stop in ranges
            for part in ((start, min(stop, low)), (max(start, high), stop))
        ]
        ranges = [(start, stop) for start, stop in parts if start < stop]
    return ranges


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
