# SPDX-License-Identifier: GPL-2.0-or-later
"""Counting values that come more than once, in bounded memory, whatever the order they come in.

A sketch has the hashes of the values that were counted, and how often each came. Values are not
dropped at random but by their hash, so that whoever else sees the same value drops it too: parts
of an image that were looked at apart, by other threads or machines, merge to what one reader of
all of it would have found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

LIMIT: Final = 1 << 20
"""The most values that a sketch keeps: 16 MiB. Sampling aims at half of it, and a guest that makes
its memory such that its hashes are small meets this."""

# Odd numbers with bits all over: 2^64 over the golden ratio, and those of MurmurHash3 and xxHash.
_K0: Final = np.uint64(0x9E3779B97F4A7C15)
_K1: Final = np.uint64(0xFF51AFD7ED558CCD)
_K2: Final = np.uint64(0xC4CEB9FE1A85EC53)
_PLACES: Final = np.array(
    [0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5], np.uint64
)
_HALF: Final = np.uint64(32)
_WHOLE: Final = 1 << 64

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Sketch:
    """How often values came.

    Attributes:
        hashes: uint64, shape (n,), ascending, each once.
        counts: int64, shape (n,): how often each came.
        cut: hashes from here on were dropped; 2^64, none was.
    """

    hashes: Hashes
    counts: npt.NDArray[np.int64]
    cut: int = _WHOLE

    @classmethod
    def empty(cls) -> Self:
        """Of no values."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.int64))

    @classmethod
    def of(cls, hashes: Hashes, limit: int = LIMIT) -> Self:
        """Count hashes: uint64, shape (n,), in any order."""
        return cls.merged([cls(hashes, np.ones(len(hashes), np.int64))], limit)

    @classmethod
    def merged(cls, parts: Iterable[Sketch], limit: int = LIMIT) -> Self:
        """What one reader of all the parts would have found."""
        found = list(parts)
        if not found:
            return cls.empty()
        cut = min(one.cut for one in found)
        all_hashes = np.concatenate([one.hashes for one in found])
        all_counts = np.concatenate([one.counts for one in found])
        # Nearly all came once where it is ciphertext: they are sorted without their counts, which
        # is several times as fast, and what the others had more is put on top.
        more = all_counts > 1
        more_hashes, more_counts = all_hashes[more], all_counts[more] - 1
        all_hashes.sort(kind="stable" if len(found) > 1 else None)  # stable: a merge of runs
        if cut < _WHOLE:
            all_hashes = all_hashes[: np.searchsorted(all_hashes, np.uint64(cut))]
            kept = more_hashes < np.uint64(cut)
            more_hashes, more_counts = more_hashes[kept], more_counts[kept]
        first = np.flatnonzero(all_hashes[1:] != all_hashes[:-1]) + 1
        first = np.concatenate(([0], first)) if len(all_hashes) else first
        hashes = all_hashes[first]
        counts = np.diff(first, append=len(all_hashes))
        np.add.at(counts, np.searchsorted(hashes, more_hashes), more_counts)
        # A value that is among the `limit` smallest of all is so in each part that has it: what is
        # dropped anywhere would be dropped in the end, and counts of what stays are complete.
        if len(hashes) > limit:
            cut = int(hashes[limit])
            hashes, counts = hashes[:limit].copy(), counts[:limit].copy()
        return cls(hashes, counts, cut)

    @property
    def counted(self) -> int:
        """How many values were counted, each time that it came."""
        return int(self.counts.sum())

    @property
    def repeated(self) -> int:
        """How many of them came more than once, each time that they did."""
        return int(self.counts[self.counts > 1].sum())

    @property
    def most(self) -> int:
        """How often the most frequent one came; 0 if there is none."""
        return int(self.counts.max(initial=0))


def hash_blocks(words: npt.NDArray[np.uint64]) -> Hashes:
    """Hash 16-byte blocks.

    Equal hashes of unequal blocks are as likely as of random numbers, but for blocks made for it.

    Args:
        words: uint64, shape (..., 2 n): two a block.

    Returns:
        uint64, shape (..., n).
    """
    found = words[..., 0::2] * _K0
    # Without this shift the hash were a sum of products, and blocks that differ in the upper bit
    # of both halves, as (x, y) and (-x, -y) do where floating-point numbers are, had the same.
    found ^= found >> _HALF
    found += words[..., 1::2]
    found *= _K1
    return found


def in_sample(words: npt.NDArray[np.uint64], shift: int) -> npt.NDArray[np.bool_]:
    """Which 16-byte blocks are in a sample of one in 2^shift.

    It looks at their first halves alone, which takes a third of the time of a hash: blocks that
    share it are all in the sample, or all out of it.

    Args:
        words: uint64, shape (..., 2 n): two a block.
        shift: 1 to 63.

    Returns:
        bool, shape (..., n).
    """
    mixed = words[..., 0::2] * _K0
    # The upper end: zeros, which are 0 here too, must not be in every sample.
    chosen: npt.NDArray[np.bool_] = mixed >= np.uint64(_WHOLE - (1 << (64 - shift)))
    return chosen


def hash_lines(blocks: Hashes) -> Hashes:
    """Hash 64-byte lines.

    Args:
        blocks: `hash_blocks` of them, uint64, shape (..., 4 n).

    Returns:
        uint64, shape (..., n).
    """
    products = blocks * np.tile(_PLACES, blocks.shape[-1] // 4)
    found = products[..., 0::4] + products[..., 1::4]
    found += products[..., 2::4]
    found += products[..., 3::4]
    return found


def hash_numbers(numbers: npt.NDArray[np.int64]) -> Hashes:
    """Hash page numbers, int64 of any shape: which pages are in a sample follows no stride."""
    found = (numbers.astype(np.uint64) + np.uint64(1)) * _K0
    found ^= found >> _HALF
    found *= _K1
    found ^= found >> _HALF
    found *= _K2
    return found
