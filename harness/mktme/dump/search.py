# SPDX-License-Identifier: GPL-2.0-or-later
"""Search of an image: text, bytes, regular expressions and AES key schedules.

Everything is found at every byte address, across the borders of the pieces that threads work on.
Holes of the image read as zeros: what is found may reach into them, but they are not searched
themselves.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from mktme.dump.aes_keys import Form, xts_partners
from mktme.dump.image import CHUNK_BYTES, DumpImage
from mktme.dump.patterns import Match, Searcher, Window
from mktme.engine.sidecar import Sidecar
from mktme.engine.text import spelled

DEFAULT_LIMIT: Final = 100

# What assertions (^, $, \b) and key schedules need to see before what is searched.
_CONTEXT_BYTES: Final = 64
_PER_TASK_HITS: Final = 4096
"""No more than this (or the limit) is counted in a piece: each hit is a call into Python."""


@dataclass(frozen=True, slots=True)
class FoundKey:
    """An AES key schedule, as reported.

    Attributes:
        bits: of the key.
        form: what its round keys are for.
        swapped: whether the bytes of its words are reversed.
        errors: bits of it that are wrong.
        xts_partner: address of a schedule beside it that is likely to be the other of an XTS key.
        key: the key in hexadecimal; None unless it was asked for.
    """

    bits: int
    form: Form
    swapped: bool
    errors: int
    xts_partner: int | None
    key: str | None


@dataclass(frozen=True, slots=True)
class Hit:
    """One place where something was found.

    Attributes:
        pattern: what.
        address: in DRAM, or the offset in a raw file.
        size_bytes: how much of it matches.
        keyid: of its page; None without a sidecar.
        vm, guest_physical: whose it is, and where the guest has it.
        excerpt: its first bytes, in hexadecimal, up to `EXCERPT_BYTES`; None for a key.
        key: a key schedule.
    """

    pattern: str
    address: int
    size_bytes: int
    keyid: int | None
    vm: str | None
    guest_physical: int | None
    excerpt: str | None
    key: FoundKey | None


@dataclass(frozen=True, slots=True)
class SearchReport:
    """The document of `mktme dump search`.

    Attributes:
        image: the file.
        searched_bytes: how much of it is no hole.
        patterns: what was looked for.
        hits: by address, as many as the limit allowed.
        more: how many others there are.
        counted: whether that is their number; where hits are very many there are more.
    """

    schema: Literal["mktme.dump-search"]
    version: Literal[1]
    image: str
    size_bytes: int
    searched_bytes: int
    duration_s: float
    patterns: tuple[str, ...]
    hits: tuple[Hit, ...]
    more: int
    counted: bool


class _Piece(NamedTuple):
    """A piece of data, and where what reaches into it may begin: in a hole before it."""

    first: int
    base: int
    end: int


class _Found(NamedTuple):
    matches: list[Match]
    whole: bool
    searched_bytes: int


def search(
    image: DumpImage,
    searcher: Searcher,
    *,
    limit: int = DEFAULT_LIMIT,
    jobs: int | None = None,
    show_keys: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> SearchReport:
    """Search an image.

    Memory does not depend on the image's size: a few pieces are held for each thread.

    Args:
        image: what to search.
        searcher: what to look for.
        limit: how many hits to report.
        jobs: how many threads search; None for one a core.
        show_keys: whether the report has the AES keys that were found.
        chunk_bytes: how much a thread takes at a time; whole pages.
        progress: told how many bytes were searched, and of how many.

    Raises:
        DumpError: the image cannot be read.
        DumpChangedError: it was written meanwhile.
    """
    started = time.monotonic()
    threads = jobs or len(os.sched_getaffinity(0))
    total = sum(region.size_bytes for region in image.data_ranges())
    most = max(limit, _PER_TASK_HITS)

    def work(pieces: Sequence[_Piece]) -> _Found:
        return _search_pieces(image, searcher, pieces, most)

    kept: list[Match] = []
    count = searched = 0
    whole = True
    for found in _in_order(work, _tasks(image, searcher.reach_bytes, chunk_bytes), threads):
        kept += found.matches[: limit - len(kept)]
        count += len(found.matches)
        whole &= found.whole
        searched += found.searched_bytes
        progress(searched, total)
    image.check_unchanged()
    return SearchReport(
        schema="mktme.dump-search",
        version=1,
        image=spelled(image.path),
        size_bytes=image.size_bytes,
        searched_bytes=searched,
        duration_s=time.monotonic() - started,
        patterns=searcher.names,
        hits=tuple(_hits(image, kept, show_keys)),
        more=count - len(kept),
        counted=whole,
    )


def _tasks(image: DumpImage, reach_bytes: int, chunk_bytes: int) -> Iterator[list[_Piece]]:
    """Pieces, as many small ones together as make up a large one."""
    task: list[_Piece] = []
    held = end = 0
    for region in image.pieces(chunk_bytes):
        task.append(_Piece(max(end, region.base - reach_bytes + 1), region.base, region.end))
        end = region.end
        held += region.size_bytes
        if held >= chunk_bytes:
            yield task
            task, held = [], 0
    if task:
        yield task


def _search_pieces(
    image: DumpImage, searcher: Searcher, pieces: Sequence[_Piece], most: int
) -> _Found:
    matches: list[Match] = []
    whole = True
    for piece in pieces:
        low = max(0, piece.first - _CONTEXT_BYTES)
        # One byte more than anything can match: where the window ends is not where data does.
        high = min(image.size_bytes, piece.end + searcher.reach_bytes)
        window = Window(low, image.read(low, high - low), piece.first, piece.end, piece.base)
        found, complete = searcher.find(window, most)
        matches += found
        whole &= complete
    return _Found(matches, whole, sum(piece.end - piece.base for piece in pieces))


def _in_order(
    work: Callable[[list[_Piece]], _Found], tasks: Iterable[list[_Piece]], threads: int
) -> Iterator[_Found]:
    """What threads make of tasks, in the tasks' order, a few ahead."""
    running: deque[Future[_Found]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="search") as pool:
        try:
            for task in tasks:
                running.append(pool.submit(work, task))
                if len(running) > 2 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


