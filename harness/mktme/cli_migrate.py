# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme migrate`: a guest moves to another host while it works."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mktme.cli_narration import narrate
from mktme.cli_options import (
    ExitCode,
    GuestOption,
    JsonOption,
    MemoryOption,
    VcpusOption,
    WindowOption,
    check_json,
    guest_memory,
    image,
)
from mktme.cli_output import make_table, out
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.text import spelled
from mktme.engine.xts import Algorithm
from mktme.proof import moving
from mktme.proof.moving import MoveReport
from mktme.proof.report import write_json
from mktme.remote.uri import RemoteUri
from mktme.vm.config import VmConfig, check_config
from mktme.vm.host import dotted
from mktme.vm.sizes import parse_window


def migrate(
    destination: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="libvirt on the other host, such as qemu+ssh://root@host/system. Its parameters"
            " keyfile, command, no_verify and no_tty are mktme's, too.",
        ),
    ],
    guest: GuestOption = "tiny",
    memory: MemoryOption = "512M",
    vcpus: VcpusOption = 1,
    datapath: Annotated[DataPath, typer.Option(help="How memory is encrypted.")] = DataPath.SHADOW,
    window: WindowOption = None,
    algorithm: Annotated[
        Algorithm, typer.Option(help="The guest's cipher.")
    ] = Algorithm.AES_XTS_128,
    connect: Annotated[
        str,
        typer.Option(
            metavar="URI", help="libvirt on this host; its embedded driver migrates no guests."
        ),
    ] = "qemu:///system",
    remote_mktme: Annotated[
        str, typer.Option(metavar="PATH", help="mktme on the other host.")
    ] = "mktme",
    json: JsonOption = None,
) -> None:
    """Move a guest to another host over ssh while it works, and prove on both."""
    check_json(json)
    RemoteUri.parse(destination)
    memory_bytes = guest_memory(memory, vcpus)
    config = VmConfig(
        image(guest),
        memory_bytes=memory_bytes,
        vcpus=vcpus,
        datapath=datapath,
        track=Track.STORES_AND_PAGES if datapath is DataPath.SHADOW else None,
        window_bytes=None if window is None else parse_window(window, memory_bytes),
        algorithm=algorithm,
    )
    check_config(config)
    with narrate() as narrator:
        report = moving.migrate(
            config,
            destination,
            narrator,
            connect=connect,
            command=remote_mktme,
            arguments=tuple(map(spelled, sys.argv[1:])),
        )
    _print_report(report)
    if json is not None:
        write_json(json, report)
    if not report.passed:
        raise typer.Exit(ExitCode.PROOF_FAILED)


def _print_report(report: MoveReport) -> None:
    out.print(_move_table(report))
    table = make_table("Proofs and their controls", "", "proof", "where", "claim", "found")
    for check in report.checks:
        table.add_row(
            "[green]pass[/]" if check.passed else "[red]FAIL[/]",
            f"{check.proof}\ncontrol" if check.control else check.proof,
            escape(check.subject),
            check.claim,
            escape(check.finding),
        )
    out.print(table)
    passed = sum(check.passed for check in report.checks)
    verdict = "[green]passed[/]" if report.passed else "[red]FAILED[/]"
    out.print(
        f"{verdict}: {passed} of {len(report.checks)} checks in {report.duration_s:.1f} s"
        f" (QEMU {report.environment.qemu}, there {dotted(report.destination.qemu_version)},"
        f" libvirt {report.environment.libvirt},"
        f" guest kernel {report.environment.guest_kernel_version})",
        soft_wrap=True,
        highlight=False,
    )


def _move_table(report: MoveReport) -> Table:
    took = report.migration
    figures = ("total", "transfer", "downtime", "sent", "passes")
    host = RemoteUri.parse(report.destination.uri).host
    title = (
        f"Moved {report.memory_bytes >> 20} MiB, {report.datapath.value},"
        f" {report.algorithm.value}, to {escape(host)}"
    )
    table = make_table(title, *figures, right=figures)
    table.add_row(
        f"{took.total_s:.1f} s",
        f"{took.transfer_s:.1f} s",
        f"{took.downtime_s * 1000:.0f} ms",
        f"{took.sent_bytes >> 20} MiB",
        str(took.iterations),
    )
    return table
