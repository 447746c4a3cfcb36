# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump`: what a DRAM image holds, for who reads it as an attacker would, or as its owner."""

from __future__ import annotations

import typer

from mktme.cli_dump_export import capture, decrypt, info
from mktme.cli_dump_search import SEARCH_EPILOG, search
from mktme.cli_dump_stats import diff, draw_map, stats

dump_app = typer.Typer(
    help="DRAM images: capture, look at, search and decrypt them.", no_args_is_help=True
)
dump_app.command()(capture)
dump_app.command()(info)
dump_app.command()(stats)
dump_app.command()(diff)
dump_app.command("map")(draw_map)
dump_app.command(epilog=SEARCH_EPILOG)(search)
dump_app.command()(decrypt)
