# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme tamper`: what it asks for, what it shows, and how it exits. No guest is booted."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from mktme import cli_tamper
from mktme.cli import ExitCode
from mktme.datapath.kinds import DataPath
from mktme.engine.integrity import Violation
from mktme.engine.xts import Algorithm
from mktme.proof import tamper as suite
from mktme.proof.attacks import ATTACKS
from mktme.proof.damage import Outcome
from mktme.proof.runs import Narrator
from mktme.proof.tamper import AttackReport, Finding, TamperReport
from mktme.proof.victim import MachineCheck
from mktme.vm import images
from mktme.vm.config import VmConfig
from mktme.vm.images import GuestImage

from .command import Mktme, Result, runner
from .proof.test_report import ENVIRONMENT
from .vm.test_domain_xml import IMAGE

MIB = 1 << 20
CHECK = MachineCheck(
    guest="alice",
    address=0x8140,
    keyid=1,
    lines=1,
    kind=Violation.MISMATCH,
    guest_physical=0x8140,
    reported=0x8000,
    console="Kernel panic - not syncing: Fatal machine check",
)


def finding(expected: Outcome) -> Finding:
    checks = (CHECK,) if expected is Outcome.MACHINE_CHECK else ()
    return Finding(expected, expected, True, "", checks)


REPORT = TamperReport(
    schema="mktme.tamper",
    version=1,
    started="2026-01-01T00:00:00+00:00",
    duration_s=128.6,
    passed=True,
    environment=ENVIRONMENT,
    memory_bytes=192 * MIB,
    window_bytes=32 * MIB,
    without=Algorithm.AES_XTS_128,
    with_integrity=Algorithm.AES_XTS_128_INTEGRITY,
    attacks=tuple(
        AttackReport(
            name=attack.name,
            action=attack.action,
            remark=attack.remark,
            control=attack.control,
            without=finding(attack.without),
            with_integrity=finding(attack.with_integrity),
            passed=True,
        )
        for attack in ATTACKS
    ),
    notices=(),
)


def failed() -> TamperReport:
    """A bit that was flipped, and nobody noticed."""
    found = Finding(Outcome.MACHINE_CHECK, Outcome.ONE_BLOCK, False, "", ())
    odd = Finding(Outcome.INTACT, Outcome.OTHER, False, "3 of 4 blocks are noise", ())
    rows = tuple(
        dataclasses.replace(row, with_integrity=found, passed=False)
        if row.name == "flip a bit"
        else dataclasses.replace(row, without=odd, passed=False)
        if row.control
        else row
        for row in REPORT.attacks
    )
    return dataclasses.replace(REPORT, attacks=rows, passed=False)


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@dataclass
class Asked:
    """What the command asked the library for."""

    image: str | None = None
    config: VmConfig | None = None
    connect: str | None = None
    answer: TamperReport = REPORT

    def ensure(self, guest: str, _progress: object) -> GuestImage:
        self.image = guest
        return IMAGE

    def tamper(self, config: VmConfig, narrator: Narrator, *, connect: str | None) -> TamperReport:
        self.config, self.connect = config, connect
        with narrator.step("with integrity: flip a bit"):
            narrator.notice("alice: machine check")
        return self.answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(suite, "tamper", asked.tamper)
    monkeypatch.setattr(images, "ensure", asked.ensure)
    return asked


def test_default_guests(mktme: Mktme, asked: Asked) -> None:
    result = mktme("tamper")
    assert result.code == ExitCode.OK
    assert asked.image == "tiny"
    assert asked.connect is None
    assert asked.config is not None
    assert (asked.config.datapath, asked.config.track) == (DataPath.INLINE, None)
    assert (asked.config.memory_bytes, asked.config.window_bytes) == (192 * MIB, 32 * MIB)
    assert "with integrity: flip a bit ..." in result.err
    assert "note: alice: machine check" in result.err


def test_options_arrive(mktme: Mktme, asked: Asked) -> None:
    mktme("tamper", "--memory", "512M", "--window", "25%", "--connect", "qemu:///system")
    assert asked.connect == "qemu:///system"
    assert asked.config is not None
    assert (asked.config.memory_bytes, asked.config.window_bytes) == (512 * MIB, 128 * MIB)


def test_document_is_the_report(mktme: Mktme, asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert mktme("tamper", "--json", path).code == ExitCode.OK
    assert msgspec.json.decode(path.read_bytes(), type=TamperReport) == REPORT
    plain = json.loads(path.read_text())
    assert (plain["schema"], plain["version"], plain["passed"]) == ("mktme.tamper", 1, True)
    assert plain["environment"]["qemu"] == "10.0.2"
    rows = {row["name"]: row for row in plain["attacks"]}
    assert rows["move a line"]["without"]["found"] == "garbage"
    assert rows["move a line"]["with_integrity"]["machine_checks"][0]["address"] == 0x8140


def test_all_as_expected(mktme: Mktme, asked: Asked) -> None:
    result = mktme("tamper")
    assert f"passed: {len(ATTACKS)} of {len(ATTACKS)} attacks as expected in 128.6 s" in result.said
    assert "FAIL" not in result.said
    assert "[1] neither has freshness" in result.said
    assert "[3] a line of zeros is one that was never written here" in result.said


def test_one_that_is_not_as_expected(mktme: Mktme, asked: Asked, tmp_path: Path) -> None:
    asked.answer = failed()
    path = tmp_path / "out.json"
    result = mktme("tamper", "--json", path)
    assert result.code == ExitCode.PROOF_FAILED
    assert result.said.count("FAIL ") == 2
    assert "flip a bit, with integrity: one block" in result.said
    assert "none, without integrity: 3 of 4 blocks are noise" in result.said
    count = len(ATTACKS)
    assert f"FAILED: {count - 2} of {count} attacks as expected" in result.said
    assert json.loads(path.read_text())["passed"] is False


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_table_is_readable(columns: int) -> None:
    screen = io.StringIO()
    Console(file=screen, width=columns).print(cli_tamper._table(REPORT))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    words = set(screen.getvalue().split())
    assert {"integrity:", "expected", "found", "garbage", "refused", "KeyID", "pages"} <= words
    (row,) = (line for line in lines if "flip a bit" in line)
    assert row.split() == ["pass", "flip", "a", "bit", "one", "block", "one", "block", "#MC", "#MC"]


REFUSED = {
    "window too large": (
        "--window 64M",
        "a window of 64 MiB is too large to push a page out of it",
        "--window 48M or less, or more --memory",
    ),
    "window that is none": (
        "--window 0%",
        "'0%' is no share of the guest's memory",
        "1% to 100%",
    ),
    "too little memory": (
        "--memory 64M",
        "64 MiB are too little for a guest",
        "--memory 192M or more",
    ),
    "report into nowhere": (
        "--json /nonexistent/out.json",
        "--json /nonexistent/out.json: no file can be written there",
        "name a file in a directory that exists",
    ),
}


@pytest.mark.parametrize(("line", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_value_that_makes_no_sense_is_refused_before_anything_is_built(
    mktme: Mktme, asked: Asked, line: str, message: str, hint: str
) -> None:
    result = mktme("tamper", *line.split())
    assert result == Result(ExitCode.USAGE, "", f"mktme: {message}\n  hint: {hint}\n")
    assert (asked.image, asked.config) == (None, None)


def test_window_that_is_too_small(mktme: Mktme, asked: Asked) -> None:
    assert mktme("tamper", "--window", "1M").code == ExitCode.USAGE
    assert asked.image is None
