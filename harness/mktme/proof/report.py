# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run says of itself, for people and, as JSON, for programs.

The JSON of each command is one of the documents below, described by ``docs/schema/*.json`` (made
by `json_schema`). `version` grows with each change that a reader could trip over.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import msgspec

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.errors import MktmeError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.confidentiality import CanarySearch
from mktme.proof.entropy import EntropyComparison
from mktme.proof.isolation import IsolationMatrix
from mktme.proof.residency import Residency
from mktme.proof.timeline import Timeline
from mktme.proof.transparency import MemoryComparison
from mktme.service.wire import Memory, Paging, Traffic
from mktme.vm.disk_images import DiskImage
from mktme.vm.host import Host, dotted
from mktme.vm.images import GuestImage

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Environment:
    """What a run ran on and with.

    Attributes:
        guest_kernel_package: the guest's kernel; empty for a disk of the user's own.
        guest_kernel_version: the package's.
        guest_kernel_sha256: of the kernel that QEMU loads, or of the package that a disk has it of.
        mktme: this package's version; empty in reports that are older than the field.
    """

    host_kernel: str
    cpu: str
    cores: int
    memory_bytes: int
    qemu: str
    libvirt: str
    libvirt_uri: str
    guest: str
    guest_kernel_package: str
    guest_kernel_version: str
    guest_kernel_sha256: str
    mktme: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim and what was found.

    Attributes:
        control: whether this is a control: a case made to fail, which the check must notice.
        passed: whether the claim holds; of a control, whether the failure was noticed.
    """

    proof: Literal["transparency", "confidentiality", "isolation"]
    subject: str
    claim: str
    control: bool
    passed: bool
    finding: str


@dataclass(frozen=True, slots=True)
class GuestReport:
    """One guest of a run.

    Attributes:
        datapath: None for the plain guest, which has neither plugin nor engine.
        track: what told of writes, or counted stores.
        boot_s: from its first instruction to its shell, seconds.
        workload_s: its workload, seconds.
        checksums: what its workload computed, by name.
        entropy: None where nothing was compared, and in reports that are older than the field.
        timeline: its counters while it worked; None as for `entropy`.
    """

    name: str
    role: Literal["guest", "control", "plain"]
    memory_bytes: int
    vcpus: int
    track: Track | None
    algorithm: Algorithm | None
    key_mode: KeyMode | None
    keyid: int | None
    dram_base: int | None
    boot_s: float
    workload_s: float
    checksums: dict[str, str]
    datapath: DataPath | None = None
    traffic: Traffic | None = None
    paging: Paging | None = None
    residency: Residency | None = None
    comparison: MemoryComparison | None = None
    canary: CanarySearch | None = None
    entropy: EntropyComparison | None = None
    timeline: Timeline | None = None

    @property
    def counts_stores(self) -> bool:
        """Whether its traffic tells a vCPU's stores from other writes."""
        return self.track is not None and self.track.stores

    @property
    def counts_pages(self) -> bool:
        """Whether its traffic holds what only a page scan sees."""
        return self.track is not None and self.track.pages


@dataclass(frozen=True, slots=True)
class RunReport:
    """The document of `mktme run` and `mktme demo`.

    Attributes:
        started: UTC, ISO 8601.
        dram: path of the DRAM image, None if it went with the run.
        engine_memory: the engine's, at the end of the run.
        arguments: the command line that made it, after `mktme`; empty if it was no command, and in
            reports that are older than the field.
    """

    schema: Literal["mktme.run"]
    version: Literal[1]
    command: Literal["run", "demo"]
    started: str
    duration_s: float
    passed: bool
    environment: Environment
    guests: tuple[GuestReport, ...]
    checks: tuple[Check, ...]
    isolation: IsolationMatrix | None
    engine_memory: Memory
    dram: str | None
    sidecar: str | None
    notices: tuple[str, ...]
    arguments: tuple[str, ...] = ()


def environment(host: Host, image: GuestImage | DiskImage) -> Environment:
    """Describe this machine."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    package, version, digest = _kernel(image)
    return Environment(
        host_kernel=platform.release(),
        cpu=cpu,
        cores=os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        qemu=dotted(host.qemu_version),
        libvirt=dotted(host.libvirt_version),
        libvirt_uri=host.uri,
        guest=image.name,
        guest_kernel_package=package,
        guest_kernel_version=version,
        guest_kernel_sha256=digest,
        mktme=metadata.version("mktme"),
    )


def _kernel(image: GuestImage | DiskImage) -> tuple[str, str, str]:
    """Package, version and SHA-256 of a guest's kernel; of a user's own disk they are not known."""
    if isinstance(image, GuestImage):
        kernel = image.manifest.kernel
        return kernel.name, kernel.version, kernel.member_sha256
    if image.manifest is None:
        return "", "", ""
    return image.manifest.kernel.name, image.manifest.kernel.version, image.manifest.kernel.sha256


def encode(document: object) -> bytes:
    """A document as JSON to be read: indented, but numbers in a row on one line."""
    data = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    # No string of JSON has a line break in it, so none is taken for a row of numbers.
    return _NUMBERS.sub(lambda found: b"[" + b" ".join(found[1].split()) + b"]", data)


_NUMBERS: Final = re.compile(rb"\[\n([-+.\deE,\s]+)\]")


def write_json(path: Path, document: object) -> None:
    """Write a document, as `write_whole`."""
    write_whole(path, encode(document), "the report", "--json FILE")


def write_whole(path: Path, data: bytes, what: str, option: str) -> None:
    """Write a file; it has its final name only when it is whole.

    Args:
        path: where.
        data: all of it.
        what: what it is, for an error.
        option: how its place was chosen.

    Raises:
        MktmeError: it cannot be written; an older one is still there.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise MktmeError(
            f"{path}: cannot write {what}: {error.strerror}",
            hint=f"choose another place with {option}",
        ) from error


def json_schema(document: type) -> bytes:
    """JSON Schema (2020-12) of a document's type."""
    schema = msgspec.json.schema(document)
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"
