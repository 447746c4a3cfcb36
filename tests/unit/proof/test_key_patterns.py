# SPDX-License-Identifier: GPL-2.0-or-later
"""AES key expansion against FIPS 197, and the search for each form of a key."""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.proof.key_patterns import (
    KeyPatterns,
    decryption_round_keys,
    encryption_round_keys,
)

_random = random.Random(197)
KEYS = {"small": _random.randbytes(32), "large": _random.randbytes(64)}
PATTERNS = KeyPatterns(KEYS)

# FIPS 197, appendix A.1: w[0] to w[43]
A_1 = """
2b7e151628aed2a6abf7158809cf4f3c a0fafe1788542cb123a339392a6c7605
f2c295f27a96b9435935807a7359f67f 3d80477d4716fe3e1e237e446d7a883b
ef44a541a8525b7fb671253bdb0bad00 d4d1c6f87c839d87caf2b8bc11f915bc
6d88a37a110b3efddbf98641ca0093fd 4e54f70e5f5fc9f384a64fb24ea6dc4f
ead27321b58dbad2312bf5607f8d292f ac7766f319fadc2128d12941575c006e
d014f9a8c9ee2589e13f0cc8b6630ca6
"""
# FIPS 197, appendix A.3: w[0] to w[59]
A_3 = """
603deb1015ca71be2b73aef0857d7781 1f352c073b6108d72d9810a30914dff4
9ba354118e6925afa51a8b5f2067fcde a8b09c1a93d194cdbe49846eb75d5b9a
d59aecb85bf3c917fee94248de8ebe96 b5a9328a2678a647983122292f6c79b3
812c81addadf48ba24360af2fab8b464 98c5bfc9bebd198e268c3ba709e04214
68007bacb2df331696e939e46c518d80 c814e20476a9fb8a5025c02d59c58239
de1369676ccc5a71fa2563959674ee15 5886ca5d2e2f31d77e0af1fa27cf73c3
749c47ab18501ddae2757e4f7401905a cafaaae3e4d59b349adf6acebd10190d
fe4890d1e6188d0b046df344706c631e
"""
# FIPS 197, appendix C.1, equivalent inverse cipher: round[10].ik_sch to round[0].ik_sch
C_1 = """
000102030405060708090a0b0c0d0e0f 8c56dff0825dd3f9805ad3fc8659d7fd
a0db02992286d160a2dc029c2485d561 c7c6e391e54032f1479c306d6319e50c
a8a2f5044de2c7f50a7ef79869671294 2ec410276326d7d26958204a003f32de
72e3098d11c5de5f789dfe1578a2cccb 8d82fc749c47222be4dadc3e9c7810f5
1362a4638f2586486bff5a76f7874a83 13aa29be9c8faff6f770f58000f7bf03
13111d7fe3944a17f307a78b4d2b30c5
"""


def blocks(text: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(word) for word in text.split())


@pytest.mark.parametrize(("vector", "key_blocks"), [(A_1, 1), (A_3, 2)], ids=["A.1", "A.3"])
def test_key_expansion_is_that_of_fips_197(vector: str, key_blocks: int) -> None:
    expected = blocks(vector)
    assert encryption_round_keys(b"".join(expected[:key_blocks])) == expected


def test_equivalent_inverse_key_expansion_is_that_of_fips_197() -> None:
    expected = blocks(C_1)
    assert decryption_round_keys(expected[0]) == expected


def forms(key: bytes) -> Iterator[tuple[str, bytes]]:
    """Each form that a key has, made in another way than the module does."""
    words, longs = len(key) // 4, len(key) // 8
    yield "", key
    yield ", bytes reversed", bytes(reversed(key))
    for size, letter, count in ((4, "I", words), (8, "Q", longs)):
        values = struct.unpack(f">{count}{letter}", key)
        yield f", bytes of {size}-byte words reversed", struct.pack(f"<{count}{letter}", *values)
        ordered = struct.pack(f">{count}{letter}", *values[::-1])
        yield f", order of {size}-byte words reversed", ordered
    yield ", hexadecimal", "".join(f"{byte:02x}" for byte in key).encode()
    yield ", hexadecimal, upper case", "".join(f"{byte:02X}" for byte in key).encode()
    for name, round_keys in (
        ("round key", encryption_round_keys(key)),
        ("decryption round key", decryption_round_keys(key)),
    ):
        for number, one in enumerate(round_keys):
            yield f", {name} {number}", one
            swapped = struct.pack("<4I", *struct.unpack(">4I", one))
            yield f", {name} {number}, bytes of 4-byte words reversed", swapped


