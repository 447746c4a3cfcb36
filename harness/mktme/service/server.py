# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine process: one platform's keys, DRAM and VMs behind two sockets.

``control.sock`` takes control clients (`mktme.service.wire`), ``link.sock`` the plugins. Both are
0600 and check SO_PEERCRED. The process that started the engine owns it, over a connection of its
own (an inherited descriptor); when that ends, so does the engine, and each plugin then stops its
QEMU. On ``control.sock`` there are observers only, unless ownership is shared: QEMU may run as the
same user, and a hostile one must not get at other VMs.

Everything that touches the platform runs on one thread. Drains give way to requests after each
batch, and each request to the other connections; `mktme.service.limits` says what a peer can have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, TypeVar

from mktme.attest.identity import Identity
from mktme.datapath import link as ram_link
from mktme.datapath.inline import InlineDataPath
from mktme.datapath.kinds import DataPath
from mktme.datapath.link import LinkError, VmLink
from mktme.datapath.registers import CALL_BYTES, RegisterPage, decode_call
from mktme.datapath.shadow import ShadowDataPath
from mktme.datapath.window import Window
from mktme.engine.dram import Dram, Region
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.xts import PAGE_BYTES, wipe
from mktme.service import limits, wire
from mktme.service.attestation import look_at
from mktme.service.audit import AuditLog, Peer
from mktme.service.custody import Custody
from mktme.service.drains import Drains, release_link
from mktme.service.faults import Faults
from mktme.service.limits import LimitError, TokenBucket, WaitingRoom
from mktme.service.peer import credentials
from mktme.service.requests import Requests
from mktme.service.vms import AnyDataPath, Vm
from mktme.service.vtpm import Vtpm

log = logging.getLogger(__name__)

# Asked for once: to look takes descriptors, of which there may be none left.
_VERSION: Final = metadata.version("mktme")

CONTROL_SOCKET: Final = "control.sock"
LINK_SOCKET: Final = "link.sock"
_BACKLOG: Final = 16
_SO_PASSRIGHTS: Final = 83  # asm-generic/socket.h, from Linux 6.16 on
_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Client:
    """A control connection; the starter's is the one that the engine inherited."""

    writer: asyncio.StreamWriter
    is_starter: bool
    may_own: bool
    pid: int
    uid: int
    role: wire.Role | None = None

    @property
    def peer(self) -> Peer:
        return Peer(self.pid, self.uid, self.role)

    def patience(self, timeout_s: float) -> asyncio.Timeout:
        return asyncio.timeout(None if self.is_starter else timeout_s)


