# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of another process, as it sees them and as they stood when they were looked at."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from mktme.attest import cbor
from mktme.attest.errors import MeasurementError

_READ_BYTES: Final = 1 << 20
# A change within the kernel's clock tick leaves no trace, so what is that young is hashed anew.
_RACY_NS: Final = 1_000_000_000

# openat2(2), linux/openat2.h
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10

_libc: Final = ctypes.CDLL(None, use_errno=True)

Stamp: TypeAlias = tuple[int, int, int, int, int]
"""Device, inode, size, and times of change in nanoseconds (content, and inode)."""


@dataclass(frozen=True, slots=True)
class File:
    """A file as it stood when it was looked at.

    Attributes:
        path: absolute, in its process's root.
        stamp: how it stood.
        is_disk: whether its digest is that of a disk (`disk_digest`).
    """

    path: str
    stamp: Stamp
    is_disk: bool = False


class Root:
    """The files of a process, as it sees them."""

    def __init__(self, process: Path) -> None:
        self._fd = os.open(process / "root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def open(self, path: str, flags: int = 0) -> int:
        """A descriptor of a file; symbolic links stay in this root."""
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        how = (ctypes.c_uint64 * 3)(flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        fd: int = _libc.syscall(
            _SYS_OPENAT2, self._fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)
        )
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return fd

    def look_at(self, path: str, *, is_disk: bool = False) -> File:
        """A regular file as it stands."""
        with closing(Opened(self, path)) as opened:
            return File(path, opened.stamp, is_disk)

    def list(self, path: str) -> list[str]:
        """The names in a directory; none if it is not there."""
        try:
            fd = self.open(path, os.O_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return []
            raise
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)


class Opened:
    """A regular file, open for reading."""

    def __init__(self, root: Root, path: str) -> None:
        if not path.startswith("/"):
            raise MeasurementError(f"{path}: QEMU was given a path that is not absolute")
        try:
            self.fd = root.open(path)
        except OSError as error:
            raise MeasurementError(f"{path}: {error.strerror}") from error
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.fd)
            raise MeasurementError(f"{path} is not a regular file, and cannot be measured")
        self.stamp: Stamp = (
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)

    def read(self, size: int, offset: int) -> bytes:
        """Some of its bytes, fewer at its end."""
        return os.pread(self.fd, size, offset)


class Digests:
    """SHA-256 of files, each made once; used by one thread at a time."""

    def __init__(self) -> None:
        self._known: dict[tuple[Stamp, bool], bytes] = {}

    def of(self, root: Root, file: File) -> bytes:
        """The digest of a file that is as it was.

        Raises:
            MeasurementError: it is not, or cannot be read.
        """
        changed = MeasurementError(f"{file.path} was changed since the VM was launched")
        with closing(Opened(root, file.path)) as opened:
            if opened.stamp != file.stamp:
                raise changed
            known = self._known.get((file.stamp, file.is_disk))
            if known is not None:
                return known
            started = time.time_ns()
            digest = disk_digest(opened.fd) if file.is_disk else _digest(opened.fd)
        with closing(Opened(root, file.path)) as again:
            if again.stamp != file.stamp:
                raise changed
        if started - file.stamp[4] > _RACY_NS:
            self._known[file.stamp, file.is_disk] = digest
        return digest


def _digest(fd: int) -> bytes:
    digest = hashlib.sha256()
    offset = 0
    while part := os.pread(fd, _READ_BYTES, offset):
        digest.update(part)
        offset += len(part)
    return digest.digest()


def disk_digest(fd: int) -> bytes:
    """SHA-256 over a disk: of the CBOR array of its size and, of each 1 MiB not all zeros, where
    it is and its SHA-256.

    A hole and written zeros are the same, and holes, most of such files, are not read.

    Args:
        fd: of the file, open for reading.
    """
    size = os.fstat(fd).st_size
    chunks: list[object] = []
    position = 0
    while position < size:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        position = data - data % _READ_BYTES
        chunk = os.pread(fd, _READ_BYTES, position)
        if not chunk:
            break  # it became shorter: its stamp will tell
        if chunk.count(0) != len(chunk):
            chunks.append([position, hashlib.sha256(chunk).digest()])
        position += _READ_BYTES
    return hashlib.sha256(cbor.encode([size, chunks])).digest()
