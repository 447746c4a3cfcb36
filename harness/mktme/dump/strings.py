# SPDX-License-Identifier: GPL-2.0-or-later
"""Printable strings in pages, at the speed of memory where there are none.

A string that is long enough covers a whole aligned 8-byte word, so that the words that are all
printable are found first, eight bytes at a time, and what is around them then.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from mktme.engine.xts import PAGE_BYTES

MIN_ASCII: Final = 16
"""Shorter ones are everywhere: 95 of 256 values of a byte are printable."""
MIN_UTF16: Final = 8
FEW: Final = 5
"""How many of the longest are kept."""

_FIRST, _LAST = 0x20, 0x7E
_WORD_BYTES: Final = 8
_PAGE_WORDS: Final = PAGE_BYTES // _WORD_BYTES
_BATCH_WORDS: Final = 1 << 16  # 512 KiB, for a cache
_TEXT_CHARS: Final = 200

_UPPER: Final = np.uint64(0x8080808080808080)
_SPACES: Final = np.uint64(0x2020202020202020)
_ONES: Final = np.uint64(0x0101010101010101)
_UPPER16: Final = np.uint64(0xFF80FF80FF80FF80)
_SPACES16: Final = np.uint64(0x0020002000200020)
_ONES16: Final = np.uint64(0x0001000100010001)

_Words = npt.NDArray[np.uint64]
_Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class String:
    """A printable string.

    Attributes:
        address: of its first byte in DRAM.
        chars: how long it is.
        text: its first 200 characters.
    """

    address: int
    chars: int
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """Strings that were found.

    Attributes:
        count: how many.
        longest: the longest few, the longest first.
    """

    count: int
    longest: tuple[String, ...]

    @classmethod
    def merged(cls, parts: Iterable[Found]) -> Self:
        """The sum."""
        found = list(parts)
        strings = (string for part in found for string in part.longest)
        longest = heapq.nsmallest(FEW, strings, key=lambda one: (-one.chars, one.address))
        return cls(sum(part.count for part in found), tuple(longest))


def find_strings(
    pages: npt.NDArray[np.uint8], numbers: npt.NDArray[np.int64]
) -> tuple[Found, Found]:
    """Strings of characters from 20H to 7EH that do not leave their page.

    Args:
        pages: uint8, shape (n, 4096), C-contiguous.
        numbers: int64, shape (n,): their numbers.

    Returns:
        those of `MIN_ASCII` or more bytes, and those of `MIN_UTF16` or more UTF-16LE characters at
        even addresses.
    """
    words = pages.view(np.uint64).reshape(-1)
    at = np.concatenate(
        [
            np.empty(0, np.int64),
            *(
                np.flatnonzero((words[first : first + _BATCH_WORDS] & _UPPER) == 0) + first
                for first in range(0, len(words), _BATCH_WORDS)
            ),
        ]
    )
    word = words[at]
    # Bytes are below 80H here: adding 1 carries 7FH into the upper bit, and subtracting 20H borrows
    # into it what is less. A borrow reaches the next byte from one that is out anyway.
    is_ascii = ((word - _SPACES | word + _ONES) & _UPPER) == 0
    is_utf16 = ((word - _SPACES16 | word + _ONES16 | word) & _UPPER16) == 0
    return (
        _runs(pages.reshape(-1), at[is_ascii], numbers, MIN_ASCII),
        _runs(pages.view(np.uint16).reshape(-1), at[is_utf16], numbers, MIN_UTF16),
    )


def _runs(
    units: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
    words: _Index,
    numbers: npt.NDArray[np.int64],
    min_chars: int,
) -> Found:
    """Strings around words that are all printable.

    Args:
        units: the characters of all the pages.
        words: which 8-byte words are printable, ascending.
        numbers: of the pages.
        min_chars: the shortest string.
    """
    if len(words) == 0:
        return Found(0, ())
    per_word = _WORD_BYTES // units.itemsize
    starts = np.concatenate(([True], (np.diff(words) != 1) | (words[1:] % _PAGE_WORDS == 0)))
    first = words[starts]
    last = words[np.concatenate((starts[1:], [True]))]
    reach = np.arange(1, per_word)
    # What is printable before the first word and after the last: no whole word, and none on
    # another page.
    before = _printable(units, first[:, None] * per_word - reach)
    before[first % _PAGE_WORDS == 0] = False
    after = _printable(units, last[:, None] * per_word + per_word - 1 + reach)
    after[last % _PAGE_WORDS == _PAGE_WORDS - 1] = False
    begin = first * per_word - _leading(before)
    end = (last + 1) * per_word + _leading(after)
    chars = end - begin
    long = np.flatnonzero(chars >= min_chars)
    if len(long) == 0:
        return Found(0, ())
    page, unit = np.divmod(begin, per_word * _PAGE_WORDS)
    address = numbers[page] * PAGE_BYTES + unit * units.itemsize
    best = long[np.lexsort((address[long], -chars[long]))[:FEW]]
    return Found(
        len(long),
        tuple(
            String(
                int(address[one]),
                int(chars[one]),
                units[begin[one] : min(end[one], begin[one] + _TEXT_CHARS)]
                .astype(np.uint8)
                .tobytes()
                .decode("ascii"),
            )
            for one in best
        ),
    )


def _printable(
    units: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], at: _Index
) -> npt.NDArray[np.bool_]:
    found = units[np.clip(at, 0, len(units) - 1)]
    return np.asarray((found >= _FIRST) & (found <= _LAST))


def _leading(flags: npt.NDArray[np.bool_]) -> _Index:
    """How many flags of each row are set before the first that is not."""
    return np.logical_and.accumulate(flags, axis=1).sum(axis=1, dtype=np.int64)  # type: ignore[no-any-return]
