# SPDX-License-Identifier: GPL-2.0-or-later
"""The `shadow` data path: mirror every write to guest RAM, encrypted, into DRAM.

A drain asks the trackers what was written, then reads and encrypts it in batches. What the page
tracker reports is encrypted whole; what only the store tracker reports, line by line. XTS is
deterministic, so a line's ciphertext changes exactly if its plaintext did: that tells which
lines of a written page really changed, and those that no store marked came from elsewhere
(DMA, page-table walks, interrupt frames, firmware loading).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.datapath.link import LinkError, VmLink
from mktme.datapath.pages import PageTracker
from mktme.datapath.stores import StoreTracker
from mktme.engine.controller import BATCH_PAGES, MemoryController
from mktme.engine.dram import Region
from mktme.engine.pages import as_lines, pack_masks, runs_of_consecutive
from mktme.engine.xts import LINES_PER_PAGE, PAGE_BYTES

_WORDS_PER_PAGE: Final = PAGE_BYTES // 8
_ALL_LINES: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class Track(enum.Enum):
    """Which trackers tell `shadow` that memory was written."""

    STORES = "stores"
    PAGES = "pages"
    STORES_AND_PAGES = "stores+pages"

    @property
    def stores(self) -> bool:
        """Whether the plugin's store tracker is on."""
        return self is not Track.PAGES

    @property
    def pages(self) -> bool:
        """Whether the kernel's page tracker is on."""
        return self is not Track.STORES


@dataclass(slots=True)
class ShadowCounters:
    """What a VM's drains did so far.

    Attributes:
        drains: how many there were.
        pages_written: pages that the page tracker reported, a page counted each time.
        lines_marked: lines that the store tracker reported, a line counted each time.
        lines_encrypted: lines that went through the engine.
        lines_stored: changed lines that a store had marked.
        lines_other: changed lines that a page scan found and no store marked (DMA, system);
            zeros in a page that was never written before are not among them.
        pages_vanished: pages that the guest gave back (ballooning, free-page reporting).
    """

    drains: int = 0
    pages_written: int = 0
    lines_marked: int = 0
    lines_encrypted: int = 0
    lines_stored: int = 0
    lines_other: int = 0
    pages_vanished: int = 0


@dataclass(slots=True)
class DrainPacer:
    """How long to wait between two drains of one VM.

    A busy guest is drained often, but never so often that the drains take more than a share of
    a core; an idle one ever more rarely.

    Attributes:
        shortest_s: the wait for a busy guest whose drains are quick.
        longest_s: the wait for a guest that writes nothing.
        share: the most of one core that drains may take.
        interval_s: the wait now.
    """

    shortest_s: float = 0.1
    longest_s: float = 1.0
    share: float = 0.25
    interval_s: float = field(default=0.1, init=False)

    def next(self, drain_s: float, wrote: bool) -> float:
        """The wait after a drain that took `drain_s` and, or not, had something to write."""
        if wrote:
            floor = max(self.shortest_s, drain_s * (1 / self.share - 1))
            self.interval_s = min(floor, self.longest_s)
        else:
            self.interval_s = min(self.interval_s * 2, self.longest_s)
        return self.interval_s


