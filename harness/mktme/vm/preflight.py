# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether two platforms fit together for a guest to move from one to the other.

What else the destination needs, DRAM and a KeyID above all, its engine says when it is told of the
guest, before anything moves (`mktme.vm.migration`).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import libvirt

from mktme.service import wire
from mktme.service.client import EngineClient, EngineGoneError, EngineRefusedError
from mktme.vm.console import VmError
from mktme.vm.host import dotted, unpacked_version
from mktme.vm.platform import Platform

_ENGINE_HINT: Final = (
    "on that machine, as QEMU's user: mktme run --keep --connect qemu:///system; then bring its"
    " control socket here: ssh -L /tmp/engine.sock:CONTROL_SOCKET MACHINE"
)
_SAME_HINT: Final = "install the same mktme on both"


class MigrationError(VmError):
    """A guest did not move. It runs on where it was, and nothing of it is at the destination."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two platforms of a migration, as far as they have to fit together.

    Attributes:
        uri: its libvirt.
        host: what that libvirt calls its host; no two have the same.
        engine: what its engine says of itself.
    """

    uri: str
    host: str
    qemu_version: tuple[int, ...]
    engine: wire.Welcome


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
        ("mktme", source.engine.mktme_version, destination.engine.mktme_version),
        ("link protocol", source.engine.link_version, destination.engine.link_version),
    ):
        if here != there:
            raise MigrationError(
                f"the engine at {destination.uri} has {what} {there}, the one here {here}",
                hint=_SAME_HINT,
            )
    if destination.qemu_version < source.qemu_version:
        # QEMU is compatible forwards: a newer one knows the older one's machine types.
        raise MigrationError(
            f"{destination.uri} has QEMU {dotted(destination.qemu_version)}, and guests of"
            f" {dotted(source.qemu_version)} only move to that or a newer one"
        )


def side_of(platform: Platform) -> Side:
    """What a platform is to a migration.

    Raises:
        MigrationError: it is in libvirt's embedded driver, which takes part in none.
    """
    if platform.host.embedded:
        raise MigrationError(
            "libvirt's embedded driver migrates no guests",
            hint="give both platforms a libvirtd of their own: Platform(connect=URI)",
        )
    host = platform.host
    return Side(
        uri=host.uri,
        host=_host_uuid(host.connection),
        qemu_version=host.qemu_version,
        engine=platform.engine.welcome,
    )


def preflight(source: Platform, uri: str, control_socket: Path) -> Side:
    """Check whether a platform elsewhere could take this one's guests; returns what it is.

    Args:
        source: where they are.
        uri: the other machine's libvirt, such as ``qemu+ssh://machine/system``.
        control_socket: where the control socket of the engine there can be reached here.

    Raises:
        MigrationError: it could not: there is no engine, libvirt does not answer, or they do not
            fit together.
    """
    try:
        with EngineClient.connect(control_socket, wire.Role.OBSERVER) as engine:
            welcome = engine.welcome
    except EngineGoneError as error:
        raise MigrationError(
            f"{uri}: no engine runs there, or it is not to be reached ({error}): the memory of what"
            " would arrive there would be plaintext",
            hint=_ENGINE_HINT,
        ) from error
    except EngineRefusedError as error:
        raise MigrationError(f"{uri}: {error}", hint=_SAME_HINT) from error
    try:
        connection = libvirt.openReadOnly(uri)
    except libvirt.libvirtError as error:
        raise MigrationError(f"libvirt at {uri}: {error}") from error
    try:
        there = Side(
            uri=uri,
            host=_host_uuid(connection),
            qemu_version=unpacked_version(connection.getVersion()),
            engine=welcome,
        )
    finally:
        connection.close()
    check_sides(side_of(source), there)
    return there


def _host_uuid(connection: libvirt.virConnect) -> str:
    """What identifies a host to libvirt: it migrates nothing between two that have the same."""
    found = ET.fromstring(connection.getCapabilities()).findtext("host/uuid")
    return found or ""
