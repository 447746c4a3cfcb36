# SPDX-License-Identifier: GPL-2.0-or-later
"""The master key, what is derived from it, and how rows and sessions are sealed.

AES-256-GCM with nonces drawn at random: one key is good for 2^32 of them (NIST SP 800-38D, section
8.3). Rows are few; sessions are many, so their keys are another with each of their databases.

OpenSSL and Python make copies of derived keys that nobody can wipe. What keeps them is the process:
`mktme.broker.serving` makes it undumpable.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Self

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mktme.engine.errors import KeyMaterialError
from mktme.engine.keys import read_private_file
from mktme.engine.xts import wipe

MASTER_BYTES: Final = 32
_NONCE_BYTES: Final = 12
SEAL_BYTES: Final = _NONCE_BYTES + 16
"""How much longer what is sealed is than what it was: nonce and tag."""


class SealError(Exception):
    """What was to be opened is not what was sealed in that place."""


class Sealer:
    """AES-256-GCM under one key; what is sealed tells nothing but its length.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, plaintext: bytes, place: tuple[object, ...]) -> bytes:
        """Encrypt for a place: nonce, ciphertext, tag.

        Args:
            plaintext: what to encrypt.
            place: what it belongs to; the same is needed to open it.
        """
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plaintext, msgspec.json.encode(place))

    def open(self, sealed: bytes, place: tuple[object, ...]) -> bytes:
        """The inverse of `seal`.

        Raises:
            SealError: it was not sealed with this key, or for another place.
        """
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, rest, msgspec.json.encode(place))
        except (InvalidTag, ValueError):  # ValueError: too short
            raise SealError from None

    def __repr__(self) -> str:
        return "<Sealer>"


class MasterKey:
    """The key that all others of a broker are derived from (HKDF, RFC 5869).

    Args:
        key: 32 bytes; a copy is kept until `wipe`.
    """

    def __init__(self, key: bytes | bytearray) -> None:
        self._key = bytearray(key)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it from its file: 32 raw bytes, for its owner's eyes only.

        Raises:
            KeyMaterialError: that is not what is there.
        """
        buffer = bytearray(MASTER_BYTES + 1)
        try:
            if read_private_file(path, buffer) != MASTER_BYTES:
                raise KeyMaterialError(f"{path}: no master key: not {MASTER_BYTES} bytes")
            return cls(memoryview(buffer)[:MASTER_BYTES].tobytes())
        finally:
            wipe(buffer)

    def derive(self, purpose: str, salt: bytes | None = None) -> bytes:
        """A key of 32 bytes for a purpose of its own."""
        info = f"mktme broker 1 {purpose}".encode()
        return HKDF(SHA256(), MASTER_BYTES, salt, info).derive(bytes(self._key))

    def wipe(self) -> None:
        """Overwrite it; what was derived stays."""
        wipe(self._key)

    def __repr__(self) -> str:
        return "<MasterKey>"
