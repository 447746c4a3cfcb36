# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme features`: what works in real guests, on both data paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mktme.cli_options import ExitCode, JsonOption, check_json
from mktme.cli_output import err, make_table, out
from mktme.datapath.kinds import DataPath
from mktme.proof.features.scenarios import SCENARIOS
from mktme.proof.features.table import FeatureReport, Outcome, run_features, write_readme
from mktme.proof.report import write_json


def features(
    only: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"One of the guests: {', '.join(one.name for one in SCENARIOS)}.",
        ),
    ] = "",
    datapath: Annotated[
        DataPath | None, typer.Option(help="One of the data paths.", show_default="both")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Put the table into this README.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Check that all that a VM does still works: guests, devices, direct I/O, a guest's life."""
    check_json(json)
    datapaths = list(DataPath) if datapath is None else [datapath]

    def listen(outcome: Outcome) -> None:
        err.print(
            f"{_state(outcome)}  {outcome.datapath.value:7} {escape(outcome.row)}"
            f" [dim]({outcome.duration_s:.1f} s) {escape(outcome.finding)}[/]",
            highlight=False,
        )

    report = run_features(datapaths, only, listen)
    _print_report(report)
    if json is not None:
        write_json(json, report)
    if readme is not None:
        write_readme(report, readme)
    if not report.passed:
        raise typer.Exit(ExitCode.PROOF_FAILED)


def _print_report(report: FeatureReport) -> None:
    for scenario in SCENARIOS:
        rows = [one for one in report.outcomes if one.scenario == scenario.name]
        if not rows:
            continue
        datapaths = [path for path in DataPath if any(one.datapath is path for one in rows)]
        table = make_table(scenario.summary, "feature", *(path.value for path in datapaths))
        for row in scenario.rows:
            states = {one.datapath: _state(one) for one in rows if one.row == row.name}
            table.add_row(escape(row.name), *(states[path] for path in datapaths))
        out.print(table)
    for outcome in report.outcomes:
        if outcome.skipped:
            line = f"skipped, {outcome.datapath.value}: {outcome.row}: {outcome.finding}"
            out.print(line, markup=False, highlight=False)
    works = sum(one.passed for one in report.outcomes)
    skipped = sum(one.skipped for one in report.outcomes)
    verdict = "[green]passed[/]" if report.passed else "[red]FAILED[/]"
    more = f", {skipped} skipped" if skipped else ""
    out.print(f"{verdict}: {works} of {len(report.outcomes)} work{more}", highlight=False)


def _state(outcome: Outcome) -> str:
    colour = {"works": "green", "FAILS": "red", "skipped": "yellow"}[outcome.state]
    return f"[{colour}]{outcome.state}[/]"
