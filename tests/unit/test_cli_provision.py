# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme provision`: what it prints and its exit status. The provisioner's platform is fake."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mktme.cli import ExitCode
from mktme.provision import wire
from mktme.provision.client import Client
from mktme.provision.daemon import Daemon
from mktme.provision.plan import Action
from mktme.provision.report import ApplyReport, DestroyReport, PlanReport

from .command import Mktme, runner
from .provision.bench import FakeGuest, Site, write_files

SECRET = "correct horse battery staple"
FILE = """\
name = "bench"
[tenants.alice]
policy = "policy.toml"
reference = "reference.json"
[tenants.alice.vms.web]
guest = "debian-12"
secrets = [{ file = "token", path = "/run/app/token" }]
[tenants.alice.vms.db]
guest = "tiny"
memory = "MEMORY"
"""


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_files(tmp_path)
    path = tmp_path / "tenants.toml"
    path.write_text(FILE.replace("MEMORY", "256M"))
    return path


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    """A provisioner in a thread, which is the one that commands find or start."""
    site = Site()
    threads: list[threading.Thread] = []

    def start(_name: str, client: socket.socket, *_streams: object) -> int:
        directory = Path(tempfile.mkdtemp(prefix="mktme-"))
        daemon = Daemon(directory / wire.socket_name("bench"), site.open, lambda *_: b"")
        thread = threading.Thread(target=daemon.run, args=(client.dup(),), daemon=True)
        thread.start()
        threads.append(thread)
        return os.getpid()

    def wait_ended(_client: Client) -> None:
        threads[-1].join(20)
        assert not threads[-1].is_alive()

    monkeypatch.setattr("mktme.provision.client._spawn", start)
    monkeypatch.setattr(Client, "wait_ended", wait_ended)
    # Not tmp_path: the paths of UNIX sockets are short.
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield site
        client = Client.find("bench")
        if client is not None:
            with client:
                client.destroy(_Silent())


class _Silent:
    def step(self, _what: str) -> threading.Lock:
        return threading.Lock()  # any context manager

    def notice(self, _line: str) -> None:
        pass


def test_plan_apply_plan_drift_destroy(mktme: Mktme, site: Site, file: Path) -> None:
    found = mktme("provision", "plan", "-f", str(file), "--exit-code")
    assert found.code == ExitCode.CHANGES
    assert "+ create    alice.web" in found.out
    assert "bench: 2 to create" in found.out
    assert mktme("provision", "plan", "-f", str(file)).code == ExitCode.OK
    assert site.benches == []  # nothing was started for it

    found = mktme("provision", "apply", "-f", str(file))
    assert found.code == ExitCode.OK, found.err
    assert "create alice.web: " in found.err
    assert "running  alice.web" in found.out
    found = mktme("provision", "plan", "-f", str(file), "--exit-code")
    assert found.code == ExitCode.OK
    assert "bench: 2 VMs as wanted, nothing to do" in found.out
    assert mktme("provision", "apply", "-f", str(file)).out.endswith("nothing to do\n")

    file.write_text(FILE.replace("MEMORY", "512M"))
    found = mktme("provision", "plan", "-f", str(file), "--exit-code")
    assert found.code == ExitCode.CHANGES
    assert "± replace   alice.db  (memory cannot change in place)" in found.out
    assert "memory  256M -> 512M" in found.out

    found = mktme("provision", "destroy", "-f", str(file))
    assert (found.code, found.out) == (ExitCode.OK, "bench: 2 VMs taken down\n")
    found = mktme("provision", "destroy", "-f", str(file))
    assert (found.code, found.out) == (ExitCode.OK, "bench: nothing runs\n")


def test_json(mktme: Mktme, site: Site, file: Path) -> None:
    found = mktme("provision", "plan", "-f", str(file), "--json", "--exit-code")
    assert found.code == ExitCode.CHANGES
    plan = msgspec.json.decode(found.out, type=PlanReport)
    assert (plan.changes, {one.action for one in plan.steps}) == (True, {Action.CREATE})
    out = found.out
    found = mktme("provision", "apply", "-f", str(file), "--json")
    applied = msgspec.json.decode(found.out, type=ApplyReport)
    assert applied.well
    assert [one.secrets for one in applied.vms] == [(), ("/run/app/token (root, 0600)",)]
    out += found.out + mktme("provision", "plan", "-f", str(file), "--json").out
    found = mktme("provision", "destroy", "-f", str(file), "--json")
    destroyed = msgspec.json.decode(found.out, type=DestroyReport)
    assert (destroyed.well, len(destroyed.results)) == (True, 3)
    assert SECRET not in out + found.out


def test_refused_vm_is_told_with_the_checks_that_did(mktme: Mktme, site: Site, file: Path) -> None:
    def spoil(guest: FakeGuest) -> None:
        if guest.spec.vm == "web":
            guest.kernel = bytes(32)

    site.prepare = lambda bench: setattr(bench, "make", spoil)
    found = mktme("provision", "apply", "-f", str(file))
    assert found.code == ExitCode.PROOF_FAILED
    assert "alice.web: refused: it gets no secret\n  launch:kernel: 0000000000000000" in found.out
    assert "shows what is left, and apply goes on" in found.said
    assert [one.spec.name for one in site.bench.guests] == ["alice.db"]


def test_vm_that_does_not_come_up_is_told(mktme: Mktme, site: Site, file: Path) -> None:
    site.prepare = lambda bench: bench.fails.add("alice.web")
    found = mktme("provision", "apply", "-f", str(file))
    assert found.code == ExitCode.RUN_FAILED
    assert "alice.web: alice.web does not come up\n  hint: make it come up" in found.out
    assert all(len(line) <= 80 for line in found.out.splitlines())


def test_interrupted_apply_leaves_what_is_done(
    mktme: Mktme, site: Site, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mktme("provision", "apply", "-f", str(file)).code == ExitCode.OK

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "apply", interrupt)
    found = mktme("provision", "apply", "-f", str(file))
    assert found.code == ExitCode.INTERRUPTED
    assert "no other is begun" in found.err
    assert "everything was taken down" not in found.err
    assert len(site.bench.guests) == 2


@pytest.mark.parametrize("what", ["plan", "apply", "destroy"])
def test_file_that_makes_no_sense(mktme: Mktme, site: Site, file: Path, what: str) -> None:
    with file.open("a") as end:
        end.write('memry = "1G"\n')
    found = mktme("provision", what, "-f", str(file))
    assert (found.code, found.out) == (ExitCode.USAGE, "")
    assert f"{file}:11: tenants.alice.vms.db.memry: unknown key" in found.err
    assert "did you mean memory?" in found.err
    assert site.benches == []


def test_file_that_is_not_there(mktme: Mktme, tmp_path: Path) -> None:
    found = mktme("provision", "plan", "-f", str(tmp_path / "none.toml"))
    assert (found.code, found.out) == (ExitCode.USAGE, "")
    assert "No such file" in found.err
