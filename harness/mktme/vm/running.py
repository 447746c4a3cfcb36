# SPDX-License-Identifier: GPL-2.0-or-later
"""The platforms that run on this machine now, for commands that look at one from outside."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mktme.service.client import EngineClient, EngineGoneError, EngineRefusedError, ServiceError
from mktme.service.server import CONTROL_SOCKET
from mktme.service.wire import Role, RoleError
from mktme.vm.host import UsageError

# What `mktme.vm.reaper.process_dir` and `mktme.vm.platform.Platform` call their directories.
_SOCKETS: Final = f"mktme-*/run-*/{CONTROL_SOCKET}"
_HINT: Final = "mktme run --keep keeps one running; --engine SOCKET names one elsewhere"


def control_sockets() -> list[Path]:
    """The control socket of each platform of this user that answers."""
    return [path for path in sorted(Path(tempfile.gettempdir()).glob(_SOCKETS)) if _answers(path)]


@contextlib.contextmanager
def connected(control_socket: Path | None, role: Role) -> Iterator[EngineClient]:
    """A connection to a running platform.

    Args:
        control_socket: which one; None for the only one that there is.
        role: what to ask for.

    Raises:
        UsageError: there is none, or there are several, or it grants no such role.
        ServiceError: it cannot be asked.
    """
    with _connect(_the_only_one() if control_socket is None else control_socket, role) as client:
        yield client


def _the_only_one() -> Path:
    sockets = control_sockets()
    if not sockets:
        raise UsageError("no platform is running", hint=_HINT)
    if len(sockets) > 1:
        raise UsageError(
            f"{len(sockets)} platforms are running",
            hint="choose one: " + " or ".join(f"--engine {path}" for path in sockets),
        )
    return sockets[0]


def _connect(control_socket: Path, role: Role) -> EngineClient:
    try:
        return EngineClient.connect(control_socket, role)
    except EngineGoneError as error:
        raise UsageError(f"no engine answers at {control_socket}", hint=_HINT) from error
    except EngineRefusedError as error:
        if error.error != RoleError.__name__:
            raise
        raise UsageError(
            "only the process that started this platform may change it",
            hint="mktme run --keep starts one that others may change",
        ) from error


def _answers(path: Path) -> bool:
    # Anybody can make such a directory. In others' we may not look, and a socket may outlive its
    # engine for a moment.
    try:
        if path.stat().st_uid != os.geteuid():
            return False
        with EngineClient.connect(path, Role.OBSERVER):
            return True
    except (ServiceError, OSError):
        return False
