# SPDX-License-Identifier: GPL-2.0-or-later
"""Running platforms, as `mktme run --keep` leaves them, but without libvirt or guests."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mktme.datapath.shadow import Track
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service.client import EngineClient, EngineProcess
from mktme.service.server import CONTROL_SOCKET

DRAM_BYTES = 64 << 20


class RunningPlatform:
    """A platform that runs."""

    def __init__(self, engine: EngineProcess) -> None:
        self.engine = engine

    @property
    def client(self) -> EngineClient:
        """Its starter's connection."""
        return self.engine.client

    @property
    def control_socket(self) -> Path:
        """Where others connect to it."""
        return self.engine.log_path.parent / CONTROL_SOCKET

    def add_vm(self, name: str = "alice", memory_bytes: int = 8 << 20) -> tuple[uuid.UUID, int]:
        """A VM that nothing runs in, and its KeyID."""
        vm = uuid.uuid4()
        added = self.client.add_vm(
            vm,
            name=name,
            memory_bytes=memory_bytes,
            track=Track.PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
        return vm, added.keyid

    def keyids(self) -> dict[int, tuple[KeyMode, Algorithm | None]]:
        """How those are programmed that are."""
        keys = self.client.status().keys
        return {one.keyid: (one.mode, one.algorithm) for one in keys if one.keyid}


class Platforms:
    """Those that run in one place for temporary files."""

    def __init__(self, tmpdir: Path, stack: ExitStack) -> None:
        self.tmpdir = tmpdir
        self._stack = stack

    def run_dir(self) -> Path:
        """A new directory, of a process of its own."""
        process_dir = tempfile.mkdtemp(prefix="mktme-", dir=self.tmpdir)
        return Path(tempfile.mkdtemp(prefix="run-", dir=process_dir))

    def start(
        self, config: PlatformConfig | None = None, *, shared_ownership: bool = True
    ) -> RunningPlatform:
        """A platform that runs until the test ends."""
        run_dir = self.run_dir()
        process = EngineProcess(
            run_dir,
            run_dir / "dram.img",
            DRAM_BYTES,
            platform=config,
            shared_ownership=shared_ownership,
        )
        return RunningPlatform(self._stack.enter_context(process))


@contextlib.contextmanager
def make_platforms(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platforms]:
    """A place of its own for them, which is where commands look."""
    tmp_path_factory.getbasetemp()  # pytest's own place is somewhere else
    # Not tmp_path: the paths of UNIX sockets are short.
    directory = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    try:
        with ExitStack() as stack:
            yield Platforms(directory, stack)
    finally:
        shutil.rmtree(directory)
