# SPDX-License-Identifier: GPL-2.0-or-later
"""What a platform can be, and how firmware sets it up."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from mktme.engine.firmware import (
    Exclusion,
    FirmwareError,
    PlatformConfig,
    PlatformConfigError,
    boot,
)
from mktme.engine.keys import KeyTable
from mktme.engine.tme import Revision, Tme
from mktme.engine.xts import Algorithm

from .fake_rng import FakeRng

ACTIVATE, EXCLUDE_MASK, EXCLUDE_BASE, CORE_ACTIVATE = 0x982, 0x983, 0x984, 0x9FF
LOCK, ENABLE, RESTORE, SAVE, BYPASS = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 31
ALL_ALGORITHMS = 0b111 << 48

REVISIONS = pytest.mark.parametrize("revision", Revision, ids=["SDM", "336907-004"])


# --- PlatformConfig ---------------------------------------------------------------------------


def exclusion(base: int, size_bytes: int) -> Exclusion:
    return Exclusion(base=base, size_bytes=size_bytes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"physical_address_bits": 32, "keyid_bits": 15},
        {"physical_address_bits": 52, "keyid_bits": 0},
        {"tme": False, "keyid_bits": 0},
        {"tme": False, "keyid_bits": 0, "bypass": True, "save_key_for_standby": True},
        {"keyid_bits": 0, "algorithms": ()},
        {"dram": 4096},
        {"dram": 1 << 40},
        {"dram": 1 << 26, "physical_address_bits": 32},
        {"exclusion": exclusion(0, 4096)},
        {"exclusion": exclusion(0, 1 << 46)},
        {"exclusion": exclusion((1 << 46) - 4096, 4096)},
        {"exclusion": exclusion(3 << 20, 1 << 20), "revision": Revision.SPEC_1_4},
        {"policy": Algorithm.AES_XTS_128_INTEGRITY},
        {
            "algorithms": (Algorithm.AES_XTS_128_INTEGRITY,),
            "revision": Revision.SPEC_1_4,
        },
    ],
    ids=str,
)
def test_platform_that_can_be_boots(settings: dict[str, Any]) -> None:
    config = PlatformConfig(**settings)
    tme = Tme(KeyTable(), maxphyaddr=config.physical_address_bits, revision=config.revision)
    boot(tme, config)
    assert tme.active == config.tme
    assert tme.rdmsr(ACTIVATE) & LOCK


@pytest.mark.parametrize(
    ("settings", "key", "message", "hint"),
    [
        ({"physical_address_bits": 31}, "physical-address-bits", "31", "32 to 52"),
        ({"physical_address_bits": 53}, "physical-address-bits", "53", "32 to 52"),
        ({"keyid_bits": -1}, "keyid-bits", "-1", "0 to 15"),
        ({"keyid_bits": 16}, "keyid-bits", "16", "0 to 15"),
        ({"keyid_bits": 1, "tme": False}, "keyid-bits", "without TME", "0 while tme = false"),
        (
            {"algorithms": ()},
            "algorithms",
            "none",
            "aes-xts-128, aes-xts-256, aes-xts-128-integrity",
        ),
        (
            {"policy": Algorithm.AES_XTS_128_INTEGRITY, "revision": Revision.SPEC_1_4},
            "policy",
            "aes-xts-128-integrity is not for the TME key with revision spec-1.4",
            'aes-xts-128, aes-xts-256; or revision = "sdm"',
        ),
        ({"dram": 0}, "dram", "0 bytes are not whole", "4K"),
        ({"dram": -4096}, "dram", "-4096 bytes are not whole", "4K"),
        ({"dram": 4097}, "dram", "4097 bytes are not whole", "4K"),
        ({"dram": (1 << 40) + 4096}, "dram", "46 address bits less 6 KeyID bits", "at most that"),
        ({"dram": 1 << 41, "keyid_bits": 6}, "dram", "do not fit", "fewer keyid-bits"),
        ({"exclusion": exclusion(0, 0)}, "exclusion.size", "0 bytes", "4K, 8K"),
        ({"exclusion": exclusion(0, 2048)}, "exclusion.size", "2048 bytes", "4K, 8K"),
        ({"exclusion": exclusion(0, -4096)}, "exclusion.size", "-4096 bytes", "4K, 8K"),
        ({"exclusion": exclusion(0, 12288)}, "exclusion.size", "no power of two", "4K, 8K"),
        ({"exclusion": exclusion(4096, 8192)}, "exclusion.base", "0x1000", "0, 0x2000, 0x4000"),
        ({"exclusion": exclusion(-8192, 8192)}, "exclusion.base", "-0x2000", "0, 0x2000"),
        ({"exclusion": exclusion(1 << 46, 4096)}, "exclusion.base", "46 bits", "below that"),
        ({"exclusion": exclusion(0, 1 << 47)}, "exclusion.base", "46 bits", "below that"),
    ],
)
def test_platform_that_cannot_be_is_refused(
    settings: dict[str, Any], key: str, message: str, hint: str
) -> None:
    with pytest.raises(PlatformConfigError) as caught:
        PlatformConfig(**settings)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")
    assert message in str(caught.value)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("allowed: ")
    assert hint in caught.value.hint


def test_settings_have_their_toml_names_and_errors_come_through_decoding() -> None:
    settings = {
        "physical-address-bits": 40,
        "save-key-for-standby": True,
        "keyid-bits": 3,
        "policy": "aes-xts-256",
        "algorithms": ["aes-xts-128"],
        "revision": "spec-1.4",
    }
    assert msgspec.convert(settings, PlatformConfig) == PlatformConfig(
        physical_address_bits=40,
        save_key_for_standby=True,
        keyid_bits=3,
        policy=Algorithm.AES_XTS_256,
        algorithms=(Algorithm.AES_XTS_128,),
        revision=Revision.SPEC_1_4,
    )
    with pytest.raises(PlatformConfigError, match="keyid-bits"):
        msgspec.convert({"keyid-bits": 16}, PlatformConfig)
    for unknown in ({"keyid_bits": 6}, {"exclusion": {"base": 0, "size_bytes": 4096, "end": 0}}):
        with pytest.raises(msgspec.ValidationError, match="unknown field"):
            msgspec.convert(unknown, PlatformConfig)


# --- boot -------------------------------------------------------------------------------------


class Recorder(Tme):
    """Notes what is written, and whether the lock was on by then."""

    def __init__(self, keys: KeyTable, config: PlatformConfig) -> None:
        self.writes: list[tuple[int, int]] = []
        self.locked: list[bool] = []
        super().__init__(keys, maxphyaddr=config.physical_address_bits, revision=config.revision)

    def wrmsr(self, msr: int, value: int) -> None:
        self.writes.append((msr, value))
        self.locked.append(bool(self.rdmsr(ACTIVATE) & LOCK))
        super().wrmsr(msr, value)


class Board:
    def __init__(self, **settings: Any) -> None:
        self.config = PlatformConfig(**settings)
        self.rng = FakeRng()
        self.keys = KeyTable(self.rng)
        self.tme = Recorder(self.keys, self.config)

    def boot(self, *, resume: bool = False) -> list[tuple[int, int]]:
        """Reset, then firmware; what it wrote."""
        self.tme.reset()
        self.keys.reset()
        self.tme.writes.clear()
        self.tme.locked.clear()
        boot(self.tme, self.config, resume=resume)
        return self.tme.writes


@pytest.mark.parametrize(
    ("settings", "writes"),
    [
        pytest.param(
            {},
            [(ACTIVATE, ENABLE | 6 << 32 | ALL_ALGORITHMS), (CORE_ACTIVATE, 0)],
            id="default",
        ),
        pytest.param({"keyid_bits": 0}, [(ACTIVATE, ENABLE)], id="TME alone"),
        pytest.param({"keyid_bits": 0, "tme": False}, [(ACTIVATE, 0)], id="TME off"),
        pytest.param(
            {"keyid_bits": 0, "tme": False, "bypass": True, "save_key_for_standby": True},
            [(ACTIVATE, 0)],
            id="TME off, and what goes with it",
        ),
        pytest.param(
            {
                "policy": Algorithm.AES_XTS_256,
                "bypass": True,
                "save_key_for_standby": True,
                "keyid_bits": 15,
                "algorithms": (Algorithm.AES_XTS_256,),
            },
            [(ACTIVATE, ENABLE | SAVE | 2 << 4 | BYPASS | 15 << 32 | 1 << 50), (CORE_ACTIVATE, 0)],
            id="everything",
        ),
        pytest.param(
            {"exclusion": exclusion(16 << 20, 1 << 20)},
            [
                (EXCLUDE_BASE, 16 << 20),
                (EXCLUDE_MASK, (1 << 46) - (1 << 20) | 1 << 11),
                (ACTIVATE, ENABLE | 6 << 32 | ALL_ALGORITHMS),
                (CORE_ACTIVATE, 0),
            ],
            id="exclusion",
        ),
        pytest.param(
            {"exclusion": exclusion(0, 1 << 32), "physical_address_bits": 32, "keyid_bits": 0},
            [(EXCLUDE_BASE, 0), (EXCLUDE_MASK, 1 << 11), (ACTIVATE, ENABLE)],
            id="all is excluded",
        ),
    ],
)
@REVISIONS
def test_336907_chapter_4_sequence(
    revision: Revision, settings: dict[str, Any], writes: list[tuple[int, int]]
) -> None:
    board = Board(revision=revision, **settings)
    assert board.boot() == writes
    msrs = [msr for msr, _ in writes]
    at = msrs.index(ACTIVATE)
    assert board.tme.locked == [False] * (at + 1) + [True] * (len(msrs) - at - 1)
    assert board.tme.rdmsr(ACTIVATE) == writes[at][1] | LOCK
    for msr, value in writes[:at]:
        assert board.tme.rdmsr(msr) == value
    assert board.tme.rdmsr(CORE_ACTIVATE) == board.config.keyid_bits << 32


@REVISIONS
def test_resume_asks_for_the_saved_key(
    revision: Revision, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board(revision=revision, save_key_for_standby=True)
    board.boot()
    board.rng.broken = True  # nothing is drawn
    value = ENABLE | RESTORE | SAVE | 6 << 32 | ALL_ALGORITHMS
    with caplog.at_level(logging.DEBUG):
        assert board.boot(resume=True) == [(ACTIVATE, value), (CORE_ACTIVATE, 0)]
    assert board.tme.active
    assert caplog.records == []


@REVISIONS
@pytest.mark.parametrize("keyid_bits", [0, 6])
def test_resume_with_nothing_saved_warns_and_makes_a_new_key(
    revision: Revision, keyid_bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board(revision=revision, save_key_for_standby=True, keyid_bits=keyid_bits)
    fresh = ENABLE | SAVE | keyid_bits << 32 | (ALL_ALGORITHMS if keyid_bits else 0)
    writes = board.boot(resume=True)
    assert writes[:2] == [(ACTIVATE, fresh | RESTORE), (ACTIVATE, fresh)]
    assert board.tme.rdmsr(ACTIVATE) == LOCK | fresh
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no TME key was saved" in record.getMessage()


def test_resume_without_saving_is_an_ordinary_boot(caplog: pytest.LogCaptureFixture) -> None:
    board = Board()
    before = list(board.boot())
    assert board.boot(resume=True) == before
    assert len(board.rng.given) == 2
    assert caplog.records == []


def test_resume_with_tme_off() -> None:
    board = Board(tme=False, keyid_bits=0, save_key_for_standby=True)
    assert board.boot(resume=True) == [(ACTIVATE, 0)]


@REVISIONS
@pytest.mark.parametrize("resume", [False, True], ids=["boot", "resume"])
@pytest.mark.parametrize("keyid_bits", [0, 6])
def test_without_a_key_firmware_gives_up(revision: Revision, resume: bool, keyid_bits: int) -> None:
    board = Board(revision=revision, save_key_for_standby=True, keyid_bits=keyid_bits)
    board.rng.broken = True
    with pytest.raises(FirmwareError, match="random number generator") as caught:
        board.boot(resume=resume)
    assert caught.value.hint == "nothing runs unprotected; start the platform again"
    assert not board.tme.active
    assert CORE_ACTIVATE not in [msr for msr, _ in board.tme.writes]
    board.rng.broken = False
    board.boot()
    assert board.tme.active


def test_tme_off_needs_no_random_numbers() -> None:
    board = Board(tme=False, keyid_bits=0)
    board.rng.broken = True
    board.boot()
    assert board.tme.rdmsr(ACTIVATE) == LOCK
