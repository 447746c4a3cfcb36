# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump capture`, `info` and `decrypt`: DRAM out of a platform, and into others' tools.

What computes is imported when a command runs, so that `mktme --help` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from mktme.cli_output import EngineOption, JsonFlag, err, make_table, out, print_json
from mktme.dump.formats import Format
from mktme.dump.image import DumpImage
from mktme.engine.text import shown
from mktme.service.wire import Role
from mktme.vm.host import UsageError
from mktme.vm.running import connected

if TYPE_CHECKING:
    from mktme.dump.decrypt import DecryptReport
    from mktme.dump.info import InfoReport
    from mktme.engine.sidecar import VmRecord

_KEY_HINT: Final = "--key-file FILE; or decrypt it while the platform that wrote it runs"

ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="The DRAM image.")]
SidecarOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Its description.", show_default="IMAGE.json"),
]


def capture(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="What to write; new.")],
    vm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="This VM's memory only. May be given again."),
    ] = None,
    engine: EngineOption = None,
    json: JsonFlag = False,
) -> None:
    """Copy the DRAM of a running platform (mktme run --keep), as it is at one moment.

    Guests are held for that moment and go on while the rest is copied; one that is paused stays so.
    IMAGE.json describes the copy, IMAGE.mac has the MACs if there are any.
    """
    from mktme.dump.capture import capture as run

    with connected(engine, Role.OWNER) as client, err.status("capturing DRAM"):
        report = run(client, image, vm or ())
    if json:
        print_json(report)
        return
    record = report.capture
    paused = "no guest had to be held"
    if record.pause_s is not None:
        paused = f"guests held for {record.pause_s * 1000:.0f} ms"
    vms = shown(" and ".join(report.vms)) or "no VM"
    lines = (
        f"{report.image}: {_size(record.data_bytes)} of {vms}",
        f"{paused}; {record.total_s:.2f} s in all, by {record.method}",
        f"described by {report.sidecar}",
    )
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def info(
    image: ImageArgument,
    sidecar: SidecarOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it, and check the capture's digest.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Say what a DRAM image is of: VMs, KeyIDs, how it was captured."""
    from mktme.dump.info import describe_image

    with DumpImage.open(image, sidecar) as opened, err.status("reading the image"):
        report = describe_image(opened, verify=verify)
    if json:
        print_json(report)
        return
    _print_info(report)


def decrypt(
    image: ImageArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="What to write; new.")
    ],
    vm: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose memory.", show_default="the only VM's"),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="raw: file offset = guest-physical address; lime: for volatility; elf: a core with"
            " VMCOREINFO, for drgn and crash."
        ),
    ] = Format.RAW,
    key_file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[KEYID=]FILE",
            help="A key, as for mktme run --key-file; for the VM's own KeyID, or this one. May be"
            " given again. None: the running platform decrypts, and keeps its keys.",
        ),
    ] = None,
    sidecar: SidecarOption = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Zeros for memory whose key is not given.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Go on if keys or MACs do not fit: noise, where they do not."),
    ] = False,
    engine: EngineOption = None,
    json: JsonFlag = False,
) -> None:
    """Write a VM's memory as its guest sees it, for the tools of others.

    A wrong key is noticed (mktme.dump.decrypt says how, and how surely), and nothing is written.
    """
    from contextlib import ExitStack

    from mktme.dump.decrypt import VmMemory
    from mktme.dump.decrypt import decrypt as run
    from mktme.dump.keys import EngineKeys, FileKeys, Keys

    if key_file and engine is not None:
        raise UsageError("--key-file has no use for --engine", hint="leave one of them out")
    with ExitStack() as stack:
        opened = stack.enter_context(DumpImage.open(image, sidecar))
        record = opened.vm(vm) if vm is not None else _the_only_vm(opened)
        keys: Keys
        if key_file:
            keys = stack.enter_context(FileKeys.read(opened, record, key_file))
        else:
            try:
                client = stack.enter_context(connected(engine, Role.OWNER))
            except UsageError as error:
                raise UsageError(f"no key: {error}", hint=_KEY_HINT) from error
            keys = EngineKeys(client, record)
        memory = stack.enter_context(VmMemory(opened, record, keys))
        with err.status(f"decrypting {escape(shown(record.name))}"):
            report = run(
                memory, output, format, image=image, skip_missing=skip_missing, force=force
            )
    if json:
        print_json(report)
        return
    _print_decrypted(report)


