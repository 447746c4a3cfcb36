# SPDX-License-Identifier: GPL-2.0-or-later
"""AES-XTS over many 64-byte lines at a time (IEEE 1619, NIST SP 800-38E).

A line is one XTS data unit of four AES blocks. With its tweak encrypted to T (under the tweak
key), block j becomes ``AES(P_j ^ x^j*T) ^ x^j*T``, where x is the generator of GF(2^128) modulo
x^128 + x^7 + x^2 + x + 1. TME and MKTME do this between the caches and DRAM, with the line's
physical address as the tweak (Intel 336907, Memory Encryption Technologies Specification).

How it is made fast
    No library encrypts many small data units in one call, and a call for each line costs far
    more than its AES. So numpy computes the masks ``x^j*T`` of a batch of lines, and OpenSSL
    does the AES of the whole batch in one call.

    OpenSSL's fastest AES over many blocks is, of all things, its own XTS: vectorised (VAES)
    since 3.5 (openssl/openssl#26410), which its ECB is not. We run it over the whole batch as
    *one* data unit, with tweak 0 and a public tweak key W. That puts masks of its own around
    AES: ``x^b * E_W(0)`` for block b of the batch. Block j of line i is b = 4i + j, so this is
    ``x^j * K_i`` with ``K_i = x^(4i) * E_W(0)``: public, and of the same form as our mask. To
    cancel it we XOR K_i into T_i before the doublings. K is a table made once.

    What that gains is for the benchmark to say: ``mktme bench`` prints the rate beside that of
    ``openssl speed -evp aes-128-xts``.

Where the keys are
    In `mktme.engine.secret`'s memory, and nowhere else between calls. OpenSSL reads them there
    for each call anew, expands them in its own memory, and cleanses that at the call's end. What
    ordinary memory keeps is masks of the last batch, which are AES's outputs.

Single-threaded: all ciphers of a process share one set of scratch arrays (about 1 MiB).
"""

from __future__ import annotations

import enum
import functools
import hmac
from typing import Final, NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from mktme.engine.errors import KeyMaterialError
from mktme.engine.secret import allocate

LINE_BYTES: Final = 64
PAGE_BYTES: Final = 4096
LINES_PER_PAGE: Final = PAGE_BYTES // LINE_BYTES

_BLOCK_BYTES: Final = 16
_BLOCKS_PER_LINE: Final = LINE_BYTES // _BLOCK_BYTES
# Lines for which masks are made at once: as many as make numpy's cost per call small while the
# scratch arrays still fit a core's L2 cache.
_BATCH_LINES: Final = 4096

# 0-d arrays, because numpy takes 0.4 us less for each call with one than with a Python int.
_ONE: Final = np.array(1, np.int64)
_SIGN_SHIFT: Final = np.array(63, np.int64)
_WORD: Final = np.dtype(np.uint64)
# x^128 = x^7 + x^2 + x + 1
_REDUCTION: Final = np.array(0x87, np.int64)


class Algorithm(enum.Enum):
    """What a KeyID's lines are encrypted with; the value is the name users see."""

    AES_XTS_128 = "aes-xts-128"
    AES_XTS_256 = "aes-xts-256"
    AES_XTS_128_INTEGRITY = "aes-xts-128-integrity"
    """As `AES_XTS_128`, and a MAC for each line: `mktme.engine.integrity`."""

    @property
    def key_bytes(self) -> int:
        """Bytes of key material: the data key, then the tweak key."""
        return 64 if self is Algorithm.AES_XTS_256 else 32

    @property
    def has_integrity(self) -> bool:
        """Whether lines have MACs."""
        return self is Algorithm.AES_XTS_128_INTEGRITY


