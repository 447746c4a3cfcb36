# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command's modules print with, and the options they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

out: Final = Console()
err: Final = Console(stderr=True)

EngineOption = Annotated[
    Path | None,
    typer.Option(metavar="SOCKET", help="Control socket; none: the only platform that runs."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def make_table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table that fits 80 columns where its text does.

    Args:
        title: above it; markup.
        columns: their heads.
        right: which of them are flush right.
    """
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def print_json(document: object) -> None:
    """A document as JSON to standard output, for programs: neither coloured nor wrapped."""
    typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
