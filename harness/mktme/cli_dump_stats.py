# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump stats`, `diff` and `map`: an image looked at without a key."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mktme.cli_narration import narrate
from mktme.cli_options import ExitCode, JsonOption, check_file, check_json
from mktme.cli_output import make_table, out
from mktme.dump.cluster import Source, Workers
from mktme.dump.diff import DiffReport, ZoneDiff, dump_diff
from mktme.dump.pixels import Order, What
from mktme.dump.randomness import DEGREES_OF_FREEDOM
from mktme.dump.stats import (
    Repeats,
    StatsReport,
    Verdict,
    ZoneStats,
    dump_stats,
    short,
)
from mktme.engine.text import shown
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.proof.report import write_json, write_whole
from mktme.vm.host import UsageError

ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")]
SidecarOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Its description, if that is not beside it.", show_default="IMAGE.json"
    ),
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Nothing describes it: any file of memory will do.")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="A Dask cluster that does the work, such as tcp://host:8786; it must see the image"
        " under the same path.",
        show_default="threads of this process",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Threads that do the work.", show_default="one a CPU, up to 16"),
]

_COLOURS = {
    Verdict.ENCRYPTED: "green",
    Verdict.STRUCTURED: "yellow",
    Verdict.LITTLE: "dim",
    Verdict.EMPTY: "dim",
}


def stats(
    image: ImageArgument,
    sidecar: SidecarOption = None,
    raw: RawOption = False,
    scheduler: SchedulerOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = None,
) -> None:
    """Tell, KeyID by KeyID, whether an image looks like ciphertext, and why not.

    Exit status 1: memory that is to be encrypted does not look so.
    """
    check_json(json, image, sidecar)
    source, workers = _source(image, sidecar, raw), _workers(scheduler, threads)
    with narrate() as narrator, narrator.step(f"reading {image.name}") as progress:
        report = dump_stats(source, workers, progress)
    _print_stats(report)
    if json is not None:
        write_json(json, report)
    if not report.passed:
        raise typer.Exit(ExitCode.PROOF_FAILED)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An image.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="One of the same memory, later.")],
    c: Annotated[
        Path | None,
        typer.Argument(
            metavar="[C]",
            help="And later still: which lines that changed are again as they were?",
            show_default=False,
        ),
    ] = None,
    raw: RawOption = False,
    scheduler: SchedulerOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = None,
) -> None:
    """Compare images of the same memory: what was written, and what is as it was."""
    check_json(json, a, b, c)
    one, two = _source(a, None, raw), _source(b, None, raw)
    three = None if c is None else _source(c, None, raw)
    with narrate() as narrator, narrator.step(f"comparing {a.name} with {b.name}") as progress:
        report = dump_diff(one, two, three, _workers(scheduler, threads), progress)
    _print_diff(report)
    if json is not None:
        write_json(json, report)


