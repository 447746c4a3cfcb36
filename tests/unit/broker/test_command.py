# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme broker`, as an administrator uses it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mktme.broker.directory import BrokerDirectory
from mktme.broker.report import BrokerListing
from mktme.cli import ExitCode
from mktme.engine.xts import Algorithm

from ..attest.signing import Platform
from ..command import Mktme, Result, runner
from .setting import KEY_PATH, POLICY, SECRET, pem


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.fixture
def files(tmp_path: Path, platform: Platform) -> Path:
    """What alice has."""
    (tmp_path / "platforms.pem").write_bytes(pem(platform))
    (tmp_path / "policy.toml").write_bytes(POLICY)
    (tmp_path / "reference.json").write_bytes(platform.reference().encode())
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    return tmp_path


@pytest.fixture
def broker(mktme: Mktme, files: Path) -> BrokerDirectory:
    """One that the commands below made."""
    path = files / "broker"
    assert mktme("broker", "init", path).code == ExitCode.OK
    return BrokerDirectory(path)


def furnish(mktme: Mktme, broker: BrokerDirectory, files: Path) -> None:
    def run(command: str, *arguments: str | Path) -> None:
        result = mktme("broker", command, broker.path, *arguments)
        assert (result.code, result.out) == (ExitCode.OK, ""), result.err

    run("trust", "alice/platforms", files / "platforms.pem")
    values = ("--reference", files / "reference.json")
    run("set-policy", "alice/strict", files / "policy.toml", *values)
    terms = ("--tenant", "alice", "--policy", "strict")
    run("set-resource", KEY_PATH, *terms, "--vm", "alice", "--file", files / "secret")
    run("set-resource", "alice/key/random", *terms, "--random-key", "aes-xts-256")


def refused(result: Result, message: str, hint: str | None = None) -> bool:
    lines = [f"mktme: {message}"] + ([] if hint is None else [f"  hint: {hint}"])
    return result == Result(ExitCode.USAGE, "", "\n".join(lines) + "\n")


