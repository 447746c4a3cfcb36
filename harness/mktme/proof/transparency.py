# SPDX-License-Identifier: GPL-2.0-or-later
"""Transparency: the guest cannot tell.

Two halves. Of a held guest, every page that the engine decrypts from DRAM equals the guest's RAM;
and the guest computes the same checksums as without plugin and engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.datapath.kinds import DataPath
from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE, PAGE_BYTES
from mktme.proof.guest_ram import ram_of
from mktme.service.client import EngineClient
from mktme.vm.console import VmError
from mktme.vm.platform import Vm
from mktme.vm.shell import Shell

WORKLOAD_TIMEOUT_S: Final = 300.0
_SUM: Final = re.compile(r"^@mktme sum (\S+) ([0-9a-f]+)$", re.M)
_DONE: Final = "@mktme workload done"

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class MemoryComparison:
    """DRAM, decrypted, against guest RAM; counts are of 64-byte lines.

    Attributes:
        lines_compared: all lines of the guest's RAM that are in memory, or could be: of an
            `inline` guest those in the window, for the others are in DRAM alone.
        lines_nonzero: of these, lines that are not all zeros in RAM: those that say something.
        lines_mismatched: lines that differ.
        line_marked: of these, lines that a store was seen to (and something unseen later).
        page_marked: lines no store was seen to, in a page with a line that one was seen to.
        unmarked: lines in pages without any store seen.
    """

    lines_compared: int
    lines_nonzero: int
    lines_mismatched: int
    line_marked: int
    page_marked: int
    unmarked: int

    @property
    def passed(self) -> bool:
        """Whether DRAM is exactly the guest's RAM, and there was something to compare."""
        return self.lines_mismatched == 0 and self.lines_nonzero > 0


def compare_memory(
    vm: Vm, engine: EngineClient, progress: Progress = lambda _done, _all: None
) -> MemoryComparison:
    """Compare every page of a held guest (`Vm.held`) with what DRAM holds of it."""
    compared = nonzero = mismatched = line_marked = page_marked = 0
    inline = vm.config.datapath is DataPath.INLINE
    size = vm.config.all_bytes
    with ram_of(vm) as ram:
        for ram_offset, plain in ram.chunks():
            decrypted = engine.read(vm.uuid, ram_offset, len(plain))
            expected = _lines(plain)
            there = np.ones(len(expected), np.bool_)
            if inline:
                there = np.repeat(ram.populated(ram_offset, len(plain)), LINES_PER_PAGE)
            compared += int(np.count_nonzero(there))
            nonzero += int(np.count_nonzero(expected.any(axis=1)))
            if decrypted != plain:
                wrong = (expected != _lines(decrypted)).any(axis=1) & there
                marks = engine.line_marks(
                    vm.uuid, ram_offset // PAGE_BYTES, len(plain) // PAGE_BYTES
                )
                by_line = _per_line(marks)
                by_page = np.repeat(marks != 0, LINES_PER_PAGE)
                mismatched += int(np.count_nonzero(wrong))
                line_marked += int(np.count_nonzero(wrong & by_line))
                page_marked += int(np.count_nonzero(wrong & by_page & ~by_line))
            progress(ram_offset + len(plain), size)
    return MemoryComparison(
        lines_compared=compared,
        lines_nonzero=nonzero,
        lines_mismatched=mismatched,
        line_marked=line_marked,
        page_marked=page_marked,
        unmarked=mismatched - line_marked - page_marked,
    )


def run_workload(shell: Shell, rounds: int = 1) -> dict[str, str]:
    """Have the guest compute and check itself; returns its checksums by name.

    Raises:
        VmError: the guest found its own data wrong, or did not finish.
    """
    output = shell.run(f"workload {rounds}", WORKLOAD_TIMEOUT_S).output
    sums = dict(_SUM.findall(output))
    if _DONE not in output or not sums:
        raise VmError("the guest's workload did not say that it is done")
    return sums


def _lines(data: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(data, dtype="<u8").reshape(-1, LINE_BYTES // 8)


def _per_line(marks: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(np.ascontiguousarray(marks).view(np.uint8), bitorder="little")
    return bits.astype(bool)
