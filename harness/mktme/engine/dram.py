# SPDX-License-Identifier: GPL-2.0-or-later
"""The DRAM image, and the MACs beside it. `mktme.engine.sidecar` says how to read them.

The image is a sparse raw file: byte offset A is system physical address A, KeyID bits stripped.

A line whose 64 bytes are all zero was never written, and reads as 64 zero bytes whatever the
KeyID. (A line that was written is all zero with probability 2^-512, or when it holds zeros and
its KeyID does not encrypt.) So the file stays sparse, and a copy that is not sparse means the
same.

The MAC area is another such file, with an entry of 4 bytes for each line: what real hardware keeps
in the memory's spare bits. It stays empty as long as no KeyID has integrity.

Some of DRAM's addresses may be those of NVDIMMs (`mktme.engine.nvdimm`), each with an image of its
own: at these the file above is a hole.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, Self

from mktme.engine.errors import AddressError, DramError
from mktme.engine.integrity import ENTRY_BYTES
from mktme.engine.sparse_file import SparseFile
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES

REGION_ALIGN_BYTES: Final = 2 << 20

MAC_BYTES_OF: Final = LINE_BYTES // ENTRY_BYTES
"""Bytes of DRAM that a byte of the MAC area is for."""


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A range of DRAM, in bytes."""

    base: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size_bytes


class FileRange(NamedTuple):
    """Where a part of DRAM, or of its MACs, is.

    Attributes:
        file: its file.
        offset, size_bytes: where in that file.
        copy_offset: where it is in a file of all of DRAM, or of all MACs.
    """

    file: SparseFile
    offset: int
    size_bytes: int
    copy_offset: int
    is_macs: bool


