# SPDX-License-Identifier: GPL-2.0-or-later
"""The `mktme` command.

The library raises; this module alone prints errors and chooses the exit code.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

try:
    # First of ours: it needs libvirt, the one library that pip does not bring.
    from mktme.vm.host import QEMU11, EnvironmentUnfitError, UsageError, emulator_path
except ImportError as missing:
    print(f"mktme: libvirt cannot be loaded ({missing})\n  hint: make setup", file=sys.stderr)
    sys.exit(3)  # ExitCode.ENVIRONMENT

from mktme.attest.errors import CertificateError, PolicyError, ReferenceValuesError
from mktme.broker.errors import BrokerSetupError
from mktme.cli_attest import ca_app, evidence, reference, verify_evidence
from mktme.cli_broker import broker_app
from mktme.cli_dump import dump_app
from mktme.cli_features import features
from mktme.cli_keyid import keyid_app
from mktme.cli_metrics import metrics
from mktme.cli_migrate import migrate
from mktme.cli_narration import narrate
from mktme.cli_options import (
    ConnectOption,
    GuestOption,
    HtmlOption,
    JsonOption,
    MemoryOption,
    VcpusOption,
    WindowOption,
    check_json,
    guest_memory,
    image,
)
from mktme.cli_options import ExitCode as ExitCode  # part of this module for others
from mktme.cli_output import err, make_table, out
from mktme.cli_platform import platform_app
from mktme.cli_provision import provision_app
from mktme.cli_quote import quote
from mktme.cli_report import Page, report_page
from mktme.cli_tamper import tamper
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.uffd import FaultServiceError, WriteTrackingError
from mktme.datapath.window import Policy
from mktme.engine.errors import (
    DramError,
    DramFullError,
    KeyIdError,
    KeyMaterialError,
    MktmeError,
    OutputError,
    OutputExistsError,
)
from mktme.engine.firmware import FirmwareError, PlatformConfigError
from mktme.engine.keys import KeyMode
from mktme.engine.text import shown, spelled
from mktme.engine.xts import Algorithm
from mktme.proof import runs
from mktme.proof.bench import CONFIGURATIONS, BenchReport, bench
from mktme.proof.demand import demo_demand, run_demand
from mktme.proof.isolation import IsolationMatrix
from mktme.proof.report import Check, GuestReport, RunReport, write_json
from mktme.provision.errors import LeftOffError
from mktme.remote.receiver import receive
from mktme.report.document import ReportError
from mktme.service.client import EngineRefusedError
from mktme.service.platform_file import read_platform
from mktme.service.wire import RoleError
from mktme.vm import doctor, images
from mktme.vm.config import (
    BOOT_TIMEOUT_S,
    DISK_BOOT_TIMEOUT_S,
    VmConfig,
    check_config,
    check_data_path,
    parse_nvdimm,
)
from mktme.vm.disk_images import user_image
from mktme.vm.hardware import Firmware, Hardware, Machine
from mktme.vm.pages import parse_pages
from mktme.vm.platform import Platform
from mktme.vm.sizes import parse_window
from mktme.vm.ssh import read_public_key
from mktme.vm.visible import check_visible, visible_platform

_USAGE_ERRORS: Final = (
    UsageError,
    BrokerSetupError,
    PlatformConfigError,
    ReportError,
    images.UnknownGuestError,
    KeyMaterialError,
    OutputExistsError,
    CertificateError,
    PolicyError,
    ReferenceValuesError,
)
_ENVIRONMENT_ERRORS: Final = (
    EnvironmentUnfitError,
    WriteTrackingError,
    FaultServiceError,
    FirmwareError,
    images.ImageError,
    OutputError,
)
# The engine's own errors come over its socket by name.
_ENGINE_USAGE_ERRORS: Final = {
    one.__name__
    for one in (
        KeyMaterialError,
        KeyIdError,
        PlatformConfigError,
        RoleError,
        OutputExistsError,
        CertificateError,
    )
}
_ENGINE_ENVIRONMENT_ERRORS: Final = {
    one.__name__ for one in (DramError, DramFullError, FirmwareError, OutputError)
}

app = typer.Typer(
    name="mktme",
    help="A test bench for Intel TME and MKTME: unmodified guests, encrypted DRAM, and proofs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="Exit status: 0 all well, 1 a proof failed, 2 usage, 3 this machine is not fit"
    " (mktme doctor), 4 the run itself failed, 5 something is to be done (provision plan"
    " --exit-code), 130 interrupted.",
)
app.add_typer(platform_app, name="platform")
app.add_typer(keyid_app, name="keyid")
app.add_typer(dump_app, name="dump")
app.add_typer(provision_app, name="provision")
app.add_typer(broker_app, name="broker")
app.command()(tamper)
app.command()(features)
app.command()(quote)
app.command()(metrics)
app.add_typer(ca_app, name="ca")
app.command()(evidence)
app.command()(reference)
app.command("verify")(verify_evidence)
app.command()(migrate)
app.command(hidden=True)(receive)
app.command("report")(report_page)


AlgorithmOption = Annotated[Algorithm, typer.Option(help="The guests' cipher.")]
TrackOption = Annotated[
    Track | None,
    typer.Option(
        help="What tells that memory was written (inline: stores, to count them).",
        show_default="stores+pages; inline: none",
    ),
]
DramOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep the DRAM image here, its description beside it."),
]
AuditOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append the engine's audit log to this file."),
]
CaOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Have evidence certified by this CA (mktme ca create)."),
]
PlatformOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The platform: a platform.toml (mktme platform show)."),
]


@app.command()
def run(
    guest: GuestOption = "tiny",
    disk_image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="FILE", help="A cloud image to boot, qcow2 or raw; never written to."
        ),
    ] = None,
    machine: Annotated[Machine, typer.Option(help="The guest's chipset.")] = Machine.Q35,
    firmware: Annotated[Firmware, typer.Option(help="What boots a guest's disk.")] = Firmware.BIOS,
    vtpm: Annotated[
        bool, typer.Option("--vtpm", help="Give guests a TPM 2.0; firmware must be uefi.")
    ] = False,
    ssh_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            help="Loopback port for ssh to a guest that boots its disk.",
            show_default="a free one",
        ),
    ] = None,
    ssh_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Your public key, to log in to such a guest with --keep."
        ),
    ] = None,
    boot_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="How long a guest may take to its shell.",
            show_default=f"{BOOT_TIMEOUT_S:g}, from a disk {DISK_BOOT_TIMEOUT_S:g}",
        ),
    ] = None,
    datapath: Annotated[DataPath, typer.Option(help="How memory is encrypted.")] = DataPath.SHADOW,
    track: TrackOption = None,
    window: WindowOption = None,
    policy: Annotated[
        Policy, typer.Option(help="inline: which pages leave a full window.")
    ] = Policy.TWO_QUEUES,
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
    pages: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE@ADDRESS=USE",
            help="Pages under another KeyID, such as 16M@64M=shared; uses: shared, no-encrypt,"
            " other-key. May be given again.",
        ),
    ] = None,
    nvdimm: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:SIZE",
            help="An NVDIMM for the guest: ciphertext in FILE; the same --key-file reads it again.",
        ),
    ] = None,
    platform: PlatformOption = None,
    visible: Annotated[
        bool,
        typer.Option(
            "--platform-visible",
            help="Let the guests see the platform's TME: CPUID, MSRs and PCONFIG (QEMU 11).",
        ),
    ] = False,
    dram: DramOption = None,
    audit: AuditOption = None,
    ca: CaOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the guests running until Ctrl-C.")
    ] = False,
    connect: ConnectOption = None,
    emulator: Annotated[
        str | None,
        typer.Option(
            metavar=f"PATH|{QEMU11}",
            help=f"Another QEMU than this machine's own; {QEMU11} is what `make qemu11` installs.",
        ),
    ] = None,
    json: JsonOption = None,
    html: HtmlOption = None,
) -> None:
    """Boot guests with encrypted memory, let them work, and prove what is claimed of them."""
    mode = KeyMode.DIRECT if key_file is not None else KeyMode.RANDOM
    if no_encrypt:
        if key_file is not None:
            raise UsageError("--no-encrypt has no use for --key-file", hint="leave one of them out")
        mode = KeyMode.NO_ENCRYPT
    module = None if nvdimm is None else parse_nvdimm(nvdimm)
    in_module = None if module is None else module.path
    page = Page(json, html, dram, disk_image, ssh_key, key_file, platform, in_module, audit)
    qemu = None if emulator is None else emulator_path(emulator)
    memory_bytes = guest_memory(memory, vcpus)
    window_bytes = None if window is None else parse_window(window, memory_bytes)
    check_data_path(datapath, track, window_bytes, memory_bytes)
    if track is None and datapath is DataPath.SHADOW:
        track = Track.STORES_AND_PAGES
    ranges = tuple(parse_pages(one) for one in pages or ())
    for one in ranges:
        one.ram_offset(memory_bytes, machine)
    if ssh_port is not None and guests > 1:
        raise UsageError("one port for several guests", hint="leave --ssh-port out")
    if module is not None and guests > 1:
        raise UsageError("an NVDIMM is one guest's", hint="leave --guests out")
    set_up = None if platform is None else read_platform(platform)
    if visible:
        set_up = visible_platform(set_up)
    all_bytes = memory_bytes + (0 if module is None else module.size_bytes)
    run_demand(all_bytes, algorithm, ranges, guests).check(set_up)
    config = VmConfig(
        image(guest) if disk_image is None else user_image(disk_image),
        memory_bytes=memory_bytes,
        vcpus=vcpus,
        datapath=datapath,
        track=track,
        window_bytes=window_bytes,
        policy=policy,
        algorithm=algorithm,
        mode=mode,
        key_file=key_file,
        pages=ranges,
        hardware=Hardware(machine, firmware, vtpm=vtpm),
        ssh_port=ssh_port,
        authorized_keys=() if ssh_key is None else (read_public_key(ssh_key),),
        boot_timeout_s=boot_timeout,
        nvdimm=module,
        visible=visible,
    )
    check_config(config)
    if visible:
        check_visible(config, visible_platform(set_up))
    options = runs.RunOptions(
        connect=connect,
        emulator=qemu,
        dram=dram,
        audit=audit,
        ca=ca,
        reference=reference,
        platform=set_up,
        arguments=tuple(map(spelled, sys.argv[1:])),
    )
    with ExitStack() as telling:
        narrator = telling.enter_context(narrate())

        def leave_running(report: RunReport, platform: Platform) -> None:
            telling.close()  # else progress is drawn over what follows
            _deliver(report, json, page)
            _wait(platform)

        options.keep = leave_running if keep else None
        options.look = page.looker(narrator)
        report = runs.run(config, narrator, guests=guests, options=options)
    if not keep:
        _deliver(report, json, page)
    _conclude(report)


@app.command()
def demo(
    guest: GuestOption = "tiny",
    memory: MemoryOption = "512M",
    algorithm: AlgorithmOption = Algorithm.AES_XTS_128,
    platform: PlatformOption = None,
    connect: ConnectOption = None,
    json: JsonOption = None,
    html: HtmlOption = None,
) -> None:
    """The main job: two guests side by side under different keys, all proofs and their controls."""
    page = Page(json, html, platform)
    memory_bytes = guest_memory(memory)
    firmware = None if platform is None else read_platform(platform)
    demo_demand(memory_bytes, algorithm).check(firmware)
    config = VmConfig(image(guest), memory_bytes=memory_bytes, algorithm=algorithm)
    arguments = tuple(map(spelled, sys.argv[1:]))
    options = runs.RunOptions(connect=connect, platform=firmware, arguments=arguments)
    with narrate() as narrator:
        options.look = page.looker(narrator)
        report = runs.demo(config, narrator, options)
    _deliver(report, json, page)
    _conclude(report)


@app.command("doctor")
def examine(json: JsonOption = None) -> None:
    """Look whether this machine is fit, and say what mends it."""
    check_json(json)
    with err.status("looking around"):
        findings = doctor.examine()
    table = make_table("This machine", "", "check", "found", "what mends it")
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
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"A configuration, and no others but plain: {', '.join(CONFIGURATIONS)}."
            " May be given again.",
        ),
    ] = None,
    guest: GuestOption = "tiny",
    memory: MemoryOption = "512M",
    json: JsonOption = None,
) -> None:
    """Measure what the configurations cost, against plain TCG in the same run."""
    check_json(json)
    for name in only or ():
        if name not in CONFIGURATIONS:
            raise UsageError(
                f"no configuration {name!r}", hint=f"--only {' or '.join(CONFIGURATIONS)}"
            )
    memory_bytes = guest_memory(memory)
    config = VmConfig(image(guest), memory_bytes=memory_bytes)
    with narrate() as narrator:
        report = bench(config, rounds, narrator, only or ())
    _print_bench(report)
    if json is not None:
        write_json(json, report)


def main() -> None:
    """Entry point: every error becomes one line with its hint, and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as ended:
        if ended.code == ExitCode.INTERRUPTED:  # what Typer makes of KeyboardInterrupt
            err.print("mktme: interrupted; everything was taken down", style="yellow")
        raise
    except MktmeError as error:
        err.print(
            f"mktme: {shown(str(error))}",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if error.hint is not None:
            err.print(f"  hint: {shown(error.hint)}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(_exit_code(error))
    except Exception as error:  # a fault in mktme; and status 1 would be a failed proof
        if os.environ.get("MKTME_TRACEBACK"):
            traceback.print_exc()
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
        err.print(
            f"mktme: {shown(what)}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        err.print("  hint: a fault in mktme; MKTME_TRACEBACK=1 shows more", highlight=False)
        sys.exit(ExitCode.RUN_FAILED)


def _exit_code(error: MktmeError) -> ExitCode:
    if isinstance(error, LeftOffError):
        return ExitCode.INTERRUPTED
    name = error.error if isinstance(error, EngineRefusedError) else ""
    if isinstance(error, _USAGE_ERRORS) or name in _ENGINE_USAGE_ERRORS:
        return ExitCode.USAGE
    if isinstance(error, _ENVIRONMENT_ERRORS) or name in _ENGINE_ENVIRONMENT_ERRORS:
        return ExitCode.ENVIRONMENT
    return ExitCode.RUN_FAILED


def _wait(platform: Platform) -> None:
    """Leave all as it is until the user has seen enough."""
    lines = (
        "running until Ctrl-C; meanwhile, in another terminal: mktme keyid list",
        f"control socket {platform.control_socket}",
        *(f"log in, if --ssh-key was yours: {login}" for login in platform.logins()),
    )
    with suppress(KeyboardInterrupt):
        for line in lines:
            err.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        platform.wait_for_trouble()


def _deliver(report: RunReport, json: Path | None, page: Page) -> None:
    _print_report(report)
    if json is not None:
        write_json(json, report)
    page.write(report)


def _print_report(report: RunReport) -> None:
    out.print(_guest_table(report.guests))
    if any(guest.paging for guest in report.guests):
        out.print(_window_table(report.guests))
    out.print(_check_table(report.checks))
    if report.isolation is not None:
        out.print(_isolation_table(report.isolation))
    if report.dram is not None:
        line = f"DRAM image {report.dram}, described by {report.sidecar}"
        out.print(line, markup=False, soft_wrap=True)
    passed = sum(check.passed for check in report.checks)
    verdict = "[green]passed[/]" if report.passed else "[red]FAILED[/]"
    out.print(
        f"{verdict}: {passed} of {len(report.checks)} checks in {report.duration_s:.1f} s"
        f" (QEMU {report.environment.qemu}, libvirt {report.environment.libvirt},"
        f" guest kernel {report.environment.guest_kernel_version})",
        soft_wrap=True,
        highlight=False,
    )


def _conclude(report: RunReport) -> None:
    if not report.passed:
        raise typer.Exit(ExitCode.PROOF_FAILED)


def _guest_table(guests: tuple[GuestReport, ...]) -> Table:
    figures = ("boot", "work", "CPU lines", "other lines")
    ciphers = {guest.algorithm.value for guest in guests if guest.algorithm}
    title = f"Guests, {guests[0].memory_bytes >> 20} MiB each, {', '.join(sorted(ciphers))}"
    table = make_table(title, "guest", "tracker", "KeyID", *figures, right=figures)
    for guest in guests:
        traffic = guest.traffic
        source = traffic or guest.paging
        stored = None if source is None else source.lines_stored
        has_key = guest.keyid is not None and guest.key_mode is not None
        table.add_row(
            guest.name,
            _data_path(guest),
            f"{guest.keyid} {guest.key_mode.value}" if has_key and guest.key_mode else "-",
            f"{guest.boot_s:.1f} s",
            f"{guest.workload_s:.1f} s" if guest.checksums else "-",
            f"{stored:,}" if stored is not None and guest.counts_stores else "-",
            f"{traffic.lines_other:,}" if traffic and guest.counts_pages else "-",
        )
    return table


def _data_path(guest: GuestReport) -> str:
    if guest.paging is not None:
        return f"inline {guest.paging.policy.value}"
    return guest.track.value if guest.track else "plain QEMU"


def _window_table(guests: tuple[GuestReport, ...]) -> Table:
    figures = ("peak, MiB", "faults", "median", "p99", "pages in", "of them ahead", "pages out")
    title = "Windows: plaintext at most, page faults and their service, pages moved"
    table = make_table(title, "guest", *figures, right=figures)
    for guest in guests:
        paging = guest.paging
        if paging is not None:
            table.add_row(
                guest.name,
                f"{paging.peak_bytes / (1 << 20):.1f} of {paging.window_bytes / (1 << 20):.1f}",
                f"{paging.faults:,}",
                _microseconds(paging.fault_median_s),
                _microseconds(paging.fault_p99_s),
                f"{paging.pages_fetched:,}",
                f"{paging.pages_read_ahead:,}",
                f"{paging.pages_evicted:,}",
            )
    return table


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f} µs"


def _check_table(checks: tuple[Check, ...]) -> Table:
    table = make_table("Proofs and their controls", "", "proof", "of", "claim", "found")
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
    table = make_table("Isolation: the canary page of each VM, read with each KeyID", "", *columns)
    for name, cells in zip(matrix.names, matrix.readable, strict=True):
        table.add_row(name, *("readable" if cell else "[dim]noise[/]" for cell in cells))
    return table


def _print_bench(report: BenchReport) -> None:
    figures = ("boot", "work", "ratio", "again", "engine CPU", "peak", "faults", "median", "p99")
    title = f"Guest time, medians of {report.rounds} rounds"
    table = make_table(title, "configuration", *figures, right=figures)
    for one in report.configurations:
        cpu, memory, paging = one.engine_cpu_share, one.engine_memory, one.paging
        table.add_row(
            one.name,
            f"{median(one.boot_s):.2f} s",
            f"{median(one.workload_s):.2f} s",
            f"{one.ratio:.2f}",
            "-" if one.again_s is None else f"{one.again_s:.2f} s",
            "-" if cpu is None else f"{cpu:.0%}",
            "-" if memory is None else f"{memory.peak >> 20} MiB",
            "-" if paging is None else f"{paging.faults:,}",
            "-" if paging is None else _microseconds(paging.fault_median_s),
            "-" if paging is None else _microseconds(paging.fault_p99_s),
        )
    out.print(table)
    xts, engine = report.xts, report.engine
    out.print(
        f"XTS, {xts.batch_bytes >> 10} KiB of 64-byte units:"
        f" {xts.engine_bytes_per_s / 1e9:.2f} GB/s;"
        f" openssl speed, 4096-byte units: {xts.openssl_bytes_per_s / 1e9:.2f} GB/s;"
        f" ratio {xts.ratio:.3f}\n"
        f"Over the socket: {engine.rekey_bytes >> 20} MiB re-keyed at"
        f" {engine.rekey_bytes_per_s / 1e9:.2f} GB/s; RDMSR {engine.rdmsr_s * 1e3:.2f} ms;"
        f" WRMSR {engine.wrmsr_s * 1e3:.2f} ms;"
        f" PCONFIG {engine.pconfig_s * 1e3:.2f} ms",
        soft_wrap=True,
        highlight=False,
    )
    targets = make_table("Targets", "", "figure", "is", "to reach", right=("is", "to reach"))
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
