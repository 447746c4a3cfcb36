# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that see the platform's memory encryption, and what they can do to it.

A bare kernel executes every row of Intel's tables, on two vCPUs; stock kernels find TME as their
firmware left it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mktme.engine import tme
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.pconfig import Status
from mktme.engine.tme import Revision
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES, Algorithm
from mktme.proof.transparency import compare_memory
from mktme.pytest_plugin import vm_config
from mktme.service.audit import AUDIT_FILE
from mktme.vm.config import VmConfig
from mktme.vm.disk_images import ensure_disk
from mktme.vm.disk_layout import ROOT_OFFSET_BYTES
from mktme.vm.hardware import Hardware
from mktme.vm.host import QEMU11, EnvironmentUnfitError, UsageError, emulator_path
from mktme.vm.images import GuestImage
from mktme.vm.platform import Platform, Vm
from mktme.vm.shell import Shell

from ..vectors import reference
from .bare_kernel import USER, BareKernel, bare_image

DRAM_BYTES = 2 << 30
BOOT_AGAIN_S = 240
DISK_BOOT_AGAIN_S = 1200
KEY = bytes(range(32))
XTS_128 = 1 << 8  # in KEYID_CTRL
SET_KEY_DIRECT, SET_KEY_RANDOM, CLEAR_KEY, NO_ENCRYPT = (XTS_128 | one for one in range(4))
REGISTERS = (0x87, 0x981, 0x982, 0x983, 0x984, 0x9FF)
FAULT = "#GP"
USUAL = PlatformConfig(physical_address_bits=40)
ENABLED = ["x86/tme: enabled by BIOS"]
KEYIDS = ["x86/mktme: enabled by BIOS", "x86/mktme: 63 KeyIDs available"]
SAYS_6_1 = ENABLED + KEYIDS
SAYS_6_12 = [*ENABLED, "x86/mktme: BIOS enabled: x86_phys_bits reduced by 6"]


@pytest.fixture(scope="module")
def mktme_emulator() -> str:
    return QEMU11


@pytest.fixture(scope="module")
def mktme_firmware() -> PlatformConfig:
    return USUAL


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, mktme_platform: Platform) -> GuestImage:
    return bare_image(tmp_path_factory.mktemp("bare"))


@contextmanager
def another_platform(config: PlatformConfig) -> Iterator[Platform]:
    with Platform(DRAM_BYTES, config=config, emulator=emulator_path(QEMU11)) as platform:
        yield platform


def bare_config(image: GuestImage, **more: object) -> VmConfig:
    config = VmConfig(image, memory_bytes=192 << 20, vcpus=2, visible=True)
    return dataclasses.replace(config, **more)  # type: ignore[arg-type]


def kernel_says(shell: Shell) -> list[str]:
    """What Linux said of TME when it booted, without the times."""
    said = shell.run("dmesg | grep -E 'x86/(tme|mktme)'", timeout_s=60).output
    return [line.partition("] ")[2] for line in said.splitlines()]


def processors(shell: Shell) -> list[tuple[bool, bool, int]]:
    """Of each: whether it has TME, and PCONFIG; and its physical address width."""
    said = shell.run("grep -E '^(flags|address sizes)' /proc/cpuinfo", timeout_s=60).output
    flags = [set(line.split()) for line in said.splitlines() if line.startswith("flags")]
    widths = [int(one) for one in re.findall(r": (\d+) bits physical", said)]
    return [
        ("tme" in one, "pconfig" in one, width) for one, width in zip(flags, widths, strict=True)
    ]


def kernel_on_disk(guest: str, directory: Path) -> Path:
    """The kernel that a guest's disk boots, without booting it (debugfs(8))."""
    root = f"{ensure_disk(guest).disk}?offset={ROOT_OFFSET_BYTES}"

    def debugfs(command: str) -> str:
        run = ["/sbin/debugfs", "-R", command, root]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout

    (name,) = re.findall(r"/(vmlinuz-[^/]+)/", debugfs("ls -p /boot"))
    kernel = directory / str(name)
    debugfs(f"dump /boot/{name} {kernel}")
    return kernel


# --- every row, executed by a bare kernel -------------------------------------------------------


