# SPDX-License-Identifier: GPL-2.0-or-later
"""A package: what of DRAM is readable before and after power events, and what is in plaintext."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mktme.engine.dram import Dram
from mktme.engine.errors import AddressError, KeyIdError, KeyMaterialError
from mktme.engine.firmware import Exclusion, FirmwareError, PlatformConfig
from mktme.engine.package import Package, PconfigError, PowerEvent
from mktme.engine.pconfig import Command, Status
from mktme.engine.sidecar import PageRange
from mktme.engine.tme import GeneralProtection, Revision
from mktme.engine.xts import Algorithm

from ...vectors import reference
from .fake_rng import FakeRng

PAGES = 16
DRAM_BYTES = PAGES * 4096
KEY = bytes(range(0x40, 0x60))
ACTIVATE = 0x982
LOCK = 1

Words = NDArray[np.uint64]
EVENTS = pytest.mark.parametrize("event", PowerEvent, ids=lambda event: event.value)


def plaintext(seed: int) -> Words:
    """A page of words, none of them zero."""
    return np.random.default_rng(seed).integers(1, 2**64, (1, 512), np.uint64)


class SpyPackage(Package):
    """Remembers the structures that PCONFIG was given."""

    structures: list[bytes | bytearray | memoryview]

    def pconfig(self, leaf: int, address: int, program: bytes | bytearray | memoryview) -> Status:
        assert any(program)
        self.structures.append(program)
        return super().pconfig(leaf, address, program)


class Board:
    """A package and its DRAM."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.rng = FakeRng()
        self.path = directory / "dram"
        self.dram = Dram.create(self.path, DRAM_BYTES)
        self.package = SpyPackage(self.dram, PlatformConfig(**settings), self.rng)
        self.package.structures = []

    def write(self, page: int, keyid: int, words: Words) -> None:
        self.package.controller.assign(page * 4096, 4096, keyid)
        self.package.controller.update_pages(np.array([page]), words)

    def read(self, page: int, keyid: int) -> Words:
        """A page; all bits are set in poisoned lines."""
        poisoned = np.empty(1, np.uint64)
        return self.package.controller.read_pages(page, 1, keyid=keyid, poisoned=poisoned)

    def stored(self, page: int) -> bytes:
        """What an attacker reads."""
        return self.path.read_bytes()[page * 4096 : (page + 1) * 4096]

    def in_plaintext(self, keyid: int) -> list[int]:
        """Pages that DRAM holds as they are, after all were written under a KeyID."""
        found = []
        for page in range(PAGES):
            self.write(page, keyid, plaintext(page))
            assert np.array_equal(self.read(page, keyid), plaintext(page))
            if self.stored(page) == plaintext(page).tobytes():
                found.append(page)
        return found

    def program(self, keyid: int, key: bytes = KEY) -> None:
        self.package.program(keyid, Command.SET_KEY_DIRECT, Algorithm.AES_XTS_128, bytearray(key))


class MakeBoard:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.boards: list[Board] = []

    def __call__(self, **settings: Any) -> Board:
        self.boards.append(Board(self.directory, **settings))
        return self.boards[-1]


@pytest.fixture
def make_board(tmp_path: Path) -> Iterator[MakeBoard]:
    make = MakeBoard(tmp_path)
    yield make
    for board in make.boards:
        board.dram.close()


# --- power-on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", Revision, ids=["SDM", "336907-004"])
def test_power_on_leaves_the_registers_locked(make_board: MakeBoard, revision: Revision) -> None:
    package = make_board(revision=revision).package
    assert package.rdmsr(ACTIVATE) == LOCK | 1 << 1 | 6 << 32 | 0b111 << 48
    assert package.keys.keyid_count == 64
    assert package.controller.address_bits == 40
    for msr in (0x983, 0x984):
        with pytest.raises(GeneralProtection):
            package.wrmsr(msr, 0)
    before = package.rdmsr(ACTIVATE)
    if revision is Revision.SDM:
        package.wrmsr(ACTIVATE, 0)
    else:
        with pytest.raises(GeneralProtection):
            package.wrmsr(ACTIVATE, 0)
    assert package.rdmsr(ACTIVATE) == before


