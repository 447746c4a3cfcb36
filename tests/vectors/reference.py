# SPDX-License-Identifier: GPL-2.0-or-later
"""AES-XTS written straight from IEEE 1619, block by block, with pycryptodome's AES; and line MACs.

It shares nothing with the engine: neither numpy nor OpenSSL nor a shortcut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from Crypto.Cipher import AES
from Crypto.Hash import SHA3_256

BLOCK_BYTES: Final = 16


def encrypt(key: bytes, tweak: bytes, plaintext: bytes) -> bytes:
    """Encrypt one data unit of at least a block (IEEE 1619, 5.3).

    Args:
        key: data key followed by tweak key.
        tweak: 16 bytes.
        plaintext: the data unit.
    """
    data_key, tweak_key = key[: len(key) // 2], key[len(key) // 2 :]
    return _data_unit(AES.new(data_key, AES.MODE_ECB).encrypt, tweak_key, tweak, plaintext, False)


def decrypt(key: bytes, tweak: bytes, ciphertext: bytes) -> bytes:
    """Decrypt one data unit (IEEE 1619, 5.4)."""
    data_key, tweak_key = key[: len(key) // 2], key[len(key) // 2 :]
    return _data_unit(AES.new(data_key, AES.MODE_ECB).decrypt, tweak_key, tweak, ciphertext, True)


def mac_entry(key: bytes, address: int, line: bytes) -> int:
    """The entry of a line in the MAC area, from what the sidecar says of it.

    Args:
        key: data key followed by tweak key.
        address: where the line is.
        line: 64 bytes of ciphertext.
    """
    block = b"mktme line MAC".ljust(136 - len(key), b"\0") + key
    digest = SHA3_256.new(block + block + address.to_bytes(8, "little") + line).digest()
    return 2**31 + int.from_bytes(digest, "little") % 2**28


def _data_unit(
    aes: Callable[[bytes], bytes], tweak_key: bytes, tweak: bytes, text: bytes, decrypting: bool
) -> bytes:
    whole, rest = divmod(len(text), BLOCK_BYTES)
    mask = int.from_bytes(AES.new(tweak_key, AES.MODE_ECB).encrypt(tweak), "little")
    masks = []
    for _ in range(whole + 1):
        masks.append(mask.to_bytes(BLOCK_BYTES, "little"))
        mask = _times_x(mask)
    blocks = [text[start : start + BLOCK_BYTES] for start in range(0, len(text), BLOCK_BYTES)]
    if rest == 0:
        pairs = zip(blocks, masks[:whole], strict=True)
        return b"".join(_block(aes, block, mask) for block, mask in pairs)
    # Ciphertext stealing: the last whole block lends its tail to the partial one. Decryption
    # meets the two in reverse, so their masks change places.
    last, spare = (masks[whole], masks[whole - 1]) if decrypting else masks[whole - 1 : whole + 1]
    done = [_block(aes, *pair) for pair in zip(blocks[: whole - 1], masks, strict=False)]
    lender = _block(aes, blocks[whole - 1], last)
    final = _block(aes, blocks[whole] + lender[rest:], spare)
    return b"".join([*done, final, lender[:rest]])


def _block(aes: Callable[[bytes], bytes], block: bytes, mask: bytes) -> bytes:
    return _xor(aes(_xor(block, mask)), mask)


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def _times_x(element: int) -> int:
    """Multiply by x in GF(2^128), reduced by x^128 + x^7 + x^2 + x + 1 (IEEE 1619, 5.2)."""
    element <<= 1
    return element ^ (1 << 128 | 0x87) if element >> 128 else element
