# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme run` and `demo` on a platform, with pages under other KeyIDs, and left running."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
from rich.console import Console

from mktme import cli, cli_narration
from mktme.cli import ExitCode
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof import runs
from mktme.proof.report import RunReport
from mktme.proof.runs import Narrator, RunOptions
from mktme.service.client import EngineGoneError
from mktme.vm import images
from mktme.vm.config import VmConfig
from mktme.vm.console import VmError
from mktme.vm.images import GuestImage
from mktme.vm.pages import GuestPages, PageUse
from mktme.vm.platform import Platform

from .command import Mktme, Result, runner
from .proof.test_report import GUEST, REPORT
from .service.test_wire import TRAFFIC
from .vm.test_domain_xml import IMAGE

MIB = 1 << 20
SOCKET = Path("/tmp/mktme-x/run-x/control.sock")


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@dataclass
class Asked:
    """What the command asked the library for; no image is built and no guest booted."""

    image: str | None = None
    config: VmConfig | None = None
    options: RunOptions | None = None
    answer: RunReport = REPORT
    left: Callable[[], None] = lambda: None
    """What comes while guests are left running."""

    def ensure(self, guest: str, _progress: object) -> GuestImage:
        self.image = guest
        return IMAGE

    def run(
        self, config: VmConfig, narrator: Narrator, *, options: RunOptions, **_: int
    ) -> RunReport:
        return self.demo(config, narrator, options)

    def demo(self, config: VmConfig, narrator: Narrator, options: RunOptions) -> RunReport:
        self.config, self.options = config, options
        with narrator.step("working"):
            pass
        if options.keep is not None:
            platform = SimpleNamespace(
                control_socket=SOCKET,
                logins=lambda: ["ssh -p 2222 mktme@127.0.0.1"],
                wait_for_trouble=lambda: self.left(),
            )
            options.keep(self.answer, cast("Platform", platform))
        return self.answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(runs, "run", asked.run)
    monkeypatch.setattr(runs, "demo", asked.demo)
    monkeypatch.setattr(images, "ensure", asked.ensure)
    return asked


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "platform.toml"
        file.write_text(text)
        return file

    return write


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "demo"])
def test_platform_arrives(
    mktme: Mktme, asked: Asked, toml: Callable[[str], Path], command: str
) -> None:
    file = toml('dram = "2G"\nkeyid-bits = 2\nsave-key-for-standby = true\n')
    assert mktme(command, "--platform", file).code == ExitCode.OK
    assert asked.options is not None
    assert asked.options.platform == PlatformConfig(
        dram=2 << 30, keyid_bits=2, save_key_for_standby=True
    )


def test_visible_platform_arrives(mktme: Mktme, asked: Asked, toml: Callable[[str], Path]) -> None:
    assert mktme("run").code == ExitCode.OK
    assert asked.config is not None
    assert asked.options is not None
    assert (asked.config.visible, asked.options.platform) == (False, None)
    assert mktme("run", "--platform-visible").code == ExitCode.OK
    assert asked.config.visible
    assert asked.options.platform == PlatformConfig(physical_address_bits=40)
    file = toml("keyid-bits = 2\nphysical-address-bits = 40\n")
    assert mktme("run", "--platform-visible", "--platform", file).code == ExitCode.OK
    assert asked.options.platform == PlatformConfig(physical_address_bits=40, keyid_bits=2)


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("keyid-bits = 2", "the platform has 46 physical address bits", "physical-address-bits"),
        (
            "keyid-bits = 9\nphysical-address-bits = 40",
            "9 KeyID bits of 40 leave the guest 40 - 9 for addresses",
            "keyid-bits = 8 or fewer",
        ),
    ],
)
def test_platform_that_no_guest_can_see(
    mktme: Mktme,
    asked: Asked,
    toml: Callable[[str], Path],
    text: str,
    complaint: str,
    hint: str,
) -> None:
    result = mktme("run", "--platform-visible", "--platform", toml(text))
    assert result.code == ExitCode.USAGE
    assert complaint in " ".join(result.err.split())
    assert hint in result.err
    assert asked.options is None


def test_emulator_arrives(mktme: Mktme, asked: Asked, tmp_path: Path) -> None:
    emulator = tmp_path / "qemu"
    emulator.touch(0o755)
    assert mktme("run", "--emulator", emulator).code == ExitCode.OK
    assert asked.options is not None
    assert asked.options.emulator == emulator
    assert mktme("run").code == ExitCode.OK
    assert asked.options.emulator is None


