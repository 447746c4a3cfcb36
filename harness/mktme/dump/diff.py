# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump diff`: what two images of the same memory, taken at different times, tell.

AES-XTS is a function of key, address and plaintext, and of nothing else: a line that holds what it
held before has the ciphertext that it had before, and of a line that changed those 16-byte blocks
alone differ whose plaintext does. Who sees DRAM twice sees where it was written and when it is as
it was; there is no freshness (SP 800-38E has none to offer, and TME stores none).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt

from mktme.dump.analysis import BLOCK_BYTES, LINE_BLOCKS, PAGE_LINES, written_lines
from mktme.dump.cluster import HERE, Progress, Source, Workers, fold, read_pages, whole_pages
from mktme.dump.image import DumpError, DumpImage
from mktme.dump.zones import EXCLUDED, Zones
from mktme.engine.dram import Region
from mktme.engine.text import spelled
from mktme.engine.xts import PAGE_BYTES

_BLOCK_BITS: Final = BLOCK_BYTES * 8

Flags = npt.NDArray[np.bool_]
Pages = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Change:
    """Pages, or lines, by what became of them from A to B.

    Attributes:
        equal: written in both, and the same.
        changed: written in both, and not the same.
        only_a: written in A alone: erased since.
        only_b: written in B alone: new.
    """

    equal: int
    changed: int
    only_a: int
    only_b: int


@dataclass(frozen=True, slots=True)
class Return:
    """Lines that changed from A to B, and what a third image, C, has in their place.

    Attributes:
        back: what A had.
        kept: what B has.
        neither: something else.
    """

    back: int
    kept: int
    neither: int


@dataclass(frozen=True, slots=True)
class ZoneDiff:
    """Pages that had one KeyID in A and one, the same or another, in B.

    Attributes:
        excluded_a, excluded_b: whether it is what the platform excludes from KeyID 0's encryption.
        blocks_changed: changed lines by how many of their 16-byte blocks differ: 1, 2, 3, 4.
        bits_changed: the share of bits that differ in the blocks that do, 0 to 1; one half where
            both are ciphertext. None, no block does.
        returned: None without a third image.
    """

    keyid_a: int
    excluded_a: bool
    keyid_b: int
    excluded_b: bool
    pages: Change
    lines: Change
    blocks_changed: tuple[int, int, int, int]
    bits_changed: float | None
    returned: Return | None


@dataclass(frozen=True, slots=True)
class DiffReport:
    """The document of `mktme dump diff`.

    Attributes:
        image_a: path of the earlier image.
        image_b: of the later one.
        image_c: of one that is later still, or None.
        pages: of each image, holes as well; those written in neither are all that is in none of
            `keyids`.
        keyids: by the pages' KeyIDs in A and B.
    """

    schema: Literal["mktme.dump-diff"]
    version: Literal[1]
    image_a: str
    image_b: str
    image_c: str | None
    size_bytes: int
    pages: int
    keyids: tuple[ZoneDiff, ...]


@dataclass(frozen=True, slots=True)
class LineDiff:
    """Two images' lines against each other: bool, shape (n, 64), each.

    Attributes:
        in_a: written in A.
        in_b: written in B.
        differs: not the same in both.
    """

    in_a: Flags
    in_b: Flags
    differs: Flags

    @classmethod
    def of(cls, a: Pages, b: Pages) -> Self:
        """Compare pages: uint8, shape (n, 4096), each."""
        return cls(written_lines(a), written_lines(b), written_lines(a ^ b))

    @property
    def flags(self) -> tuple[Flags, Flags, Flags]:
        """All three."""
        return self.in_a, self.in_b, self.differs

    @property
    def changed(self) -> Flags:
        """Written in both, and not the same."""
        return self.in_a & self.in_b & self.differs


@dataclass(frozen=True, slots=True)
class _Tally:
    """Whole numbers, added up: int64.

    Attributes:
        pages, lines: shape (4,), as `Change`.
        blocks: shape (5,), lines by blocks that differ.
        bits: that differ.
        returned: shape (3,), as `Return`.
    """

    pages: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64]
    bits: int
    returned: npt.NDArray[np.int64]


_Tallies = dict[tuple[int, int], _Tally]


