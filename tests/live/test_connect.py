# SPDX-License-Identifier: GPL-2.0-or-later
"""`--connect`: a libvirtd in place of the embedded driver."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from mktme.cli import ExitCode
from mktme.proof.transparency import compare_memory
from mktme.pytest_plugin import vm_config
from mktme.vm.console import VmError, VmLostError
from mktme.vm.host import Host
from mktme.vm.platform import Platform, Vm

from .conftest import Command
from .libvirtd import needs_root, private_libvirtd

pytestmark = [needs_root, pytest.mark.usefixtures("quick_boots")]


MIB = 1 << 20


@pytest.fixture
def full_disk(command: Command) -> Iterator[Path]:
    """A directory with room for 16 MiB; a libvirtd that starts later has it as well."""
    directory = command.tmpdir / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture
def libvirtd(command: Command) -> Iterator[str]:
    """A private libvirtd; yields its URI."""
    with private_libvirtd(command.tmpdir / "libvirtd") as running:
        yield running.uri


def test_run_under_a_libvirtd(command: Command, libvirtd: str) -> None:
    status, out, err = command.run(
        "run", "--memory", "256M", "--no-reference", "--connect", libvirtd
    )
    assert status == ExitCode.OK, err
    assert "passed: 2 of 2 checks" in out
    connection = libvirt.open(libvirtd)
    assert connection.listAllDomains() == []
    connection.close()


def test_killed_harness_leaves_no_domain(command: Command, libvirtd: str) -> None:
    """The engine ends with its owner, and the plugin has its QEMU end with the engine."""
    ended = threading.Event()

    def note(_connection: object, _domain: object, event: int, *_detail: object) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            ended.set()

    with Host(libvirtd) as host:
        lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        host.connection.domainEventRegisterAny(None, lifecycle, note, None)
        process = command.start("run", "--memory", "256M", "--no-reference", "--connect", libvirtd)
        command.wait_for_step(process, "working")
        (qemu,) = command.processes("qemu-system-x86_64")
        descriptor = os.pidfd_open(qemu)
        process.kill()
        command.finish(process)
        command.wait_ended(descriptor)
        assert ended.wait(20)
        assert host.connection.listAllDomains() == []


@pytest.mark.parametrize("datapath", ["shadow", "inline"])
def test_guest_is_saved_and_goes_on(
    datapath: str, full_disk: Path, libvirtd: str, tmp_path: Path
) -> None:
    """And on a disk that is full it is not saved, and goes on as well."""
    window = "48M" if datapath == "inline" else None
    config = vm_config(memory="256M", datapath=datapath, window=window)
    with Platform(256 * MIB, connect=libvirtd) as platform, platform.launch(config) as vm:
        console = vm.domain.console
        console.run("head -c 4000000 /dev/urandom >/tmp/some", timeout_s=60)
        expected = sum_of_some(vm)
        with pytest.raises(VmError, match=r"was not saved: .*No space left") as caught:
            vm.domain.save(full_disk / "state")
        assert not isinstance(caught.value, VmLostError)
        assert list(full_disk.iterdir()) == []
        check(vm, expected)

        qemu = vm.status().qemu_pid
        vm.domain.save(tmp_path / "state")
        platform.restore(vm, tmp_path / "state")
        assert vm.status().qemu_pid not in (qemu, None)
        check(vm, expected)
    connection = libvirt.open(libvirtd)
    assert connection.listAllDomains() == []
    connection.close()


def sum_of_some(vm: Vm) -> str:
    return vm.domain.console.run("sha256sum /tmp/some", timeout_s=60).output


def check(vm: Vm, expected: str) -> None:
    """It runs, has what it had, and DRAM has it too."""
    assert not vm.domain.is_paused
    assert sum_of_some(vm) == expected
    with vm.held() as engine:
        assert compare_memory(vm, engine).passed
