# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin's parts that need no QEMU: micro-TLB, RAM segments, and what flushes a TLB."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

PLUGIN: Final = Path(__file__).parents[2] / "qemu-plugin"
PAGE: Final = 4096
LINE: Final = 64
GIB: Final = 1 << 30
HIGHEST_PAGE: Final = (1 << 64) - PAGE
U64 = ctypes.c_uint64


def _sets() -> int:
    found = re.search(r"#define MKTME_TLB_SETS (\d+)", (PLUGIN / "micro_tlb.h").read_text())
    assert found
    return int(found[1])


SETS: Final = _sets()


class Segment(ctypes.Structure):
    """struct mktme_hello_segment."""

    _fields_ = [("guest_physical", U64), ("ram_offset", U64), ("size_bytes", U64)]


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.mktme_micro_tlb_flush.argtypes = [ctypes.c_void_p]
    library.mktme_micro_tlb_flush.restype = None
    library.mktme_micro_tlb_insert.argtypes = [ctypes.c_void_p, U64, U64]
    library.mktme_micro_tlb_insert.restype = None
    for lookup in (library.mktme_micro_tlb_lookup, library.mktme_micro_tlb_lookup_recent):
        lookup.argtypes = [ctypes.c_void_p, U64, ctypes.POINTER(U64)]
        lookup.restype = ctypes.c_bool
    library.mktme_may_cross_line.argtypes = [U64]
    library.mktme_may_cross_line.restype = ctypes.c_bool
    library.mktme_crosses_line.argtypes = [U64, ctypes.c_uint, ctypes.POINTER(U64)]
    library.mktme_crosses_line.restype = ctypes.c_bool
    library.mktme_segments_init.argtypes = [U64, U64, ctypes.POINTER(Segment)]
    library.mktme_segments_init.restype = ctypes.c_size_t
    segments_type = ctypes.POINTER(Segment)
    library.mktme_ram_offset.argtypes = [segments_type, ctypes.c_size_t, U64, ctypes.POINTER(U64)]
    library.mktme_ram_offset.restype = ctypes.c_bool
    library.mktme_flushes_tlb.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.mktme_flushes_tlb.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not (shutil.which("make") and shutil.which("cc")) and not os.environ.get("CI"):
        pytest.skip("needs make and a C compiler")
    build = tmp_path_factory.mktemp("plugin")
    subprocess.run(
        ["make", "-C", PLUGIN, "testlib", f"BUILD={build}"], check=True, capture_output=True
    )
    return _load(build / "libmicro_tlb.so")


