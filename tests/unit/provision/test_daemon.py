# SPDX-License-Identifier: GPL-2.0-or-later
"""The provisioner's process: who gets an answer, which, and when it ends. Its platform is fake."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mktme.provision import wire
from mktme.provision.apply import Outcome
from mktme.provision.client import Client, plan_for
from mktme.provision.daemon import Daemon
from mktme.provision.errors import ProvisionError
from mktme.provision.plan import Action
from mktme.vm.host import UsageError

from .bench import FakeGuest, Quiet, Site
from .conftest import Want

TIMEOUT_S = 20


class Running:
    """A daemon in a thread of this process."""

    def __init__(self, site: Site, directory: Path) -> None:
        self.path = directory / wire.socket_name("bench")
        self.site = site
        self.daemon = Daemon(self.path, site.open, lambda *_: b"")
        first, theirs = socket.socketpair()
        self.thread = threading.Thread(target=self.daemon.run, args=(theirs,), daemon=True)
        self.thread.start()
        self.first = Client(first, os.getpid())
        assert self.first._is_ready()

    def client(self) -> Client:
        client = Client.find("bench")
        assert client is not None
        return client

    def wait_ended(self) -> None:
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()
        assert not self.path.exists()


@pytest.fixture
def running(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    tmp_path_factory.getbasetemp()  # pytest's own place is somewhere else
    # Not tmp_path: the paths of UNIX sockets are short.
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        process_dir = Path(tempfile.mkdtemp(prefix="mktme-"))
        one = Running(site, process_dir)
        yield one
        one.daemon.end()
        one.first.close()
        one.wait_ended()


def test_apply_plan_destroy(running: Running, want: Want) -> None:
    deployment, tell = want({"alice.web": {}, "bob.db": {}}), Quiet()
    applied = running.first.apply(deployment, tell)
    assert tell.steps == ["create platform", "create alice.web", "create bob.db"]
    assert {one.outcome for one in applied.results} == {Outcome.DONE}
    assert [one.name for one in applied.state.vms] == ["alice.web", "bob.db"]
    running.first.close()

    with running.client() as client:  # it outlives who started it
        planned = client.plan(deployment)
        assert planned.plan.is_empty
        assert planned.state == client.state()
        assert planned.state == applied.state
        drift = client.plan(want({"alice.web": {"memory": "512M"}, "bob.db": {}}))
        assert drift.plan.count(Action.REPLACE) == 1
    assert plan_for(deployment).plan.is_empty

    with running.client() as client:
        client.wait_ended = lambda: None  # type: ignore[method-assign]  # it is this process
        assert {one.outcome for one in client.destroy(Quiet()).results} == {Outcome.DONE}
    running.wait_ended()
    assert running.site.bench.guests == []
    assert Client.find("bench") is None


def test_it_ends_when_it_holds_nothing_and_nobody_asks(running: Running, want: Want) -> None:
    assert running.first.state() == wire.StateIs(state=running.first.state()).state
    assert running.first.state().platform is None
    running.first.close()
    running.wait_ended()
    assert plan_for(want()).plan.count(Action.CREATE) == 1


def test_it_holds_no_platform_for_vms_that_were_refused(running: Running, want: Want) -> None:
    def spoil(guest: FakeGuest) -> None:
        guest.kernel = bytes(32)

    running.site.prepare = lambda bench: setattr(bench, "make", spoil)
    applied = running.first.apply(want(), Quiet())
    assert [one.outcome for one in applied.results] == [Outcome.DONE, Outcome.REFUSED]
    assert applied.results[-1].failed[0].name == "launch:kernel"
    assert running.site.bench.ended.is_set()
    running.first.close()
    running.wait_ended()


def test_it_ends_with_its_engine(running: Running, want: Want) -> None:
    running.first.apply(want(), Quiet())
    running.site.bench.ended.set()
    running.wait_ended()
    assert running.site.bench.aborted
    assert running.site.bench.guests == []
    with pytest.raises(ProvisionError, match="the provisioner ends, and all"):
        running.first.state()


def test_one_operation_at_a_time(running: Running, want: Want) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def wait(_guest: FakeGuest) -> None:
        entered.set()
        assert go_on.wait(TIMEOUT_S)

    running.site.prepare = lambda bench: setattr(bench, "when_booted", wait)
    applying = threading.Thread(target=running.first.apply, args=(want(), Quiet()))
    applying.start()
    assert entered.wait(TIMEOUT_S)
    with running.client() as other, pytest.raises(ProvisionError, match="is at work") as caught:
        other.plan(want())
    assert caught.value.hint is not None
    go_on.set()
    applying.join(TIMEOUT_S)
    with running.client() as other:
        assert other.plan(want()).plan.is_empty


def test_no_step_is_begun_for_a_client_that_is_gone(running: Running, want: Want) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def wait(guest: FakeGuest) -> None:
        if guest.spec.name == "alice.web":
            entered.set()
            assert go_on.wait(TIMEOUT_S)

    running.site.prepare = lambda bench: setattr(bench, "when_booted", wait)
    vms: dict[str, dict[str, object]] = {"alice.web": {}, "bob.db": {}, "carol.ci": {}}
    with running.client() as leaving:
        wire.send(leaving._connection, wire.Apply(deployment=want(vms)))
        assert entered.wait(TIMEOUT_S)
    go_on.set()
    with running.daemon._operation:
        pass
    assert [one.name for one in running.first.state().vms] == ["alice.web"]


def test_what_is_wrong_with_a_request_is_told(running: Running, want: Want, files: Path) -> None:
    deployment = want(
        {"alice.web": {"guest": "debian-12", "secrets": [{"file": "token", "path": "/run/x"}]}}
    )
    (files / "token").chmod(0o644)
    with pytest.raises(UsageError, match="open to others") as caught:
        running.first.apply(deployment, Quiet())
    assert str(caught.value.hint).startswith("chmod 600")
    assert running.first.state().vms == ()


@pytest.mark.parametrize(
    "sent",
    [
        wire.GetState(),  # no hello
        wire.Hello(version=wire.PROTOCOL_VERSION + 1),
    ],
    ids=["no hello", "another version"],
)
def test_strangers_get_no_answer(running: Running, sent: wire.Message) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(os.fspath(running.path))
        wire.send(stranger, sent)
        assert stranger.recv(1) == b""
    assert running.first.state().platform is None  # and others theirs


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", (3).to_bytes(4, "little") + b"abc", (9).to_bytes(4, "little") + b"x"],
    ids=["too long", "no message", "cut off"],
)
def test_noise_ends_its_connection_alone(running: Running, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(os.fspath(running.path))
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1) == b""
    assert running.first.state().platform is None


def test_socket_is_its_users_alone(running: Running) -> None:
    assert running.path.stat().st_mode & 0o777 == 0o600
    assert running.path.parent.stat().st_mode & 0o777 == 0o700


def test_nothing_secret_goes_over_the_socket(
    running: Running, want: Want, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = bytearray()
    send = socket.socket.sendall

    def record(connection: socket.socket, data: bytes) -> None:
        seen.extend(data)
        send(connection, data)

    monkeypatch.setattr(socket.socket, "sendall", record)
    secret = {"file": "token", "path": "/run/app/token"}
    deployment = want({"alice.web": {"guest": "debian-12", "secrets": [secret]}})
    running.first.apply(deployment, Quiet())
    assert running.site.guest("alice.web").secrets
    running.first.plan(deployment)
    assert b"/run/app/token" in seen
    assert b"correct horse" not in seen
