# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration of a guest from one platform to another.

::

    with Platform(SIZE, connect=a) as source, Platform(SIZE, connect=b) as destination:
        with source.launch(config) as vm, Migration(vm, source, destination) as moved:
            moved.vm.domain.console.run("workload 1", timeout_s=120)
            print(moved.report.downtime_s)

Each platform has a libvirtd, an engine, DRAM and keys of its own. The destination's engine gives
the guest a KeyID and a key that the source's never had; QEMU there starts with the plugin linked to
that engine, so that what comes in is encrypted as any other write is. From the source, QEMU sends
the guest's memory as the guest sees it: plaintext, through a UNIX socket in a private directory.

With `mktme.remote.RemotePlatform` as the destination, that is on another host, and what goes
between the hosts goes through ssh.
"""

from __future__ import annotations

import dataclasses
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Generic, Self, TypeVar

import libvirt

from mktme.datapath.kinds import DataPath
from mktme.engine.errors import MktmeError
from mktme.vm.arrival import (
    Arrival,
    Destination,
    MigrationError,
    Place,
    belongings_of,
    check_sides,
    place_of,
    watch_over,
)
from mktme.vm.bypass import refuse_bypasses
from mktme.vm.config import VmConfig
from mktme.vm.console import VmLostError
from mktme.vm.platform import Platform, Vm

TIMEOUT_S: Final = 300.0
_LIVENESS_S: Final = 0.2
# Of a guest's config: what the guest has no part in.
_CAN_CHANGE: Final = (
    *("datapath", "track", "window_bytes", "policy"),
    *("algorithm", "mode", "key_file", "pages", "check_tlb", "ssh_port"),
)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What it took to move a guest; times in seconds, sizes in bytes.

    Attributes:
        source: the data path there; "plain" without an engine.
        destination: the data path there.
        memory_bytes: the guest's memory.
        total_s: from the call until it runs at the destination and all of it is checked; to start
            a QEMU there is a part of that.
        transfer_s: of it, what QEMU took to move it, downtime included.
        downtime_s: from when its vCPUs stopped until they ran again.
        sent_bytes: what went from QEMU to QEMU.
        pages_sent: pages of 4096 bytes in it; one that was written meanwhile is sent anew.
        pages_zero: pages of which it only said that they are zeros.
        iterations: passes over memory.
    """

    source: str
    destination: str
    memory_bytes: int
    total_s: float
    transfer_s: float
    downtime_s: float
    sent_bytes: int
    pages_sent: int
    pages_zero: int
    iterations: int