def test_emulator_that_cannot_be(
    mktme: Mktme, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = mktme("run", "--emulator", tmp_path / "qemu")
    assert answer.code == ExitCode.USAGE
    assert f"emulator {tmp_path}/qemu is no file" in answer.err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answer = mktme("run", "--emulator", "qemu11")
    assert answer.code == ExitCode.ENVIRONMENT
    assert "hint: make qemu11" in answer.err
    assert asked.image is None  # known before an image is built


@pytest.mark.parametrize("command", ["run", "demo"])
def test_without_a_file_the_platform_is_the_default(
    mktme: Mktme, asked: Asked, command: str
) -> None:
    assert mktme(command).code == ExitCode.OK
    assert asked.options is not None
    assert asked.options.platform is None
    assert asked.options.keep is None


def test_ranges_of_pages_arrive_in_their_order(mktme: Mktme, asked: Asked) -> None:
    result = mktme("run", "--pages", "64M@0=shared", "--pages", "16M@16M=private")
    assert result.code == ExitCode.OK
    assert asked.config is not None
    assert asked.config.pages == (
        GuestPages(0, 64 * MIB, PageUse.SHARED),
        GuestPages(16 * MIB, 16 * MIB, PageUse.PRIVATE),
    )


# --- wrong options, before an image is built --------------------------------------------------

USES = "private, shared, no-encrypt, other-key"
FORM = f"write it as SIZE@ADDRESS=USE, such as 16M@64M=shared; uses: {USES}"
WINDOWS = "--window 4M to 512M, in whole pages, or a share such as 25%"
REFUSED: dict[str, tuple[str, str, str, str | None]] = {
    "no range": ("", "run --pages 16M", "'16M' is no range of pages", FORM),
    "no use": ("", "run --pages 4K@0=mine", "'4K@0=mine' is no range of pages", FORM),
    "second range wrong": (
        "",
        "run --pages 4K@0=shared --pages 4K@4X=shared",
        "'4K@4X=shared' is no range of pages: '4X' is not a size",
        FORM,
    ),
    "range past the RAM": (
        "",
        "run --memory 192M --pages 16M@184M=shared",
        "16M@184M=shared: not all RAM",
        "RAM is 0 to 192M",
    ),
    "range in the PCI hole": (
        "",
        "run --memory 3G --pages 16M@2G=no-encrypt",
        "16M@2G=no-encrypt: not all RAM",
        "RAM is 0 to 2G and 4G to 5G",
    ),
    "parts of a page": (
        "",
        "run --pages 6K@0=shared",
        "6K@0=shared: KeyIDs are for whole pages of 4096 bytes",
        "give multiples of 4K",
    ),
    "too little memory": (
        "",
        "run --memory 64M --pages 16M@0=shared",
        "64 MiB are too little for a guest",
        "--memory 192M or more",
    ),
    "window without a data path that has one": (
        "",
        "run --window 64M",
        "the shadow data path has no window",
        "--datapath inline",
    ),
    "share without a data path that has a window": (
        "",
        "run --window 25%",
        "the shadow data path has no window",
        "--datapath inline",
    ),
    "window of nothing": (
        "",
        "run --datapath inline --window 0",
        "a window of 0 bytes is too small for a guest to run in",
        WINDOWS,
    ),
    "window that is too small": (
        "",
        "run --datapath inline --window 4092K",
        "a window of 4190208 bytes is too small for a guest to run in",
        WINDOWS,
    ),
    "share that is too small": (
        "",
        "run --datapath inline --memory 192M --window 1%",
        "a window of 2011136 bytes is too small for a guest to run in",
        WINDOWS.replace("512M", "192M"),
    ),
    "window that is larger than memory": (
        "",
        "run --datapath inline --window 513M",
        "a window of 537919488 bytes is larger than the guest's 512M of memory",
        WINDOWS,
    ),
    "window with a part of a page": (
        "",
        "run --datapath inline --window 5000001",
        "a window of 5000001 bytes is not whole pages of 4096 bytes",
        WINDOWS,
    ),
    "window that is no size": (
        "",
        "run --datapath inline --window small",
        "'small' is not a size",
        "write it as 128M or 25%",
    ),
    **{
        f"share of {share}": (
            "",
            f"run --datapath inline --window {share}",
            f"'{share}' is no share of the guest's memory",
            "1% to 100%",
        )
        for share in ("0%", "200%", "101%", "12.5%", "-5%", "x%", "%", "%%", "\u0665%")
    },
    "both trackers with a window": (
        "",
        "run --datapath inline --track stores+pages",
        "the inline data path needs no page tracker",
        "--track stores, or leave it out",
    ),
    "tracker without use": (
        "",
        "run --datapath inline --track pages",
        "the inline data path needs no page tracker",
        "--track stores, or leave it out",
    ),
    "platform that is wrong": (
        "policy = 1",
        "run --platform FILE",
        "FILE:1: policy: 1 is not allowed",
        "allowed: ALGORITHMS",
    ),
    "no KeyIDs": (
        "keyid-bits = 0",
        "demo --platform FILE",
        "the platform has no KeyIDs for guests",
        "tme = true and keyid-bits = 6 in platform.toml",
    ),
    "too few KeyIDs for the guests": (
        "keyid-bits = 1",
        "run --guests 2 --platform FILE",
        "the platform's 1 KeyIDs are too few: the run takes 2",
        "keyid-bits = 2 or more in platform.toml",
    ),
    "too few KeyIDs for the pages": (
        "keyid-bits = 1",
        "run --pages 4K@0=other-key --platform FILE",
        "the platform's 1 KeyIDs are too few: the run takes 2",
        "keyid-bits = 2 or more in platform.toml",
    ),
    "too few KeyIDs for the control": (
        "keyid-bits = 1",
        "demo --platform FILE",
        "the platform's 1 KeyIDs are too few: the run takes 3",
        "keyid-bits = 2 or more in platform.toml",
    ),
    "algorithm not allowed": (
        'algorithms = ["aes-xts-256"]',
        "run --platform FILE",
        "the platform's algorithms do not include aes-xts-128",
        "--algorithm aes-xts-256",
    ),
    "algorithm not allowed, in a demo": (
        'algorithms = ["aes-xts-128"]',
        "demo --algorithm aes-xts-256 --platform FILE",
        "the platform's algorithms do not include aes-xts-256",
        "--algorithm aes-xts-128",
    ),
    "too little DRAM": (
        'dram = "1G"',
        "run --guests 3 --platform FILE",
        "the platform has 1024 MiB of DRAM and the guests take 1536 MiB",
        'dram = "1536M" in platform.toml, or less --memory',
    ),
    "too little DRAM for a demo": (
        'dram = "512M"',
        "demo --memory 384M --platform FILE",
        "the platform has 512 MiB of DRAM and the guests take 768 MiB",
        'dram = "768M" in platform.toml, or less --memory',
    ),
    "addresses too short": (
        "physical-address-bits = 32",
        "run --platform FILE",
        "the platform's addresses reach 64 MiB and the guests take 512 MiB",
        "more physical-address-bits in platform.toml, or fewer keyid-bits",
    ),
    "key without use": (
        "",
        "run --no-encrypt --key-file FILE",
        "--no-encrypt has no use for --key-file",
        "leave one of them out",
    ),
    "report into nowhere": (
        "",
        "demo --json /nonexistent/out.json",
        "--json /nonexistent/out.json: no file can be written there",
        "name a file in a directory that exists",
    ),
}


@pytest.mark.parametrize(("text", "line", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_value_that_makes_no_sense_is_refused_before_anything_is_built(
    mktme: Mktme,
    asked: Asked,
    toml: Callable[[str], Path],
    text: str,
    line: str,
    message: str,
    hint: str | None,
) -> None:
    file = str(toml(text))
    result = mktme(*line.replace("FILE", file).split())
    names = ", ".join(one.value for one in Algorithm)
    told = f"mktme: {message}\n  hint: {hint}\n"
    told = told.replace("FILE", file).replace("ALGORITHMS", names)
    assert result == Result(ExitCode.USAGE, "", told)
    assert (asked.image, asked.config) == (None, None)


def test_platform_that_is_not_there(mktme: Mktme, asked: Asked, tmp_path: Path) -> None:
    for command in ("run", "demo"):
        result = mktme(command, "--platform", tmp_path / "none.toml")
        assert result.code == ExitCode.USAGE
        assert "none.toml: cannot be read: No such file or directory" in result.err
    assert (asked.image, asked.config) == (None, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('dram = "192M"\nkeyid-bits = 2', "run --memory 192M --pages 4K@0=other-key"),
        ('dram = "1G"\nkeyid-bits = 2', "demo --memory 512M"),
        ('algorithms = ["aes-xts-256"]', "run --algorithm aes-xts-256"),
    ],
)
def test_what_just_fits_is_run(
    mktme: Mktme, asked: Asked, toml: Callable[[str], Path], text: str, line: str
) -> None:
    """The control: these come to an image and a run."""
    assert mktme(*line.split(), "--platform", toml(text)).code == ExitCode.OK
    assert asked.image == "tiny"
    assert asked.config is not None


# --- left running -----------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], None]:
    def left() -> None:
        raise error

    return left


def test_report_is_shown_before_the_wait_and_ctrl_c_ends_well(
    mktme: Mktme, asked: Asked, tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    written = []

    def left() -> None:
        written.append(json.loads(path.read_text())["schema"])
        raise KeyboardInterrupt

    asked.left = left
    result = mktme("run", "--keep", "--json", path)
    assert result.code == ExitCode.OK
    assert written == ["mktme.run"]
    assert result.said.count("passed: 1 of 1 checks") == 1
    assert result.err.splitlines()[-3:] == [
        "running until Ctrl-C; meanwhile, in another terminal: mktme keyid list",
        f"control socket {SOCKET}",
        "log in, if --ssh-key was yours: ssh -p 2222 mktme@127.0.0.1",
    ]


def test_failed_proof_is_told_at_the_end_too(mktme: Mktme, asked: Asked) -> None:
    asked.answer = dataclasses.replace(REPORT, passed=False)
    asked.left = raising(KeyboardInterrupt())
    assert mktme("run", "--keep").code == ExitCode.PROOF_FAILED


@pytest.mark.parametrize(
    "error", [VmError("guest1: its QEMU ended"), EngineGoneError("the engine is gone")]
)
def test_what_ends_by_itself_is_a_failure(
    mktme: Mktme, asked: Asked, tmp_path: Path, error: MktmeError
) -> None:
    asked.left = raising(error)
    result = mktme("run", "--keep", "--json", tmp_path / "out.json")
    assert result.code == ExitCode.RUN_FAILED
    assert result.err.splitlines()[-1] == f"mktme: {error}"
    assert json.loads((tmp_path / "out.json").read_text())["passed"] is True


def test_nothing_is_left_running_unasked(mktme: Mktme, asked: Asked) -> None:
    asked.left = raising(AssertionError("it waits"))
    result = mktme("run")
    assert result.code == ExitCode.OK
    assert "control socket" not in result.said


def test_progress_is_not_drawn_over_the_report(
    mktme: Mktme, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, where bars are drawn again and again until they are closed."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    for module in (cli, cli_narration):
        monkeypatch.setattr(module, "err", terminal)
    monkeypatch.setattr(cli, "out", Console(file=screen, force_terminal=False, width=80))
    asked.left = raising(KeyboardInterrupt())
    assert mktme("run", "--keep").code == ExitCode.OK
    bars, _, report = screen.getvalue().partition("Guests, ")
    assert "working" in bars  # control: they were drawn
    assert "working" not in report
    assert "control socket" in report


def test_guests_of_a_demo_fit_80_columns() -> None:
    traffic = msgspec.structs.replace(TRAFFIC, lines_stored=4_399_699, lines_other=2_273_598)
    names = ("alice", "stores-only", "no-encrypt")
    modes = (KeyMode.RANDOM, KeyMode.DIRECT, KeyMode.NO_ENCRYPT)
    guests = tuple(
        dataclasses.replace(
            GUEST, name=name, key_mode=mode, traffic=traffic, boot_s=14.8, workload_s=11.1
        )
        for name, mode in zip(names, modes, strict=True)
    )
    words = {*names, *(mode.value for mode in modes), "stores+pages", "4,399,699", "2,273,598"}

    def shown(columns: int) -> set[str]:
        screen = io.StringIO()
        Console(file=screen, width=columns).print(cli._guest_table(guests))
        return set(screen.getvalue().split())

    assert words <= shown(80)
    assert not words <= shown(60)  # control
