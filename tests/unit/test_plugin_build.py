# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin builds everywhere, and QEMU loads it: arguments, hello, and no QEMU without engine.

QEMU runs paused here, so no guest code is ever executed.
"""

from __future__ import annotations

import array
import os
import select
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from mktme.datapath.link import CAPABILITY_FAULTS, Hello, Segment, decode_hello, encode_answer
from mktme.datapath.uffd import Fault, Userfaultfd

PLUGIN: Final = Path(__file__).parents[2] / "qemu-plugin"
WITHOUT_USERFAULTFD: Final = Path(__file__).parents[1] / "live" / "without_userfaultfd.py"
QEMU: Final = "qemu-system-x86_64"
VM: Final = uuid.UUID("7c1b0c52-30a4-4b0e-9d0c-0d2f3c1f2b11")
GIB: Final = 1 << 30
DEADLINE_S: Final = 20
EX_SOFTWARE: Final = 70
ENGINE_GONE: Final = "mktme: the engine is gone; stopping QEMU so that the guest does not run"


def need(*tools: str) -> None:
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"needs {', '.join(missing)}")


def make(target: str, *variables: str) -> None:
    result = subprocess.run(
        ["make", "-C", PLUGIN, target, *variables], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("api", [4, 7])
def test_builds_without_a_warning_and_exports_only_what_qemu_looks_for(
    tmp_path: Path, compiler: str, api: int
) -> None:
    need("make", "nm", compiler)
    make("all", f"API={api}", f"CC={compiler}", f"BUILD={tmp_path}")
    plugin = tmp_path / f"mktme-api{api}.so"
    assert list(tmp_path.iterdir()) == [plugin]
    symbols = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--format=just-symbols", plugin],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(symbols.stdout.split()) == ["qemu_plugin_install", "qemu_plugin_version"]


def test_no_other_api_builds(tmp_path: Path) -> None:
    need("make", "cc")
    with pytest.raises(AssertionError, match="MKTME_QEMU_API must be 4"):
        make("all", "API=5", f"BUILD={tmp_path}")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin for the QEMU of this machine."""
    need("make", "cc", QEMU)
    build = tmp_path_factory.mktemp("plugin")
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True)
    api = 7 if int(version.stdout.split("version ")[1].split(".")[0]) >= 11 else 4
    make("all", f"API={api}", f"BUILD={build}")
    return build / f"mktme-api{api}.so"


@dataclass(frozen=True)
class Arguments:
    """Good ones, of a VM with 64 MiB, unless told otherwise."""

    plugin: str = f"socket=/nonexistent,vm={VM},track=stores"
    share: str = "on"
    machine: str = "q35"
    memory: str = "64M"
    smp: str = "1"
    sandbox: str = "off"
    backend: str = ""
    more: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()


