# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's link: descriptors are what they are said to be, reads stay within the VM's RAM."""

from __future__ import annotations

import dataclasses
import fcntl
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
    small_hello,
)

RAM, UFFD, PAGEMAP, STORE_MAP = range(4)
PAGES = 64


def open_descriptors() -> set[str]:
    gc.collect()  # what earlier tests left to it would be closed at any moment
    # Less the one that the listing itself needed.
    return {one for one in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{one}")}


@pytest.fixture
def inline(fault_handling: None) -> Iterator[FakeQemu]:
    """A VM whose faults are served, in two blocks, with a store map."""
    with FakeQemu((PAGES // 2, PAGES // 2), faults=True) as qemu:
        yield qemu


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


def test_link_of_served_faults_has_its_userfaultfd(inline: FakeQemu, qemu: FakeQemu) -> None:
    def target(link: VmLink) -> str | None:
        if link.userfaultfd is None:
            return None
        return os.readlink(f"/proc/self/fd/{link.userfaultfd}")

    before = open_descriptors()
    link = link_to(inline)
    assert target(link) == "anon_inode:[userfaultfd]"
    assert link.pagemap is None
    assert link.store_map is not None
    link.close()
    assert target(link) is None
    assert open_descriptors() == before
    with closing(link_to(qemu)) as tracked:  # the control
        assert target(tracked) is None


@pytest.mark.parametrize("make", ["null", "pagemap"])
def test_faults_come_from_nothing_but_a_userfaultfd(
    inline: FakeQemu, tmp_path: Path, make: str
) -> None:
    other = null(tmp_path) if make == "null" else proc_file("self/pagemap")(tmp_path)
    before = open_descriptors()
    descriptors = inline.dups()
    os.dup2(other, descriptors[2])
    with pytest.raises(LinkError, match=r"should be anon_inode:\[userfaultfd\] is /"):
        VmLink(decode_hello(inline.hello.encode()), descriptors, os.getpid())
    assert open_descriptors() == before
    os.close(other)


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


def test_runs_of_data_are_what_holes_are_not(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(4, 4)
    with closing(link_to(qemu)) as link:
        assert link.runs_of_data() == []
        for page in (0, 2, 3, 4, 6):
            qemu.dma(page * PAGE, b"x")
        assert link.runs_of_data() == [(0, 1), (2, 5), (6, 7)]
        qemu.dma(7 * PAGE, b"x")
        assert link.runs_of_data() == [(0, 1), (2, 5), (6, 8)]
        for page in range(8):
            qemu.dma(page * PAGE, b"x")
        assert link.runs_of_data() == [(0, 8)]


def test_punched_pages_are_no_memory_any_more(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(4, 4)
    with closing(link_to(qemu)) as link:
        assert link.allocated_bytes() == 0
        for page in range(8):
            qemu.dma(page * PAGE, b"x")
        assert link.allocated_bytes() == 8 * PAGE
        link.punch(1, 1)
        link.punch(3, 3)  # over the blocks' border
        assert link.runs_of_data() == [(0, 1), (2, 3), (6, 8)]
        assert link.allocated_bytes() == 4 * PAGE
        assert qemu.contents()[: 4 * PAGE : PAGE] == b"x\0x\0"
        link.punch(1, 1)  # a hole stays one
        link.punch(0, 0)
        assert link.allocated_bytes() == 4 * PAGE


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (PAGES, 1), (PAGES - 1, 2)])
def test_pages_that_are_not_there_cannot_be_punched(
    qemu: FakeQemu, link: VmLink, first: int, count: int
) -> None:
    qemu.dma(0, b"x")
    with pytest.raises(LinkError, match="outside the guest's RAM"):
        link.punch(first, count)
    assert link.runs_of_data() == [(0, 1)]


def test_sealed_memory_cannot_be_punched() -> None:
    memfd = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, PAGE)
    fcntl.fcntl(memfd, 1033, 8)  # F_ADD_SEALS, F_SEAL_WRITE
    hello = decode_hello(small_hello(capabilities=0))
    with (
        closing(VmLink(hello, [memfd], os.getpid())) as link,
        pytest.raises(LinkError, match="RAM at offset 0x0 stays in memory: Operation not"),
    ):
        link.punch(0, 1)


def test_pages_and_qemus_addresses_are_each_others(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(4, 1, 3)
    with closing(link_to(qemu)) as link:
        for page in range(8):
            address = link.host_address(page)
            assert address == qemu.address(page * PAGE)
            assert link.page_of(address) == link.page_of(address + PAGE - 1) == page
        ends = [link.pages_to_block_end(page) for page in range(8)]
        assert ends == [4, 3, 2, 1, 1, 3, 2, 1]
        for page in (-1, 8):
            with pytest.raises(LinkError, match="outside the guest's RAM"):
                link.host_address(page)


def test_addresses_beside_ram_are_no_pages() -> None:
    hello = decode_hello(
        small_hello(
            capabilities=0,
            blocks=((0x7F00_0020_0000, 2 * PAGE), (0x7F00_0010_0000, PAGE)),
        )
    )
    memfds = [memfd_of(2 * PAGE)(Path()), memfd_of(PAGE)(Path())]
    with closing(VmLink(hello, memfds, os.getpid())) as link:
        assert link.page_of(0x7F00_0010_0FFF) == 2
        assert link.page_of(0x7F00_0020_1FFF) == 1
        for address in (0, 0x7F00_0010_0000 - 1, 0x7F00_0010_1000, 0x7F00_0020_2000, 2**64 - 1):
            with pytest.raises(LinkError, match=f"no guest RAM at {address:#x}"):
                link.page_of(address)


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
        link.runs_of_data,
        link.allocated_bytes,
        lambda: link.punch(0, 1),
        lambda: link.host_address(0),
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
