# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump stats`: does an image look like ciphertext, KeyID by KeyID?

A KeyID looks encrypted if its written bytes cannot be told from random ones by the tests below,
each of which has a threshold that the report states; it is structured if one of them can. Random
plaintext passes, of course: the tests show what does not leak, not that there is a key.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from mktme.dump.analysis import (
    BLOCK_BYTES,
    PAGE_DEVIATIONS,
    Sampling,
    Tally,
    structured_below,
    tally_pages,
)
from mktme.dump.cluster import HERE, Progress, Source, Workers, fold, read_pages, whole_pages
from mktme.dump.image import DumpImage
from mktme.dump.randomness import (
    SYMBOLS,
    chi_square,
    chi_square_p,
    entropy,
    entropy_of_random,
)
from mktme.dump.sketch import Sketch
from mktme.dump.strings import MIN_ASCII, MIN_UTF16, String
from mktme.dump.zones import EXCLUDED, Zones, zone_key
from mktme.engine.dram import Region
from mktme.engine.keys import KeyMode
from mktme.engine.text import spelled
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES, Algorithm

P_LIMIT: Final = 1e-6
"""What is less likely than this, in any of an image's written KeyIDs, is no chance: chi-square to
either side and the longest strings. Each KeyID has its part of it."""
COMPRESSION_LIMIT: Final = 1.0
"""zlib makes noise larger, by its frame of 9 to 11 bytes a page; never smaller."""
MIN_LINES: Final = 20
"""Chi-square wants 5 bytes of each value: 1280 bytes."""

_PRINTABLE: Final = 95 / 256


class Verdict(enum.Enum):
    """What the written memory of a KeyID looks like."""

    ENCRYPTED = "looks encrypted"
    STRUCTURED = "structured"
    LITTLE = "too little to tell"
    EMPTY = "never written"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What makes memory structured, beside a value that repeats.

    Attributes:
        page_deviations: a page whose entropy is that many deviations below a random page's mean.
        whole_page_entropy: what that is for a page of 64 written lines, bits per byte.
        p_value: chi-square less likely than this, too large or too small; or strings as long as
            the longest, of which random bytes have fewer than this: 10^-6 over the number of KeyIDs
            that are written under.
        compression: zlib's output by its input: less than this.
        min_lines: with fewer written lines nothing is said of chi-square, and none look encrypted.
    """

    page_deviations: float
    whole_page_entropy: float
    p_value: float
    compression: float
    min_lines: int


@dataclass(frozen=True, slots=True)
class Repeats:
    """Blocks or lines that come more than once, at whatever address.

    Attributes:
        size_bytes: 16 for blocks, 64 for lines.
        one_in: 1: all were counted; n: those whose first 8 bytes are among one in n, wherever they
            are, and all of one page in n.
        counted: how many were.
        repeated: how many of them are equal to another one of them.
        most: how often the most frequent one came.
    """

    size_bytes: int
    one_in: int
    counted: int
    repeated: int
    most: int


@dataclass(frozen=True, slots=True)
class Compression:
    """What zlib (level 1) made of the written lines of some pages, each on its own.

    Attributes:
        one_in: 1: all written pages; n: one in n.
        ratio: bytes after by bytes before; None, nothing was compressed. 1.00 is as good as random.
    """

    one_in: int
    pages: int
    bytes_before: int
    bytes_after: int
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Strings:
    """Printable strings (20H to 7EH) that do not leave their page.

    Attributes:
        min_chars: the shortest that count.
        by_chance: how many of them random bytes in their place would have, on average.
        longest: the first few.
    """

    encoding: Literal["ascii", "utf-16le"]
    min_chars: int
    found: int
    by_chance: float
    longest: tuple[String, ...]


@dataclass(frozen=True, slots=True)
class ZoneStats:
    """The memory of one KeyID.

    Attributes:
        excluded: whether it is what the platform excludes from KeyID 0's encryption.
        mode: how it is programmed; None: nothing is known.
        algorithm: None: plaintext, or nothing is known.
        vms: names of those whose KeyID it is.
        pages: all of its pages.
        pages_written: those that have a written line.
        lines_written: lines that are not all zero; what follows is about these.
        entropy: of all their bytes, bits per byte.
        entropy_of_random: what as many random bytes have.
        page_entropy: the mean of its pages'.
        page_entropy_of_random: what whole random pages have.
        pages_structured: pages whose entropy is too small to be random.
        first_structured: address of the first of them.
        chi_square: of their bytes, with 255 degrees of freedom; None, without bytes.
        p_value: how likely random bytes have that or more.
        byte_histogram: 256 counts.
        page_histogram: pages by entropy: 128 counts, 1/16 bit per byte each.
        reasons: why it is structured, one line each.
    """

    keyid: int
    excluded: bool
    mode: KeyMode | None
    algorithm: Algorithm | None
    vms: tuple[str, ...]
    pages: int
    pages_written: int
    lines_written: int
    entropy: float
    entropy_of_random: float
    page_entropy: float
    page_entropy_of_random: float
    pages_structured: int
    first_structured: int | None
    chi_square: float | None
    p_value: float | None
    blocks: Repeats
    lines: Repeats
    compression: Compression
    strings: tuple[Strings, ...]
    byte_histogram: tuple[int, ...]
    page_histogram: tuple[int, ...]
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it does not look like plaintext though it has an algorithm."""
        return self.algorithm is None or self.verdict is not Verdict.STRUCTURED