class ShadowDataPath:
    """One VM's RAM, mirrored into its region of DRAM.

    Args:
        link: the VM's RAM and descriptors.
        controller: encrypts into DRAM under each page's KeyID.
        region: where the VM's RAM offset 0 is in DRAM.
        track: which trackers to believe.

    Raises:
        LinkError: the plugin did not bring what `track` needs.
    """

    def __init__(
        self, link: VmLink, controller: MemoryController, region: Region, track: Track
    ) -> None:
        self._link = link
        self._controller = controller
        self._first_dram_page = region.base // PAGE_BYTES
        self._stores: StoreTracker | None = None
        self._pages: PageTracker | None = None
        if track.stores:
            if link.store_map is None:
                raise LinkError("the plugin brought no store map")
            self._stores = StoreTracker(link.store_map)
        if track.pages:
            if link.pagemap is None:
                raise LinkError("the plugin brought no pagemap descriptor")
            self._pages = PageTracker(link.pagemap, link.hello.blocks)
        count = link.ram_pages
        self.counters = ShadowCounters()
        # Pending work outlives a drain that fails (DRAM full): nothing is forgotten.
        self._written = np.zeros(count, dtype=bool)
        self._marked = np.zeros(count, dtype=np.uint64)
        # What was ever reported, to tell why a line is not in DRAM as it should be.
        self._ever_marked = np.zeros(count, dtype=np.uint64)
        # Pages that DRAM holds data of, and those whose data is to become zeros.
        self._shadowed = np.zeros(count, dtype=bool)
        self._vanished = np.zeros(count, dtype=bool)
        self._plaintext = np.empty((BATCH_PAGES, _WORDS_PER_PAGE), dtype=np.uint64)

    @property
    def pending_pages(self) -> int:
        """Pages that are known to be written and not in DRAM yet."""
        return int(np.count_nonzero(self._written | (self._marked != 0)))

    def drain(self) -> Iterator[int]:
        """Bring what was written since the last drain into DRAM, batch by batch.

        Yields:
            After each batch: how many of its lines changed. The caller may do other work then.

        Raises:
            DramFullError: DRAM took no more. What it lacks stays pending for the next drain.
            LinkError, OSError: the VM is gone.
        """
        self.counters.drains += 1
        self._collect()
        pending = np.flatnonzero(self._written | (self._marked != 0))
        for start in range(0, len(pending), BATCH_PAGES):
            yield self._encrypt(pending[start : start + BATCH_PAGES])

    def flush(self) -> Iterator[int]:
        """As `drain`, and on until nothing is left: of a paused guest, DRAM is then the RAM.

        A running guest is caught up with as far as it had come at the start.
        """
        if self._pages is not None:
            self._collect_vanished()
            yield from self._collect_zeroed()
        for _ in range(2):  # the second round takes marks set late: after the page's own scan
            self._collect_marked()
            yield from self.drain()

    def load(self, first_page: int, count: int) -> Iterator[None]:
        """Fill pages of RAM with what DRAM holds of them; before the VM runs.

        Yields:
            After each batch.

        Raises:
            IntegrityError: a line does not match its MAC. Nobody could tell the guest.
            DramError, LinkError, OSError: there is nothing to read from, or to write to.
        """
        for first in range(first_page, first_page + count, BATCH_PAGES):
            length = min(BATCH_PAGES, first_page + count - first)
            plaintext = self._controller.read_pages(
                self._first_dram_page + first, length, out=self._plaintext[:length]
            )
            pages = np.flatnonzero(plaintext.any(axis=1))
            for start, stop in runs_of_consecutive(pages):
                part = plaintext[pages[start] : pages[stop - 1] + 1]
                offset = (first + int(pages[start])) * PAGE_BYTES
                self._link.write(offset, memoryview(part.data).cast("B"))
            self._shadowed[pages + first] = True
            yield

    def persist(self, first_page: int, count: int) -> Iterator[int]:
        """As `flush`, of some pages, after QEMU's end: its memory outlives trackers."""
        stop = first_page + count
        self._note_written(first_page, stop)
        for hole_start, hole_stop in self._link.holes(first_page, stop):
            self._written[hole_start:hole_stop] = False
            self._note_hole(hole_start, hole_stop)
        pending = np.flatnonzero(self._written[first_page:stop]) + first_page
        for start in range(0, len(pending), BATCH_PAGES):
            yield self._encrypt(pending[start : start + BATCH_PAGES])

    def discard(self, first_page: int, count: int) -> None:
        """Forget pages that QEMU has taken from the guest: they are zero from now on."""
        self._link.punch(first_page, count)
        self._collect()  # what the trackers know of them
        if self._stores is not None:
            self._stores.take(np.arange(first_page, first_page + count))
        pages = slice(first_page, first_page + count)
        self._written[pages] = self._shadowed[pages] = self._vanished[pages] = False
        self._marked[pages] = 0
        self._controller.discard(self._first_dram_page + first_page, count)

    def renew(self, first_page: int, count: int) -> None:
        """Let the next drain write pages anew: DRAM may not hold them as it should."""
        known = slice(first_page, first_page + count)
        self._written[known] |= self._shadowed[known]

    def line_marks(self, first_page: int, count: int) -> npt.NDArray[np.uint64]:
        """For each page, which of its lines a store was ever seen to (bit i: line i)."""
        return self._ever_marked[first_page : first_page + count]

    def _collect(self) -> None:
        self._link.check_open()
        if self._pages is None:
            self._collect_marked()
            return
        for start, stop in self._pages.take():
            # A page scan also reports what has no memory behind it; reading that as zeros and
            # encrypting it would make every never-touched page a written one.
            populated = start
            for hole_start, hole_stop in self._link.holes(start, stop):
                self._note_written(populated, hole_start)
                self._note_hole(hole_start, hole_stop)
                populated = hole_stop
            self._note_written(populated, stop)

    def _collect_marked(self) -> None:
        if self._stores is not None:
            self._take_marks(self._stores, self._stores.marked_pages())

    def _collect_vanished(self) -> None:
        """Find pages that the guest gave back since they were encrypted: they are zero now.

        The kernel does not report these as written (mm/memory.c keeps the write-protect marker
        of a page whose memory is punched away).
        """
        for start, stop in self._link.holes(0, self._link.ram_pages):
            self._note_hole(start, stop)

    def _collect_zeroed(self) -> Iterator[int]:
        """Find pages that were given back and are memory again, because somebody read them.

        The kernel reports these as unwritten too, and they are no holes any more; but all of such
        a page is zeros, so whatever is zeros is encrypted once more.
        """
        for first in range(0, len(self._shadowed), BATCH_PAGES):
            pages = np.flatnonzero(self._shadowed[first : first + BATCH_PAGES]) + first
            if len(pages):
                zero = ~self._read(pages).any(axis=1)
                self._written[pages[zero]] = True
                yield 0

    def _note_written(self, start: int, stop: int) -> None:
        self.counters.pages_written += stop - start
        self._written[start:stop] = True
        self._vanished[start:stop] = False

    def _note_hole(self, start: int, stop: int) -> None:
        vanished = self._shadowed[start:stop]
        self.counters.pages_vanished += int(np.count_nonzero(vanished))
        self._written[start:stop] |= vanished
        self._vanished[start:stop] |= vanished
        vanished[:] = False

    def _take_marks(self, stores: StoreTracker, pages: npt.NDArray[np.int64]) -> None:
        marks = stores.take(pages)
        self._marked[pages] |= marks
        self._ever_marked[pages] |= marks
        self.counters.lines_marked += _bits(marks)

    def _encrypt(self, pages: npt.NDArray[np.int64]) -> int:
        if self._stores is not None:
            self._take_marks(self._stores, pages)
        plaintext = self._read(pages)
        marks = self._marked[pages]
        whole = self._written[pages]
        masks = None if whole.all() else np.where(whole, _ALL_LINES, marks)
        changed = self._controller.update_pages(
            pages + self._first_dram_page, plaintext, line_masks=masks
        )
        if self._stores is not None:
            # A store between our look at the marks and our read of the RAM is marked by now.
            marks = marks | self._stores.peek(pages)
        stored = _bits(changed & marks)
        other = _bits(changed & ~marks & self._meaning(pages, plaintext))
        self._written[pages] = False
        self._marked[pages] = 0
        self._shadowed[pages] = ~self._vanished[pages]
        self._vanished[pages] = False
        self.counters.lines_stored += stored
        self.counters.lines_other += other
        self.counters.lines_encrypted += (
            len(pages) * LINES_PER_PAGE if masks is None else _bits(masks)
        )
        return stored + other

    def _read(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """The RAM of at most `BATCH_PAGES` pages, uint64 (n, 512), until the next call."""
        plaintext = self._plaintext[: len(pages)]
        self._link.read_pages_into(pages, plaintext)
        return plaintext

    def _meaning(
        self, pages: npt.NDArray[np.int64], plaintext: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        """Which lines can tell of a write: not the zeros that a page's first memory starts with.

        The host's kernel put them there; nobody in the guest or its devices wrote them.
        """
        masks = np.full(len(pages), _ALL_LINES)
        fresh = np.flatnonzero(~self._shadowed[pages])
        if len(fresh):
            nonzero = as_lines(plaintext[fresh]).any(axis=1)
            masks[fresh] = pack_masks(nonzero.reshape(-1, LINES_PER_PAGE))
        return masks


def _bits(masks: npt.NDArray[np.uint64]) -> int:
    return int(np.bitwise_count(masks).sum(dtype=np.int64))
