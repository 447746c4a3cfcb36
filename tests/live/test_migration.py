# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration between two hosts on this machine: two libvirtd, and two platforms."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import libvirt
import msgspec
import pytest

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.proof.confidentiality import Canary, find_canary, search_dram
from mktme.proof.residency import Residency, sampled
from mktme.proof.transparency import compare_memory
from mktme.pytest_plugin import vm_config
from mktme.service.client import EngineClient
from mktme.service.wire import Welcome
from mktme.vm import platform as platform_module
from mktme.vm.arrival import MigrationError
from mktme.vm.config import VmConfig
from mktme.vm.disk_images import user_image
from mktme.vm.hardware import Firmware, Hardware
from mktme.vm.host import EnvironmentUnfitError
from mktme.vm.migration import Migration, MigrationReport
from mktme.vm.platform import Platform, Vm

from .libvirtd import Libvirtd, needs_root, private_libvirtd
from .test_disk_guests import HANGS
from .test_inline_life import DISK_DRIVER

MIB: Final = 1 << 20
MEMORY: Final = 256 * MIB
WINDOW: Final = 48 * MIB
PAGE: Final = 4096
TIMEOUT_S: Final = 120

pytestmark = [needs_root, pytest.mark.usefixtures("quick_boots")]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    # Not tmp_path: the paths of UNIX sockets are short.
    path = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    try:
        yield path
        assert list(path.iterdir()) == []
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def hosts(directory: Path) -> Iterator[tuple[Libvirtd, Libvirtd]]:
    """Two hosts; at the end nothing is left of either."""
    with host(directory / "a") as here, host(directory / "b") as there:
        yield here, there


@contextlib.contextmanager
def host(directory: Path) -> Iterator[Libvirtd]:
    with private_libvirtd(directory) as running:
        namespace = os.readlink(f"/proc/{running.process.pid}/ns/mnt")
        yield running
        if running.process.poll() is None:
            assert domains(running) == []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            assert os.readlink(process / "ns" / "mnt") != namespace


@pytest.fixture
def platforms(hosts: tuple[Libvirtd, Libvirtd]) -> Iterator[tuple[Platform, Platform]]:
    here, there = hosts
    with Platform(MEMORY, connect=here.uri) as source, Platform(MEMORY, connect=there.uri) as other:
        yield source, other
    assert not source.run_dir.exists()
    assert not other.run_dir.exists()
    for running in hosts:
        assert domains(running) == []


def domains(running: Libvirtd) -> list[str]:
    connection = libvirt.open(running.uri)
    try:
        return [one.name() for one in connection.listAllDomains()]
    finally:
        connection.close()


def guest_config(datapath: str) -> VmConfig:
    window = f"{WINDOW // MIB}M" if datapath == "inline" else None
    return vm_config(memory=f"{MEMORY // MIB}M", datapath=datapath, window=window)


def check_memory(vm: Vm) -> None:
    with vm.held() as engine:
        found = compare_memory(vm, engine)
    assert found.passed, found


def assert_nothing_of(vm: Vm, platform: Platform) -> None:
    """A platform that runs on has no KeyID, DRAM, domain or QEMU of a guest."""
    status = platform.engine.status()
    assert status.vms == ()
    assert [one.keyid for one in status.keys] == [0]
    for one in platform.host.connection.listAllDomains():
        assert one.UUID() != vm.uuid.bytes
    assert_no_qemu(platform)


def assert_no_qemu(platform: Platform) -> None:
    """No QEMU with a socket in a platform's directory, once those that are ending have."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = command.read_bytes()
            if b"qemu-system" in line and os.fsencode(platform.run_dir) in line:
                descriptor = os.pidfd_open(int(command.parent.name))
                assert select.select([descriptor], [], [], 20)[0], "a QEMU is left"
                os.close(descriptor)


# --- it moves -------------------------------------------------------------------------------------

WORK: Final = "(workload >/run/sums 2>&1; echo $? >/run/status) & echo"
CHECK_MEMORY: Final = (
    "(export MEMTESTER_TEST_MASK=1; until [ -e /run/stop ]; do verify-memory 8; done"
    " >/run/memory 2>&1; echo >/run/stopped) & echo"
)
SUMS: Final = "while ! [ -s /run/status ]; do sleep 1; done; cat /run/sums /run/status"
VERIFIED: Final = ": >/run/stop; while ! [ -s /run/stopped ]; do sleep 1; done; cat /run/memory"


@contextlib.contextmanager
def bounded(vm: Vm, *platforms: Platform) -> Iterator[None]:
    """Sample the guest's memory there for as long as it moves: it is within the window."""
    bounds: list[Residency] = []
    over = threading.Event()

    def sample(platform: Platform) -> None:
        assert platform.wait_for(lambda: vm.uuid in platform._linked, 60)
        with sampled(dataclasses.replace(vm, engine=platform.engine), WINDOW) as bound:
            bounds.append(bound)
            over.wait()

    threads = [threading.Thread(target=sample, args=(one,)) for one in platforms]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(bounds) == len(platforms)
    assert all(bound.passed for bound in bounds), bounds


