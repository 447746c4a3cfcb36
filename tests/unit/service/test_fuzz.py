# SPDX-License-Identifier: GPL-2.0-or-later
"""Anything at all against a real engine: it answers, serves others meanwhile, and keeps nothing.

Requests are generated from their types, so that a new one is covered without a change here. A
well-behaved observer asks for the status all the time; at the end the engine must be as it was.
"""

from __future__ import annotations

import dataclasses
import os
import pty
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from mktme.datapath.shadow import Track
from mktme.datapath.uffd import open_write_tracking
from mktme.engine.keys import KeyMode
from mktme.engine.package import PowerEvent
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess
from mktme.service.server import CONTROL_SOCKET
from mktme.service.wire import Role

from ..fake_qemu import DEADLINE_S, PAGE, FakeQemu, parse_answer
from .raw_client import HELLO, HELLO_OBSERVER, RawClient, framed

VMS = [uuid.UUID(int=number) for number in range(1, 4)]
KEY = bytes(range(1, 65))
MEMORY_GROWTH_BYTES = 32 << 20
"""What an allocator may keep of what was freed; a leak of each 4 MiB answer would be far more."""

some = settings(max_examples=200, print_blob=True)
many = settings(max_examples=400, print_blob=True)


# --- requests from their types ----------------------------------------------------------------

INTEGERS = (
    st.sampled_from([0, 1, -1, PAGE, 2 << 20, wire.READ_MAX_BYTES, 2**31, 2**63 - 1, 2**64 - 1])
    | st.sampled_from([0x981, 0x982, 0x983, 0x984, 64, 192, -(2**63)])
    | st.integers(0, 64)
    | st.integers(0, 20).map(lambda pages: pages * PAGE)
    | st.integers(-(2**63), 2**64 - 1)
)
KEY_FILES: dict[str, Callable[[Path], None]] = {
    "good": lambda path: private(path, KEY[:32]),
    "for AES-256": lambda path: private(path, KEY),
    "hexadecimal": lambda path: private(path, KEY[:32].hex().encode()),
    "equal halves": lambda path: private(path, KEY[:16] * 2),
    "empty": lambda path: private(path, b""),
    "huge": lambda path: private(path, KEY * 1000),
    "readable": lambda path: private(path, KEY[:32], 0o644),
    "directory": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path, 0o600),
    "link": lambda path: path.symlink_to("good"),
    "loop": lambda path: path.symlink_to("loop"),
    "missing": lambda path: None,
}
FILE_NAMES = st.sampled_from(
    [*KEY_FILES, "good/x", "no\0name", "x" * 300, "{long}", "", "\udfff", "n\n\x1b[2J"]
)


def private(path: Path, content: bytes, mode: int = 0o600) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def strategy_of(kind: inspect.Type, name: str = "") -> st.SearchStrategy[Any]:
    """What a field of a type may be, in range and not, as MessagePack would have it."""
    match kind:
        case inspect.IntType():
            return INTEGERS
        case inspect.UUIDType():
            return st.sampled_from(VMS) | st.uuids()
        case inspect.EnumType(cls=cls):
            return st.sampled_from([one.value for one in cls])
        case inspect.BoolType():
            return st.booleans()
        case inspect.StrType() if name.endswith("_file") or name == "path":
            return FILE_NAMES.map(lambda file: f"{{files}}/{file}")
        case inspect.StrType():
            return st.text(max_size=300)
        case inspect.BytesType():
            # Fields of a structure come first, and what is reserved is zero.
            return st.binary(max_size=300) | st.binary(max_size=6).map(
                lambda b: b.ljust(192, b"\0")
            )
        case inspect.NoneType():
            return st.none()
        case inspect.VarTupleType(item_type=item):
            return st.lists(strategy_of(item, name), max_size=3)
        case inspect.UnionType(types=types):
            return st.one_of(*(strategy_of(one, name) for one in types))
        case inspect.StructType(fields=fields, tag_field=tag_field, tag=tag):
            required: dict[str, st.SearchStrategy[Any]] = {}
            optional: dict[str, st.SearchStrategy[Any]] = {}
            for field in fields:
                where = required if field.required else optional
                where[field.encode_name] = strategy_of(field.type, field.name)
            if tag_field is not None:
                required[tag_field] = st.just(tag)
            return st.fixed_dictionaries(required, optional=optional)
        case _:
            raise NotImplementedError(f"no strategy for a field of {kind}")


