# SPDX-License-Identifier: GPL-2.0-or-later
"""An image's pages as the pixels of a picture: which page is where, and what is shown of it."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from mktme.dump.analysis import PAGE_LINES, page_entropy, written_lines
from mktme.dump.cluster import Source, read_pages
from mktme.dump.diff import LineDiff
from mktme.dump.image import DumpError, DumpImage
from mktme.engine.dram import Region
from mktme.engine.xts import PAGE_BYTES

MAX_SIDE: Final = 512
"""Pixels a side: what a screen shows, two beside each other."""

_POINT: Final = 1 << 20  # entropies are added up as integers
_COLUMNS: Final = 3

Index = npt.NDArray[np.int64]


class What(enum.Enum):
    """What a picture shows of pages."""

    ENTROPY = "entropy"
    KEYID = "keyid"
    WRITTEN = "written"
    DIFFERENCE = "difference"


class Order(enum.Enum):
    """How pages follow one another in a picture.

    HILBERT keeps neighbours together: a range of memory is a patch. ROW is easier to read an
    address off.
    """

    HILBERT = "hilbert"
    ROW = "row"


@dataclass(frozen=True, slots=True)
class View:
    """Which part of an image is shown, and at which addresses.

    Attributes:
        runs: image address, shown address and size, bytes, whole pages; ascending by the first.
        size_bytes: of what is shown: where its addresses end.
    """

    runs: tuple[tuple[int, int, int], ...]
    size_bytes: int

    @classmethod
    def whole(cls, image: DumpImage) -> Self:
        """All of an image."""
        size_bytes = -(-image.size_bytes // PAGE_BYTES) * PAGE_BYTES
        return cls(((0, 0, size_bytes),), size_bytes)

    @classmethod
    def vm(cls, image: DumpImage, name: str) -> Self:
        """A VM's memory, by guest-physical address.

        Raises:
            DumpError: there is no VM of the name, or it has no memory yet.
        """
        record = image.vm(name)
        if not record.segments:
            raise DumpError(
                f"{image.path}: VM {name!r} has no memory yet",
                hint="capture it when its guest has started",
            )
        runs = sorted(
            (record.base + one.ram_offset, one.guest_physical, one.size_bytes)
            for one in record.segments
        )
        return cls(tuple(runs), max(shown + size for _, shown, size in runs))

    def regions(self, data: Iterable[Region]) -> list[Region]:
        """The parts of an image's data that are shown."""
        return [
            Region(low, high - low)
            for one in data
            for base, _, size in self.runs
            if (low := max(one.base, base)) < (high := min(one.end, base + size))
        ]

    def shown(self, numbers: Index) -> Index:
        """Shown page numbers of pages that are, int64, both of shape (n,)."""
        bases = np.array([base // PAGE_BYTES for base, _, _ in self.runs], np.int64)
        shifts = np.array([(to - base) // PAGE_BYTES for base, to, _ in self.runs], np.int64)
        return numbers + shifts[np.searchsorted(bases, numbers, "right") - 1]

    def inner(self, shown: Index) -> Index:
        """The opposite: the image's page numbers of shown ones; -1 where nothing is."""
        found = np.full(len(shown), -1, np.int64)
        for base, to, size in self.runs:
            first, last = to // PAGE_BYTES, (to + size) // PAGE_BYTES
            inside = (shown >= first) & (shown < last)
            found[inside] = shown[inside] - first + base // PAGE_BYTES
        return found


@dataclass(frozen=True, slots=True)
class Layout:
    """Where pixels are.

    Attributes:
        pages: pages shown.
        pixel_pages: how many of them are one pixel, a power of two.
        side: pixels a row, a power of two.
    """

    order: Order
    pages: int
    pixel_pages: int
    side: int

    @classmethod
    def of(cls, view: View, order: Order) -> Self:
        """What shows all of a view in at most 512 by 512 pixels."""
        pages = view.size_bytes // PAGE_BYTES
        pixel_pages = 1
        while -(-pages // pixel_pages) > MAX_SIDE**2:
            pixel_pages *= 2
        side = 1
        while side * side * pixel_pages < pages:
            side *= 2
        return cls(order, pages, pixel_pages, side)

    @property
    def pixels(self) -> int:
        """How many pixels show pages."""
        return -(-self.pages // self.pixel_pages)

    def places(self) -> tuple[Index, Index]:
        """Row and column of each pixel, int64, shape (pixels,)."""
        index = np.arange(self.pixels, dtype=np.int64)
        if self.order is Order.ROW:
            return index // self.side, index % self.side
        return hilbert(self.side, index)

    def arrange(self, values: npt.NDArray[np.float64], fill: float) -> npt.NDArray[np.float64]:
        """A picture of values, shape (pixels,): shape (rows, columns), no row or column empty."""
        rows, columns = self.places()
        grid = np.full((int(rows.max()) + 1, int(columns.max()) + 1), fill)
        grid[rows, columns] = values
        return grid


def hilbert(side: int, index: Index) -> tuple[Index, Index]:
    """Rows and columns of the Hilbert curve (D. Hilbert, 1891) from upper left to upper right.

    Its quarters are upper left, lower left, lower right, upper right.

    Args:
        side: a power of two.
        index: steps along the curve, int64, shape (n,), less than side squared.

    Returns:
        int64, shape (n,), each.
    """
    row = np.zeros_like(index)
    column = np.zeros_like(index)
    rest = index.copy()
    size = 1
    while size < side:
        right = (rest // 2) & 1
        down = (rest ^ right) & 1
        # The first and the last quarter are turned.
        turned = down == 0
        flipped = turned & (right == 1)
        row[flipped] = size - 1 - row[flipped]
        column[flipped] = size - 1 - column[flipped]
        row[turned], column[turned] = column[turned], row[turned].copy()
        column += size * right
        row += size * down
        rest //= 4
        size *= 2
    return row, column


@dataclass(frozen=True, slots=True)
class PixelSums:
    """What is added up for pixels.

    Attributes:
        pixels: int64, shape (n,), ascending, each once: those that have anything.
        sums: int64, shape (n, 3): pages written; lines, written or compared; and what is shown:
            2^-20 bits of entropy, or lines that differ.
    """

    pixels: Index
    sums: Index

    @classmethod
    def of(cls, pixels: Index, sums: Index) -> Self:
        """Add up what is for the same pixel."""
        found, where = np.unique(pixels, return_inverse=True)
        total = np.zeros((len(found), _COLUMNS), np.int64)
        np.add.at(total, where, sums)
        return cls(found, total)


def merge_pixels(parts: Iterable[PixelSums]) -> PixelSums:
    """Add up."""
    found = list(parts)
    return PixelSums.of(
        np.concatenate([np.empty(0, np.int64), *(one.pixels for one in found)]),
        np.concatenate([np.empty((0, _COLUMNS), np.int64), *(one.sums for one in found)]),
    )


@dataclass(frozen=True, slots=True)
class PixelWork:
    """What is shown of an image's regions: a task for `fold`.

    Attributes:
        other: the image to compare with, for `What.DIFFERENCE`.
    """

    source: Source
    other: Source | None
    what: What
    view: View
    pixel_pages: int

    def __call__(self, regions: tuple[Region, ...], /) -> PixelSums:
        """Look at some of them."""
        if self.what is What.DIFFERENCE and self.other is not None:
            return self._differences(regions, self.other)
        found = []
        with self.source.open() as image:
            for pages, numbers in read_pages(image, regions):
                lines = written_lines(pages).sum(axis=1, dtype=np.int64)
                written = lines > 0
                pages, numbers, lines = pages[written], numbers[written], lines[written]
                shown = np.zeros(len(pages), np.int64)
                if self.what is What.ENTROPY and len(pages):
                    shown = np.rint(page_entropy(pages, lines)[0] * _POINT).astype(np.int64)
                found.append(self._sums(numbers, np.ones_like(lines), lines, shown))
        return merge_pixels(found)

    def _differences(self, regions: tuple[Region, ...], other: Source) -> PixelSums:
        found = []
        with self.source.open() as a, other.open() as b:
            for (pages_a, numbers), (pages_b, _) in zip(
                read_pages(a, regions), read_pages(b, regions), strict=True
            ):
                lines = LineDiff.of(pages_a, pages_b)
                either = (lines.in_a | lines.in_b).sum(axis=1, dtype=np.int64)
                differs = lines.differs.sum(axis=1, dtype=np.int64)
                written = np.asarray(either > 0, np.int64)
                found.append(self._sums(numbers, written, either, differs))
        return merge_pixels(found)

    def _sums(self, numbers: Index, pages: Index, lines: Index, shown: Index) -> PixelSums:
        pixels = self.view.shown(numbers) // self.pixel_pages
        return PixelSums.of(pixels, np.stack((pages, lines, shown), axis=1))


@dataclass(frozen=True, slots=True)
class Values:
    """What a picture shows, by pixel: each of shape (pixels,).

    Attributes:
        shown: float64; NaN where nothing was written. Entropy: bits per byte, the mean of the
            pixel's written pages. Written: the share of its lines, 0 to 1. Difference: the share
            of the lines written in either image that are not the same in both. KeyID: 1.
    """

    shown: npt.NDArray[np.float64]

    @classmethod
    def of(cls, what: What, found: PixelSums, layout: Layout) -> Self:
        """Of what was added up."""
        shown = np.full(layout.pixels, np.nan)
        pages, lines, value = (found.sums[:, at].astype(np.float64) for at in range(_COLUMNS))
        kept = pages > 0
        if what is What.ENTROPY:
            result = value / _POINT / np.maximum(pages, 1)
        elif what is What.DIFFERENCE:
            result = value / np.maximum(lines, 1)
        elif what is What.WRITTEN:
            in_pixel = np.minimum(
                layout.pixel_pages, layout.pages - found.pixels * layout.pixel_pages
            )
            result = lines / (in_pixel * PAGE_LINES)
        else:
            result = np.ones_like(pages)
        shown[found.pixels[kept]] = result[kept]
        return cls(shown)
