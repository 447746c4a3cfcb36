# SPDX-License-Identifier: GPL-2.0-or-later
"""What is computed of an image's pages: pure functions over NumPy arrays, and results that merge.

Everything is found page by page, or merges without regard to order: how an image is cut up, and how
many threads or machines read it, does not show. A string ends where its page does, too: pages that
are neighbours in DRAM need not be so for anybody who uses them.

Lines of 64 zero bytes were never written (`mktme.engine.dram`); they are counted as such, and left
out of everything else.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from mktme.dump.randomness import SYMBOLS, entropy_of_random
from mktme.dump.sketch import (
    Hashes,
    Sketch,
    hash_blocks,
    hash_lines,
    hash_numbers,
    in_sample,
)
from mktme.dump.strings import Found, find_strings
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES

BLOCK_BYTES: Final = 16
"""The cipher's block."""
PAGE_LINES: Final = PAGE_BYTES // LINE_BYTES
PAGE_BLOCKS: Final = PAGE_BYTES // BLOCK_BYTES
LINE_BLOCKS: Final = LINE_BYTES // BLOCK_BYTES
ENTROPY_BINS: Final = 128
"""Bins of a histogram of pages by entropy, each 1/16 bit per byte."""
PAGE_DEVIATIONS: Final = 8.0
"""A page is structured if its entropy is that many deviations below a random page's mean. For a
whole page that is 7.922; chance alone does it to one page in about 10^11 (chi-square's tail, which
entropy's follows), so to one image of 64 GiB, 2^24 pages, in some thousands."""
COMPILED_FROM_BYTES: Final = 1 << 30
"""Less is counted by NumPy before Numba has compiled anything, docs/adr/0016-numba.md."""

_BATCH_PAGES: Final = 256  # enough for NumPy's calls to cost little, and little enough for a cache
_COPIED_PAGES: Final = 16
_SKETCH_VALUES: Final = 1 << 18
_COMPRESSED_PAGES: Final = 512
_COMPRESSED_MAX_SHIFT: Final = 9  # zlib takes eight times as long as all the rest together
_FIXED_POINT: Final = 1 << 20  # entropies are summed as integers: their order must not matter
_COUNT_POINT: Final = 1 << 32

PagesArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which blocks, lines and pages are looked at for what cannot be done with all; and with what.

    What a block's or line's first 8 bytes are decides whether it is counted, so that it is so
    wherever it comes again; and all of one page in 2^n is, for the few that are everywhere.

    Attributes:
        shift: n: one in 2^n is counted for repetitions; 0: all are.
        page_shift: one page in 2^n is compressed.
        compiled: whether `mktme.dump.byte_counts` counts bytes: the same, faster once it is there.
    """

    shift: int
    page_shift: int
    compiled: bool = False

    @classmethod
    def for_data(cls, size_bytes: int) -> Self:
        """What keeps an image of so many bytes, holes not among them, within bounds."""

        def shift(things: int, most: int) -> int:
            return max(0, -(-things // most) - 1).bit_length()

        return cls(
            shift(size_bytes // BLOCK_BYTES, _SKETCH_VALUES),
            min(_COMPRESSED_MAX_SHIFT, shift(size_bytes // PAGE_BYTES, _COMPRESSED_PAGES)),
            size_bytes >= COMPILED_FROM_BYTES,
        )


@dataclass(frozen=True, slots=True)
class Tally:
    """What was found in some written pages; `merged` adds tallies up.

    Attributes:
        pages: pages that have a written line.
        lines: written lines.
        histogram: int64, shape (256,): bytes of written lines by value.
        entropies: int64, shape (ENTROPY_BINS,): pages by entropy.
        entropy_sum: of all pages, in 2^-20 bits per byte.
        structured: pages of too little entropy to be random.
        first_structured: page number of the first, or None.
        compressed_pages: pages given to zlib.
        compressed_from, compressed_to: bytes of their written lines, and what zlib made of these.
        blocks, line_values: what repeats.
        ascii, utf16: printable strings.
    """

    pages: int
    lines: int
    histogram: npt.NDArray[np.int64]
    entropies: npt.NDArray[np.int64]
    entropy_sum: int
    structured: int
    first_structured: int | None
    compressed_pages: int
    compressed_from: int
    compressed_to: int
    blocks: Sketch
    line_values: Sketch
    ascii: Found
    utf16: Found

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Self:
        """The sum of tallies; of none, an empty one."""
        parts = list(tallies)
        firsts = [one.first_structured for one in parts if one.first_structured is not None]
        return cls(
            pages=sum(one.pages for one in parts),
            lines=sum(one.lines for one in parts),
            histogram=_sum([one.histogram for one in parts], SYMBOLS),
            entropies=_sum([one.entropies for one in parts], ENTROPY_BINS),
            entropy_sum=sum(one.entropy_sum for one in parts),
            structured=sum(one.structured for one in parts),
            first_structured=min(firsts, default=None),
            compressed_pages=sum(one.compressed_pages for one in parts),
            compressed_from=sum(one.compressed_from for one in parts),
            compressed_to=sum(one.compressed_to for one in parts),
            blocks=Sketch.merged(one.blocks for one in parts),
            line_values=Sketch.merged(one.line_values for one in parts),
            ascii=Found.merged(one.ascii for one in parts),
            utf16=Found.merged(one.utf16 for one in parts),
        )

    @property
    def page_entropy(self) -> float:
        """The mean of its pages' entropies, bits per byte; 0 without pages."""
        return self.entropy_sum / _FIXED_POINT / self.pages if self.pages else 0.0


