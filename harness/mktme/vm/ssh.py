# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's shell over ssh: a key for each guest, and the host key that its console said.

Neither is ever in a file of the host's. QEMU's user-mode network forwards a port of the loopback
interface to the guest's port 22, so who can log in is who has the key.
"""

from __future__ import annotations

import io
import logging
import re
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mktme.vm.console import CommandResult, GuestCommandError, VmLostError
from mktme.vm.host import UsageError

LOOPBACK: Final = "127.0.0.1"
HOST_KEYS_SHOWN: Final = "-----END SSH HOST KEY KEYS-----"
"""What the console says behind the host keys: cloud-init's module "Keys to Console"."""
_HOST_KEY: Final = re.compile(rb"^ssh-ed25519 (\S+)", re.M)
_PUBLIC_KEY: Final = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\n]*)?")
_RETRY_S: Final = 0.25
_ANSWER_TIMEOUT_S: Final = 20.0

# It logs every attempt that a booting guest does not answer as an error.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class LoginKey:
    """A key pair for one guest: Ed25519, in memory alone."""

    def __init__(self) -> None:
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        self._key = paramiko.Ed25519Key.from_private_key(io.StringIO(pem.decode()))

    @property
    def key(self) -> paramiko.PKey:
        """What paramiko logs in with."""
        return self._key

    @property
    def authorized(self) -> str:
        """The public key, as a line of ``authorized_keys``."""
        return f"{self._key.get_name()} {self._key.get_base64()} mktme"


@dataclass(frozen=True, slots=True)
class Access:
    """How to log in to a guest.

    Attributes:
        port: of the loopback interface, forwarded to the guest's port 22.
        user: who may do anything with sudo.
        key: that the guest was told of.
        password: of `user`, on the console alone.
    """

    port: int
    user: str
    key: LoginKey
    password: str

    def __repr__(self) -> str:
        return f"<Access {self.user}@{LOOPBACK}:{self.port}>"


def host_key_from(console: bytes) -> paramiko.PKey | None:
    """The guest's Ed25519 host key as cloud-init showed it on the console, None if it did not."""
    match = _HOST_KEY.search(console)
    if match is None:
        return None
    line = f"{LOOPBACK} ssh-ed25519 {match[1].decode(errors='replace')}"
    try:
        entry = paramiko.hostkeys.HostKeyEntry.from_line(line)
    except (paramiko.SSHException, paramiko.hostkeys.InvalidHostKey, ValueError):
        return None
    return None if entry is None else entry.key


