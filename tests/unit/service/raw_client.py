# SPDX-License-Identifier: GPL-2.0-or-later
"""A control connection of plain bytes, for what `EngineClient` would never send."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from mktme.service import wire

from ..fake_qemu import DEADLINE_S

HELLO = wire.frame(wire.Hello(version=wire.PROTOCOL_VERSION))
HELLO_OBSERVER = wire.frame(wire.Hello(version=wire.PROTOCOL_VERSION, role=wire.Role.OBSERVER))


def framed(body: bytes) -> bytes:
    """Any bytes as a frame."""
    return len(body).to_bytes(4, "little") + body


class RawClient:
    """A connection to a control socket; a context manager."""

    def __init__(self, control_socket: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(control_socket))  # with a timeout it would not wait for its turn
        self.socket.settimeout(DEADLINE_S)

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def answer(self) -> wire.Reply | wire.Event | None:
        """The next message; None when the engine hangs up."""
        length = self._read(4)
        return wire.decode_reply(self._read(int.from_bytes(length, "little"))) if length else None

    def reply(self) -> wire.Reply | None:
        """The next reply; events are let go."""
        while isinstance(message := self.answer(), wire.Event):
            pass
        return message

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.socket.recv(size - len(data))
            except ConnectionResetError:  # it hung up on what we had still sent
                part = b""
            if not part:
                return b""
            data += part
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()
