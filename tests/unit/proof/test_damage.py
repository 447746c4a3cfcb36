# SPDX-License-Identifier: GPL-2.0-or-later
"""Outcomes of tampering are told apart: noise from what only looks like it, lines from blocks."""

from __future__ import annotations

import random

import pytest

from mktme.proof.damage import ALL_LINES, BLOCK_BYTES, Outcome, Written, classify

LINE = 64
BLOCKS = 256
_random = random.Random(7)
PAGE = _random.randbytes(LINE) * 64
EARLIER = _random.randbytes(LINE) * 64
OTHERS = _random.randbytes(LINE) * 64
WRITTEN = Written(PAGE, EARLIER, (OTHERS,))
FIFTH = 1 << 5


def noise(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def with_block(block: int, data: bytes, page: bytes = PAGE) -> bytes:
    return page[: block * BLOCK_BYTES] + data + page[block * BLOCK_BYTES + len(data) :]


def with_line(line: int, data: bytes) -> bytes:
    return with_block(line * 4, data)


def outcome(found: bytes, lines: int = FIFTH, written: Written = WRITTEN) -> Outcome:
    return classify(found, written, lines).outcome


def test_unchanged_is_intact() -> None:
    assert outcome(PAGE) is Outcome.INTACT
    assert outcome(PAGE, 0) is Outcome.INTACT
    assert outcome(PAGE, ALL_LINES, Written(PAGE)) is Outcome.INTACT


@pytest.mark.parametrize("block", range(20, 24))
def test_one_block_of_noise(block: int) -> None:
    assert outcome(with_block(block, noise(BLOCK_BYTES))) is Outcome.ONE_BLOCK


def test_line_of_noise_is_garbage() -> None:
    assert outcome(with_line(5, noise(LINE))) is Outcome.GARBAGE
    assert outcome(noise(64 * LINE), ALL_LINES) is Outcome.GARBAGE


@pytest.mark.parametrize("seed", range(1000, 1200))
def test_noise_is_always_taken_for_noise(seed: int) -> None:
    assert outcome(noise(64 * LINE, seed), ALL_LINES) is Outcome.GARBAGE


def test_old_lines_and_zeros() -> None:
    assert outcome(with_line(5, EARLIER[:LINE])) is Outcome.OLD_DATA
    assert outcome(EARLIER, ALL_LINES) is Outcome.OLD_DATA
    assert outcome(with_line(5, bytes(LINE))) is Outcome.ZEROS
    assert outcome(bytes(64 * LINE), ALL_LINES) is Outcome.ZEROS


OTHERWISE = {
    "two blocks of a line": (with_block(20, noise(2 * BLOCK_BYTES)), "2 of 4 blocks are noise"),
    "three blocks of a line": (with_block(21, noise(3 * BLOCK_BYTES)), "3 of 4 blocks are noise"),
    "another line": (with_line(6, noise(LINE)), "4 blocks that were left alone changed"),
    "one line more": (with_line(5, noise(2 * LINE)), "4 blocks that were left alone changed"),
    "zeros in another line": (with_line(6, bytes(LINE)), "4 blocks that were left alone"),
    "one block of zeros": (with_block(20, bytes(BLOCK_BYTES)), "known"),
    "ones, as poison reads": (with_line(5, b"\xff" * LINE), "known"),
    "one bit, as without a cipher": (
        with_block(20, bytes([PAGE[5 * LINE] ^ 1])),
        "differs in 1 of 128 bits",
    ),
    "a byte, as of a stream cipher": (
        with_block(20, bytes([PAGE[5 * LINE] ^ 0xFF])),
        "differs in 8 of 128 bits",
    ),
    "all bits turned": (
        with_block(20, bytes(byte ^ 0xFF for byte in PAGE[5 * LINE : 5 * LINE + 16])),
        "differs in 128 of 128 bits",
    ),
    "its blocks in another order": (with_line(5, PAGE[16:64] + PAGE[:16]), "known"),
    "plaintext of somebody else": (with_line(5, OTHERS[:LINE]), "known"),
    "half an old line": (with_line(5, EARLIER[:32]), "known"),
    "an old line, changed": (
        with_line(5, bytes([EARLIER[0] ^ 1]) + EARLIER[1:16]),
        "differs in 1 of 128 bits",
    ),
    "the same noise in each block": (with_line(5, noise(BLOCK_BYTES) * 4), "is as another"),
}


@pytest.mark.parametrize(("found", "told"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_none_of_these_is_said_to_be_none(found: bytes, told: str) -> None:
    damage = classify(found, WRITTEN, FIFTH)
    assert damage.outcome is Outcome.OTHER
    assert told in damage.detail


def test_old_data_needs_an_earlier_page() -> None:
    """The control: what is not known to be old is not called so."""
    assert outcome(with_line(5, EARLIER[:LINE]), written=Written(PAGE)) is not Outcome.OLD_DATA


def test_a_whole_page_of_others_is_not_garbage() -> None:
    """As two VMs under one key would find it, without the address in the tweak."""
    assert outcome(OTHERS, ALL_LINES) is Outcome.OTHER


@pytest.mark.parametrize("size", [0, 4095, 8192])
def test_pages_are_pages(size: int) -> None:
    with pytest.raises(ValueError, match=f"a page of {size} bytes"):
        classify(bytes(size), WRITTEN, FIFTH)
    with pytest.raises(ValueError, match=f"a page of {size} bytes"):
        classify(PAGE, Written(PAGE, None, (bytes(size),)), FIFTH)