def test_no_package_without_a_key(tmp_path: Path) -> None:
    rng = FakeRng()
    rng.broken = True
    with Dram.create(tmp_path / "dram", DRAM_BYTES) as dram:
        with pytest.raises(FirmwareError):
            Package(dram, PlatformConfig(), rng)
        rng.broken = False
        Package(dram, PlatformConfig(), rng)


def test_dram_must_be_reachable_below_the_keyid_bits(tmp_path: Path) -> None:
    with Dram.create(tmp_path / "fits", 1 << 17) as dram:
        Package(dram, PlatformConfig(physical_address_bits=32, keyid_bits=15))
    with Dram.create(tmp_path / "dram", (1 << 17) + 4096) as dram:
        Package(dram, PlatformConfig(physical_address_bits=33, keyid_bits=15))
        with pytest.raises(AddressError, match="17 address bits that 15 KeyID bits of 32 leave"):
            Package(dram, PlatformConfig(physical_address_bits=32, keyid_bits=15))


# --- power events -----------------------------------------------------------------------------


@EVENTS
@pytest.mark.parametrize("save", [False, True], ids=["not saved", "saved"])
@pytest.mark.parametrize("policy", Algorithm)
def test_memory_of_keyid_0_is_readable_only_after_standby_with_a_saved_key(
    make_board: MakeBoard, event: PowerEvent, save: bool, policy: Algorithm
) -> None:
    board = make_board(save_key_for_standby=save, policy=policy)
    board.write(3, 0, plaintext(1))
    before = board.stored(3)
    board.package.power(event)
    assert board.stored(3) == before
    survives = event is PowerEvent.STANDBY and save
    assert np.array_equal(board.read(3, 0), plaintext(1)) == survives
    if not survives:
        assert (board.read(3, 0) != plaintext(1)).all()
        assert len(set(board.rng.given)) == len(board.rng.given) == 2


@EVENTS
@pytest.mark.parametrize("save", [False, True], ids=["not saved", "saved"])
def test_memory_of_a_programmed_keyid_is_not_readable_after_any_event(
    make_board: MakeBoard, event: PowerEvent, save: bool
) -> None:
    board = make_board(save_key_for_standby=save)
    board.program(1)
    board.package.program(2, Command.SET_KEY_RANDOM, Algorithm.AES_XTS_256)
    for keyid in (1, 2):
        board.write(keyid, keyid, plaintext(keyid))
    board.package.power(event)
    assert [one.keyid for one in board.package.keys.describe()] == [0]
    for keyid in (1, 2):
        for through in range(64):
            assert (board.read(keyid, through) != plaintext(keyid)).all()
    # Its ciphertext is still there: who knows the key can read it.
    board.program(5)
    assert np.array_equal(board.read(1, 5), plaintext(1))
    assert (board.read(2, 5) != plaintext(2)).all()


@EVENTS
def test_event_gives_all_pages_back_to_keyid_0_and_locks_again(
    make_board: MakeBoard, event: PowerEvent
) -> None:
    board = make_board(exclusion=Exclusion(base=0, size_bytes=8192))
    board.package.controller.assign(0, DRAM_BYTES, 7)
    before = [board.package.rdmsr(msr) for msr in (0x87, 0x981, 0x982, 0x983, 0x984, 0x9FF)]
    board.package.power(event)
    after = [board.package.rdmsr(msr) for msr in (0x87, 0x981, 0x982, 0x983, 0x984, 0x9FF)]
    assert after == before
    assert board.package.controller.page_ranges() == (
        PageRange(base=0, size_bytes=DRAM_BYTES, keyid=0),
    )
    assert board.in_plaintext(0) == [0, 1]


def test_standby_restores_the_newest_key_only(make_board: MakeBoard) -> None:
    board = make_board(save_key_for_standby=True)
    board.write(1, 0, plaintext(1))
    board.package.power(PowerEvent.WARM_RESET)
    board.write(2, 0, plaintext(2))
    for _ in range(3):
        board.package.power(PowerEvent.STANDBY)
        assert (board.read(1, 0) != plaintext(1)).all()
        assert np.array_equal(board.read(2, 0), plaintext(2))
    assert len(board.rng.given) == 2


