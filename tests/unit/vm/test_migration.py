# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of a migration before libvirt has a part in it, and what is made of its answers."""

from __future__ import annotations

import dataclasses
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
from mktme.vm.arrival import MigrationError, Side, check_sides, place_of
from mktme.vm.config import VmConfig
from mktme.vm.console import VmLostError
from mktme.vm.domain import Domain
from mktme.vm.domain_xml import domain_xml
from mktme.vm.host import Host
from mktme.vm.migration import Migration, destination_xml
from mktme.vm.platform import Platform, Vm

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
