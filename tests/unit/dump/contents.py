# SPDX-License-Identifier: GPL-2.0-or-later
"""What images in tests hold: text, and its ciphertext by the engine's cipher."""

from __future__ import annotations

import itertools
import random

import numpy as np

from mktme.engine.xts import LINE_BYTES, Algorithm, XtsCipher

KEY = random.Random(7).randbytes(64)


def prose(size_bytes: int, seed: int = 1) -> bytes:
    """Words of a language that nobody speaks, with no line of 64 zeros in it."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))).encode() for _ in range(200)]
    text = bytearray()
    while len(text) < size_bytes:
        text += rng.choice(words) + b" "
    return bytes(text[:size_bytes])


def encrypt(plaintext: bytes, address: int, key: bytes = KEY) -> bytes:
    """AES-XTS-256 as in DRAM, at an address."""
    lines = np.frombuffer(plaintext, np.uint64).reshape(-1, LINE_BYTES // 8)
    addresses = np.arange(address, address + len(plaintext), LINE_BYTES, dtype=np.uint64)
    return XtsCipher(Algorithm.AES_XTS_256, key).encrypt_lines(lines, addresses).tobytes()


def encrypt_without_addresses(plaintext: bytes, key: bytes = KEY) -> bytes:
    """What a memory controller must not do: the same tweak for each line."""
    lines = np.frombuffer(plaintext, np.uint64).reshape(-1, LINE_BYTES // 8)
    same = np.zeros(len(lines), np.uint64)
    return XtsCipher(Algorithm.AES_XTS_256, key).encrypt_lines(lines, same).tobytes()


def counter(size_bytes: int) -> bytes:
    """Bytes 0 to 255, again and again: no histogram is more even."""
    return bytes(itertools.islice(itertools.cycle(range(256)), size_bytes))
