# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin socket of a real engine: what follows a good hello, and what a bad one gets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from mktme.datapath import link as ram_link
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import ShadowDataPath, Track
from mktme.engine.dram import Dram, Region
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import limits, wire
from mktme.service.audit import AUDIT_FILE, AuditLog
from mktme.service.client import EngineProcess, EngineRefusedError
from mktme.service.drains import Drains
from mktme.service.server import LINK_SOCKET, EngineServer
from mktme.service.vms import Vm

from .. import fake_qemu
from ..conftest import Guests, MakeQemu, wait_event
from ..fake_qemu import DEADLINE_S, PAGE, Answer, FakeQemu, HelloFields, parse_answer, say_hello
from .conftest import CUSTODY

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")


class Descriptors:
    """How many descriptors the engine has open beyond those of an engine without VMs."""

    def __init__(self, engine: EngineProcess) -> None:
        self._client = engine.client
        self._directory = f"/proc/{engine.process.pid}/fd"
        self._client.status()  # it is up
        self._at_rest = len(os.listdir(self._directory))

    def __call__(self) -> int:
        return len(os.listdir(self._directory)) - self._at_rest

    def settle_at(self, count: int) -> bool:
        """Wait until there are `count`: what was cancelled ends a few turns of its loop later."""
        for _ in range(2000):
            if self() == count:
                return True
            self._client.status()
        return False


@pytest.fixture(scope="module")
def descriptors(engine: EngineProcess) -> Descriptors:
    return Descriptors(engine)


