# SPDX-License-Identifier: GPL-2.0-or-later
"""``mktme receive``: what ssh starts on the host that guests come to.

It has a platform for as long as its source is connected. A source that ends, or is silent for
`SILENT_S`, is gone: then the guest is taken down, as nobody answers for it any more. Should this
process be killed, its engine ends, the plugin with the engine, and QEMU with the plugin.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import libvirt

from mktme.engine.errors import MktmeError
from mktme.engine.keys import KeyMode
from mktme.proof.confidentiality import Canary
from mktme.proof.held import prove_held
from mktme.remote import wire
from mktme.vm.arrival import Arrival, MigrationError
from mktme.vm.config import VmConfig
from mktme.vm.hardware import Hardware
from mktme.vm.images import GuestImage
from mktme.vm.platform import Platform, Vm
from mktme.vm.reaper import common_dir

_LOOK_S: Final = 0.2
_READ_BYTES: Final = 1 << 20


def receive() -> None:
    """Serve the source behind standard input and output until it is gone."""
    answers = os.dup(sys.stdout.fileno())
    # What a library prints must not be taken for a message.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    Receiver(sys.stdin.fileno(), answers).serve()


class _SourceGoneError(Exception):
    """There is nobody left to answer."""


class Receiver:
    """One source's receiver.

    Args:
        source: descriptor that requests are read from.
        answers: descriptor for replies, the receiver's own from now on.
    """

    def __init__(self, source: int, answers: int) -> None:
        self._source = source
        self._answers = os.fdopen(answers, "wb", buffering=0)
        self._sending = threading.Lock()
        self._requests: queue.SimpleQueue[wire.Request | None] = queue.SimpleQueue()
        self._ending = threading.Lock()
        self._gone = False
        self._platform: Platform | None = None

    def serve(self) -> None:
        """Answer until the source is gone."""
        self._send(wire.greeting())
        threading.Thread(target=self._read, name="mktme-source", daemon=True).start()
        with self._answers, contextlib.suppress(_SourceGoneError), self._failures():
            request = self._next()
            if not isinstance(request, wire.Open):
                raise wire.WireError(f"{type(request).__name__} without a platform")
            with self._platform_for(request) as platform:
                self._send(wire.Opened(side=platform.side()))
                while True:
                    self._serve_guest(platform)

    @contextlib.contextmanager
    def _platform_for(self, request: wire.Open) -> Iterator[Platform]:
        with ExitStack() as stack:
            try:
                stack.enter_context(common_dir(Path(request.exchange)))
            except OSError as error:
                raise MigrationError(
                    f"{request.exchange}: {error.strerror}",
                    hint="both hosts need that directory, each its own: export TMPDIR=/tmp",
                ) from error
            one = Platform(request.dram_bytes, connect=request.connect, notice=self._note)
            platform = stack.enter_context(one)
            with self._ending:
                self._platform = platform
            yield platform

    def _serve_guest(self, platform: Platform) -> None:
        """Take one guest, if the next request is for one, and answer for it until it is to go."""
        request = self._next()
        with self._failures():
            if not isinstance(request, wire.Expect):
                raise wire.WireError(f"{type(request).__name__} without a guest")
            with ExitStack() as stack:
                directory = tempfile.TemporaryDirectory(prefix="image-", dir=platform.run_dir)
                image = _kept(request.image, Path(stack.enter_context(directory)))
                guest = platform.receive(
                    request.vm, _config(request, image), request.name, None, self._meet
                )
                vm = stack.enter_context(guest)
                self._send(wire.Arrived(keyid=vm.keyid, base=vm.base))
                self._attend(platform, vm)
            self._send(wire.Done())

    def _meet(self, arrival: Arrival) -> None:
        """Wait until the source says that the guest is here.

        Raises:
            MigrationError: it says that it is not, and what is known here of the cause.
        """
        self._send(wire.Expecting(place=arrival.place))
        told: str | None = None
        while True:
            # A connection's end is no event: look for it now and then.
            try:
                request = self._next(_LOOK_S)
            except queue.Empty:
                trouble = arrival.trouble()
                if trouble is not None and trouble != told:
                    self._send(wire.Trouble(why=trouble))
                    told = trouble
                continue
            match request:
                case wire.Moved():
                    return
                case wire.NotMoved(why=why):
                    raise MigrationError(arrival.why(why))
                case _:
                    raise wire.WireError(f"{type(request).__name__} while a guest moves")

    def _attend(self, platform: Platform, vm: Vm) -> None:
        """Answer for a guest that is here."""
        while not isinstance(request := self._next(), wire.Leave):
            with self._failures():
                match request:
                    case wire.Run():
                        with vm.domain.explained():
                            ran = vm.domain.shell.run(
                                request.command, request.timeout_s, check=request.check
                            )
                        self._send(wire.Ran(output=ran.output, status=ran.status))
                    case wire.Prove():
                        proof = prove_held(platform, vm, Canary(request.canary))
                        self._send(wire.Proven(proof=proof))
                    case _:
                        raise wire.WireError(f"{type(request).__name__} of a guest that is here")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """An error within the `with` is the answer, once all that was made in it is gone."""
        try:
            yield
        except MktmeError as error:
            failure = wire.Failure(error=type(error).__name__, message=str(error), hint=error.hint)
            self._send(failure)
        except (libvirt.libvirtError, OSError) as error:
            self._send(wire.Failure(error=type(error).__name__, message=str(error)))

    def _next(self, timeout_s: float | None = None) -> wire.Request:
        """What the source asks for next.

        Raises:
            _SourceGoneError: nothing any more.
            queue.Empty: nothing, so far.
        """
        request = self._requests.get(timeout=timeout_s)
        if request is None:
            raise _SourceGoneError
        return request

    def _read(self) -> None:
        rest = bytearray()
        try:
            while select.select([self._source], [], [], wire.SILENT_S)[0]:
                data = os.read(self._source, _READ_BYTES)
                if not data or len(rest) > wire.LINE_MAX_BYTES:
                    return
                *lines, last = data.split(b"\n")
                for line in lines:
                    request = wire.decode_request(bytes(rest + line))
                    rest.clear()
                    if not isinstance(request, wire.Beat):
                        self._requests.put(request)
                rest += last
        except wire.WireError as error:
            self._send(wire.Failure(error=type(error).__name__, message=str(error)))
        finally:
            self._end()

    def _end(self) -> None:
        """There is no source any more: whoever waits for a guest gets an error."""
        self._requests.put(None)
        with self._ending:
            platform = self._platform
        if platform is not None:
            platform.abort()

    def _note(self, line: str) -> None:
        self._send(wire.Note(line=line))

    def _send(self, message: wire.Message | wire.Greeting) -> None:
        data = memoryview(wire.line_of(message))
        # A source that is gone is noticed by who reads.
        with self._sending, contextlib.suppress(OSError, ValueError):
            while data:
                data = data[self._answers.write(data) :]


def _kept(image: wire.Image, directory: Path) -> GuestImage:
    """An image as files of this host's."""
    kernel, initrd = directory / "vmlinuz", directory / "initrd"
    kernel.write_bytes(image.kernel)
    initrd.write_bytes(image.initrd)
    return GuestImage(image.name, kernel, initrd, image.cmdline, image.manifest)


def _config(request: wire.Expect, image: GuestImage) -> VmConfig:
    return VmConfig(
        image,
        memory_bytes=request.memory_bytes,
        vcpus=request.vcpus,
        datapath=request.datapath,
        track=request.track,
        window_bytes=request.window_bytes,
        policy=request.policy,
        algorithm=request.algorithm,
        mode=KeyMode.RANDOM if request.encrypted else KeyMode.NO_ENCRYPT,
        pages=request.pages,
        check_tlb=request.check_tlb,
        hardware=Hardware(request.machine),
    )
