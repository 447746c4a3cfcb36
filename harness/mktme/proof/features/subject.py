# SPDX-License-Identifier: GPL-2.0-or-later
"""What a row of the feature table is checked on: a live guest, and what its devices lead to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mktme.engine.errors import MktmeError
from mktme.vm.platform import Platform, Vm
from mktme.vm.ssh import LOOPBACK

COMMAND_TIMEOUT_S: Final = 120.0
BOOT_AGAIN_TIMEOUT_S: Final = 420.0
_POLL_S: Final = 0.1


class FeatureError(MktmeError):
    """Something does not work as it does on any machine."""


class SkippedError(MktmeError):
    """A row cannot be checked by whoever runs this, or on this host: nothing is known of it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A guest of a scenario.

    Attributes:
        platform: where it runs.
        vm: the guest, up.
        directory: the host's side of its devices: images, sockets, a shared directory.
    """

    platform: Platform
    vm: Vm
    directory: Path

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run shell commands in the guest, as root; returns what they print."""
        return self.vm.domain.shell.run(command, timeout_s).output

    def python(self, program: str, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """Run a program in the guest's own Python; returns the JSON that it prints last."""
        self.vm.domain.ssh.put("/run/mktme.py", program.encode(), timeout_s)
        words = " ".join(f"'{one}'" for one in arguments)
        output = self.run(f"python3 /run/mktme.py {words}", timeout_s)
        return json.loads(output.strip().splitlines()[-1])

    def put(self, path: str, data: bytes) -> None:
        """Write a file in the guest."""
        self.vm.domain.ssh.put(path, data, COMMAND_TIMEOUT_S, mode=0o600)

    def sha256(self, path: str) -> str:
        """The SHA-256 of a file or device as the guest reads it, past its page cache."""
        return self.run(f"sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum <{path}").split()[0]

    def boot_id(self) -> str:
        """Another one each time that the kernel starts (random(4))."""
        return self.run("cat /proc/sys/kernel/random/boot_id").strip()


def require(condition: object, problem: str) -> None:
    """Raise FeatureError unless something holds."""
    if not condition:
        raise FeatureError(problem)


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for something that nobody tells of; returns whether it came."""
    never = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        never.wait(_POLL_S)
    return True


def random_data(mib: int) -> tuple[bytes, str]:
    """Random bytes, and their SHA-256 in hexadecimal."""
    data = secrets.token_bytes(mib << 20)
    return data, hashlib.sha256(data).hexdigest()


def connect(path: Path, timeout_s: float) -> socket.socket:
    """The host's end of a character device that QEMU listens for."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        connection: socket.socket = self.request
        while data := connection.recv(1 << 16):
            connection.sendall(data)


@contextlib.contextmanager
def echo_server(address: str = LOOPBACK) -> Iterator[int]:
    """A TCP server at an address of the host's that says what it hears; its port."""
    with socketserver.ThreadingTCPServer((address, 0), _Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, name="mktme-echo", daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


Check = Callable[[Subject], str]
"""Checks a row; returns what was found, or raises `FeatureError` or another `MktmeError`."""
