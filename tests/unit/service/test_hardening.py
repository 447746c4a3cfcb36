# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits: no peer has more of the engine than its share, whatever it does or leaves undone.

Time limits are tested in an engine within this process, where they can be short; all else on one
of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from mktme.engine.dram import Dram
from mktme.engine.firmware import PlatformConfig
from mktme.service import limits, wire
from mktme.service.audit import AUDIT_FILE, AuditLog
from mktme.service.client import EngineClient, EngineProcess
from mktme.service.limits import LimitError, Rate, TokenBucket, WaitingRoom
from mktme.service.requests import Requests
from mktme.service.server import CONTROL_SOCKET, LINK_SOCKET, EngineServer
from mktme.service.wire import Role

from ..conftest import Guests, MakeQemu
from ..fake_qemu import DEADLINE_S, PAGE, Answer, FakeQemu, parse_answer, say_hello
from .conftest import CUSTODY
from .raw_client import HELLO, HELLO_OBSERVER, RawClient

LINGER_S = 60
READ = wire.frame(wire.ReadDram(address=0, size_bytes=wire.READ_MAX_BYTES))
STATUS = wire.frame(wire.GetStatus())


# --- an engine in this process ----------------------------------------------------------------


class Peer:
    """A control connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def message(self) -> wire.Reply | wire.Event | None:
        """The next one; None at the end."""
        try:
            length = int.from_bytes(await self.reader.readexactly(4), "little")
            return wire.decode_reply(await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def ask(self, request: bytes) -> wire.Reply | wire.Event | None:
        """Send a frame and get the next message."""
        self.writer.write(request)
        return await self.message()


class Serving:
    """An engine that serves as a task of this loop."""

    def __init__(
        self, run_dir: Path, server: EngineServer, task: asyncio.Task[None], starter: Peer
    ) -> None:
        self.server = server
        self.task = task
        self.starter = starter
        self._control = run_dir / CONTROL_SOCKET
        self._peers: list[Peer] = []

    async def peer(self, hello: bytes | None = HELLO) -> Peer:
        """Connect, and be welcome."""
        peer = Peer(*await asyncio.open_unix_connection(self._control))
        self._peers.append(peer)
        if hello is not None:
            assert isinstance(await peer.ask(hello), wire.Welcome)
        return peer

    async def close(self) -> None:
        for peer in (*self._peers, self.starter):
            peer.writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(run_dir: Path) -> AsyncIterator[Serving]:
    ours, theirs = socket.socketpair()
    with (
        Dram.create(run_dir / "dram.img", 8 << 20) as dram,
        AuditLog(run_dir / AUDIT_FILE) as audit,
    ):
        server = EngineServer(
            run_dir, dram, PlatformConfig(), CUSTODY, audit, shared_ownership=True
        )
        task = asyncio.create_task(server.serve(theirs))
        starter = Peer(*await asyncio.open_unix_connection(sock=ours))
        assert isinstance(await starter.ask(HELLO), wire.Welcome)
        engine = Serving(run_dir, server, task, starter)
        try:
            yield engine
        finally:
            await engine.close()
            await task


Scenario = Callable[[Serving], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[[Scenario], None]]:
    """Run a scenario against an engine in this process."""

    async def run(scenario: Scenario) -> None:
        async with asyncio.timeout(DEADLINE_S), serving(tmp_path) as engine:
            await scenario(engine)

    before = signal.getsignal(signal.SIGINT)
    yield lambda scenario: asyncio.run(run(scenario))
    signal.signal(signal.SIGINT, before)


def test_silent_connection_is_closed(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 0.01)

    async def scenario(engine: Serving) -> None:
        greeted = await engine.peer()
        silent = await engine.peer(None)
        halfway = await engine.peer(None)
        halfway.writer.write(HELLO[:7])
        assert await silent.message() is None
        assert await halfway.message() is None
        # Those that said Hello may be as silent as they like.
        for peer in (greeted, engine.starter):
            assert isinstance(await peer.ask(STATUS), wire.Status)

    play(scenario)


@pytest.mark.parametrize("size", [1, 3, 4, len(STATUS) - 1])
def test_connection_that_stops_within_a_frame_is_closed(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(limits, "FRAME_TIMEOUT_S", 0.01)

    async def scenario(engine: Serving) -> None:
        other = await engine.peer()
        halfway = await engine.peer()
        engine.starter.writer.write(STATUS[:size])
        halfway.writer.write(STATUS[:size])
        assert await halfway.message() is None
        assert isinstance(await other.ask(STATUS), wire.Status)
        # The starter may take its time: it may have been stopped.
        assert isinstance(await engine.starter.ask(STATUS[size:]), wire.Status)

    play(scenario)


def test_peer_that_does_not_read_its_answers_is_cut(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REPLY_TIMEOUT_S", 0.3)

    async def scenario(engine: Serving) -> None:
        reading = await engine.peer()
        deaf = await engine.peer()
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        deaf.writer.write(READ)
        engine.starter.reader._transport.pause_reading()  # type: ignore[attr-defined]
        engine.starter.writer.write(READ)
        while len(engine.server._clients) == 3:
            assert isinstance(await reading.ask(STATUS), wire.Status)
        deaf.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert await deaf.message() is None
        # Again, the starter may.
        engine.starter.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert isinstance(await engine.starter.message(), wire.Data)

    play(scenario)


def test_peer_that_does_not_read_its_events_is_cut(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EVENT_BUFFER_BYTES", 64 << 10)

    async def scenario(engine: Serving) -> None:
        deaf = await engine.peer(HELLO_OBSERVER)
        for one in (deaf, engine.starter):
            one.reader._transport.pause_reading()  # type: ignore[attr-defined]
        event = wire.LinkRefused(reason="x" * 1000)
        for _ in range(1000):
            engine.server._announce(event)
            await asyncio.sleep(0)
        assert len(engine.server._clients) == 1
        for one in (deaf, engine.starter):
            one.reader._transport.resume_reading()  # type: ignore[attr-defined]
        count = 0
        while await deaf.message() == event:
            count += 1
        assert 0 < count < 1000
        # The starter missed some, and is served.
        reply = await engine.starter.ask(STATUS)
        while reply == event:
            reply = await engine.starter.message()
        assert isinstance(reply, wire.Status)

    play(scenario)


def test_engine_that_ends_waits_for_nobody(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REPLY_TIMEOUT_S", "STOP_TIMEOUT_S"):
        monkeypatch.setattr(limits, name, 1000)

    async def scenario(engine: Serving) -> None:
        deaf = await engine.peer()
        for peer in (deaf, engine.starter):
            peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
        # More than a socket holds, for either.
        for _ in range(400):
            engine.server._announce(wire.LinkRefused(reason="x" * 1000))
        deaf.writer.write(READ)
        assert isinstance(await (await engine.peer()).ask(READ), wire.Data)
        assert len(engine.server._clients) == 3
        engine.starter.writer.write_eof()
        await engine.task

    play(scenario)


def test_connection_over_its_rate_waits_and_fails_nothing(
    play: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {Role.OWNER: Rate(1e6, 10**6), Role.OBSERVER: Rate(20, 5)}
    monkeypatch.setattr(limits, "REQUESTS", rates)

    async def scenario(engine: Serving) -> None:
        loop = asyncio.get_running_loop()
        busy = await engine.peer(HELLO_OBSERVER)
        start = loop.time()
        busy.writer.write(STATUS * 15)
        for number in range(15):
            # Others do not wait with it, nor for it.
            assert isinstance(await engine.starter.ask(STATUS), wire.Status)
            assert isinstance(await busy.message(), wire.Status)
            if number == 4:
                assert loop.time() - start < 0.4  # the burst, at once
        assert loop.time() - start >= 10 / 20

    play(scenario)


def test_oldest_of_too_many_silent_connections_gives_way(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(engine: Serving) -> None:
        silent = [await engine.peer(None) for _ in range(limits.WAITING_CONNECTIONS + 3)]
        await engine.peer()
        for one in silent[:3]:
            reply = await one.message()
            assert isinstance(reply, wire.Failure)
            assert (reply.error, reply.message) == (
                "LimitError",
                "too many connections that say nothing",
            )
            assert await one.message() is None
        for one in silent[4:]:  # the fourth gave way to the peer that spoke
            assert isinstance(await one.ask(HELLO), wire.Welcome)

    play(scenario)


def test_fault_of_the_engine_is_an_answer(
    play: Callable[[Scenario], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What no check foresaw is reported by its type alone, and the engine lives on."""

    async def fail(_requests: Requests, _request: wire.Command, _client: object) -> wire.Reply:
        raise ZeroDivisionError("which quotes a secret")

    async def scenario(engine: Serving) -> None:
        peer = await engine.peer()
        with monkeypatch.context() as context:
            context.setattr(Requests, "handle", fail)
            reply = await peer.ask(STATUS)
        assert reply == wire.Failure(error="InternalError", message="ZeroDivisionError")
        assert isinstance(await peer.ask(STATUS), wire.Status)

    play(scenario)
    assert "request failed: ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