def tally_pages(pages: PagesArray, numbers: npt.NDArray[np.int64], sampling: Sampling) -> Tally:
    """Look at pages.

    Args:
        pages: uint8, shape (n, 4096), C-contiguous.
        numbers: int64, shape (n,): their numbers, DRAM address / 4096.
        sampling: what is not done with all of them.
    """
    written = written_lines(pages)
    any_line = written.any(axis=1)
    if not any_line.all():
        pages, numbers, written = pages[any_line], numbers[any_line], written[any_line]
    if len(pages) == 0:
        return Tally.merged(())
    lines = written.sum(axis=1, dtype=np.int64)
    places = hash_numbers(numbers)
    entropies, histogram = np.empty(len(pages)), np.zeros(SYMBOLS, np.int64)
    block_hashes, line_hashes = [], []
    for first in range(0, len(pages), _BATCH_PAGES):
        part = slice(first, first + _BATCH_PAGES)
        entropies[part], counts = page_entropy(pages[part], lines[part], compiled=sampling.compiled)
        histogram += counts.sum(axis=0)
        words = pages[part].view(np.uint64)
        blocks, line_values = _sample(words, written[part], places[part], sampling.shift)
        block_hashes.append(blocks)
        line_hashes.append(line_values)
    structured = numbers[entropies < structured_below()[lines]]
    compressed = _compress(pages, written, places, sampling.page_shift)
    ascii_found, utf16_found = find_strings(pages, numbers)
    return Tally(
        pages=len(pages),
        lines=int(lines.sum()),
        histogram=histogram,
        entropies=by_entropy(entropies),
        entropy_sum=int(np.rint(entropies * _FIXED_POINT).astype(np.int64).sum()),
        structured=len(structured),
        first_structured=int(structured.min()) if len(structured) else None,
        compressed_pages=compressed[0],
        compressed_from=compressed[1],
        compressed_to=compressed[2],
        blocks=Sketch.of(np.concatenate(block_hashes)),
        line_values=Sketch.of(np.concatenate(line_hashes)),
        ascii=ascii_found,
        utf16=utf16_found,
    )


