# SPDX-License-Identifier: GPL-2.0-or-later
"""The `mktme` command.

The library raises; this module alone prints errors and chooses the exit code.
"""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

try:
    # First of ours: it needs libvirt, the one library that pip does not bring.
    from mktme.vm.host import EnvironmentUnfitError, UsageError
except ImportError as missing:
    print(f"mktme: libvirt cannot be loaded ({missing})\n  hint: make setup", file=sys.stderr)
    sys.exit(3)  # ExitCode.ENVIRONMENT

from mktme.datapath.shadow import Track
from mktme.datapath.uffd import WriteTrackingError
from mktme.engine.errors import DramError, DramFullError, KeyMaterialError, MktmeError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof import runs
from mktme.proof.bench import BenchReport, bench
from mktme.proof.isolation import IsolationMatrix
from mktme.proof.report import Check, GuestReport, RunReport, write_json
from mktme.proof.runs import Narrator
from mktme.proof.transparency import Progress as StepProgress
from mktme.service.client import EngineRefusedError
from mktme.vm import doctor, images
from mktme.vm.platform import VmConfig, check_config, check_sizes, parse_size


class ExitCode(enum.IntEnum):
    """What the command's exit status says."""

    OK = 0
    PROOF_FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3
    RUN_FAILED = 4
    INTERRUPTED = 130


class DataPath(enum.Enum):
    """How guest memory reaches the engine."""

    SHADOW = "shadow"


_USAGE_ERRORS: Final = (UsageError, images.UnknownGuestError)
_ENVIRONMENT_ERRORS: Final = (EnvironmentUnfitError, WriteTrackingError, images.ImageError)
# The engine's own errors come over its socket by name.
_ENGINE_USAGE_ERRORS: Final = {KeyMaterialError.__name__}
_ENGINE_ENVIRONMENT_ERRORS: Final = {DramError.__name__, DramFullError.__name__}

app = typer.Typer(
    name="mktme",
    help="A test bench for Intel TME and MKTME: unmodified guests, encrypted DRAM, and proofs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="Exit status: 0 all well, 1 a proof failed, 2 usage, 3 this machine is not fit"
    " (mktme doctor), 4 the run itself failed, 130 interrupted.",
)
out = Console()
err = Console(stderr=True)


GuestOption = Annotated[str, typer.Option(help="Guest to boot: a recipe in guest-images/.")]
MemoryOption = Annotated[
    str, typer.Option(metavar="SIZE", help="Guest RAM, such as 512M or 4G: whole MiB.")
]
VcpusOption = Annotated[int, typer.Option(min=1, max=255, help="Guest vCPUs.")]
AlgorithmOption = Annotated[Algorithm, typer.Option(help="The guests' cipher.")]
TrackOption = Annotated[Track, typer.Option(help="What tells that memory was written.")]
ConnectOption = Annotated[
    str | None,
    typer.Option(
        metavar="URI", help="libvirt on this machine to use, in place of its embedded driver."
    ),
]
DramOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep the DRAM image here, its description beside it."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
]


@app.command()
def run(
    guest: GuestOption = "tiny",
    datapath: Annotated[DataPath, typer.Option(help="How memory is encrypted.")] = DataPath.SHADOW,
    track: TrackOption = Track.STORES_AND_PAGES,
    memory: MemoryOption = "512M",
    vcpus: VcpusOption = 1,
    guests: Annotated[
        int, typer.Option(min=1, max=16, help="How many guests, each under a key of its own.")
    ] = 1,
    algorithm: AlgorithmOption = Algorithm.AES_XTS_128,
    no_encrypt: Annotated[
        bool, typer.Option("--no-encrypt", help="KeyID mode NO_ENCRYPT: DRAM holds plaintext.")
    ] = False,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Known key for checking DRAM offline: data key, then tweak key, raw or hex.",
        ),
    ] = None,
    reference: Annotated[
        bool, typer.Option(help="Run the guest on plain QEMU too, to compare what it computes.")
    ] = True,
    dram: DramOption = None,
    connect: ConnectOption = None,
    json: JsonOption = None,
) -> None:
    """Boot guests with encrypted memory, let them work, and prove what is claimed of them."""
    del datapath  # one so far
    mode = KeyMode.DIRECT if key_file is not None else KeyMode.RANDOM
    if no_encrypt:
        if key_file is not None:
            raise UsageError("--no-encrypt has no use for --key-file", hint="leave one of them out")
        mode = KeyMode.NO_ENCRYPT
    _check_json(json)
    config = _config(
        guest, memory, vcpus, track=track, algorithm=algorithm, mode=mode, key_file=key_file
    )
    options = runs.RunOptions(connect=connect, dram=dram, reference=reference)
    with _narrate() as narrator:
        report = runs.run(config, narrator, guests=guests, options=options)
    _finish(report, json)


