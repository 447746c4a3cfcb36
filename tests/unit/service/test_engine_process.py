# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's life: it starts or says why not, and ends with its owner."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import ExitStack
from pathlib import Path

import pytest

from mktme.datapath.shadow import Track
from mktme.engine.dram import Dram
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineGoneError, EngineProcess, EngineRefusedError
from mktme.service.server import CONTROL_SOCKET, LINK_SOCKET

from ..conftest import Guests, MakeQemu
from ..fake_qemu import DEADLINE_S, PAGE
from .raw_client import HELLO, RawClient

MIB = 1 << 20


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """One of this test's own, which it may end as it likes."""
    with EngineProcess(tmp_path, tmp_path / "dram.img", 8 * MIB) as engine:
        yield engine


def ended(pidfd: int) -> bool:
    """Wait for a process's end."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(DEADLINE_S * 1000))


def hangs_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# --- the end ----------------------------------------------------------------------------------


def test_engine_ends_with_its_owner(tmp_path: Path) -> None:
    with EngineProcess(tmp_path, tmp_path / "dram.img", 8 * MIB) as engine:
        assert (tmp_path / CONTROL_SOCKET).is_socket()
        assert (tmp_path / LINK_SOCKET).is_socket()
        process = engine.process
        assert process.poll() is None
    assert process.returncode == 0
    # The image and its MACs stay for who wants to look at them, the sockets do not.
    assert sorted(os.listdir(tmp_path)) == ["audit.jsonl", "dram.img", "dram.img.mac", "engine.log"]
    assert "the owner is gone, stopping" in (tmp_path / "engine.log").read_text()
    with pytest.raises(EngineGoneError):
        engine.client.status()


def test_other_clients_and_plugins_end_with_it(
    engine: EngineProcess, tmp_path: Path, make_qemu: MakeQemu
) -> None:
    with (
        ExitStack() as stack,
        EngineClient.connect(tmp_path / CONTROL_SOCKET) as other,
        RawClient(tmp_path / CONTROL_SOCKET) as halfway,
    ):
        halfway.send(HELLO[:5])
        qemu, _ = Guests(engine, make_qemu, stack).link()
        engine.client.close()
        assert hangs_up(qemu.connection)
        assert engine.process.wait(DEADLINE_S) == 0
        assert halfway.answer() is None
        while other.events.get(timeout=DEADLINE_S) is not None:
            pass
        with pytest.raises(EngineGoneError):
            other.status()


def test_other_clients_do_not_end_it(engine: EngineProcess, tmp_path: Path) -> None:
    for _ in range(3):
        with EngineClient.connect(tmp_path / CONTROL_SOCKET) as other:
            other.status()
    assert engine.client.status().vms == ()


def test_owner_that_is_killed_takes_the_engine_with_it(tmp_path: Path) -> None:
    """All that is left of an owner killed with -9 is the end of its connection."""
    with EngineProcess(tmp_path, tmp_path / "dram.img", 8 * MIB) as engine:
        pidfd = os.pidfd_open(engine.process.pid)
        try:
            engine.client._socket.shutdown(socket.SHUT_RDWR)
            assert ended(pidfd)
        finally:
            os.close(pidfd)
    assert not (tmp_path / LINK_SOCKET).exists()


def test_killed_engine_is_noticed_by_all(
    engine: EngineProcess, tmp_path: Path, make_qemu: MakeQemu
) -> None:
    with ExitStack() as stack, EngineClient.connect(tmp_path / CONTROL_SOCKET) as other:
        qemu, _ = Guests(engine, make_qemu, stack).link()
        engine.process.kill()
        # The plugin's connection ends, which stops QEMU.
        assert hangs_up(qemu.connection)
        for client in (engine.client, other):
            while client.events.get(timeout=DEADLINE_S) is not None:
                pass
            with pytest.raises(EngineGoneError, match="the engine is gone"):
                client.status()
            with pytest.raises(EngineGoneError):
                client.flush(qemu.vm)
    assert engine.process.wait(DEADLINE_S) == -signal.SIGKILL


def test_call_in_progress_ends_when_the_engine_is_killed(engine: EngineProcess) -> None:
    engine.process.send_signal(signal.SIGSTOP)  # it can answer no more
    errors: list[Exception] = []

    def call() -> None:
        try:
            engine.client.status()
        except EngineGoneError as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    engine.process.kill()
    for caller in callers:
        caller.join(DEADLINE_S)
        assert not caller.is_alive()
    assert len(errors) == 3
    assert engine.client.events.get(timeout=DEADLINE_S) is None


def test_sigterm_ends_it_in_good_order(engine: EngineProcess, tmp_path: Path) -> None:
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(DEADLINE_S) == 0
    assert engine.client.events.get(timeout=DEADLINE_S) is None
    assert not (tmp_path / CONTROL_SOCKET).exists()


def test_ctrl_c_is_the_owners_to_handle(engine: EngineProcess) -> None:
    assert os.getsid(engine.process.pid) != os.getsid(0)
    engine.process.send_signal(signal.SIGINT)
    assert engine.client.status().dram_bytes == 8 * MIB


def test_engine_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mktme.service.client.STOP_TIMEOUT_S", 0.05)
    with EngineProcess(tmp_path, tmp_path / "dram.img", 8 * MIB) as engine:
        engine.process.send_signal(signal.SIGSTOP)
    assert engine.process.returncode == -signal.SIGKILL


def test_ping_is_answered_unless_it_hangs(engine: EngineProcess) -> None:
    assert engine.client.ping().result(DEADLINE_S)
    engine.process.send_signal(signal.SIGSTOP)
    answer = engine.client.ping()
    assert wait([answer], 0.2).not_done
    engine.process.send_signal(signal.SIGCONT)
    assert answer.result(DEADLINE_S)


def test_engine_that_is_given_up_is_killed_and_everybody_told_why(engine: EngineProcess) -> None:
    engine.process.send_signal(signal.SIGSTOP)
    answer = engine.client.ping()
    engine.give_up("it did not answer")
    with pytest.raises(EngineGoneError, match=r"^it did not answer$"):
        answer.result(DEADLINE_S)
    with pytest.raises(EngineGoneError, match=r"^it did not answer$"):
        engine.client.status()
    assert engine.process.wait(DEADLINE_S) == -signal.SIGKILL


def test_nothing_of_the_owner_is_inherited(tmp_path: Path) -> None:
    """A lock or a socket of the owner would live on with the engine."""
    owners = os.memfd_create("owners", 0)
    try:
        os.set_inheritable(owners, True)
        with EngineProcess(tmp_path, tmp_path / "dram.img", 8 * MIB) as engine:
            links = list(Path(f"/proc/{engine.process.pid}/fd").iterdir())
            targets = [os.readlink(link) for link in links]
    finally:
        os.close(owners)
    assert targets.count("/dev/null") == 1
    assert not any("owners" in target for target in targets)


# --- the start --------------------------------------------------------------------------------


def start(run_dir: Path, dram: Path, dram_bytes: int = 8 * MIB) -> EngineRefusedError:
    """Start an engine that cannot; returns what it says."""
    process = EngineProcess(run_dir, dram, dram_bytes)
    with pytest.raises(EngineRefusedError) as caught, process:
        raise AssertionError("it did start")
    assert process.process.returncode == 1
    return caught.value


def test_dram_that_exists_is_left_alone(tmp_path: Path) -> None:
    dram = tmp_path / "dram.img"
    dram.write_bytes(b"precious")
    refusal = start(tmp_path, dram)
    assert refusal.error == "DramError"
    assert str(refusal) == f"{dram}: exists"
    assert refusal.hint == "remove it, or choose another path for DRAM"
    assert dram.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["audit.jsonl", "dram.img", "engine.log"]


def test_dram_of_another_engine_is_left_alone(engine: EngineProcess, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    assert "exists" in str(start(tmp_path / "second", tmp_path / "dram.img"))
    assert engine.client.status().vms == ()


def test_no_place_for_dram(tmp_path: Path) -> None:
    refusal = start(tmp_path, tmp_path / "none" / "dram.img")
    assert refusal.error == "DramError"
    assert str(refusal) == f"{tmp_path}/none/dram.img: No such file or directory"


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    # Not even root can create a file there.
    refusal = start(tmp_path, Path("/proc/self/dram.img"))
    assert refusal.error == "DramError"
    assert str(refusal).startswith("/proc/self/dram.img: ")


def test_dram_too_large_for_its_file_system(tmp_path: Path) -> None:
    refusal = start(tmp_path, tmp_path / "dram.img", 1 << 62)
    assert refusal.error == "DramError"
    assert f"no DRAM of {1 << 62} bytes" in str(refusal)
    assert not (tmp_path / "dram.img").exists()


def test_dram_too_large_for_its_addresses(tmp_path: Path) -> None:
    refusal = start(tmp_path, tmp_path / "dram.img", 2 << 40)
    assert refusal.error == "AddressError"
    assert "40 address bits" in str(refusal)


def test_socket_that_is_there_already(tmp_path: Path) -> None:
    with EngineProcess(tmp_path, tmp_path / "dram.img", 8 * MIB) as first:
        refusal = start(tmp_path, tmp_path / "second.img")
        assert "Address already in use" in str(refusal)
        assert first.client.status().vms == ()
        with EngineClient.connect(tmp_path / CONTROL_SOCKET) as other:
            assert other.welcome.engine_pid == first.process.pid


def test_path_too_long_for_a_socket(tmp_path: Path) -> None:
    run_dir = tmp_path / ("x" * 100)
    run_dir.mkdir()
    assert "path too long" in str(start(run_dir, tmp_path / "dram.img"))


def test_dram_is_there_while_the_engine_is_and_after(tmp_path: Path, make_qemu: MakeQemu) -> None:
    dram = tmp_path / "dram.img"
    with (
        EngineProcess(tmp_path, dram, 8 * MIB) as engine,
        ExitStack() as stack,
    ):
        qemu, added = Guests(engine, make_qemu, stack).link(mode=KeyMode.NO_ENCRYPT)
        qemu.store(3 * PAGE, b"x" * PAGE)
        engine.client.flush(qemu.vm)
    with Dram.open(dram) as image:
        page = bytearray(PAGE)
        image.read_into(added.base + 3 * PAGE, page)
    assert page == b"x" * PAGE


def test_two_engines_side_by_side(tmp_path: Path) -> None:
    with ExitStack() as stack:
        engines = []
        for name in ("one", "two"):
            run_dir = tmp_path / name
            run_dir.mkdir()
            engines.append(
                stack.enter_context(EngineProcess(run_dir, run_dir / "dram.img", 8 * MIB))
            )
        engines[0].client.add_vm(
            (vm := uuid.uuid4()),
            name="vm",
            memory_bytes=PAGE,
            track=Track.PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
        assert [one.vm for one in engines[0].client.status().vms] == [vm]
        assert engines[1].client.status().vms == ()
        engines[0].process.kill()
        assert isinstance(engines[1].client.status(), wire.Status)
