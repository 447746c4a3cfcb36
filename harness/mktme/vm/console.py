# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's serial console, driven with pexpect.

A command counts as done only when the guest says so with a token of that one call; silence is a
lost guest, never a success.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final, cast

import pexpect
from pexpect.spawnbase import SpawnBase

from mktme.engine.errors import MktmeError

READY: Final = "@mktme ready"
_LOG_LINES: Final = 5
_MOST_UNREAD: Final = 16 << 20  # bytes that nobody has looked at yet; the transcript has them all
_NOTHING: Final = "(?!)"  # matches nowhere
_PANIC: Final = r"Kernel panic - not syncing: ([^\r\n]*)\r?\n"  # Linux, kernel/panic.c
_FOUND: Final = 0
_ENDED: Final = 1
_TIMED_OUT: Final = 2
_PANICKED: Final = 3


class VmError(MktmeError):
    """A guest did not do as expected."""


class VmLostError(VmError):
    """A guest's console ended or fell silent: QEMU is gone, or the guest hangs."""


class GuestPanicError(VmLostError):
    """The guest's kernel panicked.

    Attributes:
        said: what the console said since it was waited for, the panic included.
    """

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


class GuestCommandError(VmError):
    """A command in the guest failed."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command in the guest printed, line ends normalised, and its exit status."""

    output: str
    status: int


class _Line(SpawnBase):  # type: ignore[type-arg]  # generic in its stub alone
    """A serial line that is read all the time, as `pexpect.popen_spawn.PopenSpawn` reads a pipe.

    Nobody may look at a guest's console for hours. If it were not read, QEMU's socket would fill
    up, and the guest stop at the next line that it says.
    """

    def __init__(self, connection: socket.socket, transcript: FileIO) -> None:
        super().__init__(timeout=None)
        self.heard_at: float | None = None
        self._connection = connection
        self._transcript = transcript
        self._unread = bytearray()
        self._ended = False
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="mktme-console", daemon=True)
        self._reader.start()

    def read_nonblocking(self, size: int = 1, timeout: float | None = -1) -> bytes:
        with self._said:
            self._said.wait_for(
                lambda: self._unread or self._ended, self.timeout if timeout == -1 else timeout
            )
            data = bytes(self._unread[:size])
            del self._unread[:size]
            if data:
                return data
            if self._ended:
                self.flag_eof = True
                raise pexpect.EOF("the line has ended")
            raise pexpect.TIMEOUT("nothing was said")

    def sendline(self, line: str) -> None:
        """Send a line.

        Raises:
            OSError: nobody listens any more.
        """
        self._connection.sendall(f"{line}\n".encode())

    def close(self) -> None:
        """End the line; what was said is in the transcript."""
        with contextlib.suppress(OSError):  # QEMU has ended it
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:  # a QEMU that is killed resets the connection
                data = b""
            if data:
                self._transcript.write(data)
                if self.heard_at is None:
                    self.heard_at = time.monotonic()
            with self._said:
                self._unread += data
                del self._unread[:-_MOST_UNREAD]
                self._ended = not data
                self._said.notify()
            if not data:
                return


