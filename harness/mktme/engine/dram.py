# SPDX-License-Identifier: GPL-2.0-or-later
"""The DRAM image, and the JSON sidecar that says how to read it.

The image is a sparse raw file: byte offset A is system physical address A, KeyID bits stripped.

A line whose 64 bytes are all zero was never written, and reads as 64 zero bytes whatever the
KeyID. (A line that was written is all zero with probability 2^-512, or when it holds zeros and
its KeyID does not encrypt.) So the file stays sparse, and a copy that is not sparse means the
same.

The image is read and written with preadv and pwrite only. It is never mapped: when its file
system is full, a store to a mapped hole is a SIGBUS, where pwrite returns ENOSPC and the engine
can wait for space.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn, Self
from uuid import UUID

import msgspec

from mktme.engine.errors import AddressError, DramError, DramFullError
from mktme.engine.keys import MAX_KEYID_BITS, KeyDescription
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES

REGION_ALIGN_BYTES: Final = 2 << 20

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# linux/falloc.h
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A range of DRAM, in bytes."""

    base: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size_bytes


class Dram:
    """An open DRAM image; `Dram.create` or `Dram.open` makes one. A context manager."""

    def __init__(self, fd: int, path: Path, size_bytes: int) -> None:
        self._fd = fd
        self._path = path
        self._size_bytes = size_bytes
        self._regions: list[Region] = []  # ascending

    @classmethod
    def create(cls, path: Path, size_bytes: int, *, overwrite: bool = False) -> Self:
        """Make an image of never-written lines, accessible to its owner only.

        Args:
            path: where.
            size_bytes: a multiple of 4096.
            overwrite: whether a file that exists may be replaced by the image.

        Raises:
            ValueError: the size is not a positive multiple of 4096.
            DramError: the file exists, is another engine's DRAM, or cannot be made.
        """
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ValueError(f"the DRAM size must be whole 4 KiB pages, not {size_bytes} bytes")
        fd = _open_image(path, os.O_RDWR | os.O_CREAT | (0 if overwrite else os.O_EXCL))
        try:
            # Not O_TRUNC: an image that another process writes must be left alone.
            _lock(fd, path)
            try:
                os.fchmod(fd, 0o600)
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size_bytes)
            except OSError as error:
                os.unlink(path)
                raise DramError(
                    f"{path}: no DRAM of {size_bytes} bytes: {error.strerror}"
                ) from error
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, size_bytes)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = True) -> Self:
        """Open an image that exists.

        It knows of no regions: `allocate` is for the process that created the image.

        Args:
            path: the image.
            read_only: False to write to it too, which only one process at a time can.

        Raises:
            DramError: it cannot be opened, is no regular file or not whole pages, or another
                process writes it.
        """
        fd = _open_image(path, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            if not read_only:
                _lock(fd, path)
            size_bytes = os.fstat(fd).st_size
            if size_bytes == 0 or size_bytes % PAGE_BYTES:
                raise DramError(f"{path}: no DRAM image: {size_bytes} bytes are not whole pages")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, size_bytes)

    @property
    def path(self) -> Path:
        """The image file."""
        return self._path

    @property
    def size_bytes(self) -> int:
        """Bytes of DRAM."""
        return self._size_bytes

    def read_into(self, address: int, buffer: bytearray | memoryview) -> None:
        """Fill a buffer with ciphertext.

        Args:
            address: of the first byte.
            buffer: C-contiguous, writable, of any item type.

        Raises:
            AddressError: the range is not all in DRAM.
            DramError: the file cannot be read, or was cut short.
        """
        view = memoryview(buffer).cast("B")
        self.check_range(address, len(view))
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], address + done)
            except OSError as error:
                self._raise("cannot read", error, address + done)
            if count == 0:
                raise DramError(f"{self._path}: cut short at {address + done:#x}")
            done += count

    def write(self, address: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write ciphertext.

        Args:
            address: of the first byte.
            buffer: C-contiguous, of any item type.

        Raises:
            AddressError: the range is not all in DRAM.
            DramFullError: there is no space; ``address`` is the first byte not written.
            DramError: the file cannot be written.
        """
        view = memoryview(buffer).cast("B")
        self.check_range(address, len(view))
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], address + done)
            except OSError as error:
                self._raise("cannot write", error, address + done)

    def allocate(self, size_bytes: int) -> Region:
        """Set aside a range of DRAM, aligned to 2 MiB: the first that is free.

        Its lines are never-written ones, whatever was there before.

        Args:
            size_bytes: whole 4 KiB pages.

        Raises:
            ValueError: the size is not a positive multiple of 4096.
            AddressError: no free range is that large.
            DramError: what was there cannot be erased.
        """
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ValueError(f"a region is whole 4 KiB pages, not {size_bytes} bytes")
        base = 0
        for taken in self._regions:
            if base + size_bytes <= taken.base:
                break
            base = -(-taken.end // REGION_ALIGN_BYTES) * REGION_ALIGN_BYTES
        region = Region(base, size_bytes)
        if region.end > self._size_bytes:
            raise AddressError(
                f"no free {size_bytes} bytes in {self._size_bytes} bytes of DRAM",
                address=base,
                hint="make DRAM larger, or remove a VM",
            )
        self.erase(region)
        bisect.insort(self._regions, region)
        return region

    def free(self, region: Region) -> None:
        """Give a region back. What it holds stays in the image until it is allocated again.

        Raises:
            AddressError: the region is not allocated.
        """
        try:
            self._regions.remove(region)
        except ValueError:
            raise AddressError(
                f"no region of {region.size_bytes} bytes at {region.base:#x}", address=region.base
            ) from None

    def check_range(self, address: int, size_bytes: int) -> None:
        """Raise AddressError unless all of a range is in DRAM."""
        if address < 0 or size_bytes < 0 or address + size_bytes > self._size_bytes:
            raise AddressError(
                f"{size_bytes} bytes at {address:#x} are not in DRAM "
                f"(0 to {self._size_bytes - 1:#x})",
                address=address,
            )

    def close(self) -> None:
        """Close the image; it stays on disk. Closing again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Dram {self._path}, {self._size_bytes} bytes>"

    def erase(self, region: Region) -> None:
        """Make a range's lines never-written ones: a hole, unless it is one.

        Raises:
            DramError: the file system cannot do that.
        """
        try:
            data = os.lseek(self._fd, region.base, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end of the file
                return
            self._raise("cannot read", error, region.base)
        if data >= region.end:
            return
        if _libc.fallocate(
            self._fd,
            _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE,
            ctypes.c_int64(region.base),
            ctypes.c_int64(region.size_bytes),
        ):
            number = ctypes.get_errno()
            self._raise("cannot erase", OSError(number, os.strerror(number)), region.base)

    def _raise(self, what: str, error: OSError, address: int) -> NoReturn:
        message = f"{self._path}: {what} at {address:#x}: {error.strerror}"
        if error.errno in _FULL:
            raise DramFullError(
                message, address=address, hint=f"make space on the file system of {self._path}"
            ) from error
        raise DramError(message) from error


_libc: Final = ctypes.CDLL(None, use_errno=True)


def _open_image(path: Path, flags: int) -> int:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except FileExistsError as error:
        raise DramError(
            f"{path}: exists", hint="remove it, or choose another path for DRAM"
        ) from error
    except OSError as error:
        raise DramError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DramError(f"{path}: not a regular file")
    return fd


def _lock(fd: int, path: Path) -> None:
    """Take the image's write lock; it ends with the descriptor."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DramError(f"{path}: another process writes this image") from None


# --- the sidecar ------------------------------------------------------------------------------

SIDECAR_SCHEMA: Final = "mktme-dram"
SIDECAR_VERSION: Final = 1
_SIDECAR_MAX_BYTES: Final = 64 << 20

TWEAK_RULE: Final = (
    "AES-XTS (IEEE 1619, NIST SP 800-38E), the key being the data key followed by the tweak key. "
    "Each 64 bytes of the image are a data unit; its tweak is its byte offset in the image as "
    "a 16-byte little-endian number. The KeyID is not part of the tweak."
)
NEVER_WRITTEN_RULE: Final = (
    "64 bytes that are all zero were never written and read as 64 zero bytes whatever the KeyID."
)

_Bytes = Annotated[int, msgspec.Meta(ge=0)]
_KeyId = Annotated[int, msgspec.Meta(ge=0, lt=1 << MAX_KEYID_BITS)]


class PlatformRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the platform.

    Attributes:
        maxphyaddr: bits of a physical address, KeyID bits included (CPUID 80000008H:EAX[7:0]).
        keyid_bits: how many of them, the uppermost, are KeyID.
        dram_bytes: bytes of DRAM.
    """

    maxphyaddr: Annotated[int, msgspec.Meta(ge=32, le=52)]
    keyid_bits: Annotated[int, msgspec.Meta(ge=0, le=MAX_KEYID_BITS)]
    dram_bytes: _Bytes


class GuestSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run of guest-physical addresses, and the run of its VM's RAM offsets behind it."""

    guest_physical: _Bytes
    ram_offset: _Bytes
    size_bytes: _Bytes


class VmRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a VM's RAM is: RAM offset 0 at ``base`` in DRAM."""

    uuid: UUID
    name: str
    base: _Bytes
    size_bytes: _Bytes
    keyid: _KeyId
    segments: tuple[GuestSegment, ...]


class PageRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run of pages assigned to one KeyID."""

    base: _Bytes
    size_bytes: _Bytes
    keyid: _KeyId


class Sidecar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that it takes, besides the keys, to read a DRAM image. Never a key.

    Attributes:
        platform: sizes.
        keys: how KeyIDs are programmed; one that is not listed is as KeyID 0.
        vms: whose RAM is where.
        pages: the KeyID of every page of DRAM.
        integrity: where line MACs are; None, there are none.
        tweak, never_written: rules, for a reader who has only this file.
    """

    schema: Literal["mktme-dram"] = SIDECAR_SCHEMA
    version: Literal[1] = SIDECAR_VERSION
    platform: PlatformRecord
    data_unit_bytes: Literal[64] = LINE_BYTES
    tweak: str = TWEAK_RULE
    never_written: str = NEVER_WRITTEN_RULE
    keys: tuple[KeyDescription, ...]
    vms: tuple[VmRecord, ...]
    pages: tuple[PageRange, ...]
    integrity: None = None


class _Header(msgspec.Struct):
    schema: str
    version: int


def sidecar_path(image: Path) -> Path:
    """Where the sidecar of an image is: ``<image>.json``."""
    return image.with_name(f"{image.name}.json")


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write a sidecar, replacing an older one in one step; only its owner can access it.

    Args:
        path: see `sidecar_path`.
        sidecar: what to write.

    Raises:
        DramError: it cannot be written; an older one is still there.
    """
    data = msgspec.json.format(msgspec.json.encode(sidecar), indent=2) + b"\n"
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise DramError(f"{path}: cannot write the sidecar: {error.strerror}") from error


def read_sidecar(path: Path) -> Sidecar:
    """Read a sidecar.

    Args:
        path: see `sidecar_path`.

    Raises:
        DramError: it cannot be read, is no sidecar, or is of another version.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_SIDECAR_MAX_BYTES + 1)
    except OSError as error:
        raise DramError(f"{path}: cannot read the sidecar: {error.strerror}") from error
    if len(data) > _SIDECAR_MAX_BYTES:
        raise DramError(f"{path}: no sidecar: larger than {_SIDECAR_MAX_BYTES} bytes")
    try:
        header = msgspec.json.decode(data, type=_Header)
        if header.schema != SIDECAR_SCHEMA:
            raise DramError(f"{path}: no sidecar: its schema is {header.schema!r}")
        if header.version != SIDECAR_VERSION:
            raise DramError(
                f"{path}: sidecar version {header.version}, this mktme reads {SIDECAR_VERSION}",
                hint="use the mktme that wrote it",
            )
        return msgspec.json.decode(data, type=Sidecar)
    except msgspec.DecodeError as error:
        raise DramError(f"{path}: no valid sidecar: {error}") from error
