# SPDX-License-Identifier: GPL-2.0-or-later
"""What forensic tools that others wrote find in DRAM, and what in the same memory decrypted.

Captures are of live guests, on both data paths. Control: what a tool does not find in DRAM it finds
in DRAM that is not encrypted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import drgn
import numpy as np
import pytest

from mktme.cli import ExitCode
from mktme.dump.decrypt import VmMemory, decrypt
from mktme.dump.formats import Format
from mktme.dump.image import DumpImage
from mktme.dump.info import describe_image
from mktme.dump.keys import EngineKeys, FileKeys
from mktme.engine.dram import CaptureRecord
from mktme.proof.guest_ram import ram_of
from mktme.proof.transparency import run_workload
from mktme.pytest_plugin import vm_config
from mktme.vm.config import VmConfig
from mktme.vm.image_cache import cache_dir
from mktme.vm.images import GuestImage
from mktme.vm.platform import Platform, Vm

from ..vectors import reference
from .conftest import Command
from .crypt import crypt_guest

MIB = 1 << 20
MEMORY = 256 * MIB
DISK_BYTES = 4 * MIB
SECTOR = 512
COMMAND_S = 60
DATAPATHS = ("shadow", "inline")


def config_for(datapath: str, **more: object) -> VmConfig:
    """A guest of 256 MiB; `inline`, with an eighth of it in the window."""
    window = "32M" if datapath == "inline" else None
    return vm_config(memory="256M", datapath=datapath, window=window, **more)  # type: ignore[arg-type]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


def tool(name: str) -> str:
    """A program of a Debian package that set-up installs; CI has no excuse not to have it."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {name}")
        pytest.skip(f"there is no {name}: make setup installs it")
    return found


def offline(image: Path, key: Path, out: Path, kind: Format) -> Path:
    """Decrypt a capture with its key alone."""
    with (
        DumpImage.open(image) as opened,
        FileKeys.read(opened, opened.vm("guest"), [str(key)]) as keys,
        VmMemory(opened, opened.vm("guest"), keys) as memory,
    ):
        decrypt(memory, out, kind, image=image)
    return out