class XtsCipher:
    """AES-XTS under one key, each line its own data unit.

    Args:
        algorithm: which AES.
        key: data key followed by tweak key, ``algorithm.key_bytes`` in all. It is copied; the
            caller's copy is the caller's to wipe.

    Raises:
        TypeError: ``algorithm`` is no `Algorithm`, or ``key`` is not bytes-like.
        KeyMaterialError: the length is wrong, or the halves are equal, which makes XTS insecure
            and which FIPS 140-3 IG C.I forbids.
        OSError: there is no memory for a key.
    """

    __slots__ = ("_algorithm", "_ciphers", "_key", "_public_masks")

    def __init__(self, algorithm: Algorithm, key: bytes | bytearray | memoryview) -> None:
        if not isinstance(algorithm, Algorithm):
            raise TypeError(f"algorithm must be an Algorithm, not {type(algorithm).__name__}")
        material = memoryview(key).cast("B")
        if len(material) != algorithm.key_bytes:
            raise KeyMaterialError(
                f"{algorithm.value} needs a key of {algorithm.key_bytes} bytes, "
                f"this one has {len(material)}"
            )
        half = algorithm.key_bytes // 2
        if hmac.compare_digest(material[:half], material[half:]):
            raise KeyMaterialError("data key and tweak key are equal (FIPS 140-3 IG C.I)")
        self._algorithm = algorithm

        # W of the module's docstring: any public key but the data key, as OpenSSL too refuses
        # equal halves.
        public_key = bytes(half) if any(material[:half]) else b"\xff" * half
        self._public_masks = _public_masks(public_key)
        self._key = allocate(3 * half)
        view = self._key.view
        view[:half] = material[:half]
        view[half : 2 * half] = public_key
        view[2 * half :] = material[half:]
        # pyca keeps these very slices, and lets OpenSSL read them for every new context.
        data_aes = Cipher(algorithms.AES(view[: 2 * half]), modes.XTS(bytes(_BLOCK_BYTES)))
        tweak_aes = Cipher(algorithms.AES(view[2 * half :]), modes.ECB())
        self._ciphers: tuple[Cipher[modes.XTS], Cipher[modes.ECB]] | None = (data_aes, tweak_aes)

    @property
    def algorithm(self) -> Algorithm:
        """Which AES."""
        return self._algorithm

    def encrypt_lines(
        self,
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        out: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.uint64]:
        """Encrypt whole lines.

        Each word of ``lines`` is read exactly once, so they may be a view of memory that a
        guest is writing at this moment.

        Args:
            lines: shape (n, 8), uint64, C-contiguous: the lines' bytes as little-endian words.
            addresses: shape (n,), uint64: each line's physical byte address, KeyID stripped.
                The tweak is the address as a 16-byte little-endian number.
            out: shape (n, 8), uint64, C-contiguous; a new array when None. It may be ``lines``
                itself, but must not overlap it in any other way.

        Returns:
            ``out``.

        Raises:
            TypeError: something is not a uint64 array.
            ValueError: a shape or layout is not as above.
            KeyMaterialError: the key was wiped.
        """
        return self._crypt(lines, addresses, out, decrypt=False)

    def decrypt_lines(
        self,
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        out: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.uint64]:
        """Decrypt whole lines; the inverse of `encrypt_lines`, with the same arguments."""
        return self._crypt(lines, addresses, out, decrypt=True)

    def _crypt(
        self,
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        out: NDArray[np.uint64] | None,
        *,
        decrypt: bool,
    ) -> NDArray[np.uint64]:
        if self._ciphers is None:
            raise KeyMaterialError("this key was wiped")
        check_words("lines", lines, (len(lines), LINE_BYTES // 8))
        check_words("addresses", addresses, (len(lines),))
        if out is None:
            out = np.empty_like(lines)
        else:
            check_words("out", out, lines.shape)
        data_aes, tweak_aes = self._ciphers
        tweak_context = tweak_aes.encryptor()  # in both directions
        new_context = data_aes.decryptor if decrypt else data_aes.encryptor
        for start in range(0, len(lines), _BATCH_LINES):
            part = slice(start, start + _BATCH_LINES)
            batch = _batch(len(addresses[part]))
            masks = batch.make_masks(tweak_context, self._public_masks, addresses[part])
            np.bitwise_xor(lines[part], masks, batch.blocks)
            # A new context each time: OpenSSL's documentation leaves open whether a second
            # update would start at the tweak again or go on after the first.
            new_context().update_into(batch.blocks_bytes, batch.blocks_out)
            np.bitwise_xor(batch.blocks, masks, out[part])
        return out

    def wipe(self) -> None:
        """Overwrite the key; the cipher cannot be used any more."""
        self._key.wipe()
        self._ciphers = None

    def __repr__(self) -> str:
        return f"<XtsCipher {self._algorithm.value}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an XtsCipher holds a key and cannot be pickled or copied")


def wipe(buffer: bytearray) -> None:
    """Overwrite a buffer that held a secret with zeros."""
    buffer[:] = bytes(len(buffer))


class _Scratch:
    """The arrays that batches of lines are worked on in; `_Batch` says what is in which.

    What OpenSSL writes to has an element of slack: pyca insists on ``len(input) + 15`` bytes.
    """

    def __init__(self) -> None:
        n, words = _BATCH_LINES, LINE_BYTES // 8
        self.tweaks = np.zeros((n, 2), np.uint64)
        self.encrypted = np.empty((n + 1, 2), np.int64)
        self.powers = np.empty(2 * n, np.int64)
        self.carries = np.empty(2 * n, np.int64)
        self.masks = np.empty((n, words), np.int64)
        self.blocks = np.empty((n + 1, words), np.uint64)


_scratch = _Scratch()


class _Batch:
    """Views of the scratch arrays for n lines, made once: that takes as long as to use them.

    Attributes:
        blocks: what goes into OpenSSL and comes out of it, shape (n, 8).
        blocks_bytes: its bytes.
        blocks_out: its bytes, and OpenSSL's slack.
    """

    def __init__(self, n: int) -> None:
        tweaks, encrypted = _scratch.tweaks[:n], _scratch.encrypted[:n]
        self._addresses = tweaks[:, 0]  # the high words stay 0
        self._tweaks = tweaks.view(np.uint8).reshape(-1).data
        self._encrypted = encrypted
        self._encrypted_out = _scratch.encrypted.view(np.uint8).reshape(-1).data
        # All low words, then all high words: numpy's loops are vectorised (and several times
        # faster) only over contiguous arrays.
        self._powers, self._carries = _scratch.powers[: 2 * n], _scratch.carries[: 2 * n]
        self._low, self._high = self._powers[:n], self._powers[n:]
        self._low_carry, self._high_carry = self._carries[:n], self._carries[n:]
        self._encrypted_low, self._encrypted_high = encrypted[:, 0], encrypted[:, 1]
        masks = _scratch.masks[:n]
        self._masks = masks.view(np.uint64)
        self._later_masks = [
            (masks[:, 2 * block], masks[:, 2 * block + 1]) for block in range(1, _BLOCKS_PER_LINE)
        ]
        # Viewed as complex128, a block is one item to copy, not two.
        self._first_masks = masks.view(np.complex128)[:, 0]
        self._encrypted_blocks = encrypted.view(np.complex128)[:, 0]
        self.blocks = _scratch.blocks[:n]
        self.blocks_bytes = self.blocks.view(np.uint8).reshape(-1).data
        self.blocks_out = _scratch.blocks.view(np.uint8).reshape(-1).data

    def make_masks(
        self,
        tweak_aes: CipherContext,
        public_masks: NDArray[np.int64],
        addresses: NDArray[np.uint64],
    ) -> NDArray[np.uint64]:
        """The masks that our use of OpenSSL's XTS needs around the lines.

        Args:
            tweak_aes: ECB under the tweak key.
            public_masks: the table K, shape (>= n, 2).
            addresses: shape (n,).

        Returns:
            ``x^j * (T_i ^ K_i)``, i the line and j the block: shape (n, 8), valid until any
            batch's next call.
        """
        copy, xor, encrypted = np.copyto, np.bitwise_xor, self._encrypted
        copy(self._addresses, addresses)
        tweak_aes.update_into(self._tweaks, self._encrypted_out)
        xor(encrypted, public_masks[: len(encrypted)], encrypted)
        copy(self._first_masks, self._encrypted_blocks)
        powers, carries = self._powers, self._carries
        low, high, low_carry, high_carry = self._low, self._high, self._low_carry, self._high_carry
        copy(low, self._encrypted_low)
        copy(high, self._encrypted_high)
        # For the lines of a page, numpy's calls are what costs: the last argument is "out",
        # which takes longer to give by name.
        for mask_low, mask_high in self._later_masks:
            np.right_shift(powers, _SIGN_SHIFT, carries)  # signed, so a carry is -1
            np.left_shift(powers, _ONE, powers)
            np.bitwise_and(high_carry, _REDUCTION, high_carry)
            xor(low, high_carry, low)
            np.subtract(high, low_carry, high)  # - (-1): sets the bit just shifted in
            copy(mask_low, low)
            copy(mask_high, high)
        return self._masks


_batch = functools.lru_cache(maxsize=256)(_Batch)


@functools.cache
def _public_masks(public_key: bytes) -> NDArray[np.int64]:
    """The table ``K_i = x^(4i) * E_W(0)`` for W = ``public_key``, shape (_BATCH_LINES, 2)."""
    zero = bytes(_BLOCK_BYTES)
    encrypted = Cipher(algorithms.AES(public_key), modes.ECB()).encryptor().update(zero)
    power = int.from_bytes(encrypted, "little")
    table = bytearray()
    for _ in range(_BATCH_LINES):
        table += power.to_bytes(_BLOCK_BYTES, "little")
        for _ in range(_BLOCKS_PER_LINE):
            power = power << 1 ^ (0x87 | 1 << 128 if power >> 127 else 0)
    return np.frombuffer(bytes(table), np.int64).reshape(_BATCH_LINES, 2)


def check_words(name: str, array: NDArray[np.uint64], shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless an array is uint64, C-contiguous, of that shape."""
    # There is one dtype object for it, unless it was unpickled; to compare them takes longer.
    if not isinstance(array, np.ndarray) or (array.dtype is not _WORD and array.dtype != _WORD):
        raise TypeError(f"{name} must be a uint64 array")
    if array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous with shape {shape}, not {array.shape} "
            f"with strides {array.strides}"
        )
