# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's audit log: who changed what, or was refused; JSON, one record a line.

It tells of every request that changes keys, pages or VMs, reads memory for somebody, or signs, and
of what QEMUs and DRAM did meanwhile. No key can be in it: records are made of requests and answers,
in which there is none (`mktme.service.wire`). It is only ever appended to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self
from uuid import UUID

import msgspec

from mktme.engine.append_file import open_append, timestamp
from mktme.engine.errors import EngineError, MktmeError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire

AUDIT_FILE: Final = "audit.jsonl"
"""Its name in the engine's private directory, unless it is to outlive that."""

log = logging.getLogger(__name__)


class AuditError(EngineError):
    """What happens could not be recorded; nothing that is to be recorded is done then."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks (unix(7), SO_PEERCRED).

    Attributes:
        pid: its process.
        uid: that process's user.
        role: what it was granted, None before its Hello.
    """

    pid: int
    uid: int
    role: wire.Role | None


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line.

    Attributes:
        time: UTC, RFC 3339.
        number: counts the records of this engine, from 1.
        event: the request or event, as its class in `mktme.service.wire` is called; GuestWrmsr or
            GuestPconfig for what a guest executed, and then `pid` and `uid` are its QEMU's.
        outcome: "done", or the class of the error.
        reason: the error's text.
        pid: who asked; so the next two. None of what nobody asked for.
        status: what PCONFIG left in RAX.
        msr: which register was to be written.
        address: where in DRAM, bytes; with `size_bytes`.
        ram_offset: where in the VM's RAM, bytes; with `size_bytes`.
        path: of a copy of DRAM.
    """

    time: str
    number: int
    event: str
    outcome: str
    reason: str | None = None
    pid: int | None = None
    uid: int | None = None
    role: wire.Role | None = None
    vm: UUID | None = None
    name: str | None = None
    keyid: int | None = None
    mode: KeyMode | None = None
    algorithm: Algorithm | None = None
    status: int | None = None
    msr: int | None = None
    address: int | None = None
    ram_offset: int | None = None
    size_bytes: int | None = None
    path: str | None = None


# What destroys keys is done whatever becomes of its record.
_ALWAYS: Final = (wire.RemoveVm, wire.ClearKey, wire.PowerPlatform)
# What waits for room. Refusals can be had at will, and are dropped beyond that.
_UNWRITTEN_MAX_BYTES: Final = 1 << 20
_SUBJECT: Final = ("vm", "name", "keyid", "mode", "algorithm", "status", "msr", "path")
_RANGE: Final = ("address", "ram_offset", "size_bytes")


class AuditLog:
    """Appends records to a file; a context manager.

    Args:
        path: of the file, made (0600) if it is not there.
        clock: the time, in UTC.

    Raises:
        AuditError: it cannot be opened.
    """

    def __init__(
        self, path: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path = path
        self._clock = clock
        self._number = 0
        self._unwritten = b""
        try:
            self._file = open_append(path)
        except OSError as error:
            raise AuditError(f"audit log {path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._file)

    def admit(self, request: wire.Command) -> None:
        """Check that a request can be recorded, before it is done.

        Raises:
            AuditError: earlier records are not in the file, and cannot be written now either.
        """
        if request.is_audited and not isinstance(request, _ALWAYS):
            self.require_room()

    def require_room(self) -> None:
        """Check that what is done next can be recorded.

        Raises:
            AuditError: as `admit`.
        """
        if self._unwritten:
            self._write()
        if self._unwritten:
            raise AuditError(
                f"the audit log {self._path} takes no more records",
                hint="make room for it; until then nothing is done that it is to tell of",
            )

    def request(
        self, peer: Peer, request: wire.Command, reply: wire.Reply | MktmeError | None
    ) -> None:
        """Record a request, if it is one to be recorded.

        Args:
            peer: who sent it.
            request: what it asked for.
            reply: the answer; an error if it was refused or failed; None for a fault of ours.
        """
        if not request.is_audited:
            return
        fields = _subject(request)
        reason = None
        if isinstance(reply, MktmeError):
            outcome, reason = type(reply).__name__, str(reply)
        elif reply is None:
            outcome = "InternalError"
        else:
            outcome = "done"
            fields |= _subject(reply)
        self._append(
            type(request).__name__,
            outcome,
            reason=reason,
            pid=peer.pid,
            uid=peer.uid,
            role=peer.role,
            **fields,
        )

    def guest_call(
        self,
        peer: Peer,
        vm: UUID,
        instruction: str,
        error: MktmeError | None,
        **subject: int | None,
    ) -> None:
        """Record what a guest executed.

        Args:
            peer: its QEMU.
            vm: which VM.
            instruction: "WRMSR" or "PCONFIG".
            error: why it raised #GP, None if it did not.
            subject: `msr`, or `keyid` and `status`.
        """
        outcome = "done" if error is None else type(error).__name__
        reason = None if error is None else str(error)
        fields = {name: value for name, value in subject.items() if value is not None}
        self._append(
            f"Guest{instruction.capitalize()}",
            outcome,
            reason=reason,
            pid=peer.pid,
            uid=peer.uid,
            vm=vm,
            **fields,
        )

    def event(self, event: wire.Event) -> None:
        """Record what happened without being asked for."""
        reason = getattr(event, "message", None) or getattr(event, "reason", None)
        self._append(type(event).__name__, "done", reason=reason, **_subject(event))

    def _append(self, event: str, outcome: str, **fields: object) -> None:
        self._number += 1
        record = Record(
            time=timestamp(self._clock()),
            number=self._number,
            event=event,
            outcome=outcome,
            **fields,  # type: ignore[arg-type]
        )
        line = msgspec.json.encode(record) + b"\n"
        if len(self._unwritten) + len(line) > _UNWRITTEN_MAX_BYTES and outcome != "done":
            return  # its number is missing, which tells of it
        self._unwritten += line
        self._write()

    def _write(self) -> None:
        try:
            # A disk that fills up takes a part; the rest of the line follows when there is room.
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            log.error("audit log %s: %s", self._path, error.strerror)


def _subject(message: wire.Message) -> dict[str, object]:
    """What a message is about, by the fields that messages call alike."""
    found = {name: getattr(message, name, None) for name in (*_SUBJECT, *_RANGE)}
    if isinstance(message, wire.ExecutePconfig):
        # Its `address` is RBX. KEYID is the structure's first 16 bits (336907, table 6-4).
        found |= {"address": None, "keyid": int.from_bytes(message.program[:2], "little")}
    return {name: value for name, value in found.items() if value is not None}