@pytest.mark.parametrize("datapath", ["shadow", "inline"])
def test_guest_moves_while_it_works(datapath: str, platforms: tuple[Platform, Platform]) -> None:
    source, destination = platforms
    canary = Canary.random()
    with source.launch(guest_config(datapath)) as vm:
        console = vm.domain.console
        canary.plant(console)
        with vm.held() as engine:
            page = find_canary(vm, canary)
            assert engine.read(vm.uuid, page, PAGE) == canary.page
        before = read_dram(source, vm.base + page)
        console.run(CHECK_MEMORY, TIMEOUT_S)
        console.run(WORK, TIMEOUT_S)
        with ExitStack() as stack:
            window = platforms if datapath == "inline" else ()
            with bounded(vm, *window):
                moved = stack.enter_context(Migration(vm, source, destination))
            check_report(moved.report, datapath)
            assert_nothing_of(vm, source)
            assert not vm.domain.is_active
            # The page is under another key there, and readable with the destination's KeyID alone.
            there = moved.vm
            with there.held() as engine:
                assert there.uuid == vm.uuid
                assert find_canary(there, canary) == page
                assert engine.read(there.uuid, page, PAGE) == canary.page
                assert engine.read(there.uuid, page, PAGE, keyid=0) != canary.page
                assert search_dram(there, canary, destination.dram_path).passed
                assert compare_memory(there, engine).passed
            after = read_dram(destination, there.base + page)
            assert before != after
            assert len({before, after, canary.page, bytes(PAGE)}) == 4
            console = there.domain.console
            sums = console.run(SUMS, 200).output.split("\n")
            assert sums[-3:-1] == ["@mktme workload done", "0"]
            verified = console.run(VERIFIED, TIMEOUT_S).output
            assert "verified" in verified
            assert "FAILED" not in verified
            check_memory(there)
        assert_nothing_of(vm, destination)


def read_dram(platform: Platform, address: int) -> bytes:
    with platform.dram_path.open("rb") as dram:
        return os.pread(dram.fileno(), PAGE, address)


def check_report(report: MigrationReport, datapath: str) -> None:
    assert (report.source, report.destination) == (datapath, datapath)
    assert report.memory_bytes == MEMORY
    assert 0 < report.downtime_s < report.transfer_s < report.total_s
    assert report.sent_bytes > report.pages_sent * PAGE > 16 * MIB
    assert msgspec.json.decode(msgspec.json.encode(report), type=MigrationReport) == report


def test_there_and_back_on_another_data_path(
    platforms: tuple[Platform, Platform], tmp_path: Path
) -> None:
    """With a disk, which both hosts have."""
    source, destination = platforms
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    inline = dataclasses.replace(guest_config("inline"), disk=disk)
    shadow = dataclasses.replace(
        inline, datapath=DataPath.SHADOW, window_bytes=None, track=Track.STORES_AND_PAGES
    )
    with source.launch(inline) as vm, ExitStack() as stack:
        vm.domain.console.run(DISK_DRIVER, TIMEOUT_S)
        boot_id = vm.domain.console.run("cat /proc/sys/kernel/random/boot_id", TIMEOUT_S).output
        with bounded(vm, source):
            there = stack.enter_context(Migration(vm, source, destination, config=shadow)).vm
        check_memory(there)
        there.domain.console.run("echo there | dd of=/dev/vda conv=sync,fsync", TIMEOUT_S)
        # A guest that is held stays held.
        there.domain.suspend()
        with bounded(vm, source):
            back = stack.enter_context(Migration(there, destination, source, config=inline)).vm
        assert back.domain.is_paused
        back.domain.resume()
        assert_nothing_of(vm, destination)
        check_memory(back)
        console = back.domain.console
        assert disk.read_bytes()[:6] == b"there\n"
        console.run("echo 3 >/proc/sys/vm/drop_caches", TIMEOUT_S)
        assert console.run("head -n1 /dev/vda", TIMEOUT_S).output == "there\n"
        assert console.run("cat /proc/sys/kernel/random/boot_id", TIMEOUT_S).output == boot_id


