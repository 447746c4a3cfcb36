# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's libvirt domain, and what QEMU's memory map says of its RAM."""

from __future__ import annotations

import dataclasses
import json
import uuid
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mktme.engine.sidecar import GuestSegment
from mktme.vm.bypass import BypassError, refuse_bypasses
from mktme.vm.console import VmError
from mktme.vm.domain import Domain
from mktme.vm.domain_xml import DomainSpec, domain_xml
from mktme.vm.guest_map import guest_ram_ranges, modules_of, ram_below_4g
from mktme.vm.host import Host
from mktme.vm.images import GuestImage, Manifest, Package
from mktme.vm.snapshots import Snapshots

MIB, GIB = 1 << 20, 1 << 30
QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"

PACKAGE = Package("linux-image-amd64", "6.1", "0" * 64, "./boot/vmlinuz", "0" * 64)
IMAGE = GuestImage(
    name="tiny",
    kernel=Path("/images/vmlinuz"),
    initrd=Path("/images/initrd"),
    cmdline="console=ttyS0 quiet",
    manifest=Manifest("tiny", "bookworm", "console=ttyS0", PACKAGE, (PACKAGE,)),
)
SPEC = DomainSpec(
    name="mktme-alice-6f3d4b9e",
    uuid=uuid.UUID("6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11"),
    image=IMAGE,
    memory_bytes=512 * MIB,
    vcpus=2,
    console_socket=Path("/run/console"),
    emulator=Path("/usr/bin/qemu-system-x86_64"),
    plugin="/plugin.so,socket=/run/link.sock",
)


def parsed(spec: DomainSpec = SPEC) -> ET.Element:
    return ET.fromstring(domain_xml(spec))


def text(domain: ET.Element, path: str) -> str | None:
    (element,) = domain.findall(path)
    return element.text


def attributes(domain: ET.Element, path: str) -> dict[str, str]:
    (element,) = domain.findall(path)
    return element.attrib


def test_domain_is_what_was_asked_for() -> None:
    domain = parsed()
    assert domain.tag == "domain"
    assert domain.attrib == {"type": "qemu"}
    assert text(domain, "name") == "mktme-alice-6f3d4b9e"
    assert text(domain, "uuid") == "6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11"
    assert text(domain, "memory") == str(512 * MIB)
    assert attributes(domain, "memory") == {"unit": "b"}
    assert text(domain, "vcpu") == "2"
    assert text(domain, "os/type") == "hvm"
    assert attributes(domain, "os/type") == {"arch": "x86_64", "machine": "q35"}
    assert text(domain, "os/kernel") == "/images/vmlinuz"
    assert text(domain, "os/initrd") == "/images/initrd"
    assert text(domain, "os/cmdline") == "console=ttyS0 quiet"
    assert text(domain, "devices/emulator") == "/usr/bin/qemu-system-x86_64"


def test_memory_is_a_memfd_that_the_engine_can_share() -> None:
    domain = parsed()
    assert attributes(domain, "memoryBacking/source") == {"type": "memfd"}
    assert attributes(domain, "memoryBacking/access") == {"mode": "shared"}


def test_console_is_a_socket_that_qemu_listens_on() -> None:
    domain = parsed()
    assert attributes(domain, "devices/serial") == {"type": "unix"}
    assert attributes(domain, "devices/serial/source") == {"mode": "bind", "path": "/run/console"}


def test_free_pages_are_reported() -> None:
    assert attributes(parsed(), "devices/memballoon") == {
        "model": "virtio",
        "freePageReporting": "on",
    }


def test_disk_is_a_raw_file_with_the_hosts_cache() -> None:
    """Any cache= that bypasses the host's would pin guest pages."""
    assert parsed().find("devices/disk") is None
    domain = parsed(dataclasses.replace(SPEC, disk=Path("/disks/one.img")))
    assert attributes(domain, "devices/disk/driver") == {"name": "qemu", "type": "raw"}
    assert attributes(domain, "devices/disk/source") == {"file": "/disks/one.img"}
    assert attributes(domain, "devices/disk/target") == {"dev": "vda", "bus": "virtio"}


def test_crash_and_power_off_end_the_domain() -> None:
    domain = parsed()
    assert text(domain, "on_poweroff") == text(domain, "on_crash") == "destroy"


def test_plugin_is_one_argument() -> None:
    arguments = parsed().findall(f"{QEMU}commandline/{QEMU}arg")
    assert [one.attrib["value"] for one in arguments][2:] == [
        "-plugin",
        "/plugin.so,socket=/run/link.sock",
    ]
    # libvirt knows the element by this prefix alone.
    assert "<qemu:commandline>" in domain_xml(SPEC)


@pytest.mark.parametrize("inline", [False, True])
def test_our_own_guests_bypass_no_data_path(inline: bool) -> None:
    refuse_bypasses(domain_xml(SPEC), inline=inline)
    # The control: what the user adds to it may.
    locked = domain_xml(SPEC).replace("<memoryBacking>", "<memoryBacking><hugepages/>")
    with pytest.raises(BypassError):
        refuse_bypasses(locked, inline=True)


