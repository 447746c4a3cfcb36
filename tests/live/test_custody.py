# SPDX-License-Identifier: GPL-2.0-or-later
"""Known keys are nowhere but in the engine: a search of all that an attacker might get hold of.

A harness process of its own (`custody_guest`) runs two guests with keys from files that were made
by another program. This process alone reads those files, and searches the others' memory, their
files, and what crossed the engine's sockets. As a control the harness plants a key on purpose.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec
import pytest

from mktme.engine.secret import KeyMemory
from mktme.engine.sidecar import read_sidecar
from mktme.proof.custody import KeySearch, search_bytes, search_file, search_memory
from mktme.proof.key_patterns import KeyPatterns
from mktme.service import wire

from ..vectors import reference
from .custody_guest import Planted, Started, Worked
from .socket_record import RecordError, Stream, read_record, recorded

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("quick_boots"),
    pytest.mark.xdist_group("custody"),  # one scene, that the last of the tests ends
]

KEY_BYTES = {"small": 32, "large": 64}
LINE = 64
_M = TypeVar("_M", Started, Worked, Planted)


@dataclass
class Harness:
    """The process of `custody_guest`, and what it said."""

    process: subprocess.Popen[bytes]
    errors: Path

    def ask(self, question: bytes, answer: type[_M]) -> _M:
        assert self.process.stdin is not None
        self.process.stdin.write(question)
        self.process.stdin.flush()
        return self.hear(answer)

    def hear(self, answer: type[_M]) -> _M:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the harness ended: {self.errors.read_text()}"
        return msgspec.json.decode(line, type=answer)


@dataclass
class Scene:
    """Two guests at work, with known keys, and every process and file that took part."""

    harness: Harness
    strace: subprocess.Popen[str]
    record: Path
    owner_descriptor: int
    directory: Path
    key_files: dict[str, Path]
    started: Started
    worked: Worked
    patterns: KeyPatterns

    @property
    def qemu_pids(self) -> list[int]:
        return [guest.qemu_pid for guest in self.worked.guests]

    @property
    def harness_pids(self) -> list[int]:
        """The harness and what it started but for the engine: its reaper (proc(5), children)."""
        found: list[int] = []
        waiting = [self.harness.process.pid]
        while waiting:
            pid = waiting.pop()
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
            if pid != self.started.engine_pid:
                found.append(pid)
        return found


def unfit(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def command_line(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if os.geteuid() != 0:
        unfit("only root can look into the engine")
    private = tmp_path_factory.mktemp("private")
    key_files = {name: private / f"{name}.key" for name in KEY_BYTES}
    for name, size in KEY_BYTES.items():
        make = f'umask 077; head -c {size} /dev/urandom >"$1"'
        subprocess.run(["sh", "-c", make, "sh", key_files[name]], check=True)
    # Not in tmp_path: the paths of UNIX sockets are short.
    directory = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        errors = directory / "harness.log"
        with errors.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.live.custody_guest", *key_files.values()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=REPOSITORY,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(directory)},
            )
        stack.callback(end, process)
        harness = Harness(process, errors)
        started = harness.hear(Started)
        record = private / "sockets"
        try:
            strace = stack.enter_context(recorded(started.engine_pid, record))
        except RecordError as error:
            unfit(f"the engine's sockets cannot be recorded: {error}")
        (owner,) = (
            int(word.removeprefix(b"--owner-fd="))
            for word in command_line(started.engine_pid)
            if word.startswith(b"--owner-fd=")
        )
        worked = harness.ask(b"work\n", Worked)
        patterns = KeyPatterns({name: key_files[name].read_bytes() for name in KEY_BYTES})
        yield Scene(harness, strace, record, owner, directory, key_files, started, worked, patterns)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the harness as its user would, by the end of its input."""
    try:
        process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@dataclass
class Planting:
    """A key that the harness and the first guest hold on purpose."""

    key: bytes
    patterns: KeyPatterns
    answer: Planted


@pytest.fixture(scope="module")
def planting(scene: Scene) -> Planting:
    key = secrets.token_bytes(64)
    answer = scene.harness.ask(key.hex().encode() + b"\n", Planted)
    return Planting(key, KeyPatterns({"planted": key}), answer)


@pytest.fixture(scope="module")
def streams(scene: Scene, planting: Planting) -> dict[Stream, bytes]:
    """All that crossed the engine's sockets, its end included; so this ends the scene."""
    end(scene.harness.process)
    assert scene.harness.process.returncode == 0
    scene.strace.wait(60)  # it ends with the engine
    return read_record(scene.record)


def assert_clean(found: KeySearch) -> None:
    assert found.hits == ()
    assert found.unreadable == ()
    assert found.bytes_searched > 0


def test_the_keys_are_in_use(scene: Scene) -> None:
    """Else it would be no wonder that they are nowhere; with them, DRAM shows the canaries."""
    small, large = scene.worked.guests
    assert small.readable == (True, False)
    assert large.readable == (False, True)
    assert read_sidecar(Path(scene.worked.sidecar)).data_unit_bytes == LINE
    with open(scene.worked.dram, "rb") as dram:
        for guest, path in zip(scene.worked.guests, scene.key_files.values(), strict=True):
            tweak = guest.canary_address.to_bytes(16, "little")
            line = os.pread(dram.fileno(), LINE, guest.canary_address)
            in_use = reference.decrypt(path.read_bytes(), tweak, line) == scene.worked.canary
            assert in_use


def test_the_key_files_hold_them(scene: Scene) -> None:
    """Control: the search finds the keys where they are."""
    for name, path in scene.key_files.items():
        hits = search_file(path, scene.patterns).hits
        assert len(hits) == KEY_BYTES[name] // 8
        assert all(hit.pattern.startswith(name) for hit in hits)


