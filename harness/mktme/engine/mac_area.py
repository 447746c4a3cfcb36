# SPDX-License-Identifier: GPL-2.0-or-later
"""The MACs of lines that are read and written, in the MAC area beside DRAM.

An entry that is not 0 was written after the line that it is for, and is made 0 before that line is
written again, whatever the KeyID. So when a write ends half-way (no space, a crash), lines it was
about have no MAC, which no KeyID with integrity accepts, and the next write of such a line makes
its MAC even if the ciphertext is there already.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mktme.engine.dram import Dram
from mktme.engine.integrity import LineMacs
from mktme.engine.pages import runs_of_consecutive, unpack_masks
from mktme.engine.xts import LINES_PER_PAGE, PAGE_BYTES


def read_entries(dram: Dram, numbers: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Read pages' entries: page numbers, ascending, shape (n,), to shape (n, 64).

    Raises:
        DramError: the MAC area cannot be read.
    """
    entries = np.empty((len(numbers), LINES_PER_PAGE), np.uint32)
    for start, stop in runs_of_consecutive(numbers):
        dram.read_macs_into(int(numbers[start]) * PAGE_BYTES, entries[start:stop].data)
    return entries


class MacUpdate:
    """What happens to the MACs of pages whose ciphertext is about to be written.

    Args:
        dram: the image.
        numbers: page numbers, ascending, shape (n,).
        lines: their ciphertext to be, shape (n * 64, 8).
        addresses: the lines' addresses, shape (n * 64,).
        changed: masks of lines that DRAM does not hold so yet, shape (n,).
        chosen: masks of lines that shall have a MAC afterwards, shape (n,).
        domains: (index of the first page, index behind the last, what makes their MACs).

    Raises:
        DramError: the MAC area cannot be read.

    Attributes:
        pages: whether MACs are to be written, shape (n,).
    """

    def __init__(
        self,
        dram: Dram,
        numbers: NDArray[np.int64],
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        changed: NDArray[np.uint64],
        chosen: NDArray[np.uint64],
        domains: Iterable[tuple[int, int, LineMacs | None]],
    ) -> None:
        self._dram = dram
        self._numbers = numbers
        self._stored = read_entries(dram, numbers)
        changed_lines = unpack_masks(changed)
        self._cleared = np.where(changed_lines, np.uint32(0), self._stored)
        self._made = self._cleared.copy()
        made = self._made.reshape(-1)
        without_mac = (self._made == 0) & (changed_lines | unpack_masks(chosen))
        for start, stop, macs in domains:
            if macs is not None:
                picked = np.flatnonzero(without_mac[start:stop]) + start * LINES_PER_PAGE
                made[picked] = macs.entries(lines[picked], addresses[picked])
        self.pages: NDArray[np.bool_] = (self._made != self._cleared).any(axis=1)

    def clear(self, start: int, stop: int) -> None:
        """Take old MACs away; then the ciphertext may be written.

        Args:
            start: index of the first page of a run without a gap.
            stop: index behind the last one.

        Raises:
            DramError: the MAC area cannot be written.
        """
        self._write(self._stored, self._cleared, start, stop)

    def commit(self, start: int, stop: int) -> None:
        """Write the new MACs, after the ciphertext; as `clear`."""
        self._write(self._cleared, self._made, start, stop)

    def _write(
        self, before: NDArray[np.uint32], after: NDArray[np.uint32], start: int, stop: int
    ) -> None:
        if not np.array_equal(before[start:stop], after[start:stop]):
            self._dram.write_macs(int(self._numbers[start]) * PAGE_BYTES, after[start:stop].data)
