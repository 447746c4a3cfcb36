# SPDX-License-Identifier: GPL-2.0-or-later
"""The key table: which key, if any, each KeyID stands for.

A key lives in `mktme.engine.secret`'s memory, which at its best nobody can read from outside; what
it passes on its way there (a key file's contents, PCONFIG's structure) is in bytearrays that are
overwritten when their use ends; and OpenSSL expands it for one call at a time. A key for integrity
is also in a hash state, from which it is not to be had (`mktme.engine.integrity`). What stays
exposed is that moment, and that whoever controls the engine's process can make it do anything. The
process is therefore the boundary that protects keys, not this module (`mktme.service.custody`).
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

from mktme.engine.errors import KeyIdError, KeyMaterialError
from mktme.engine.integrity import LineMacs
from mktme.engine.rng import Rng
from mktme.engine.secret import allocate
from mktme.engine.xts import Algorithm, XtsCipher, wipe

MAX_KEYID_BITS: Final = 15
"""What the 4-bit field IA32_TME_CAPABILITY[35:32] can say (Intel SDM vol. 4, MSR 981H)."""

_KEY_FILE_MAX_BYTES: Final = 1024
_DIGITS: Final = b"0123456789abcdefABCDEF"
_WHITESPACE: Final = b" \t\r\n\v\f"


class KeyMode(enum.Enum):
    """How a KeyID is programmed (in brackets: the PCONFIG command, Intel 336907)."""

    PLATFORM = "platform"
    """The TME key: KeyID 0, and every KeyID not programmed otherwise or cleared."""
    DIRECT = "direct"
    """A key that software gave (SET_KEY_DIRECT)."""
    RANDOM = "random"
    """A key that the platform drew, which nobody can read (SET_KEY_RANDOM)."""
    NO_ENCRYPT = "no-encrypt"
    """Plaintext in DRAM (NO_ENCRYPT)."""


@dataclass(frozen=True, slots=True)
class KeyDescription:
    """What may be told about a KeyID.

    Attributes:
        keyid: the KeyID.
        mode: how it was programmed.
        algorithm: what its lines are encrypted with; None if they are not: `KeyMode.NO_ENCRYPT`,
            or TME is off or bypassed.
    """

    keyid: int
    mode: KeyMode
    algorithm: Algorithm | None


@dataclass(frozen=True, slots=True)
class _Key:
    """What uses a key: a cipher, and MACs if the algorithm has integrity."""

    cipher: XtsCipher
    macs: LineMacs | None

    @classmethod
    def make(cls, algorithm: Algorithm, material: bytes | bytearray | memoryview) -> Self:
        cipher = XtsCipher(algorithm, material)
        return cls(cipher, LineMacs(material) if algorithm.has_integrity else None)

    def wipe(self) -> None:
        self.cipher.wipe()
        if self.macs is not None:
            self.macs.wipe()


@dataclass(frozen=True, slots=True)
class _Entry:
    mode: KeyMode
    key: _Key | None


_TME_OFF: Final = _Entry(KeyMode.PLATFORM, None)


class KeyTable:
    """The keys of one package.

    Until it is activated there is KeyID 0 only, whose memory is not encrypted. From then on the
    TME key is KeyID 0's, and that of each KeyID that is not programmed.

    Args:
        rng: draws the TME key and random keys.

    Attributes:
        lock: KEY_TABLE_LOCK (336907, chapter 6): whoever programs a KeyID, or relies on KeyIDs
            to stay as they are for a while, holds it.
    """

    def __init__(self, rng: Rng | None = None) -> None:
        self.lock = threading.Lock()
        self._rng = Rng() if rng is None else rng
        self._keyid_bits = 0
        self._tme: _Key | None = None
        self._saved: _Key | None = None
        self._platform = _TME_OFF
        self._programmed: dict[int, _Entry] = {}

    @property
    def keyid_bits(self) -> int:
        """Physical address bits used as KeyID."""
        return self._keyid_bits

    @property
    def keyid_count(self) -> int:
        """How many KeyIDs there are, KeyID 0 included."""
        return 1 << self._keyid_bits

    # --- the TME key --------------------------------------------------------------------------

    def draw_tme_key(self, algorithm: Algorithm) -> None:
        """Make a new TME key; `activate` puts it to use.

        Raises:
            EntropyError: the random number generator failed; there is no TME key then.
        """
        self._drop_tme_key()
        self._tme = self._draw(algorithm)

    def restore_tme_key(self, algorithm: Algorithm) -> bool:
        """Take the TME key that was saved for standby; False if there is none for `algorithm`."""
        self._drop_tme_key()
        if self._saved is None or self._saved.cipher.algorithm is not algorithm:
            return False
        self._tme = self._saved
        return True

    def save_tme_key(self) -> None:
        """Keep the TME key where standby does not reach it."""
        if self._saved is not None and self._saved is not self._tme:
            self._saved.wipe()
        self._saved = self._tme

    def activate(self, keyid_bits: int, *, bypass: bool = False) -> None:
        """Open the table: what a successful write to IA32_TME_ACTIVATE does.

        Args:
            keyid_bits: physical address bits used as KeyID, 0 (TME only) to `MAX_KEYID_BITS`.
            bypass: whether KeyID 0, and what is as it, is not encrypted.

        Raises:
            ValueError: ``keyid_bits`` is out of range.
            KeyMaterialError: there is no TME key.
        """
        if not 0 <= keyid_bits <= MAX_KEYID_BITS:
            raise ValueError(f"keyid_bits must be 0 to {MAX_KEYID_BITS}, not {keyid_bits}")
        if self._tme is None:
            raise KeyMaterialError("there is no TME key to activate")
        self._keyid_bits = keyid_bits
        self._platform = _TME_OFF if bypass else _Entry(KeyMode.PLATFORM, self._tme)

    def reset(self, *, keep_saved_key: bool = True) -> None:
        """CPU reset: every key is destroyed, except that saved for standby if so asked."""
        for keyid in tuple(self._programmed):
            self._replace(keyid, None)
        self._drop_tme_key()
        if self._saved is not None and not keep_saved_key:
            self._saved.wipe()
            self._saved = None
        self._keyid_bits = 0
        self._platform = _TME_OFF

    # --- the other KeyIDs ---------------------------------------------------------------------

    def program_direct(
        self, keyid: int, algorithm: Algorithm, key: bytes | bytearray | memoryview
    ) -> None:
        """Give a KeyID a key (SET_KEY_DIRECT).

        Args:
            keyid: 1 to `keyid_count` - 1.
            algorithm: what the key is for.
            key: data key followed by tweak key. It is copied; the caller wipes its own.

        Raises:
            KeyIdError: no such KeyID, or KeyID 0.
            KeyMaterialError: the key must not be used; the KeyID keeps what it had.
        """
        self._check_programmable(keyid)
        self._replace(keyid, _Entry(KeyMode.DIRECT, _Key.make(algorithm, key)))

    def program_random(
        self,
        keyid: int,
        algorithm: Algorithm,
        entropy: bytes | bytearray | memoryview | None = None,
    ) -> None:
        """Draw a key for a KeyID (SET_KEY_RANDOM).

        Args:
            keyid: 1 to `keyid_count` - 1.
            algorithm: what the key is for.
            entropy: software's own, as long as the key; it is XORed into what was drawn (SDM
                vol. 2B, PCONFIG), so it can make the key no worse.

        Raises:
            KeyIdError: no such KeyID, or KeyID 0.
            EntropyError: the random number generator failed; the KeyID keeps what it had.
        """
        self._check_programmable(keyid)
        self._replace(keyid, _Entry(KeyMode.RANDOM, self._draw(algorithm, entropy)))

    def program_no_encrypt(self, keyid: int) -> None:
        """Let a KeyID's memory go to DRAM as it is (NO_ENCRYPT).

        Args:
            keyid: 1 to `keyid_count` - 1.

        Raises:
            KeyIdError: no such KeyID, or KeyID 0.
        """
        self._check_programmable(keyid)
        self._replace(keyid, _Entry(KeyMode.NO_ENCRYPT, None))

    def clear(self, keyid: int) -> None:
        """Destroy a KeyID's own key; from now on it uses the TME key (CLEAR_KEY).

        Args:
            keyid: 1 to `keyid_count` - 1.

        Raises:
            KeyIdError: no such KeyID, or KeyID 0.
        """
        self._check_programmable(keyid)
        self._replace(keyid, None)

    def cipher(self, keyid: int) -> XtsCipher | None:
        """What a KeyID's lines are encrypted with.

        Good until the KeyID is programmed anew, which wipes it: ask for each batch.

        Args:
            keyid: 0 to `keyid_count` - 1.

        Returns:
            The cipher, or None when the KeyID's memory is not encrypted.

        Raises:
            KeyIdError: no such KeyID.
        """
        key = self._entry(keyid).key
        return None if key is None else key.cipher

    def macs(self, keyid: int) -> LineMacs | None:
        """What makes the MACs of a KeyID's lines; good as long as its `cipher` is.

        Args:
            keyid: 0 to `keyid_count` - 1.

        Returns:
            None when the KeyID's algorithm has no integrity, or its memory is not encrypted.

        Raises:
            KeyIdError: no such KeyID.
        """
        key = self._entry(keyid).key
        return None if key is None else key.macs

    def is_programmed(self, keyid: int) -> bool:
        """Whether a KeyID was programmed, and not cleared since."""
        return keyid in self._programmed

    def describe(self) -> tuple[KeyDescription, ...]:
        """What may be told of the KeyIDs: KeyID 0, then each programmed one in order.

        Every other KeyID is as KeyID 0.
        """
        entries = {0: self._platform, **self._programmed}
        return tuple(
            KeyDescription(keyid, entry.mode, entry.key.cipher.algorithm if entry.key else None)
            for keyid, entry in sorted(entries.items())
        )

    def __repr__(self) -> str:
        return f"<KeyTable {self._keyid_bits} bits, {len(self._programmed)} KeyIDs programmed>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KeyTable holds keys and cannot be pickled or copied")

    def _draw(
        self, algorithm: Algorithm, entropy: bytes | bytearray | memoryview | None = None
    ) -> _Key:
        with allocate(algorithm.key_bytes) as secret:
            self._rng.fill(secret.view)
            if entropy is not None:
                for index, byte in enumerate(entropy):
                    secret.view[index] ^= byte
            return _Key.make(algorithm, secret.view)

    def _drop_tme_key(self) -> None:
        if self._tme is not None and self._tme is not self._saved:
            self._tme.wipe()
        self._tme = None

    def _entry(self, keyid: int) -> _Entry:
        if not 0 <= keyid < self.keyid_count:
            raise KeyIdError(
                f"no KeyID {keyid}: the platform has 0 to {self.keyid_count - 1}", keyid=keyid
            )
        return self._programmed.get(keyid, self._platform)

    def _check_programmable(self, keyid: int) -> None:
        if keyid == 0:
            raise KeyIdError("KeyID 0 is the TME key's and cannot be programmed", keyid=0)
        self._entry(keyid)

    def _replace(self, keyid: int, entry: _Entry | None) -> None:
        old = self._programmed.pop(keyid, None)
        if old is not None and old.key is not None:
            old.key.wipe()
        if entry is not None:
            self._programmed[keyid] = entry


def read_key_file(path: Path, algorithm: Algorithm) -> bytearray:
    """Read key material from a file: the raw bytes, or hexadecimal text.

    Args:
        path: a regular file, not a symbolic link, that only its owner can access. Whitespace in
            hexadecimal text is ignored.
        algorithm: says how many bytes it takes.

    Returns:
        Data key followed by tweak key. The caller wipes it after use (`mktme.engine.xts.wipe`).

    Raises:
        KeyMaterialError: the file cannot be read, others may read it, or it does not hold a key
            of the right length. No message shows any of its contents.
    """
    size = algorithm.key_bytes
    # One byte more than is allowed, to tell a longer file from the longest good one.
    buffer = bytearray(_KEY_FILE_MAX_BYTES + 1)
    try:
        text = memoryview(buffer)[: read_private_file(path, buffer)]
        if len(text) <= _KEY_FILE_MAX_BYTES:
            # Text that happens to be as long as the raw key would be is a shorter key in
            # hexadecimal: random bytes look like that with probability (22/256)^32.
            digits = _count_hexadecimal(text)
            if digits is None and len(text) == size:
                return bytearray(text)
            if digits == 2 * size:
                return _decode_hexadecimal(text, size)
    finally:
        wipe(buffer)
    raise KeyMaterialError(
        f"{path}: no {algorithm.value} key: neither {size} raw bytes nor "
        f"{2 * size} hexadecimal digits",
        hint=f"create one with: (umask 077; head -c {size} /dev/urandom > FILE)",
    )


def read_private_file(path: Path, buffer: bytearray) -> int:
    """Fill a buffer from a file that only its owner can access.

    Args:
        path: a regular file, not a symbolic link.
        buffer: for its contents; of a longer file it gets the beginning.

    Returns:
        How many bytes were read.

    Raises:
        KeyMaterialError: it cannot be read, or others have access to it.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        hint = "give the file itself" if error.errno == errno.ELOOP else None
        raise KeyMaterialError(f"{path}: {error.strerror}", hint=hint) from error
    except ValueError as error:  # a NUL in it
        raise KeyMaterialError(f"{str(path)!r} is no path") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise KeyMaterialError(f"{path}: not a regular file")
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyMaterialError(
                f"{path}: others have access to this key file "
                f"(mode {stat.S_IMODE(status.st_mode):04o})",
                hint=f"chmod 600 {path}",
            )
        length = 0
        while count := os.readv(fd, [memoryview(buffer)[length:]]):
            length += count
        return length
    except OSError as error:
        raise KeyMaterialError(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _count_hexadecimal(text: memoryview) -> int | None:
    """How many hexadecimal digits there are, or None when there is anything but whitespace too."""
    if not all(byte in _DIGITS or byte in _WHITESPACE for byte in text):
        return None
    return sum(byte in _DIGITS for byte in text)


def _decode_hexadecimal(text: memoryview, size_bytes: int) -> bytearray:
    """Decode digit by digit: `bytes.fromhex` would leave immutable copies of the key behind."""
    key = bytearray(size_bytes)
    digits = (int(chr(byte), 16) for byte in text if byte in _DIGITS)
    for index, high in enumerate(digits):
        key[index] = high << 4 | next(digits)
    return key
