# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme migrate`: what it asks for, what it shows, and how it exits. No guest is booted."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from mktme import cli_migrate
from mktme.cli import ExitCode
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.xts import Algorithm
from mktme.proof import moving
from mktme.proof.moving import MoveReport, Work, work_of
from mktme.proof.runs import Narrator
from mktme.vm import images
from mktme.vm.arrival import MigrationError
from mktme.vm.config import VmConfig
from mktme.vm.images import GuestImage
from mktme.vm.migration import MigrationReport

from .command import Mktme, Result, runner
from .proof.test_report import ENVIRONMENT
from .remote.test_wire import PROOF, SIDE
from .vm.test_domain_xml import IMAGE

MIB = 1 << 20
URI = "qemu+ssh://root@lab/system?keyfile=/home/me/id"
SUMS = ("compress", "copy", "processes", "sorted", "stream")
WORK = Work(rounds=2, parts=10, names=SUMS, failed=None)


def report_of(work: Work = WORK, readable: tuple[int, int] = (0, 256)) -> MoveReport:
    checks = moving._checks("lab", work, (PROOF, PROOF), readable)
    return MoveReport(
        schema="mktme.migrate",
        version=1,
        started="2026-01-01T00:00:00+00:00",
        duration_s=41.3,
        passed=all(check.passed for check in checks),
        environment=ENVIRONMENT,
        destination=dataclasses.replace(SIDE, uri=URI),
        memory_bytes=256 * MIB,
        vcpus=1,
        datapath=DataPath.SHADOW,
        track=Track.STORES_AND_PAGES,
        algorithm=Algorithm.AES_XTS_128,
        migration=MigrationReport(
            "shadow", "shadow", 256 * MIB, 10.9, 3.4, 0.06, 151 * MIB, 38000, 29000, 3
        ),
        work=work,
        here=PROOF,
        there=PROOF,
        checks=checks,
        notices=(),
    )


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@dataclass
class Asked:
    """What the command asked the library for."""

    config: VmConfig | None = None
    destination: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    answer: MoveReport | MigrationError = field(default_factory=report_of)

    def ensure(self, _guest: str, _progress: object) -> GuestImage:
        return IMAGE

    def migrate(
        self, config: VmConfig, destination: str, narrator: Narrator, **options: Any
    ) -> MoveReport:
        self.config, self.destination, self.options = config, destination, options
        with narrator.step("moving to lab"):
            narrator.notice("lab: tracking by pages alone")
        if isinstance(self.answer, MigrationError):
            raise self.answer
        return self.answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(moving, "migrate", asked.migrate)
    monkeypatch.setattr(images, "ensure", asked.ensure)
    return asked


def test_default_guest(mktme: Mktme, asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = mktme("migrate", URI, "--json", path)
    assert result.code == ExitCode.OK
    assert asked.config == VmConfig(IMAGE)
    assert asked.destination == URI
    assert asked.options["connect"] == "qemu:///system"
    assert asked.options["command"] == "mktme"
    assert "note: lab: tracking by pages alone" in result.err
    assert "Moved 256 MiB, shadow, aes-xts-128, to lab" in result.said
    assert "10.9 s 3.4 s 60 ms 151 MiB 3" in result.said
    assert "passed: 9 of 9 checks in 41.3 s (QEMU 10.0.2, there 10.0.2," in result.said
    assert msgspec.json.decode(path.read_bytes(), type=MoveReport) == asked.answer
    assert json.loads(path.read_text())["migration"]["downtime_s"] == 0.06


def test_options_arrive(mktme: Mktme, asked: Asked) -> None:
    options = "--datapath inline --window 25% --memory 256M --vcpus 2 --algorithm aes-xts-256"
    elsewhere = "--connect qemu:///session --remote-mktme /opt/mktme"
    mktme("migrate", URI, *options.split(), *elsewhere.split())
    assert asked.config == VmConfig(
        IMAGE,
        memory_bytes=256 * MIB,
        vcpus=2,
        datapath=DataPath.INLINE,
        track=None,
        window_bytes=64 * MIB,
        algorithm=Algorithm.AES_XTS_256,
    )
    assert asked.options["connect"] == "qemu:///session"
    assert asked.options["command"] == "/opt/mktme"


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_are_readable(columns: int) -> None:
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_migrate, "out", Console(file=screen, width=columns))
        cli_migrate._print_report(report_of())
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines[:-1])) <= columns
    assert "[" not in screen.getvalue()


def test_key_that_reads_the_other_hosts_memory_fails(mktme: Mktme, asked: Asked) -> None:
    asked.answer = report_of(readable=(1, 256))
    result = mktme("migrate", URI)
    assert result.code == ExitCode.PROOF_FAILED
    assert "FAIL isolation on lab" in result.said
    assert "FAILED: 8 of 9 checks" in result.said


def test_control_that_reads_nothing_fails(mktme: Mktme, asked: Asked) -> None:
    asked.answer = report_of(readable=(0, 255))
    assert mktme("migrate", URI).code == ExitCode.PROOF_FAILED


def test_guest_that_did_not_move(mktme: Mktme, asked: Asked) -> None:
    asked.answer = MigrationError("guest1 did not move: lab is gone", hint="look")
    result = mktme("migrate", URI)
    assert result.code == ExitCode.RUN_FAILED
    assert result.err.endswith("mktme: guest1 did not move: lab is gone\n  hint: look\n")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ("qemu:///system",),
            "qemu:///system is no libvirt of QEMU's on another host",
            "such as qemu+ssh://root@host/system",
        ),
        (
            (URI, "--memory", "64M"),
            "64 MiB are too little for a guest",
            "--memory 192M or more",
        ),
    ],
)
def test_what_makes_no_sense(
    mktme: Mktme, asked: Asked, arguments: tuple[str, ...], message: str, hint: str
) -> None:
    result = mktme("migrate", *arguments)
    assert result == Result(ExitCode.USAGE, "", f"mktme: {message}\n  hint: {hint}\n")
    assert asked.config is None


def round_of(sums: tuple[str, ...] = SUMS) -> str:
    said = "".join(f"@mktme sum {name} {'ab' * 32}\n" for name in sums)
    return f"{said}@mktme workload done\n@mktme round\n"


@pytest.mark.parametrize(
    ("said", "work", "passed"),
    [
        (round_of() * 2, WORK, True),
        ("", Work(0, 0, (), None), False),
        (round_of(SUMS[:2]) + round_of(), Work(2, 7, SUMS, None), False),
        (
            round_of() + "@mktme sum stream ab\n@mktme workload FAILED copy\n",
            Work(1, 6, SUMS, "@mktme workload FAILED copy"),
            False,
        ),
    ],
)
def test_work_that_was_done(said: str, work: Work, passed: bool) -> None:
    assert work_of(said) == work
    assert work.passed is passed
