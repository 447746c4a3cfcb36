# SPDX-License-Identifier: GPL-2.0-or-later
"""This process's private directory, and the small process that clears up after it.

libvirt's embedded driver has one root for the life of a process, and leaves its QEMU processes
running when that process is killed. So there is one directory per process, and a reaper that
holds the other end of a pipe: when the pipe ends, however that comes about, it kills each QEMU
that was started below the directory and removes it. An engine ends by itself then, unless it hangs.
It imports nothing heavy.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

LIBVIRT_ROOT: Final = "libvirt"
_KILL_TIMEOUT_S: Final = 10
_PID_FILES: Final = f"{LIBVIRT_ROOT}/run/qemu/*.pid"
ENGINE_PID_FILE: Final = "engine.pid"
"""In the directory of a platform, which is below that of the process."""
_ENGINE_PID_FILES: Final = f"run-*/{ENGINE_PID_FILE}"
_ENGINE_TIMEOUT_S: Final = 5


def process_dir() -> Path:
    """A private directory that is gone, and all QEMUs of it, soon after this process is."""
    return _started()[0]


@contextlib.contextmanager
def common_dir(path: Path | None = None) -> Iterator[Path]:
    """A private directory that has the same path on two hosts; gone soon after this process is.

    Args:
        path: what the other host calls it; None to choose.

    Raises:
        OSError: it cannot be made, or is there already.
    """
    reaper = _started()[1]
    with interrupts_later():
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="mktme-move-"))
        else:
            path.mkdir(mode=0o700)
        assert reaper.stdin is not None
        reaper.stdin.write(os.fsencode(path) + b"\0")
        reaper.stdin.flush()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _started() -> tuple[Path, subprocess.Popen[bytes]]:
    """The process's directory, and its reaper."""
    with interrupts_later():
        # Short, since the paths of UNIX sockets end at 107 bytes.
        directory = Path(tempfile.mkdtemp(prefix="mktme-"))
        try:
            reaper = subprocess.Popen(
                [sys.executable, "-m", "mktme.vm.reaper", str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # neither Ctrl-C nor the terminal's end may reach it
            )
            atexit.register(reaper.communicate)
        except BaseException:
            shutil.rmtree(directory)  # not yet anybody else's to remove
            raise
        return directory, reaper


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Let Ctrl-C in the `with` count at its end, and never for a process that is started in it.

    Between a file that was made and the `try` that would remove it there always is a gap. Python's
    tempfile has one too: it makes a file to see whether its directory will do. And a child is in
    the terminal's foreground group until it has a session of its own; what comes before then would
    end it, so it starts with SIGINT blocked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is the main thread's
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def kill_leftovers(directory: Path) -> None:
    """Kill every QEMU that libvirt started below `directory`, then remove the directory.

    An engine of a platform below it has some seconds to end by itself.
    """
    for pid_file in directory.glob(_PID_FILES):
        _kill(pid_file, directory, patience_s=0)
    for pid_file in directory.glob(_ENGINE_PID_FILES):
        _kill(pid_file, directory, patience_s=_ENGINE_TIMEOUT_S)
    shutil.rmtree(directory, ignore_errors=True)


def _kill(pid_file: Path, directory: Path, patience_s: float) -> None:
    with contextlib.suppress(OSError, ValueError, OverflowError):
        pid = int(pid_file.read_text())
        descriptor = os.pidfd_open(pid)
        try:
            # The number may have passed on to a stranger since the file was written.
            if os.fsencode(directory) not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return
            # Readable once the process is gone.
            if not select.select([descriptor], [], [], patience_s)[0]:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                # It takes a moment with much memory.
                select.select([descriptor], [], [], _KILL_TIMEOUT_S)
        finally:
            os.close(descriptor)


def main() -> None:
    """Wait for the end of the process that started this one, and clear up after it."""
    further = sys.stdin.buffer.read()
    kill_leftovers(Path(sys.argv[1]))
    for path in further.split(b"\0")[:-1]:
        shutil.rmtree(os.fsdecode(path), ignore_errors=True)


if __name__ == "__main__":
    main()
