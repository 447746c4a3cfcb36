# SPDX-License-Identifier: GPL-2.0-or-later
"""MACs of lines: how they are made, what is detected, and what is not.

A change that is random to the MAC passes with probability 2^-28. That is by design, and not tested
by force. Nearly all keys and contents here are fixed, so nothing fails by chance either.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mktme.engine.controller import BATCH_PAGES, MemoryController
from mktme.engine.dram import Dram, mac_path
from mktme.engine.errors import IntegrityError, KeyMaterialError
from mktme.engine.integrity import LineMacs
from mktme.engine.keys import KeyTable
from mktme.engine.tme import ExclusionRange
from mktme.engine.xts import Algorithm

from ...vectors import reference
from .conftest import activated
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
    access,
    content,
    flipped,
    keys,
    split,
)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    platform = Platform(tmp_path)
    yield platform
    platform.dram.close()


# --- the MAC ----------------------------------------------------------------------------------

# Made by tests/vectors/reference.py: key, address, line, entry.
VECTORS = [
    (bytes(range(32)), 0, bytes(range(64)), 0x8E1B7D23),
    (bytes(range(32)), 0x40, bytes(range(64)), 0x8863E10B),
    (bytes(range(32)), 0x3_FFFF_FFC0, b"\xff" * 64, 0x8A8E0FC4),
    (bytes(32), 0, bytes(64), 0x887EFCD6),
    (bytes(range(255, 223, -1)), 0x1234_5678_90C0, bytes(range(128, 192)), 0x8D67E1AB),
]
VECTOR_NAMES = ["first line", "second line", "ones", "zeros", "another key"]


def entries(key: bytes, addresses: list[int], lines: list[bytes]) -> list[int]:
    words = np.frombuffer(b"".join(lines), np.uint64).reshape(-1, 8)
    made = LineMacs(key).entries(words, np.array(addresses, np.uint64))
    assert made.dtype == np.uint32
    found: list[int] = made.tolist()
    return found


def entry_by_hashlib(key: bytes, address: int, line: bytes) -> int:
    """An entry, from what the sidecar says and nothing else."""
    block = b"mktme line MAC" + bytes(90) + key
    hashed = hashlib.sha3_256(block + block + address.to_bytes(8, "little") + line).digest()
    return 1 << 31 | int.from_bytes(hashed[:4], "little") & (1 << 28) - 1


@pytest.mark.parametrize(("key", "address", "line", "entry"), VECTORS, ids=VECTOR_NAMES)
def test_mac_is_as_it_is_described(key: bytes, address: int, line: bytes, entry: int) -> None:
    assert entries(key, [address], [line]) == [entry]
    assert entry_by_hashlib(key, address, line) == entry
    assert reference.mac_entry(key, address, line) == entry


@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.tuples(st.integers(0, 2**52 - 1), st.binary(min_size=64, max_size=64)), min_size=1),
)
@settings(deadline=None)
def test_mac_of_any_line_is_as_it_is_described(key: bytes, lines: list[tuple[int, bytes]]) -> None:
    expected = [entry_by_hashlib(key, *one) for one in lines]
    assert entries(key, [at for at, _ in lines], [line for _, line in lines]) == expected


def test_macs_of_more_lines_than_are_made_at_once() -> None:
    lines = split(content(1, 50))
    addresses = [random.Random(at).randrange(2**46) for at in range(len(lines))]
    assert entries(SHARED_KEY, addresses, lines) == [
        entry_by_hashlib(SHARED_KEY, *one) for one in zip(addresses, lines, strict=True)
    ]
    assert entries(SHARED_KEY, [], []) == []


def test_every_bit_of_the_key_counts() -> None:
    line = bytes(range(64))
    good = entries(SHARED_KEY, [0], [line])
    for bit in range(256):
        assert entries(flipped(SHARED_KEY, bit), [0], [line]) != good


def test_bad_arrays_are_refused() -> None:
    macs = LineMacs(SHARED_KEY)
    lines, addresses = np.zeros((2, 8), np.uint64), np.zeros(2, np.uint64)
    bad: list[Any] = [
        (lines.astype(np.int64), addresses),
        (addresses, addresses),
        (lines, addresses.astype(np.int64)),
        (lines, addresses[:1]),
    ]
    for one in bad:
        with pytest.raises((TypeError, ValueError)):
            macs.entries(*one)


@pytest.mark.parametrize(
    "drop",
    [
        pytest.param(lambda table: table.clear(MAC), id="CLEAR_KEY"),
        pytest.param(lambda table: table.program_no_encrypt(MAC), id="NO_ENCRYPT"),
        pytest.param(
            lambda table: table.program_direct(MAC, Algorithm.AES_XTS_128_INTEGRITY, OTHER_KEY),
            id="another key",
        ),
        pytest.param(lambda table: table.reset(), id="reset"),
    ],
)
def test_key_of_macs_goes_with_the_ciphers(drop: Callable[[KeyTable], None]) -> None:
    table = keys()
    macs = table.macs(MAC)
    assert macs is not None
    line = np.zeros((1, 8), np.uint64), np.zeros(1, np.uint64)
    assert macs.entries(*line)[0] == entry_by_hashlib(SHARED_KEY, 0, bytes(64))
    drop(table)
    with pytest.raises(KeyMaterialError, match="wiped"):
        macs.entries(*line)


def test_integrity_is_only_where_the_algorithm_has_it() -> None:
    table = keys()
    with_macs = [keyid for keyid in range(8) if table.macs(keyid) is not None]
    assert with_macs == [MAC, OTHER_MAC]
    everywhere = keys(Algorithm.AES_XTS_128_INTEGRITY)
    with_macs = [keyid for keyid in range(8) if everywhere.macs(keyid) is not None]
    assert with_macs == [TME, MAC, OTHER_MAC, 5, 6, 7]  # those not programmed are as KeyID 0


def test_saved_tme_key_keeps_its_macs() -> None:
    table = activated(algorithm=Algorithm.AES_XTS_128_INTEGRITY)
    line = np.zeros((1, 8), np.uint64), np.zeros(1, np.uint64)
    macs = table.macs(0)
    assert macs is not None
    before = macs.entries(*line)
    table.save_tme_key()
    table.reset()
    assert table.macs(0) is None
    assert not table.restore_tme_key(Algorithm.AES_XTS_128)
    assert table.restore_tme_key(Algorithm.AES_XTS_128_INTEGRITY)
    table.activate(6)
    macs = table.macs(0)
    assert macs is not None
    assert macs.entries(*line) == before


# --- what DRAM holds --------------------------------------------------------------------------


def test_cipher_is_the_one_without_integrity(platform: Platform) -> None:
    platform.write(3, content(1), PLAIN)
    without = platform.path.read_bytes()
    platform.write(3, content(2), MAC)
    platform.write(3, content(1), MAC)
    assert platform.path.read_bytes() == without


def test_every_line_written_has_its_mac_and_no_other_has(platform: Platform) -> None:
    platform.write(3, content(1), mask=0xF0F)
    platform.write(4, content(2), OTHER_MAC)
    platform.write(5, content(3), PLAIN)
    for page in range(PAGES):
        for number in range(64):
            at = page * PAGE + number * LINE
            key = {3: SHARED_KEY, 4: OTHER_KEY}.get(page)
            if key is None or (page == 3 and not 0xF0F >> number & 1):
                assert platform.entry(at) == bytes(4)
            else:
                expected = entry_by_hashlib(key, at, platform.line(at))
                assert platform.entry(at) == expected.to_bytes(4, "little")


def test_without_integrity_no_mac_is_written(platform: Platform) -> None:
    for keyid in (TME, PLAIN, NO_ENCRYPT):
        platform.write(keyid, content(1), keyid)
    assert not platform.dram.has_macs
    assert mac_path(platform.path).stat().st_blocks == 0


def test_what_was_written_reads_back(platform: Platform) -> None:
    pages = np.array([1, 2, 3, 7, 8])
    platform.controller.assign(0, PAGES * PAGE, MAC)
    platform.controller.update_pages(pages, content(1, 5))
    poisoned = np.full(10, ALL_LINES, np.uint64)
    found = platform.controller.read_pages(0, 10, poisoned=poisoned)
    assert not poisoned.any()
    assert np.array_equal(found[pages], content(1, 5))
    assert not np.delete(found, pages, axis=0).any()  # never written
    assert np.array_equal(platform.controller.read_pages(0, 10), found)


def test_reads_of_more_than_a_batch_say_which_lines(tmp_path: Path) -> None:
    with Dram.create(tmp_path / "large", 300 * PAGE) as dram:
        controller = MemoryController(dram, keys())
        controller.assign(0, 300 * PAGE, MAC)
        plaintext = content(1, 300)
        for start in range(0, 300, BATCH_PAGES):
            part = plaintext[start : start + BATCH_PAGES]
            controller.update_pages(np.arange(start, start + len(part)), part)
        spoilt = {0: 1, 127: 1 << 63, 128: 6, 299: ALL_LINES}
        for page, mask in spoilt.items():
            for line in range(64):
                if mask >> line & 1:
                    at = page * PAGE + line * LINE + 5
                    access(dram.path, at, 1, flipped(access(dram.path, at, 1, None), 0))
        poisoned = np.empty(300, np.uint64)
        found = controller.read_pages(0, 300, poisoned=poisoned)
        masks = [spoilt.get(page, 0) for page in range(300)]
        assert poisoned.tolist() == masks
        bad = np.array([[mask >> line & 1 for line in range(64)] for mask in masks], bool)
        lines = found.reshape(300, 64, 8)
        assert (lines[bad] == ALL_LINES).all()
        assert np.array_equal(lines[~bad], plaintext.reshape(300, 64, 8)[~bad])


# --- what is detected -------------------------------------------------------------------------


def test_every_bit_of_a_line_counts(platform: Platform) -> None:
    address = 3 * PAGE + 9 * LINE
    platform.write(3, content(1))
    expected = split(content(1))
    expected[9] = POISON
    good = platform.line(address)
    for bit in range(512):
        platform.line(address, flipped(good, bit))
        assert platform.read(3) == (expected, 1 << 9)
        platform.line(address, good)
        assert platform.accepts(3, content(1))


def test_every_bit_of_an_entry_counts(platform: Platform) -> None:
    """The 28 of the MAC and the 4 above."""
    address = 3 * PAGE + 63 * LINE
    platform.write(3, content(1))
    good = platform.entry(address)
    for bit in range(32):
        platform.entry(address, flipped(good, bit))
        assert platform.read(3)[1] == 1 << 63
        platform.entry(address, good)
        assert platform.accepts(3, content(1))


def test_line_that_was_moved_is_poisoned(platform: Platform) -> None:
    """With its MAC, to a line of the same page and to the same line of another page."""
    platform.write(3, content(1))
    platform.write(4, content(2))
    moved = platform.pair(3 * PAGE)
    for address in (3 * PAGE + LINE, 4 * PAGE):
        before = platform.pair(address, moved)
        assert platform.read(address // PAGE)[1] == 1 << address % PAGE // LINE
        platform.pair(address, before)
    assert platform.accepts(3, content(1))
    assert platform.accepts(4, content(2))


def test_line_never_written_cannot_be_made_a_written_one(platform: Platform) -> None:
    platform.write(3, content(1))
    platform.write(4, content(2), mask=1)
    platform.pair(4 * PAGE + LINE, platform.pair(3 * PAGE + LINE))
    platform.line(4 * PAGE + 2 * LINE, b"x" * LINE)
    platform.entry(4 * PAGE + 3 * LINE, platform.entry(3 * PAGE))
    assert platform.read(4)[1] == 0b1110


@pytest.mark.parametrize("keyid", [OTHER_MAC, TME, PLAIN, NO_ENCRYPT])
def test_page_written_through_another_keyid_is_poisoned(platform: Platform, keyid: int) -> None:
    platform.write(3, content(1), keyid)
    assert not platform.accepts(3, content(1), MAC)
    assert platform.accepts(3, content(1), keyid)  # the control


def test_other_keyids_with_integrity_read_poison_and_those_without_noise(
    platform: Platform,
) -> None:
    platform.write(3, content(1))
    assert not platform.accepts(3, content(1), OTHER_MAC)
    for keyid in (TME, NO_ENCRYPT):
        lines, poisoned = platform.read(3, keyid)
        assert poisoned == 0
        assert set(lines).isdisjoint([*split(content(1)), POISON])
    # PLAIN has the same key, and does not look at MACs.
    assert platform.accepts(3, content(1), PLAIN)


def test_without_integrity_tampering_gives_a_random_block(platform: Platform) -> None:
    """The control of all above: the same change, and nobody says so."""
    platform.write(3, content(1), PLAIN)
    platform.line(3 * PAGE, flipped(platform.line(3 * PAGE), 0))
    lines, poisoned = platform.read(3)
    assert poisoned == 0
    assert lines[1:] == split(content(1))[1:]
    assert lines[0][16:] == split(content(1))[0][16:]
    assert lines[0][:16] != split(content(1))[0][:16]


def test_line_of_zeros_is_poisoned_if_its_mac_is_kept(platform: Platform) -> None:
    platform.write(3, content(1))
    platform.line(3 * PAGE, bytes(LINE))
    assert platform.read(3)[1] == 1


def test_line_without_its_mac_is_poisoned(platform: Platform) -> None:
    platform.write(3, content(1))
    platform.entry(3 * PAGE, bytes(4))
    assert platform.read(3)[1] == 1


def test_pages_swapped_between_keyids_are_poisoned(platform: Platform) -> None:
    """Two VMs' pages change places, MACs and all."""
    platform.write(3, content(1), MAC)
    platform.write(4, content(2), OTHER_MAC)

    def swap() -> None:
        for offset in range(0, PAGE, LINE):
            first, second = 3 * PAGE + offset, 4 * PAGE + offset
            platform.pair(first, platform.pair(second, platform.pair(first)))

    swap()
    for page in (3, 4):
        for keyid in (MAC, OTHER_MAC):
            assert not platform.accepts(page, content(1), keyid)
    swap()
    assert platform.accepts(3, content(1))
    assert platform.accepts(4, content(2))


