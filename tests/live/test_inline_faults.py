# SPDX-License-Identifier: GPL-2.0-or-later
"""The inline data path fails closed: whatever happens to the engine or DRAM, a guest gets its data
or nothing. It is never given zeros, and whoever waits is told what for.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from mktme.cli import ExitCode
from mktme.datapath.kinds import DataPath
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.confidentiality import Canary, find_canary
from mktme.proof.guest_ram import GuestRam, ram_of
from mktme.proof.residency import sampled
from mktme.proof.transparency import compare_memory
from mktme.pytest_plugin import vm_config
from mktme.service.client import EngineGoneError, EngineProcess, EngineRefusedError
from mktme.vm import domain as vm_domain
from mktme.vm.bypass import BypassError
from mktme.vm.config import BOOT_TIMEOUT_S, MIN_WINDOW_BYTES, VmConfig
from mktme.vm.console import VmError, VmLostError
from mktme.vm.domain_xml import DomainSpec, domain_xml
from mktme.vm.platform import Platform, Vm

from .conftest import Command

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB = 1 << 20
MEMORY = 192 * MIB
WINDOW = 16 * MIB
INLINE = ("run", "--datapath", "inline", "--memory", "192M", "--window", "16M", "--no-reference")
DEADLINE_S = 30
QUIET_S = 3  # a reader that is not held says something several times in as long
SUM = r"([0-9a-f]{64})  -\r?\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and ptrace need root")


def inline_config(window: str = "16M") -> VmConfig:
    return vm_config(memory="192M", datapath="inline", window=window)


class Reader:
    """A guest that reads more than its window holds, over and over, and says its SHA-256."""

    def __init__(self, vm: Vm) -> None:
        self._console = vm.domain.console
        block = "echo $i; head -c 786432 /bin/busybox"
        self._console.run(f"for i in $(seq 32); do {block}; done >/tmp/data", timeout_s=120)
        (self.expected, _) = self._console.run("sha256sum </tmp/data", 60).output.split()
        self._console.send("while :; do sha256sum </tmp/data; done")
        self.read()

    def read(self, times: int = 1) -> None:
        """Wait for it to have read all of it so often."""
        for _ in range(times):
            found = self._console._expect(SUM, 60, "reading")[1]
            assert found.decode() == self.expected, "the guest read what is not its data"

    def run_dry(self) -> None:
        """Wait until it says nothing more: but for what was on its way, at once."""
        for _ in range(3):
            try:
                found = self._console._expect(SUM, QUIET_S, "reading")[1]
            except VmLostError:
                return
            assert found.decode() == self.expected, "the guest read what is not its data"
        raise AssertionError("it goes on without what it needs")

    def read_to_its_end(self) -> None:
        """Until its console ends, which raises what is known of it."""
        while True:
            self.read()


@contextlib.contextmanager
def qemu_of(vm: Vm) -> Iterator[int]:
    """A guest's QEMU process, as a descriptor that is readable once it has ended."""
    pid = vm.status().qemu_pid
    assert pid is not None
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def ended(descriptor: int, timeout_s: float = DEADLINE_S) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def assert_no_memory_comes(ram: GuestRam, wait_on: int) -> None:
    """While nobody serves its faults, no page of a guest's may come into being: it would be zeros.

    Args:
        ram: its memory.
        wait_on: its QEMU, which is not to end meanwhile.
    """
    before = ram.allocated_bytes()
    assert 0 < before <= WINDOW
    assert not ended(wait_on, QUIET_S)
    assert ram.allocated_bytes() == before


class Told(list[str]):
    """What a platform tells its user."""

    def says(self, text: str) -> bool:
        return any(text in line for line in self)


# --- the engine is killed ---------------------------------------------------------------------


def test_engine_killed_while_the_guest_reads(emulator: Path | None) -> None:
    with (
        Platform(MEMORY, emulator=emulator) as platform,
        platform.launch(inline_config()) as vm,
        qemu_of(vm) as qemu,
    ):
        reader = Reader(vm)
        os.kill(platform.engine_pid, signal.SIGKILL)
        assert ended(qemu)
        with pytest.raises(VmLostError, match="the engine is gone"), vm.domain.explained():
            reader.read_to_its_end()
        with pytest.raises(EngineGoneError, match="the engine is gone"):
            vm.status()


def test_command_whose_engine_is_killed(command: Command) -> None:
    process = command.start(*INLINE)
    command.wait_for_step(process, "working")
    (pid,) = command.processes("mktme.service")
    os.kill(pid, signal.SIGKILL)
    status, _out, err = command.finish(process)
    assert status == ExitCode.RUN_FAILED, err
    assert "the engine is gone" in err
    assert "Traceback" not in err
    command.assert_nothing_left()


