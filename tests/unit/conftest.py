# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests that need memory under write tracking, or a running engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings

from mktme.datapath.shadow import Track
from mktme.datapath.uffd import (
    FaultServiceError,
    WriteTrackingError,
    require_fault_handling,
    require_write_tracking,
)
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, ServiceError

from .fake_qemu import DEADLINE_S, FakeQemu

DRAM_BYTES = 256 << 20

# A slow machine is no failure: pytest's own timeout is what ends a test that hangs.
settings.register_profile("mktme", deadline=None)
settings.load_profile("mktme")


class MakeQemu(Protocol):
    """Makes fake QEMUs that end with the test."""

    def __call__(
        self,
        *block_pages: int,
        segments: tuple[tuple[int, int, int], ...] | None = None,
        track: Track = Track.STORES_AND_PAGES,
        visible: bool = False,
    ) -> FakeQemu: ...


@pytest.fixture(scope="session")
def write_tracking() -> None:
    """The kernel must track writes for this user; CI has no excuse not to."""
    try:
        require_write_tracking()
    except WriteTrackingError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; {error.hint}")


@pytest.fixture(scope="session")
def fault_handling() -> None:
    """This user must be able to have all its faults served; CI has no excuse not to."""
    try:
        require_fault_handling()
    except FaultServiceError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; {error.hint}")


@pytest.fixture
def make_qemu(write_tracking: None) -> Iterator[MakeQemu]:
    with ExitStack() as stack:

        def make(
            *block_pages: int,
            segments: tuple[tuple[int, int, int], ...] | None = None,
            track: Track = Track.STORES_AND_PAGES,
            visible: bool = False,
        ) -> FakeQemu:
            qemu = FakeQemu(block_pages or (64,), segments=segments, track=track, visible=visible)
            return stack.enter_context(qemu)

        yield make


@pytest.fixture
def qemu(make_qemu: MakeQemu) -> FakeQemu:
    """64 pages of memory, all still holes, under both trackers."""
    return make_qemu()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that the tests of a module share: each has VMs of its own."""
    run_dir = tmp_path_factory.mktemp("engine")
    with EngineProcess(run_dir, run_dir / "dram.img", DRAM_BYTES) as engine:
        yield engine


class Guests:
    """VMs of an engine, announced to it and with a fake QEMU each; they go with the test."""

    def __init__(self, engine: EngineProcess, make_qemu: MakeQemu, stack: ExitStack) -> None:
        self.client = engine.client
        self._make_qemu = make_qemu
        self._stack = stack

    def announce(
        self,
        qemu: FakeQemu,
        *,
        track: Track = Track.STORES_AND_PAGES,
        memory_bytes: int | None = None,
        mode: KeyMode = KeyMode.RANDOM,
        algorithm: Algorithm = Algorithm.AES_XTS_128,
        key_file: Path | None = None,
        visible: bool = False,
    ) -> wire.VmAdded:
        """Tell the engine of a VM."""
        added = self.client.add_vm(
            qemu.vm,
            name=f"vm-{qemu.vm.hex[:4]}",
            memory_bytes=qemu.ram_bytes if memory_bytes is None else memory_bytes,
            track=track,
            algorithm=algorithm,
            mode=mode,
            key_file=key_file,
            visible=visible,
        )
        self._stack.callback(self._forget, qemu)
        return added

    def link(
        self,
        *block_pages: int,
        segments: tuple[tuple[int, int, int], ...] | None = None,
        track: Track = Track.STORES_AND_PAGES,
        mode: KeyMode = KeyMode.RANDOM,
        algorithm: Algorithm = Algorithm.AES_XTS_128,
        key_file: Path | None = None,
        visible: bool = False,
    ) -> tuple[FakeQemu, wire.VmAdded]:
        """A VM that is announced and linked."""
        qemu = self._make_qemu(*block_pages, segments=segments, track=track, visible=visible)
        added = self.announce(
            qemu, track=track, mode=mode, algorithm=algorithm, key_file=key_file, visible=visible
        )
        qemu.link(self.link_socket)
        return qemu, added

    @property
    def link_socket(self) -> Path:
        """Where plugins connect."""
        return Path(self.client.welcome.link_socket)

    def read(self, qemu: FakeQemu, keyid: int | None = None) -> bytes:
        """All of a VM's memory, as the engine decrypts it from DRAM."""
        return self.client.read(qemu.vm, 0, qemu.ram_bytes, keyid)

    def status(self, qemu: FakeQemu) -> wire.VmStatus:
        """The engine's view of a VM."""
        (status,) = (one for one in self.client.status().vms if one.vm == qemu.vm)
        return status

    def wait(self, expected: wire.Event) -> None:
        """Wait until the engine announced this very event; what comes before it is let go."""
        wait_event(self.client, lambda event: event == expected)

    def _forget(self, qemu: FakeQemu) -> None:
        with suppress(ServiceError):  # the test removed it, or ended the engine
            self.client.remove_vm(qemu.vm)


def wait_event(
    client: EngineClient, wanted: Callable[[wire.Event | None], bool]
) -> wire.Event | None:
    """Take events until one is as wanted; `queue.Empty` when none comes in time."""
    while True:
        event = client.events.get(timeout=DEADLINE_S)
        if wanted(event):
            return event
        assert event is not None, "the engine is gone"


@pytest.fixture
def guests(engine: EngineProcess, make_qemu: MakeQemu) -> Iterator[Guests]:
    with ExitStack() as stack:
        yield Guests(engine, make_qemu, stack)