def _the_only_vm(image: DumpImage) -> VmRecord:
    vms = () if image.sidecar is None else image.sidecar.vms
    if len(vms) == 1:
        return vms[0]
    known = ", ".join(one.name for one in vms)
    raise UsageError(
        f"{image.path} holds {len(vms)} VMs" if vms else f"{image.path} holds no VM",
        hint=f"say which: --vm NAME, of {known}" if vms else "capture it while one runs",
    )


def _print_decrypted(report: DecryptReport) -> None:
    lines = [
        f"{report.out}: {_size(report.size_bytes)} of {shown(report.vm)} as {report.format.value},"
        f" {_size(report.written_bytes)} of it not zero, in {report.duration_s:.2f} s"
    ]
    if report.kernel is not None:
        lines.append(f"with VMCOREINFO of Linux {report.kernel}")
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    warnings = [
        f"zeros in place of {_size(one.size_bytes)} under KeyID {one.keyid}: no key"
        for one in report.skipped
    ]
    if report.format is Format.ELF and report.kernel is None:
        warnings.append("without VMCOREINFO: no Linux was found; drgn and crash will not take it")
    if report.bad_lines:
        warnings.append(f"{report.bad_lines:,} lines do not match their MACs: noise, or changed")
    for line in warnings:
        err.print(f"mktme: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print_info(report: InfoReport) -> None:
    out.print(
        f"{report.image}: DRAM of {_size(report.size_bytes)}, {_size(report.written_bytes)} of it"
        " written",
        f"{report.physical_address_bits} address bits, {report.keyid_bits} of them KeyID"
        + (", lines have MACs" if report.integrity else ""),
        sep="\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for path in report.nvdimms:
        out.print(f"an NVDIMM in {shown(path)}", markup=False, highlight=False, soft_wrap=True)
    if report.vms:
        out.print(_vm_table(report))
    out.print(_keyid_table(report))
    capture = report.capture
    if capture is None:
        out.print("not captured: a platform's own image")
        return
    held = "" if capture.pause_s is None else f", guests held for {capture.pause_s * 1000:.0f} ms"
    verified = ", verified" if report.verified else ""
    out.print(
        f"captured {capture.captured_at} by {capture.method}{held}",
        f"SHA-256 {capture.sha256[:16]}…{verified}",
        sep="\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _vm_table(report: InfoReport) -> Table:
    right = ("KeyID", "DRAM", "memory", "written")
    table = make_table("VMs", "VM", *right, "guest-physical", right=right)
    for one in report.vms:
        segments = (
            f"{segment.guest_physical:#x}, {_size(segment.size_bytes)}" for segment in one.segments
        )
        table.add_row(
            escape(shown(one.name)),
            str(one.keyid),
            f"{one.base:#x}",
            _size(one.size_bytes),
            _size(one.written_bytes),
            "\n".join(segments) or "-",
        )
    return table


def _keyid_table(report: InfoReport) -> Table:
    right = ("KeyID", "memory", "written")
    table = make_table("KeyIDs", "KeyID", "mode", "cipher", "memory", "written", right=right)
    for one in report.keyids:
        table.add_row(
            str(one.keyid),
            one.mode.value,
            "plaintext" if one.algorithm is None else one.algorithm.value,
            _size(one.size_bytes),
            _size(one.written_bytes),
        )
    return table


def _size(size_bytes: int) -> str:
    if size_bytes < 1 << 20:
        return f"{size_bytes / (1 << 10):,.0f} KiB"
    return f"{size_bytes / (1 << 20):,.1f} MiB"
