# SPDX-License-Identifier: GPL-2.0-or-later
"""What the live tests share: the command as a user runs it, and whether it left anything."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from mktme.vm.host import QEMU11, EnvironmentUnfitError, emulator_path
from mktme.vm.images import ensure

from .quick_boots import quick_cache

COMMAND_TIMEOUT_S = 240
IN_CREATE = 0x100  # linux/inotify.h

_CACHE_HOME: Final = os.environ.get("XDG_CACHE_HOME")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.live)
            item.add_marker(pytest.mark.timeout(COMMAND_TIMEOUT_S + 60))


@dataclass
class Command:
    """Runs of `mktme` in a temporary directory of their own, and nothing else in it."""

    tmpdir: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    timeout_s: float = COMMAND_TIMEOUT_S

    def start(self, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "mktme.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C reaches a whole process group: this one's, not that of the tests.
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(self.tmpdir), "COLUMNS": "200"},
        )
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=self.timeout_s)
        return process.returncode, out, err

    def run(self, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, str, str]:
        return self.finish(self.start(*arguments, prefix=prefix))

    def wait_for_step(self, process: subprocess.Popen[str], text: str) -> None:
        """Read the command's progress until it shows a step: an event to act upon."""
        assert process.stderr is not None
        seen = ""
        while text not in seen:
            more = os.read(process.stderr.fileno(), 4096)
            assert more, f"the command ended before {text!r}: {seen}"
            seen += more.decode(errors="replace")

    @staticmethod
    def wait_ended(descriptor: int, timeout_s: float = 20) -> None:
        """Wait for the end of a process (pidfd_open(2)), and close its descriptor."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        try:
            assert poll.poll(timeout_s * 1000), "a process did not end"
        finally:
            os.close(descriptor)

    def processes(self, what: str = "") -> list[int]:
        """Processes that have this run's directory in their command line, and `what`."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                if os.fsencode(self.tmpdir) in line and what.encode() in line:
                    found.append(int(directory.name))
        return found

    def assert_nothing_left(self) -> None:
        """No process, no socket, no file: what holds a descriptor would be a process."""
        for pid in self.processes():
            # When the command was killed, the reaper and the engine may still be at it, and what
            # they ended still be ending: wait for that, an event.
            with contextlib.suppress(ProcessLookupError):
                self.wait_ended(os.pidfd_open(pid))
        assert self.processes() == []
        assert list(self.tmpdir.iterdir()) == []


def wait_until(
    directory: Path, condition: Callable[[], bool], process: subprocess.Popen[bytes]
) -> None:
    """Wait for a change in `directory` (inotify(7)) that makes `condition` true."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_CLOEXEC)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    end = os.pidfd_open(process.pid)
    poll.register(end, select.POLLIN)
    deadline = time.monotonic() + 60
    try:
        assert libc.inotify_add_watch(descriptor, os.fsencode(directory), IN_CREATE) >= 0
        while not condition():
            assert poll.poll(max(0.0, deadline - time.monotonic()) * 1000), "nothing came in time"
            assert process.poll() is None, "the process ended"
            os.read(descriptor, 4096)
    finally:
        os.close(end)
        os.close(descriptor)


@pytest.fixture(params=[None, pytest.param(QEMU11, marks=pytest.mark.nightly)], ids=["", QEMU11])
def emulator(request: pytest.FixtureRequest) -> Path | None:
    """This machine's own QEMU, then QEMU 11; CI has no excuse not to have it."""
    if request.param is None:
        return None
    try:
        return emulator_path(request.param)
    except EnvironmentUnfitError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; {error.hint}")


@pytest.fixture(scope="session")
def _quick_cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mktme-quick-") as directory:
        quick_cache(Path(directory), ensure("tiny"))
        yield Path(directory)


@pytest.fixture(scope="module")
def quick_boots(_quick_cache: Path) -> Iterator[None]:
    """Within this module `tiny` boots with its kernel unpacked, the command's guests as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(_quick_cache))
        yield


@pytest.fixture
def packaged_kernel(quick_boots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for this test: QEMU loads the kernel as packaged, and what it loads is much less."""
    if _CACHE_HOME is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", _CACHE_HOME)


@pytest.fixture
def command() -> Iterator[Command]:
    # Not tmp_path: the paths of UNIX sockets are short.
    directory = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    one = Command(directory)
    try:
        yield one
    finally:
        for process in one.started:
            if process.poll() is None:
                process.kill()
                process.communicate()
        for pid in one.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)
