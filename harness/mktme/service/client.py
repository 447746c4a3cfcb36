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
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Final, Self, TypeVar
from uuid import UUID

import msgspec
import numpy as np
import numpy.typing as npt

from mktme.attest.claims import REPORT_DATA_BYTES
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import Policy
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.package import PowerEvent
from mktme.engine.pconfig import Status
from mktme.engine.sidecar import CaptureRecord
from mktme.engine.tme import IA32_TME_CAPABILITY
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
        role: what to ask for; `welcome` says what was granted.

    Raises:
        EngineRefusedError: the engine could not start, speaks another version, or grants no such
            role.
        EngineGoneError: there is no engine at the other end.
    """

    def __init__(self, connection: socket.socket, role: wire.Role = wire.Role.OWNER) -> None:
        self.events: queue.SimpleQueue[wire.Event | None] = queue.SimpleQueue()
        self._socket = connection
        self._waiting: deque[Future[wire.Reply]] = deque()
        self._lock = threading.Lock()
        self._gone = False
        self._why_gone = "the engine is gone"
        self._reader = threading.Thread(target=self._receive, name="mktme-client", daemon=True)
        self._reader.start()
        try:
            hello = wire.Hello(version=wire.PROTOCOL_VERSION, role=role)
            self.welcome = self._call(hello, wire.Welcome)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, control_socket: Path, role: wire.Role = wire.Role.OBSERVER) -> Self:
        """Connect to a running engine's control socket; see `wire.Role`."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(control_socket))
        except OSError as error:
            connection.close()
            raise EngineGoneError(f"no engine at {control_socket}: {error.strerror}") from error
        return cls(connection, role)

    def status(self) -> wire.Status:
        """The platform's keys, VMs and memory as of now."""
        return self._call(wire.GetStatus(), wire.Status)

    def ping(self) -> Future[wire.Reply]:
        """Ask for anything at all; done when the engine has answered, or is gone.

        Raises:
            EngineGoneError: it is gone already.
        """
        return self._send(wire.ReadMsr(msr=IA32_TME_CAPABILITY))

    def add_vm(
        self,
        vm: UUID,
        *,
        name: str,
        memory_bytes: int,
        track: Track | None,
        algorithm: Algorithm,
        mode: KeyMode,
        key_file: Path | None = None,
        datapath: DataPath = DataPath.SHADOW,
        window_bytes: int | None = None,
        policy: Policy = Policy.TWO_QUEUES,
        nvdimm: wire.NvdimmFile | None = None,
        dimm_bytes: int = 0,
        visible: bool = False,
    ) -> wire.VmAdded:
        """Announce a VM; see `wire.AddVm`."""
        request = wire.AddVm(
            vm=vm,
            name=name,
            memory_bytes=memory_bytes,
            track=track,
            algorithm=algorithm,
            mode=mode,
            key_file=_path(key_file),
            datapath=datapath,
            window_bytes=window_bytes,
            policy=policy,
            nvdimm=nvdimm,
            dimm_bytes=dimm_bytes,
            visible=visible,
        )
        return self._call(request, wire.VmAdded)

    def add_vtpm(self, vm: UUID) -> wire.VtpmAdded:
        """Give a VM a TPM, before its QEMU is started."""
        return self._call(wire.AddVtpm(vm=vm), wire.VtpmAdded)

    def remove_vm(self, vm: UUID) -> None:
        """Forget a VM and clear its KeyID; its ciphertext stays."""
        self._call(wire.RemoveVm(vm=vm), wire.Done)

    def discard_memory(self, vm: UUID, ram_offset: int, size_bytes: int) -> None:
        """Forget what a DIMM held that was unplugged; see `wire.DiscardMemory`."""
        request = wire.DiscardMemory(vm=vm, ram_offset=ram_offset, size_bytes=size_bytes)
        self._call(request, wire.Done)

    def flush(self, vm: UUID) -> None:
        """Barrier: of a paused VM, DRAM is exactly its RAM when this returns."""
        self._call(wire.FlushVm(vm=vm), wire.Done, FLUSH_TIMEOUT_S)

    def read(self, vm: UUID, ram_offset: int, size_bytes: int, keyid: int | None = None) -> bytes:
        """Read a VM's memory from DRAM through the engine; see `wire.ReadVm`."""
        request = wire.ReadVm(vm=vm, ram_offset=ram_offset, size_bytes=size_bytes, keyid=keyid)
        return self._call(request, wire.Data).data

    def read_dram(self, address: int, size_bytes: int, keyid: int | None = None) -> bytes:
        """Read DRAM through the engine, whoever's it is; see `wire.ReadDram`."""
        request = wire.ReadDram(address=address, size_bytes=size_bytes, keyid=keyid)
        return self._call(request, wire.Data).data

    def write_dram(self, address: int, data: bytes, keyid: int) -> None:
        """Write DRAM through the engine, whoever's it is; see `wire.WriteDram`.

        What is too long for one request goes in several.
        """
        for start in range(0, len(data), wire.WRITE_MAX_BYTES):
            part = data[start : start + wire.WRITE_MAX_BYTES]
            request = wire.WriteDram(address=address + start, data=part, keyid=keyid)
            self._call(request, wire.Done)

    def rdmsr(self, msr: int) -> int:
        """Execute RDMSR on the package."""
        return self._call(wire.ReadMsr(msr=msr), wire.MsrValue).value

    def wrmsr(self, msr: int, value: int) -> None:
        """Execute WRMSR on the package; #GP is an `EngineRefusedError`."""
        self._call(wire.WriteMsr(msr=msr, value=value), wire.Done)

    def pconfig(
        self,
        program: bytes | bytearray,
        *,
        leaf: int = 0,
        address: int = 0,
        key_file: Path | None = None,
    ) -> Status:
        """Execute PCONFIG on the package; see `wire.ExecutePconfig`."""
        request = wire.ExecutePconfig(
            leaf=leaf, address=address, program=bytes(program), key_file=_path(key_file)
        )
        return Status(self._call(request, wire.PconfigDone).status)

    def program_key(
        self,
        mode: KeyMode,
        algorithm: Algorithm = Algorithm.AES_XTS_128,
        *,
        keyid: int | None = None,
        key_file: Path | None = None,
        vm: UUID | None = None,
    ) -> int:
        """Program a KeyID that nobody uses, and return which; see `wire.ProgramKey`."""
        request = wire.ProgramKey(
            mode=mode, algorithm=algorithm, keyid=keyid, key_file=_path(key_file), vm=vm
        )
        return self._call(request, wire.KeyProgrammed).keyid

    def clear_key(self, keyid: int) -> None:
        """Destroy the key of a KeyID that nobody uses."""
        self._call(wire.ClearKey(keyid=keyid), wire.Done)

    def assign_pages(
        self, vm: UUID, ram_offset: int, size_bytes: int, keyid: int | None = None
    ) -> None:
        """Give pages of a VM another KeyID, None for its own; see `wire.AssignPages`."""
        request = wire.AssignPages(vm=vm, ram_offset=ram_offset, size_bytes=size_bytes, keyid=keyid)
        self._call(request, wire.Done, FLUSH_TIMEOUT_S)

    def release_page(self, vm: UUID, ram_offset: int) -> None:
        """Let go on who waits for a poisoned page; see `wire.ReleasePage`."""
        self._call(wire.ReleasePage(vm=vm, ram_offset=ram_offset), wire.Done)

    def power(self, event: PowerEvent) -> None:
        """Let a power event happen: every VM ends, and firmware sets the platform up again."""
        self._call(wire.PowerPlatform(event=event), wire.Done)

    def line_marks(self, vm: UUID, first_page: int, page_count: int) -> npt.NDArray[np.uint64]:
        """Which lines stores were seen to: uint64, shape (page_count,), bit i is line i."""
        request = wire.ReadMarks(vm=vm, first_page=first_page, page_count=page_count)
        return np.frombuffer(self._call(request, wire.Data).data, dtype="<u8")

    def write_sidecar(self) -> Path:
        """Write the DRAM image's description; returns its path."""
        return Path(self._call(wire.WriteSidecar(), wire.SidecarWritten).path)

    def start_capture(self, path: Path, vms: Collection[UUID] = ()) -> int:
        """Begin to copy DRAM to a file; `wait_for_capture`, or events, tell how it goes on.

        Args:
            path: of the copy; its sidecar and MACs go beside it.
            vms: whose memory; none: all of DRAM.

        Returns:
            What events call it.
        """
        request = wire.StartCapture(path=str(path.absolute()), vms=tuple(vms))
        return self._call(request, wire.CaptureStarted).capture

    def wait_for_capture(self, capture: int) -> CaptureRecord:
        """Wait for a capture's end, on a connection whose events nobody else reads.

        If the wait itself ends otherwise (Ctrl-C), so does the capture.

        Raises:
            EngineRefusedError: it failed, and nothing is left of it.
            EngineGoneError: so did the engine.
        """
        ended: wire.CaptureDone | wire.CaptureFailed | None = None
        while ended is None:
            try:
                event = self.events.get()
            except BaseException:
                self.cancel_capture(capture)
                raise
            if event is None:
                raise EngineGoneError(self._why_gone)
            if isinstance(event, wire.CaptureDone | wire.CaptureFailed):
                ended = event if event.capture == capture else None
        return captured(ended)

    def cancel_capture(self, capture: int) -> None:
        """End a capture, if it is under way; nothing is left of it."""
        with contextlib.suppress(ServiceError):
            self._call(wire.CancelCapture(capture=capture), wire.Done)

    def vms_held(self, capture: int, problem: str | None = None) -> None:
        """Say that VMs stand still, or why they do not; when it returns they may go on."""
        request = wire.VmsHeld(capture=capture, problem=problem)
        self._call(request, wire.Done, FLUSH_TIMEOUT_S)

    def vms_released(self, capture: int, pause_s: float | None) -> None:
        """Say that they go on, and how long they stood still; see `wire.VmsReleased`."""
        pause_ns = None if pause_s is None else round(pause_s * 1e9)
        self._call(wire.VmsReleased(capture=capture, pause_ns=pause_ns), wire.Done)

    def decrypt(
        self, keyid: int, address: int, data: bytes, entries: bytes | None = None
    ) -> wire.Decrypted:
        """Decrypt what a copy of DRAM holds; see `wire.DecryptLines`."""
        request = wire.DecryptLines(keyid=keyid, address=address, data=data, entries=entries)
        return self._call(request, wire.Decrypted)

    def describe_domain(self, vm: UUID, xml: str) -> None:
        """Tell what libvirt was told of a VM, before its QEMU links."""
        self._call(wire.DescribeDomain(vm=vm, xml=xml), wire.Done)

    def evidence(
        self, nonce: bytes, vm: UUID | None = None, report_data: bytes | None = None
    ) -> bytes:
        """Signed evidence of a VM, None for all of them; see `wire.GetEvidence`.

        The first time, the files that it was launched from are hashed.

        Args:
            nonce: 8 to 64 bytes that were never used before.
            vm: which.
            report_data: 64 bytes to be signed with it, None for zeros.
        """
        request = wire.GetEvidence(
            nonce=nonce,
            vm=vm,
            report_data=bytes(REPORT_DATA_BYTES) if report_data is None else report_data,
        )
        return self._call(request, wire.Evidence, FLUSH_TIMEOUT_S).token

    def identity(self) -> wire.Identity:
        """Who signs evidence."""
        return self._call(wire.GetIdentity(), wire.Identity)

    def release_key(self, vm: UUID, jwe: bytes) -> int:
        """Hand on a key that a broker released; returns the VM's new KeyID."""
        request = wire.ReleaseKey(vm=vm, jwe=jwe)
        return self._call(request, wire.KeyProgrammed, FLUSH_TIMEOUT_S).keyid

    def give_up(self, why: str) -> None:
        """As `close`, of an engine that does not answer: whoever asks it is told why; any thread.

        Args:
            why: message of the `EngineGoneError`.
        """
        with self._lock:
            if not self._gone:
                self._why_gone = why
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

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
        answer = self._send(request)
        try:
            reply = answer.result(timeout_s)
        except TimeoutError as error:
            name = type(request).__name__
            raise ServiceError(
                f"the engine did not answer {name} in {timeout_s:g} s",
                hint="look whether it is stopped, or waits for the disk that DRAM is on",
            ) from error
        if isinstance(reply, wire.Failure):
            raise EngineRefusedError(reply)
        if not isinstance(reply, expected):
            raise ServiceError(f"the engine answered with {type(reply).__name__}")
        return reply

    def _send(self, request: wire.Request) -> Future[wire.Reply]:
        answer: Future[wire.Reply] = Future()
        data = wire.frame(request)
        with self._lock:  # the order of the frames is the order of the answers
            if self._gone:
                raise EngineGoneError(self._why_gone)
            self._waiting.append(answer)
            try:
                self._socket.sendall(data)
            except OSError as error:
                raise EngineGoneError(self._why_gone) from error
        return answer

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
            answer.set_exception(EngineGoneError(self._why_gone))
        self.events.put(None)

    def _messages(self) -> Iterator[wire.Reply | wire.Event]:
        with self._socket.makefile("rb") as stream:
            while header := stream.read(wire.LENGTH_BYTES):
                body = stream.read(int.from_bytes(header, "little"))
                yield wire.decode_reply(body)


