# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's TPM in the engine's hands: whose it is, who may use it, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mktme.attest.tpm_keys import TpmKey
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError
from mktme.service.server import CONTROL_SOCKET, LINK_SOCKET

from .. import fake_qemu
from ..conftest import Guests, MakeQemu
from ..fake_qemu import DEADLINE_S, PAGE, Answer, FakeQemu

MIB = 1 << 20
# swtpm's control channel (tpm_ioctl.h), which is big-endian on a socket.
CMD_INIT, CMD_SET_DATAFD = 2, 16
STARTUP = bytes.fromhex("8001 0000000c 00000144 0000")
READ_EK = bytes.fromhex("8001 0000000e 00000173 81010001")
HEADER_BYTES = 10


@pytest.fixture
def run_dir() -> Iterator[Path]:
    # Not tmp_path: the paths of UNIX sockets are short.
    with tempfile.TemporaryDirectory(prefix="mt-") as directory:
        yield Path(directory)


@pytest.fixture
def engine(run_dir: Path) -> Iterator[EngineProcess]:
    """One of this test's own."""
    if shutil.which("swtpm_setup") is None and not os.environ.get("CI"):
        pytest.skip("swtpm is not installed: make setup")
    with EngineProcess(run_dir, run_dir / "dram.img", 8 * MIB) as engine:
        yield engine


@pytest.fixture
def guests(engine: EngineProcess, make_qemu: MakeQemu) -> Iterator[Guests]:
    with ExitStack() as stack:
        yield Guests(engine, make_qemu, stack)


class Emulator:
    """QEMU's back end of a TPM (backends/tpm/tpm_emulator.c), in brief."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        self._control = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._control.settimeout(DEADLINE_S)
        self._control.connect(path)
        self._data, its = socket.socketpair()
        stack.enter_context(self._data)
        self._data.settimeout(DEADLINE_S)
        with its:
            socket.send_fds(self._control, [struct.pack(">I", CMD_SET_DATAFD)], [its.fileno()])
        assert self._result() == 0
        self._control.sendall(struct.pack(">II", CMD_INIT, 0))
        assert self._result() == 0
        assert self.command(STARTUP) == b""

    def _result(self) -> int:
        answer = self._control.recv(4)
        assert len(answer) == 4
        return int.from_bytes(answer, "big")

    def command(self, command: bytes) -> bytes:
        self._data.sendall(command)
        answer = self._data.recv(4096)
        assert int.from_bytes(answer[6:HEADER_BYTES], "big") == 0
        return answer[HEADER_BYTES:]

    def endorsement_key(self) -> bytes:
        answer = self.command(READ_EK)
        return TpmKey.parse(answer[: 2 + int.from_bytes(answer[:2], "big")]).sha256

    def ended(self) -> bool:
        return self._data.recv(1) == b""


def processes(run_dir: Path) -> list[int]:
    """The processes of the TPMs of an engine."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (directory / "cmdline").read_bytes()
            if os.fsencode(run_dir) in line and line.startswith(b"swtpm"):
                found.append(int(directory.name))
    return found


def names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir() if "tpm" in path.name}


def announced(guests: Guests, make_qemu: MakeQemu) -> tuple[FakeQemu, wire.VtpmAdded]:
    qemu = make_qemu()
    guests.announce(qemu)
    return qemu, guests.client.add_vtpm(qemu.vm)


# --- whose it is ------------------------------------------------------------------------------


def test_engine_knows_the_key_that_its_tpm_has(guests: Guests, make_qemu: MakeQemu) -> None:
    with ExitStack() as stack:
        keys = []
        for _ in range(2):
            _, added = announced(guests, make_qemu)
            keys.append(added.endorsement_key)
            assert Emulator(added.socket, stack).endorsement_key() == added.endorsement_key
        assert keys[0] != keys[1]


def test_qemu_that_has_the_tpm_links(guests: Guests, make_qemu: MakeQemu, run_dir: Path) -> None:
    qemu, added = announced(guests, make_qemu)
    with ExitStack() as stack:
        Emulator(added.socket, stack)
        assert qemu.connect(run_dir / LINK_SOCKET) == Answer(True, "")


