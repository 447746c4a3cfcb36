# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel that executes single instructions and tells how they ended: ``bare/main.c``."""

from __future__ import annotations

import dataclasses
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mktme.vm.images import GuestImage, ensure
from mktme.vm.platform import Vm

SOURCES: Final = Path(__file__).parent / "bare"
ANSWER_TIMEOUT_S: Final = 60
USER: Final = 2
"""In place of a vCPU: the first one, at privilege level 3."""
COMPARISON: Final = 0x97
"""RFLAGS of the comparison before each instruction (0 - 1): CF, PF, AF, SF; bit 1 is always set."""
_ARITHMETIC: Final = 0x8D7
_FLAGS: Final = (
    *("-m64", "-O2", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-mno-red-zone"),
    *("-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none"),
    f"-Wl,-T,{SOURCES / 'layout.ld'},--build-id=none,-z,noexecstack,--no-warn-rwx-segments",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an instruction ended.

    Attributes:
        exception: "#GP" or "#UD", at the instruction; None if it was executed.
        rflags: the arithmetic ones behind it, or in the exception's frame.
    """

    exception: str | None
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rflags: int


def bare_image(directory: Path) -> GuestImage:
    """Build the kernel; a guest of it is to have two vCPUs."""
    kernel, initrd = directory / "bare.elf", directory / "initrd"
    sources = [SOURCES / "start.S", SOURCES / "main.c"]
    subprocess.run(["gcc", *_FLAGS, *sources, "-o", kernel], check=True)
    initrd.write_bytes(bytes(4096))  # libvirt wants one
    return dataclasses.replace(
        ensure("tiny"), name="bare", kernel=kernel, initrd=initrd, cmdline=""
    )


class BareKernel:
    """A running one.

    Args:
        vm: launched, and not booted.
    """

    def __init__(self, vm: Vm) -> None:
        self._domain = vm.domain
        self._domain.resume()
        with self._domain.explained():
            self._domain.console.wait_for("bare kernel ready", ANSWER_TIMEOUT_S, "booting")

    def cpuid(
        self, leaf: int, subleaf: int = 0, *, cpu: int = 0, alone: bool = False
    ) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX; `alone` in its block."""
        name = "Cpuid" if alone else "cpuid"
        outcome = self._execute(f"{cpu} {name} {leaf:x} {subleaf:x}")
        assert (outcome.exception, outcome.rflags) == (None, COMPARISON)
        return outcome.rax, outcome.rbx, outcome.rcx, outcome.rdx

    def rdmsr(self, msr: int, *, cpu: int = 0, alone: bool = False) -> int | None:
        """EDX:EAX; None for #GP, which leaves all registers as they were; `alone` in its block."""
        outcome = self._execute(f"{cpu} {'Rdmsr' if alone else 'rdmsr'} {msr:x}")
        assert (outcome.rcx, outcome.rflags) == (msr, COMPARISON)
        if outcome.exception is not None:
            assert outcome.exception == "#GP"
            assert (outcome.rax, outcome.rdx) == (0, 0x2222222222222222)
            return None
        assert outcome.rax >> 32 == outcome.rdx >> 32 == 0
        return outcome.rdx << 32 | outcome.rax

    def wrmsr(self, msr: int, value: int, *, cpu: int = 0) -> bool:
        """False for #GP; either way registers and flags are as they were."""
        outcome = self._execute(f"{cpu} wrmsr {msr:x} {value:x}")
        assert (outcome.rcx, outcome.rax, outcome.rdx) == (msr, value, value >> 32)
        assert outcome.rflags == COMPARISON
        assert outcome.exception in (None, "#GP")
        return outcome.exception is None

    def pconfig(
        self,
        keyid: int,
        control: int,
        *,
        leaf: int = 0,
        offset: int = 0,
        reserved: int = 0,
        key: bytes = b"",
        cpu: int = 0,
    ) -> tuple[int, bool] | str:
        """RAX and ZF, other flags being clear; or its exception.

        Args:
            keyid: KEYID.
            control: KEYID_CTRL.
            leaf: EAX.
            offset: of RBX from an aligned address.
            reserved: a byte of RSVD.
            key: data key, then tweak key.
            cpu: which vCPU executes it.
        """
        half = len(key) // 2
        halves = " ".join(one.hex() or "-" for one in (key[:half], key[half:]))
        outcome = self._execute(
            f"{cpu} pconfig {leaf:x} {offset:x} {keyid:x} {control:x} {reserved:x} {halves}"
        )
        assert (outcome.rcx, outcome.rdx) == (0x1111111111111111, 0x2222222222222222)
        if outcome.exception is not None:
            assert (outcome.rax, outcome.rflags) == (leaf, COMPARISON)
            return outcome.exception
        assert outcome.rflags & ~0x40 == 2
        return outcome.rax, bool(outcome.rflags & 0x40)

    def _execute(self, command: str) -> Outcome:
        console = self._domain.console
        console.send(command)
        with self._domain.explained():
            said = console.wait_for(r"(done|lost|#[A-Z]+)[^\n]*\n", ANSWER_TIMEOUT_S, command)
        *_, line = said.decode().split("\n")[:-1]
        what, *numbers = line.split()
        assert what in ("done", "#GP", "#UD"), line
        if what != "done":
            assert numbers.pop(0) == "0", "an error code"
        rax, rbx, rcx, rdx, rflags = (int(one, 16) for one in numbers)
        exception = None if what == "done" else what
        return Outcome(exception, rax, rbx, rcx, rdx, rflags & _ARITHMETIC)
