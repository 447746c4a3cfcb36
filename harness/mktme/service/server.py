# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine process: one platform's keys, DRAM and VMs behind two sockets.

``control.sock`` takes control clients (`mktme.service.wire`), ``link.sock`` the plugins. Both are
0600 and check SO_PEERCRED. The owner, which started the process, has a connection of its own
(an inherited descriptor); when that ends, so does the engine, and each plugin then stops its
QEMU. Everything runs on one thread: drains give way to requests after each batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Final
from uuid import UUID

from mktme.datapath import link as ram_link
from mktme.datapath.link import LinkError, VmLink
from mktme.datapath.shadow import ShadowDataPath
from mktme.engine.controller import MemoryController
from mktme.engine.dram import Dram, sidecar_path, write_sidecar
from mktme.engine.errors import AddressError, DramFullError, EngineError, KeyIdError, MktmeError
from mktme.engine.keys import KeyMode, KeyTable, read_key_file
from mktme.engine.xts import PAGE_BYTES, wipe
from mktme.service import wire
from mktme.service.vms import Vm, describe, own_memory, vm_status

log = logging.getLogger(__name__)

CONTROL_SOCKET: Final = "control.sock"
LINK_SOCKET: Final = "link.sock"
HELLO_TIMEOUT_S: Final = 5.0
FULL_RETRY_S: Final = 0.5
_UCRED: Final = struct.Struct("iII")