def test_standby_after_a_power_cycle_restores_the_key_since_then(make_board: MakeBoard) -> None:
    board = make_board(save_key_for_standby=True)
    board.write(1, 0, plaintext(1))
    board.package.power(PowerEvent.POWER_CYCLE)
    board.write(2, 0, plaintext(2))
    board.package.power(PowerEvent.STANDBY)
    assert (board.read(1, 0) != plaintext(1)).all()
    assert np.array_equal(board.read(2, 0), plaintext(2))


def test_saved_key_that_got_lost_is_replaced_with_a_warning(
    make_board: MakeBoard, caplog: pytest.LogCaptureFixture
) -> None:
    board = make_board(save_key_for_standby=True)
    board.write(1, 0, plaintext(1))
    board.package.keys.reset(keep_saved_key=False)
    board.package.power(PowerEvent.STANDBY)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert board.package.tme.active
    assert (board.read(1, 0) != plaintext(1)).all()
    assert len(board.rng.given) == 2


@pytest.mark.parametrize("event", [PowerEvent.POWER_CYCLE, PowerEvent.WARM_RESET])
def test_event_without_a_new_key_fails_and_can_be_repeated(
    make_board: MakeBoard, event: PowerEvent
) -> None:
    board = make_board(exclusion=Exclusion(base=0, size_bytes=4096))
    board.write(1, 0, plaintext(1))
    board.rng.broken = True
    with pytest.raises(FirmwareError):
        board.package.power(event)
    assert board.package.rdmsr(ACTIVATE) & LOCK == 0
    assert (board.read(1, 0) != plaintext(1)).all()
    with pytest.raises(KeyIdError):
        board.read(1, 1)
    with pytest.raises(GeneralProtection):
        board.program(1)
    board.rng.broken = False
    board.package.power(event)
    assert board.package.rdmsr(ACTIVATE) & LOCK
    assert board.in_plaintext(0) == [0]


def test_exclusion_that_software_writes_while_unlocked_takes_effect(make_board: MakeBoard) -> None:
    board = make_board()
    board.rng.broken = True
    with pytest.raises(FirmwareError):
        board.package.power(PowerEvent.WARM_RESET)
    board.rng.broken = False
    board.package.wrmsr(0x984, 4096)
    board.package.wrmsr(0x983, (1 << 46) - 4096 | 1 << 11)
    board.package.wrmsr(ACTIVATE, 1 << 1)
    assert board.in_plaintext(0) == [1]


# --- what is not encrypted --------------------------------------------------------------------


def test_everything_is_encrypted_by_default(make_board: MakeBoard) -> None:
    board = make_board()
    board.program(1)
    assert board.in_plaintext(0) == board.in_plaintext(1) == board.in_plaintext(2) == []


def test_bypass_leaves_keyid_0_in_plaintext_and_programmed_keyids_encrypted(
    make_board: MakeBoard,
) -> None:
    board = make_board(bypass=True)
    board.program(1)
    board.package.program(2, Command.SET_KEY_RANDOM, Algorithm.AES_XTS_256)
    everything = list(range(PAGES))
    assert board.in_plaintext(0) == everything
    assert board.in_plaintext(1) == board.in_plaintext(2) == []
    assert board.in_plaintext(3) == everything  # as KeyID 0, by 336907 table 6-5
    board.package.program(1, Command.CLEAR_KEY, Algorithm.AES_XTS_128)
    assert board.in_plaintext(1) == everything


@pytest.mark.parametrize(("first", "count"), [(0, 1), (5, 1), (4, 4), (8, 8), (0, 16)])
def test_exclusion_leaves_keyid_0_in_plaintext_there_and_nowhere_else(
    make_board: MakeBoard, first: int, count: int
) -> None:
    board = make_board(exclusion=Exclusion(base=first * 4096, size_bytes=count * 4096))
    board.program(1)
    assert board.in_plaintext(0) == list(range(first, first + count))
    assert board.in_plaintext(1) == board.in_plaintext(2) == []