ALL_FORMS = [
    (f"{label}: {part}", form, data)
    for label, key in KEYS.items()
    for part, half in (("data key", key[: len(key) // 2]), ("tweak key", key[len(key) // 2 :]))
    for form, data in forms(half)
]


def test_every_form_is_found_at_every_offset() -> None:
    noise = random.Random(1)
    for _part, form, data in ALL_FORMS:
        size = 16 if "hexadecimal" in form else 8
        for offset in range(9):
            around = noise.randbytes(offset) + data + noise.randbytes(noise.randrange(9))
            found = PATTERNS.find(around)
            pieces = [(offset + at, offset + at + size) for at in range(0, len(data), size)]
            assert sorted((at, behind) for _name, at, behind in found) == pieces, form


def test_what_is_found_is_named() -> None:
    # A form may be the same as another in pieces of 8 bytes, so not all are found as themselves.
    named = {
        (part, form): {name for name, _at, _behind in PATTERNS.find(data)}
        for part, form, data in ALL_FORMS
    }
    assert named["small: data key", ""] == {
        "small: data key, bytes 0-7",
        "small: data key, bytes 8-15",
    }
    assert named["large: tweak key", ", round key 13"] == {
        "large: tweak key, round key 13, bytes 0-7",
        "large: tweak key, round key 13, bytes 8-15",
    }
    for (part, _form), names in named.items():
        assert names
        assert all(name.startswith(part) for name in names)


def test_python_repr_is_found() -> None:
    for key in KEYS.values():
        assert len(PATTERNS.find(f"no key {key!r}".encode())) >= len(key) // 8 - 2
        assert len(PATTERNS.find(f"no key {bytearray(key)!r}".encode())) >= len(key) // 8 - 2


@given(
    noise=st.binary(max_size=100),
    part=st.sampled_from(ALL_FORMS),
    start=st.integers(0, 100),
    size=st.integers(15, 64),
)
def test_any_fifteen_bytes_in_a_row_are_found(
    noise: bytes, part: tuple[str, str, bytes], start: int, size: int
) -> None:
    _part, form, data = part
    if "hexadecimal" in form:
        size += 16
    start = min(start, max(0, len(data) - size))
    assert PATTERNS.find(noise + data[start : start + size] + noise)


def test_less_than_eight_bytes_are_no_hit() -> None:
    for key in KEYS.values():
        for at in range(len(key) - 6):
            assert PATTERNS.find(b"some " + key[at : at + 7] + b", and no more") == []
            assert PATTERNS.find(key[at : at + 7].hex().encode()) == []


def test_nothing_is_found_where_no_key_is() -> None:
    assert PATTERNS.find(random.Random(2).randbytes(16 << 20)) == []
    assert PATTERNS.find(random.Random(3).randbytes(1 << 20).hex().encode()) == []
    assert PATTERNS.find(bytes(1 << 20)) == []
    assert PATTERNS.find(b"") == []
    assert PATTERNS.find(b"abc") == []


def test_other_keys_are_not_found() -> None:
    """Each form of each key, searched for with another key: the control of the search above."""
    other = KeyPatterns({"other": random.Random(5).randbytes(64)})
    assert other.find(b"".join(data for _part, _form, data in ALL_FORMS)) == []


@pytest.mark.parametrize("size", [0, 16, 31, 33, 48, 65])
def test_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"32 or 64 bytes, not {size}"):
        KeyPatterns({"bad": random.Random(6).randbytes(size)})


def test_search_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no key"):
        KeyPatterns({})


def test_key_that_would_be_found_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="bad: tweak key: not random enough"):
        KeyPatterns({"bad": random.Random(7).randbytes(16) + bytes(8) + bytes(range(8))})


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_keys_may_be_any_buffer(kind: type[bytes]) -> None:
    patterns = KeyPatterns({"one": kind(KEYS["small"])})
    assert len(patterns.find(KEYS["small"])) == 4


def test_patterns_show_and_give_away_nothing() -> None:
    assert PATTERNS.find(repr(PATTERNS).encode()) == []
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(PATTERNS)
