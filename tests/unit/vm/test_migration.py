# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of a migration before libvirt has a part in it, and what is made of its answers."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import uuid
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import libvirt
import pytest

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.service.client import EngineClient
from mktme.vm.arrival import MigrationError, Side, check_sides, place_of, taken_over
from mktme.vm.config import VmConfig
from mktme.vm.console import VmLostError
from mktme.vm.disk_images import DiskImage
from mktme.vm.domain import Domain
from mktme.vm.domain_xml import DiskBoot, domain_xml
from mktme.vm.hardware import Firmware, Hardware
from mktme.vm.host import Host
from mktme.vm.migration import Migration, destination_xml
from mktme.vm.platform import Platform, Vm
from mktme.vm.ssh import Access, LoginKey

from .test_domain_xml import IMAGE, QEMU, SPEC

HERE = Side("qemu+unix:///system?socket=/a", "host-a", (10, 0, 2), "0.1.0", 1)
THERE = dataclasses.replace(HERE, uri="qemu+unix:///system?socket=/b", host="host-b")


@pytest.mark.parametrize("qemu_version", [(10, 0, 2), (10, 0, 3), (11, 1, 2)])
def test_platforms_that_fit_together(qemu_version: tuple[int, int, int]) -> None:
    check_sides(HERE, dataclasses.replace(THERE, qemu_version=qemu_version))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (dataclasses.replace(THERE, host="host-a"), "are one host to libvirt"),
        (dataclasses.replace(THERE, qemu_version=(10, 0, 1)), r"has QEMU 10\.0\.1, and guests of"),
        (
            dataclasses.replace(THERE, mktme_version="0.2.0"),
            r"has mktme 0\.2\.0, the one here 0\.1\.0",
        ),
        (
            dataclasses.replace(THERE, link_version=2),
            "has link protocol 2, the one here 1",
        ),
    ],
)
def test_platforms_that_do_not(there: Side, message: str) -> None:
    with pytest.raises(MigrationError, match=message):
        check_sides(HERE, there)


def test_xml_at_the_destination_differs_in_what_is_the_hosts() -> None:
    source = ET.fromstring(domain_xml(SPEC))
    devices = source.find("devices")
    assert devices is not None
    console = ET.SubElement(devices, "console", type="unix")  # as libvirt adds it
    ET.SubElement(console, "source", mode="bind", path="/run/console")
    image = dataclasses.replace(IMAGE, kernel=Path("/there/vmlinuz"), initrd=Path("/there/initrd"))
    spec = dataclasses.replace(
        SPEC,
        image=image,
        console_socket=Path("/there/console"),
        emulator=Path("/there/qemu"),
        plugin="/there/plugin.so,socket=/there/link.sock",
    )
    there = place_of(spec)
    moved = ET.fromstring(
        destination_xml(ET.tostring(source, encoding="unicode"), place_of(SPEC), there)
    )
    paths = [one.get("path") for one in moved.iterfind("devices//source")]
    assert paths == ["/there/console", "/there/console"]
    assert moved.findtext("devices/emulator") == "/there/qemu"
    assert moved.findtext("os/kernel") == "/there/vmlinuz"
    assert moved.findtext("os/initrd") == "/there/initrd"
    values = [one.get("value") for one in moved.iterfind(f"{QEMU}commandline/{QEMU}arg")]
    assert values[-2:] == ["-plugin", there.plugin]
    for tree in (source, moved):
        for path in ("devices", "os", f"{QEMU}commandline"):
            (part,) = tree.findall(path)
            tree.remove(part)
    assert ET.tostring(moved) == ET.tostring(source)


def booted_from(directory: Path, *files: str) -> DiskBoot:
    for name in files:
        (directory / name).write_text(name)
    disk, seed, nvram = (directory / name for name in ("disk.qcow2", "seed.img", "nvram.fd"))
    return DiskBoot(disk, seed, nvram, Access(2222, "mktme", LoginKey(), "secret"))


@pytest.mark.parametrize("firmware", [Firmware.BIOS, Firmware.UEFI])
def test_disk_that_goes_along(firmware: Firmware, tmp_path: Path) -> None:
    """Both platforms have the files until one removes them; their names are in the XML."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    files = ["disk.qcow2", "seed.img", *(["nvram.fd"] if firmware is Firmware.UEFI else [])]
    before = booted_from(here, *files)
    after = taken_over(before, there, 3333)
    assert sorted(one.name for one in there.iterdir()) == sorted(files)
    assert all((there / name).samefile(here / name) for name in files)
    shutil.rmtree(here)
    assert after.disk.read_text() == "disk.qcow2"
    assert after.access == dataclasses.replace(before.access, port=3333)

    image = DiskImage("debian-12", Path("/images/disk"), "raw", None)
    spec = dataclasses.replace(SPEC, image=image, boot=before, hardware=Hardware(firmware=firmware))
    place = place_of(dataclasses.replace(spec, boot=after))
    moved = destination_xml(domain_xml(spec), place_of(spec), place)
    assert moved == domain_xml(dataclasses.replace(spec, boot=after))
    assert str(here) not in moved
    assert "hostfwd=tcp:127.0.0.1:3333-:22" in moved


def test_disk_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_paths: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(MigrationError, match="Invalid cross-device link") as caught:
        taken_over(booted_from(tmp_path, "disk.qcow2"), tmp_path, 3333)
    assert "on one file system" in str(caught.value.hint)


CONFIG = VmConfig(IMAGE)


def leaving(config: VmConfig = CONFIG, *, active: bool = True) -> Vm:
    domain = SimpleNamespace(label="alice", is_active=active, reason=lambda text: text)
    return Vm(uuid.uuid4(), config, cast("Domain", domain), cast("EngineClient", None))


def embedded() -> Platform:
    one = Platform(1 << 30)
    one.host = cast("Host", SimpleNamespace(embedded=True))
    return one


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(CONFIG, memory_bytes=1 << 30), "keeps its image, memory, vCPUs"),
        (dataclasses.replace(CONFIG, vcpus=2), "keeps its image, memory, vCPUs"),
        (dataclasses.replace(CONFIG, track=None), "an engine on both sides, or on neither"),
        (
            dataclasses.replace(CONFIG, datapath=DataPath.INLINE, track=Track.STORES),
            "embedded driver migrates no guests",
        ),
    ],
)
def test_what_a_guest_is_stays(config: VmConfig, message: str) -> None:
    with pytest.raises(MigrationError, match=f"alice did not move: .*{message}"):
        Migration(leaving(), embedded(), embedded(), config=config).__enter__()


def test_guest_that_is_gone_did_not_stay() -> None:
    one = embedded()
    with pytest.raises(VmLostError, match="alice was lost: source and destination"):
        Migration(leaving(active=False), one, one).__enter__()


def test_qemu_that_libvirt_cannot_migrate() -> None:
    migration = Migration(leaving(), embedded(), embedded())
    said = (
        "internal error: unable to execute QEMU command 'migrate': Parameter 'detach' is unexpected"
    )
    with pytest.raises(MigrationError) as caught, migration._stays_unless_moved():
        raise libvirt.libvirtError(said)
    assert "cannot migrate this QEMU" in str(caught.value.hint)