_PTRACE_DETACH: Final = 17  # sys/ptrace.h
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_WALL: Final = 0x4000_0000  # linux/wait.h: threads, too


@contextlib.contextmanager
def stopped_thread(pid: int, name: str) -> Iterator[None]:
    """Stop one thread of a process (ptrace(2)); the others run on."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    tasks = Path(f"/proc/{pid}/task").iterdir()
    (thread,) = (int(one.name) for one in tasks if (one / "comm").read_text().strip() == name)

    def trace(request: int) -> None:
        assert libc.ptrace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())

    trace(_PTRACE_SEIZE)
    trace(_PTRACE_INTERRUPT)
    os.waitpid(thread, _WALL)
    try:
        yield
    finally:
        trace(_PTRACE_DETACH)


@needs_root
def test_memory_is_never_zeros_between_the_engines_end_and_qemus() -> None:
    """The plugin ends QEMU when the engine is gone. Until it does, its own userfaultfd holds."""
    with Platform(MEMORY) as platform, platform.launch(inline_config()) as vm, qemu_of(vm) as qemu:
        reader = Reader(vm)
        pid = vm.status().qemu_pid
        assert pid is not None
        with ram_of(vm) as ram:
            with stopped_thread(pid, "mktme-link"):
                os.kill(platform.engine_pid, signal.SIGKILL)
                reader.run_dry()
                assert_no_memory_comes(ram, qemu)
            assert ended(qemu)


# --- the engine hangs -------------------------------------------------------------------------


def test_engine_hangs_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mktme.vm.platform.ENGINE_SILENT_S", 2)
    told = Told()
    with (
        Platform(MEMORY, notice=told.append) as platform,
        platform.launch(inline_config()) as vm,
        qemu_of(vm) as qemu,
        ram_of(vm) as ram,
    ):
        reader = Reader(vm)
        os.kill(platform.engine_pid, signal.SIGSTOP)
        reader.run_dry()
        assert_no_memory_comes(ram, qemu)
        silent = f"the engine (process {platform.engine_pid}) does not answer, and guests wait"
        assert platform.wait_for(lambda: told.says(silent), DEADLINE_S)
        with pytest.raises(VmLostError, match="does not answer"), vm.domain.explained():
            vm.domain.console._expect(SUM, 0.1, "reading")  # nobody blames the guest
        os.kill(platform.engine_pid, signal.SIGCONT)
        reader.read(3)
        assert platform.wait_for(lambda: told.says("the engine answers again"), DEADLINE_S)
        assert vm.status().fault is None


def test_engine_hangs_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended after a while, and with it every guest of its."""
    monkeypatch.setattr("mktme.vm.platform.ENGINE_SILENT_S", 2)
    monkeypatch.setattr("mktme.vm.platform.ENGINE_LOST_S", 6)
    told = Told()
    with (
        Platform(MEMORY, notice=told.append) as platform,
        platform.launch(inline_config()) as vm,
        qemu_of(vm) as qemu,
    ):
        reader = Reader(vm)
        os.kill(platform.engine_pid, signal.SIGSTOP)
        lost = "the engine did not answer for 6 s and was ended"
        with pytest.raises(EngineGoneError, match=lost):  # whoever has asked it is told, too
            vm.status()
        assert ended(qemu)
        with pytest.raises(VmLostError, match=lost), vm.domain.explained():
            reader.read_to_its_end()
        assert told.says(lost)


def test_a_guest_is_taken_down_while_the_engine_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mktme.vm.platform.ENGINE_SILENT_S", 2)
    with ExitStack() as stack:
        platform = stack.enter_context(Platform(MEMORY))
        engine = os.pidfd_open(platform.engine_pid)
        vm = stack.enter_context(platform.launch(inline_config()))
        with qemu_of(vm) as qemu:
            reader = Reader(vm)
            os.kill(platform.engine_pid, signal.SIGSTOP)
            reader.run_dry()
            started = time.monotonic()
            stack.close()
            # With a deadline each for the engine, libvirt and a request it would be 50.
            assert time.monotonic() - started < 10
            assert ended(qemu, 0)
            assert ended(engine, 0)
        os.close(engine)
        assert not platform.run_dir.exists()


