# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests' counters were in the course of a run.

The engine counts; it does not remember when. So a thread asks it ten times a second while guests
work, and keeps what it says in bounded memory: when there is no more room, every other sample goes
and the thread asks half as often.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Final
from uuid import UUID

import msgspec

from mktme.engine.errors import MktmeError
from mktme.service import wire
from mktme.service.client import EngineClient

INTERVAL_S: Final = 0.1
"""As often as a busy guest is drained: in between, nothing new is to be seen."""
CAPACITY: Final = 512
"""The most samples that are kept: more than a chart has columns."""
SHARE: Final = 0.02
"""The most of its time that the engine is to spend on answers: they take longer for more DRAM."""

_LEAST_STEP_S: Final = 0.000_9

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


@dataclass(frozen=True, slots=True)
class Timeline:
    """A guest's counters over time, as columns of one value a sample.

    Counters only grow, and their rates are for the reader to take; `resident_bytes` is what it is
    at that moment. A column that the guest's data path has no such counter for is empty.

    Attributes:
        at_s: when, seconds from the guest's first instruction, to the millisecond; ascending.
        worked_s: from when to when its workload ran; None if it had none.
        lines_stored: changed lines of 64 bytes that a vCPU's store had marked.
        lines_other: `shadow`: changed lines that only a page scan saw.
        lines_written: `inline`: lines whose ciphertext changed when their page went out.
        pages_fetched: `inline`: pages that came into the window.
        pages_evicted: `inline`: pages that went out.
        faults: `inline`: accesses to pages that were not in the window.
        resident_bytes: `inline`: plaintext in the window.
    """

    at_s: tuple[Seconds, ...]
    worked_s: tuple[Seconds, Seconds] | None
    lines_stored: tuple[Count, ...] = ()
    lines_other: tuple[Count, ...] = ()
    lines_written: tuple[Count, ...] = ()
    pages_fetched: tuple[Count, ...] = ()
    pages_evicted: tuple[Count, ...] = ()
    faults: tuple[Count, ...] = ()
    resident_bytes: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        """Check that the columns belong together."""
        for name in COUNTERS:
            if len(getattr(self, name)) not in (0, len(self.at_s)):
                raise ValueError(f"{name} has another number of samples than at_s")
        # Whole milliseconds are apart by no more exactly than a float is.
        if any(later - earlier < _LEAST_STEP_S for earlier, later in itertools.pairwise(self.at_s)):
            raise ValueError("at_s does not ascend, by a millisecond at least")


COUNTERS: Final = tuple(
    one.name for one in fields(Timeline) if one.name not in ("at_s", "worked_s")
)
_SHADOW: Final = ("lines_stored", "lines_other")
_INLINE: Final = tuple(name for name in COUNTERS if name != "lines_other")


class Recorder:
    """Samples of all guests of an engine; `recording` makes one."""

    def __init__(self, capacity: int = CAPACITY, interval_s: float = INTERVAL_S) -> None:
        self.interval_s = interval_s
        self._capacity = capacity
        self._lock = threading.Lock()
        self._samples: list[tuple[float, dict[UUID, wire.Traffic | wire.Paging]]] = []

    def add(self, at: float, vms: tuple[wire.VmStatus, ...]) -> None:
        """Take a sample.

        Args:
            at: when, by `time.monotonic`.
            vms: what the engine says of them.
        """
        found = {vm.vm: one for vm in vms if (one := vm.paging or vm.traffic) is not None}
        with self._lock:
            if len(self._samples) == self._capacity:
                # A guest's first sample may go so, its last one not: totals are in that.
                del self._samples[-2::-2]
                self.interval_s *= 2
            self._samples.append((at, found))

    def timeline(
        self, vm: UUID, started: float, worked: tuple[float, float] | None = None
    ) -> Timeline | None:
        """What was sampled of a guest from its first instruction on.

        Args:
            vm: which.
            started: when that was, by `time.monotonic`.
            worked: from when to when its workload ran, by `time.monotonic`.

        Returns:
            None if nothing was.
        """
        with self._lock:
            # Of two samples in the same millisecond, the later one.
            samples = {
                _ms(at - started): vms[vm]
                for at, vms in self._samples
                if vm in vms and at >= started
            }
        if not samples:
            return None
        counters = tuple(samples.values())
        columns = {
            name: tuple(getattr(one, name) for one in counters)
            for name in (_INLINE if isinstance(counters[0], wire.Paging) else _SHADOW)
        }
        since = None if worked is None else (_ms(worked[0] - started), _ms(worked[1] - started))
        return Timeline(tuple(samples), since, **columns)


@contextlib.contextmanager
def recording(engine: EngineClient) -> Iterator[Recorder]:
    """Sample an engine's VMs for as long as the `with` lasts, and once more at its end."""
    recorder = Recorder()
    stop = threading.Event()

    def sample() -> None:
        # An engine that is gone, or hangs, is for the run to tell of.
        with contextlib.suppress(MktmeError):
            quickest = float("inf")  # others took longer since the engine had other things to do
            while True:
                asked = time.monotonic()
                vms = engine.status().vms
                quickest = min(quickest, time.monotonic() - asked)
                recorder.add(asked, vms)
                if stop.wait(max(recorder.interval_s, quickest / SHARE)):
                    return

    sampler = threading.Thread(target=sample, name="mktme-timeline", daemon=True)
    sampler.start()
    try:
        yield recorder
    finally:
        stop.set()
        sampler.join()
    with contextlib.suppress(MktmeError):
        recorder.add(time.monotonic(), engine.status().vms)


def _ms(seconds: float) -> float:
    return round(seconds, 3)
