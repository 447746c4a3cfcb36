# SPDX-License-Identifier: GPL-2.0-or-later
"""XtsCipher's interface; that its results are AES-XTS is shown by tests/vectors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from mktme.engine.errors import KeyMaterialError
from mktme.engine.xts import Algorithm, XtsCipher

KEY = bytes(range(100, 132))


@pytest.fixture
def cipher() -> XtsCipher:
    return XtsCipher(Algorithm.AES_XTS_128, KEY)


def lines(count: int) -> Any:
    return np.random.default_rng(count).integers(0, 2**64, (count, 8), np.uint64)


def addresses(count: int) -> Any:
    return np.arange(count, dtype=np.uint64) * np.uint64(64)


@pytest.mark.parametrize("count", [0, 1, 64, 4096, 4097])
def test_decrypting_gives_the_plaintext(cipher: XtsCipher, count: int) -> None:
    encrypted = cipher.encrypt_lines(lines(count), addresses(count))
    assert count == 0 or (encrypted != lines(count)).all()
    assert np.array_equal(cipher.decrypt_lines(encrypted, addresses(count)), lines(count))


def test_out_may_be_the_input_or_another_array(cipher: XtsCipher) -> None:
    expected = cipher.encrypt_lines(lines(5000), addresses(5000))
    out = np.empty_like(expected)
    assert cipher.encrypt_lines(lines(5000), addresses(5000), out=out) is out
    assert np.array_equal(out, expected)
    in_place = lines(5000)
    cipher.encrypt_lines(in_place, addresses(5000), out=in_place)
    assert np.array_equal(in_place, expected)
    cipher.decrypt_lines(in_place, addresses(5000), out=in_place)
    assert np.array_equal(in_place, lines(5000))


def test_input_may_be_read_only(cipher: XtsCipher) -> None:
    plaintext = lines(3)
    plaintext.flags.writeable = False
    cipher.encrypt_lines(plaintext, addresses(3))
    assert np.array_equal(plaintext, lines(3))


def test_address_and_key_matter(cipher: XtsCipher) -> None:
    zeros = np.zeros((2, 8), np.uint64)
    at_two_addresses = cipher.encrypt_lines(zeros, np.array([0, 64], np.uint64))
    assert (at_two_addresses[0] != at_two_addresses[1]).all()
    other = XtsCipher(Algorithm.AES_XTS_128, KEY[::-1])
    assert (other.encrypt_lines(zeros, addresses(2)) != at_two_addresses).all()


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_key_of_wrong_length_is_refused(size: int) -> None:
    with pytest.raises(KeyMaterialError, match=f"32 bytes, this one has {size}"):
        XtsCipher(Algorithm.AES_XTS_128, bytes(range(size)))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_equal_halves_are_refused(algorithm: Algorithm) -> None:
    key = bytearray(range(algorithm.key_bytes // 2)) * 2
    with pytest.raises(KeyMaterialError, match=r"IG C\.I"):
        XtsCipher(algorithm, key)
    key[-1] ^= 1
    XtsCipher(algorithm, key)


def test_key_of_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError):
        XtsCipher(Algorithm.AES_XTS_128, "0" * 32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be an Algorithm, not str"):
        XtsCipher("aes-xts-128", KEY)  # type: ignore[arg-type]


def test_callers_key_is_copied() -> None:
    key = bytearray(KEY)
    cipher = XtsCipher(Algorithm.AES_XTS_128, memoryview(key))
    before = cipher.encrypt_lines(lines(1), addresses(1))
    key[:] = bytes(32)
    assert np.array_equal(cipher.encrypt_lines(lines(1), addresses(1)), before)


BAD_ARRAYS: list[tuple[Any, Any, type[Exception]]] = [
    ([[0] * 8], addresses(1), TypeError),
    (lines(1).view(np.int64), addresses(1), TypeError),
    (lines(1), addresses(1).view(np.int64), TypeError),
    (lines(2), addresses(1), ValueError),
    (lines(2).reshape(-1), addresses(16), ValueError),
    (lines(2).reshape(4, 4), addresses(4), ValueError),
    (lines(4)[::2], addresses(2), ValueError),
    (np.asfortranarray(lines(4)), addresses(4), ValueError),
    (lines(4), addresses(8)[::2], ValueError),
]


@pytest.mark.parametrize(("bad_lines", "bad_addresses", "error"), BAD_ARRAYS)
def test_bad_arrays_are_refused(
    cipher: XtsCipher, bad_lines: Any, bad_addresses: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="must be"):
        cipher.encrypt_lines(bad_lines, bad_addresses)
    with pytest.raises(error, match="must be"):
        cipher.decrypt_lines(bad_lines, bad_addresses)


def test_bad_out_is_refused(cipher: XtsCipher) -> None:
    with pytest.raises(ValueError, match="out must be"):
        cipher.encrypt_lines(lines(2), addresses(2), out=lines(3))


def test_key_is_not_shown(cipher: XtsCipher) -> None:
    assert repr(cipher) == "<XtsCipher aes-xts-128>"


def test_cipher_cannot_be_pickled_or_copied(cipher: XtsCipher) -> None:
    with pytest.raises(TypeError, match="holds a key"):
        pickle.dumps(cipher)
    with pytest.raises(TypeError, match="holds a key"):
        copy.deepcopy(cipher)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_wiped_key_is_gone(algorithm: Algorithm) -> None:
    key = bytes(range(100, 100 + algorithm.key_bytes))
    half = len(key) // 2
    cipher = XtsCipher(algorithm, key)
    held = cipher._key.view[:]
    assert bytes(held[:half]) == key[:half]
    assert bytes(held[-half:]) == key[half:]
    cipher.wipe()
    assert not any(held)
    for crypt in (cipher.encrypt_lines, cipher.decrypt_lines):
        with pytest.raises(KeyMaterialError, match="this key was wiped"):
            crypt(lines(1), addresses(1))
    cipher.wipe()


def test_wiped_cipher_gives_its_memory_back(cipher: XtsCipher) -> None:
    cipher.encrypt_lines(lines(1), addresses(1))
    place = cipher._key._address
    cipher.wipe()
    other = XtsCipher(Algorithm.AES_XTS_128, KEY[::-1])
    assert other._key._address == place
    with pytest.raises(KeyMaterialError, match="wiped"):
        cipher.encrypt_lines(lines(1), addresses(1))


def test_refused_key_takes_no_memory() -> None:
    place = XtsCipher(Algorithm.AES_XTS_128, KEY)._key._address
    with pytest.raises(KeyMaterialError):
        XtsCipher(Algorithm.AES_XTS_128, KEY[:16] * 2)
    assert XtsCipher(Algorithm.AES_XTS_128, KEY)._key._address == place