@pytest.mark.parametrize(
    "moment", ["at once", pytest.param("when told", marks=pytest.mark.nightly)]
)
def test_interrupt_while_the_engine_hangs(command: Command, moment: str) -> None:
    process = command.start(*INLINE)
    command.wait_for_step(process, "working")
    (pid,) = command.processes("mktme.service")
    os.kill(pid, signal.SIGSTOP)
    if moment == "when told":
        command.wait_for_step(process, f"note: the engine (process {pid}) does not answer")
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    status, _out, err = command.finish(process)
    assert time.monotonic() - started < DEADLINE_S
    assert status == ExitCode.INTERRUPTED, err
    assert "Traceback" not in err
    command.assert_nothing_left()


def test_kill_of_the_harness_while_the_engine_hangs(command: Command) -> None:
    """A stopped engine does not see that its owner is gone."""
    process = command.start(*INLINE)
    command.wait_for_step(process, "working")
    (pid,) = command.processes("mktme.service")
    os.kill(pid, signal.SIGSTOP)
    process.kill()
    command.finish(process)
    command.assert_nothing_left()


# --- DRAM cannot be read ----------------------------------------------------------------------


def test_dram_cut_short_while_the_guest_reads() -> None:
    with Platform(MEMORY) as platform, platform.launch(inline_config()) as vm, qemu_of(vm) as qemu:
        reader = Reader(vm)
        os.truncate(platform.dram_path, 0)
        assert ended(qemu)
        with (
            pytest.raises(VmLostError, match=r"dram\.img: cut short at 0x[0-9a-f]+"),
            vm.domain.explained(),
        ):
            reader.read_to_its_end()
        # It is this VM's end, and nobody else's.
        fault = vm.status().fault
        assert fault is not None
        assert "cut short" in fault


@pytest.mark.nightly
def test_command_whose_dram_is_cut_short(command: Command, tmp_path: Path) -> None:
    dram = tmp_path / "dram.img"
    process = command.start(*INLINE, "--dram", str(dram))
    command.wait_for_step(process, "working")
    os.truncate(dram, 0)
    status, _out, err = command.finish(process)
    assert status == ExitCode.RUN_FAILED, err
    assert f"{dram}: cut short at 0x" in err
    assert "Traceback" not in err
    command.assert_nothing_left()


# --- DRAM is full -----------------------------------------------------------------------------