def written_lines(pages: PagesArray) -> npt.NDArray[np.bool_]:
    """Which lines were written: bool, shape (n, 64), of uint8 pages of shape (n, 4096)."""
    words = pages.view(np.uint64)
    # A line of ciphertext begins with eight zeros once in 2^64 times.
    begun = np.not_equal(words[:, :: LINE_BYTES // 8], 0)
    if begun.all():
        return begun
    blocks = words[:, 0::2] | words[:, 1::2]
    halves = blocks[:, 0::2] | blocks[:, 1::2]
    lines = halves[:, 0::2] | halves[:, 1::2]
    return np.not_equal(lines, 0)


def page_entropy(
    pages: PagesArray, lines: npt.NDArray[np.int64], *, compiled: bool = False
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Entropy of the written lines of each page.

    Args:
        pages: uint8, shape (n, 4096), C-contiguous.
        lines: int64, shape (n,): how many lines of each were written, 1 to 64.
        compiled: as `Sampling`.

    Returns:
        bits per byte, float64, shape (n,); and byte counts, int64, shape (n, 256).
    """
    if compiled:
        from mktme.dump.byte_counts import count_bytes
    else:
        count_bytes = _count_bytes
    counts = count_bytes(pages)
    counts[:, 0] -= (PAGE_LINES - lines) * LINE_BYTES
    size = lines * LINE_BYTES
    # Whole numbers, so that the sum is the same in whatever order a CPU takes it.
    total = _count_logs().take(counts).sum(axis=1)
    return np.log2(size) - total / (size * float(_COUNT_POINT)), counts


def _count_bytes(pages: PagesArray) -> npt.NDArray[np.int64]:
    """As `mktme.dump.byte_counts.count_bytes`."""
    # A call for each page, on an int64 copy: that is what bincount counts in, and the counts stay
    # in L1. One call for many pages, with an offset each, takes half as long again.
    copies = np.empty((_COPIED_PAGES, PAGE_BYTES), np.int64)
    rows = list(copies)
    each = [np.empty(0, np.int64)]
    for first in range(0, len(pages), _COPIED_PAGES):
        part = pages[first : first + _COPIED_PAGES]
        copies[: len(part)] = part
        each += [np.bincount(row, None, SYMBOLS) for row in rows[: len(part)]]
    return np.concatenate(each).reshape(len(pages), SYMBOLS)


def by_entropy(entropies: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Pages by entropy, 0 to 8 bits per byte: int64, shape (ENTROPY_BINS,); 8 is in the last."""
    bins = np.minimum((entropies * (ENTROPY_BINS / 8)).astype(np.int64), ENTROPY_BINS - 1)
    return np.bincount(bins, minlength=ENTROPY_BINS)


def _sample(
    words: npt.NDArray[np.uint64], written: npt.NDArray[np.bool_], places: Hashes, shift: int
) -> tuple[Hashes, Hashes]:
    """Hashes of blocks and of lines that are in a sample, but for lines that were not written.

    Args:
        words: uint64, shape (n, 512).
        written: bool, shape (n, 64).
        places: of the pages, shape (n,).
        shift: one in 2^shift; 0: all.
    """
    if shift == 0:
        lines = words.reshape(-1, LINE_BYTES // 8)[written.reshape(-1)]
        blocks = hash_blocks(lines)
        return blocks.reshape(-1), hash_lines(blocks).reshape(-1)
    taken = in_sample(words, shift)
    taken[places < np.uint64(1 << (64 - shift))] = True
    at = np.flatnonzero(taken)
    at = at[written.take(at // LINE_BLOCKS)]
    blocks = hash_blocks(words.reshape(-1, BLOCK_BYTES // 8)[at])
    lines = words.reshape(-1, LINE_BYTES // 8)[at[at % LINE_BLOCKS == 0] // LINE_BLOCKS]
    return blocks.reshape(-1), hash_lines(hash_blocks(lines)).reshape(-1)


def _compress(
    pages: PagesArray, written: npt.NDArray[np.bool_], places: Hashes, shift: int
) -> tuple[int, int, int]:
    """How many pages zlib was given, their bytes, and what it made of these."""
    chosen = list(range(len(pages)))
    if shift:
        chosen = np.flatnonzero(places < np.uint64(1 << (64 - shift))).tolist()
    before = after = 0
    for at in chosen:
        data = pages[at].reshape(PAGE_LINES, LINE_BYTES)[written[at]].tobytes()
        before += len(data)
        after += len(zlib.compress(data, 1))
    return len(chosen), before, after


def _sum(arrays: Sequence[npt.NDArray[np.int64]], size: int) -> npt.NDArray[np.int64]:
    return np.sum(arrays, axis=0, dtype=np.int64) if arrays else np.zeros(size, np.int64)


@functools.cache
def _count_logs() -> npt.NDArray[np.int64]:
    """For each count c to 4096: c log2(c), in 2^-32 bits."""
    counts = np.arange(PAGE_BYTES + 1)
    return np.rint(counts * np.log2(np.maximum(counts, 1)) * _COUNT_POINT).astype(np.int64)


@functools.cache
def structured_below() -> npt.NDArray[np.float64]:
    """From which entropy down a page is structured: float64, shape (65,), by written lines."""
    found = np.zeros(PAGE_LINES + 1)
    for lines in range(1, PAGE_LINES + 1):
        random = entropy_of_random(lines * LINE_BYTES)
        found[lines] = random.mean - PAGE_DEVIATIONS * random.deviation
    return found
