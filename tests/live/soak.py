# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that checks its own memory without an end, in a window that is a part of it.

``make soak``, or ``python -m tests.live.soak --seconds 600``. Debian's memtester fills memory and
checks it, test by test, and between its tests the guest computes checksums that are known. The
first error ends it.

What a test costs is its passes over memory: "Bit Flip" makes 1,024, and on each of them every page
of a working set larger than the window comes in and goes out. So the tests with many passes get
little more memory than there is window, and those with few get four times as much.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mktme.engine.errors import MktmeError
from mktme.proof.residency import sampled
from mktme.proof.transparency import run_workload
from mktme.pytest_plugin import vm_config
from mktme.vm.config import VmConfig
from mktme.vm.console import Console, VmError
from mktme.vm.platform import Platform, Vm

MIB: Final = 1 << 20
STEP_TIMEOUT_S: Final = 1800.0  # the longest takes 250 s
MEMORY: Final = "192M"
WINDOW_MIB: Final = 24
_VERIFIED: Final = re.compile(r"^@mktme memory verified (\d+) MiB, (\d+) tests$", re.M)


@dataclass(frozen=True, slots=True)
class Verify:
    """Run tests of memtester 4.6.0.

    Attributes:
        size_mib: how much memory they fill.
        tests: their numbers, as MEMTESTER_TEST_MASK counts them.
    """

    size_mib: int
    tests: tuple[int, ...]

    def __call__(self, console: Console) -> str:
        return f"{verify_memory(console, self.size_mib, self.tests)} tests of {self.size_mib} MiB"


@dataclass(frozen=True, slots=True)
class Workload:
    """Run the workload, some 150 MiB of files, pipes and processes, which checks its own sums."""

    def __call__(self, console: Console) -> str:
        return f"{len(run_workload(console))} checksums"


Step = Verify | Workload

ALL: Final[Sequence[Step]] = (
    Workload(),
    # Random Value, Compare XOR to AND, Sequential Increment, 8-bit Writes, 16-bit Writes
    Verify(96, (0, 1, 2, 3, 4, 5, 6, 7, 15, 16)),
    Workload(),
    Verify(32, (8, 10)),  # Solid Bits, Checkerboard
    Workload(),
    Verify(32, (11,)),  # Bit Spread
    Workload(),
    Verify(32, (13, 14)),  # Walking Ones, Walking Zeroes
    Workload(),
    Verify(32, (9,)),  # Block Sequential
    Workload(),
    Verify(32, (12,)),  # Bit Flip
)
SHORT: Final[Sequence[Step]] = (Workload(), Verify(48, (0, 1, 7, 15)))


@dataclass(frozen=True, slots=True)
class Soaked:
    """What a guest did without an error.

    Attributes:
        peak_bytes: the most plaintext that was in memory, seen from outside.
        bytes_fetched: what came into the window in all.
    """

    seconds: float
    steps: int
    peak_bytes: int
    bytes_fetched: int


def soak_config() -> VmConfig:
    """The guest: an eighth of its memory is plaintext."""
    return vm_config(memory=MEMORY, datapath="inline", window=f"{WINDOW_MIB}M")


def verify_memory(console: Console, size_mib: int, tests: Sequence[int]) -> int:
    """Have the guest fill memory and check it; returns how many tests that were.

    Raises:
        VmError: it found an error, or did not finish.
    """
    mask = sum(1 << test for test in tests)
    command = f"MEMTESTER_TEST_MASK={mask:#x} verify-memory {size_mib}"
    verified = _VERIFIED.search(console.run(command, STEP_TIMEOUT_S).output)
    if verified is None or int(verified[1]) != size_mib:
        raise VmError(f"the guest did not say that {size_mib} MiB are verified")
    count = int(verified[2])
    # "Stuck Address" has no number, and "Random Value" runs along with any other.
    if count != len({0, *tests}) + 1:
        raise VmError(f"memtester ran {count} tests, not those that were asked for")
    return count


def soak(
    vm: Vm, steps: Sequence[Step], seconds: float, tell: Callable[[str], None] = lambda _line: None
) -> Soaked:
    """Have a guest take every step, and again from the first until the time is over.

    Args:
        vm: a running guest of the inline data path.
        steps: what it is to do.
        seconds: how long at least.
        tell: called with a line for each step.

    Raises:
        VmError: the guest found an error, was lost, or had more plaintext than its window.
    """
    window_bytes = vm.config.window_bytes
    assert window_bytes is not None
    start = time.monotonic()
    taken = 0
    with sampled(vm, window_bytes) as bound:
        while taken < len(steps) or time.monotonic() - start < seconds:
            did = steps[taken % len(steps)](vm.domain.console)
            taken += 1
            tell(f"{time.monotonic() - start:7.1f} s  {did}")
    if not bound.passed:
        raise VmError(f"{bound.peak_bytes} bytes of plaintext, the window is {window_bytes}")
    paging = vm.status().paging
    assert paging is not None
    return Soaked(
        seconds=time.monotonic() - start,
        steps=taken,
        peak_bytes=bound.peak_bytes,
        bytes_fetched=paging.pages_fetched * 4096,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.live.soak")
    parser.add_argument("--seconds", type=float, default=600, help="how long at least")
    seconds: float = parser.parse_args().seconds

    def tell(line: str) -> None:
        print(line, flush=True)

    config = soak_config()
    tell(f"soak: {MEMORY} of memory, a window of {WINDOW_MIB} MiB")
    try:
        with Platform(config.memory_bytes) as platform, platform.launch(config) as vm:
            done = soak(vm, ALL, seconds, tell)
    except MktmeError as error:
        print(f"soak: FAILED: {error}", file=sys.stderr)
        return 1
    tell(
        f"soak: no error in {done.steps} steps and {done.seconds:.0f} s;"
        f" {done.bytes_fetched / (1 << 30):.1f} GiB went through the window,"
        f" of which never more than {done.peak_bytes / MIB:.1f} MiB were plaintext"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
