# SPDX-License-Identifier: GPL-2.0-or-later
"""The command: its options, its exit codes, and one line with a hint for whatever goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mktme import cli
from mktme.cli import ExitCode
from mktme.datapath.link import LinkError
from mktme.datapath.shadow import Track
from mktme.datapath.uffd import WriteTrackingError
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import FirmwareError, PlatformConfigError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof import runs
from mktme.proof.bench import (
    BenchReport,
    ConfigurationReport,
    EngineReport,
    Target,
    XtsReport,
)
from mktme.proof.report import RunReport
from mktme.proof.runs import RunOptions
from mktme.service import wire
from mktme.service.client import EngineGoneError, EngineRefusedError
from mktme.vm import doctor, images
from mktme.vm.config import VmConfig
from mktme.vm.console import VmError, VmLostError
from mktme.vm.doctor import Finding
from mktme.vm.host import EnvironmentUnfitError, UsageError
from mktme.vm.images import ImageError, UnknownGuestError

from .command import Mktme, Result, runner
from .proof.test_report import ENVIRONMENT, REPORT
from .vm.test_domain_xml import IMAGE

MIB = 1 << 20


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@dataclass
class Asked:
    """What the command asked the library for, and what it is given."""

    config: VmConfig | None = None
    options: RunOptions | None = None
    guests: int | None = None
    answer: Callable[[], RunReport] = lambda: REPORT


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """No image is built and no guest booted."""
    asked = Asked()

    def run(config: VmConfig, _narrator: object, *, guests: int, options: RunOptions) -> RunReport:
        asked.config, asked.guests, asked.options = config, guests, options
        return asked.answer()

    def demo(config: VmConfig, _narrator: object, options: RunOptions) -> RunReport:
        asked.config, asked.options = config, options
        return asked.answer()

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "demo", demo)
    monkeypatch.setattr(images, "ensure", lambda _guest, _progress: IMAGE)
    return asked


def raising(error: BaseException) -> Callable[[], RunReport]:
    def answer() -> RunReport:
        raise error

    return answer


# --- options ----------------------------------------------------------------------------------


def test_what_is_run_by_default(mktme: Mktme, asked: Asked) -> None:
    assert mktme("run").code == ExitCode.OK
    assert asked.config == VmConfig(
        image=IMAGE,
        memory_bytes=512 * MIB,
        vcpus=1,
        track=Track.STORES_AND_PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
        key_file=None,
        check_tlb=False,
    )
    assert asked.guests == 1
    assert asked.options == RunOptions(connect=None, dram=None, reference=True, arguments=("run",))


def test_every_option_arrives(mktme: Mktme, asked: Asked, tmp_path: Path) -> None:
    options = "--guest tiny --datapath shadow --track pages --memory 1G --vcpus 3 --guests 2"
    options += " --algorithm aes-xts-256 --no-reference --connect qemu:///system"
    files = {"--key-file": "key", "--dram": "dram.img", "--json": "out.json"}
    for option, name in files.items():
        options += f" {option} {tmp_path / name}"
    arguments = ("run", *options.split())
    result = mktme(*arguments)
    assert result.code == ExitCode.OK
    assert asked.config == VmConfig(
        image=IMAGE,
        memory_bytes=1 << 30,
        vcpus=3,
        track=Track.PAGES,
        algorithm=Algorithm.AES_XTS_256,
        mode=KeyMode.DIRECT,
        key_file=tmp_path / "key",
    )
    assert asked.guests == 2
    assert asked.options == RunOptions(
        "qemu:///system", tmp_path / "dram.img", reference=False, arguments=arguments
    )


def test_no_encrypt_is_a_key_mode(mktme: Mktme, asked: Asked) -> None:
    assert mktme("run", "--no-encrypt").code == ExitCode.OK
    assert asked.config is not None
    assert asked.config.mode is KeyMode.NO_ENCRYPT


def test_demo_has_one_configuration(mktme: Mktme, asked: Asked) -> None:
    assert mktme("demo", "--memory", "256M", "--algorithm", "aes-xts-256").code == ExitCode.OK
    assert asked.config == VmConfig(IMAGE, 256 * MIB, algorithm=Algorithm.AES_XTS_256)


# --- wrong options ----------------------------------------------------------------------------

# What argument parsing refuses is told with the command's usage.
REFUSED_BY_PARSING: dict[str, tuple[str, list[str]]] = {
    "no such command": ("fly", ["No such command 'fly'"]),
    "no such option": ("run --fast", ["No such option", "--fast"]),
    "no vCPU": ("run --vcpus 0", ["--vcpus", "greater than or equal to 1"]),
    "too many vCPUs": ("run --vcpus 256", ["--vcpus", "less than or equal to 255"]),
    "vCPUs in words": ("run --vcpus two", ["--vcpus", "integer"]),
    "no guests": ("run --guests 0", ["--guests"]),
    "no such tracker": ("run --track writes", ["--track", "'writes'", "stores+pages"]),
    "no such data path": ("run --datapath outline", ["--datapath", "'outline'", "shadow"]),
    "no such algorithm": ("run --algorithm rot13", ["--algorithm", "'rot13'", "aes-xts-256"]),
    "option without value": ("run --memory", ["--memory"]),
    "no rounds": ("bench --rounds 0", ["--rounds"]),
}


@pytest.mark.parametrize(
    ("line", "told"), REFUSED_BY_PARSING.values(), ids=REFUSED_BY_PARSING.keys()
)
def test_option_that_makes_no_sense(mktme: Mktme, asked: Asked, line: str, told: list[str]) -> None:
    result = mktme(*line.split())
    assert result.code == ExitCode.USAGE
    for part in told:
        assert part in result.said
    assert "Traceback" not in result.said
    assert asked.config is None


REFUSED_BY_US: dict[str, tuple[str, str, str]] = {
    "no size": ("run --memory 512X", "'512X' is not a size", "write it as 512M or 4G"),
    "negative size": ("demo --memory=-1M", "'-1M' is not a size", "write it as 512M or 4G"),
    "half a page": (
        "run --memory 536870913",
        "536870913 bytes of memory are not whole pages of 4096 bytes",
        "--memory 512M",
    ),
    "pages, but no MiB": (
        "bench --memory 524292K",
        "536875008 bytes of memory are not whole MiB, and libvirt gives no less",
        "--memory 512M",
    ),
    "key without use": (
        "run --no-encrypt --key-file /key",
        "--no-encrypt has no use for --key-file",
        "leave one of them out",
    ),
    "report into nowhere": (
        "run --json /nonexistent/out.json",
        "--json /nonexistent/out.json: no file can be written there",
        "name a file in a directory that exists",
    ),
    "report over a directory": (
        "doctor --json /tmp",
        "--json /tmp: no file can be written there",
        "name a file in a directory that exists",
    ),
}


@pytest.mark.parametrize(
    ("line", "message", "hint"), REFUSED_BY_US.values(), ids=REFUSED_BY_US.keys()
)
def test_value_that_makes_no_sense(
    mktme: Mktme, asked: Asked, line: str, message: str, hint: str
) -> None:
    result = mktme(*line.split())
    assert result == Result(ExitCode.USAGE, "", f"mktme: {message}\n  hint: {hint}\n")
    assert asked.config is None


def test_little_memory_is_refused_before_anything_is_started(mktme: Mktme, asked: Asked) -> None:
    result = mktme("run", "--memory", "1M")
    assert result.code == ExitCode.USAGE
    assert "1 MiB are too little for a guest" in result.err
    assert asked.config is None


def test_without_arguments_there_is_help(mktme: Mktme) -> None:
    result = mktme()
    assert result.code == ExitCode.USAGE
    for command in ("run", "demo", "doctor", "bench", "platform"):
        assert re.search(rf"\b{command}\b", result.said)


def test_help_tells_the_exit_codes(mktme: Mktme) -> None:
    result = mktme("--help")
    assert result.code == ExitCode.OK
    for part in ("0 all well", "1 a proof failed", "2 usage", "3 this machine", "4 the run itself"):
        assert part in result.said


# --- what goes wrong later --------------------------------------------------------------------


def of_engine(error: str) -> EngineRefusedError:
    return EngineRefusedError(wire.Failure(error=error, message="it said no", hint="ask again"))


ERRORS: list[tuple[MktmeError, ExitCode]] = [
    (UsageError("x"), ExitCode.USAGE),
    (UnknownGuestError("x", ("tiny",)), ExitCode.USAGE),
    (PlatformConfigError("policy", "x", hint="y"), ExitCode.USAGE),
    (of_engine("KeyMaterialError"), ExitCode.USAGE),
    (EnvironmentUnfitError("x"), ExitCode.ENVIRONMENT),
    (WriteTrackingError("x"), ExitCode.ENVIRONMENT),
    (ImageError("x"), ExitCode.ENVIRONMENT),
    (FirmwareError("x", hint="y"), ExitCode.ENVIRONMENT),
    (of_engine("DramError"), ExitCode.ENVIRONMENT),
    (of_engine("DramFullError"), ExitCode.ENVIRONMENT),
    (of_engine("InternalError"), ExitCode.RUN_FAILED),
    (EngineGoneError("x"), ExitCode.RUN_FAILED),
    (VmError("x"), ExitCode.RUN_FAILED),
    (VmLostError("x"), ExitCode.RUN_FAILED),
    (LinkError("x"), ExitCode.RUN_FAILED),
    (MktmeError("x"), ExitCode.RUN_FAILED),
]


@pytest.mark.parametrize(
    ("error", "code"), ERRORS, ids=[f"{type(error).__name__}-{code.name}" for error, code in ERRORS]
)
def test_error_is_one_line_and_an_exit_code(
    mktme: Mktme, asked: Asked, error: MktmeError, code: ExitCode
) -> None:
    asked.answer = raising(error)
    result = mktme("run")
    assert result.code == code
    lines = [line for line in result.err.splitlines() if line.strip()]
    hint = [] if error.hint is None else [f"  hint: {error.hint}"]
    assert lines == [f"mktme: {error}", *hint]
    assert result.out == ""


def test_error_is_shown_as_it_is(mktme: Mktme, asked: Asked) -> None:
    """Whatever it holds: no markup is taken out, no line is broken."""
    text = "[bold]/tmp/[red]x[/] " + "long " * 40 + "[/end]"
    asked.answer = raising(VmError(text, hint=text))
    result = mktme("run")
    assert result.err.splitlines() == [f"mktme: {text}", f"  hint: {text}"]


def test_interruption_is_told(mktme: Mktme, asked: Asked) -> None:
    asked.answer = raising(KeyboardInterrupt())
    result = mktme("run")
    assert result.code == ExitCode.INTERRUPTED
    assert result.err.splitlines()[-1] == "mktme: interrupted; everything was taken down"
    assert "Traceback" not in result.err


def test_guest_with_a_name_like_markup(mktme: Mktme) -> None:
    result = mktme("run", "--guest", "[/x]")
    assert result.code == ExitCode.USAGE
    assert result.err.splitlines()[0] == "mktme: unknown guest '[/x]'"


# --- reports ----------------------------------------------------------------------------------


def test_report_is_shown_and_written(mktme: Mktme, asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = mktme("run", "--json", path)
    assert result.code == ExitCode.OK
    assert json.loads(path.read_text())["schema"] == "mktme.run"
    for part in ("alice", "plain QEMU", "isolation", "readable", "passed: 1 of 1 checks"):
        assert part in result.said


def test_failed_proof_is_an_exit_code_and_a_report_all_the_same(
    mktme: Mktme, asked: Asked, tmp_path: Path
) -> None:
    check = dataclasses.replace(REPORT.checks[0], passed=False)
    failed = dataclasses.replace(REPORT, passed=False, checks=(check,))
    asked.answer = lambda: failed
    result = mktme("demo", "--json", tmp_path / "out.json")
    assert result.code == ExitCode.PROOF_FAILED
    assert "FAILED: 0 of 1 checks" in result.said
    assert json.loads((tmp_path / "out.json").read_text())["passed"] is False


def test_paths_are_shown_as_they_are(mktme: Mktme, asked: Asked) -> None:
    kept = dataclasses.replace(REPORT, dram="/[red]/dram.img", sidecar="/[red]/dram.img.json")
    asked.answer = lambda: kept
    result = mktme("run")
    assert "DRAM image /[red]/dram.img, described by /[red]/dram.img.json" in result.out


def test_report_that_cannot_be_written(mktme: Mktme, asked: Asked) -> None:
    result = mktme("run", "--json", "/proc/out.json")
    assert result.code == ExitCode.RUN_FAILED
    assert "mktme: /proc/out.json: cannot write the report" in result.err
    assert "Traceback" not in result.err


FINDINGS = [
    Finding("disk", True, "plenty in /tmp"),
    Finding("userfaultfd", False, "no [/x] permission", "sudo setfacl -m u:$USER:rw [x]"),
]


def test_doctor_gives_what_mends_it(
    mktme: Mktme, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: FINDINGS)
    result = mktme("doctor", "--json", tmp_path / "out.json")
    assert result.code == ExitCode.ENVIRONMENT
    for part in ("ok", "unfit", "no [/x] permission", "sudo setfacl"):
        assert part in result.said
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["schema"], report["version"]) == ("mktme.doctor", 1)
    assert [finding["fit"] for finding in report["findings"]] == [True, False]


def test_doctor_of_a_fit_machine(mktme: Mktme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: FINDINGS[:1])
    assert mktme("doctor").code == ExitCode.OK


def test_bench_tells_what_was_reached(
    mktme: Mktme, asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = ConfigurationReport(
        name="plain",
        boot_s=(2.0, 3.0, 2.5),
        workload_s=(4.0, 4.0, 4.0),
        start_s=0.5,
        boot_ratio=1.0,
        guest_s=6.5,
        ratio=1.0,
        again_s=3.75,
        engine_cpu_share=None,
        engine_memory=None,
        traffic=None,
        paging=None,
    )
    report = BenchReport(
        schema="mktme.bench",
        version=1,
        environment=ENVIRONMENT,
        rounds=3,
        memory_bytes=512 * MIB,
        configurations=(plain,),
        xts=XtsReport(512 << 10, 2.4e9, 1.17e10, 0.205),
        engine=EngineReport(256 * MIB, 8.76e8, 1.2e-4, 1.1e-4, 2.3e-4),
        targets=(Target("XTS", 0.205, 0.2, True, True), Target("pages", 1.2, 1.1, False, False)),
    )
    rounds_asked = []

    def bench(
        _config: VmConfig, rounds: int, _narrator: object, only: Sequence[str]
    ) -> BenchReport:
        rounds_asked.append((rounds, tuple(only)))
        return report

    monkeypatch.setattr(cli, "bench", bench)
    result = mktme("bench", "--rounds", "3", "--only", "inline 6%", "--json", tmp_path / "out.json")
    assert result.code == ExitCode.OK  # a target missed is a figure, not a failure
    assert rounds_asked == [(3, ("inline 6%",))]
    for part in (
        "2.50 s",
        "4.00 s",
        "3.75 s",
        "2.40 GB/s",
        "0.205",
        "0.88 GB/s",
        "0.12 ms",
        "met",
        "missed",
    ):
        assert part in result.said
    assert json.loads((tmp_path / "out.json").read_text())["schema"] == "mktme.bench"


def test_bench_of_a_configuration_that_is_none(mktme: Mktme) -> None:
    result = mktme("bench", "--only", "inline 7%")
    assert result.code == ExitCode.USAGE
    assert "no configuration 'inline 7%'" in result.err
    assert "--only plain or pages" in result.err


# --- as a user runs it ------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mktme.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | environment,
    )


def test_unknown_guest_as_a_process() -> None:
    ended = command("run", "--guest", "huge")
    assert ended.returncode == ExitCode.USAGE
    assert ended.stderr.splitlines()[0] == "mktme: unknown guest 'huge'"
    assert re.fullmatch(r"  hint: known guests: .*tiny.*", ended.stderr.splitlines()[1])
    assert len(ended.stderr.splitlines()) == 2
    assert ended.stdout == ""


def test_libvirt_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "libvirt.py").write_text("raise ImportError('no libvirt.so.0')\n")
    ended = command("doctor", PYTHONPATH=str(tmp_path))
    assert ended.returncode == ExitCode.ENVIRONMENT
    assert ended.stderr == (
        "mktme: libvirt cannot be loaded (no libvirt.so.0)\n  hint: make setup\n"
    )
