# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that sees the platform's registers, without a guest: its page, and what it may do."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from mktme.datapath.registers import Operation
from mktme.engine import tme
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.pconfig import STRUCT_BYTES, Command, Status, encode
from mktme.engine.tme import Revision
from mktme.engine.xts import Algorithm
from mktme.service import limits, wire
from mktme.service.audit import AUDIT_FILE, Record
from mktme.service.client import EngineClient, EngineProcess

from ..conftest import Guests, MakeQemu, wait_event
from ..fake_qemu import PAGE, FakeQemu

XTS_128 = Algorithm.AES_XTS_128
KEY = bytes(range(32))
FAULT = None


@pytest.fixture(params=list(Revision))
def revision(request: pytest.FixtureRequest) -> Revision:
    revision: Revision = request.param
    return revision


@pytest.fixture
def platform(tmp_path: Path, revision: Revision) -> Iterator[EngineProcess]:
    """Three KeyIDs."""
    config = PlatformConfig(keyid_bits=2, revision=revision)
    with EngineProcess(tmp_path, tmp_path / "dram.img", 64 << 20, platform=config) as engine:
        yield engine


@pytest.fixture
def visible(platform: EngineProcess, make_qemu: MakeQemu) -> Iterator[Guests]:
    with ExitStack() as stack:
        yield Guests(platform, make_qemu, stack)


def call(
    qemu: FakeQemu, operation: Operation, number: int, value: int, program: bytes = b""
) -> tuple[int, bool] | None:
    """RAX and ZF; None for #GP."""
    message = struct.pack("<IIQ", operation, number, value) + program.ljust(STRUCT_BYTES, b"\0")
    qemu.connection.send(message)
    faults, rax, zf, reserved = struct.unpack("<IIII", qemu.connection.recv(17))
    assert reserved == 0
    if faults:
        assert (faults, rax, zf) == (1, 0, 0)
        return FAULT
    return rax, bool(zf)


def pconfig(qemu: FakeQemu, program: bytes | bytearray, leaf: int = 0, rbx: int = 0x1000) -> object:
    return call(qemu, Operation.PCONFIG, leaf, rbx, bytes(program))


def registers(qemu: FakeQemu) -> dict[int, int | None]:
    """What RDMSR gives."""
    page = os.pread(qemu.register_page, 472, 0)
    (count,) = struct.unpack_from("<H", page, 22)
    entries = [struct.unpack_from("<IIQ", page, 216 + 16 * index) for index in range(count)]
    return {msr: None if faults else value for msr, faults, value in entries}


def records(engine: EngineProcess) -> list[Record]:
    path = engine.log_path.parent / AUDIT_FILE
    every = [msgspec.json.decode(line, type=Record) for line in path.read_bytes().splitlines()]
    return [one for one in every if one.event.startswith("Guest")]


def keyids(client: EngineClient) -> dict[int, tuple[KeyMode, uuid.UUID | None]]:
    return {one.keyid: (one.mode, one.vm) for one in client.status().keys if one.keyid}


# --- what it reads ----------------------------------------------------------------------------


def test_page_has_the_registers_before_the_vm_runs(visible: Guests) -> None:
    qemu, _ = visible.link(visible=True)
    shown = registers(qemu)
    assert set(shown) == set(tme.MSR_NAMES)
    assert shown == {msr: visible.client.rdmsr(msr) for msr in shown}
    assert (shown[tme.IA32_TME_ACTIVATE] or 0) & 3 == 3  # locked, enabled
    page = os.pread(qemu.register_page, 472, 0)
    assert struct.unpack_from("<6I6I", page, 24) == (
        *(7, 0, 0, 0, 1 << 13, 1 << 18),
        *(0x1B, 0, 1, 1, 0, 0),
    )


def test_page_follows_the_registers(tmp_path: Path, make_qemu: MakeQemu) -> None:
    """Whoever writes one: here the platform's owner, on a platform that has TME alone."""
    config = PlatformConfig(keyid_bits=0, tme=True)
    with (
        EngineProcess(tmp_path, tmp_path / "dram.img", 64 << 20, platform=config) as engine,
        ExitStack() as stack,
    ):
        guests = Guests(engine, make_qemu, stack)
        qemu, added = guests.link(visible=True, mode=KeyMode.PLATFORM)
        assert added.keyid == 0
        sequence = os.pread(qemu.register_page, 4, 12)
        guests.client.wrmsr(tme.MK_TME_CORE_ACTIVATE, 0)
        assert os.pread(qemu.register_page, 4, 12) > sequence
        assert registers(qemu)[tme.IA32_MKTME_KEYID_PARTITIONING] == 0


def test_vm_is_visible_as_it_was_announced(visible: Guests, make_qemu: MakeQemu) -> None:
    for is_visible in (False, True):
        qemu = make_qemu(visible=is_visible)
        visible.announce(qemu, visible=not is_visible)
        answer = qemu.connect(visible.link_socket)
        assert not answer.accepted
        assert "to see registers" in answer.reason


# --- what it writes ---------------------------------------------------------------------------


