# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump search`: text, bytes, expressions and AES keys in an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from mktme.cli_narration import narrate
from mktme.cli_options import JsonOption, check_json
from mktme.cli_output import make_table, out
from mktme.dump.aes_keys import Form
from mktme.dump.image import DumpError, DumpImage
from mktme.engine.sidecar import sidecar_path
from mktme.engine.text import shown
from mktme.proof.report import write_json
from mktme.vm.host import UsageError
from mktme.vm.sizes import parse_size

if TYPE_CHECKING:
    from mktme.dump.search import FoundKey, Hit, SearchReport

SEARCH_EPILOG: Final = (
    "Exit status: 0 something was found, 1 nothing, 2 usage, 4 the image cannot be read."
)
_NOTHING_FOUND: Final = 1
_EXCERPT_BYTES: Final = 24
_NAME_CHARACTERS: Final = 72


def search(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A DRAM image.")],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Look for a string, in UTF-8. May be repeated."),
    ] = None,
    utf16: Annotated[
        list[str] | None,
        typer.Option("--utf16", metavar="TEXT", help="Look for a string, in UTF-16."),
    ] = None,
    hexadecimal: Annotated[
        list[str] | None,
        typer.Option("--hex", metavar="DIGITS", help='Look for bytes, such as "de ad be ef".'),
    ] = None,
    regex: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Look for a regular expression: PCRE, without back-references and look-around.",
        ),
    ] = None,
    aes_keys: Annotated[
        bool, typer.Option("--aes-keys", help="Look for AES key schedules.")
    ] = False,
    ignore_case: Annotated[
        bool, typer.Option("--ignore-case", "-i", help="ASCII letters in either case.")
    ] = False,
    max_match: Annotated[
        str, typer.Option(metavar="SIZE", help="The longest match of a regular expression.")
    ] = "4K",
    max_errors: Annotated[
        int,
        typer.Option(min=0, max=12, help="Bits of a key schedule that may be wrong (decayed)."),
    ] = 0,
    show_keys: Annotated[
        bool,
        typer.Option("--show-keys", help="Show the AES keys found: secrets, on your terminal."),
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Any file of memory, which has no sidecar.")
    ] = False,
    sidecar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The image's description; none: the one beside it."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show so many hits, by address.")] = 100,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, max=1024, help="Threads; none: a core's.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Look for text, bytes, expressions and AES keys, at any address of an image."""
    # Not needed for any other command, and slow to load.
    from mktme.dump.patterns import MAX_MATCH_BYTES, Pattern, PatternError, Searcher
    from mktme.dump.search import search as search_image

    check_json(json, image, sidecar)
    longest = parse_size(max_match)
    if not 1 <= longest <= MAX_MATCH_BYTES:
        raise UsageError(
            f"--max-match {max_match}: out of range", hint=f"1 to {MAX_MATCH_BYTES} bytes"
        )
    for option, given in (("--max-errors", max_errors > 0), ("--show-keys", show_keys)):
        if given and not aes_keys:
            raise UsageError(f"{option} is for AES keys", hint="look for them with --aes-keys")
    if raw and sidecar is not None:
        raise UsageError("--raw says that there is no sidecar", hint="leave out --raw or --sidecar")
    try:
        searcher = Searcher(
            [
                *(Pattern.text(one, ignore_case=ignore_case) for one in text or ()),
                *(Pattern.text(one, "utf-16-le", ignore_case=ignore_case) for one in utf16 or ()),
                *(Pattern.hexadecimal(one) for one in hexadecimal or ()),
                *(Pattern.regex(one, ignore_case=ignore_case) for one in regex or ()),
            ],
            aes_keys=aes_keys,
            max_errors=max_errors,
            max_match_bytes=longest,
        )
    except PatternError as error:
        raise UsageError(str(error), hint=error.hint) from error
    opened = DumpImage.open_raw(image) if raw else _open(image, sidecar)
    with opened, narrate() as narrator, narrator.step(f"search {image.name}") as advance:
        report = search_image(
            opened, searcher, limit=limit, jobs=jobs, show_keys=show_keys, progress=advance
        )
    _print_report(report)
    if json is not None:
        write_json(json, report)
    if not report.hits:
        raise typer.Exit(_NOTHING_FOUND)


def _open(image: Path, sidecar: Path | None) -> DumpImage:
    try:
        return DumpImage.open(image, sidecar)
    except DumpError as error:
        described = sidecar_path(image) if sidecar is None else sidecar
        if described.exists() or not image.exists():
            raise
        raise DumpError(
            str(error), hint=f"{error.hint}; or search it as it is, with --raw"
        ) from error


def _print_report(report: SearchReport) -> None:
    if report.hits:
        out.print(_table(report))
    found = len(report.hits) + report.more
    number = f"{found:,}" if report.counted else f"more than {found:,}"
    line = f"{number if found else 'nothing'} found in {_size(report.searched_bytes)} of data"
    if report.duration_s > 0:
        line += f", {report.duration_s:.1f} s"
    out.print(line, highlight=False, soft_wrap=True)
    if report.more:
        out.print(
            f"the first {len(report.hits):,} of them are shown; --limit shows more",
            highlight=False,
            soft_wrap=True,
        )


def _table(report: SearchReport) -> Table:
    """Columns that say nothing about any hit are left out."""
    of_vm = any(one.vm is not None for one in report.hits)
    of_keyid = any(one.keyid is not None for one in report.hits)
    heads = ["address", *["KeyID"] * of_keyid, *["VM", "guest-physical"] * of_vm, "found"]
    title = f"Found in {escape(shown(Path(report.image).name))}"
    table = make_table(title, *heads, right=("address", "KeyID", "guest-physical"))
    for one in report.hits:
        cells = [f"{one.address:#x}"]
        if of_keyid:
            cells.append("-" if one.keyid is None else str(one.keyid))
        if of_vm:
            cells.append(escape(shown(one.vm or "-")))
            cells.append("-" if one.guest_physical is None else f"{one.guest_physical:#x}")
        table.add_row(*cells, escape(_what(one)))
    return table


def _what(hit: Hit) -> str:
    if hit.key is not None:
        return _key(hit.pattern, hit.key)
    if not hit.pattern.startswith("regex"):
        name = hit.pattern
        return name if len(name) <= _NAME_CHARACTERS else f"{name[:_NAME_CHARACTERS]}..."
    # An expression's matches differ.
    matched = bytes.fromhex(hit.excerpt or "")
    shown = repr(matched[:_EXCERPT_BYTES])[1:]
    more = f" and {hit.size_bytes - _EXCERPT_BYTES:,} more" * (hit.size_bytes > _EXCERPT_BYTES)
    return f"{shown}{more}"


def _key(name: str, key: FoundKey) -> str:
    parts = [name]
    if key.form is Form.DECRYPTION:
        parts.append("for decryption")
    if key.swapped:
        parts.append("words byte-swapped")
    if key.errors:
        parts.append(f"{key.errors} bit{'s' * (key.errors > 1)} wrong")
    if key.xts_partner is not None:
        parts.append(f"XTS pair with {key.xts_partner:#x}")
    text = ", ".join(parts)
    return text if key.key is None else f"{text}: {key.key}"


def _size(size_bytes: int) -> str:
    mib = size_bytes / (1 << 20)
    return f"{mib:,.1f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"
