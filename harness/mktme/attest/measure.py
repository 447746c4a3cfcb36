# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM was launched from: its QEMU, firmware, kernel, command line, disks and domain.

It is looked at when QEMU has loaded everything and executes nothing yet: `observe` takes down which
files those are, from QEMU's own process (proc(5): cmdline, maps, root), and how they stand (device,
inode, size, times). `Observation.measure` hashes them when somebody first asks. A file that was
changed in between, which its change time tells, is not measured but refused.

============== =================================================================================
component      SHA-256 of
============== =================================================================================
command-line   the kernel's command line
disk0, ...     what the guest's n-th disk shows (`mktme.attest.files.disk_digest`): the file, or
               under a layer of the guest's own, which has to be empty, the files of its base
domain         the domain's canonical XML (`mktme.attest.domain.canonical_domain`)
firmware       the firmware, where it is not one of QEMU's own
initrd         the initial RAM disk
kernel         the kernel
nvram          the firmware's variables
options        all of QEMU's options, canonical (`mktme.attest.qemu_options.canonical_options`)
plugin         the plugin
qemu           all other files that QEMU executes, libraries included: their sorted digests
roms           QEMU's own firmware and option ROMs, by name: what it may load is in there
============== =================================================================================

What a running VM is given later is not in it, nor what its memory or its NVDIMM held before.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import mktme
from mktme.attest import cbor
from mktme.attest.claims import COMPONENTS_MAX, Component, Launch
from mktme.attest.domain import Comparison, canonical_domain, parse_domain
from mktme.attest.errors import MeasurementError
from mktme.attest.files import Digests, File, Root
from mktme.attest.qemu_options import (
    DEBUGGERS,
    Nodes,
    arguments_of,
    canonical_options,
    check_options,
    drives_of,
    last,
    options_of,
    property_of,
)

_PROC: Final = Path("/proc")
# Where Debian's QEMU looks for its ROMs if it is not told (qemu(1), -L; configure --datadir).
_DATA_DIRS: Final = ("/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu")
_ROM: Final = re.compile(r".*\.(bin|rom)")


def code_digest(package: Path | None = None) -> bytes:
    """SHA-256 over the files of a Python package: of the CBOR map of their paths and digests.

    What the interpreter made of them (``__pycache__``) is left out.

    Args:
        package: its directory; None for this one's.
    """
    root = Path(mktme.__file__).parent if package is None else package
    files = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return hashlib.sha256(cbor.encode(files)).digest()


@dataclass(frozen=True, slots=True)
class Observation:
    """What QEMU has loaded, before its first instruction.

    Attributes:
        debuggable: whether QEMU listens for a debugger.
    """

    _process: Path
    _files: Mapping[str, tuple[File, ...]]  # of each component
    _roms: Mapping[str, File]
    _digests: Mapping[str, bytes]  # of components that are no files, or will change
    debuggable: bool

    def measure(self, digests: Digests) -> Launch:
        """Hash all of it.

        Args:
            digests: keeps what was hashed before.

        Raises:
            MeasurementError: a file is not as it was, or QEMU is gone.
        """
        try:
            root = Root(self._process)
        except OSError as error:
            raise MeasurementError(f"QEMU's process is gone: {error.strerror}") from error
        with closing(root):
            found = dict(self._digests)
            for name, files in self._files.items():
                each = [digests.of(root, one) for one in files]
                found[name] = each[0] if len(each) == 1 else _over(sorted(each))
            roms = {name: digests.of(root, one) for name, one in self._roms.items()}
            found["roms"] = _over(roms)
        return Launch(tuple(Component(name, found[name]) for name in sorted(found)))


def observe(
    pid: int,
    vm: UUID,
    domain: str,
    *,
    tpm: int | None = None,
    tpm_socket: Path | None = None,
    proc: Path = _PROC,
) -> Observation:
    """Take down what a QEMU has loaded that executes nothing yet.

    Args:
        pid: its process.
        vm: the VM that it is to be.
        domain: the domain's XML, which must not contradict it.
        tpm: the process of its vTPM, None without one.
        tpm_socket: where that was to be connected to.
        proc: where proc(5) is.

    Raises:
        MeasurementError: it cannot be measured, or is not the domain's.
    """
    process = proc / str(pid)
    try:
        arguments = arguments_of((process / "cmdline").read_bytes())
        with closing(Root(process)) as root:
            observation = _observe(process, root, arguments, vm, domain)
            if tpm is None:
                return observation
            _check_tpm(list(options_of(arguments)), tpm_socket)
            executed = tuple(_executed(proc / str(tpm), root))
            return replace(observation, _files={**observation._files, "tpm": executed})
    except OSError as error:
        raise MeasurementError(f"QEMU's process cannot be looked at: {error.strerror}") from error


