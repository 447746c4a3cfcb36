# SPDX-License-Identifier: GPL-2.0-or-later
"""One simulated host for its user: an engine, a libvirt, and the VMs on them.

::

    with Platform(dram_bytes=2 << 30) as platform:
        with platform.launch(VmConfig(image, memory_bytes=512 << 20)) as vm:
            vm.domain.console.run("workload 1", timeout_s=120)
            with vm.held():
                ...  # DRAM is now exactly the guest's RAM

Nothing outlives its `with`; a `vm.reaper` cleans up after a harness that is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import libvirt

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.uffd import require_fault_handling, require_write_tracking
from mktme.engine.firmware import PlatformConfig
from mktme.engine.pages import first_line
from mktme.engine.sidecar import CaptureRecord
from mktme.engine.xts import LINE_BYTES
from mktme.service import wire
from mktme.service.client import (
    EngineClient,
    EngineGoneError,
    EngineProcess,
    ServiceError,
    captured,
)
from mktme.service.server import CONTROL_SOCKET
from mktme.vm.arrival import (
    Arrival,
    ArrivingDomain,
    Belongings,
    MigrationError,
    Side,
    place_of,
    taken_over,
    uuid_of,
)
from mktme.vm.config import VmConfig, check_config, with_window
from mktme.vm.console import VmError
from mktme.vm.disk_images import DiskImage, make_seed, overlay
from mktme.vm.domain import Domain
from mktme.vm.domain_xml import DiskBoot, DomainSpec, domain_xml
from mktme.vm.guest_map import modules_of, ram_below_4g
from mktme.vm.host import EnvironmentUnfitError, Host, UsageError, plugin_path
from mktme.vm.pages import GuestPages, assign_pages
from mktme.vm.reaper import ENGINE_PID_FILE, process_dir
from mktme.vm.ssh import LOOPBACK, Access, LoginKey, free_port
from mktme.vm.visible import check_processor, check_visible, require_visible

log = logging.getLogger(__name__)

LINK_TIMEOUT_S: Final = 20.0
ENGINE_SILENT_S: Final = 10
"""An engine that has not answered for so long hangs: the user is told, and a guest that is taken
down takes it along. It gives way to requests after each batch, so milliseconds are usual."""
ENGINE_LOST_S: Final = 60
"""One that has not answered for so long is not waited for any more."""
_USER: Final = "mktme"
_PING_S: Final = 1.0
_LIVENESS_S: Final = 0.5
_EVENT_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Vm:
    """A running guest of a platform.

    Attributes:
        config: as it was launched, with the tracker that is really on.
        domain: its libvirt side; `domain.console` runs commands.
        engine: the platform's engine, None for a plain guest.
        keyid: its KeyID, 0 for a plain guest.
        base: where its RAM starts in DRAM.
    """

    uuid: uuid.UUID
    config: VmConfig
    domain: Domain
    engine: EngineClient | None
    keyid: int = 0
    base: int = 0

    @property
    def name(self) -> str:
        """What the user calls it; the domain's own name is longer, and unique."""
        return self.domain.label

    @contextlib.contextmanager
    def held(self) -> Iterator[EngineClient]:
        """Pause the guest and flush: within the `with`, DRAM is exactly the guest's RAM."""
        engine = self.require_engine()
        with self.domain.paused():
            engine.flush(self.uuid)
            yield engine

    def assign(self, pages: GuestPages) -> int:
        """Give some of its pages to another KeyID, running or held; returns which.

        Raises:
            UsageError: the range is not whole pages of its RAM.
            ServiceError: the engine refuses.
        """
        engine = self.require_engine()
        offset = pages.ram_offset(self.config.memory_bytes, self.config.hardware.machine)
        keyid = assign_pages(engine, self.uuid, pages, offset, self.config.algorithm)
        return self.keyid if keyid is None else keyid

    def plug_in(self, dimm: int) -> None:
        """Plug one of its DIMMs in, by its place in the configuration.

        Raises:
            VmError: QEMU refuses, or has it elsewhere than the engine expects it.
        """
        self.domain.plug_in(dimm)
        self.domain.check_guest_map(self.status().segments)

    def unplug(self, dimm: int, timeout_s: float) -> None:
        """Have the guest give one of its DIMMs back, and DRAM forget it.

        Raises:
            VmError: the guest has not given it back in time.
        """
        module = self.domain.unplug(dimm, timeout_s)
        engine = self.require_engine()
        engine.discard_memory(self.uuid, module.ram_offset, module.size_bytes)

    def status(self) -> wire.VmStatus:
        """The engine's view of this VM."""
        return vm_status(self.require_engine(), self.uuid)

    def require_engine(self) -> EngineClient:
        """The engine; a plain guest has none."""
        if self.engine is None:
            raise VmError(f"{self.name} runs without an engine")
        return self.engine


