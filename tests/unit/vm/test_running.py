# SPDX-License-Identifier: GPL-2.0-or-later
"""Which platforms are found to run on this machine, and what a command gets of them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mktme.service.server import CONTROL_SOCKET
from mktme.service.wire import Role
from mktme.vm.host import UsageError
from mktme.vm.running import connected, control_sockets

from ..running_platforms import Platforms, make_platforms

NOBODY = 65534
WHERE_TO_FIND_ONE = "mktme run --keep keeps one running; --engine SOCKET names one elsewhere"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be others")


@pytest.fixture
def platforms(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platforms]:
    with make_platforms(monkeypatch, tmp_path_factory) as platforms:
        yield platforms


# --- which are found --------------------------------------------------------------------------


def test_none_runs(platforms: Platforms) -> None:
    assert control_sockets() == []


@pytest.mark.parametrize("shared", [True, False])
def test_each_that_runs_is_found(platforms: Platforms, shared: bool) -> None:
    one = platforms.start(shared_ownership=shared)
    assert control_sockets() == [one.control_socket]
    other = platforms.start()
    assert control_sockets() == sorted([one.control_socket, other.control_socket])


def test_one_that_ended_is_not_found(platforms: Platforms) -> None:
    one, other = platforms.start(), platforms.start()
    one.engine.process.kill()
    one.engine.process.wait()
    assert one.control_socket.is_socket()  # nobody was left to remove it
    assert control_sockets() == [other.control_socket]


def hang_up(path: Path, stack: contextlib.ExitStack) -> None:
    """A server that takes connections and says nothing."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    thread = threading.Thread(target=serve)
    thread.start()
    stack.callback(thread.join)
    stack.callback(listener.shutdown, socket.SHUT_RDWR)


NO_ENGINES: dict[str, Callable[[Path, contextlib.ExitStack], object]] = {
    "file": lambda path, _: path.touch(),
    "directory": lambda path, _: path.mkdir(),
    "link to nothing": lambda path, _: path.symlink_to("nothing"),
    "link to itself": lambda path, _: path.symlink_to(path),
    "server that hangs up": hang_up,
}


@pytest.mark.parametrize("make", NO_ENGINES.values(), ids=NO_ENGINES)
def test_what_is_no_engine_is_not_found(
    platforms: Platforms, make: Callable[[Path, contextlib.ExitStack], object]
) -> None:
    with contextlib.ExitStack() as stack:
        make(platforms.run_dir() / CONTROL_SOCKET, stack)
        assert control_sockets() == []
        one = platforms.start()
        assert control_sockets() == [one.control_socket]


@contextlib.contextmanager
def closed(directory: Path) -> Iterator[None]:
    """A directory as it is to those whom it is closed to; root becomes one of them."""
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            directory.parent.chmod(0o755)
            os.seteuid(NOBODY)
            stack.callback(os.seteuid, 0)
        else:
            directory.chmod(0)
            stack.callback(directory.chmod, 0o700)
        yield


def test_directory_that_is_closed_to_us_is_passed_over(platforms: Platforms) -> None:
    one = platforms.start()
    process_dir = one.control_socket.parents[1]
    with closed(process_dir):
        with pytest.raises(PermissionError):
            os.listdir(process_dir)
        assert control_sockets() == []
        with (
            pytest.raises(UsageError, match="no engine answers at"),
            connected(one.control_socket, Role.OBSERVER),
        ):
            pass
    assert control_sockets() == [one.control_socket]


@needs_root
def test_one_that_others_made_is_not_found(platforms: Platforms) -> None:
    """Else anybody could stand in for the user's platform, or beside it."""
    one, other = platforms.start(), platforms.start()
    os.chown(other.control_socket, NOBODY, NOBODY)
    with connected(other.control_socket, Role.OWNER):  # it would answer
        pass
    assert control_sockets() == [one.control_socket]


# --- what a command gets ----------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_only_one_is_taken_unnamed(platforms: Platforms, role: Role) -> None:
    one = platforms.start()
    with connected(None, role) as client:
        assert client.welcome.role is role
        assert client.welcome.engine_pid == one.engine.process.pid


def test_one_of_several_is_taken_by_its_name(platforms: Platforms) -> None:
    for one in (platforms.start(), platforms.start()):
        with connected(one.control_socket, Role.OBSERVER) as client:
            assert client.welcome.engine_pid == one.engine.process.pid


def test_connection_ends_with_its_use(platforms: Platforms) -> None:
    platforms.start()
    with connected(None, Role.OBSERVER) as client:
        assert client.status().dram_bytes
    assert client.events.get(timeout=20) is None


def refused(control_socket: Path | None, role: Role) -> tuple[str, str | None]:
    """What is said when there is no connection, and the hint."""
    with pytest.raises(UsageError) as caught, connected(control_socket, role):
        pass
    return str(caught.value), caught.value.hint


def test_none_to_take(platforms: Platforms) -> None:
    assert refused(None, Role.OBSERVER) == ("no platform is running", WHERE_TO_FIND_ONE)


def test_several_to_choose_from(platforms: Platforms) -> None:
    first, second, third = sorted(platforms.start().control_socket for _ in range(3))
    assert refused(None, Role.OBSERVER) == (
        "3 platforms are running",
        f"choose one: --engine {first} or --engine {second} or --engine {third}",
    )


@pytest.mark.parametrize("name", ["nothing", "file", "x" * 200, "file/below"])
def test_name_of_no_engine(platforms: Platforms, name: str) -> None:
    (platforms.tmpdir / "file").touch()
    path = platforms.tmpdir / name
    assert refused(path, Role.OBSERVER) == (f"no engine answers at {path}", WHERE_TO_FIND_ONE)


def test_engine_that_ended(platforms: Platforms) -> None:
    one = platforms.start()
    one.engine.process.kill()
    one.engine.process.wait()
    assert refused(one.control_socket, Role.OBSERVER)[0] == (
        f"no engine answers at {one.control_socket}"
    )


@pytest.mark.parametrize("named", [False, True])
def test_only_observers_where_ownership_is_not_shared(platforms: Platforms, named: bool) -> None:
    one = platforms.start(shared_ownership=False)
    name = one.control_socket if named else None
    assert refused(name, Role.OWNER) == (
        "only the process that started this platform may change it",
        "mktme run --keep starts one that others may change",
    )
    with connected(name, Role.OBSERVER) as client:
        assert client.welcome.role is Role.OBSERVER
