# SPDX-License-Identifier: GPL-2.0-or-later
"""`--connect`: a libvirtd in place of the embedded driver."""

from __future__ import annotations

import os
from collections.abc import Iterator

import libvirt
import pytest

from mktme.cli import ExitCode

from .conftest import Command
from .libvirtd import needs_root, private_libvirtd

pytestmark = needs_root


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