@dataclass(frozen=True, slots=True)
class StatsReport:
    """The document of `mktme dump stats`.

    Attributes:
        image: path of the image.
        described: whether a sidecar says which KeyID a page has; without one, all are KeyID 0's.
        pages: all pages, holes as well.
        blocks, lines: what repeats in the image as a whole, across KeyIDs as well.
        passed: whether all that is to be encrypted looks so.
    """

    schema: Literal["mktme.dump-stats"]
    version: Literal[1]
    image: str
    described: bool
    size_bytes: int
    pages: int
    pages_written: int
    lines_written: int
    thresholds: Thresholds
    blocks: Repeats
    lines: Repeats
    keyids: tuple[ZoneStats, ...]
    passed: bool


def dump_stats(
    source: Source, workers: Workers = HERE, progress: Progress | None = None
) -> StatsReport:
    """Look at all of an image.

    Args:
        source: the image.
        workers: who does it.
        progress: told of tasks done and of all there are.

    Raises:
        DumpError: the image cannot be read, or the scheduler not be reached.
        DumpChangedError: the image was written meanwhile.
    """
    with source.open() as image:
        regions = whole_pages(image, image.data_ranges())
        sampling = Sampling.for_data(sum(one.size_bytes for one in regions))
        work = StatsWork(source.absolute(), sampling)
        tallies = fold(regions, work, merge_tallies, workers, progress)
        image.check_unchanged()
        return _report(image, tallies, sampling)


@dataclass(frozen=True, slots=True)
class StatsWork:
    """Tallies of an image's regions by zone: a task for `fold`."""

    source: Source
    sampling: Sampling

    def __call__(self, regions: tuple[Region, ...], /) -> dict[int, Tally]:
        """Look at some of it."""
        found: list[dict[int, Tally]] = []
        with self.source.open() as image:
            zones = Zones(image)
            for pages, numbers in read_pages(image, regions):
                owners = zones.of(numbers)
                if (owners == owners[0]).all():
                    tally = tally_pages(pages, numbers, self.sampling)
                    found.append({int(owners[0]): tally})
                    continue
                for zone in sorted(set(owners.tolist())):
                    own = owners == zone
                    tally = tally_pages(pages[own], numbers[own], self.sampling)
                    found.append({zone: tally})
        return merge_tallies(found)


def merge_tallies(parts: Iterable[dict[int, Tally]]) -> dict[int, Tally]:
    """Add up tallies by zone."""
    found: dict[int, list[Tally]] = {}
    for part in parts:
        for zone, tally in part.items():
            found.setdefault(zone, []).append(tally)
    return {zone: Tally.merged(tallies) for zone, tallies in sorted(found.items())}


