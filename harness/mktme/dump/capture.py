# SPDX-License-Identifier: GPL-2.0-or-later
"""Capturing DRAM of a platform that other processes run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import UUID

from mktme.dump.image import DumpError
from mktme.engine.sidecar import CaptureRecord, sidecar_path
from mktme.engine.text import spelled
from mktme.service.client import EngineClient


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """The document of `mktme dump capture`.

    Attributes:
        image: the copy.
        sidecar: what describes it.
        vms: names of those whose memory it has.
        capture: as the sidecar has it.
    """

    schema: Literal["mktme.dump-capture"]
    version: Literal[1]
    image: str
    sidecar: str
    vms: tuple[str, ...]
    capture: CaptureRecord


def capture(client: EngineClient, path: Path, names: Sequence[str] = ()) -> CaptureReport:
    """Copy DRAM as it is at one moment to a file, its sidecar beside it; guests go on.

    Args:
        client: an owner's connection, whose events nobody else reads.
        path: of the copy; nothing may be there.
        names: whose memory, names or UUIDs; none: all of DRAM.

    Raises:
        DumpError: there is no such VM, or there are several.
        ServiceError: it failed, and nothing is left of it.
    """
    running = {one.vm: one.name for one in client.status().vms}
    chosen = [_find(running, name) for name in names]
    number = client.start_capture(path, chosen)
    record = client.wait_for_capture(number)
    return CaptureReport(
        schema="mktme.dump-capture",
        version=1,
        image=spelled(path),
        sidecar=str(sidecar_path(path)),
        vms=tuple(running[one] for one in chosen or running),
        capture=record,
    )


def _find(running: dict[UUID, str], name: str) -> UUID:
    found = [one for one, known in running.items() if name in (known, str(one))]
    if len(found) == 1:
        return found[0]
    what = "several VMs are" if found else "no VM is"
    raise DumpError(
        f"{what} named {name!r} on this platform",
        hint=f"there are: {', '.join(running.values()) or 'none'}; a UUID will do, too",
    )
