# SPDX-License-Identifier: GPL-2.0-or-later
"""Counting values by hash, whatever order they come in."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mktme.dump.sketch import Sketch, hash_blocks, hash_lines, hash_numbers, in_sample


def test_counts() -> None:
    found = Sketch.of(np.array([5, 9, 5, 1, 5, 9], np.uint64))
    assert found.hashes.tolist() == [1, 5, 9]
    assert found.counts.tolist() == [1, 3, 2]
    assert (found.counted, found.repeated, found.most) == (6, 5, 3)
    nothing = Sketch.merged(())
    assert (nothing.counted, nothing.repeated, nothing.most) == (0, 0, 0)


@given(
    values=st.lists(st.integers(0, 30), max_size=80),
    cuts=st.lists(st.integers(0, 80), max_size=5),
    limit=st.integers(1, 40),
    order=st.randoms(use_true_random=False),
)
def test_parts_merge_to_the_whole_in_any_order(
    values: list[int], cuts: list[int], limit: int, order: random.Random
) -> None:
    edges = [0, *sorted(cuts), len(values)]
    parts = [
        Sketch.of(np.array(values[low:high], np.uint64), limit) for low, high in pairwise(edges)
    ]
    order.shuffle(parts)
    while len(parts) > 1:  # a tree of any shape
        some = [parts.pop() for _ in range(order.randint(1, len(parts)))]
        parts.insert(order.randint(0, len(parts)), Sketch.merged(some, limit))
    (merged,) = parts
    counts = Counter(values)
    kept = sorted(counts)[:limit]
    assert merged.hashes.tolist() == kept
    assert merged.counts.tolist() == [counts[value] for value in kept]
    assert merged.cut == (sorted(counts)[limit] if len(counts) > limit else 1 << 64)


def test_hashes_tell_blocks_apart() -> None:
    """Blocks as programs have them: small numbers, signs, pointers, one bit."""
    rng = np.random.default_rng(1)
    small = rng.permutation(1 << 16)[: 1 << 15]
    blocks = np.concatenate(
        [
            np.stack((small, small[::-1]), axis=1).astype(np.uint64),
            np.stack((small, np.zeros_like(small)), axis=1).astype(np.uint64) << np.uint64(48),
            rng.standard_normal((1 << 14, 2)).view(np.uint64),
        ]
    )
    doubles = rng.standard_normal((1 << 14, 2))
    blocks = np.concatenate([blocks, doubles.view(np.uint64), (-doubles).view(np.uint64)])
    bits = np.zeros((128, 2), np.uint64)
    bits[np.arange(128), np.arange(128) // 64] = np.uint64(1) << (np.arange(128) % 64).astype(
        np.uint64
    )
    blocks = np.unique(np.concatenate([blocks, bits]), axis=0)
    hashes = hash_blocks(blocks.reshape(-1))
    assert len(np.unique(hashes)) == len(blocks)


def test_sample_of_blocks_is_by_their_first_halves() -> None:
    words = np.random.default_rng(3).integers(0, 1 << 63, (1 << 16, 2), dtype=np.uint64)
    chosen = in_sample(words, 6)[:, 0]
    expected = len(words) / 64
    assert abs(int(chosen.sum()) - expected) < 5 * expected**0.5
    words[:, 1] += np.uint64(1)
    assert (in_sample(words, 6)[:, 0] == chosen).all()
    small = np.zeros((1 << 16, 2), np.uint64)
    small[:, 0] = np.arange(1 << 16)
    assert abs(int(in_sample(small, 6).sum()) - expected) < 5 * expected**0.5
    assert not in_sample(np.zeros((1, 2), np.uint64), 6).any()


def test_hash_of_a_line_depends_on_each_block_and_its_place() -> None:
    words = np.random.default_rng(2).integers(0, 1 << 63, 8, dtype=np.uint64)
    lines = [words]
    for at in range(8):
        other = words.copy()
        other[at] ^= np.uint64(1)
        lines.append(other)
    lines.append(words.reshape(4, 2)[[1, 0, 2, 3]].reshape(-1))
    lines.append(np.zeros(8, np.uint64))
    hashes = hash_lines(hash_blocks(np.concatenate(lines)))
    assert len(np.unique(hashes)) == len(lines)


def test_sample_of_pages_follows_no_stride() -> None:
    chosen = hash_numbers(np.arange(1 << 16)) < np.uint64(1 << 56)
    numbers = np.flatnonzero(chosen)
    assert abs(len(numbers) - 256) < 5 * 16
    for stride in (2, 64, 512, 4096):
        assert len(np.unique(numbers % stride)) > 0.6 * min(stride, len(numbers))