# --- captures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_capture_of_a_held_guest_is_its_ram(datapath: str, tmp_path: Path) -> None:
    """Read behind the engine's back, and decrypted by the engine, the same to the last byte."""
    image, out = tmp_path / "c.img", tmp_path / "out.raw"
    with Platform(MEMORY) as platform, platform.launch(config_for(datapath)) as vm:
        run_workload(vm.domain.console)
        with vm.held() as engine:
            record = platform.capture(image)
            assert vm.domain.is_paused
            assert record.pause_s is None  # nobody had to be held for it
            with DumpImage.open(image) as opened:
                assert describe_image(opened, verify=True).verified
                keys = EngineKeys(engine, opened.vm("guest"))
                with VmMemory(opened, opened.vm("guest"), keys) as memory:
                    report = decrypt(memory, out, Format.RAW, image=image)
            assert report.written_bytes > MEMORY // 4
            compared = differing = 0
            with ram_of(vm) as ram, out.open("rb") as decrypted:
                for offset, plain in ram.chunks():
                    there = np.ones(len(plain) // 4096, np.bool_)
                    if datapath == "inline":
                        there = ram.populated(offset, len(plain))
                    left, right = (
                        np.frombuffer(data, np.uint64).reshape(-1, 512)[there]
                        for data in (plain, os.pread(decrypted.fileno(), len(plain), offset))
                    )
                    compared += left.size * 8
                    differing += int(np.count_nonzero(left != right))
            assert differing == 0
            assert compared > 16 * MIB
        vm.domain.console.run("true", COMMAND_S)  # it goes on


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_capture_while_the_guest_works_is_of_one_moment(
    datapath: str, key_file: Path, tmp_path: Path
) -> None:
    """What the guest writes meanwhile is not in it: each line still has the MAC that it had.

    The inline guest has 32 MiB of window and works on 64, so that pages leave it all the time. A
    second capture, of one VM, comes while it is paused, and leaves it so.
    """
    more = {"algorithm": "aes-xts-128-integrity"} if datapath == "inline" else {}
    config = config_for(datapath, key_file=key_file, **more)
    with Platform(MEMORY) as platform, platform.launch(config) as vm:
        with ThreadPoolExecutor(1) as pool:
            works = pool.submit(run_workload, vm.domain.console)
            records = [platform.capture(tmp_path / f"{number}.img") for number in range(3)]
            assert not works.done()
            works.result()  # it checks its own sums
        for number, record in enumerate(records):
            assert record.pause_s is not None
            assert 0 < record.pause_s < record.total_s
            image = tmp_path / f"{number}.img"
            out = offline(image, key_file, tmp_path / f"{number}.elf", Format.ELF)
            assert kernel_of(out) == vm.domain.console.run("uname -r", COMMAND_S).output.strip()
            show(f"{datapath} capture {number}", record)
        vm.domain.suspend()
        one = platform.capture(tmp_path / "one.img", [vm])
        assert vm.domain.is_paused
        assert one.pause_s is None
        assert one.vms == (vm.uuid,)
        vm.domain.resume()
        vm.domain.console.run("true", COMMAND_S)


def show(what: str, record: CaptureRecord) -> None:
    """For who runs this with -s: the figures."""
    held = "none" if record.pause_s is None else f"{record.pause_s * 1e3:.1f} ms"
    print(
        f"{what}: held {held}, {record.data_bytes / MIB:.1f} MiB,"
        f" {record.saved_bytes / MIB:.2f} MiB of it saved before writes, {record.total_s:.2f} s,"
        f" {record.method}"
    )


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_capture_and_decryption_from_another_terminal(
    command: Command, datapath: str, tmp_path: Path
) -> None:
    window = ("--window", "25%") if datapath == "inline" else ()
    process = command.start(
        *("run", "--keep", "--memory", "256M", "--no-reference", "--datapath", datapath, *window)
    )
    command.wait_for_step(process, "control socket ")
    image, out = tmp_path / "c.img", tmp_path / "out.lime"
    status, said, err = command.run("dump", "capture", str(image), "--vm", "guest1", "--json")
    assert status == ExitCode.OK, err
    assert json.loads(said)["capture"]["pause_s"] > 0
    status, said, err = command.run("dump", "info", str(image), "--verify")
    assert status == ExitCode.OK, err
    assert "verified" in said
    status, said, err = command.run(
        *("dump", "decrypt", str(image), "-o", str(out), "--format", "lime")
    )
    assert status == ExitCode.OK, err
    assert b"Linux version" in out.read_bytes()
    status, said, err = command.run("dump", "capture", str(image))
    assert (status, said) == (ExitCode.USAGE, "")
    assert "exists" in err
    os.killpg(process.pid, signal.SIGINT)
    status, said, err = command.finish(process)
    assert (status, err) == (ExitCode.OK, "")
    command.assert_nothing_left()
    status, said, err = command.run("dump", "decrypt", str(image), "-o", str(tmp_path / "late"))
    assert status == ExitCode.USAGE
    assert "no key: no platform is running" in err


def test_engine_killed_while_it_captures(tmp_path: Path) -> None:
    """Nothing is left, and the guest does not go on without it."""
    with Platform(MEMORY) as platform, platform.launch(config_for("shadow")) as vm:
        image = tmp_path / "c.img"
        capture = platform.engine.start_capture(image)
        pid = vm.status().qemu_pid
        assert pid is not None
        qemu = os.pidfd_open(pid)
        os.kill(platform.engine_pid, signal.SIGKILL)
        Command.wait_ended(qemu)
        assert capture > 0
        assert list(tmp_path.iterdir()) == []


# --- the cold-boot test -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def crypt_image(tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    return crypt_guest(tmp_path_factory.mktemp("crypt"))


@contextmanager
def with_encrypted_disk(
    config: VmConfig, image: GuestImage, directory: Path
) -> Iterator[tuple[Platform, Vm, bytes]]:
    """A guest that uses a disk under dm-crypt, whose key is given too."""
    disk, key = directory / "disk.img", secrets.token_bytes(64)
    disk.write_bytes(bytes(DISK_BYTES))
    config = dataclasses.replace(config, image=image, disk=disk)
    with Platform(MEMORY) as platform, platform.launch(config) as vm:
        console = vm.domain.console
        console.run("modprobe -a virtio_pci virtio_blk dm_crypt xts ecb", COMMAND_S)
        console.run(f"dmcrypt /dev/vda {DISK_BYTES // SECTOR} {key.hex()}", COMMAND_S)
        console.run("echo 'top secret' | dd of=/dev/dm-0 bs=512 conv=sync,fsync 2>&1", COMMAND_S)
        secret = b"top secret\n".ljust(SECTOR, b"\0")
        with disk.open("rb") as file:
            # It is under that key: XTS, the sector's number the tweak (dm-crypt's plain64).
            assert file.read(SECTOR) == reference.encrypt(key, bytes(16), secret)
        yield platform, vm, key


def keys_in(memory: Path) -> set[str]:
    """What aeskeyfind finds: AES keys by their schedules (Halderman et al., 2008)."""
    found = subprocess.run(
        [tool("aeskeyfind"), "-q", memory], capture_output=True, text=True, check=True, timeout=200
    )
    return set(re.findall(r"^[0-9a-f]{32,64}$", found.stdout, re.MULTILINE))


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_disk_key_is_in_memory_and_not_in_dram(
    datapath: str, crypt_image: GuestImage, key_file: Path, tmp_path: Path
) -> None:
    tool("aeskeyfind")
    config = config_for(datapath, key_file=key_file)
    image = tmp_path / "c.img"
    with with_encrypted_disk(config, crypt_image, tmp_path) as (platform, _, key):
        show(datapath, platform.capture(image))
        halves = {key[:32].hex(), key[32:].hex()}
    assert keys_in(image) == set()
    assert keys_in(offline(image, key_file, tmp_path / "out.raw", Format.RAW)) >= halves


def test_disk_key_is_in_dram_without_encryption(crypt_image: GuestImage, tmp_path: Path) -> None:
    """The control."""
    tool("aeskeyfind")
    config = config_for("shadow", encrypt=False)
    image = tmp_path / "c.img"
    with with_encrypted_disk(config, crypt_image, tmp_path) as (platform, _, key):
        platform.capture(image)
    assert keys_in(image) >= {key[:32].hex(), key[32:].hex()}


# --- volatility3 ------------------------------------------------------------------------------


def banners(memory: Path, cache: Path) -> list[str]:
    """Kernel banners that volatility3 finds in a file."""
    volatility = Path(sys.executable).with_name("vol")
    options: list[str | Path] = ["-q", "--offline", "--cache-path", cache, "-r", "json"]
    ended = subprocess.run(
        [volatility, *options, "-f", memory, "banners.Banners"],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    return [row["Banner"] for row in json.loads(ended.stdout)]


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_volatility_finds_the_kernel_in_memory_and_not_in_dram(
    datapath: str, key_file: Path, tmp_path: Path
) -> None:
    image, clear = tmp_path / "c.img", tmp_path / "clear.img"
    with (
        Platform(MEMORY) as platform,
        platform.launch(config_for(datapath, key_file=key_file)) as vm,
    ):
        version = vm.domain.console.run("cat /proc/version", COMMAND_S).output.strip()
        platform.capture(image)
    assert banners(image, tmp_path / "cache") == []
    found = banners(offline(image, key_file, tmp_path / "o.lime", Format.LIME), tmp_path / "cache")
    assert version in {one.strip("\0\n ") for one in found}
    if datapath == "inline":
        return
    with (  # the control
        Platform(MEMORY) as platform,
        platform.launch(config_for(datapath, encrypt=False)),
    ):
        platform.capture(clear)
    assert banners(clear, tmp_path / "cache")


# --- drgn -------------------------------------------------------------------------------------


def kernel_of(core: Path) -> str:
    """The release of the kernel that drgn takes a core for."""
    program = drgn.Program()
    program.set_core_dump(core)
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    text = bytes(program["VMCOREINFO"].string_()).decode()
    (release,) = re.findall(r"^OSRELEASE=(\S+)$", text, re.MULTILINE)
    return str(release)


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_drgn_opens_the_core(datapath: str, key_file: Path, tmp_path: Path) -> None:
    """And reads the guest's memory at virtual addresses, through its page tables."""
    image = tmp_path / "c.img"
    config = config_for(datapath, key_file=key_file)
    with Platform(MEMORY) as platform, platform.launch(config) as vm:
        release = vm.domain.console.run("uname -r", COMMAND_S).output.strip()
        platform.capture(image)
    core = offline(image, key_file, tmp_path / "core", Format.ELF)
    assert kernel_of(core) == release
    program = drgn.Program()
    program.set_core_dump(core)
    text = bytes(program["VMCOREINFO"].string_())
    symbol = re.search(rb"SYMBOL\(init_uts_ns\)=([0-9a-f]+)", text)
    assert symbol is not None
    assert release.encode() + b"\0" in program.read(int(symbol[1], 16), 400)


def debug_symbols(release: str) -> Path:
    """The distribution's symbols of a kernel, where `make drgn` has put them."""
    path = cache_dir().parent / "debug" / release / "vmlinux"
    if not path.exists():
        pytest.skip(f"no debug symbols of {release}: make drgn downloads them")
    return path


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_drgn_lists_the_guests_tasks(datapath: str, key_file: Path, tmp_path: Path) -> None:
    from drgn.helpers.linux.pid import for_each_task

    image = tmp_path / "c.img"
    config = config_for(datapath, key_file=key_file)
    with Platform(MEMORY) as platform, platform.launch(config) as vm:
        console = vm.domain.console
        symbols = debug_symbols(console.run("uname -r", COMMAND_S).output.strip())
        console.run("sleep 1000 &", COMMAND_S)
        running = console.run("cat /proc/[0-9]*/stat", COMMAND_S, check=False).output
        platform.capture(image)
    program = drgn.Program()
    program.set_core_dump(offline(image, key_file, tmp_path / "core", Format.ELF))
    program.load_debug_info([symbols])
    tasks = {int(task.pid): task.comm.string_().decode() for task in for_each_task(program)}
    # What it says of itself; those that it ran to say so are gone, and kernel threads come and go.
    told = {int(pid): comm for pid, comm in re.findall(r"^(\d+) \((.+?)\) ", running, re.MULTILINE)}
    assert tasks[1] == "sh" or tasks[1] == told[1]
    assert "sleep" in tasks.values()
    same = {pid for pid, comm in told.items() if tasks.get(pid) == comm}
    assert len(same) > 0.8 * len(told) > 20
