# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to ``mktme receive`` on another host: an ssh client as a child process.

OpenSSH's own, so that ~/.ssh/config, agents and known_hosts are what they are to a user.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, TypeVar

from mktme.engine.errors import MktmeError
from mktme.engine.text import shown
from mktme.remote import wire
from mktme.remote.uri import RemoteUri
from mktme.vm.arrival import SAME_HINT, MigrationError
from mktme.vm.console import GuestCommandError, VmError, VmLostError
from mktme.vm.host import EnvironmentUnfitError, UsageError
from mktme.vm.reaper import interrupts_later

CALL_TIMEOUT_S: Final = 90.0
GREETING_TIMEOUT_S: Final = 180.0
"""From ssh's start to mktme's first word there; the user may be asked for a passphrase."""
_END_TIMEOUT_S: Final = 30.0
_LAST_WORDS_S: Final = 2.0
_SAID_LINES: Final = 20
_SSH_FAILED: Final = 255  # ssh(1), EXIT STATUS
_NO_COMMAND: Final = (126, 127)  # POSIX shell: cannot be run, not found
_OPEN_FAILED: Final = ": open failed: "  # OpenSSH, channels.c, "channel %d: open failed: %s%s%s"
_INSTALL_HINT: Final = (
    "make setup there, and have mktme in the PATH of commands run by ssh (such as by a link in"
    " /usr/local/bin), or --remote-mktme PATH"
)
_ERRORS: Final[dict[str, type[MktmeError]]] = {
    one.__name__: one
    for one in (
        VmError,
        VmLostError,
        GuestCommandError,
        MigrationError,
        UsageError,
        EnvironmentUnfitError,
    )
}
_R = TypeVar("_R", bound=wire.Message)


class HostLostError(VmLostError):
    """The connection to another host ended, and with it what ran there."""


