# SPDX-License-Identifier: GPL-2.0-or-later
"""What two hosts say to each other, in both directions: `mktme.remote.wire`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import msgspec

from mktme.remote import wire

from ...unit.remote.test_wire import REPLIES, REQUESTS
from ..mutate import mutate_tree
from ..target import Target, refusal

_DEEP: Final = b'{"x":' + b"[" * 1500


def check_request(data: bytes) -> str:
    """Only `WireError` comes out, and what is accepted survives the wire."""
    try:
        request = wire.decode_request(data)
    except wire.WireError as error:
        return _on_one_line(error)
    assert wire.decode_request(wire.line_of(request)) == request
    return type(request).__name__


def check_reply(data: bytes) -> str:
    """As `check_request`; what is a greeting is neither."""
    try:
        reply = wire.decode_reply(data)
    except wire.WireError as error:
        greeting = wire.decode_greeting(data)
        return _on_one_line(error) if greeting is None else "Greeting"
    assert wire.decode_greeting(data) is None
    assert wire.decode_reply(wire.line_of(reply)) == reply
    return type(reply).__name__


def _on_one_line(error: wire.WireError) -> str:
    assert str(error).isprintable(), error
    return refusal(str(error))


def _target(
    name: str,
    check: Callable[[bytes], str],
    messages: Sequence[wire.Message | wire.Greeting],
) -> Target:
    seeds = tuple(wire.line_of(message) for message in messages)
    donors: list[Any] = [msgspec.json.decode(seed) for seed in seeds]

    def mutate(data: bytes, rng: Random) -> bytes | None:
        try:
            return msgspec.json.encode(mutate_tree(msgspec.json.decode(data), rng, donors))
        # msgspec's, of what is not JSON; the others, of what it decodes and cannot encode.
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
            return None

    return Target(name=name, check=check, seeds=(*seeds, _DEEP), max_bytes=8192, mutate=mutate)


TARGETS: Final = (
    _target("remote-request", check_request, REQUESTS),
    _target("remote-reply", check_reply, [*REPLIES, wire.greeting()]),
)