def test_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    now = 0.0
    bucket = TokenBucket(Rate(10, 3), clock=lambda: now)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert [round(bucket.take(), 6) for _ in range(3)] == [0.1, 0.2, 0.3]
    now = 0.3  # when it was told to go on
    assert round(bucket.take(), 6) == 0.1
    now = 1000.0  # what was not used is not saved up beyond a burst
    assert [bucket.try_take() for _ in range(5)] == [True, True, True, False, False]
    now = 1000.15
    assert [bucket.try_take() for _ in range(2)] == [True, False]


def test_cancelled_wait_is_not_taken_for_a_full_room() -> None:
    """The engine's end cancels who waits; that is no error of theirs."""

    async def run() -> list[BaseException | None]:
        room = WaitingRoom(2)

        async def wait() -> None:
            with room.seat():
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(wait()) for _ in range(3)]
        for _ in range(3):
            await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks[:2])
        with room.seat():  # there is room again: nobody else gives way
            await asyncio.sleep(0)
        assert not tasks[2].done()
        tasks[2].cancel()
        return [error for error in await asyncio.gather(*tasks, return_exceptions=True)]

    errors = asyncio.run(run())
    assert [type(error) for error in errors] == [
        LimitError,
        asyncio.CancelledError,
        asyncio.CancelledError,
    ]