def _observe(
    process: Path, root: Root, arguments: Sequence[str], vm: UUID, domain: str
) -> Observation:
    options = list(options_of(arguments))
    check_options(options)
    nodes = Nodes(options)
    Comparison(options, nodes, arguments).with_domain(parse_domain(domain), vm)

    plugin = last(options, "-plugin").partition(",")[0]
    executed = _executed(process, root)
    plugins = [one for one in executed if one.path == os.path.normpath(plugin)]
    if len(plugins) != 1:
        raise MeasurementError("QEMU's plugin is not what it says it is")
    files = {"plugin": (plugins[0],), "qemu": tuple(set(executed) - {plugins[0]})}
    for component, option in (("kernel", "-kernel"), ("initrd", "-initrd"), ("firmware", "-bios")):
        path = last(options, option)
        if path:
            files[component] = (root.look_at(path),)
    firmware, nvram = (property_of(options, "-machine", f"pflash{unit}") for unit in (0, 1))
    if firmware:
        files["firmware"] = nodes.contents(root, firmware, is_disk=False)
    for number, node in enumerate(drives_of(options)):
        files[f"disk{number}"] = nodes.contents(root, node)
    held = _open_files(process)
    _check_open(held, [one for name in files if name.startswith("disk") for one in files[name]])
    if firmware:
        _check_open(held, files["firmware"])
    if len(files) + 6 > COMPONENTS_MAX:
        raise MeasurementError(f"it has more than {COMPONENTS_MAX} components")
    values = {"domain": canonical_domain(domain), "options": canonical_options(options)}
    if "kernel" in files:
        values["command-line"] = last(options, "-append").encode()
    digests = {name: hashlib.sha256(value).digest() for name, value in values.items()}
    if nvram:
        # Now, for firmware writes to it first thing.
        variables = Digests()
        contents = nodes.contents(root, nvram, is_disk=False)
        _check_open(held, contents)
        each = [variables.of(root, one) for one in contents]
        digests["nvram"] = each[0] if len(each) == 1 else _over(each)
    return Observation(
        process,
        files,
        _roms(root, options),
        digests,
        debuggable=any(name in DEBUGGERS for name, _value in options),
    )


def _open_files(process: Path) -> frozenset[tuple[int, int]]:
    """Device and inode of what a process has open."""
    found = set()
    for descriptor in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile; or what has no file any more
            status = descriptor.stat()
            found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _check_open(held: Collection[tuple[int, int]], files: Iterable[File]) -> None:
    """Raise MeasurementError unless these very files are among those held: names may move."""
    for file in files:
        if file.stamp[:2] not in held:
            raise MeasurementError(f"{file.path} is not what QEMU has open under that name")


def _check_tpm(options: Sequence[tuple[str, str]], socket: Path | None) -> None:
    """Raise MeasurementError unless QEMU's only TPM is to be found at the engine's socket."""
    devices = [value for name, value in options if name == "-tpmdev"]
    chardev = dict(one.partition("=")[::2] for one in ",".join(devices).split(",")).get("chardev")
    paths = [
        fields.get("path")
        for fields in (
            dict(one.partition("=")[::2] for one in value.split(","))
            for name, value in options
            if name == "-chardev"
        )
        if fields.get("id") == chardev
    ]
    if len(devices) != 1 or paths != [str(socket)]:
        raise MeasurementError("QEMU's TPM is another than the engine's")


def _over(value: object) -> bytes:
    return hashlib.sha256(cbor.encode(value)).digest()


def _executed(process: Path, root: Root) -> list[File]:
    """The files that a process executes, as they are mapped (proc(5), maps)."""
    files: dict[str, File] = {}
    for line in (process / "maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or "x" not in fields[1] or not fields[5].startswith("/"):
            continue
        path, inode = fields[5], int(fields[4])
        if path.startswith("/memfd:tcg-jit"):  # what QEMU translates
            continue
        if path not in files:
            files[path] = root.look_at(path)
        if files[path].stamp[1] != inode:
            raise MeasurementError(f"QEMU executes a file that {path} is not any more")
    return list(files.values())


def _roms(root: Root, options: Sequence[tuple[str, str]]) -> dict[str, File]:
    """QEMU's own ROMs; of two with one name it takes that of the first directory."""
    directories = [value for name, value in options if name == "-L"] or list(_DATA_DIRS)
    roms: dict[str, File] = {}
    for directory in directories:
        for name in root.list(directory):
            if name not in roms and _ROM.fullmatch(name):
                roms[name] = root.look_at(f"{directory}/{name}")
    if not roms:
        raise MeasurementError("QEMU's own firmware is not where it is known to be")
    return roms