@pytest.fixture
def small_file_system(
    packaged_kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A tmpfs too small for what a guest writes while it boots, but not for what QEMU loads."""
    # The check for space before the run would refuse it; the case is space that others took.
    monkeypatch.setattr("mktme.vm.platform.require_disk", lambda _directory, needed: needed)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


FULL = r"dram\.img: cannot write at 0x[0-9a-f]+: No space left on device"


@needs_root
def test_full_dram_holds_the_guest_and_loses_nothing(small_file_system: Path) -> None:
    told = Told()
    with (
        Platform(MEMORY, dram=small_file_system / "dram.img", notice=told.append) as platform,
        platform.launch(inline_config(), boot=False) as vm,
        qemu_of(vm) as qemu,
        ram_of(vm) as ram,
    ):
        vm.domain.resume()
        assert platform.wait_for(lambda: told.says("it is held"), 60)
        with pytest.raises(VmError, match=FULL):
            platform.check(vm)
        with pytest.raises(VmLostError, match="it is held: .*" + FULL), vm.domain.explained():
            vm.domain.console.wait_ready(QUIET_S)
        assert_no_memory_comes(ram, qemu)
        more = ["mount", "-o", "remount,size=400m", str(small_file_system)]
        subprocess.run(more, check=True)
        assert platform.wait_for(lambda: told.says("goes on"), DEADLINE_S)
        vm.domain.console.wait_ready(BOOT_TIMEOUT_S)
        Reader(vm).read(2)
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed


@needs_root
@pytest.mark.nightly
def test_dram_full_for_good_ends_with_the_reason(
    small_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mktme.vm.domain._SUSPEND_TIMEOUT_S", 1)
    with ExitStack() as stack:
        platform = stack.enter_context(Platform(MEMORY, dram=small_file_system / "dram.img"))
        vm = stack.enter_context(platform.launch(inline_config(), boot=False))
        with pytest.raises(VmLostError, match="guest: it is held: .*" + FULL):
            vm.domain.boot(timeout_s=20)
        # A vCPU that waits cannot be paused either, which is no reason to wait for ever.
        with pytest.raises(VmLostError, match=FULL), vm.held():
            pass
        started = time.monotonic()
        with qemu_of(vm) as qemu:
            stack.close()
            assert ended(qemu, 0)
        assert time.monotonic() - started < 8  # libvirt would kill it after 10


# --- another engine ---------------------------------------------------------------------------


def blocks_of(canary: Canary, data: bytes) -> int:
    """How many of the canary's cipher blocks are in some data."""
    return sum(canary.page[at : at + 16] in data for at in range(0, 4096, 16))


def test_another_engine_resumes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine leaves when it dies is of no use to the next, nor to its guests."""
    dram = tmp_path / "dram.img"
    canary = Canary.random()
    with Platform(MEMORY, dram=dram) as platform, platform.launch(inline_config()) as vm:
        canary.plant(vm.domain.console)
        with vm.held() as engine:
            offset = find_canary(vm, canary)
            assert engine.read(vm.uuid, offset, 4096) == canary.page  # the key does it
        with qemu_of(vm) as qemu:
            os.kill(platform.engine_pid, signal.SIGKILL)
            assert ended(qemu)
    image = dram.read_bytes()
    assert any(image[vm.base + offset : vm.base + offset + 4096])

    # It takes no DRAM that is there.
    with pytest.raises(EngineRefusedError, match="exists"), Platform(MEMORY, dram=dram):
        pass
    assert dram.read_bytes() == image

    # Had it the old ciphertext, no KeyID of its would read it, not even one of the same number;
    # and to a VM of the same name and place its memory is new.
    with EngineProcess(tmp_path, tmp_path / "second.img", MEMORY) as second:
        client = second.client
        (tmp_path / "second.img").write_bytes(image)
        assert client.status().vms == ()
        assert client.program_key(KeyMode.RANDOM) == vm.keyid
        for keyid in (None, 0, vm.keyid):
            assert blocks_of(canary, client.read_dram(vm.base + offset, 4096, keyid)) == 0
        client.clear_key(vm.keyid)
        added = client.add_vm(
            vm.uuid,
            name=vm.name,
            memory_bytes=MEMORY,
            track=None,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
            datapath=DataPath.INLINE,
            window_bytes=WINDOW,
        )
        assert (added.base, added.keyid) == (vm.base, vm.keyid)
        assert client.read(vm.uuid, offset, 4096) == bytes(4096)

    # A QEMU that comes for the old VM is sent away.
    with Platform(MEMORY) as platform:
        argument = platform._plugin_argument
        monkeypatch.setattr(
            platform, "_plugin_argument", lambda _vm, config: argument(vm.uuid, config)
        )
        with (
            pytest.raises(VmError, match=f"no VM {vm.uuid} was announced to this engine"),
            platform.launch(inline_config()),
        ):
            pass


# --- bounds -----------------------------------------------------------------------------------


def test_a_guest_boots_in_the_smallest_window() -> None:
    with (
        Platform(MEMORY) as platform,
        platform.launch(inline_config(str(MIN_WINDOW_BYTES)), boot=False) as vm,
        sampled(vm, MIN_WINDOW_BYTES) as bound,
    ):
        vm.domain.boot(2 * BOOT_TIMEOUT_S)  # it pages all the time, and other work slows that
        found = vm.domain.console.run("seq 20000 | sha256sum", timeout_s=120).output
    expected = hashlib.sha256(b"".join(b"%d\n" % number for number in range(1, 20_001)))
    assert found.split()[0] == expected.hexdigest()
    assert bound.passed, bound


@pytest.mark.parametrize(
    ("device", "said", "hint"),
    [
        (
            "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>"
            "<source file='/dev/null'/><target dev='vda' bus='virtio'/></disk>",
            "<disk> with cache='none': the host transfers data to and from pinned guest pages",
            "cache='writeback'",
        ),
        (
            "<filesystem type='mount'><driver type='virtiofs'/><source dir='/tmp'/>"
            "<target dir='share'/></filesystem>",
            "<filesystem> with virtiofs: it gives guest RAM to another process",
            "use 9p",
        ),
    ],
    ids=["cache=none", "virtiofs"],
)
def test_a_guest_with_a_bypass_is_never_started(
    monkeypatch: pytest.MonkeyPatch, device: str, said: str, hint: str
) -> None:
    def with_device(spec: DomainSpec) -> str:
        return domain_xml(spec).replace("</devices>", f"{device}</devices>")

    monkeypatch.setattr(vm_domain, "domain_xml", with_device)
    with Platform(MEMORY) as platform:
        with pytest.raises(BypassError) as caught, platform.launch(inline_config()):
            pass
        assert str(caught.value) == said
        assert hint in str(caught.value.hint)
        assert not list(platform.run_dir.glob("*.console")), "a QEMU was started"
        assert platform.host.connection.listAllDomains() == []
        assert platform.engine.status().vms == ()
