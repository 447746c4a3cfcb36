# SPDX-License-Identifier: GPL-2.0-or-later
"""The control protocol's messages, in both directions: `mktme.service.wire`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import msgspec

from mktme.service import wire

from ...unit.service.test_wire import EVENTS, REPLIES, REQUESTS
from ..mutate import mutate_tree
from ..target import Target, refusal

# Deeper than Python's recursion limit, which msgspec keeps as well.
_DEEP: Final = b"\x82\xa1x" + b"\x91" * 1500 + b"\xc0\xa4type\xa9GetStatus"


def check_request(data: bytes) -> str:
    """Only `ProtocolError` comes out, and what is accepted survives the wire."""
    try:
        request = wire.decode_request(data)
    except wire.ProtocolError as error:
        return _on_one_line(error)
    assert wire.decode_request(_body(request)) == request
    return type(request).__name__


def check_reply(data: bytes) -> str:
    """As `check_request`; by the bytes of the message, since NaN equals nothing."""
    try:
        reply = wire.decode_reply(data)
    except wire.ProtocolError as error:
        return _on_one_line(error)
    again = wire.decode_reply(_body(reply))
    assert type(again) is type(reply)
    assert _body(again) == _body(reply)
    return type(reply).__name__


def _on_one_line(error: wire.ProtocolError) -> str:
    assert str(error).isprintable(), error
    return refusal(str(error))


def _body(message: wire.Message) -> bytes:
    return wire.frame(message)[wire.LENGTH_BYTES :]


def _target(
    name: str, check: Callable[[bytes], str], messages: Sequence[wire.Message], max_bytes: int
) -> Target:
    seeds = tuple(_body(message) for message in messages)
    donors: list[Any] = [msgspec.msgpack.decode(seed) for seed in seeds]

    def mutate(data: bytes, rng: Random) -> bytes | None:
        try:
            tree = mutate_tree(msgspec.msgpack.decode(data), rng, donors)
            return msgspec.msgpack.encode(tree)
        # msgspec's, of what is not MessagePack; the others, of what it decodes and cannot encode.
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
            return None

    return Target(name=name, check=check, seeds=(*seeds, _DEEP), max_bytes=max_bytes, mutate=mutate)


TARGETS: Final = (
    _target("request", check_request, REQUESTS, 2048),
    _target("reply", check_reply, [*REPLIES, *EVENTS], 4096),
)
