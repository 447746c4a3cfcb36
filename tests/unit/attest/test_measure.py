# SPDX-License-Identifier: GPL-2.0-or-later
"""Launch measurement: command line, files and domain of a process that stands for QEMU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest

from mktme.attest.domain import canonical_domain
from mktme.attest.errors import MeasurementError
from mktme.attest.files import Digests, disk_digest
from mktme.attest.measure import Observation, code_digest, observe
from mktme.attest.qemu_options import canonical_options, options_of
from mktme.vm.image_cache import run_tool

VM = UUID("6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11")
MIB = 1 << 20
OLD_S = 1_000_000_000
DEADLINE_S = 20.0


@dataclass
class Launched:
    """Files, and what QEMU and libvirt are told of them."""

    directory: Path
    extra: list[str] = field(default_factory=list)
    domain_extra: str = ""
    memory_bytes: int = 256 * MIB
    append: str = "console=ttyS0 quiet"

    def file(self, name: str, content: bytes = b"") -> Path:
        path = self.directory / name
        path.write_bytes(content)
        # Not as young as to be hashed again each time.
        os.utime(path, ns=(OLD_S, OLD_S))
        return path

    def arguments(self) -> list[str]:
        disk, seed = self.directory / "layer.qcow2", self.directory / "seed"
        base = self.directory / "base"
        nodes: list[dict[str, object]] = [
            {"driver": "file", "filename": str(base), "node-name": "n3"},
            {"driver": "file", "filename": str(disk), "node-name": "n2"},
            {"driver": "qcow2", "file": "n2", "backing": "n3", "node-name": "top"},
            {"driver": "file", "filename": str(seed), "node-name": "n1", "read-only": True},
        ]
        return [
            *("-name", "guest=one,debug-threads=on", "-S"),
            *("-machine", "pc-q35-10.0,usb=off,memory-backend=pc.ram"),
            *("-m", f"size={self.memory_bytes >> 10}k", "-smp", "1,sockets=1"),
            *("-uuid", str(VM)),
            *("-chardev", "socket,id=charmonitor,fd=11,server=on"),
            *("-kernel", str(self.directory / "kernel"), "-initrd", str(self.directory / "initrd")),
            *("-append", self.append),
            *(word for node in nodes for word in ("-blockdev", json.dumps(node))),
            *("-device", json.dumps({"driver": "virtio-blk-pci", "drive": "top"})),
            *("-device", json.dumps({"driver": "virtio-blk-pci", "drive": "n1"})),
            *("-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:2222-:22"),
            *("-plugin", f"{plugin()},socket=/tmp/a.sock,vm={VM},track=stores"),
            *("-L", str(self.directory / "roms")),
            *self.extra,
        ]

    def domain(self) -> str:
        directory = self.directory
        return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
            <name>one</name><uuid>{VM}</uuid>
            <memory unit='b'>{self.memory_bytes}</memory><vcpu>1</vcpu>
            <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{directory}/kernel</kernel>
            <initrd>{directory}/initrd</initrd><cmdline>console=ttyS0 quiet</cmdline></os>
            <devices><emulator>/usr/bin/qemu</emulator>
            <disk type='file'><source file='{directory}/layer.qcow2'/></disk>
            <disk type='file'><source file='{directory}/seed'/></disk>{self.domain_extra}</devices>
            <qemu:commandline><qemu:arg value='-netdev'/>
            <qemu:arg value='user,id=n,hostfwd=tcp:127.0.0.1:2222-:22'/><qemu:arg value='-plugin'/>
            <qemu:arg value='{plugin()},socket=/tmp/a.sock,vm={VM},track=stores'/>
            </qemu:commandline></domain>"""

    def observe(self) -> Observation:
        """What is seen of a process with these arguments."""
        with process(self.arguments()) as pid:
            return observe(pid, VM, self.domain())

    def measure(self) -> dict[str, bytes]:
        with process(self.arguments()) as pid:
            return observe(pid, VM, self.domain()).measure(Digests()).by_name()


def plugin() -> str:
    """A library that the process has mapped as QEMU has its plugin."""
    import _ctypes

    return str(Path(_ctypes.__file__).resolve())


