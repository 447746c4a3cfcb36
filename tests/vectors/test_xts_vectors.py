# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's AES-XTS against NIST's vectors, an independent implementation, and OpenSSL's XTS.

NIST's data units are of 16 to 48 bytes, the engine's of 64. XTS without ciphertext stealing
encrypts each block by its place in the unit alone, so a vector of whole blocks is the beginning
of a 64-byte unit that starts with it: the engine gets the vector filled up with zeros.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import cryptography_vectors
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mktme.engine.xts import LINE_BYTES, Algorithm, XtsCipher

from . import reference

DIRECTORY = os.path.join("ciphers", "AES", "XTS")
# Tweaks as 16 bytes (``i = ...``) and as numbers (``DataUnitSeqNumber = ...``), which only the
# latter the engine can be given: its tweaks are addresses, below 2^64.
FILES = {
    (directory, algorithm): os.path.join(DIRECTORY, directory, name)
    for directory in ("tweak-128hexstr", "tweak-dataunitseqno")
    for algorithm, name in (
        (Algorithm.AES_XTS_128, "XTSGenAES128.rsp"),
        (Algorithm.AES_XTS_256, "XTSGenAES256.rsp"),
    )
}


@dataclass(frozen=True)
class Vector:
    encrypts: bool
    bits: int
    key: bytes
    tweak: bytes
    plaintext: bytes
    ciphertext: bytes


@functools.cache
def vectors(directory: str, algorithm: Algorithm) -> list[Vector]:
    """All vectors of a file, those of data units of a fraction of a byte too."""
    if algorithm is Algorithm.AES_XTS_128_INTEGRITY:
        algorithm = Algorithm.AES_XTS_128  # which it encrypts like
    found = []
    fields: dict[str, str] = {}
    encrypts = True
    with cryptography_vectors.open_vector_file(FILES[directory, algorithm], "r") as file:
        for line in file:
            name, equals, value = (part.strip() for part in line.partition("="))
            if name in ("[ENCRYPT]", "[DECRYPT]"):
                encrypts = name == "[ENCRYPT]"
            if not equals:
                continue
            fields[name] = value
            if name == ("CT" if encrypts else "PT"):
                found.append(_vector(encrypts, fields))
                fields = {}
    return found


def _vector(encrypts: bool, fields: dict[str, str]) -> Vector:
    if "i" in fields:
        tweak = bytes.fromhex(fields["i"])
    else:
        tweak = int(fields["DataUnitSeqNumber"]).to_bytes(16, "little")
    return Vector(
        encrypts=encrypts,
        bits=int(fields["DataUnitLen"]),
        key=bytes.fromhex(fields["Key"]),
        tweak=tweak,
        plaintext=bytes.fromhex(fields["PT"]),
        ciphertext=bytes.fromhex(fields["CT"]),
    )


def as_line(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(data.ljust(LINE_BYTES, b"\0"), np.uint64).reshape(1, -1).copy()


@pytest.mark.parametrize(("directory", "algorithm"), FILES)
def test_reference_agrees_with_nist(directory: str, algorithm: Algorithm) -> None:
    usable = [vector for vector in vectors(directory, algorithm) if vector.bits % 8 == 0]
    assert len(usable) == (800 if algorithm is Algorithm.AES_XTS_128 else 600)
    for vector in usable:
        assert reference.encrypt(vector.key, vector.tweak, vector.plaintext) == vector.ciphertext
        assert reference.decrypt(vector.key, vector.tweak, vector.ciphertext) == vector.plaintext


@pytest.mark.parametrize("algorithm", Algorithm)
def test_engine_agrees_with_nist(algorithm: Algorithm) -> None:
    usable = [
        vector for vector in vectors("tweak-dataunitseqno", algorithm) if vector.bits % 128 == 0
    ]
    assert len(usable) == 600
    for vector in usable:
        cipher = XtsCipher(algorithm, vector.key)
        address = np.array([int.from_bytes(vector.tweak, "little")], np.uint64)
        size = vector.bits // 8
        encrypted = cipher.encrypt_lines(as_line(vector.plaintext), address).tobytes()
        assert encrypted[:size] == vector.ciphertext
        decrypted = cipher.decrypt_lines(as_line(vector.ciphertext), address).tobytes()
        assert decrypted[:size] == vector.plaintext


def key_material(algorithm: Algorithm) -> st.SearchStrategy[bytes]:
    size = algorithm.key_bytes // 2
    halves = st.tuples(*[st.binary(min_size=size, max_size=size)] * 2)
    return halves.filter(lambda pair: pair[0] != pair[1]).map(b"".join)


@st.composite
def cases(
    draw: st.DrawFn,
) -> tuple[Algorithm, bytes, NDArray[np.uint64], NDArray[np.uint64]]:
    algorithm = draw(st.sampled_from(Algorithm))
    key = draw(key_material(algorithm))
    addresses = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
    data = draw(
        st.binary(min_size=len(addresses) * LINE_BYTES, max_size=len(addresses) * LINE_BYTES)
    )
    lines = np.frombuffer(data, np.uint64).reshape(-1, LINE_BYTES // 8)
    return algorithm, key, lines, np.array(addresses, np.uint64)


@given(cases())
@settings(deadline=None)
def test_engine_agrees_with_reference(
    case: tuple[Algorithm, bytes, NDArray[np.uint64], NDArray[np.uint64]],
) -> None:
    algorithm, key, lines, addresses = case
    cipher = XtsCipher(algorithm, key)
    encrypted = cipher.encrypt_lines(lines, addresses)
    for line, address, result in zip(lines, addresses.tolist(), encrypted, strict=True):
        tweak = address.to_bytes(16, "little")
        assert result.tobytes() == reference.encrypt(key, tweak, line.tobytes())
        assert line.tobytes() == reference.decrypt(key, tweak, result.tobytes())
    assert np.array_equal(cipher.decrypt_lines(encrypted, addresses), lines)


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("data_key_byte", [0x00, 0xFF, 0x5A])
def test_engine_agrees_with_openssl(algorithm: Algorithm, data_key_byte: int) -> None:
    # More lines than one batch of the engine, and the data keys that it uses as public keys.
    half = algorithm.key_bytes // 2
    key = bytes([data_key_byte]) * half + bytes(range(half))
    generator = np.random.default_rng(20)
    lines = generator.integers(0, 2**64, (9000, 8), np.uint64)
    addresses = generator.integers(0, 2**40, 9000, np.uint64) * np.uint64(LINE_BYTES)
    encrypted = XtsCipher(algorithm, key).encrypt_lines(lines, addresses)
    for line, address, result in zip(lines, addresses.tolist(), encrypted, strict=True):
        mode = modes.XTS(address.to_bytes(16, "little"))
        expected = Cipher(algorithms.AES(key), mode).encryptor().update(line.tobytes())
        assert result.tobytes() == expected
