# SPDX-License-Identifier: GPL-2.0-or-later
"""`--connect`: a libvirtd in place of the embedded driver."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from mktme.cli import ExitCode

from .conftest import Command, wait_until

HERE = Path(__file__).parent
# Where tools/setup puts it, if the system has none: it is for these tests alone.
UNPACKED = HERE.parents[1] / "build" / "libvirtd" / "usr" / "sbin" / "libvirtd"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirtd of our own needs root")


@pytest.fixture
def libvirtd(command: Command) -> Iterator[str]:
    """A private libvirtd; yields its URI."""
    program = shutil.which("libvirtd") or str(UNPACKED)
    directory = command.tmpdir / "libvirtd"
    directory.mkdir()
    with (command.tmpdir / "libvirtd.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", str(HERE / "libvirtd.sh"), program, str(directory)],
            stdout=log,
            stderr=log,
        )
    socket = directory / "libvirt-sock"
    try:
        wait_until(directory, socket.exists, process)
        yield f"qemu+unix:///system?socket={socket}"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory)
        (command.tmpdir / "libvirtd.log").unlink()


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
    """libvirtd itself takes down the domains of a client that is gone (AUTODESTROY)."""
    process = command.start("run", "--memory", "256M", "--no-reference", "--connect", libvirtd)
    command.wait_for_step(process, "working")
    (qemu,) = command.processes("qemu-system-x86_64")
    descriptor = os.pidfd_open(qemu)
    process.kill()
    command.finish(process)
    command.wait_ended(descriptor)
    connection = libvirt.open(libvirtd)
    assert connection.listAllDomains() == []
    connection.close()
