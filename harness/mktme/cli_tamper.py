# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme tamper`: attacks on the memory of live guests, and what came of them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mktme.cli_narration import narrate
from mktme.cli_options import (
    ConnectOption,
    ExitCode,
    GuestOption,
    JsonOption,
    MemoryOption,
    check_json,
    guest_memory,
    image,
)
from mktme.cli_output import make_table, out
from mktme.datapath.kinds import DataPath
from mktme.proof import tamper as suite
from mktme.proof.eviction import check_window
from mktme.proof.report import write_json
from mktme.proof.tamper import AttackReport, Finding, TamperReport
from mktme.vm.config import VmConfig, check_data_path
from mktme.vm.sizes import parse_window


def tamper(
    guest: GuestOption = "tiny",
    memory: MemoryOption = "192M",
    window: Annotated[
        str,
        typer.Option(
            metavar="SIZE|SHARE",
            help="The most plaintext there may be, such as 32M; at most 25%.",
        ),
    ] = "32M",
    connect: ConnectOption = None,
    json: JsonOption = None,
) -> None:
    """Attack the memory of live guests, without and with integrity: is it what is to come?"""
    check_json(json)
    memory_bytes = guest_memory(memory)
    window_bytes = parse_window(window, memory_bytes)
    check_data_path(DataPath.INLINE, None, window_bytes, memory_bytes)
    check_window(window_bytes, memory_bytes)
    config = VmConfig(
        image(guest),
        memory_bytes=memory_bytes,
        datapath=DataPath.INLINE,
        track=None,
        window_bytes=window_bytes,
    )
    with narrate() as narrator:
        report = suite.tamper(config, narrator, connect=connect)
    _print_report(report)
    if json is not None:
        write_json(json, report)
    if not report.passed:
        raise typer.Exit(ExitCode.PROOF_FAILED)


def _print_report(report: TamperReport) -> None:
    out.print(_table(report))
    for number, remark in enumerate(_remarks(report), 1):
        out.print(f"[{number}] {remark}", markup=False, highlight=False)
    for row in report.attacks:
        for kind, found in (("without", row.without), ("with", row.with_integrity)):
            if not found.passed:
                line = f"{row.name}, {kind} integrity: {found.detail or found.found.value}"
                out.print(line, style="red", markup=False, highlight=False)
    passed = sum(row.passed for row in report.attacks)
    verdict = "[green]passed[/]" if report.passed else "[red]FAILED[/]"
    out.print(
        f"{verdict}: {passed} of {len(report.attacks)} attacks as expected in"
        f" {report.duration_s:.1f} s (QEMU {report.environment.qemu}, libvirt"
        f" {report.environment.libvirt}, guest kernel {report.environment.guest_kernel_version})",
        soft_wrap=True,
        highlight=False,
    )


def _remarks(report: TamperReport) -> list[str]:
    """Each remark once, in the order of the rows."""
    return list(dict.fromkeys(row.remark for row in report.attacks if row.remark is not None))


def _table(report: TamperReport) -> Table:
    title = (
        f"Attacks on live guests: {report.memory_bytes >> 20} MiB, window"
        f" {report.window_bytes >> 20} MiB, {report.without.value} and"
        f" {report.with_integrity.value}"
    )
    heads = (
        f"{kind}\nintegrity:\n{what}"
        for kind in ("without", "with")
        for what in ("expected", "found")
    )
    table = make_table(title, "", "attack", *heads)
    remarks = _remarks(report)
    for row in report.attacks:
        table.add_row(
            "[green]pass[/]" if row.passed else "[red]FAIL[/]",
            _name(row, remarks),
            *_cells(row.without),
            *_cells(row.with_integrity),
        )
    return table


def _name(row: AttackReport, remarks: list[str]) -> str:
    name = f"{row.name} (control)" if row.control else row.name
    return escape(name if row.remark is None else f"{name} [{remarks.index(row.remark) + 1}]")


def _cells(found: Finding) -> tuple[str, str]:
    shown = escape(found.found.value)
    return escape(found.expected.value), shown if found.passed else f"[red]{shown}[/]"
