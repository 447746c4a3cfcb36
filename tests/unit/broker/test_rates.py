# SPDX-License-Identifier: GPL-2.0-or-later
"""How often a client may ask."""

from __future__ import annotations

from mktme.broker.rates import ADDRESSES_MAX, ClientRates


def test_burst_then_rate() -> None:
    now = 0.0
    rates = ClientRates(2, 3, lambda: now)
    assert [rates.take("192.0.2.1") for _ in range(3)] == [0, 0, 0]
    assert rates.take("192.0.2.1") == 0.5
    assert rates.take("192.0.2.2") == 0  # another client's own
    now = 0.5
    assert rates.take("192.0.2.1") == 0
    assert rates.take("192.0.2.1") == 0.5
    now = 100.0
    assert [rates.take("192.0.2.1") for _ in range(4)] == [0, 0, 0, 0.5]


def test_ipv6_customers_have_one_share() -> None:
    rates = ClientRates(1, 1, lambda: 0.0)
    assert rates.take("2001:db8::1") == 0
    assert rates.take("2001:db8::2:1") > 0
    assert rates.take("2001:db8:0:1::1") == 0


def test_memory_is_bounded() -> None:
    rates = ClientRates(1, 1, lambda: 0.0)
    for n in range(ADDRESSES_MAX + 100):
        rates.take(f"client {n}")
    assert len(rates._buckets) == ADDRESSES_MAX
    assert rates.take(f"client {ADDRESSES_MAX + 99}") > 0
