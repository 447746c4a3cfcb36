# SPDX-License-Identifier: GPL-2.0-or-later
"""The reaper: what a killed harness leaves behind is taken away, and nothing else is."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from mktme.vm.reaper import ENGINE_PID_FILE, kill_leftovers

DEADLINE_S: Final = 20.0

# A harness that has its directory, a QEMU below it if asked, and then waits.
HARNESS: Final = """
import subprocess, sys
from mktme.vm.reaper import process_dir
directory = process_dir()
assert process_dir() is directory
run = directory / "libvirt" / "run" / "qemu"
run.mkdir(parents=True)
(directory / "dram.img").write_bytes(b"x" * 4096)
command = ["/bin/sh", "-c", "echo started; read line", str(directory)]
qemu = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
qemu.stdout.readline()
(run / "alice.pid").write_text(str(qemu.pid))
print(directory, qemu.pid, flush=True)
sys.stdin.readline()
"""


# One that has a directory in common with another host, and then waits, or ends it.
COMMON: Final = """
import sys
from pathlib import Path
from mktme.vm.reaper import common_dir
with common_dir(*map(Path, sys.argv[1:])) as path:
    (path / "memory").write_text("")
    print(path, flush=True)
    sys.stdin.readline()
print(path.exists(), flush=True)
sys.stdin.readline()
"""


# One that is interrupted when its directory has been made, and is nobody's to remove yet.
INTERRUPTED: Final = """
import os, signal, tempfile
from mktme.vm.reaper import process_dir
make = tempfile.mkdtemp
def make_and_interrupt(**options):
    directory = make(**options)
    os.kill(os.getpid(), signal.SIGINT)
    return directory
tempfile.mkdtemp = make_and_interrupt
try:
    process_dir()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_interrupt_while_the_directory_is_made(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        stdin=subprocess.DEVNULL,
        capture_output=True,  # the reaper has its standard error too: until it ends
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=True,
        timeout=DEADLINE_S,
    )
    assert ended.stdout == b"interrupted\n"
    assert list(tmp_path.iterdir()) == []


@contextmanager
def pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def ended(descriptor: int) -> bool:
    """Wait for a process's end."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(DEADLINE_S * 1000))


def running(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return not poller.poll(0)


def child_running(module: str, parent: int) -> int:
    """The child of a process that runs a module."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (found,) = (
        int(child)
        for child in children
        if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return found


class Harness:
    """A harness process, its QEMU and its reaper, by pidfd."""

    def __init__(self, tmpdir: Path, stack: ExitStack) -> None:
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", HARNESS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"TMPDIR": str(tmpdir)},
                start_new_session=True,
            )
        )
        assert self.process.stdout is not None
        directory, qemu = self.process.stdout.readline().split()
        self.directory = Path(directory.decode())
        self.qemu = stack.enter_context(pidfd(int(qemu)))
        self.reaper_pid = child_running("mktme.vm.reaper", self.process.pid)
        self.reaper = stack.enter_context(pidfd(self.reaper_pid))


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with ExitStack() as stack:
        harness = Harness(tmp_path, stack)
        yield harness
        harness.process.kill()
        assert ended(harness.reaper)


def test_directory_is_private(harness: Harness, tmp_path: Path) -> None:
    assert harness.directory.parent == tmp_path
    assert harness.directory.name.startswith("mktme-")
    assert harness.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_of_a_harness_that_is_killed(harness: Harness, number: int) -> None:
    assert running(harness.qemu)
    assert running(harness.reaper)
    assert harness.directory.exists()
    harness.process.send_signal(number)
    assert harness.process.wait(DEADLINE_S) == -number
    assert ended(harness.reaper)
    assert ended(harness.qemu)
    assert not harness.directory.exists()


def test_nothing_is_left_of_a_harness_that_ends(harness: Harness) -> None:
    assert harness.process.stdin is not None
    harness.process.stdin.close()
    assert harness.process.wait(DEADLINE_S) == 0
    # It waits for its reaper, so that nothing is left already now.
    assert not running(harness.reaper)
    assert ended(harness.qemu)
    assert not harness.directory.exists()


def test_ctrl_c_reaches_the_harness_and_not_its_reaper(harness: Harness) -> None:
    assert os.getpgid(harness.reaper_pid) != os.getpgid(harness.process.pid)
    assert os.getsid(harness.reaper_pid) != os.getsid(harness.process.pid)
    os.killpg(harness.process.pid, signal.SIGINT)
    assert harness.process.wait(DEADLINE_S) == -signal.SIGINT
    assert ended(harness.reaper)
    assert ended(harness.qemu)
    assert not harness.directory.exists()