class Migration(Generic[V]):
    """A guest's move to another platform; a context manager, in which it is there.

    At the end of the `with` the guest is taken down, as at the end of `Platform.launch`; that of
    the source finds nothing left to take down. Pages that were given another KeyID while the guest
    ran, rather than by its config, are the guest's own again.

    Args:
        vm: the guest, running or held; it stays what it is.
        source: its platform.
        destination: where it is to go: another platform, here or on another host.
        config: what it is to be there, None for what it is; only data path, tracker, window and
            key can be others.
        timeout_s: how long it may take until it runs there.

    Attributes:
        vm: the guest at the destination; within the `with`. Of a `Platform`, a `Vm`.
        report: what it took.
    """

    vm: V
    report: MigrationReport

    def __init__(
        self,
        vm: Vm,
        source: Platform,
        destination: Destination[V],
        *,
        config: VmConfig | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._leaving = vm
        self._source = source
        self._destination = destination
        self._config = config or vm.config
        self._timeout_s = timeout_s
        self._unwanted: str | None = None
        self._stats: dict[str, int] | None = None  # libvirt's, when it has moved

    def cancel(self) -> None:
        """Have the guest stay where it is, from any thread; once it has moved, do nothing."""
        self._unwanted = "it was cancelled"

    def __enter__(self) -> Self:
        """Move the guest.

        Raises:
            MigrationError: it is refused, was cancelled, failed, or took too long.
            VmLostError: the guest was lost with its source, or at the destination.
        """
        started = time.monotonic()
        vm = self._leaving
        with ExitStack() as stack:
            with self._stays_unless_moved(), self._source.leaving(vm):
                self._check()
                belongings = belongings_of(vm.domain)
                arriving = self._destination.receive(
                    vm.uuid, self._config, vm.name, belongings, self._move
                )
                self.vm = stack.enter_context(arriving)
            self._stack = stack.pop_all()
        assert self._stats is not None
        self.report = _report(vm.config, self._config, time.monotonic() - started, self._stats)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _check(self) -> None:
        """What can be known before anything is started."""
        destination: object = self._destination
        if destination is self._source:
            raise MigrationError("source and destination are the same platform")
        before: Any = self._leaving.config
        free: Any = {field: getattr(before, field) for field in _CAN_CHANGE}
        if dataclasses.replace(self._config, **free) != before:
            raise MigrationError("a guest that moves keeps its image, memory, vCPUs and disk")
        if self._config.plain != before.plain:
            raise MigrationError("a guest moves with an engine on both sides, or on neither")
        check_sides(self._source.side(), self._destination.side())

    @contextmanager
    def _stays_unless_moved(self) -> Iterator[None]:
        """Within the `with`, an error says what it means for the guest."""
        name = self._leaving.name
        try:
            yield
        except (MktmeError, libvirt.libvirtError) as error:
            if self._stats is not None:
                raise VmLostError(f"{name} was lost after it had moved: {error}") from error
            domain = self._leaving.domain
            if not domain.is_active:
                raise VmLostError(domain.reason(f"{name} was lost: {error}")) from error
            hint = error.hint if isinstance(error, MktmeError) else None
            if "'detach' is unexpected" in str(error):
                # QEMU 11 takes no such argument of its command any more; libvirt 11.3 gives it.
                hint = "this libvirt cannot migrate this QEMU: a newer libvirt can, or QEMU 10"
            raise MigrationError(f"{name} did not move: {error}", hint=hint) from error

    def _move(self, arrival: Arrival) -> None:
        """Have the guest come to the destination."""
        leaving = self._leaving.domain
        there = self._destination.connection
        xml = destination_xml(
            leaving.handle.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE),
            place_of(leaving.spec),
            arrival.place,
        )
        if not self._config.plain:
            refuse_bypasses(xml, inline=self._config.datapath is DataPath.INLINE)
        parameters = {
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: xml,
            libvirt.VIR_MIGRATE_PARAM_URI: f"unix://{arrival.socket}",
        }
        # A guest that writes faster than its memory can be sent is slowed down until it does not.
        flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_AUTO_CONVERGE
        if leaving.spec.disk is not None or leaving.spec.boot is not None:
            # libvirt fears for two page caches; both QEMUs are on one machine, which has one.
            flags |= libvirt.VIR_MIGRATE_UNSAFE
        watch_over(there)
        with ThreadPoolExecutor(1, "mktme-migrate") as pool:
            moving = pool.submit(leaving.handle.migrate3, there, parameters, flags)
            try:
                self._watch(moving, arrival)
            except BaseException:
                while wait([moving], _LIVENESS_S).not_done:
                    self._abort()
                if moving.exception() is None:  # just before
                    moving.result().destroy()
                raise
        try:
            self._stats = moving.result().jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
        except libvirt.libvirtError as error:
            why = self._unwanted or arrival.why(str(error))
            raise MigrationError(why) from error

    def _watch(self, moving: Future[Any], arrival: Arrival) -> None:
        """Wait until libvirt is done, and see to it that it is when the guest shall not move."""
        deadline = time.monotonic() + self._timeout_s
        # Neither Ctrl-C, `cancel` nor a connection's end is an event of libvirt's job: look for
        # them now and then. It takes an abort from the moment on that the job has begun.
        while wait([moving], _LIVENESS_S).not_done:
            if time.monotonic() > deadline:
                self._unwanted = f"it took more than {self._timeout_s:g} s"
            elif (trouble := arrival.trouble()) is not None:
                self._unwanted = trouble
            if self._unwanted is not None:
                self._abort()

    def _abort(self) -> None:
        with suppress(libvirt.libvirtError):  # there is no job yet, or none any more
            self._leaving.domain.handle.abortJob()


def destination_xml(xml: str, here: Place, there: Place) -> str:
    """A running domain's XML, with what is another at the destination.

    libvirt compares the rest with the source's, which has addresses and a machine type by now.

    Args:
        xml: the source's, migratable.
        here: where the guest is.
        there: where it is to be.
    """
    others = {
        value: getattr(there, field.name)
        for field in dataclasses.fields(Place)
        if (value := getattr(here, field.name)) is not None
    }
    domain = ET.fromstring(xml)
    for element in domain.iter():
        if element.text is not None:
            element.text = others.get(element.text, element.text)
        for name, value in element.items():
            element.set(name, others.get(value, value))
    return ET.tostring(domain, encoding="unicode")


def _report(
    source: VmConfig, destination: VmConfig, total_s: float, stats: dict[str, int]
) -> MigrationReport:
    """What libvirt has counted (virDomainGetJobStats), in our units."""
    return MigrationReport(
        source="plain" if source.plain else source.datapath.value,
        destination="plain" if destination.plain else destination.datapath.value,
        memory_bytes=source.memory_bytes,
        total_s=total_s,
        transfer_s=stats[libvirt.VIR_DOMAIN_JOB_TIME_ELAPSED] / 1000,
        downtime_s=stats[libvirt.VIR_DOMAIN_JOB_DOWNTIME] / 1000,
        sent_bytes=stats[libvirt.VIR_DOMAIN_JOB_DATA_PROCESSED],
        pages_sent=stats[libvirt.VIR_DOMAIN_JOB_MEMORY_NORMAL],
        pages_zero=stats[libvirt.VIR_DOMAIN_JOB_MEMORY_CONSTANT],
        iterations=stats[libvirt.VIR_DOMAIN_JOB_MEMORY_ITERATION],
    )