def ends(connection: socket.socket) -> bool:
    """Wait for the engine to hang up."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# --- a good hello -----------------------------------------------------------------------------


@pytest.mark.parametrize("track", list(Track))
def test_dram_is_the_linked_memory_after_a_flush(guests: Guests, track: Track) -> None:
    qemu, _ = guests.link(40, 24, track=track)
    write = qemu.store if track.stores else qemu.dma
    for round_ in range(3):
        write(round_ * PAGE + 33, os.urandom(9000))
        write(40 * PAGE - 5, b"across the blocks"[:5])
        guests.client.flush(qemu.vm)
        assert guests.read(qemu) == qemu.contents()


def test_engine_follows_without_being_asked(guests: Guests) -> None:
    qemu, _ = guests.link()
    qemu.store(0, b"x" * PAGE)
    qemu.dma(PAGE, b"y" * PAGE)
    deadline = time.monotonic() + DEADLINE_S
    while guests.read(qemu) != qemu.contents():
        assert time.monotonic() < deadline


def test_events_tell_of_link_and_end(guests: Guests) -> None:
    qemu, _ = guests.link()
    guests.wait(wire.VmLinked(vm=qemu.vm))
    qemu.close()
    guests.wait(wire.VmUnlinked(vm=qemu.vm))
    status = guests.status(qemu)
    assert (status.linked, status.qemu_pid, status.traffic) == (False, None, None)


def test_removing_a_vm_ends_its_link(guests: Guests, descriptors: Descriptors) -> None:
    qemu, _ = guests.link()
    # Its connection, four of its hello, and one that Python's mmap keeps of the store map.
    assert descriptors.settle_at(6)
    guests.client.remove_vm(qemu.vm)
    assert ends(qemu.connection)
    guests.wait(wire.VmUnlinked(vm=qemu.vm))
    assert descriptors.settle_at(0)


def test_whatever_a_plugin_says_later_ends_its_link(guests: Guests) -> None:
    qemu, _ = guests.link()
    qemu.connection.send(qemu.hello.encode())
    assert ends(qemu.connection)
    guests.wait(wire.VmUnlinked(vm=qemu.vm))


def test_killed_qemu_is_unlinked(guests: Guests, descriptors: Descriptors) -> None:
    vm = uuid.uuid4()
    guests.client.add_vm(
        vm,
        name="vm",
        memory_bytes=16 * PAGE,
        track=Track.STORES_AND_PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
    )
    canary = os.urandom(PAGE)
    arguments = [str(guests.link_socket), str(vm), "16", canary.hex()]
    with subprocess.Popen(
        [sys.executable, fake_qemu.__file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"linked\n"
        guests.client.flush(vm)
        (status,) = (one for one in guests.client.status().vms if one.vm == vm)
        assert status.qemu_pid == process.pid
        process.send_signal(signal.SIGKILL)
    guests.wait(wire.VmUnlinked(vm=vm))
    assert descriptors.settle_at(0)
    # What it had written by then is still there.
    assert guests.client.read(vm, 3 * PAGE, PAGE) == canary
    guests.client.remove_vm(vm)


def test_vm_that_cannot_be_followed_any_more_is_cut_off(guests: Guests) -> None:
    """Fail closed: its plugin stops QEMU then. Other VMs are none the worse."""
    other, _ = guests.link()
    qemu, _ = guests.link(track=Track.STORES)
    os.ftruncate(qemu.ram[0], PAGE)
    qemu.mark(50 * PAGE)
    assert ends(qemu.connection)
    event = wait_event(guests.client, lambda event: isinstance(event, wire.VmFault))
    assert isinstance(event, wire.VmFault)
    assert event.vm == qemu.vm
    assert "LinkError: guest RAM ends at offset 0x32000" in event.message
    guests.wait(wire.VmUnlinked(vm=qemu.vm))
    assert guests.status(qemu).fault == event.message
    other.store(0, b"x" * PAGE)
    guests.client.flush(other.vm)
    assert guests.read(other) == other.contents()


def test_vms_do_not_read_each_other(guests: Guests) -> None:
    secret = os.urandom(PAGE)
    one, first = guests.link()
    two, second = guests.link()
    for qemu in (one, two):
        qemu.store(5 * PAGE, secret)
        guests.client.flush(qemu.vm)
    for qemu, own, other in ((one, first, second), (two, second, first)):
        for keyid in (None, own.keyid):
            assert guests.client.read(qemu.vm, 5 * PAGE, PAGE, keyid) == secret
        for keyid in (0, other.keyid, 63):
            wrong = guests.client.read(qemu.vm, 5 * PAGE, PAGE, keyid)
            assert not any(wrong[at : at + 8] in secret for at in range(PAGE - 8))


def test_without_encryption_dram_holds_plaintext(guests: Guests) -> None:
    """The control for every claim about ciphertext."""
    data = os.urandom(PAGE)
    clear, at_clear = guests.link(mode=KeyMode.NO_ENCRYPT)
    hidden, at_hidden = guests.link(mode=KeyMode.RANDOM)
    for qemu in (clear, hidden):
        qemu.store(7 * PAGE, data)
        guests.client.flush(qemu.vm)
        assert guests.read(qemu) == qemu.contents()
    with open(guests.client.welcome.dram_path, "rb") as dram:
        assert os.pread(dram.fileno(), PAGE, at_clear.base + 7 * PAGE) == data
        stored = os.pread(dram.fileno(), PAGE, at_hidden.base + 7 * PAGE)
    assert not any(stored[at : at + 8] in data for at in range(PAGE - 8))


def test_next_vm_of_a_region_sees_nothing_of_the_last(guests: Guests) -> None:
    data = os.urandom(PAGE)
    qemu, added = guests.link(mode=KeyMode.NO_ENCRYPT)
    qemu.store(0, data)
    guests.client.flush(qemu.vm)
    guests.client.remove_vm(qemu.vm)
    heir, inherited = guests.link(mode=KeyMode.NO_ENCRYPT)
    assert inherited == added
    assert guests.read(heir) == bytes(heir.ram_bytes)


def test_vm_that_links_again_starts_anew(guests: Guests, make_qemu: MakeQemu) -> None:
    first, _ = guests.link()
    first.store(5 * PAGE, os.urandom(PAGE))
    guests.client.flush(first.vm)
    first.close()
    guests.wait(wire.VmUnlinked(vm=first.vm))
    second = make_qemu()
    second.hello = dataclasses.replace(second.hello, vm=first.vm)
    second.link(guests.link_socket)
    second.store(7 * PAGE, os.urandom(PAGE))
    guests.client.flush(first.vm)
    assert guests.client.read(first.vm, 0, second.ram_bytes) == second.contents()


# --- DRAM that is full ------------------------------------------------------------------------


@needs_root
def test_full_dram_is_told_and_caught_up_with(tmp_path: Path, make_qemu: MakeQemu) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    tmpfs = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    subprocess.run(tmpfs, check=True)
    try:
        with (
            EngineProcess(tmp_path, disk / "dram.img", 8 << 20) as engine,
            contextlib.ExitStack() as stack,
        ):
            guests = Guests(engine, make_qemu, stack)
            qemu, _ = guests.link()
            qemu.store(0, os.urandom(8 * PAGE))
            guests.client.flush(qemu.vm)
            qemu.store(8 * PAGE, os.urandom(56 * PAGE))
            event = wait_event(guests.client, lambda event: isinstance(event, wire.DramFull))
            assert isinstance(event, wire.DramFull)
            assert "No space left on device" in event.message
            assert guests.status(qemu).fault == event.message
            with pytest.raises(EngineRefusedError, match="No space left on device") as caught:
                guests.client.flush(qemu.vm)
            assert caught.value.error == "DramFullError"
            assert "make space" in str(caught.value.hint)
            assert guests.client.read(qemu.vm, 0, 8 * PAGE) == qemu.contents()[: 8 * PAGE]
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
            guests.wait(wire.DramCaughtUp(vm=qemu.vm))
            assert guests.status(qemu).fault is None
            guests.client.flush(qemu.vm)
            assert guests.read(qemu) == qemu.contents()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- a bad hello ------------------------------------------------------------------------------


class Hostile:
    """Says bad hellos for a VM that was announced; the engine must be as before after each."""

    def __init__(self, guests: Guests, qemu: FakeQemu) -> None:
        self.guests = guests
        self.qemu = qemu

    def say(self, hello: bytes, descriptors: Sequence[int]) -> str:
        """Returns the reason of the refusal."""
        with say_hello(self.guests.link_socket, hello, descriptors) as connection:
            answer = parse_answer(connection.recv(4096))
            assert ends(connection)
        assert not answer.accepted
        self.guests.wait(wire.LinkRefused(reason=answer.reason))
        return answer.reason


@pytest.fixture
def hostile(guests: Guests, descriptors: Descriptors, qemu: FakeQemu) -> Iterator[Hostile]:
    guests.announce(qemu)
    yield Hostile(guests, qemu)
    assert descriptors.settle_at(0)
    assert not guests.status(qemu).linked
    # And the right one is still welcome.
    qemu.link(guests.link_socket)
    qemu.store(0, b"x" * PAGE)
    guests.client.flush(qemu.vm)
    assert guests.read(qemu) == qemu.contents()


@pytest.mark.parametrize(
    "hello",
    [b"x", bytes(64), b"MKTMELNK" + bytes(56), os.urandom(600), HelloFields().encode()[:-1]],
    ids=["short", "zeros", "its magic", "noise", "cut"],
)
@pytest.mark.parametrize("count", [0, 4])
def test_garbage_is_refused(hostile: Hostile, hello: bytes, count: int) -> None:
    reason = hostile.say(hello, hostile.qemu.descriptors[:count])
    assert "hello" in reason or "link protocol 0" in reason


def test_hello_of_an_unknown_vm_is_refused(hostile: Hostile) -> None:
    stranger = dataclasses.replace(hostile.qemu.hello, vm=uuid.uuid4())
    reason = hostile.say(stranger.encode(), hostile.qemu.descriptors)
    assert reason == f"no VM {stranger.vm} was announced to this engine"


def test_oversize_hello_is_refused(hostile: Hostile) -> None:
    for size in (ram_link.HELLO_MAX_BYTES + 1, 100_000):
        hello = hostile.qemu.hello.encode()
        reason = hostile.say(hello + bytes(size - len(hello)), hostile.qemu.descriptors)
        assert "hello" in reason


@pytest.mark.parametrize("count", [0, 1, 3])
def test_missing_descriptors_are_refused(hostile: Hostile, count: int) -> None:
    reason = hostile.say(hostile.qemu.hello.encode(), hostile.qemu.descriptors[:count])
    assert reason == f"{count} descriptors came, 4 were announced"


@pytest.mark.parametrize("count", [5, 20, 21, 253])  # 253: the most that one message can have
def test_too_many_descriptors_are_refused(hostile: Hostile, count: int) -> None:
    descriptors = (hostile.qemu.descriptors * 64)[:count]
    reason = hostile.say(hostile.qemu.hello.encode(), descriptors)
    expected = "more bytes or descriptors" if count > 20 else f"{count} descriptors came, 4 were"
    assert expected in reason


def test_swapped_descriptors_are_refused(hostile: Hostile) -> None:
    ram, uffd, pagemap, store_map = hostile.qemu.descriptors
    hello = hostile.qemu.hello.encode()
    for swapped, what in (
        ([store_map, uffd, pagemap, ram], "bytes has"),
        ([uffd, ram, pagemap, store_map], "not a memfd"),
        ([ram, pagemap, uffd, store_map], "userfaultfd"),
        ([ram, uffd, ram, store_map], "pagemap"),
        ([ram, uffd, pagemap, ram], "announced size"),
    ):
        assert what in hostile.say(hello, swapped)


def test_other_ram_than_announced_is_refused(hostile: Hostile, make_qemu: MakeQemu) -> None:
    larger = make_qemu(65)
    hello = dataclasses.replace(larger.hello, vm=hostile.qemu.vm)
    reason = hostile.say(hello.encode(), larger.descriptors)
    assert "has 266240 bytes of RAM, 262144 were announced" in reason


def test_trackers_must_be_those_of_the_vm(hostile: Hostile, make_qemu: MakeQemu) -> None:
    for track, missing in ((Track.STORES, "pagemap"), (Track.PAGES, "store map")):
        half = make_qemu(track=track)
        hello = dataclasses.replace(half.hello, vm=hostile.qemu.vm)
        reason = hostile.say(hello.encode(), half.descriptors)
        assert f"the plugin brought no {missing}" in reason


def test_pagemap_of_another_process_is_refused(hostile: Hostile) -> None:
    ram, uffd, _, store_map = hostile.qemu.descriptors
    with (
        subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process,
        open(f"/proc/{process.pid}/pagemap", "rb") as other,
    ):
        swapped = [ram, uffd, other.fileno(), store_map]
        reason = hostile.say(hostile.qemu.hello.encode(), swapped)
    assert f"/proc/{process.pid}/pagemap" in reason


def test_connection_without_a_hello_is_let_go(hostile: Hostile) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(hostile.guests.link_socket))
    hostile.guests.wait(wire.LinkRefused(reason="hello of 0 bytes is shorter than its header"))


def test_peer_that_leaves_before_its_answer_is_let_go(hostile: Hostile) -> None:
    """Its hello is good, and may be accepted before the engine sees that nobody is there."""
    qemu = hostile.qemu
    for _ in range(10):
        say_hello(hostile.guests.link_socket, qemu.hello.encode(), qemu.descriptors).close()
        wait_event(
            hostile.guests.client,
            lambda event: (
                isinstance(event, wire.LinkRefused) or event == wire.VmUnlinked(vm=qemu.vm)
            ),
        )


def test_silent_peers_hold_nobody_up(hostile: Hostile, guests: Guests) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(10)]
    try:
        for connection in silent:
            connection.connect(str(guests.link_socket))
        other, _ = guests.link()
        other.store(0, b"x" * PAGE)
        guests.client.flush(other.vm)
        assert guests.read(other) == other.contents()
        guests.client.remove_vm(other.vm)
    finally:
        for connection in silent:
            connection.close()
    for _ in silent:
        hostile.guests.wait(wire.LinkRefused(reason="hello of 0 bytes is shorter than its header"))


def test_second_hello_of_a_linked_vm_is_refused(guests: Guests, descriptors: Descriptors) -> None:
    qemu, _ = guests.link()
    assert descriptors.settle_at(6)
    again = say_hello(guests.link_socket, qemu.hello.encode(), qemu.descriptors)
    with again:
        assert parse_answer(again.recv(4096)) == Answer(False, f"VM {qemu.vm} is linked already")
        assert ends(again)
    assert guests.status(qemu).linked
    qemu.store(0, b"x" * PAGE)
    guests.client.flush(qemu.vm)
    assert guests.read(qemu) == qemu.contents()
    assert descriptors.settle_at(6)


def test_hello_for_another_engines_vm_is_refused(
    guests: Guests, tmp_path: Path, qemu: FakeQemu
) -> None:
    """Two platforms side by side know nothing of each other."""
    with EngineProcess(tmp_path, tmp_path / "dram.img", 8 << 20) as other:
        guests.announce(qemu)
        assert not qemu.connect(Path(other.client.welcome.link_socket)).accepted
        qemu.link(guests.link_socket)


def test_silence_ends_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 0.01)

    async def stay_silent() -> bytes:
        owner, theirs = socket.socketpair()
        with (
            Dram.create(tmp_path / "dram.img", PAGE) as dram,
            AuditLog(tmp_path / AUDIT_FILE) as audit,
            owner,
        ):
            engine = EngineServer(tmp_path, dram, PlatformConfig(), CUSTODY, audit)
            serving = asyncio.create_task(engine.serve(theirs))
            loop = asyncio.get_running_loop()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as plugin:
                plugin.setblocking(False)
                while not (tmp_path / LINK_SOCKET).exists():
                    await asyncio.sleep(0)
                await loop.sock_connect(plugin, str(tmp_path / LINK_SOCKET))
                answer = await loop.sock_recv(plugin, 4096)
            owner.shutdown(socket.SHUT_RDWR)
            await serving
            return answer

    before = signal.getsignal(signal.SIGINT)
    try:
        answer = asyncio.run(asyncio.wait_for(stay_silent(), DEADLINE_S))
    finally:
        signal.signal(signal.SIGINT, before)
    assert parse_answer(answer) == Answer(False, "no hello came in time")


class Endless:
    """A data path with work for ever, or until it is told."""

    enough = False

    def drain(self) -> Iterator[int]:
        while not self.enough:
            yield 1


def test_drain_gives_way_after_each_batch() -> None:
    """Else one busy VM would keep the engine from all others, and from its owner."""

    async def drain_and_stop() -> int:
        path = Endless()
        vm = Vm(
            uuid=uuid.uuid4(),
            name="vm",
            memory_bytes=PAGE,
            datapath=DataPath.SHADOW,
            track=Track.PAGES,
            keyid=1,
            region=Region(0, PAGE),
            path=cast("ShadowDataPath", path),
        )
        drains = Drains(announce=lambda _event: None)
        draining = asyncio.create_task(drains.run(vm, lambda path: path.drain()))
        for _ in range(10):
            await asyncio.sleep(0)
        path.enough = True
        return await draining

    assert asyncio.run(drain_and_stop()) >= 5


def test_qemu_that_ends_is_not_cut_off() -> None:
    """Its memory goes before its sockets: a scan that comes between finds no process."""

    class Path:
        def drain(self) -> Iterator[int]:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    vm = Vm(
        uuid=uuid.uuid4(),
        name="vm",
        memory_bytes=PAGE,
        datapath=DataPath.SHADOW,
        track=Track.PAGES,
        keyid=1,
        region=Region(0, PAGE),
        path=cast("ShadowDataPath", Path()),
    )
    told: list[wire.Event] = []
    asyncio.run(Drains(told.append).follow(vm))
    assert (vm.fault, told) == (None, [])
