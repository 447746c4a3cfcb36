# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU with the plugin is to the engine, without either: memory, trackers, and a hello.

The memory is real (memfds under a real userfaultfd), and so are the descriptors that go over the
socket. With `faults`, whoever touches a page waits until it is served: in another thread, or from
another process. The hello is packed here from the layout of ``qemu-plugin/link_protocol.h``, not
with the engine's own definitions.

Run as a program it is a VM in a process of its own::

    fake_qemu.py LINK_SOCKET VM_UUID PAGES CANARY_HEX
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import mmap
import os
import socket
import struct
import sys
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mktme.datapath.shadow import Track
from mktme.datapath.uffd import (
    open_fault_handling,
    open_write_tracking,
    register_fault_handling,
    register_write_tracking,
)

PAGE: Final = 4096
LINE: Final = 64
GIB: Final = 1 << 30
MAP_HEADER: Final = 4096
DEADLINE_S: Final = 20.0

STORES: Final = 1
PAGES: Final = 2
FAULTS: Final = 4
REGISTERS: Final = 8

VM: Final = uuid.UUID("6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11")

_ANSWER: Final = struct.Struct("<8sHHHH")
# include/uapi/linux/fcntl.h, linux/falloc.h
_F_ADD_SEALS: Final = 1033
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW = 1, 2, 4
_PUNCH_HOLE_KEEP_SIZE: Final = 3
_MADV_DONTNEED: Final = 4
_UNREGISTER: Final = 0x8010AA01  # UFFDIO_UNREGISTER

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class HelloFields:
    """A good hello of one page of RAM unless told otherwise; what is None follows from the rest."""

    magic: bytes = b"MKTMELNK"
    version: int = 1
    plugin_api: int = 4
    vcpus: int = 1
    block_count: int | None = None
    segment_count: int | None = None
    descriptor_count: int | None = None
    capabilities: int = STORES | PAGES
    vm: uuid.UUID = VM
    store_map_bytes: int | None = None
    page_bytes: int = PAGE
    total_bytes: int | None = None
    reserved: int = 0
    blocks: tuple[tuple[int, int], ...] = ((0x7F00_0000_0000, PAGE),)
    """(host address, size)"""
    segments: tuple[tuple[int, int, int], ...] | None = None
    """(guest-physical address, RAM offset, size); None for one that is all RAM at 0"""

    def encode(self) -> bytes:
        """The message."""
        ram_bytes = sum(size for _address, size in self.blocks)
        segments = ((0, 0, ram_bytes),) if self.segments is None else self.segments
        has_map = bool(self.capabilities & STORES)
        tail = b"".join(struct.pack("<QQ", *block) for block in self.blocks)
        tail += b"".join(struct.pack("<QQQ", *segment) for segment in segments)
        descriptors = len(self.blocks) + has_map + 2 * bool(self.capabilities & PAGES)
        descriptors += bool(self.capabilities & FAULTS) + bool(self.capabilities & REGISTERS)
        map_bytes = MAP_HEADER + ram_bytes // LINE if has_map else 0
        head = struct.pack(
            "<8sHHHHHHI16sQIIQ",
            self.magic,
            self.version,
            self.plugin_api,
            self.vcpus,
            _or(self.block_count, len(self.blocks)),
            _or(self.segment_count, len(segments)),
            _or(self.descriptor_count, descriptors),
            self.capabilities,
            self.vm.bytes,
            _or(self.store_map_bytes, map_bytes),
            self.page_bytes,
            _or(self.total_bytes, 64 + len(tail)),
            self.reserved,
        )
        return head + tail


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


@dataclass(frozen=True)
class Answer:
    """The engine's answer to a hello."""

    accepted: bool
    reason: str


def parse_answer(message: bytes) -> Answer:
    """Take the engine's answer apart; it must be exactly as link_protocol.h has it."""
    magic, version, status, reason_bytes, reserved = _ANSWER.unpack_from(message)
    assert (magic, version, reserved) == (b"MKTMEANS", 1, 0)
    assert len(message) == _ANSWER.size + reason_bytes
    return Answer(status == 0, message[_ANSWER.size :].decode())


