# SPDX-License-Identifier: GPL-2.0-or-later
"""The search for a canary: found wherever it is, and the control that it can be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from mktme.engine.keys import KeyMode
from mktme.proof import confidentiality
from mktme.proof.confidentiality import Canary, CanarySearch, find_canary, search_dram
from mktme.vm.console import Console, VmError
from mktme.vm.platform import Vm

from ..conftest import Guests
from ..fake_qemu import LINE, PAGE, FakeQemu
from .fake_vm import vm_of_qemu

CHUNK = confidentiality._CHUNK_BYTES


@pytest.fixture
def canary() -> Canary:
    return Canary.random()


def test_canaries_are_random_lines_repeated_through_a_page(canary: Canary) -> None:
    assert len(canary.line) == LINE
    assert canary.page == canary.line * 64
    assert Canary.random().line != canary.line


def test_guest_is_told_the_line() -> None:
    class Told:
        def run(self, command: str, _timeout_s: float) -> None:
            assert command == "canary " + "ab" * LINE

    Canary(b"\xab" * LINE).plant(cast("Console", Told()))


def held(guests: Guests, canary: Canary, mode: KeyMode = KeyMode.RANDOM) -> tuple[FakeQemu, Vm]:
    """A guest that holds the canary on page 9, flushed."""
    qemu, added = guests.link(mode=mode)
    qemu.store(9 * PAGE, canary.page)
    qemu.dma(20 * PAGE, canary.line)  # in part, which is not the page
    guests.client.flush(qemu.vm)
    return qemu, vm_of_qemu(guests.client, qemu, added)


def dram_of(guests: Guests) -> Path:
    return Path(guests.client.welcome.dram_path)


def test_encrypted_canary_is_not_in_dram(guests: Guests, canary: Canary) -> None:
    _, vm = held(guests, canary)
    assert find_canary(vm, canary) == 9 * PAGE
    found = search_dram(vm, canary, dram_of(guests))
    assert (found.ram_offset, found.dram_hits, found.first_hit) == (9 * PAGE, 0, None)
    assert found.dram_bytes_searched >= 2 * PAGE
    assert found.passed


def test_canary_that_is_not_encrypted_is_found(guests: Guests, canary: Canary) -> None:
    """The control."""
    _, vm = held(guests, canary, KeyMode.NO_ENCRYPT)
    found = search_dram(vm, canary, dram_of(guests))
    assert found.dram_hits == 4 * 64 + 4
    assert found.first_hit == vm.base + 9 * PAGE
    assert not found.passed


def test_guest_that_does_not_hold_its_canary_proves_nothing(guests: Guests, canary: Canary) -> None:
    _, vm = held(guests, canary)
    with pytest.raises(VmError, match="alice does not hold its canary page"):
        search_dram(vm, Canary.random(), dram_of(guests))


def test_vm_that_is_not_linked_proves_nothing(
    guests: Guests, qemu: FakeQemu, canary: Canary
) -> None:
    vm = vm_of_qemu(guests.client, qemu, guests.announce(qemu))
    with pytest.raises(VmError, match="alice is not linked"):
        search_dram(vm, canary, dram_of(guests))


# --- the search itself, on files of our own ---------------------------------------------------


@pytest.fixture
def holder(guests: Guests, canary: Canary) -> Vm:
    return held(guests, canary)[1]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Noise at both ends, a hole between them; larger than a chunk of the search."""
    image = tmp_path / "dram.img"
    with image.open("wb") as file:
        file.write(os.urandom(PAGE))
        file.truncate(2 * CHUNK + 64 * PAGE)
        file.seek(2 * CHUNK + 63 * PAGE)
        file.write(os.urandom(PAGE))
    return image


def plant(image: Path, at: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_holes_are_not_searched(holder: Vm, canary: Canary, image: Path) -> None:
    found = search_dram(holder, canary, image)
    assert found.dram_bytes_searched == 2 * PAGE
    assert found.passed


def test_nothing_searched_is_nothing_proved(holder: Vm, canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.truncate(tmp_path / "empty", 1 << 30)
    found = search_dram(holder, canary, tmp_path / "empty")
    assert (found.dram_bytes_searched, found.dram_hits) == (0, 0)
    assert not found.passed


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("at", [0, 1, 7, 15, 16, 4095, 4096 - 16])
def test_each_block_is_found_at_any_alignment(
    holder: Vm, canary: Canary, image: Path, block: int, at: int
) -> None:
    plant(image, at, canary.line[16 * block : 16 * block + 16])
    found = search_dram(holder, canary, image)
    assert (found.dram_hits, found.first_hit) == (1, at)
    assert not found.passed


def test_less_than_a_block_is_not_found(holder: Vm, canary: Canary, image: Path) -> None:
    plant(image, 100, canary.line[:15] + b"\0")
    assert search_dram(holder, canary, image).passed


@pytest.mark.parametrize("offset", range(-17, 2))
def test_block_on_the_border_of_two_chunks_is_found_once(
    holder: Vm, canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    monkeypatch.setattr(confidentiality, "_CHUNK_BYTES", 2 * PAGE)
    image = tmp_path / "dram.img"
    image.write_bytes(os.urandom(5 * PAGE))
    plant(image, 2 * PAGE + offset, canary.line[16:32])
    found = search_dram(holder, canary, image)
    assert (found.dram_hits, found.first_hit) == (1, 2 * PAGE + offset)
    assert found.dram_bytes_searched == 5 * PAGE


def test_every_copy_counts(holder: Vm, canary: Canary, image: Path) -> None:
    plant(image, 10, canary.line)
    plant(image, 2 * CHUNK + 63 * PAGE, canary.page)
    found = search_dram(holder, canary, image)
    assert (found.dram_hits, found.first_hit) == (4 + 4 * 64, 10)


@pytest.mark.parametrize(
    ("searched", "hits", "passed"), [(1, 0, True), (1, 1, False), (0, 0, False)]
)
def test_verdict(searched: int, hits: int, passed: bool) -> None:
    assert CanarySearch(0, searched, hits, None).passed == passed