def vm_status(engine: EngineClient, vm: uuid.UUID) -> wire.VmStatus:
    """One VM of the engine's status."""
    for status in engine.status().vms:
        if status.vm == vm:
            return status
    raise ServiceError(f"the engine knows no VM {vm}")


class Platform:
    """The simulated host; a context manager.

    Args:
        dram_bytes: size of its DRAM.
        config: what its firmware sets up; the size of DRAM there is not looked at.
        dram: where to keep the DRAM image; None for a file that goes with the platform.
        audit: where to append the engine's audit log; None for a file that goes with the platform.
        ca: directory of the platform CA that certifies the engine; None for one of its own.
        connect: a libvirt URI in place of the embedded driver.
        emulator: another QEMU than this machine's own.
        shared_ownership: let other processes of this user program keys, too.
        notice: called with a line for the user when something is not as asked for.
    """

    def __init__(
        self,
        dram_bytes: int,
        *,
        config: PlatformConfig | None = None,
        shared_ownership: bool = False,
        dram: Path | None = None,
        audit: Path | None = None,
        ca: Path | None = None,
        connect: str | None = None,
        emulator: Path | None = None,
        notice: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._dram_bytes = dram_bytes
        self._config = config
        self._shared_ownership = shared_ownership
        self._dram = dram
        self._audit = audit
        self._ca = ca
        self._connect = connect
        self._emulator = emulator
        self._notice = notice
        self._changed = threading.Condition()
        self._linked: set[uuid.UUID] = set()
        self._domains: dict[uuid.UUID, Domain] = {}
        self._faults: dict[uuid.UUID, str] = {}
        self._leaving: set[uuid.UUID] = set()
        self.poisoned: list[wire.PagePoisoned] = []
        """What was found in DRAM that does not match its MAC, in this order."""
        self._captured: dict[int, wire.CaptureDone | wire.CaptureFailed] = {}
        self._capturing = 0  # how many `capture` look for theirs in there
        self._aborted = False
        self._gone = False
        self._silence: str | None = None  # what is to be told of an engine that does not answer
        self._given_up = False
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=process_dir()))
            stack.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
            self.host = stack.enter_context(Host(self._connect, emulator=self._emulator))
            self.dram_path = (self._dram or self.run_dir / "dram.img").absolute()
            require_disk(self.dram_path.parent, self._dram_bytes)
            process = EngineProcess(
                self.run_dir,
                self.dram_path,
                self._dram_bytes,
                platform=self._config,
                shared_ownership=self._shared_ownership,
                audit=None if self._audit is None else self._audit.absolute(),
                ca=None if self._ca is None else self._ca.absolute(),
            )
            self._process = stack.enter_context(process)
            self.engine = self._process.client
            (self.run_dir / ENGINE_PID_FILE).write_text(str(self.engine_pid))
            for name, watch in (("mktme-events", self._watch), ("mktme-pings", self._watch_over)):
                threading.Thread(target=watch, name=name, daemon=True).start()
            stack.callback(self._closing.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @property
    def connection(self) -> libvirt.virConnect:
        """Its libvirt."""
        return self.host.connection

    @property
    def engine_pid(self) -> int:
        """The engine's process."""
        return self._process.process.pid

    @property
    def control_socket(self) -> Path:
        """Where others can connect to the engine (`mktme.vm.running`)."""
        return self.run_dir / CONTROL_SOCKET

    def wait_for_trouble(self) -> None:
        """Wait, with every VM launched, until the engine or one of them ends.

        Raises:
            EngineGoneError: the engine ended.
            VmError: a VM did.
        """
        with self._changed:
            while (lost := self._unlinked()) is None and not self._gone:
                self._changed.wait()
        if lost is None:
            raise EngineGoneError(self._silence or "the engine is gone")
        fault = self.fault(lost.spec.uuid)
        raise VmError(lost.reason(f"{lost.label}: {fault or 'its QEMU ended'}"))

    def wait_ended(self) -> None:
        """Wait until the engine ends, whoever ends it."""
        with self._changed:
            self._changed.wait_for(lambda: self._gone)

    def launch(
        self, config: VmConfig, name: str = "guest", *, boot: bool = True
    ) -> contextlib.AbstractContextManager[Vm]:
        """Start a guest, boot it to its shell, and take it down at the end.

        Args:
            config: what to start.
            name: what to call it.
            boot: False to leave it before its first instruction, for `Domain.boot` later.

        Raises:
            UsageError: a value in `config` makes no sense.
            EnvironmentUnfitError: this machine cannot carry it.
            VmError: it did not come up.
        """
        return self.carry(uuid.uuid4(), config, name, boot=boot)

    @contextlib.contextmanager
    def carry(
        self,
        one: uuid.UUID,
        config: VmConfig,
        name: str,
        *,
        boot: bool,
        make: Callable[..., Domain] = Domain,
        belongings: Belongings | None = None,
    ) -> Iterator[Vm]:
        """As `launch`, of a guest that has a UUID and a way to come here (`receive`).

        Args:
            one: its UUID.
            config: what it is.
            name: what to call it.
            boot: False to leave it as it comes.
            make: takes a `Domain`'s arguments, and makes one that brings it up.
            belongings: what it has from where it was, if it boots its disk.
        """
        check_config(config)
        if config.visible:
            check_visible(config, self._config or PlatformConfig())
            require_visible(self.host)
        config = with_window(self._supported(config))
        if config.datapath is DataPath.INLINE:
            require_fault_handling()
        elif config.track is not None and config.track.pages:
            require_write_tracking()
        require_memory(config.all_bytes)
        unique = f"mktme-{name}-{one.hex[:8]}"
        with contextlib.ExitStack() as stack:
            vm_fields = {}
            plugin = None
            if not config.plain:
                added = self.engine.add_vm(
                    one,
                    name=name,
                    memory_bytes=config.memory_bytes,
                    track=config.track,
                    algorithm=config.algorithm,
                    mode=config.mode,
                    key_file=config.key_file,
                    datapath=config.datapath,
                    window_bytes=config.window_bytes,
                    policy=config.policy,
                    nvdimm=_nvdimm_file(config),
                    dimm_bytes=sum(config.dimms),
                    visible=config.visible,
                )
                stack.callback(self._forget, one)
                for pages in config.pages:
                    offset = pages.ram_offset(config.memory_bytes, config.hardware.machine)
                    assign_pages(self.engine, one, pages, offset, config.algorithm)
                vm_fields = {"keyid": added.keyid, "base": added.base}
                plugin = self._plugin_argument(one, config)
            vtpm = None
            if config.hardware.vtpm:
                vtpm = Path(self.engine.add_vtpm(one).socket)
            boot_disk = None
            if isinstance(config.image, DiskImage):
                layer = self._boot_disk(one, config.image, config, belongings)
                boot_disk = stack.enter_context(layer)
            spec = DomainSpec(
                name=unique,
                uuid=one,
                image=config.image,
                memory_bytes=config.memory_bytes,
                vcpus=config.vcpus,
                console_socket=self.run_dir / f"{one.hex[:8]}.console",
                emulator=self.host.emulator,
                plugin=plugin,
                inline=config.datapath is DataPath.INLINE,
                disk=config.disk,
                boot=boot_disk,
                hardware=config.hardware,
                nvdimm_bytes=config.nvdimm_bytes,
                dimms=config.dimms,
                vtpm=vtpm,
                visible=config.visible,
            )
            if not config.plain:
                self.engine.describe_domain(one, domain_xml(spec))
            transcript = self.run_dir / f"{unique}.log"
            why = functools.partial(self._why_lost, one)
            domain = stack.enter_context(make(self.host, spec, transcript, name, why))
            with self._changed:
                self._domains[one] = domain
                stack.callback(self._domains.pop, one, None)
                fault = self._faults.get(one)
            stack.callback(self._let_go, domain)
            if fault is not None:  # it came before there was a domain to hold
                domain.hold(f"it is held: {fault}")
            if self._aborted:
                raise VmError(f"{unique} is not wanted any more")
            engine = None
            if not config.plain:
                engine = self.engine
                self._wait_linked(one, domain)
                domain.check_guest_map(vm_status(engine, one).segments)
            if config.visible:
                check_processor(domain)
            if boot:
                domain.boot(config.boot_deadline_s)
            yield Vm(one, config, domain, engine, **vm_fields)

    def side(self) -> Side:
        """What it is to a migration; see `mktme.vm.arrival.Destination`."""
        if self.host.embedded:
            raise MigrationError(
                "libvirt's embedded driver migrates no guests",
                hint="give both platforms a libvirtd of their own: Platform(connect=URI)",
            )
        welcome = self.engine.welcome
        return Side(
            uri=self.host.uri,
            host=uuid_of(self.connection),
            qemu_version=self.host.qemu_version,
            mktme_version=welcome.mktme_version,
            link_version=welcome.link_version,
        )

    @contextlib.contextmanager
    def receive(
        self,
        one: uuid.UUID,
        config: VmConfig,
        name: str,
        belongings: Belongings | None,
        move: Callable[[Arrival], None],
    ) -> Iterator[Vm]:
        """Take a guest from another host; see `mktme.vm.arrival.Destination`."""

        def come(domain: ArrivingDomain) -> None:
            socket = domain.spec.console_socket.with_suffix(".migration")
            trouble = functools.partial(self._trouble, domain)
            why = functools.partial(self._why_not_come, domain)
            try:
                move(Arrival(place_of(domain.spec), socket, trouble, why))
            finally:
                socket.unlink(missing_ok=True)

        make = functools.partial(ArrivingDomain, come=come)
        with self.carry(one, config, name, boot=False, make=make, belongings=belongings) as vm:
            vm.domain.host_key = None if belongings is None else belongings.host_key
            yield vm

    def _trouble(self, domain: ArrivingDomain) -> str | None:
        """What keeps a guest from coming, if anything does."""
        if not self.connection.isAlive():
            return f"libvirt at {self.host.uri} is gone"
        return domain.unmet

    def _why_not_come(self, domain: ArrivingDomain, otherwise: str) -> str:
        try:
            self.engine.ping()
        except EngineGoneError:  # and its plugin has ended the QEMU there
            return "the engine at the destination is gone"
        return domain.reason(otherwise)

    @contextlib.contextmanager
    def _boot_disk(
        self, one: uuid.UUID, image: DiskImage, config: VmConfig, belongings: Belongings | None
    ) -> Iterator[DiskBoot]:
        """A guest's layer over its image, and the seed that tells it who may log in."""
        with tempfile.TemporaryDirectory(prefix=f"{one.hex[:8]}-", dir=self.run_dir) as directory:
            before = None if belongings is None else belongings.boot.access.port
            port = free_port() if config.ssh_port in (None, before) else config.ssh_port
            if belongings is not None:
                yield taken_over(belongings.boot, Path(directory), port)
                return
            access = Access(port, _USER, LoginKey(), secrets.token_urlsafe(12))
            seed = Path(directory, "seed.img")
            make_seed(
                seed,
                hostname=f"mktme-{one.hex[:8]}",
                user=access.user,
                public_keys=(access.key.authorized, *config.authorized_keys),
                password=access.password,
            )
            yield DiskBoot(
                overlay(image, Path(directory, "disk.qcow2")),
                seed,
                Path(directory, "nvram.fd"),
                access,
            )

    @contextlib.contextmanager
    def leaving(self, vm: Vm) -> Iterator[None]:
        """Within the `with`, the guest may end here; if no error ends the `with`, it has.

        Then its KeyID is cleared and its DRAM is free, before its `launch` ends.
        """
        with self._changed:
            self._leaving.add(vm.uuid)
        try:
            yield
            with self._changed:
                self._domains.pop(vm.uuid, None)
        finally:
            with self._changed:
                self._leaving.remove(vm.uuid)
                self._changed.notify_all()
        self._forget(vm.uuid)
        vm.domain.console.close()

    def restore(self, vm: Vm, state: Path) -> None:
        """Start a guest again that `Domain.save` ended, in a QEMU of its own, and let it run.

        The plugin of that QEMU says hello as any other: DRAM forgets all that it held of the VM,
        and what libvirt reads from the file is encrypted into it anew.

        Args:
            vm: as it was launched.
            state: what `Domain.save` wrote.

        Raises:
            VmError: it did not come up.
        """
        engine = vm.require_engine()
        if not self.wait_for(lambda: vm.uuid not in self._linked, LINK_TIMEOUT_S):
            raise VmError(f"{vm.name}: the QEMU that it was saved from is there still")
        vm.domain.restore(state)
        self._wait_linked(vm.uuid, vm.domain)
        vm.domain.check_guest_map(vm_status(engine, vm.uuid).segments)
        vm.domain.resume()

    def capture(self, path: Path, vms: Collection[Vm] = ()) -> CaptureRecord:
        """Copy DRAM as it is at one moment to a file, its sidecar beside it; guests go on.

        Guests that run are held for that moment; one that is paused, or `held`, stays so.

        Args:
            path: of the copy; nothing may be there.
            vms: whose memory; none: all of DRAM.

        Raises:
            ServiceError: it failed, and nothing is left of it.
        """
        with self._changed:
            self._capturing += 1
        try:
            number = self.engine.start_capture(path, [vm.uuid for vm in vms])
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._gone or number in self._captured)
                    event = self._captured.pop(number, None)
            except BaseException:
                self.engine.cancel_capture(number)
                raise
        finally:
            with self._changed:
                self._capturing -= 1
                if not self._capturing:
                    self._captured.clear()  # others' and cancelled ones
        if event is None:
            raise EngineGoneError(self._silence or "the engine is gone")
        return captured(event)

    def abort(self) -> None:
        """Take every guest down now, from any thread: whoever waits for one gets a `VmError`."""
        self._aborted = True
        for domain in tuple(self._domains.values()):
            self._let_go(domain)
            domain.destroy()

    def logins(self) -> list[str]:
        """How to log in to those of its guests that have an sshd, as commands."""
        boots = [domain.spec.boot for domain in tuple(self._domains.values())]
        return [
            f"ssh -p {boot.access.port} {boot.access.user}@{LOOPBACK}" for boot in boots if boot
        ]

    def check(self, vm: Vm) -> None:
        """Raise what went wrong with a VM's memory since it was launched, if anything did."""
        fault = self.fault(vm.uuid)
        if fault is not None:
            raise VmError(f"{vm.name}: {fault}", hint="free space where the DRAM image is")

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for an engine event that makes `condition` true; returns whether one did."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def fault(self, vm: uuid.UUID) -> str | None:
        """Why a VM's memory is not followed now, None if it is."""
        with self._changed:
            return self._faults.get(vm)

    def _supported(self, config: VmConfig) -> VmConfig:
        """Fall back from `stores` where QEMU would abort (mktme.c, prepare_stores)."""
        if config.track is None or not config.track.stores or config.vcpus == 1:
            return config
        if self.host.qemu_version >= (11,):
            return config
        self._notice(
            f"QEMU {self.host.qemu_version[0]} can abort when the stores tracker watches"
            f" {config.vcpus} vCPUs; tracking by pages alone"
        )
        fallback = Track.PAGES if config.datapath is DataPath.SHADOW else None
        return dataclasses.replace(config, track=fallback)

    def _plugin_argument(self, one: uuid.UUID, config: VmConfig) -> str:
        path = plugin_path(self.host.plugin_api)
        options = {
            "socket": self.engine.welcome.link_socket,
            "vm": str(one),
            "datapath": config.datapath.value,
            "track": "off" if config.track is None else config.track.value,
            "ram-below-4g": str(ram_below_4g(config.memory_bytes, config.hardware.machine)),
            "check-tlb": "on" if config.check_tlb else "off",
            "visible": "on" if config.visible else "off",
        }
        # QEMU splits options at commas; one that belongs to a value is doubled.
        values = [str(path), *(f"{key}={value}" for key, value in options.items())]
        modules = modules_of(
            config.memory_bytes, config.nvdimm_bytes, config.dimms, config.hardware.machine
        )
        values += [f"module={one.size_bytes}@{one.guest_physical}" for one in modules]
        return ",".join(value.replace(",", ",,") for value in values)

    def _wait_linked(self, one: uuid.UUID, domain: Domain) -> None:
        deadline = time.monotonic() + LINK_TIMEOUT_S
        while True:
            # An end of QEMU is no event of the engine's: look for it now and then.
            if self.wait_for(lambda: one in self._linked, _LIVENESS_S):
                return
            if not domain.is_active or time.monotonic() > deadline:
                why = f"{domain.label}: its plugin did not link to the engine"
                raise VmError(domain.reason(why))

    def _forget(self, one: uuid.UUID) -> None:
        with contextlib.suppress(ServiceError):  # an engine that is gone has forgotten
            self.engine.remove_vm(one)

    def _let_go(self, domain: Domain) -> None:
        """Before a guest is taken down: nobody in it may wait for memory that does not come.

        Its QEMU would not end, and libvirt kills it after 10 s only. A plugin whose link ends ends
        its QEMU at once.
        """
        if domain.spec.plugin is None:
            return
        if not self._answers():
            self._give_up(self._silence or "the engine does not answer")
        elif self.fault(domain.spec.uuid) is not None:
            self._forget(domain.spec.uuid)

    def _answers(self) -> bool:
        """Whether the engine answers; one that is gone does nothing else any more either."""
        if self._silence is not None:
            return False
        with contextlib.suppress(EngineGoneError):
            return bool(wait([self.engine.ping()], ENGINE_SILENT_S).done)
        return True

    def _why_lost(self, one: uuid.UUID, ended: bool) -> str | None:
        """What is known of why a VM's memory is not served; its plugin knows less.

        Args:
            one: the VM.
            ended: whether its plugin has ended its QEMU: the engine says why before it says that
                the link has ended.
        """
        with self._changed:
            if ended:
                self._changed.wait_for(
                    lambda: self._gone or one not in self._linked, _EVENT_TIMEOUT_S
                )
            return self._silence or self._faults.get(one)

    def _watch_over(self) -> None:
        """Notice when the engine does not answer: whoever needs it just waits."""
        while True:
            try:
                answer = self.engine.ping()
            except EngineGoneError:
                return
            # Counted, not timed: when this process was stopped meanwhile (Ctrl-Z), it is not the
            # engine that was silent.
            silent_s = 0
            while wait([answer], 1.0).not_done:
                silent_s += 1
                if silent_s == ENGINE_SILENT_S:
                    self._note_silence(
                        f"the engine (process {self.engine_pid}) does not answer, and guests wait"
                        " for it: is it stopped, or the disk that DRAM is on?"
                    )
                elif silent_s == ENGINE_LOST_S:
                    lost = f"the engine did not answer for {silent_s} s and was ended"
                    self._note_silence(lost)
                    self._give_up(lost)
                    return
            with self._changed:
                was_silent = self._silence is not None
                if not self._given_up:
                    self._silence = None
            if answer.exception() is not None:
                return
            if was_silent:
                self._notice("the engine answers again")
            if self._closing.wait(_PING_S):
                return

    def _give_up(self, why: str) -> None:
        with self._changed:
            self._silence = why
            self._given_up = True
        self._process.give_up(why)

    def _note_silence(self, what: str) -> None:
        with self._changed:
            self._silence = what
        self._notice(what)

    def _watch(self) -> None:
        """Follow the engine's events; a VM whose writes do not fit into DRAM waits for space."""
        while (event := self.engine.events.get()) is not None:
            with self._changed:
                self._note(event)
            if isinstance(event, wire.PagePoisoned):
                # QEMU answers only when the guest goes on, which other events may be needed for.
                threading.Thread(
                    target=self._machine_check, args=(event,), name="mktme-mce", daemon=True
                ).start()
            if isinstance(event, wire.HoldVms):
                # An `inline` guest may need other events until it stands still.
                threading.Thread(
                    target=self._hold_for_capture, args=(event,), name="mktme-hold", daemon=True
                ).start()
            if isinstance(event, wire.DramFull | wire.DramCaughtUp):
                with contextlib.suppress(VmError):  # it ended by itself meanwhile
                    self._hold_or_release(event)
            with self._changed:
                self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _note(self, event: wire.Event) -> None:
        match event:
            case wire.VmLinked(vm=one):
                self._linked.add(one)
            case wire.VmUnlinked(vm=one):
                self._linked.discard(one)
            case wire.LinkRefused(reason=reason):
                # Its QEMU says so too, and ends; from a stranger it is none of our VMs' business.
                log.info("the engine refused a plugin: %s", reason)
            case wire.PagePoisoned():
                self.poisoned.append(event)
            case wire.CaptureDone(capture=number) | wire.CaptureFailed(capture=number):
                if self._capturing:
                    self._captured[number] = event
            case wire.DramCaughtUp(vm=one):
                self._faults.pop(one, None)
            case wire.DramFull(vm=one, message=message) | wire.VmFault(vm=one, message=message):
                self._faults[one] = message

    def _unlinked(self) -> Domain | None:
        """A domain that the engine is to follow and does not."""
        for one, domain in self._domains.items():
            if domain.spec.plugin is not None and one not in self._linked | self._leaving:
                return domain
        return None

    def _machine_check(self, event: wire.PagePoisoned) -> None:
        """A line does not match its MAC: the guest gets a machine check, then the page."""
        with self._changed:
            domain = self._domains.get(event.vm)
        if domain is None:
            return  # it is gone, or never was: who waits for the page waits
        line = first_line(event.lines)
        address = domain.guest_physical(event.ram_offset) + line * LINE_BYTES
        self._notice(
            f"{domain.label}: memory at {address:#x} (KeyID {event.keyid}) is not what was written"
            f" there ({event.kind.value}): machine check"
        )
        with contextlib.suppress(VmError, ServiceError):  # it ended meanwhile
            domain.machine_check(
                address,
                vm_status(self.engine, event.vm).qemu_pid,
                on_its_way=lambda: self.engine.release_page(event.vm, event.ram_offset),
            )

    def _hold_for_capture(self, event: wire.HoldVms) -> None:
        """Hold the guests that run until the engine has what it needs, and say how long."""
        with self._changed:
            domains = [self._domains.get(one) for one in event.vms]
        problem: str | None = None
        started: float | None = None
        try:
            with contextlib.ExitStack() as stack:
                for domain in domains:
                    if domain is None:
                        raise VmError("a VM is not up yet, or not any more: try again")
                    if not domain.stands_still:
                        started = time.monotonic() if started is None else started
                    hold = contextlib.ExitStack()
                    hold.enter_context(domain.paused())
                    stack.callback(self._end_hold, domain, hold)
                self.engine.vms_held(event.capture)
        except VmError as error:
            problem = str(error)
        except ServiceError as error:  # it is cancelled, or the engine gone or too slow
            log.info("capture %d: %s", event.capture, error)
        pause_s = None if started is None else time.monotonic() - started
        with contextlib.suppress(ServiceError):
            if problem is not None:
                self.engine.vms_held(event.capture, problem)
            self.engine.vms_released(event.capture, pause_s)

    def _end_hold(self, domain: Domain, hold: contextlib.ExitStack) -> None:
        """Let a guest go on; that it does not is told, for nobody waits for it here."""
        try:
            hold.close()
        except VmError as error:
            log.error("%s does not go on after a capture: %s", domain.label, error)
            try:
                domain.resume()
            except VmError as again:
                if domain.is_active:  # else its end is told as any other's
                    log.error("%s does not go on after a capture: %s", domain.label, again)
                    self._notice(f"{domain.label} does not go on after a capture: {again}")

    def _hold_or_release(self, event: wire.DramFull | wire.DramCaughtUp) -> None:
        with self._changed:
            domain = self._domains.get(event.vm)
        if domain is None:
            return  # `launch` looks for the fault when it has one
        if isinstance(event, wire.DramFull):
            domain.hold(f"it is held: {event.message}")
            self._notice(f"{domain.label} {domain.trouble}; it goes on when there is space")
        else:
            domain.release()
            self._notice(f"{domain.label} goes on: all it wrote is in DRAM")


