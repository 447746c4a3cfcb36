# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes between the plugin and the engine of a guest that sees the platform's registers.

What RDMSR and CPUID give is in a page of memory that QEMU maps (``qemu-plugin/tme_port.c``); what
changes a register or a key is a call over the link. Layouts are those of
``qemu-plugin/link_protocol.h``. A call comes from the peer, so nothing in it is trusted.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mktme.datapath.link import LinkError, VmLink
from mktme.engine.pconfig import STRUCT_BYTES
from mktme.engine.tme import CpuidBits

_MAGIC: Final = b"MKTMEREG"
_VERSION: Final = 1
_MAX_CPUID: Final = 8
_MAX_MSRS: Final = 16
_HEADER: Final = struct.Struct("<8sIIIHH")
_SEQUENCE_OFFSET: Final = 12
_CPUID: Final = struct.Struct("<6I")
_MSR: Final = struct.Struct("<IIQ")
_CALL: Final = struct.Struct(f"<IIQ{STRUCT_BYTES}x")
_ANSWER: Final = struct.Struct("<IIII")

CALL_BYTES: Final = _CALL.size


class Operation(enum.IntEnum):
    """What a vCPU executes."""

    WRMSR = 1
    PCONFIG = 2


@dataclass(frozen=True, slots=True)
class Call:
    """What a vCPU executes at privilege level 0, and its operands.

    Attributes:
        operation: the instruction.
        number: ECX of WRMSR, EAX of PCONFIG.
        value: EDX:EAX of WRMSR, RBX of PCONFIG.
        program: the 192 bytes at RBX; a part of the message, which may hold a key.
    """

    operation: Operation
    number: int
    value: int
    program: memoryview


def decode_call(message: memoryview) -> Call:
    """Decode and check one call.

    Raises:
        LinkError: it is none.
    """
    if len(message) != CALL_BYTES:
        raise LinkError(f"a call of {len(message)} bytes, {CALL_BYTES} expected")
    operation, number, value = _CALL.unpack_from(message)
    if operation not in set(Operation):
        raise LinkError(f"a call of operation {operation}")
    program = message[CALL_BYTES - STRUCT_BYTES :]
    return Call(Operation(operation), number, value, program)


def encode_answer(*, rax: int = 0, zf: bool = False) -> bytes:
    """The instruction is executed; what PCONFIG leaves in RAX and RFLAGS.ZF."""
    return _ANSWER.pack(0, rax, zf, 0)


GENERAL_PROTECTION: Final = _ANSWER.pack(1, 0, 0, 0)
"""The answer: the instruction raises #GP(0)."""


class RegisterPage:
    """The register page of one linked VM.

    Args:
        link: has its descriptor.
    """

    def __init__(self, link: VmLink) -> None:
        self._link = link
        self._sequence = 0

    def write(self, cpuid: Sequence[CpuidBits], msrs: Mapping[int, int | None]) -> None:
        """Show registers to the guest.

        Args:
            cpuid: what leaves have beside what QEMU says of them, at most 8.
            msrs: what RDMSR gives, None for #GP; at most 16. Of others QEMU decides.

        Raises:
            LinkError: the VM is gone, or QEMU does not let the page be written.
        """
        if len(cpuid) > _MAX_CPUID or len(msrs) > _MAX_MSRS:
            raise ValueError("more than the page holds")
        has_pconfig = any(one.has_pconfig for one in cpuid)
        body = b"".join(_CPUID.pack(one.leaf, one.subleaf, *one.bits) for one in cpuid)
        body = body.ljust(_MAX_CPUID * _CPUID.size, b"\0")
        body += b"".join(_MSR.pack(msr, value is None, value or 0) for msr, value in msrs.items())
        body = body.ljust(_MAX_CPUID * _CPUID.size + _MAX_MSRS * _MSR.size, b"\0")
        # Odd while it is written; who reads meanwhile does so again.
        head = _HEADER.pack(
            _MAGIC, _VERSION, self._sequence + 1, has_pconfig, len(cpuid), len(msrs)
        )
        self._write(head, 0)
        self._write(body, len(head))
        self._sequence = (self._sequence + 2) % (1 << 32)
        self._write(self._sequence.to_bytes(4, "little"), _SEQUENCE_OFFSET)

    def _write(self, data: bytes, offset: int) -> None:
        self._link.check_open()
        if self._link.registers is None:
            raise LinkError("the VM has no register page")
        try:
            os.pwrite(self._link.registers, data, offset)
        except OSError as error:
            raise LinkError(f"the register page cannot be written: {error.strerror}") from error
