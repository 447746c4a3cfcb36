# SPDX-License-Identifier: GPL-2.0-or-later
"""The shadow data path: after a flush, DRAM is the memory. Real trackers, real engine."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from mktme.datapath.link import LinkError, VmLink, decode_hello
from mktme.datapath.shadow import DrainPacer, ShadowDataPath, Track
from mktme.engine.controller import BATCH_PAGES, MemoryController
from mktme.engine.dram import Dram
from mktme.engine.errors import DramFullError
from mktme.engine.xts import Algorithm

from ..conftest import MakeQemu
from ..engine.conftest import activated
from ..fake_qemu import LINE, PAGE, FakeQemu, punch_hole

MIB = 1 << 20
KEYID = 3
ALL_LINES = 2**64 - 1


class SmallDram(Dram):
    """Full once it took `space_bytes`."""

    space_bytes: int

    def write(self, address: int, buffer: bytes | bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        fits = min(len(view), self.space_bytes)
        super().write(address, view[:fits])
        self.space_bytes -= fits
        if fits < len(view):
            raise DramFullError("full", address=address + fits)


class Shadow:
    """A fake QEMU's memory, mirrored into DRAM at 2 MiB, away from address 0."""

    def __init__(
        self,
        qemu: FakeQemu,
        track: Track,
        directory: Path,
        stack: ExitStack,
        link_class: type[VmLink] = VmLink,
    ) -> None:
        self.qemu = qemu
        self.dram = stack.enter_context(SmallDram.create(directory / "dram.img", 64 * MIB))
        self.dram.space_bytes = 1 << 40
        self.dram.allocate(PAGE)
        self.region = self.dram.allocate(qemu.ram_bytes)
        keys = activated()
        keys.program_random(KEYID, Algorithm.AES_XTS_128)
        self.controller = MemoryController(self.dram, keys)
        self.controller.assign(self.region.base, self.region.size_bytes, KEYID)
        hello = decode_hello(qemu.hello.encode())
        self.link = stack.enter_context(closing(link_class(hello, qemu.dups(), os.getpid())))
        self.path = ShadowDataPath(self.link, self.controller, self.region, track)

    def drain(self) -> int:
        return sum(self.path.drain())

    def flush(self) -> int:
        return sum(self.path.flush())

    def mirrored(self) -> bytes:
        """DRAM as the VM's KeyID reads it."""
        return bytes(self.controller.read(self.region.base, self.region.size_bytes))

    def stored(self, page: int) -> bytes:
        """Ciphertext."""
        buffer = bytearray(PAGE)
        self.dram.read_into(self.region.base + page * PAGE, buffer)
        return bytes(buffer)

    def is_exact(self) -> bool:
        return self.wrong_lines() == []

    def wrong_lines(self) -> list[int]:
        """Lines of RAM that DRAM does not have."""
        ram, dram = self.qemu.contents(), self.mirrored()
        starts = range(0, len(ram), LINE)
        return [at // LINE for at in starts if ram[at : at + LINE] != dram[at : at + LINE]]


MakeShadow = Callable[..., Shadow]


@pytest.fixture
def make_shadow(make_qemu: MakeQemu, tmp_path: Path) -> Iterator[MakeShadow]:
    with ExitStack() as stack:

        def make(
            track: Track = Track.STORES_AND_PAGES,
            blocks: tuple[int, ...] = (),
            link_class: type[VmLink] = VmLink,
        ) -> Shadow:
            return Shadow(make_qemu(*blocks, track=track), track, tmp_path, stack, link_class)

        yield make


@pytest.fixture
def shadow(make_shadow: MakeShadow) -> Shadow:
    return make_shadow()


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# --- completeness -----------------------------------------------------------------------------


@pytest.mark.parametrize("track", list(Track))
def test_flush_makes_dram_the_memory(make_shadow: MakeShadow, track: Track) -> None:
    shadow = make_shadow(track, (40, 7, 3))
    write = shadow.qemu.store if track.stores else shadow.qemu.dma
    for round_ in range(3):
        write(5 * PAGE + 17, noise(9000, round_))
        write(39 * PAGE, noise(PAGE, round_))
        write(40 * PAGE, noise(8 * PAGE - 1, round_)[: 7 * PAGE])
        assert not shadow.is_exact()
        assert shadow.flush() > 0
        assert shadow.is_exact()
        assert shadow.path.pending_pages == 0
        assert shadow.flush() == 0


def test_dram_holds_no_plaintext(shadow: Shadow) -> None:
    data = noise(PAGE)
    shadow.qemu.store(0, data)
    shadow.flush()
    assert shadow.stored(0) != data
    assert shadow.controller.read(shadow.region.base, PAGE) == data
    assert shadow.controller.read(shadow.region.base, PAGE, keyid=0) != data


def test_a_drain_is_enough_once_both_trackers_saw_it(shadow: Shadow) -> None:
    shadow.qemu.store(3 * PAGE, noise(100))
    shadow.qemu.dma(4 * PAGE, noise(100))
    assert shadow.drain() == 4
    assert shadow.is_exact()


def test_stores_alone_miss_a_write_by_a_device(make_shadow: MakeShadow) -> None:
    """The control for all of the above: a tracker with a hole shows."""
    shadow = make_shadow(Track.STORES)
    shadow.qemu.store(2 * PAGE, noise(LINE))
    shadow.qemu.dma(2 * PAGE + LINE, noise(LINE))
    shadow.qemu.dma(7 * PAGE, noise(LINE))
    assert shadow.flush() == 1
    assert shadow.wrong_lines() == [2 * 64 + 1, 7 * 64]
    assert shadow.path.pending_pages == 0


@pytest.mark.parametrize("track", [Track.PAGES, Track.STORES_AND_PAGES])
def test_pages_find_a_write_by_a_device(make_shadow: MakeShadow, track: Track) -> None:
    shadow = make_shadow(track)
    shadow.qemu.dma(2 * PAGE + LINE, noise(LINE))
    shadow.qemu.dma(7 * PAGE, noise(LINE))
    assert shadow.flush() == 2
    assert shadow.wrong_lines() == []


def test_late_mark_is_taken_by_a_flush(shadow: Shadow) -> None:
    """A mark may be set after its page's scan and stay when the page is not written again."""
    shadow.qemu.dma(PAGE, noise(LINE))
    shadow.drain()
    shadow.qemu.mark(PAGE)
    assert shadow.path.pending_pages == 0
    shadow.flush()
    assert not any(shadow.qemu.marks())
    assert shadow.path.line_marks(1, 1).tolist() == [1]


def test_memory_never_touched_takes_no_dram(shadow: Shadow) -> None:
    shadow.flush()
    assert os.stat(shadow.dram.path).st_blocks == 0
    assert shadow.is_exact()


def test_guest_that_writes_all_the_while_is_caught_up_with(shadow: Shadow) -> None:
    running = threading.Event()
    running.set()
    stores = 0

    def run() -> None:
        nonlocal stores
        source = random.Random(3)
        while running.is_set() or stores < 2000:
            write = shadow.qemu.store if stores % 3 else shadow.qemu.dma
            write(source.randrange(64 * PAGE - 8), source.randbytes(8))
            stores += 1

    guest = threading.Thread(target=run)
    guest.start()
    for _ in range(5):
        shadow.drain()
    shadow.flush()
    running.clear()
    guest.join()
    shadow.flush()
    assert shadow.is_exact()
    assert not any(shadow.qemu.marks())


# --- granularity and counters -----------------------------------------------------------------


def test_stores_alone_encrypt_lines(make_shadow: MakeShadow) -> None:
    shadow = make_shadow(Track.STORES)
    shadow.qemu.dma(4 * PAGE, noise(PAGE))
    shadow.qemu.mark(4 * PAGE + 5 * LINE)
    assert shadow.flush() == 1
    assert shadow.path.counters.lines_encrypted == 1
    assert shadow.stored(4)[5 * LINE : 6 * LINE] != bytes(LINE)
    assert shadow.stored(4)[: 5 * LINE] == bytes(5 * LINE)
    assert shadow.stored(4)[6 * LINE :] == bytes(58 * LINE)


def test_pages_encrypt_pages(make_shadow: MakeShadow) -> None:
    shadow = make_shadow(Track.PAGES)
    shadow.qemu.dma(4 * PAGE + 5 * LINE, noise(LINE))
    assert shadow.flush() == 1
    assert shadow.path.counters.lines_encrypted == 64
    assert shadow.path.counters.pages_written == 1
    assert all(shadow.stored(4)[at : at + LINE] != bytes(LINE) for at in range(0, PAGE, LINE))
    assert shadow.stored(3) == shadow.stored(5) == bytes(PAGE)


def test_counters_tell_stores_from_other_writes(shadow: Shadow) -> None:
    shadow.qemu.store(PAGE, noise(3 * LINE))
    shadow.qemu.dma(PAGE + 10 * LINE, noise(2 * LINE))
    shadow.qemu.dma(8 * PAGE, noise(LINE))
    assert shadow.flush() == 6
    counters = shadow.path.counters
    assert counters.drains == 2
    assert counters.pages_written == 2
    assert counters.lines_marked == 3
    assert counters.lines_stored == 3
    assert counters.lines_other == 3
    assert counters.lines_encrypted == 2 * 64
    assert counters.pages_vanished == 0


class Racing(VmLink):
    """A link whose guest stores to a line just before its page is read."""

    late: tuple[FakeQemu, int, bytes] | None = None

    def read_into(self, ram_offset: int, buffer: memoryview) -> None:
        if self.late is not None:
            qemu, at, data = self.late
            self.late = None
            qemu.store(at, data)
        super().read_into(ram_offset, buffer)


def test_store_between_the_marks_and_the_read_is_a_store(make_shadow: MakeShadow) -> None:
    shadow = make_shadow(link_class=Racing)
    assert isinstance(shadow.link, Racing)
    shadow.qemu.store(PAGE, noise(LINE))
    shadow.link.late = (shadow.qemu, PAGE + 7 * LINE, noise(LINE, 2))
    assert shadow.drain() == 2
    counters = shadow.path.counters
    assert (counters.lines_stored, counters.lines_other) == (2, 0)
    assert shadow.is_exact()
    # Its mark is still there, and finds nothing new.
    assert shadow.flush() == 0
    assert not any(shadow.qemu.marks())


def test_only_lines_that_changed_are_counted(shadow: Shadow) -> None:
    data = noise(PAGE)
    shadow.qemu.store(0, data)
    shadow.flush()
    shadow.qemu.store(0, data)  # the same again
    shadow.qemu.dma(0, data)
    assert shadow.flush() == 0
    counters = shadow.path.counters
    assert (counters.lines_stored, counters.lines_other) == (64, 0)
    assert (counters.lines_marked, counters.pages_written) == (128, 2)


def test_zeros_of_new_memory_are_nobodys_write(shadow: Shadow) -> None:
    shadow.qemu.dma(3 * PAGE + LINE, b"x")
    assert shadow.flush() == 1
    assert shadow.path.counters.lines_other == 1
    # In memory that was there before, zeros are a write as any other.
    shadow.qemu.dma(3 * PAGE + LINE, bytes(LINE))
    assert shadow.flush() == 1
    assert shadow.path.counters.lines_other == 2
    assert shadow.is_exact()


def test_line_marks_remember_every_store(shadow: Shadow) -> None:
    shadow.qemu.store(2 * PAGE, b"x")
    shadow.drain()
    shadow.qemu.store(2 * PAGE + 63 * LINE, b"x")
    shadow.drain()
    shadow.qemu.dma(3 * PAGE, b"x")
    shadow.drain()
    assert shadow.path.line_marks(1, 3).tolist() == [0, 1 << 63 | 1, 0]


# --- memory that is given back ----------------------------------------------------------------


def test_memory_given_back_is_zeros_after_a_flush(shadow: Shadow) -> None:
    shadow.qemu.store(4 * PAGE, noise(4 * PAGE))
    shadow.flush()
    before = shadow.stored(5)
    shadow.qemu.punch(5, 2)
    assert not shadow.is_exact()
    assert shadow.flush() == 0  # nobody wrote these zeros
    assert shadow.mirrored()[5 * PAGE : 7 * PAGE] == bytes(2 * PAGE)
    assert shadow.is_exact()
    assert shadow.stored(5) not in (before, bytes(PAGE))  # encrypted zeros, not a hole
    assert shadow.path.counters.pages_vanished == 2
    shadow.flush()
    assert shadow.path.counters.pages_vanished == 2
    assert shadow.path.counters.lines_other == 0


def test_memory_given_back_through_its_file_alone(shadow: Shadow) -> None:
    shadow.qemu.dma(0, noise(PAGE))
    shadow.flush()
    punch_hole(shadow.qemu.ram[0], 0, PAGE)
    assert not shadow.is_exact()
    shadow.flush()
    assert shadow.is_exact()


def test_memory_given_back_and_written_again(shadow: Shadow) -> None:
    shadow.qemu.store(4 * PAGE, noise(PAGE))
    shadow.flush()
    shadow.qemu.punch(4)
    shadow.flush()
    shadow.qemu.store(4 * PAGE + LINE, noise(LINE))
    assert shadow.flush() == 1
    assert shadow.is_exact()
    shadow.qemu.punch(4)
    shadow.qemu.store(4 * PAGE + LINE, noise(LINE, 2))
    shadow.flush()
    assert shadow.is_exact()


def test_memory_given_back_before_it_was_ever_encrypted(shadow: Shadow) -> None:
    shadow.qemu.store(4 * PAGE, noise(PAGE))
    shadow.qemu.punch(4)
    shadow.flush()
    assert shadow.is_exact()
    assert shadow.path.counters.pages_vanished == 0


def test_memory_given_back_and_only_read_again(shadow: Shadow) -> None:
    shadow.qemu.store(4 * PAGE, noise(PAGE))
    shadow.flush()
    shadow.qemu.punch(4)
    assert shadow.qemu.touch(4) == 0
    shadow.flush()
    assert shadow.is_exact()


# --- batches, faults --------------------------------------------------------------------------


def test_other_work_fits_between_batches(make_shadow: MakeShadow) -> None:
    shadow = make_shadow(blocks=(3 * BATCH_PAGES,))
    for page in range(3 * BATCH_PAGES):
        shadow.qemu.store(page * PAGE, b"1")
    drain = shadow.path.drain()
    assert next(drain) == BATCH_PAGES
    assert shadow.path.pending_pages == 2 * BATCH_PAGES
    shadow.qemu.store(0, b"2")  # behind the drain: for the next one
    shadow.qemu.store(2 * BATCH_PAGES * PAGE, b"2")  # before it: read in time
    assert list(drain) == [BATCH_PAGES] * 2
    assert shadow.wrong_lines() == [0]
    assert shadow.drain() == 1
    assert shadow.is_exact()


def test_drain_that_is_given_up_is_taken_up_by_the_next(make_shadow: MakeShadow) -> None:
    shadow = make_shadow(blocks=(2 * BATCH_PAGES,))
    for page in range(2 * BATCH_PAGES):
        shadow.qemu.store(page * PAGE, b"1")
    drain = shadow.path.drain()
    next(drain)
    del drain
    assert shadow.path.pending_pages == BATCH_PAGES
    shadow.drain()
    assert shadow.is_exact()


@pytest.mark.parametrize("track", list(Track))
@pytest.mark.parametrize("space_bytes", [0, 100, PAGE, 5 * PAGE + 70])
def test_full_dram_loses_nothing(make_shadow: MakeShadow, track: Track, space_bytes: int) -> None:
    shadow = make_shadow(track)
    write = shadow.qemu.store if track.stores else shadow.qemu.dma
    write(0, noise(PAGE))
    shadow.flush()
    shadow.dram.space_bytes = space_bytes
    for page in range(2, 20, 3):
        write(page * PAGE, noise(PAGE, page))
    for _ in range(2):
        with pytest.raises(DramFullError):
            shadow.flush()
        assert shadow.path.pending_pages == 6
    assert shadow.mirrored()[:PAGE] == noise(PAGE)
    write(2 * PAGE, b"later")  # a guest runs on for a moment
    write(30 * PAGE, noise(PAGE))
    shadow.dram.space_bytes = 1 << 40
    shadow.flush()
    assert shadow.path.pending_pages == 0
    assert shadow.is_exact()


def test_link_that_closes_ends_a_drain(make_shadow: MakeShadow) -> None:
    shadow = make_shadow(blocks=(2 * BATCH_PAGES,))
    for page in range(2 * BATCH_PAGES):
        shadow.qemu.store(page * PAGE, b"1")
    drain = shadow.path.drain()
    next(drain)
    shadow.link.close()
    with pytest.raises(LinkError, match="the VM is gone"):
        next(drain)
    for work in (shadow.drain, shadow.flush):
        with pytest.raises(LinkError, match="the VM is gone"):
            work()


@pytest.mark.parametrize(
    ("brought", "wanted", "message"),
    [
        (Track.PAGES, Track.STORES, "no store map"),
        (Track.PAGES, Track.STORES_AND_PAGES, "no store map"),
        (Track.STORES, Track.PAGES, "no pagemap descriptor"),
        (Track.STORES, Track.STORES_AND_PAGES, "no pagemap descriptor"),
    ],
)
def test_tracker_that_the_plugin_does_not_have(
    make_qemu: MakeQemu, tmp_path: Path, brought: Track, wanted: Track, message: str
) -> None:
    with ExitStack() as stack, pytest.raises(LinkError, match=message):
        Shadow(make_qemu(track=brought), wanted, tmp_path, stack)


# --- pace -------------------------------------------------------------------------------------


def test_busy_guest_is_drained_at_the_shortest_interval() -> None:
    pacer = DrainPacer()
    assert [pacer.next(0.001, True) for _ in range(3)] == [0.1] * 3


def test_drains_take_no_more_than_their_share_of_a_core() -> None:
    pacer = DrainPacer()
    for drain_s in (0.05, 0.1, 0.3):
        wait_s = pacer.next(drain_s, True)
        assert drain_s / (drain_s + wait_s) == pytest.approx(0.25)
    assert pacer.next(10.0, True) == 1.0  # nor is a guest ever left alone for longer


def test_idle_guest_is_drained_ever_more_rarely_until_it_writes() -> None:
    pacer = DrainPacer()
    waits = [pacer.next(0.001, False) for _ in range(5)]
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])
    assert pacer.interval_s == 1.0
    assert pacer.next(0.001, True) == 0.1
    assert pacer.next(0.001, False) == 0.2
