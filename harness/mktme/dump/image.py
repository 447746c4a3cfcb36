# SPDX-License-Identifier: GPL-2.0-or-later
"""A DRAM image and its sidecar, opened for reading.

Everything in `mktme.dump` reads through a `DumpImage`: it finds what was written (the rest of the
file is holes), says which KeyID a page has, and notices a file that changes under the reader.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from mktme.engine.dram import Region, mac_path
from mktme.engine.errors import AddressError, DramError, MktmeError
from mktme.engine.keys import KeyDescription
from mktme.engine.sidecar import ModuleRecord, Sidecar, VmRecord, read_sidecar, sidecar_path
from mktme.engine.xts import PAGE_BYTES

CHUNK_BYTES: Final = 4 << 20
"""What readers take at a time, unless they have a reason for more."""


class DumpError(MktmeError):
    """An image that cannot be read as what it is said to be."""


class DumpChangedError(DumpError):
    """An image was written while it was read."""


class Chunk(NamedTuple):
    """A piece of an image: `data`, uint8 of shape (n,), begins at byte `address`."""

    address: int
    data: npt.NDArray[np.uint8]


class _Stamp(NamedTuple):
    """What changes when a file is written or replaced; st_mtime may be set back, ctime may not."""

    device: int
    inode: int
    size_bytes: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    fd: int
    stamp: _Stamp


class DumpImage:
    """An image opened for reading; `DumpImage.open` makes one. A context manager.

    Threads may read one image at the same time.

    Attributes:
        path: the image.
        sidecar: its description; None for `open_raw`.
        size_bytes: bytes of DRAM.
    """

    def __init__(self, image: _File, sidecar: Sidecar | None, modules: dict[Region, _File]) -> None:
        self.path = image.path
        self.sidecar = sidecar
        self.size_bytes = image.stamp.size_bytes
        self._image = image
        self._modules = modules  # ascending, none overlaps another

    @classmethod
    def open(cls, path: Path, sidecar: Path | None = None) -> Self:
        """Open an image that has a sidecar, and the images of the NVDIMMs in it.

        Args:
            path: the image.
            sidecar: its description; None for the one beside it.

        Raises:
            DumpError: no image; no sidecar, or one of another version; the two do not belong
                together, as one is of another size.
        """
        described = sidecar_path(path) if sidecar is None else sidecar
        image = _open(path)
        modules: dict[Region, _File] = {}
        try:
            if not described.exists():
                raise DumpError(
                    f"{described}: no such file: nothing says how {path.name} is to be read",
                    hint="copy it along with its image, or name it with --sidecar",
                )
            try:
                record = read_sidecar(described)
            except DramError as error:
                raise DumpError(str(error), hint=error.hint) from error
            _check_belongs(image, record, described)
            for module in sorted(record.modules, key=lambda one: one.base):
                modules[Region(module.base, module.size_bytes)] = _open_module(module, path.parent)
            return cls(image, record, modules)
        except BaseException:
            for file in (image, *modules.values()):
                os.close(file.fd)
            raise

    @classmethod
    def open_raw(cls, path: Path) -> Self:
        """Open a file of memory that nothing describes: what `decrypt` made, or a foreign dump.

        Raises:
            DumpError: it is no regular file, or empty.
        """
        return cls(_open(path), None, {})

    def close(self) -> None:
        """Close the files. Closing again does nothing."""
        for file in (self._image, *self._modules.values()):
            if file.fd >= 0:
                os.close(file.fd)
        self._image = _File(self._image.path, -1, self._image.stamp)
        self._modules = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DumpImage {self.path}, {self.size_bytes} bytes>"

    def check_unchanged(self) -> None:
        """Raise DumpChangedError if a file was written, or replaced, since it was opened.

        A reader calls it before it tells anybody what it found.
        """
        for file in (self._image, *self._modules.values()):
            try:
                there = _stamp(os.stat(file.path))
            except OSError as error:
                raise DumpChangedError(f"{file.path}: {error.strerror} while it was read") from None
            if there != file.stamp or _stamp(os.fstat(file.fd)) != file.stamp:
                raise DumpChangedError(
                    f"{file.path}: changed while it was read",
                    hint="a running platform writes its DRAM; mktme dump capture makes a copy"
                    " that stays as it is",
                )

    def data_ranges(self) -> list[Region]:
        """What the image may have other than zeros: whole pages, ascending, apart.

        Pages that are not in it were never written, and need not be read.
        """
        ranges = [
            region
            for low, high in self._outside_modules()
            for region in _data(self._image, low, high, 0)
        ]
        for module, file in self._modules.items():
            ranges += _data(file, 0, module.size_bytes, module.base)
        return _merged(ranges)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES, *, overlap_bytes: int = 0) -> Iterator[Chunk]:
        """What was written, piece by piece.

        Args:
            chunk_bytes: whole pages; pieces begin at multiples of it, or where data does.
            overlap_bytes: how much of what follows a piece has besides, for what lies across a
                border.

        Raises:
            DumpError: the image cannot be read, or was cut short.
        """
        for piece in self.pieces(chunk_bytes):
            end = min(self.size_bytes, piece.end + overlap_bytes)
            yield Chunk(piece.base, self.read(piece.base, end - piece.base))

    def pieces(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Region]:
        """Where the pieces of `chunks` are, without reading them: tasks for a scheduler."""
        if chunk_bytes <= 0 or chunk_bytes % PAGE_BYTES:
            raise ValueError(f"a chunk is whole 4 KiB pages, not {chunk_bytes} bytes")
        for region in self.data_ranges():
            base = region.base
            while base < region.end:
                end = min(region.end, (base // chunk_bytes + 1) * chunk_bytes)
                yield Region(base, end - base)
                base = end

    def read(self, address: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of the image: ciphertext, where its KeyID encrypts.

        Returns:
            uint8, shape (size_bytes,), writable.

        Raises:
            AddressError: the range is not all in the image.
            DumpError: the image cannot be read, or was cut short.
        """
        data = np.empty(max(0, size_bytes), np.uint8)
        self.read_into(address, data)
        return data

    def read_into(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        """As `read`, into memory that is there: new memory costs more than to read.

        Args:
            address: of the first byte.
            data: uint8, shape (n,), C-contiguous.
        """
        size_bytes = len(data)
        if address < 0 or size_bytes < 0 or address + size_bytes > self.size_bytes:
            raise AddressError(
                f"{size_bytes} bytes at {address:#x} are not in {self.path}"
                f" (0 to {self.size_bytes - 1:#x})",
                address=address,
            )
        view = data.data
        at = address
        end = address + size_bytes
        for module, file in self._modules.items():
            if module.end <= at or module.base >= end:
                continue
            if at < module.base:
                _read_into(self._image, at, view[at - address : module.base - address])
                at = module.base
            stop = min(end, module.end)
            _read_into(file, at - module.base, view[at - address : stop - address])
            at = stop
        if at < end:
            _read_into(self._image, at, view[at - address :])

    def module_files(self) -> list[tuple[Region, Path]]:
        """Ranges that have an image of their own, and which."""
        return [(region, file.path) for region, file in self._modules.items()]

    def keyids(self) -> npt.NDArray[np.uint16]:
        """The KeyID of every page: uint16, shape (pages,); 0 where the sidecar has none."""
        found = np.zeros(-(-self.size_bytes // PAGE_BYTES), np.uint16)
        if self.sidecar is not None:
            for run in self.sidecar.pages:
                first = run.base // PAGE_BYTES
                found[first : first + run.size_bytes // PAGE_BYTES] = run.keyid
        return found

    def key(self, keyid: int) -> KeyDescription | None:
        """How a KeyID is programmed; KeyID 0's if it is not; None if nothing is known."""
        if self.sidecar is None:
            return None
        keys = {one.keyid: one for one in self.sidecar.keys}
        return keys.get(keyid, keys.get(0))

    def vm(self, name: str) -> VmRecord:
        """The VM of a name, or of a UUID's text.

        Raises:
            DumpError: there is none, or several have the name.
        """
        vms = () if self.sidecar is None else self.sidecar.vms
        found = [one for one in vms if name in (one.name, str(one.uuid))]
        if len(found) == 1:
            return found[0]
        known = ", ".join(one.name for one in vms) or "none"
        what = "several VMs are" if found else "no VM is"
        raise DumpError(
            f"{self.path}: {what} named {name!r}", hint=f"it holds: {known}; a UUID will do, too"
        )

    def _outside_modules(self) -> Iterator[tuple[int, int]]:
        low = 0
        for module in self._modules:
            if low < module.base:
                yield low, module.base
            low = module.end
        if low < self.size_bytes:
            yield low, self.size_bytes


def _check_belongs(image: _File, record: Sidecar, described: Path) -> None:
    size_bytes = image.stamp.size_bytes
    if size_bytes != record.platform.dram_bytes:
        what = "truncated" if size_bytes < record.platform.dram_bytes else "not its image"
        raise DumpError(
            f"{image.path}: {what}: {size_bytes} bytes, and {described.name} describes"
            f" {record.platform.dram_bytes}"
        )
    for what, regions in (
        ("VMs", [Region(one.base, one.size_bytes) for one in record.vms]),
        ("pages", [Region(one.base, one.size_bytes) for one in record.pages]),
        ("modules", [Region(one.base, one.size_bytes) for one in record.modules]),
    ):
        end = 0
        for region in sorted(regions):
            if region.base < end or region.end > size_bytes or region.base % PAGE_BYTES:
                raise DumpError(
                    f"{described}: inconsistent: {what} overlap, or are not in the image, at"
                    f" {region.base:#x}"
                )
            end = region.end
    if record.integrity is not None and not mac_path(image.path).exists():
        raise DumpError(
            f"{mac_path(image.path)}: no such file, and {described.name} says that there are MACs",
            hint="copy it along with its image",
        )


def _open_module(module: ModuleRecord, directory: Path) -> _File:
    """An NVDIMM's image: where the sidecar has it, or beside the image if it was moved along."""
    path = Path(module.file)
    if not path.exists():
        path = directory / path.name
    file = _open(path)
    if file.stamp.size_bytes != module.size_bytes:
        os.close(file.fd)
        raise DumpError(
            f"{path}: {file.stamp.size_bytes} bytes, and the NVDIMM at {module.base:#x} has"
            f" {module.size_bytes}"
        )
    return file


def _open(path: Path) -> _File:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DumpError(f"{path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not os.path.isfile(f"/proc/self/fd/{fd}"):
            raise DumpError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise DumpError(f"{path}: empty")
        return _File(path, fd, _stamp(status))
    except BaseException:
        os.close(fd)
        raise


def _stamp(status: os.stat_result) -> _Stamp:
    return _Stamp(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)


def _read_into(file: _File, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file.fd, [view[done:]], offset + done)
        except OSError as error:
            raise DumpError(
                f"{file.path}: cannot read at {offset + done:#x}: {error.strerror}"
            ) from error
        if count == 0:
            raise DumpChangedError(f"{file.path}: cut short at {offset + done:#x}")
        done += count


def _data(file: _File, low: int, high: int, base: int) -> Iterator[Region]:
    """Pages of `file` from `low` to `high` that are no holes (lseek(2)), moved up by `base`."""
    at = low
    while at < high:
        try:
            start = os.lseek(file.fd, at, os.SEEK_DATA)
            at = os.lseek(file.fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return
            raise DumpError(f"{file.path}: cannot read: {error.strerror}") from error
        start = max(low, start - start % PAGE_BYTES)
        at = min(high, at + -at % PAGE_BYTES)
        if start < at:
            yield Region(base + start, at - start)


def _merged(ranges: list[Region]) -> list[Region]:
    merged: list[Region] = []
    for region in sorted(ranges):
        if merged and merged[-1].end >= region.base:
            last = merged.pop()
            region = Region(last.base, max(last.end, region.end) - last.base)
        merged.append(region)
    return merged
