# SPDX-License-Identifier: GPL-2.0-or-later
"""The bound of the `inline` data path: how much of a guest's RAM is plaintext, seen from outside.

The engine says that itself, but a proof does not ask it: this samples how much memory the kernel
has allocated to the RAM memfds of the QEMU process (fstat(2), st_blocks), for as long as it runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mktme.proof.guest_ram import ram_of
from mktme.vm.platform import Vm

SAMPLE_INTERVAL_S: Final = 0.002


@dataclass(slots=True)
class Residency:
    """How much of a guest's RAM was in memory.

    Attributes:
        limit_bytes: the most that is allowed.
        peak_bytes: the most that was seen.
        samples: how often it was looked at.
    """

    limit_bytes: int
    peak_bytes: int = 0
    samples: int = 0

    @property
    def passed(self) -> bool:
        """Whether there was something to see, and never too much."""
        return self.samples > 0 and 0 < self.peak_bytes <= self.limit_bytes


@contextlib.contextmanager
def sampled(vm: Vm, limit_bytes: int) -> Iterator[Residency]:
    """Sample a VM's memory for as long as the `with` lasts."""
    found = Residency(limit_bytes)
    stop = threading.Event()

    def sample() -> None:
        while True:
            found.peak_bytes = max(found.peak_bytes, ram.allocated_bytes())
            found.samples += 1
            if stop.wait(SAMPLE_INTERVAL_S):
                return

    with ram_of(vm) as ram:
        sampler = threading.Thread(target=sample, name="mktme-residency", daemon=True)
        sampler.start()
        try:
            yield found
        finally:
            stop.set()
            sampler.join()