def test_directory_is_its_owners(broker: BrokerDirectory, mktme: Mktme) -> None:
    for path in (broker.path, *broker.path.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    again = mktme("broker", "init", broker.path)
    assert refused(again, f"{broker.path}: exists", "choose another directory")


def test_keys_in_another_place(mktme: Mktme, files: Path) -> None:
    keys = files / "elsewhere"
    assert mktme("broker", "init", files / "b", "--keys", keys).code == ExitCode.OK
    assert {one.name for one in keys.iterdir()} >= {"master.key", "generation", "tls.key"}
    furnish(mktme, BrokerDirectory(files / "b"), files)
    assert not [one for one in (files / "b").iterdir() if one.is_file() and ".key" in one.name]
    assert (keys / "generation").read_text() == "6\n"


def test_list(mktme: Mktme, broker: BrokerDirectory, files: Path) -> None:
    furnish(mktme, broker, files)
    result = mktme("broker", "list", broker.path, "--json")
    listing = msgspec.json.decode(result.out, type=BrokerListing)
    assert listing.generation == 6
    rows = [(row.kind, row.name, row.policy, row.vm, row.size_bytes) for row in listing.rows]
    assert rows == [
        ("policy", "strict", None, None, len(POLICY)),
        ("reference", "strict", None, None, (files / "reference.json").stat().st_size),
        ("trust", "platforms", None, None, (files / "platforms.pem").stat().st_size),
        ("resource", "alice/key/random", "strict", None, 64),
        ("resource", KEY_PATH, "strict", "alice", len(SECRET)),
    ]
    schema = Path(__file__).parents[3] / "docs" / "schema" / "broker-list-1.json"
    defined = json.loads(schema.read_text())["$defs"]["BrokerListing"]["properties"]
    assert set(json.loads(result.out)) == set(defined)


def test_list_fits_80_columns(mktme: Mktme, broker: BrokerDirectory, files: Path) -> None:
    furnish(mktme, broker, files)
    ended = subprocess.run(
        [sys.executable, "-m", "mktme.broker", "list", "broker"],
        cwd=files,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert f"{KEY_PATH} " in ended.stdout
    assert "generation 6" in ended.stdout


def test_no_secret_is_shown(mktme: Mktme, broker: BrokerDirectory, files: Path) -> None:
    furnish(mktme, broker, files)
    with broker.open_store() as store:
        contents = store.contents()
        row = contents.resource("alice", "alice/key/random")
        assert row is not None
        drawn = contents.open(row)
        assert SECRET.decode() not in repr(contents.rows)
    assert len(drawn) == Algorithm.AES_XTS_256.key_bytes
    assert drawn[:32] != drawn[32:]
    said = "".join(
        result.out + result.err
        for result in (
            mktme("broker", "list", broker.path),
            mktme("broker", "list", broker.path, "--json"),
        )
    )
    for path in broker.path.rglob("*"):
        if path.is_file():
            assert drawn not in path.read_bytes()
            assert drawn.hex() not in path.read_text("latin-1")
            assert SECRET[:16] not in path.read_bytes()
    assert drawn.hex() not in said
    assert SECRET.decode()[:16] not in said


def test_changes_are_recorded(mktme: Mktme, broker: BrokerDirectory, files: Path) -> None:
    furnish(mktme, broker, files)
    removed = mktme("broker", "remove", broker.path, "resource", KEY_PATH, "--tenant", "alice")
    assert removed.err == f"resource {KEY_PATH} of alice removed; generation 7\n"
    records = [json.loads(line) for line in broker.audit_log.read_text().splitlines()]
    assert [one["event"] for one in records] == ["change"] * 6
    last = records[-1]
    assert last.pop("time")
    assert last == {
        "event": "change",
        "outcome": "done",
        "tenant": "alice",
        "resource": KEY_PATH,
        "generation": 7,
        "what": f"remove resource {KEY_PATH} by uid {os.getuid()}",
    }


def test_file_that_others_can_read(mktme: Mktme, broker: BrokerDirectory, files: Path) -> None:
    furnish(mktme, broker, files)
    (files / "secret").chmod(0o644)
    command = ("set-resource", broker.path, "alice/key/2", "--tenant", "alice")
    result = mktme("broker", *command, "--policy", "strict", "--file", files / "secret")
    message = f"{files / 'secret'}: others have access to this key file (mode 0644)"
    assert refused(result, message, f"chmod 600 {files / 'secret'}")


def test_what_makes_no_sense(mktme: Mktme, broker: BrokerDirectory, files: Path) -> None:
    directory = broker.path
    furnish(mktme, broker, files)

    def run(*arguments: str | Path) -> Result:
        return mktme("broker", *arguments)

    resource = ("set-resource", directory, KEY_PATH, "--tenant", "alice", "--policy", "strict")
    one = "either --file FILE or --random-key CIPHER"
    assert refused(run(*resource), "what is it?", one)
    both = ("--file", files / "secret", "--random-key", "aes-xts-128")
    assert refused(run(*resource, *both), "what is it?", one)
    assert refused(
        run("list", files / "none"),
        f"{files / 'none'}: no broker's directory",
        f"mktme broker init {files / 'none'}",
    )
    assert refused(
        run("set-policy", directory, "strict", files / "policy.toml"),
        "'strict' names no tenant",
        "TENANT/NAME, such as alice/prod",
    )
    assert refused(
        run("set-reference", directory, "alice/strict", files / "none"),
        f"{files / 'none'}: No such file or directory",
    )
    assert refused(
        run("init", files / "c", "--tls-cert", files / "x"),
        "--tls-cert and --tls-key belong together",
        "give both",
    )
    assert refused(
        run("serve", directory, "--listen", "8443"),
        "'8443' is nowhere to listen",
        "such as --listen 127.0.0.1:8443",
    )
    wrong = run("trust", directory, "alice/platforms", files / "policy.toml")
    assert wrong.code != ExitCode.OK
    assert "is no PEM file of certificates" in wrong.err
    wrong = run("set-policy", directory, "alice/strict", files / "reference.json")
    assert wrong.code != ExitCode.OK
    assert "Traceback" not in wrong.err
    assert json.loads(run("list", directory, "--json").out)["generation"] == 6


def test_command_needs_no_libvirt(broker: BrokerDirectory) -> None:
    """A broker runs on a machine of its own."""
    script = (
        "import sys; sys.modules['libvirt'] = None; sys.argv[1:] = ['list', sys.argv[1]];"
        "import runpy; runpy.run_module('mktme.broker', run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(broker.path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "generation 1" in ended.stdout
