# SPDX-License-Identifier: GPL-2.0-or-later
"""A platform on another host, as a destination of `mktme.vm.migration.Migration`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Self
from uuid import UUID

import libvirt

from mktme.engine.errors import MktmeError
from mktme.engine.keys import KeyMode
from mktme.proof.confidentiality import Canary
from mktme.proof.held import HeldProof
from mktme.remote import wire
from mktme.remote.link import HostLostError, Link
from mktme.remote.uri import RemoteUri
from mktme.vm.arrival import Arrival, Belongings, MigrationError, Side, uuid_of
from mktme.vm.config import VmConfig
from mktme.vm.console import CommandResult
from mktme.vm.host import run_event_loop
from mktme.vm.images import GuestImage
from mktme.vm.reaper import common_dir, interrupts_later

_SOCKET: Final = "memory"
# The engine there has to start, or to end; a whole guest's memory, to be read.
_PROOF_TIMEOUT_S: Final = 300.0
_SLACK_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class RemoteVm:
    """A guest on another host; its own `mktme.vm.shell.Shell`.

    Attributes:
        config: as it is there.
        keyid: its KeyID there.
        base: where its RAM starts in DRAM there.
    """

    uuid: UUID
    name: str
    config: VmConfig
    keyid: int
    base: int
    _link: Link

    def run(self, command: str, timeout_s: float, *, check: bool = True) -> CommandResult:
        """Run shell commands in the guest; see `mktme.vm.shell.Shell`."""
        request = wire.Run(command=command, timeout_s=timeout_s, check=check)
        ran = self._link.ask(request, wire.Ran, timeout_s + _SLACK_S)
        return CommandResult(ran.output, ran.status)

    def prove(self, canary: Canary) -> HeldProof:
        """Have the guest held, and its memory looked at, there; see `prove_held`.

        Raises:
            VmError: it does not hold its canary, or is gone.
        """
        request = wire.Prove(canary=canary.line)
        return self._link.ask(request, wire.Proven, _PROOF_TIMEOUT_S).proof


class RemotePlatform:
    """A platform on another host; a context manager. What ran there ends with it.

    To enter it is to find out whether guests could come: it needs mktme of this version, its
    plugin, and a libvirt there.

    Args:
        uri: libvirt's of that host, such as ``qemu+ssh://root@host/system``.
        dram_bytes: size of its DRAM.
        command: mktme's own, there.
        notice: called with a line for the user when something is not as asked for.

    Raises:
        UsageError: `uri` is none such.
    """

    def __init__(
        self,
        uri: str,
        dram_bytes: int,
        *,
        command: str = "mktme",
        notice: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._remote = RemoteUri.parse(uri)
        self._dram_bytes = dram_bytes
        self._command = command
        self._notice = notice

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            MigrationError: ssh does not get there, or there is no mktme, or none of this version.
            HostLostError: it ended while it started.
            MktmeError: why there can be no platform there.
        """
        with ExitStack() as stack:
            self._directory = stack.enter_context(common_dir())
            socket = self._directory / _SOCKET
            link = stack.enter_context(Link(self._remote, self._command, socket, self._notice))
            request = wire.Open(
                connect=self._remote.there,
                dram_bytes=self._dram_bytes,
                exchange=str(self._directory),
            )
            there = link.ask(request, wire.Opened).side
            self._link = link
            self._side = dataclasses.replace(there, uri=self._remote.uri)
            self._connection = self._open_libvirt()
            stack.callback(self._close_libvirt)
            if uuid_of(self._connection) != there.host:
                raise MigrationError(
                    f"{self._remote.uri}: libvirt and mktme came to different hosts",
                    hint="look at ssh's configuration of both",
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @property
    def host(self) -> str:
        """The host's name, as the URI has it."""
        return self._remote.host

    @property
    def connection(self) -> libvirt.virConnect:
        """Its libvirt, over an ssh connection of its own."""
        return self._connection

    def side(self) -> Side:
        """What it is to a migration; see `mktme.vm.arrival.Destination`."""
        return self._side

    @contextlib.contextmanager
    def receive(
        self,
        one: UUID,
        config: VmConfig,
        name: str,
        belongings: Belongings | None,
        move: Callable[[Arrival], None],
    ) -> Iterator[RemoteVm]:
        """Take a guest from this host; see `mktme.vm.arrival.Destination`."""
        expected = _expected(one, config, name)
        assert belongings is None  # no guest that has any gets here
        link = self._link
        link.trouble = None
        place = link.ask(expected, wire.Expecting).place
        over = False

        def why(text: str) -> str:
            """Have them clear up, and say what they know."""
            nonlocal over
            over = True
            try:
                link.ask(wire.NotMoved(why=text), wire.Done)
            except MktmeError as error:  # their answer
                text = str(error)
            refused = link.refused_forwarding
            if refused is not None:
                return f"sshd there has AllowStreamLocalForwarding off, it seems ({refused})"
            return text

        try:
            move(Arrival(place, self._directory / _SOCKET, self._trouble, why))
        except BaseException as error:
            if not over:
                why(str(error))
            raise
        arrived = link.ask(wire.Moved(), wire.Arrived)
        try:
            yield RemoteVm(one, name, config, arrived.keyid, arrived.base, link)
        finally:
            with contextlib.suppress(HostLostError):  # it ended with its host's end of it
                link.ask(wire.Leave(), wire.Done)

    def _trouble(self) -> str | None:
        """What keeps a guest from coming, if anything does."""
        if self._link.gone is not None:
            return self._link.gone
        if not self._connection.isAlive():
            return f"libvirt at {self._remote.uri} is gone"
        return self._link.trouble

    def _open_libvirt(self) -> libvirt.virConnect:
        run_event_loop()
        try:
            with interrupts_later():
                return libvirt.open(self._remote.uri)
        except libvirt.libvirtError as error:
            raise MigrationError(
                f"libvirt at {self._remote.uri}: {error}",
                hint=f"look whether this works: virsh --connect '{self._remote.uri}' list",
            ) from error

    def _close_libvirt(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):  # it is gone
            self._connection.close()


def check_can_move(config: VmConfig) -> GuestImage:
    """Check that a guest has nothing that another host has not; returns its image.

    Raises:
        MigrationError: it does, and does not move there.
    """
    image = config.image
    for what, has in (
        ("an NVDIMM", config.nvdimm is not None),
        ("DIMMs", bool(config.dimms)),
        ("a disk", config.disk is not None),
        ("a known key", config.mode is KeyMode.DIRECT),
    ):
        if has:
            raise MigrationError(f"a guest with {what} does not move to another host")
    if config.plain:
        raise MigrationError("a guest without an engine does not move to another host")
    if not isinstance(image, GuestImage):
        raise MigrationError(
            "a guest that boots its disk does not move to another host",
            hint="migrate guests whose kernel QEMU loads, such as tiny",
        )
    return image


def _expected(one: UUID, config: VmConfig, name: str) -> wire.Expect:
    """What another host has to know of a guest."""
    image = check_can_move(config)
    return wire.Expect(
        vm=one,
        name=name,
        image=wire.Image(
            name=image.name,
            cmdline=image.cmdline,
            manifest=image.manifest,
            kernel=image.kernel.read_bytes(),
            initrd=image.initrd.read_bytes(),
        ),
        memory_bytes=config.memory_bytes,
        vcpus=config.vcpus,
        datapath=config.datapath,
        track=config.track,
        window_bytes=config.window_bytes,
        policy=config.policy,
        algorithm=config.algorithm,
        encrypted=config.mode is not KeyMode.NO_ENCRYPT,
        pages=config.pages,
        check_tlb=config.check_tlb,
        machine=config.hardware.machine,
    )
