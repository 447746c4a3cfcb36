# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command finds a deployment's provisioner, or starts it, and has it do things."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Self, TypeVar

from mktme.attest.errors import AttestationError
from mktme.engine.firmware import PlatformConfigError
from mktme.provision import wire
from mktme.provision.apply import Narrator
from mktme.provision.errors import ProvisionError
from mktme.provision.plan import plan
from mktme.provision.state import State, wanted
from mktme.provision.tenants import Deployment
from mktme.service.peer import credentials
from mktme.vm.host import EnvironmentUnfitError, UsageError
from mktme.vm.image_cache import ImageError, cache_dir

_END_TIMEOUT_S: Final = 90.0
_FIRST_CLIENT_FD: Final = 3
# Whose command's fault it was, which its exit status says.
_ERRORS: Final = {
    one.__name__: one
    for one in (UsageError, EnvironmentUnfitError, ImageError, AttestationError, ProvisionError)
}
_USAGE: Final = ("TenantsError", PlatformConfigError.__name__)
_R = TypeVar("_R", bound=wire.Reply)


class _NotWell(Exception):  # noqa: N818 - no error: how a step of the provisioner's ended
    """Ends a narrated step that did not go well."""


class Client:
    """A connection to a provisioner; a context manager.

    Args:
        connection: to it, owned by the client from now on.
        pid: its process.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._pid = pid
        self._replies = wire.replies(connection)

    @classmethod
    def find(cls, name: str) -> Self | None:
        """The provisioner of a deployment, None if none runs.

        Args:
            name: of the deployment.
        """
        for path in sorted(Path(tempfile.gettempdir()).glob(f"mktme-*/{wire.socket_name(name)}")):
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(os.fspath(path))
                # Anybody can make such a directory.
                if credentials(connection).uid == os.geteuid():
                    client = cls(connection, credentials(connection).pid)
                    if client._is_ready():
                        return client
            except (OSError, ProvisionError):
                pass  # it ended just now, is not for us, or of another version
            connection.close()
        return None

    @classmethod
    def obtain(cls, name: str) -> Self:
        """As `find`, and start one where there is none.

        Raises:
            ProvisionError: it does not start.
        """
        with _starting():
            return cls.find(name) or cls._start(name)

    @classmethod
    def _start(cls, name: str) -> Self:
        ours, theirs = socket.socketpair()
        # What it says before it has a log; nothing of it is left.
        with theirs, tempfile.TemporaryFile() as said, open(os.devnull, "r+b") as null:
            pid = _spawn(name, theirs, null, said)
            client = cls(ours, pid)
            theirs.close()
            if client._is_ready():
                return client
            client.close()
            client.wait_ended()
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ProvisionError(
                f"the provisioner did not start: {(last or ['it says nothing'])[0]}"
            )

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            wire.send(self._connection, wire.Hello())
            return isinstance(next(self._replies, None), wire.Ready)
        return False

    def state(self) -> State:
        """What there is."""
        return self._ask(wire.GetState(), wire.StateIs).state

    def plan(self, deployment: Deployment, only: frozenset[str] | None = None) -> wire.Planned:
        """What is to be done; see `mktme.provision.plan.plan`."""
        return self._ask(wire.MakePlan(deployment=deployment, only=only), wire.Planned)

    def apply(
        self, deployment: Deployment, tell: Narrator, only: frozenset[str] | None = None
    ) -> wire.Applied:
        """Have it done; see `mktme.provision.apply.Provisioner.apply`.

        If the wait for it ends otherwise (Ctrl-C), the step in hand is finished and no other begun.
        """
        return self._ask(wire.Apply(deployment=deployment, only=only), wire.Applied, tell)

    def destroy(self, tell: Narrator) -> wire.Applied:
        """Have all taken down, and wait for the end of the provisioner."""
        applied = self._ask(wire.Destroy(), wire.Applied, tell)
        self.close()
        self.wait_ended()
        return applied

    def wait_ended(self) -> None:
        """Wait for the end of the provisioner's process.

        Raises:
            ProvisionError: it does not end.
        """
        try:
            descriptor = os.pidfd_open(self._pid)
        except ProcessLookupError:
            return
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(_END_TIMEOUT_S * 1000):
                raise ProvisionError(f"the provisioner, process {self._pid}, does not end")
        finally:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # it is not always a child of ours
            os.waitpid(self._pid, 0)

    def close(self) -> None:
        """Let go of it; it ends if it holds nothing and nobody else asks it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._replies.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _ask(self, request: wire.Request, expected: type[_R], tell: Narrator | None = None) -> _R:
        try:
            wire.send(self._connection, request)
            reply = self._reply(tell)
        except OSError as error:
            raise ProvisionError(f"the provisioner is gone: {error.strerror}") from error
        if isinstance(reply, wire.Failure):
            if reply.error in _USAGE:
                raise UsageError(reply.message, hint=reply.hint)
            raise _ERRORS.get(reply.error, ProvisionError)(reply.message, hint=reply.hint)
        if not isinstance(reply, expected):
            raise ProvisionError(f"the provisioner answered with {type(reply).__name__}")
        return reply

    def _reply(self, tell: Narrator | None) -> wire.Reply:
        """The next reply; what comes before it is told of."""
        while True:
            message = self._next()
            match message:
                case wire.StepBegan(what=what) if tell is not None:
                    with contextlib.suppress(_NotWell), tell.step(what):
                        self._until_step_ended(tell)
                case wire.Noticed(line=line) if tell is not None:
                    tell.notice(line)
                case wire.StepBegan() | wire.StepEnded() | wire.Noticed():
                    pass
                case reply:
                    return reply

    def _until_step_ended(self, tell: Narrator) -> None:
        while not isinstance(message := self._next(), wire.StepEnded):
            if isinstance(message, wire.Noticed):
                tell.notice(message.line)
        if not message.well:
            raise _NotWell

    def _next(self) -> wire.Reply | wire.Progress:
        message = next(self._replies, None)
        if message is None:
            raise ProvisionError(
                "the provisioner ended, and all that it held",
                hint="mktme provision apply makes it anew",
            )
        return message


def plan_for(deployment: Deployment, only: frozenset[str] | None = None) -> wire.Planned:
    """What is to be done, whether a provisioner runs or not; none is started for it.

    Raises:
        MktmeError: it cannot be planned.
    """
    client = Client.find(deployment.name)
    if client is None:
        nothing = State()
        return wire.Planned(plan=plan(wanted(deployment), nothing, only), state=nothing)
    with client:
        return client.plan(deployment, only)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """One at a time, of a user's commands: none starts what another one just does."""
    directory = cache_dir().parent
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _spawn(name: str, client: socket.socket, null: IO[bytes], said: IO[bytes]) -> int:
    """Start a provisioner in a session of its own: neither Ctrl-C nor the terminal's end is its.

    Not by `subprocess`, whose object insists on the end of what it started.
    """
    module = ("-m", "mktme.provision.daemon", f"--name={name}", f"--client-fd={_FIRST_CLIENT_FD}")
    moves = ((null, 0), (null, 1), (said, 2), (client, _FIRST_CLIENT_FD))
    return os.posix_spawn(
        sys.executable,
        [sys.executable, *module],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, one.fileno(), fd) for one, fd in moves],
        setsid=True,
    )
