# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme platform`: a platform in tables or JSON, and its platform.toml checked."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from mktme.cli import ExitCode
from mktme.engine import rng
from mktme.engine.firmware import PlatformConfig
from mktme.proof.platform_report import PlatformCheck, PlatformReport, describe
from mktme.service.platform_file import read_platform

from .command import Mktme, Result, runner
from .running_platforms import DRAM_BYTES, Platforms, make_platforms

BYPASSED = """\
dram = "2G"
physical-address-bits = 40
policy = "aes-xts-256"
bypass = true
save-key-for-standby = true
exclusion = { base = "16M", size = "512K" }
keyid-bits = 4
algorithms = ["aes-xts-256"]
revision = "spec-1.4"
"""


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "platform.toml"
    path.write_text(BYPASSED)
    return path


# --- validate ---------------------------------------------------------------------------------


def test_valid_file(mktme: Mktme, file: Path) -> None:
    assert mktme("platform", "validate", file) == Result(ExitCode.OK, f"{file}: valid\n", "")


def test_valid_file_with_a_name_like_markup(mktme: Mktme, tmp_path: Path) -> None:
    file = tmp_path / f"[red]{'x' * 90}"
    file.write_text("")
    assert mktme("platform", "validate", file).out == f"{file}: valid\n"


@pytest.mark.parametrize("command", ["validate", "show"])
def test_file_that_is_wrong(mktme: Mktme, file: Path, command: str) -> None:
    file.write_text('tme = true\npolicy = "rot13"\n')
    told = f"mktme: {file}:2: policy: 'rot13' is not allowed\n"
    hint = "  hint: allowed: aes-xts-128, aes-xts-256, aes-xts-128-integrity\n"
    assert mktme("platform", command, file) == Result(ExitCode.USAGE, "", told + hint)


def test_verdict_as_json(mktme: Mktme, file: Path) -> None:
    def verdict(code: ExitCode) -> PlatformCheck:
        result = mktme("platform", "validate", file, "--json")
        assert result.code == code
        return msgspec.json.decode(result.out, type=PlatformCheck)

    kind: Final = "mktme.platform-check"
    assert verdict(ExitCode.OK) == PlatformCheck(kind, 1, str(file), valid=True)
    file.write_text("keyid-bits = 16\n")
    assert verdict(ExitCode.USAGE) == PlatformCheck(
        kind,
        1,
        str(file),
        valid=False,
        key="keyid-bits",
        message=f"{file}:1: keyid-bits: 16 is out of range",
        hint="allowed: 0 to 15",
    )


@pytest.mark.parametrize("command", ["validate", "show"])
def test_file_that_is_not_there(mktme: Mktme, tmp_path: Path, command: str) -> None:
    result = mktme("platform", command, tmp_path / "platform.toml")
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert "platform.toml: cannot be read: No such file or directory" in result.err


def test_validate_needs_a_file(mktme: Mktme) -> None:
    result = mktme("platform", "validate")
    assert result.code == ExitCode.USAGE
    assert "Missing argument 'FILE'" in result.said


def test_without_arguments_there_is_help(mktme: Mktme) -> None:
    result = mktme("platform")
    assert result.code == ExitCode.USAGE
    for command in ("show", "validate"):
        assert re.search(rf"\b{command}\b", result.said)


# --- show -------------------------------------------------------------------------------------


def test_defaults_are_shown(mktme: Mktme) -> None:
    result = mktme("platform", "show")
    assert (result.code, result.err) == (ExitCode.OK, "")
    for part in (
        "Platform, by default",
        "memory encryption on ",
        "TME key aes-xts-128, lost in standby",
        "KeyIDs for software 63, each with aes-xts-128 or aes-xts-128-integrity or aes-xts-256",
        "physical address 46 bits: 6 of KeyID, 40 of address (1 TiB)",
        "exclusion range none",
        "DRAM as much as the VMs take",
        "revision sdm",
        "982H IA32_TME_ACTIVATE 0 lock: locked until reset",
        "0x0007000600000003 1 TME: enabled",
    ):
        assert part in result.said


def test_file_is_shown(mktme: Mktme, file: Path) -> None:
    result = mktme("platform", "show", file)
    assert result.code == ExitCode.OK
    for part in (
        "memory encryption bypassed: memory of KeyID 0 is plaintext",
        "TME key aes-xts-256, kept for standby",
        "KeyIDs for software 15, each with aes-xts-256",
        "physical address 40 bits: 4 of KeyID, 36 of address (64 GiB)",
        "exclusion range 0x1000000 to 0x107ffff (512 KiB)",
        "DRAM 2 GiB",
        "revision spec-1.4",
        "983H IA32_TME_EXCLUDE_MASK 11 exclusion: enabled",
        "0x000000fffff80800 39:12 mask: 0xfffff80000",
    ):
        assert part in result.said


def test_platform_without_encryption_is_shown(mktme: Mktme, file: Path) -> None:
    file.write_text("tme = false\nkeyid-bits = 0\n")
    result = mktme("platform", "show", file)
    assert result.code == ExitCode.OK
    for part in ("memory encryption off", "TME key none", "KeyIDs for software none"):
        assert part in result.said


