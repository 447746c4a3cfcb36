# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults and bad input: a clear line, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mktme.cli import ExitCode
from mktme.proof.transparency import compare_memory
from mktme.pytest_plugin import vm_config
from mktme.vm.console import VmError, VmLostError
from mktme.vm.host import QEMU_MIN, Host
from mktme.vm.platform import Platform

from .conftest import Command

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB = 1 << 20
SMALL = ("run", "--memory", "256M", "--no-reference")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def test_any_number_of_platforms_in_one_process() -> None:
    """libvirt has room for 21 registered drivers, and each opening of an embedded one takes one."""
    for _ in range(25):
        with Host() as host:
            assert host.qemu_version >= QEMU_MIN


def test_engine_killed() -> None:
    with ExitStack() as stack:
        platform = stack.enter_context(Platform(dram_bytes=256 * MIB))
        vm = stack.enter_context(platform.launch(vm_config(memory="256M")))
        pid = vm.status().qemu_pid
        assert pid is not None
        qemu = os.pidfd_open(pid)
        stack.callback(os.close, qemu)
        os.kill(platform.engine_pid, signal.SIGKILL)
        # The descriptor of a process polls readable when it has ended, and not before.
        assert select.select([qemu], [], [], 20)[0]
        with pytest.raises(VmLostError, match="engine is gone"), vm.domain.explained():
            vm.domain.console.run("true", timeout_s=20)


def test_plugin_that_the_engine_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU ends before the guest's first instruction, and the reason reaches the user."""
    with ExitStack() as stack:
        platform = stack.enter_context(Platform(dram_bytes=256 * MIB))
        argument = platform._plugin_argument
        monkeypatch.setattr(
            platform,
            "_plugin_argument",
            lambda _vm, config: argument(uuid.uuid4(), config),
        )
        with pytest.raises(VmError, match=r"no VM .* was announced"):
            stack.enter_context(platform.launch(vm_config(memory="256M")))
        assert platform.engine.status().vms == ()


@pytest.mark.parametrize("victim", ["mktme.service", "qemu-system-x86_64"])
def test_command_whose_process_is_killed(command: Command, victim: str) -> None:
    process = command.start(*SMALL)
    command.wait_for_step(process, "working")
    (pid,) = command.processes(victim)
    os.kill(pid, signal.SIGKILL)
    status, _out, err = command.finish(process)
    assert status == ExitCode.RUN_FAILED, err
    assert "Traceback" not in err
    if victim == "mktme.service":
        assert "the engine is gone" in err
    command.assert_nothing_left()


@pytest.mark.parametrize(
    ("moment", "more"),
    [
        ("starting", ("--guests", "2")),
        ("booting", ("--guests", "2")),
        ("working", ("--guests", "2", "--no-reference")),
        ("comparing", ("--no-reference",)),
    ],
)
def test_interrupt_at_any_moment(command: Command, moment: str, more: tuple[str, ...]) -> None:
    process = command.start("run", "--memory", "256M", *more)
    command.wait_for_step(process, moment)
    os.killpg(process.pid, signal.SIGINT)
    status, _out, err = command.finish(process)
    assert status == ExitCode.INTERRUPTED, err
    assert "interrupted" in err
    assert "Traceback" not in err
    command.assert_nothing_left()


@pytest.mark.parametrize(
    "reference",
    [False, pytest.param(True, marks=pytest.mark.nightly)],
    ids=["encrypted", "plain"],
)
def test_kill_of_the_harness_itself(command: Command, reference: bool) -> None:
    """Not even kill -9 leaves a QEMU, be it an encrypted one or a plain one without an engine."""
    process = command.start("run", "--memory", "256M")
    command.wait_for_step(process, "plain: booting" if reference else "working")
    process.kill()
    command.finish(process)
    command.assert_nothing_left()


@pytest.mark.nightly
def test_two_runs_at_once(command: Command) -> None:
    reports = [command.tmpdir / f"{number}.json" for number in range(2)]
    processes = [command.start(*SMALL, "--json", str(report)) for report in reports]
    for process in processes:
        status, _out, err = command.finish(process)
        assert status == ExitCode.OK, err
    for report in reports:
        assert json.loads(report.read_text())["passed"] is True
        report.unlink()
    command.assert_nothing_left()


@needs_root
def test_no_permission_for_userfaultfd(command: Command) -> None:
    """In a mount namespace where the device is another one, and under a filter of system calls."""
    hide = 'mount --bind /dev/null /dev/userfaultfd && exec "$@"'
    forbid = (sys.executable, str(Path(__file__).with_name("without_userfaultfd.py")))
    prefix = ("unshare", "--mount", "sh", "-c", hide, "sh", *forbid)
    status, _out, err = command.run(*SMALL, prefix=prefix)
    assert status == ExitCode.ENVIRONMENT, err
    assert "no permission for userfaultfd" in err
    assert "hint: " in err
    assert "Traceback" not in err
    command.assert_nothing_left()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--guest", "tinny"), ExitCode.USAGE, "unknown guest 'tinny'"),
        (("--track", "loads"), ExitCode.USAGE, "loads"),
        (("--memory", "300000000"), ExitCode.USAGE, "whole pages"),
        (("--memory", "lots"), ExitCode.USAGE, "not a size"),
        (("--memory", "64M"), ExitCode.USAGE, "too little"),
        (("--memory", "8000G"), ExitCode.ENVIRONMENT, "does not fit"),
        (("--key-file", "/nonexistent"), ExitCode.USAGE, "/nonexistent"),
        (("--connect", "qemu+ssh://elsewhere/system"), ExitCode.USAGE, "another machine"),
        (("--connect", "qemu:///nonsense"), ExitCode.ENVIRONMENT, "libvirt"),
        (("--dram", "/proc/dram.img"), ExitCode.ENVIRONMENT, "/proc"),
        (("--json", "/nonexistent/out.json"), ExitCode.USAGE, "/nonexistent"),
    ],
)
def test_bad_input(
    command: Command, arguments: tuple[str, ...], status: ExitCode, said: str
) -> None:
    found, _out, err = command.run("run", *arguments)
    assert found == status, err
    assert said in err
    assert "Traceback" not in err
    command.assert_nothing_left()


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs too small for a guest's memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@needs_root
def test_full_dram_pauses_the_guest_and_loses_nothing(
    small_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The check for space before the run would refuse this; the case is space that others took.
    monkeypatch.setattr("mktme.vm.platform.require_disk", lambda _directory, needed: needed)
    dram = small_file_system / "dram.img"
    with (
        Platform(dram_bytes=256 * MIB, dram=dram) as platform,
        platform.launch(vm_config(memory="256M"), boot=False) as vm,
    ):
        vm.domain.resume()  # a boot alone writes more than 40 MiB
        assert platform.wait_for(lambda: vm.domain.trouble is not None, 60)
        assert vm.domain.is_paused
        with pytest.raises(VmError, match="cannot write"):
            platform.check(vm)
        before = vm.status().traffic
        assert before is not None
        assert before.pending_pages > 0
        more = ["mount", "-o", "remount,size=400m", str(small_file_system)]
        subprocess.run(more, check=True)
        assert platform.wait_for(lambda: vm.domain.trouble is None, 60)
        vm.domain.console.wait_ready(60)
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed
