# SPDX-License-Identifier: GPL-2.0-or-later
"""Captures on the side of who runs the VMs: holding those that run, and no others."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mktme.engine.sidecar import CaptureRecord
from mktme.service import wire
from mktme.service.client import EngineClient, EngineGoneError, EngineRefusedError
from mktme.vm.console import VmError
from mktme.vm.domain import Domain
from mktme.vm.platform import Platform

ALICE, BOB = (uuid.UUID(int=number) for number in range(1, 3))
RECORD = CaptureRecord(
    captured_at="2026-01-01T00:00:00.000+00:00",
    method="copy-on-write",
    vms=None,
    pause_s=0.1,
    total_s=1.0,
    data_bytes=0,
    saved_bytes=0,
    sha256="0" * 64,
    mac_sha256=None,
)


def domain_of(*, paused: bool = False, stuck: bool = False) -> Any:
    """A domain that has libvirt's side of it only: whether it runs, and what was asked of it."""
    domain = Domain.__new__(Domain)
    state = SimpleNamespace(paused=paused, asked=[])

    def suspend() -> None:
        if stuck:
            raise VmError("its vCPUs did not stop")
        state.asked.append("suspend")
        state.paused = True

    def resume() -> None:
        state.asked.append("resume")
        state.paused = False

    made = cast("Any", domain)
    made.suspend, made.resume, made.state = suspend, resume, state
    made._pausing = threading.Lock()
    made._pauses, made._was_running = 0, False
    return made


@pytest.fixture(autouse=True)
def is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = property(lambda domain: domain.state.paused)
    monkeypatch.setattr(Domain, "is_paused", paused)


class FakeEngine:
    """Takes down what it is told; `taken` is the moment of the copy."""

    def __init__(self, taken: Callable[[], None] = lambda: None) -> None:
        self.events: queue.SimpleQueue[wire.Event | None] = queue.SimpleQueue()
        self.told: list[tuple[Any, ...]] = []
        self.cancelled: list[int] = []
        self._taken = taken
        self.released = threading.Event()

    def vms_held(self, capture: int, problem: str | None = None) -> None:
        self.told.append(("held", capture, problem))
        if problem is None:
            self._taken()

    def vms_released(self, capture: int, pause_s: float | None) -> None:
        self.told.append(("released", capture, pause_s))
        self.released.set()

    def start_capture(self, _path: Path, _vms: list[uuid.UUID]) -> int:
        return 7

    def cancel_capture(self, capture: int) -> None:
        self.cancelled.append(capture)


@pytest.fixture
def platform() -> Iterator[Platform]:
    platform = Platform(1 << 30)
    yield platform
    engine = getattr(platform, "engine", None)
    if engine is not None:
        engine.events.put(None)


def watched(platform: Platform, engine: FakeEngine, **domains: Any) -> None:
    """Have the platform follow an engine's events."""
    platform.engine = cast("EngineClient", engine)
    platform._domains.update(
        {one: domains[name] for one, name in ((ALICE, "alice"), (BOB, "bob")) if name in domains}
    )
    threading.Thread(target=platform._watch, daemon=True).start()


def test_those_that_run_are_held_and_those_that_are_paused_stay_so(platform: Platform) -> None:
    alice, bob = domain_of(), domain_of(paused=True)
    states: list[tuple[bool, bool]] = []
    engine = FakeEngine(lambda: states.append((alice.state.paused, bob.state.paused)))
    watched(platform, engine, alice=alice, bob=bob)
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE, BOB)))
    assert engine.released.wait(20)
    assert states == [(True, True)]
    assert (alice.state.paused, bob.state.paused) == (False, True)
    (held, (released, number, pause_s)) = engine.told
    assert held == ("held", 3, None)
    assert (released, number) == ("released", 3)
    assert pause_s > 0
    assert bob.state.asked == []


def test_none_had_to_be_held(platform: Platform) -> None:
    engine = FakeEngine()
    watched(platform, engine, alice=domain_of(paused=True))
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE,)))
    assert engine.released.wait(20)
    assert engine.told[-1] == ("released", 3, None)


@pytest.mark.parametrize("second", ["stuck", "unknown"])
def test_one_that_cannot_be_held(platform: Platform, second: str) -> None:
    """The other goes on, and the engine is told why."""
    alice, engine = domain_of(), FakeEngine()
    others = {"bob": domain_of(stuck=True)} if second == "stuck" else {}
    watched(platform, engine, alice=alice, **others)
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE, BOB)))
    assert engine.released.wait(20)
    assert alice.state.asked == ["suspend", "resume"]
    (_, number, problem) = engine.told[0]
    assert number == 3
    assert ("did not stop" if second == "stuck" else "not up yet") in problem


def test_holds_within_each_other() -> None:
    """A capture comes while somebody else holds the guest, and ends before or after that."""
    domain = domain_of()
    first, second = domain.paused(), domain.paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert domain.state.paused
    second.__exit__(None, None, None)
    assert domain.state.asked == ["suspend", "resume"]


def test_capture_is_waited_for(platform: Platform, tmp_path: Path) -> None:
    engine = FakeEngine()
    watched(platform, engine)
    engine.events.put(wire.CaptureDone(capture=7, path="/c", record=RECORD))
    assert platform.capture(tmp_path / "c") == RECORD
    engine.events.put(
        wire.CaptureFailed(capture=7, error="OutputError", message="full", hint="space")
    )
    with pytest.raises(EngineRefusedError, match="full") as caught:
        platform.capture(tmp_path / "c")
    assert (caught.value.error, caught.value.hint) == ("OutputError", "space")
    engine.events.put(None)
    with pytest.raises(EngineGoneError):
        platform.capture(tmp_path / "c")


def test_capture_that_is_interrupted_is_cancelled(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    watched(platform, engine)

    def interrupt(_condition: Callable[[], bool]) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(platform._changed, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        platform.capture(tmp_path / "c")
    assert engine.cancelled == [7]
