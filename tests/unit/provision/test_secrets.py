# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets on their way into a guest; the guest's side is an sshd of paramiko's, without sudo."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mktme.provision.errors import ProvisionError
from mktme.provision.secrets import Marks, hand_over, look, withdraw
from mktme.provision.state import SecretFact
from mktme.provision.tenants import Secret
from mktme.vm.console import CommandResult, GuestCommandError
from mktme.vm.host import UsageError
from mktme.vm.ssh import LoginKey, Ssh

from ..vm.test_ssh import Guest, running

ME = pwd.getpwuid(os.geteuid()).pw_name
GROUP = grp.getgrgid(os.getegid()).gr_name
CONTENT = b"correct horse\0battery staple\n"


@pytest.fixture
def ssh() -> Iterator[Ssh]:
    guest = Guest(LoginKey())
    with running(guest) as access, contextlib.closing(Ssh(access, guest.host_key, 10)) as one:
        yield one


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_bytes(CONTENT)
    return Secret(file, f"{tmp_path}/guest/it's here/token", f"{ME}:{GROUP}", 0o440)


def test_secret_arrives_whole_with_its_owner_and_mode(ssh: Ssh, secret: Secret) -> None:
    marks = Marks()
    assert look(ssh, [secret], marks) == ()
    hand_over(ssh, secret)
    there = Path(secret.path)
    assert there.read_bytes() == CONTENT
    assert stat.S_IMODE(there.stat().st_mode) == 0o440
    assert [one.name for one in there.parent.iterdir()] == ["token"]
    assert look(ssh, [secret], marks) == (SecretFact(str(secret), marks.of_file(secret.file)),)


def test_what_differs_in_the_guest_is_seen(ssh: Ssh, secret: Secret) -> None:
    marks = Marks()
    hand_over(ssh, secret)
    (before,) = look(ssh, [secret], marks)
    there = Path(secret.path)
    there.chmod(0o644)
    (after,) = look(ssh, [secret], marks)
    assert after.text == str(secret).replace("0440", "0644")
    assert after.mark == before.mark
    there.write_text("another")
    (after,) = look(ssh, [secret], marks)
    assert after.mark != before.mark
    there.unlink()
    there.symlink_to(secret.file)  # a link to it is not it
    assert look(ssh, [secret], marks) == ()


def test_secret_takes_the_place_of_what_was_there(ssh: Ssh, secret: Secret) -> None:
    there = Path(secret.path)
    there.parent.mkdir(parents=True)
    victim = there.parent / "victim"
    victim.write_text("untouched")
    there.symlink_to(victim)
    hand_over(ssh, secret)
    assert not there.is_symlink()
    assert there.read_bytes() == CONTENT
    assert victim.read_text() == "untouched"
    withdraw(ssh, secret.path)
    assert not there.exists()
    withdraw(ssh, secret.path)


def test_guest_that_has_something_else_gets_no_name_for_it(secret: Secret) -> None:
    """What a guest that garbles, or lies, is asked to do."""

    class Garbling:
        def __init__(self) -> None:
            self.commands: list[str] = []
            self.input = b""

        def run(
            self, command: str, timeout_s: float, *, check: bool = True, stdin: bytes = b""
        ) -> CommandResult:
            self.commands.append(command)
            self.input += stdin
            return CommandResult("0" * 64 + "  -\n", 0)

    guest = Garbling()
    with pytest.raises(ProvisionError, match="is not what was sent") as caught:
        hand_over(guest, secret)
    assert len(guest.commands) == 2
    assert guest.commands[1].startswith("rm -f -- ")
    assert guest.input == CONTENT
    assert "horse" not in " ".join(guest.commands) + str(caught.value)


def test_nothing_is_left_where_it_cannot_be_given_its_owner(ssh: Ssh, secret: Secret) -> None:
    stranger = Secret(secret.file, secret.path, "nobody-of-this-name", 0o600)
    with pytest.raises(GuestCommandError, match="invalid user") as caught:
        hand_over(ssh, stranger)
    assert "horse" not in str(caught.value)
    assert list(Path(secret.path).parent.iterdir()) == []


def test_file_that_others_can_read_is_no_secret(ssh: Ssh, secret: Secret) -> None:
    secret.file.chmod(0o644)
    with pytest.raises(UsageError, match="open to others"):
        hand_over(ssh, secret)
    with pytest.raises(UsageError, match="open to others"):
        Marks().of_file(secret.file)
    assert not Path(secret.path).exists()


def test_mark_tells_nothing_without_its_key(secret: Secret) -> None:
    one, other = Marks(), Marks()
    assert one.of_file(secret.file) == one.of_file(secret.file)
    assert one.of_file(secret.file) != other.of_file(secret.file)
    assert one.of_file(secret.file) not in repr(SecretFact("text", one.of_file(secret.file)))