# --- an engine of its own ---------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path, tmp_path / "dram.img", 16 << 20, shared_ownership=True) as engine:
        yield engine
    assert engine.process.returncode == 0  # whatever was done to it, it ended by itself
    assert "Traceback" not in engine.log_path.read_text()


@pytest.fixture
def control(engine: EngineProcess) -> Path:
    return engine.log_path.parent / CONTROL_SOCKET


@contextlib.contextmanager
def stopped(engine: EngineProcess) -> Iterator[None]:
    """What is sent meanwhile is there all at once when the engine goes on."""
    engine.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, engine.process.pid, os.WSTOPPED)
    try:
        yield
    finally:
        engine.process.send_signal(signal.SIGCONT)


# As many as a burst lets through at once, and whose answers fit into a socket.
AHEAD = {
    "owner": (HELLO, wire.frame(wire.ReadMsr(msr=0x981)) * 2000, 2000),
    "observer": (HELLO_OBSERVER, STATUS * 100, 100),
}


@pytest.mark.parametrize(("hello", "requests", "count"), AHEAD.values(), ids=AHEAD.keys())
def test_client_that_sends_ahead_is_not_served_before_others(
    engine: EngineProcess, control: Path, hello: bytes, requests: bytes, count: int
) -> None:
    with RawClient(control) as greedy, RawClient(control) as modest:
        for one, first in ((greedy, hello), (modest, HELLO_OBSERVER)):
            one.send(first)
            assert isinstance(one.reply(), wire.Welcome)
        before = engine.client.status()
        with stopped(engine):
            greedy.send(requests)
            modest.send(STATUS)
        status = modest.reply()
        assert isinstance(status, wire.Status)
        for _ in range(count):
            assert isinstance(greedy.reply(), wire.MsrValue | wire.Status)
        after = engine.client.status()
        # Not long into the work: the engine's own time tells, not when we look.
        assert status.cpu_s - before.cpu_s < (after.cpu_s - before.cpu_s) / 3


def test_clients_beyond_the_limit_are_told_so(engine: EngineProcess, control: Path) -> None:
    with ExitStack() as stack:
        others = limits.CONTROL_CONNECTIONS - 1  # the starter is one
        clients = [stack.enter_context(EngineClient.connect(control)) for _ in range(others)]
        with RawClient(control) as late:
            late.send(HELLO)
            reply = late.reply()
            assert isinstance(reply, wire.Failure)
            assert (reply.error, reply.message) == (
                "LimitError",
                "32 control connections are open already",
            )
            assert late.answer() is None
        assert all(client.status().dram_bytes for client in [*clients, engine.client])
        clients[0].close()
        # The engine is told of that end before, or after, it is of the next connection.
        for _ in range(1000):
            with RawClient(control) as next_one:
                next_one.send(HELLO)
                if isinstance(next_one.reply(), wire.Welcome):
                    return
        raise AssertionError("no room for another")