class EngineServer:
    """Serves one platform.

    Args:
        run_dir: private directory (0700) for the two sockets.
        dram: the DRAM image; this process is its only writer.
        keyid_bits: size of the key table.
        peer_uids: user ids that may connect, besides this process's own.
    """

    def __init__(
        self, run_dir: Path, dram: Dram, keyid_bits: int, peer_uids: frozenset[int] = frozenset()
    ) -> None:
        self._run_dir = run_dir
        self._dram = dram
        self._keys = KeyTable(keyid_bits=keyid_bits)
        self._controller = MemoryController(dram, self._keys)
        self._peer_uids = peer_uids | {os.geteuid()}
        self._vms: dict[UUID, Vm] = {}
        # Whether they said Hello: events are only for those who did.
        self._clients: dict[asyncio.StreamWriter, bool] = {}
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, owner: socket.socket) -> None:
        """Serve until the owner's connection ends or SIGTERM comes."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        # Ctrl-C goes to the whole foreground group; the owner decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_vms)
            control = stack.enter_context(self._listener(CONTROL_SOCKET, socket.SOCK_STREAM))
            links = stack.enter_context(self._listener(LINK_SOCKET, socket.SOCK_SEQPACKET))
            server = await asyncio.start_unix_server(self._serve_client, sock=control)
            reader, writer = await asyncio.open_unix_connection(sock=owner)
            self._spawn(self._serve_owner(reader, writer))
            self._spawn(self._accept_links(links))
            await self._stopping.wait()
            server.close()
            for task in tuple(self._tasks):
                task.cancel()
            for client in tuple(self._clients):
                client.transport.abort()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- control clients ----------------------------------------------------------------------

    async def _serve_owner(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await self._serve_client(reader, writer)
        finally:
            log.info("the owner is gone, stopping")
            self._stopping.set()

    async def _serve_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._clients[writer] = False
        try:
            if self._refuses(writer.get_extra_info("socket")):
                return
            while True:
                length = int.from_bytes(await reader.readexactly(wire.LENGTH_BYTES), "little")
                if length > wire.REQUEST_MAX_BYTES:
                    log.warning("control client sent a frame of %d bytes, closing", length)
                    return
                body = await reader.readexactly(length)
                reply = await self._answer(body, self._clients[writer])
                self._clients[writer] |= isinstance(reply, wire.Welcome)
                writer.write(wire.frame(reply))
                await writer.drain()
                if not self._clients[writer]:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client is gone, perhaps in the middle of a frame
        finally:
            del self._clients[writer]
            writer.close()

    def _refuses(self, peer: socket.socket) -> bool:
        pid, uid, _gid = _credentials(peer)
        if uid not in self._peer_uids:
            log.warning("refused a connection of process %d, user %d", pid, uid)
            return True
        return False

    async def _answer(self, body: bytes, greeted: bool) -> wire.Reply:
        try:
            request = wire.decode_request(body)
            if not greeted and not isinstance(request, wire.Hello):
                raise MktmeError("the first message of a connection is Hello")
            return await self._handle(request)
        except MktmeError as error:
            return wire.Failure(error=type(error).__name__, message=str(error), hint=error.hint)
        except Exception as error:
            # A fault of ours; the type alone, since a message might quote what it choked on.
            log.error("request failed: %s", type(error).__name__)
            return wire.Failure(error="InternalError", message=type(error).__name__)

    async def _handle(self, request: wire.Request) -> wire.Reply:
        match request:
            case wire.Hello(version=version):
                if version != wire.PROTOCOL_VERSION:
                    raise MktmeError(
                        f"this engine speaks protocol {wire.PROTOCOL_VERSION}, not {version}"
                    )
                return wire.Welcome(
                    version=wire.PROTOCOL_VERSION,
                    engine_pid=os.getpid(),
                    dram_path=str(self._dram.path),
                    link_socket=str(self._run_dir / LINK_SOCKET),
                )
            case wire.GetStatus():
                return self._status()
            case wire.AddVm():
                return self._add_vm(request)
            case wire.RemoveVm(vm=uuid):
                self._remove_vm(self._vm(uuid))
                return wire.Done()
            case wire.FlushVm(vm=uuid):
                await self._flush(self._vm(uuid))
                return wire.Done()
            case wire.ReadVm():
                return self._read(request)
            case wire.ReadMarks():
                return self._marks(request)
            case wire.WriteSidecar():
                return self._write_sidecar()

    def _vm(self, uuid: UUID) -> Vm:
        try:
            return self._vms[uuid]
        except KeyError:
            raise MktmeError(f"no VM {uuid} on this platform") from None

    def _add_vm(self, request: wire.AddVm) -> wire.VmAdded:
        if request.vm in self._vms:
            raise MktmeError(f"VM {request.vm} is there already")
        if request.memory_bytes <= 0 or request.memory_bytes % PAGE_BYTES:
            raise AddressError("memory is not whole pages", address=request.memory_bytes)
        region = self._dram.allocate(request.memory_bytes)
        try:
            keyid = self._program_free_keyid(request)
            self._controller.assign(region.base, region.size_bytes, keyid)
        except BaseException:
            self._dram.free(region)
            raise
        self._vms[request.vm] = Vm(
            uuid=request.vm,
            name=request.name,
            memory_bytes=request.memory_bytes,
            track=request.track,
            keyid=keyid,
            region=region,
        )
        return wire.VmAdded(keyid=keyid, base=region.base)

    def _program_free_keyid(self, request: wire.AddVm) -> int:
        used = {vm.keyid for vm in self._vms.values()}
        keyid = next((one for one in range(1, self._keys.keyid_count) if one not in used), None)
        if keyid is None:
            raise KeyIdError("every KeyID is taken", keyid=len(used), hint="remove a VM first")
        match request.mode:
            case KeyMode.DIRECT:
                if request.key_file is None:
                    raise MktmeError("direct mode needs a key file")
                key = read_key_file(Path(request.key_file), request.algorithm)
                try:
                    self._keys.program_direct(keyid, request.algorithm, key)
                finally:
                    wipe(key)
            case KeyMode.RANDOM:
                self._keys.program_random(keyid, request.algorithm)
            case KeyMode.NO_ENCRYPT:
                self._keys.program_no_encrypt(keyid)
            case KeyMode.PLATFORM:
                raise MktmeError("a VM has a KeyID of its own, not the platform's")
        return keyid

    def _remove_vm(self, vm: Vm) -> None:
        self._unlink(vm)
        self._keys.clear(vm.keyid)
        # The ciphertext stays: no later key of these addresses makes sense of it.
        self._controller.assign(vm.region.base, vm.region.size_bytes, 0)
        self._dram.free(vm.region)
        del self._vms[vm.uuid]

    def _status(self) -> wire.Status:
        return wire.Status(
            keys=tuple(
                wire.KeyStatus(keyid=one.keyid, mode=one.mode, algorithm=one.algorithm)
                for one in self._keys.describe()
            ),
            vms=tuple(vm_status(vm) for vm in self._vms.values()),
            dram_bytes=self._dram.size_bytes,
            memory=own_memory(),
            cpu_s=time.process_time(),
        )

    def _read(self, request: wire.ReadVm) -> wire.Data:
        vm = self._vm(request.vm)
        offset, size = request.ram_offset, request.size_bytes
        if offset < 0 or size <= 0 or offset % PAGE_BYTES or size % PAGE_BYTES:
            raise AddressError("a read is of whole pages", address=offset)
        if size > wire.READ_MAX_BYTES or offset + size > vm.memory_bytes:
            raise AddressError(f"no read of {size} bytes at RAM offset {offset:#x}", address=offset)
        first = (vm.region.base + offset) // PAGE_BYTES
        plaintext = self._controller.read_pages(first, size // PAGE_BYTES, keyid=request.keyid)
        return wire.Data(data=plaintext.tobytes())

    def _marks(self, request: wire.ReadMarks) -> wire.Data:
        vm = self._vm(request.vm)
        first, count = request.first_page, request.page_count
        if first < 0 or not 0 < count <= wire.READ_MAX_BYTES // 8:
            raise AddressError(f"no {count} pages of marks at page {first}", address=first)
        if first + count > vm.memory_bytes // PAGE_BYTES:
            raise AddressError("marks past the end of RAM", address=first)
        if vm.path is None:
            raise MktmeError(f"VM {vm.name} is not linked")
        return wire.Data(data=vm.path.line_marks(first, count).tobytes())

    def _write_sidecar(self) -> wire.SidecarWritten:
        path = sidecar_path(self._dram.path)
        write_sidecar(path, describe(self._dram, self._controller, self._keys, self._vms.values()))
        return wire.SidecarWritten(path=str(path))

    def _announce(self, event: wire.Event) -> None:
        data = wire.frame(event)
        for client, greeted in self._clients.items():
            # A client that does not read must not make us hold its events without bound.
            if greeted and client.transport.get_write_buffer_size() < wire.REPLY_MAX_BYTES:
                client.write(data)

    # --- plugin links -------------------------------------------------------------------------

    async def _accept_links(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            self._spawn(self._serve_link(connection))

    async def _serve_link(self, connection: socket.socket) -> None:
        with connection:
            vm = None
            try:
                async with asyncio.timeout(HELLO_TIMEOUT_S):
                    await _readable(connection)
                vm = self._accept_hello(connection)
                connection.send(ram_link.encode_answer())
            except (LinkError, EngineError, OSError, TimeoutError) as error:
                reason = str(error) or "no hello came in time"
                log.warning("refused a plugin: %s", reason)
                with contextlib.suppress(OSError):
                    connection.send(ram_link.encode_answer(reason))
                self._announce(wire.LinkRefused(reason=reason))
                if vm is not None:
                    self._unlink(vm)
                return
            vm.connection = connection
            vm.follower = asyncio.current_task()
            self._announce(wire.VmLinked(vm=vm.uuid))
            drains = asyncio.ensure_future(self._follow(vm))
            try:
                # Nothing follows the hello: whatever comes, or the end, is the end.
                await _readable(connection)
            finally:
                drains.cancel()
                await asyncio.gather(drains, return_exceptions=True)
                self._release_link(vm)
                self._announce(wire.VmUnlinked(vm=vm.uuid))

    def _accept_hello(self, connection: socket.socket) -> Vm:
        """Receive and check one hello; its descriptors never outlive a refusal."""
        pid, uid, _gid = _credentials(connection)
        message, descriptors, flags, _ = socket.recv_fds(
            connection,
            ram_link.HELLO_MAX_BYTES + 1,
            ram_link.MAX_DESCRIPTORS,
            socket.MSG_CMSG_CLOEXEC,
        )
        with contextlib.ExitStack() as received:
            for descriptor in descriptors:
                received.callback(os.close, descriptor)
            # Not before its message was received: a peer whose data was left unread gets a reset
            # in place of our reason.
            if uid not in self._peer_uids:
                raise LinkError(f"user {uid} may not connect")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise LinkError("hello with more bytes or descriptors than one can have")
            hello = ram_link.decode_hello(message)
            vm = self._vms.get(hello.vm_uuid)
            if vm is None:
                raise LinkError(f"no VM {hello.vm_uuid} was announced to this engine")
            if vm.link is not None:
                raise LinkError(f"VM {hello.vm_uuid} is linked already")
            if hello.ram_bytes != vm.memory_bytes:
                raise LinkError(
                    f"VM {vm.name} has {hello.ram_bytes} bytes of RAM,"
                    f" {vm.memory_bytes} were announced"
                )
            received.pop_all()
        link = VmLink(hello, descriptors, pid)  # owns the descriptors, also when it fails
        try:
            # Had it been linked before, DRAM would hold old memory where this one's is untouched.
            self._dram.erase(vm.region)
            vm.path = ShadowDataPath(link, self._controller, vm.region, vm.track)
        except BaseException:
            link.close()
            raise
        vm.link = link
        return vm

    async def _follow(self, vm: Vm) -> None:
        """Drain one VM for as long as it is linked."""
        wait_s = 0.0
        while True:
            await asyncio.sleep(wait_s)
            async with vm.lock:
                try:
                    started_s = vm.drain_s
                    wrote = await self._run_drain(vm, lambda path: path.drain())
                    wait_s = vm.pacer.next(vm.drain_s - started_s, wrote > 0)
                except DramFullError as error:
                    wait_s = FULL_RETRY_S
                    self._note_full(vm, error)
                except Exception as error:
                    self._cut(vm, error)
                    return

    async def _flush(self, vm: Vm) -> None:
        async with vm.lock:
            try:
                await self._run_drain(vm, lambda path: path.flush())
            except DramFullError as error:
                self._note_full(vm, error)
                raise

    async def _run_drain(self, vm: Vm, start: Callable[[ShadowDataPath], Iterator[int]]) -> int:
        """Run one drain or flush, giving way to other work after each batch."""
        if vm.path is None:
            raise LinkError(f"VM {vm.name} is not linked: there is nothing to follow")
        batches = start(vm.path)
        changed = 0
        while True:
            started = time.perf_counter()
            lines = next(batches, None)
            vm.drain_s += time.perf_counter() - started
            if lines is None:
                break
            changed += lines
            await asyncio.sleep(0)
        if vm.full:
            vm.full, vm.fault = False, None
            self._announce(wire.DramCaughtUp(vm=vm.uuid))
        return changed

    def _note_full(self, vm: Vm, error: DramFullError) -> None:
        if not vm.full:
            vm.full, vm.fault = True, str(error)
            self._announce(wire.DramFull(vm=vm.uuid, message=str(error)))

    def _cut(self, vm: Vm, error: Exception) -> None:
        """Fail closed: a VM that cannot be followed loses its link, and its plugin stops it."""
        text = f"{type(error).__name__}: {error}"
        log.error("VM %s cannot be followed: %s", vm.name, text)
        vm.fault = text
        self._announce(wire.VmFault(vm=vm.uuid, message=text))
        if vm.connection is not None:
            vm.connection.shutdown(socket.SHUT_RDWR)

    def _unlink(self, vm: Vm) -> None:
        if vm.follower is not None:
            vm.follower.cancel()
        if vm.connection is not None:
            with contextlib.suppress(OSError):
                vm.connection.shutdown(socket.SHUT_RDWR)
        self._release_link(vm)

    @staticmethod
    def _release_link(vm: Vm) -> None:
        vm.path = None
        if vm.link is not None:
            vm.link.close()
        vm.link = vm.connection = vm.follower = None

    def _close_vms(self) -> None:
        for vm in self._vms.values():
            self._unlink(vm)

    # --- helpers ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _listener(self, name: str, kind: socket.SocketKind) -> Iterator[socket.socket]:
        path = self._run_dir / name
        listener = socket.socket(socket.AF_UNIX, kind)
        with listener:
            mask = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            try:
                listener.listen(16)
                listener.setblocking(False)
                yield listener
            finally:
                path.unlink(missing_ok=True)

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _credentials(peer: socket.socket) -> tuple[int, int, int]:
    """The peer's process, user and group (unix(7), SO_PEERCRED)."""
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return pid, uid, gid


async def _readable(connection: socket.socket) -> None:
    """Wait until a receive would not block (a message, or the end)."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
