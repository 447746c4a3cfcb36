# SPDX-License-Identifier: GPL-2.0-or-later
"""What clients and the provisioner say to each other, version `PROTOCOL_VERSION`.

A frame is a 4-byte little-endian length and that many bytes of MessagePack. A client sends `Hello`
and is answered with `Ready`; then requests, each answered by what tells of its progress, if there
is any, and one reply. No message carries a secret or a key: they are named by their files.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from mktme.provision.apply import Result
from mktme.provision.errors import ProvisionError
from mktme.provision.plan import Plan
from mktme.provision.state import State
from mktme.provision.tenants import Deployment

PROTOCOL_VERSION: Final = 1
FRAME_MAX_BYTES: Final = 16 << 20
_LENGTH_BYTES: Final = 4


def socket_name(name: str) -> str:
    """The socket of a deployment's provisioner, in the private directory of its process."""
    return f"provision-{name}.sock"


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages; the class name is the tag on the wire."""


class Hello(Message, frozen=True):
    """First message of a client."""

    version: int = PROTOCOL_VERSION


class GetState(Message, frozen=True):
    """Ask for `StateIs`."""


class MakePlan(Message, frozen=True):
    """Ask for `Planned`; `only`: VMs that it is about, None for all."""

    deployment: Deployment
    only: frozenset[str] | None = None


class Apply(MakePlan, frozen=True):
    """Have it done, and ask for `Applied`."""


class Destroy(Message, frozen=True):
    """Have all taken down; after `Applied` the provisioner ends."""


Request: TypeAlias = Hello | GetState | MakePlan | Apply | Destroy


class Ready(Message, frozen=True):
    """The provisioner speaks the client's version, and does not end before the client does."""


class StateIs(Message, frozen=True):
    """What there is."""

    state: State


class Planned(Message, frozen=True):
    """What is to be done, and what there is."""

    plan: Plan
    state: State


class Applied(Message, frozen=True):
    """What was done, and what there is now."""

    results: tuple[Result, ...]
    state: State


class Failure(Message, frozen=True):
    """The request was refused or failed as a whole; `error` is the exception's class."""

    error: str
    message: str
    hint: str | None = None


class StepBegan(Message, frozen=True):
    """A step that takes a while."""

    what: str


class StepEnded(Message, frozen=True):
    """The step that began last is over."""

    well: bool


class Noticed(Message, frozen=True):
    """Something is not as it was asked for."""

    line: str


Progress: TypeAlias = StepBegan | StepEnded | Noticed
Reply: TypeAlias = Ready | StateIs | Planned | Applied | Failure


def _encode_other(value: object) -> object:
    if isinstance(value, Path):
        return os.fspath(value)
    raise NotImplementedError(type(value))


def _decode_other(kind: type, value: Any) -> object:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_requests: Final = msgspec.msgpack.Decoder(Request, dec_hook=_decode_other)
_replies: Final = msgspec.msgpack.Decoder(Reply | Progress, dec_hook=_decode_other)


def send(connection: socket.socket, message: Message) -> None:
    """Send a message.

    Raises:
        OSError: nobody takes it.
    """
    body = _encoder.encode(message)
    connection.sendall(len(body).to_bytes(_LENGTH_BYTES, "little") + body)


def requests(connection: socket.socket) -> Generator[Request, None, None]:
    """What a client sends, until it ends.

    Raises:
        ProvisionError: it sends what is no request.
    """
    for body in _frames(connection):
        yield _decoded(_requests, body)


def replies(connection: socket.socket) -> Generator[Reply | Progress, None, None]:
    """What the provisioner sends, until it ends; otherwise as `requests`."""
    for body in _frames(connection):
        yield _decoded(_replies, body)


def _decoded(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    # ValueError: msgspec's own, what types check themselves, text that is no UTF-8.
    except (ValueError, RecursionError, ProvisionError) as error:
        raise ProvisionError(
            "the provisioner and this command do not understand each other",
            hint="they are of different versions: destroy with the version that applied",
        ) from error


def _frames(connection: socket.socket) -> Generator[bytes, None, None]:
    with connection.makefile("rb") as stream:
        while len(header := stream.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
            length = int.from_bytes(header, "little")
            if length > FRAME_MAX_BYTES:
                raise ProvisionError(f"a message of {length} bytes")
            body = stream.read(length)
            if len(body) < length:
                return
            yield body
