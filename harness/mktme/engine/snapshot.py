# SPDX-License-Identifier: GPL-2.0-or-later
"""A copy of DRAM as it is at one moment, while it goes on being written.

Where the file system can share blocks between files (btrfs, XFS), the copy is made of DRAM's own
blocks: ioctl_ficlonerange(2). That first writes back what the page cache has of them, and nobody
writes DRAM until it is done; so most of that is written back before the moment (`prepare`).

Elsewhere it is copy-on-write in here: at that moment it is noted which pages hold anything, which
takes as long as to ask the file system for holes. From then on each write to DRAM first saves the
pages under it that are not copied yet (`Dram.before_write`), and `Snapshot.copy` copies the rest
bit by bit. What is erased at once may be GiB: whoever can wait has it saved bit by bit before
(`Snapshot.save`).

Holes stay holes. What has an image of its own, an NVDIMM, is in the copy at its addresses.
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from mktme.engine.dram import MAC_BYTES_OF, Dram, FileRange, Region, mac_path
from mktme.engine.errors import MktmeError, OutputError
from mktme.engine.new_file import NewFile
from mktme.engine.pages import runs_of_consecutive
from mktme.engine.xts import PAGE_BYTES

COPY_PAGES: Final = 64
"""Most pages that are copied at once, 256 KiB: who waits for the engine waits so long."""

_FICLONERANGE: Final = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_FILE_CLONE_RANGE: Final = struct.Struct("=qQQQ")  # descriptor, offset, length, offset there
_SEARCH_PAGES: Final = 1 << 16
# A copy takes a sixteenth more: MACs, the file system's own, what is written until the moment.
_MORE: Final = 16


class CopyMethod(enum.Enum):
    """How a copy came about; the value is the name users see."""

    REFLINK = "reflink"
    """The two files share blocks until one of them is written."""
    COPY_ON_WRITE = "copy-on-write"
    """Pages were copied, first those about to be written."""


class Snapshot:
    """A copy that is being made; a context manager, which drops it unless it is published.

    For the thread that writes DRAM.

    Args:
        dram: what to copy; nobody else has a snapshot of it now.
        path: where to; the MACs go to `mac_path` of it.
        regions: what to copy, whole pages; the rest of the copy are holes.

    Raises:
        OutputError: a file is there already, or cannot be made.

    Attributes:
        image, macs: the copies.
        method: how they come about; when `prepare` has returned, how they probably will.
        data_bytes: how much DRAM held, pages with anything in them.
        saved_bytes: how much of that was about to be written before it was copied.
    """

    def __init__(self, dram: Dram, path: Path, regions: tuple[Region, ...]) -> None:
        self._dram = dram
        self._regions = regions
        self._pending = np.zeros(0, np.bool_)
        self._buffer = np.empty((COPY_PAGES, PAGE_BYTES // 8), np.uint64)
        self._entries = np.empty(COPY_PAGES * PAGE_BYTES // MAC_BYTES_OF, np.uint8)
        self._failure: MktmeError | None = None
        self.data_bytes = 0
        self.saved_bytes = 0
        self.image = NewFile(path, dram.size_bytes)
        try:
            self.macs = NewFile(mac_path(path), dram.size_bytes // MAC_BYTES_OF)
        except BaseException:
            self.image.close()
            raise
        self._files = self._files_now()
        self.method = CopyMethod.COPY_ON_WRITE

    def prepare(self) -> None:
        """Write back, before guests are stopped, what `begin` would; in a thread of its own.

        Guests and engine go on meanwhile, and what they write then is left to `begin`.

        Raises:
            DramError: DRAM cannot be written back.
        """
        # First the copies, which is asked in no time: a reflink of none of DRAM, too, has btrfs
        # write back all of it (filemap_flush), with the file locked.
        if not _can_share(self.macs.fd, self.image.fd):
            return
        for source in self._files:
            source.file.write_back(source.offset, source.size_bytes)
        if all(_can_share(source.file.fd, self.image.fd) for source in self._files):
            self.method = CopyMethod.REFLINK

    def check_space(self) -> None:
        """Look, when `prepare` has returned, whether what is copied will probably fit.

        Raises:
            OutputError: it will not.
            DramError: DRAM cannot be read.
        """
        if self.method is CopyMethod.REFLINK:
            return
        needed_bytes = int(np.count_nonzero(self._pages_with_data())) * PAGE_BYTES
        needed_bytes += needed_bytes // _MORE
        status = os.fstatvfs(self.image.fd)
        free_bytes = status.f_bavail * status.f_frsize
        if needed_bytes > free_bytes:
            raise OutputError(
                f"{self.image.path}: no space for it: it takes about"
                f" {-(-needed_bytes >> 20)} MiB, and {free_bytes >> 20} MiB are free",
                hint=f"make space on its file system ({self.image.path.parent})",
            )

    def begin(self) -> None:
        """The moment that the copy is of.

        Raises:
            DramError: DRAM cannot be read.
        """
        shared = self.method is CopyMethod.REFLINK and self._share()
        self.method = CopyMethod.REFLINK if shared else CopyMethod.COPY_ON_WRITE
        pending = self._pages_with_data()
        self.data_bytes = int(np.count_nonzero(pending)) * PAGE_BYTES
        if self.method is CopyMethod.COPY_ON_WRITE:
            self._pending = pending
            self._dram.before_write = self._save

    def copy(self) -> Iterator[int]:
        """Copy what is not copied yet.

        Yields:
            After each batch: how many pages it was. DRAM may be written then.

        Raises:
            OutputError: the copy takes no more; what is written to DRAM is not held up by that.
            DramError: DRAM cannot be read.
        """
        for at, count in self._runs(0, len(self._pending)):
            if self._failure is not None:
                break
            self._copy(at, count)
            yield count
        if self._failure is not None:
            raise self._failure
        self.stop()

    def save(self, region: Region) -> Iterator[int]:
        """Copy what is not copied yet of a region, before it is erased or kept elsewhere.

        That would copy it, too, but all of it at once. Nothing that goes wrong here is the caller's
        business.

        Yields:
            As `copy`.
        """
        first, stop = region.base // PAGE_BYTES, -(-region.end // PAGE_BYTES)
        try:
            for at, count in self._runs(first, stop):
                self._copy(at, count)
                self.saved_bytes += count * PAGE_BYTES
                yield count
        except MktmeError as error:
            self._failure = error
            self.stop()

    def stop(self) -> None:
        """Let writes to DRAM go by again; doing so again does nothing."""
        if self._dram.before_write == self._save:
            self._dram.before_write = None
        self._pending = np.zeros(0, np.bool_)

    def close(self) -> None:
        """Drop the copy, unless it was published."""
        self.stop()
        self.image.close()
        self.macs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------

    def _save(self, address: int, size_bytes: int) -> None:
        """`Dram.before_write`."""
        for _ in self.save(Region(address, size_bytes)):
            pass

    def _runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Pages from `first` to `stop` that are not copied when it is their turn: first, count."""
        at = first
        while at < min(stop, len(self._pending)):
            ahead = self._pending[at : min(stop, at + _SEARCH_PAGES)]
            if not ahead.any():
                at += len(ahead)
                continue
            at += int(ahead.argmax())
            row = self._pending[at : min(stop, at + COPY_PAGES)]
            count = len(row) if row.all() else int(row.argmin())
            yield at, count
            at += count

    def _copy(self, first: int, count: int) -> None:
        address = first * PAGE_BYTES
        pages = self._buffer[:count]
        self._dram.read_into(address, pages.data)
        # What it holds may be MACs alone, and pages of zeros beside them.
        written = np.flatnonzero(pages.any(axis=1))
        for start, stop in runs_of_consecutive(written):
            low, high = int(written[start]), int(written[stop - 1]) + 1
            self.image.write(address + low * PAGE_BYTES, pages[low:high].data)
        if self._dram.has_macs:
            entries = self._entries[: count * PAGE_BYTES // MAC_BYTES_OF]
            self._dram.read_macs_into(address, entries.data)
            if entries.any():
                self.macs.write(address // MAC_BYTES_OF, entries.data)
        self._pending[first : first + count] = False

    def _pages_with_data(self) -> NDArray[np.bool_]:
        """Which pages of DRAM are to be in the copy; bool, shape (pages,)."""
        found = np.zeros(self._dram.size_bytes // PAGE_BYTES, np.bool_)
        for region in self._regions:
            for data in self._dram.data_ranges(region):
                found[data.base // PAGE_BYTES : data.end // PAGE_BYTES] = True
        return found

    def _files_now(self) -> list[FileRange]:
        return [file for region in self._regions for file in self._dram.files(region)]

    def _share(self) -> bool:
        """Share DRAM's blocks; returns whether that could be done."""
        try:
            for source in self._files_now():
                new = self.macs if source.is_macs else self.image
                _clone(source.file.fd, source.offset, source.size_bytes, new.fd, source.copy_offset)
        except OSError:
            # EOPNOTSUPP, ENOTTY, EXDEV, EINVAL (no whole blocks), ENOSPC, ...: it is copied then,
            # and what is wrong shows there. What was shared already must not be in the copy.
            for new in (self.image, self.macs):
                size_bytes = os.fstat(new.fd).st_size
                os.ftruncate(new.fd, 0)
                os.ftruncate(new.fd, size_bytes)
            return False
        return True


def _can_share(source: int, target: int) -> bool:
    """Whether two files can share blocks: they are to share none, from the end to the end."""
    try:
        _clone(source, os.fstat(source).st_size, 0, target, 0)
    except OSError:
        return False
    return True


def _clone(source: int, offset: int, size_bytes: int, target: int, target_offset: int) -> None:
    share = _FILE_CLONE_RANGE.pack(source, offset, size_bytes, target_offset)
    fcntl.ioctl(target, _FICLONERANGE, share)


class ContentsDigest:
    """A digest of a file, whatever of it is holes: `mktme.engine.sidecar.CONTENTS_RULE`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Add what is at an offset.

        Args:
            offset: behind all that was added before, a multiple of 4096.
            data: uint8, shape (n,); only at the file's end n may be no multiple of 4096.
        """
        whole = len(data) - len(data) % PAGE_BYTES
        pages = data[:whole].reshape(-1, PAGE_BYTES)
        # As words: to look for what is not zero is eight times faster so.
        written = np.flatnonzero(pages.view(np.uint64).any(axis=1))
        message = np.empty((len(written), 8 + PAGE_BYTES), np.uint8)
        message[:, :8] = (
            (written.astype("<u8") * np.uint64(PAGE_BYTES) + np.uint64(offset))
            .view(np.uint8)
            .reshape(-1, 8)
        )
        np.take(pages, written, axis=0, out=message[:, 8:], mode="clip")
        self._hash.update(message.data)
        if data[whole:].any():
            self._hash.update((offset + whole).to_bytes(8, "little") + data[whole:].tobytes())

    def hexdigest(self) -> str:
        """What it comes to, 64 hexadecimal digits."""
        return self._hash.hexdigest()
