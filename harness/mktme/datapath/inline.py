# SPDX-License-Identifier: GPL-2.0-or-later
"""The `inline` data path: DRAM is the guest's memory, and RAM a window onto it.

QEMU's guest RAM is an empty shared mapping under a userfaultfd. An access to a page that is not in
the window stops whoever made it, vCPU or device, until the page was decrypted from DRAM; and when
the window is full, others are encrypted into DRAM and punched away first. So plaintext is never
more than the window, and whatever happened to DRAM meanwhile is what the guest gets.

A page leaves without a race: it is write-protected (who writes now waits), read, encrypted,
written, punched away, and those who wait are woken to find it missing. All of that is one thread's
work and nothing comes in between; if DRAM does not take it, the page stays.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.datapath.latency import Latencies
from mktme.datapath.link import LinkError, VmLink
from mktme.datapath.stores import StoreTracker
from mktme.datapath.uffd import Fault, Removed, Userfaultfd
from mktme.datapath.window import Window
from mktme.engine.controller import BATCH_PAGES, WORDS_PER_PAGE, MemoryController
from mktme.engine.dram import Region
from mktme.engine.errors import DramFullError
from mktme.engine.integrity import Violation
from mktme.engine.pages import as_lines, first_line, pack_masks, runs_of_consecutive
from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE, PAGE_BYTES

EVICT_PAGES: Final = 64
"""How many pages leave at once: encrypting few at a time costs several times as much a page."""

_ALL_LINES: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@dataclass(slots=True)
class InlineCounters:
    """What a VM's window did so far.

    Attributes:
        faults: accesses to pages that were not in the window.
        pages_fetched: pages that came in, those read ahead included.
        pages_read_ahead: pages that came in before they were asked for.
        pages_evicted: pages that went out.
        lines_written: lines whose ciphertext changed when their page went out.
        lines_stored: of these, lines that a vCPU's store had marked (`stores` tracker).
        pages_vanished: pages that the guest gave back (ballooning, free-page reporting).
        pages_poisoned: pages that came in with a line whose integrity check failed.
    """

    faults: int = 0
    pages_fetched: int = 0
    pages_read_ahead: int = 0
    pages_evicted: int = 0
    lines_written: int = 0
    lines_stored: int = 0
    pages_vanished: int = 0
    pages_poisoned: int = 0


@dataclass(frozen=True, slots=True)
class Poison:
    """A page whose integrity check failed; an access to it waits until `release`.

    Attributes:
        page: its number in RAM.
        keyid: the KeyID that it was read with.
        lines: bit i is set if line i does not match its MAC.
        kind: what is wrong with the first of them.
    """

    page: int
    keyid: int
    lines: int
    kind: Violation


class InlineDataPath:
    """One VM's RAM, a window onto its region of DRAM.

    Args:
        link: the VM's RAM and descriptors.
        controller: decrypts from DRAM and encrypts into it under each page's KeyID.
        region: where the VM's RAM offset 0 is in DRAM.
        window: which pages are plaintext, and which go next; empty.

    Raises:
        LinkError: the plugin brought no userfaultfd.
        DramError: what QEMU loaded before does not fit into DRAM.
    """

    def __init__(
        self, link: VmLink, controller: MemoryController, region: Region, window: Window
    ) -> None:
        if link.userfaultfd is None:
            raise LinkError("the plugin brought no userfaultfd that stops at missing pages")
        self._link = link
        self._uffd = Userfaultfd(link.userfaultfd)
        self._controller = controller
        self._first_dram_page = region.base // PAGE_BYTES
        self._window = window
        # With so little room left, pages go out while nobody waits for that.
        self._reserve = min(EVICT_PAGES // 2, window.capacity_pages // 16)
        self._stores = None if link.store_map is None else StoreTracker(link.store_map)
        self._ever_marked = np.zeros(link.ram_pages, dtype=np.uint64)
        # Marks of pages in the window that were taken from the map to see whether there were any.
        self._looked_at = np.zeros(link.ram_pages, dtype=np.uint64)
        # Pages that somebody waits for and that could not be had yet: DRAM is full.
        # With the `time.perf_counter_ns` since when they do.
        self._waiting: deque[tuple[int, int]] = deque()
        # Bad lines, by page: of those that somebody waits for, and of those in the window.
        self._poisoned: dict[int, int] = {}
        self._released: dict[int, int] = {}
        self.found_poison: deque[Poison] = deque()
        """Poison that was met and nobody was told of yet."""
        self.counters = InlineCounters()
        self.service_times = Latencies()
        """From when the engine has read a fault until who waits can go on."""
        self._pages = np.empty((BATCH_PAGES, WORDS_PER_PAGE), dtype=np.uint64)
        self._pages_address = self._pages.ctypes.data
        self._first_page = self._pages[:1]
        self._masks = np.zeros(BATCH_PAGES, dtype=np.uint64)
        self._adopt()

    @property
    def descriptor(self) -> int:
        """Readable when there is something for `serve`."""
        return self._uffd.descriptor

    @property
    def window(self) -> Window:
        """The window."""
        return self._window

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a page that `serve` could not give: call it again."""
        return bool(self._waiting)

    def serve(self) -> int:
        """Give those who wait what they wait for; returns how many events there were.

        Raises:
            DramFullError: DRAM took no more: the rest wait. Nothing is lost.
            DramError, LinkError, OSError: the VM cannot go on.
        """
        events = self._uffd.read()
        read_at = time.perf_counter_ns()
        for event in events:
            if isinstance(event, Removed):
                self._remove(event)
            else:
                self._note(event, read_at)
        while self._waiting:
            page, since = self._waiting[0]
            came_in = self._fetch(page, since)
            self._waiting.popleft()
            if came_in:
                self._read_ahead(page)
        if events and self._window.room < self._reserve:
            # Nobody waits for it now, who would if the next fault found no room.
            with suppress(DramFullError):
                self._evict(EVICT_PAGES)
        return len(events)

    def release(self, page: int) -> None:
        """Let go on whoever waits for a poisoned page; its bad lines read as all ones."""
        lines = self._poisoned.pop(page, None)
        if lines is not None:
            self._released[page] = lines
            self._fetch(page)

    def drain(self) -> Iterator[int]:
        """As `flush`: what the window holds is all that DRAM can lack."""
        return self.flush()

    def flush(self) -> Iterator[int]:
        """Encrypt the window into DRAM and keep it: of a paused guest, DRAM is then the RAM.

        Yields:
            After each batch: how many of its lines changed. The caller may do other work then.

        Raises:
            DramFullError: DRAM took no more.
            LinkError, OSError: the VM is gone.
        """
        return self.persist(0, self._link.ram_pages)

    def persist(self, first_page: int, count: int) -> Iterator[int]:
        """As `flush`, of some pages; after QEMU's end, too: its memory is there still."""
        resident = self._window.resident()
        resident = resident[(resident >= first_page) & (resident < first_page + count)]
        for start in range(0, len(resident), BATCH_PAGES):
            pages = resident[start : start + BATCH_PAGES]
            yield self._write(pages[self._window.contains(pages)])

    def discard(self, first_page: int, count: int) -> None:
        """Forget pages that QEMU has taken from the guest: they are zero from now on."""
        self._link.punch(first_page, count)
        self._window.forget(first_page, count)
        if self._stores is not None:
            self._stores.take(np.arange(first_page, first_page + count))
            self._looked_at[first_page : first_page + count] = 0
        for page in range(first_page, first_page + count) if self._released else ():
            self._released.pop(page, None)
        self._controller.discard(self._first_dram_page + first_page, count)

    def line_marks(self, first_page: int, count: int) -> npt.NDArray[np.uint64]:
        """For each page, which of its lines a store was ever seen to (bit i: line i)."""
        return self._ever_marked[first_page : first_page + count]

    # --- inside -------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take in what QEMU put into RAM before the userfaultfd was there."""
        for start, stop in self._link.runs_of_data():
            for page in range(start, stop):
                if not self._window.room:
                    self._evict(EVICT_PAGES)
                self._window.admit(page)

    def _note(self, fault: Fault, read_at: int) -> None:
        page = self._link.page_of(fault.address)
        if fault.protected or page in self._poisoned:
            # It was write-protected while it was on its way out, and is gone by now; or it
            # waits for its poison to be dealt with.
            if page not in self._poisoned:
                self._uffd.wake(self._link.host_address(page), PAGE_BYTES)
            return
        self.counters.faults += 1
        self._waiting.append((page, read_at))

    def _remove(self, removed: Removed) -> None:
        """The guest gave pages back: they are zero from now on, in DRAM too."""
        first = self._link.page_of(removed.start)
        pages = np.arange(first, self._link.page_of(removed.end - 1) + 1)
        resident = pages[self._window.contains(pages)]
        for page, size in _runs(resident):
            for hole, stop in self._link.holes(page, page + size):
                self._window.forget(hole, stop - hole)
        self._controller.discard(self._first_dram_page + first, len(pages))
        self.counters.pages_vanished += len(pages)

    def _fetch(self, page: int, since_ns: int | None = None) -> bool:
        """Give who waits for a page what it waits for; returns whether the page came in for that.

        Args:
            page: its number in RAM.
            since_ns: when the engine heard of the fault, None if it is known to be poisoned.
        """
        host = self._link.host_address(page)
        if page in self._window:
            # Two asked for it, or it was punched away behind our back and is zero.
            if self._uffd.zero(host, PAGE_BYTES):
                self.counters.pages_vanished += 1
            else:
                self._uffd.wake(host, PAGE_BYTES)
            return False
        if not self._window.room:
            self._evict(EVICT_PAGES)
        poisoned = self._controller.read_page(self._first_dram_page + page, self._first_page)
        if since_ns is not None and poisoned:
            self._hold_poisoned(page, poisoned)
            return False
        if not self._uffd.copy(host, self._pages_address, PAGE_BYTES):
            self._uffd.wake(host, PAGE_BYTES)
        if since_ns is not None:
            self.service_times.add(time.perf_counter_ns() - since_ns)
        self._window.admit(page)
        self.counters.pages_fetched += 1
        return True

    def _read_ahead(self, page: int) -> None:
        """Bring in pages behind one that came in, if they will be wanted; nobody waits for them.

        Who asks for one meanwhile gets it as it comes in.
        """
        first = page + 1
        count = min(
            self._window.read_ahead(page) - 1, self._window.room, self._pages_in_a_row(first)
        )
        if not count:
            return
        poisoned = self._masks[:count]
        self._controller.read_pages(
            self._first_dram_page + first, count, out=self._pages[:count], poisoned=poisoned
        )
        if poisoned.any():
            count = int(np.flatnonzero(poisoned)[0])  # what is poisoned is not read ahead
            if not count:
                return
        host = self._link.host_address(first)
        copied = self._uffd.copy(host, self._pages_address, count * PAGE_BYTES) // PAGE_BYTES
        self._window.admit_range(first, copied)
        self.counters.pages_fetched += copied
        self.counters.pages_read_ahead += copied

    def _pages_in_a_row(self, first: int) -> int:
        """How many pages from one on can be put into QEMU's memory at once."""
        if first >= self._link.ram_pages:
            return 0
        return min(BATCH_PAGES, self._link.pages_to_block_end(first))

    def _hold_poisoned(self, page: int, lines: int) -> None:
        self._poisoned[page] = lines
        self.counters.pages_poisoned += 1
        address = (self._first_dram_page + page) * PAGE_BYTES
        kind = self._controller.violation_at(address + first_line(lines) * LINE_BYTES)
        self.found_poison.append(Poison(page, self._controller.keyid_at(address), lines, kind))

    def _evict(self, count: int) -> None:
        """Let pages go out into DRAM; all of them, or DramError and none."""
        referenced = None if self._stores is None else self._is_marked
        pages = self._window.choose(min(count, BATCH_PAGES), referenced)
        runs = [(page, size, self._link.host_address(page)) for page, size in _runs(pages)]
        for _, size, host in runs:
            self._uffd.protect(host, size * PAGE_BYTES)
        try:
            self._write(pages)
        except BaseException:
            for _, size, host in runs:
                self._uffd.unprotect(host, size * PAGE_BYTES)
            self._window.restore(pages)
            raise
        for page in pages.tolist() if self._released else ():
            self._released.pop(page, None)
        for page, size, host in runs:
            self._link.punch(page, size)
            self._uffd.wake(host, size * PAGE_BYTES)
        self.counters.pages_evicted += len(pages)

    def _write(self, pages: npt.NDArray[np.int64]) -> int:
        """Encrypt pages of the window; only lines that changed are written to DRAM."""
        plaintext = self._pages[: len(pages)]
        self._link.read_pages_into(pages, plaintext)
        marks = None
        if self._stores is not None:
            marks = self._stores.take(pages) | self._looked_at[pages]
            self._looked_at[pages] = 0
        changed = self._controller.update_pages(
            pages + self._first_dram_page, plaintext, self._good_lines(pages, plaintext)
        )
        lines = int(np.bitwise_count(changed).sum(dtype=np.int64))
        self.counters.lines_written += lines
        if marks is not None:
            self._ever_marked[pages] |= marks
            stored = np.bitwise_count(changed & marks).sum(dtype=np.int64)
            self.counters.lines_stored += int(stored)
        return lines

    def _good_lines(
        self, pages: npt.NDArray[np.int64], plaintext: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64] | None:
        """Masks of lines to write: not the bad ones, unless the guest wrote them since.

        A MAC for what a bad line reads as would make it a good one.
        """
        if not self._released:
            return None
        masks = np.full(len(pages), _ALL_LINES)
        for index, page in enumerate(pages.tolist()):
            bad = self._released.get(page, 0)
            if bad:
                untouched = (as_lines(plaintext[index]) == _ALL_LINES).all(axis=1)
                lines = pack_masks(untouched.reshape(1, LINES_PER_PAGE))[0]
                masks[index] &= ~(lines & np.uint64(bad))
        return masks

    def _is_marked(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """As `mktme.datapath.window.Referenced`: were they stored to since they were asked about?

        Not "since they came in": then pages that are only read would always be the first to go.
        """
        assert self._stores is not None
        marks = self._stores.take(pages)
        self._looked_at[pages] |= marks
        marked: npt.NDArray[np.bool_] = marks != 0
        return marked


def _runs(pages: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Split ascending page numbers into (first, how many)."""
    for start, stop in runs_of_consecutive(pages):
        yield int(pages[start]), stop - start
