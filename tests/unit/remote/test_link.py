# SPDX-License-Identifier: GPL-2.0-or-later
"""The source's end of a connection, with programs that play ssh and the other host."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Final

import pytest

from mktme.remote import wire
from mktme.remote.link import HostLostError, Link
from mktme.remote.uri import RemoteUri
from mktme.vm.arrival import MigrationError
from mktme.vm.console import GuestCommandError, VmError
from mktme.vm.host import EnvironmentUnfitError

GREETING: Final = wire.line_of(wire.greeting()).decode().strip()
DONE: Final = wire.line_of(wire.Done()).decode().strip()
BEAT: Final = wire.line_of(wire.Beat()).decode().strip()


class Other:
    """Another host, as a script that is run in place of ssh."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: list[str] = []

    def link(self, script: str) -> Link:
        ssh = self.directory / "ssh"
        ssh.write_text(f"#!/bin/sh\n{script}\n")
        ssh.chmod(0o755)
        remote = RemoteUri.parse(f"qemu+ssh://other/system?command={ssh}")
        return Link(remote, "mktme", self.directory / "memory", self.notes.append)


@pytest.fixture
def other(tmp_path: Path) -> Other:
    return Other(tmp_path)


def says(*lines: str) -> str:
    return "\n".join(f"echo '{line}'" for line in lines)


def test_what_a_login_says_is_no_greeting(other: Other) -> None:
    with other.link(
        says("Welcome!", "{}", GREETING) + f"\nread -r line; {says(DONE)}; exec cat"
    ) as link:
        assert link.gone is None
        link.ask(wire.Moved(), wire.Done)


def test_it_ends_when_the_source_does(other: Other, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    with other.link(f"{says(GREETING)}; cat >/dev/null; echo >{ended}") as link:
        assert not ended.exists()
    assert ended.exists()
    assert link.gone == "mktme on other ended with status 0"


@pytest.mark.parametrize(
    ("script", "message", "hint"),
    [
        (
            "echo 'bash: mktme: command not found' >&2; exit 127",
            "there is no mktme on other: bash: mktme: command not found",
            "--remote-mktme PATH",
        ),
        (
            "echo 'Host key verification failed.' >&2; exit 255",
            "ssh to other failed: Host key verification failed.",
            "ssh other mktme",
        ),
        ("echo hello; exit 3", "mktme on other ended with status 3: hello", "None"),
        (
            "printf '\\033[2J' >&2; kill -9 $$",
            "was ended by signal 9: \N{REPLACEMENT CHARACTER}",
            "",
        ),
        (
            says('{"type":"Greeting","protocol":1,"mktme":"0.0.9"}') + "; exec cat",
            r"other has mktme 0\.0\.9, this host ",
            "install the same mktme on both",
        ),
        (
            says(GREETING.replace('"protocol":1', '"protocol":2')) + "; exec cat",
            "other has protocol 2, this host 1",
            "install the same mktme on both",
        ),
    ],
)
def test_host_without_our_mktme(other: Other, script: str, message: str, hint: str) -> None:
    with pytest.raises(MigrationError, match=message) as caught:
        other.link(script)
    assert hint in str(caught.value.hint)


def test_there_is_no_ssh() -> None:
    remote = RemoteUri.parse("qemu+ssh://other/system?command=/nowhere/ssh")
    with pytest.raises(MigrationError, match="/nowhere/ssh: No such file"):
        Link(remote, "mktme", Path("/tmp/memory"), lambda _line: None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("GuestCommandError", GuestCommandError),
        ("EnvironmentUnfitError", EnvironmentUnfitError),
        ("EngineRefusedError", VmError),
        ("SystemExit", VmError),
    ],
)
def test_failures_are_ours(other: Other, error: str, kind: type[Exception]) -> None:
    failure = wire.Failure(error=error, message="no\x1b room", hint="make some")
    script = (
        f"{says(GREETING)}; read -r line; {says(wire.line_of(failure).decode().strip())}; exec cat"
    )
    with other.link(script) as link:
        with pytest.raises(kind, match="other: no\N{REPLACEMENT CHARACTER} room") as caught:
            link.ask(wire.Moved(), wire.Done)
        assert getattr(caught.value, "hint", None) == "on other: make some"
        assert link.gone is None


def test_notes_and_trouble_come_in_between(other: Other) -> None:
    note = wire.line_of(wire.Note(line="slow")).decode().strip()
    trouble = wire.line_of(wire.Trouble(why="libvirt is gone")).decode().strip()
    script = f"{says(GREETING)}; read -r line; {says(note, trouble, DONE)}; exec cat"
    with other.link(script) as link:
        link.ask(wire.Moved(), wire.Done)
        assert other.notes == ["other: slow"]
        assert link.trouble == "libvirt is gone"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("exit 4", "mktme on other ended with status 4"),
        ("echo nonsense; exec cat", "what other says is not to be understood"),
        (says(BEAT) + "; exec cat", "what other says is not to be understood"),
        (f"echo '{DONE[:-1]}'; exec cat", "what other says is not to be understood"),
        (says(DONE) + "; exec cat", "other answered with Done"),
    ],
)
def test_connection_that_is_lost(other: Other, answer: str, message: str) -> None:
    with other.link(f"{says(GREETING)}; read -r line; {answer}") as link:
        for _again in range(2):  # and stays so
            with pytest.raises(HostLostError, match=message):
                link.ask(wire.Moved(), wire.Arrived)
        assert str(link.gone).startswith(message)


def test_forwarding_that_is_refused(other: Other) -> None:
    said = "channel 2: open failed: administratively prohibited: open failed"
    script = f"{says(GREETING)}; read -r line; echo '{said}' >&2; {says(DONE)}; exec cat"
    with other.link(script) as link:
        assert link.refused_forwarding is None
        link.ask(wire.Moved(), wire.Done)
    assert link.refused_forwarding == said


def test_no_answer_in_time(other: Other) -> None:
    with other.link(f"{says(GREETING)}; exec cat >/dev/null") as link:
        with pytest.raises(HostLostError, match="other did not answer Moved in"):
            link.ask(wire.Moved(), wire.Done, timeout_s=0.1)
        assert link.gone is not None


def test_end_of_one_that_reads_nothing_frees_who_writes(other: Other) -> None:
    with other.link(f"{says(GREETING)}; exec sleep 1000") as link:
        threading.Timer(0.2, link._process.kill).start()
        # More than a pipe holds.
        with pytest.raises(HostLostError, match="was ended by signal 9"):
            link.ask(wire.NotMoved(why="x" * (1 << 20)), wire.Done)


def test_ctrl_c_while_it_asks(other: Other) -> None:
    """The answer that comes then must not be taken for that to another request."""
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with other.link(f"{says(GREETING)}; exec cat >/dev/null") as link:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            link.ask(wire.Moved(), wire.Done)
        with pytest.raises(HostLostError, match="it was interrupted"):
            link.ask(wire.Moved(), wire.Done)


def test_ctrl_c_of_a_terminal_is_not_sshs(tmp_path: Path) -> None:
    """It has the terminal, to ask for a passphrase, and so gets its signals."""
    ssh = tmp_path / "ssh"
    program = "import signal\nraise SystemExit(f'{signal.pthread_sigmask(signal.SIG_BLOCK, [])}')"
    ssh.write_text(f"#!{sys.executable}\n{program}\n")  # no shell: dash unblocks all
    ssh.chmod(0o755)
    remote = RemoteUri.parse(f"qemu+ssh://other/system?command={ssh}")
    with pytest.raises(MigrationError, match="SIGINT"):
        Link(remote, "mktme", tmp_path / "memory", lambda _line: None)
