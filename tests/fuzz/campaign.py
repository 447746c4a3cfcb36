# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs targets side by side, each in its process, and judges what they report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]

# To start and to end; and how long these may take.
_OVERHEAD_S: Final = 2
_GRACE_S: Final = 60
_TAIL_LINES: Final = 15


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a target.

    Attributes:
        executions: inputs that it ran.
        per_second: how many of them in a second.
        coverage_at_start: branches and outcomes that the corpus reached, seeds included.
        coverage: those that were reached in the end.
        corpus: inputs that are kept, each for something that no other reaches.
        failure: what went wrong, several lines; None if all is well.
        finding: the input that failed.
    """

    target: str
    executions: int
    per_second: int
    coverage_at_start: int
    coverage: int
    corpus: int
    failure: str | None
    finding: Path | None


def jobs() -> int:
    """How many targets run at a time: one on each processor that we may use."""
    return len(os.sched_getaffinity(0))


def seconds_each(count: int, seconds: int) -> int:
    """How long each of `count` targets can run so that all take `seconds`."""
    rounds = -(-count // jobs())
    return max(1, seconds // rounds - _OVERHEAD_S)


def run(targets: Sequence[str], seconds: int, directory: Path) -> Iterator[Result]:
    """Fuzz targets.

    Args:
        targets: their names.
        seconds: for all of them, with as many at a time as there are processors.
        directory: for corpora, findings and logs.

    Yields:
        Each target's result, as it ends.
    """
    each = seconds_each(len(targets), seconds)
    with ThreadPoolExecutor(jobs()) as pool:
        running = [pool.submit(run_target, target, each, directory) for target in targets]
        for future in as_completed(running):
            yield future.result()


def run_target(target: str, seconds: int, directory: Path) -> Result:
    """Fuzz one target in a process of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{target}.log"
    command = ["-m", "tests.fuzz.child", "--fuzz", str(directory.resolve()), str(seconds), target]
    # libFuzzer ends the process without a chance to tidy up, so its files are ours to remove.
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as output:
        # The hash seed: a finding must be the same when its input is run again.
        environment = os.environ | {"TMPDIR": scratch, "PYTHONHASHSEED": "0"}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            status: int | None = process.wait(seconds + _GRACE_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
    return judge(target, status, log.read_text(errors="replace"))


def judge(target: str, status: int | None, log: str) -> Result:
    """What a child's log amounts to.

    Args:
        target: its name.
        status: its exit status, None if it had to be killed.
        log: all that it wrote.
    """
    executions = _number(r"stat::number_of_executed_units: *(\d+)", log)
    coverage = _number(r"^#.* cov: (\d+)", log)
    finding = re.findall(r"Test unit written to (.+)$", log, re.MULTILINE)
    failure = None
    if status is None:
        failure = f"it did not end in time\n{_tail(log)}"
    elif status != 0:
        failure = _raised(log) or f"exit status {status}\n{_tail(log)}"
    elif executions == 0:
        failure = f"it executed nothing\n{_tail(log)}"
    elif coverage == 0:
        failure = "it covered nothing: the code under test was not instrumented"
    return Result(
        target=target,
        executions=executions,
        per_second=_number(r"stat::average_exec_per_sec: *(\d+)", log),
        coverage_at_start=_number(r"^#.*INITED cov: (\d+)", log),
        coverage=coverage,
        corpus=_number(r"^#.* corp: (\d+)", log),
        failure=failure,
        finding=Path(finding[-1]) if finding else None,
    )


def _number(pattern: str, log: str) -> int:
    """The last number that matches, 0 without one."""
    found = re.findall(pattern, log, re.MULTILINE)
    return int(found[-1]) if found else 0


def _raised(log: str) -> str | None:
    """The traceback that atheris printed."""
    match = re.search(r"=== Uncaught Python exception: ===\n(.*?)\n\n", log, re.DOTALL)
    return match[1] if match else None


def _tail(log: str) -> str:
    return "\n".join(log.splitlines()[-_TAIL_LINES:])
