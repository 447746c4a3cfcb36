# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest as a libvirt domain: its life."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final, Self

import libvirt
import libvirt_qemu
import paramiko

from mktme.engine.sidecar import GuestSegment
from mktme.vm.bypass import refuse_bypasses
from mktme.vm.console import Console, GuestPanicError, VmError, VmLostError
from mktme.vm.domain_xml import DomainSpec, device_of, domain_xml
from mktme.vm.guest_map import Module, guest_physical, guest_ram_ranges
from mktme.vm.host import Host
from mktme.vm.shell import Shell
from mktme.vm.ssh import HOST_KEYS_SHOWN, Access, Ssh, host_key_from

# A machine check that software must recover from (SRAR): "data load", an address that is valid and
# physical (SDM vol. 3B, table 17-20; QEMU target/i386/cpu.h).
_MCI_STATUS: Final = 0xBD80_0000_0000_0134
_MCG_STATUS: Final = 0x7  # RIPV, EIPV, MCIP
_MCI_MISC: Final = 0x8C  # the address is physical, and good to 4 KiB
# Within milliseconds, unless the machine is very busy.
_QUEUE_TIMEOUT_S: Final = 5.0
_SUSPEND_TIMEOUT_S: Final = 30.0
_LOGIN_TIMEOUT_S: Final = 60.0
_PRESS_AGAIN_S: Final = 30.0
_POLL_S: Final = 0.002


