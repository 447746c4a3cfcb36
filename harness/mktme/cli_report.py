# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme report`: a run's report as a page; and `--html` of the commands that make one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mktme.cli_narration import narrate
from mktme.cli_options import check_file
from mktme.cli_output import out
from mktme.engine.errors import MktmeError
from mktme.proof.report import RunReport, write_whole
from mktme.proof.runs import Narrator
from mktme.report.document import read_report
from mktme.report.dumps import Look, look_at
from mktme.vm.host import UsageError


def report_page(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What run or demo wrote with --json.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page, one HTML file.")
    ],
    dumps: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DUMP", help="DRAM images to show in it, as --dram kept them."),
    ] = None,
) -> None:
    """Make a page of a run's report: proofs, pictures and charts in one file, for any browser."""
    images = dumps or []
    check_file("-o", output, run, *images)
    report = read_report(run)
    looks = []
    with narrate() as narrator:
        for image in images:
            with narrator.step(f"{image}: reading"):
                looks.append(look_at(image))
        with narrator.step(f"{output}: writing"):
            _write(output, report, looks, "-o FILE")


class Page:
    """The page that a run is to end with, if one is asked for.

    Args:
        json: where its JSON goes.
        html: where the page goes; None for no page.
        sources: see `check_file`.

    Raises:
        UsageError: one of the two cannot be written, or both are the same.
    """

    def __init__(self, json: Path | None, html: Path | None, *sources: Path | None) -> None:
        check_file("--json", json, *sources)
        check_file("--html", html, *sources)
        if html is not None and json is not None and html.absolute() == json.absolute():
            raise UsageError(f"--html {html}: --json has that file")
        self._path = html
        self._looks: list[Look] = []

    def looker(self, narrator: Narrator) -> Callable[[Path, str], None] | None:
        """For `RunOptions.look`: takes pictures of DRAM while guests are held."""
        if self._path is None:
            return None

        def look(dram: Path, what: str) -> None:
            try:
                self._looks.append(look_at(dram, what))
            except MktmeError as error:  # a picture that is lacking voids no proof
                narrator.notice(f"no picture of DRAM: {error}")

        return look

    def write(self, report: RunReport) -> None:
        """Write the page, if one is asked for.

        Raises:
            MktmeError: it cannot be written.
        """
        if self._path is not None:
            _write(self._path, report, self._looks, "--html FILE")
            out.print(f"report {self._path}", markup=False, highlight=False, soft_wrap=True)


def _write(path: Path, report: RunReport, looks: list[Look], option: str) -> None:
    from mktme.report.page import render  # Matplotlib: not for every `mktme --help`

    write_whole(path, render(report, looks), "the report", option)
