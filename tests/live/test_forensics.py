# SPDX-License-Identifier: GPL-2.0-or-later
"""What forensic tools that others wrote find in DRAM, and what in the same memory decrypted.

Captures are of live guests, on both data paths. Control: what a tool does not find in DRAM it finds
in DRAM that is not encrypted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import drgn
import numpy as np
import pytest
from drgn.helpers.linux.pid import for_each_task

from mktme.cli import ExitCode
from mktme.dump.decrypt import VmMemory, decrypt
from mktme.dump.formats import Format
from mktme.dump.image import DumpImage
from mktme.dump.info import describe_image
from mktme.dump.keys import EngineKeys, FileKeys
from mktme.engine.sidecar import CaptureRecord
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

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB = 1 << 20
PAGE = 4096
MEMORY = 256 * MIB
DISK_BYTES = 4 * MIB
SECTOR = 512
COMMAND_S = 60
FILL = "head -c 80000000 /dev/zero | tr '\\0' a >/tmp/fill"
DATAPATHS = ("shadow", "inline")


def config_for(datapath: str, **more: object) -> VmConfig:
    """A guest of 256 MiB; `inline`, with an eighth of it in the window."""
    window = "32M" if datapath == "inline" else None
    return vm_config(memory="256M", datapath=datapath, window=window, **more)  # type: ignore[arg-type]


def new_key(path: Path) -> Path:
    path.touch(0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return new_key(tmp_path / "key")


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
        vm.domain.console.run(FILL, COMMAND_S)
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
    datapath: str, key_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guest writes meanwhile is not in it: it is the RAM of that moment, to the last byte.

    The guest works, and is held for its RAM to be read behind the engine's back. The capture comes
    then; when it has its moment the guest works on, and all it writes is brought into DRAM at once.
    """
    image = tmp_path / "c.img"
    config = config_for(datapath, key_file=key_file)
    with Platform(MEMORY) as platform, platform.launch(config) as vm, ThreadPoolExecutor(2) as pool:
        taken, vms_held = threading.Event(), platform.engine.vms_held

        def noting(capture: int, problem: str | None = None) -> None:
            vms_held(capture, problem)
            taken.set()

        monkeypatch.setattr(platform.engine, "vms_held", noting)
        vm.domain.console.run(f"{FILL}; rm /tmp/fill", COMMAND_S)
        works = pool.submit(run_workload, vm.domain.console)
        with vm.held() as engine:
            assert not works.done()
            expected = digests(vm, datapath)
            capturing = pool.submit(platform.capture, image)
            assert taken.wait(COMMAND_S)
        while not capturing.done():
            engine.flush(vm.uuid)
        record = capturing.result()
        works.result()  # it checks its own sums
    show(datapath, record)
    assert record.saved_bytes > 0
    with offline(image, key_file, tmp_path / "raw", Format.RAW).open("rb") as memory:
        found = {at: digest_of(os.pread(memory.fileno(), PAGE, at)) for at in expected}
    assert found == expected
    assert len(expected) > 16 * MIB // PAGE