class Dram:
    """An open DRAM image; `Dram.create` or `Dram.open` makes one. A context manager."""

    def __init__(self, image: SparseFile, macs: SparseFile, *, has_macs: bool) -> None:
        self._image = image
        self._macs = macs
        self._has_macs = has_macs
        self._regions: list[Region] = []  # ascending
        self._modules: dict[Region, Dram] = {}  # what has an image of its own
        self.before_write: Callable[[int, int], None] | None = None
        """Called with address and size, in bytes, of what is about to be written (or its MACs),
        erased, or kept elsewhere; it raises nothing (`mktme.engine.snapshot`)."""

    @classmethod
    def create(cls, path: Path, size_bytes: int, *, overwrite: bool = False) -> Self:
        """Make an image of never-written lines, accessible to its owner only.

        Args:
            path: where; the MACs are in `mac_path` of it.
            size_bytes: a multiple of 4096.
            overwrite: whether files that exist may be replaced.

        Raises:
            ValueError: the size is not a positive multiple of 4096.
            DramError: a file exists, is another engine's DRAM, or cannot be made.
        """
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ValueError(f"the DRAM size must be whole 4 KiB pages, not {size_bytes} bytes")
        image = SparseFile.create(path, size_bytes, overwrite=overwrite)
        try:
            macs = SparseFile.create(
                mac_path(path),
                size_bytes // MAC_BYTES_OF,
                overwrite=overwrite,
                stands_for=MAC_BYTES_OF,
            )
        except BaseException:
            image.close()
            os.unlink(path)
            raise
        return cls(image, macs, has_macs=False)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = True, has_macs: bool = True) -> Self:
        """Open an image that exists.

        It knows of no regions: `allocate` is for the process that created the image.

        Args:
            path: the image; the MACs are in `mac_path` of it.
            read_only: False to write to it too, which only one process at a time can.
            has_macs: False if it is known that no line has a MAC.

        Raises:
            DramError: a file cannot be opened, is no regular file or has no fitting size, or
                another process writes it.
        """
        image = SparseFile.open(path, read_only=read_only)
        macs = None
        try:
            if image.size_bytes == 0 or image.size_bytes % PAGE_BYTES:
                raise DramError(
                    f"{path}: no DRAM image: {image.size_bytes} bytes are not whole pages"
                )
            macs = SparseFile.open(mac_path(path), read_only=read_only, stands_for=MAC_BYTES_OF)
            if macs.size_bytes * MAC_BYTES_OF != image.size_bytes:
                raise DramError(
                    f"{macs.path}: {macs.size_bytes} bytes are not the MACs of"
                    f" {image.size_bytes} bytes of DRAM"
                )
        except BaseException:
            image.close()
            if macs is not None:
                macs.close()
            raise
        return cls(image, macs, has_macs=has_macs)

    @property
    def path(self) -> Path:
        """The image file."""
        return self._image.path

    @property
    def size_bytes(self) -> int:
        """Bytes of DRAM."""
        return self._image.size_bytes

    @property
    def has_macs(self) -> bool:
        """Whether any entry of the MAC area may be other than 0."""
        return self._has_macs or any(module.has_macs for module in self._modules.values())

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
        for module, offset, part in self._parts(address, len(view)):
            module._image.read_into(offset, view[part])

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
        if self.before_write is not None:
            self.before_write(address, len(view))
        for module, offset, part in self._parts(address, len(view)):
            module._image.write(offset, view[part])

    def read_macs_into(self, address: int, entries: bytearray | memoryview) -> None:
        """Fill a buffer with lines' entries of the MAC area.

        Args:
            address: of the first line.
            entries: 4 bytes a line; C-contiguous, writable, of any item type.

        Raises:
            AddressError: the lines are not all in DRAM.
            DramError: the file cannot be read, or was cut short.
        """
        view = memoryview(entries).cast("B")
        size_bytes = len(view) * MAC_BYTES_OF
        self.check_range(address, size_bytes)
        for module, offset, part in self._parts(address, size_bytes):
            module._macs.read_into(offset // MAC_BYTES_OF, view[_of_macs(part)])

    def write_macs(self, address: int, entries: bytes | bytearray | memoryview) -> None:
        """Write lines' entries of the MAC area.

        Args:
            address: of the first line.
            entries: 4 bytes a line; C-contiguous, of any item type.

        Raises:
            AddressError: the lines are not all in DRAM.
            DramFullError: there is no space; ``address`` is in the first line whose entry was not
                written.
            DramError: the file cannot be written.
        """
        view = memoryview(entries).cast("B")
        size_bytes = len(view) * MAC_BYTES_OF
        self.check_range(address, size_bytes)
        if self.before_write is not None:
            self.before_write(address, size_bytes)
        for module, offset, part in self._parts(address, size_bytes):
            module._has_macs = True
            module._macs.write(offset // MAC_BYTES_OF, view[_of_macs(part)])

    def allocate(self, size_bytes: int, base: int | None = None) -> Region:
        """Set aside a range of DRAM, aligned to 2 MiB: the first that is free.

        Its lines are never-written ones, whatever was there before.

        Args:
            size_bytes: whole 4 KiB pages.
            base: where it has to be, a multiple of 4096; None for anywhere.

        Raises:
            ValueError: the size is not a positive multiple of 4096, or the base none of 4096.
            AddressError: no free range is that large, or that one is not free.
            DramError: what was there cannot be erased.
        """
        region = self.find_free(size_bytes, base)
        self.erase(region)
        bisect.insort(self._regions, region)
        return region

    def find_free(self, size_bytes: int, base: int | None = None) -> Region:
        """What `allocate` would set aside; arguments and errors are its."""
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ValueError(f"a region is whole 4 KiB pages, not {size_bytes} bytes")
        if base is None:
            return self._first_free(size_bytes)
        region = Region(base, size_bytes)
        self._check_free(region)
        return region

    def _first_free(self, size_bytes: int) -> Region:
        base = 0
        for taken in self._regions:
            if base + size_bytes <= taken.base:
                break
            base = -(-taken.end // REGION_ALIGN_BYTES) * REGION_ALIGN_BYTES
        if base + size_bytes > self.size_bytes:
            raise AddressError(
                f"no free {size_bytes} bytes in {self.size_bytes} bytes of DRAM",
                address=base,
                hint="make DRAM larger, or remove a VM",
            )
        return Region(base, size_bytes)

    def _check_free(self, region: Region) -> None:
        if region.base % PAGE_BYTES:
            raise ValueError(f"a region starts at a 4 KiB page, not at {region.base:#x}")
        self.check_range(region.base, region.size_bytes)
        for taken in self._regions:
            if taken.base < region.end and region.base < taken.end:
                raise AddressError(
                    f"{region.base:#x} to {region.end - 1:#x} of DRAM is not free",
                    address=max(taken.base, region.base),
                    hint="remove the VM that is there",
                )

    def attach(self, base: int, module: Dram) -> None:
        """Have a range of addresses kept in another image, from its first byte on.

        Args:
            base: page-aligned; the range is part of an allocated region.
            module: what keeps it; it stays the caller's to close, after `detach`.

        Raises:
            AddressError: the range is not all in DRAM, or another module has some of it.
        """
        region = Region(base, module.size_bytes)
        self.check_range(base, module.size_bytes)
        for taken in self._modules:
            if taken.base < region.end and region.base < taken.end:
                raise AddressError(f"{taken.base:#x} of DRAM has a module already", address=base)
        if self.before_write is not None:
            self.before_write(base, module.size_bytes)
        module._image.base = module._macs.base = base
        self._modules[region] = module

    def detach(self, module: Dram) -> None:
        """Take a module out again, if it is there; at its addresses is this image again."""
        for region, one in self._modules.items():
            if one is module and self.before_write is not None:
                self.before_write(region.base, region.size_bytes)
        self._modules = {at: one for at, one in self._modules.items() if one is not module}

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
        if address < 0 or size_bytes < 0 or address + size_bytes > self.size_bytes:
            raise AddressError(
                f"{size_bytes} bytes at {address:#x} are not in DRAM "
                f"(0 to {self.size_bytes - 1:#x})",
                address=address,
            )

    def close(self) -> None:
        """Close the image and its MACs; they stay on disk. Closing again does nothing."""
        self._image.close()
        self._macs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Dram {self.path}, {self.size_bytes} bytes>"

    def erase(self, region: Region) -> None:
        """Make a range's lines never-written ones: holes, unless they are.

        Raises:
            DramError: the file system cannot do that.
        """
        if self.before_write is not None:
            self.before_write(region.base, region.size_bytes)
        for module, offset, part in self._parts(region.base, region.size_bytes):
            size_bytes = part.stop - part.start
            module._image.erase(offset, size_bytes)
            module._macs.erase(offset // MAC_BYTES_OF, size_bytes // MAC_BYTES_OF)

    def data_ranges(self, region: Region) -> Iterator[Region]:
        """Pages of a region that may hold other than zeros, or have MACs; some may come twice.

        Raises:
            DramError: a file system cannot say.
        """
        for file in self.files(region):
            scale = MAC_BYTES_OF if file.is_macs else 1
            for start, stop in file.file.data(file.offset, file.size_bytes):
                low = (file.copy_offset + start - file.offset) * scale
                high = (file.copy_offset + stop - file.offset) * scale
                low = max(region.base, low - low % PAGE_BYTES)
                high = min(region.end, high + -high % PAGE_BYTES)
                yield Region(low, high - low)

    def files(self, region: Region) -> Iterator[FileRange]:
        """Where a region, whole pages, is kept, and where its MACs are if there are any."""
        for module, offset, part in self._parts(region.base, region.size_bytes):
            size_bytes, at = part.stop - part.start, region.base + part.start
            yield FileRange(module._image, offset, size_bytes, at, is_macs=False)
            if self.has_macs:
                yield FileRange(
                    module._macs,
                    offset // MAC_BYTES_OF,
                    size_bytes // MAC_BYTES_OF,
                    at // MAC_BYTES_OF,
                    is_macs=True,
                )

    def _parts(self, address: int, size_bytes: int) -> Iterator[tuple[Dram, int, slice]]:
        """Which image a range is in, where in it, and which bytes of the range these are."""
        if not self._modules:
            yield self, address, slice(0, size_bytes)
            return
        end = address + size_bytes
        edges = {edge for region in self._modules for edge in (region.base, region.end)}
        inner = [edge for edge in edges if address < edge < end]
        for start, stop in pairwise(sorted((address, *inner, end))):
            part = slice(start - address, stop - address)
            for region, module in self._modules.items():
                if region.base <= start < region.end:
                    yield module, start - region.base, part
                    break
            else:
                yield self, start, part


def _of_macs(part: slice) -> slice:
    """The bytes of entries that are for a part's bytes of DRAM."""
    return slice(part.start // MAC_BYTES_OF, part.stop // MAC_BYTES_OF)


def mac_path(image: Path) -> Path:
    """Where the MACs of an image are: ``<image>.mac``."""
    return image.with_name(f"{image.name}.mac")
