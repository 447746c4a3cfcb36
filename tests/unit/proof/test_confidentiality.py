# SPDX-License-Identifier: GPL-2.0-or-later
"""The search for a canary: found wherever it is, and the control that it can be."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mktme.engine.firmware import Exclusion, PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.proof import confidentiality
from mktme.proof.confidentiality import (
    Canary,
    CanarySearch,
    find_canary,
    plant_canary,
    search_dram,
)
from mktme.service.client import EngineProcess
from mktme.vm.console import Console, VmError
from mktme.vm.domain import Domain
from mktme.vm.pages import GuestPages, PageUse
from mktme.vm.platform import Vm

from ..conftest import Guests, MakeQemu
from ..fake_qemu import LINE, PAGE, FakeQemu
from .fake_vm import vm_of_qemu

CHUNK = confidentiality._CHUNK_BYTES
MIB = 1 << 20


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


# --- pages under other KeyIDs -----------------------------------------------------------------


def given(guests: Guests, vm: Vm, page: int, count: int, mode: KeyMode | None) -> None:
    """Give pages of a VM to another KeyID; None for sharing them."""
    keyid = 0 if mode is None else guests.client.program_key(mode, vm=vm.uuid)
    guests.client.assign_pages(vm.uuid, page * PAGE, count * PAGE, keyid)


def test_pages_that_are_not_to_be_encrypted_are_left_out(guests: Guests, canary: Canary) -> None:
    qemu, vm = held(guests, canary)
    given(guests, vm, 16, 8, KeyMode.NO_ENCRYPT)
    given(guests, vm, 40, 8, KeyMode.NO_ENCRYPT)
    qemu.store(23 * PAGE, canary.page)
    qemu.store(40 * PAGE, canary.page)
    guests.client.flush(qemu.vm)
    found = search_dram(vm, canary, dram_of(guests))
    assert found.passed
    assert (found.ram_offset, found.clear_bytes) == (9 * PAGE, 16 * PAGE)
    # The control: beside them, all is searched.
    for at in (16 * PAGE - 16, 24 * PAGE, 40 * PAGE - 16, 48 * PAGE):
        with dram_of(guests).open("r+b") as dram:
            plant_at = vm.base + at
            before = os.pread(dram.fileno(), 16, plant_at)
            os.pwrite(dram.fileno(), canary.line[:16], plant_at)
            found = search_dram(vm, canary, dram_of(guests))
            os.pwrite(dram.fileno(), before, plant_at)
        assert (found.dram_hits, found.first_hit) == (1, plant_at)


def test_others_pages_that_are_not_to_be_encrypted_are_left_out(
    guests: Guests, canary: Canary
) -> None:
    """Guests that are searched side by side hold the same canary."""
    qemu, bob = held(guests, canary)
    given(guests, bob, 8, 16, KeyMode.NO_ENCRYPT)
    qemu.close()  # RAM is looked for in this one process; what is in DRAM stays
    _, alice = held(guests, canary)
    found = search_dram(alice, canary, dram_of(guests))
    assert found.passed
    assert found.clear_bytes == 16 * PAGE


def test_others_without_encryption_are_not_left_out(guests: Guests, canary: Canary) -> None:
    qemu, _ = held(guests, canary, KeyMode.NO_ENCRYPT)
    qemu.close()
    _, alice = held(guests, canary)
    assert not search_dram(alice, canary, dram_of(guests)).passed


@pytest.mark.parametrize("mode", [None, KeyMode.RANDOM], ids=["shared", "another key"])
def test_pages_under_other_keys_are_searched(
    guests: Guests, canary: Canary, mode: KeyMode | None
) -> None:
    qemu, vm = held(guests, canary)
    given(guests, vm, 16, 8, mode)
    qemu.store(17 * PAGE, canary.page)
    guests.client.flush(qemu.vm)
    found = search_dram(vm, canary, dram_of(guests))
    assert found.passed
    assert found.clear_bytes == 0
    plant(dram_of(guests), vm.base + 17 * PAGE, canary.line)
    assert search_dram(vm, canary, dram_of(guests)).dram_hits == 4


def test_canary_under_the_vms_own_keyid_is_preferred(guests: Guests, canary: Canary) -> None:
    qemu, vm = held(guests, canary)
    qemu.store(30 * PAGE, canary.page)
    guests.client.flush(qemu.vm)
    assert find_canary(vm, canary) == 9 * PAGE
    given(guests, vm, 8, 4, None)
    assert find_canary(vm, canary) == 30 * PAGE
    given(guests, vm, 28, 4, None)
    assert find_canary(vm, canary) == 9 * PAGE


def test_canary_in_plaintext_alone_proves_nothing(guests: Guests, canary: Canary) -> None:
    _, vm = held(guests, canary)
    given(guests, vm, 8, 4, KeyMode.NO_ENCRYPT)
    with pytest.raises(VmError, match="alice holds its canary in pages alone that are not to be"):
        search_dram(vm, canary, dram_of(guests))


@pytest.mark.parametrize(
    "config",
    [PlatformConfig(bypass=True), PlatformConfig(exclusion=Exclusion(base=0, size_bytes=MIB))],
    ids=["bypass", "exclusion"],
)
def test_shared_pages_may_be_plaintext(
    make_qemu: MakeQemu, tmp_path: Path, canary: Canary, config: PlatformConfig
) -> None:
    image = tmp_path / "dram.img"
    with (
        EngineProcess(tmp_path, image, 8 * MIB, platform=config) as engine,
        ExitStack() as stack,
    ):
        guests = Guests(engine, make_qemu, stack)
        qemu, vm = held(guests, canary)
        given(guests, vm, 16, 8, None)
        qemu.store(17 * PAGE, canary.page)
        guests.client.flush(qemu.vm)
        assert canary.page in image.read_bytes()
        found = search_dram(vm, canary, image)
        assert found.passed
        assert found.clear_bytes == 8 * PAGE


# --- the guest gets a page of its own ---------------------------------------------------------


class Linux:
    """Plants canaries where Linux would: on the first pages that are free."""

    def __init__(self, guests: Guests, qemu: FakeQemu, canary: Canary) -> None:
        self._guests = guests
        self._qemu = qemu
        self._canary = canary
        self.commands: list[str] = []
        self.held = 0

    def run(self, command: str, _timeout_s: float) -> None:
        self.commands.append(command)
        count = max(self.held, 1)  # twice as many as before
        self._qemu.store(self.held * PAGE, self._canary.page * count)
        self.held += count

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield


def linux(guests: Guests, canary: Canary, pages: tuple[GuestPages, ...]) -> tuple[Linux, Vm]:
    qemu, added = guests.link(256)
    guest = Linux(guests, qemu, canary)
    domain = cast("Domain", SimpleNamespace(label="alice", shell=guest, paused=guest.paused))
    vm = vm_of_qemu(guests.client, qemu, added)
    config = dataclasses.replace(vm.config, pages=pages)
    return guest, dataclasses.replace(vm, domain=domain, config=config)


def pages_of(first: int, count: int) -> GuestPages:
    return GuestPages(first * PAGE, count * PAGE, PageUse.SHARED)


@pytest.mark.parametrize(
    ("pages", "held"),
    [
        ((), 1),
        ((pages_of(64, 64),), 1),
        ((pages_of(0, 1),), 2),
        ((pages_of(0, 5), pages_of(5, 2)), 8),
        ((pages_of(0, 31),), 32),
    ],
)
def test_guest_keeps_canaries_until_one_is_its_own(
    guests: Guests, canary: Canary, pages: tuple[GuestPages, ...], held: int
) -> None:
    guest, vm = linux(guests, canary, pages)
    for one in pages:
        vm.assign(one)
    plant_canary(vm, canary)
    assert guest.held == held
    assert guest.commands[0] == f"canary {canary.line.hex()}"
    assert len(set(guest.commands)) == len(guest.commands)  # none goes over an earlier one
    own = find_canary(vm, canary)
    assert all(not 0 <= own - one.guest_physical < one.size_bytes for one in pages)


def test_guest_without_a_page_of_its_own(guests: Guests, canary: Canary) -> None:
    guest, vm = linux(guests, canary, (pages_of(0, 32),))
    vm.assign(pages_of(0, 32))
    with pytest.raises(VmError, match="alice gets no page under its own KeyID") as caught:
        plant_canary(vm, canary)
    assert caught.value.hint == "leave more of its memory to it with --pages"
    assert guest.held == 32  # an eighth of its memory


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
