# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that hold a machine's physical memory, as the tools of others read it.

``raw``
    File offset = guest-physical address; what is no RAM (the PCI hole) is a hole in the file.
``lime``
    LiME's format, version 1 (github.com/504ensicsLabs/LiME, doc/README.md, "LiME memory range
    header"): each range has a header of 32 bytes, then its contents.
``elf``
    An ELF64 core as /proc/vmcore is one: elf(5); a PT_LOAD a range, its physical address in
    p_paddr. In PT_NOTE is the kernel's own VMCOREINFO, by which drgn(1) and crash(8) find their way
    (Documentation/admin-guide/kdump/vmcoreinfo.rst); it is in the guest's memory, complete with the
    header of a note, from boot on (kernel/crash_core.c or kernel/vmcore_info.c,
    update_vmcoreinfo_note).
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mktme.engine.sidecar import GuestSegment
from mktme.engine.xts import PAGE_BYTES

_LIME_MAGIC: Final = 0x4C694D45
_LIME_HEADER: Final = struct.Struct("<IIQQQ")  # magic, version, first and last address, reserved

_ELF_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_IDENT: Final = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1; any OS
_ET_CORE, _EM_X86_64, _EV_CURRENT = 4, 62, 1
_PT_LOAD, _PT_NOTE = 1, 4
_RWX: Final = 7

_NOTE: Final = struct.Struct("<III")  # sizes of name and descriptor, type
_NOTE_NAME: Final = b"VMCOREINFO\0"
_NAME_BYTES: Final = len(_NOTE_NAME) + 1  # padded to 4
_TEXT_STARTS: Final = b"OSRELEASE="
# A page of text (VMCOREINFO_BYTES, include/linux/crash_core.h).
_TEXT_MAX_BYTES: Final = 4096
VMCOREINFO_MAX_BYTES: Final = _NOTE.size + _NAME_BYTES + _TEXT_MAX_BYTES
"""The most bytes that the kernel's note takes."""
_START_KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000  # arch/x86/include/asm/page_64_types.h
_UTS_NS_BYTES: Final = 512  # struct uts_namespace begins with struct new_utsname, 390 bytes


