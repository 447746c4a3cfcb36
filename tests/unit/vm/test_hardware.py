# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that boot their disk, and other hardware than the usual: what libvirt is told."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mktme.vm.bypass import BypassError, refuse_bypasses
from mktme.vm.config import VmConfig, check_config
from mktme.vm.disk_images import DiskImage
from mktme.vm.domain_xml import DiskBoot, domain_xml
from mktme.vm.guest_map import guest_physical, ram_below_4g
from mktme.vm.hardware import Firmware, Hardware, Machine
from mktme.vm.host import UsageError
from mktme.vm.pages import GuestPages, PageUse
from mktme.vm.ssh import Access, LoginKey

from .test_domain_xml import IMAGE, QEMU, SPEC, attributes, parsed

MIB, GIB = 1 << 20, 1 << 30
DISK_IMAGE = DiskImage("debian-12", Path("/images/disk"), "raw", None)
BOOT = DiskBoot(
    Path("/run/disk.qcow2"),
    Path("/run/seed.img"),
    Path("/run/nvram.fd"),
    Access(2222, "mktme", LoginKey(), "secret-password"),
)
DISK_SPEC = dataclasses.replace(SPEC, image=DISK_IMAGE, boot=BOOT)


def arguments(domain: ET.Element) -> list[str]:
    return [one.attrib["value"] for one in domain.findall(f"{QEMU}commandline/{QEMU}arg")]


def test_disk_guest_boots_its_own_layer_and_finds_its_seed() -> None:
    domain = parsed(DISK_SPEC)
    assert [one.tag for one in domain.findall("os/*")] == ["type"]
    disks = {
        disk.find("target").attrib["dev"]: disk.find("source").attrib["file"]  # type: ignore[union-attr]
        for disk in domain.findall("devices/disk")
    }
    assert disks == {"vda": "/run/disk.qcow2", "vdb": "/run/seed.img"}
    assert domain.findall("devices/disk/readonly")
    assert "user,id=mktme-net,hostfwd=tcp:127.0.0.1:2222-:22" in arguments(domain)


def test_no_secret_is_in_what_libvirt_is_told() -> None:
    assert "secret" not in domain_xml(DISK_SPEC)
    assert BOOT.access.key.authorized.split()[1] not in domain_xml(DISK_SPEC)


def test_uefi_has_variables_of_its_own() -> None:
    spec = dataclasses.replace(DISK_SPEC, hardware=Hardware(firmware=Firmware.UEFI))
    domain = parsed(spec)
    assert attributes(domain, "os/loader") == {"readonly": "yes", "type": "pflash"}
    (nvram,) = domain.findall("os/nvram")
    assert nvram.text == "/run/nvram.fd"
    assert nvram.attrib["template"].endswith("OVMF_VARS_4M.fd")


def test_tpm_is_the_engines() -> None:
    domain = parsed(dataclasses.replace(DISK_SPEC, vtpm=Path("/run/one.tpm")))
    assert attributes(domain, "devices/tpm") == {"model": "tpm-crb"}
    assert attributes(domain, "devices/tpm/backend") == {"type": "external"}
    source = {"type": "unix", "mode": "connect", "path": "/run/one.tpm"}
    assert attributes(domain, "devices/tpm/backend/source") == source
    assert parsed(DISK_SPEC).find("devices/tpm") is None


def test_further_devices_and_options_are_passed_on() -> None:
    rng = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
    hardware = Hardware(Machine.PC, devices=(rng,), arguments=("-device", "edu"))
    domain = parsed(dataclasses.replace(DISK_SPEC, hardware=hardware))
    assert attributes(domain, "os/type")["machine"] == "pc"
    assert attributes(domain, "devices/rng") == {"model": "virtio"}
    told = arguments(domain)
    assert told[told.index("edu") - 1] == "-device"


@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(arguments=("-device", "vhost-user-blk-pci")),
        Hardware(
            devices=(
                "<disk type='file' device='disk'><driver name='qemu' cache='none'/>"
                "<source file='/x'/><target dev='vdc' bus='virtio'/></disk>",
            )
        ),
    ],
)
def test_further_devices_cannot_bypass_the_data_path(hardware: Hardware) -> None:
    with pytest.raises(BypassError):
        refuse_bypasses(domain_xml(dataclasses.replace(DISK_SPEC, hardware=hardware)), inline=True)


@pytest.mark.parametrize(
    ("memory_bytes", "below"),
    [
        (512 * MIB, 512 * MIB),
        (3 * GIB, 3 * GIB),
        (3584 * MIB - 4096, 3584 * MIB - 4096),
        (3584 * MIB, 3 * GIB),  # 0xe0000000: hw/i386/pc_piix.c, pc_init1
        (5 * GIB, 3 * GIB),
    ],
)
def test_ram_below_the_hole_of_pc(memory_bytes: int, below: int) -> None:
    assert ram_below_4g(memory_bytes, Machine.PC) == below
    if below < memory_bytes:
        assert guest_physical(below, memory_bytes, Machine.PC) == 4 * GIB
    assert guest_physical(below - 4096, memory_bytes, Machine.PC) == below - 4096


def test_pages_lie_where_the_chipset_has_them() -> None:
    pages = GuestPages(4 * GIB, 4096, PageUse.SHARED)
    assert pages.ram_offset(5 * GIB) == 2 * GIB
    assert pages.ram_offset(5 * GIB, Machine.PC) == 3 * GIB


UEFI_VTPM = Hardware(firmware=Firmware.UEFI, vtpm=True)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (VmConfig(IMAGE, ssh_port=2222), "boots from no disk"),
        (VmConfig(IMAGE, hardware=Hardware(firmware=Firmware.UEFI)), "boots from no disk"),
        (VmConfig(DISK_IMAGE, memory_bytes=192 * MIB), "too little for debian-12"),
        (VmConfig(DISK_IMAGE, ssh_port=1 << 20), "cannot be had"),
        (VmConfig(IMAGE, hardware=Hardware(vtpm=True)), "a boot by UEFI"),
        (VmConfig(DISK_IMAGE, hardware=Hardware(vtpm=True)), "a boot by UEFI"),
        (VmConfig(DISK_IMAGE, track=None, hardware=UEFI_VTPM), "the engine's"),
    ],
)
def test_what_makes_no_sense_is_refused(config: VmConfig, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        check_config(config)
    assert caught.value.hint
