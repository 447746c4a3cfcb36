# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that have no name until they are complete.

Such a file is made with O_TMPFILE (open(2)), so that the kernel takes it away with its last
descriptor: whoever writes it may fail, or be killed, and nothing of it is left. Where a file system
has no such files (NFS, vfat), it has a hidden name meanwhile, which only a kill leaves behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn, Self

from mktme.engine.errors import OutputError, OutputExistsError

_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


class NewFile:
    """A file that is being written; a context manager, which drops it unless it was published.

    Args:
        path: its name to be, which must be free.
        size_bytes: its size; it begins as one hole.

    Raises:
        OutputExistsError: the name is taken.
        OutputError: no file can be made there.

    Attributes:
        path: its name to be.
        fd: its descriptor, for reading and writing.
    """

    def __init__(self, path: Path, size_bytes: int = 0) -> None:
        self.path = path
        self._temporary: str | None = None
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # ValueError: what no path can be
            raise OutputError(f"{path}: no file can be made there: {_why(error)}") from error
        else:
            raise _exists(path)
        try:
            self._directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise OutputError(f"{path}: no file can be made there: {error.strerror}") from error
        self.fd = -1
        try:
            self.fd = self._open()
            os.ftruncate(self.fd, size_bytes)
        except OSError as error:
            self.close()
            raise OutputError(f"{path}: no file can be made there: {error.strerror}") from error

    def _open(self) -> int:
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(self.path.parent, flags, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        fd, self._temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        return fd

    def write(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write a buffer; from any thread.

        Raises:
            OutputError: there is no space, or the file cannot be written.
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                self._raise("cannot write", error)

    def publish(self) -> None:
        """Give the file its name.

        Raises:
            OutputExistsError: somebody took the name meanwhile.
            OutputError: it cannot be done.
        """
        try:
            if self._temporary is None:
                # /proc/self/fd: linkat(2) with AT_EMPTY_PATH needs a capability.
                os.link(
                    f"/proc/self/fd/{self.fd}",
                    self.path.name,
                    dst_dir_fd=self._directory,
                    follow_symlinks=True,
                )
            elif os.path.lexists(self.path):
                raise _exists(self.path)
            else:
                # Not link(2): the file systems that this is for may have none.
                os.rename(self._temporary, self.path)
                self._temporary = None
        except FileExistsError as error:
            raise _exists(self.path) from error
        except OSError as error:
            self._raise("cannot be given its name", error)

    def close(self) -> None:
        """Close the file; one without a name is gone then. Closing again does nothing."""
        temporary, self._temporary = self._temporary, None
        descriptors = (self.fd, self._directory)
        self.fd = self._directory = -1
        try:
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        finally:
            for descriptor in descriptors:
                if descriptor >= 0:
                    os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _raise(self, what: str, error: OSError) -> NoReturn:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{self.path}: {what}: {error.strerror}; nothing of it is left",
            hint=f"make space on its file system ({self.path.parent})" if full else None,
        ) from error


def publish(files: Sequence[NewFile]) -> None:
    """Give files that belong together their names, in this order; all of them or none.

    Raises:
        OutputError: one of them cannot be had.
    """
    named: list[NewFile] = []
    try:
        for file in files:
            file.publish()
            named.append(file)
    except BaseException:
        for file in named:
            os.unlink(file.path)
        raise


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(f"{path}: exists", hint="remove it, or choose another name")


def _why(error: OSError | ValueError) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)
