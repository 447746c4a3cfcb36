# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's audit log: who got what, and why not; JSON, one record a line.

No key or secret can be in it: a record is made of names, numbers and checks' reasons. It is only
ever appended to, by all workers, each record with one write(2). What cannot be recorded is not
done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self
from uuid import UUID

import msgspec

from mktme.broker.errors import AuditError
from mktme.engine.append_file import open_append, timestamp
from mktme.engine.text import shown

AUDIT_FILE: Final = "audit.jsonl"


class FailedCheck(msgspec.Struct, frozen=True):
    """A check that failed, and why; the client is told its name alone."""

    name: str
    reason: str


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line.

    Attributes:
        event: "attest", "release", "change" (by an administrator), "serve" and "stop".
        outcome: "done", or the kind of problem.
        client: the network address of who asked.
        session: the first 16 hexadecimal digits of its id.
        tenant: whose policy was asked for.
        policy: which; with its version.
        vm: which VM was asked about; the next three are of evidence that a trusted platform signed.
        name: that VM's name.
        keyid: that VM's.
        ueid: that platform's identity, hexadecimal.
        resource: which resource was asked for; with the version that was released.
        checks: those that failed.
        generation: of the store.
        what: what an administrator changed.
    """

    event: str
    outcome: str
    client: str | None = None
    session: str | None = None
    tenant: str | None = None
    policy: str | None = None
    policy_version: int | None = None
    vm: UUID | None = None
    name: str | None = None
    keyid: int | None = None
    ueid: str | None = None
    resource: str | None = None
    resource_version: int | None = None
    checks: tuple[FailedCheck, ...] = ()
    generation: int | None = None
    what: str | None = None


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
        try:
            self._file = open_append(path)
        except OSError as error:
            raise AuditError(f"audit log {path}: {error.strerror}") from error

    def write(self, record: Record) -> None:
        """Append a record.

        Raises:
            AuditError: it cannot be written.
        """
        fields = {"time": timestamp(self._clock()), **msgspec.to_builtins(record)}
        # Names are others' choice; see `mktme.engine.text`.
        line = msgspec.json.encode(_shown(fields)) + b"\n"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise AuditError(f"audit log {self._path}: {error.strerror}") from error
        if written != len(line):
            raise AuditError(f"audit log {self._path}: no space for a record")

    def close(self) -> None:
        """Close the file; again does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _shown(value: object) -> object:
    match value:
        case str():
            return shown(value)
        case dict():
            return {key: _shown(one) for key, one in value.items()}
        case list() | tuple():
            return [_shown(one) for one in value]
        case _:
            return value
