# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM, read from the QEMU process itself."""

from __future__ import annotations

import os
import subprocess

import pytest

from mktme.proof.guest_ram import CHUNK_BYTES, GuestRam, GuestRamError

from ..conftest import MakeQemu
from ..fake_qemu import PAGE

pytestmark = pytest.mark.usefixtures("write_tracking")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_ram_is_what_the_process_has(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(3, 5, 2)
    qemu.dma(0, os.urandom(3 * PAGE))
    qemu.dma(4 * PAGE, os.urandom(PAGE))
    qemu.dma(8 * PAGE, os.urandom(2 * PAGE))
    before = descriptors()
    with GuestRam(os.getpid(), qemu.ram_bytes) as ram:
        expected = qemu.contents()
        assert ram.read(0, qemu.ram_bytes) == expected
        assert ram.read(3 * PAGE - 7, 14) == expected[3 * PAGE - 7 :][:14]
        assert ram.read(9 * PAGE, 10 * PAGE) == expected[9 * PAGE :]
        assert list(ram.chunks()) == [(0, expected)]
    assert descriptors() == before


def test_large_ram_comes_in_chunks(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(CHUNK_BYTES // PAGE + 3)
    qemu.dma(CHUNK_BYTES - 1, b"ab")
    with GuestRam(os.getpid(), qemu.ram_bytes) as ram:
        chunks = list(ram.chunks())
    assert [(offset, len(data)) for offset, data in chunks] == [
        (0, CHUNK_BYTES),
        (CHUNK_BYTES, 3 * PAGE),
    ]
    assert b"".join(data for _, data in chunks) == qemu.contents()


def test_looking_leaves_memory_as_it_is(make_qemu: MakeQemu) -> None:
    qemu = make_qemu()
    with GuestRam(os.getpid(), qemu.ram_bytes) as ram:
        assert not any(ram.read(0, qemu.ram_bytes))
    assert os.fstat(qemu.ram[0]).st_blocks == 0


@pytest.mark.parametrize("page", [0, 2, 3, 9])
def test_page_is_found_where_it_is(make_qemu: MakeQemu, page: int) -> None:
    qemu = make_qemu(3, 7)
    wanted = os.urandom(PAGE)
    qemu.dma(5 * PAGE, wanted[:-1] + bytes([wanted[-1] ^ 1]))  # not quite
    with GuestRam(os.getpid(), qemu.ram_bytes) as ram:
        assert list(ram.find_pages(wanted)) == []
        qemu.dma(page * PAGE, wanted)
        assert list(ram.find_pages(wanted)) == [page * PAGE]


def test_page_that_is_not_on_its_boundary_is_none(make_qemu: MakeQemu) -> None:
    qemu = make_qemu()
    wanted = os.urandom(64) * 64
    qemu.dma(PAGE + 64, wanted)  # repeats, so that it begins at other offsets too
    with GuestRam(os.getpid(), qemu.ram_bytes) as ram:
        assert list(ram.find_pages(wanted)) == []
        qemu.dma(9 * PAGE, wanted)
        assert list(ram.find_pages(wanted)) == [9 * PAGE]


def test_page_in_a_later_chunk(make_qemu: MakeQemu) -> None:
    qemu = make_qemu(CHUNK_BYTES // PAGE + 3)
    wanted = os.urandom(PAGE)
    qemu.dma(CHUNK_BYTES + PAGE, wanted)
    with GuestRam(os.getpid(), qemu.ram_bytes) as ram:
        assert list(ram.find_pages(wanted)) == [CHUNK_BYTES + PAGE]


def test_another_size_than_known_is_refused(make_qemu: MakeQemu) -> None:
    qemu = make_qemu()
    before = descriptors()
    with pytest.raises(GuestRamError, match="has 262144 bytes of RAM, not 4096"):
        GuestRam(os.getpid(), PAGE)
    assert descriptors() == before
    assert qemu.ram_bytes == 262144


def test_process_without_guest_ram_is_refused() -> None:
    with (
        subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as other,
        pytest.raises(GuestRamError, match="has 0 bytes of RAM"),
    ):
        GuestRam(other.pid, PAGE)


def test_process_that_is_gone() -> None:
    with subprocess.Popen(["/bin/true"]) as gone:
        gone.wait()
    with pytest.raises(GuestRamError, match=f"QEMU process {gone.pid}: No such file"):
        GuestRam(gone.pid, PAGE)
