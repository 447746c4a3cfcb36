# SPDX-License-Identifier: GPL-2.0-or-later
"""The link between a VM's QEMU and the engine: the plugin's hello and its descriptors.

The plugin (``qemu-plugin/ram_link.c``) sends one SOCK_SEQPACKET message with the layout of
``qemu-plugin/link_protocol.h``, and the descriptors beside it. The peer is only trusted with its
own VM, so each number is checked before it is used and each descriptor is shown to be what it
is said to be; whatever does not fit is a `LinkError`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.engine.errors import MktmeError
from mktme.engine.pages import runs_of_consecutive
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES

PROTOCOL_VERSION: Final = 1
MAX_BLOCKS: Final = 16
MAX_SEGMENTS: Final = 17
MAX_DESCRIPTORS: Final = MAX_BLOCKS + 4
MAX_VCPUS: Final = 4096

_HELLO: Final = struct.Struct("<8sHHHHHHI16sQIIQ")
_BLOCK: Final = struct.Struct("<QQ")
_SEGMENT: Final = struct.Struct("<QQQ")
_ANSWER: Final = struct.Struct("<8sHHHH")
_MAP_HEADER: Final = struct.Struct("<8sIIQQ")

HELLO_MAX_BYTES: Final = _HELLO.size + MAX_BLOCKS * _BLOCK.size + MAX_SEGMENTS * _SEGMENT.size
STORE_MAP_HEADER_BYTES: Final = 4096
_HELLO_MAGIC: Final = b"MKTMELNK"
_ANSWER_MAGIC: Final = b"MKTMEANS"
_MAP_MAGIC: Final = b"MKTMEMAP"
_REASON_MAX_BYTES: Final = 480

CAPABILITY_STORES: Final = 1 << 0
CAPABILITY_PAGES: Final = 1 << 1
CAPABILITY_FAULTS: Final = 1 << 2
CAPABILITY_REGISTERS: Final = 1 << 3
_KNOWN_CAPABILITIES: Final = (
    CAPABILITY_STORES | CAPABILITY_PAGES | CAPABILITY_FAULTS | CAPABILITY_REGISTERS
)

# x86 physical addresses have at most 52 bits (SDM vol. 3A, 4.1.4), user addresses 56 with LA57.
_PHYSICAL_LIMIT: Final = 1 << 52
_USER_LIMIT: Final = 1 << 56

# include/uapi/linux/fcntl.h; Python's fcntl module has these since 3.12 only for some.
_F_GET_SEALS: Final = 1034
_F_SEAL_SHRINK: Final = 0x0002
# linux/falloc.h
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_BLOCK_BYTES: Final = 512  # the unit of st_blocks (stat(2))

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class LinkError(MktmeError):
    """A hello that the engine refuses; the message is sent back and shown by QEMU."""


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One guest RAM block as QEMU has it mapped.

    Attributes:
        host_address: where QEMU's process has it, bytes.
        size_bytes: its size.
        ram_offset: its start in the concatenation of all blocks, bytes.
    """

    host_address: int
    size_bytes: int
    ram_offset: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of guest-physical addresses that one run of RAM offsets backs, all in bytes."""

    guest_physical: int
    ram_offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Hello:
    """What the plugin says of its VM, checked for consistency.

    Attributes:
        vm_uuid: which VM this is.
        plugin_api: the QEMU plugin API version that the plugin was built for.
        vcpus: the most vCPUs this VM can have.
        capabilities: `CAPABILITY_STORES`, and one of `CAPABILITY_PAGES` (the shadow data path)
            and `CAPABILITY_FAULTS` (inline) or neither; `CAPABILITY_REGISTERS` if the guest is
            to see the platform's registers.
        store_map_bytes: size of the store map's memfd with its header, 0 without one.
        blocks: guest RAM, in RAM offset order.
        segments: guest-physical to RAM offset, covering each RAM byte once.
    """

    vm_uuid: uuid.UUID
    plugin_api: int
    vcpus: int
    capabilities: int
    store_map_bytes: int
    blocks: tuple[RamBlock, ...]
    segments: tuple[Segment, ...]

    @property
    def ram_bytes(self) -> int:
        """Size of the guest's RAM in bytes."""
        return sum(block.size_bytes for block in self.blocks)

    @property
    def descriptor_count(self) -> int:
        """How many descriptors come with this hello."""
        count = len(self.blocks)
        if self.capabilities & CAPABILITY_FAULTS:
            count += 1
        if self.capabilities & CAPABILITY_PAGES:
            count += 2
        if self.capabilities & CAPABILITY_STORES:
            count += 1
        if self.capabilities & CAPABILITY_REGISTERS:
            count += 1
        return count


