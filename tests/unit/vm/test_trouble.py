# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting, with guests left running, until the engine or one of them ends."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest

from mktme.service import wire
from mktme.service.client import EngineClient, EngineGoneError
from mktme.vm.config import VmConfig
from mktme.vm.console import VmError
from mktme.vm.domain import Domain
from mktme.vm.platform import Platform, Vm

from .test_domain_xml import IMAGE

ALICE, BOB, PLAIN = (uuid.UUID(int=number) for number in range(1, 4))
DEADLINE_S = 20


class FakeDomain:
    """A domain whose QEMU said something, or nothing."""

    trouble: str | None = None

    def __init__(self, one: uuid.UUID, label: str, plugin: str | None, said: str | None) -> None:
        self.spec = SimpleNamespace(uuid=one, plugin=plugin)
        self.label = label
        self._said = said

    def reason(self, otherwise: str) -> str:
        return otherwise if self._said is None else f"{self.label}: {self._said}"

    def hold(self, trouble: str) -> None:
        pass

    def release(self) -> None:
        pass


class Running:
    """A platform that follows events; its two guests and a plain one are launched."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[wire.Event | None] = queue.SimpleQueue()
        self.platform = Platform(1 << 30)
        self.platform.engine = cast("EngineClient", SimpleNamespace(events=self.events))
        self.domain(ALICE, "alice", "plugin")
        self.domain(BOB, "bob", "plugin")
        self.domain(PLAIN, "plain", None)
        for one in (ALICE, BOB):
            self.events.put(wire.VmLinked(vm=one))
        self._watcher = threading.Thread(target=self.platform._watch)
        self._watcher.start()
        assert self.platform.wait_for(lambda: self.platform._linked == {ALICE, BOB}, DEADLINE_S)

    def domain(
        self, one: uuid.UUID, label: str, plugin: str | None, said: str | None = None
    ) -> None:
        domain = FakeDomain(one, label, plugin, said)
        self.platform._domains[one] = cast("Domain", domain)

    def wait(self, *events: wire.Event | None) -> Future[None]:
        """Wait for trouble, and have these events come meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.platform.wait_for_trouble)
            for event in events:
                self.events.put(event)
            waiting.exception(DEADLINE_S)
        return waiting

    def close(self) -> None:
        self.events.put(None)
        self._watcher.join()


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


def test_guest_that_ends(running: Running) -> None:
    with pytest.raises(VmError, match=r"^bob: its QEMU ended$"):
        running.wait(wire.VmUnlinked(vm=BOB)).result()


def test_guest_that_ended_before(running: Running) -> None:
    """Between its proofs and the wait, perhaps while another guest ran for comparison."""
    running.events.put(wire.VmUnlinked(vm=ALICE))
    assert running.platform.wait_for(lambda: running.platform._linked == {BOB}, DEADLINE_S)
    with pytest.raises(VmError, match=r"^alice: its QEMU ended$"):
        running.wait().result()


def test_what_qemu_said_is_told(running: Running) -> None:
    running.domain(BOB, "bob", "plugin", "the engine is gone")
    with pytest.raises(VmError, match=r"^bob: the engine is gone$"):
        running.wait(wire.VmUnlinked(vm=BOB)).result()


def test_memory_that_cannot_be_followed(running: Running) -> None:
    events = (wire.VmFault(vm=BOB, message="PCONFIG changed its KeyID"), wire.VmUnlinked(vm=BOB))
    with pytest.raises(VmError, match=r"^bob: PCONFIG changed its KeyID$"):
        running.wait(*events).result()


def test_engine_that_ends(running: Running) -> None:
    with pytest.raises(EngineGoneError, match=r"^the engine is gone$"):
        running.wait(None).result()


def test_engine_that_ended_before(running: Running) -> None:
    running.events.put(None)
    assert running.platform.wait_for(lambda: running.platform._gone, DEADLINE_S)
    with pytest.raises(EngineGoneError):
        running.wait().result()


NO_TROUBLE: dict[str, tuple[wire.Event, ...]] = {
    "a stranger was refused": (wire.LinkRefused(reason="no such VM"),),
    "DRAM is full for a while": (
        wire.DramFull(vm=ALICE, message="no space left"),
        wire.DramCaughtUp(vm=ALICE),
    ),
    "a VM of another owner came and went": (wire.VmLinked(vm=PLAIN), wire.VmUnlinked(vm=PLAIN)),
    "so did one that nobody knows": (wire.VmUnlinked(vm=uuid.UUID(int=9)),),
}


@pytest.mark.parametrize("events", NO_TROUBLE.values(), ids=NO_TROUBLE)
def test_what_is_no_trouble(running: Running, events: tuple[wire.Event, ...]) -> None:
    """It goes on waiting, until there is some: events are followed in their order."""
    with pytest.raises(VmError, match=r"^alice: "):
        running.wait(*events, wire.VmUnlinked(vm=ALICE)).result()
    assert running.platform._linked >= {BOB}


def test_guest_that_was_taken_down_is_not_missed(running: Running) -> None:
    del running.platform._domains[ALICE]
    running.events.put(wire.VmUnlinked(vm=ALICE))
    with pytest.raises(VmError, match=r"^bob: "):
        running.wait(wire.VmUnlinked(vm=BOB)).result()


def test_guest_that_left_is_no_trouble(running: Running) -> None:
    """Nor is its end before it has; its DRAM is free by the end of the `with`."""
    vm, removed, closed = leaving(running)
    with running.platform.leaving(vm):
        assert ended(running) is None
        assert removed == []
    assert ended(running) is None
    assert (removed, closed) == ([BOB], [True])


def test_guest_that_ended_and_did_not_leave(running: Running) -> None:
    vm, removed, closed = leaving(running)

    def leave() -> None:
        with running.platform.leaving(vm):
            assert ended(running) is None
            raise VmError("it did not arrive")

    with pytest.raises(VmError, match="did not arrive"):
        leave()
    lost = ended(running)
    assert lost is not None
    assert lost.label == "bob"
    assert (removed, closed) == ([], [])


def leaving(running: Running) -> tuple[Vm, list[uuid.UUID], list[bool]]:
    """A guest, and notes of its being removed from the engine and of its console's end."""
    removed: list[uuid.UUID] = []
    closed: list[bool] = []
    running.platform.engine.remove_vm = removed.append  # type: ignore[assignment, method-assign]
    console = SimpleNamespace(close=lambda: closed.append(True))
    domain = cast("Domain", SimpleNamespace(console=console))
    return Vm(BOB, VmConfig(IMAGE), domain, running.platform.engine), removed, closed


def ended(running: Running) -> Domain | None:
    """Whom the platform holds for lost once bob's QEMU has ended."""
    running.events.put(wire.VmUnlinked(vm=BOB))
    assert running.platform.wait_for(lambda: running.platform._linked == {ALICE}, DEADLINE_S)
    return running.platform._unlinked()
