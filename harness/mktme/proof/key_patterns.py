# SPDX-License-Identifier: GPL-2.0-or-later
"""The forms in which software is likely to hold an AES-XTS key, and a fast search for them.

An AES-XTS key is a data key and a tweak key (IEEE 1619). Each may be in memory as it is, in
another byte order, as text, and expanded: a cipher that is in use keeps its round keys (FIPS 197,
section 5.2; for decryption mostly those of section 5.3.5), and from any one or two in a row the
key follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = bytes | bytearray | memoryview

PIECE_BYTES: Final = 8
"""How much of a key in a row is a hit; chance makes one of 8 random bytes in 2^64."""


# --- AES key expansion ------------------------------------------------------------------------


def _xtime(x: int) -> int:
    """Multiply by x in GF(2^8) (FIPS 197, section 4.2)."""
    return x << 1 ^ (0x11B if x & 0x80 else 0)


def _times(a: int, b: int) -> int:
    """Multiply in GF(2^8)."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a, b = _xtime(a), b >> 1
    return product


def _make_sbox() -> bytes:
    """SubBytes (FIPS 197, section 5.1.1): the inverse in GF(2^8), and an affine map."""
    powers = [1]  # of 3, which generates all but 0
    while len(powers) < 255:
        powers.append(powers[-1] ^ _xtime(powers[-1]))
    inverses = [0] * 256
    for exponent, value in enumerate(powers):
        inverses[value] = powers[-exponent % 255]
    table = bytearray()
    for inverse in inverses:
        twice = inverse << 8 | inverse  # so that a shift is a rotation
        rotated = twice >> 4 ^ twice >> 5 ^ twice >> 6 ^ twice >> 7
        table.append((inverse ^ rotated) & 0xFF ^ 0x63)
    return bytes(table)


SBOX: Final = _make_sbox()
"""SubBytes of each byte."""


def encryption_round_keys(key: bytes) -> tuple[bytes, ...]:
    """The round keys of AES, 16 bytes each, the first for the whitening (FIPS 197, section 5.2).

    Args:
        key: 16, 24 or 32 bytes.
    """
    words = [key[at : at + 4] for at in range(0, len(key), 4)]
    in_key = len(words)
    constant = 1
    for index in range(in_key, 4 * (in_key + 7)):
        word = words[-1]
        if index % in_key == 0:
            word = (word[1:] + word[:1]).translate(SBOX)
            word = bytes((word[0] ^ constant, *word[1:]))
            constant = _xtime(constant)
        elif in_key > 6 and index % in_key == 4:
            word = word.translate(SBOX)
        words.append(bytes(a ^ b for a, b in zip(word, words[-in_key], strict=True)))
    return tuple(b"".join(words[at : at + 4]) for at in range(0, len(words), 4))


def decryption_round_keys(key: bytes) -> tuple[bytes, ...]:
    """The round keys of AES's equivalent inverse cipher (FIPS 197, section 5.3.5).

    They are in the order of `encryption_round_keys`; decryption uses the last one first.
    """
    first, *inner, last = encryption_round_keys(key)
    return (first, *(_inverse_mix_columns(one) for one in inner), last)


def _inverse_mix_columns(block: bytes) -> bytes:
    """InvMixColumns (FIPS 197, section 5.3.3)."""
    mixed = bytearray()
    for at in range(0, 16, 4):
        column = block[at : at + 4]
        for row in range(4):
            mixed.append(
                _times(column[row], 14)
                ^ _times(column[(row + 1) % 4], 11)
                ^ _times(column[(row + 2) % 4], 13)
                ^ _times(column[(row + 3) % 4], 9)
            )
    return bytes(mixed)