@pytest.mark.parametrize("revision", list(Revision))
def test_instructions_end_as_the_documents_say(bare: GuestImage, revision: Revision) -> None:
    config = PlatformConfig(physical_address_bits=40, revision=revision)
    with (
        another_platform(config) as platform,
        platform.launch(bare_config(bare), boot=False) as vm,
    ):
        kernel = BareKernel(vm)
        for cpu in (0, 1):
            assert kernel.cpuid(0, cpu=cpu)[0] >= 0x1B
            _, _, ecx, edx = kernel.cpuid(7, cpu=cpu)
            assert (ecx >> 13 & 1, edx >> 18 & 1) == (1, 1)
            assert kernel.cpuid(0x1B, cpu=cpu) == (1, 1, 0, 0)
            assert kernel.cpuid(0x1B, 1, cpu=cpu) == (0, 0, 0, 0)
            for leaf, subleaf in ((7, 0), (0x1B, 0), (0x1B, 1)):
                alone = kernel.cpuid(leaf, subleaf, cpu=cpu, alone=True)
                assert alone == kernel.cpuid(leaf, subleaf, cpu=cpu)
            for msr in REGISTERS:
                for alone_in_block in (False, True):
                    found = kernel.rdmsr(msr, cpu=cpu, alone=alone_in_block)
                    assert found == platform.engine.rdmsr(msr)
            _locked_registers(kernel, revision, cpu)
            _pconfig_rows(kernel, vm, revision, cpu)
        for msr in REGISTERS:
            assert kernel.rdmsr(msr, cpu=USER) is None
            assert not kernel.wrmsr(msr, 0, cpu=USER)
        assert kernel.pconfig(5, SET_KEY_RANDOM, cpu=USER) == "#UD"
        assert kernel.pconfig(5, SET_KEY_RANDOM, leaf=1, cpu=USER) == "#UD"
        assert not platform.engine.status().keys[2:]


def _locked_registers(kernel: BareKernel, revision: Revision, cpu: int) -> None:
    before = kernel.rdmsr(tme.IA32_TME_ACTIVATE, cpu=cpu)
    assert before is not None
    assert before & 1  # locked
    ignored = revision is Revision.SDM
    assert kernel.wrmsr(tme.IA32_TME_ACTIVATE, 0, cpu=cpu) == ignored
    for msr in (tme.IA32_TME_EXCLUDE_MASK, tme.IA32_TME_EXCLUDE_BASE):
        assert not kernel.wrmsr(msr, 0x800, cpu=cpu)
    for msr in (tme.IA32_TME_CAPABILITY, tme.IA32_MKTME_KEYID_PARTITIONING):
        assert not kernel.wrmsr(msr, 0, cpu=cpu)
    assert kernel.wrmsr(tme.MK_TME_CORE_ACTIVATE, 0, cpu=cpu)
    assert kernel.rdmsr(tme.IA32_TME_ACTIVATE, cpu=cpu) == before


def _pconfig_rows(kernel: BareKernel, vm: Vm, revision: Revision, cpu: int) -> None:
    """336907, table 6-6; what is a status there is #GP(0) in the SDM."""

    def by_spec(status: Status) -> tuple[int, bool] | str:
        return FAULT if revision is Revision.SDM else (status, True)

    done = (Status.PROG_SUCCESS, False)
    assert kernel.pconfig(5, SET_KEY_DIRECT, key=KEY, cpu=cpu) == done
    assert kernel.pconfig(5, SET_KEY_RANDOM, cpu=cpu) == done
    assert kernel.pconfig(5, NO_ENCRYPT, cpu=cpu) == done
    assert kernel.pconfig(5, CLEAR_KEY, cpu=cpu) == done
    assert kernel.pconfig(5, XTS_128 | 4, cpu=cpu) == by_spec(Status.INVALID_PROG_CMD)
    assert kernel.pconfig(0, SET_KEY_RANDOM, cpu=cpu) == by_spec(Status.INVALID_KEYID)
    assert kernel.pconfig(64, SET_KEY_RANDOM, cpu=cpu) == by_spec(Status.INVALID_KEYID)
    assert kernel.pconfig(5, 1, cpu=cpu) == by_spec(Status.INVALID_ENC_ALG)
    assert kernel.pconfig(5, 0x501, cpu=cpu) == by_spec(Status.INVALID_ENC_ALG)
    assert kernel.pconfig(vm.keyid, CLEAR_KEY, cpu=cpu) == (Status.DEVICE_BUSY, True)
    assert kernel.pconfig(5, SET_KEY_RANDOM, leaf=1, cpu=cpu) == FAULT
    assert kernel.pconfig(5, SET_KEY_RANDOM, offset=8, cpu=cpu) == FAULT
    assert kernel.pconfig(5, SET_KEY_RANDOM | 1 << 24, cpu=cpu) == FAULT
    reserved = kernel.pconfig(5, SET_KEY_RANDOM, reserved=1, cpu=cpu)
    assert reserved == (done if revision is Revision.SDM else FAULT)
    assert kernel.pconfig(5, SET_KEY_DIRECT, cpu=cpu) == FAULT  # equal halves, docs/adr/0005
    # After all of it, what is right is done.
    assert kernel.pconfig(5, CLEAR_KEY, cpu=cpu) == done


