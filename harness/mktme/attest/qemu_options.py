# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line: its options, and the files behind its block nodes (qemu(1))."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Final

from mktme.attest import cbor
from mktme.attest.errors import MeasurementError
from mktme.attest.files import File, Opened, Root

DEBUGGERS: Final = frozenset(("-s", "-gdb"))
"""Options that have QEMU listen for a debugger."""
CMDLINE_MAX_BYTES: Final = 4 << 20

# Options that bring in what is in no component of a launch.
_UNMEASURED: Final = frozenset(
    (
        *("-acpitable", "-cdrom", "-drive", "-dtb", "-fda", "-fdb", "-fw_cfg", "-hda", "-hdb"),
        *("-hdc", "-hdd", "-mtdblock", "-option-rom", "-pflash", "-readconfig", "-sd", "-shim"),
    )
)
_ELSEWHERE: Final = frozenset(("-incoming", "-loadvm"))
_LAYERS_MAX: Final = 8

_ALIASES: Final = {"-M": "-machine"}
# What is in these is a path or a name, or measured by itself.
_PATHS: Final = frozenset(
    ("", "-name", "-uuid", "-L", "-library-path", "-kernel", "-initrd", "-append", "-bios")
)
_MACHINE_FILES: Final = frozenset(("kernel", "initrd", "append", "dtb", "shim", "firmware"))
OWN_PLUGIN_SETTINGS: Final = ("driver", "socket", "vm")
"""Of the plugin's arguments, those that are another for each launch; "driver" is its path."""
_OWN: Final = {
    "-blockdev": ("filename",),
    "-chardev": ("fd", "path"),
    "-object": ("file",),
    "-plugin": OWN_PLUGIN_SETTINGS,
}


def arguments_of(cmdline: bytes) -> list[str]:
    """A process's arguments (proc(5), cmdline).

    Raises:
        MeasurementError: they are too many, or not text.
    """
    if len(cmdline) > CMDLINE_MAX_BYTES:
        raise MeasurementError("QEMU's command line is too long")
    try:
        return cmdline.decode().split("\0")[:-1]
    except UnicodeDecodeError as error:
        raise MeasurementError("QEMU's command line is not UTF-8") from error