class Console:
    """The guest's serial console behind the UNIX socket `path`.

    Args:
        path: where QEMU listens.
        transcript: file that all output is written to.
    """

    def __init__(self, path: Path, transcript: Path) -> None:
        self._path = path
        self._transcript = transcript.open("wb", buffering=0)
        self._connect()

    @property
    def heard_at(self) -> float | None:
        """The `time.monotonic` of its first output that was read, None if there was none."""
        return self._line.heard_at

    def reconnect(self) -> None:
        """Follow the guest to another QEMU, which listens where the one before did."""
        self._line.close()
        self._connect()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the guest has booted to its shell.

        Raises:
            VmLostError: it did not in time, or its console ended.
        """
        self._expect(f"{READY}\r?\n", timeout_s, "booting")

    def run(self, command: str, timeout_s: float, *, check: bool = True) -> CommandResult:
        """Run one line of shell in the guest.

        Raises:
            VmLostError: the guest did not finish it in time, or its console ended.
            GuestPanicError: the guest's kernel panicked meanwhile.
            GuestCommandError: it exited with another status than 0, and `check` is set.
        """
        token = secrets.token_hex(8)
        # Split in the command, whole in the answer: an echoing terminal cannot fool us.
        self._send(f"{command}; echo @mktme-''{token} $?")
        pattern = rf"@mktme-{token} (\d+)\r?\n"
        doing = f"running '{command.split()[0]}'"
        match = self._expect(pattern, timeout_s, doing, unless=_PANIC)
        output = match.string[: match.start()].decode(errors="replace").replace("\r\n", "\n")
        status = int(match[1])
        if check and status != 0:
            last = output.strip().splitlines()[-1:] or ["no output"]
            raise GuestCommandError(f"'{command}' exited with {status} in the guest: {last[0]}")
        return CommandResult(output, status)

    def wait_for(self, pattern: str, timeout_s: float, doing: str) -> bytes:
        """Wait until the guest says something; returns all that it said since the last wait.

        Args:
            pattern: a regular expression.
            timeout_s: how long.
            doing: what the guest is doing, for the error.

        Raises:
            VmLostError: it did not say so in time, or its console ended.
            GuestPanicError: the guest's kernel panicked meanwhile.
        """
        match = self._expect(pattern, timeout_s, doing, unless=_PANIC)
        return bytes(match.string[: match.end()])

    def log_in(self, user: str, password: str, timeout_s: float) -> None:
        """Log in at the prompt of a guest that has one, and become root: then `run` works.

        Raises:
            VmLostError: there is no prompt, or the password is wrong.
        """
        doing = "logging in on its console"
        self._send("")  # for another prompt: the first may have gone by
        self._expect("login: ", timeout_s, doing)
        self._send(user)
        self._expect("[Pp]assword: ", timeout_s, doing)
        self._send(password)
        # What comes before the shell's prompt is lost: login(1) flushes the line.
        self._expect(rf"{re.escape(user)}@[^\r\n]*[$#] ", timeout_s, doing)
        token = secrets.token_hex(8)
        # Without a terminal's niceties, nothing but what commands say is on the line.
        self._send(
            f"exec sudo -n env PS1= PS2= TERM=dumb sh -c 'stty -echo; echo {token}; exec sh'"
        )
        self._expect(rf"{token}\r?\n", timeout_s, doing)  # not its echo, in which more follows

    def send(self, command: str) -> None:
        """Send a line that is not expected to return (poweroff)."""
        self._send(command)

    def wait_end(self, timeout_s: float) -> None:
        """Wait until QEMU closes the console."""
        if self._wait(_NOTHING, timeout_s) == _TIMED_OUT:
            raise VmLostError(f"the guest is still there after {timeout_s:g} s")

    def close(self) -> None:
        """Let go of the console."""
        self._line.close()
        self._transcript.close()

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self._path))
            self._line = _Line(connection, self._transcript)
        except BaseException:
            connection.close()
            self._transcript.close()
            raise

    def _wait(self, pattern: str, timeout_s: float, unless: str = _NOTHING) -> int:
        """Wait for `pattern`: `_FOUND`, `_ENDED`, `_TIMED_OUT`, or `_PANICKED` for `unless`."""
        found: int = self._line.expect(
            [pattern, pexpect.EOF, pexpect.TIMEOUT, unless], timeout=timeout_s
        )
        return found

    def _send(self, line: str) -> None:
        try:
            self._line.sendline(line)
        except OSError as error:
            raise VmLostError("the guest's console ended") from error

    def _expect(
        self, pattern: str, timeout_s: float, doing: str, unless: str = _NOTHING
    ) -> re.Match[bytes]:
        found = self._wait(pattern, timeout_s, unless)
        if found == _FOUND:
            return cast("re.Match[bytes]", self._line.match)
        if found == _PANICKED:
            panic = cast("re.Match[bytes]", self._line.match)
            said = panic.string[: panic.end()].decode(errors="replace").replace("\r\n", "\n")
            last = said.splitlines()[-1]
            raise GuestPanicError(f"the guest was lost while {doing}: {last}", said)
        what = "its console ended" if found == _ENDED else f"no answer in {timeout_s:g} s"
        tail = self._line.before if isinstance(self._line.before, bytes) else b""
        lines = tail.decode(errors="replace").split("\n")[-_LOG_LINES:]
        said = " / ".join(line.strip() for line in lines if line.strip())
        raise VmLostError(f"the guest was lost while {doing}: {what}; it last said: {said or '-'}")
