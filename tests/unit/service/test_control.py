# SPDX-License-Identifier: GPL-2.0-or-later
"""Control clients of a real engine: what they get, what they are refused, and who is let in."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from mktme.datapath.shadow import Track
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.sidecar import PageRange, read_sidecar
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import (
    EngineClient,
    EngineGoneError,
    EngineProcess,
    EngineRefusedError,
    ServiceError,
)
from mktme.service.peer import credentials
from mktme.service.server import CONTROL_SOCKET, LINK_SOCKET

from ..conftest import DRAM_BYTES, Guests
from ..fake_qemu import DEADLINE_S, LINE, PAGE
from .raw_client import HELLO, HELLO_OBSERVER, RawClient, framed

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


@pytest.fixture(scope="module")
def engine(shared_engine: EngineProcess) -> EngineProcess:
    return shared_engine


@pytest.fixture
def client(engine: EngineProcess) -> EngineClient:
    return engine.client


@pytest.fixture
def control(engine: EngineProcess) -> Path:
    return engine.log_path.parent / CONTROL_SOCKET


@pytest.fixture
def raw(control: Path) -> Iterator[RawClient]:
    with RawClient(control) as raw:
        yield raw


def add(client: EngineClient, vm: uuid.UUID, memory_bytes: int = 16 * PAGE) -> wire.VmAdded:
    return client.add_vm(
        vm,
        name="vm",
        memory_bytes=memory_bytes,
        track=Track.PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
    )


@pytest.fixture
def vm(client: EngineClient) -> Iterator[uuid.UUID]:
    """Announced, not linked, of 16 pages."""
    vm = uuid.uuid4()
    add(client, vm)
    yield vm
    client.remove_vm(vm)


# --- who is let in ----------------------------------------------------------------------------


def test_sockets_are_the_owners_only(control: Path) -> None:
    for path in (control, control.with_name(LINK_SOCKET)):
        status = path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_uid == os.geteuid()


def test_peer_is_who_the_kernel_says() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert credentials(ours) == (os.getpid(), os.getuid(), os.getgid())


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that everybody may enter: only the check of the peer is left."""
    with tempfile.TemporaryDirectory(prefix="mktme-test-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


# Connect as another user, with no library but Python's own, and print the answer.
STRANGER = """
import socket, sys
with socket.socket(socket.AF_UNIX, getattr(socket, sys.argv[2])) as peer:
    peer.settimeout(20)
    peer.connect(sys.argv[1])
    try:
        peer.send(bytes.fromhex(sys.argv[3]))
        print(peer.recv(4096).hex())
    except ConnectionError:
        print()
"""


def as_user(user: int, path: Path, kind: str, message: bytes) -> bytes:
    command = ["/usr/bin/python3", "-c", STRANGER, str(path), kind, message.hex()]
    answer = subprocess.run(
        command, user=user, group=user, extra_groups=[], cwd="/", check=True, stdout=subprocess.PIPE
    )
    return bytes.fromhex(answer.stdout.decode())


@needs_root
def test_other_users_are_refused(open_to_all: Path) -> None:
    dram = open_to_all / "dram.img"
    with EngineProcess(open_to_all, dram, 64 << 20) as engine:
        control, link = open_to_all / CONTROL_SOCKET, open_to_all / LINK_SOCKET
        for path in (control, link):
            with pytest.raises(subprocess.CalledProcessError):  # by the sockets' modes
                as_user(NOBODY, path, "SOCK_STREAM", HELLO)
            path.chmod(0o666)
        assert as_user(NOBODY, control, "SOCK_STREAM", HELLO_OBSERVER) == b""
        assert b"user 65534 may not connect" in as_user(NOBODY, link, "SOCK_SEQPACKET", b"x")
        # The control: root, in the same way, gets an answer.
        assert b"Welcome" in as_user(0, control, "SOCK_STREAM", HELLO_OBSERVER)
        assert b"shorter than its header" in as_user(0, link, "SOCK_SEQPACKET", b"x")
        assert engine.client.status().vms == ()
        log = engine.log_path.read_text()
    assert "refused a connection of process" in log
    assert "user 65534" in log
    assert stat.S_IMODE(dram.stat().st_mode) == 0o600


@needs_root
@pytest.mark.parametrize("shared", [False, True])
def test_users_that_the_owner_names_may_link_and_no_more(open_to_all: Path, shared: bool) -> None:
    dram = open_to_all / "dram.img"
    with EngineProcess(open_to_all, dram, 64 << 20, peer_uids=(NOBODY,), shared_ownership=shared):
        control, link = open_to_all / CONTROL_SOCKET, open_to_all / LINK_SOCKET
        for path in (control, link):
            path.chmod(0o666)
        assert b"shorter than its header" in as_user(NOBODY, link, "SOCK_SEQPACKET", b"x")
        answer = as_user(NOBODY - 1, link, "SOCK_SEQPACKET", b"x")
        assert b"user 65533 may not connect" in answer
        for hello in (HELLO, HELLO_OBSERVER):
            assert as_user(NOBODY, control, "SOCK_STREAM", hello) == b""
        assert b"Welcome" in as_user(0, control, "SOCK_STREAM", HELLO_OBSERVER)


# --- the protocol -----------------------------------------------------------------------------


def test_hello_is_answered(raw: RawClient, engine: EngineProcess, control: Path) -> None:
    raw.send(HELLO)
    assert raw.answer() == wire.Welcome(
        version=5,
        role=wire.Role.OWNER,
        engine_pid=engine.process.pid,
        dram_path=str(control.with_name("dram.img")),
        link_socket=str(control.with_name(LINK_SOCKET)),
        mktme_version=metadata.version("mktme"),
        link_version=1,
    )


def test_hello_must_come_first(raw: RawClient) -> None:
    raw.send(wire.frame(wire.GetStatus()))
    answer = raw.reply()
    assert isinstance(answer, wire.Failure)
    assert "Hello" in answer.message
    assert raw.answer() is None


def test_events_are_for_clients_that_said_hello(
    raw: RawClient, control: Path, guests: Guests
) -> None:
    with RawClient(control) as greeted:
        greeted.send(HELLO)
        assert isinstance(greeted.answer(), wire.Welcome)
        qemu, _ = guests.link()
        assert greeted.answer() == wire.VmLinked(vm=qemu.vm)
    raw.send(HELLO)
    assert isinstance(raw.answer(), wire.Welcome)


@pytest.mark.parametrize("version", [0, 4, 6, -1, 2**63])
def test_another_version_is_refused(raw: RawClient, version: int) -> None:
    raw.send(wire.frame(wire.Hello(version=version)))
    answer = raw.reply()
    assert isinstance(answer, wire.Failure)
    assert f"speaks protocol 5, not {version}" in answer.message
    assert raw.answer() is None


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "a reply": wire.frame(wire.Done())[4:],
    "deep nesting": b"\x82\xa1x" + b"\x91" * 60_000 + b"\xc0\xa4type\xa9GetStatus",
    "a type that is not UTF-8": b"\x81\xa4type\xa1\x80",
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("greeted", [False, True])
def test_garbage_is_refused_and_a_greeted_client_may_go_on(
    raw: RawClient, body: bytes, greeted: bool
) -> None:
    if greeted:
        raw.send(HELLO)
        assert isinstance(raw.reply(), wire.Welcome)
    raw.send(framed(body))
    answer = raw.reply()
    assert isinstance(answer, wire.Failure)
    assert answer.error == "ProtocolError"
    if greeted:
        raw.send(wire.frame(wire.GetStatus()))
        assert isinstance(raw.reply(), wire.Status)
    else:
        assert raw.answer() is None


@pytest.mark.parametrize("length", [wire.REQUEST_MAX_BYTES + 1, 2**31, 2**32 - 1])
def test_frame_over_the_limit_ends_the_connection(raw: RawClient, length: int) -> None:
    raw.send(HELLO + length.to_bytes(4, "little") + b"x" * 1000)
    assert isinstance(raw.reply(), wire.Welcome)
    assert raw.answer() is None


def test_frame_at_the_limit_is_read(raw: RawClient) -> None:
    raw.send(HELLO + framed(bytes(wire.REQUEST_MAX_BYTES)))
    assert isinstance(raw.reply(), wire.Welcome)
    assert isinstance(raw.reply(), wire.Failure)


def test_requests_may_be_sent_ahead(raw: RawClient, vm: uuid.UUID) -> None:
    requests = [wire.GetStatus(), wire.ReadVm(vm=vm, ram_offset=0, size_bytes=PAGE)] * 50
    raw.send(HELLO + b"".join(map(wire.frame, requests)))
    assert isinstance(raw.reply(), wire.Welcome)
    for request in requests:
        expected = wire.Status if isinstance(request, wire.GetStatus) else wire.Data
        assert isinstance(raw.reply(), expected)


def test_frame_in_pieces_is_put_together(raw: RawClient) -> None:
    raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for byte in HELLO:
        raw.send(bytes([byte]))
    assert isinstance(raw.reply(), wire.Welcome)


@pytest.mark.parametrize("size", [1, 3, 4, len(HELLO) - 1])
def test_half_a_frame_and_silence_hold_nobody_up(
    raw: RawClient, client: EngineClient, size: int
) -> None:
    raw.send(HELLO[:size])
    assert client.status().dram_bytes == DRAM_BYTES
    raw.socket.shutdown(socket.SHUT_WR)
    assert raw.answer() is None


def test_peer_that_never_reads_holds_nobody_up(
    control: Path, client: EngineClient, guests: Guests
) -> None:
    """Neither its answers, of which it asked for many, nor the events that it is sent."""
    qemu, _ = guests.link(1024)
    client.flush(qemu.vm)
    ask = wire.frame(wire.ReadVm(vm=qemu.vm, ram_offset=0, size_bytes=wire.READ_MAX_BYTES))
    with RawClient(control) as deaf:
        deaf.send(HELLO + ask * 100)
        for _ in range(20):
            with pytest.raises(EngineRefusedError):
                client.read(uuid.uuid4(), 0, PAGE)
            with RawClient(control) as other:
                other.send(HELLO)
                assert isinstance(other.reply(), wire.Welcome)
        qemu.store(0, b"still followed")
        client.flush(qemu.vm)
        assert guests.read(qemu) == qemu.contents()
        # 100 answers are 400 MiB.
        assert client.status().memory.peak < 150 << 20


def test_calls_from_several_threads_get_their_own_answers(
    client: EngineClient, vm: uuid.UUID
) -> None:
    def call(number: int) -> bool:
        if number % 2:
            return len(client.read(vm, 0, (number % 16 + 1) * PAGE)) == (number % 16 + 1) * PAGE
        return client.status().dram_bytes == DRAM_BYTES

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))