def captured(event: wire.CaptureDone | wire.CaptureFailed) -> CaptureRecord:
    """How a capture ended.

    Raises:
        EngineRefusedError: it failed.
    """
    if isinstance(event, wire.CaptureFailed):
        raise EngineRefusedError(
            wire.Failure(error=event.error, message=event.message, hint=event.hint)
        )
    return event.record


def _path(file: Path | None) -> str | None:
    return None if file is None else str(file.absolute())


class EngineProcess:
    """The engine as a child process; a context manager, nothing of it outlives the `with`.

    Args:
        run_dir: existing private directory for its sockets and its log.
        dram: path of the DRAM image, which must not exist yet.
        dram_bytes: size of the platform's DRAM.
        platform: what firmware sets up; its own size of DRAM is not looked at.
        peer_uids: further users whose plugins may link (QEMU's, if it is another).
        shared_ownership: let every process of this user be an owner, on the control socket.
        audit: where to keep the audit log; None for a file in `run_dir`.
        ca: directory of the platform CA that certifies the engine; None for one of its own.
    """

    def __init__(
        self,
        run_dir: Path,
        dram: Path,
        dram_bytes: int,
        *,
        platform: PlatformConfig | None = None,
        audit: Path | None = None,
        ca: Path | None = None,
        peer_uids: tuple[int, ...] = (),
        shared_ownership: bool = False,
    ) -> None:
        self.log_path = run_dir / "engine.log"
        self._command = [
            sys.executable,
            "-m",
            "mktme.service",
            f"--run-dir={run_dir}",
            f"--dram={dram}",
            f"--dram-bytes={dram_bytes}",
            f"--platform={msgspec.json.encode(platform or PlatformConfig()).decode()}",
            *(f"--peer-uid={uid}" for uid in peer_uids),
            *(["--shared-ownership"] if shared_ownership else []),
            *([] if audit is None else [f"--audit={audit}"]),
            *([] if ca is None else [f"--ca={ca}"]),
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

    def give_up(self, why: str) -> None:
        """End an engine that does not answer, from any thread; see `EngineClient.give_up`."""
        self.client.give_up(why)
        self.process.kill()

    def _stop(self) -> None:
        """The owner's connection is closed: the engine ends by itself, or is made to."""
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
