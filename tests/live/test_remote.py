# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration to a second host over ssh (`second_host`): `mktme migrate`, and what can fail."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import libvirt
import msgspec
import pytest

from mktme.cli import ExitCode
from mktme.engine.keys import KeyMode
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.proof.confidentiality import Canary
from mktme.proof.moving import MoveReport
from mktme.proof.transparency import compare_memory
from mktme.remote import RemotePlatform
from mktme.vm import reaper
from mktme.vm.arrival import MigrationError
from mktme.vm.console import VmLostError
from mktme.vm.host import run_event_loop
from mktme.vm.migration import Migration
from mktme.vm.platform import Platform, Vm

from .conftest import Command
from .libvirtd import Libvirtd, needs_root
from .second_host import REPOSITORY, SecondHost, command_line, second_host
from .test_migration import (
    CHECK_MEMORY,
    MEMORY,
    MIB,
    TIMEOUT_S,
    VERIFIED,
    assert_nothing_of,
    guest_config,
    host,
    once_underway,
)

RECEIVER: Final = "mktme.cli receive"
QEMU: Final = "qemu-system-x86_64"

# One second host, which takes a second or two.
pytestmark = [needs_root, pytest.mark.xdist_group("second-host")]


@dataclass(frozen=True)
class Hosts:
    """Two hosts: this one under a libvirtd of its own, and the second."""

    here: Libvirtd
    second: SecondHost

    @contextmanager
    def remote(
        self, command: str = "mktme", uri: str | None = None, dram_bytes: int = MEMORY
    ) -> Iterator[RemotePlatform]:
        """A platform there. What both call by one path is another directory on each."""
        one = RemotePlatform(uri or self.second.uri, dram_bytes, command=command)
        with ExitStack() as stack:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tempfile, "tempdir", str(self.second.tmpdir))
                stack.enter_context(one)
            yield one

    def assert_nothing_there(self) -> None:
        """Nothing of a guest, once what ends has ended."""
        for what in (RECEIVER, "mktme.vm.reaper", "mktme.service", QEMU):
            self.second.wait_ended(what)
        assert self.second.files() == []
        wait_for_no_domain(self.second.libvirtd.uri)


def wait_for_no_domain(uri: str) -> None:
    """Wait until libvirt, too, has noticed that QEMUs have ended."""
    run_event_loop()
    connection = libvirt.open(uri)
    changed = threading.Event()
    lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
    handle = connection.domainEventRegisterAny(None, lifecycle, lambda *_event: changed.set(), None)
    try:
        while left := [one.name() for one in connection.listAllDomains()]:
            assert changed.wait(20), left
            changed.clear()
    finally:
        connection.domainEventDeregisterAny(handle)
        connection.close()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    # Not tmp_path: the paths of UNIX sockets are short.
    directory = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    try:
        with host(directory / "a") as here, second_host(directory) as second:
            yield Hosts(here, second)
        assert list(directory.iterdir()) == []
    finally:
        shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def _nothing_left(hosts: Hosts) -> Iterator[None]:
    reaper.process_dir()  # which outlives these tests
    yield
    assert list(hosts.second.tmpdir.iterdir()) == []
    hosts.assert_nothing_there()


def arguments(hosts: Hosts, *more: str) -> tuple[str, ...]:
    memory = f"{MEMORY // MIB}M"
    return ("migrate", hosts.second.uri, "--connect", hosts.here.uri, "--memory", memory, *more)


@pytest.fixture
def mktme(hosts: Hosts) -> Iterator[Command]:
    """`mktme`, with the directory that is another on the second host."""
    command = Command(hosts.second.tmpdir)
    yield command
    command.assert_nothing_left()


# --- it moves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("datapath", ["shadow", pytest.param("inline", marks=pytest.mark.nightly)])
def test_guest_moves_while_it_works(
    datapath: str, hosts: Hosts, mktme: Command, tmp_path: Path
) -> None:
    document = tmp_path / "out.json"
    options = ("--datapath", datapath, "--json", str(document))
    status, out, err = mktme.run(*arguments(hosts, *options))
    assert status == ExitCode.OK, out + err
    assert "passed: 9 of 9 checks" in out
    report = msgspec.json.decode(document.read_bytes(), type=MoveReport)
    assert [check.control for check in report.checks].count(True) == 3
    assert report.destination.uri == hosts.second.uri
    took = report.migration
    assert (took.source, took.destination) == (datapath, datapath)
    assert 0 < took.downtime_s < took.transfer_s < took.total_s
    assert took.sent_bytes > took.pages_sent * PAGE_BYTES > 16 * MIB
    assert report.work.rounds >= 1
    assert report.work.names == ("compress", "copy", "processes", "sorted", "stream")
    # Another key, another ciphertext; either repeats with the canary's line only where XTS does.
    pages = report.here.ciphertext, report.there.ciphertext
    assert pages[0] != pages[1]
    for page in pages:
        lines = {page[at : at + LINE_BYTES] for at in range(0, PAGE_BYTES, LINE_BYTES)}
        assert len(lines) == PAGE_BYTES // LINE_BYTES


