# SPDX-License-Identifier: GPL-2.0-or-later
"""userfaultfd: what this kernel gives, what an older one or a filter refuses, and faults served."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import pytest

from mktme.datapath import link as ram_link
from mktme.datapath import pages, uffd
from mktme.datapath.link import VmLink, decode_hello
from mktme.datapath.shadow import Track
from mktme.datapath.uffd import (
    Event,
    Fault,
    FaultServiceError,
    GuestGoneError,
    Removed,
    Userfaultfd,
    WriteTrackingError,
    open_fault_handling,
    open_write_tracking,
    register_fault_handling,
    require_fault_handling,
    require_write_tracking,
)

from ..fake_qemu import DEADLINE_S, PAGE, FakeQemu

_T = TypeVar("_T")

REPOSITORY: Final = Path(__file__).parents[3]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- tracking writes --------------------------------------------------------------------------


def test_this_kernel_tracks_writes() -> None:
    require_write_tracking()


def test_kernel_without_asynchronous_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a kernel, a feature that came later is an unknown bit: this one is unknown to all."""
    before = descriptors()
    monkeypatch.setattr(uffd, "FEATURE_WP_ASYNC", 1 << 62)
    with pytest.raises(WriteTrackingError, match="no asynchronous write tracking") as caught:
        open_write_tracking()
    assert caught.value.hint is not None
    assert "6.7" in caught.value.hint
    assert descriptors() == before


def test_kernel_without_pagemap_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ioctl that came later is an unknown number to a kernel."""
    monkeypatch.setattr(pages, "PAGEMAP_SCAN", 0xC06066FF)
    with pytest.raises(WriteTrackingError, match="no PAGEMAP_SCAN"):
        require_write_tracking()


def test_tracking_needs_no_access_to_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uffd, "DEVICE", tmp_path / "none")
    require_write_tracking()


def test_no_permission_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uffd, "DEVICE", tmp_path / "none")
    monkeypatch.setattr(uffd, "_SYSCALL_NUMBER", 1 << 20)  # fails, as under a filter
    hint = f"sudo setfacl -m u:$USER:rw {tmp_path / 'none'}"
    with pytest.raises(WriteTrackingError, match=os.strerror(errno.ENOSYS)) as caught:
        open_write_tracking()
    assert caught.value.hint == hint
    with pytest.raises(FaultServiceError, match=os.strerror(errno.ENOSYS)) as refused:
        open_fault_handling()
    assert refused.value.hint == hint


# --- what it takes to serve faults ------------------------------------------------------------


@pytest.mark.usefixtures("fault_handling")
def test_showing_that_faults_are_served_leaves_nothing() -> None:
    before = descriptors()
    require_fault_handling()
    assert descriptors() == before


@pytest.mark.usefixtures("fault_handling")
def test_kernel_that_cannot_protect_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(uffd, "FAULT_FEATURES", uffd.FAULT_FEATURES | 1 << 62)
    with pytest.raises(FaultServiceError, match="cannot write-protect shared memory") as caught:
        require_fault_handling()
    assert caught.value.hint is not None
    assert "5.19" in caught.value.hint
    assert descriptors() == before


def test_userfaultfd_that_stops_user_mode_alone_will_not_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Anyone can have one of these, and with it all tests of memory by plain accesses succeed."""
    before = descriptors()
    monkeypatch.setattr(uffd, "DEVICE", tmp_path / "none")
    monkeypatch.setattr(uffd, "_PROBE_TIMEOUT_S", 0.05)
    real = uffd._open
    monkeypatch.setattr(uffd, "_open", lambda flags: real(flags | 1))  # UFFD_USER_MODE_ONLY
    with pytest.raises(FaultServiceError, match=r"one page was read, the kernel reports \[\]"):
        require_fault_handling()
    assert descriptors() == before


def null() -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


@pytest.mark.usefixtures("fault_handling")
@pytest.mark.parametrize(
    ("make", "message"),
    [(null, "should be a userfaultfd is none"), (open_write_tracking, "features 0xb000, 0x1828")],
)
def test_other_descriptor_is_refused(make: Callable[[], int], message: str) -> None:
    descriptor = make()
    with pytest.raises(FaultServiceError, match=message):
        Userfaultfd(descriptor)
    os.close(descriptor)  # it is the caller's, still


