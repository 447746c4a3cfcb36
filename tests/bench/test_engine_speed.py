# SPDX-License-Identifier: GPL-2.0-or-later
"""Speed that is promised of a real engine over its socket; `mktme bench` prints it too."""

from __future__ import annotations

from mktme.proof.bench import CALL_TARGET_MS, REKEY_TARGET_GB_PER_S, measure_engine


def test_requests_are_as_fast_as_promised() -> None:
    """Pages re-keyed at 0.5 GB/s or more; MSRs and PCONFIG in less than 1 ms, medians.

    Other work on the machine can only make it slower, so one of three measurements will do.
    """
    found = [measure_engine() for _ in range(3)]
    assert any(
        one.rekey_bytes == 256 << 20
        and one.rekey_bytes_per_s / 1e9 >= REKEY_TARGET_GB_PER_S
        and max(one.rdmsr_s, one.wrmsr_s, one.pconfig_s) * 1e3 <= CALL_TARGET_MS
        for one in found
    ), found