class process:  # noqa: N801  used as a function
    """A process of some arguments that has loaded what stands for the plugin."""

    def __init__(self, arguments: list[str]) -> None:
        program = """if True:
            import _ctypes, os, re, sys
            paths = re.findall(r'"filename": "([^"]+)"', " ".join(sys.argv))
            held = [open(one, "rb") for one in paths if os.path.isfile(one)]
            print("up", flush=True)
            sys.stdin.read()"""
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> int:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"
        return self._process.pid

    def __exit__(self, *_error: object) -> None:
        self._process.communicate()


@pytest.fixture
def launched(tmp_path: Path) -> Launched:
    one = Launched(tmp_path)
    one.file("kernel", b"a kernel")
    one.file("initrd", b"an initrd")
    one.file("base", b"\0" * MIB + b"a system" + b"\0" * (2 * MIB - 8))
    one.file("seed", b"a seed" + b"\0" * 506)
    (tmp_path / "roms").mkdir()
    one.file("roms/bios-256k.bin", b"a BIOS")
    one.file("roms/not-a-rom.txt", b"text")
    layer = tmp_path / "layer.qcow2"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", str(layer))
    return one


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_disk_of_another_file_under_the_same_name_is_refused(launched: Launched) -> None:
    """QEMU has opened one file; its name is moved to another before anybody looks."""
    other = launched.file("other", b"\0" * MIB + b"another system" + b"\0" * MIB)
    with process(launched.arguments()) as pid:
        observe(pid, VM, launched.domain())
        other.rename(launched.directory / "base")
        with pytest.raises(MeasurementError, match="not what QEMU has open"):
            observe(pid, VM, launched.domain())


@pytest.mark.parametrize(
    ("options", "is_it"),
    [
        (["-tpmdev", "emulator,id=t,chardev=c", "-chardev", "socket,id=c,path=/run/a.tpm"], True),
        (["-tpmdev", "emulator,id=t,chardev=c", "-chardev", "socket,id=c,path=/run/b.tpm"], False),
        (["-tpmdev", "emulator,id=t,chardev=d", "-chardev", "socket,id=c,path=/run/a.tpm"], False),
        (["-chardev", "socket,id=c,path=/run/a.tpm"], False),
    ],
)
def test_tpm_is_to_be_the_engines(launched: Launched, options: list[str], is_it: bool) -> None:
    launched.extra = options
    with process(launched.arguments()) as pid:
        tpm, socket = os.getpid(), Path("/run/a.tpm")
        if is_it:
            observe(pid, VM, launched.domain(), tpm=tpm, tpm_socket=socket)
        else:
            with pytest.raises(MeasurementError, match="TPM is another"):
                observe(pid, VM, launched.domain(), tpm=tpm, tpm_socket=socket)


def test_what_is_measured_can_be_computed_by_hand(launched: Launched) -> None:
    found = launched.measure()
    assert sorted(found) == [
        "command-line", "disk0", "disk1", "domain", "initrd", "kernel", "options", "plugin",
        "qemu", "roms",
    ]  # fmt: skip
    assert found["kernel"] == sha256(b"a kernel")
    assert found["initrd"] == sha256(b"an initrd")
    assert found["command-line"] == sha256(b"console=ttyS0 quiet")
    assert found["plugin"] == sha256(Path(plugin()).read_bytes())
    assert found["domain"] == sha256(canonical_domain(launched.domain()))
    assert found["disk0"] == digest_of(launched.directory / "base")
    assert found["disk1"] == digest_of(launched.directory / "seed")
    # CBOR by hand: a map of one name and one digest.
    name = b"bios-256k.bin"
    assert found["roms"] == sha256(b"\xa1\x6d" + name + b"\x58\x20" + sha256(b"a BIOS"))


