# SPDX-License-Identifier: GPL-2.0-or-later
"""What `mktme receive` makes of its source, with a platform that has no VMs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Final, Self
from uuid import UUID

import pytest

from mktme.engine.keys import KeyMode
from mktme.remote import receiver as receiver_module
from mktme.remote import wire
from mktme.remote.receiver import Receiver
from mktme.vm.arrival import Arrival, Side
from mktme.vm.config import VmConfig
from mktme.vm.console import CommandResult, GuestCommandError, VmLostError
from mktme.vm.host import EnvironmentUnfitError
from mktme.vm.images import GuestImage

from .test_wire import EXPECT, PLACE, PROOF, SIDE

DEADLINE_S: Final = 20.0
RUN: Final = wire.Run(command="true", timeout_s=1.0, check=True)


class FakePlatform:
    """A platform that says what was done to it."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory
        self.log: list[str] = []
        self.connect: str | None = None
        self.trouble: str | None = None
        self.images: list[tuple[bytes, bytes]] = []
        self.config: VmConfig | None = None
        self.unfit: EnvironmentUnfitError | None = None
        self.aborted = threading.Event()

    def __call__(self, _dram_bytes: int, *, connect: str, notice: Callable[[str], None]) -> Self:
        self.connect = connect
        self.notice = notice
        return self

    def __enter__(self) -> Self:
        self.log.append("up")
        return self

    def __exit__(self, *_error: object) -> None:
        self.log.append("down")

    def side(self) -> Side:
        return SIDE

    def abort(self) -> None:
        self.aborted.set()

    @contextmanager
    def receive(
        self,
        one: UUID,
        config: VmConfig,
        name: str,
        _belongings: None,
        move: Callable[[Arrival], None],
    ) -> Iterator[Any]:
        if self.unfit is not None:
            raise self.unfit
        assert isinstance(config.image, GuestImage)
        self.config = config
        self.images.append((config.image.kernel.read_bytes(), config.image.initrd.read_bytes()))
        assert (one, name) == (EXPECT.vm, EXPECT.name)
        socket = self.run_dir / "unused"
        try:
            move(Arrival(PLACE, socket, lambda: self.trouble, lambda why: f"{why}, and why"))
            self.log.append("moved")
            domain = SimpleNamespace(explained=contextlib.nullcontext, shell=self)
            yield SimpleNamespace(keyid=3, base=2 << 20, domain=domain)
        finally:
            self.log.append("gone")

    def run(self, command: str, _timeout_s: float, *, check: bool) -> CommandResult:
        assert check
        if command == "false":
            raise GuestCommandError("it exited with 1")
        if command == "hang":
            assert self.aborted.wait(DEADLINE_S)
            raise VmLostError("its console ended")
        return CommandResult(f"{command} ran\n", 0)