def test_oldest_of_too_many_silent_plugins_gives_way(
    engine: EngineProcess, make_qemu: MakeQemu
) -> None:
    link_socket = engine.log_path.with_name(LINK_SOCKET)
    with ExitStack() as stack:
        silent = []
        for _ in range(limits.WAITING_CONNECTIONS * 3):
            one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(one.close)
            one.connect(str(link_socket))  # waits for its turn, as it has no timeout yet
            one.settimeout(DEADLINE_S)
            silent.append(one)
        for one in silent[: -limits.WAITING_CONNECTIONS]:
            refusal = Answer(False, "too many connections that say nothing")
            assert parse_answer(one.recv(4096)) == refusal
        qemu, _ = Guests(engine, make_qemu, stack).link()
        qemu.store(0, b"x" * PAGE)
        engine.client.flush(qemu.vm)
        assert engine.client.read(qemu.vm, 0, qemu.ram_bytes) == qemu.contents()


def test_refusals_are_not_all_told_of(engine: EngineProcess) -> None:
    """The log and the events would grow as fast as a hostile plugin can connect."""
    link_socket = engine.log_path.with_name(LINK_SOCKET)
    count = limits.REFUSALS.burst + 100
    for _ in range(count):
        with say_hello(link_socket, b"x", []) as plugin:
            assert not parse_answer(plugin.recv(4096)).accepted
    engine.client.status()  # events that came before its answer are here
    told = engine.client.events.qsize()
    assert limits.REFUSALS.burst <= told < count
    assert engine.log_path.read_text().count("refused a plugin") == told
    deadline = time.monotonic() + DEADLINE_S
    while "connections more" not in engine.log_path.read_text():  # told with the next one
        assert time.monotonic() < deadline
        with say_hello(link_socket, b"x", []) as plugin:
            plugin.recv(4096)


def test_engine_out_of_descriptors_goes_on_when_there_are_some(
    engine: EngineProcess, control: Path
) -> None:
    directory = f"/proc/{engine.process.pid}/fd"
    engine.client.status()
    _, hard = resource.prlimit(engine.process.pid, resource.RLIMIT_NOFILE)
    limit = len(os.listdir(directory)) + 8
    resource.prlimit(engine.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(control)) for _ in range(12)]
        for client in clients:
            client.send(HELLO)
        welcome = sum(isinstance(client.reply(), wire.Welcome) for client in clients[:8])
        assert welcome == 8
        deadline = time.monotonic() + DEADLINE_S
        while "cannot accept connections now" not in engine.log_path.read_text():
            assert time.monotonic() < deadline
        # Who is connected is served.
        for _ in range(500):
            clients[0].send(wire.frame(wire.ReadMsr(msr=0x981)))
            assert isinstance(clients[0].reply(), wire.MsrValue)
        for client in clients[:4]:
            client.socket.close()
        # And so are the others, as soon as it is possible.
        assert all(isinstance(client.reply(), wire.Welcome) for client in clients[8:])
    # It did not try as fast as it can, which is once for each of these requests.
    assert engine.log_path.read_text().count("cannot accept connections now") < 50


def test_engine_ends_although_a_peer_does_not_read(engine: EngineProcess, control: Path) -> None:
    with RawClient(control) as deaf:
        deaf.send(HELLO + READ * 10)
        assert isinstance(deaf.reply(), wire.Welcome)
        engine.client.status()
        engine.client.close()
        assert engine.process.wait(DEADLINE_S) == 0


# --- descriptors that take for ever to close --------------------------------------------------


# Hand a socket over whose last close(2) takes long (socket(7), SO_LINGER). In a process with one
# thread, so that nothing comes between: whoever is the last to close it waits.
HAND_OVER = """
import socket, struct, sys, time
linger_s, port, plugin, further = map(int, sys.argv[1:5])
lingering = socket.create_connection(("127.0.0.1", port))
lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger_s))
lingering.setblocking(False)
try:
    while True:
        lingering.send(bytes(65536))
except BlockingIOError:
    pass
if plugin < 0:
    plugin = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plugin.connect(sys.argv[5])
else:
    plugin = socket.socket(fileno=plugin)
time.sleep(0.01)  # to have the processor for a while then
socket.send_fds(plugin, [b"x"], [0] * further + [lingering.fileno()])
lingering.close()
"""


