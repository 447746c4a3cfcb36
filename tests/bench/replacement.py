# SPDX-License-Identifier: GPL-2.0-or-later
"""What the replacement policies are worth: the figures of docs/adr/0009-replacement-policy.md.

::

    python tests/bench/replacement.py [--window 25% ...] [--policy fifo ...] [--rounds 1]
    python tests/bench/replacement.py --operations

The first boots guest `tiny` under each policy and window, has it run its workload, and prints
faults and pages moved in either phase, and the time over that of plain QEMU. The second times the
window's own operations and needs no guest.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import MAX_READ_AHEAD_PAGES, Policy, Window
from mktme.engine.errors import MktmeError
from mktme.proof.transparency import run_workload
from mktme.service.wire import Paging
from mktme.vm import images
from mktme.vm.config import VmConfig, region_bytes
from mktme.vm.platform import Platform

CHOICES: Final = (
    (Policy.FIFO, None),
    (Policy.RANDOM, None),
    (Policy.TWO_QUEUES, None),
    (Policy.FIFO, Track.STORES),
    (Policy.CLOCK, Track.STORES),
    (Policy.TWO_QUEUES, Track.STORES),
)
PAGES: Final = 1 << 17
BATCH_PAGES: Final = 64
ROUNDS: Final = 7


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of one run; pages that came in and went out."""

    seconds: float
    faults: int
    pages_in: int
    pages_out: int

    @classmethod
    def between(cls, seconds: float, start: Paging | None, end: Paging | None) -> Phase:
        """What happened between two reports of the engine; nothing without one."""
        if end is None:
            return cls(seconds, 0, 0, 0)
        if start is None:
            return cls(seconds, end.faults, end.pages_fetched, end.pages_evicted)
        return cls(
            seconds,
            end.faults - start.faults,
            end.pages_fetched - start.pages_fetched,
            end.pages_evicted - start.pages_evicted,
        )


def measure(config: VmConfig) -> tuple[Phase, Phase]:
    """Boot a guest on a platform of its own and run its workload once."""
    with (
        Platform(region_bytes(config.memory_bytes)) as platform,
        platform.launch(config) as vm,
    ):
        booted = time.monotonic()
        before = None if config.plain else vm.status().paging
        started = time.monotonic()
        run_workload(vm.domain.console)
        ended = time.monotonic()
        after = None if config.plain else vm.status().paging
        return (
            Phase.between(booted - vm.domain.started, None, before),
            Phase.between(ended - started, before, after),
        )


def compare(windows: Sequence[float], policies: Sequence[Policy], rounds: int) -> None:
    """Print a table: a row for each window, policy and tracker."""
    image = images.ensure("tiny", progress=print)
    plain = VmConfig(image, track=None)
    plain_s = statistics.median(
        sum(phase.seconds for phase in measure(plain)) for _ in range(rounds)
    )
    print(f"plain QEMU: {plain_s:.1f} s; each figure is a median of {rounds}\n")
    print("| window | policy | boot: faults | in | out | workload: faults | in | out | time |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for window in windows:
        for policy, track in CHOICES:
            if policy in policies:
                config = dataclasses.replace(
                    plain,
                    datapath=DataPath.INLINE,
                    track=track,
                    policy=policy,
                    window_bytes=int(plain.memory_bytes * window) >> 12 << 12,
                )
                runs = [measure(config) for _ in range(rounds)]
                name = policy.value if track is None else f"{policy.value}, stores"
                total_s = statistics.median(boot.seconds + work.seconds for boot, work in runs)
                cells = [
                    f"{statistics.median(getattr(run[phase], field) for run in runs):.0f}"
                    for phase in (0, 1)
                    for field in ("faults", "pages_in", "pages_out")
                ]
                row = [f"{window:.4g}", name, *cells, f"{total_s / plain_s:.2f}"]
                print(f"| {' | '.join(row)} |", flush=True)


def time_operations() -> None:
    """Print what the window's operations take, on pages all over RAM."""
    print("| policy | admit | 32 in order | choose 64 | read_ahead |  (ns a page)")
    print("| --- | ---: | ---: | ---: | ---: |")
    for policy in Policy:
        rounds = [_operations(policy) for _ in range(ROUNDS)]
        best = [min(times) for times in zip(*rounds, strict=True)]
        print(f"| {policy.value} | {' | '.join(f'{1e9 * one:.0f}' for one in best)} |")


def _operations(policy: Policy) -> tuple[float, float, float, float]:
    """Seconds a page."""
    admit, in_order, choose, read_ahead = (_Stopwatch() for _ in range(4))
    pages = random.Random(1).sample(range(PAGES // 4, PAGES), 200 * BATCH_PAGES)
    window = _full_window(policy)
    for start in range(0, len(pages), BATCH_PAGES):
        batch = pages[start : start + BATCH_PAGES]
        with choose:
            window.choose(BATCH_PAGES)
        with read_ahead:
            for page in batch:
                window.read_ahead(page)
        with admit:
            for page in batch:
                window.admit(page)
    window = _full_window(policy)
    for first in range(PAGES // 4, PAGES, MAX_READ_AHEAD_PAGES):
        if window.room < MAX_READ_AHEAD_PAGES:
            window.choose(BATCH_PAGES)
        with in_order:
            window.admit_range(first, MAX_READ_AHEAD_PAGES)
    return (
        admit.spent_s / len(pages),
        in_order.spent_s / (PAGES - PAGES // 4),
        choose.spent_s / len(pages),
        read_ahead.spent_s / len(pages),
    )


class _Stopwatch:
    """Our processor time within its `with`, which may come again."""

    spent_s = 0.0

    def __enter__(self) -> None:
        self._started = time.thread_time()

    def __exit__(self, *_error: object) -> None:
        self.spent_s += time.thread_time() - self._started


def _full_window(policy: Policy) -> Window:
    window = Window(PAGES, PAGES // 4, policy)
    window.admit_range(0, PAGES // 4)
    return window


def _share(text: str) -> float:
    share = float(text.removesuffix("%")) / 100
    if not text.endswith("%") or not 0 < share <= 1:
        raise ValueError(text)
    return share


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="Compare the window's replacement policies.")
    parser.add_argument("--window", type=_share, nargs="+", default=[0.25, 0.125, 0.0625])
    parser.add_argument("--policy", type=Policy, nargs="+", default=list(Policy))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--operations", action="store_true", help="time the window alone")
    arguments = parser.parse_args()
    try:
        if arguments.operations:
            time_operations()
        else:
            compare(arguments.window, arguments.policy, arguments.rounds)
    except MktmeError as error:
        print(f"{error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
