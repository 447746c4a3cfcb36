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

import libvirt
import pytest

from mktme.engine.sidecar import CaptureRecord
from mktme.service import wire
from mktme.service.client import EngineClient, EngineGoneError, EngineRefusedError, ServiceError
from mktme.vm import domain as domain_module
from mktme.vm.console import VmLostError
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


class FakeGuest:
    """libvirt's side of a guest: whether it runs, and what was asked of it.

    `late` is waited for before its vCPUs stop; `refusals` is how often it does not go on.
    """

    def __init__(self, state: int, *, stuck: bool) -> None:
        self.refusals = 0
        self._state = state
        self._stuck = stuck
        self.asked: list[str] = []
        self.late = threading.Event()
        self.late.set()

    @property
    def paused(self) -> bool:
        return bool(self._state != libvirt.VIR_DOMAIN_RUNNING)

    def state(self) -> list[int]:
        return [self._state, 0]

    def suspend(self) -> None:
        assert self.late.wait(20)
        if self._stuck or self._state == libvirt.VIR_DOMAIN_PMSUSPENDED:
            raise libvirt.libvirtError("its vCPUs did not stop")
        self.asked.append("suspend")
        self._state = libvirt.VIR_DOMAIN_PAUSED

    def isActive(self) -> int:  # noqa: N802
        return 1

    def resume(self) -> None:
        self.asked.append("resume")
        if self.refusals:
            self.refusals -= 1
            raise libvirt.libvirtError("no lock")
        self._state = libvirt.VIR_DOMAIN_RUNNING


def domain_of(
    *, state: int = libvirt.VIR_DOMAIN_RUNNING, stuck: bool = False, inline: bool = False
) -> Any:
    """A domain that has libvirt's side of it only, as `guest`."""
    host = SimpleNamespace(qemu_log=lambda _name: "")
    spec = SimpleNamespace(name="alice", inline=inline, plugin=None, boot=None)
    domain = cast("Any", Domain(cast("Any", host), cast("Any", spec), Path("/none"), "alice"))
    domain._domain = domain.guest = FakeGuest(state, stuck=stuck)
    return domain


class FakeEngine:
    """Takes down what it is told; `taken` is the moment of the copy."""

    def __init__(self, taken: Callable[[], None] = lambda: None) -> None:
        self.events: queue.SimpleQueue[wire.Event | None] = queue.SimpleQueue()
        self.told: list[tuple[Any, ...]] = []
        self.cancelled: list[int] = []
        self.ends: list[wire.Event | None] = []
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
        for event in self.ends:
            self.events.put(event)
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
    alice, bob = domain_of(), domain_of(state=libvirt.VIR_DOMAIN_PAUSED)
    states: list[tuple[bool, bool]] = []
    engine = FakeEngine(lambda: states.append((alice.guest.paused, bob.guest.paused)))
    watched(platform, engine, alice=alice, bob=bob)
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE, BOB)))
    assert engine.released.wait(20)
    assert states == [(True, True)]
    assert (alice.guest.paused, bob.guest.paused) == (False, True)
    (held, (released, number, pause_s)) = engine.told
    assert held == ("held", 3, None)
    assert (released, number) == ("released", 3)
    assert pause_s > 0
    assert bob.guest.asked == []


@pytest.mark.parametrize("state", [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED])
def test_none_had_to_be_held(platform: Platform, state: int) -> None:
    engine = FakeEngine()
    watched(platform, engine, alice=domain_of(state=state))
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE,)))
    assert engine.released.wait(20)
    assert engine.told == [("held", 3, None), ("released", 3, None)]


@pytest.mark.parametrize("second", ["stuck", "unknown"])
def test_one_that_cannot_be_held(platform: Platform, second: str) -> None:
    """The other goes on, and the engine is told why."""
    alice, engine = domain_of(), FakeEngine()
    others = {"bob": domain_of(stuck=True)} if second == "stuck" else {}
    watched(platform, engine, alice=alice, **others)
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE, BOB)))
    assert engine.released.wait(20)
    assert alice.guest.asked == ["suspend", "resume"]
    (_, number, problem) = engine.told[0]
    assert number == 3
    assert ("did not stop" if second == "stuck" else "not up yet") in problem


@pytest.mark.parametrize("refusals", [1, 2])
def test_one_that_does_not_go_on(refusals: int, caplog: pytest.LogCaptureFixture) -> None:
    """It is tried once more, and then the user is told; the other goes on, and so the engine."""
    notices: list[str] = []
    platform, engine = Platform(1 << 30, notice=notices.append), FakeEngine()
    alice, bob = domain_of(), domain_of()
    bob.guest.refusals = refusals
    watched(platform, engine, alice=alice, bob=bob)
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE, BOB)))
    assert engine.released.wait(20)
    engine.events.put(None)
    assert not alice.guest.paused
    assert bob.guest.asked == ["suspend", "resume", "resume"]
    assert bob.guest.paused == (refusals == 2)
    assert [told[0] for told in engine.told] == ["held", "released"]
    assert len(caplog.messages) == refusals
    assert len(notices) == refusals - 1
    assert all("does not go on after a capture" in one for one in caplog.messages + notices)