class Ssh:
    """A shell in a guest, as root; a `mktme.vm.shell.Shell`.

    Args:
        access: how to log in.
        host_key: the guest's; another one is refused.
        timeout_s: until when there must be an answer.

    Raises:
        VmLostError: there is none in time, or it is not the guest's.
    """

    def __init__(self, access: Access, host_key: paramiko.PKey, timeout_s: float) -> None:
        self._access = access
        self._host_key = host_key
        self._connect(timeout_s)
        self._boot_id = self._read_boot_id(timeout_s)

    def _connect(self, timeout_s: float) -> None:
        """Log in as soon as the guest's sshd answers.

        QEMU takes the connection in any case; until there is an sshd it ends at once, or nothing
        comes. Nobody tells when there is one.
        """
        deadline = time.monotonic() + timeout_s
        never = threading.Event()
        while True:
            try:
                self._client = self._attempt(max(1.0, deadline - time.monotonic()))
                return
            except paramiko.BadHostKeyException as error:
                raise VmLostError(
                    f"whoever answers at port {self._access.port} is not the guest: its host key"
                    " is not the one that the guest's console said"
                ) from error
            except paramiko.AuthenticationException as error:
                # While the guest boots, only root may log in (pam_nologin).
                if time.monotonic() > deadline:
                    raise VmLostError(f"the guest refuses {self._access.user}: {error}") from error
            except (paramiko.SSHException, OSError, EOFError) as error:
                if time.monotonic() > deadline:
                    raise VmLostError(
                        f"the guest's sshd does not answer after {timeout_s:g} s: {error}"
                    ) from error
            never.wait(_RETRY_S)

    def _attempt(self, timeout_s: float) -> paramiko.SSHClient:
        client = paramiko.SSHClient()
        name = f"[{LOOPBACK}]:{self._access.port}"
        client.get_host_keys().add(name, self._host_key.get_name(), self._host_key)
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        timeout_s = min(timeout_s, _ANSWER_TIMEOUT_S)
        try:
            client.connect(
                LOOPBACK,
                self._access.port,
                self._access.user,
                pkey=self._access.key.key,
                timeout=timeout_s,
                banner_timeout=timeout_s,
                auth_timeout=timeout_s,
                channel_timeout=timeout_s,
                allow_agent=False,
                look_for_keys=False,
            )
        except BaseException:
            client.close()
            raise
        return client

    def wait_booted_again(self, timeout_s: float) -> None:
        """Log in anew once the guest has booted another time.

        Raises:
            VmLostError: it has not in time.
        """
        deadline = time.monotonic() + timeout_s
        never = threading.Event()
        while True:
            left = max(1.0, deadline - time.monotonic())
            self.close()
            try:
                self._connect(left)
                # A guest that goes down meanwhile does not say so.
                boot_id = self._read_boot_id(min(left, _ANSWER_TIMEOUT_S))
            except VmLostError:
                if time.monotonic() > deadline:
                    raise
                continue
            if boot_id != self._boot_id:
                self._boot_id = boot_id
                return
            if time.monotonic() > deadline:
                raise VmLostError(f"the guest has not booted again after {timeout_s:g} s")
            never.wait(_RETRY_S)

    def _read_boot_id(self, timeout_s: float) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id", timeout_s).output.strip()

    def run(
        self, command: str, timeout_s: float, *, check: bool = True, stdin: bytes = b""
    ) -> CommandResult:
        """Run shell commands in the guest.

        Args:
            command: for ``sh -c``; both its outputs are one.
            timeout_s: how long it may take.
            check: whether another exit status than 0 is an error.
            stdin: what it reads.

        Raises:
            VmLostError: the guest did not finish it in time, or is gone.
            GuestCommandError: it exited with another status than 0, and `check` is set.
        """
        output, status = self._execute(command, timeout_s, stdin)
        text = output.decode(errors="replace")
        if check and status != 0:
            last = text.strip().splitlines()[-1:] or ["no output"]
            raise GuestCommandError(f"'{command}' exited with {status} in the guest: {last[0]}")
        return CommandResult(text, status)

    def _execute(self, command: str, timeout_s: float, stdin: bytes) -> tuple[bytes, int]:
        doing = f"running '{command.split()[0]}'"
        output = bytearray()
        deadline = time.monotonic() + timeout_s
        try:
            transport = self._client.get_transport()
            if transport is None:
                raise EOFError("not connected")
            with transport.open_session(timeout=timeout_s) as channel:
                channel.set_combine_stderr(True)
                channel.exec_command(f"sudo -n sh -c {_quoted(command)}")
                if stdin:
                    channel.settimeout(timeout_s)
                    channel.sendall(stdin)
                channel.shutdown_write()
                while True:
                    channel.settimeout(max(0.001, deadline - time.monotonic()))
                    data = channel.recv(1 << 16)
                    if not data:
                        break
                    output += data
                channel.status_event.wait(max(0.001, deadline - time.monotonic()))
                status = channel.exit_status if channel.exit_status_ready() else -1
        except TimeoutError as error:
            raise VmLostError(
                f"the guest was lost while {doing}: no end in {timeout_s:g} s"
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise VmLostError(f"the guest was lost while {doing}: {error}") from error
        if status < 0:  # the connection ended before the command did
            raise VmLostError(f"the guest was lost while {doing}: its sshd said no more")
        return bytes(output), status

    def put(self, path: str, data: bytes, timeout_s: float, *, mode: int = 0o755) -> None:
        """Write a file in the guest."""
        self.run(f"cat >{path} && chmod {mode:o} {path}", timeout_s, stdin=data)

    def get(self, path: str, timeout_s: float) -> bytes:
        """Read a file in the guest."""
        return self._execute(f"cat {path}", timeout_s, b"")[0]

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def read_public_key(path: Path) -> str:
    """A line of ``authorized_keys`` from a file such as ``id_ed25519.pub``.

    Raises:
        UsageError: it has none, or cannot be read. A private key is not shown.
    """
    hint = "give the file that ends in .pub"
    try:
        line = path.read_text(errors="replace").strip()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint=hint) from error
    if not _PUBLIC_KEY.fullmatch(line):
        raise UsageError(f"{path}: no public key, in one line", hint=hint)
    return line


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(port: int) -> None:
    """Check that QEMU will be able to listen at a port of the loopback interface.

    Raises:
        UsageError: it will not.
    """
    with socket.socket() as probe:
        # As QEMU does: a connection that ended lately is no reason.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"port {port} of {LOOPBACK} cannot be had: {error}",
                hint="leave --ssh-port out, and one that is free is found",
            ) from error
