# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine's memory is written as: layouts, and the kernel's VMCOREINFO in memory."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.dump.formats import (
    VMCOREINFO_MAX_BYTES,
    Format,
    describes_running_kernel,
    layout,
    parse_vmcoreinfo,
    vmcoreinfo_pages,
)
from mktme.engine.sidecar import GuestSegment

PAGE = 4096
LOW, HIGH = 0x10000, 1 << 32
SEGMENTS = (
    GuestSegment(guest_physical=0, ram_offset=0, size_bytes=LOW),
    GuestSegment(guest_physical=HIGH, ram_offset=LOW, size_bytes=PAGE),
)
RELEASE = "6.1.0-51-amd64"
TEXT = (
    f"OSRELEASE={RELEASE}\nBUILD-ID=00\nPAGESIZE=4096\n"
    "SYMBOL(init_uts_ns)=ffffffff82a11dc0\nNUMBER(phys_base)=-16777216\n"
).encode()


def note_of(text: bytes = TEXT, name: bytes = b"VMCOREINFO\0", kind: int = 0) -> bytes:
    """As update_vmcoreinfo_note() has it in memory."""
    padded = name + bytes(-len(name) % 4)
    return struct.pack("<III", len(name), len(text), kind) + padded + text


def test_raw_is_memory_at_its_addresses() -> None:
    assert layout(Format.RAW, SEGMENTS).offsets == (0, HIGH)
    assert layout(Format.RAW, SEGMENTS).size_bytes == HIGH + PAGE
    assert layout(Format.RAW, SEGMENTS).headers == ()


def test_lime_has_a_header_a_range() -> None:
    made = layout(Format.LIME, SEGMENTS)
    assert made.offsets == (32, 32 + LOW + 32)
    assert made.size_bytes == 2 * 32 + LOW + PAGE
    assert made.headers == (
        (0, b"EMiL" + struct.pack("<IQQQ", 1, 0, LOW - 1, 0)),
        (32 + LOW, b"EMiL" + struct.pack("<IQQQ", 1, HIGH, HIGH + PAGE - 1, 0)),
    )


def test_elf_is_one_to_others(tmp_path: Path) -> None:
    note = note_of()
    note += bytes(-len(note) % 4)
    made = layout(Format.ELF, SEGMENTS, note)
    assert made.offsets == layout(Format.ELF, SEGMENTS).offsets
    assert all(offset % PAGE == 0 for offset in made.offsets)
    path = tmp_path / "core"
    with path.open("wb") as file:
        file.truncate(made.size_bytes)
        for offset, contents in made.headers:
            file.seek(offset)
            file.write(contents)
    shown = subprocess.run(
        ["readelf", "--wide", "--file-header", "--segments", "--notes", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stderr == ""
    assert "CORE (Core file)" in shown.stdout
    assert "X86-64" in shown.stdout
    assert shown.stdout.count("  LOAD  ") == 2
    (high,) = (line.split() for line in shown.stdout.splitlines() if f"{HIGH:016x}" in line)
    assert int(high[1], 16) == made.offsets[1]
    assert [int(one, 16) for one in high[3:6]] == [HIGH, PAGE, PAGE]
    assert "VMCOREINFO" in shown.stdout


def test_note_is_found_at_the_start_of_a_page() -> None:
    memory = bytearray(Random(1).randbytes(8 * PAGE))
    for page, contents in (
        (2, note_of()),
        (5, note_of(kind=1)),
        (6, note_of(name=b"XMCOREINFO\0")),
    ):
        memory[page * PAGE : page * PAGE + len(contents)] = contents
    memory[7 * PAGE + 64 : 7 * PAGE + 64 + len(note_of())] = note_of()
    pages = np.frombuffer(memory, np.uint64).reshape(-1, 512)
    assert vmcoreinfo_pages(pages) == [2]
    found = parse_vmcoreinfo(bytes(memory[2 * PAGE :][:VMCOREINFO_MAX_BYTES]))
    assert found is not None
    assert found[1] == RELEASE
    assert found[0].rstrip(b"\0") == note_of().rstrip(b"\0")
    assert len(found[0]) % 4 == 0


@pytest.mark.parametrize(
    "memory",
    [
        b"",
        note_of()[:20],
        note_of()[:-1],
        note_of(kind=1),
        note_of(b"OSRELEASE"),
        note_of(TEXT.replace(b"SYMBOL(init_uts_ns)", b"SYMBOL(other)")),
        note_of(TEXT.replace(b"NUMBER(phys_base)", b"NUMBER(other)")),
        note_of(TEXT.replace(RELEASE.encode(), b"\x1b[31m")),
        note_of(TEXT.replace(RELEASE.encode(), b"\xff")),
        note_of(name=b"OTHER\0\0\0\0\0\0"),
    ],
)
def test_what_is_no_note(memory: bytes) -> None:
    assert parse_vmcoreinfo(memory) is None


def test_note_of_the_kernel_that_runs() -> None:
    """Its release is where its symbol says, moved by phys_base; that of one before kexec is not."""
    at = 0xFFFFFFFF82A11DC0 - 0xFFFFFFFF80000000 - 16777216

    def read(address: int, size_bytes: int) -> bytes:
        return (
            b"Linux\0tiny\0".ljust(130, b"\0") + RELEASE.encode() + b"\0" if address == at else b""
        )

    assert describes_running_kernel(note_of(), read)
    assert not describes_running_kernel(note_of(TEXT.replace(b"-51-", b"-50-")), read)
    assert not describes_running_kernel(note_of(TEXT.replace(b"16777216", b"0")), read)
    assert not describes_running_kernel(note_of(TEXT.replace(b"-1677", b"-99991677")), read)
    assert not describes_running_kernel(b"OSRELEASE=x\n", read)


@given(
    st.one_of(
        st.binary(max_size=100),
        st.binary(max_size=200).map(lambda text: note_of(b"OSRELEASE=" + text)),
        st.from_regex(
            rb"OSRELEASE=.*\nSYMBOL\(init_uts_ns\)=.*\nNUMBER\(phys_base\)=.*", fullmatch=True
        ).map(note_of),
    )
)
def test_guest_may_write_what_it_likes(memory: bytes) -> None:
    found = parse_vmcoreinfo(memory)
    if found is not None:
        assert found[1].isprintable()
        assert memory.startswith(found[0].rstrip(b"\0"))
        describes_running_kernel(found[0], lambda _address, _size: b"")