def start(plugin: Path, arguments: Arguments) -> subprocess.Popen[str]:
    backend = f"memory-backend-memfd,id=ram,share={arguments.share},size={arguments.memory}"
    return subprocess.Popen(
        [
            *arguments.prefix,
            *(QEMU, "-S", "-nodefaults", "-display", "none", "-accel", "tcg"),
            *("-machine", f"{arguments.machine},memory-backend=ram"),
            *("-object", backend + arguments.backend),
            *("-m", arguments.memory, "-smp", arguments.smp, "-sandbox", arguments.sandbox),
            *("-plugin", f"{plugin},{arguments.plugin}", *arguments.more),
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(qemu: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Its exit status, and what the plugin said."""
    try:
        _out, err = qemu.communicate(timeout=DEADLINE_S)
    finally:
        qemu.kill()
    return qemu.returncode, [line for line in err.splitlines() if line.startswith("mktme: ")]


GOOD: Final = f"socket=/x,vm={VM},track=pages"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (f"vm={VM},track=pages", "missing argument 'socket='"),
        ("socket=/x,track=pages", "missing argument 'vm='"),
        (f"socket=/x,vm={VM}", "missing argument 'track='"),
        (f"{GOOD},colour=blue", "unknown argument 'colour=blue'"),
        # A bare name: QEMU makes it NAME=on.
        (f"{GOOD},colour", "unknown argument 'colour=on'"),
        (f"socket,vm={VM},track=pages", "'socket=on': expected the absolute path"),
        (f"{GOOD},socket=x", "'socket=x': expected the absolute path"),
        (f"{GOOD},socket=/{'x' * 107}", "expected the absolute path"),
        (f"{GOOD},vm=7c1b0c52", "'vm=7c1b0c52': expected the UUID"),
        (f"{GOOD},vm={VM}0", f"'vm={VM}0': expected the UUID"),
        (f"{GOOD},vm={VM.hex}", f"'vm={VM.hex}': expected the UUID"),
        (f"{GOOD},track=everything", "expected stores, pages, stores+pages or off"),
        (f"{GOOD},datapath=none", "'datapath=none': expected shadow or inline"),
        (f"{GOOD},visible=yes", "'visible=yes': expected on or off"),
        (f"{GOOD},track=off", "track=off is for datapath=inline"),
        (f"{GOOD},track=off,datapath=shadow", "track=off is for datapath=inline"),
        (f"{GOOD},datapath=inline", "use track=stores or track=off"),
        (f"{GOOD},datapath=inline,track=stores+pages", "use track=stores or track=off"),
        (f"{GOOD},ram-below-4g=-4096", "expected the bytes of RAM below the PCI hole"),
        (f"{GOOD},ram-below-4g=2G", "expected the bytes of RAM below the PCI hole"),
        (f"{GOOD},ram-below-4g=0", "expected the bytes of RAM below the PCI hole"),
        (f"{GOOD},ram-below-4g=4097", "expected the bytes of RAM below the PCI hole"),
        (f"{GOOD},ram-below-4g=4294967296", "expected the bytes of RAM below the PCI hole"),
        (f"{GOOD},module=4096", "expected BYTES@ADDRESS"),
        (f"{GOOD},module=4096@", "expected BYTES@ADDRESS"),
        (f"{GOOD},module=@4096", "expected BYTES@ADDRESS"),
        (f"{GOOD},module=4095@4096", "expected BYTES@ADDRESS"),
        (f"{GOOD},module=4096@4097", "expected BYTES@ADDRESS"),
        (f"{GOOD},module=4096@0x1000", "expected BYTES@ADDRESS"),
        (f"{GOOD},module=4096@4503599627370496", "expected BYTES@ADDRESS"),
        (f"{GOOD}{',module=4096@4096' * 9}", "up to 8 times"),
        (f"{GOOD},check-tlb=maybe", "'check-tlb=maybe': expected on or off"),
        (f"{GOOD},check-tlb=on", "check-tlb=on checks what track=stores uses"),
    ],
)
def test_wrong_argument_is_named_and_qemu_does_not_start(
    plugin: Path, arguments: str, complaint: str
) -> None:
    status, said = finish(start(plugin, Arguments(plugin=arguments)))
    assert status == 1
    assert len(said) == 1
    assert complaint in said[0]


def test_registers_need_a_qemu_whose_plugins_can_write_them(plugin: Path) -> None:
    if plugin.name == "mktme-api7.so":
        pytest.skip("this QEMU's can")
    status, said = finish(start(plugin, Arguments(plugin=f"{GOOD},visible=on")))
    assert status == 1
    assert said == ["mktme: visible=on needs QEMU 11.1: before it a plugin cannot write registers"]


def test_stores_of_several_vcpus_need_a_qemu_that_survives_them(plugin: Path) -> None:
    if plugin.name == "mktme-api7.so":
        pytest.skip("this QEMU survives them")
    # Hot-plugged ones count.
    arguments = Arguments(smp="1,maxcpus=2")
    status, said = finish(start(plugin, arguments))
    assert status == 1
    assert "track=stores with more than one vCPU needs QEMU 11.1" in said[0]
    assert "use track=pages or one vCPU" in said[0]
    inline = replace(arguments, plugin=f"{arguments.plugin},datapath=inline")
    status, said = finish(start(plugin, inline))
    assert status == 1
    assert "use track=off or one vCPU" in said[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (Arguments(), "cannot connect to the engine at /nonexistent: No such file or directory"),
        (Arguments(share="off"), "guest RAM is a private mapping: add share=on"),
        (Arguments(memory="4G"), "more than 2 GiB of guest RAM is split around the PCI hole"),
    ],
)
def test_guest_that_cannot_be_protected_does_not_run(
    plugin: Path, arguments: Arguments, complaint: str
) -> None:
    status, said = finish(start(plugin, arguments))
    assert status == EX_SOFTWARE
    assert len(said) == 1
    assert complaint in said[0]


class Engine:
    """The engine's end of the link."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(DEADLINE_S)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connection: socket.socket | None = None
        self.descriptors: list[int] = []

    def hello(self) -> Hello:
        self._connection, _address = self._listener.accept()
        self._connection.settimeout(DEADLINE_S)
        message, controls, flags, _address = self._connection.recvmsg(4096, socket.CMSG_SPACE(256))
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        for _level, _type, data in controls:
            self.descriptors += array.array("i", data)
        return decode_hello(message)

    def answer(self, message: bytes) -> None:
        assert self._connection is not None
        self._connection.send(message)

    def vanish(self) -> None:
        assert self._connection is not None
        self._connection.close()

    def close(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path / "link")
    yield engine
    engine.close()


def linked(engine: Engine, arguments: Arguments, *, track: str = "stores") -> Arguments:
    return replace(arguments, plugin=f"socket={engine.path},vm={VM},track={track}")


def test_hello_describes_the_vm(plugin: Path, engine: Engine) -> None:
    qemu = start(plugin, linked(engine, Arguments()))
    try:
        hello = engine.hello()
    finally:
        qemu.kill()
        finish(qemu)
    assert hello.vm_uuid == VM
    assert hello.plugin_api == int(plugin.stem[-1])
    assert hello.vcpus == 1
    assert hello.ram_bytes == 64 << 20
    assert hello.segments == (Segment(0, 0, 64 << 20),)
    ram, store_map = engine.descriptors
    assert os.fstat(ram).st_size == 64 << 20
    assert os.fstat(store_map).st_size == hello.store_map_bytes == 4096 + (64 << 20) // 64


def test_hello_splits_ram_where_it_was_told(plugin: Path, engine: Engine) -> None:
    arguments = linked(engine, Arguments(memory="4G"))
    told = replace(arguments, plugin=f"{arguments.plugin},ram-below-4g={2 * GIB}")
    qemu = start(plugin, told)
    try:
        hello = engine.hello()
    finally:
        qemu.kill()
        finish(qemu)
    assert hello.segments == (Segment(0, 0, 2 * GIB), Segment(4 * GIB, 2 * GIB, 2 * GIB))


@pytest.mark.usefixtures("write_tracking")
def test_page_tracking_works_in_the_sandbox_libvirt_puts_qemu_in(
    plugin: Path, engine: Engine
) -> None:
    sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    arguments = linked(engine, Arguments(sandbox=sandbox), track="stores+pages")
    qemu = start(plugin, arguments)
    try:
        hello = engine.hello()
        kinds = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in engine.descriptors]
        engine.answer(encode_answer())
        # To see the engine go it must have got past the answer, and its thread be running.
        engine.vanish()
        status, said = finish(qemu)
    finally:
        qemu.kill()
    assert hello.descriptor_count == len(kinds) == 4
    assert "memory-backend-memfd" in kinds[0]
    assert "userfaultfd" in kinds[1]
    assert kinds[2].endswith("/pagemap")
    assert "mktme-store-map" in kinds[3]
    assert status == EX_SOFTWARE
    assert said[0].startswith(ENGINE_GONE)


# --- the inline data path ---------------------------------------------------------------------


INLINE: Final = "stores,datapath=inline"


def mapping_flags(pid: int, address: int) -> set[str]:
    """The flags of one of a process's mappings (proc(5), /proc/PID/smaps, VmFlags)."""
    _before, _start, after = Path(f"/proc/{pid}/smaps").read_text().partition(f"\n{address:x}-")
    return set(after.partition("\nVmFlags:")[2].partition("\n")[0].split())


@pytest.mark.usefixtures("fault_handling")
@pytest.mark.parametrize("track", ["stores", "off"])
def test_every_access_waits_for_the_engine_from_the_hello_on(
    plugin: Path, engine: Engine, track: str
) -> None:
    sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    # Something has to get into RAM although the guest is stopped.
    loader = ("-device", f"loader,file={plugin},addr=0x100000,force-raw=on")
    arguments = Arguments(sandbox=sandbox, more=loader)
    qemu = start(plugin, linked(engine, arguments, track=f"{track},datapath=inline"))
    try:
        hello = engine.hello()
        (block,) = hello.blocks
        ram, userfaultfd, *_ = engine.descriptors
        kinds = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in engine.descriptors]
        resident_bytes = os.fstat(ram).st_blocks * 512
        flags = mapping_flags(qemu.pid, block.host_address)
        engine.answer(encode_answer())
        poll = select.poll()
        poll.register(userfaultfd, select.POLLIN)
        uffd = Userfaultfd(userfaultfd)
        loaded: set[int] = set()
        while not loaded:
            assert poll.poll(DEADLINE_S * 1000)
            for fault in uffd.read():
                assert isinstance(fault, Fault)
                assert not fault.protected
                offset = fault.address - block.host_address
                if offset >= 0x100000:
                    loaded.add(offset)
                else:
                    uffd.zero(fault.address & ~4095, 4096)
        # Whoever waits for us does not keep QEMU from ending.
        engine.vanish()
        status, said = finish(qemu)
    finally:
        qemu.kill()
    assert hello.capabilities == CAPABILITY_FAULTS | (track == "stores")
    assert len(kinds) == hello.descriptor_count == 2 + (track == "stores")
    assert kinds[1] == "anon_inode:[userfaultfd]"
    assert resident_bytes == 0
    # VM_UFFD_MISSING, VM_UFFD_WP, VM_NOHUGEPAGE
    assert {"um", "uw", "nh"} <= flags
    assert loaded == {0x100000}
    assert os.pread(ram, 4096, 0x100000) == bytes(4096)
    assert status == EX_SOFTWARE
    assert said[0].startswith(ENGINE_GONE)


@pytest.mark.usefixtures("fault_handling")
@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (",hugetlb=on,hugetlbsize=2M,reserve=off", "guest RAM is made of pages of 2048 KiB"),
        (",prealloc=on", "in memory before the engine has it: leave out prealloc=on"),
    ],
)
def test_memory_that_cannot_come_and_go_is_refused(
    plugin: Path, engine: Engine, backend: str, complaint: str
) -> None:
    arguments = linked(engine, Arguments(backend=backend), track=INLINE)
    status, said = finish(start(plugin, arguments))
    assert status == EX_SOFTWARE
    assert complaint in said[0]
    assert "use datapath=shadow" in said[0]