@pytest.mark.parametrize("firmware", [Firmware.BIOS, Firmware.UEFI])
def test_disk_goes_along(
    firmware: Firmware, platforms: tuple[Platform, Platform], tmp_path: Path
) -> None:
    """The same layer, by names of each platform's own: who has the guest last removes it."""
    source, destination = platforms
    image = tmp_path / "hangs.img"
    image.write_bytes(HANGS.ljust(MIB, b"\0"))
    config = dataclasses.replace(
        guest_config("shadow"), image=user_image(image), hardware=Hardware(firmware=firmware)
    )
    with ExitStack() as stack:
        with source.launch(config, boot=False) as vm:
            vm.domain.resume()
            left = vm.domain.spec.boot
            assert left is not None
            layer = left.disk.stat().st_ino
            moved = stack.enter_context(Migration(vm, source, destination)).vm
            come = moved.domain.spec.boot
            assert come is not None
            assert come.disk.stat().st_ino == layer
            check_memory(moved)
            # QEMU answers at the port that is to lead to the guest's sshd, and there alone.
            socket.create_connection(("127.0.0.1", come.access.port)).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", left.access.port))
        assert not left.disk.exists()
        assert come.disk.stat().st_ino == layer
        assert come.nvram.exists() == (firmware is Firmware.UEFI)
        assert_nothing_of(vm, source)
    assert not come.disk.exists()
    assert_nothing_of(vm, destination)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("datapath", "firmware"), [("shadow", "bios"), ("inline", "uefi")])
def test_guest_that_boots_its_disk_takes_it_along(
    datapath: str, firmware: str, hosts: tuple[Libvirtd, Libvirtd]
) -> None:
    """And removes it at the end, though it was made where it came from."""
    config = vm_config(guest="debian-12", memory="512M", datapath=datapath, firmware=firmware)
    here, there = hosts
    with (
        Platform(512 * MIB, connect=there.uri) as destination,
        Platform(512 * MIB, connect=here.uri) as source,
        ExitStack() as stack,
    ):
        with source.launch(config) as vm:
            vm.domain.ssh.run("head -c 8000000 /dev/urandom >/root/before; sync", TIMEOUT_S)
            boot = "cat /proc/sys/kernel/random/boot_id"
            look = f"{boot}; sha256sum /root/before"
            before = vm.domain.ssh.run(look, TIMEOUT_S).output
            # Written back at the destination, where it was not written.
            vm.domain.ssh.run("head -c 4000000 /dev/urandom >/root/dirty", TIMEOUT_S)
            dirty = vm.domain.ssh.run("sha256sum /root/dirty", TIMEOUT_S).output
            moved = stack.enter_context(Migration(vm, source, destination)).vm
            port = vm.domain.access.port
        assert_nothing_of(vm, source)
        assert list(source.run_dir.glob(f"{vm.uuid.hex[:8]}-*")) == []
        ssh = moved.domain.ssh
        assert moved.domain.access.port != port
        assert ssh.run(look, TIMEOUT_S).output == before
        ssh.run("sync; echo 3 >/proc/sys/vm/drop_caches", TIMEOUT_S)
        assert ssh.run("sha256sum /root/dirty", TIMEOUT_S).output == dirty
        check_memory(moved)
        moved.domain.reset(600)
        again = moved.domain.ssh.run(look, TIMEOUT_S).output
        assert again.splitlines()[1:] == before.splitlines()[1:]
        assert again != before
        stack.close()
        assert_nothing_of(vm, destination)
        assert list(destination.run_dir.glob(f"{vm.uuid.hex[:8]}-*")) == []


# --- it stays -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Underway:
    """A migration at its first pass over memory, which would take minutes to end."""

    migration: Migration[Vm]
    destination: Platform
    libvirtd: Libvirtd


def interrupt(_underway: Underway) -> None:
    os.kill(os.getpid(), signal.SIGINT)


FAILURES: Final[dict[str, tuple[Callable[[Underway], None], type[BaseException], str]]] = {
    "cancelled": (lambda one: one.migration.cancel(), MigrationError, "it was cancelled"),
    "interrupted": (interrupt, KeyboardInterrupt, "^$"),
    "too slow": (lambda _one: None, MigrationError, "it took more than 8 s"),
    "engine killed": (
        lambda one: os.kill(one.destination.engine_pid, signal.SIGKILL),
        MigrationError,
        "the engine at the destination is gone",
    ),
    "libvirtd killed": (
        lambda one: one.libvirtd.process.kill(),
        MigrationError,
        "libvirt at .* is gone",
    ),
}


