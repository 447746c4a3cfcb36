# SPDX-License-Identifier: GPL-2.0-or-later
"""AES key schedules are found wherever they are, and nowhere else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.dump import aes_keys
from mktme.dump.aes_keys import MAX_ERRORS, Form, KeySchedule, find_schedules, xts_partners

from .key_schedules import linux_context, schedule

Bytes: TypeAlias = npt.NDArray[np.uint8]

# FIPS 197, appendix A: the key, and the last four words of its expansion.
KNOWN = {
    "A.1": ("2b7e151628aed2a6abf7158809cf4f3c", "d014f9a8c9ee2589e13f0cc8b6630ca6"),
    "A.2": (
        "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b",
        "e98ba06f448c773c8ecc720401002202",
    ),
    "A.3": (
        "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        "fe4890d1e6188d0b046df344706c631e",
    ),
}
BATCH_BYTES = 4 * aes_keys._BATCH_WORDS
# But AES-192's for decryption, which are not looked for: see aes_keys._SHAPES.
KINDS = [(shape.key_words * 4, shape.form) for shape in aes_keys._SHAPES]
KEYS = st.sampled_from([16, 24, 32]).flatmap(lambda size: st.binary(min_size=size, max_size=size))


def random_bytes(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def planted(background: bytes, at: int, content: bytes) -> Bytes:
    data = np.frombuffer(background, np.uint8).copy()
    data[at : at + len(content)] = np.frombuffer(content, np.uint8)
    return data


def flipped(data: bytes, bits: set[int]) -> bytes:
    spoilt = bytearray(data)
    for bit in bits:
        spoilt[bit // 8] ^= 1 << bit % 8
    return bytes(spoilt)


@pytest.mark.parametrize(("key", "last"), KNOWN.values(), ids=KNOWN)
def test_known_expansions(key: str, last: str) -> None:
    expansion = schedule(bytes.fromhex(key))
    assert expansion.hex().startswith(key)
    assert expansion.hex().endswith(last)
    (found,) = find_schedules(planted(bytes(4096), 1001, expansion))
    assert found == KeySchedule(
        offset=1001,
        size_bytes=len(expansion),
        form=Form.ENCRYPTION,
        swapped=False,
        errors=0,
        key=bytes.fromhex(key),
    )
    assert found.key_bits == 4 * len(key)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("key_bytes", "form"), KINDS)
@pytest.mark.parametrize("background", [random_bytes, bytes])
def test_at_each_offset_around_a_border_of_batches(
    key_bytes: int, form: Form, swapped: bool, background: type[bytes]
) -> None:
    key = random_bytes(key_bytes)
    content = schedule(key, form, swapped=swapped)
    memory = background(BATCH_BYTES + 4096)
    for at in range(BATCH_BYTES - len(content) - 5, BATCH_BYTES + 5, 3):
        (found,) = find_schedules(planted(memory, at, content))
        assert (found.offset, found.form, found.swapped) == (at, form, swapped)
        assert found.key == key


@given(st.sampled_from(KINDS), st.integers(0, 600), st.booleans(), st.booleans(), st.data())
def test_any_key_in_memory_of_its_size_and_more(
    kind: tuple[int, Form], at: int, swapped: bool, zeros: bool, data: st.DataObject
) -> None:
    key_bytes, form = kind
    key = data.draw(st.binary(min_size=key_bytes, max_size=key_bytes))
    content = schedule(key, form, swapped=swapped)
    background = bytes(at + len(content)) if zeros else random_bytes(at + len(content))
    (found,) = find_schedules(planted(background, at, content))
    assert (found.offset, found.key, found.form) == (at, key, form)


@pytest.mark.parametrize("key_bytes", [16, 24, 32])
def test_all_zero_key(key_bytes: int) -> None:
    """The beginning of its schedule is what zeros around it are."""
    (found,) = find_schedules(planted(bytes(4096), 1000, schedule(bytes(key_bytes))))
    assert (found.offset, found.key) == (1000, bytes(key_bytes))


def test_one_bit_less_is_none() -> None:
    for key_bytes in (16, 24, 32):
        content = schedule(random_bytes(key_bytes))
        for bit in range(0, 8 * len(content), 5):
            assert find_schedules(planted(bytes(512), 100, flipped(content, {bit}))) == []


@given(KEYS, st.integers(1, 2), st.data())
def test_decayed_schedule(key: bytes, count: int, data: st.DataObject) -> None:
    content = schedule(key)
    bits = data.draw(st.sets(st.integers(0, 8 * len(content) - 1), min_size=count, max_size=count))
    at = data.draw(st.integers(0, 100))
    # At either end of memory is where it has least to go by.
    memory = planted(random_bytes(at + len(content)), at, flipped(content, bits))
    (found,) = find_schedules(memory, max_errors=count)
    assert (found.offset, found.key, found.errors) == (at, key, count)
    assert find_schedules(memory, max_errors=count - 1) == []


@pytest.mark.parametrize("key_bytes", [16, 32])
def test_more_that_decayed_is_mostly_found(key_bytes: int) -> None:
    """One bit in 200, as the docstring says: nearly always."""
    random = np.random.default_rng(1)
    found = 0
    for _round in range(100):
        key = random.bytes(key_bytes)
        content = schedule(key)
        count = min(MAX_ERRORS, 8 * len(content) // 200)
        bits = set(random.choice(8 * len(content), count, replace=False).tolist())
        memory = planted(random.bytes(1024), 333, flipped(content, bits))
        found += [one.key for one in find_schedules(memory, MAX_ERRORS)] == [key]
    assert found >= 90


def lfsr(key_words: int) -> bytes:
    """Words that obey a schedule's linear relation throughout."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, np.uint32)
    for index in range(key_words, len(words)):
        words[index] = words[index - 1] ^ words[index - key_words]
    return words.tobytes()