def test_two_harnesses_do_not_disturb_each_other(harness: Harness, tmp_path: Path) -> None:
    with ExitStack() as stack:
        other = Harness(tmp_path, stack)
        other.process.kill()
        assert ended(other.reaper)
        assert ended(other.qemu)
        assert not other.directory.exists()
    assert running(harness.qemu)
    assert running(harness.reaper)
    assert (harness.directory / "dram.img").exists()


def test_harness_that_cannot_start_a_reaper_leaves_no_directory(tmp_path: Path) -> None:
    script = "import sys; sys.executable = '/nonexistent'\n" + HARNESS
    failed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert failed.returncode == 1
    assert b"FileNotFoundError" in failed.stderr
    assert os.listdir(tmp_path) == []


# --- which processes --------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where libvirt's driver notes its QEMUs, below the directory `tmp_path / "mktme-x"`."""
    run_dir = tmp_path / "mktme-x" / "libvirt" / "run" / "qemu"
    run_dir.mkdir(parents=True)
    return run_dir


@contextmanager
def sleeper(argument: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with an argument in its command line."""
    with subprocess.Popen(
        ["/bin/sh", "-c", "echo started; read line", argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as one:
        assert one.stdout is not None
        one.stdout.readline()  # not before then is its command line sure to be there
        yield one
        one.kill()


def test_stranger_with_a_recycled_number_is_spared(run_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mktme-x"
    with sleeper(f"-name alice {directory}/socket") as ours, sleeper("-name bob") as stranger:
        (run_dir / "alice.pid").write_text(f"{ours.pid}\n")
        (run_dir / "bob.pid").write_text(f"{stranger.pid}\n")
        kill_leftovers(directory)
        assert ours.wait(DEADLINE_S) == -signal.SIGKILL
        assert stranger.poll() is None
    assert not directory.exists()


def test_useless_pid_files_are_passed_over(run_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mktme-x"
    for index, content in enumerate([b"", b"alice", b"-1", b"0", b"\xff", b"9" * 30, b"4194305"]):
        (run_dir / f"{index}.pid").write_bytes(content)
    (run_dir / "directory.pid").mkdir()
    with sleeper(str(directory)) as ours:
        (run_dir / "z.pid").write_text(str(ours.pid))
        kill_leftovers(directory)
        assert ours.wait(DEADLINE_S) == -signal.SIGKILL
    assert not directory.exists()


def test_engine_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mktme.vm.reaper._ENGINE_TIMEOUT_S", 0.05)
    directory = tmp_path / "mktme-x"
    pid_file = directory / "run-1" / ENGINE_PID_FILE
    pid_file.parent.mkdir(parents=True)
    with sleeper(f"--run-dir={pid_file.parent}") as engine:
        engine.send_signal(signal.SIGSTOP)
        pid_file.write_text(str(engine.pid))
        kill_leftovers(directory)
        assert engine.wait(DEADLINE_S) == -signal.SIGKILL
    assert not directory.exists()


def test_engine_that_ends_by_itself_has_the_time(tmp_path: Path) -> None:
    directory = tmp_path / "mktme-x"
    pid_file = directory / "run-1" / ENGINE_PID_FILE
    pid_file.parent.mkdir(parents=True)
    with sleeper(f"--run-dir={pid_file.parent}") as engine:
        pid_file.write_text(str(engine.pid))
        # It is in its own time that it ends: after the reaper has come to wait for it.
        timer = threading.Timer(0.2, engine.communicate, [b"a line\n"])
        timer.start()
        kill_leftovers(directory)
        timer.join()
        assert engine.returncode == 0
    assert not directory.exists()


def test_directory_that_is_gone_is_fine(run_dir: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "mktme-x")
    kill_leftovers(tmp_path / "mktme-x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_directory_that_another_host_calls_alike(named: bool, killed: bool, tmp_path: Path) -> None:
    """Private, of the name that was asked for, and gone however its process ends."""
    tmpdir = tmp_path / "tmp"
    tmpdir.mkdir()
    name = tmp_path / "mktme-move-1"
    with subprocess.Popen(
        [sys.executable, "-c", COMMON, *([str(name)] if named else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmpdir)},
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path == name if named else path.parent == tmpdir
        assert path.stat().st_mode & 0o777 == 0o700
        with pidfd(child_running("mktme.vm.reaper", process.pid)) as reaper:
            if killed:
                process.kill()
            else:
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == "False\n"
                process.stdin.write("\n")
                process.stdin.flush()
            assert ended(reaper)
    assert not path.exists()
    assert list(tmpdir.iterdir()) == []


def test_directory_of_another_is_left_to_it(tmp_path: Path) -> None:
    """What two hosts call alike has to be another on each."""
    (tmp_path / "mine").write_text("")
    ended_with = subprocess.run(
        [sys.executable, "-c", COMMON, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert "FileExistsError" in ended_with.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]
