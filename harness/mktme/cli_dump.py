# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump`: what a DRAM image holds, for who reads it as an attacker would, or as its owner."""

from __future__ import annotations

import typer

from mktme.cli_dump_export import capture, decrypt, info

dump_app = typer.Typer(
    help="DRAM images: capture, look at, search and decrypt them.", no_args_is_help=True
)
dump_app.command()(capture)
dump_app.command()(info)
dump_app.command()(decrypt)