def test_no_key_in_the_memory_of_qemu(scene: Scene) -> None:
    for pid in scene.qemu_pids:
        found = search_memory(pid, scene.patterns)
        assert_clean(found)
        assert found.bytes_searched > 64 << 20  # its guest's memory is in it


def test_no_key_in_the_memory_of_the_harness(scene: Scene) -> None:
    pids = scene.harness_pids
    assert len(pids) >= 2
    assert not {scene.started.engine_pid, *scene.qemu_pids} & set(pids)
    for pid in pids:
        assert_clean(search_memory(pid, scene.patterns))


def test_no_key_in_memory_that_the_engine_shows(scene: Scene) -> None:
    """To root, that is; to anyone else the kernel shows none of it."""
    if scene.worked.key_memory is not KeyMemory.SECRET:
        pytest.skip("this kernel has no memfd_secret: root can read the engine's keys")
    found = search_memory(scene.started.engine_pid, scene.patterns)
    assert found.hits == ()
    assert found.bytes_searched > 1 << 20
    # And that is where they are.
    assert found.unreadable
    assert all("secretmem" in where for where, _size in found.unreadable)


def test_the_engines_memory_is_searched(scene: Scene) -> None:
    """Control: its own command line, taken for a key, is found in it."""
    words = b"\0".join(command_line(scene.started.engine_pid))
    at = words.index(os.fsencode(scene.started.directory))
    found = search_memory(scene.started.engine_pid, KeyPatterns({"arguments": words[at : at + 32]}))
    assert any("[stack]" in hit.where for hit in found.hits)


def test_no_key_in_any_file_of_the_run(scene: Scene) -> None:
    files = [
        path for path in scene.directory.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    for path in files:
        found = search_file(path, scene.patterns)
        assert found.hits == ()
    # These at least are among them: DRAM, the sidecar, and libvirt's and the engine's logs.
    assert {Path(scene.worked.dram), Path(scene.worked.sidecar)} <= set(files)
    assert search_file(Path(scene.worked.dram), scene.patterns).bytes_searched > 64 << 20
    names = [path.name for path in files]
    assert "engine.log" in names
    for suffix in (".xml", ".log"):
        libvirts = [path for path in files if "libvirt" in path.parts and path.suffix == suffix]
        assert len(libvirts) >= 2


def test_no_key_in_arguments_and_environments(scene: Scene) -> None:
    for pid in (scene.started.engine_pid, *scene.qemu_pids, *scene.harness_pids):
        for what in ("cmdline", "environ"):
            path = Path(f"/proc/{pid}/{what}")
            assert_clean(search_bytes(path.read_bytes(), scene.patterns, str(path)))


def test_planted_key_is_found_where_it_was_planted(scene: Scene, planting: Planting) -> None:
    """Control: the memory of QEMU and of the harness is searched indeed."""
    assert planting.answer.read_back
    first, second = scene.qemu_pids
    hits = search_memory(first, planting.patterns).hits
    assert any("memfd:memory-backend-memfd" in hit.where for hit in hits)
    assert search_memory(scene.harness.process.pid, planting.patterns).hits
    assert search_memory(second, planting.patterns).passed
    assert search_file(Path(scene.worked.dram), planting.patterns).passed


def frames(stream: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(stream):
        size = int.from_bytes(stream[at : at + wire.LENGTH_BYTES], "little")
        at += wire.LENGTH_BYTES
        assert at + size <= len(stream), "the record ends within a frame"
        yield stream[at : at + size]
        at += size


def test_no_key_crossed_the_engines_sockets(
    scene: Scene, planting: Planting, streams: dict[Stream, bytes]
) -> None:
    for stream, data in streams.items():
        assert_clean(search_bytes(data, scene.patterns, str(stream)))
    # Control: the guest's memory that was read through the engine is in the record.
    read = streams[Stream(scene.owner_descriptor, "out")]
    assert search_bytes(read, planting.patterns, "answers").hits


def test_the_record_of_the_sockets_is_complete(
    scene: Scene, planting: Planting, streams: dict[Stream, bytes]
) -> None:
    """Each request has its answer, and each guest's plugin its hello."""
    owner = scene.owner_descriptor
    asked = [wire.decode_request(body) for body in frames(streams[Stream(owner, "in")])]
    answered = [wire.decode_reply(body) for body in frames(streams[Stream(owner, "out")])]
    replies = [message for message in answered if isinstance(message, wire.Reply)]
    linked = [message.vm for message in answered if isinstance(message, wire.VmLinked)]
    if isinstance(asked[-1], wire.ReadMsr) and len(asked) > len(replies):
        asked.pop()  # the harness looks whether the engine answers, and hung up meanwhile
    assert len(asked) == len(replies)
    assert not any(isinstance(reply, wire.Failure) for reply in replies)
    added = [request for request in asked if isinstance(request, wire.AddVm)]
    uuids = [guest.uuid for guest in scene.worked.guests]
    assert [request.vm for request in added] == uuids
    assert [request.key_file for request in added] == list(map(str, scene.key_files.values()))
    assert set(linked) == set(uuids)
    assert [request.vm for request in asked if isinstance(request, wire.RemoveVm)] == uuids[::-1]
    canaries = (scene.worked.canary * LINE, planting.key * LINE)
    data = [reply.data for reply in replies if isinstance(reply, wire.Data)]
    assert len(data) == 5
    assert [data.count(canary) for canary in canaries] == [2, 1]
    others = [data for stream, data in streams.items() if stream.descriptor != owner]
    assert all(any(uuid.bytes in data for data in others) for uuid in uuids)
