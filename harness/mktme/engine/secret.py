# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for keys: out of swap and core dumps and, where the kernel can, out of its own reach.

The best there is is memfd_secret(2), Linux 5.14 (mm/secretmem.c): such pages are locked, and gone
from the kernel's direct map. So the kernel's ways to another process's memory (``/proc/PID/mem``,
ptrace(2), process_vm_readv(2)) fail on them, for root too. One cannot hibernate a machine while
a process holds some. Next is ordinary memory that is locked (mlock(2)) and left out of core dumps
(MADV_DONTDUMP). Where RLIMIT_MEMLOCK refuses that too, it stays unlocked, and a warning is logged.

None of it is for forked children: they have no such mapping (MADV_DONTFORK), so a child that
touches a parent's buffer dies of SIGSEGV. It may make buffers of its own.

What Python adds: a `memoryview` of a buffer shows the memory itself, but ``bytes(view)``, a
slice of a ``bytes`` object or an int made from several bytes is a copy in ordinary memory that
nobody wipes.

Single-threaded.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import mmap
import os
import resource
import weakref
from contextlib import suppress
from typing import Final, NoReturn, Self

_MEMFD_SECRET: Final = 447  # memfd_secret(2), include/uapi/asm-generic/unistd.h
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
# Small, because it counts against RLIMIT_MEMLOCK as a whole; that is 8 MiB by default.
_CHUNK_BYTES: Final = 64 << 10
_SLOT_ALIGN_BYTES: Final = 16

log = logging.getLogger(__name__)


class KeyMemory(enum.Enum):
    """What kind of memory keys are in, the best first; the value is the name users see."""

    SECRET = "memfd_secret"
    """Locked, and not even in the kernel's direct map."""
    LOCKED = "mlock"
    """Out of swap and core dumps; root can read it."""
    PAGEABLE = "pageable"
    """Out of core dumps; it may get into swap."""


class SecretBuffer:
    """Bytes of a secret; `allocate` makes one. A context manager, which wipes it at its end.

    A buffer that goes with no `wipe` is wiped when the last view of it goes.
    """

    __slots__ = ("_address", "_arena", "_size_bytes", "_view")

    def __init__(self, arena: _Arena, size_bytes: int) -> None:
        self._arena: _Arena | None = arena  # None once wiped
        self._size_bytes = size_bytes
        self._address, self._view = arena.allocate(size_bytes)

    @property
    def view(self) -> memoryview:
        """The memory: writable, format "B", `len(self)` bytes.

        Raises:
            ValueError: it was wiped.
        """
        # A released memoryview raises this itself, but at its first use only.
        if self._arena is None:
            raise ValueError("this secret was wiped")
        return self._view

    def wipe(self) -> None:
        """Overwrite the secret with zeros and give the memory back; again does nothing.

        `view` is released: its every use raises ValueError. A slice of it or an array on it that
        somebody kept shows zeros, and the memory is not used again while there is one.
        """
        if self._arena is None:
            return
        self._arena.zero(self._address, self._size_bytes)
        self._arena = None
        with suppress(BufferError):  # there is an array on it
            self._view.release()

    def __len__(self) -> int:
        return self._size_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return f"<SecretBuffer {self._size_bytes} bytes>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretBuffer holds a secret and cannot be pickled or copied")


def allocate(size_bytes: int) -> SecretBuffer:
    """Make a buffer of zeros for a secret.

    Args:
        size_bytes: its size, at least 1.

    Raises:
        ValueError: the size is not positive.
        OSError: there is no more memory.
    """
    if size_bytes <= 0:
        raise ValueError(f"a secret has at least 1 byte, not {size_bytes}")
    return SecretBuffer(_own_arena(), size_bytes)


def scrub(secret: bytes) -> None:
    """Overwrite a secret that a library gave as an object that cannot be written to.

    For what pyca returns and has no other way to return. The object still exists, with zeros in
    it, so nobody may use it any more; what the library itself copied is not reached.

    Args:
        secret: at least 2 bytes: CPython has each shorter object once for all its users.
    """
    if len(secret) < 2:
        raise ValueError("an object of less than 2 bytes is not ours alone")
    ctypes.memset(ctypes.cast(ctypes.c_char_p(secret), ctypes.c_void_p), 0, len(secret))


