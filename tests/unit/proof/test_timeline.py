# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters over time: in bounded memory, with their last value, and only of who is meant."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast
from uuid import UUID

import msgspec
import pytest

from mktme.proof.timeline import CAPACITY, INTERVAL_S, SHARE, Recorder, Timeline, recording
from mktme.service import wire
from mktme.service.client import EngineClient, EngineGoneError

from ..service.test_wire import INLINE_STATUS, VM_STATUS

ALICE, BOB = UUID(int=1), UUID(int=2)


def shadow(vm: UUID, stored: int) -> wire.VmStatus:
    assert VM_STATUS.traffic is not None
    traffic = msgspec.structs.replace(VM_STATUS.traffic, lines_stored=stored, lines_other=2)
    return msgspec.structs.replace(VM_STATUS, vm=vm, traffic=traffic)


def inline(vm: UUID, faults: int) -> wire.VmStatus:
    assert INLINE_STATUS.paging is not None
    paging = msgspec.structs.replace(INLINE_STATUS.paging, faults=faults, lines_stored=1)
    return msgspec.structs.replace(INLINE_STATUS, vm=vm, paging=paging)


def test_columns_of_each_data_path() -> None:
    recorder = Recorder()
    recorder.add(100.0, (shadow(ALICE, 0), inline(BOB, 0)))
    recorder.add(100.5, (shadow(ALICE, 70), inline(BOB, 3)))
    recorder.add(101.25, (inline(BOB, 9),))
    assert recorder.timeline(ALICE, 100.0, (100.25, 100.4)) == Timeline(
        at_s=(0.0, 0.5), worked_s=(0.25, 0.4), lines_stored=(0, 70), lines_other=(2, 2)
    )
    found = recorder.timeline(BOB, 100.0)
    assert found is not None
    assert found.at_s == (0.0, 0.5, 1.25)
    assert found.faults == (0, 3, 9)
    assert found.resident_bytes == (1, 1, 1)
    assert found.lines_other == ()
    assert found.worked_s is None


def test_what_was_before_the_guest_ran_is_not_its() -> None:
    recorder = Recorder()
    recorder.add(1.0, (shadow(ALICE, 5),))
    assert recorder.timeline(ALICE, 2.0) is None
    assert recorder.timeline(BOB, 0.0) is None
    unlinked = msgspec.structs.replace(VM_STATUS, vm=ALICE, linked=False, traffic=None)
    recorder.add(3.0, (unlinked,))
    recorder.add(4.0, (shadow(ALICE, 6),))
    assert recorder.timeline(ALICE, 2.0) == Timeline((2.0,), None, (6,), (2,))


def test_samples_that_come_together_are_one() -> None:
    recorder = Recorder()
    for at, stored in ((1.0, 1), (2.0001, 2), (2.0002, 3)):
        recorder.add(at, (shadow(ALICE, stored),))
    assert recorder.timeline(ALICE, 1.0) == Timeline((0.0, 1.0), None, (1, 3), (2, 2))


@pytest.mark.parametrize("capacity", [4, 5, CAPACITY])
def test_resolution_halves_when_it_is_full(capacity: int) -> None:
    recorder = Recorder(capacity)
    for number in range(20 * capacity):
        recorder.add(float(number), (shadow(ALICE, number),))
        found = recorder.timeline(ALICE, 0.0)
        assert found is not None
        assert len(found.at_s) <= capacity
        assert found.lines_stored[-1] == number  # what is newest is always there
        assert found.at_s == tuple(map(float, found.lines_stored))  # rows stay rows
    assert recorder.interval_s > INTERVAL_S
    assert recorder.interval_s / INTERVAL_S in {2.0**power for power in range(64)}


def wrong(at_s: tuple[float, ...], faults: tuple[int, ...]) -> bytes:
    return json.dumps({"at_s": at_s, "worked_s": None, "faults": faults}).encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (wrong((0.0, 1.0), (1,)), "faults has another number of samples than at_s"),
        (wrong((1.0, 1.0), (1, 1)), "at_s does not ascend"),
        (wrong((0.0, 5e-324), (1, 1)), "at_s does not ascend"),
        (wrong((0.0,), (-1,)), r"Expected `int` >= 0 - at `\$\.faults\[0\]`"),
        (wrong((-1.0,), (0,)), r">= 0\.0 - at `\$\.at_s\[0\]`"),
        (wrong((0.0,), (1 << 63,)), "Expected `int` <= 9223372036854775807"),
    ],
)
def test_columns_that_do_not_belong_together_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.json.decode(data, type=Timeline)


def client(status: Callable[[], object]) -> EngineClient:
    return cast("EngineClient", SimpleNamespace(status=status))


def test_recording_asks_until_its_end_and_once_more() -> None:
    counter = itertools.count()
    asked = threading.Event()

    def status() -> object:
        number = next(counter)
        if number == 2:
            asked.set()
        return SimpleNamespace(vms=(shadow(ALICE, number),))

    began = time.monotonic()
    with recording(client(status)) as recorder:
        assert asked.wait(30)
    found = recorder.timeline(ALICE, began)
    assert found is not None
    last = next(counter) - 1
    assert found.lines_stored[-1] == last
    assert last >= 3


def test_engine_that_is_slow_is_asked_less_often() -> None:
    """Of an answer that takes 10 ms, it is busy for 2 % of the time, and not for 10."""
    answers = []

    def status() -> object:
        answers.append(time.monotonic())
        time.sleep(0.01)  # what the engine does meanwhile
        if len(answers) == 3:
            asked.set()
        return SimpleNamespace(vms=())

    asked = threading.Event()
    with recording(client(status)):
        assert asked.wait(30)
    assert answers[2] - answers[0] >= 2 * 0.01 / SHARE > 2 * INTERVAL_S


def test_engine_that_is_busy_once_is_asked_as_often() -> None:
    """An answer that took long for other reasons does not count, once there was a quick one."""
    answers = []
    asked = threading.Event()

    def status() -> object:
        answers.append(time.monotonic())
        if len(answers) == 2:
            time.sleep(1)  # the engine is at something else
        if len(answers) == 3:
            asked.set()
        return SimpleNamespace(vms=())

    with recording(client(status)):
        assert asked.wait(30)  # and not for 1 s / SHARE
    assert answers[2] - answers[1] < 1 / SHARE


def test_engine_that_is_gone_is_told_of_by_others() -> None:
    def status() -> object:
        raise EngineGoneError("the engine is gone")

    with recording(client(status)) as recorder:
        pass
    assert recorder.timeline(ALICE, 0.0) is None