def test_qemu_that_has_it_not_does_not_link(
    guests: Guests, make_qemu: MakeQemu, run_dir: Path
) -> None:
    """Its guest might talk to any TPM, and evidence would name this one."""
    qemu, added = announced(guests, make_qemu)
    refusal = qemu.connect(run_dir / LINK_SOCKET)
    assert not refusal.accepted
    assert refusal.reason.endswith("its QEMU is not who has its TPM")
    with ExitStack() as stack:
        Emulator(added.socket, stack)  # this process has it, and another one links
        canary, pages = "00" * 32, str(qemu.ram_bytes // PAGE)
        program = [sys.executable, fake_qemu.__file__, str(run_dir / LINK_SOCKET), str(qemu.vm)]
        subprocess.run([*program, pages, canary], capture_output=True, timeout=60, check=False)
        for _ in range(2):
            guests.wait(wire.LinkRefused(reason=refusal.reason))


def test_nobody_else_gets_it(guests: Guests, make_qemu: MakeQemu) -> None:
    _, added = announced(guests, make_qemu)
    assert Path(added.socket).stat().st_mode & 0o777 == 0o600
    with ExitStack() as stack:
        Emulator(added.socket, stack)
        second = stack.enter_context(socket.socket(socket.AF_UNIX))
        with pytest.raises(OSError, match="No such file"):
            second.connect(added.socket)


def test_one_tpm_before_the_link(guests: Guests, make_qemu: MakeQemu, run_dir: Path) -> None:
    with pytest.raises(EngineRefusedError, match="no VM"):
        guests.client.add_vtpm(uuid.uuid4())
    qemu, _ = announced(guests, make_qemu)
    with pytest.raises(EngineRefusedError, match="has a TPM already"):
        guests.client.add_vtpm(qemu.vm)
    linked, _ = guests.link()
    with pytest.raises(EngineRefusedError, match="has a TPM already, or runs without"):
        guests.client.add_vtpm(linked.vm)
    with (
        EngineClient.connect(run_dir / CONTROL_SOCKET) as observer,
        pytest.raises(EngineRefusedError, match="observer may not send AddVtpm"),
    ):
        observer.add_vtpm(qemu.vm)
    assert len(names(run_dir)) == 2  # a socket and a state


# --- its state --------------------------------------------------------------------------------


def test_state_on_disk_is_of_no_use(guests: Guests, make_qemu: MakeQemu, run_dir: Path) -> None:
    """Whoever copies it has no TPM: swtpm itself does not start with it without the key."""
    announced(guests, make_qemu)
    (state,) = (path for path in run_dir.iterdir() if path.is_dir() and "-tpm-" in path.name)
    assert state.stat().st_mode & 0o777 == 0o700
    copy = shutil.copytree(state, run_dir / "copy")
    ours, its = socket.socketpair()
    with ours, its:
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={copy}", "--terminate"]
        command += ["--fd", str(its.fileno()), "--flags", "not-need-init,startup-clear"]
        stolen = subprocess.Popen(command, pass_fds=(its.fileno(),), stderr=subprocess.DEVNULL)
        its.close()
        ours.settimeout(DEADLINE_S)
        with contextlib.suppress(OSError):
            ours.sendall(READ_EK)
            answer = ours.recv(4096)
            assert answer == b"" or int.from_bytes(answer[6:HEADER_BYTES], "big") != 0
        ours.close()
        stolen.wait(DEADLINE_S)


# --- its end ----------------------------------------------------------------------------------


def test_tpm_ends_with_its_vm(guests: Guests, make_qemu: MakeQemu, run_dir: Path) -> None:
    qemu, added = announced(guests, make_qemu)
    unused, _ = announced(guests, make_qemu)
    with ExitStack() as stack:
        emulator = Emulator(added.socket, stack)
        assert len(processes(run_dir)) == 1
        guests.client.remove_vm(qemu.vm)
        assert emulator.ended()
    guests.client.remove_vm(unused.vm)
    assert processes(run_dir) == []
    assert names(run_dir) == set()


def test_tpm_ends_with_its_qemu(guests: Guests, make_qemu: MakeQemu, run_dir: Path) -> None:
    _, added = announced(guests, make_qemu)
    with ExitStack() as stack:
        Emulator(added.socket, stack)
        (pid,) = processes(run_dir)
        pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000)
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_tpm_ends_with_the_engine(
    engine: EngineProcess, guests: Guests, make_qemu: MakeQemu, run_dir: Path, how: signal.Signals
) -> None:
    _, added = announced(guests, make_qemu)
    with ExitStack() as stack:
        emulator = Emulator(added.socket, stack)
        engine.process.send_signal(how)
        engine.process.wait(DEADLINE_S)
        assert emulator.ended()


def test_machine_without_swtpm(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = run_dir / "bin"
    tools.mkdir()
    (tools / "setpriv").symlink_to(shutil.which("setpriv") or "")
    monkeypatch.setenv("PATH", str(tools))
    with EngineProcess(run_dir, run_dir / "dram.img", 8 * MIB) as engine, ExitStack() as stack:
        guests = Guests(engine, lambda *_, **__: stack.enter_context(FakeQemu()), stack)
        qemu = stack.enter_context(FakeQemu())
        guests.announce(qemu)
        with pytest.raises(EngineRefusedError, match="swtpm_setup failed") as refusal:
            guests.client.add_vtpm(qemu.vm)
        assert "make setup" in str(refusal.value.hint)
        assert names(run_dir) == set()
