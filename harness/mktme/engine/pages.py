# SPDX-License-Identifier: GPL-2.0-or-later
"""Arrays of pages, seen as runs of pages and as lines; masks say which lines of a page."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE

WORDS_PER_LINE: Final = LINE_BYTES // 8


def runs_of_equal(values: NDArray[np.integer[Any]]) -> Iterator[tuple[int, int]]:
    """Split values into runs of equal ones: (index of the first, index behind the last)."""
    if len(values) == 1:  # the page of a fault: half of what a call costs is saved
        return iter(((0, 1),))
    return _runs(len(values), values[1:] != values[:-1])


def runs_of_consecutive(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Split ascending numbers into runs without a gap, as `runs_of_equal` does."""
    return _runs(len(numbers), numbers[1:] != numbers[:-1] + 1)


def _runs(count: int, breaks: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    ends = [count] if count else []
    return pairwise([0, *(breaks.nonzero()[0] + 1).tolist(), *ends])


def check_page_numbers(pages: NDArray[np.integer[Any]], most: int) -> NDArray[np.int64]:
    """Take page numbers, or raise TypeError or ValueError unless they are ascending.

    Args:
        pages: page numbers, shape (n,).
        most: the largest n.
    """
    if not isinstance(pages, np.ndarray) or pages.dtype.kind not in "iu":
        raise TypeError("pages must be an array of integers")
    if pages.ndim != 1 or len(pages) > most:
        raise ValueError(f"pages must have shape (n,), n <= {most}, not {pages.shape}")
    numbers = pages.astype(np.int64)
    if (numbers[1:] <= numbers[:-1]).any():
        raise ValueError("pages must be ascending")
    return numbers


def as_lines(pages: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """View pages (n, 512) as lines (n * 64, 8)."""
    return pages.reshape(-1, WORDS_PER_LINE)


def any_of_line(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether any of 8 words' flags is set: (n, 8 * k) to (n, k).

    The 8 bytes of a line's flags are looked at as one word: ``any(axis=-1)`` is ten times slower
    over so short an axis.
    """
    result: NDArray[np.bool_] = flags.view(np.uint64) != 0
    return result


def pack_masks(lines: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Pack flags (n, 64) into masks (n,); line i is bit i."""
    return np.packbits(lines, axis=1, bitorder="little").view(np.uint64).reshape(-1)


def first_line(mask: int) -> int:
    """The first line in a mask, which is not 0."""
    return (mask & -mask).bit_length() - 1


def unpack_masks(masks: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """The inverse of `pack_masks`; ``masks`` is C-contiguous."""
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little")
    return bits.view(np.bool_).reshape(-1, LINES_PER_PAGE)
