# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is at the other end of a UNIX socket."""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

_UCRED: Final = struct.Struct("iII")


class Credentials(NamedTuple):
    """A process, its user and its group, as it connected (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def credentials(connection: socket.socket) -> Credentials:
    """The peer's, which the kernel took down.

    Raises:
        OSError: the connection is none any more.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials(*_UCRED.unpack(data))
