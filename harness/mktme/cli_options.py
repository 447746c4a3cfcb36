# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands that boot guests have in common: options, what is checked of them, exit codes."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mktme.cli_output import err
from mktme.engine.dram import mac_path
from mktme.engine.sidecar import sidecar_path
from mktme.vm.config import check_sizes
from mktme.vm.disk_images import DiskImage
from mktme.vm.host import UsageError
from mktme.vm.images import GuestImage, guest_image
from mktme.vm.sizes import parse_size


class ExitCode(enum.IntEnum):
    """What the command's exit status says."""

    OK = 0
    PROOF_FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3
    RUN_FAILED = 4
    CHANGES = 5
    """`mktme provision plan --exit-code`: something is to be done."""
    INTERRUPTED = 130


GuestOption = Annotated[str, typer.Option(help="Guest to boot: a recipe in guest-images/.")]
MemoryOption = Annotated[
    str, typer.Option(metavar="SIZE", help="Guest RAM, such as 512M or 4G: whole MiB.")
]
VcpusOption = Annotated[int, typer.Option(min=1, max=255, help="Guest vCPUs.")]
WindowOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|SHARE",
        help="inline: the most plaintext there may be, such as 128M or 25%.",
        show_default="25%",
    ),
]
ConnectOption = Annotated[
    str | None,
    typer.Option(
        metavar="URI", help="libvirt on this machine to use, in place of its embedded driver."
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write the report as a page for people, too."),
]


def guest_memory(memory: str, vcpus: int = 1) -> int:
    """A guest's memory as asked for, checked with its vCPUs before an image is built for it."""
    memory_bytes = parse_size(memory)
    check_sizes(memory_bytes, vcpus)
    return memory_bytes


def image(guest: str) -> GuestImage | DiskImage:
    """A guest's image, built if it is not there yet."""
    with err.status(f"guest image {escape(guest)}"):
        return guest_image(guest, lambda line: err.print(line, style="dim", markup=False))


def check_json(path: Path | None, *sources: Path | None) -> None:
    """A report that cannot be written is better known before the run than after it."""
    check_file("--json", path, *sources)


def check_file(option: str, path: Path | None, *sources: Path | None) -> None:
    """Check that a file can be written where an option says.

    Args:
        option: which.
        path: where; None: the option was not given.
        sources: what else the command has to do with, if it is given: neither that nor, as it may
            be an image, its sidecar and its MACs are to be replaced.

    Raises:
        UsageError: it cannot be.
    """
    if path is None:
        return
    if (path.exists() and not path.is_file()) or not path.absolute().parent.is_dir():
        raise UsageError(
            f"{option} {path}: no file can be written there",
            hint="name a file in a directory that exists",
        )
    for source in sources:
        if source is None or not source.name:  # a directory is another check's
            continue
        for kept in (source, sidecar_path(source), mac_path(source)):
            there = kept.exists() and path.exists()
            if kept.resolve() == path.resolve() or (there and kept.samefile(path)):
                raise UsageError(
                    f"{option} {path}: it would take the place of {kept}", hint="name another file"
                )