@app.command()
def demo(
    guest: GuestOption = "tiny",
    memory: MemoryOption = "512M",
    algorithm: AlgorithmOption = Algorithm.AES_XTS_128,
    connect: ConnectOption = None,
    json: JsonOption = None,
) -> None:
    """The main job: two guests side by side under different keys, all proofs and their controls."""
    _check_json(json)
    config = _config(guest, memory, 1, algorithm=algorithm)
    with _narrate() as narrator:
        report = runs.demo(config, narrator, runs.RunOptions(connect=connect))
    _finish(report, json)


@app.command("doctor")
def examine(json: JsonOption = None) -> None:
    """Look whether this machine is fit, and say what mends it."""
    _check_json(json)
    with err.status("looking around"):
        findings = doctor.examine()
    table = _table("This machine", "", "check", "found", "what mends it")
    for finding in findings:
        state = "[green]ok[/]" if finding.fit else "[red]unfit[/]"
        table.add_row(state, finding.name, escape(finding.found), escape(finding.remedy or ""))
    out.print(table)
    if json is not None:
        write_json(json, doctor.DoctorReport("mktme.doctor", 1, tuple(findings)))
    if not all(finding.fit for finding in findings):
        raise typer.Exit(ExitCode.ENVIRONMENT)


@app.command("bench")
def measure(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all configurations.")] = 3,
    guest: GuestOption = "tiny",
    memory: MemoryOption = "512M",
    json: JsonOption = None,
) -> None:
    """Measure what the configurations cost, against plain TCG in the same run."""
    _check_json(json)
    config = _config(guest, memory, 1)
    with _narrate() as narrator:
        report = bench(config, rounds, narrator)
    _print_bench(report)
    if json is not None:
        write_json(json, report)


def main() -> None:
    """Entry point: every error of ours becomes one line with its hint, and an exit code."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == ExitCode.INTERRUPTED:  # what Typer makes of KeyboardInterrupt
            err.print("mktme: interrupted; everything was taken down", style="yellow")
        raise
    except MktmeError as error:
        err.print(f"mktme: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if error.hint is not None:
            err.print(f"  hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(_exit_code(error))


def _exit_code(error: MktmeError) -> ExitCode:
    name = error.error if isinstance(error, EngineRefusedError) else ""
    if isinstance(error, _USAGE_ERRORS) or name in _ENGINE_USAGE_ERRORS:
        return ExitCode.USAGE
    if isinstance(error, _ENVIRONMENT_ERRORS) or name in _ENGINE_ENVIRONMENT_ERRORS:
        return ExitCode.ENVIRONMENT
    return ExitCode.RUN_FAILED


def _config(guest: str, memory: str, vcpus: int, **fields: object) -> VmConfig:
    """The guest as asked for; sizes are checked before an image is built for it."""
    size = parse_size(memory)
    check_sizes(size, vcpus)
    with err.status(f"guest image {escape(guest)}"):
        image = images.ensure(guest, lambda line: err.print(line, style="dim", markup=False))
    config = VmConfig(image, memory_bytes=size, vcpus=vcpus, **fields)  # type: ignore[arg-type]
    check_config(config)
    return config


def _check_json(path: Path | None) -> None:
    """A report that cannot be written is better known before the run than after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(
            f"--json {path}: no file can be written there",
            hint="name a file in a directory that exists",
        )


