# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's link: descriptors are what they are said to be, reads stay within the VM's RAM."""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mktme.datapath.link import LinkError, StoreMapCounters, VmLink, decode_hello
from mktme.datapath.shadow import Track

from ..conftest import MakeQemu
from ..fake_qemu import (
    LINE,
    PAGE,
    SEAL_GROW,
    SEAL_SHRINK,
    FakeQemu,
    make_store_map,
    punch_hole,
)

RAM, UFFD, PAGEMAP, STORE_MAP = range(4)
PAGES = 64


def open_descriptors() -> set[str]:
    gc.collect()  # what earlier tests left to it would be closed at any moment
    # Less the one that the listing itself needed.
    return {one for one in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{one}")}


def link_to(qemu: FakeQemu) -> VmLink:
    return VmLink(decode_hello(qemu.hello.encode()), qemu.dups(), os.getpid())


@pytest.fixture
def link(qemu: FakeQemu) -> Iterator[VmLink]:
    with closing(link_to(qemu)) as link:
        yield link


# --- descriptors ------------------------------------------------------------------------------


def test_link_gives_all_descriptors_back(qemu: FakeQemu) -> None:
    before = open_descriptors()
    link = link_to(qemu)
    assert len(open_descriptors()) == len(before) + 5  # Python's mmap keeps one of its own
    link.close()
    link.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("track", list(Track))
def test_link_has_what_its_trackers_need(make_qemu: MakeQemu, track: Track) -> None:
    with closing(link_to(make_qemu(track=track))) as link:
        assert (link.store_map is not None) == track.stores
        assert (link.counters() is not None) == track.stores
        assert (link.pagemap is not None) == track.pages
        assert link.ram_pages == PAGES


def null(_directory: Path) -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


def pipe(_directory: Path) -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def unix_socket(_directory: Path) -> int:
    return socket.socket(socket.AF_UNIX).detach()


def directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def file_of(size: int) -> Callable[[Path], int]:
    def make(directory: Path) -> int:
        descriptor = os.open(directory / "memfd:file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(descriptor, size)
        return descriptor

    return make


def memfd_of(size: int) -> Callable[[Path], int]:
    def make(_directory: Path) -> int:
        descriptor = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return descriptor

    return make


def store_map(
    *, ram_pages: int = PAGES, seals: int = SEAL_SHRINK, **header: object
) -> Callable[[Path], int]:
    return lambda _directory: make_store_map(ram_pages * PAGE, seals=seals, header=header)


def proc_file(name: str) -> Callable[[Path], int]:
    return lambda _directory: os.open(f"/proc/{name}", os.O_RDONLY | os.O_CLOEXEC)


def another_pagemap(_directory: Path) -> int:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        return os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)


MAP_BYTES = 4096 + PAGES * 64
SWAPS: dict[str, tuple[int, Callable[[Path], int], str]] = {
    "RAM: /dev/null": (RAM, null, "not a memfd"),
    "RAM: a pipe": (RAM, pipe, "not a memfd"),
    "RAM: a socket": (RAM, unix_socket, "not a memfd"),
    "RAM: a directory": (RAM, directory, "not a memfd"),
    "RAM: a file of that size": (RAM, file_of(PAGES * PAGE), "not a memfd"),
    "RAM: truncated": (RAM, memfd_of(PAGES * PAGE - 1), "has 262143"),
    "RAM: empty": (RAM, memfd_of(0), "has 0"),
    "RAM: too large": (RAM, memfd_of(PAGES * PAGE * 2), "has 524288"),
    "userfaultfd: a pipe": (UFFD, pipe, r"should be anon_inode:\[userfaultfd\] is pipe:"),
    "userfaultfd: a memfd": (UFFD, memfd_of(PAGE), "should be anon_inode"),
    "pagemap: /dev/null": (PAGEMAP, null, "/pagemap is /dev/null"),
    "pagemap: another process's": (PAGEMAP, another_pagemap, r"/pagemap is /proc/\d+/pagemap"),
    "pagemap: another file of it": (PAGEMAP, proc_file("self/maps"), r"/pagemap is /proc/\d+/maps"),
    "store map: a pipe": (STORE_MAP, pipe, "not a memfd of the announced size"),
    "store map: a file": (STORE_MAP, file_of(MAP_BYTES), "not a memfd of the announced size"),
    "store map: truncated": (STORE_MAP, store_map(ram_pages=PAGES - 1), "announced size"),
    "store map: too large": (STORE_MAP, store_map(ram_pages=PAGES + 1), "announced size"),
    "store map: not sealed": (STORE_MAP, store_map(seals=0), "not sealed against shrinking"),
    "store map: the wrong seal": (STORE_MAP, store_map(seals=SEAL_GROW), "not sealed against"),
    "store map: zeros": (STORE_MAP, store_map(magic=b""), "no header that this engine knows"),
    "store map: newer": (STORE_MAP, store_map(version=2), "no header that this engine knows"),
    "store map: larger header": (STORE_MAP, store_map(header_bytes=8192), "no header"),
    "store map: too few lines": (STORE_MAP, store_map(line_count=1), "map is for 1 lines"),
    "store map: too many lines": (STORE_MAP, store_map(line_count=2**64 - 1), "lines"),
}


@pytest.mark.parametrize(("index", "make", "message"), SWAPS.values(), ids=SWAPS.keys())
def test_another_descriptor_than_announced_is_refused(
    qemu: FakeQemu, tmp_path: Path, index: int, make: Callable[[Path], int], message: str
) -> None:
    before = open_descriptors()
    descriptors = qemu.dups()
    os.close(descriptors[index])
    descriptors[index] = make(tmp_path)
    assert len(open_descriptors()) == len(before) + 4
    with pytest.raises(LinkError, match=message):
        VmLink(decode_hello(qemu.hello.encode()), descriptors, os.getpid())
    assert open_descriptors() == before


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_another_number_of_descriptors_is_refused(qemu: FakeQemu, count: int) -> None:
    before = open_descriptors()
    descriptors = [*qemu.dups(), *qemu.dups()]
    while len(descriptors) > count:
        os.close(descriptors.pop())
    with pytest.raises(LinkError, match=f"{count} descriptors came, 4 were announced"):
        VmLink(decode_hello(qemu.hello.encode()), descriptors, os.getpid())
    assert open_descriptors() == before


def test_pagemap_must_be_of_the_process_that_connected(qemu: FakeQemu) -> None:
    with pytest.raises(LinkError, match="/proc/1/pagemap"):
        VmLink(decode_hello(qemu.hello.encode()), qemu.dups(), qemu_pid=1)


def test_file_that_is_named_like_a_memfd_is_none(qemu: FakeQemu, tmp_path: Path) -> None:
    # The kernel's name for a file in a mount that is out of sight starts at that mount's root.
    mount = ["mount", "-t", "ramfs", "ramfs", str(tmp_path)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    descriptors = qemu.dups()
    os.close(descriptors[RAM])
    try:
        descriptors[RAM] = file_of(PAGES * PAGE)(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
    assert os.readlink(f"/proc/self/fd/{descriptors[RAM]}") == "/memfd:file"
    with pytest.raises(LinkError, match="not a memfd"):
        VmLink(decode_hello(qemu.hello.encode()), descriptors, os.getpid())


# --- RAM --------------------------------------------------------------------------------------


def read(link: VmLink, ram_offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    link.read_into(ram_offset, memoryview(buffer))
    return bytes(buffer)


def test_reads_cross_blocks(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(2, 1, 3)
    for page in range(6):
        qemu.dma(page * PAGE, bytes([page + 1]) * PAGE)
    with closing(link_to(qemu)) as link:
        assert read(link, 0, 6 * PAGE) == qemu.contents()
        assert read(link, 2 * PAGE - 1, PAGE + 2) == b"\2" + b"\3" * PAGE + b"\4"
        assert read(link, 5 * PAGE, 0) == b""


def test_reading_a_hole_gives_zeros_and_leaves_it_one(qemu: FakeQemu, link: VmLink) -> None:
    qemu.dma(PAGE, b"x" * PAGE)
    assert read(link, 0, 3 * PAGE) == bytes(PAGE) + b"x" * PAGE + bytes(PAGE)
    assert link.holes(0, PAGES) == [(0, 1), (2, PAGES)]
    qemu.touch(0)  # the control: a mapping does allocate
    assert link.holes(0, PAGES) == [(2, PAGES)]


def test_holes_are_of_the_pages_asked_for(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(4, 4)
    with closing(link_to(qemu)) as link:
        assert link.holes(0, 8) == [(0, 4), (4, 8)]
        assert link.holes(3, 5) == [(3, 4), (4, 5)]
        for page in (1, 3, 4, 7):
            qemu.dma(page * PAGE, b"x")
        assert link.holes(0, 8) == [(0, 1), (2, 3), (5, 7)]
        assert link.holes(1, 2) == []
        assert link.holes(2, 6) == [(2, 3), (5, 6)]
        assert link.holes(3, 3) == []
        for page in range(8):
            qemu.dma(page * PAGE, b"x")
        assert link.holes(0, 8) == []
        punch_hole(qemu.ram[1], 0, PAGE)
        assert link.holes(0, 8) == [(4, 5)]


@pytest.mark.parametrize(("ram_offset", "size"), [(PAGES * PAGE, 1), (63 * PAGE, PAGE + 1)])
def test_read_past_the_end_is_refused(link: VmLink, ram_offset: int, size: int) -> None:
    with pytest.raises(LinkError, match="0x40000 is outside the guest's RAM"):
        read(link, ram_offset, size)


def test_read_before_the_start_is_refused(link: VmLink) -> None:
    with pytest.raises(LinkError, match="outside the guest's RAM"):
        read(link, -PAGE, PAGE)


def test_ram_that_is_cut_short_later_is_an_error_not_a_fault(qemu: FakeQemu, link: VmLink) -> None:
    os.ftruncate(qemu.ram[0], 10 * PAGE)
    assert read(link, 0, 10 * PAGE) == bytes(10 * PAGE)
    with pytest.raises(LinkError, match="ends at offset 0xa000"):
        read(link, 9 * PAGE, 2 * PAGE)


def test_closed_link_does_nothing(qemu: FakeQemu) -> None:
    link = link_to(qemu)
    link.check_open()
    link.close()
    for use in (
        link.check_open,
        lambda: read(link, 0, PAGE),
        lambda: link.holes(0, 1),
    ):
        with pytest.raises(LinkError, match="the VM is gone"):
            use()
    assert link.pagemap is None
    assert link.store_map is None
    assert link.counters() is None


# --- the store map ----------------------------------------------------------------------------


def test_store_map_is_live_both_ways(qemu: FakeQemu, link: VmLink) -> None:
    marks = link.store_map
    assert marks is not None
    assert marks.shape == (PAGES * 64,)
    assert not marks.any()
    qemu.mark(5 * PAGE + 3 * LINE)
    assert marks.nonzero()[0].tolist() == [5 * 64 + 3]
    marks[5 * 64 + 3] = 0
    assert qemu.marks() == bytes(PAGES * 64)


def test_counters_are_summed_over_vcpus(qemu: FakeQemu, link: VmLink) -> None:
    assert link.counters() == StoreMapCounters(0, 0, 0, 0)
    qemu.set_counters(0, 1, 2, 3, 4)
    qemu.set_counters(1, 10, 20, 30, 40)
    qemu.set_counters(63, 100, 200, 300, 400)
    assert link.counters() == StoreMapCounters(111, 222, 333, 444)


def test_absurd_counters_are_only_numbers(qemu: FakeQemu, link: VmLink) -> None:
    for vcpu in range(64):
        qemu.set_counters(vcpu, *[2**64 - 1] * 4)
    counters = link.counters()
    assert counters is not None
    assert all(0 <= count < 2**64 for count in dataclasses.astuple(counters))