def encode_answer(refusal: str | None = None) -> bytes:
    """The engine's answer to a hello: accepted, or refused with a reason for the user."""
    reason = (refusal or "").encode()[:_REASON_MAX_BYTES]
    # A cut must not leave half a character: the other side prints it.
    reason = reason.decode(errors="ignore").encode()
    status = 0 if refusal is None else 1
    return _ANSWER.pack(_ANSWER_MAGIC, PROTOCOL_VERSION, status, len(reason), 0) + reason


def decode_hello(message: bytes) -> Hello:
    """Decode and check one hello.

    Raises:
        LinkError: it is malformed, of another version, or its ranges do not fit together.
    """
    if len(message) < _HELLO.size:
        raise LinkError(f"hello of {len(message)} bytes is shorter than its header")
    (
        magic,
        version,
        plugin_api,
        vcpus,
        block_count,
        segment_count,
        descriptor_count,
        capabilities,
        uuid_bytes,
        store_map_bytes,
        page_bytes,
        total_bytes,
        reserved,
    ) = _HELLO.unpack_from(message)
    if magic != _HELLO_MAGIC:
        raise LinkError("this is not a hello of the mktme plugin")
    if version != PROTOCOL_VERSION:
        raise LinkError(
            f"the plugin speaks link protocol {version}, this engine {PROTOCOL_VERSION}",
            hint="build the plugin from the same checkout: make setup",
        )
    if not 1 <= block_count <= MAX_BLOCKS or not 1 <= segment_count <= MAX_SEGMENTS:
        raise LinkError(f"hello with {block_count} RAM blocks and {segment_count} segments")
    expected = _HELLO.size + block_count * _BLOCK.size + segment_count * _SEGMENT.size
    if total_bytes != expected or len(message) != expected:
        raise LinkError(f"hello of {len(message)} bytes, {expected} expected")
    if page_bytes != PAGE_BYTES or reserved != 0 or capabilities & ~_KNOWN_CAPABILITIES:
        raise LinkError("hello with unknown capabilities, page size or reserved fields")
    if capabilities & CAPABILITY_PAGES and capabilities & CAPABILITY_FAULTS:
        raise LinkError("hello of a VM whose pages are tracked and faults served, both at once")
    if not 1 <= vcpus <= MAX_VCPUS:
        raise LinkError(f"hello with {vcpus} vCPUs")

    hello = Hello(
        vm_uuid=uuid.UUID(bytes=uuid_bytes),
        plugin_api=plugin_api,
        vcpus=vcpus,
        capabilities=capabilities,
        store_map_bytes=store_map_bytes,
        blocks=_decode_blocks(message, block_count),
        segments=_decode_segments(message, block_count, segment_count),
    )
    if descriptor_count != hello.descriptor_count:
        raise LinkError(
            f"hello announces {descriptor_count} descriptors, {hello.descriptor_count} expected"
        )
    _check_segments(hello)
    has_map = bool(capabilities & CAPABILITY_STORES)
    map_bytes = STORE_MAP_HEADER_BYTES + hello.ram_bytes // LINE_BYTES if has_map else 0
    if store_map_bytes != map_bytes:
        raise LinkError(f"store map of {store_map_bytes} bytes, {map_bytes} expected")
    return hello


def _decode_blocks(message: bytes, count: int) -> tuple[RamBlock, ...]:
    blocks: list[RamBlock] = []
    ram_offset = 0
    for index in range(count):
        host_address, size = _BLOCK.unpack_from(message, _HELLO.size + index * _BLOCK.size)
        if size == 0 or size % PAGE_BYTES or host_address == 0 or host_address % PAGE_BYTES:
            raise LinkError(f"RAM block {index} is not made of whole pages")
        if host_address + size > _USER_LIMIT or ram_offset + size > _PHYSICAL_LIMIT:
            raise LinkError(f"RAM block {index} lies outside any address space")
        blocks.append(RamBlock(host_address, size, ram_offset))
        ram_offset += size
    by_address = sorted(blocks, key=lambda block: block.host_address)
    for low, high in pairwise(by_address):
        if low.host_address + low.size_bytes > high.host_address:
            raise LinkError("RAM blocks overlap")
    return tuple(blocks)


