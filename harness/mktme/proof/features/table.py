# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of the scenarios, and the feature table that they give."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from mktme.datapath.kinds import DataPath
from mktme.engine.errors import MktmeError
from mktme.proof.features.scenarios import SCENARIOS, Row, Scenario
from mktme.proof.features.subject import SkippedError, Subject
from mktme.vm.host import UsageError

_BEGIN: Final = "<!-- features: made by `make features` -->"
_END: Final = "<!-- end of features -->"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row on a data path.

    Attributes:
        scenario: the guest's.
        row: the row's name.
        datapath: on which.
        passed: whether it works.
        finding: what was found, what went wrong, or why it was not looked at.
        duration_s: how long it took; of a guest's first row, its boot included.
        skipped: whether it was not looked at. Then it has not passed, and fails nothing.
    """

    scenario: str
    row: str
    datapath: DataPath
    passed: bool
    finding: str
    duration_s: float
    skipped: bool = False

    @property
    def state(self) -> Literal["works", "FAILS", "skipped"]:
        """In a word, as tables have it."""
        if self.skipped:
            return "skipped"
        return "works" if self.passed else "FAILS"


@dataclass(frozen=True, slots=True)
class FeatureReport:
    """The feature table as a document.

    Attributes:
        schema: always "mktme.features".
        version: of the schema.
        passed: whether all of it works that was looked at.
        outcomes: in the order of the scenarios and their rows.
    """

    schema: Literal["mktme.features"]
    version: Literal[1]
    passed: bool
    outcomes: tuple[Outcome, ...]


class Listener(Protocol):
    """Is told of each outcome as it comes."""

    def __call__(self, outcome: Outcome) -> None:
        """One more."""
        ...


def run_features(
    datapaths: Sequence[DataPath], only: str = "", listen: Listener = lambda outcome: None
) -> FeatureReport:
    """Boot the guests one after another and check their rows.

    A guest that was lost fails its further rows.

    Args:
        datapaths: on which.
        only: scenarios whose name it is; all when empty.
        listen: told of each outcome.

    Raises:
        UsageError: there is no such scenario.
    """
    chosen = [one for one in SCENARIOS if only in ("", one.name)]
    if not chosen:
        known = ", ".join(one.name for one in SCENARIOS)
        raise UsageError(f"there is no scenario {only!r}", hint=f"one of {known}")
    outcomes: list[Outcome] = []
    for scenario in chosen:
        for datapath in datapaths:
            for outcome in _outcomes(scenario, datapath):
                outcomes.append(outcome)
                listen(outcome)
    passed = all(one.passed or one.skipped for one in outcomes)
    return FeatureReport("mktme.features", 1, passed, tuple(outcomes))


def _outcomes(scenario: Scenario, datapath: DataPath) -> Iterator[Outcome]:
    started = time.monotonic()
    done = 0

    def outcome(row: Row, passed: bool, finding: str, skipped: bool = False) -> Outcome:
        nonlocal started, done
        took, started = time.monotonic() - started, time.monotonic()
        done += 1
        return Outcome(scenario.name, row.name, datapath, passed, finding, round(took, 1), skipped)

    try:
        with scenario.booted(datapath) as subject:
            for row in scenario.rows:
                yield outcome(row, *_check(row, subject))
    except MktmeError as error:
        for row in scenario.rows[done:]:
            yield outcome(row, False, f"the guest was lost: {error}")


def _check(row: Row, subject: Subject) -> tuple[bool, str, bool]:
    """Whether it works, what was found, and whether it was not looked at."""
    try:
        return True, row.check(subject), False
    except SkippedError as error:
        return False, str(error), True
    except MktmeError as error:
        return False, str(error), False


def markdown(report: FeatureReport) -> str:
    """The table for README: a row that fails shows as failing, one that was skipped as that."""
    lines = []
    for scenario in SCENARIOS:
        rows = [one for one in report.outcomes if one.scenario == scenario.name]
        if not rows:
            continue
        datapaths = [path for path in DataPath if any(one.datapath is path for one in rows)]
        header = " | ".join((scenario.summary, *(path.value for path in datapaths), "found"))
        lines += [f"| {header} |", "|" + " --- |" * (2 + len(datapaths))]
        for row in scenario.rows:
            of_row = {one.datapath: one for one in rows if one.row == row.name}
            states = (of_row[path].state for path in datapaths)
            marks = ("**FAILS**" if state == "FAILS" else state for state in states)
            told = next((one for one in of_row.values() if not one.passed), of_row[datapaths[0]])
            finding = told.finding.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {' | '.join((row.name, *marks, finding))} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def write_readme(report: FeatureReport, readme: Path) -> None:
    """Put the table into README, between its marks.

    Raises:
        MktmeError: it has no marks, or cannot be written.
    """
    try:
        text = readme.read_text()
        pattern = re.escape(_BEGIN) + ".*?" + re.escape(_END)
        new, count = re.subn(
            pattern, lambda _match: f"{_BEGIN}\n{markdown(report)}{_END}", text, flags=re.DOTALL
        )
        if count != 1:
            raise MktmeError(f"{readme} has no marks for the feature table", hint=f"add {_BEGIN}")
        readme.write_text(new)
    except OSError as error:
        raise MktmeError(f"{readme}: {error.strerror}") from error
