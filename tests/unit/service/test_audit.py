# SPDX-License-Identifier: GPL-2.0-or-later
"""The audit log tells who did what, and what was refused; and what cannot be told is not done."""

from __future__ import annotations

import os
import resource
import signal
import typing
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from mktme.engine.errors import KeyIdError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.audit import AUDIT_FILE, AuditError, AuditLog, Peer, Record
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError
from mktme.service.server import CONTROL_SOCKET
from mktme.service.wire import Role

from ..conftest import Guests
from .test_wire import EVENTS, REQUESTS

OWNER = Peer(pid=4711, uid=1000, role=Role.OWNER)
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
# Whoever adds a request thinks about whether it is to be told of: this list, or the class, is
# wrong else.
NOT_AUDITED = {
    *(wire.GetStatus, wire.FlushVm, wire.ReadVm, wire.ReadDram, wire.ReadMarks, wire.ReadMsr),
    *(
        wire.DescribeDomain,
        wire.GetIdentity,
        wire.WriteSidecar,
        wire.VmsHeld,
        wire.VmsReleased,
        wire.CancelCapture,
        wire.DecryptLines,
    ),
}


def records(path: Path) -> list[Record]:
    return [msgspec.json.decode(line, type=Record) for line in path.read_bytes().splitlines()]


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Within the `with`, this process's files grow no larger (setrlimit(2): EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[AuditLog]:
    with AuditLog(tmp_path / AUDIT_FILE, lambda: NOW) as audit:
        yield audit


@pytest.mark.parametrize("command", typing.get_args(wire.Command), ids=lambda one: one.__name__)
def test_what_is_audited(command: type[wire.Command]) -> None:
    assert command.is_audited is (command not in NOT_AUDITED)


def test_record_says_who_did_what(audit: AuditLog, tmp_path: Path) -> None:
    request = wire.ProgramKey(mode=KeyMode.RANDOM, algorithm=Algorithm.AES_XTS_256)
    audit.request(OWNER, request, wire.KeyProgrammed(keyid=5))
    (line,) = (tmp_path / AUDIT_FILE).read_text().splitlines()
    assert msgspec.json.decode(line) == {
        "time": "2026-11-25T12:00:00.000Z",
        "number": 1,
        "event": "ProgramKey",
        "outcome": "done",
        "pid": 4711,
        "uid": 1000,
        "role": "owner",
        "keyid": 5,
        "mode": "random",
        "algorithm": "aes-xts-256",
    }


def test_refusal_says_why(audit: AuditLog, tmp_path: Path) -> None:
    audit.request(OWNER, wire.ClearKey(keyid=5), KeyIdError("KeyID 5 is in use", keyid=5))
    (record,) = records(tmp_path / AUDIT_FILE)
    assert (record.outcome, record.reason) == ("KeyIdError", "KeyID 5 is in use")


def test_pconfig_is_told_by_its_keyid_and_status(audit: AuditLog, tmp_path: Path) -> None:
    program = (63).to_bytes(2, "little") + bytes(190)
    request = wire.ExecutePconfig(leaf=0, address=256, program=program)
    audit.request(OWNER, request, wire.PconfigDone(status=4))
    (record,) = records(tmp_path / AUDIT_FILE)
    assert (record.keyid, record.status, record.address) == (63, 4, None)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: type(one).__name__)
def test_every_request_can_be_recorded(
    audit: AuditLog, tmp_path: Path, request_: wire.Request
) -> None:
    if isinstance(request_, wire.Hello):
        return
    audit.request(OWNER, request_, wire.Done())
    assert len(records(tmp_path / AUDIT_FILE)) == request_.is_audited


@pytest.mark.parametrize("event", EVENTS, ids=lambda one: type(one).__name__)
def test_every_event_can_be_recorded(audit: AuditLog, tmp_path: Path, event: wire.Event) -> None:
    audit.event(event)
    (record,) = records(tmp_path / AUDIT_FILE)
    assert record.event == type(event).__name__


def test_text_of_a_peer_makes_no_lines(audit: AuditLog, tmp_path: Path) -> None:
    audit.event(wire.LinkRefused(reason='x"\n{"event":"forged"}'))
    (record,) = records(tmp_path / AUDIT_FILE)
    assert record.event == "LinkRefused"


