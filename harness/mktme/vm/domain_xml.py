# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt is told of a guest: an ordinary domain, and QEMU's options beside it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from mktme.vm.disk_images import DiskImage
from mktme.vm.guest_map import Module, modules_of
from mktme.vm.hardware import USUAL_HARDWARE, Firmware, Hardware
from mktme.vm.images import GuestImage
from mktme.vm.ssh import LOOPBACK, Access

QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
OVMF_CODE: Final = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
OVMF_VARS: Final = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
# libvirt does not know what QEMU is told past it, and fills the bus from the other end.
_NET_SLOT: Final = "0x12"
NETDEV: Final = "mktme-net"
"""QEMU's name of the network that ssh goes through."""
# All that TCG can do, as an Intel processor with TME (Sapphire Rapids): Linux looks for TME, and
# handles machine checks, as the vendor has them. TCG's own "max" says it is AMD's.
_CPU: Final = "max,vendor=GenuineIntel,family=6,model=143,stepping=8"
_VISIBLE_LEVEL: Final = 0x1B  # CPUID's last basic leaf, at least: what PCONFIG is for

ET.register_namespace("qemu", QEMU_NAMESPACE)


@dataclass(frozen=True, slots=True)
class DiskBoot:
    """What a guest boots from its disk with.

    Attributes:
        disk: its own layer over the image, qcow2.
        seed: its first boot's configuration, for cloud-init.
        nvram: where UEFI is to keep its variables.
        access: how to log in to it then.
    """

    disk: Path
    seed: Path
    nvram: Path
    access: Access


@dataclass(frozen=True, slots=True)
class DomainSpec:
    """What libvirt is to start.

    Attributes:
        plugin: the `-plugin` argument, None to run without.
        inline: whether its memory is a window, which bears less than all of it would.
        disk: a raw image for it to have as its first virtio disk, None for a guest without.
        nvdimm_bytes: size of its NVDIMM, 0 for a guest without.
        dimms: sizes of what can be plugged in while it runs.
        console_socket: where QEMU is to listen for the serial console.
        visible: whether its processor is to name the leaves of memory encryption.
        boot: for a guest that boots its disk; None for one whose kernel QEMU loads.
        hardware: what else it has.
        vtpm: where the engine has its TPM, None for a guest without.
    """

    name: str
    uuid: UUID
    image: GuestImage | DiskImage
    memory_bytes: int
    vcpus: int
    console_socket: Path
    emulator: Path
    plugin: str | None = None
    inline: bool = False
    disk: Path | None = None
    boot: DiskBoot | None = None
    hardware: Hardware = USUAL_HARDWARE
    nvdimm_bytes: int = 0
    dimms: tuple[int, ...] = ()
    vtpm: Path | None = None
    visible: bool = False

    @property
    def modules(self) -> list[Module]:
        """Its memory beside its RAM."""
        machine = self.hardware.machine
        return modules_of(self.memory_bytes, self.nvdimm_bytes, self.dimms, machine)


def _modules(spec: DomainSpec) -> list[str]:
    """QEMU's options for modules.

    libvirt's <memory model='nvdimm'> would have QEMU map a file, with plaintext in it. Its 'dimm'
    would make the memory when it is plugged in, which nothing tells a plugin of; so all memory that
    there can be is made here, and is empty. QEMU joins options that are given again with those
    that libvirt gives.
    """
    modules = spec.modules
    most = spec.memory_bytes + sum(one.size_bytes for one in modules)
    options = ["-machine", "nvdimm=on", "-m", f"slots={len(modules)},maxmem={most}b"]
    for one in modules:
        backend = {"qom-type": "memory-backend-memfd", "id": one.name, "share": True}
        options += ["-object", json.dumps(backend | {"size": one.size_bytes})]
        if one.name == "nvdimm0":
            options += ["-device", json.dumps({"driver": "nvdimm"} | device_of(one))]
    return options


def device_of(module: Module) -> dict[str, str | int]:
    """A module's device."""
    return {
        "id": f"{module.name}-device",
        "memdev": module.name,
        "addr": module.guest_physical,
    }


