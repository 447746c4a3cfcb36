# SPDX-License-Identifier: GPL-2.0-or-later
"""The page tracker, on a real userfaultfd."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from mktme.datapath.link import RamBlock, VmLink, decode_hello
from mktme.datapath.pages import PageTracker
from mktme.datapath.uffd import tracked_memory

from ..conftest import MakeQemu
from ..fake_qemu import PAGE, FakeQemu

Tracked = tuple[mmap.mmap, PageTracker]


@pytest.fixture
def tracked(write_tracking: None) -> Iterator[Tracked]:
    """32 pages that nobody touched since they were reported."""
    with tracked_memory(32) as (memory, tracker, _memfd, _uffd):
        tracker.take()
        yield memory, tracker


def tracker_of(qemu: FakeQemu) -> PageTracker:
    hello = decode_hello(qemu.hello.encode())
    assert qemu.hello.capabilities & 2
    tracker = PageTracker(qemu.descriptors[len(qemu.ram) + 1], hello.blocks)
    tracker.take()
    return tracker


def test_written_pages_are_found_once(tracked: Tracked) -> None:
    memory, tracker = tracked
    assert tracker.take() == []
    memory[3 * PAGE] = 1
    memory[4 * PAGE + 100] = 1
    memory[9 * PAGE : 11 * PAGE] = bytes(2 * PAGE)
    assert tracker.take() == [(3, 5), (9, 11)]
    assert tracker.take() == []


def test_page_that_was_found_is_watched_again(tracked: Tracked) -> None:
    memory, tracker = tracked
    for round_ in range(3):
        memory[7 * PAGE] = round_
        assert tracker.take() == [(7, 8)]


def test_reading_is_not_writing(tracked: Tracked) -> None:
    memory, tracker = tracked
    memory[0] = 1
    tracker.take()
    assert memory[0] == 1
    assert memory[5 * PAGE] == 0
    assert tracker.take() == []


def test_write_by_the_kernel_is_found(tracked: Tracked) -> None:
    """As a device model's read of a disk into guest memory is."""
    memory, tracker = tracked
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as source, open(writer, "wb", buffering=0) as sink:
        sink.write(b"x" * 100)
        view = memoryview(memory)[6 * PAGE : 6 * PAGE + 100]
        assert source.readinto(view) == 100
        view.release()
    assert tracker.take() == [(6, 7)]


def test_write_around_the_mapping_is_not_found(write_tracking: None) -> None:
    """Why a process that maps guest RAM itself (vhost-user) must be refused."""
    with tracked_memory(4) as (memory, tracker, memfd, _uffd):
        tracker.take()
        os.pwrite(memfd, b"x", 2 * PAGE)
        assert memory[2 * PAGE] == ord("x")
        assert tracker.take() == []


def test_more_runs_than_one_scan_holds(write_tracking: None) -> None:
    pages = 10_000
    with tracked_memory(pages) as (memory, tracker, _memfd, _uffd):
        tracker.take()
        for page in range(0, pages, 2):
            memory[page * PAGE] = 1
        assert tracker.take() == [(page, page + 1) for page in range(0, pages, 2)]
        assert tracker.take() == []


def test_blocks_are_one_row_of_pages(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(4, 8, 2)
    tracker = tracker_of(qemu)
    for page in (0, 3, 4, 11, 12, 13):
        qemu.dma(page * PAGE, b"x")
    # Runs end at the end of a block.
    assert tracker.take() == [(0, 1), (3, 4), (4, 5), (11, 12), (12, 14)]
    assert tracker.take() == []


def test_memory_given_back_is_not_reported(qemu: FakeQemu) -> None:
    """Why the data path has to look for holes itself."""
    tracker = tracker_of(qemu)
    qemu.dma(0, b"x" * 8 * PAGE)
    assert tracker.take() == [(0, 8)]
    qemu.punch(2, 3)
    assert tracker.take() == []
    qemu.dma(3 * PAGE, b"y")
    assert tracker.take() == [(3, 4)]


def test_memory_without_write_tracking_is_an_error(qemu: FakeQemu) -> None:
    with mmap.mmap(-1, PAGE) as untracked:
        anchor = ctypes.c_char.from_buffer(untracked)
        block = RamBlock(ctypes.addressof(anchor), PAGE, 0)
        del anchor
        tracker = PageTracker(qemu.descriptors[len(qemu.ram) + 1], [block])
        with pytest.raises(PermissionError):  # PM_SCAN_CHECK_WPASYNC
            tracker.take()


def test_pagemap_through_a_link_is_the_same(qemu: FakeQemu) -> None:
    hello = decode_hello(qemu.hello.encode())
    with closing(VmLink(hello, qemu.dups(), os.getpid())) as link:
        assert link.pagemap is not None
        tracker = PageTracker(link.pagemap, hello.blocks)
        tracker.take()
        qemu.dma(5 * PAGE, b"x")
        assert tracker.take() == [(5, 6)]