class Domain:
    """A started guest; a context manager that leaves nothing of it behind.

    The guest starts to run only after its console is connected, so not a byte of it is lost.
    `started` is the `time.monotonic` of that moment. `trouble` is what keeps it from running, if
    something does.

    Args:
        host: where.
        spec: what to start.
        transcript: file for what its console says.
        label: what the user calls it.
        fault: asked why its memory is not served any more, None if it is; with True, its plugin
            has ended its QEMU.
        autodestroy: have libvirtd end a guest without an engine when this process ends. libvirt
            does not migrate such a guest. Without, it outlives this process, should that be killed.
            One with an engine never does: its plugin sees to it.
    """

    def __init__(
        self,
        host: Host,
        spec: DomainSpec,
        transcript: Path,
        label: str,
        fault: Callable[[bool], str | None] = lambda _ended: None,
        *,
        autodestroy: bool = True,
    ) -> None:
        self.spec = spec
        self.label = label
        self.trouble: str | None = None
        self.host_key: paramiko.PKey | None = None
        """Its sshd's, once that is known."""
        self._ssh: Ssh | None = None
        self._holding = threading.Lock()
        self._pausing = threading.Lock()
        self._pauses = 0  # how many `paused` there are now
        self._was_running = False  # before the first of them, or asked for since
        self._last_stop: Future[None] | None = None
        self._host = host
        self._transcript = transcript
        self._fault = fault
        self._autodestroy = autodestroy

    def __enter__(self) -> Self:
        self.bring_up()
        return self

    def bring_up(self) -> None:
        """Start the guest, paused, and connect to its console."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED
        if self._autodestroy and self.spec.plugin is None and not self._host.embedded:
            # The embedded driver has no such thing; vm/reaper.py stands in for it.
            flags |= libvirt.VIR_DOMAIN_START_AUTODESTROY
        xml = domain_xml(self.spec)
        if self.spec.plugin is not None:
            nvdimm = self.spec.nvdimm_bytes > 0
            refuse_bypasses(xml, inline=self.spec.inline, nvdimm=nvdimm)
        try:
            self._domain = self._host.connection.createXML(xml, flags)
        except libvirt.libvirtError as error:
            raise VmError(self.reason(f"libvirt could not start {self.label}: {error}")) from (
                error
            )
        try:
            self.connect()
        except BaseException:
            self.destroy()
            raise

    def connect(self) -> None:
        """Connect to its console: from then on not a byte of it is lost."""
        self.console = Console(self.spec.console_socket, self._transcript)

    @property
    def handle(self) -> libvirt.virDomain:
        """What libvirt has of it, for what is not here."""
        return self._domain

    def __exit__(self, *_error: object) -> None:
        if self._ssh is not None:
            self._ssh.close()
        self.console.close()
        self.destroy()

    @property
    def shell(self) -> Shell:
        """A root shell in the guest: ssh if it boots from a disk, else its console."""
        return self.console if self.spec.boot is None else self.ssh

    @property
    def ssh(self) -> Ssh:
        """The guest's shell over ssh.

        Raises:
            VmError: it has none: it is not up yet, or boots from no disk.
        """
        if self._ssh is None:
            if self.host_key is None:
                raise VmError(f"{self.label} has no ssh")
            self._ssh = Ssh(self.access, self.host_key, _LOGIN_TIMEOUT_S)
        return self._ssh

    @property
    def access(self) -> Access:
        """How to log in to the guest.

        Raises:
            VmError: it boots from no disk.
        """
        if self.spec.boot is None:
            raise VmError(f"{self.label} has no login: it boots from no disk")
        return self.spec.boot.access

    def boot(self, timeout_s: float) -> None:
        """Let the guest run, and wait for its shell.

        Raises:
            VmLostError: there is none in time.
        """
        self.resume()
        self.started = time.monotonic()
        with self.explained():
            if self.spec.boot is None:
                self.console.wait_ready(timeout_s)
            else:
                self._first_login(timeout_s)

    def _first_login(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        try:
            said = self.console.wait_for(HOST_KEYS_SHOWN, timeout_s, "booting to cloud-init's end")
        except GuestPanicError:
            raise
        except VmLostError as error:
            hint = "it must have cloud-init, and console=ttyS0; --boot-timeout gives it longer"
            raise VmLostError(str(error), hint=hint) from error
        self.host_key = host_key_from(said)
        if self.host_key is None:
            raise VmLostError(f"{self.label} showed no Ed25519 host key on its console")
        self._ssh = Ssh(self.access, self.host_key, max(1.0, deadline - time.monotonic()))

    def _booted_again(self, timeout_s: float) -> None:
        """Wait for the shell of a guest that has been up before."""
        with self.explained():
            if self._ssh is None:
                self.console.wait_ready(timeout_s)
            else:
                self._ssh.wait_booted_again(timeout_s)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a lost console within the `with` into what QEMU or its plugin said, if anything."""
        try:
            yield
        except VmLostError as error:
            raise VmLostError(self.reason(str(error)), hint=error.hint) from error

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the guest still: vCPUs stopped, and all device I/O finished (QEMU's vm_stop).

        Several can, from any threads: it goes on when the last is done, or stays paused if it was
        when the first came. Whoever has it go on, or stop, meanwhile says what it does then.
        """
        with self._pausing:
            if self._pauses == 0:
                self._was_running = not self.stands_still
                if self._was_running:
                    self._stop()
            self._pauses += 1
        try:
            yield
        finally:
            with self._pausing:
                self._pauses -= 1
                if self._pauses == 0 and self._was_running:
                    self._go_on()

    def suspend(self) -> None:
        """Stop the vCPUs; they stay so at the end of a `paused`, too.

        Raises:
            VmLostError: there is no QEMU any more, or its vCPUs do not stop: of an `inline` guest,
                one may be waiting for memory. Those that stop later go on.
        """
        with self._pausing:
            if self._pauses == 0:
                self._stop()
            self._was_running = False

    def resume(self) -> None:
        """Let the vCPUs run, or, while the guest is held, have `release` or `paused` do so."""
        with self._pausing:
            if self._pauses:
                self._was_running = True
            else:
                self._go_on()

    def hold(self, trouble: str) -> None:
        """Stop the vCPUs until `release`, whoever else resumes them; from any thread.

        Those of an `inline` guest are left alone: they stop by themselves at the next page that
        they lack, and until then nothing of theirs is lost.
        """
        with self._holding:
            if not self.spec.inline:
                self._stop()
            self.trouble = trouble

    def release(self) -> None:
        """End a `hold`; within a `paused`, the vCPUs run when that is over."""
        if self.spec.inline:
            # Not to wait for a `paused`: it may wait for what comes after this.
            with self._holding:
                self.trouble = None
            return
        with self._pausing, self._holding:
            if self._pauses:
                self._was_running = True
            else:
                self._call(self._domain.resume)
            self.trouble = None

    def _stop(self) -> None:
        """As `suspend`, whoever has it `paused`."""
        stopped: Future[None] = Future()
        self._last_stop = stopped

        def stop() -> None:
            error = None
            try:
                self._domain.suspend()
            except libvirt.libvirtError as failure:
                error = failure
            if not stopped.set_running_or_notify_cancel():
                # Nobody has waited for that any more. Who stopped it anew means it.
                if error is None and self._last_stop is stopped:
                    with contextlib.suppress(VmError):
                        self.resume()
            elif error is None:
                stopped.set_result(None)
            else:
                stopped.set_exception(error)

        # In a thread of its own, which ends with QEMU at the latest: who is in libvirt hears
        # neither a deadline nor Ctrl-C.
        threading.Thread(target=stop, name="mktme-suspend", daemon=True).start()
        try:
            self._call(lambda: stopped.result(_SUSPEND_TIMEOUT_S))
        except TimeoutError as error:
            if not stopped.cancel():  # they did just now
                self._call(stopped.result)
                return
            why = f"{self.label}: its vCPUs did not stop in {_SUSPEND_TIMEOUT_S:g} s"
            raise VmLostError(self.reason(why)) from error

    def _go_on(self) -> None:
        """As `resume`, whoever has it `paused`."""
        with self._holding:
            if self.trouble is None or self.spec.inline:
                self._call(self._domain.resume)

    @property
    def is_paused(self) -> bool:
        """Whether libvirt has the guest as paused."""
        return bool(self._state == libvirt.VIR_DOMAIN_PAUSED)

    @property
    def stands_still(self) -> bool:
        """Whether no vCPU runs: it is paused, or sleeps (ACPI S3), and cannot be paused then."""
        return self._state in (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED)

    @property
    def _state(self) -> int:
        state: int = self._call(self._domain.state)[0]
        return state

    @property
    def is_active(self) -> bool:
        """Whether there still is a QEMU."""
        try:
            return bool(self._domain.isActive())
        except libvirt.libvirtError:  # a domain that ended is forgotten
            return False

    def power_off(self, timeout_s: float) -> None:
        """Have the guest shut down by itself, and wait for QEMU's end.

        Raises:
            VmLostError: it is still there; `destroy` ends it in any case.
        """
        with self.explained():
            if self.spec.boot is None:
                self.console.send("poweroff -f")
                self.console.wait_end(timeout_s)
            else:
                self._press_power_button(timeout_s)

    def _press_power_button(self, timeout_s: float) -> None:
        """As who wants it off does: again, as nobody listens to it while a guest boots."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._call(
                lambda: self._domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            )
            left = deadline - time.monotonic()
            with contextlib.suppress(VmLostError):
                self.console.wait_end(min(left, _PRESS_AGAIN_S))
                return
            if left <= _PRESS_AGAIN_S:
                raise VmLostError(f"the guest is still there after {timeout_s:g} s")

    def reset(self, timeout_s: float) -> None:
        """Push the reset button, and wait for the guest's shell: the same QEMU boots it anew.

        Raises:
            VmError: there is no QEMU any more, or the guest did not boot in time.
        """
        if self.host_key is not None:
            _ = self.ssh  # there is a login, so that another boot can be told from this one
        self._call(self._domain.reset)
        self._booted_again(timeout_s)

    def reboot(self, timeout_s: float, how: str = "reboot") -> None:
        """Have the guest reboot by itself, and wait for its shell; otherwise as `reset`.

        Args:
            timeout_s: until when it has to be up.
            how: of a guest with systemd: ``reboot``, or ``kexec`` for a kernel that is loaded.
        """
        with self.explained():
            if self.spec.boot is None:
                self.console.send("reboot -f")
            else:
                self.ssh.run(f"systemctl --no-block {how}", timeout_s)
        self._booted_again(timeout_s)

    def standby(self, timeout_s: float) -> None:
        """Have the guest suspend itself to RAM (ACPI S3), and wake it once it has.

        Raises:
            VmError: it has not in time, or there is no QEMU any more.
        """
        asleep = threading.Event()
        event = libvirt.VIR_DOMAIN_EVENT_ID_PMSUSPEND
        connection = self._host.connection
        handle = self._call(
            lambda: connection.domainEventRegisterAny(
                self._domain, event, lambda *_event: asleep.set(), None
            )
        )
        try:
            self.ssh.run("systemctl --no-block suspend", timeout_s)
            if not asleep.wait(timeout_s):
                raise VmError(f"{self.label} does not sleep after {timeout_s:g} s")
            self._call(self._domain.pMWakeup)
        finally:
            self._call(lambda: connection.domainEventDeregisterAny(handle))

    def balloon(self, memory_bytes: int, timeout_s: float) -> None:
        """Have the guest give memory back, or take it again, until it has `memory_bytes`.

        Its driver, `virtio_balloon`, has to be loaded.

        Raises:
            VmError: it has not come as far in time, or there is no QEMU any more.
        """
        moved = threading.Event()

        def note(_host: object, _domain: object, actual_kib: int, _opaque: object) -> None:
            if actual_kib << 10 == memory_bytes:
                moved.set()

        event = libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE
        connection = self._host.connection
        handle = self._call(
            lambda: connection.domainEventRegisterAny(self._domain, event, note, None)
        )
        try:
            kib = memory_bytes >> 10
            self._call(lambda: self._domain.setMemoryFlags(kib, libvirt.VIR_DOMAIN_AFFECT_LIVE))
            if not moved.wait(timeout_s):
                actual = self._call(self._domain.memoryStats)["actual"]
                raise VmError(
                    f"{self.label} has {actual >> 10} MiB of memory after {timeout_s:g} s,"
                    f" not {kib >> 10}"
                )
        finally:
            self._call(lambda: connection.domainEventDeregisterAny(handle))

    def save(self, state: Path) -> None:
        """Save the guest to a file and end its QEMU; `Platform.restore` starts it again.

        The file has the guest's memory as the guest sees it: plaintext.

        Raises:
            EnvironmentUnfitError: this libvirt cannot for this QEMU.
            VmError: libvirt could not, and the guest goes on as before; or it is gone.
        """
        self.require_state()
        self._host.require_migration()
        # "sparse" is a file that QEMU writes itself, where its pages have fixed places. Of the
        # others libvirt makes a stream through a program that is not a part of its QEMU driver.
        parameters = {
            libvirt.VIR_DOMAIN_SAVE_PARAM_FILE: str(state),
            libvirt.VIR_DOMAIN_SAVE_PARAM_IMAGE_FORMAT: "sparse",
        }
        try:
            self._domain.saveParams(parameters, 0)
        except libvirt.libvirtError as error:
            kind = VmError if self.is_active else VmLostError
            raise kind(self.reason(f"{self.label} was not saved: {error}")) from error

    def require_state(self) -> None:
        """Check that its state can be in a file: not that of a TPM, which would be in two places.

        Raises:
            VmError: it has a TPM.
        """
        if self.spec.vtpm is not None:
            raise VmError(f"{self.label} has a vTPM, which is neither saved nor put back")

    def restore(self, state: Path) -> None:
        """Start a guest that was saved in a QEMU of its own, and leave it paused.

        Raises:
            VmError: libvirt could not, or there is no console to it.
        """
        connection = self._host.connection
        self._call(
            lambda: connection.restoreFlags(str(state), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
        )
        self._domain = self._call(lambda: connection.lookupByUUID(self.spec.uuid.bytes))
        self.console.reconnect()

    def guest_physical(self, ram_offset: int) -> int:
        """The guest-physical address of an offset in all of its memory."""
        for one in self.spec.modules:
            if 0 <= ram_offset - one.ram_offset < one.size_bytes:
                return one.guest_physical + ram_offset - one.ram_offset
        spec = self.spec
        return guest_physical(ram_offset, spec.memory_bytes, spec.hardware.machine)

    def plug_in(self, dimm: int) -> None:
        """Plug one of the guest's DIMMs in; the guest is told, and takes it as it sees fit.

        Raises:
            VmError: it is there already, or QEMU refuses.
        """
        module = self._dimm(dimm)
        self.qmp("device_add", driver="pc-dimm", **device_of(module))

    def unplug(self, dimm: int, timeout_s: float) -> Module:
        """Have the guest give one of its DIMMs back; returns which memory that was.

        Raises:
            VmError: it is not there, or the guest has not given it back in time.
        """
        module = self._dimm(dimm)
        device = device_of(module)["id"]
        with self._qemu_event("DEVICE_DELETED", lambda told: told.get("device") == device) as gone:
            self.qmp("device_del", id=device)
            if not gone.wait(timeout_s):
                raise VmError(f"{self.label} has not given {module.name} back in {timeout_s:g} s")
        return module

    def _dimm(self, index: int) -> Module:
        dimms = [one for one in self.spec.modules if one.name.startswith("dimm")]
        if not 0 <= index < len(dimms):
            raise VmError(f"{self.label} has {len(dimms)} DIMMs to plug in, and no number {index}")
        return dimms[index]

    @contextlib.contextmanager
    def _qemu_event(
        self, name: str, is_it: Callable[[dict[str, Any]], bool]
    ) -> Iterator[threading.Event]:
        """Within the `with`, wait for one of QEMU's own events."""
        came = threading.Event()

        def note(*event: Any) -> None:
            if is_it(json.loads(event[-2])):
                came.set()

        connection = self._host.connection
        handle = self._call(
            lambda: libvirt_qemu.qemuMonitorEventRegister(
                connection, self._domain, name, note, None
            )
        )
        try:
            yield came
        finally:
            self._call(lambda: libvirt_qemu.qemuMonitorEventDeregister(connection, handle))

    def run_job(self, command: str, timeout_s: float, **arguments: Any) -> None:
        """Run one of QEMU's jobs to its end (QMP commands that take a ``job-id``).

        Raises:
            VmError: it failed, or has not ended in time.
        """
        job = f"mktme-{command}"
        done = {"id": job, "status": "concluded"}
        with self._qemu_event("JOB_STATUS_CHANGE", lambda told: told == done) as concluded:
            self.qmp(command, **{"job-id": job}, **arguments)
            if not concluded.wait(timeout_s):
                raise VmError(f"{self.label}: {command} has not ended after {timeout_s:g} s")
        state = next(one for one in self.qmp("query-jobs") if one["id"] == job)
        self.qmp("job-dismiss", id=job)
        if "error" in state:
            raise VmError(f"{self.label}: {command}: {state['error']}")

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One command of QEMU's machine protocol (QMP); returns what it returns.

        Raises:
            VmError: QEMU refuses it, or is gone.
        """
        told = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(
            self._call(lambda: libvirt_qemu.qemuMonitorCommand(self._domain, told, 0))
        )
        if "error" in answer:
            raise VmError(f"{self.label}: {command}: {answer['error'].get('desc')}")
        return answer["return"]

    def monitor(self, command: str) -> str:
        """One command of QEMU's human monitor (HMP)."""
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        answer: str = self._call(
            lambda: libvirt_qemu.qemuMonitorCommand(self._domain, command, flags)
        )
        return answer

    def machine_check(
        self, address: int, qemu_pid: int | None, *, on_its_way: Callable[[], None]
    ) -> None:
        """Have an uncorrected memory error reported to the guest: a machine check.

        QEMU queues it for its vCPUs and waits for them, one of which may be waiting for the very
        page that is bad. Once it is queued, a vCPU takes it before it goes on.

        Args:
            address: guest-physical, of the bad line.
            qemu_pid: QEMU's process.
            on_its_way: called once it is queued: lets go on who waits for the page.

        Raises:
            VmError: QEMU cannot be told.
        """
        everywhere = "-b " if self.spec.vcpus > 1 else ""  # as Intel's processors do
        command = (
            f"mce {everywhere}0 1 {_MCI_STATUS:#x} {_MCG_STATUS:#x} {address:#x} {_MCI_MISC:#x}"
        )
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(self.monitor, command)
            deadline = time.monotonic() + _QUEUE_TIMEOUT_S
            looks = 0
            while looks < 2 and time.monotonic() < deadline and not told.done():
                looks = looks + 1 if self._waits_for_vcpus(qemu_pid) else 0
                wait([told], _POLL_S)
            on_its_way()
            told.result()

    def _waits_for_vcpus(self, qemu_pid: int | None) -> bool:
        """Whether QEMU was told something and has come as far as to wait for its vCPUs.

        libvirt says when it has sent a command. QEMU's main thread waits in poll(2) for commands,
        and for vCPUs on a futex; if that is for one that holds QEMU's lock while it waits for the
        page (an access by a device), nothing can be queued before it goes on.
        """
        sent = self._call(lambda: self._domain.controlInfo()[0])
        if sent != libvirt.VIR_DOMAIN_CONTROL_OCCUPIED:
            return False
        try:
            return Path(f"/proc/{qemu_pid}/wchan").read_text().startswith("futex")
        except OSError:
            return False

    def check_guest_map(self, segments: tuple[GuestSegment, ...]) -> None:
        """Compare the plugin's guest-physical map with QEMU's own flat view of memory.

        Raises:
            VmError: they differ: what the store tracker marks would be other lines.
        """
        ranges = guest_ram_ranges(self.monitor("info mtree -f"), self.spec.modules)
        if not ranges:
            raise VmError("QEMU shows no guest RAM in its memory tree")
        for start, stop, offset in ranges:
            fits = any(
                segment.guest_physical <= start
                and stop <= segment.guest_physical + segment.size_bytes
                and start - segment.guest_physical == offset - segment.ram_offset
                for segment in segments
            )
            if not fits:
                raise VmError(
                    f"QEMU has guest-physical {start:#x}-{stop:#x} at RAM offset {offset:#x},"
                    " the plugin has it elsewhere"
                )

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except libvirt.libvirtError as error:
            raise VmLostError(self.reason(f"{self.label}: {error}")) from error

    def reason(self, otherwise: str) -> str:
        """What is known to be wrong, or the plugin's last word, says more than a symptom does."""
        if self.trouble is not None:
            return f"{self.label}: {self.trouble}"
        said = [
            line
            for line in self._host.qemu_log(self.spec.name).splitlines()
            if line.startswith("mktme: ")
        ]
        fault = self._fault(bool(said))
        if fault is not None:
            return f"{self.label}: {fault}"
        return f"{self.label}: {said[-1].removeprefix('mktme: ')}" if said else otherwise

    def destroy(self) -> None:
        """Take the guest down, whatever it is doing."""
        with contextlib.suppress(libvirt.libvirtError):  # it is gone already
            self._domain.destroy()
