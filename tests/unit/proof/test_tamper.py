# SPDX-License-Identifier: GPL-2.0-or-later
"""The tamper suite's own logic: what a guest says, and what is made of it. Live: tests/live."""

from __future__ import annotations

import dataclasses
import os
import uuid
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.integrity import Violation
from mktme.proof.attacks import ATTACKS
from mktme.proof.damage import ALL_LINES, Damage, Outcome
from mktme.proof.eviction import check_window
from mktme.proof.runs import Narrator
from mktme.proof.tamper import _in_one, _jobs, tamper
from mktme.proof.victim import Victim
from mktme.service.wire import PagePoisoned
from mktme.vm.config import VmConfig
from mktme.vm.console import CommandResult, GuestPanicError, VmLostError
from mktme.vm.domain import Domain
from mktme.vm.host import UsageError
from mktme.vm.platform import Platform, Vm

from ..vm.test_domain_xml import IMAGE

MIB = 1 << 20
PAGE = 4096
BASE, OFFSET, KEYID = 192 * MIB, 0x7000, 3
FIFTH = 1 << 5
AT = OFFSET + 5 * 64
VM = uuid.uuid4()
CONFIG = VmConfig(
    IMAGE, memory_bytes=192 * MIB, datapath=DataPath.INLINE, track=None, window_bytes=24 * MIB
)
REPORTED = (
    "[    9.1] mce: [Hardware Error]: CPU 0: Machine Check Exception: 7 Bank 1: bd80000000000134\n"
    "[    9.1] mce: [Hardware Error]: TSC 0 ADDR 7000 MISC 8c \n"
    "[    9.1] Kernel panic - not syncing: Fatal machine check\n"
)
POISONED = PagePoisoned(
    vm=VM,
    ram_offset=OFFSET,
    address=BASE + AT,
    keyid=KEYID,
    lines=FIFTH,
    kind=Violation.MISMATCH,
)


class Guest:
    """A guest's console, which says what it is told to."""

    def __init__(self, said: str | VmLostError) -> None:
        self.said = said

    def run(self, _command: str, _timeout_s: float, *, check: bool) -> CommandResult:
        if isinstance(self.said, VmLostError):
            raise self.said
        return CommandResult(self.said, 0)


def victim(said: str | VmLostError, *poisoned: PagePoisoned) -> Victim:
    domain = SimpleNamespace(label="alice", console=Guest(said), reason=lambda what: what)
    vm = Vm(VM, CONFIG, cast("Domain", domain), None, KEYID, BASE)
    one = Victim(cast("Platform", SimpleNamespace(poisoned=list(poisoned))), vm)
    one._ram_offset = OFFSET
    return one


def od(page: bytes) -> str:
    return "".join(f" {page[at : at + 16].hex(' ')}\n" for at in range(0, PAGE, 16))


def look(one: Victim, lines: int = FIFTH) -> Damage:
    return one.look(lines, ())[0]


def panic(said: str = REPORTED) -> GuestPanicError:
    return GuestPanicError("lost", said)


def replaced(**fields: int | uuid.UUID) -> PagePoisoned:
    return msgspec.structs.replace(POISONED, **fields)


# --- what a guest says --------------------------------------------------------------------------


def test_guest_that_reads_what_it_wrote() -> None:
    one = victim("")
    one.vm.domain.console.said = od(one.page)  # type: ignore[attr-defined]
    assert look(one) == Damage(Outcome.INTACT)
    assert not one.is_lost


def test_guest_that_reads_noise() -> None:
    one = victim("")
    found = one.page[: 5 * 64] + os.urandom(64) + one.page[6 * 64 :]
    # The kernel says something on the console, too.
    shown = od(found).replace("\n", "\n[  1.5] random: crng init done\n", 1)
    one.vm.domain.console.said = shown  # type: ignore[attr-defined]
    assert look(one) == Damage(Outcome.GARBAGE)


def test_guest_that_shows_half_a_page() -> None:
    one = victim("")
    one.vm.domain.console.said = od(one.page)[:6000]  # type: ignore[attr-defined]
    damage = look(one)
    assert damage.outcome is Outcome.OTHER
    assert "blocks of its page" in damage.detail


def test_machine_check_that_ends_the_guest() -> None:
    one = victim(panic(), POISONED)
    damage, told = one.look(FIFTH, ())
    assert damage == Damage(Outcome.MACHINE_CHECK)
    assert one.is_lost
    assert told is not None
    assert (told.guest, told.keyid, told.lines) == ("alice", KEYID, 1)
    assert (told.address, told.guest_physical, told.reported) == (BASE + AT, AT, 0x7000)
    assert told.console == "[    9.1] Kernel panic - not syncing: Fatal machine check"


