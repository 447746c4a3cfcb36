# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of the engine any peer can have, and why; sizes of messages are in `wire`.

The connection that the engine's starter inherited to it has no time limits: a starter that was
stopped (Ctrl-Z, a debugger) finds its VMs as it left them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mktme.engine.errors import MktmeError
from mktme.service.wire import REPLY_MAX_BYTES, Role

CONTROL_CONNECTIONS: Final = 32
"""Clients that said Hello. An owner, a bench and some monitors are few; and 32 peers that read
nothing cost the engine at most 32 of the largest replies, 130 MiB."""

WAITING_CONNECTIONS: Final = 16
"""Connections of each socket that said nothing yet. Whoever means well speaks at once, so the
oldest of more gives way; the engine's descriptors (1024 by default) cannot be used up."""

CLOSING_CONNECTIONS: Final = 16
"""Connections of each socket, further to these, that are being closed. With descriptors of a
hostile plugin this can take for ever; no more are accepted then, but what is linked goes on."""

HELLO_TIMEOUT_S: Final = 5.0
"""From connection to Hello. Peers are on the same machine, and send it first thing."""

FRAME_TIMEOUT_S: Final = 10.0
"""From the first byte of a frame to the last: 64 KiB at most, local, and sent in one go."""

REPLY_TIMEOUT_S: Final = 30.0
"""Until a peer has read what it asked for. As long as clients wait for an answer
(`client.CALL_TIMEOUT_S`): slower means stopped."""

STOP_TIMEOUT_S: Final = 1.0
"""At the end, until connections are closed; the starter waits `client.STOP_TIMEOUT_S`."""

EVENT_BUFFER_BYTES: Final = REPLY_MAX_BYTES
"""Output that may wait in the engine when an event comes; beyond that events are not read."""

ACCEPT_RETRY_S: Final = 0.5
"""After accept(2) failed (EMFILE, ENFILE, ENOMEM). The connection stays readable, so trying at
once would be a busy loop; the limits above free something within seconds."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How often something may happen: `burst` at once, `per_s` in the long run."""

    per_s: float
    burst: int


REQUESTS: Final = {Role.OWNER: Rate(5000, 10_000), Role.OBSERVER: Rate(100, 200)}
"""Requests of one connection. An owner's thousands are a tenth of what the engine can do, more
than one process of it asks for, so that only a loop gone wild notices. An observer polls."""

GUEST_CALLS: Final = Rate(50, 500)
"""WRMSR and PCONFIG of one guest, of which each is a line in the audit log. An operating system
writes its registers once and programs each of its KeyIDs; the vCPU of a loop waits."""

REFUSALS: Final = Rate(20, 200)
"""Refused connections that are told of, in the log and as events: both grow with each."""


class LimitError(MktmeError):
    """A peer had its share."""


class TokenBucket:
    """Counts how often something happens against a rate.

    Args:
        rate: what is allowed.
        clock: seconds, monotonic.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._tokens = float(rate.burst)
        self._then = clock()

    def take(self) -> float:
        """Count one more; returns how long to wait before it is done, in seconds."""
        self._refill()
        self._tokens -= 1
        return max(0.0, -self._tokens / self._rate.per_s)

    def try_take(self) -> bool:
        """Count one more if it is within the rate; returns whether it is."""
        self._refill()
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._rate.burst, self._tokens + (now - self._then) * self._rate.per_s)
        self._then = now


class WaitingRoom:
    """Where tasks wait for the first word of their peers; the oldest gives way to a new one."""

    def __init__(self, seats: int) -> None:
        self._seats = seats
        self._waiting: dict[asyncio.Task[object], None] = {}

    @contextlib.contextmanager
    def seat(self) -> Iterator[None]:
        """Wait in the body.

        Raises:
            LimitError: there came too many others.
        """
        task = asyncio.current_task()
        assert task is not None
        if len(self._waiting) >= self._seats:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
        self._waiting[task] = None
        try:
            yield
        except asyncio.CancelledError:
            if task in self._waiting:
                raise  # not for this reason
            task.uncancel()
            raise LimitError("too many connections that say nothing") from None
        finally:
            self._waiting.pop(task, None)