def strategy_of_requests() -> st.SearchStrategy[dict[str, Any]]:
    kinds = inspect.type_info(wire.Request)
    assert isinstance(kinds, inspect.UnionType)
    return st.one_of(*(strategy_of(one) for one in kinds.types))


REQUESTS = strategy_of_requests()

# So that there is something that requests can be about; refused if it is there already.
PRELUDE = [
    wire.AddVm(
        vm=vm,
        name="vm",
        memory_bytes=64 * PAGE,
        track=Track.PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
    )
    for vm in VMS[:2]
]


def test_strategy_makes_every_request() -> None:
    """The control: what is generated is mostly valid, and of each type."""
    seen: set[type] = set()

    @settings(max_examples=400, database=None)
    @given(REQUESTS)
    def collect(request: dict[str, Any]) -> None:
        with suppress(wire.ProtocolError, UnicodeEncodeError):
            seen.add(type(wire.decode_request(msgspec.msgpack.encode(request))))

    collect()
    kinds = inspect.type_info(wire.Request)
    assert isinstance(kinds, inspect.UnionType)
    assert seen == {one.cls for one in kinds.types if isinstance(one, inspect.StructType)}


# --- the engine, and what must be as before ---------------------------------------------------


def in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A request, or a part of one, with every text in it changed."""
    match value:
        case str():
            return change(value)
        case dict():
            return {name: in_texts(one, change) for name, one in value.items()}
        case list():
            return [in_texts(one, change) for one in value]
        case _:
            return value


class Target:
    """The engine under attack."""

    def __init__(self, engine: EngineProcess, files: Path) -> None:
        self.engine = engine
        self.control = engine.log_path.parent / CONTROL_SOCKET
        self._files = str(files)

    def encode(self, request: dict[str, Any]) -> bytes:
        """A request, whose files are those of this test."""
        # A lone surrogate cannot be encoded: then as it would be from elsewhere.
        return msgspec.msgpack.encode(
            in_texts(
                request,
                lambda text: (
                    text.replace("{files}", self._files)
                    .replace("{long}", "x/" * 3000)
                    .encode("utf-8", "replace")
                    .decode()
                ),
            )
        )

    def exchange(self, data: bytes) -> list[wire.Reply]:
        """Send all this, and nothing more; returns all replies."""
        with RawClient(self.control) as raw:
            with suppress(BrokenPipeError, ConnectionResetError):  # it hung up
                raw.send(data)
                raw.socket.shutdown(socket.SHUT_WR)
            replies = []
            while (reply := raw.reply()) is not None:
                check(reply)
                replies.append(reply)
        return replies

    def is_well(self) -> None:
        assert self.engine.client.status().dram_bytes == 32 << 20

    def clean(self) -> None:
        """No VM, no key."""
        self.engine.client.power(PowerEvent.POWER_CYCLE)

    def descriptors(self) -> int:
        try:
            return len(os.listdir(f"/proc/{self.engine.process.pid}/fd"))
        except PermissionError:  # for root only: the engine is not dumpable
            return 0

    def settles_at(self, descriptors: int) -> bool:
        deadline = time.monotonic() + DEADLINE_S
        # Fewer are no leak: one of them may still have been on its way out when they were counted.
        while self.descriptors() > descriptors and time.monotonic() < deadline:
            self.is_well()
        return self.descriptors() <= descriptors


def check(reply: wire.Reply) -> None:
    """Nothing is a fault of the engine's, nothing shows a key."""
    if isinstance(reply, wire.Failure):
        assert reply.error != "InternalError", reply.message
        told = f"{reply.message} {reply.hint}".encode("utf-8", "replace")
        shown = any(KEY[at : at + 8] in told for at in range(len(KEY) - 8))
        assert not shown