class EngineServer:
    """Serves one platform.

    Args:
        run_dir: private directory (0700) for the two sockets.
        dram: the DRAM image; this process is its only writer.
        config: what firmware sets up.
        custody: what is told of this process's memory.
        audit: where it is recorded what is done.
        peer_uids: user ids whose plugins may link, besides this process's own.
        shared_ownership: whether this process's user may be an owner on the control socket.
        identity: who signs evidence; None for one that a CA of its own certifies.
    """

    def __init__(
        self,
        run_dir: Path,
        dram: Dram,
        config: PlatformConfig,
        custody: Custody,
        audit: AuditLog,
        peer_uids: frozenset[int] = frozenset(),
        *,
        shared_ownership: bool = False,
        identity: Identity | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._audit = audit
        self._drains = Drains(self._announce)
        self._faults = Faults(self._drains, self._announce)
        self._peer_uids = peer_uids | {os.geteuid()}
        self._requests = Requests(
            dram,
            config,
            custody,
            self._drains,
            self._announce,
            identity,
            lambda vm: Vtpm.create(run_dir, vm, self._peer_uids),
        )
        self._shared_ownership = shared_ownership
        self._clients: set[_Client] = set()  # those that said Hello
        self._silent_clients = WaitingRoom(limits.WAITING_CONNECTIONS)
        self._silent_links = WaitingRoom(limits.WAITING_CONNECTIONS)
        self._client_places = asyncio.Semaphore(
            limits.CONTROL_CONNECTIONS + limits.WAITING_CONNECTIONS + limits.CLOSING_CONNECTIONS
        )
        self._link_places = asyncio.Semaphore(
            limits.WAITING_CONNECTIONS + limits.CLOSING_CONNECTIONS
        )
        self._refusals = TokenBucket(limits.REFUSALS)
        self._refusals_untold = 0
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, starter: socket.socket) -> None:
        """Serve until the starter's connection ends or SIGTERM comes."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        # Ctrl-C goes to the whole foreground group; the starter decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.ExitStack() as stack:
            stack.callback(self._requests.close)
            control = stack.enter_context(self._listener(CONTROL_SOCKET, socket.SOCK_STREAM))
            links = stack.enter_context(self._listener(LINK_SOCKET, socket.SOCK_SEQPACKET))
            self._spawn(self._serve_starter(starter))
            self._spawn(self._accept(control, self._client_places, self._serve_peer))
            self._spawn(self._accept(links, self._link_places, self._serve_link))
            await self._stopping.wait()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.wait(self._tasks, timeout=limits.STOP_TIMEOUT_S)

    async def _accept(
        self,
        listener: socket.socket,
        places: asyncio.Semaphore,
        serve: Callable[[socket.socket], Coroutine[object, object, None]],
    ) -> None:
        """Accept connections while there are places; `serve` gives its place back."""
        loop = asyncio.get_running_loop()
        while True:
            if places.locked():
                log.warning("no more connections are accepted until some are closed")
            await places.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                places.release()
                log.warning("cannot accept connections now: %s", error.strerror)
                await asyncio.sleep(limits.ACCEPT_RETRY_S)
                continue
            connection.setblocking(False)
            self._spawn(serve(connection))
            # A queue of connections is accepted without a pause otherwise.
            await asyncio.sleep(0)

    # --- control clients ----------------------------------------------------------------------

    async def _serve_starter(self, connection: socket.socket) -> None:
        try:
            await self._serve_client(connection, is_starter=True)
        finally:
            log.info("the owner is gone, stopping")
            self._stopping.set()

    async def _serve_peer(self, connection: socket.socket) -> None:
        try:
            pid, uid, _gid = credentials(connection)
            if uid == os.geteuid():
                await self._serve_client(connection, is_starter=False)
            else:
                if self._may_tell():
                    log.warning("refused a connection of process %d, user %d", pid, uid)
                await _aside(connection.close)
        finally:
            self._client_places.release()

    async def _serve_client(self, connection: socket.socket, *, is_starter: bool) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        pid, uid, _gid = credentials(connection)
        may_own = is_starter or self._shared_ownership
        client = _Client(writer, is_starter, may_own, pid, uid)
        try:
            with self._silent_clients.seat():
                async with client.patience(limits.HELLO_TIMEOUT_S):
                    body = await self._receive(reader, client)
            await self._reply(client, await self._answer(body, client))
            if client.role is None:
                return
            bucket = TokenBucket(limits.REQUESTS[client.role])
            while True:
                body = await self._receive(reader, client)
                # Over the rate it is not read any further; and within it, others come first.
                await asyncio.sleep(bucket.take())
                await self._reply(client, await self._answer(body, client))
        except LimitError as error:
            writer.write(wire.frame(_failure(error)))
        except wire.ProtocolError as error:
            log.warning("closing a control connection: %s", error)
        except EOFError:
            pass  # it sends nothing more, but may still read its answers
        except OSError:
            writer.transport.abort()  # it is gone, or stopped reading or writing
        finally:
            self._requests.leave(client)
            try:
                await self._hang_up(client)
            finally:
                self._clients.discard(client)

    async def _hang_up(self, client: _Client) -> None:
        """Close a connection when its peer has read what there is for it, or does not."""
        at_once = client.is_starter or self._stopping.is_set()
        transport = client.writer.transport
        transport.set_write_buffer_limits(0)  # what `drain` waits for
        try:
            async with asyncio.timeout(0 if at_once else limits.REPLY_TIMEOUT_S):
                await client.writer.drain()
        except OSError:
            pass
        finally:
            # Not after close(), which may have ended it by now: abort() does not look (3.11).
            transport.abort()

    async def _receive(self, reader: asyncio.StreamReader, client: _Client) -> bytes:
        """Wait for a request as long as it takes; once it has begun it must end soon."""
        first = await reader.readexactly(1)
        async with client.patience(limits.FRAME_TIMEOUT_S):
            length = int.from_bytes(
                first + await reader.readexactly(wire.LENGTH_BYTES - 1), "little"
            )
            if length > wire.REQUEST_MAX_BYTES:
                raise wire.ProtocolError(f"a frame of {length} bytes")
            return await reader.readexactly(length)

    async def _reply(self, client: _Client, reply: wire.Reply) -> None:
        client.writer.write(wire.frame(reply))
        async with client.patience(limits.REPLY_TIMEOUT_S):
            await client.writer.drain()

    async def _answer(self, body: bytes, client: _Client) -> wire.Reply:
        try:
            request = wire.decode_request(body)
            if isinstance(request, wire.Hello):
                return self._welcome(request, client)
            if client.role is None:
                raise wire.ProtocolError("the first message of a connection is Hello")
            return await self._do(request, client, client.role)
        except MktmeError as error:
            return _failure(error)
        except Exception as error:
            # A fault of ours; the type alone, since a message might quote what it choked on.
            log.error("request failed: %s", type(error).__name__)
            return wire.Failure(error="InternalError", message=type(error).__name__)

    async def _do(self, request: wire.Command, client: _Client, role: wire.Role) -> wire.Reply:
        """Do what a client asks for, if it may, and record it."""
        outcome: wire.Reply | MktmeError | None = None
        try:
            if not role.may_send(request):
                raise wire.RoleError(
                    f"an {role.value} may not send {type(request).__name__}",
                    hint="only an owner may, as the process that started the engine is",
                )
            self._audit.admit(request)
            outcome = await self._requests.handle(request, client)
            return outcome
        except MktmeError as error:
            outcome = error
            raise
        finally:
            self._audit.request(client.peer, request, outcome)

    def _welcome(self, hello: wire.Hello, client: _Client) -> wire.Welcome:
        if client.role is not None:
            raise wire.ProtocolError("Hello is said once")
        if hello.version != wire.PROTOCOL_VERSION:
            raise MktmeError(
                f"this engine speaks protocol {wire.PROTOCOL_VERSION}, not {hello.version}"
            )
        if hello.role is wire.Role.OWNER and not client.may_own:
            raise wire.RoleError(
                "on the control socket there are observers only",
                hint="ask to be an observer, or start the engine with --shared-ownership",
            )
        if len(self._clients) >= limits.CONTROL_CONNECTIONS and not client.is_starter:
            raise LimitError(f"{len(self._clients)} control connections are open already")
        client.role = hello.role
        self._clients.add(client)
        return wire.Welcome(
            version=wire.PROTOCOL_VERSION,
            role=client.role,
            engine_pid=os.getpid(),
            dram_path=str(self._requests.dram.path),
            link_socket=str(self._run_dir / LINK_SOCKET),
            mktme_version=_VERSION,
            link_version=ram_link.PROTOCOL_VERSION,
        )

    def _announce(self, event: wire.Event) -> None:
        self._audit.event(event)
        data = wire.frame(event)
        for client in self._clients:
            transport = client.writer.transport
            if transport.is_closing():
                continue
            if transport.get_write_buffer_size() < limits.EVENT_BUFFER_BYTES:
                client.writer.write(data)
            elif not client.is_starter:
                # Better no connection than one with a gap. The starter's would end every VM.
                transport.abort()

    def _may_tell(self) -> bool:
        """Whether one more refusal may go into the log."""
        if not self._refusals.try_take():
            self._refusals_untold += 1
            return False
        if self._refusals_untold:
            log.warning("refused %d connections more", self._refusals_untold)
            self._refusals_untold = 0
        return True

    # --- plugin links -------------------------------------------------------------------------

    async def _serve_link(self, connection: socket.socket) -> None:
        left = contextlib.ExitStack()  # what is to be closed, should it be refused
        left.callback(connection.close)
        try:
            vm = await self._accept_hello(connection, left)
        except Exception as error:
            self._refuse_link(connection, _reason(error))
            await _aside(left.close)
            return
        finally:
            self._link_places.release()
        self._announce(wire.VmLinked(vm=vm.uuid))
        drains = asyncio.ensure_future(self._follow(vm))
        try:
            if vm.registers is not None:
                await self._serve_calls(vm, connection)
            else:
                # Nothing follows the hello: whatever comes, or the end, is the end.
                await _readable(connection)
        finally:
            drains.cancel()
            await asyncio.gather(drains, return_exceptions=True)
            try:
                await self._drains.persist(vm)
            finally:
                release_link(vm)
                self._announce(wire.VmUnlinked(vm=vm.uuid))
                connection.shutdown(socket.SHUT_RDWR)
                async with self._link_places:  # what came last may bring descriptors
                    await _aside(connection.close)

    async def _serve_calls(self, vm: Vm, connection: socket.socket) -> None:
        """Answer the calls of a VM's vCPUs, one at a time, until the end or what is no call."""
        pid, uid, _gid = credentials(connection)
        peer = Peer(pid, uid, None)
        bucket = TokenBucket(limits.GUEST_CALLS)
        message = bytearray(CALL_BYTES + 1)
        try:
            while True:
                await _readable(connection)
                # It may have brought descriptors, which are closed by whoever receives it.
                count = await _aside(lambda: connection.recv_into(message))
                if count == 0:
                    return
                call = decode_call(memoryview(message)[:count])
                await asyncio.sleep(bucket.take())
                answer = self._requests.registers.execute(vm, call, peer, self._audit)
                wipe(message)
                connection.send(answer)
        except (LinkError, OSError) as error:  # also of an answer that is not fetched
            self._drains.cut(vm, f"its plugin's call: {error}")
        finally:
            wipe(message)

    async def _follow(self, vm: Vm) -> None:
        if isinstance(vm.path, InlineDataPath):
            await self._faults.follow(vm, vm.path)
        else:
            await self._drains.follow(vm)

    def _refuse_link(self, connection: socket.socket, reason: str) -> None:
        if self._may_tell():
            log.warning("refused a plugin: %s", reason)
            self._announce(wire.LinkRefused(reason=reason))
        with contextlib.suppress(OSError):
            connection.send(ram_link.encode_answer(reason))

    async def _accept_hello(self, connection: socket.socket, left: contextlib.ExitStack) -> Vm:
        """Receive and check one hello, and answer that it is accepted."""
        with self._silent_links.seat():
            async with asyncio.timeout(limits.HELLO_TIMEOUT_S):
                await _readable(connection)
        message, descriptors, flags = await _aside(lambda: _receive_hello(connection))
        for descriptor in descriptors:
            left.callback(os.close, descriptor)
        pid, uid, _gid = credentials(connection)
        # Not before its message was received: a peer whose data was left unread gets a reset in
        # place of our reason.
        if uid not in self._peer_uids:
            raise LinkError(f"user {uid} may not connect")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise LinkError("hello with more bytes or descriptors than one can have")
        hello = ram_link.decode_hello(message)
        vm = self._expected(hello)
        if vm.vtpm is not None and vm.vtpm.client_pid != pid:
            raise LinkError(f"VM {vm.name}: its QEMU is not who has its TPM")
        left.pop_all()
        left.callback(connection.close)
        # It owns the descriptors, also when it fails.
        link = await _aside(lambda: VmLink(hello, descriptors, pid))
        left.callback(link.close)
        observation, unmeasured = await _aside(lambda: look_at(vm, pid))
        # Had it been linked before, DRAM would hold old memory where this one's is untouched.
        stale = (
            Region(vm.region.base, vm.memory_bytes),
            Region(vm.region.end - vm.dimm_bytes, vm.dimm_bytes),
        )
        await self._requests.captures.save(*stale)
        if self._expected(hello) is not vm:
            raise LinkError(f"VM {hello.vm_uuid} is another by now")
        for region in stale:
            self._requests.dram.erase(region)
        path = self._data_path(vm, link)
        registers = self._register_page(vm, link)
        if vm.nvdimm is not None:
            await self._power_on_nvdimm(vm, hello, link, path)
        connection.send(ram_link.encode_answer())
        vm.link, vm.path, vm.connection = link, path, connection
        vm.observation, vm.unmeasured, vm.launch = observation, unmeasured, None
        vm.registers = registers
        vm.follower = asyncio.current_task()
        return vm

    async def _power_on_nvdimm(
        self, vm: Vm, hello: ram_link.Hello, link: VmLink, path: AnyDataPath
    ) -> None:
        """Give a VM that is about to be linked what its NVDIMM holds."""
        first_page, count = vm.nvdimm_pages
        if all(block.ram_offset != vm.memory_bytes for block in hello.blocks):
            raise LinkError(f"VM {vm.name} has no RAM block that is its NVDIMM")
        if link.holes(first_page, first_page + count) != [(first_page, first_page + count)]:
            raise LinkError(f"VM {vm.name}: its NVDIMM has contents before the engine gave it any")
        if isinstance(path, ShadowDataPath):
            for _ in path.load(first_page, count):
                await asyncio.sleep(0)
                # Its place in DRAM may be another's by now, which it must not read.
                if self._expected(hello) is not vm:
                    raise LinkError(f"VM {hello.vm_uuid} is another by now")
        if vm.nvdimm is not None:
            vm.nvdimm.set_clean(False)

    def _register_page(self, vm: Vm, link: VmLink) -> RegisterPage | None:
        if vm.visible != (link.registers is not None):
            raise LinkError(f"VM {vm.name} was announced to see registers, or not to, and differs")
        if not vm.visible:
            return None
        page = RegisterPage(link)
        self._requests.registers.show(page)
        return page

    def _data_path(self, vm: Vm, link: VmLink) -> AnyDataPath:
        controller = self._requests.controller
        if vm.datapath is DataPath.INLINE:
            window = Window(link.ram_pages, vm.window_bytes // PAGE_BYTES, vm.policy)
            return InlineDataPath(link, controller, vm.region, window)
        if vm.track is None or link.userfaultfd is not None:
            raise LinkError(f"VM {vm.name} was announced as a shadow VM, and is none")
        return ShadowDataPath(link, controller, vm.region, vm.track)

    def _expected(self, hello: ram_link.Hello) -> Vm:
        """The VM that a hello is for."""
        vm = self._requests.vms.get(hello.vm_uuid)
        if vm is None:
            raise LinkError(f"no VM {hello.vm_uuid} was announced to this engine")
        if vm.link is not None:
            raise LinkError(f"VM {hello.vm_uuid} is linked already")
        if hello.ram_bytes != vm.region.size_bytes:
            raise LinkError(
                f"VM {vm.name} has {hello.ram_bytes} bytes of RAM,"
                f" {vm.region.size_bytes} were announced"
            )
        return vm

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
                if kind is socket.SOCK_STREAM:
                    _refuse_descriptors(listener)
                listener.listen(_BACKLOG)
                listener.setblocking(False)
                yield listener
            finally:
                path.unlink(missing_ok=True)

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _reason(error: Exception) -> str:
    """Why a plugin is refused."""
    if isinstance(error, TimeoutError):
        return "no hello came in time"
    if isinstance(error, (MktmeError, OSError)):
        return str(error)
    log.error("hello failed: %s", type(error).__name__)  # a fault of ours, as in `_answer`
    return "the engine failed"


def _failure(error: MktmeError) -> wire.Failure:
    return wire.Failure(error=type(error).__name__, message=str(error), hint=error.hint)


def _refuse_descriptors(listener: socket.socket) -> None:
    """No descriptors for the connections of a listener: see `_aside` for what they can do."""
    with contextlib.suppress(OSError):  # ENOPROTOOPT: an older kernel
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def _receive_hello(connection: socket.socket) -> tuple[bytes, list[int], int]:
    message, descriptors, flags, _ = socket.recv_fds(
        connection,
        ram_link.HELLO_MAX_BYTES + 1,
        ram_link.MAX_DESCRIPTORS,
        socket.MSG_CMSG_CLOEXEC,
    )
    return message, descriptors, flags


def _aside(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Run in a thread of its own what may close a descriptor that a peer sent.

    Its maker decides how long that takes: a TCP socket may linger (socket(7), SO_LINGER), a file
    of FUSE waits for its server. What the kernel closes itself, as more than was asked for, or
    never received, it closes in the thread that received or closed the connection.
    """
    result: Future[_T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="mktme-aside", daemon=True).start()
    return asyncio.wrap_future(result)


async def _readable(connection: socket.socket) -> None:
    """Wait until a receive would not block (a message, or the end)."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
