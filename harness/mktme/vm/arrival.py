# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's arrival from another host: whether the two fit together, and who meets it.

What else a destination needs, DRAM and a KeyID above all, its engine says when it is told of the
guest, before anything moves (`mktme.vm.migration`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

import libvirt
import paramiko

from mktme.vm.config import VmConfig
from mktme.vm.console import VmError
from mktme.vm.domain import Domain
from mktme.vm.domain_xml import DiskBoot, DomainSpec, netdev
from mktme.vm.host import dotted
from mktme.vm.images import GuestImage

# A libvirtd that does not answer counts as gone after 5 x 6 s.
_KEEPALIVE_S: Final = 5
_KEEPALIVE_COUNT: Final = 5
SAME_HINT: Final = "install the same mktme on both"

V_co = TypeVar("V_co", covariant=True)


class MigrationError(VmError):
    """A guest did not move. It runs on where it was, and nothing of it is at the destination."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two platforms of a migration, as far as they have to fit together.

    Attributes:
        uri: its libvirt.
        host: what that libvirt calls its host; no two have the same.
        qemu_version: of the QEMU that it starts.
        mktme_version: of the package that its engine is from.
        link_version: what that engine speaks with plugins.
    """

    uri: str
    host: str
    qemu_version: tuple[int, ...]
    mktme_version: str
    link_version: int


@dataclass(frozen=True, slots=True)
class Place:
    """What of a guest's XML is another where it comes to; None for what it has not.

    Attributes:
        console_socket: path of the socket on which QEMU has its console.
        emulator: path of QEMU.
        plugin: the `-plugin` argument.
        kernel: path of what QEMU loads.
        initrd: as `kernel`.
        disk: path of its layer over the disk that it boots.
        seed: as `disk`, of its first boot's configuration.
        nvram: as `disk`, of UEFI's variables.
        netdev: the `-netdev` argument of the network that ssh goes through.
    """

    console_socket: str
    emulator: str
    plugin: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    disk: str | None = None
    seed: str | None = None
    nvram: str | None = None
    netdev: str | None = None


@dataclass(frozen=True, slots=True)
class Belongings:
    """What goes along with a guest that boots its disk.

    Attributes:
        boot: its layer, and how to log in to it.
        host_key: its sshd's, None if that is not known yet.
    """

    boot: DiskBoot
    host_key: paramiko.PKey | None


@dataclass(frozen=True, slots=True)
class Arrival:
    """A destination that waits for a guest.

    Attributes:
        place: for its XML there.
        socket: where its memory is to be sent to, a UNIX socket on both hosts.
        trouble: asked now and then what keeps it from coming; None: nothing does.
        why: given libvirt's error, says what the destination knows to be the cause.
    """

    place: Place
    socket: Path
    trouble: Callable[[], str | None]
    why: Callable[[str], str]


class Destination(Protocol[V_co]):
    """Where a guest can move to: a `mktme.vm.platform.Platform`, or one on another host."""

    @property
    def connection(self) -> libvirt.virConnect:
        """Its libvirt."""
        ...

    def side(self) -> Side:
        """What it is to a migration.

        Raises:
            MigrationError: it takes part in none.
        """
        ...

    def receive(
        self,
        one: UUID,
        config: VmConfig,
        name: str,
        belongings: Belongings | None,
        move: Callable[[Arrival], None],
    ) -> AbstractContextManager[V_co]:
        """Take a guest; within the `with` it is there, and it is taken down at the end.

        Args:
            one: its UUID.
            config: what it is to be.
            name: what to call it.
            belongings: what goes along with it, if it boots its disk.
            move: called when all is ready for it; returns when it has come. What it raises ends
                all that was made ready.
        """
        ...


class ArrivingDomain(Domain):
    """A domain that comes from another host rather than from its XML.

    Args:
        arguments: a `Domain`'s.
        come: called with it; returns when it has come.
    """

    def __init__(self, *arguments: Any, come: Callable[[ArrivingDomain], None]) -> None:
        super().__init__(*arguments)
        self._come = come
        self._met = False
        self.unmet: str | None = None
        """Why there is no connection to its console, if there was to be one."""

    def bring_up(self) -> None:
        """Have it come, running if it ran where it was."""
        connection = self._host.connection
        try:
            with self._meeting(connection):
                self._come(self)
            self._domain = connection.lookupByUUID(self.spec.uuid.bytes)
            if not self._met:
                self.connect()
        except BaseException:
            if self._met:
                self.console.close()
            raise

    @contextlib.contextmanager
    def _meeting(self, connection: libvirt.virConnect) -> Iterator[None]:
        """Within the `with`, connect to its console as soon as it has a QEMU here."""
        lock = threading.Lock()
        over = False

        def note(_host: object, one: libvirt.virDomain, event: int, *_detail: object) -> None:
            if event != libvirt.VIR_DOMAIN_EVENT_STARTED or one.UUID() != self.spec.uuid.bytes:
                return
            with lock:
                if over or self._met:
                    return
                try:
                    self.connect()
                    self._met = True
                except OSError as error:
                    self.unmet = f"its console at the destination: {error.strerror}"

        lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        handle = connection.domainEventRegisterAny(None, lifecycle, note, None)
        try:
            yield
        finally:
            with lock:
                over = True
            with contextlib.suppress(libvirt.libvirtError):  # the connection is gone
                connection.domainEventDeregisterAny(handle)


def place_of(spec: DomainSpec) -> Place:
    """Where a guest is that was started as `spec`."""
    loaded = spec.image if isinstance(spec.image, GuestImage) else None
    boot = spec.boot
    return Place(
        console_socket=str(spec.console_socket),
        emulator=str(spec.emulator),
        plugin=spec.plugin,
        kernel=None if loaded is None else str(loaded.kernel),
        initrd=None if loaded is None else str(loaded.initrd),
        disk=None if boot is None else str(boot.disk),
        seed=None if boot is None else str(boot.seed),
        nvram=None if boot is None else str(boot.nvram),
        netdev=None if boot is None else netdev(boot.access.port),
    )


def belongings_of(domain: Domain) -> Belongings | None:
    """What goes along with a guest; None: nothing does."""
    boot = domain.spec.boot
    return None if boot is None else Belongings(boot, domain.host_key)


def taken_over(boot: DiskBoot, directory: Path, port: int) -> DiskBoot:
    """What a guest boots its disk with, by names of a platform's own.

    The files are the same: both QEMUs have them open while it moves, and of the two platforms the
    one that has the guest last removes them.

    Args:
        boot: where it was.
        directory: for the names, on the same file system.
        port: of the loopback interface, for ssh.

    Raises:
        MigrationError: it is another file system.
    """
    names = [directory / one.name for one in (boot.disk, boot.seed, boot.nvram)]
    try:
        for there, here in zip((boot.disk, boot.seed, boot.nvram), names, strict=True):
            if there.exists():  # only UEFI has variables
                here.hardlink_to(there)
    except OSError as error:
        raise MigrationError(
            f"the guest's disk cannot be had in {directory}: {error.strerror}",
            hint="both platforms need their temporary directories on one file system",
        ) from error
    disk, seed, nvram = names
    return DiskBoot(disk, seed, nvram, dataclasses.replace(boot.access, port=port))


def check_sides(source: Side, destination: Side) -> None:
    """Check whether guests of one platform can move to another.

    Raises:
        MigrationError: they cannot.
    """
    if source.host == destination.host:
        raise MigrationError(
            f"{source.uri} and {destination.uri} are one host to libvirt",
            hint="give each libvirtd a host_uuid of its own (libvirtd.conf)",
        )
    for what, here, there in (
        ("mktme", source.mktme_version, destination.mktme_version),
        ("link protocol", source.link_version, destination.link_version),
    ):
        if here != there:
            raise MigrationError(
                f"the engine at {destination.uri} has {what} {there}, the one here {here}",
                hint=SAME_HINT,
            )
    if destination.qemu_version < source.qemu_version:
        # QEMU is compatible forwards: a newer one knows the older one's machine types.
        raise MigrationError(
            f"{destination.uri} has QEMU {dotted(destination.qemu_version)}, and guests of"
            f" {dotted(source.qemu_version)} only move to that or a newer one"
        )


def uuid_of(connection: libvirt.virConnect) -> str:
    """What identifies a host to libvirt: it migrates nothing between two that have the same."""
    found = ET.fromstring(connection.getCapabilities()).findtext("host/uuid")
    return found or ""


def watch_over(connection: libvirt.virConnect) -> None:
    """Have `isAlive` notice a libvirtd that does not answer any more."""
    connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)