def digests(vm: Vm, datapath: str) -> dict[int, bytes]:
    """Of the pages that QEMU has of a guest's RAM, by offset: what is in them."""
    found = {}
    with ram_of(vm) as ram:
        for offset, plain in ram.chunks():
            there = np.ones(len(plain) // PAGE, np.bool_)
            if datapath == "inline":
                there = ram.populated(offset, len(plain))
            for at in (np.flatnonzero(there) * PAGE).tolist():
                found[offset + at] = digest_of(plain[at : at + PAGE])
    return found


def digest_of(page: bytes) -> bytes:
    return hashlib.sha256(page).digest()


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_captures_one_after_another(datapath: str, key_file: Path, tmp_path: Path) -> None:
    """While the guest works: each line has the MAC that it had, and each is a whole guest.

    The inline guest has 32 MiB of window and works on 64, so that pages leave it all the time. A
    last capture, of one VM, comes while it is paused, and leaves it so.
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


# --- evidence ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """A capture of a guest that uses a disk under dm-crypt, and what the guest said of itself.

    Attributes:
        image: the capture.
        key_file: the key of its memory; None if that is not encrypted.
        disk_key: data key, then tweak key.
        version: /proc/version.
        tasks: /proc/PID/stat of what ran.
    """

    image: Path
    key_file: Path | None
    disk_key: bytes
    version: str
    release: str
    tasks: str

    @property
    def disk_keys(self) -> set[str]:
        """The two keys of XTS, as aeskeyfind prints keys."""
        return {self.disk_key[:32].hex(), self.disk_key[32:].hex()}

    def decrypted(self, kind: Format, out: Path) -> Path:
        """The guest's memory, with the known key alone."""
        assert self.key_file is not None
        return offline(self.image, self.key_file, out, kind)


@pytest.fixture(scope="module")
def crypt_image(tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    return crypt_guest(tmp_path_factory.mktemp("crypt"))


def gather(config: VmConfig, image: GuestImage, directory: Path) -> Evidence:
    """Boot a guest, have it use its disk, capture DRAM."""
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
        console.run("(sleep 1000 &)", COMMAND_S)
        evidence = Evidence(
            directory / "c.img",
            config.key_file,
            key,
            console.run("cat /proc/version", COMMAND_S).output.strip(),
            console.run("uname -r", COMMAND_S).output.strip(),
            console.run("cat /proc/[0-9]*/stat", COMMAND_S, check=False).output,
        )
        show(config.datapath.value, platform.capture(evidence.image))
    return evidence


@pytest.fixture(scope="module", params=DATAPATHS)
def evidence(
    request: pytest.FixtureRequest,
    crypt_image: GuestImage,
    tmp_path_factory: pytest.TempPathFactory,
) -> Evidence:
    """Of a guest on either data path, under a known key."""
    directory = tmp_path_factory.mktemp("evidence")
    config = config_for(request.param, key_file=new_key(directory / "key"))
    return gather(config, crypt_image, directory)


@pytest.fixture(scope="module")
def unencrypted(crypt_image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """The control: DRAM that holds plaintext."""
    config = config_for("shadow", encrypt=False)
    return gather(config, crypt_image, tmp_path_factory.mktemp("evidence"))


# --- the cold-boot test -----------------------------------------------------------------------


def keys_in(memory: Path) -> set[str]:
    """What aeskeyfind finds: AES keys by their schedules (Halderman et al., 2008)."""
    found = subprocess.run(
        [tool("aeskeyfind"), "-q", memory], capture_output=True, text=True, check=True, timeout=200
    )
    return set(re.findall(r"^[0-9a-f]{32,64}$", found.stdout, re.MULTILINE))


def test_disk_key_is_in_memory_and_not_in_dram(evidence: Evidence, tmp_path: Path) -> None:
    assert keys_in(evidence.image) == set()
    assert keys_in(evidence.decrypted(Format.RAW, tmp_path / "raw")) >= evidence.disk_keys


def test_disk_key_is_in_dram_without_encryption(unencrypted: Evidence) -> None:
    assert keys_in(unencrypted.image) >= unencrypted.disk_keys


# --- volatility3 ------------------------------------------------------------------------------


def banners(memory: Path, directory: Path) -> set[str]:
    """Kernel banners that volatility3 finds in a file."""
    cache = directory / "cache"
    cache.mkdir(exist_ok=True)
    volatility = Path(sys.executable).with_name("vol")
    options: list[str | Path] = ["-q", "--offline", "--cache-path", cache, "-r", "json"]
    ended = subprocess.run(
        [volatility, *options, "-f", memory, "banners.Banners"],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    return {row["Banner"].strip() for row in json.loads(ended.stdout)}


def test_volatility_finds_the_kernel_in_memory_and_not_in_dram(
    evidence: Evidence, tmp_path: Path
) -> None:
    assert banners(evidence.image, tmp_path) == set()
    memory = evidence.decrypted(Format.LIME, tmp_path / "lime")
    assert evidence.version in banners(memory, tmp_path)


def test_volatility_finds_the_kernel_in_dram_without_encryption(
    unencrypted: Evidence, tmp_path: Path
) -> None:
    assert unencrypted.version in banners(unencrypted.image, tmp_path)


# --- drgn -------------------------------------------------------------------------------------


def opened(core: Path) -> tuple[drgn.Program, bytes]:
    """A core in drgn, and the VMCOREINFO by which that reads it."""
    program = drgn.Program()
    program.set_core_dump(core)
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    return program, bytes(program["VMCOREINFO"].string_())


def kernel_of(core: Path) -> str:
    """The release of the kernel that drgn takes a core for."""
    (release,) = re.findall(rb"^OSRELEASE=(\S+)$", opened(core)[1], re.MULTILINE)
    return bytes(release).decode()


def test_drgn_opens_the_core(evidence: Evidence, tmp_path: Path) -> None:
    """And reads the guest's memory at virtual addresses, through its page tables."""
    core = evidence.decrypted(Format.ELF, tmp_path / "core")
    assert kernel_of(core) == evidence.release
    program, info = opened(core)
    symbol = re.search(rb"SYMBOL\(init_uts_ns\)=([0-9a-f]+)", info)
    assert symbol is not None
    assert evidence.release.encode() + b"\0" in program.read(int(symbol[1], 16), 400)


def test_drgn_lists_the_guests_tasks(evidence: Evidence, tmp_path: Path) -> None:
    """With the distribution's debug symbols, which `make drgn` downloads."""
    symbols = cache_dir().parent / "debug" / evidence.release / "vmlinux"
    if not symbols.exists():
        pytest.skip(f"no debug symbols of {evidence.release}: make drgn downloads them")
    program, _ = opened(evidence.decrypted(Format.ELF, tmp_path / "core"))
    program.load_debug_info([symbols])
    found = {int(task.pid): task.comm.string_().decode() for task in for_each_task(program)}
    told = dict(re.findall(r"^(\d+) \((.+?)\) ", evidence.tasks, re.MULTILINE))
    assert "sleep" in told.values()
    # /proc has more of a kernel thread's name (fs/proc/array.c, proc_task_name).
    same = [pid for pid, comm in told.items() if comm.startswith(found.get(int(pid), "-"))]
    assert {"1", *(pid for pid, comm in told.items() if comm == "sleep")} <= set(same)
    # What it ran to say so is gone, and kernel threads come and go.
    assert len(same) > 0.9 * len(told) > 20
