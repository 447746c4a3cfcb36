# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme keyid`: the KeyIDs of a platform that is running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.markup import escape
from rich.table import Table

from mktme.cli_output import EngineOption, JsonFlag, make_table, out, print_json
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import MAX_KEYID_BITS, KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.platform_report import KeyIdChange, KeyIdReport, describe_keyids
from mktme.service.wire import Role
from mktme.vm.host import UsageError
from mktme.vm.running import connected

keyid_app = typer.Typer(
    help="The KeyIDs of a running platform (mktme run --keep).", no_args_is_help=True
)

_MAX_KEYID: Final = (1 << MAX_KEYID_BITS) - 1  # of any platform; and the wire has 64 bits


@keyid_app.command("list")
def list_keyids(
    engine: EngineOption = None,
    json: JsonFlag = False,
) -> None:
    """Show how each KeyID is programmed, for whom, and for how much memory."""
    with connected(engine, Role.OBSERVER) as client:
        report = describe_keyids(client.status())
    if json:
        print_json(report)
        return
    out.print(_table(report))
    free = "no more can be programmed"
    if report.free:
        free = f"{report.free} more can be programmed; until then they are as KeyID 0"
    out.print(free, highlight=False)


@keyid_app.command()
def program(
    keyid: Annotated[
        int | None,
        typer.Argument(
            metavar="KEYID", min=1, max=_MAX_KEYID, help="Which; none: the first that is free."
        ),
    ] = None,
    mode: Annotated[
        Literal["random", "direct", "no-encrypt"],
        typer.Option(help="A key that nobody knows, a known one, or no encryption."),
    ] = "random",
    algorithm: Annotated[
        Algorithm | None, typer.Option(help="The cipher; none: the first that the platform allows.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The key, for mode direct: data key, then tweak key, raw or hex."
        ),
    ] = None,
    engine: EngineOption = None,
    json: JsonFlag = False,
) -> None:
    """Program a KeyID that nobody uses."""
    chosen = KeyMode(mode)
    if chosen is KeyMode.DIRECT and key_file is None:
        raise UsageError("--mode direct needs a key", hint="name its file with --key-file FILE")
    if chosen is not KeyMode.DIRECT and key_file is not None:
        raise UsageError(f"--mode {mode} has no use for --key-file", hint="--mode direct has")
    with connected(engine, Role.OWNER) as client:
        cipher = _algorithm(client.status().platform, algorithm)
        done = client.program_key(chosen, cipher, keyid=keyid, key_file=key_file)
    if json:
        key = None if chosen is KeyMode.NO_ENCRYPT else cipher
        print_json(KeyIdChange("mktme.keyid-change", 1, done, chosen, key))
        return
    what = mode if chosen is KeyMode.NO_ENCRYPT else f"{mode} {cipher.value}"
    out.print(f"KeyID {done}: {what}", highlight=False)


@keyid_app.command()
def clear(
    keyid: Annotated[int, typer.Argument(metavar="KEYID", min=1, max=_MAX_KEYID)],
    engine: EngineOption = None,
    json: JsonFlag = False,
) -> None:
    """Destroy the key of a KeyID that nobody uses."""
    with connected(engine, Role.OWNER) as client:
        client.clear_key(keyid)
    if json:
        print_json(KeyIdChange("mktme.keyid-change", 1, keyid, None, None))
        return
    out.print(f"KeyID {keyid}: cleared, it is as KeyID 0 again", highlight=False)


def _algorithm(platform: PlatformConfig, asked: Algorithm | None) -> Algorithm:
    # PCONFIG wants one in any case, also for no encryption; it refuses what firmware did not allow.
    allowed = platform.algorithms or tuple(Algorithm)
    if asked is not None and asked not in allowed:
        raise UsageError(
            f"the platform's algorithms do not include {asked.value}",
            hint=f"--algorithm {allowed[0].value}",
        )
    return asked or allowed[0]


def _table(report: KeyIdReport) -> Table:
    table = make_table(
        "KeyIDs", "KeyID", "mode", "cipher", "VM", "memory", right=("KeyID", "memory")
    )
    for row in report.keyids:
        table.add_row(
            str(row.keyid),
            row.mode.value,
            "plaintext" if row.algorithm is None else row.algorithm.value,
            escape(row.vm or "-"),
            _memory(row.size_bytes),
        )
    return table


def _memory(size_bytes: int) -> str:
    if not size_bytes:
        return "-"
    if size_bytes < 1 << 20:
        return f"{size_bytes >> 10} KiB"
    return f"{size_bytes / (1 << 20):,.1f} MiB"