def digest_of(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return disk_digest(fd)
    finally:
        os.close(fd)


def test_holes_of_a_disk_are_zeros(tmp_path: Path) -> None:
    written, sparse = tmp_path / "written", tmp_path / "sparse"
    written.write_bytes(bytes(3 * MIB) + b"x" + bytes(MIB))
    with sparse.open("wb") as file:
        file.truncate(4 * MIB + 1)
        file.seek(3 * MIB)
        file.write(b"x")
    chunk = sha256(b"x" + bytes(MIB - 1))
    # [4194305, [[3145728, chunk]]]
    by_hand = sha256(b"\x82\x1a\x00\x40\x00\x01\x81\x82\x1a\x00\x30\x00\x00\x58\x20" + chunk)
    assert digest_of(written) == digest_of(sparse) == by_hand
    with sparse.open("r+b") as file:
        file.seek(MIB)
        file.write(b"y")
    assert digest_of(sparse) != by_hand


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("kernel", lambda one: one.file("kernel", b"another kernel")),
        ("initrd", lambda one: one.file("initrd", b"another initrd")),
        ("disk0", lambda one: one.file("base", b"\0" * MIB + b"a System" + b"\0" * (2 * MIB - 8))),
        ("disk1", lambda one: one.file("seed", b"b seed" + b"\0" * 506)),
        ("roms", lambda one: one.file("roms/vgabios.bin", b"another ROM")),
        ("options", lambda one: one.extra.extend(["-device", "edu"])),
        ("options", lambda one: one.extra.extend(["/a/disk"])),
    ],
)
def test_one_change_is_one_digest(
    launched: Launched, component: str, change: Callable[[Launched], None]
) -> None:
    before = launched.measure()
    change(launched)
    after = launched.measure()
    assert [name for name in before if before[name] != after[name]] == [component]


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("cmdline", lambda one: setattr(one, "append", "console=ttyS0 init=/bin/sh")),
        ("disks", lambda one: setattr(one, "domain_extra", "<disk><source file='/x'/></disk>")),
        ("-incoming", lambda one: one.extra.extend(["-incoming", "defer"])),
        ("-loadvm", lambda one: one.extra.extend(["--loadvm", "snapshot"])),
        ("-drive", lambda one: one.extra.extend(["-drive", "file=/x,if=virtio"])),
        ("-fw_cfg", lambda one: one.extra.extend(["-fw_cfg", "name=opt/x,file=/x"])),
        ("-machine", lambda one: one.extra.extend(["-M", "kernel=/x"])),
        ("-device", lambda one: one.extra.extend(["-device", "loader,file=/x,addr=0"])),
        ("-device", lambda one: one.extra.extend(["-device", "e1000,romfile=/x"])),
        ("block node", lambda one: one.extra.extend(["-device", "virtio-blk-pci,drive=late"])),
        ("UUID", lambda one: one.extra.extend(["-uuid", str(UUID(int=1))])),
        ("memory", lambda one: one.extra.extend(["-m", "size=1G"])),
        ("vCPUs", lambda one: one.extra.extend(["-smp", "2"])),
        ("kernel", lambda one: one.extra.extend(["-kernel", "/vmlinuz"])),
        ("plugin", lambda one: one.extra.extend(["-plugin", "/another.so"])),
        ("no JSON", lambda one: one.extra.extend(["-device", "{"])),
        ("a regular file", lambda one: fifo(one.directory / "kernel")),
        ("No such file", lambda one: (one.directory / "initrd").unlink()),
        ("firmware", lambda one: (one.directory / "roms/bios-256k.bin").unlink()),
    ],
)
def test_what_cannot_be_vouched_for_is_refused(
    launched: Launched, why: str, change: Callable[[Launched], None]
) -> None:
    change(launched)
    with pytest.raises(MeasurementError, match=why):
        launched.measure()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_what_the_guest_wrote_before_is_refused(launched: Launched) -> None:
    layer = launched.directory / "layer.qcow2"
    assert launched.measure()
    run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(layer))
    with pytest.raises(MeasurementError, match="not empty"):
        launched.measure()


def test_a_snapshot_in_the_layer_is_refused(launched: Launched) -> None:
    run_tool("qemu-img", "snapshot", "-c", "one", str(launched.directory / "layer.qcow2"))
    with pytest.raises(MeasurementError, match="not empty"):
        launched.measure()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"another one"),
        lambda path: os.replace(path.with_name("initrd"), path),
        lambda path: path.chmod(0o644 ^ 0o040 if path.stat().st_mode & 0o040 else 0o664),
        lambda path: path.unlink(),
    ],
)
def test_what_changes_between_launch_and_hashing_is_refused(
    launched: Launched, change: Callable[[Path], None]
) -> None:
    with process(launched.arguments()) as pid:
        observation = observe(pid, VM, launched.domain())
        kernel = launched.directory / "kernel"
        wait_for_another_tick(kernel)
        change(kernel)
        with pytest.raises(MeasurementError, match=r"changed|No such file"):
            observation.measure(Digests())