NOT_SCHEDULES = {
    "random": random_bytes(8 << 20),
    "zeros": bytes(8 << 20),
    "ones": b"\xff" * (1 << 20),
    "words": np.arange(1 << 18, dtype="<u4").tobytes(),
    "pointers": (np.arange(1 << 17, dtype="<u8") * 8 + np.uint64(0xFFFF_8880_0000_0000)).tobytes(),
    "text": b"The quick brown fox jumps over the lazy dog. " * 20000,
    "one bit in zeros": (bytes(63) + b"\1") * 16384,
    **{f"linear, {words} words": lfsr(words) for words in (4, 6, 8)},
}


@pytest.mark.parametrize("max_errors", [0, MAX_ERRORS])
@pytest.mark.parametrize("data", NOT_SCHEDULES.values(), ids=NOT_SCHEDULES)
def test_what_is_no_schedule(data: bytes, max_errors: int) -> None:
    assert find_schedules(np.frombuffer(data, np.uint8), max_errors) == []


@pytest.mark.parametrize("what", ["zeros", "ones", "words", "text", "one bit in zeros"])
def test_plain_memory_has_nothing_to_try(what: str) -> None:
    """Nor is it slow: there is no place that would have to be compared in full."""
    words = np.frombuffer(NOT_SCHEDULES[what], "<u4")
    assert sum(map(len, aes_keys._edges(words))) <= 1


@pytest.mark.parametrize("size", [0, 1, 3, 4, 31, 175, 176])
def test_memory_too_small_for_one(size: int) -> None:
    assert find_schedules(np.frombuffer(random_bytes(size), np.uint8)) == []


def test_numbers_of_errors() -> None:
    for count in (-1, MAX_ERRORS + 1):
        with pytest.raises(ValueError, match="0 to 12 bits"):
            find_schedules(np.zeros(16, np.uint8), count)


def test_repr_does_not_show_the_key() -> None:
    key = random_bytes(16)
    (found,) = find_schedules(planted(bytes(512), 7, schedule(key)))
    assert key.hex() not in repr(found)
    assert repr(key)[2:-1] not in repr(found)


def partners(*content: bytes) -> list[tuple[int, int]]:
    memory = np.frombuffer(b"".join(content) + bytes(64), np.uint8)
    found = find_schedules(memory)
    pairs = xts_partners(found)
    return [(found[one].offset, found[other].offset) for one, other in pairs.items()]


def test_xts_pairs() -> None:
    tweak, key, other, small = (
        random_bytes(size, seed) for seed, size in enumerate([32, 32, 32, 16])
    )
    # Linux 6.1's struct aesni_xts_ctx: two contexts of 484 bytes, aligned to 16.
    assert partners(linux_context(tweak), bytes(12), linux_context(key)) == [
        (0, 496),
        (240, 496),
        (496, 0),
        (736, 0),
    ]
    # OpenSSL's two AES_KEY.
    assert partners(schedule(key), bytes(8), schedule(tweak)) == [(0, 248), (248, 0)]
    # A third schedule is not one of the pair; the same key twice is none, nor two kinds of keys.
    assert partners(schedule(key), schedule(tweak), schedule(other)) == [(0, 240), (240, 0)]
    assert partners(schedule(key), schedule(key)) == []
    assert partners(schedule(key), schedule(small)) == []
    assert partners(schedule(key), bytes(300), schedule(tweak)) == []


def test_finds_what_aeskeyfind_finds(tmp_path: Path) -> None:
    """Debian's aeskeyfind: another implementation, by the authors of the paper."""
    program = shutil.which("aeskeyfind")
    if program is None:
        pytest.skip("aeskeyfind is not installed")
    memory = bytearray(random_bytes(1 << 20))
    keys = {at: random_bytes(size, at) for at, size in ((5, 16), (70001, 32), (500002, 16))}
    for at, key in keys.items():
        memory[at : at + len(schedule(key))] = schedule(key)
    path = tmp_path / "memory"
    path.write_bytes(memory)
    theirs = subprocess.run([program, "-q", path], capture_output=True, text=True, check=True)
    ours = find_schedules(np.frombuffer(memory, np.uint8))
    assert {one.offset: one.key for one in ours} == keys
    assert set(re.findall(r"^[0-9a-f]+$", theirs.stdout, re.M)) == {
        key.hex() for key in keys.values()
    }
