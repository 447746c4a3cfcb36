# SPDX-License-Identifier: GPL-2.0-or-later
"""What would reach a guest's memory past its data path: refused before the guest starts.

A data path sees whoever comes through QEMU's page tables: vCPUs, the devices that QEMU emulates,
system calls that copy, and so the kernel's own vhost. These do not come that way:

- another process with a mapping of guest RAM of its own (vhost-user, virtiofs), and a device that
  was given it (VFIO);
- the kernel, when it has pinned guest pages for a transfer and not copied: host I/O with O_DIRECT.
  A page that `inline` takes away meanwhile is not the one that is written to. `shadow` misses what
  arrives between a scan and the end of the transfer: of 30 reads of 4 MiB with O_DIRECT, 19 left
  pages behind that the kernel's write tracking had not reported; of 30 buffered ones none did;
- memory that is no shared memfd, which the plugin does not find (``qemu-plugin/ram_link.c``).

Memory devices are refused but for those that the engine was told of: an NVDIMM of libvirt's own is
a file with the guest's plaintext, and its DIMMs bring memory that comes after the plugin has
looked.

Huge and preallocated pages are all the same to `shadow`, while `inline` needs an empty window and
pages of 4 KiB.

Sources: libvirt's domain XML format; qemu(1), -blockdev and -object memory-backend-*; Linux,
Documentation/core-api/pin_user_pages.rst.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from mktme.vm.host import UsageError

_QEMU: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}"

_ANOTHER_PROCESS: Final = "it gives guest RAM to another process"
_A_DEVICE: Final = "it gives guest RAM to a device of the host"
_PINNED: Final = "the host transfers data to and from pinned guest pages"
_NOT_FOUND: Final = "guest RAM has to be a shared memfd"
_ADDED: Final = "the engine has no place in DRAM for memory that it was not told of"
_AT_REST: Final = "the engine does not know of it: its contents would be plaintext, or lost"
_FROM_THE_START: Final = "all of guest RAM would be in memory before there is a window"
_HUGE: Final = "a window takes pages of 4 KiB"

_USE_9P: Final = "use 9p, which is a part of QEMU: <driver type='path'/>"
_USE_EMULATED_NETWORK: Final = "use an emulated network: <interface type='user'> or 'network'"
_USE_EMULATED: Final = "use a device that QEMU emulates; igb is one with SR-IOV"
_USE_FILE: Final = "use <disk type='file'> or 'block' with device='disk' and the default cache"
_USE_CACHE: Final = "leave out cache= and io=, or use cache='writeback' and io='threads'"
_USE_MEMFD: Final = "use <memoryBacking><source type='memfd'/><access mode='shared'/>"
_USE_NVDIMM: Final = "use --nvdimm FILE:SIZE, whose file is ciphertext"
_USE_MEMORY: Final = (
    "give the guest its memory as RAM, <memory>, or what can be plugged in as dimms="
)
_OR_SHADOW: Final = "leave it out, or use the shadow data path"

_COPIED: Final = ("usb", "scsi")
"""Kinds of <hostdev> for which QEMU copies between guest RAM and buffers of its own."""

_Refusal: TypeAlias = tuple[str, str, str]
"""What is refused, why, and what to use in its place."""


class BypassError(UsageError):
    """A guest was asked for with something that would bypass its data path."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Settings of QEMU options that are refused.

    Attributes:
        key: of a setting, without the names of the objects that it may be in, as in
            "file.driver". The first value of an option may go without a key.
        option: the options that the rule is for.
        inline: whether it is for the inline data path alone.
    """

    key: str
    value: str
    why: str
    instead: str
    option: str = ".*"
    inline: bool = False

    def refuses(self, option: str, key: str, value: str) -> bool:
        return all(
            re.fullmatch(pattern, text)
            for pattern, text in (
                (self.option, option),
                (rf"(.*\.)?({self.key})", key),
                (self.value, value),
            )
        )


_KIND: Final = "|driver|qom-type|type"
_ON: Final = "on|yes|true|y"
_OFF: Final = "off|no|false|n"
_RULES: Final = (
    _Rule(_KIND, ".*(vhost-user-fs|virtiofs).*", _ANOTHER_PROCESS, _USE_9P),
    _Rule(_KIND, ".*(vhost-?user|x-pci-proxy).*", _ANOTHER_PROCESS, _USE_EMULATED),
    _Rule(_KIND, ".*(vfio|vhost-vdpa|vhost-scsi).*", _A_DEVICE, _USE_EMULATED),
    _Rule(_KIND, "nvme", _A_DEVICE, _USE_FILE, option="-blockdev|-drive"),
    _Rule("file|filename", "nvme://.*", _A_DEVICE, _USE_FILE),
    _Rule(_KIND, "(nvme-)?io_uring|scsi-block", _PINNED, _USE_FILE),
    _Rule("cache", "none|directsync", _PINNED, _USE_CACHE),
    _Rule(r"cache\.direct", _ON, _PINNED, _USE_CACHE),
    _Rule("aio", "native", _PINNED, _USE_CACHE),
    _Rule("aio", "io_uring", _PINNED, _USE_CACHE, inline=True),
    _Rule("blob", _ON, _ANOTHER_PROCESS, "leave blob out"),
    _Rule("|transport", "rdma(:.*)?", _A_DEVICE, "migrate by tcp: or unix:", option="-incoming"),
    _Rule(_KIND, "memory-backend-(?!memfd).*", _NOT_FOUND, _USE_MEMFD),
    _Rule("share", _OFF, _NOT_FOUND, _USE_MEMFD),
    _Rule(_KIND, "pc-dimm|virtio-p?mem.*|cxl-type3", _ADDED, _USE_MEMORY, option="-device"),
    _Rule("prealloc", _ON, _FROM_THE_START, _OR_SHADOW, inline=True),
    _Rule("mem-lock", _ON, _FROM_THE_START, _OR_SHADOW, inline=True),
    _Rule("hugetlb", _ON, _HUGE, _OR_SHADOW, inline=True),
)


_UNKNOWN_NVDIMM: Final = _Rule(_KIND, "nvdimm", _AT_REST, _USE_NVDIMM, option="-device")


def refuse_bypasses(xml: str | ET.Element, *, inline: bool, nvdimm: bool = False) -> None:
    """Refuse a guest that has something which would bypass its data path.

    What is done to it once it runs (devices that are attached, migration) is not looked at.

    Args:
        xml: the libvirt domain.
        inline: whether its data path is `inline`, not `shadow`.
        nvdimm: whether the engine knows that it has an NVDIMM.

    Raises:
        BypassError: it has; the hint names what to use in its place.
    """
    domain = ET.fromstring(xml) if isinstance(xml, str) else xml
    rules = _RULES if nvdimm else (*_RULES, _UNKNOWN_NVDIMM)
    for found in (
        _in_memory(domain, inline),
        _in_devices(domain, inline),
        _in_commandline(domain, inline, rules),
    ):
        for what, why, instead in found:
            raise BypassError(f"{what}: {why}", hint=instead)


def _in_memory(domain: ET.Element, inline: bool) -> Iterator[_Refusal]:
    backing = domain.find("memoryBacking")
    if backing is None:
        backing = ET.Element("memoryBacking")
    if _attribute(backing, "source", "type") != "memfd":
        yield "memory without <source type='memfd'/>", _NOT_FOUND, _USE_MEMFD
    access = _attribute(backing, "access", "mode")
    # A NUMA node's own word goes before that for all of them.
    nodes = [cell.get("memAccess", access) for cell in domain.findall("cpu/numa/cell")]
    if any(mode != "shared" for mode in nodes or [access]):
        yield "memory without <access mode='shared'/>", _NOT_FOUND, _USE_MEMFD
    if not inline:
        return
    if backing.find("hugepages") is not None:
        yield "<hugepages/>", _HUGE, _OR_SHADOW
    if backing.find("locked") is not None:
        yield "<locked/>", _FROM_THE_START, _OR_SHADOW
    if _attribute(backing, "allocation", "mode") == "immediate":
        yield "<allocation mode='immediate'/>", _FROM_THE_START, _OR_SHADOW


def _in_devices(domain: ET.Element, inline: bool) -> Iterator[_Refusal]:
    for device in domain.findall("devices/*"):
        kind, driver = device.get("type"), _attribute(device, "driver", "name")
        what = f"<{device.tag} type='{kind}'>"
        match device.tag:
            case "filesystem" if _attribute(device, "driver", "type") == "virtiofs":
                yield "<filesystem> with virtiofs", _ANOTHER_PROCESS, _USE_9P
            case "disk":
                yield from _in_disk(device, inline)
            case "interface" if kind == "vhostuser":
                yield what, _ANOTHER_PROCESS, _USE_EMULATED_NETWORK
            case "interface" if kind in ("hostdev", "vdpa"):
                yield what, _A_DEVICE, _USE_EMULATED
            case "hostdev" if kind not in _COPIED:
                yield what, _A_DEVICE, _USE_EMULATED
            case "memory" if device.get("model") == "nvdimm":
                yield "<memory model='nvdimm'>", _AT_REST, _USE_NVDIMM
            case "memory":
                yield f"<memory model='{device.get('model')}'>", _ADDED, _USE_MEMORY
            case "video" if _attribute(device, "model", "blob") == "on":
                yield "<video> with blob='on'", _ANOTHER_PROCESS, "leave blob out"
            case _ if "vhostuser" in (kind, driver):
                yield f"<{device.tag}> with vhostuser", _ANOTHER_PROCESS, _USE_EMULATED
            case _:
                pass


def _in_disk(disk: ET.Element, inline: bool) -> Iterator[_Refusal]:
    kind = disk.get("type")
    if kind == "vhostuser":
        yield f"<disk type='{kind}'>", _ANOTHER_PROCESS, _USE_FILE
    if kind in ("nvme", "vhostvdpa"):
        yield f"<disk type='{kind}'>", _A_DEVICE, _USE_FILE
    if disk.get("device") == "lun":
        yield "<disk device='lun'>", _PINNED, _USE_FILE
    cache, io = (_attribute(disk, "driver", name) for name in ("cache", "io"))
    if cache in ("none", "directsync"):
        yield f"<disk> with cache='{cache}'", _PINNED, _USE_CACHE
    if io == "native" or (io == "io_uring" and inline):
        yield f"<disk> with io='{io}'", _PINNED, _USE_CACHE


def _in_commandline(
    domain: ET.Element, inline: bool, rules: tuple[_Rule, ...]
) -> Iterator[_Refusal]:
    option = ""
    for argument in domain.findall(f"{_QEMU}commandline/{_QEMU}arg"):
        text = argument.get("value", "")
        if text.startswith("-"):
            option = "-" + text.lstrip("-")  # QEMU takes one as well as two
            match option:
                case "-mem-path":
                    yield option, _NOT_FOUND, _USE_MEMFD
                case "-mem-prealloc" if inline:
                    yield option, _FROM_THE_START, _OR_SHADOW
                case "-readconfig":
                    yield option, "what is in the file is not known", "give the options themselves"
                case _:
                    pass
            continue
        for key, value in _settings(text):
            for rule in rules:
                if (inline or not rule.inline) and rule.refuses(option, key, value):
                    setting = f"{key}={value}" if key else value
                    yield f"{option} {setting}", rule.why, rule.instead


def _attribute(parent: ET.Element, tag: str, name: str) -> str | None:
    child = parent.find(tag)
    return None if child is None else child.get(name)


def _settings(argument: str) -> Iterator[tuple[str, str]]:
    """The settings of a QEMU option, in either of its two syntaxes."""
    if argument.startswith("{"):
        yield from _flat("", _json(argument))
        return
    # A comma that belongs to a value is doubled.
    for index, part in enumerate(argument.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if value.startswith("json:"):  # where a file name belongs
            yield from _flat(key, _json(value.removeprefix("json:")))
        elif equals:
            yield key, value
        elif index == 0:
            yield "", key
        else:
            yield key, "on"


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BypassError(f"{text}: {error}", hint="QEMU takes well-formed JSON only") from error


def _flat(key: str, value: object) -> Iterator[tuple[str, str]]:
    """The leaves of a JSON object, named as QEMU's other syntax does."""
    match value:
        case dict():
            for name, child in value.items():
                yield from _flat(f"{key}.{name}" if key else name, child)
        case list():
            for index, child in enumerate(value):
                yield from _flat(f"{key}.{index}", child)
        case bool():
            yield key, "on" if value else "off"
        case _:
            yield key, str(value)