def test_wrmsr_is_the_packages(
    visible: Guests, platform: EngineProcess, revision: Revision
) -> None:
    qemu, _ = visible.link(visible=True)
    before = registers(qemu)
    locked = (0, False) if revision is Revision.SDM else FAULT
    assert call(qemu, Operation.WRMSR, tme.IA32_TME_ACTIVATE, 3) == locked
    assert call(qemu, Operation.WRMSR, tme.IA32_TME_EXCLUDE_MASK, 1 << 11) is FAULT
    assert call(qemu, Operation.WRMSR, tme.IA32_TME_EXCLUDE_BASE, 0) is FAULT
    assert call(qemu, Operation.WRMSR, tme.IA32_TME_CAPABILITY, 0) is FAULT
    assert call(qemu, Operation.WRMSR, tme.MK_TME_CORE_ACTIVATE, 0) == (0, False)
    assert call(qemu, Operation.WRMSR, 0x1234, 0) is FAULT
    assert registers(qemu) == before
    told = records(platform)
    assert [one.msr for one in told] == [0x982, 0x983, 0x984, 0x981, 0x9FF, 0x1234]
    assert {one.outcome for one in told} == {"done", "GeneralProtection"}
    assert {(one.event, one.vm, one.pid) for one in told} == {("GuestWrmsr", qemu.vm, os.getpid())}


@pytest.mark.parametrize("command", list(Command))
def test_pconfig_programs_a_keyid_for_its_vm(
    visible: Guests, platform: EngineProcess, command: Command
) -> None:
    qemu, added = visible.link(visible=True)
    key = KEY if command is Command.SET_KEY_DIRECT else None
    assert pconfig(qemu, encode(3, command, XTS_128, key)) == (0, False)
    mode = {
        Command.SET_KEY_DIRECT: KeyMode.DIRECT,
        Command.SET_KEY_RANDOM: KeyMode.RANDOM,
        Command.NO_ENCRYPT: KeyMode.NO_ENCRYPT,
    }.get(command)
    assert keyids(visible.client).get(3) == (None if mode is None else (mode, qemu.vm))
    (told,) = records(platform)
    assert (told.event, told.outcome, told.keyid, told.status) == ("GuestPconfig", "done", 3, 0)

    # Its own, it may change again; with the VM it goes.
    assert pconfig(qemu, encode(3, Command.SET_KEY_RANDOM, XTS_128)) == (0, False)
    visible.client.remove_vm(qemu.vm)
    assert keyids(visible.client) == {}
    assert added.keyid == 1


def test_pages_under_a_guests_key_are_what_any_library_reads(
    visible: Guests, tmp_path: Path
) -> None:
    qemu, added = visible.link(visible=True)
    assert pconfig(qemu, encode(2, Command.SET_KEY_DIRECT, XTS_128, KEY)) == (0, False)
    secret = os.urandom(PAGE)
    qemu.store(8 * PAGE, secret)
    visible.client.assign_pages(qemu.vm, 8 * PAGE, PAGE, 2)
    assert visible.client.read(qemu.vm, 8 * PAGE, PAGE, 2) == secret
    assert visible.client.read(qemu.vm, 8 * PAGE, PAGE, added.keyid) != secret
    assert visible.client.read(qemu.vm, 8 * PAGE, PAGE, 0) != secret


def test_failing_pconfigs_are_the_packages(
    visible: Guests, platform: EngineProcess, revision: Revision
) -> None:
    """The rows of 336907, table 6-6, and of the SDM's #GP(0)."""
    qemu, _ = visible.link(visible=True)
    good = encode(3, Command.SET_KEY_RANDOM, XTS_128)

    def changed(offset: int, *values: int) -> bytes:
        program = bytearray(good)
        program[offset : offset + len(values)] = values
        return bytes(program)

    def by_spec(status: Status) -> tuple[int, bool] | None:
        return FAULT if revision is Revision.SDM else (status, True)

    assert pconfig(qemu, changed(2, 4)) == by_spec(Status.INVALID_PROG_CMD)
    assert pconfig(qemu, changed(0, 0, 0)) == by_spec(Status.INVALID_KEYID)
    assert pconfig(qemu, changed(0, 4, 0)) == by_spec(Status.INVALID_KEYID)
    assert pconfig(qemu, changed(3, 0, 0)) == by_spec(Status.INVALID_ENC_ALG)
    assert pconfig(qemu, changed(3, 5, 0)) == by_spec(Status.INVALID_ENC_ALG)
    assert pconfig(qemu, good, leaf=1) is FAULT
    assert pconfig(qemu, good, rbx=0x1040) is FAULT
    assert pconfig(qemu, changed(5, 1)) is FAULT
    assert (pconfig(qemu, changed(6, 1)) is FAULT) == (revision is Revision.SPEC_1_4)
    # A rule of ours (docs/adr/0005): equal halves are no key.
    weak = encode(3, Command.SET_KEY_DIRECT, XTS_128, bytes(32))
    assert pconfig(qemu, weak) is FAULT
    told = records(platform)
    assert told[-1].outcome == "KeyMaterialError"
    assert len(told) == 10


