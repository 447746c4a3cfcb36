# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme platform`: what a platform is, and whether its platform.toml is right."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from mktme.cli_output import EngineOption, JsonFlag, make_table, out, print_json
from mktme.engine.firmware import PlatformConfig, PlatformConfigError
from mktme.proof.platform_report import (
    Encryption,
    PlatformCheck,
    PlatformReport,
    describe,
    describe_registers,
)
from mktme.service.platform_file import read_platform
from mktme.service.wire import Role
from mktme.vm.host import UsageError
from mktme.vm.running import connected

platform_app = typer.Typer(
    help="The platform: what its firmware sets up, from a platform.toml; or as it runs.",
    no_args_is_help=True,
)


@platform_app.command()
def show(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A platform.toml; none: the defaults.")
    ] = None,
    running: Annotated[
        bool, typer.Option("--running", help="Show the platform that runs now (run --keep).")
    ] = False,
    engine: EngineOption = None,
    json: JsonFlag = False,
) -> None:
    """Show what firmware makes of a platform.toml, or a running platform: registers in words."""
    if file is not None and (running or engine is not None):
        raise UsageError(
            "a platform.toml says nothing of a platform that is running",
            hint="leave out either FILE or --running and --engine",
        )
    if running or engine is not None:
        with connected(engine, Role.OBSERVER) as client:
            status = client.status()
            # Its DRAM is what its owner made it, whatever firmware was told.
            config = msgspec.structs.replace(status.platform, dram=status.dram_bytes)
            report = describe_registers(config, client.rdmsr)
            title = "Platform, as it runs"
    else:
        config = PlatformConfig() if file is None else read_platform(file)
        report = describe(config, None if file is None else str(file))
        title = "Platform, by default" if file is None else f"Platform {escape(str(file))}"
    if json:
        print_json(report)
        return
    out.print(_platform_table(report, title))
    out.print(_register_table(report))


@platform_app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A platform.toml.")],
    json: JsonFlag = False,
) -> None:
    """Check a platform.toml."""
    try:
        read_platform(file)
    except PlatformConfigError as error:
        if json:
            print_json(
                PlatformCheck(
                    "mktme.platform-check",
                    1,
                    str(file),
                    valid=False,
                    key=error.key,
                    message=str(error),
                    hint=error.hint,
                )
            )
        raise
    if json:
        print_json(PlatformCheck("mktme.platform-check", 1, str(file), valid=True))
        return
    out.print(f"{file}: valid", markup=False, highlight=False, soft_wrap=True)


def _platform_table(report: PlatformReport, title: str) -> Table:
    table = make_table(title, "what", "is")
    table.add_row("memory encryption", _encryption(report))
    table.add_row("TME key", _tme_key(report))
    table.add_row("KeyIDs for software", _keyids(report))
    table.add_row("physical address", _address(report))
    table.add_row("exclusion range", _exclusion(report))
    dram = report.dram_bytes
    table.add_row("DRAM", "as much as the VMs take" if dram is None else _size(dram))
    table.add_row("revision", f"{report.revision.value}, where Intel's documents disagree")
    return table


def _encryption(report: PlatformReport) -> str:
    match report.encryption:
        case Encryption.OFF:
            return "off"
        case Encryption.BYPASSED:
            return "bypassed: memory of KeyID 0 is plaintext"
    return "on"


def _tme_key(report: PlatformReport) -> str:
    if report.policy is None:
        return "none"
    standby = "kept for" if report.save_key_for_standby else "lost in"
    return f"{report.policy.value}, {standby} standby"


def _keyids(report: PlatformReport) -> str:
    if not report.keyids:
        return "none"
    names = " or ".join(one.value for one in report.algorithms)
    return f"{report.keyids}, each with {names}"


def _address(report: PlatformReport) -> str:
    bits = report.address_bits
    return (
        f"{report.physical_address_bits} bits: {report.keyid_bits} of KeyID, {bits} of address"
        f" ({_size(1 << bits)})"
    )


def _exclusion(report: PlatformReport) -> str:
    if report.exclusion is None:
        return "none"
    base, size = report.exclusion.base, report.exclusion.size_bytes
    return f"{base:#x} to {base + size - 1:#x} ({_size(size)})"


def _size(size_bytes: int) -> str:
    """In the largest unit that gives a whole number."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if not size_bytes % (1 << shift):
            return f"{size_bytes >> shift} {unit}"
    return f"{size_bytes >> 10} KiB"


def _register_table(report: PlatformReport) -> Table:
    table = make_table("Registers", "MSR", "register", "bits", "field")
    for register in report.registers:
        msr = f"{register.msr.removeprefix('0x').upper()}H"
        # Below its name, the value leaves 80 columns enough for the fields.
        cells = [(msr, register.name), ("", register.value)]
        fields = [(field.bits, f"{field.name}: {field.meaning}") for field in register.fields]
        for cell, field in zip_longest(cells, fields, fillvalue=("", "")):
            table.add_row(*cell, *field)
    return table
