# SPDX-License-Identifier: GPL-2.0-or-later
"""What a histogram of constant size tells of times, beside what sorting them all tells."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.datapath.latency import Latencies


def filled(nanoseconds: list[int]) -> Latencies:
    latencies = Latencies()
    for one in nanoseconds:
        latencies.add(one)
    return latencies


def test_nothing_was_timed() -> None:
    assert Latencies().percentile(0.5) is None
    assert Latencies().count == 0


@given(st.lists(st.integers(256, 10**12), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_percentile_is_that_of_the_sorted_times(times: list[int], share: float) -> None:
    exact = sorted(times)[max(0, -int(-share * len(times) // 1) - 1)]
    found = filled(times).percentile(share)
    assert found is not None
    assert found * 1e9 == pytest.approx(exact, rel=0.07)


@pytest.mark.parametrize(
    ("nanoseconds", "least", "most"), [(0, 256, 288), (1 << 60, 1 << 39, 1 << 40)]
)
def test_what_is_out_of_range_is_at_its_end(nanoseconds: int, least: int, most: int) -> None:
    found = filled([nanoseconds]).percentile(0.5)
    assert found is not None
    assert least <= found * 1e9 <= most
