# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme ca`, `evidence`, `reference` and `verify`, as users and programs meet them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mktme.attest.identity import Identity
from mktme.attest.measure import code_digest
from mktme.attest.reference import Reference
from mktme.cli import ExitCode

from .attest.signing import NONCE, VM, Platform
from .command import Mktme, runner
from .running_platforms import Platforms, make_platforms


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    monkeypatch.setenv("COLUMNS", "80")
    return runner(monkeypatch, capsys)


@pytest.fixture
def platforms(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platforms]:
    with make_platforms(monkeypatch, tmp_path_factory) as platforms:
        yield platforms


@dataclasses.dataclass
class Files:
    """Evidence as of now, and what it takes to verify it."""

    directory: Path
    platform: Platform

    def path(self, name: str) -> Path:
        return self.directory / name

    def verify(self, *more: object, evidence: str = "evidence.cwt", nonce: str = "") -> list[str]:
        """Arguments of `mktme verify`."""
        return [
            *("verify", str(self.path(evidence)), "--trust", str(self.path("root.pem"))),
            *("--policy", str(self.path("policy.toml"))),
            *("--reference", str(self.path("reference.json"))),
            *("--nonce", nonce or NONCE.hex(), *map(str, more)),
        ]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    platform = Platform(identity=Identity.create())
    evidence = platform.evidence(issued_at=int(dt.datetime.now(dt.UTC).timestamp()))
    (tmp_path / "evidence.cwt").write_bytes(platform.sign(evidence))
    (tmp_path / "root.pem").write_bytes(platform.identity.root_pem())
    (tmp_path / "policy.toml").write_text('name = "tenant a"\n')
    (tmp_path / "reference.json").write_bytes(platform.reference().encode())
    return Files(tmp_path, platform)


def test_true_evidence_is_affirmed(mktme: Mktme, files: Files) -> None:
    result = mktme(*files.verify())
    assert result.code == ExitCode.OK, result
    lines = result.out.splitlines()
    assert lines[-1] == "affirmed by tenant a: 21 checks"
    assert max(map(len, lines)) <= 80
    checks = [line.split()[:2] for line in lines if line.split()[:1] == ["pass"]]
    assert len(checks) == 21
    assert ["pass", "launch:kernel"] in checks


def test_what_fails_is_shown_with_its_reason(mktme: Mktme, files: Files) -> None:
    result = mktme(*files.verify(nonce="00" * 16))
    assert result.code == 1
    assert "FAIL" in result.out
    assert "another nonce" in result.out
    assert result.out.splitlines()[-1] == "REFUSED by tenant a: 1 of 21 checks"


def test_programs_get_an_ear(mktme: Mktme, files: Files) -> None:
    result = mktme(*files.verify("--json"))
    assert result.code == ExitCode.OK
    submodule = json.loads(result.out)["submods"][str(VM)]
    assert submodule["ear.status"] == "affirming"
    refused = mktme(*files.verify("--json", evidence="policy.toml"))
    assert refused.code == 1
    (submodule,) = json.loads(refused.out)["submods"].values()
    assert submodule["ear.status"] == "contraindicated"
    assert [one["name"] for one in submodule["mktme.checks"]] == ["format"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("policy.toml", "key-sise = 1", "key-sise: unknown setting"),
        ("reference.json", "{", "no reference values"),
        ("root.pem", "none", "no PEM file of certificates"),
    ],
)
def test_what_is_wrong_with_our_own_files(
    mktme: Mktme, files: Files, name: str, content: str, told: str
) -> None:
    files.path(name).write_text(content)
    result = mktme(*files.verify())
    assert result.code == ExitCode.USAGE
    assert told in result.err
    assert "hint:" in result.err
    files.path(name).unlink()
    assert mktme(*files.verify()).code == ExitCode.USAGE


@pytest.mark.parametrize(
    "more", [("--nonce", "00"), ("--nonce", "xy"), ("--report-data", "00"), ("--vm", "alice")]
)
def test_options_that_make_no_sense(mktme: Mktme, files: Files, more: tuple[str, str]) -> None:
    result = mktme(*files.verify(*more))
    assert result.code == ExitCode.USAGE
    assert "Traceback" not in result.err


def test_a_platform_from_ca_to_evidence(mktme: Mktme, platforms: Platforms, tmp_path: Path) -> None:
    made = mktme("ca", "create", str(tmp_path / "ca"))
    assert made.code == ExitCode.OK
    again = mktme("ca", "create", str(tmp_path / "ca"))
    assert again.code == ExitCode.USAGE
    assert "a CA gets a new directory" in again.err

    running = platforms.start()
    vm, _keyid = running.add_vm()
    token, root = tmp_path / "e.cwt", tmp_path / "root.pem"
    got = mktme("evidence", "-o", str(token), "--chain", str(root), "--nonce", "00" * 8)
    assert got.code == ExitCode.OK, got
    assert got.out.splitlines()[-1] == "nonce " + "00" * 8
    assert root.read_text() == running.client.identity().root
    taken = mktme("evidence", "-o", str(token))
    assert taken.code == ExitCode.USAGE
    unmeasured = mktme("evidence", "-o", str(tmp_path / "f"), "--vm", "alice")
    assert unmeasured.code == ExitCode.RUN_FAILED
    assert "its QEMU is not linked" in unmeasured.err
    assert not (tmp_path / "f").exists()
    unknown = mktme("evidence", "-o", str(tmp_path / "f"), "--vm", "bob")
    assert unknown.code == ExitCode.USAGE
    assert f"alice {vm}" in unknown.err.replace("\n", " ")


def test_reference_values_of_evidence(mktme: Mktme, files: Files) -> None:
    output = files.path("new.json")
    arguments = ["reference", str(files.path("evidence.cwt")), "-o", str(output)]
    trusted = [*arguments, "--trust", str(files.path("root.pem"))]
    result = mktme(*trusted, "--any", "kernel")
    assert result.code == ExitCode.OK, result
    assert Reference.load(output) == files.platform.reference().accepting_any(["kernel"])
    output.unlink()
    assert mktme(*arguments).code == ExitCode.USAGE  # nobody is trusted
    files.path("other.pem").write_bytes(Identity.create().root_pem())
    refused = mktme(*arguments, "--trust", str(files.path("other.pem")))
    assert refused.code == 1
    assert "refused" in refused.err
    assert not output.exists()


def test_the_code_digest_can_be_had(mktme: Mktme) -> None:
    assert mktme("reference", "--code").out == code_digest().hex() + "\n"