def test_two_clients_see_the_same_platform(control: Path, vm: uuid.UUID) -> None:
    with EngineClient.connect(control) as other:
        assert vm in {one.vm for one in other.status().vms}


def test_closed_client_says_so(control: Path) -> None:
    client = EngineClient.connect(control)
    client.close()
    assert client.events.get(timeout=1) is None
    with pytest.raises(EngineGoneError, match="the engine is gone"):
        client.status()
    client.close()


def test_no_engine_there(tmp_path: Path) -> None:
    with pytest.raises(EngineGoneError, match=r"no engine at .*: No such file"):
        EngineClient.connect(tmp_path / CONTROL_SOCKET)


@contextmanager
def fake_engine(*answers: bytes) -> Iterator[Future[EngineClient]]:
    """A client that is answered with these bytes, and then with nothing but the end."""
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool, theirs:
        connecting = pool.submit(EngineClient, ours)
        assert theirs.recv(len(HELLO), socket.MSG_WAITALL) == HELLO
        theirs.sendall(b"".join(answers))
        theirs.shutdown(socket.SHUT_WR)
        yield connecting


WELCOME = wire.frame(
    wire.Welcome(
        version=5,
        role=wire.Role.OWNER,
        engine_pid=1,
        dram_path="",
        link_socket="",
        mktme_version="1",
        link_version=1,
    )
)