def test_userfaultfd_for_user_mode_alone_is_refused(plugin: Path, engine: Engine) -> None:
    """In a mount namespace where the device is another one, and under a filter of system calls."""
    if os.geteuid() != 0:
        pytest.skip("hiding the device takes root")
    hide = 'mount --bind /dev/null /dev/userfaultfd && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", hide, "sh", sys.executable)
    arguments = replace(
        linked(engine, Arguments(), track=INLINE), prefix=(*prefix, str(WITHOUT_USERFAULTFD))
    )
    status, said = finish(start(plugin, arguments))
    assert status == EX_SOFTWARE
    assert "a userfaultfd that stops the kernel's own accesses to guest RAM: Operation" in said[0]
    assert "allow QEMU's user to open /dev/userfaultfd, or use datapath=shadow" in said[0]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (encode_answer("no such VM"), "mktme: the engine refused: no such VM"),
        (b"MKTMEANS", "mktme: the engine's answer is not of protocol version 1"),
        (b"MKTMEANX" + encode_answer()[8:], "mktme: the engine's answer is not of protocol"),
        (encode_answer("cut")[:-1], "mktme: the engine's answer is not of protocol version 1"),
        (encode_answer() + b"x", "mktme: the engine's answer is not of protocol version 1"),
        (encode_answer() + bytes(1000), "mktme: the engine's answer is not of protocol version 1"),
        (None, "mktme: the engine closed the connection without an answer"),
    ],
)
def test_qemu_does_not_run_unless_accepted(
    plugin: Path, engine: Engine, answer: bytes | None, complaint: str
) -> None:
    qemu = start(plugin, linked(engine, Arguments()))
    try:
        engine.hello()
        if answer is None:
            engine.vanish()
        else:
            engine.answer(answer)
        status, said = finish(qemu)
    finally:
        qemu.kill()
    assert status == EX_SOFTWARE
    assert len(said) == 1
    assert said[0].startswith(complaint)


def test_qemu_ends_with_the_engine(plugin: Path, engine: Engine) -> None:
    qemu = start(plugin, linked(engine, Arguments()))
    try:
        engine.hello()
        engine.answer(encode_answer())
        engine.vanish()
        status, said = finish(qemu)
    finally:
        qemu.kill()
    assert status == EX_SOFTWARE
    assert len(said) == 1
    assert said[0].startswith(ENGINE_GONE)