def test_exclusion_above_dram_excludes_nothing(make_board: MakeBoard) -> None:
    board = make_board(exclusion=Exclusion(base=1 << 39, size_bytes=1 << 20))
    assert board.in_plaintext(0) == []


def test_no_encrypt_leaves_one_keyid_in_plaintext(make_board: MakeBoard) -> None:
    board = make_board()
    board.package.program(9, Command.NO_ENCRYPT, Algorithm.AES_XTS_128)
    assert board.in_plaintext(9) == list(range(PAGES))
    assert board.in_plaintext(0) == board.in_plaintext(8) == []


def test_with_tme_off_there_is_plaintext_and_no_keyid(make_board: MakeBoard) -> None:
    board = make_board(tme=False, keyid_bits=0)
    assert board.in_plaintext(0) == list(range(PAGES))
    assert board.rng.given == []
    with pytest.raises(KeyIdError):
        board.read(0, 1)
    with pytest.raises(GeneralProtection):
        board.program(1)
    assert board.package.rdmsr(ACTIVATE) == LOCK


@pytest.mark.parametrize("policy", Algorithm)
def test_dram_holds_keyid_0_under_the_policys_algorithm(
    make_board: MakeBoard, policy: Algorithm
) -> None:
    board = make_board(policy=policy)
    board.write(3, 0, plaintext(1))
    (key,) = board.rng.given
    assert len(key) == policy.key_bytes
    for line in range(0, 4096, 64):
        tweak = (3 * 4096 + line).to_bytes(16, "little")
        expected = reference.encrypt(key, tweak, plaintext(1).tobytes()[line : line + 64])
        assert board.stored(3)[line : line + 64] == expected


# --- program ----------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", Revision, ids=["SDM", "336907-004"])
def test_refused_program_says_why(make_board: MakeBoard, revision: Revision) -> None:
    board = make_board(revision=revision, algorithms=(Algorithm.AES_XTS_128,))
    for keyid, algorithm, status in (
        (64, Algorithm.AES_XTS_128, Status.INVALID_KEYID),
        (0, Algorithm.AES_XTS_128, Status.INVALID_KEYID),
        (1, Algorithm.AES_XTS_256, Status.INVALID_ENC_ALG),
    ):
        if revision is Revision.SDM:
            with pytest.raises(GeneralProtection, match=status.name):
                board.package.program(keyid, Command.SET_KEY_RANDOM, algorithm)
        else:
            with pytest.raises(PconfigError, match=f"KeyID {keyid}: .*{status.name}") as caught:
                board.package.program(keyid, Command.SET_KEY_RANDOM, algorithm)
            assert caught.value.status is status


def test_failed_program_has_pconfigs_status_and_changes_nothing(make_board: MakeBoard) -> None:
    board = make_board()
    board.program(1)
    board.write(0, 1, plaintext(1))
    board.rng.broken = True
    with pytest.raises(PconfigError) as caught:
        board.package.program(1, Command.SET_KEY_RANDOM, Algorithm.AES_XTS_128)
    assert caught.value.status is Status.ENTROPY_ERROR
    with board.package.keys.lock, pytest.raises(PconfigError) as caught:
        board.package.program(1, Command.CLEAR_KEY, Algorithm.AES_XTS_128)
    assert caught.value.status is Status.DEVICE_BUSY
    with pytest.raises(KeyMaterialError, match=r"IG C\.I"):
        board.program(1, KEY[:16] * 2)
    assert np.array_equal(board.read(0, 1), plaintext(1))


def test_structure_is_wiped_whatever_becomes_of_it(make_board: MakeBoard) -> None:
    board = make_board()
    board.program(1)
    with pytest.raises(GeneralProtection):
        board.program(64)
    with pytest.raises(KeyMaterialError):
        board.program(1, KEY[:16] * 2)
    assert len(board.package.structures) == 3
    assert not any(any(structure) for structure in board.package.structures)