def test_engine_that_does_not_answer_in_time(platform: Platform) -> None:
    """Guests go on, and it is told so: it may have its copy."""

    def silent() -> None:
        raise ServiceError("the engine did not answer VmsHeld in 300 s")

    alice, engine = domain_of(), FakeEngine(silent)
    watched(platform, engine, alice=alice)
    engine.events.put(wire.HoldVms(capture=3, vms=(ALICE,)))
    assert engine.released.wait(20)
    assert not alice.guest.paused
    assert [told[0] for told in engine.told] == ["held", "released"]


def test_holds_within_each_other() -> None:
    """A capture comes while somebody else holds the guest, and ends before or after that."""
    domain = domain_of()
    first, second = domain.paused(), domain.paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert domain.guest.paused
    second.__exit__(None, None, None)
    assert domain.guest.asked == ["suspend", "resume"]


def test_owner_has_it_go_on_while_it_is_held() -> None:
    """By `resume`, as `Domain.boot` and `Platform.restore` do: it runs when that is over."""
    domain = domain_of(state=libvirt.VIR_DOMAIN_PAUSED)
    with domain.paused():
        domain.resume()
        assert domain.guest.paused
    assert domain.guest.asked == ["resume"]


def test_owner_suspends_it_while_it_is_held() -> None:
    domain = domain_of()
    with domain.paused():
        domain.suspend()
    assert domain.guest.asked == ["suspend"]
    domain.resume()
    assert not domain.guest.paused


def test_trouble_ends_while_it_is_held() -> None:
    domain = domain_of()
    domain.hold("DRAM is full")
    with domain.paused():
        domain.release()
        assert domain.guest.paused
    assert not domain.guest.paused
    with domain.paused():
        domain.hold("DRAM is full")
    assert domain.guest.paused
    domain.release()
    assert not domain.guest.paused


def test_trouble_of_an_inline_guest_ends_while_it_is_about_to_stand_still() -> None:
    """It may be what its vCPUs wait for."""
    domain = domain_of(inline=True)
    domain.hold("DRAM is full")
    with domain._pausing:
        domain.release()
    assert domain.trouble is None


def too_late(domain: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Thread:
    """Have the vCPUs not stop in time; who waits for them still, until `late`."""
    monkeypatch.setattr(domain_module, "_SUSPEND_TIMEOUT_S", 0.05)
    domain.guest.late.clear()
    with pytest.raises(VmLostError, match="did not stop"), domain.paused():
        pytest.fail("held")
    monkeypatch.undo()
    (thread,) = (one for one in threading.enumerate() if one.name == "mktme-suspend")
    return thread


def test_vcpus_that_stop_too_late_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = domain_of()
    thread = too_late(domain, monkeypatch)
    domain.guest.late.set()
    thread.join(20)
    assert domain.guest.asked == ["suspend", "resume"]


def test_vcpus_that_stop_too_late_are_stopped_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does wait for them means it."""
    domain = domain_of()
    thread, suspend = too_late(domain, monkeypatch), domain.guest.suspend

    def after_the_other() -> None:
        domain.guest.late.set()
        thread.join(20)
        suspend()

    domain.guest.suspend = after_the_other
    domain.suspend()
    assert domain.guest.asked == ["suspend", "suspend"]
    assert domain.guest.paused


def test_capture_is_waited_for(platform: Platform, tmp_path: Path) -> None:
    engine = FakeEngine()
    watched(platform, engine)
    engine.ends = [
        wire.CaptureDone(capture=6, path="/others", record=RECORD),
        wire.CaptureDone(capture=7, path="/c", record=RECORD),
    ]
    assert platform.capture(tmp_path / "c") == RECORD
    engine.ends = [wire.CaptureFailed(capture=7, error="OutputError", message="full", hint="space")]
    with pytest.raises(EngineRefusedError, match="full") as caught:
        platform.capture(tmp_path / "c")
    assert (caught.value.error, caught.value.hint) == ("OutputError", "space")
    engine.ends = [None]
    with pytest.raises(EngineGoneError):
        platform.capture(tmp_path / "c")
    assert platform._captured == {}


def test_captures_of_others_are_forgotten(platform: Platform) -> None:
    engine = FakeEngine()
    watched(platform, engine, alice=domain_of())
    engine.events.put(wire.CaptureDone(capture=6, path="/others", record=RECORD))
    engine.events.put(wire.HoldVms(capture=7, vms=(ALICE,)))
    assert engine.released.wait(20)
    assert platform._captured == {}


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
