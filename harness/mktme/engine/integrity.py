# SPDX-License-Identifier: GPL-2.0-or-later
"""Cryptographic integrity: a MAC for each line, as TDX's "Ci" has it.

TDX with "cryptographic integrity" keeps with each line 28 bits of a SHA-3-256 MAC over its
ciphertext, its address and the like, and poisons a line that does not match (Intel TDX Module Base
Architecture Specification, memory integrity; the algorithm is bit 1 of IA32_TME_CAPABILITY, Intel
SDM vol. 4, table 2-2, which asks for at least 28 bits). Intel does not publish the exact input of
the hash: `MAC_RULE` is ours, docs/adr/0008 has the reasons.

What it detects is a line that was not written at this address under this key: changed, moved, or
of another KeyID. Random contents pass with probability 2^-28. It has no freshness: an old line
together with its old MAC, at its address, is accepted, and so is a line that was made one that was
never written, with its MAC.

Where the key is
    In `mktme.engine.secret`'s memory while a `LineMacs` is made; from then on, mixed, in OpenSSL's
    hash state, which is ordinary memory. So whoever reads that can forge MACs. The key for
    decryption is not to be had from it: Keccak-f can be run backwards, but as the key's block was
    absorbed twice, what comes out is f(x) ^ x of a secret x. A block is of SHA3-256's rate, because
    what OpenSSL cannot absorb at once it would keep as it is.

How it is made fast
    It is not: a hash object a line, which costs about 0.6 us, most of it the permutation itself.
    numpy lays out the messages and compares.
"""

from __future__ import annotations

import enum
import hashlib
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from mktme.engine.errors import KeyMaterialError
from mktme.engine.secret import allocate
from mktme.engine.xts import LINE_BYTES, check_words

if TYPE_CHECKING:
    from hashlib import _Hash

ENTRY_BYTES: Final = 4
"""Bytes that a line's MAC takes in the MAC area."""

_MAC_BITS: Final = 28
_HAS_MAC: Final = np.uint32(1 << 31)
_MAC_MASK: Final = np.uint32((1 << _MAC_BITS) - 1)

_BLOCK_BYTES: Final = 136  # SHA3-256's rate (FIPS 202, table 3)
_LABEL: Final = b"mktme line MAC"

MAC_RULE: Final = (
    "Each 64 bytes of the image have an entry in the file, in order: a 4-byte little-endian "
    "number. 0: there is no MAC. Otherwise 2^31 plus a MAC of 28 bits: the first 4 bytes of a "
    "SHA3-256 as a little-endian number, modulo 2^28. What is hashed: the key's block, the same "
    "block again, the byte offset of the 64 bytes in the image as an 8-byte little-endian number, "
    f"and the 64 bytes as they are in the image. The key's block is {_BLOCK_BYTES} bytes: "
    f"'{_LABEL.decode()}' in ASCII, zeros, and at its end the data key and the tweak key. "
    "64 bytes of a KeyID whose algorithm has integrity are good if their entry has their MAC, or "
    "if they and their entry are all zero. Those of other KeyIDs have no MAC to look at."
)

# Messages that are laid out at once: enough to make numpy's cost per call small.
_BATCH_LINES: Final = 1024
_MESSAGE_BYTES: Final = 8 + LINE_BYTES
# What goes to OpenSSL, address and ciphertext. A row viewed as one item becomes `bytes`.
_messages: Final = np.empty((_BATCH_LINES, _MESSAGE_BYTES // 8), np.uint64)
_messages_items: Final = _messages.view(f"V{_MESSAGE_BYTES}").reshape(-1)


class Violation(enum.Enum):
    """What is wrong with a line that is poisoned."""

    MISMATCH = "mac-mismatch"
    """It has the MAC of other contents, of another address, or under another key."""
    NO_MAC = "no-mac"
    """It was written through a KeyID without integrity, or not to the end."""


class LineMacs:
    """MACs of lines under one key. Like the ciphers, for one thread.

    Args:
        key: data key followed by tweak key. It is copied; the caller's copy is the caller's to
            wipe.

    Raises:
        OSError: there is no memory for a key.
    """

    __slots__ = ("_state",)

    def __init__(self, key: bytes | bytearray | memoryview) -> None:
        material = memoryview(key).cast("B")
        with allocate(_BLOCK_BYTES) as block:
            block.view[: len(_LABEL)] = _LABEL
            block.view[_BLOCK_BYTES - len(material) :] = material
            state = hashlib.sha3_256()
            state.update(block.view)
            state.update(block.view)
        self._state: _Hash | None = state

    def entries(
        self, lines: NDArray[np.uint64], addresses: NDArray[np.uint64]
    ) -> NDArray[np.uint32]:
        """Make the entries of lines in the MAC area.

        Args:
            lines: shape (n, 8), uint64, C-contiguous: the lines' ciphertext as little-endian
                words.
            addresses: shape (n,), uint64: each line's physical byte address, KeyID stripped.

        Returns:
            uint32, shape (n,): see `MAC_RULE`.

        Raises:
            TypeError, ValueError: an array is not as above.
            KeyMaterialError: the key was wiped.
        """
        if self._state is None:
            raise KeyMaterialError("this key was wiped")
        check_words("lines", lines, (len(lines), LINE_BYTES // 8))
        check_words("addresses", addresses, (len(lines),))
        entries = np.empty(len(lines), np.uint32)
        copy_state = self._state.copy
        for start in range(0, len(lines), _BATCH_LINES):
            batch = slice(start, start + _BATCH_LINES)
            count = len(lines[batch])
            _messages[:count, 0] = addresses[batch]
            _messages[:count, 1:] = lines[batch]
            digests: list[bytes] = []
            for message in _messages_items[:count].tolist():
                state = copy_state()
                state.update(message)
                digests.append(state.digest())
            entries[batch] = np.frombuffer(b"".join(digests), np.uint32)[:: 32 // ENTRY_BYTES]
        entries &= _MAC_MASK
        entries |= _HAS_MAC
        return entries

    def find_bad(
        self,
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        never_written: NDArray[np.bool_],
        entries: NDArray[np.uint32],
    ) -> NDArray[np.bool_]:
        """Find lines that are neither good nor never written.

        Args:
            lines: as for `entries`.
            addresses: as for `entries`.
            never_written: shape (n,): which lines are all zero.
            entries: shape (n,): what the MAC area has for them.

        Returns:
            bool, shape (n,).

        Raises:
            TypeError, ValueError: an array is not as above.
            KeyMaterialError: the key was wiped.
        """
        bad: NDArray[np.bool_] = (entries != 0) | ~never_written
        hashed = np.flatnonzero(~never_written & (entries != 0))
        if len(hashed) == len(lines):
            np.not_equal(self.entries(lines, addresses), entries, out=bad)
        elif len(hashed):
            bad[hashed] = self.entries(lines[hashed], addresses[hashed]) != entries[hashed]
        return bad

    def wipe(self) -> None:
        """Drop the key, which OpenSSL overwrites; no MAC can be made any more."""
        self._state = None

    def __repr__(self) -> str:
        return "<LineMacs>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("LineMacs hold a key and cannot be pickled or copied")