def key_memory() -> KeyMemory:
    """What kind of memory this process got for secrets: of all of it, the worst.

    Raises:
        OSError: there is no memory.
    """
    return _own_arena().kind()


class _Arena:
    """A process's memory for secrets, in slots; it grows in chunks and never shrinks."""

    def __init__(self) -> None:
        self.pid: Final = os.getpid()
        self._kinds: list[KeyMemory] = []  # of each chunk
        # What is left of the newest chunk.
        self._next = 0
        self._end = 0
        self._free: dict[int, list[int]] = {}  # addresses, by slot size

    def allocate(self, size_bytes: int) -> tuple[int, memoryview]:
        """A slot of zeros: its address and the one view of it."""
        slot_bytes = _round_up(size_bytes, _SLOT_ALIGN_BYTES)
        free = self._free.get(slot_bytes)
        address = free.pop() if free else self._take(slot_bytes)
        # Every view of the slot, slices too, keeps this object alive. So when it goes, nobody
        # can reach the slot any more.
        slot = (ctypes.c_ubyte * size_bytes).from_address(address)
        weakref.finalize(slot, self._give_back, address, slot_bytes)
        return address, memoryview(slot).cast("B")

    def zero(self, address: int, size_bytes: int) -> None:
        """Overwrite; in a forked child, which has no such memory, do nothing."""
        if self.pid == os.getpid():
            ctypes.memset(address, 0, size_bytes)

    def kind(self) -> KeyMemory:
        """The worst of what the chunks are."""
        if not self._kinds:
            self._grow(_CHUNK_BYTES)
        return max(self._kinds, key=list(KeyMemory).index)

    def _take(self, slot_bytes: int) -> int:
        if self._end - self._next < slot_bytes:
            self._grow(_round_up(slot_bytes, _CHUNK_BYTES))
        address = self._next
        self._next += slot_bytes
        return address

    def _give_back(self, address: int, slot_bytes: int) -> None:
        self.zero(address, slot_bytes)
        self._free.setdefault(slot_bytes, []).append(address)

    def _grow(self, size_bytes: int) -> None:
        address, kind = _map_chunk(size_bytes)
        if kind is KeyMemory.PAGEABLE and kind not in self._kinds:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            log.warning("keys may be swapped out: RLIMIT_MEMLOCK is %d bytes", limit)
        self._kinds.append(kind)
        self._next, self._end = address, address + size_bytes


_arena = _Arena()


def _own_arena() -> _Arena:
    global _arena
    if _arena.pid != os.getpid():
        _arena = _Arena()
    return _arena


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def _map_chunk(size_bytes: int) -> tuple[int, KeyMemory]:
    """Map zeros for secrets: the address, and the best kind that this process may have."""
    kind = KeyMemory.SECRET
    address = _map_secret(size_bytes)
    if address is None:
        address = _mmap(size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        if address is None:
            _raise_errno()
        locked = _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes)) == 0
        kind = KeyMemory.LOCKED if locked else KeyMemory.PAGEABLE
        _madvise(address, size_bytes, mmap.MADV_DONTDUMP)
    _madvise(address, size_bytes, mmap.MADV_DONTFORK)
    return address, kind


def _map_secret(size_bytes: int) -> int | None:
    """Map memfd_secret memory; None when there is none, or RLIMIT_MEMLOCK allows no more."""
    descriptor = _libc.syscall(_MEMFD_SECRET, os.O_CLOEXEC)
    if descriptor < 0:
        return None
    # Not Python's mmap, which keeps a descriptor: whoever got that (root can, by pidfd_getfd(2))
    # could map the memory.
    try:
        os.ftruncate(descriptor, size_bytes)
        return _mmap(size_bytes, mmap.MAP_SHARED, descriptor)
    finally:
        os.close(descriptor)


def _mmap(size_bytes: int, flags: int, descriptor: int) -> int | None:
    address: int | None = _libc.mmap(
        None,
        ctypes.c_size_t(size_bytes),
        mmap.PROT_READ | mmap.PROT_WRITE,
        flags,
        descriptor,
        ctypes.c_long(0),
    )
    return None if address == _MAP_FAILED else address


def _madvise(address: int, size_bytes: int, advice: int) -> None:
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), advice):
        _raise_errno()


def _raise_errno() -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