class Watch(threading.Thread):
    """A well-behaved observer, which takes the time."""

    def __init__(self, client: EngineClient) -> None:
        super().__init__(name="watch")
        self._client = client
        self.enough = threading.Event()
        self.answers = 0
        self.slowest_s = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        while not self.enough.wait(0.01):
            start = time.monotonic()
            try:
                self._client.status()
            except Exception as error:
                self.error = error
                return
            self.slowest_s = max(self.slowest_s, time.monotonic() - start)
            self.answers += 1


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    run_dir = tmp_path_factory.mktemp("fuzz")
    files = tmp_path_factory.mktemp("files")
    for name, make in KEY_FILES.items():
        make(files / name)
    with EngineProcess(run_dir, run_dir / "dram.img", 32 << 20, shared_ownership=True) as engine:
        target = Target(engine, files)
        # What is allocated once is there before it is measured.
        read = wire.frame(wire.ReadDram(address=0, size_bytes=wire.READ_MAX_BYTES))
        assert len(target.exchange(HELLO + read * 4)) == 5
        target.clean()
        with EngineClient.connect(target.control, Role.OBSERVER) as observer:
            before = engine.client.status().memory.anonymous
            descriptors = target.descriptors()
            watch = Watch(observer)
            watch.start()
            try:
                yield target
            finally:
                watch.enough.set()
                watch.join()
            assert watch.error is None
            assert watch.answers > 10
            assert watch.slowest_s < 5
            target.clean()
            assert target.settles_at(descriptors)
            assert engine.client.status().memory.anonymous < before + MEMORY_GROWTH_BYTES
    assert engine.process.returncode == 0
    log = engine.log_path.read_text()
    for fault in ("Traceback", "request failed", "hello failed", "exception"):
        assert fault not in log


# --- the control socket -----------------------------------------------------------------------


@many
@given(requests=st.lists(REQUESTS, min_size=1, max_size=8), role=st.sampled_from(Role))
def test_any_requests_are_answered_in_order(
    target: Target, requests: list[dict[str, Any]], role: Role
) -> None:
    target.exchange(HELLO + b"".join(map(wire.frame, PRELUDE)))
    bodies = [target.encode(request) for request in requests]
    hello = wire.frame(wire.Hello(version=wire.PROTOCOL_VERSION, role=role))
    welcome, *replies = target.exchange(hello + b"".join(map(framed, bodies)))
    assert isinstance(welcome, wire.Welcome)
    assert len(replies) == len(bodies)
    if role is Role.OBSERVER:
        for body, reply in zip(bodies, replies, strict=True):
            try:
                request = wire.decode_request(body)
            except wire.ProtocolError:
                continue
            if not isinstance(request, wire.Hello) and not role.may_send(request):
                assert isinstance(reply, wire.Failure)
                assert reply.error == "RoleError"
    target.is_well()


EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)


def damaged(data: bytes, edits: list[tuple[int, int]], end: int | None, more: bytes) -> bytes:
    result = bytearray(data[:end])
    for at, value in edits:
        if result:
            result[at % len(result)] = value
    return bytes(result) + more


@many
@given(
    request=REQUESTS,
    edits=EDITS,
    end=st.none() | st.integers(0, 200),
    more=st.binary(max_size=20),
    whole=st.booleans(),
)
def test_damaged_request_is_refused_or_done(
    target: Target,
    request: dict[str, Any],
    edits: list[tuple[int, int]],
    end: int | None,
    more: bytes,
    whole: bool,
) -> None:
    body = target.encode(request)
    if whole:  # it is the message that is damaged
        frames = framed(damaged(body, edits, end, more))
        welcome, _reply, last = target.exchange(HELLO + frames + wire.frame(wire.GetStatus()))
        assert isinstance(last, wire.Status)
    else:  # it is the stream
        welcome, *_ = target.exchange(HELLO + damaged(framed(body), edits, end, more))
    assert isinstance(welcome, wire.Welcome)
    target.is_well()


@some
@given(
    hello=st.sampled_from([b"", HELLO, HELLO_OBSERVER]),
    data=st.binary(max_size=400)
    | st.lists(st.binary(max_size=60).map(framed), max_size=8).map(b"".join),
)
def test_noise_is_survived(target: Target, hello: bytes, data: bytes) -> None:
    target.exchange(hello + data)
    target.is_well()