# --- patterns ---------------------------------------------------------------------------------


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _forms(key: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """How software may hold an AES key: what that is, and the pieces that are searched for.

    Piece i is always of bytes 8i to 8i + 7.
    """

    def swapped(data: bytes, word_bytes: int) -> bytes:
        return b"".join(word[::-1] for word in _cut(data, word_bytes))

    yield "", _cut(key, PIECE_BYTES)
    yield ", bytes reversed", _cut(key[::-1], PIECE_BYTES)
    for size in (4, 8):
        yield f", bytes of {size}-byte words reversed", _cut(swapped(key, size), PIECE_BYTES)
        words = b"".join(reversed(_cut(key, size)))
        yield f", order of {size}-byte words reversed", _cut(words, PIECE_BYTES)
    parts = _cut(key, PIECE_BYTES)
    yield ", hexadecimal", [part.hex().encode() for part in parts]
    yield ", hexadecimal, upper case", [part.hex().upper().encode() for part in parts]
    yield ", Python's repr", [repr(part)[2:-1].encode() for part in parts]
    for name, expand in (
        ("round key", encryption_round_keys),
        ("decryption round key", decryption_round_keys),
    ):
        for number, round_key in enumerate(expand(key)):
            yield f", {name} {number}", _cut(round_key, PIECE_BYTES)
            # OpenSSL's and others' portable AES load big-endian words into a CPU's integers.
            yield (
                f", {name} {number}, bytes of 4-byte words reversed",
                _cut(swapped(round_key, 4), PIECE_BYTES),
            )


_BATCH_WORDS: Final = 1 << 16  # the arrays for this many fit a core's L2 cache
_TABLE_BITS: Final = 20
_MULTIPLIER: Final = np.uint32(0x9E37_79B9)  # Knuth's multiplicative hash, 2^32 / golden ratio
_SHIFT: Final = np.uint32(32 - _TABLE_BITS)


class KeyPatterns:
    """What to search for: some AES-XTS keys, in each form that software may hold them in.

    How it is made fast
        Wherever a piece of 8 bytes lies, four of its bytes in a row are an aligned 32-bit word.
        So only those words of the data are looked up, by a hash of them in a table with one
        entry for each word that may come of a piece: `n` pieces have 4n. What the table lets
        through, some 0.1 % of random data, is compared with the words and then with the pieces.

    Args:
        keys: by what to call each: data key followed by tweak key, 32 or 64 bytes.

    Raises:
        ValueError: there is no key, one is of another length, or one repeats a byte 8 times: that
            would be found everywhere.
    """

    __slots__ = ("_marked", "_pieces", "_table", "_words")

    def __init__(self, keys: Mapping[str, Buffer]) -> None:
        if not keys:
            raise ValueError("no key to search for")
        pieces: dict[bytes, str] = {}
        for label, key in keys.items():
            if len(key) not in (32, 64):
                raise ValueError(f"{label}: an AES-XTS key has 32 or 64 bytes, not {len(key)}")
            half = len(key) // 2
            for part, secret in (("data key", key[:half]), ("tweak key", key[half:])):
                for form, parts in _forms(bytes(secret)):
                    for number, piece in enumerate(parts):
                        if len(set(piece)) == 1:
                            raise ValueError(f"{label}: {part}: not random enough to search for")
                        first = number * PIECE_BYTES
                        last = first + PIECE_BYTES - 1
                        pieces.setdefault(piece, f"{label}: {part}{form}, bytes {first}-{last}")
        self._pieces = tuple(pieces.items())
        self._words: dict[int, list[tuple[int, int]]] = {}
        for index, (piece, _name) in enumerate(self._pieces):
            for shift in range(4):
                word = int.from_bytes(piece[shift : shift + 4], "little")
                self._words.setdefault(word, []).append((index, shift))
        self._table = np.zeros(1 << _TABLE_BITS, np.bool_)
        self._table[_hash(np.fromiter(self._words, "<u4"))] = True
        self._marked = np.empty(_BATCH_WORDS, np.bool_)

    @property
    def longest_bytes(self) -> int:
        """Bytes of the longest piece: no hit is longer."""
        return max(len(piece) for piece, _name in self._pieces)

    def find(self, data: Buffer) -> list[tuple[str, int, int]]:
        """Look for all patterns at each byte offset.

        Returns:
            Of each hit: which pattern, its offset, and the offset behind it.
        """
        view = memoryview(data).cast("B")
        words = np.frombuffer(view, "<u4", count=len(view) // 4)
        found = []
        for start in range(0, len(words), _BATCH_WORDS):
            batch = words[start : start + _BATCH_WORDS]
            if not batch.any():  # no piece is all zero
                continue
            marked = self._marked[: len(batch)]
            np.take(self._table, _hash(batch), out=marked, mode="clip")
            for index in np.flatnonzero(marked).tolist():
                for piece_index, shift in self._words.get(int(batch[index]), ()):
                    at = 4 * (start + index) - shift
                    piece, name = self._pieces[piece_index]
                    if at >= 0 and view[at : at + len(piece)] == piece:
                        found.append((name, at, at + len(piece)))
        return found

    def __repr__(self) -> str:
        return f"<KeyPatterns, {len(self._pieces)} pieces>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("KeyPatterns hold keys and cannot be pickled or copied")


def _hash(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    hashed = np.multiply(words, _MULTIPLIER)
    return np.right_shift(hashed, _SHIFT, out=hashed)
