# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme run --keep`: other processes look at a running platform and change it, until Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from mktme.cli import ExitCode
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.platform_report import KeyIdReport, PlatformReport

from .conftest import Command

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB = 1 << 20
DRAM = 256 * MIB
SHARED, CLEAR = 16 * MIB, 16 * MIB
PLATFORM = """\
dram = "256M"
keyid-bits = 4
save-key-for-standby = true
algorithms = ["aes-xts-256", "aes-xts-128"]
"""
KEPT = (
    *("run", "--keep", "--memory", "192M", "--no-reference"),
    *("--pages", "16M@64M=shared", "--pages", "16M@96M=no-encrypt"),
)


@pytest.fixture
def platform(tmp_path: Path) -> Path:
    file = tmp_path / "platform.toml"
    file.write_text(PLATFORM)
    return file


def keep(command: Command, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A run that proved what it has to, and waits."""
    process = command.start(*KEPT, *arguments, prefix=prefix)
    command.wait_for_step(process, "control socket ")
    return process


def listed(command: Command) -> KeyIdReport:
    status, out, err = command.run("keyid", "list", "--json")
    assert status == ExitCode.OK, err
    return msgspec.json.decode(out, type=KeyIdReport)


def test_platform_that_is_left_running(command: Command, platform: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    process = keep(command, "--platform", str(platform), "--json", str(report))
    found = json.loads(report.read_text())  # there already
    assert found["passed"] is True
    (guest,) = found["guests"]
    assert guest["canary"]["clear_bytes"] == CLEAR

    rows = {row.keyid: row for row in listed(command).keyids}
    assert [row.mode for row in rows.values()] == [
        KeyMode.PLATFORM,
        KeyMode.RANDOM,
        KeyMode.NO_ENCRYPT,
    ]
    (own, clear) = list(rows)[1:]
    assert own == guest["keyid"]
    assert rows[0].size_bytes == DRAM - 192 * MIB + SHARED
    assert rows[own].size_bytes == 192 * MIB - SHARED - CLEAR
    assert rows[clear].size_bytes == CLEAR
    assert [row.vm for row in rows.values()] == [None, "guest1", "guest1"]
    assert listed(command).free == 13

    status, out, err = command.run("keyid", "program", "9")
    assert (status, out) == (ExitCode.OK, "KeyID 9: random aes-xts-256\n"), err
    (row,) = (row for row in listed(command).keyids if row.keyid == 9)
    assert (row.mode, row.algorithm, row.vm) == (KeyMode.RANDOM, Algorithm.AES_XTS_256, None)
    for keyid in (own, clear):
        for verb in ("clear", "program"):
            status, out, err = command.run("keyid", verb, str(keyid))
            assert (status, out) == (ExitCode.USAGE, "")
            assert f"KeyID {keyid} is in use by guest1: its memory would be lost" in err
            assert "hint: " in err
    status, out, err = command.run("keyid", "clear", "9")
    assert (status, out) == (ExitCode.OK, "KeyID 9: cleared, it is as KeyID 0 again\n"), err
    assert {row.keyid: row for row in listed(command).keyids} == rows

    status, out, err = command.run("platform", "show", "--running", "--json")
    assert status == ExitCode.OK, err
    shown = msgspec.json.decode(out, type=PlatformReport)
    assert (shown.dram_bytes, shown.keyids, shown.save_key_for_standby) == (DRAM, 15, True)

    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    status, out, err = command.finish(process)
    assert (status, err) == (ExitCode.OK, "")
    assert "passed: 2 of 2 checks" in out
    command.assert_nothing_left()
    status, out, err = command.run("keyid", "list")
    assert (status, out) == (ExitCode.USAGE, "")
    assert "no platform is running" in err


@pytest.mark.parametrize(
    ("victim", "said"),
    [("qemu-system-x86_64", "guest1: its QEMU ended"), ("mktme.service", "the engine is gone")],
)
def test_what_is_killed_while_it_is_left_running(command: Command, victim: str, said: str) -> None:
    process = keep(command)
    (pid,) = command.processes(victim)
    os.kill(pid, signal.SIGKILL)
    status, out, err = command.finish(process)
    assert (status, err) == (ExitCode.RUN_FAILED, f"mktme: {said}\n")
    assert "passed: 2 of 2 checks" in out  # it was, before
    command.assert_nothing_left()


def test_hangup_of_the_terminal_leaves_nothing(command: Command) -> None:
    # Whoever started the tests may ignore SIGHUP (nohup), and children inherit that.
    process = keep(command, prefix=("env", "--default-signal=HUP"))
    os.killpg(process.pid, signal.SIGHUP)
    command.finish(process)
    command.assert_nothing_left()
