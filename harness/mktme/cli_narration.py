# SPDX-License-Identifier: GPL-2.0-or-later
"""How commands tell of their progress: bars on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mktme.cli_output import err
from mktme.proof.runs import Narrator
from mktme.proof.transparency import Progress as StepProgress


class _Bars:
    """For a terminal: steps as lines with a bar or a spinner, and their time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def step(self, what: str) -> Iterator[StepProgress]:
        task = self._progress.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        yield advance
        self._progress.update(task, completed=1, total=1)

    def notice(self, line: str) -> None:
        self._progress.console.print(f"note: {line}", style="yellow", markup=False)


class _Lines:
    """For a log: a line when a step begins, one when it is done."""

    @contextmanager
    def step(self, what: str) -> Iterator[StepProgress]:
        started = time.monotonic()
        self._print(f"{what} ...")
        yield lambda _done, _all: None
        self._print(f"{what}: {time.monotonic() - started:.1f} s")

    def notice(self, line: str) -> None:
        self._print(f"note: {line}")

    @staticmethod
    def _print(line: str) -> None:
        err.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def narrate() -> Iterator[Narrator]:
    """Tell of the steps within the `with`."""
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield _Bars(progress)