def test_key_that_a_guest_programs_encrypts(bare: GuestImage, mktme_platform: Platform) -> None:
    """Its pages are read with that KeyID only, and by any library with that key."""
    engine = mktme_platform.engine
    with (
        mktme_platform.launch(bare_config(bare), "alice", boot=False) as alice,
        mktme_platform.launch(bare_config(bare), "bob", boot=False) as bob,
    ):
        kernel, other = BareKernel(alice), BareKernel(bob)
        key = os.urandom(32)
        assert kernel.pconfig(9, SET_KEY_DIRECT, key=key, cpu=1) == (0, False)
        # Another guest, and whoever has no KeyID of that number, cannot touch it.
        for command in (SET_KEY_RANDOM, CLEAR_KEY, NO_ENCRYPT):
            assert other.pconfig(9, command) == (Status.DEVICE_BUSY, True)
            assert other.pconfig(alice.keyid, command) == (Status.DEVICE_BUSY, True)
        assert other.pconfig(10, SET_KEY_RANDOM) == (0, False)

        offset = 1 << 20  # where the kernel is
        engine.assign_pages(alice.uuid, offset, PAGE_BYTES, 9)
        with alice.held():
            plaintext = engine.read(alice.uuid, offset, PAGE_BYTES)
            assert b"Xen" in plaintext
            readable = [
                keyid
                for keyid in range(64)
                if engine.read(alice.uuid, offset, PAGE_BYTES, keyid) == plaintext
            ]
            assert readable == [9]
            address = alice.base + offset
            with open(mktme_platform.dram_path, "rb") as dram:
                stored = os.pread(dram.fileno(), PAGE_BYTES, address)
            assert plaintext == b"".join(
                reference.decrypt(
                    key, (address + at).to_bytes(16, "little"), stored[at : at + LINE_BYTES]
                )
                for at in range(0, PAGE_BYTES, LINE_BYTES)
            )
            assert compare_memory(alice, engine).passed
        owners = {one.keyid: one.vm for one in engine.status().keys}
        assert (owners[9], owners[10]) == (alice.uuid, bob.uuid)
        audit = (mktme_platform.run_dir / AUDIT_FILE).read_bytes()
        assert audit.count(b'"GuestPconfig"') >= 8
        assert key.hex().encode() not in audit
    assert [one.keyid for one in engine.status().keys] == [0]


# --- stock kernels ------------------------------------------------------------------------------


@pytest.mark.mktme(memory="256M", vcpus=2, visible=True)
def test_debian_12s_kernel_finds_tme(mktme_vm: Vm) -> None:
    shell = mktme_vm.domain.shell
    assert shell.run("uname -r", timeout_s=60).output.startswith("6.1.")
    assert kernel_says(shell) == SAYS_6_1
    assert processors(shell) == [(True, True, 40 - 6)] * 2
    with mktme_vm.held() as engine:
        assert compare_memory(mktme_vm, engine).passed


@pytest.mark.mktme(memory="256M", vcpus=2, visible=True)
def test_reset_finds_it_set_up_and_locked_again(mktme_vm: Vm) -> None:
    mktme_vm.domain.reset(BOOT_AGAIN_S)
    assert kernel_says(mktme_vm.domain.shell) == SAYS_6_1
    with mktme_vm.held() as engine:
        assert compare_memory(mktme_vm, engine).passed


@pytest.mark.usefixtures("mktme_platform")
def test_debian_13s_kernel_finds_tme(tmp_path: Path) -> None:
    """The kernel of that guest's disk, in the surroundings of guest tiny."""
    config = vm_config(memory="256M", vcpus=2, visible=True)
    assert isinstance(config.image, GuestImage)
    image = dataclasses.replace(config.image, kernel=kernel_on_disk("debian-13", tmp_path))
    config = dataclasses.replace(config, image=image)
    with another_platform(USUAL) as platform, platform.launch(config) as vm:
        shell = vm.domain.shell
        assert shell.run("uname -r", timeout_s=60).output.startswith("6.12.")
        assert kernel_says(shell) == SAYS_6_12
        assert processors(shell) == [(True, True, 34)] * 2
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed


