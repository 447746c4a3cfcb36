# SPDX-License-Identifier: GPL-2.0-or-later
"""A sparse file of fixed size that one process owns: DRAM, and the MACs beside it.

It is read and written with preadv and pwrite only. It is never mapped: when its file system is
full, a store to a mapped hole is a SIGBUS, where pwrite returns ENOSPC and the engine can wait for
space (docs/adr/0002).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn, Self

from mktme.engine.errors import DramError, DramFullError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# linux/falloc.h
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
# linux/fs.h: sync_file_range(2), to write back what is dirty and wait for it.
_SYNC_FILE_RANGE_WAIT_BEFORE: Final = 1
_SYNC_FILE_RANGE_WRITE: Final = 2
_SYNC_FILE_RANGE_WAIT_AFTER: Final = 4


class SparseFile:
    """An open file; `SparseFile.create` or `SparseFile.open` makes one.

    Offsets are the caller's to check.

    Attributes:
        path: the file.
        size_bytes: its size.
        stands_for: bytes of DRAM that a byte of it is for; where it is full, the error says which.
        base: the first of them, as an address.
    """

    def __init__(self, fd: int, path: Path, stands_for: int) -> None:
        self._fd = fd
        self.path = path
        self.size_bytes = os.fstat(fd).st_size
        self.stands_for = stands_for
        self.base = 0

    @classmethod
    def create(cls, path: Path, size_bytes: int, *, overwrite: bool, stands_for: int = 1) -> Self:
        """Make a file of zeros, accessible to its owner only.

        Args:
            path: where.
            size_bytes: its size.
            overwrite: whether a file that exists may be replaced.
            stands_for: see the attribute.

        Raises:
            DramError: the file exists, is another engine's, or cannot be made.
        """
        fd = _open(path, os.O_RDWR | os.O_CREAT | (0 if overwrite else os.O_EXCL))
        try:
            # Not O_TRUNC: a file that another process writes must be left alone.
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
        return cls(fd, path, stands_for)

    @classmethod
    def open(cls, path: Path, *, read_only: bool, stands_for: int = 1) -> Self:
        """Open a file that exists.

        Args:
            path: the file.
            read_only: False to write to it too, which only one process at a time can.
            stands_for: see the attribute.

        Raises:
            DramError: it cannot be opened, is no regular file, or another process writes it.
        """
        fd = _open(path, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            if not read_only:
                _lock(fd, path)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, stands_for)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill a buffer.

        Args:
            offset: of the first byte.
            buffer: C-contiguous, writable, of any item type.

        Raises:
            DramError: the file cannot be read, or was cut short.
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                self._raise("cannot read", error, offset + done)
            if count == 0:
                raise DramError(f"{self.path}: cut short at {offset + done:#x}")
            done += count

    def write(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write a buffer.

        Args:
            offset: of the first byte.
            buffer: C-contiguous, of any item type.

        Raises:
            DramFullError: there is no space; ``address`` is what the first byte not written
                stands for.
            DramError: the file cannot be written, or was cut short.
        """
        self._check_size()
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:
                self._raise("cannot write", error, offset + done)

    def erase(self, offset: int, size_bytes: int) -> None:
        """Make a range zeros: a hole, unless it is one.

        Raises:
            DramError: the file system cannot do that.
        """
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end of the file
                return
            self._raise("cannot read", error, offset)
        if data >= offset + size_bytes:
            return
        if _libc.fallocate(
            self._fd,
            _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE,
            ctypes.c_int64(offset),
            ctypes.c_int64(size_bytes),
        ):
            number = ctypes.get_errno()
            self._raise("cannot erase", OSError(number, os.strerror(number)), offset)

    def write_back(self, offset: int, size_bytes: int) -> None:
        """Have what the page cache has of a range written to disk; others may write meanwhile.

        Raises:
            DramError: it cannot be written.
        """
        if _libc.sync_file_range(
            self._fd,
            ctypes.c_int64(offset),
            ctypes.c_int64(size_bytes),
            _SYNC_FILE_RANGE_WAIT_BEFORE | _SYNC_FILE_RANGE_WRITE | _SYNC_FILE_RANGE_WAIT_AFTER,
        ):
            number = ctypes.get_errno()
            self._raise("cannot write back", OSError(number, os.strerror(number)), offset)

    def data(self, offset: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """Where a range is no hole: (offset, offset behind it), ascending.

        Raises:
            DramError: the file system cannot say.
        """
        at, end = offset, offset + size_bytes
        while at < end:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                at = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from here to the end of the file
                    return
                self._raise("cannot read", error, at)
            if start < end:
                yield start, min(at, end)

    @property
    def fd(self) -> int:
        """Its descriptor, to share its blocks; the file is written through `write` alone."""
        return self._fd

    def close(self) -> None:
        """Close the file; it stays on disk. Closing again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_size(self) -> None:
        """Look whether the file was cut short.

        A write behind the cut would make it longer again, and what was lost would be a hole: lines
        that were never written, which read as zeros.
        """
        size = os.fstat(self._fd).st_size
        if size < self.size_bytes:
            raise DramError(f"{self.path}: cut short at {size:#x}")

    def _raise(self, what: str, error: OSError, offset: int) -> NoReturn:
        message = f"{self.path}: {what} at {offset:#x}: {error.strerror}"
        if error.errno in _FULL:
            raise DramFullError(
                message,
                address=self.base + offset * self.stands_for,
                hint=f"make space on the file system of {self.path}",
            ) from error
        raise DramError(message) from error


_libc: Final = ctypes.CDLL(None, use_errno=True)


def _open(path: Path, flags: int) -> int:
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
    """Take the file's write lock; it ends with the descriptor."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DramError(f"{path}: another process writes this image") from None
