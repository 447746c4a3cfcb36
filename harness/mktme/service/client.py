# SPDX-License-Identifier: GPL-2.0-or-later
"""The control client, and the engine process that an owner starts and takes down with it."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Final, Self, TypeVar
from uuid import UUID

import numpy as np
import numpy.typing as npt

from mktme.datapath.shadow import Track
from mktme.engine.errors import MktmeError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire

CALL_TIMEOUT_S: Final = 30.0
FLUSH_TIMEOUT_S: Final = 300.0
STOP_TIMEOUT_S: Final = 10.0

_R = TypeVar("_R", bound=wire.Message)


class ServiceError(MktmeError):
    """The engine could not be asked."""


class EngineGoneError(ServiceError):
    """The engine process ended, or its connection did."""


class EngineRefusedError(ServiceError):
    """The engine answered with a failure.

    Attributes:
        error: class name of the engine's own exception.
    """

    def __init__(self, failure: wire.Failure) -> None:
        super().__init__(failure.message, hint=failure.hint)
        self.error = failure.error


class EngineClient:
    """One control connection.

    Calls block until the engine's answer; they may come from several threads. Events are put
    into `events`; None there means that the engine is gone.

    Args:
        connection: a connected stream socket, owned by the client from now on.

    Raises:
        EngineRefusedError: the engine could not start, or speaks another version.
        EngineGoneError: there is no engine at the other end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.events: queue.SimpleQueue[wire.Event | None] = queue.SimpleQueue()
        self._socket = connection
        self._waiting: deque[Future[wire.Reply]] = deque()
        self._lock = threading.Lock()
        self._gone = False
        self._reader = threading.Thread(target=self._receive, name="mktme-client", daemon=True)
        self._reader.start()
        try:
            self.welcome = self._call(wire.Hello(version=wire.PROTOCOL_VERSION), wire.Welcome)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, control_socket: Path) -> Self:
        """Connect to a running engine's control socket."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(control_socket))
        except OSError as error:
            connection.close()
            raise EngineGoneError(f"no engine at {control_socket}: {error.strerror}") from error
        return cls(connection)

    def status(self) -> wire.Status:
        """The platform's keys, VMs and memory as of now."""
        return self._call(wire.GetStatus(), wire.Status)

    def add_vm(
        self,
        vm: UUID,
        *,
        name: str,
        memory_bytes: int,
        track: Track,
        algorithm: Algorithm,
        mode: KeyMode,
        key_file: Path | None = None,
    ) -> wire.VmAdded:
        """Announce a VM; see `wire.AddVm`."""
        request = wire.AddVm(
            vm=vm,
            name=name,
            memory_bytes=memory_bytes,
            track=track,
            algorithm=algorithm,
            mode=mode,
            key_file=None if key_file is None else str(key_file.absolute()),
        )
        return self._call(request, wire.VmAdded)

    def remove_vm(self, vm: UUID) -> None:
        """Forget a VM and clear its KeyID; its ciphertext stays."""
        self._call(wire.RemoveVm(vm=vm), wire.Done)

    def flush(self, vm: UUID) -> None:
        """Barrier: of a paused VM, DRAM is exactly its RAM when this returns."""
        self._call(wire.FlushVm(vm=vm), wire.Done, FLUSH_TIMEOUT_S)

    def read(self, vm: UUID, ram_offset: int, size_bytes: int, keyid: int | None = None) -> bytes:
        """Read a VM's memory from DRAM through the engine; see `wire.ReadVm`."""
        request = wire.ReadVm(vm=vm, ram_offset=ram_offset, size_bytes=size_bytes, keyid=keyid)
        return self._call(request, wire.Data).data

    def line_marks(self, vm: UUID, first_page: int, page_count: int) -> npt.NDArray[np.uint64]:
        """Which lines stores were seen to: uint64, shape (page_count,), bit i is line i."""
        request = wire.ReadMarks(vm=vm, first_page=first_page, page_count=page_count)
        return np.frombuffer(self._call(request, wire.Data).data, dtype="<u8")

    def write_sidecar(self) -> Path:
        """Write the DRAM image's description; returns its path."""
        return Path(self._call(wire.WriteSidecar(), wire.SidecarWritten).path)

    def close(self) -> None:
        """End the connection; what still waits for an answer gets `EngineGoneError`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _call(
        self, request: wire.Request, expected: type[_R], timeout_s: float = CALL_TIMEOUT_S
    ) -> _R:
        answer: Future[wire.Reply] = Future()
        data = wire.frame(request)
        with self._lock:  # the order of the frames is the order of the answers
            if self._gone:
                raise EngineGoneError("the engine is gone")
            self._waiting.append(answer)
            try:
                self._socket.sendall(data)
            except OSError as error:
                raise EngineGoneError("the engine is gone") from error
        try:
            reply = answer.result(timeout_s)
        except TimeoutError as error:
            name = type(request).__name__
            raise ServiceError(f"the engine did not answer {name} in {timeout_s:g} s") from error
        if isinstance(reply, wire.Failure):
            raise EngineRefusedError(reply)
        if not isinstance(reply, expected):
            raise ServiceError(f"the engine answered with {type(reply).__name__}")
        return reply

    def _receive(self) -> None:
        try:
            for message in self._messages():
                if isinstance(message, wire.Reply):
                    with self._lock:
                        answer = self._waiting.popleft()
                    answer.set_result(message)
                else:
                    self.events.put(message)
        except (OSError, wire.ProtocolError, IndexError):
            # As good as the end of the stream, which may come in the middle of a frame. So is
            # an answer that nobody waits for (IndexError).
            pass
        with self._lock:
            self._gone = True
            waiting = tuple(self._waiting)
            self._waiting.clear()
        for answer in waiting:
            answer.set_exception(EngineGoneError("the engine is gone"))
        self.events.put(None)

    def _messages(self) -> Iterator[wire.Reply | wire.Event]:
        with self._socket.makefile("rb") as stream:
            while header := stream.read(wire.LENGTH_BYTES):
                body = stream.read(int.from_bytes(header, "little"))
                yield wire.decode_reply(body)


class EngineProcess:
    """The engine as a child process; a context manager, nothing of it outlives the `with`.

    Args:
        run_dir: existing private directory for its sockets and its log.
        dram: path of the DRAM image, which must not exist yet.
        dram_bytes: size of the platform's DRAM.
        keyid_bits: size of its key table.
        peer_uids: further users that may connect (QEMU's, if it is another).
    """

    def __init__(
        self,
        run_dir: Path,
        dram: Path,
        dram_bytes: int,
        *,
        keyid_bits: int = 6,
        peer_uids: tuple[int, ...] = (),
    ) -> None:
        self.log_path = run_dir / "engine.log"
        self._command = [
            sys.executable,
            "-m",
            "mktme.service",
            f"--run-dir={run_dir}",
            f"--dram={dram}",
            f"--dram-bytes={dram_bytes}",
            f"--keyid-bits={keyid_bits}",
            *(f"--peer-uid={uid}" for uid in peer_uids),
        ]

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        with theirs, self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, f"--owner-fd={theirs.fileno()}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # Its own session: Ctrl-C is the owner's to handle.
                start_new_session=True,
            )
        try:
            self.client = EngineClient(ours)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.client.close()
        self._stop()

    def _stop(self) -> None:
        """The owner's connection is closed: the engine ends by itself, or is made to."""
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