@pytest.mark.parametrize(
    ("firmware", "expected", "width"),
    [
        (
            PlatformConfig(physical_address_bits=40, tme=False, keyid_bits=0),
            ["x86/tme: not enabled by BIOS"],
            40,
        ),
        pytest.param(
            PlatformConfig(physical_address_bits=40, keyid_bits=0),
            [
                *ENABLED,
                "x86/mktme: No known encryption algorithm is supported: 0x0",
                "x86/mktme: disabled by BIOS",
            ],
            40,
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            PlatformConfig(physical_address_bits=40, policy=Algorithm.AES_XTS_256),
            [*ENABLED, "x86/tme: Unknown policy is active: 0x2", *KEYIDS],
            34,
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            PlatformConfig(physical_address_bits=40, algorithms=(Algorithm.AES_XTS_256,)),
            [*ENABLED, "x86/mktme: No known encryption algorithm is supported: 0x4", *KEYIDS],
            34,
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["disabled", "without KeyIDs", "policy", "algorithms"],
)
@pytest.mark.usefixtures("mktme_platform")  # which skips where there is no QEMU 11
def test_kernel_says_what_else_firmware_did(
    firmware: PlatformConfig, expected: list[str], width: int
) -> None:
    """Controls: the same kernel, another platform."""
    config = vm_config(memory="256M", visible=True, algorithm=firmware.algorithms[0].value)
    if not firmware.keyid_bits:
        config = dataclasses.replace(config, mode=KeyMode.PLATFORM)
    with another_platform(firmware) as platform, platform.launch(config) as vm:
        assert kernel_says(vm.domain.shell) == expected
        assert processors(vm.domain.shell) == [(True, True, width)]


@pytest.mark.nightly
@pytest.mark.timeout(4 * DISK_BOOT_AGAIN_S)
@pytest.mark.parametrize(
    ("guest", "kernel", "says"),
    [("debian-12", "6.1.", SAYS_6_1), ("debian-13", "6.12.", SAYS_6_12)],
    ids=["debian-12", "debian-13"],
)
@pytest.mark.usefixtures("mktme_platform")
def test_debian_and_a_program_of_ours_in_it(
    tmp_path: Path, guest: str, kernel: str, says: list[str]
) -> None:
    """Root reads the registers by the kernel's msr module; so after a reboot, and after kexec."""
    program = tmp_path / "guest_msr"
    source = Path(__file__).parent / "guest_msr.c"
    subprocess.run(["gcc", "-static", "-O2", "-Wall", source, "-o", program], check=True)
    config = vm_config(guest=guest, memory="1G", vcpus=2, visible=True, track="pages")
    config = dataclasses.replace(config, boot_timeout_s=DISK_BOOT_AGAIN_S)
    with another_platform(USUAL) as platform, platform.launch(config) as vm:
        shell = vm.domain.ssh
        assert shell.run("uname -r", timeout_s=60).output.startswith(kernel)
        _program_finds_the_registers(platform, vm, program, says)
        vm.domain.reboot(DISK_BOOT_AGAIN_S)
        _program_finds_the_registers(platform, vm, program, says)
        shell.run("kexec -l /vmlinuz --initrd=/initrd.img --reuse-cmdline", timeout_s=120)
        vm.domain.reboot(DISK_BOOT_AGAIN_S, "kexec")
        _program_finds_the_registers(platform, vm, program, says)
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed


def _program_finds_the_registers(
    platform: Platform, vm: Vm, program: Path, says: list[str]
) -> None:
    shell = vm.domain.ssh
    assert kernel_says(shell) == says
    assert processors(shell) == [(True, True, 34)] * 2
    shell.put("/tmp/guest_msr", program.read_bytes(), timeout_s=60)
    said = shell.run("modprobe msr; /tmp/guest_msr /dev/cpu/[01]/msr", timeout_s=60).output
    expected = []
    for cpu in range(2):
        device = f"/dev/cpu/{cpu}/msr"
        for msr in (0x981, 0x982, 0x983, 0x984):
            expected.append(f"{device} {msr:x} {platform.engine.rdmsr(msr):x}")
        expected.append(f"{device} write error EIO")
    assert said.splitlines() == expected
    assert platform.engine.rdmsr(tme.IA32_TME_ACTIVATE) & 3 == 3  # locked, enabled


# --- what cannot be -----------------------------------------------------------------------------


def test_qemu_without_the_interface_is_refused() -> None:
    with Platform(DRAM_BYTES, config=USUAL) as platform:
        if platform.host.plugin_api >= 7:
            pytest.skip("this machine's own QEMU has it")
        config = vm_config(memory="256M", visible=True)
        with (
            pytest.raises(EnvironmentUnfitError, match="does not let a plugin answer") as refused,
            platform.launch(config),
        ):
            pass
        assert refused.value.hint == "make qemu11, and --emulator qemu11"
        assert platform.engine.status().vms == ()


def test_processor_of_another_vendor_is_refused(bare: GuestImage, mktme_platform: Platform) -> None:
    config = bare_config(bare, hardware=Hardware(arguments=("-cpu", "EPYC")))
    with (
        pytest.raises(UsageError, match="AuthenticAMD's, and TME is Intel's"),
        mktme_platform.launch(config, "epyc", boot=False),
    ):
        pass
    assert "epyc" not in {one.name for one in mktme_platform.engine.status().vms}