def test_lost_write_is_a_replay_if_the_mac_is_lost_too(platform: Platform) -> None:
    platform.write(3, content(1))
    before = [platform.pair(3 * PAGE + at) for at in range(0, PAGE, LINE)]
    platform.write(3, content(2))
    for number, (line, _) in enumerate(before):
        platform.line(3 * PAGE + number * LINE, line)
    assert not platform.accepts(3, content(1))
    for number, pair in enumerate(before):
        platform.pair(3 * PAGE + number * LINE, pair)
    assert platform.accepts(3, content(1))


# --- what is not ------------------------------------------------------------------------------


def test_old_line_with_its_old_mac_is_accepted_at_its_address(platform: Platform) -> None:
    """No freshness, as in hardware. Either alone is detected."""
    platform.write(3, content(1))
    old = platform.pair(3 * PAGE)
    platform.write(3, content(2))
    new = platform.pair(3 * PAGE, old)
    lines, poisoned = platform.read(3)
    assert poisoned == 0
    assert lines == [split(content(1))[0], *split(content(2))[1:]]
    for mixed in ((old[0], new[1]), (new[0], old[1])):
        platform.pair(3 * PAGE, mixed)
        assert platform.read(3)[1] == 1


def test_line_made_never_written_with_its_mac_is_accepted(platform: Platform) -> None:
    """It is a replay of what was there first."""
    platform.write(3, content(1))
    platform.pair(3 * PAGE, (bytes(LINE), bytes(4)))
    lines, poisoned = platform.read(3)
    assert poisoned == 0
    assert lines == [bytes(LINE), *split(content(1))[1:]]


