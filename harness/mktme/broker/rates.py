# SPDX-License-Identifier: GPL-2.0-or-later
"""How often one client address may ask for a challenge: a bucket of tokens for each."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Final

ADDRESSES_MAX: Final = 8192
"""Addresses that are remembered; of more, the one that asked longest ago is forgotten."""
_IPV6_PREFIX: Final = 64  # what one customer has at least (RFC 6177)


class ClientRates:
    """Counts each client's requests against the same rate, in one worker.

    Args:
        per_s: what a client may do in the long run.
        burst: and at once.
        clock: seconds, monotonic.
    """

    def __init__(
        self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        # Tokens and when they were counted; the longest ago first.
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, address: str) -> float:
        """Count a request.

        Args:
            address: the client's.

        Returns:
            0 if it is within the rate; else how many seconds the client has to wait.
        """
        client = _client(address)
        now = self._clock()
        tokens, then = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._per_s)
        wait_s = max(0.0, 1 - tokens) / self._per_s
        self._buckets[client] = (tokens if wait_s else tokens - 1, now)
        if len(self._buckets) > ADDRESSES_MAX:
            del self._buckets[next(iter(self._buckets))]
        return wait_s


def _client(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