class Source:
    """The other end of a receiver's descriptors."""

    def __init__(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        self._requests = requests
        self._replies = replies

    def say(self, message: wire.Message) -> None:
        self.write(wire.line_of(message))

    def write(self, data: bytes) -> None:
        self._requests.write(data)
        self._requests.flush()

    def hear(self) -> wire.Reply | wire.Greeting | None:
        line = self._replies.readline()
        if not line:
            return None
        return wire.decode_greeting(line) or wire.decode_reply(line)

    def ask(self, message: wire.Message) -> wire.Reply | wire.Greeting | None:
        self.say(message)
        return self.hear()

    def leave(self) -> None:
        self._requests.close()


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePlatform:
    directory = tmp_path / "run"
    directory.mkdir()
    one = FakePlatform(directory)
    monkeypatch.setattr(receiver_module, "Platform", one)
    monkeypatch.setattr(receiver_module, "prove_held", lambda *_arguments: PROOF)
    return one


@pytest.fixture
def source(platform: FakePlatform) -> Iterator[Source]:
    """A source of a receiver that has greeted; at the end it has ended, and its platform."""
    requests, ours = os.pipe()
    theirs, replies = os.pipe()
    thread = threading.Thread(target=Receiver(requests, replies).serve)
    thread.start()
    with os.fdopen(ours, "wb") as to, os.fdopen(theirs, "rb") as come:
        one = Source(to, come)
        assert one.hear() == wire.greeting()
        yield one
        one.leave()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert one.hear() is None
    for reader in threading.enumerate():
        if reader.name == "mktme-source":
            reader.join(DEADLINE_S)
    os.close(requests)
    assert platform.log.count("up") == platform.log.count("down")
    assert list(platform.run_dir.iterdir()) == []


@pytest.fixture
def exchange(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "exchange"
    yield path
    assert not path.exists()


def opened(source: Source, exchange: Path) -> None:
    request = wire.Open(connect="qemu:///system", dram_bytes=1 << 30, exchange=str(exchange))
    assert source.ask(request) == wire.Opened(side=SIDE)
    assert exchange.stat().st_mode & 0o777 == 0o700


def test_guest_that_comes_and_goes(platform: FakePlatform, exchange: Path, source: Source) -> None:
    opened(source, exchange)
    assert platform.connect == "qemu:///system"
    for guest in (1, 2):
        assert source.ask(EXPECT) == wire.Expecting(place=PLACE)
        assert platform.images[-1] == (EXPECT.image.kernel, EXPECT.image.initrd)
        source.say(wire.Beat())
        assert source.ask(wire.Moved()) == wire.Arrived(keyid=3, base=2 << 20)
        assert source.ask(RUN) == wire.Ran(output="true ran\n", status=0)
        failed = source.ask(wire.Run(command="false", timeout_s=1.0, check=True))
        assert failed == wire.Failure(error="GuestCommandError", message="it exited with 1")
        assert source.ask(wire.Prove(canary=bytes(64))) == wire.Proven(proof=PROOF)
        assert source.ask(wire.Leave()) == wire.Done()
        assert platform.log == ["up", *["moved", "gone"] * guest]
    assert platform.config is not None
    assert platform.config.mode is KeyMode.RANDOM
    assert platform.config.window_bytes == EXPECT.window_bytes
    platform.notice("slow")
    assert source.hear() == wire.Note(line="slow")


def test_guest_that_does_not_come(platform: FakePlatform, exchange: Path, source: Source) -> None:
    """Nothing of it is left when the source is told, and the next one can come."""
    opened(source, exchange)
    source.ask(EXPECT)
    platform.trouble = "libvirt is gone"
    assert source.hear() == wire.Trouble(why="libvirt is gone")
    answer = source.ask(wire.NotMoved(why="it was cancelled"))
    assert answer == wire.Failure(error="MigrationError", message="it was cancelled, and why")
    assert platform.log == ["up", "gone"]
    platform.trouble = None
    assert source.ask(EXPECT) == wire.Expecting(place=PLACE)


def test_host_that_is_not_fit(platform: FakePlatform, exchange: Path, source: Source) -> None:
    opened(source, exchange)
    platform.unfit = EnvironmentUnfitError("the plugin is not built", hint="make setup")
    assert source.ask(EXPECT) == wire.Failure(
        error="EnvironmentUnfitError", message="the plugin is not built", hint="make setup"
    )


def test_source_that_ends_ends_the_guest(
    platform: FakePlatform, exchange: Path, source: Source
) -> None:
    opened(source, exchange)
    source.ask(EXPECT)
    source.ask(wire.Moved())
    source.say(wire.Run(command="hang", timeout_s=1.0, check=True))
    source.leave()
    assert platform.aborted.wait(DEADLINE_S)
    while source.hear() is not None:
        pass
    assert platform.log == ["up", "moved", "gone", "down"]


def test_source_that_ends_while_the_guest_moves(
    platform: FakePlatform, exchange: Path, source: Source
) -> None:
    opened(source, exchange)
    source.ask(EXPECT)
    source.leave()
    assert source.hear() is None
    assert platform.log == ["up", "gone", "down"]


def test_source_that_is_silent_is_gone(
    platform: FakePlatform, exchange: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SILENT_S", 0.2)  # from the next line on
    opened(source, exchange)
    source.ask(EXPECT)
    source.ask(wire.Moved())
    assert source.hear() is None
    assert platform.log == ["up", "moved", "gone", "down"]


def test_directory_that_is_there_already(exchange: Path, source: Source) -> None:
    exchange.mkdir()
    answer = source.ask(wire.Open(connect="", dram_bytes=1, exchange=str(exchange)))
    assert isinstance(answer, wire.Failure)
    assert answer.message == f"{exchange}: File exists"
    assert "TMPDIR" in str(answer.hint)
    exchange.rmdir()


@pytest.mark.parametrize("line", [b"nonsense\n", b"\n", b'{"type":"Opened"}\n'])
def test_what_is_no_request_ends_it(
    line: bytes, platform: FakePlatform, exchange: Path, source: Source
) -> None:
    opened(source, exchange)
    source.write(line)
    answer = source.hear()
    assert isinstance(answer, wire.Failure)
    assert answer.error == "WireError"
    assert source.hear() is None
    assert platform.log == ["up", "down"]


def test_requests_out_of_order(platform: FakePlatform, exchange: Path, source: Source) -> None:
    def refused(request: wire.Message) -> None:
        answer = source.ask(request)
        assert isinstance(answer, wire.Failure)
        assert answer.error == "WireError"

    opened(source, exchange)
    for request in (wire.Moved(), RUN, wire.Leave()):
        refused(request)
    source.ask(EXPECT)
    refused(RUN)
    assert platform.log == ["up", "gone"]
    source.ask(EXPECT)
    source.ask(wire.Moved())
    refused(EXPECT)
    assert source.ask(RUN) == wire.Ran(output="true ran\n", status=0)


def test_first_request_has_to_be_for_a_platform(platform: FakePlatform, source: Source) -> None:
    answer = source.ask(EXPECT)
    assert isinstance(answer, wire.Failure)
    assert answer.message == "Expect without a platform"
    assert source.hear() is None
    assert platform.log == []
