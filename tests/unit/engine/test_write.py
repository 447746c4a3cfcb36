# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes through any KeyID: what a reference of software's does, whoever's the memory is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mktme.engine.controller import BATCH_PAGES, MemoryController
from mktme.engine.dram import Dram
from mktme.engine.errors import AddressError, IntegrityError, KeyIdError

from ...vectors import reference
from .macs import (
    ALL_LINES,
    LINE,
    MAC,
    NO_ENCRYPT,
    OTHER_KEY,
    OTHER_MAC,
    PAGE,
    PAGES,
    PLAIN,
    POISON,
    SHARED_KEY,
    TME,
    Platform,
    content,
    keys,
    split,
)

DATA = random.Random(8).randbytes(2 * PAGE)
KEYS = {PLAIN: SHARED_KEY, MAC: SHARED_KEY, OTHER_MAC: OTHER_KEY}


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    platform = Platform(tmp_path)
    yield platform
    platform.dram.close()


@pytest.mark.parametrize("keyid", KEYS)
def test_ciphertext_is_the_references(platform: Platform, keyid: int) -> None:
    for address, size in ((3 * PAGE + 5 * LINE, LINE), (7 * PAGE - 2 * LINE, PAGE)):
        platform.controller.write(address, DATA[:size], keyid)
        for at in range(0, size, LINE):
            tweak = (address + at).to_bytes(16, "little")
            expected = reference.encrypt(KEYS[keyid], tweak, DATA[at : at + LINE])
            assert platform.line(address + at) == expected
        assert platform.controller.read(address, size, keyid) == DATA[:size]


@pytest.mark.parametrize("keyid", [TME, PLAIN, MAC, OTHER_MAC, NO_ENCRYPT])
@pytest.mark.parametrize("assigned", [TME, PLAIN, MAC, OTHER_MAC, NO_ENCRYPT])
def test_line_is_the_writers_and_the_page_is_not(
    platform: Platform, assigned: int, keyid: int
) -> None:
    platform.write(3, content(1), assigned)
    before = [platform.pair(3 * PAGE + at) for at in range(0, PAGE, LINE)]
    platform.controller.write(3 * PAGE + 5 * LINE, DATA[:LINE], keyid)
    assert platform.controller.keyid_at(3 * PAGE) == assigned
    after = [platform.pair(3 * PAGE + at) for at in range(0, PAGE, LINE)]
    assert [at for at in range(64) if before[at] != after[at]] == [5]
    assert (after[5][1] != bytes(4)) == (keyid in (MAC, OTHER_MAC))  # its MAC, as hardware has it

    lines, poisoned = platform.read(3)
    assert lines[:5] + lines[6:] == split(content(1))[:5] + split(content(1))[6:]
    has_key = assigned == keyid or {assigned, keyid} == {PLAIN, MAC}
    if assigned in (MAC, OTHER_MAC) and assigned != keyid:
        assert (poisoned, lines[5]) == (1 << 5, POISON)
        with pytest.raises(IntegrityError):
            platform.controller.read(3 * PAGE + 5 * LINE, LINE)
    else:
        assert poisoned == 0
        assert (lines[5] == DATA[:LINE]) == has_key


def test_same_ciphertext_without_integrity_loses_its_mac(platform: Platform) -> None:
    """PLAIN and MAC have one key: nothing changes in DRAM but whose MAC it has."""
    platform.write(3, content(1), MAC)
    line = split(content(1))[5]
    stored = platform.line(3 * PAGE + 5 * LINE)
    platform.controller.write(3 * PAGE + 5 * LINE, line, PLAIN)
    assert platform.line(3 * PAGE + 5 * LINE) == stored
    assert platform.read(3)[1] == 1 << 5
    platform.controller.write(3 * PAGE + 5 * LINE, line, MAC)
    assert platform.accepts(3, content(1))


def test_write_under_the_own_keyid_heals(platform: Platform) -> None:
    platform.write(3, content(1))
    platform.line(3 * PAGE, b"x" * LINE)
    assert platform.read(3)[1] == 1
    platform.controller.write(3 * PAGE, split(content(1))[0], MAC)
    assert platform.accepts(3, content(1))


def test_zeros_of_plaintext_are_written(platform: Platform) -> None:
    platform.controller.write(3 * PAGE, bytes(PAGE), MAC)
    lines, poisoned = platform.read(3, MAC)
    assert (lines, poisoned) == ([bytes(LINE)] * 64, 0)
    assert all(platform.line(3 * PAGE + at) != bytes(LINE) for at in range(0, PAGE, LINE))
    assert platform.read(3, OTHER_MAC)[1] == ALL_LINES


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (1, LINE),
        (LINE // 2, LINE),
        (0, 0),
        (0, 1),
        (0, LINE + 1),
        (-LINE, LINE),
        (PAGES * PAGE, LINE),
        (PAGES * PAGE - LINE, 2 * LINE),
    ],
)
def test_range_that_is_none_is_refused(platform: Platform, address: int, size: int) -> None:
    before = platform.path.read_bytes()
    with pytest.raises(AddressError):
        platform.controller.write(address, bytes(size), MAC)
    assert platform.path.read_bytes() == before


def test_more_than_a_batch_is_refused(tmp_path: Path) -> None:
    with Dram.create(tmp_path / "large", (BATCH_PAGES + 1) * PAGE) as dram:
        controller = MemoryController(dram, keys())
        data = content(1, BATCH_PAGES).tobytes()
        controller.write(PAGE, data, PLAIN)
        assert controller.read(PAGE, len(data), PLAIN) == data
        with pytest.raises(AddressError, match="too many for one write"):
            controller.write(PAGE - LINE, data + bytes(LINE), PLAIN)
        assert controller.read(PAGE, len(data), PLAIN) == data


@pytest.mark.parametrize("keyid", [-1, 8, 1 << 40])
def test_keyid_that_is_none_is_refused(platform: Platform, keyid: int) -> None:
    with pytest.raises(KeyIdError):
        platform.controller.write(0, bytes(LINE), keyid)