# --- errors -----------------------------------------------------------------------------------


def test_poison_is_an_error_unless_it_is_asked_for(platform: Platform) -> None:
    platform.controller.assign(0, 8 * PAGE, MAC)
    platform.controller.update_pages(np.arange(8), content(1, 8))
    address = 5 * PAGE + 17 * LINE
    platform.line(address, bytes(LINE))
    platform.line(7 * PAGE, bytes(LINE))
    with pytest.raises(IntegrityError, match="0x5440 does not match its MAC") as caught:
        platform.controller.read_pages(2, 6)
    assert (caught.value.address, caught.value.keyid) == (address, MAC)
    with pytest.raises(IntegrityError) as caught:
        platform.controller.read_pages(0, 8, OTHER_MAC)
    assert (caught.value.address, caught.value.keyid) == (0, OTHER_MAC)
    assert np.array_equal(platform.controller.read_pages(0, 5), content(1, 8)[:5])
    platform.controller.read_pages(0, 8, PLAIN)


def test_read_of_lines_fails_for_those_lines_only(platform: Platform) -> None:
    platform.write(3, content(1))
    platform.write(4, content(2))
    platform.line(3 * PAGE + 10 * LINE, bytes(LINE))
    data = content(1).tobytes() + content(2).tobytes()
    read = platform.controller.read
    assert read(3 * PAGE, 10 * LINE) == data[: 10 * LINE]
    assert read(3 * PAGE + 11 * LINE, 60 * LINE) == data[11 * LINE : 71 * LINE]
    assert read(3 * PAGE, 0) == b""
    for first, count in ((10, 1), (0, 11), (9, 100)):
        with pytest.raises(IntegrityError) as caught:
            read(3 * PAGE + first * LINE, count * LINE)
        assert (caught.value.address, caught.value.keyid) == (3 * PAGE + 10 * LINE, MAC)
    with pytest.raises(IntegrityError) as caught:
        read(4 * PAGE + LINE, LINE, OTHER_MAC)
    assert (caught.value.address, caught.value.keyid) == (4 * PAGE + LINE, OTHER_MAC)