class MicroTlb:
    """An empty one, with the C functions as methods."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        # Two entries of two words a set.
        self._memory = ctypes.create_string_buffer(SETS * 2 * 16)
        self.flush()

    def flush(self) -> None:
        self._library.mktme_micro_tlb_flush(self._memory)

    def insert(self, vaddr: int, ram_offset: int) -> None:
        self._library.mktme_micro_tlb_insert(self._memory, vaddr, ram_offset)

    def lookup(self, vaddr: int) -> int | None:
        line = U64()
        hit = self._library.mktme_micro_tlb_lookup(self._memory, vaddr, line)
        return line.value if hit else None

    def lookup_recent(self, vaddr: int) -> int | None:
        line = U64()
        hit = self._library.mktme_micro_tlb_lookup_recent(self._memory, vaddr, line)
        return line.value if hit else None


@pytest.fixture
def tlb(library: ctypes.CDLL) -> MicroTlb:
    return MicroTlb(library)


VADDRS: Final = [0, PAGE, 0x7FFF_FFFF_F000, 0xFFFF_8880_0000_0000, HIGHEST_PAGE]


@pytest.mark.parametrize("vaddr", VADDRS, ids=hex)
def test_empty_tlb_knows_nothing(tlb: MicroTlb, vaddr: int) -> None:
    assert tlb.lookup(vaddr) is None
    assert tlb.lookup_recent(vaddr) is None


@pytest.mark.parametrize("vaddr", VADDRS, ids=hex)
@pytest.mark.parametrize("ram_offset", [0, 5 * PAGE, 3 * GIB], ids=hex)
def test_page_is_known_from_its_first_byte_to_its_last(
    tlb: MicroTlb, vaddr: int, ram_offset: int
) -> None:
    # What enters is a store's address, which need not be the start of its page.
    tlb.insert(vaddr + 0x123, ram_offset + 0x123)
    for into in (0, 1, LINE - 1, LINE, 0x123, PAGE - 1):
        assert tlb.lookup(vaddr + into) == (ram_offset + into) // LINE
        assert tlb.lookup_recent(vaddr + into) == (ram_offset + into) // LINE
    assert tlb.lookup((vaddr + PAGE) % (1 << 64)) is None
    assert tlb.lookup((vaddr - 1) % (1 << 64)) is None


def test_two_pages_of_one_set_live_side_by_side(tlb: MicroTlb) -> None:
    first, second = 7 * PAGE, (7 + SETS) * PAGE
    tlb.insert(first, 100 * PAGE)
    tlb.insert(second, 200 * PAGE)
    assert tlb.lookup_recent(second) == 200 * PAGE // LINE
    assert tlb.lookup_recent(first) is None
    assert tlb.lookup(first) == 100 * PAGE // LINE
    # That made it the recent one, and the other is not forgotten.
    assert tlb.lookup_recent(first) == 100 * PAGE // LINE
    assert tlb.lookup(second) == 200 * PAGE // LINE


def test_third_page_of_a_set_replaces_the_one_used_longest_ago(tlb: MicroTlb) -> None:
    first, second, third = (page * PAGE for page in (7, 7 + SETS, 7 + 2 * SETS))
    neighbour = 8 * PAGE
    for vaddr in (neighbour, first, second):
        tlb.insert(vaddr, vaddr)
    assert tlb.lookup(first) is not None
    tlb.insert(third, third)
    assert tlb.lookup(second) is None
    assert tlb.lookup(first) == first // LINE
    assert tlb.lookup(third) == third // LINE
    assert tlb.lookup(neighbour) == neighbour // LINE


def test_flush_forgets_every_page(tlb: MicroTlb) -> None:
    pages = [page * PAGE for page in range(2 * SETS)]
    for vaddr in pages:
        tlb.insert(vaddr, vaddr)
    assert all(tlb.lookup(vaddr) is not None for vaddr in pages)
    tlb.flush()
    assert all(tlb.lookup(vaddr) is None for vaddr in pages)


# Few pages of few sets, so that they get in each other's way.
_PAGES = st.sampled_from([base + way * SETS for base in (0, 1, 1 << 51) for way in range(4)])


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("insert"), _PAGES, st.integers(0, 1 << 20)),
            st.tuples(st.just("lookup"), _PAGES, st.integers(0, PAGE - 1)),
            st.tuples(st.just("flush"), st.just(0), st.just(0)),
        )
    )
)
def test_hit_is_always_the_newest_translation_since_the_flush(
    library: ctypes.CDLL, steps: list[tuple[str, int, int]]
) -> None:
    tlb = MicroTlb(library)
    truth: dict[int, int] = {}
    for step, page, number in steps:
        vaddr = page * PAGE
        if step == "flush":
            tlb.flush()
            truth.clear()
        elif step == "insert" and tlb.lookup(vaddr) is None:
            # As the plugin does: what is known is not inserted again.
            tlb.insert(vaddr, number * PAGE)
            truth[page] = number * PAGE
        elif (line := tlb.lookup(vaddr + number % PAGE)) is not None:
            assert line == (truth[page] + number % PAGE) // LINE


def segments_of(library: ctypes.CDLL, ram: int, below: int) -> list[tuple[int, int, int]]:
    segments = (Segment * 2)()
    count = library.mktme_segments_init(ram, below, segments)
    return [(s.guest_physical, s.ram_offset, s.size_bytes) for s in segments[:count]]


@pytest.mark.parametrize(
    ("ram", "below", "expected"),
    [
        (512 << 20, 2 * GIB, [(0, 0, 512 << 20)]),
        (2 * GIB, 2 * GIB, [(0, 0, 2 * GIB)]),
        (2 * GIB + PAGE, 2 * GIB, [(0, 0, 2 * GIB), (4 * GIB, 2 * GIB, PAGE)]),
        (8 * GIB, 3 * GIB, [(0, 0, 3 * GIB), (4 * GIB, 3 * GIB, 5 * GIB)]),
    ],
)
def test_ram_goes_around_the_pci_hole(
    library: ctypes.CDLL, ram: int, below: int, expected: list[tuple[int, int, int]]
) -> None:
    assert segments_of(library, ram, below) == expected


@pytest.mark.parametrize(
    ("guest_physical", "ram_offset"),
    [
        (0, 0),
        (3 * GIB - 1, 3 * GIB - 1),
        (3 * GIB, None),  # the hole: devices, ROM at its end
        (4 * GIB - 1, None),
        (4 * GIB, 3 * GIB),
        (9 * GIB - 1, 8 * GIB - 1),
        (9 * GIB, None),
        ((1 << 64) - 1, None),
    ],
)
def test_guest_physical_to_ram_offset(
    library: ctypes.CDLL, guest_physical: int, ram_offset: int | None
) -> None:
    segments = (Segment * 2)()
    count = library.mktme_segments_init(8 * GIB, 3 * GIB, segments)
    offset = U64()
    found = library.mktme_ram_offset(segments, count, guest_physical, offset)
    assert (offset.value if found else None) == ram_offset


def test_store_marks_its_last_line_exactly_when_that_is_another(library: ctypes.CDLL) -> None:
    for start in range(PAGE - LINE, PAGE + LINE):
        for shift in range(5):
            last = U64()
            crosses = library.mktme_crosses_line(start, shift, last)
            assert last.value == start + (1 << shift) - 1
            assert crosses == (last.value // LINE != start // LINE)
            # The hot path asks for the size only where this says so.
            assert library.mktme_may_cross_line(start) or not crosses
    assert not library.mktme_may_cross_line(0)


FLUSHING: Final = {
    "mov cr0, rax": "0f 22 c0",
    "mov cr3, rdi": "0f 22 df",
    "mov cr4, r8": "41 0f 22 e0",
    "mov cr8, rax": "44 0f 22 c0",
    "wrmsr": "0f 30",
    "wrmsrns": "0f 01 c6",
    "rsm": "0f aa",
    "invlpg [rax]": "0f 01 38",
    "invlpg [r9+8]": "41 0f 01 79 08",
    "invlpg gs:[rip+0]": "65 0f 01 3d 00 00 00 00",
    "lmsw ax": "0f 01 f0",
    "lmsw [rax]": "0f 01 30",
    "invpcid rax, [rcx]": "66 0f 38 82 01",
    "invpcid r8, [rcx]": "66 44 0f 38 82 01",
    "vmrun": "0f 01 d8",
    "vmmcall": "0f 01 d9",
    "stgi": "0f 01 dc",
    "invlpga": "0f 01 df",
    "call far [rax]": "ff 18",
    "jmp far [rax]": "ff 28",
    "jmp far fword [rsp+8]": "48 ff 6c 24 08",
    "jmp far 8:0": "ea 00 00 00 00 08 00",
    "call far 8:0": "9a 00 00 00 00 08 00",
    "jmp far, 16 bit": "66 ea 00 00 08 00",
    "int3": "cc",
    "int 80h": "cd 80",
    "into": "ce",
    "int1": "f1",
    "iret": "cf",
    "iret, 16 bit": "66 cf",
    "rex.w that does not count, iret": "48 66 cf",
    "out 92h, al": "e6 92",
    "out 80h, eax": "e7 80",
    "out dx, al": "ee",
    "out dx, eax": "ef",
    "rep outsb": "f3 6e",
    "outsw": "66 6f",
    "all segment overrides": "26 2e 36 3e 64 65 0f 30",
    "repeats, lock, sizes": "f0 f2 f3 66 67 0f 30",
    "rex before a legacy prefix": "48 f3 0f 30",
}

NOT_FLUSHING: Final = {
    "nothing": "",
    "prefixes alone": "66 f3 48",
    "inc eax, 32 bit": "40",
    "mov rax, cr3": "0f 20 d8",
    "mov dr7, rax": "0f 23 f8",
    "rdmsr": "0f 32",
    "rdtsc": "0f 31",
    "wbinvd": "0f 09",
    "clts": "0f 06",
    "syscall": "0f 05",
    "swapgs": "0f 01 f8",
    "rdtscp": "0f 01 f9",
    "clac": "0f 01 ca",
    "stac": "0f 01 cb",
    "xsetbv": "0f 01 d1",
    "smsw eax": "0f 01 e0",
    "sgdt [rax]": "0f 01 00",
    "lgdt [rax]": "0f 01 10",
    "lidt [rax]": "0f 01 18",
    "smsw [rax]": "0f 01 20",
    "0f 38 82 without 66": "0f 38 82 01",
    "pshufb xmm": "66 0f 38 00 c1",
    "0f at the end": "0f",
    "0f 01 at the end": "0f 01",
    "0f 38 at the end": "66 0f 38",
    "ff at the end": "ff",
    "call near [rax]": "ff 10",
    "jmp near [rax]": "ff 20",
    "push [rax]": "ff 30",
    "inc dword [rax]": "ff 00",
    "ff /3 with a register": "ff d8",
    "ff /5 with a register": "ff e8",
    "iretq": "48 cf",
    "prefix, iretq": "66 48 cf",
    "retf": "cb",
    "in al, dx": "ec",
    "in al, 60h": "e4 60",
    "insb": "6c",
    "call near": "e8 00 00 00 00",
    "jmp near": "e9 00 00 00 00",
    "hlt": "f4",
    "mov [rax], rcx": "48 89 08",
    "mov eax, 0x300f": "b8 0f 30 00 00",
    "mov with an immediate like wrmsr": "c7 00 0f 30 0f 30",
    "vzeroupper": "c5 f8 77",
    "vpmovzxbw xmm0, xmm1": "c4 e2 79 30 c1",
    "vpmovzxbw zmm0, ymm1": "62 f2 7d 48 30 c1",
}


@pytest.mark.parametrize("code", FLUSHING.values(), ids=FLUSHING.keys())
def test_flushing_instruction_is_recognised(library: ctypes.CDLL, code: str) -> None:
    instruction = bytes.fromhex(code)
    assert library.mktme_flushes_tlb(instruction, len(instruction))


@pytest.mark.parametrize("code", NOT_FLUSHING.values(), ids=NOT_FLUSHING.keys())
def test_look_alike_is_not(library: ctypes.CDLL, code: str) -> None:
    instruction = bytes.fromhex(code)
    assert not library.mktme_flushes_tlb(instruction, len(instruction))


@pytest.mark.parametrize("code", ["0f 22", "0f 01 38", "66 0f 38 82", "ff 28"])
def test_bytes_past_the_end_do_not_count(library: ctypes.CDLL, code: str) -> None:
    instruction = bytes.fromhex(code)
    assert library.mktme_flushes_tlb(instruction, len(instruction))
    for size in range(len(instruction)):
        assert not library.mktme_flushes_tlb(instruction, size)


@given(instruction=st.binary(max_size=15))
def test_any_bytes_can_be_asked_about(library: ctypes.CDLL, instruction: bytes) -> None:
    verdict = library.mktme_flushes_tlb(instruction, len(instruction))
    # A prefix that no opcode depends on changes nothing.
    assert library.mktme_flushes_tlb(b"\x3e" + instruction, len(instruction) + 1) == verdict
