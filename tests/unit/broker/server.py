# SPDX-License-Identifier: GPL-2.0-or-later
"""A broker as its administrator starts it: processes, TLS, sockets."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from mktme.attest.claims import Evidence
from mktme.attest.identity import Identity
from mktme.broker.client import BrokerClient
from mktme.broker.directory import BrokerDirectory

from ..attest.signing import VM, Platform

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30


def platform_now() -> Platform:
    """A platform whose identity is good at this moment."""
    return Platform(identity=Identity.create())


def evidence_now(platform: Platform, nonce: bytes) -> Evidence:
    return platform.evidence(nonce=nonce, issued_at=int(time.time()))


@dataclass
class Server:
    """One that runs.

    Attributes:
        log: what it wrote to its standard error so far.
    """

    directory: BrokerDirectory
    process: subprocess.Popen[str]
    url: str = ""
    metrics: str = ""
    log: list[str] = field(default_factory=list)
    _reader: threading.Thread | None = None

    def client(self) -> BrokerClient:
        return BrokerClient(self.url, self.directory.ca)

    def attest(
        self, client: BrokerClient, platform: Platform, policy: str = "alice/strict", vm: UUID = VM
    ) -> str:
        return client.attest(
            vm, lambda nonce: platform.sign(evidence_now(platform, nonce)), policy=policy
        )

    def processes(self) -> dict[int, str]:
        """Processes that the broker started, and their arguments."""
        listed = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        lines = (line.split(None, 1) for line in listed.splitlines())
        return {int(pid): arguments for pid, arguments in lines}

    def workers(self) -> set[int]:
        """Processes that answer."""
        return {pid for pid, arguments in self.processes().items() if "spawn_main" in arguments}

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tell it to stop; returns its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(STOP_TIMEOUT_S)
        if self._reader is not None:
            self._reader.join(STOP_TIMEOUT_S)
        return status

    def _read(self, started: threading.Event) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.match(r"serving (https?)://(\S+)", line):
                if found[1] == "https":
                    self.url = f"https://{found[2]}"
                else:
                    self.metrics = f"http://{found[2]}"
                if self.url:
                    started.set()
        started.set()


@contextlib.contextmanager
def outlived(pids: Iterable[int]) -> Iterator[None]:
    """Processes end, with nobody waiting for them, before the body has ended or soon after it."""
    with contextlib.ExitStack() as opened:
        watched = {pid: os.pidfd_open(pid) for pid in pids}
        assert watched
        for descriptor in watched.values():
            opened.callback(os.close, descriptor)
        yield
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for pid, descriptor in watched.items():
            left_s = max(0.0, deadline - time.monotonic())
            assert select.select([descriptor], [], [], left_s)[0], f"process {pid} is left"


@contextlib.contextmanager
def serving(directory: Path, *options: str) -> Iterator[Server]:
    """Start a broker on ports that are free; at the end it is stopped, and nothing of it is left.

    Args:
        directory: the broker's.
        options: of ``mktme broker serve``.
    """
    command = [sys.executable, "-m", "mktme.broker", "serve", str(directory)]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    server = Server(BrokerDirectory(directory), process)
    started = threading.Event()
    server._reader = threading.Thread(target=server._read, args=(started,))
    server._reader.start()
    try:
        assert started.wait(START_TIMEOUT_S), "it does not start"
        assert server.url, "".join(server.log)
        yield server
    finally:
        if process.poll() is None:
            server.stop()
        assert process.stderr is not None
        process.stderr.close()