def test_log_is_private_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / AUDIT_FILE
    for _ in range(2):
        with AuditLog(path) as audit:
            audit.event(wire.VmUnlinked(vm=uuid.uuid4()))
    assert [one.number for one in records(path)] == [1, 1]
    assert path.stat().st_mode & 0o777 == 0o600
    assert abs(datetime.fromisoformat(records(path)[0].time) - datetime.now(UTC)) < timedelta(
        minutes=1
    )


def test_log_is_no_link_to_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / AUDIT_FILE).symlink_to("elsewhere")
    with pytest.raises(AuditError, match="audit log"):
        AuditLog(tmp_path / AUDIT_FILE)


def test_nothing_is_done_that_cannot_be_recorded(audit: AuditLog, tmp_path: Path) -> None:
    program = wire.ProgramKey(mode=KeyMode.RANDOM, algorithm=Algorithm.AES_XTS_128)
    with file_size_limit(40):
        audit.request(OWNER, program, wire.KeyProgrammed(keyid=1))
        with pytest.raises(AuditError, match="takes no more records"):
            audit.admit(program)
        audit.admit(wire.GetStatus())  # changes nothing
        audit.admit(wire.ClearKey(keyid=1))  # a key is destroyed all the same
    audit.admit(program)  # there is room again: what was cut off is whole
    assert [one.keyid for one in records(tmp_path / AUDIT_FILE)] == [1]


def test_engine_records_what_its_clients_do(shared_engine: EngineProcess, tmp_path: Path) -> None:
    run_dir = shared_engine.log_path.parent
    before = len(records(run_dir / AUDIT_FILE))
    key = tmp_path / "key"
    material = bytes(range(32))
    key.touch(0o600)
    key.write_bytes(material)
    with EngineClient.connect(run_dir / CONTROL_SOCKET, Role.OWNER) as client:
        keyid = client.program_key(KeyMode.DIRECT, Algorithm.AES_XTS_128, key_file=key)
        client.clear_key(keyid)
        with pytest.raises(EngineRefusedError):
            client.clear_key(keyid)
    with (
        EngineClient.connect(run_dir / CONTROL_SOCKET, Role.OBSERVER) as observer,
        pytest.raises(EngineRefusedError),
    ):
        observer.clear_key(keyid)
    found = records(run_dir / AUDIT_FILE)[before:]
    assert [(one.event, one.keyid, one.outcome, one.role) for one in found] == [
        ("ProgramKey", keyid, "done", Role.OWNER),
        ("ClearKey", keyid, "done", Role.OWNER),
        ("ClearKey", keyid, "KeyIdError", Role.OWNER),
        ("ClearKey", keyid, "RoleError", Role.OBSERVER),
    ]
    assert {(one.pid, one.uid) for one in found} == {(os.getpid(), os.geteuid())}
    written = (run_dir / AUDIT_FILE).read_bytes()
    assert material not in written
    assert material.hex().encode() not in written


def test_engine_records_what_its_vms_do(guests: Guests, engine: EngineProcess) -> None:
    qemu, added = guests.link()
    guests.wait(wire.VmLinked(vm=qemu.vm))
    path = engine.log_path.parent / AUDIT_FILE
    of_it = [one for one in records(path) if one.vm == qemu.vm]
    assert [one.event for one in of_it] == ["AddVm", "VmLinked"]
    assert of_it[0].keyid == added.keyid


def test_audit_log_may_outlive_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    (tmp_path / "run").mkdir()
    with EngineProcess(tmp_path / "run", tmp_path / "dram.img", 8 << 20, audit=path) as engine:
        engine.client.program_key(KeyMode.RANDOM, Algorithm.AES_XTS_128)
    assert [one.event for one in records(path)] == ["ProgramKey"]


def test_engine_without_a_place_for_its_log_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "none" / "audit.jsonl"
    with (
        pytest.raises(EngineRefusedError, match="audit log"),
        EngineProcess(tmp_path, tmp_path / "dram.img", 8 << 20, audit=path),
    ):
        pass