class _Bars:
    """For a terminal: steps as lines with a bar or a spinner, and their time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def step(self, what: str) -> Iterator[StepProgress]:
        task = self._progress.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        yield advance
        self._progress.update(task, completed=1, total=1)

    def notice(self, line: str) -> None:
        self._progress.console.print(f"note: {line}", style="yellow", markup=False)


class _Lines:
    """For a log: a line when a step begins, one when it is done."""

    @contextmanager
    def step(self, what: str) -> Iterator[StepProgress]:
        started = time.monotonic()
        self._print(f"{what} ...")
        yield lambda _done, _all: None
        self._print(f"{what}: {time.monotonic() - started:.1f} s")

    def notice(self, line: str) -> None:
        self._print(f"note: {line}")

    @staticmethod
    def _print(line: str) -> None:
        err.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _narrate() -> Iterator[Narrator]:
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield _Bars(progress)


def _finish(report: RunReport, json: Path | None) -> None:
    out.print(_guest_table(report.guests))
    out.print(_check_table(report.checks))
    if report.isolation is not None:
        out.print(_isolation_table(report.isolation))
    if report.dram is not None:
        line = f"DRAM image {report.dram}, described by {report.sidecar}"
        out.print(line, markup=False, soft_wrap=True)
    if json is not None:
        write_json(json, report)
    passed = sum(check.passed for check in report.checks)
    verdict = "[green]passed[/]" if report.passed else "[red]FAILED[/]"
    out.print(
        f"{verdict}: {passed} of {len(report.checks)} checks in {report.duration_s:.1f} s"
        f" (QEMU {report.environment.qemu}, libvirt {report.environment.libvirt},"
        f" guest kernel {report.environment.guest_kernel_version})",
        soft_wrap=True,
        highlight=False,
    )
    if not report.passed:
        raise typer.Exit(ExitCode.PROOF_FAILED)


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table that fits 80 columns where its text does."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _guest_table(guests: tuple[GuestReport, ...]) -> Table:
    figures = ("boot", "work", "CPU lines", "other lines")
    ciphers = {guest.algorithm.value for guest in guests if guest.algorithm}
    title = f"Guests, {guests[0].memory_bytes >> 20} MiB each, {', '.join(sorted(ciphers))}"
    table = _table(title, "guest", "tracker", "KeyID", *figures, right=figures)
    for guest in guests:
        traffic = guest.traffic
        has_key = guest.keyid is not None and guest.key_mode is not None
        table.add_row(
            guest.name,
            guest.track.value if guest.track else "plain QEMU",
            f"{guest.keyid} {guest.key_mode.value}" if has_key and guest.key_mode else "-",
            f"{guest.boot_s:.1f} s",
            f"{guest.workload_s:.1f} s" if guest.checksums else "-",
            f"{traffic.lines_stored:,}" if traffic and guest.counts_stores else "-",
            f"{traffic.lines_other:,}" if traffic and guest.counts_pages else "-",
        )
    return table


def _check_table(checks: tuple[Check, ...]) -> Table:
    table = _table("Proofs and their controls", "", "proof", "of", "claim", "found")
    for check in checks:
        table.add_row(
            "[green]pass[/]" if check.passed else "[red]FAIL[/]",
            f"{check.proof}\ncontrol" if check.control else check.proof,
            check.subject,
            check.claim,
            check.finding,
        )
    return table


def _isolation_table(matrix: IsolationMatrix) -> Table:
    columns = (
        f"KeyID {keyid} ({name})" for name, keyid in zip(matrix.names, matrix.keyids, strict=True)
    )
    table = _table("Isolation: the canary page of each VM, read with each KeyID", "", *columns)
    for name, cells in zip(matrix.names, matrix.readable, strict=True):
        table.add_row(name, *("readable" if cell else "[dim]noise[/]" for cell in cells))
    return table


def _print_bench(report: BenchReport) -> None:
    figures = ("boot", "work", "together", "ratio", "engine CPU", "engine peak")
    title = f"Guest time, medians of {report.rounds} rounds"
    table = _table(title, "configuration", *figures, right=figures)
    for one in report.configurations:
        cpu, memory = one.engine_cpu_share, one.engine_memory
        table.add_row(
            one.name,
            f"{median(one.boot_s):.2f} s",
            f"{median(one.workload_s):.2f} s",
            f"{one.guest_s:.2f} s",
            f"{one.ratio:.2f}",
            "-" if cpu is None else f"{cpu:.0%}",
            "-" if memory is None else f"{memory.peak >> 20} MiB",
        )
    out.print(table)
    xts = report.xts
    out.print(
        f"XTS, {xts.batch_bytes >> 10} KiB of 64-byte units:"
        f" {xts.engine_bytes_per_s / 1e9:.2f} GB/s;"
        f" openssl speed, 4096-byte units: {xts.openssl_bytes_per_s / 1e9:.2f} GB/s;"
        f" ratio {xts.ratio:.3f}",
        soft_wrap=True,
        highlight=False,
    )
    targets = _table("Targets", "", "figure", "is", "to reach", right=("is", "to reach"))
    for target in report.targets:
        targets.add_row(
            "[green]met[/]" if target.met else "[red]missed[/]",
            target.name,
            f"{target.value:.3g}",
            f"{'≥' if target.at_least else '≤'} {target.limit:.3g}",
        )
    out.print(targets)


if __name__ == "__main__":
    main()