@pytest.mark.nightly
def test_without_encryption_there_the_canary_is_found(hosts: Hosts) -> None:
    """The control of `mktme migrate`'s search, and of its comparison of ciphertexts."""
    canary = Canary.random()
    config = guest_config("shadow")
    clear = replace(config, mode=KeyMode.NO_ENCRYPT)
    with (
        Platform(MEMORY, connect=hosts.here.uri) as source,
        hosts.remote() as there,
        source.launch(config) as vm,
    ):
        canary.plant(vm.domain.console)
        with Migration(vm, source, there, config=clear) as moved:
            assert_nothing_of(vm, source)
            found = moved.vm.prove(canary)
            assert found.comparison.passed
            assert not found.search.passed
            assert found.search.dram_hits >= PAGE_BYTES // 16
            assert found.ciphertext == canary.page


# --- it stays -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Underway:
    """A migration at its first pass over memory, which would take minutes to end."""

    hosts: Hosts
    migration: Migration[object]


def kill_there(what: str) -> Callable[[Underway], None]:
    """Kill the processes of the second host that have something in their command line."""

    def kill(one: Underway) -> None:
        pids = one.hosts.second.processes(what)
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    return kill


def cut_ssh(_one: Underway) -> None:
    """Kill our ssh, not libvirt's."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for child in children for pid in child.read_text().split()]
    (ssh,) = [pid for pid in pids if "mktme receive" in command_line(pid)]
    os.kill(ssh, signal.SIGKILL)


def unplug(one: Underway) -> None:
    interface = one.hosts.second.interface
    subprocess.run(["ip", "link", "set", interface, "down"], check=True)


FAILURES: Final[dict[str, tuple[Callable[[Underway], None], str]]] = {
    "cancelled": (lambda one: one.migration.cancel(), "did not move: it was cancelled"),
    "receiver killed": (kill_there(RECEIVER), "did not move: mktme on second ended"),
    "engine killed": (kill_there("mktme.service"), "did not move: .*the engine at the destination"),
    "ssh cut": (cut_ssh, "did not move: ssh to second was ended by signal 9"),
    "sessions ended": (kill_there("sshd: root"), "did not move: (ssh to second failed|libvirt at)"),
}
ALWAYS: Final = ("cancelled", "receiver killed")


@pytest.mark.parametrize(
    ("datapath", "failures"),
    [
        ("shadow", ALWAYS),
        pytest.param("inline", tuple(FAILURES), marks=pytest.mark.nightly),
    ],
)
def test_failure_leaves_the_guest_here(
    datapath: str, failures: tuple[str, ...], hosts: Hosts
) -> None:
    """And, once it has moved, the end of the connection ends it there."""
    with (
        Platform(MEMORY, connect=hosts.here.uri) as source,
        source.launch(guest_config(datapath)) as vm,
    ):
        vm.domain.console.run(CHECK_MEMORY, TIMEOUT_S)
        vm.domain.handle.migrateSetMaxSpeed(1)  # MiB/s
        for name in failures:
            act, message = FAILURES[name]
            with hosts.remote() as there:
                migration: Migration[object] = Migration(vm, source, there, timeout_s=60)
                one = Underway(hosts, migration)
                with (
                    once_underway(vm, lambda act=act, one=one: act(one)),  # type: ignore[misc]
                    pytest.raises(MigrationError, match=message),
                    migration,
                ):
                    pass
                hosts.second.wait_ended(QEMU)
            assert_still_here(vm)
            hosts.assert_nothing_there()
        vm.domain.handle.migrateSetMaxSpeed(1 << 20)
        with hosts.remote() as there, Migration(vm, source, there) as moved:
            assert_nothing_of(vm, source)
            verified = moved.vm.run(VERIFIED, TIMEOUT_S).output
            assert "verified" in verified
            assert "FAILED" not in verified
            cut_ssh(Underway(hosts, migration))
            hosts.assert_nothing_there()
            with pytest.raises(VmLostError, match="was ended by signal 9"):
                moved.vm.run("echo", TIMEOUT_S)


def assert_still_here(vm: Vm) -> None:
    assert vm.domain.is_active
    assert not vm.domain.is_paused
    with vm.held() as engine:
        assert compare_memory(vm, engine).passed


@pytest.mark.nightly
def test_network_that_goes_away(hosts: Hosts) -> None:
    """Nobody ends a connection: each side has to find out that nothing comes any more."""
    with (
        Platform(MEMORY, connect=hosts.here.uri) as source,
        source.launch(guest_config("shadow")) as vm,
    ):
        vm.domain.handle.migrateSetMaxSpeed(1)
        try:
            with hosts.remote() as there:
                migration: Migration[object] = Migration(vm, source, there)
                one = Underway(hosts, migration)
                with (
                    once_underway(vm, lambda: unplug(one)),
                    pytest.raises(MigrationError, match="did not move: "),
                    migration,
                ):
                    pass
            assert_still_here(vm)
            hosts.assert_nothing_there()
        finally:
            subprocess.run(["ip", "link", "set", hosts.second.interface, "up"], check=True)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_source_that_ends_leaves_nothing(
    number: signal.Signals, hosts: Hosts, mktme: Command
) -> None:
    process = mktme.start(*arguments(hosts))
    mktme.wait_for_step(process, "moving to second")
    process.send_signal(number)
    status, _out, err = mktme.finish(process)
    if number == signal.SIGINT:
        assert status == ExitCode.INTERRUPTED, err
    mktme.assert_nothing_left()
    hosts.assert_nothing_there()
    wait_for_no_domain(hosts.here.uri)


# --- it is refused --------------------------------------------------------------------------------


def test_host_that_cannot_is_refused(hosts: Hosts, mktme: Command, tmp_path: Path) -> None:
    second = hosts.second
    python = shlex.quote(sys.executable)
    version = "from importlib import metadata; metadata.version = lambda _name: '0.0.9'"
    other = second.install(
        "mktme-other", f'exec {python} -c "{version}; from mktme.cli import main; main()" "$@"'
    )
    # As of a tree in which nothing was built.
    (tmp_path / "harness").symlink_to(REPOSITORY / "harness")
    unbuilt = second.install(
        "mktme-unbuilt", f'PYTHONPATH={tmp_path}/harness exec {python} -m mktme.cli "$@"'
    )
    chatty = second.install("mktme-chatty", 'echo "Welcome!"; exec mktme "$@"')
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\nexec {second.directory}/ssh -o UserKnownHostsFile={tmp_path}/known "$@"\n'
    )
    ssh.chmod(0o755)
    key = (second.directory / "id.pub").read_text()
    (tmp_path / "known").write_text(f"second {key}")

    def refused(message: str, hint: str, command: str = "mktme", uri: str | None = None) -> None:
        with pytest.raises(MigrationError, match=message) as caught, hosts.remote(command, uri):
            pass
        assert hint in str(caught.value.hint)
        hosts.assert_nothing_there()

    refused("there is no mktme on second", "make setup there", "mktme-none")
    refused(r"second has mktme 0\.0\.9, this host", "install the same mktme on both", other)
    refused(
        "ssh to second failed: Host key verification failed",
        "ssh second mktme",
        uri=f"qemu+ssh://second/system?command={ssh}",
    )
    with hosts.remote(chatty) as there:
        assert there.side().host
        other_side = there.side()
    with (
        Platform(MEMORY, connect=hosts.here.uri) as source,
        source.launch(guest_config("shadow"), boot=False) as vm,
    ):
        assert source.side().host != other_side.host
        for command, dram_bytes, message in (
            (unbuilt, MEMORY, "plugin .* is not built"),
            ("mktme", MEMORY // 2, "DRAM"),
        ):
            with (
                hosts.remote(command, dram_bytes=dram_bytes) as there,
                pytest.raises(MigrationError, match=f"did not move: second: .*{message}"),
                Migration(vm, source, there),
            ):
                pass
            assert vm.status().linked
            assert second.processes(QEMU) == []

    # And as a user sees it.
    status, _out, err = mktme.run(*arguments(hosts, "--remote-mktme", "mktme-other"))
    assert status == ExitCode.RUN_FAILED
    assert "mktme: second has mktme 0.0.9, this host" in err
    assert "hint: install the same mktme on both" in err