def _decode_segments(message: bytes, block_count: int, count: int) -> tuple[Segment, ...]:
    start = _HELLO.size + block_count * _BLOCK.size
    segments = []
    for index in range(count):
        fields = _SEGMENT.unpack_from(message, start + index * _SEGMENT.size)
        if fields[2] == 0 or any(field % PAGE_BYTES for field in fields):
            raise LinkError(f"guest-physical segment {index} is not made of whole pages")
        if fields[0] + fields[2] > _PHYSICAL_LIMIT:
            raise LinkError(f"guest-physical segment {index} lies outside any address space")
        segments.append(Segment(*fields))
    return tuple(segments)


def _check_segments(hello: Hello) -> None:
    """Each RAM byte has exactly one guest-physical address, and none is used twice."""
    end = 0
    for segment in sorted(hello.segments, key=lambda item: item.ram_offset):
        if segment.ram_offset != end:
            raise LinkError("guest-physical segments do not cover the guest's RAM exactly once")
        end += segment.size_bytes
    if end != hello.ram_bytes:
        raise LinkError("guest-physical segments do not cover the guest's RAM exactly once")
    by_address = sorted(hello.segments, key=lambda item: item.guest_physical)
    for low, high in pairwise(by_address):
        if low.guest_physical + low.size_bytes > high.guest_physical:
            raise LinkError("guest-physical segments overlap")


@dataclass(frozen=True, slots=True)
class StoreMapCounters:
    """The plugin's own counts, summed over its vCPUs (``store_map.h``).

    Attributes:
        tlb_misses: stores whose page the micro-TLB did not hold.
        tlb_flushes: how often a vCPU's micro-TLB was emptied.
        tlb_checked: translations compared with QEMU's (``check-tlb=on`` only).
        tlb_errors: of these, how many differed.
    """

    tlb_misses: int
    tlb_flushes: int
    tlb_checked: int
    tlb_errors: int


