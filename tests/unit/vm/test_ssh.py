# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging in to a guest: keys, host keys, commands. The guest's side is paramiko's own server."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
import pytest
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from mktme.vm.console import GuestCommandError, VmLostError
from mktme.vm.host import UsageError
from mktme.vm.ssh import (
    Access,
    LoginKey,
    Ssh,
    check_port,
    free_port,
    host_key_from,
    read_public_key,
)

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@dataclass
class Guest(paramiko.ServerInterface):
    """An sshd that runs commands here, without sudo."""

    login: LoginKey
    host_key: paramiko.PKey = field(default_factory=lambda: LoginKey().key)
    boot_ids: list[str] = field(default_factory=lambda: ["first"])
    hangs: bool = False

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        right = username == "mktme" and key == self.login.key
        return AUTH_SUCCESSFUL if right else AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: bytes) -> None:
        shell = command.decode().removeprefix("sudo -n ")
        assert shell != command.decode()
        stdin = channel.makefile("rb").read()  # its end comes once the request was answered
        if self.hangs:
            return
        if BOOT_ID in shell:
            boot_id = self.boot_ids[0] if len(self.boot_ids) == 1 else self.boot_ids.pop(0)
            channel.sendall(f"{boot_id}\n".encode())
            channel.send_exit_status(0)
        else:
            done = subprocess.run(
                ["/bin/sh", "-c", shell],
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            channel.sendall(done.stdout)
            channel.send_exit_status(done.returncode)
        channel.close()


@contextlib.contextmanager
def running(guest: Guest) -> Iterator[Access]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transports: list[paramiko.Transport] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    transport = paramiko.Transport(connection)
                    transports.append(transport)
                    transport.add_server_key(guest.host_key)
                    with contextlib.suppress(paramiko.SSHException, EOFError):
                        transport.start_server(server=guest)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield Access(listener.getsockname()[1], "mktme", guest.login, "secret-password")
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for transport in transports:
                transport.close()


@pytest.fixture
def guest() -> Guest:
    return Guest(LoginKey())


def test_commands_run_with_their_output_status_and_input(guest: Guest) -> None:
    with running(guest) as access, contextlib.closing(Ssh(access, guest.host_key, 10)) as ssh:
        found = ssh.run("echo it\\'s; echo err >&2; exit 3", 10, check=False)
        assert (found.output, found.status) == ("it's\nerr\n", 3)
        expected = hashlib.sha256(b"x" * 100_000).hexdigest()
        assert ssh.run("sha256sum", 10, stdin=b"x" * 100_000).output.split()[0] == expected
        with pytest.raises(GuestCommandError, match="exited with 3 in the guest: oops"):
            ssh.run("echo oops; exit 3", 10)


def test_files_go_in_and_out(guest: Guest, tmp_path: object) -> None:
    data = bytes(range(256)) * 100
    with running(guest) as access, contextlib.closing(Ssh(access, guest.host_key, 10)) as ssh:
        ssh.put(f"{tmp_path}/file", data, 10, mode=0o640)
        assert ssh.run(f"stat -c %a {tmp_path}/file", 10).output == "640\n"
        assert ssh.get(f"{tmp_path}/file", 10) == data


def test_command_that_does_not_end_is_a_lost_guest(guest: Guest) -> None:
    with running(guest) as access, contextlib.closing(Ssh(access, guest.host_key, 10)) as ssh:
        guest.hangs = True
        with pytest.raises(VmLostError, match=r"running 'sleep': no end in 0\.2 s"):
            ssh.run("sleep 100", 0.2)


def test_another_host_key_is_refused(guest: Guest) -> None:
    with running(guest) as access, pytest.raises(VmLostError, match="is not the guest"):
        Ssh(access, LoginKey().key, 10)


def test_another_login_key_is_refused(guest: Guest) -> None:
    with running(guest) as access:
        stranger = Access(access.port, access.user, LoginKey(), "")
        with pytest.raises(VmLostError, match="the guest refuses mktme"):
            Ssh(stranger, guest.host_key, 0.1)


def test_guest_that_never_answers_is_lost() -> None:
    access = Access(free_port(), "mktme", LoginKey(), "")
    with pytest.raises(VmLostError, match=r"sshd does not answer after 0\.1 s"):
        Ssh(access, LoginKey().key, 0.1)


def test_second_boot_is_one_with_another_boot_id(guest: Guest) -> None:
    with running(guest) as access, contextlib.closing(Ssh(access, guest.host_key, 10)) as ssh:
        guest.boot_ids[:] = ["first", "first", "second"]
        ssh.wait_booted_again(20)
        assert guest.boot_ids == ["second"]
        with pytest.raises(VmLostError, match="has not booted again"):
            ssh.wait_booted_again(0.1)


def test_nothing_that_lets_in_is_shown() -> None:
    login = LoginKey()
    access = Access(2222, "mktme", login, "secret-password")
    assert repr(access) == "<Access mktme@127.0.0.1:2222>"
    kind, public, comment = login.authorized.split()
    assert (kind, comment) == ("ssh-ed25519", "mktme")
    assert len(public) == 68


CONSOLE = b"""\
[  OK  ] Reached target cloud-init.target - Cloud-init target.\r
-----BEGIN SSH HOST KEY KEYS-----\r
ecdsa-sha2-nistp256 AAAAE2VjZHNh root@debian-12\r
ssh-ed25519 KEY root@debian-12\r
-----END SSH HOST KEY KEYS-----"""


def test_host_key_is_the_one_on_the_console() -> None:
    key = LoginKey().key
    assert host_key_from(CONSOLE.replace(b"KEY root", key.get_base64().encode() + b" root")) == key


@pytest.mark.parametrize("said", [b"", CONSOLE, CONSOLE.replace(b"ssh-ed25519", b"ssh-rsa")])
def test_console_without_a_host_key(said: bytes) -> None:
    assert host_key_from(said) is None


def test_port_that_is_taken_is_known_before() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UsageError, match="cannot be had") as caught:
            check_port(taken.getsockname()[1])
        assert caught.value.hint is not None
        assert "--ssh-port" in caught.value.hint
    with pytest.raises(UsageError, match="cannot be had"):
        check_port(1 << 16)
    check_port(free_port())


def test_own_public_key_is_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{LoginKey().authorized}\n")
    assert read_public_key(path).startswith("ssh-ed25519 ")
    path.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    with pytest.raises(UsageError, match="no public key") as caught:
        read_public_key(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        read_public_key(tmp_path / "none")
