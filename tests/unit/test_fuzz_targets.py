# SPDX-License-Identifier: GPL-2.0-or-later
"""The fuzzer finds what is there to be found, and starts from inputs that are good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from ..fuzz.campaign import ROOT, jobs, judge, run_target, seconds_each
from ..fuzz.targets import NAMES, load
from ..fuzz.targets.control import MAGIC

REFUSALS = ("not a valid", "no valid", "refused", "neither", ": no")

HEALTHY = """\
#6	INITED cov: 61 ft: 121 corp: 5/1208b exec/s: 0 rss: 82Mb
#900	NEW    cov: 80 ft: 190 corp: 40/8Kb lim: 792 exec/s: 0 rss: 82Mb L: 10/792 MS: 1 Custom-
#315207	DONE   cov: 84 ft: 210 corp: 47/9129b lim: 792 exec/s: 35023 rss: 82Mb
stat::number_of_executed_units: 315207
stat::average_exec_per_sec:     35023
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )


# --- with atheris -----------------------------------------------------------------------------


def test_bug_that_only_coverage_leads_to_is_found_and_can_be_had_again(tmp_path: Path) -> None:
    run = python("tests.fuzz", "--control", "--seconds", "30", "--directory", str(tmp_path))
    assert run.returncode == 1
    assert "FAILED" in run.stdout
    assert "IndexError" in run.stdout
    assert "data[len(data)]" in run.stdout
    (finding,) = (tmp_path / "findings").iterdir()
    assert finding.read_bytes().startswith(MAGIC)
    again = f"-m tests.fuzz.child control {os.path.relpath(finding, ROOT)}"
    assert again in run.stdout

    repeated = python(*again.split()[1:])
    assert repeated.returncode != 0
    assert "IndexError" in repeated.stdout
    finding.write_bytes(MAGIC[:-1])
    assert python(*again.split()[1:]).returncode == 0


def test_real_target_runs_many_inputs_and_gains_coverage(tmp_path: Path) -> None:
    result = run_target("hello", 2, tmp_path)
    assert result.failure is None
    assert result.executions > 1000
    assert result.coverage > result.coverage_at_start > 0
    assert result.corpus > len(load("hello").seeds)


def test_target_that_cannot_start_fails(tmp_path: Path) -> None:
    result = run_target("none", 1, tmp_path)
    assert result.executions == 0
    assert result.failure is not None
    assert "KeyError: 'none'" in result.failure


# --- without ----------------------------------------------------------------------------------


def test_log_of_a_healthy_target() -> None:
    result = judge("hello", 0, HEALTHY)
    assert result.failure is None
    assert (result.executions, result.per_second, result.corpus) == (315207, 35023, 47)
    assert (result.coverage_at_start, result.coverage) == (61, 84)


@pytest.mark.parametrize(
    ("status", "log", "failure"),
    [
        (None, HEALTHY, "did not end in time"),
        (1, HEALTHY, "exit status 1"),
        (-9, HEALTHY, "exit status -9"),
        (0, "", "executed nothing"),
        (0, HEALTHY.replace("315207\nstat", "0\nstat"), "executed nothing"),
        (0, HEALTHY.replace("cov:", "cov: 0 was:"), "covered nothing"),
        (
            77,
            " === Uncaught Python exception: ===\nOops: x\n  at y\n\n==1== ERROR",
            "Oops: x\n  at y",
        ),
    ],
)
def test_target_that_is_not_healthy_fails(status: int | None, log: str, failure: str) -> None:
    told = judge("hello", status, log).failure
    assert told is not None
    assert failure in told


@pytest.mark.parametrize("count", [1, 2, 9, 1000])
def test_time_is_divided(count: int) -> None:
    each = seconds_each(count, 120)
    assert each >= 1
    assert each == 1 or each * -(-count // jobs()) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_what_is_made_of_them_pass(name: str) -> None:
    target = load(name)
    outcomes = [target.check(seed) for seed in target.seeds]
    accepted = [one for one in outcomes if one is None or not one.lstrip().startswith(REFUSALS)]
    # All that are valid; the others are there for what they do to a parser.
    assert len(accepted) >= max(1, len(outcomes) - 2)
    assert all(len(seed) <= target.max_bytes for seed in target.seeds)
    if target.mutate is None:
        return
    rng = Random(name)
    changed = [target.mutate(rng.choice(target.seeds), rng) for _ in range(200)]
    inputs = [one for one in changed if one is not None]
    assert len(inputs) > 100
    for data in inputs:
        target.check(data)
