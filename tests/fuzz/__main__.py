# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.fuzz``: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from . import campaign
from .campaign import Result
from .targets import CONTROL, NAMES


def main() -> int:
    """Fuzz, and report; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=120, help="for all targets (%(default)s)")
    parser.add_argument("--directory", type=Path, default=campaign.ROOT / "build" / "fuzz")
    # Fuzz a target with a bug, which must be found.
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [target for target in options.targets if target not in NAMES]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(NAMES)}")
    targets = [CONTROL] if options.control else options.targets or NAMES

    each = campaign.seconds_each(len(targets), options.seconds)
    print(f"{len(targets)} targets, {each} s each, {campaign.jobs()} at a time", flush=True)
    print(f"{'target':<10}{'executions':>12}{'per second':>12}{'coverage':>14}{'corpus':>8}")
    failed = []
    for result in campaign.run(targets, options.seconds, options.directory):
        print(_row(result), flush=True)
        if result.failure is not None:
            failed.append(result)
    for result in failed:
        print(f"\n{result.target}: {result.failure}")
        if result.finding is not None:
            again = ["-m", "tests.fuzz.child", result.target, os.path.relpath(result.finding)]
            print(f"again: {shlex.join([os.path.relpath(sys.executable), *again])}")
    return 1 if failed else 0


def _row(result: Result) -> str:
    coverage = f"{result.coverage_at_start} to {result.coverage}"
    return (
        f"{result.target:<10}{result.executions:>12}{result.per_second:>12}{coverage:>14}"
        f"{result.corpus:>8}{'  FAILED' if result.failure else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