def options_of(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options with their values; QEMU takes one hyphen as well as two.

    What belongs to no option is a value of the option "".
    """
    name = ""
    for argument in arguments[1:]:
        if argument.startswith("-") and name not in ("-append",):
            if name:
                yield name, ""
            name = "-" + argument.lstrip("-")
        else:
            yield _ALIASES.get(name, name), argument
            name = ""
    if name:
        yield name, ""


def canonical_options(options: Iterable[tuple[str, str]]) -> bytes:
    """All options without what is another for each launch, or measured by its contents.

    That is names, UUIDs, descriptors, the paths of files and sockets, and the port that ssh is
    forwarded from. The rest is there in its order: whoever starts QEMU can add nothing unseen.
    """
    return cbor.encode([[name, *_canonical(name, value)] for name, value in options])


def _canonical(name: str, value: str) -> list[str]:
    if name in _PATHS:
        return []
    if value.startswith("{"):
        settings = settings_of(value)
        kept = {key: settings[key] for key in settings if key not in _OWN.get(name, ())}
        return [json.dumps(kept, sort_keys=True)]
    return [without_ports(part) for key, part in parts_of(value) if key not in _OWN.get(name, ())]


def parts_of(value: str) -> Iterator[tuple[str, str]]:
    """The settings of an option, each with its key; the first may go without: "driver"."""
    for index, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, _ = part.partition("=")
        yield key if equals or index else "driver", part.replace("\0", ",")


def without_ports(value: str) -> str:
    """A network's setting without the port of the host that it forwards."""
    return re.sub(r"^(hostfwd=[a-z]+:[^:]*):\d+-", r"\1:-", value)


def check_options(options: Iterable[tuple[str, str]]) -> None:
    """Refuse what makes a launch that cannot be measured.

    Raises:
        MeasurementError: there is some of it.
    """
    for name, value in options:
        if name in _ELSEWHERE:
            raise MeasurementError(f"QEMU has {name}: the VM was not launched here")
        if name in _UNMEASURED or (name == "-smbios" and "file=" in value):
            raise MeasurementError(f"QEMU has {name}, which is not measured")
        settings = settings_of(value) if name in ("-device", "-machine") else {}
        if (
            (name == "-device" and settings.get("driver") in ("loader", "guest-loader"))
            or (name == "-device" and settings.get("romfile"))
            or (name == "-machine" and settings.keys() & _MACHINE_FILES)
            or (name in ("-global", "-set") and "romfile" in value)
        ):
            raise MeasurementError(f"QEMU has {name} with a file, which is not measured")


def last(options: Iterable[tuple[str, str]], wanted: str) -> str:
    """The value of an option, of which QEMU takes the last; empty without it."""
    found = ""
    for name, value in options:
        if name == wanted:
            found = value
    return found


def property_of(options: Iterable[tuple[str, str]], option: str, key: str) -> str | None:
    """A property of an option's, which may be given in parts; the last counts."""
    found = None
    for name, value in options:
        if name == option:
            found = settings_of(value).get(key, found)
    return None if found is None else str(found)


def settings_of(value: str) -> dict[str, Any]:
    """An option's value in either of QEMU's two syntaxes; the first may go without a key."""
    if value.startswith("{"):
        try:
            parsed = json.loads(value)
        except ValueError as error:
            raise MeasurementError("an option of QEMU's is no JSON") from error
        return parsed if isinstance(parsed, dict) else {}
    settings: dict[str, Any] = {}
    for key, part in parts_of(value):
        _, equals, setting = part.partition("=")
        settings[key] = setting if equals else part if key == "driver" else "on"
    return settings


def drives_of(options: Iterable[tuple[str, str]]) -> list[str]:
    """The block nodes that devices show, in their order."""
    drives = [settings_of(value).get("drive") for name, value in options if name == "-device"]
    return [str(one) for one in drives if one]


class Nodes:
    """QEMU's block nodes."""

    def __init__(self, options: Iterable[tuple[str, str]]) -> None:
        self._nodes: dict[str, dict[str, Any]] = {}
        for name, value in options:
            if name == "-blockdev":
                node = settings_of(value)
                self._nodes[str(node.get("node-name"))] = node

    def path(self, name: str) -> str:
        """The file at the bottom of a node, layers under it not counted."""
        for _ in range(_LAYERS_MAX):
            node = self._node(name)
            if node.get("driver") == "file":
                return str(node.get("filename"))
            if node.get("driver") not in ("raw", "qcow2") or not isinstance(node.get("file"), str):
                raise MeasurementError(f"block driver {node.get('driver')} is not measured")
            name = str(node["file"])
        raise MeasurementError("more layers than are looked at")

    def contents(self, root: Root, name: str, *, is_disk: bool = True) -> tuple[File, ...]:
        """The files that make what a node shows; a layer that may be written to must be empty."""
        files: list[File] = []
        top = True
        for _ in range(_LAYERS_MAX):
            node = self._node(name)
            path = self.path(name)
            backing = node.get("backing")
            if node.get("driver") == "qcow2" and top and backing is not None:
                _check_empty(root, path)
            else:
                files.append(root.look_at(path, is_disk=is_disk))
            if node.get("driver") == "qcow2" and "backing" not in node:
                _check_no_backing(root, path)
            if backing is None:
                return tuple(files)
            if not isinstance(backing, str):
                raise MeasurementError("a base that has no node of its own is not measured")
            name, top = backing, False
        raise MeasurementError("more layers than are looked at")

    def _node(self, name: str) -> dict[str, Any]:
        try:
            return self._nodes[name]
        except KeyError:
            raise MeasurementError(f"QEMU has no block node {name} from its start") from None


_L1_ENTRY_BYTES: Final = 8
# Compressed clusters are none in an empty image; 3 and 4: compression type, extended L2 entries.
_QCOW2_KNOWN: Final = 1 << 3 | 1 << 4


def _qcow2_header(opened: Opened) -> bytes:
    header = opened.read(112, 0)
    if header[:4] != b"QFI\xfb" or int.from_bytes(header[4:8], "big") not in (2, 3):
        raise MeasurementError("a layer that is no qcow2 file of version 2 or 3")
    return header


def _check_empty(root: Root, path: str) -> None:
    """The guest wrote nothing to its layer: no entry in its L1 table, no snapshot.

    Source: QEMU, docs/interop/qcow2.txt.
    """
    with closing(Opened(root, path)) as opened:
        header = _qcow2_header(opened)
        number = {
            name: int.from_bytes(header[start:end], "big")
            for name, start, end in (
                ("l1_size", 36, 40),
                ("l1_table", 40, 48),
                ("snapshots", 60, 64),
                ("incompatible", 72, 80),
            )
        }
        if int.from_bytes(header[4:8], "big") == 2:  # its header is shorter
            number["incompatible"] = 0
        if number["incompatible"] & ~_QCOW2_KNOWN:
            raise MeasurementError(f"{path}: a qcow2 layer with features that are not known")
        size = number["l1_size"] * _L1_ENTRY_BYTES
        if size > CMDLINE_MAX_BYTES:
            raise MeasurementError(f"{path}: a qcow2 layer that is too large")
        table = opened.read(size, number["l1_table"])
        if len(table) != size or any(table) or number["snapshots"]:
            raise MeasurementError(
                f"{path}: the guest's own layer is not empty",
                hint="launch it on a new layer; what it wrote before cannot be vouched for",
            )


def _check_no_backing(root: Root, path: str) -> None:
    with closing(Opened(root, path)) as opened:
        if int.from_bytes(_qcow2_header(opened)[8:16], "big"):
            raise MeasurementError(f"{path}: its base has no node of its own, and is not measured")