def _report(image: DumpImage, tallies: dict[int, Tally], sampling: Sampling) -> StatsReport:
    thresholds = Thresholds(
        page_deviations=PAGE_DEVIATIONS,
        whole_page_entropy=float(structured_below()[-1]),
        p_value=P_LIMIT / max(1, sum(one.lines > 0 for one in tallies.values())),
        compression=COMPRESSION_LIMIT,
        min_lines=MIN_LINES,
    )
    keyids = tuple(
        _zone(image, zone, pages, tallies.get(zone, Tally.merged(())), sampling, thresholds)
        for zone, pages in Zones(image).sizes().items()
    )
    blocks = Sketch.merged(one.blocks for one in tallies.values())
    lines = Sketch.merged(one.line_values for one in tallies.values())
    return StatsReport(
        schema="mktme.dump-stats",
        version=1,
        image=spelled(image.path),
        described=image.sidecar is not None,
        size_bytes=image.size_bytes,
        pages=-(-image.size_bytes // PAGE_BYTES),
        pages_written=sum(one.pages for one in tallies.values()),
        lines_written=sum(one.lines for one in tallies.values()),
        thresholds=thresholds,
        blocks=_repeats(blocks, BLOCK_BYTES, sampling.shift),
        lines=_repeats(lines, LINE_BYTES, sampling.shift),
        keyids=keyids,
        passed=all(one.passed for one in keyids),
    )


def _zone(
    image: DumpImage,
    zone: int,
    pages: int,
    tally: Tally,
    sampling: Sampling,
    limits: Thresholds,
) -> ZoneStats:
    size = tally.lines * LINE_BYTES
    key = zone_key(image, zone)
    keyid = 0 if zone == EXCLUDED else zone
    vms = () if image.sidecar is None else image.sidecar.vms
    chi = chi_square(tally.histogram.tolist()) if size else None
    p_value = None if chi is None else chi_square_p(chi)
    blocks = _repeats(tally.blocks, BLOCK_BYTES, sampling.shift)
    lines = _repeats(tally.line_values, LINE_BYTES, sampling.shift)
    ratio = tally.compressed_to / tally.compressed_from if tally.compressed_from else None
    reasons = _reasons(tally, p_value, ratio, blocks, lines, limits)
    return ZoneStats(
        keyid=keyid,
        excluded=zone == EXCLUDED,
        mode=None if key is None else key.mode,
        algorithm=None if key is None else key.algorithm,
        vms=tuple(one.name for one in vms if one.keyid == zone),
        pages=pages,
        pages_written=tally.pages,
        lines_written=tally.lines,
        entropy=entropy(tally.histogram.tolist()),
        entropy_of_random=entropy_of_random(size).mean if size else 0.0,
        page_entropy=tally.page_entropy,
        page_entropy_of_random=entropy_of_random(PAGE_BYTES).mean,
        pages_structured=tally.structured,
        first_structured=(
            None if tally.first_structured is None else tally.first_structured * PAGE_BYTES
        ),
        chi_square=chi,
        p_value=p_value,
        blocks=blocks,
        lines=lines,
        compression=Compression(
            one_in=1 << sampling.page_shift,
            pages=tally.compressed_pages,
            bytes_before=tally.compressed_from,
            bytes_after=tally.compressed_to,
            ratio=ratio,
        ),
        strings=_strings(tally),
        byte_histogram=tuple(tally.histogram.tolist()),
        page_histogram=tuple(tally.entropies.tolist()),
        verdict=_verdict(tally, reasons),
        reasons=reasons,
    )


def _verdict(tally: Tally, reasons: tuple[str, ...]) -> Verdict:
    if tally.lines == 0:
        return Verdict.EMPTY
    if reasons:
        return Verdict.STRUCTURED
    return Verdict.LITTLE if tally.lines < MIN_LINES else Verdict.ENCRYPTED


def _reasons(
    tally: Tally,
    p_value: float | None,
    ratio: float | None,
    blocks: Repeats,
    lines: Repeats,
    limits: Thresholds,
) -> tuple[str, ...]:
    found: list[str] = []
    limit = limits.p_value
    if tally.first_structured is not None:
        found.append(
            f"{tally.structured:,} of {tally.pages:,} pages have too little entropy, the first at"
            f" {tally.first_structured * PAGE_BYTES:#x}"
        )
    if p_value is not None and tally.lines >= limits.min_lines:
        if p_value < limit:
            found.append(f"bytes not equally frequent: p < {short(limit)}")
        elif p_value > 1 - limit:
            found.append(f"bytes more equally frequent than by chance: p > 1 - {short(limit)}")
    for what, one in (("16-byte blocks", blocks), ("lines", lines)):
        if one.repeated:
            found.append(f"{one.repeated:,} of {one.counted:,} {what} come more than once")
    if ratio is not None and ratio < limits.compression:
        found.append(f"zlib makes it smaller: {ratio:.1%}")
    for encoding, strings, width, share in (
        ("ASCII", tally.ascii, 1, _PRINTABLE),
        ("UTF-16LE", tally.utf16, 2, _PRINTABLE / SYMBOLS),
    ):
        for longest in strings.longest[:1]:
            chars = tally.lines * LINE_BYTES // width
            if _by_chance(chars, tally.pages, longest.chars, share) < limit:
                found.append(
                    f"{longest.chars:,} printable characters of {encoding} in a row, at"
                    f" {longest.address:#x}: no chance"
                )
    return tuple(found)


def short(p_value: float) -> str:
    """A small probability in few characters: 1e-6, and not 1e-06."""
    return f"{p_value:.0e}".replace("e-0", "e-")


def _repeats(sketch: Sketch, size_bytes: int, shift: int) -> Repeats:
    return Repeats(
        size_bytes=size_bytes,
        one_in=1 << shift,
        counted=sketch.counted,
        repeated=sketch.repeated,
        most=sketch.most,
    )


def _strings(tally: Tally) -> tuple[Strings, ...]:
    size = tally.lines * LINE_BYTES
    ascii_chance = _by_chance(size, tally.pages, MIN_ASCII, _PRINTABLE)
    utf16_chance = _by_chance(size // 2, tally.pages, MIN_UTF16, _PRINTABLE / SYMBOLS)
    return (
        Strings("ascii", MIN_ASCII, tally.ascii.count, ascii_chance, tally.ascii.longest),
        Strings("utf-16le", MIN_UTF16, tally.utf16.count, utf16_chance, tally.utf16.longest),
    )


def _by_chance(chars: int, pages: int, least: int, share: float) -> float:
    """How many strings random characters have, `share` of which are printable.

    A string begins where its page does, or where another character comes before it.
    """
    starts = pages + (1 - share) * (chars - least * pages)
    return max(0.0, starts) * share**least