class Hostile:
    """Sends the engine descriptors that it cannot close."""

    def __init__(self, engine: EngineProcess, stack: ExitStack) -> None:
        self._engine = engine
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._at_rest = self._threads()

    def hand_over(self, link: socket.socket | None = None, further: int = 0) -> None:
        """Send one over a link, or in the hello of a new one, together with others."""
        numbers = [
            LINGER_S,
            self._listener.getsockname()[1],
            -1 if link is None else link.fileno(),
            further,
        ]
        command = [sys.executable, "-IS", "-c", HAND_OVER, *map(str, numbers)]
        link_socket = self._engine.client.welcome.link_socket
        # If it takes time, it was the last itself: `occupies` will tell.
        with self._slow_engine(), suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*command, link_socket],
                timeout=2,
                check=True,
                pass_fds=[] if link is None else [link.fileno()],
            )
        unread, _ = self._listener.accept()
        self._stack.callback(unread.close)

    @contextlib.contextmanager
    def _slow_engine(self) -> Iterator[None]:
        """Let the engine wake up only when the process that is started here sleeps or ends.

        On one processor, and with no right to preempt. To stop it would not do: a signal ends
        the wait for a socket.
        """
        engine = self._engine.process.pid
        processors = os.sched_getaffinity(0)
        for process in (0, engine):
            os.sched_setaffinity(process, {min(processors)})
        os.sched_setscheduler(engine, os.SCHED_BATCH, os.sched_param(0))
        try:
            yield
        finally:
            os.sched_setscheduler(engine, os.SCHED_OTHER, os.sched_param(0))
            for process in (0, engine):
                os.sched_setaffinity(process, processors)

    def occupies(self, threads: int) -> bool:
        """Whether, in the end, so many of the engine's threads wait for a socket."""
        for _ in range(20):
            self._engine.client.status()
        return self._threads() - self._at_rest >= threads

    def _threads(self) -> int:
        return len(os.listdir(f"/proc/{self._engine.process.pid}/task"))


@pytest.fixture
def hostile(engine: EngineProcess) -> Iterator[Hostile]:
    engine.client.status()  # it is up
    with ExitStack() as stack:
        yield Hostile(engine, stack)


def still_serves(engine: EngineProcess, qemu: FakeQemu) -> bool:
    """Whether the engine answers, and follows a VM, at its usual pace."""
    start = time.monotonic()
    for number in range(20):
        qemu.store(number * PAGE, os.urandom(PAGE))
        engine.client.flush(qemu.vm)
        assert engine.client.read(qemu.vm, 0, qemu.ram_bytes) == qemu.contents()
    return time.monotonic() - start < LINGER_S / 3


@pytest.mark.parametrize("when", ["in a hello", "beyond what a hello has", "never received"])
def test_descriptor_that_takes_for_ever_to_close_holds_nobody_up(
    engine: EngineProcess, make_qemu: MakeQemu, hostile: Hostile, when: str
) -> None:
    with ExitStack() as stack:
        guests = Guests(engine, make_qemu, stack)
        for _ in range(10):
            if when == "never received":
                qemu, _ = guests.link()
                hostile.hand_over(qemu.connection)
                qemu.close()
                guests.wait(wire.VmUnlinked(vm=qemu.vm))
            else:
                hostile.hand_over(further=0 if when == "in a hello" else 30)
            if hostile.occupies(1):
                break
        else:
            pytest.fail("the engine was never the last to close it")
        qemu, _ = guests.link()  # others link as before
        assert still_serves(engine, qemu)


@pytest.mark.parametrize("when", ["in a hello", "never received"])
def test_no_number_of_them_stops_what_is_linked(
    engine: EngineProcess, make_qemu: MakeQemu, hostile: Hostile, when: str
) -> None:
    with ExitStack() as stack:
        guests = Guests(engine, make_qemu, stack)
        qemu, _ = guests.link()
        places = limits.WAITING_CONNECTIONS + limits.CLOSING_CONNECTIONS
        for _ in range(3 * places):
            if hostile.occupies(places):
                break
            if when == "in a hello":
                hostile.hand_over()
            else:
                accepted, _ = guests.link()
                hostile.hand_over(accepted.connection)
                accepted.close()
                guests.wait(wire.VmUnlinked(vm=accepted.vm))
                guests.client.remove_vm(accepted.vm)
        assert "no more connections are accepted" in engine.log_path.read_text()
        hostile.hand_over()
        assert hostile.occupies(places)
        assert not hostile.occupies(places + 1)
        assert still_serves(engine, qemu)


def test_control_connections_take_no_descriptors(control: Path, engine: EngineProcess) -> None:
    with RawClient(control) as peer:
        try:
            peer.socket.setsockopt(socket.SOL_SOCKET, 83, 1)  # SO_PASSRIGHTS
        except OSError:
            pytest.skip("the kernel is older than 6.16")
        with pytest.raises(PermissionError):
            socket.send_fds(peer.socket, [HELLO], [0])
        peer.send(HELLO)
        assert isinstance(peer.reply(), wire.Welcome)