def dump_diff(
    a: Source,
    b: Source,
    c: Source | None = None,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare two images, or three.

    Args:
        a: the earlier image.
        b: the later one.
        c: one that is later still: which changed lines are again as they were?
        workers: who does it.
        progress: told of tasks done and of all there are.

    Raises:
        DumpError: an image cannot be read, or they are not of the same size.
        DumpChangedError: one was written meanwhile.
    """
    with a.open() as image_a, b.open() as image_b, (c or b).open() as image_c:
        for other in (image_b, image_c):
            check_same_size(image_a, other)
        regions = whole_pages(image_a, [*image_a.data_ranges(), *image_b.data_ranges()])
        work = _DiffWork(a.absolute(), b.absolute(), None if c is None else c.absolute())
        tallies = fold(regions, work, _merge, workers, progress)
        for image in (image_a, image_b, image_c):
            image.check_unchanged()
        return DiffReport(
            schema="mktme.dump-diff",
            version=1,
            image_a=spelled(image_a.path),
            image_b=spelled(image_b.path),
            image_c=None if c is None else spelled(image_c.path),
            size_bytes=image_a.size_bytes,
            pages=-(-image_a.size_bytes // PAGE_BYTES),
            keyids=tuple(
                _zone(zones, tally, has_c=c is not None) for zones, tally in tallies.items()
            ),
        )


def check_same_size(a: DumpImage, b: DumpImage) -> None:
    """Raise DumpError unless images can be laid upon each other."""
    if a.size_bytes != b.size_bytes:
        raise DumpError(
            f"{a.path} has {a.size_bytes} bytes, {b.path} {b.size_bytes}: not the same memory",
            hint="compare images of one platform",
        )


@dataclass(frozen=True, slots=True)
class _DiffWork:
    a: Source
    b: Source
    c: Source | None

    def __call__(self, regions: tuple[Region, ...], /) -> _Tallies:
        found: list[_Tallies] = []
        with self.a.open() as a, self.b.open() as b, (self.c or self.b).open() as c:
            zones_a, zones_b = Zones(a), Zones(b)
            readers = [read_pages(image, regions) for image in (a, b)]
            third = read_pages(c, regions) if self.c is not None else None
            for (pages_a, numbers), (pages_b, _) in zip(*readers, strict=True):
                pages_c = None if third is None else next(third)[0]
                zones = np.stack((zones_a.of(numbers), zones_b.of(numbers)), axis=1)
                for pair in sorted({(int(one), int(two)) for one, two in zones.tolist()}):
                    own = (zones == pair).all(axis=1)
                    tally = _compare(
                        pages_a[own], pages_b[own], None if pages_c is None else pages_c[own]
                    )
                    found.append({pair: tally})
        return _merge(found)


def _compare(a: Pages, b: Pages, c: Pages | None) -> _Tally:
    lines = LineDiff.of(a, b)
    changed = lines.changed
    xor = (_lines(a)[changed] ^ _lines(b)[changed]).reshape(-1, LINE_BLOCKS, 2)
    blocks = (xor != 0).any(axis=2).sum(axis=1)
    returned = np.zeros(3, np.int64)
    if c is not None:
        now = _lines(c)[changed]
        back = (now == _lines(a)[changed]).all(axis=1)
        kept = (now == _lines(b)[changed]).all(axis=1)
        returned[:] = back.sum(), kept.sum(), len(now) - back.sum() - kept.sum()
    return _Tally(
        pages=_change(*(np.asarray(one.any(axis=1)) for one in lines.flags)),
        lines=_change(*lines.flags),
        blocks=np.bincount(blocks, minlength=LINE_BLOCKS + 1),
        bits=int(np.bitwise_count(xor).sum(dtype=np.int64)),
        returned=returned,
    )


def _change(in_a: Flags, in_b: Flags, differs: Flags) -> npt.NDArray[np.int64]:
    both = in_a & in_b
    kinds = both & ~differs, both & differs, in_a & ~in_b, in_b & ~in_a
    return np.array([kind.sum() for kind in kinds], np.int64)


def _merge(parts: Iterable[_Tallies]) -> _Tallies:
    found: _Tallies = {}
    for part in parts:
        for zones, one in part.items():
            sum_ = found.get(zones)
            if sum_ is not None:
                one = _Tally(
                    sum_.pages + one.pages,
                    sum_.lines + one.lines,
                    sum_.blocks + one.blocks,
                    sum_.bits + one.bits,
                    sum_.returned + one.returned,
                )
            found[zones] = one
    return dict(sorted(found.items()))


def _zone(zones: tuple[int, int], tally: _Tally, *, has_c: bool) -> ZoneDiff:
    one, two, three, four = tally.blocks[1:].tolist()
    blocks = one + 2 * two + 3 * three + 4 * four
    a, b = zones
    return ZoneDiff(
        keyid_a=0 if a == EXCLUDED else a,
        excluded_a=a == EXCLUDED,
        keyid_b=0 if b == EXCLUDED else b,
        excluded_b=b == EXCLUDED,
        pages=Change(*tally.pages.tolist()),
        lines=Change(*tally.lines.tolist()),
        blocks_changed=(one, two, three, four),
        bits_changed=tally.bits / (blocks * _BLOCK_BITS) if blocks else None,
        returned=Return(*tally.returned.tolist()) if has_c else None,
    )


def _lines(pages: Pages) -> npt.NDArray[np.uint64]:
    return pages.view(np.uint64).reshape(len(pages), PAGE_LINES, -1)