# --- faults -----------------------------------------------------------------------------------


class Guest:
    """A fake QEMU whose threads are ours to start, and the userfaultfd that serves them."""

    def __init__(self, qemu: FakeQemu, threads: ThreadPoolExecutor) -> None:
        self.qemu = qemu
        self.uffd = Userfaultfd(qemu.descriptors[len(qemu.ram)])
        self._threads = threads

    def start(self, work: Callable[..., _T], *arguments: object) -> Future[_T]:
        return self._threads.submit(work, *arguments)

    def events(self, count: int = 1) -> list[Event]:
        """The next events; there must be that many, and no more by then."""
        poll = select.poll()
        poll.register(self.uffd.descriptor, select.POLLIN)
        events: list[Event] = []
        while len(events) < count:
            assert poll.poll(DEADLINE_S * 1000) == [(self.uffd.descriptor, select.POLLIN)]
            events += self.uffd.read()
        assert self.uffd.read() == []
        assert len(events) == count
        return events

    def address(self, page: int) -> int:
        return self.qemu.address(page * PAGE)

    def resident(self) -> list[int]:
        data = self.qemu.contents()
        return [
            page for page in range(len(data) // PAGE) if data[page * PAGE : page * PAGE + 1] > b"\0"
        ]


def waits(work: Future[_T]) -> bool:
    """Whether it still waits, when it has had time enough to go on."""
    with suppress(TimeoutError):
        work.result(0.05)
    return not work.done()


def content(byte: int, count: int = 1) -> memoryview:
    return memoryview(bytearray([byte]) * (count * PAGE))


@pytest.fixture
def guest(fault_handling: None) -> Iterator[Guest]:
    with (
        FakeQemu((64, 64), track=Track.PAGES, faults=True) as qemu,
        ThreadPoolExecutor(80) as threads,
    ):
        try:
            yield Guest(qemu, threads)
        finally:
            qemu.let_go()  # should the test have failed


def test_load_gets_what_was_put_there(guest: Guest) -> None:
    load = guest.start(guest.qemu.load, 5 * PAGE + 123, 4)
    assert guest.events() == [Fault(guest.address(5) + 123, write=False, protected=False)]
    assert waits(load)
    assert guest.uffd.copy(guest.address(5), content(7), PAGE) == PAGE
    assert load.result(DEADLINE_S) == b"\7\7\7\7"
    assert guest.qemu.load(5 * PAGE, 1) == b"\7"  # no fault: nobody serves one
    assert guest.uffd.read() == []


def test_store_says_that_it_is_one(guest: Guest) -> None:
    store = guest.start(guest.qemu.dma, 64 * PAGE, b"stored")
    assert guest.events() == [Fault(guest.address(64), write=True, protected=False)]
    assert guest.uffd.zero(guest.address(64), PAGE) == PAGE
    store.result(DEADLINE_S)
    assert guest.qemu.load(64 * PAGE, 8) == b"stored\0\0"


def test_system_calls_are_served(guest: Guest) -> None:
    received = guest.start(guest.qemu.receive, 3 * PAGE + 8, b"from a socket")
    (fault,) = guest.events()
    assert fault == Fault(guest.address(3) + 8, write=True, protected=False)
    guest.uffd.copy(guest.address(3), content(1), PAGE)
    received.result(DEADLINE_S)
    assert guest.qemu.load(3 * PAGE + 7, 15) == b"\1from a socket\1"

    where = (ctypes.c_char * PAGE).from_address(guest.address(4))
    memfd = os.memfd_create("disk", os.MFD_CLOEXEC)
    sent = guest.start(os.pwrite, memfd, where, 0)
    (fault,) = guest.events()
    assert fault == Fault(guest.address(4), write=False, protected=False)
    guest.uffd.copy(guest.address(4), content(2), PAGE)
    assert sent.result(DEADLINE_S) == PAGE
    assert os.pread(memfd, PAGE, 0) == content(2)
    os.close(memfd)


def test_whoever_waits_for_a_page_is_served_with_it(guest: Guest) -> None:
    loads = [guest.start(guest.qemu.load, 9 * PAGE + 64 * line, 1) for line in range(3)]
    faults = guest.events(3)
    assert sorted(faults) == [
        Fault(guest.address(9) + 64 * line, write=False, protected=False) for line in range(3)
    ]
    guest.uffd.copy(guest.address(9), content(5), PAGE)
    assert [load.result(DEADLINE_S) for load in loads] == [b"\5"] * 3


def test_more_faults_than_one_read_takes(guest: Guest) -> None:
    loads = [guest.start(guest.qemu.touch, page) for page in range(70)]
    faults = guest.events(70)
    assert {fault[0] for fault in faults} == {guest.address(page) for page in range(70)}
    for block in (0, 64):
        guest.uffd.copy(guest.address(block), content(6, 64), 64 * PAGE)
    assert {load.result(DEADLINE_S) for load in loads} == {6}


def test_sources_of_pages(guest: Guest) -> None:
    array = np.full((2, PAGE // 8), 0x0101010101010101, dtype=np.uint64)
    guest.uffd.copy(guest.address(0), array, 2 * PAGE)
    guest.uffd.copy(guest.address(2), array.ctypes.data, PAGE)
    guest.uffd.copy(guest.address(3), content(1), PAGE)
    assert guest.qemu.contents()[: 5 * PAGE] == bytes(content(1, 4)) + bytes(PAGE)
    with pytest.raises(ValueError, match="a buffer of 4096 bytes, 8192 to be copied"):
        guest.uffd.copy(guest.address(4), content(1), 2 * PAGE)
    with pytest.raises(ValueError, match="a buffer of 8192 bytes, 12288 to be copied"):
        guest.uffd.copy(guest.address(4), array, 3 * PAGE)
    assert guest.resident() == [0, 1, 2, 3]


def test_page_that_is_there_is_left_alone(guest: Guest) -> None:
    guest.uffd.copy(guest.address(2), content(1), PAGE)
    assert guest.uffd.copy(guest.address(2), content(9), PAGE) == 0
    assert guest.uffd.zero(guest.address(2), PAGE) == 0
    assert guest.uffd.copy(guest.address(0), content(9, 4), 4 * PAGE) == 2 * PAGE
    assert guest.uffd.zero(guest.address(1), 3 * PAGE) == 0
    assert guest.uffd.zero(guest.address(3), PAGE) == PAGE
    guest.uffd.copy(guest.address(7), content(1), PAGE)
    assert guest.uffd.zero(guest.address(4), 5 * PAGE) == 3 * PAGE
    assert guest.qemu.contents()[: 8 * PAGE : PAGE] == b"\x09\x09\x01\x00\x00\x00\x00\x01"
    assert guest.qemu.contents()[6 * PAGE : 8 * PAGE] == bytes(PAGE) + bytes(content(1))


def test_waiting_goes_on_until_woken(guest: Guest) -> None:
    loads = [guest.start(guest.qemu.touch, page) for page in range(2)]
    guest.events(2)
    guest.uffd.copy(guest.address(0), content(3), PAGE, wake=False)
    guest.uffd.zero(guest.address(1), PAGE, wake=False)
    assert guest.qemu.touch(0) == 3  # in memory, for everyone but him who waits
    assert all(waits(load) for load in loads)
    guest.uffd.wake(guest.address(0), 2 * PAGE)
    assert [load.result(DEADLINE_S) for load in loads] == [3, 0]


def test_who_is_woken_for_nothing_faults_again(guest: Guest) -> None:
    load = guest.start(guest.qemu.touch, 0)
    first = guest.events()
    guest.uffd.wake(guest.address(0), PAGE)
    assert guest.events() == first
    guest.uffd.zero(guest.address(0), PAGE)
    assert load.result(DEADLINE_S) == 0


@pytest.mark.parametrize("when", ["at once", "later"])
def test_protected_page_can_be_read_and_not_written(guest: Guest, when: str) -> None:
    guest.uffd.copy(guest.address(1), content(4, 2), 2 * PAGE, protect=when == "at once")
    if when == "later":
        guest.qemu.dma(PAGE + 10, b"\4")  # not yet
        guest.uffd.protect(guest.address(1), 2 * PAGE)
    assert guest.qemu.load(PAGE, PAGE) == content(4)
    store = guest.start(guest.qemu.dma, PAGE + 10, b"x")
    received = guest.start(guest.qemu.receive, 2 * PAGE + 10, b"x")
    assert sorted(guest.events(2)) == [
        Fault(guest.address(page) + 10, write=True, protected=True) for page in (1, 2)
    ]
    assert guest.qemu.load(PAGE, 2 * PAGE) == content(4, 2)
    guest.uffd.unprotect(guest.address(1), PAGE)
    store.result(DEADLINE_S)
    guest.uffd.unprotect(guest.address(2), PAGE, wake=False)
    assert waits(received)
    guest.uffd.wake(guest.address(2), PAGE)
    received.result(DEADLINE_S)
    assert guest.qemu.load(PAGE + 9, 3) == b"\4x\4"


def test_store_to_a_page_that_is_taken_away_waits_for_its_return(guest: Guest) -> None:
    guest.uffd.copy(guest.address(1), content(4), PAGE)
    guest.uffd.protect(guest.address(1), PAGE)
    store = guest.start(guest.qemu.dma, PAGE + 10, b"x")
    assert guest.events() == [Fault(guest.address(1) + 10, write=True, protected=True)]
    with closing(link_of(guest.qemu)) as link:
        link.punch(1, 1)
    guest.uffd.wake(guest.address(1), PAGE)
    # What was protected is gone, and the protection with it.
    assert guest.events() == [Fault(guest.address(1) + 10, write=True, protected=False)]
    guest.uffd.copy(guest.address(1), content(4), PAGE)
    store.result(DEADLINE_S)
    assert guest.qemu.load(PAGE + 9, 3) == b"\4x\4"
    guest.qemu.dma(PAGE + 11, b"y")


def link_of(qemu: FakeQemu) -> VmLink:
    return VmLink(decode_hello(qemu.hello.encode()), qemu.dups(), os.getpid())


# --- memory that is given back ----------------------------------------------------------------


def test_memory_that_is_given_back_is_announced(guest: Guest) -> None:
    guest.uffd.copy(guest.address(1), content(4, 3), 3 * PAGE)
    balloon = guest.start(guest.qemu.punch, 1, 2)
    assert guest.events() == [Removed(guest.address(1), guest.address(3))]
    balloon.result(DEADLINE_S)
    assert guest.resident() == [3]
    load = guest.start(guest.qemu.touch, 1)
    assert guest.events() == [Fault(guest.address(1), write=False, protected=False)]
    guest.uffd.zero(guest.address(1), PAGE)
    assert load.result(DEADLINE_S) == 0


@pytest.mark.parametrize("what", ["copy", "zero", "protect", "unprotect"])
def test_work_goes_on_beside_memory_that_is_given_back(guest: Guest, what: str) -> None:
    guest.uffd.copy(guest.address(0), content(4, 2), 2 * PAGE, protect=what == "unprotect")
    load = guest.start(guest.qemu.touch, 40)
    guest.events()
    balloon = guest.start(guest.qemu.punch, 1)
    poll = select.poll()
    poll.register(guest.uffd.descriptor, select.POLLIN)
    assert poll.poll(DEADLINE_S * 1000)
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: guest.uffd.copy(guest.address(40), content(8), PAGE),
        "zero": lambda: guest.uffd.zero(guest.address(40), PAGE),
        "protect": lambda: guest.uffd.protect(guest.address(0), PAGE),
        "unprotect": lambda: guest.uffd.unprotect(guest.address(0), PAGE),
    }
    works[what]()
    balloon.result(DEADLINE_S)
    # Read meanwhile, and kept: nothing is readable any more, and there is something to read.
    assert poll.poll(0) == []
    assert guest.uffd.read() == [Removed(guest.address(1), guest.address(2))]
    assert guest.uffd.read() == []
    if what not in ("copy", "zero"):
        guest.uffd.zero(guest.address(40), PAGE)
    assert load.result(DEADLINE_S) == (8 if what == "copy" else 0)


class Deaf(Userfaultfd):
    """It reads no event, so that a QEMU that gives memory back never goes on."""

    def _receive(self) -> list[Event]:
        return []


def test_qemu_that_gives_memory_back_for_ever_is_given_up(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uffd, "_SETTLE_TIMEOUT_S", 0.05)
    deaf = Deaf(guest.uffd.descriptor)
    deaf.zero(guest.address(0), PAGE)  # the control
    balloon = guest.start(guest.qemu.punch, 1)
    poll = select.poll()
    poll.register(guest.uffd.descriptor, select.POLLIN)
    assert poll.poll(DEADLINE_S * 1000)
    with pytest.raises(FaultServiceError, match=r"memory back for 0\.05 s without an end"):
        deaf.zero(guest.address(1), PAGE)
    guest.events()
    balloon.result(DEADLINE_S)


# --- ends -------------------------------------------------------------------------------------


def test_reading_never_waits(guest: Guest) -> None:
    """QEMU has copies of the descriptor, and they share how it waits."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 10):
        pytest.skip("this kernel's userfaultfd knows no RWF_NOWAIT")
    os.set_blocking(guest.qemu.descriptors[2], True)
    assert guest.uffd.read() == []
    assert os.get_blocking(guest.uffd.descriptor)
    poll = select.poll()
    poll.register(guest.uffd.descriptor, select.POLLIN)
    assert poll.poll(0) == [(guest.uffd.descriptor, select.POLLERR)]
    Userfaultfd(guest.uffd.descriptor)
    assert not os.get_blocking(guest.qemu.descriptors[2])


@pytest.mark.usefixtures("fault_handling")
def test_memory_that_is_no_more() -> None:
    descriptor = open_fault_handling()
    memory = mmap.mmap(-1, PAGE)
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    register_fault_handling(descriptor, address, PAGE)
    one = Userfaultfd(descriptor)
    del anchor
    memory.close()
    for work in (
        lambda: one.copy(address, content(1), PAGE),
        lambda: one.zero(address, PAGE),
        lambda: one.protect(address, PAGE),
        lambda: one.unprotect(address, PAGE),
    ):
        with pytest.raises(GuestGoneError, match=f"at {address:#x}: No such file"):
            work()
    os.close(descriptor)


def test_what_cannot_be_is_an_error(guest: Guest) -> None:
    for work in (
        lambda: guest.uffd.copy(guest.address(0) + 1, content(1), PAGE),
        lambda: guest.uffd.zero(guest.address(0), 1),
        lambda: guest.uffd.protect(guest.address(0) + 64, PAGE),
        lambda: guest.uffd.wake(guest.address(0), 0),
    ):
        with pytest.raises(FaultServiceError, match="Invalid argument") as caught:
            work()
        assert not isinstance(caught.value, GuestGoneError)


# --- a VM in another process ------------------------------------------------------------------


class Hammered:
    """The memory of another process's VM (`hammer.py`), whose pages go as fast as they come."""

    PAGES: Final = 16

    def __init__(self, stack: ExitStack, directory: Path, *options: str) -> None:
        path = directory / "link"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.settimeout(DEADLINE_S)
            listener.bind(str(path))
            listener.listen()
            program = "tests.unit.datapath.hammer"
            command = [sys.executable, "-m", program, str(path), str(self.PAGES), *options]
            self.process = stack.enter_context(
                subprocess.Popen(
                    command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            stack.callback(self.process.kill)
            connection, _ = listener.accept()
        self.connection = stack.enter_context(connection)
        message, fds, _, _ = socket.recv_fds(connection, 4096, 16)
        self.link = stack.enter_context(
            closing(VmLink(decode_hello(message), fds, self.process.pid))
        )
        assert self.link.userfaultfd is not None
        self.uffd = Userfaultfd(self.link.userfaultfd)
        connection.send(ram_link.encode_answer())
        self.resident: list[int] = []
        self.saved: dict[int, bytearray] = {}
        self.evictions = 0
        self._random = random.Random(1)
        self._poll = select.poll()
        self._poll.register(self.uffd.descriptor, select.POLLIN)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._poll.register(self.stdout, select.POLLIN)

    def run(self, seconds: float, *, protect: bool) -> tuple[int, int]:
        """Serve faults, and evict in between; returns what it prints: stores, and lost ones."""
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() > end:
                self.stdin.close()
            ready = [descriptor for descriptor, _ in self._poll.poll(1)]
            if self.stdout.fileno() in ready:
                stores, lost = self.stdout.readline().split()
                return int(stores), int(lost)
            for event in self.uffd.read():
                assert isinstance(event, Fault)
                self.serve(event)
            if len(self.resident) > self.PAGES // 2:
                # As often as not, the page that it is at work on.
                newest = self._random.random() < 0.5
                self.evict(-1 if newest else 0, protect=protect)

    def serve(self, fault: Fault) -> None:
        page = self.link.page_of(fault.address)
        host = self.link.host_address(page)
        if fault.protected or page in self.resident:
            self.uffd.wake(host, PAGE)
            return
        data = self.saved.get(page)
        if data is None:
            assert self.uffd.zero(host, PAGE) == PAGE
        else:
            assert self.uffd.copy(host, memoryview(data), PAGE) == PAGE
        self.resident.append(page)

    def evict(self, index: int, *, protect: bool) -> None:
        page = self.resident.pop(index)
        host = self.link.host_address(page)
        data = self.saved.setdefault(page, bytearray(PAGE))
        if protect:
            self.uffd.protect(host, PAGE)
        self.link.read_into(page * PAGE, memoryview(data))
        time.sleep(100e-6)  # encrypting, say: time for stores
        self.link.punch(page, 1)
        self.uffd.wake(host, PAGE)
        self.evictions += 1


@pytest.fixture
def hammered(fault_handling: None, tmp_path: Path) -> Iterator[Hammered]:
    with ExitStack() as stack:
        yield Hammered(stack, tmp_path)


def test_no_store_is_lost_while_pages_come_and_go(hammered: Hammered) -> None:
    stores, lost = hammered.run(1.0, protect=True)
    assert lost == 0
    assert stores > 1000
    assert hammered.evictions > 100
    assert hammered.link.allocated_bytes() == len(hammered.resident) * PAGE


def test_without_protection_stores_are_lost(hammered: Hammered) -> None:
    _stores, lost = hammered.run(1.0, protect=False)
    assert lost > 0


def test_killed_process_is_gone(hammered: Hammered) -> None:
    host = hammered.link.host_address(0)
    assert hammered.uffd.zero(host, PAGE) == PAGE
    hammered.process.kill()
    hammered.process.wait()
    for work in (
        lambda: hammered.uffd.copy(host, content(1), PAGE),
        lambda: hammered.uffd.zero(host, PAGE),
        lambda: hammered.uffd.protect(host, PAGE),
        lambda: hammered.uffd.unprotect(host, PAGE),
    ):
        with pytest.raises(GuestGoneError, match="No such process"):
            work()
    hammered.uffd.wake(host, PAGE)  # nobody
    hammered.uffd.read()
    assert hammered.link.runs_of_data() == [(0, 1)]  # what is left goes with the link


@pytest.mark.usefixtures("fault_handling")
@pytest.mark.parametrize("careless", [False, True])
def test_nobody_sees_zeros_once_the_engine_is_gone(tmp_path: Path, careless: bool) -> None:
    """QEMU keeps a userfaultfd of its own open: who needs a page waits for ever."""
    with ExitStack() as stack:
        hammered = Hammered(stack, tmp_path, *["careless"] * careless)
        poll = select.poll()
        poll.register(hammered.uffd.descriptor, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000)
        hammered.stdin.close()
        hammered.link.close()
        hammered.connection.close()
        poll = select.poll()
        poll.register(hammered.stdout, select.POLLIN)
        went_on = bool(poll.poll(DEADLINE_S * 1000 if careless else 300))
        assert went_on == careless