class Link:
    """One connection; a context manager. When it ends, so does the platform there.

    Args:
        remote: the host.
        command: mktme's own, there.
        exchange: path of a socket that leads to the one of the same path there.
        note: called with each line for the user, from any thread.

    Raises:
        MigrationError: there is no mktme of this version, or ssh does not get there.
    """

    def __init__(
        self, remote: RemoteUri, command: str, exchange: Path, note: Callable[[str], None]
    ) -> None:
        self.trouble: str | None = None
        """What keeps a guest from coming, as far as they know there."""
        self._remote = remote
        self._note = note
        self._replies: queue.SimpleQueue[wire.Reply | None] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._why_gone: str | None = None
        self._greeted: queue.SimpleQueue[wire.Greeting | None] = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=_SAID_LINES)
        arguments = remote.ssh([command, "receive"], exchange)
        try:
            # A child of a terminal's, so that ssh can ask for a passphrase; Ctrl-C is ours.
            with interrupts_later():
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
        except OSError as error:
            raise MigrationError(f"{arguments[0]}: {error.strerror}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._threads = [
            threading.Thread(target=target, args=args, name=f"mktme-{name}", daemon=True)
            for name, target, args in (
                ("remote-errors", self._read_errors, (self._process.stderr,)),
                ("remote", self._read, (self._process.stdout,)),
                ("remote-beat", self._beat, ()),
            )
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._check_greeting()
        except BaseException:
            self.close()
            raise

    def _check_greeting(self) -> None:
        here = wire.greeting()
        try:
            there = self._greeted.get(timeout=GREETING_TIMEOUT_S)
        except queue.Empty:
            raise MigrationError(
                f"mktme on {self._remote.host} has said nothing for {GREETING_TIMEOUT_S:g} s",
                hint=f"look whether this works: ssh {self._remote.host} mktme --help",
            ) from None
        if there is None:
            raise MigrationError(self.gone or "", hint=self._hint())
        for what, ours, theirs in (
            ("mktme", here.mktme, there.mktme),
            ("protocol", here.protocol, there.protocol),
        ):
            if ours != theirs:
                raise MigrationError(
                    f"{self._remote.host} has {what} {shown(str(theirs))}, this host {ours}",
                    hint=SAME_HINT,
                )

    @property
    def gone(self) -> str | None:
        """Why the connection has ended; None: it has not."""
        return self._why_gone

    @property
    def refused_forwarding(self) -> str | None:
        """What ssh said when it was not let through to the socket there; None: nothing."""
        return next((line for line in tuple(self._said) if _OPEN_FAILED in line), None)

    def ask(
        self, request: wire.Message, expected: type[_R], timeout_s: float = CALL_TIMEOUT_S
    ) -> _R:
        """Ask, and wait for the answer.

        Raises:
            HostLostError: the connection ended, or there was none in time, which ends it.
            MktmeError: what they say it is.
        """
        with self._asking:
            if self._why_gone is not None:
                raise HostLostError(self._why_gone, hint=self._hint())
            self._send(request)
            try:
                reply = self._replies.get(timeout=timeout_s)
            except queue.Empty:
                name = type(request).__name__
                self._end(f"{self._remote.host} did not answer {name} in {timeout_s:g} s")
                reply = None
            except BaseException:  # Ctrl-C: the answer would be taken for that to another
                self._end("it was interrupted")
                raise
        if reply is None:
            raise HostLostError(self.gone or "", hint=self._hint())
        if isinstance(reply, wire.Failure):
            kind = _ERRORS.get(reply.error, VmError)
            hint = None if reply.hint is None else f"on {self._remote.host}: {shown(reply.hint)}"
            raise kind(f"{self._remote.host}: {shown(reply.message)}", hint=hint)
        if not isinstance(reply, expected):
            self._end(f"{self._remote.host} answered with {type(reply).__name__}")
            raise HostLostError(self.gone or "")
        return reply

    def close(self) -> None:
        """End the connection, and wait until all that ran there has ended."""
        self._closing.set()
        self._close_stdin()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _end(self, why: str) -> None:
        """End it without waiting for anything."""
        self._why_gone = self._why_gone or why
        self._process.terminate()
        self._close_stdin()

    def _close_stdin(self) -> None:
        """That is what they end by there. Who writes may be stuck, as they may be there."""
        if not self._writing.acquire(timeout=wire.BEAT_S):
            self._process.kill()
            self._writing.acquire()
        try:
            with contextlib.suppress(OSError):
                self._stdin.close()
        finally:
            self._writing.release()

    def _send(self, message: wire.Message) -> None:
        # Its end is told by who reads, with the reason.
        with self._writing, contextlib.suppress(OSError, ValueError):
            self._stdin.write(wire.line_of(message))
            self._stdin.flush()

    def _beat(self) -> None:
        while not self._closing.wait(wire.BEAT_S) and self._why_gone is None:
            self._send(wire.Beat())

    def _read(self, stream: IO[bytes]) -> None:
        greeted = False
        while line := stream.readline(wire.REPLY_MAX_BYTES):
            if not greeted:
                greeting = wire.decode_greeting(line)
                if greeting is None:  # what logins say
                    self._hear(line)
                    continue
                greeted = True
                self._greeted.put(greeting)
                continue
            try:
                reply = wire.decode_reply(line)
            except wire.WireError:
                self._end(f"what {self._remote.host} says is not to be understood")
                break
            match reply:
                case wire.Note(line=text):
                    self._note(f"{self._remote.host}: {shown(text)}")
                case wire.Trouble(why=why):
                    self.trouble = shown(why)
                case _:
                    self._replies.put(reply)
        self._process.wait()
        self._threads[0].join(_LAST_WORDS_S)
        self._why_gone = self._why_gone or self._last_words()
        self._greeted.put(None)
        self._replies.put(None)

    def _read_errors(self, stream: IO[bytes]) -> None:
        while line := stream.readline(1 << 16):
            self._hear(line)

    def _hear(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self._said.append(shown(text))

    def _last_words(self) -> str:
        status = self._process.returncode
        said = f": {self._said[-1]}" if self._said else ""
        host = self._remote.host
        if status == _SSH_FAILED:
            return f"ssh to {host} failed{said}"
        if status in _NO_COMMAND:
            return f"there is no mktme on {host}{said}"
        if status < 0:
            return f"ssh to {host} was ended by signal {-status}{said}"
        return f"mktme on {host} ended with status {status}{said}"

    def _hint(self) -> str | None:
        status = self._process.poll()
        if status in _NO_COMMAND:
            return _INSTALL_HINT
        if status == _SSH_FAILED:
            return f"look whether this works: ssh {self._remote.host} mktme --help"
        return None