class Format(enum.Enum):
    """What a guest's memory is written as; the value is the name users see."""

    RAW = "raw"
    LIME = "lime"
    ELF = "elf"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things go in a file.

    Attributes:
        size_bytes: of the file.
        offsets: of each segment's first byte.
        headers: (offset, contents) of all that is not memory.
    """

    size_bytes: int
    offsets: tuple[int, ...]
    headers: tuple[tuple[int, bytes], ...] = ()


def layout(kind: Format, segments: Sequence[GuestSegment], note: bytes = b"") -> Layout:
    """Where a guest's memory goes.

    Args:
        kind: in which format.
        segments: of the guest's memory, by guest-physical address.
        note: `elf`: contents of PT_NOTE; where memory goes does not depend on it.
    """
    match kind:
        case Format.RAW:
            end = segments[-1].guest_physical + segments[-1].size_bytes
            return Layout(end, tuple(one.guest_physical for one in segments))
        case Format.LIME:
            return _lime(segments)
        case Format.ELF:
            return _elf(segments, note)


def _lime(segments: Sequence[GuestSegment]) -> Layout:
    headers, offsets, at = [], [], 0
    for one in segments:
        last = one.guest_physical + one.size_bytes - 1
        headers.append((at, _LIME_HEADER.pack(_LIME_MAGIC, 1, one.guest_physical, last, 0)))
        at += _LIME_HEADER.size
        offsets.append(at)
        at += one.size_bytes
    return Layout(at, tuple(offsets), tuple(headers))


def _elf(segments: Sequence[GuestSegment], note: bytes) -> Layout:
    count = len(segments) + 1
    at = _ELF_HEADER.size + count * _PROGRAM_HEADER.size
    at += -at % PAGE_BYTES
    programs, offsets = [], []
    for one in segments:
        # p_vaddr: the guest's page tables know, and who reads the file walks them.
        programs.append(
            _PROGRAM_HEADER.pack(
                *(_PT_LOAD, _RWX, at, 0, one.guest_physical, one.size_bytes, one.size_bytes, 0)
            )
        )
        offsets.append(at)
        at += one.size_bytes
    # Last, because it is only found while memory is written.
    programs.insert(0, _PROGRAM_HEADER.pack(_PT_NOTE, 0, at, 0, 0, len(note), len(note), 4))
    header = _ELF_HEADER.pack(
        *(_IDENT, _ET_CORE, _EM_X86_64, _EV_CURRENT, 0, _ELF_HEADER.size, 0, 0),
        *(_ELF_HEADER.size, _PROGRAM_HEADER.size, count, 0, 0, 0),
    )
    headers = ((0, header + b"".join(programs)), (at, note))
    return Layout(at + len(note), tuple(offsets), headers)


def vmcoreinfo_pages(pages: NDArray[np.uint64]) -> list[int]:
    """Where a VMCOREINFO note begins; it is at the start of a page (Linux 4.13).

    Args:
        pages: plaintext, uint64, shape (n, 512).

    Returns:
        Indices of pages.
    """
    starts = np.frombuffer(_NOTE_NAME + b"\0" + _TEXT_STARTS, np.uint8)
    # The first word is the sizes of name and text, the next 4 bytes the type, 0, and then it is
    # the same for all kernels.
    candidates = np.flatnonzero(
        (pages[:, 0] & np.uint64(0xFFFFFFFF) == len(_NOTE_NAME))
        & (pages[:, 0] >> np.uint64(32) <= _TEXT_MAX_BYTES)
        & (pages[:, 1] & np.uint64(0xFFFFFFFF) == 0)
    )
    return [
        int(one)
        for one in candidates
        if (pages[one].view(np.uint8)[_NOTE.size :][: len(starts)] == starts).all()
    ]


def parse_vmcoreinfo(memory: bytes) -> tuple[bytes, str] | None:
    """Take the kernel's note out of memory.

    Args:
        memory: from the note's first byte on, `VMCOREINFO_MAX_BYTES` or what there is.

    Returns:
        The note as PT_NOTE has it, and the kernel's release; None if it is none that is complete.
    """
    if len(memory) < _NOTE.size + _NAME_BYTES:
        return None
    name_bytes, text_bytes, kind = _NOTE.unpack_from(memory)
    end = _NOTE.size + _NAME_BYTES + text_bytes
    text = memory[_NOTE.size + _NAME_BYTES : end]
    if (name_bytes, kind) != (len(_NOTE_NAME), 0) or len(text) != text_bytes:
        return None
    if not memory[_NOTE.size :].startswith(_NOTE_NAME) or not text.startswith(_TEXT_STARTS):
        return None
    release = text.partition(b"\n")[0].removeprefix(_TEXT_STARTS)
    # What drgn and crash cannot do without: where the kernel's symbols are.
    if b"\nSYMBOL(init_uts_ns)=" not in text or b"\nNUMBER(phys_base)=" not in text:
        return None
    if not release.isascii() or not release.decode().isprintable():
        return None
    return memory[:end] + bytes(-end % 4), release.decode()


def describes_running_kernel(text: bytes, read: Callable[[int, int], bytes]) -> bool:
    """Whether the kernel that a VMCOREINFO is of is the one that is in memory there.

    After a kexec, the old kernel's may be in memory still.

    Args:
        text: the note.
        read: gives bytes at a guest-physical address, or fewer if there are not as many.
    """
    release = _value(text, rb"OSRELEASE=(\S+)")
    symbol = _value(text, rb"SYMBOL\(init_uts_ns\)=([0-9a-f]+)")
    base = _value(text, rb"NUMBER\(phys_base\)=(-?\d+)")
    if release is None or symbol is None or base is None:
        return False
    # The kernel's own image: __pa_symbol of arch/x86/include/asm/page.h.
    address = int(symbol, 16) - _START_KERNEL_MAP + int(base)
    return address >= 0 and release + b"\0" in read(address, _UTS_NS_BYTES)


def _value(text: bytes, pattern: bytes) -> bytes | None:
    found = re.search(pattern, text)
    return None if found is None else found[1]