def _nvdimm_file(config: VmConfig) -> wire.NvdimmFile | None:
    if config.nvdimm is None:
        return None
    one = config.nvdimm
    path = str(one.path.absolute())
    return wire.NvdimmFile(path=path, size_bytes=one.size_bytes, shared=one.shared)


def require_memory(needed_bytes: int) -> None:
    """Check that a guest of this size fits into this machine's memory now."""
    available = available_memory_bytes()
    if needed_bytes > available:
        raise EnvironmentUnfitError(
            f"a guest of {needed_bytes >> 20} MiB does not fit: {available >> 20} MiB"
            " of memory are available",
            hint="ask for less with --memory, or end other programs",
        )


def available_memory_bytes() -> int:
    """Memory that programs can still have without swapping (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise EnvironmentUnfitError("/proc/meminfo does not say what memory is available")


def require_disk(directory: Path, needed_bytes: int) -> int:
    """Check that a DRAM image of this size fits into a directory; returns what is free there."""
    try:
        status = os.statvfs(directory)
    except OSError as error:
        raise UsageError(
            f"{directory}: no place for the DRAM image: {error.strerror}", hint="--dram FILE"
        ) from error
    available = status.f_bavail * status.f_frsize
    if needed_bytes > available:
        raise EnvironmentUnfitError(
            f"DRAM of {needed_bytes >> 20} MiB does not fit into {directory}:"
            f" {available >> 20} MiB are free",
            hint="put it on another file system with --dram FILE, or set TMPDIR",
        )
    return available
