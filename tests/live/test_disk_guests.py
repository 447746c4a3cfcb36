# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that boot a disk, when it goes wrong, and a user's own image; as a user runs them."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
from pathlib import Path

import pytest

from mktme.vm.disk_images import ensure_disk

from .conftest import Command

MIB = 1 << 20
HANGS = b"\xfa\xf4".ljust(510, b"\0") + b"\x55\xaa"
"""A boot sector: CLI, HLT."""


@pytest.mark.timeout(900)
@pytest.mark.nightly
def test_image_of_a_user_is_proven_and_never_written(command: Command, tmp_path: Path) -> None:
    cloud_image = tmp_path / "cloud_image.qcow2"  # as clouds publish them
    disk = ensure_disk("debian-12").disk
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(cloud_image)]
    subprocess.run(convert, check=True)
    before = hashlib.sha256(cloud_image.read_bytes()).digest()
    report = command.tmpdir.parent / f"{command.tmpdir.name}.json"
    try:
        code, out, err = command.run(
            *("run", "--image", str(cloud_image), "--memory", "768M", "--track", "pages"),
            *("--no-reference", "--json", str(report)),
        )
        assert code == 0, out + err
        document = json.loads(report.read_text())
    finally:
        report.unlink(missing_ok=True)
    assert document["passed"]
    assert document["environment"]["guest"] == "cloud_image.qcow2"
    assert len(document["guests"][0]["checksums"]) == 5
    assert hashlib.sha256(cloud_image.read_bytes()).digest() == before
    command.assert_nothing_left()


def test_guest_that_never_reaches_ssh(command: Command, tmp_path: Path) -> None:
    image = tmp_path / "hangs.img"
    image.write_bytes(HANGS.ljust(MIB, b"\0"))
    code, _, err = command.run("run", "--image", str(image), "--boot-timeout", "5")
    assert code == 4
    assert "no answer in 5 s" in err
    assert "hint: it must have cloud-init" in err
    command.assert_nothing_left()


def test_port_that_is_taken(command: Command, tmp_path: Path) -> None:
    image = tmp_path / "hangs.img"
    image.write_bytes(HANGS.ljust(MIB, b"\0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = command.run("run", "--image", str(image), "--ssh-port", port)
    assert code == 2
    assert f"port {port} of 127.0.0.1 cannot be had" in err
    command.assert_nothing_left()


def test_images_that_cannot_be_booted(command: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty.img"
    empty.write_bytes(bytes(MIB))
    vmdk = tmp_path / "other.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", str(vmdk), "1M"], check=True)
    backed = tmp_path / "backed.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(empty), "-F", "raw", str(backed)],
        check=True,
    )
    for path, problem in (
        (tmp_path / "none.qcow2", "no such file"),
        (tmp_path, "not a file"),
        (empty, "boot"),
        (vmdk, "vmdk"),
        (backed, str(empty)),
    ):
        code, _, err = command.run("run", "--image", str(path))
        assert code in (2, 3), err
        assert problem in err
        assert "hint:" in err
        assert "Traceback" not in err
    command.assert_nothing_left()