class VmLink:
    """A VM whose hello was accepted: its RAM, its trackers' descriptors, its process.

    It owns the descriptors; `close` gives all of them back. RAM is only ever read with preadv:
    unlike a mapping this neither allocates a page that the guest gave back nor faults when a
    hostile QEMU shrinks the file. Nor is it written once the VM runs: `Userfaultfd` puts pages
    into it.

    Attributes:
        pagemap: QEMU's ``/proc/PID/pagemap``, if its pages are tracked.
        userfaultfd: what its faults come from, if they are served.
        registers: the page of `mktme.datapath.registers`, if its guest sees them.
    """

    def __init__(self, hello: Hello, descriptors: Sequence[int], qemu_pid: int) -> None:
        self.hello = hello
        self.qemu_pid = qemu_pid
        self._owned = list(descriptors)
        self._ram: list[int] = []
        self._ram_bytes = hello.ram_bytes
        self._ram_starts = [block.ram_offset for block in hello.blocks]
        self._by_host_address = sorted(hello.blocks, key=lambda block: block.host_address)
        self._host_starts = [block.host_address for block in self._by_host_address]
        self.pagemap: int | None = None
        self.userfaultfd: int | None = None
        self.registers: int | None = None
        self._map: npt.NDArray[np.uint8] | None = None
        try:
            if len(descriptors) != hello.descriptor_count:
                raise LinkError(
                    f"{len(descriptors)} descriptors came, {hello.descriptor_count} were announced"
                )
            remaining = list(descriptors)
            self._ram = [self._checked_ram(block, remaining.pop(0)) for block in hello.blocks]
            if hello.capabilities & CAPABILITY_FAULTS:
                self.userfaultfd = remaining.pop(0)
                self._check_target(self.userfaultfd, "anon_inode:[userfaultfd]")
            if hello.capabilities & CAPABILITY_PAGES:
                self._check_target(remaining.pop(0), "anon_inode:[userfaultfd]")
                self.pagemap = remaining.pop(0)
                self._check_target(self.pagemap, f"/proc/{qemu_pid}/pagemap")
            if hello.capabilities & CAPABILITY_STORES:
                self._map = self._checked_map(remaining.pop(0))
            if hello.capabilities & CAPABILITY_REGISTERS:
                self.registers = remaining.pop(0)
                if _seals(self.registers) is None:
                    raise LinkError("the register page's descriptor is not a memfd")
                if os.fstat(self.registers).st_size != PAGE_BYTES:
                    raise LinkError("the register page is not one page")
        except BaseException:
            self.close()
            raise

    @property
    def store_map(self) -> npt.NDArray[np.uint8] | None:
        """One byte a line, shape (RAM bytes / 64,), live: QEMU writes it while we look."""
        return None if self._map is None else self._map[STORE_MAP_HEADER_BYTES:]

    @property
    def ram_pages(self) -> int:
        """Guest RAM in 4 KiB pages."""
        return self._ram_bytes // PAGE_BYTES

    def counters(self) -> StoreMapCounters | None:
        """The plugin's own counts so far, None without a store map."""
        if self._map is None:
            return None
        slots = self._map[64 : 64 + 64 * 32].view(np.uint64).reshape(64, 4).sum(axis=0)
        return StoreMapCounters(*(int(value) for value in slots))

    def read_into(self, ram_offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) with guest RAM from `ram_offset` on; holes read as zeros.

        Raises:
            LinkError: the RAM is not there any more.
        """
        filled = 0
        while filled < len(buffer):
            block, descriptor = self._block_at(ram_offset + filled)
            within = ram_offset + filled - block.ram_offset
            part = buffer[filled : filled + block.size_bytes - within]
            count = os.preadv(descriptor, [part], within)
            if count <= 0:
                raise LinkError(f"guest RAM ends at offset {ram_offset + filled:#x}")
            filled += count

    def write(self, ram_offset: int, data: memoryview) -> None:
        """Write guest RAM, all in one block, of a VM that does not run yet.

        Raises:
            LinkError, OSError: QEMU does not let it be written.
        """
        block, descriptor = self._block_at(ram_offset)
        if os.pwrite(descriptor, data, ram_offset - block.ram_offset) != len(data):
            raise LinkError(f"guest RAM at offset {ram_offset:#x} cannot be written")

    def read_pages_into(self, pages: npt.NDArray[np.int64], buffer: npt.NDArray[np.uint64]) -> None:
        """As `read_into`, of pages here and there.

        Args:
            pages: their numbers, ascending, shape (n,).
            buffer: shape (n, 512), C-contiguous.
        """
        for start, stop in runs_of_consecutive(pages):
            part = memoryview(buffer[start:stop].data).cast("B")
            self.read_into(int(pages[start]) * PAGE_BYTES, part)

    def holes(self, first_page: int, last_page: int) -> list[tuple[int, int]]:
        """Runs of pages [start, stop) within [first_page, last_page) with no memory behind."""
        runs: list[tuple[int, int]] = []
        position = first_page * PAGE_BYTES
        end = last_page * PAGE_BYTES
        while position < end:
            block, descriptor = self._block_at(position)
            block_end = min(end, block.ram_offset + block.size_bytes)
            hole = _seek(descriptor, position - block.ram_offset, os.SEEK_HOLE, block)
            if hole < block_end:
                data = min(
                    block_end, _seek(descriptor, hole - block.ram_offset, os.SEEK_DATA, block)
                )
                runs.append((hole // PAGE_BYTES, -(-data // PAGE_BYTES)))
                position = data
            else:
                position = block_end
        return runs

    def runs_of_data(self) -> list[tuple[int, int]]:
        """Runs of pages [start, stop), ascending, that have memory behind them."""
        edges = [0, *(page for hole in self.holes(0, self.ram_pages) for page in hole)]
        pairs = zip(edges[::2], [*edges[1::2], self.ram_pages], strict=True)
        return [(start, stop) for start, stop in pairs if start < stop]

    def allocated_bytes(self) -> int:
        """Memory behind the VM's RAM in bytes, by the kernel's own account (swap included).

        Raises:
            LinkError: the link is closed.
        """
        self.check_open()
        return sum(os.fstat(descriptor).st_blocks for descriptor in self._ram) * _BLOCK_BYTES

    def punch(self, first_page: int, count: int) -> None:
        """Take pages out of memory: whoever needs one next faults.

        Raises:
            LinkError: they are not all in the guest's RAM, or QEMU sealed it.
        """
        offset = first_page * PAGE_BYTES
        end = offset + count * PAGE_BYTES
        while offset < end:
            block, descriptor = self._block_at(offset)
            within = offset - block.ram_offset
            size = min(end - offset, block.size_bytes - within)
            flags = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
            if _libc.fallocate(descriptor, flags, within, size):
                reason = os.strerror(ctypes.get_errno())
                raise LinkError(f"guest RAM at offset {offset:#x} stays in memory: {reason}")
            offset += size

    def host_address(self, page: int) -> int:
        """Where QEMU has a page of RAM mapped."""
        block, _descriptor = self._block_at(page * PAGE_BYTES)
        return block.host_address + page * PAGE_BYTES - block.ram_offset

    def pages_to_block_end(self, page: int) -> int:
        """How many pages, this one included, are neighbours in QEMU's address space as in RAM."""
        block, _descriptor = self._block_at(page * PAGE_BYTES)
        return (block.ram_offset + block.size_bytes) // PAGE_BYTES - page

    def page_of(self, host_address: int) -> int:
        """Which page of RAM QEMU has at an address.

        Raises:
            LinkError: none.
        """
        index = bisect_right(self._host_starts, host_address) - 1
        if index >= 0:
            block = self._by_host_address[index]
            within = host_address - block.host_address
            if within < block.size_bytes:
                return (block.ram_offset + within) // PAGE_BYTES
        raise LinkError(f"QEMU has no guest RAM at {host_address:#x}")

    def close(self) -> None:
        """Give back every descriptor; the store map's memory goes with its last view."""
        self._map = None
        self._ram = []
        self.pagemap = None
        self.userfaultfd = None
        self.registers = None
        while self._owned:
            os.close(self._owned.pop())

    def check_open(self) -> None:
        """Raise a `LinkError` once the link is closed: its descriptors' numbers may be others'."""
        if not self._ram:
            raise LinkError("the VM is gone")

    def _block_at(self, ram_offset: int) -> tuple[RamBlock, int]:
        self.check_open()
        index = bisect_right(self._ram_starts, ram_offset) - 1
        if index >= 0 and ram_offset < self._ram_bytes:
            return self.hello.blocks[index], self._ram[index]
        raise LinkError(f"RAM offset {ram_offset:#x} is outside the guest's RAM")

    @staticmethod
    def _checked_ram(block: RamBlock, descriptor: int) -> int:
        if _seals(descriptor) is None:
            raise LinkError("a RAM block's descriptor is not a memfd")
        size = os.fstat(descriptor).st_size
        if size != block.size_bytes:
            raise LinkError(f"a RAM block of {block.size_bytes} bytes has {size}")
        return descriptor

    @staticmethod
    def _check_target(descriptor: int, expected: str) -> None:
        target = _target(descriptor)
        if target != expected:
            raise LinkError(f"a descriptor that should be {expected} is {target}")

    def _checked_map(self, descriptor: int) -> npt.NDArray[np.uint8]:
        size = self.hello.store_map_bytes
        seals = _seals(descriptor)
        if seals is None or os.fstat(descriptor).st_size != size:
            raise LinkError("the store map's descriptor is not a memfd of the announced size")
        # Without this seal the other side could shrink the file under our mapping: SIGBUS.
        if not seals & _F_SEAL_SHRINK:
            raise LinkError("the store map is not sealed against shrinking")
        # np.memmap takes a file object; it dups nothing, the mapping outlives the descriptor.
        with os.fdopen(os.dup(descriptor), "r+b") as file:
            mapped: npt.NDArray[np.uint8] = np.memmap(
                file, dtype=np.uint8, mode="r+", shape=(size,)
            )
        magic, version, _vcpus, lines, header_bytes = _MAP_HEADER.unpack_from(
            mapped[: _MAP_HEADER.size].tobytes()
        )
        if (magic, version, header_bytes) != (_MAP_MAGIC, 1, STORE_MAP_HEADER_BYTES):
            raise LinkError("the store map has no header that this engine knows")
        if lines != self.hello.ram_bytes // LINE_BYTES:
            raise LinkError(f"the store map is for {lines} lines, RAM has another number")
        return mapped


def _target(descriptor: int) -> str:
    """What a descriptor refers to, as the kernel names it (proc(5), /proc/PID/fd)."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _seals(descriptor: int) -> int | None:
    """A memfd's seals (fcntl(2), F_GET_SEALS), None if it is no memfd.

    The name alone does not tell: that of a file in a mount which was taken away looks the same,
    and a file of FUSE, say, could keep the engine waiting for ever.
    """
    if not _target(descriptor).startswith("/memfd:"):
        return None
    try:
        return fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError:  # EINVAL: not memory
        return None


def _seek(descriptor: int, within: int, whence: int, block: RamBlock) -> int:
    """SEEK_DATA and SEEK_HOLE (lseek(2)) in RAM offsets; no more data is the block's end."""
    try:
        return block.ram_offset + os.lseek(descriptor, within, whence)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return block.ram_offset + block.size_bytes
