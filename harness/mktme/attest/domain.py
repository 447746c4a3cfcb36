# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirt domain: its canonical form, and whether a QEMU is what it says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Final
from uuid import UUID

from mktme.attest.errors import MeasurementError
from mktme.attest.qemu_options import (
    OWN_PLUGIN_SETTINGS,
    Nodes,
    drives_of,
    last,
    parts_of,
    property_of,
    settings_of,
    without_ports,
)

QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"

_MEMORY_UNITS: Final = {"b": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_QEMU_ARG: Final = f"{{{QEMU_NAMESPACE}}}commandline/{{{QEMU_NAMESPACE}}}arg"
# What differs between launches of one thing, or is measured by its contents.
_NAMES: Final = ("name", "uuid", "title", "description")
_MEASURED_PATHS: Final = ("os/kernel", "os/initrd", "os/loader", "os/nvram", "devices/emulator")


def canonical_domain(domain: str) -> bytes:
    """A domain without what is another for each launch, as canonical XML (C14N 2.0).

    That is its name, UUID and id, the paths of files and sockets, the port that ssh is forwarded
    from, and of the plugin's arguments its path, socket and VM.

    Args:
        domain: libvirt's domain XML.

    Raises:
        MeasurementError: it is none.
    """
    root = parse_domain(domain)
    root.attrib.pop("id", None)
    for name in _NAMES:
        for element in root.findall(name):
            root.remove(element)
    for path in _MEASURED_PATHS:
        for element in root.findall(path):
            element.text = None
            element.attrib.pop("template", None)
    for source in root.findall("devices/*/source") + root.findall("devices/tpm/backend/source"):
        for name in ("file", "path", "index"):
            source.attrib.pop(name, None)
    option = ""
    for argument in root.findall(_QEMU_ARG):
        value = argument.get("value", "")
        if option == "-plugin":
            kept = [part for key, part in parts_of(value) if key not in OWN_PLUGIN_SETTINGS]
            argument.set("value", ",".join(kept))
        elif option == "-netdev":
            parts = [without_ports(part) for _key, part in parts_of(value)]
            argument.set("value", ",".join(parts))
        option = value
    return ET.canonicalize(ET.tostring(root, encoding="unicode"), strip_text=True).encode()


def parse_domain(domain: str) -> ET.Element:
    """Read a domain.

    Raises:
        MeasurementError: it is none.
    """
    try:
        root = ET.fromstring(domain)
    except ET.ParseError as error:
        raise MeasurementError("the domain is not XML") from error
    if root.tag != "domain":
        raise MeasurementError("the domain is none")
    return root


class Comparison:
    """QEMU's options, and whether they are those of a domain."""

    def __init__(
        self, options: Sequence[tuple[str, str]], nodes: Nodes, arguments: Sequence[str]
    ) -> None:
        self._options = options
        self._nodes = nodes
        self._arguments = arguments

    def with_domain(self, domain: ET.Element, vm: UUID) -> None:
        """Raise MeasurementError if they are not."""
        for what, said, found in self._pairs(domain, vm):
            if said != found:
                raise MeasurementError(f"QEMU contradicts its domain: {what}")

    def _pairs(self, domain: ET.Element, vm: UUID) -> Iterator[tuple[str, object, object]]:
        yield "UUID", (domain.findtext("uuid"), str(vm)), (last(self._options, "-uuid"),) * 2
        for tag, option in (("kernel", "-kernel"), ("initrd", "-initrd"), ("cmdline", "-append")):
            yield tag, domain.findtext(f"os/{tag}", ""), last(self._options, option)
        for tag, drive in (("loader", "pflash0"), ("nvram", "pflash1")):
            if domain.find("os/loader[@type='rom']") is not None and tag == "loader":
                yield tag, domain.findtext("os/loader"), last(self._options, "-bios")
                continue
            node = property_of(self._options, "-machine", drive)
            found = "" if node is None else self._nodes.path(node)
            yield tag, domain.findtext(f"os/{tag}", ""), found
        memory = domain.find("memory")
        yield "memory", _bytes(memory), self._memory()
        yield "vCPUs", domain.findtext("vcpu", "1"), self._vcpus()
        disks = [one.get("file", "") for one in domain.findall("devices/disk/source")]
        yield (
            "disks",
            sorted(disks),
            sorted(self._nodes.path(node) for node in drives_of(self._options)),
        )
        extra = [one.get("value", "") for one in domain.findall(_QEMU_ARG)]
        yield "its own options", True, _contains(self._arguments, extra)

    def _memory(self) -> int:
        size = str(property_of(self._options, "-m", "size"))
        match = re.fullmatch(r"(\d+)([kKmMgGbB]?)", size)
        if match is None:
            return -1
        scale = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "b": 1, "": 1 << 20}
        return int(match[1]) * scale[match[2].lower()]

    def _vcpus(self) -> str:
        settings = settings_of(last(self._options, "-smp"))
        return str(settings.get("maxcpus") or settings.get("cpus") or settings.get("driver"))


def _bytes(memory: ET.Element | None) -> int:
    if memory is None or memory.text is None or not memory.text.strip().isdigit():
        return -2
    return int(memory.text) * _MEMORY_UNITS.get(memory.get("unit", "KiB"), 0)


def _contains(arguments: Sequence[str], part: Sequence[str]) -> bool:
    """Whether arguments have others in them, one behind the other."""
    count = len(part)
    return any(
        list(arguments[start : start + count]) == list(part)
        for start in range(len(arguments) - count + 1)
    )