@contextlib.contextmanager
def once_underway(vm: Vm, act: Callable[[], None]) -> Iterator[None]:
    """Within the `with`, `act` once memory is on its way (QEMU's MIGRATION_PASS)."""
    connection = vm.domain.handle.connect()
    begun = threading.Event()

    def note(_connection: object, _domain: object, iteration: int, _opaque: object) -> None:
        if iteration == 1:
            begun.set()

    def wait_and_act() -> None:
        if begun.wait(60):
            act()

    handle = connection.domainEventRegisterAny(
        vm.domain.handle, libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, note, None
    )
    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        connection.domainEventDeregisterAny(handle)
    assert begun.is_set()


@pytest.mark.parametrize("datapath", [pytest.param("shadow", marks=pytest.mark.nightly), "inline"])
def test_failure_leaves_the_guest_where_it_is(
    datapath: str, hosts: tuple[Libvirtd, Libvirtd], directory: Path
) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(Platform(MEMORY, connect=hosts[0].uri))
        vm = stack.enter_context(source.launch(guest_config(datapath)))
        vm.domain.console.run(CHECK_MEMORY, TIMEOUT_S)
        vm.domain.handle.migrateSetMaxSpeed(1)  # MiB/s
        for name, (act, error, message) in FAILURES.items():
            there = hosts[1]
            if name == "libvirtd killed":
                there = stack.enter_context(host(directory / "c"))
            with Platform(MEMORY, connect=there.uri) as destination:
                timeout_s = 8 if name == "too slow" else 60
                migration = Migration(vm, source, destination, timeout_s=timeout_s)
                underway = Underway(migration, destination, there)
                with (
                    once_underway(vm, lambda act=act, one=underway: act(one)),  # type: ignore[misc]
                    pytest.raises(error, match=message),
                    migration,
                ):
                    pass
                if name not in ("engine killed", "libvirtd killed"):
                    assert_nothing_of(vm, destination)
                assert vm.domain.is_active
                assert not vm.domain.is_paused
                check_memory(vm)
            assert_no_qemu(destination)
        verified = vm.domain.console.run(VERIFIED, TIMEOUT_S).output
        assert "verified" in verified
        assert "FAILED" not in verified


# --- it is refused --------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_the_guest_moves(
    hosts: tuple[Libvirtd, Libvirtd], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = hosts
    with (
        Platform(2 * MEMORY, connect=here.uri) as source,
        Platform(MEMORY, connect=there.uri) as destination,
        source.launch(guest_config("shadow")) as vm,
    ):

        def refused(to: Platform, message: str, config: VmConfig | None = None) -> None:
            with (
                pytest.raises(MigrationError, match=message),
                Migration(vm, source, to, config=config),
            ):
                pass
            assert vm.status().linked
            assert not vm.domain.is_paused

        refused(source, "the same platform")
        with Platform(MEMORY, connect=here.uri) as same_host:
            refused(same_host, "one host to libvirt")
        with Platform(MEMORY) as embedded:
            refused(embedded, "embedded driver migrates no guests")
        with Platform(MEMORY // 2, connect=there.uri) as small:
            refused(small, "DRAM")
        one_key = PlatformConfig(keyid_bits=1)
        with Platform(MEMORY, connect=there.uri, config=one_key) as full:
            full.engine.program_key(KeyMode.RANDOM)
            refused(full, "KeyID")
        larger = dataclasses.replace(vm.config, memory_bytes=2 * MEMORY)
        refused(destination, "keeps its image, memory", larger)

        with monkeypatch.context() as patch:
            patch.setattr(platform_module, "plugin_path", no_plugin)
            refused(destination, "plugin .* is not built")
        with monkeypatch.context() as patch:
            patch.setattr(destination.engine, "welcome", of_version(destination.engine, "0.0.9"))
            refused(destination, r"has mktme 0\.0\.9")
        with monkeypatch.context() as patch:  # libvirt finds out
            patch.setattr(platform_module, "plugin_path", lambda _api: Path("/bin/true"))
            refused(destination, "did not move")
        assert_nothing_of(vm, destination)

        check_memory(vm)


def no_plugin(_api: int) -> Path:
    raise EnvironmentUnfitError("the QEMU plugin /x.so is not built", hint="make setup")


def of_version(engine: EngineClient, version: str) -> Welcome:
    return msgspec.structs.replace(engine.welcome, mktme_version=version)