def test_answer_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that hangs is an error after a while, not a hang."""
    monkeypatch.setattr("mktme.service.client.FLUSH_TIMEOUT_S", 0.01)
    ours, theirs = socket.socketpair()
    with theirs, ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(EngineClient, ours)
        theirs.recv(len(HELLO), socket.MSG_WAITALL)
        theirs.sendall(WELCOME)
        with (
            connecting.result(DEADLINE_S) as client,
            pytest.raises(ServiceError, match=r"did not answer FlushVm in 0.01 s"),
        ):
            client.flush(uuid.uuid4())


def test_answer_of_another_kind_is_an_error() -> None:
    with (
        fake_engine(wire.frame(wire.Done())) as connecting,
        pytest.raises(ServiceError, match="the engine answered with Done"),
    ):
        connecting.result(DEADLINE_S)


@pytest.mark.parametrize(
    "data",
    [
        b"\x05",
        framed(b"x" * 50)[:20],
        framed(b"\xc1"),
        WELCOME[:-1],
    ],
    ids=["part of a length", "part of a body", "garbage", "all but a byte"],
)
def test_connection_that_ends_within_a_frame_is_an_engine_that_is_gone(data: bytes) -> None:
    with fake_engine(data) as connecting, pytest.raises(EngineGoneError):
        connecting.result(DEADLINE_S)


def test_answer_that_nobody_waits_for_is_an_engine_that_is_gone() -> None:
    with (
        fake_engine(WELCOME, wire.frame(wire.Done())) as connecting,
        connecting.result(DEADLINE_S) as client,
    ):
        assert client.events.get(timeout=DEADLINE_S) is None
        with pytest.raises(EngineGoneError):
            client.status()


# --- requests ---------------------------------------------------------------------------------


def test_vm_has_a_keyid_and_a_region_of_its_own(client: EngineClient) -> None:
    vms = [uuid.uuid4() for _ in range(3)]
    with ExitStack() as stack:
        added = []
        for vm in vms:
            added.append(add(client, vm))
            stack.callback(client.remove_vm, vm)
        assert [one.keyid for one in added] == [1, 2, 3]
        assert [one.base for one in added] == [0, 2 << 20, 4 << 20]
        status = client.status()
        assert [one.vm for one in status.vms] == vms
        assert [key.keyid for key in status.keys] == [0, 1, 2, 3]
        # What is given back is given out again.
        client.remove_vm(vms[1])
        assert add(client, vms[1]) == added[1]
    assert client.status().vms == ()
    assert [key.keyid for key in client.status().keys] == [0]


def test_status_of_a_vm_that_is_not_linked(client: EngineClient, vm: uuid.UUID) -> None:
    assert client.status().vms == (
        wire.VmStatus(
            vm=vm,
            name="vm",
            keyid=1,
            base=0,
            memory_bytes=16 * PAGE,
            track=Track.PAGES,
            linked=False,
            pages=(PageRange(base=0, size_bytes=16 * PAGE, keyid=1),),
        ),
    )


def test_status_of_a_vm_that_is_linked(guests: Guests) -> None:
    qemu, added = guests.link(8, 56, segments=((0, 0, 8 * PAGE), (1 << 32, 8 * PAGE, 56 * PAGE)))
    qemu.set_counters(2, 5, 6, 7, 8)
    qemu.store(PAGE, b"x" * (2 * LINE))
    guests.client.flush(qemu.vm)
    status = guests.status(qemu)
    assert (status.linked, status.fault, status.keyid) == (True, None, added.keyid)
    assert (status.qemu_pid, status.plugin_api) == (os.getpid(), 4)
    assert [(one.guest_physical, one.ram_offset, one.size_bytes) for one in status.segments] == [
        (0, 0, 8 * PAGE),
        (1 << 32, 8 * PAGE, 56 * PAGE),
    ]
    traffic = status.traffic
    assert traffic is not None
    assert (traffic.lines_marked, traffic.lines_stored, traffic.pending_pages) == (2, 2, 0)
    assert traffic.drains >= 2
    assert (traffic.tlb_misses, traffic.tlb_flushes) == (5, 6)
    assert (traffic.tlb_checked, traffic.tlb_errors) == (7, 8)


def test_engine_accounts_for_itself(client: EngineClient, engine: EngineProcess) -> None:
    status = client.status()
    assert 10 << 20 < status.memory.anonymous < status.memory.peak < 300 << 20
    assert 0 < status.cpu_s < 100
    assert client.welcome.engine_pid == engine.process.pid


def test_marks_are_those_of_stores(guests: Guests) -> None:
    qemu, _ = guests.link()
    qemu.store(3 * PAGE + LINE, b"x")
    qemu.dma(4 * PAGE, b"x")
    guests.client.flush(qemu.vm)
    assert guests.client.line_marks(qemu.vm, 2, 3).tolist() == [0, 2, 0]


def test_sidecar_describes_the_platform(guests: Guests) -> None:
    qemu, added = guests.link(64, segments=((0, 0, 4 * PAGE), (1 << 32, 4 * PAGE, 60 * PAGE)))
    path = guests.client.write_sidecar()
    assert path == Path(guests.client.welcome.dram_path + ".json")
    sidecar = read_sidecar(path)
    assert sidecar.platform.dram_bytes == DRAM_BYTES
    (vm,) = sidecar.vms
    assert (vm.uuid, vm.base, vm.size_bytes) == (qemu.vm, added.base, 64 * PAGE)
    assert [one.guest_physical for one in vm.segments] == [0, 1 << 32]
    assert {one.keyid for one in sidecar.pages} == {0, added.keyid}
    assert json.loads(path.read_text())["schema"] == "mktme-dram"


def refused(error: str, message: str) -> Callable[[Callable[[], object]], None]:
    def check(call: Callable[[], object]) -> None:
        with pytest.raises(EngineRefusedError, match=message) as caught:
            call()
        assert caught.value.error == error

    return check


def test_unknown_vm_is_refused(client: EngineClient) -> None:
    stranger = uuid.uuid4()
    for call in (
        lambda: client.remove_vm(stranger),
        lambda: client.flush(stranger),
        lambda: client.read(stranger, 0, PAGE),
        lambda: client.line_marks(stranger, 0, 1),
    ):
        refused("MktmeError", f"no VM {stranger} on this platform")(call)


def test_known_vm_is_not_added_again(client: EngineClient, vm: uuid.UUID) -> None:
    refused("MktmeError", "is there already")(lambda: add(client, vm))
    assert len(client.status().vms) == 1


@pytest.mark.parametrize("memory_bytes", [0, -PAGE, 100, PAGE + 1, -(2**63)])
def test_memory_must_be_whole_pages(client: EngineClient, memory_bytes: int) -> None:
    call = lambda: add(client, uuid.uuid4(), memory_bytes)  # noqa: E731
    refused("AddressError", "not whole pages")(call)


@pytest.mark.parametrize("memory_bytes", [DRAM_BYTES + PAGE, 2**62])
def test_memory_must_fit_into_dram(client: EngineClient, memory_bytes: int) -> None:
    call = lambda: add(client, uuid.uuid4(), memory_bytes)  # noqa: E731
    refused("AddressError", "no free .* bytes in")(call)
    vm = uuid.uuid4()
    add(client, vm, DRAM_BYTES)  # it left nothing taken
    client.remove_vm(vm)


def test_keyids_run_out(tmp_path: Path) -> None:
    platform = PlatformConfig(keyid_bits=1)
    with EngineProcess(tmp_path, tmp_path / "dram.img", 64 << 20, platform=platform) as engine:
        vms = [uuid.uuid4(), uuid.uuid4()]
        assert add(engine.client, vms[0]).keyid == 1
        refused("KeyIdError", "every KeyID is taken")(lambda: add(engine.client, vms[1]))
        engine.client.remove_vm(vms[0])
        assert add(engine.client, vms[1]) == wire.VmAdded(keyid=1, base=0)


def test_mode_platform_is_not_for_vms(client: EngineClient) -> None:
    refused("MktmeError", "no KeyID is programmed as platform")(
        lambda: client.add_vm(
            uuid.uuid4(),
            name="vm",
            memory_bytes=PAGE,
            track=Track.PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.PLATFORM,
        )
    )
    assert [key.keyid for key in client.status().keys] == [0]


@pytest.mark.parametrize(
    ("ram_offset", "size_bytes", "message"),
    [
        (1, PAGE, "whole pages"),
        (0, 64, "whole pages"),
        (0, 0, "whole pages"),
        (-PAGE, PAGE, "no read of 4096 bytes at RAM offset -0x1000"),
        (0, -PAGE, "whole pages"),
        (16 * PAGE, PAGE, "no read of 4096 bytes at RAM offset 0x10000"),
        (15 * PAGE, 2 * PAGE, "no read of 8192 bytes"),
        (2**63, PAGE, "no read of"),
        (2**64 - PAGE, PAGE, "no read of"),
        (0, wire.READ_MAX_BYTES + PAGE, "no read of"),
    ],
)
def test_read_outside_the_vm_is_refused(
    client: EngineClient, vm: uuid.UUID, ram_offset: int, size_bytes: int, message: str
) -> None:
    refused("AddressError", message)(lambda: client.read(vm, ram_offset, size_bytes))
    assert client.read(vm, 0, 16 * PAGE) == bytes(16 * PAGE)


@pytest.mark.parametrize("keyid", [-1, 64, 2**63])
def test_read_with_a_keyid_that_there_is_not(
    client: EngineClient, vm: uuid.UUID, keyid: int
) -> None:
    refused("KeyIdError", f"no KeyID {keyid}")(lambda: client.read(vm, 0, PAGE, keyid))


@pytest.mark.parametrize(
    ("first", "count"), [(-1, 1), (0, 0), (0, -1), (0, 17), (16, 1), (0, 2**62)]
)
def test_marks_outside_the_vm_are_refused(guests: Guests, first: int, count: int) -> None:
    qemu, _ = guests.link(16)
    refused("AddressError", "marks")(lambda: guests.client.line_marks(qemu.vm, first, count))
    assert len(guests.client.line_marks(qemu.vm, 0, 16)) == 16


def test_vm_that_is_not_linked_is_not_followed(client: EngineClient, vm: uuid.UUID) -> None:
    refused("LinkError", "is not linked: there is nothing to follow")(lambda: client.flush(vm))
    refused("MktmeError", "is not linked")(lambda: client.line_marks(vm, 0, 1))


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("key_file", "/no\0path", "KeyMaterialError", r"'/no\x00path' is no path"),
        ("key_file", "/" + "x" * 60_000, "KeyMaterialError", "File name too long"),
        ("name", "vm\nERROR all is lost", "MktmeError", "name is printable text"),
    ],
    ids=["NUL in a path", "long path", "name of two lines"],
)
def test_odd_text_is_refused(
    raw: RawClient, client: EngineClient, field: str, value: str, error: str, message: str
) -> None:
    add_vm = wire.AddVm(
        vm=uuid.uuid4(),
        name="vm",
        memory_bytes=PAGE,
        track=Track.PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.DIRECT,
        key_file="/key",
    )
    raw.send(HELLO + wire.frame(msgspec.structs.replace(add_vm, **{field: value})))
    assert isinstance(raw.reply(), wire.Welcome)
    reply = raw.reply()
    assert isinstance(reply, wire.Failure)
    assert reply.error == error
    assert message in reply.message
    assert client.status().vms == ()


def test_messages_are_plain_messagepack(raw: RawClient) -> None:
    """Clients in other languages need nothing of ours."""
    raw.send(framed(msgspec.msgpack.encode({"type": "Hello", "version": 5})))
    assert isinstance(raw.reply(), wire.Welcome)