def domain_xml(spec: DomainSpec) -> str:
    """The libvirt domain for `spec`: an ordinary TCG guest, RAM in a shared memfd."""
    domain = ET.Element("domain", type="qemu")
    _child(domain, "name", spec.name)
    _child(domain, "uuid", str(spec.uuid))
    _child(domain, "memory", str(spec.memory_bytes), unit="b")
    _child(domain, "vcpu", str(spec.vcpus))
    backing = _child(domain, "memoryBacking")
    _child(backing, "source", type="memfd")
    _child(backing, "access", mode="shared")
    boot = _child(domain, "os")
    _child(boot, "type", "hvm", arch="x86_64", machine=spec.hardware.machine.value)
    if isinstance(spec.image, GuestImage):
        _child(boot, "kernel", str(spec.image.kernel))
        _child(boot, "initrd", str(spec.image.initrd))
        _child(boot, "cmdline", spec.image.cmdline)
    elif spec.boot is not None and spec.hardware.firmware is Firmware.UEFI:
        _child(boot, "loader", str(OVMF_CODE), readonly="yes", type="pflash")
        _child(boot, "nvram", str(spec.boot.nvram), template=str(OVMF_VARS))
    if spec.boot is not None:
        _child(_child(domain, "pm"), "suspend-to-mem", enabled="yes")
    features = _child(domain, "features")
    _child(features, "acpi")
    _child(features, "apic")
    _child(domain, "cpu", mode="maximum")
    _child(domain, "on_poweroff", "destroy")
    _child(domain, "on_reboot", "restart")
    _child(domain, "on_crash", "destroy")
    devices = _child(domain, "devices")
    _child(devices, "emulator", str(spec.emulator))
    serial = _child(devices, "serial", type="unix")
    _child(serial, "source", mode="bind", path=str(spec.console_socket))
    _child(serial, "target", port="0")
    if spec.boot is not None:
        _disk(devices, "vda", spec.boot.disk, "qcow2")
        _child(_disk(devices, "vdb", spec.boot.seed, "raw"), "readonly")
    if spec.disk is not None:
        _disk(devices, "vda" if spec.boot is None else "vdc", spec.disk, "raw")
    if spec.vtpm is not None:
        # Not libvirt's own <backend type='emulator'>: the engine would not know whose EK it is.
        backend = _child(_child(devices, "tpm", model="tpm-crb"), "backend", type="external")
        _child(backend, "source", type="unix", mode="connect", path=str(spec.vtpm))
    for device in spec.hardware.devices:
        devices.append(ET.fromstring(device))
    # A guest that loads the driver gives back what it does not use, and DRAM holds less of it.
    _child(devices, "memballoon", model="virtio", freePageReporting="on")
    arguments = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    # libvirt knows the model but no way to another vendor; QEMU takes the last -cpu.
    values = ["-cpu", f"{_CPU},min-level={_VISIBLE_LEVEL}" if spec.visible else _CPU]
    values += spec.hardware.arguments
    if spec.boot is not None:
        values += ["-netdev", netdev(spec.boot.access.port)]
        values += ["-device", f"virtio-net-pci,netdev={NETDEV},addr={_NET_SLOT}"]
    if spec.plugin is not None:
        values += ["-plugin", spec.plugin]
    if spec.modules:
        values += _modules(spec)
    for value in values:
        ET.SubElement(arguments, f"{{{QEMU_NAMESPACE}}}arg", value=value)
    return ET.tostring(domain, encoding="unicode")


def netdev(port: int) -> str:
    """The network of a guest that boots its disk: `port` of the loopback interface is its ssh's."""
    # libvirt forwards ports with passt alone, a process beside QEMU.
    return f"user,id={NETDEV},hostfwd=tcp:{LOOPBACK}:{port}-:22"


def _disk(devices: ET.Element, name: str, path: Path, driver: str) -> ET.Element:
    disk = _child(devices, "disk", type="file", device="disk")
    _child(disk, "driver", name="qemu", type=driver)
    _child(disk, "source", file=str(path))
    _child(disk, "target", dev=name, bus="virtio")
    return disk


def _child(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element