# --- what is told of it -----------------------------------------------------------------------


def _hits(image: DumpImage, matches: Sequence[Match], show_keys: bool) -> Iterator[Hit]:
    schedules = [one.schedule for one in matches if one.schedule is not None]
    partners = {
        schedules[index].offset: schedules[other].offset
        for index, other in xts_partners(schedules).items()
    }
    for match in matches:
        keyid, vm, guest_physical = _place(image.sidecar, match.start)
        key = None
        if match.schedule is not None:
            key = FoundKey(
                bits=match.schedule.key_bits,
                form=match.schedule.form,
                swapped=match.schedule.swapped,
                errors=match.schedule.errors,
                xts_partner=partners.get(match.start),
                key=match.schedule.key.hex() if show_keys else None,
            )
        yield Hit(
            pattern=match.name,
            address=match.start,
            size_bytes=match.end - match.start,
            keyid=keyid,
            vm=vm,
            guest_physical=guest_physical,
            excerpt=match.excerpt.hex() if match.schedule is None else None,
            key=key,
        )


def _place(sidecar: Sidecar | None, address: int) -> tuple[int | None, str | None, int | None]:
    """An address's KeyID, its VM, and what the VM has it as."""
    if sidecar is None:
        return None, None, None
    keyid = next(
        (one.keyid for one in sidecar.pages if 0 <= address - one.base < one.size_bytes), 0
    )
    for vm in sidecar.vms:
        offset = address - vm.base
        if 0 <= offset < vm.size_bytes:
            for one in vm.segments:
                if 0 <= offset - one.ram_offset < one.size_bytes:
                    return keyid, vm.name, one.guest_physical + offset - one.ram_offset
            return keyid, vm.name, None
    return keyid, None, None
