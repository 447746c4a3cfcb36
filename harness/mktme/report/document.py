# SPDX-License-Identifier: GPL-2.0-or-later
"""The run report that a page is made of, read from its file, which may be anybody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import msgspec

from mktme.engine.errors import MktmeError
from mktme.proof.report import SCHEMA_VERSION, RunReport

MAX_BYTES: Final = 64 << 20
"""No run's report comes near; what does is another file, or one that has no end."""
_SCHEMA: Final = "mktme.run"


class ReportError(MktmeError):
    """A file that is not the report of a run."""


def read_report(path: Path) -> RunReport:
    """Read what `mktme run --json` or `mktme demo --json` wrote.

    Raises:
        ReportError: it cannot be read, is another document or of another version, or makes no
            sense.
    """
    hint = "give it what mktme run --json FILE, or demo, wrote"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}", hint=hint) from error
    if len(data) > MAX_BYTES:
        raise ReportError(f"{path}: more than {MAX_BYTES >> 20} MiB: no run's report", hint=hint)
    try:
        outline = msgspec.json.decode(data)
    # UnicodeDecodeError and RecursionError: msgspec's own are not all that it raises.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReportError(f"{path}: no JSON: {error}", hint=hint) from error
    schema = outline.get("schema") if isinstance(outline, dict) else None
    if schema != _SCHEMA:
        what = "no report of mktme's" if not isinstance(schema, str) else f"{json.dumps(schema)}"
        raise ReportError(f"{path}: {what}, not {_SCHEMA}", hint=hint)
    if (version := outline.get("version")) != SCHEMA_VERSION:
        raise ReportError(
            f"{path}: version {json.dumps(version)} of {_SCHEMA}, and this mktme reads"
            f" {SCHEMA_VERSION}",
            hint="use the mktme that wrote it",
        )
    try:
        _check_numbers(outline)
        return msgspec.convert(outline, RunReport)
    except ValueError as error:  # msgspec.ValidationError among them
        raise ReportError(f"{path}: not as {_SCHEMA} is described: {error}", hint=hint) from error


def _check_numbers(value: object) -> None:
    """Refuse integers that no counter can have, and that no float holds: JSON knows no bounds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            _check_numbers(one)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("an integer of more than 64 bits")
