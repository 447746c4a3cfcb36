# SPDX-License-Identifier: GPL-2.0-or-later
"""How random memory looks, page by page: to the guest, and to who reads DRAM.

No proof: a good cipher's output is not told from noise by counting bytes, but a counter with a
password would not be either. It is what a picture of encryption is made of, and what a guest
without encryption fails to show.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from mktme.dump.analysis import by_entropy, page_entropy, written_lines
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.proof.guest_ram import memory_of
from mktme.vm.platform import Vm

BIN_BITS: Final = 0.25
BINS: Final = int(8 / BIN_BITS)
SAMPLE_PAGES: Final = 2048
"""Enough for a share to within 1 to 2 per cent, read in a second."""

Counts = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)], ...],
    msgspec.Meta(min_length=BINS, max_length=BINS),
]


@dataclass(frozen=True, slots=True)
class EntropyComparison:
    """The entropy of some of a held guest's pages, as the guest has them and as DRAM does.

    Pages are drawn evenly from those that DRAM holds anything of; lines that were never written are
    left out of them, on both sides. Bin i of `BINS` counts pages of
    i/4 to (i+1)/4 bits a byte; 8 bits are in the last one.

    Attributes:
        pages: how many were drawn.
        written_pages: of how many.
        plaintext: pages a bin, as the guest has them.
        ciphertext: the same pages, as they are in DRAM.
        plaintext_mean: bits a byte; so the next.
    """

    pages: int
    written_pages: int
    plaintext: Counts
    ciphertext: Counts
    plaintext_mean: float
    ciphertext_mean: float


def coarse(entropies: npt.NDArray[np.float64]) -> tuple[int, ...]:
    """Pages by entropy, in `BINS` bins."""
    return tuple(by_entropy(entropies).reshape(BINS, -1).sum(axis=1).tolist())


def compare_entropy(vm: Vm, dram: Path, sample_pages: int = SAMPLE_PAGES) -> EntropyComparison:
    """Draw pages of a held guest (`Vm.held`) and take their entropy on both sides.

    Args:
        vm: the guest.
        dram: the DRAM file.
        sample_pages: the most that are drawn.

    Raises:
        VmError: its QEMU is not linked to the engine.
        GuestRamError: its RAM cannot be read.
        OSError: the DRAM file cannot be read.
    """
    with dram.open("rb", buffering=0) as file, memory_of(vm) as memory:
        fd = file.fileno()
        written = _written_pages(fd, vm.base, vm.config.all_bytes)
        drawn = written[:: max(1, -(-len(written) // sample_pages))]
        plaintext = _matrix(memory.read(int(page) * PAGE_BYTES, PAGE_BYTES) for page in drawn)
        ciphertext = _matrix(
            os.pread(fd, PAGE_BYTES, vm.base + int(page) * PAGE_BYTES) for page in drawn
        )
    written_here = written_lines(ciphertext)
    kept = written_here.any(axis=1)
    lines = written_here[kept].sum(axis=1, dtype=np.int64)
    # What was never written in DRAM says nothing of encryption, on either side.
    clear = np.where(np.repeat(written_here, LINE_BYTES, axis=1), plaintext, np.uint8(0))
    before, after = (page_entropy(pages[kept], lines)[0] for pages in (clear, ciphertext))
    return EntropyComparison(
        pages=len(lines),
        written_pages=len(written),
        plaintext=coarse(before),
        ciphertext=coarse(after),
        plaintext_mean=_mean(before),
        ciphertext_mean=_mean(after),
    )


def _written_pages(fd: int, base: int, size_bytes: int) -> npt.NDArray[np.int64]:
    """Numbers, from `base` on, of the pages that are no holes (lseek(2)): shape (n,)."""
    runs = [np.empty(0, np.int64)]
    at, end = base, base + size_bytes
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # that is: holes from here on
                raise
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        first, last = (min(one, end) - base for one in (start, at))
        runs.append(np.arange(first // PAGE_BYTES, -(-last // PAGE_BYTES), dtype=np.int64))
    return np.concatenate(runs)


def _matrix(pages: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(pages), np.uint8).reshape(-1, PAGE_BYTES)


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0