@pytest.mark.parametrize("plugin", [SPEC.plugin, None])
def test_every_guest_has_the_same_intel_processor(plugin: str | None) -> None:
    """What a guest computes is compared with a plain one, which has nothing else of QEMU's own."""
    arguments = parsed(dataclasses.replace(SPEC, plugin=plugin)).findall(f"{QEMU}commandline/*")
    values = [one.attrib["value"] for one in arguments]
    assert values[0] == "-cpu"
    assert "vendor=GenuineIntel" in values[1]
    assert len(values) == (2 if plugin is None else 4)


def test_processor_that_shows_tme_has_its_leaves() -> None:
    arguments = parsed(dataclasses.replace(SPEC, visible=True)).findall(f"{QEMU}commandline/*")
    plain = parsed().findall(f"{QEMU}commandline/*")
    values, usual = ([one.attrib["value"] for one in some] for some in (arguments, plain))
    assert values[1] == f"{usual[1]},min-level=27"  # 1BH
    assert values[2:] == usual[2:]


@pytest.mark.parametrize("nasty", ["a<b>&c", "]]>", "'\"", "</name><evil/>", "&amp;", "häß"])
def test_what_xml_would_read_as_its_own_comes_through(nasty: str) -> None:
    spec = dataclasses.replace(
        SPEC,
        name=nasty,
        image=dataclasses.replace(IMAGE, cmdline=nasty, kernel=Path(f"/{nasty}")),
        console_socket=Path(f"/{nasty}"),
        plugin=nasty,
    )
    domain = parsed(spec)
    assert text(domain, "name") == nasty
    assert text(domain, "os/cmdline") == nasty
    assert text(domain, "os/kernel") == str(Path(f"/{nasty}"))
    assert attributes(domain, "devices/serial/source")["path"] == str(Path(f"/{nasty}"))
    assert domain.findall(f"{QEMU}commandline/{QEMU}arg")[3].attrib["value"] == nasty
    assert {one.tag for one in domain} == {one.tag for one in parsed()}


# --- RAM around the PCI hole ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory_bytes", "below"),
    [
        (128 * MIB, 128 * MIB),
        (2 * GIB, 2 * GIB),
        (2816 * MIB - 4096, 2816 * MIB - 4096),
        (2816 * MIB, 2 * GIB),  # 0xb0000000: hw/i386/pc_q35.c, pc_q35_init
        (3 * GIB, 2 * GIB),
        (4 * GIB, 2 * GIB),
        (64 * GIB, 2 * GIB),
    ],
)
def test_ram_below_the_hole(memory_bytes: int, below: int) -> None:
    assert ram_below_4g(memory_bytes) == below


# As QEMU 10.0.2 prints it for -M q35 -m 4G before the first instruction (I/O ports left out).
MTREE_4G = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-000000007fffffff (prio 0, ram): pc.ram @0000000000100000

FlatView #2
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-000000007fffffff (prio 0, ram): pc.ram @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000017fffffff (prio 0, ram): pc.ram @0000000080000000

FlatView #3
 AS "mch", root: bus master container
 Root memory region: (none)
  No rendered FlatView