ENDS: dict[str, Callable[[socket.socket], None]] = {
    "closes": lambda peer: peer.close(),
    "stops sending": lambda peer: peer.shutdown(socket.SHUT_WR),
    "stops reading": lambda peer: peer.shutdown(socket.SHUT_RD),
    "stops both": lambda peer: peer.shutdown(socket.SHUT_RDWR),
    "says nothing": lambda peer: None,
}


@some
@given(
    peers=st.lists(
        st.tuples(
            st.sampled_from([HELLO, HELLO_OBSERVER, HELLO[:-1], b""]),
            st.lists(REQUESTS, max_size=4),
            st.integers(0, 300),
            st.sampled_from(list(ENDS)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_peers_may_end_at_any_point(
    target: Target, peers: list[tuple[bytes, list[dict[str, Any]], int, str]]
) -> None:
    """In the middle of a frame, and with answers that they never read."""
    with ExitStack() as stack:
        for hello, requests, end, how in peers:
            peer = stack.enter_context(RawClient(target.control)).socket
            data = hello + b"".join(framed(target.encode(one)) for one in requests)
            with suppress(BrokenPipeError, ConnectionResetError):
                peer.sendall(data[: len(data) - end] if end < len(data) else data)
            ENDS[how](peer)
        target.is_well()


# --- the plugin socket ------------------------------------------------------------------------


class Attacker:
    """A QEMU with a good hello, and all kinds of descriptors that do not belong into one."""

    def __init__(self, target: Target, stack: ExitStack) -> None:
        self.target = target
        self.qemu = stack.enter_context(FakeQemu((16,)))
        target.engine.client.add_vm(
            self.qemu.vm,
            name="vm",
            memory_bytes=self.qemu.ram_bytes,
            track=Track.STORES_AND_PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
        self.link_socket = target.engine.client.welcome.link_socket
        self._stack = stack
        self.kinds = [*self._files(), *self._memory(), *self._sockets(), *self._events()]

    def _own(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _open(self, path: str, flags: int = os.O_RDWR) -> int:
        return self._own(os.open(path, flags | os.O_CLOEXEC))

    def _files(self) -> Iterator[int]:
        for device in ("/dev/null", "/dev/zero", "/proc/self/mem"):
            yield self._open(device)
        for file in ("/", "/proc/self/maps", "/proc/self/pagemap", "/proc/1/status"):
            yield self._open(file, os.O_RDONLY)
        yield self._open("/etc", os.O_PATH)
        yield self._open("/tmp", os.O_TMPFILE | os.O_RDWR)
        yield from map(self._own, pty.openpty())

    def _memory(self) -> Iterator[int]:
        for size in (0, PAGE - 1, self.qemu.ram_bytes, 1 << 50):
            memory = self._own(os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(memory, size)
            yield memory

    def _sockets(self) -> Iterator[int]:
        open_end, peer = socket.socketpair()
        closed_end, gone = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gone.close()
        # In flight within a descriptor in flight, and itself: for the kernel to collect.
        socket.send_fds(peer, [b"x"], [open_end.fileno(), peer.fileno(), closed_end.fileno()])
        to_engine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        to_engine.connect(self.link_socket)
        to_control = socket.socket(socket.AF_UNIX)
        to_control.connect(str(self.target.control))
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for one in (open_end, peer, closed_end, to_engine, to_control, listener, datagrams):
            self._stack.callback(one.close)
            yield one.fileno()

    def _events(self) -> Iterator[int]:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        widow, closed = os.pipe2(os.O_CLOEXEC)
        os.close(closed)
        for one in (read_end, write_end, widow, os.eventfd(1), os.pidfd_open(os.getpid())):
            yield self._own(one)
        poller = self._stack.enter_context(select.epoll())
        poller.register(read_end)
        yield poller.fileno()
        yield self._own(open_write_tracking())

    def say(self, hello: bytes, descriptors: list[int]) -> bool:
        """Say a hello; it is answered, whatever it is. Returns whether it was accepted."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self.link_socket)
            connection.settimeout(DEADLINE_S)
            socket.send_fds(connection, [hello], descriptors)
            return parse_answer(connection.recv(4096)).accepted

    def may_bring(self, descriptors: list[int]) -> bool:
        """Whether this is memory and tracking of its own, if not that of its hello."""
        ram, uffd, pagemap, store_map = descriptors
        _, good_uffd, good_pagemap, good_map = self.qemu.descriptors
        return (
            os.fstat(ram).st_size == self.qemu.ram_bytes
            and name_of(ram).startswith("/memfd:")
            and name_of(uffd) == name_of(good_uffd)
            and name_of(pagemap) == name_of(good_pagemap)
            and store_map == good_map
        )


def name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


@pytest.fixture(scope="module")
def attacker(target: Target, write_tracking: None) -> Iterator[Attacker]:
    target.clean()
    at_rest = target.descriptors()
    with ExitStack() as stack:
        yield Attacker(target, stack)
    assert target.settles_at(at_rest)


DESCRIPTORS = st.lists(st.integers(0, 100), max_size=24) | st.lists(
    st.integers(0, 100), min_size=200, max_size=253
)
HELLO_FIELDS = {
    "magic": st.binary(min_size=8, max_size=8),
    "vm": st.uuids(),
    "capabilities": st.integers(0, 3) | st.integers(0, 2**16 - 1),
    "page_bytes": st.sampled_from([0, 4096, 8192, 2**32 - 1]),
    "total_bytes": st.integers(0, 2**16),
    "store_map_bytes": st.integers(0, 2**20) | st.integers(0, 2**64 - 1),
    "blocks": st.lists(
        st.tuples(
            st.integers(0, 20).map(lambda pages: pages << 12) | st.integers(0, 2**64 - 1),
            # All of them together are a segment's size.
            st.integers(0, 20).map(lambda pages: pages << 12) | st.integers(0, 2**59),
        ),
        max_size=20,
    ).map(tuple),
    "segments": st.lists(
        st.tuples(
            *[st.integers(0, 20).map(lambda pages: pages << 12) | st.integers(0, 2**64 - 1)] * 3
        ),
        max_size=20,
    ).map(tuple),
} | {
    name: st.integers(0, 20) | st.integers(0, 2**16 - 1)
    for name in (
        "version",
        "plugin_api",
        "vcpus",
        "block_count",
        "segment_count",
        "descriptor_count",
    )
}


@some
@given(
    fields=st.fixed_dictionaries({}, optional=HELLO_FIELDS),
    edits=EDITS,
    end=st.none() | st.integers(0, 200),
    more=st.binary(max_size=30),
    padding_bytes=st.just(0) | st.sampled_from([1, 2000, 9000]),
    kinds=DESCRIPTORS,
)
def test_any_hello_is_answered(
    attacker: Attacker,
    fields: dict[str, Any],
    edits: list[tuple[int, int]],
    end: int | None,
    more: bytes,
    padding_bytes: int,
    kinds: list[int],
) -> None:
    hello = dataclasses.replace(attacker.qemu.hello, **fields).encode()
    descriptors = [attacker.kinds[kind % len(attacker.kinds)] for kind in kinds]
    attacker.say(damaged(hello, edits, end, more) + bytes(padding_bytes), descriptors)
    attacker.target.is_well()


@some
@given(swaps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100)), min_size=1, max_size=4))
def test_no_other_descriptor_passes_for_a_good_one(
    attacker: Attacker, swaps: list[tuple[int, int]]
) -> None:
    descriptors = list(attacker.qemu.descriptors)
    for at, kind in swaps:
        descriptors[at] = attacker.kinds[kind % len(attacker.kinds)]
    accepted = attacker.say(attacker.qemu.hello.encode(), descriptors)
    assert not accepted or attacker.may_bring(descriptors)
    attacker.target.is_well()


def test_the_right_descriptors_are_accepted(attacker: Attacker) -> None:
    """The control for the test above. (The engine may be about to see the end of a link.)"""
    hello = attacker.qemu.hello.encode()
    assert any(attacker.say(hello, attacker.qemu.descriptors) for _ in range(1000))
