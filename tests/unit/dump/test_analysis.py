# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages looked at: known answers, and results that do not depend on how pages are cut up."""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mktme.dump.analysis import (
    ENTROPY_BINS,
    Sampling,
    Tally,
    page_entropy,
    structured_below,
    tally_pages,
    written_lines,
)

from .contents import counter, encrypt, encrypt_without_addresses, prose
from .equal import same

PAGE, LINE = 4096, 64
ALL = Sampling(0, 0)


def as_pages(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE)


def tally(data: bytes, sampling: Sampling = ALL, first: int = 0) -> Tally:
    pages = as_pages(data)
    return tally_pages(pages, np.arange(first, first + len(pages)), sampling)


def test_pages_of_zeros_were_never_written() -> None:
    assert same(tally(bytes(3 * PAGE)), Tally.merged(()))


def test_constant_page() -> None:
    found = tally(b"\x55" * PAGE, first=9)
    assert (found.pages, found.lines) == (1, 64)
    assert found.page_entropy == 0
    assert found.histogram.tolist() == [PAGE if value == 0x55 else 0 for value in range(256)]
    assert found.entropies.tolist() == [1] + [0] * (ENTROPY_BINS - 1)
    assert (found.structured, found.first_structured) == (1, 9)
    assert (found.blocks.counted, found.blocks.repeated, found.blocks.most) == (256, 256, 256)
    assert (found.line_values.counted, found.line_values.repeated) == (64, 64)
    assert found.compressed_to == len(zlib.compress(b"\x55" * PAGE, 1))
    assert found.ascii.count == 1


def test_page_of_every_value_alike() -> None:
    found = tally(counter(PAGE))
    assert found.page_entropy == 8
    assert found.entropies[-1] == 1
    assert found.structured == 0  # by its entropy; its blocks tell
    assert (found.blocks.counted, found.blocks.repeated, found.blocks.most) == (256, 256, 16)


def test_random_pages() -> None:
    data = random.Random(1).randbytes(256 * PAGE)
    found = tally(data)
    assert (found.pages, found.lines, found.structured) == (256, 256 * 64, 0)
    assert found.page_entropy == pytest.approx(7.9546, abs=5 * 0.004 / 16)
    assert (found.blocks.counted, found.blocks.repeated) == (256 * 256, 0)
    assert (found.line_values.counted, found.line_values.repeated) == (256 * 64, 0)
    assert found.compressed_pages == 256
    assert 1 < found.compressed_to / found.compressed_from < 1.01
    counts = Counter(data)
    assert found.histogram.tolist() == [counts[value] for value in range(256)]


def test_page_of_text() -> None:
    data = prose(PAGE)
    found = tally(data)
    counts = Counter(data)
    by_hand = -sum(n / PAGE * math.log2(n / PAGE) for n in counts.values())
    assert found.page_entropy == pytest.approx(by_hand, abs=1e-6)
    assert found.structured == 1
    assert found.compressed_to == len(zlib.compress(data, 1))
    assert found.ascii.count == 1
    assert found.ascii.longest[0].chars == PAGE


@pytest.mark.parametrize("lines", [1, 7, 63])
def test_lines_that_were_not_written_are_not_in_it(lines: int) -> None:
    content = random.Random(2).randbytes(lines * LINE)
    page = bytearray(PAGE)
    places = random.Random(3).sample(range(64), lines)
    for at, place in enumerate(sorted(places)):
        page[place * LINE : (place + 1) * LINE] = content[at * LINE : (at + 1) * LINE]
    pages = as_pages(bytes(page))
    written = written_lines(pages)
    assert np.flatnonzero(written[0]).tolist() == sorted(places)
    found = tally(bytes(page))
    counts = Counter(content)
    by_hand = -sum(n / len(content) * math.log2(n / len(content)) for n in counts.values())
    assert page_entropy(pages, written.sum(axis=1))[0][0] == pytest.approx(by_hand, abs=1e-7)
    assert found.histogram.tolist() == [counts[value] for value in range(256)]
    assert (found.lines, found.blocks.counted) == (lines, lines * 4)
    assert found.compressed_from == len(content)
    assert found.structured == 0


def test_line_with_one_bit_was_written() -> None:
    for byte in range(LINE):
        page = bytearray(PAGE)
        page[LINE * 5 + byte] = 0x80
        assert np.flatnonzero(written_lines(as_pages(bytes(page)))[0]).tolist() == [5]