"""
SEGMENTS_4G = (
    GuestSegment(guest_physical=0, ram_offset=0, size_bytes=2 * GIB),
    GuestSegment(guest_physical=4 * GIB, ram_offset=2 * GIB, size_bytes=2 * GIB),
)


def test_ram_in_qemus_memory_tree() -> None:
    expected = [
        (0, 0xC0000, 0),
        (0x100000, 0x8000_0000, 0x100000),
        (4 * GIB, 6 * GIB, 2 * GIB),
    ]
    assert guest_ram_ranges(MTREE_4G) == expected
    # The monitor's lines end as a terminal's.
    assert guest_ram_ranges(MTREE_4G.replace("\n", "\r\n")) == expected


def test_modules_in_qemus_memory_tree_are_behind_all_ram() -> None:
    modules = modules_of(4 * GIB, 128 * MIB, (256 * MIB,))
    tree = MTREE_4G.replace(
        "\nFlatView #3",
        "  0000000180000000-0000000187ffffff (prio 0, nv-ram): nvdimm0\n"
        "  0000000188000000-0000000197ffffff (prio 0, ram): dimm0\n\nFlatView #3",
    )
    assert guest_ram_ranges(tree, modules)[3:] == [
        (6 * GIB, 6 * GIB + 128 * MIB, 4 * GIB),
        (6 * GIB + 128 * MIB, 6 * GIB + 384 * MIB, 4 * GIB + 128 * MIB),
    ]


@pytest.mark.parametrize(
    ("memory", "address"),
    [(512 * MIB, 4 * GIB), (4 * GIB, 6 * GIB), (4 * GIB + MIB, 7 * GIB)],
)
def test_modules_are_where_qemus_memory_devices_begin(memory: int, address: int) -> None:
    """QEMU 10.0 with these sizes, "info mtree -f"."""
    nvdimm, first, second = modules_of(memory, 2 * MIB, (128 * MIB, 256 * MIB))
    assert (nvdimm.guest_physical, nvdimm.ram_offset) == (address, memory)
    assert (first.guest_physical, first.ram_offset) == (address + 128 * MIB, memory + 2 * MIB)
    assert second.guest_physical == address + 256 * MIB
    assert second.ram_offset == memory + 130 * MIB
    assert modules_of(memory, 0, (128 * MIB,))[0].guest_physical == address
    assert modules_of(memory, 0, ()) == []


def test_each_offset_has_its_address(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, nvdimm_bytes=2 * MIB, dimms=(128 * MIB,))
    host = cast("Host", SimpleNamespace(qemu_log=lambda _name: ""))
    domain = Domain(host, spec, tmp_path / "log", "alice")
    assert domain.guest_physical(4096) == 4096
    assert domain.guest_physical(513 * MIB) == 4 * GIB + MIB
    assert domain.guest_physical(514 * MIB) == 4 * GIB + 128 * MIB
    for index in (-1, 1):
        with pytest.raises(VmError, match="has 1 DIMMs"):
            domain.plug_in(index)


def test_state_of_a_tpm_gets_into_no_file(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, vtpm=tmp_path / "one.tpm")
    host = cast("Host", SimpleNamespace(qemu_log=lambda _name: ""))
    domain = Domain(host, spec, tmp_path / "log", "alice")
    for keep in (domain.save, lambda path: Snapshots(domain, path)):
        with pytest.raises(VmError, match="neither saved nor put back"):
            keep(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_modules_are_memfds_and_no_files() -> None:
    domain = parsed(dataclasses.replace(SPEC, nvdimm_bytes=64 * MIB, dimms=(128 * MIB,)))
    options = [one.get("value", "") for one in domain.findall(f"{QEMU}commandline/{QEMU}arg")]
    told = {
        option: [json.loads(text) for name, text in pairwise(options) if name == option]
        for option in ("-object", "-device")
    }
    assert [(one["qom-type"], one["share"], one["size"]) for one in told["-object"]] == [
        ("memory-backend-memfd", True, 64 * MIB),
        ("memory-backend-memfd", True, 128 * MIB),
    ]
    (device,) = told["-device"]  # the DIMM is not plugged in
    assert (device["driver"], device["addr"]) == ("nvdimm", 4 * GIB)
    assert device["memdev"] == told["-object"][0]["id"]
    assert f"slots=2,maxmem={704 * MIB}b" in options
    refuse_bypasses(domain, inline=True, nvdimm=True)
    with pytest.raises(BypassError, match="nvdimm"):
        refuse_bypasses(domain, inline=False)


def test_ram_is_that_of_the_system_address_space() -> None:
    assert guest_ram_ranges(MTREE_4G.replace('AS "memory"', 'AS "other"')) == []
    assert guest_ram_ranges("") == []
    other = MTREE_4G.replace(": pc.ram", ": vga.vram")
    assert guest_ram_ranges(other) == []


class Monitored(Domain):
    """A domain whose monitor says what it is told to."""

    mtree = MTREE_4G

    def monitor(self, command: str) -> str:
        assert command == "info mtree -f"
        return self.mtree


@pytest.fixture
def domain(tmp_path: Path) -> Monitored:
    host = cast("Host", SimpleNamespace(qemu_log=lambda _name: ""))
    return Monitored(host, SPEC, tmp_path / "log", "alice")


def test_guest_map_that_fits_is_accepted(domain: Monitored) -> None:
    domain.check_guest_map(SEGMENTS_4G)


@pytest.mark.parametrize(
    "segments",
    [
        (GuestSegment(guest_physical=0, ram_offset=0, size_bytes=4 * GIB),),
        SEGMENTS_4G[:1],
        SEGMENTS_4G[1:],
        (
            GuestSegment(guest_physical=0, ram_offset=0, size_bytes=3 * GIB),
            GuestSegment(guest_physical=4 * GIB, ram_offset=3 * GIB, size_bytes=GIB),
        ),
    ],
    ids=["no hole", "nothing above", "nothing below", "a hole elsewhere"],
)
def test_guest_map_that_does_not_fit_is_refused(
    domain: Monitored, segments: tuple[GuestSegment, ...]
) -> None:
    with pytest.raises(VmError, match="the plugin has it elsewhere"):
        domain.check_guest_map(segments)


def test_guest_without_ram_is_refused(domain: Monitored) -> None:
    domain.mtree = ""
    with pytest.raises(VmError, match="no guest RAM"):
        domain.check_guest_map(SEGMENTS_4G)
