# SPDX-License-Identifier: GPL-2.0-or-later
"""What there is, and what is wanted, in the same words: facts that can be compared and shown.

Facts of a VM that runs are read where they are: at the engine, at libvirt, in the guest. What
neither knows (what it was appraised by, what its key is called) the provisioner remembers.
"""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final
from uuid import UUID

from mktme.engine.firmware import PlatformConfig
from mktme.provision.errors import ProvisionError
from mktme.provision.tenants import Deployment, KeySource, Secret, VmSpec
from mktme.vm.image_cache import RECIPES_DIR
from mktme.vm.pages import GuestPages, PageUse

Marker = Callable[[Path], str]
"""Makes a mark of a secret's file: of the same contents the same, and it tells nothing of them."""

_DIGEST_CHARACTERS: Final = 12


@dataclass(frozen=True, slots=True)
class SecretFact:
    """A secret as a guest has it.

    Attributes:
        text: where it is, whose, with which mode.
        mark: of its contents; empty where nobody has looked.
    """

    text: str
    mark: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a VM is, as people read it.

    Attributes:
        image: its name, and a digest that is another once it is another image.
        policy: as `image`; so are `reference`, and `trust`, the CAs that are pinned.
        secrets: by their paths.
    """

    image: str
    memory: str
    vcpus: str
    machine: str
    firmware: str
    datapath: str
    track: str
    window: str
    algorithm: str
    key: str
    pages: str = field(metadata={"in_place": True})
    policy: str = field(metadata={"in_place": True})
    reference: str = field(metadata={"in_place": True})
    trust: str = field(metadata={"in_place": True})
    secrets: tuple[SecretFact, ...] = field(metadata={"in_place": True})


IN_PLACE: Final = frozenset(one.name for one in fields(Facts) if one.metadata.get("in_place"))
"""What can be changed of a VM that runs."""


class Condition(enum.Enum):
    """How a VM is doing."""

    RUNNING = "running"
    """It proved itself and runs."""
    HELD = "held"
    """It was refused, and does not run."""
    LOST = "lost"
    """Its QEMU ended, or its memory is not followed any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmState:
    """A VM that there is.

    Attributes:
        keyid: what its memory is under.
        trouble: why it does not run, None if it does.
        failed: checks of its last appraisal that did not affirm.
    """

    name: str
    uuid: UUID
    keyid: int
    memory_bytes: int
    condition: Condition
    facts: Facts
    trouble: str | None = None
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformState:
    """The platform that there is.

    Attributes:
        config: what firmware set up.
        control_socket: where observers connect.
    """

    dram_bytes: int
    config: PlatformConfig
    emulator: Path | None
    ca: Path | None
    engine_pid: int
    control_socket: Path


@dataclass(frozen=True, slots=True)
class State:
    """All that there is; nothing where no provisioner runs."""

    platform: PlatformState | None = None
    vms: tuple[VmState, ...] = ()

    def vm(self, name: str) -> VmState | None:
        """One of them."""
        return next((one for one in self.vms if one.name == name), None)


@dataclass(frozen=True, slots=True)
class Wanted:
    """All that is wanted.

    Attributes:
        facts: of `deployment.vms`, in the same order.
    """

    deployment: Deployment
    facts: tuple[Facts, ...]


def wanted(deployment: Deployment, mark: Marker = lambda _file: "") -> Wanted:
    """What a deployment wants, with files as they are now.

    Raises:
        ProvisionError: a file cannot be read any more.
    """
    trust = trust_fact(deployment.trust)
    return Wanted(deployment, tuple(_facts(one, trust, mark) for one in deployment.vms))


def _facts(spec: VmSpec, trust: str, mark: Marker) -> Facts:
    return Facts(
        image=image_fact(spec),
        memory=size_text(spec.memory_bytes),
        vcpus=str(spec.vcpus),
        machine=spec.machine.value,
        firmware=spec.firmware.value,
        datapath=spec.datapath.value,
        track="-" if spec.track is None else spec.track.value,
        window="-" if spec.window_bytes is None else size_text(spec.window_bytes),
        algorithm=spec.algorithm.value,
        key=key_fact(spec.source, spec.resource),
        pages=pages_fact(spec.pages),
        policy=file_fact(spec.policy, read(spec.policy)),
        reference=file_fact(spec.reference, read(spec.reference)),
        trust=trust,
        secrets=tuple(secret_fact(one, mark(one.file)) for one in by_path(spec.secrets)),
    )


def by_path(secrets: tuple[Secret, ...]) -> list[Secret]:
    """Secrets in the order of their paths in the guest."""
    return sorted(secrets, key=lambda one: one.path)


def secret_fact(secret: Secret, mark: str) -> SecretFact:
    """A secret as it is wanted."""
    return SecretFact(str(secret), mark)


def key_fact(source: KeySource, resource: str | None) -> str:
    """Where a key comes from."""
    return source.value if resource is None else f"{source.value} {resource}"


def image_fact(spec: VmSpec) -> str:
    """An image's name, and a digest of what decides what it is.

    Of a recipe that is the recipe: images are built from it once. A user's disk is told from
    another by its place, size and times: reading gigabytes for each plan would take too long, and
    its launch measurement has its contents.
    """
    if spec.image is None:
        assert spec.guest is not None
        digest = hashlib.sha256()
        for file in sorted((RECIPES_DIR / spec.guest).iterdir()):
            digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
        return f"{spec.guest} {digest.hexdigest()[:_DIGEST_CHARACTERS]}"
    try:
        status = os.stat(spec.image)
    except OSError as error:
        raise ProvisionError(f"{spec.image}: {error.strerror}") from error
    what = (spec.image, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return (
        f"{spec.image.name} {hashlib.sha256(repr(what).encode()).hexdigest()[:_DIGEST_CHARACTERS]}"
    )


def file_fact(path: Path, data: bytes) -> str:
    """A file's name, and a digest of its contents."""
    return f"{path.name} {hashlib.sha256(data).hexdigest()[:_DIGEST_CHARACTERS]}"


def trust_fact(files: tuple[Path, ...]) -> str:
    """The CAs that are pinned; "-": the one that the platform made itself.

    Raises:
        ProvisionError: a file cannot be read any more.
    """
    return ", ".join(file_fact(one, read(one)) for one in files) or "-"


def read(path: Path) -> bytes:
    """A file that was there when it was named.

    Raises:
        ProvisionError: it cannot be read any more.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProvisionError(f"{path}: {error.strerror}") from error


def pages_fact(pages: tuple[GuestPages, ...]) -> str:
    """Ranges by address; those of KeyID 0 that touch are one, as an engine has them."""
    joined: list[GuestPages] = []
    for one in sorted(pages, key=lambda each: each.guest_physical):
        last = joined[-1] if joined else None
        if (
            last is not None
            and one.use is last.use is PageUse.SHARED
            and last.guest_physical + last.size_bytes == one.guest_physical
        ):
            joined[-1] = GuestPages(last.guest_physical, last.size_bytes + one.size_bytes, one.use)
        elif one.use is not PageUse.PRIVATE:
            joined.append(one)
    return ", ".join(map(str, joined)) or "-"


def size_text(size_bytes: int) -> str:
    """A size as tenants.toml has it."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size_bytes and not size_bytes % (1 << shift):
            return f"{size_bytes >> shift}{unit}"
    return str(size_bytes)