def say_hello(link_socket: Path, hello: bytes, descriptors: Sequence[int]) -> socket.socket:
    """Connect and send a hello; the answer is the caller's to receive."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(DEADLINE_S)
    try:
        connection.connect(str(link_socket))
        socket.send_fds(connection, [hello], list(descriptors))
    except BaseException:
        connection.close()
        raise
    return connection


class FakeQemu:
    """A VM's memory with both trackers on it; a context manager.

    Whatever touches memory here lets other threads run meanwhile (no method holds Python's global
    lock then): one of them may have to serve the fault.

    Args:
        block_pages: size of each RAM block in pages.
        segments: guest-physical to RAM offset; None for all RAM at 0.
        track: what the plugin was told to track.
        faults: the inline data path: faults are to be served, and pages are not tracked.
        visible: whether there is a page for the platform's registers.
        vm: which VM this is.
    """

    def __init__(
        self,
        block_pages: Sequence[int] = (64,),
        *,
        segments: tuple[tuple[int, int, int], ...] | None = None,
        track: Track = Track.STORES_AND_PAGES,
        faults: bool = False,
        visible: bool = False,
        vm: uuid.UUID | None = None,
    ) -> None:
        self.vm = vm or uuid.uuid4()
        self.ram_bytes = sum(block_pages) * PAGE
        self.descriptors: list[int] = []
        self.memory: list[mmap.mmap] = []
        """The mapped blocks. A thread that touches them here holds up all others of the process."""
        self._stack = ExitStack()
        with ExitStack() as stack:
            # Whoever looks into a QEMU takes its blocks in the order of their descriptors.
            self.ram = sorted(_memfd(stack) for _ in block_pages)
            blocks = [
                self._map_block(stack, descriptor, pages * PAGE)
                for descriptor, pages in zip(self.ram, block_pages, strict=True)
            ]
            self.descriptors += self.ram
            if faults:
                uffd = open_fault_handling()
                stack.callback(os.close, uffd)
                for address, size in blocks:
                    register_fault_handling(uffd, address, size)
                self.descriptors.append(uffd)
            elif track.pages:
                uffd = open_write_tracking()
                stack.callback(os.close, uffd)
                for address, size in blocks:
                    register_write_tracking(uffd, address, size)
                pagemap = os.open(f"/proc/{os.getpid()}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, pagemap)
                self.descriptors += [uffd, pagemap]
            self._map: mmap.mmap | None = None
            if track.stores:
                descriptor = make_store_map(self.ram_bytes)
                stack.callback(os.close, descriptor)
                self._map = mmap.mmap(descriptor, 0)
                stack.callback(self._map.close)
                self.descriptors.append(descriptor)
            if visible:
                self.register_page = make_register_page()
                stack.callback(os.close, self.register_page)
                self.descriptors.append(self.register_page)
            self._stack = stack.pop_all()
        self._blocks = blocks
        capabilities = STORES * track.stores | (FAULTS if faults else PAGES * track.pages)
        capabilities |= REGISTERS * visible
        self.hello = HelloFields(
            vm=self.vm,
            capabilities=capabilities,
            blocks=tuple(blocks),
            segments=segments,
        )

    def _map_block(self, stack: ExitStack, descriptor: int, size: int) -> tuple[int, int]:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        stack.callback(memory.close)
        self.memory.append(memory)
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        del anchor  # else the mapping could not be closed
        return address, size

    # --- what the guest and its devices do ----------------------------------------------------

    def dma(self, ram_offset: int, data: bytes) -> None:
        """Write as a device does: the plugin sees nothing of it."""
        ctypes.memmove(self.address(ram_offset, len(data)), data, len(data))

    def receive(self, ram_offset: int, data: bytes) -> None:
        """Have a system call write, as a device with something to receive does."""
        reader, writer = os.pipe()
        try:
            os.write(writer, data)
            where = (ctypes.c_char * len(data)).from_address(self.address(ram_offset, len(data)))
            assert os.readv(reader, [where]) == len(data)
        finally:
            os.close(reader)
            os.close(writer)

    def load(self, ram_offset: int, size_bytes: int) -> bytes:
        """Read as a vCPU does."""
        buffer = ctypes.create_string_buffer(size_bytes)
        ctypes.memmove(buffer, self.address(ram_offset, size_bytes), size_bytes)
        return buffer.raw

    def store(self, ram_offset: int, data: bytes) -> None:
        """Write as a vCPU does: data first, then the mark, as the plugin's callback has it."""
        self.dma(ram_offset, data)
        self.mark(ram_offset, len(data))

    def mark(self, ram_offset: int, size_bytes: int = 1) -> None:
        """Mark lines in the store map."""
        assert self._map is not None
        for line in range(ram_offset // LINE, (ram_offset + size_bytes - 1) // LINE + 1):
            self._map[MAP_HEADER + line] = 1

    def marks(self) -> bytes:
        """The store map, one byte a line."""
        assert self._map is not None
        return self._map[MAP_HEADER:]

    def set_counters(self, vcpu: int, *counters: int) -> None:
        """What the plugin counted on one vCPU: misses, flushes, checked, errors."""
        assert self._map is not None
        struct.pack_into("<4Q", self._map, 64 + 32 * vcpu, *counters)

    def punch(self, first_page: int, count: int = 1) -> None:
        """Give pages back as QEMU's balloon does (system/physmem.c, ram_block_discard_range)."""
        block, within = self._at(first_page * PAGE)
        address = self.address(first_page * PAGE, count * PAGE)
        punch_hole(self.ram[block], within, count * PAGE)
        if _libc.madvise(address, count * PAGE, _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")

    def touch(self, page: int) -> int:
        """Read a page's first byte."""
        return self.load(page * PAGE, 1)[0]

    def let_go(self) -> None:
        """No fault is to be served any more: who waits for one goes on, with zeros."""
        for address, size in self._blocks:
            fcntl.ioctl(
                self.descriptors[len(self.ram)], _UNREGISTER, struct.pack("<QQ", address, size)
            )

    def contents(self) -> bytes:
        """All RAM, in RAM offset order; read without touching a page."""
        return b"".join(os.pread(one, os.fstat(one).st_size, 0) for one in self.ram)

    def address(self, ram_offset: int, size_bytes: int = 1) -> int:
        """Where some RAM is mapped, in one piece."""
        block, within = self._at(ram_offset)
        address, size = self._blocks[block]
        assert within + size_bytes <= size, "not in one piece"
        return address + within

    def _at(self, ram_offset: int) -> tuple[int, int]:
        for index, (_address, size) in enumerate(self._blocks):
            if ram_offset < size:
                return index, ram_offset
            ram_offset -= size
        raise AssertionError("outside RAM")

    # --- the link -----------------------------------------------------------------------------

    def connect(self, link_socket: Path) -> Answer:
        """Say hello; after it is accepted `connection` is the link."""
        connection = say_hello(link_socket, self.hello.encode(), self.descriptors)
        self._stack.callback(connection.close)
        answer = parse_answer(connection.recv(4096))
        if answer.accepted:
            self.connection = connection
        return answer

    def link(self, link_socket: Path) -> None:
        """As `connect`, and the engine must accept."""
        assert self.connect(link_socket) == Answer(True, "")

    def dups(self) -> list[int]:
        """Copies of the descriptors, for whoever takes them over."""
        return [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 0) for one in self.descriptors]

    def close(self) -> None:
        """End, as QEMU's end would be."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _memfd(stack: ExitStack) -> int:
    descriptor = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def make_store_map(
    ram_bytes: int,
    *,
    seals: int = SEAL_SHRINK | SEAL_GROW | SEAL_SEAL,
    header: dict[str, object] | None = None,
) -> int:
    """A store map as ``qemu-plugin/store_map.c`` makes it, or with another header or seals."""
    fields = {
        "magic": b"MKTMEMAP",
        "version": 1,
        "vcpus": 1,
        "line_count": ram_bytes // LINE,
        "header_bytes": MAP_HEADER,
    } | (header or {})
    descriptor = os.memfd_create("mktme-store-map", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, MAP_HEADER + ram_bytes // LINE)
    os.pwrite(descriptor, struct.pack("<8sIIQQ", *fields.values()), 0)
    fcntl.fcntl(descriptor, _F_ADD_SEALS, seals)
    return descriptor


def make_register_page(size_bytes: int = PAGE) -> int:
    """A register page as ``qemu-plugin/ram_link.c`` makes it, or of another size."""
    descriptor = os.memfd_create("mktme-registers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, _F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW | SEAL_SEAL)
    return descriptor


def punch_hole(descriptor: int, start: int, size_bytes: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE, which Python's os module does not have."""
    if _libc.fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, start, size_bytes):
        raise OSError(ctypes.get_errno(), "fallocate")


def small_hello(**fields: object) -> bytes:
    """A hello that differs from a good one in some fields."""
    return dataclasses.replace(HelloFields(), **fields).encode()  # type: ignore[arg-type]


def main() -> None:
    """Hold a canary on page 3, link, say so, and stay until standard input ends."""
    link_socket, vm, pages, canary = sys.argv[1:]
    with FakeQemu((int(pages),), vm=uuid.UUID(vm)) as qemu:
        qemu.store(3 * PAGE, bytes.fromhex(canary))
        qemu.link(Path(link_socket))
        print("linked", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