def draw_map(
    image: ImageArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture: .png or .svg.")
    ],
    what: Annotated[
        What, typer.Option(metavar="WHAT", help="Of a page: entropy, keyid, written or difference.")
    ] = What.ENTROPY,
    order: Annotated[Order, typer.Option(help="How pages follow one another.")] = Order.HILBERT,
    other: Annotated[
        Path | None,
        typer.Option("--with", metavar="FILE", help="A later image, for --what difference."),
    ] = None,
    plaintext: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Decrypted memory to show beside it, at the same addresses."
        ),
    ] = None,
    vm: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Show a VM's memory, by guest-physical address."),
    ] = None,
    sidecar: SidecarOption = None,
    raw: RawOption = False,
    scheduler: SchedulerOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Draw an image: the entropy of its pages, their KeyIDs, what was written or changed."""
    from mktme.dump.drawing import Format, render
    from mktme.dump.pictures import Request, make_picture

    try:
        form = Format(output.suffix[1:].lower())
    except ValueError:
        raise UsageError(
            f"-o {output}: a picture is .png or .svg", hint="name a file of one of the two"
        ) from None
    check_file("-o", output, image, other, plaintext, sidecar)
    if (what is What.DIFFERENCE) != (other is not None):
        raise UsageError(
            "--what difference and --with FILE go together",
            hint="--with names the later image of the same memory",
        )
    if what is What.DIFFERENCE and plaintext is not None:
        raise UsageError(
            "--what difference has no --plaintext", hint="compare decrypted images with --raw"
        )
    request = Request(
        image=_source(image, sidecar, raw),
        what=what,
        order=order,
        other=None if other is None else _source(other, None, raw),
        plaintext=None if plaintext is None else Source(plaintext, raw=True),
        vm=vm,
    )
    with narrate() as narrator, narrator.step(f"reading {image.name}") as progress:
        picture = make_picture(request, _workers(scheduler, threads), progress)
    write_whole(output, render(picture, form), "the picture", "-o FILE")
    out.print(f"{output}: {what.value} of {image.name}", markup=False, soft_wrap=True)


def _source(image: Path, sidecar: Path | None, raw: bool) -> Source:
    if raw and sidecar is not None:
        raise UsageError("--raw has no use for --sidecar", hint="leave one of them out")
    return Source(image, sidecar, raw)


def _workers(scheduler: str | None, threads: int | None) -> Workers:
    if scheduler is not None and threads is not None:
        raise UsageError(
            "--scheduler has no use for --threads", hint="dask worker --nthreads says how many"
        )
    return Workers(scheduler, threads)


# --- stats ------------------------------------------------------------------------------------


def _print_stats(report: StatsReport) -> None:
    out.print(_stats_table(report))
    for zone in report.keyids:
        _print_verdict(zone)
    for zone in report.keyids:
        _print_strings(zone)
    _print_method(report)


def _stats_table(report: StatsReport) -> Table:
    title = (
        f"{escape(shown(Path(report.image).name))}: {_size(report.size_bytes)}, of which"
        f" {_size(report.lines_written * LINE_BYTES)} written"
    )
    figures = (
        "written\nMiB",
        "entropy\nbits/B",
        "chi²\np",
        "16-byte\nrepeats",
        "line\nrepeats",
        "zlib",
        "strings",
    )
    table = make_table(title, "KeyID", "cipher", *figures, right=figures)
    for zone in report.keyids:
        table.add_row(
            _keyid(zone.keyid, zone.excluded),
            _cipher(zone),
            f"{zone.lines_written * LINE_BYTES / (1 << 20):,.1f}",
            f"{zone.entropy:.5f}" if zone.lines_written else "-",
            _p_value(zone.p_value, report.thresholds.p_value),
            _share(zone.blocks),
            _share(zone.lines),
            "-" if zone.compression.ratio is None else f"{zone.compression.ratio:.1%}",
            f"{sum(one.found for one in zone.strings):,}" if zone.lines_written else "-",
        )
    return table


def _print_verdict(zone: ZoneStats) -> None:
    colour = "red" if not zone.passed else _COLOURS[zone.verdict]
    line = f"KeyID {_keyid(zone.keyid, zone.excluded)} [{colour}]{zone.verdict.value}[/]"
    if not zone.passed:
        line += ", and is to be encrypted"
    out.print(line, highlight=False)
    for reason in zone.reasons:
        out.print(f"  {reason}", markup=False, highlight=False)


def _print_strings(zone: ZoneStats) -> None:
    """Show the longest strings of memory that has more of them than chance does."""
    for kind in zone.strings:
        if kind.found <= 1 + kind.by_chance + 5 * sqrt(kind.by_chance):
            continue
        name = {"ascii": "ASCII", "utf-16le": "UTF-16LE"}[kind.encoding]
        out.print(
            f"KeyID {_keyid(zone.keyid, zone.excluded)}: {kind.found:,} {name} strings of"
            f" {kind.min_chars}+ characters ({kind.by_chance:,.0f} by chance), the longest:",
            highlight=False,
        )
        for string in kind.longest:
            # Printable they are, but may look like markup; and one line each.
            head = f"  {string.address:#x} {string.chars:,}: "
            room = max(8, out.width - len(head))
            text = string.text if len(string.text) <= room else f"{string.text[: room - 1]}…"
            out.print(head + text, markup=False, highlight=False, soft_wrap=True)


def _print_method(report: StatsReport) -> None:
    limits = report.thresholds
    zone = report.keyids[0]  # each page has a KeyID, so there is one
    sample, limit = zone.compression.one_in, short(limits.p_value)
    lines = (
        f"structured: a page of less than {limits.whole_page_entropy:.4f} bits per byte (random:"
        f" {zone.page_entropy_of_random:.4f}),",
        f"  chi² with p < {limit} or > 1 - {limit} ({DEGREES_OF_FREEDOM} degrees of freedom),",
        f"  a string so long with p < {limit}, zlib under {limits.compression:.0%}, a repetition",
        f"looked at: {_sampled(report.blocks, 'blocks')}, {_sampled(report.lines, 'lines')}; zlib:"
        f" {'every page' if sample == 1 else f'1 page in {sample}'}",
    )
    for line in lines:
        out.print(line, style="dim", markup=False, highlight=False)


def _sampled(repeats: Repeats, what: str) -> str:
    return f"all {what}" if repeats.one_in == 1 else f"1 in {repeats.one_in:,} {what}"


def _keyid(keyid: int, excluded: bool) -> str:
    return f"{keyid} (excluded)" if excluded else str(keyid)


def _cipher(zone: ZoneStats) -> str:
    if zone.algorithm is not None:
        return zone.algorithm.value.removeprefix("aes-").replace("-integrity", "\nintegrity")
    return "-" if zone.mode is None else "plaintext"


def _p_value(p_value: float | None, limit: float) -> str:
    if p_value is None:
        return "-"
    return f"< {short(limit)}" if p_value < limit else f"{p_value:.3f}"


def _share(repeats: Repeats) -> str:
    if repeats.counted == 0:
        return "-"
    return "0" if repeats.repeated == 0 else f"{repeats.repeated / repeats.counted:.2%}"


def _size(size_bytes: int) -> str:
    if size_bytes >= 1 << 30:
        return f"{size_bytes / (1 << 30):.2f} GiB"
    return f"{size_bytes / (1 << 20):.1f} MiB"


# --- diff -------------------------------------------------------------------------------------


def _print_diff(report: DiffReport) -> None:
    names = [shown(Path(path).name) for path in (report.image_a, report.image_b)]
    figures = ("equal", "changed", "only in A", "only in B")
    title = f"A {escape(names[0])}, B {escape(names[1])}: {_size(report.size_bytes)}"
    table = make_table(title, "KeyID", "", *figures, right=figures)
    for zone in report.keyids:
        for kind, change in (("pages", zone.pages), ("lines", zone.lines)):
            counts = (change.equal, change.changed, change.only_a, change.only_b)
            table.add_row(
                _pair(zone) if kind == "pages" else "", kind, *(f"{one:,}" for one in counts)
            )
    out.print(table)
    if not report.keyids:
        out.print("nothing is written in either", highlight=False)
    if any(zone.lines.changed for zone in report.keyids):
        out.print(_changed_table(report))
    out.print(
        "equal: not written in between, or as it was; XTS has no freshness: at one address and"
        f" under one key, the same plaintext has the same ciphertext. A line is {LINE_BYTES} bytes,"
        f" a page {PAGE_BYTES}.",
        style="dim",
        highlight=False,
    )


def _pair(zone: ZoneDiff) -> str:
    a, b = _keyid(zone.keyid_a, zone.excluded_a), _keyid(zone.keyid_b, zone.excluded_b)
    return a if a == b else f"{a}, then {b}"


def _changed_table(report: DiffReport) -> Table:
    figures = ["1", "2", "3", "4", "bits in these"]
    title = "Changed lines, by how many of their 16-byte blocks differ"
    if report.image_c is not None:
        figures += ["as in A", "as in B", "neither"]
        title += f"; and what C, {escape(shown(Path(report.image_c).name))}, has there"
    table = make_table(title, "KeyID", *figures, right=tuple(figures))
    for zone in report.keyids:
        if zone.bits_changed is None:
            continue
        cells = [*(f"{one:,}" for one in zone.blocks_changed), f"{zone.bits_changed:.2%}"]
        if zone.returned is not None:
            found = zone.returned
            cells += [f"{one:,}" for one in (found.back, found.kept, found.neither)]
        table.add_row(_pair(zone), *cells)
    return table