def test_name_is_shown_as_it_is(
    mktme: Mktme, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[red]x.toml").write_text("")
    assert "Platform [red]x.toml" in mktme("platform", "show", "[red]x.toml").out


def test_json_is_the_document(mktme: Mktme, file: Path) -> None:
    result = mktme("platform", "show", file, "--json")
    assert (result.code, result.err) == (ExitCode.OK, "")
    report = msgspec.json.decode(result.out, type=PlatformReport)
    assert report == describe(read_platform(file), str(file))
    assert (report.schema, report.version) == ("mktme.platform", 1)


def test_json_of_the_defaults_names_no_file(mktme: Mktme) -> None:
    report = msgspec.json.decode(mktme("platform", "show", "--json").out, type=PlatformReport)
    assert report == describe(PlatformConfig())
    assert report.file is None


def test_machine_that_makes_no_key(mktme: Mktme, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_into(_self: object, _buffer: memoryview) -> None:
        raise OSError(errno.EAGAIN, "too early")

    monkeypatch.setattr(rng.KernelEntropy, "read_into", read_into)
    result = mktme("platform", "show")
    assert (result.code, result.out) == (ExitCode.ENVIRONMENT, "")
    assert "mktme: TME could not be enabled" in result.err


# --- show --running ---------------------------------------------------------------------------


@pytest.fixture
def platforms(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platforms]:
    with make_platforms(monkeypatch, tmp_path_factory) as platforms:
        yield platforms


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_running_platform_is_shown(
    mktme: Mktme, platforms: Platforms, file: Path, shared: bool, named: bool
) -> None:
    """Observers may."""
    one = platforms.start(read_platform(file), shared_ownership=shared)
    result = mktme(
        "platform", "show", *(("--engine", one.control_socket) if named else ("--running",))
    )
    assert (result.code, result.err) == (ExitCode.OK, "")
    for part in (
        "Platform, as it runs",
        "memory encryption bypassed: memory of KeyID 0 is plaintext",
        "TME key aes-xts-256, kept for standby",
        "KeyIDs for software 15, each with aes-xts-256",
        "exclusion range 0x1000000 to 0x107ffff (512 KiB)",
        "DRAM 64 MiB",  # and not the 2G of the file: its owner gave it no more
        "revision spec-1.4",
        "982H IA32_TME_ACTIVATE 0 lock: locked until reset",
    ):
        assert part in result.said


def test_running_platform_as_json(mktme: Mktme, platforms: Platforms, file: Path) -> None:
    """It is what firmware makes of its file, but for the file, which it does not know."""
    config = read_platform(file)
    platforms.start(config)
    result = mktme("platform", "show", "--running", "--json")
    assert (result.code, result.err) == (ExitCode.OK, "")
    report = msgspec.json.decode(result.out, type=PlatformReport)
    assert report == describe(msgspec.structs.replace(config, dram=DRAM_BYTES))


def test_registers_are_read_and_not_made_up(mktme: Mktme, platforms: Platforms) -> None:
    one = platforms.start()
    before = mktme("platform", "show", "--running").said
    assert "87H IA32_MKTME_KEYID_PARTITIONING 31:0 KeyIDs of MKTME: 63" in before
    assert one.client.rdmsr(0x982) == 0x0007_0006_0000_0003
    assert "0x0007000600000003" in before


@pytest.mark.parametrize("option", ["--running", "--engine=/nonexistent"])
def test_file_and_running_platform_do_not_go_together(
    mktme: Mktme, platforms: Platforms, file: Path, option: str
) -> None:
    told = "mktme: a platform.toml says nothing of a platform that is running\n"
    hint = "  hint: leave out either FILE or --running and --engine\n"
    assert mktme("platform", "show", file, option) == Result(ExitCode.USAGE, "", told + hint)


# --- as a user runs it ------------------------------------------------------------------------


def command(columns: int, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "mktme.cli", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"COLUMNS": str(columns)},
    )
    return ended.stdout


def whole(text: str, parts: list[str]) -> list[str]:
    """Those of `parts` that no line break divides."""
    return [part for part in parts if any(part in line for line in text.splitlines())]


def test_tables_fit_80_columns(file: Path) -> None:
    """Nothing is broken but the list of all algorithms."""
    report = describe(read_platform(file))
    parts = [f"{one.name} " for one in report.registers]
    parts += [one.value for one in report.registers]
    fields = [field for one in report.registers for field in one.fields]
    parts += [f"{field.bits} " for field in fields]
    parts += [f"{field.name}: {field.meaning}" for field in fields if ", " not in field.meaning]
    parts += ["physical address", "(64 GiB)", "0x1000000 to 0x107ffff (512 KiB)"]
    shown = command(80, "platform", "show", str(file))
    assert max(map(len, shown.splitlines())) <= 80
    assert whole(shown, parts) == parts
    assert whole(command(60, "platform", "show", str(file)), parts) != parts  # control


def test_json_is_for_programs_whatever_the_terminal(file: Path) -> None:
    assert command(20, "platform", "show", "--json") == command(200, "platform", "show", "--json")