def test_from_where_on_a_page_is_structured() -> None:
    limits = structured_below()
    assert limits[64] == pytest.approx(7.9546 - 8 * 0.0040, abs=3e-4)
    assert (np.diff(limits[1:]) > 0).all()
    # One line: 64 random bytes have about 57 values.
    assert 5 < limits[1] < 5.8
    for lines in (1, 8, 64):
        text = prose(lines * LINE).ljust(PAGE, b"\0")
        noise = random.Random(lines).randbytes(lines * LINE).ljust(PAGE, b"\0")
        assert (tally(text).structured, tally(noise).structured) == (1, 0)


def test_same_plaintext_at_two_addresses_does_not_repeat() -> None:
    plaintext = prose(4 * PAGE) * 4
    encrypted = tally(encrypt(plaintext, 0))
    assert (encrypted.blocks.repeated, encrypted.line_values.repeated) == (0, 0)
    assert encrypted.structured == 0
    in_plain = tally(plaintext)
    assert in_plain.line_values.repeated == in_plain.line_values.counted == 16 * 64
    # Each page looks random, its text does not show, and yet it repeats.
    broken = tally(encrypt_without_addresses(plaintext))
    assert broken.structured == 0
    assert broken.ascii.count == 0
    assert broken.line_values.repeated == 16 * 64


def test_sample_by_hash_finds_all_of_a_value() -> None:
    """Pairs of lines that are as far apart as can be, one in 16 looked at."""
    half = random.Random(4).randbytes(512 * PAGE)
    sampling = Sampling(4, 8)
    found = tally(half + half, sampling)
    by_place = found.line_values.counts == 1  # a sampled page's line whose like is not on one
    in_pairs = found.line_values.counts == 2
    pairs = int(in_pairs.sum())
    lines = 512 * 64
    assert pairs == pytest.approx(lines / 16, abs=5 * math.sqrt(lines / 16))
    assert (by_place | in_pairs).all()
    assert tally(half, sampling).line_values.repeated == 0


def test_sample_by_page_finds_what_is_everywhere() -> None:
    """One line on every page, that is not in the sample of one in 256."""
    sampling = Sampling(8, 8)
    rng = random.Random(5)
    line = rng.randbytes(LINE)
    data = b"".join(rng.randbytes(PAGE - LINE) + line for _ in range(2048))
    found = tally(data, sampling)
    pages = found.compressed_pages  # sampled at the same rate, so the same ones
    assert 0 < pages < 30
    assert found.line_values.most == pages
    assert found.line_values.repeated == pages


def test_sampling_is_as_much_as_fits() -> None:
    assert Sampling.for_data(2 << 20) == Sampling(0, 0)
    assert Sampling.for_data(4 << 20) == Sampling(0, 1)
    assert Sampling.for_data((4 << 20) + PAGE) == Sampling(1, 2)
    assert Sampling.for_data((1 << 30) - PAGE) == Sampling(8, 9)
    assert Sampling.for_data(64 << 30) == Sampling(14, 9, compiled=True)
    assert Sampling.for_data(0) == Sampling(0, 0)


SOME = [
    bytes(PAGE),
    prose(PAGE, 2),
    b"\xff" * PAGE,
    random.Random(6).randbytes(PAGE),
    random.Random(8).randbytes(PAGE // 2) + bytes(PAGE // 2),
    encrypt(prose(PAGE, 3), 0),
    "wide".encode("utf-16le") * (PAGE // 8),
]


@settings(max_examples=30)
@given(
    chosen=st.lists(st.sampled_from(range(len(SOME))), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    sampling=st.sampled_from([ALL, Sampling(1, 1), Sampling(3, 1)]),
    order=st.randoms(use_true_random=False),
)
def test_however_pages_are_cut_up(
    chosen: list[int], cuts: list[int], sampling: Sampling, order: random.Random
) -> None:
    pages = as_pages(b"".join(SOME[at] for at in chosen))
    numbers = np.arange(100, 100 + len(pages))
    parts = [
        tally_pages(np.ascontiguousarray(part), number, sampling)
        for part, number in zip(
            np.split(pages, sorted(cuts)), np.split(numbers, sorted(cuts)), strict=True
        )
    ]
    order.shuffle(parts)
    middle = order.randint(0, len(parts))
    merged = Tally.merged([Tally.merged(parts[:middle]), Tally.merged(parts[middle:])])
    assert same(merged, tally_pages(pages, numbers, sampling))


def test_no_pages_have_no_entropy() -> None:
    entropies, counts = page_entropy(np.empty((0, PAGE), np.uint8), np.empty(0, np.int64))
    assert (entropies.shape, counts.shape) == ((0,), (0, 256))