def wait_for_another_tick(path: Path) -> None:
    """Until a change of a file would have another time than its last one."""
    probe, deadline = path.with_name("probe"), time.monotonic() + DEADLINE_S
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return
        assert time.monotonic() < deadline


def test_a_process_that_is_gone(launched: Launched) -> None:
    observation = launched.observe()
    with pytest.raises(MeasurementError, match="gone"):
        observation.measure(Digests())
    with process([]) as pid:
        pass
    with pytest.raises(MeasurementError, match="cannot be looked at"):
        observe(pid, VM, launched.domain())


def test_a_debugger_is_told_of(launched: Launched) -> None:
    assert not launched.observe().debuggable
    launched.extra = ["-gdb", "tcp::1234"]
    assert launched.observe().debuggable
    launched.extra = ["-s"]
    assert launched.observe().debuggable


def test_two_launches_of_one_thing_measure_the_same(launched: Launched) -> None:
    """Names, sockets, ports and descriptors are each launch's own; nothing else is."""
    arguments = launched.arguments()
    own = {
        "guest=one": "guest=two",
        "fd=11": "fd=12",
        "/tmp/a.sock": "/tmp/b.sock",
        ":2222-": ":2223-",
        str(launched.directory): "/elsewhere",
    }
    other = list(arguments)
    domain = launched.domain().replace("<name>one", "<name>two")
    for old, new in own.items():
        other = [word.replace(old, new) for word in other]
        domain = domain.replace(old, new)
    first, second = (
        canonical_options(options_of(["qemu", *words])) for words in (arguments, other)
    )
    assert first == second
    assert canonical_domain(launched.domain()) == canonical_domain(domain)
    assert canonical_domain(domain) != canonical_domain(domain.replace("track=stores", "track=off"))
    more = domain.replace("</devices>", "<interface type='user'/></devices>")
    assert canonical_domain(domain) != canonical_domain(more)


@pytest.mark.parametrize("domain", ["", "<domain", "<network/>"])
def test_what_is_no_domain(domain: str) -> None:
    with pytest.raises(MeasurementError, match="domain"):
        canonical_domain(domain)


def test_the_code_digest_is_of_each_file(tmp_path: Path) -> None:
    (tmp_path / "sub/__pycache__").mkdir(parents=True)
    (tmp_path / "a.py").write_bytes(b"a")
    digest = code_digest(tmp_path)
    assert digest == sha256(b"\xa1\x64a.py\x58\x20" + sha256(b"a"))
    (tmp_path / "sub/__pycache__/b.pyc").write_bytes(b"b")
    assert code_digest(tmp_path) == digest
    (tmp_path / "sub/b.py").write_bytes(b"b")
    assert code_digest(tmp_path) != digest


def test_variables_are_those_from_before_firmware_writes_them(launched: Launched) -> None:
    variables = launched.file("variables", b"as they come")
    node = {"driver": "file", "filename": str(variables), "node-name": "v"}
    launched.extra = ["-blockdev", json.dumps(node), "-machine", "pflash1=v"]
    domain = launched.domain().replace("</os>", f"<nvram>{variables}</nvram></os>")
    with process(launched.arguments()) as pid:
        observation = observe(pid, VM, domain)
        variables.write_bytes(b"what firmware made of them")
        found = observation.measure(Digests()).by_name()
    assert found["nvram"] == hashlib.sha256(b"as they come").digest()


def test_program_of_a_tpm_is_a_component(launched: Launched) -> None:
    socket = Path("/run/a.tpm")
    launched.extra = ["-tpmdev", "emulator,id=t,chardev=c"]
    launched.extra += ["-chardev", f"socket,id=c,path={socket}"]
    with process(launched.arguments()) as pid, process([]) as tpm:
        observation = observe(pid, VM, launched.domain(), tpm=tpm, tpm_socket=socket)
        found = observation.measure(Digests()).by_name()
        without = observe(pid, VM, launched.domain()).measure(Digests()).by_name()
    assert found.keys() - without.keys() == {"tpm"}