@pytest.mark.parametrize(
    "poisoned",
    [np.zeros(2, np.int64), np.zeros(1, np.uint64), np.zeros((2, 1), np.uint64), [0, 0]],
    ids=["dtype", "length", "shape", "list"],
)
def test_bad_array_for_poison_is_refused(platform: Platform, poisoned: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="poisoned must be"):
        platform.controller.read_pages(0, 2, poisoned=poisoned)


# --- KeyID 0 ----------------------------------------------------------------------------------


def test_keyid_0_with_integrity_except_where_it_is_excluded(tmp_path: Path) -> None:
    platform = Platform(tmp_path, policy=Algorithm.AES_XTS_128_INTEGRITY)
    platform.controller.exclude(ExclusionRange(mask=(1 << 46) - PAGE, base=4 * PAGE))
    for page in (3, 4):
        platform.write(page, content(page), TME)
        assert platform.accepts(page, content(page))
        platform.line(page * PAGE, b"y" * LINE)
    assert platform.read(3)[1] == 1
    assert platform.entry(4 * PAGE) == bytes(4)
    assert platform.read(4) == ([b"y" * LINE, *split(content(4))[1:]], 0)
    # What was plaintext has no MAC.
    platform.controller.exclude(None)
    assert platform.read(4)[1] == ALL_LINES
    platform.dram.close()
