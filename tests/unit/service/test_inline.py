# SPDX-License-Identifier: GPL-2.0-or-later
"""The inline data path of a real engine: memory under real faults that is in DRAM and nowhere else.

The fake QEMU is in this process, the engine in another: whoever touches a page waits for it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import Policy
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError, ServiceError

from ..conftest import wait_event
from ..fake_qemu import LINE, PAGE, FakeQemu

PAGES = 256
WINDOW = 32


class InlineGuest:
    """A fake QEMU on the inline data path, and what its memory must hold."""

    def __init__(self, engine: EngineProcess, stack: ExitStack, track: Track | None) -> None:
        self.client = engine.client
        self.qemu = stack.enter_context(
            FakeQemu((PAGES,), track=Track.STORES if track else Track.PAGES, faults=True)
        )
        self.added = self.client.add_vm(
            self.qemu.vm,
            name="inline",
            memory_bytes=PAGES * PAGE,
            track=track,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
            datapath=DataPath.INLINE,
            window_bytes=WINDOW * PAGE,
            policy=Policy.FIFO,
        )
        stack.callback(self._forget)
        stack.callback(self.qemu.let_go)  # whoever still waits must not wait for ever
        self.qemu.link(Path(self.client.welcome.link_socket))
        self.write = self.qemu.store if track else self.qemu.dma
        self.expected = bytearray(PAGES * PAGE)

    def store(self, ram_offset: int, data: bytes) -> None:
        self.write(ram_offset, data)
        self.expected[ram_offset : ram_offset + len(data)] = data

    def paging(self) -> wire.Paging:
        (status,) = (one for one in self.client.status().vms if one.vm == self.qemu.vm)
        assert status.paging is not None
        return status.paging

    def allocated_pages(self) -> int:
        return sum(os.fstat(ram).st_blocks * 512 for ram in self.qemu.ram) // PAGE

    def _forget(self) -> None:
        with suppress(ServiceError):
            self.client.remove_vm(self.qemu.vm)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=[None, Track.STORES], ids=["no tracker", "stores"])
def guest(
    engine: EngineProcess, fault_handling: None, stack: ExitStack, request: pytest.FixtureRequest
) -> InlineGuest:
    return InlineGuest(engine, stack, request.param)


def test_memory_larger_than_the_window_holds_what_was_stored(guest: InlineGuest) -> None:
    for page in range(PAGES):
        guest.store(page * PAGE + page % 60 * LINE, os.urandom(3 * LINE))
        assert guest.allocated_pages() <= WINDOW
    for page in random.Random(1).sample(range(PAGES), PAGES):
        expected = guest.expected[page * PAGE : (page + 1) * PAGE]
        assert guest.qemu.load(page * PAGE, PAGE) == expected
    assert guest.allocated_pages() <= WINDOW
    paging = guest.paging()
    assert paging.peak_bytes <= WINDOW * PAGE
    assert paging.pages_evicted >= 2 * (PAGES - WINDOW)
    assert paging.faults + paging.pages_read_ahead >= PAGES


def test_dram_holds_it_encrypted(guest: InlineGuest) -> None:
    contents = os.urandom(PAGES * PAGE)
    for page in range(PAGES):
        guest.store(page * PAGE, contents[page * PAGE : (page + 1) * PAGE])
    guest.client.flush(guest.qemu.vm)
    assert guest.client.read(guest.qemu.vm, 0, PAGES * PAGE) == contents
    with open(guest.client.welcome.dram_path, "rb") as dram:
        stored = os.pread(dram.fileno(), PAGES * PAGE, guest.added.base)
    blocks = {contents[at : at + 16] for at in range(0, len(contents), 16)}
    assert not any(stored[at : at + 16] in blocks for at in range(0, len(stored), 16))


def test_kernel_and_devices_find_it_too(guest: InlineGuest) -> None:
    """System calls that touch memory wait as a vCPU does: DMA."""
    data = os.urandom(64 * PAGE)
    for page in range(64):
        guest.qemu.receive(page * PAGE, data[page * PAGE : (page + 1) * PAGE])
    for page in reversed(range(64)):
        assert guest.qemu.load(page * PAGE, PAGE) == data[page * PAGE : (page + 1) * PAGE]


def test_what_dram_says_is_what_the_guest_gets(guest: InlineGuest) -> None:
    """The other way round: tampering with DRAM reaches the guest, one 16-byte block of noise."""
    guest.store(0, bytes(range(256)) * 16)
    for page in range(1, WINDOW + 8):
        guest.store(page * PAGE, b"x")  # page 0 is out
    with open(guest.client.welcome.dram_path, "r+b") as dram:
        at = guest.added.base + 5 * 16
        (byte,) = os.pread(dram.fileno(), 1, at)
        os.pwrite(dram.fileno(), bytes([byte ^ 1]), at)
    found = guest.qemu.load(0, PAGE)
    assert found[5 * 16 : 6 * 16] != guest.expected[5 * 16 : 6 * 16]
    assert found[: 5 * 16] == guest.expected[: 5 * 16]
    assert found[6 * 16 :] == guest.expected[6 * 16 : PAGE]


def test_pages_given_back_are_zero(guest: InlineGuest) -> None:
    for page in range(PAGES):
        guest.store(page * PAGE, b"y" * PAGE)
    for first, count in ((PAGES - 4, 4), (0, 4)):  # in the window, and out of it
        guest.qemu.punch(first, count)
        for page in range(first, first + count):
            assert guest.qemu.load(page * PAGE, PAGE) == bytes(PAGE)
    assert guest.qemu.load(8 * PAGE, PAGE) == b"y" * PAGE
    assert guest.paging().pages_vanished >= 8


def test_two_threads_lose_nothing_between_them(guest: InlineGuest) -> None:
    """Stores that meet evictions: each thread has a line of its own in every page."""

    def write(line: int) -> None:
        for number in range(2 * PAGES):
            page = (number * 31) % PAGES
            guest.write(page * PAGE + line * LINE, number.to_bytes(8, "little") * 8)

    threads = [threading.Thread(target=write, args=(line,)) for line in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = {(number * 31) % PAGES: number for number in range(2 * PAGES)}
    for page, number in last.items():
        line = number.to_bytes(8, "little") * 8
        assert guest.qemu.load(page * PAGE + 3 * LINE, 2 * LINE) == line * 2


def test_pages_change_their_keyid_in_and_out_of_the_window(guest: InlineGuest) -> None:
    for page in range(PAGES):
        guest.store(page * PAGE, os.urandom(PAGE))
    guest.client.assign_pages(guest.qemu.vm, 0, PAGES * PAGE, 0)
    for page in range(PAGES):
        expected = guest.expected[page * PAGE : (page + 1) * PAGE]
        assert guest.qemu.load(page * PAGE, PAGE) == expected
    guest.client.flush(guest.qemu.vm)
    assert guest.client.read(guest.qemu.vm, 0, PAGES * PAGE, 0) == guest.expected


# --- fail closed ------------------------------------------------------------------------------


def waits(access: Callable[[], object]) -> threading.Thread:
    """Somebody who makes an access and, it is hoped, waits for ever."""
    thread = threading.Thread(target=access, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_nobody_goes_on_without_the_engine(
    tmp_path: Path, fault_handling: None, how: signal.Signals
) -> None:
    with ExitStack() as stack:
        engine = stack.enter_context(EngineProcess(tmp_path, tmp_path / "dram.img", 16 << 20))
        guest = InlineGuest(engine, stack, None)
        for page in range(PAGES):
            guest.store(page * PAGE, b"z" * PAGE)
        found: list[bytes] = []
        engine.process.send_signal(how)
        if how is signal.SIGKILL:
            engine.process.wait()
        thread = waits(lambda: found.append(guest.qemu.load(0, PAGE)))
        thread.join(0.5)
        assert thread.is_alive()  # it saw neither zeros nor anything else
        assert found == []
        if how is signal.SIGSTOP:
            engine.process.send_signal(signal.SIGCONT)
            thread.join()
            assert found == [b"z" * PAGE]  # and nothing was lost
        else:
            # Not even so: the plugin keeps a userfaultfd of its own. This is what it prevents.
            guest.qemu.let_go()
            thread.join()
            assert found == [bytes(PAGE)]


def test_dram_that_cannot_be_read_stops_the_guest(guest: InlineGuest) -> None:
    for page in range(PAGES):
        guest.store(page * PAGE, b"w" * PAGE)
    found: list[bytes] = []
    os.truncate(guest.client.welcome.dram_path, guest.added.base)
    try:
        thread = waits(lambda: found.append(guest.qemu.load(0, PAGE)))
        wait_event(guest.client, lambda event: event == wire.VmUnlinked(vm=guest.qemu.vm))
        assert found == []
    finally:
        os.truncate(guest.client.welcome.dram_path, guest.client.status().dram_bytes)
    guest.qemu.let_go()
    thread.join()


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"window_bytes": None}, "a window is whole pages"),
        ({"window_bytes": 100}, "a window is whole pages"),
        ({"window_bytes": 0}, "a window is whole pages"),
        ({"window_bytes": -PAGE}, "a window is whole pages"),
        ({"window_bytes": 5 * PAGE}, "no more than RAM"),
        ({"track": Track.PAGES}, "needs no page tracker"),
        ({"datapath": DataPath.SHADOW}, "has a tracker and no window"),
    ],
)
def test_what_does_not_go_together_is_refused(
    engine: EngineProcess, fields: dict[str, object], told: str
) -> None:
    client: EngineClient = engine.client
    arguments: dict[str, object] = {
        "name": "vm",
        "memory_bytes": 4 * PAGE,
        "track": None,
        "algorithm": Algorithm.AES_XTS_128,
        "mode": KeyMode.RANDOM,
        "datapath": DataPath.INLINE,
        "window_bytes": 2 * PAGE,
    }
    with pytest.raises(EngineRefusedError, match=told):
        client.add_vm(uuid.uuid4(), **{**arguments, **fields})  # type: ignore[arg-type]
    assert client.status().vms == ()


def test_plugin_without_faults_is_refused(
    engine: EngineProcess, write_tracking: None, stack: ExitStack
) -> None:
    """A QEMU that was told shadow, for a VM that is announced as inline."""
    qemu = stack.enter_context(FakeQemu((4,)))
    engine.client.add_vm(
        qemu.vm,
        name="vm",
        memory_bytes=4 * PAGE,
        track=None,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
        datapath=DataPath.INLINE,
        window_bytes=PAGE,
    )
    stack.callback(engine.client.remove_vm, qemu.vm)
    answer = qemu.connect(Path(engine.client.welcome.link_socket))
    assert not answer.accepted
    assert "brought no userfaultfd" in answer.reason
