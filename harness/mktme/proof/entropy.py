# SPDX-License-Identifier: GPL-2.0-or-later
"""How random memory looks, page by page: to the guest, and to who reads DRAM.

No proof: a good cipher's output is not told from noise by counting bytes, but a counter with a
password would not be either. It is what a picture of encryption is made of, and what a guest
without encryption fails to show.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from mktme.engine.xts import PAGE_BYTES
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

    Pages are drawn evenly from those that DRAM holds anything of. Bin i of `BINS` counts pages of
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


def page_entropy(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Shannon entropy of each page's bytes.

    Args:
        pages: uint8, shape (n, 4096).

    Returns:
        Bits a byte, 0 to 8: float64, shape (n,). Random bytes have 7.955 on average: 4096 of them
        do not fill 256 bins evenly.
    """
    seen = np.empty((len(pages), 256), np.intp)
    for row, page in zip(seen, pages, strict=True):
        row[:] = np.bincount(page, minlength=256)
    # The sum of n log n, of n from 0 to 4096, looked up.
    return np.asarray(np.log2(PAGE_BYTES) - _N_LOG_N[seen].sum(axis=1) / PAGE_BYTES)


def histogram(entropy: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Pages a bin of `BIN_BITS`: int64, shape (BINS,)."""
    bins = np.clip((entropy / BIN_BITS).astype(np.int64), 0, BINS - 1)
    return np.bincount(bins, minlength=BINS)


def compare_entropy(vm: Vm, dram: Path, sample_pages: int = SAMPLE_PAGES) -> EntropyComparison:
    """Draw pages of a held guest (`Vm.held`) and take their entropy on both sides.

    Args:
        vm: the guest.
        dram: the DRAM file.
        sample_pages: the most that are drawn.

    Raises:
        VmError: its QEMU is not linked to the engine.
        GuestRamError: its RAM cannot be read.
    """
    with dram.open("rb", buffering=0) as file, memory_of(vm) as memory:
        fd = file.fileno()
        written = _written_pages(fd, vm.base, vm.config.all_bytes)
        drawn = written[:: max(1, -(-len(written) // sample_pages))]
        plaintext = _matrix(memory.read(int(page) * PAGE_BYTES, PAGE_BYTES) for page in drawn)
        ciphertext = _matrix(
            os.pread(fd, PAGE_BYTES, vm.base + int(page) * PAGE_BYTES) for page in drawn
        )
    before, after = page_entropy(plaintext), page_entropy(ciphertext)
    return EntropyComparison(
        pages=len(drawn),
        written_pages=len(written),
        plaintext=tuple(histogram(before).tolist()),
        ciphertext=tuple(histogram(after).tolist()),
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
        except OSError:  # ENXIO: holes from here on
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        first, last = (min(one, end) - base for one in (start, at))
        runs.append(np.arange(first // PAGE_BYTES, -(-last // PAGE_BYTES), dtype=np.int64))
    return np.concatenate(runs)


def _matrix(pages: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(pages), np.uint8).reshape(-1, PAGE_BYTES)


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


_N: Final = np.arange(PAGE_BYTES + 1, dtype=np.float64)
_N_LOG_N: Final = _N * np.log2(np.maximum(_N, 1))
