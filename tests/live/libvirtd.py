# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirtd of the tests' own: a host beside this one, as far as libvirt can tell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mktme.vm.images import cache_dir

from .conftest import wait_until

HERE = Path(__file__).parent
# Where tools/setup puts it, if the system has none: it is for these tests alone.
UNPACKED = HERE.parents[1] / "build" / "libvirtd" / "usr" / "sbin" / "libvirtd"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirtd of our own needs root")


@dataclass(frozen=True)
class Libvirtd:
    """A libvirtd that runs.

    Attributes:
        uri: for libvirt to connect to it.
        process: the daemon, alone in its mount namespace but for its QEMUs.
    """

    uri: str
    process: subprocess.Popen[bytes]


@contextmanager
def private_libvirtd(directory: Path, prefix: tuple[str, ...] = ()) -> Iterator[Libvirtd]:
    """Run a libvirtd whose socket is in `directory`, which is made, and gone at the end.

    Args:
        directory: where.
        prefix: further options of unshare(1), and a command to run it.
    """
    program = shutil.which("libvirtd") or str(UNPACKED)
    # Not those of the embedded driver: each forgets what another program has kept.
    capabilities = cache_dir().parent / "libvirtd-capabilities"
    capabilities.mkdir(parents=True, exist_ok=True)
    script = ("sh", str(HERE / "libvirtd.sh"), program, str(directory), str(capabilities))
    directory.mkdir()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", *prefix, *script],
            stdout=log,
            stderr=log,
        )
    socket = directory / "libvirt-sock"
    try:
        wait_until(directory, socket.exists, process)
        yield Libvirtd(f"qemu+unix:///system?socket={socket}", process)
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory)
