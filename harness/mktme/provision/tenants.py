# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wanted of a platform: whose VMs it is to run, and what each must prove.

`mktme.provision.tenants_file` reads it from a tenants.toml.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.provision.errors import TenantsError
from mktme.vm.config import (
    VmConfig,
    region_bytes,
)
from mktme.vm.disk_images import DiskImage, user_image
from mktme.vm.hardware import Firmware, Hardware, Machine
from mktme.vm.image_cache import is_disk_guest
from mktme.vm.images import GuestImage, guest_image
from mktme.vm.pages import GuestPages

DRAM_LEAST_BYTES: Final = 4 << 30
"""DRAM of a platform whose file says no size: VMs that come later need no larger one, and what is
not written takes no space."""


class KeySource(enum.Enum):
    """Where a VM's key comes from."""

    RANDOM = "random"
    """The platform draws it, and nobody else ever has it."""
    BROKER = "broker"
    """The key broker releases it against evidence, encrypted to the engine."""


class OnRefusal(enum.Enum):
    """What becomes of a VM whose evidence is refused."""

    REMOVE = "remove"
    """It is taken down."""
    HOLD = "hold"
    """It is held: before its first instruction, or with its vCPUs stopped."""


@dataclass(frozen=True, slots=True)
class Secret:
    """An application secret of a VM's: a file here that becomes a file in the guest.

    Attributes:
        file: here.
        path: in the guest, absolute.
        owner: in the guest, ``user`` or ``user:group``.
        mode: of the file in the guest.
    """

    file: Path
    path: str
    owner: str = "root"
    mode: int = 0o600

    def __str__(self) -> str:
        return f"{self.path} ({self.owner}, {self.mode:04o})"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """A VM as its tenant wants it.

    Attributes:
        tenant: whose it is.
        vm: what the tenant calls it.
        guest: a recipe's name, or None for `image`.
        image: a disk image of the user's own.
        window_bytes: `inline` alone.
        track: None for what is usual.
        source: where its key comes from.
        resource: what the broker calls its key, None without broker.
        broker_policy: what the broker is to appraise it by, ``tenant/policy``; None for its usual.
        pages: under another KeyID than its own; by address, none over another.
        policy: what its evidence must satisfy, a policy.toml.
        reference: which digests are good, a reference.json.
        secrets: what it is handed once it has proved itself.
        boot_timeout_s: None for what is plenty.
    """

    tenant: str
    vm: str
    guest: str | None
    image: Path | None
    memory_bytes: int
    vcpus: int
    machine: Machine
    firmware: Firmware
    datapath: DataPath
    track: Track | None
    window_bytes: int | None
    algorithm: Algorithm
    source: KeySource
    resource: str | None
    broker_policy: str | None
    pages: tuple[GuestPages, ...]
    policy: Path
    reference: Path
    secrets: tuple[Secret, ...]
    boot_timeout_s: float | None

    @property
    def name(self) -> str:
        """What it is called among all of them: ``tenant.vm``."""
        return f"{self.tenant}.{self.vm}"

    @property
    def has_ssh(self) -> bool:
        """Whether it can be logged in to: it boots from a disk."""
        return self.guest is None or is_disk_guest(self.guest)

    @property
    def keyids(self) -> int:
        """How many KeyIDs it takes at most.

        A key of the broker's is programmed beside the first one, which encrypts what QEMU loads.
        """
        own = 2 if self.source is KeySource.BROKER else 1
        return own + sum(one.use.has_own_keyid for one in self.pages)

    def config(self, image: GuestImage | DiskImage) -> VmConfig:
        """As `mktme.vm.platform.Platform` takes it."""
        return VmConfig(
            image,
            memory_bytes=self.memory_bytes,
            vcpus=self.vcpus,
            datapath=self.datapath,
            track=self.track,
            window_bytes=self.window_bytes,
            algorithm=self.algorithm,
            mode=KeyMode.RANDOM,
            pages=self.pages,
            hardware=Hardware(self.machine, self.firmware),
            boot_timeout_s=self.boot_timeout_s,
        )

    def ensure_image(self, progress: Callable[[str], None] | None = None) -> GuestImage | DiskImage:
        """What it boots, built if it is not there yet.

        Raises:
            ImageError: it cannot be had.
        """
        if self.image is not None:
            return user_image(self.image)
        assert self.guest is not None
        return guest_image(self.guest, progress)


@dataclass(frozen=True, slots=True)
class Broker:
    """The key broker.

    Attributes:
        url: ``https://host:port``.
        trust: the CA that its TLS certificate must come from, PEM.
    """

    url: str
    trust: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """All that one file wants.

    Attributes:
        name: of the provisioner that holds it, one for each name and user of a machine.
        platform: what firmware sets up.
        emulator: another QEMU than this machine's own.
        ca: directory of the platform's CA; None for one that the engine makes.
        trust: the CAs that evidence must come from; none: the platform's own.
        on_refusal: what becomes of a VM whose evidence is refused.
        broker: where keys of source "broker" come from.
        vms: by name.
    """

    name: str
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    emulator: Path | None = None
    ca: Path | None = None
    trust: tuple[Path, ...] = ()
    on_refusal: OnRefusal = OnRefusal.REMOVE
    broker: Broker | None = None
    vms: tuple[VmSpec, ...] = ()

    @property
    def need_bytes(self) -> int:
        """The least DRAM that all VMs fit into."""
        return sum(region_bytes(one.memory_bytes) for one in self.vms)

    @property
    def dram_bytes(self) -> int:
        """How much DRAM its platform is to have."""
        return self.platform.dram or max(self.need_bytes, DRAM_LEAST_BYTES)

    def check(self) -> None:
        """Check that the platform can carry all VMs at the same time.

        Raises:
            TenantsError: it cannot.
        """
        keyids = sum(one.keyids for one in self.vms)
        if keyids > (1 << self.platform.keyid_bits) - 1:
            raise TenantsError(
                "platform",
                f"its {(1 << self.platform.keyid_bits) - 1} KeyIDs are too few: the VMs take"
                f" {keyids}",
                hint=f"keyid-bits = {keyids.bit_length()} or more in the platform's file",
            )
        for one in self.vms:
            if one.algorithm not in self.platform.algorithms:
                allowed = ", ".join(each.value for each in self.platform.algorithms)
                raise TenantsError(
                    f"tenants.{one.tenant}.vms.{one.vm}.algorithm",
                    f"the platform does not allow {one.algorithm.value}",
                    hint=f"allowed: {allowed}",
                )
        reach = 1 << self.platform.physical_address_bits - self.platform.keyid_bits
        most = min(reach, self.platform.dram or reach)
        if self.need_bytes > most:
            raise TenantsError(
                "platform",
                f"it can have {most >> 20} MiB of DRAM, and the VMs take"
                f" {self.need_bytes >> 20} MiB",
                hint=f'dram = "{self.need_bytes >> 20}M" or more in the platform\'s file, or less'
                " memory for VMs",
            )