def test_machine_check_that_the_guest_survives() -> None:
    """Its kernel logs it and kills the process."""
    one = victim(REPORTED.rsplit("[", 1)[0] + "Bus error\n", POISONED)
    assert look(one) == Damage(Outcome.MACHINE_CHECK)
    assert not one.is_lost


def test_machine_check_of_a_whole_page() -> None:
    poisoned = replaced(address=BASE + OFFSET, lines=ALL_LINES)
    assert look(victim(panic(), poisoned), ALL_LINES) == Damage(Outcome.MACHINE_CHECK)


WRONG = {
    "another page": (panic(), replaced(address=BASE + AT + PAGE), "1 lines from 0xc008140 on"),
    "another line": (panic(), replaced(address=BASE + AT + 64), "not from 0xc007140"),
    "more lines": (panic(), replaced(lines=0b11 << 5), "2 lines from"),
    "another KeyID": (panic(), replaced(keyid=4), "under KeyID 4, not 3"),
    "the guest says another address": (
        panic(REPORTED.replace("ADDR 7000", "ADDR 8000")),
        POISONED,
        "the guest reports 0x8000, not 0x7000",
    ),
    "the guest says no address": (
        panic(REPORTED.replace("ADDR 7000", "")),
        POISONED,
        "the guest reports no address",
    ),
    "the guest panics of something else": (
        panic("Kernel panic - not syncing: Attempted to kill init!\n"),
        POISONED,
        "bad lines, and the guest reports no machine check",
    ),
    "the guest says nothing": ("\n", POISONED, "bad lines, and the guest reports no machine"),
    "the guest is silent": (VmLostError("no answer in 60 s"), POISONED, "bad lines, and"),
    "the host knows nothing": (panic(), None, "a machine check of nothing"),
    "neither knows": (VmLostError("no answer in 60 s"), None, "no answer in 60 s"),
    "it panics, of nothing that is known": (
        panic("Kernel panic - not syncing: stack-protector\n"),
        None,
        "lost",
    ),
}


@pytest.mark.parametrize(("said", "poisoned", "told"), WRONG.values(), ids=WRONG)
def test_machine_check_that_is_not_right_is_none(
    said: str | VmLostError, poisoned: PagePoisoned | None, told: str
) -> None:
    one = victim(said, *([] if poisoned is None else [poisoned]))
    damage = look(one)
    assert damage.outcome is Outcome.OTHER
    assert told in damage.detail
    assert one.is_lost == isinstance(said, VmLostError)


def test_poison_of_another_guest_is_not_this_ones() -> None:
    other = replaced(vm=uuid.uuid4())
    assert "of nothing" in look(victim(panic(), other)).detail


# --- the run ------------------------------------------------------------------------------------


def test_outcomes_of_several_guests_are_one_or_none() -> None:
    garbage, intact = Damage(Outcome.GARBAGE), Damage(Outcome.INTACT)
    assert _in_one([garbage]) == garbage
    assert _in_one([garbage, garbage]) == garbage
    mixed = _in_one([garbage, intact])
    assert mixed == Damage(Outcome.OTHER, "garbage, as written in different guests")
    assert _in_one([Damage(Outcome.OTHER, "odd"), intact]).detail.endswith("guests: odd")


def test_every_attack_is_made_once_of_each_kind() -> None:
    made = [(one.name, job.integrity) for job in _jobs(ATTACKS) for one in job.attacks]
    assert sorted(made) == sorted((one.name, kind) for one in ATTACKS for kind in (False, True))
    for job in _jobs(ATTACKS):
        if job.integrity:  # what ends a guest comes last
            assert not any(one.ends_guests for one in job.attacks[:-1])
    assert _jobs(ATTACKS[:1])[1].attacks == ATTACKS[:1]


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, datapath=DataPath.SHADOW, track=Track.PAGES, window_bytes=None),
        dataclasses.replace(CONFIG, window_bytes=None),
        dataclasses.replace(CONFIG, window_bytes=49 * MIB),
    ],
)
def test_guest_that_cannot_be_attacked_is_refused(config: VmConfig) -> None:
    with pytest.raises(UsageError):
        tamper(config, cast("Narrator", None))


def test_window_that_pages_cannot_be_pushed_out_of() -> None:
    check_window(48 * MIB, 192 * MIB)
    with pytest.raises(UsageError, match="a window of 49 MiB is too large") as caught:
        check_window(49 * MIB, 192 * MIB)
    assert caught.value.hint == "--window 48M or less, or more --memory"