def test_keyids_that_are_not_its_own_are_busy(visible: Guests) -> None:
    qemu, added = visible.link(visible=True)
    other, others = visible.link(visible=True)
    visible.client.program_key(KeyMode.RANDOM, vm=None)
    before = keyids(visible.client)
    assert (added.keyid, others.keyid, sorted(before)) == (1, 2, [1, 2, 3])
    for one in (qemu, other):
        for keyid in before:
            for command in Command:
                key = KEY if command is Command.SET_KEY_DIRECT else None
                busy = pconfig(one, encode(keyid, command, XTS_128, key))
                assert busy == (Status.DEVICE_BUSY, True)
    assert keyids(visible.client) == before
    # What is wrong besides is told first, as of any PCONFIG.
    assert pconfig(qemu, encode(1, Command.CLEAR_KEY, XTS_128), leaf=7) is FAULT


def test_keyid_that_pages_use_is_busy(visible: Guests) -> None:
    qemu, _ = visible.link(visible=True)
    assert pconfig(qemu, encode(2, Command.SET_KEY_RANDOM, XTS_128)) == (0, False)
    visible.client.assign_pages(qemu.vm, 0, PAGE, 2)
    clear = encode(2, Command.CLEAR_KEY, XTS_128)
    assert pconfig(qemu, clear) == (Status.DEVICE_BUSY, True)
    visible.client.assign_pages(qemu.vm, 0, PAGE)
    assert pconfig(qemu, clear) == (0, False)
    assert 2 not in keyids(visible.client)


# --- hostile QEMUs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [b"x", bytes(208), b"\1".ljust(207, b"\0"), b"\1".ljust(209, b"\0"), b"\1" * 4096],
    ids=["short", "zeros", "cut", "long", "huge"],
)
def test_what_is_no_call_ends_the_vm(visible: Guests, message: bytes) -> None:
    qemu, _ = visible.link(visible=True)
    bystander, _ = visible.link(visible=True)
    qemu.connection.send(message)
    fault = wait_event(visible.client, lambda event: isinstance(event, wire.VmFault))
    assert isinstance(fault, wire.VmFault)
    assert fault.vm == qemu.vm
    assert "a call of" in fault.message
    assert qemu.connection.recv(1) == b""
    assert pconfig(bystander, encode(3, Command.SET_KEY_RANDOM, XTS_128)) == (0, False)


def test_descriptors_with_a_call_are_nothing_to_the_engine(
    visible: Guests, platform: EngineProcess
) -> None:
    qemu, _ = visible.link(visible=True)
    message = struct.pack("<IIQ", 1, 0x9FF, 0) + bytes(STRUCT_BYTES)
    directory = f"/proc/{platform.process.pid}/fd"
    before = len(os.listdir(directory))
    for _ in range(20):
        socket.send_fds(qemu.connection, [message], [qemu.ram[0]] * 8)
        assert qemu.connection.recv(17) == bytes(16)
    assert len(os.listdir(directory)) == before


def test_answers_that_nobody_fetches_end_the_vm(visible: Guests) -> None:
    qemu, _ = visible.link(visible=True)
    message = struct.pack("<IIQ", 1, 0x9FF, 0) + bytes(STRUCT_BYTES)
    with contextlib.suppress(OSError):
        while True:
            qemu.connection.send(message)
    fault = wait_event(visible.client, lambda event: isinstance(event, wire.VmFault))
    assert isinstance(fault, wire.VmFault)
    assert fault.vm == qemu.vm


def test_vm_that_is_not_visible_does_not_call(visible: Guests) -> None:
    qemu, _ = visible.link()
    qemu.connection.send(struct.pack("<IIQ", 1, 0x9FF, 0) + bytes(STRUCT_BYTES))
    # The engine hangs up, and what it left unread makes that a reset.
    with contextlib.suppress(ConnectionResetError):
        assert qemu.connection.recv(17) == b""


def test_calls_beyond_the_rate_wait(visible: Guests) -> None:
    """One vCPU's loop: the engine has time for others, and its log does not run full."""
    qemu, _ = visible.link(visible=True)
    for _ in range(limits.GUEST_CALLS.burst):
        assert call(qemu, Operation.WRMSR, 0x9FF, 0) == (0, False)
    qemu.connection.send(struct.pack("<IIQ", 1, 0x9FF, 0) + bytes(STRUCT_BYTES))
    visible.client.status()  # others do not wait
    assert qemu.connection.recv(17) == bytes(16)


def test_key_is_not_in_what_the_engine_writes(visible: Guests, platform: EngineProcess) -> None:
    qemu, _ = visible.link(visible=True)
    key = os.urandom(32)
    assert pconfig(qemu, encode(3, Command.SET_KEY_DIRECT, XTS_128, key)) == (0, False)
    assert pconfig(qemu, encode(9, Command.SET_KEY_DIRECT, XTS_128, key)) != (0, False)
    for file in platform.log_path.parent.iterdir():
        if file.is_file():
            contents = file.read_bytes()
            for half in (key[:16], key[16:]):
                assert half not in contents
                assert half.hex().encode() not in contents
