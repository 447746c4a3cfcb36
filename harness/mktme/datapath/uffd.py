# SPDX-License-Identifier: GPL-2.0-or-later
"""userfaultfd from Python (include/uapi/linux/userfaultfd.h): serving faults, tracking writes.

The plugin makes the userfaultfd of a VM (``qemu-plugin/userfaultfd.c``), and the engine serves it
from outside QEMU. What is made here is for memory of our own: to show what this kernel and user
can do.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import select
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from mktme.datapath.link import RamBlock
from mktme.datapath.pages import PageTracker
from mktme.engine.errors import MktmeError
from mktme.engine.xts import PAGE_BYTES

DEVICE: Final = Path("/dev/userfaultfd")
FEATURE_EVENT_REMOVE: Final = 1 << 3
FEATURE_MISSING_SHMEM: Final = 1 << 5
FEATURE_EXACT_ADDRESS: Final = 1 << 11
FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
FEATURE_WP_UNPOPULATED: Final = 1 << 13
FEATURE_WP_ASYNC: Final = 1 << 15
FAULT_FEATURES: Final = (
    FEATURE_EVENT_REMOVE
    | FEATURE_MISSING_SHMEM
    | FEATURE_EXACT_ADDRESS
    | FEATURE_WP_HUGETLBFS_SHMEM
)

_NEW: Final = 0xAA00  # USERFAULTFD_IOC_NEW
_API: Final = 0xC018AA3F  # UFFDIO_API
_REGISTER: Final = 0xC020AA00  # UFFDIO_REGISTER
_WAKE: Final = 0x8010AA02  # UFFDIO_WAKE
_COPY: Final = 0xC028AA03  # UFFDIO_COPY
_ZEROPAGE: Final = 0xC020AA04  # UFFDIO_ZEROPAGE
_WRITEPROTECT: Final = 0xC018AA06  # UFFDIO_WRITEPROTECT
_API_VERSION: Final = 0xAA
_REGISTER_MODE_MISSING: Final = 1 << 0
_REGISTER_MODE_WP: Final = 1 << 1
_FILL_DONTWAKE: Final = 1 << 0
_COPY_WP: Final = 1 << 1
_WRITEPROTECT_WP: Final = 1 << 0
_WRITEPROTECT_DONTWAKE: Final = 1 << 1
_SYSCALL_NUMBER: Final = 323  # userfaultfd(2) on x86-64
_USER_MODE_ONLY: Final = 1

_MESSAGE: Final = struct.Struct("<B7xQQ8x")  # struct uffd_msg: event, then what depends on it
_MESSAGES: Final = 64
_EVENT_PAGEFAULT: Final = 0x12
_PAGEFAULT_WRITE: Final = 1 << 0
_PAGEFAULT_WP: Final = 1 << 1
_RANGE: Final = struct.Struct("<QQ")  # struct uffdio_range
_COPY_ARG: Final = struct.Struct("<QQQQq")  # dst, src, len, mode, copy
_ZERO_ARG: Final = struct.Struct("<QQQq")  # start, len, mode, zeropage
_PROTECT_ARG: Final = struct.Struct("<QQQ")  # start, len, mode
_RESULT: Final = struct.Struct("<q")

_FDINFO_FEATURES: Final = re.compile(r"^API:\s*[0-9a-f]+:([0-9a-f]+):", re.M)
_INITIALIZED: Final = 1 << 31  # fs/userfaultfd.c has it among the features
# For a host with much else to do. It is a matter of microseconds otherwise.
_SETTLE_TIMEOUT_S: Final = 5.0
_PROBE_TIMEOUT_S: Final = 5.0


class WriteTrackingError(MktmeError):
    """The kernel does not track writes to shared memory for this user."""


class FaultServiceError(MktmeError):
    """Page faults cannot be served: by this user on this kernel, or those of one VM."""


class GuestGoneError(FaultServiceError):
    """There is no QEMU behind the userfaultfd any more, or no memory where it was."""


class Fault(NamedTuple):
    """A thread of QEMU that waits for a page, until it is served or woken.

    Attributes:
        address: what it accesses, in QEMU's address space; not rounded to the page.
        write: whether it is about to write.
        protected: whether the page is there but write-protected; else it is missing.
    """

    address: int
    write: bool
    protected: bool


class Removed(NamedTuple):
    """A thread of QEMU that gives back [start, end); it went on when this was read.

    It calls madvise(2), the second half of what QEMU does for a balloon or free page reporting
    (system/physmem.c, ram_block_discard_range). The first half, a hole punched into the RAM's
    memfd, is not announced and came before. So pages that were in memory are holes by now, and a
    fault on one of them may have been read before this; pages that were put there meanwhile still
    are. `VmLink.runs_of_data` tells.

    Attributes:
        start: first address.
        end: the address after the last.
    """

    start: int
    end: int


Event = Fault | Removed


class Userfaultfd:
    """Serves the page faults of one VM.

    Waiting for events is for the caller: the descriptor is readable (POLLIN) when there are any.
    Call `read` until it returns none first, since some may be here already. POLLERR means that
    somebody made the descriptor a blocking one: an honest QEMU does not.

    Between QEMU's madvise(2) and its going on, after the `Removed` was read, the kernel changes
    nothing about the VM's memory. The methods that do then read events, for `read` to return
    later, and try again.

    For one thread at a time: the buffers are made once, a fault should cost as little as it can.

    Args:
        descriptor: as the plugin made it, or `open_fault_handling`; it stays the caller's.

    Raises:
        FaultServiceError: it does not have exactly the features that the engine relies on.
    """

    def __init__(self, descriptor: int) -> None:
        features = _features(descriptor)
        if features != FAULT_FEATURES:
            raise FaultServiceError(
                f"a userfaultfd with features {features:#x}, {FAULT_FEATURES:#x} are needed"
            )
        self._fd = descriptor
        os.set_blocking(descriptor, False)
        self._buffer = memoryview(bytearray(_MESSAGES * _MESSAGE.size))
        self._buffers = [self._buffer]
        self._copy_argument = bytearray(_COPY_ARG.size)
        self._zero_argument = bytearray(_ZERO_ARG.size)
        self._protect_argument = bytearray(_PROTECT_ARG.size)
        self._wake_argument = bytearray(_RANGE.size)
        self._backlog: list[Event] = []
        # QEMU shares the descriptor's O_NONBLOCK and can take it away from us.
        self._read_flags = os.RWF_NOWAIT
        try:
            self._backlog = self._receive()
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # before Linux 6.10
                raise
            self._read_flags = 0

    @property
    def descriptor(self) -> int:
        """Readable when something happened."""
        return self._fd

    def read(self) -> list[Event]:
        """What happened, oldest first, 64 events or few more; none if nothing did."""
        if self._backlog:
            events, self._backlog = self._backlog, []
            return events
        return self._receive()

    def copy(
        self,
        host_address: int,
        source: int | memoryview | npt.NDArray[Any],
        size_bytes: int,
        *,
        protect: bool = False,
        wake: bool = True,
    ) -> int:
        """Put pages into memory (UFFDIO_COPY), and let go on who waits for them.

        Args:
            host_address: where, in QEMU's address space; whole pages.
            source: from where: an address in this process, or a writable C-contiguous buffer.
            size_bytes: how much.
            protect: write-protect the pages: who writes to one first will be held.
            wake: False to leave waiters waiting, for `wake` later.

        Returns:
            The bytes copied. Less than asked for: the page after them is in memory already, and
            left as it is. Who waits for that one was not woken.

        Raises:
            GuestGoneError: there is nowhere to copy to.
            FaultServiceError: the host has no memory left, or QEMU changes its own for ever.
        """
        address = source if isinstance(source, int) else _address(source, size_bytes)
        mode = (_COPY_WP if protect else 0) | (0 if wake else _FILL_DONTWAKE)
        return self._fill(host_address, address, size_bytes, mode)

    def zero(self, host_address: int, size_bytes: int, *, wake: bool = True) -> int:
        """As `copy`, of zeros (UFFDIO_ZEROPAGE)."""
        return self._fill(host_address, None, size_bytes, 0 if wake else _FILL_DONTWAKE)

    def protect(self, host_address: int, size_bytes: int) -> None:
        """Write-protect pages (UFFDIO_WRITEPROTECT): on return no store to them is under way.

        What is pinned for I/O is written to all the same.

        Raises:
            FaultServiceError: as `copy`.
        """
        self._write_protect(host_address, size_bytes, _WRITEPROTECT_WP)

    def unprotect(self, host_address: int, size_bytes: int, *, wake: bool = True) -> None:
        """Allow pages to be written to again, and let go on who waits for that, as in `copy`."""
        self._write_protect(host_address, size_bytes, 0 if wake else _WRITEPROTECT_DONTWAKE)

    def wake(self, host_address: int, size_bytes: int) -> None:
        """Have who waits for pages try again (UFFDIO_WAKE): it goes on, or faults anew.

        Raises:
            FaultServiceError: the range is not whole pages.
        """
        _RANGE.pack_into(self._wake_argument, 0, host_address, size_bytes)
        try:
            fcntl.ioctl(self._fd, _WAKE, self._wake_argument)
        except OSError as error:
            raise _failure(error, "nobody can be woken", host_address) from error

    def _receive(self) -> list[Event]:
        try:
            size = os.preadv(self._fd, self._buffers, -1, self._read_flags)
        except BlockingIOError:
            return []
        events: list[Event] = []
        for event, first, second in _MESSAGE.iter_unpack(self._buffer[:size]):
            if event == _EVENT_PAGEFAULT:
                write, protected = first & _PAGEFAULT_WRITE, first & _PAGEFAULT_WP
                events.append(Fault(second, write != 0, protected != 0))
            else:  # EVENT_REMOVE; without their features there are no others
                events.append(Removed(first, second))
        return events

    def _fill(self, host_address: int, source: int | None, size_bytes: int, mode: int) -> int:
        done = 0
        deadline: float | None = None
        while True:
            start, size = host_address + done, size_bytes - done
            if source is None:
                request, argument = _ZEROPAGE, self._zero_argument
                _ZERO_ARG.pack_into(argument, 0, start, size, mode, 0)
            else:
                request, argument = _COPY, self._copy_argument
                _COPY_ARG.pack_into(argument, 0, start, source + done, size, mode, 0)
            try:
                fcntl.ioctl(self._fd, request, argument)
                return size_bytes
            except OSError as error:
                (filled,) = _RESULT.unpack_from(argument, len(argument) - _RESULT.size)
                if filled > 0:  # a part of it; the next round tells what is with the rest
                    done += filled
                elif error.errno == errno.EEXIST:
                    return done
                else:
                    deadline = self._settle(error, "a page cannot be put", start, deadline)

    def _write_protect(self, host_address: int, size_bytes: int, mode: int) -> None:
        _PROTECT_ARG.pack_into(self._protect_argument, 0, host_address, size_bytes, mode)
        deadline: float | None = None
        while True:
            try:
                fcntl.ioctl(self._fd, _WRITEPROTECT, self._protect_argument)
                return
            except OSError as error:
                deadline = self._settle(error, "a page cannot be protected", host_address, deadline)

    def _settle(
        self, error: OSError, what: str, host_address: int, deadline: float | None
    ) -> float:
        """Give QEMU, which changes its memory (EAGAIN), occasion to finish.

        Returns:
            The `time.monotonic` by which it must have.

        Raises:
            FaultServiceError: the error is another one, or the deadline has passed.
        """
        if error.errno != errno.EAGAIN:
            raise _failure(error, what, host_address) from error
        now = time.monotonic()
        if deadline is None:
            deadline = now + _SETTLE_TIMEOUT_S
        elif now > deadline:
            raise FaultServiceError(
                f"QEMU has been giving memory back for {_SETTLE_TIMEOUT_S:g} s without an end"
            )
        self._backlog += self._receive()
        # There is no event to wait for: the kernel lets the thread go on and says nothing.
        os.sched_yield()
        return deadline


def _address(buffer: memoryview | npt.NDArray[Any], size_bytes: int) -> int:
    """Where a buffer is; what is behind its end may be a key."""
    if buffer.nbytes < size_bytes:
        raise ValueError(f"a buffer of {buffer.nbytes} bytes, {size_bytes} to be copied")
    view = buffer if isinstance(buffer, memoryview) else buffer.data
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _failure(error: OSError, what: str, host_address: int) -> FaultServiceError:
    message = f"{what} at {host_address:#x}: {error.strerror}"
    # ESRCH: the process has ended. ENOENT: it has unmapped the memory, as when it ends.
    if error.errno in (errno.ESRCH, errno.ENOENT):
        return GuestGoneError(message)
    return FaultServiceError(message)


def _features(descriptor: int) -> int:
    """The features that a userfaultfd was given (proc(5), /proc/PID/fdinfo)."""
    found = _FDINFO_FEATURES.search(Path(f"/proc/self/fdinfo/{descriptor}").read_text())
    if found is None:
        raise FaultServiceError("a descriptor that should be a userfaultfd is none")
    return int(found[1], 16) & ~_INITIALIZED


# --- of our own -------------------------------------------------------------------------------


def open_write_tracking() -> int:
    """A userfaultfd with asynchronous write tracking of shared memory.

    Raises:
        WriteTrackingError: this user may not have one, or the kernel is too old.
    """
    try:
        # One that does not stop the kernel's own faults will do (Linux 5.11): asynchronous
        # tracking stops none, and takes note of theirs as well.
        descriptor = _open(_USER_MODE_ONLY)
    except OSError as error:
        raise WriteTrackingError(
            f"no permission for userfaultfd: {error.strerror}", hint=_permit()
        ) from error
    try:
        _enable(descriptor, FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)
    except OSError as error:
        os.close(descriptor)
        raise WriteTrackingError(
            f"kernel {os.uname().release} has no asynchronous write tracking",
            hint="Linux 6.7 or newer is needed (Debian 13's, or 12's from bookworm-backports)",
        ) from error
    return descriptor


def register_write_tracking(descriptor: int, address: int, size_bytes: int) -> None:
    """Track writes to a range of this process's shared memory (UFFDIO_REGISTER, mode WP)."""
    _register(descriptor, address, size_bytes, _REGISTER_MODE_WP)


def open_fault_handling() -> int:
    """A userfaultfd that stops every access to missing or protected memory, the kernel's too.

    Raises:
        FaultServiceError: this user may not have one, or the kernel is too old.
    """
    try:
        descriptor = _open(0)
    except OSError as error:
        raise FaultServiceError(
            f"no permission for a userfaultfd that stops system calls: {error.strerror}",
            hint=_permit(),
        ) from error
    try:
        _enable(descriptor, FAULT_FEATURES)
    except OSError as error:
        os.close(descriptor)
        raise FaultServiceError(
            f"kernel {os.uname().release} cannot write-protect shared memory for others",
            hint="Linux 5.19 or newer is needed",
        ) from error
    return descriptor


def register_fault_handling(descriptor: int, address: int, size_bytes: int) -> None:
    """Have accesses to a range of this process's shared memory wait for who serves them."""
    _register(descriptor, address, size_bytes, _REGISTER_MODE_MISSING | _REGISTER_MODE_WP)


@contextmanager
def tracked_memory(pages: int) -> Iterator[tuple[mmap.mmap, PageTracker, int, int]]:
    """Memory of our own as guest RAM would be: a tracked memfd.

    Yields:
        The mapping, its tracker, the memfd and the userfaultfd.
    """
    with ExitStack() as stack:
        uffd = open_write_tracking()
        stack.callback(os.close, uffd)
        memory, address, memfd = stack.enter_context(_own_memory(pages))
        register_write_tracking(uffd, address, len(memory))
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, pagemap)
        yield memory, PageTracker(pagemap, [RamBlock(address, len(memory), 0)]), memfd, uffd


def require_write_tracking() -> None:
    """Show on a few pages of our own that written pages are found, and only these.

    Raises:
        WriteTrackingError: they are not; the hint says what to do.
    """
    with tracked_memory(8) as (memory, tracker, _memfd, _uffd):
        try:
            tracker.take()
            memory[3 * PAGE_BYTES] = 1
            found = tracker.take()
        except OSError as error:
            raise WriteTrackingError(
                f"kernel {os.uname().release} has no PAGEMAP_SCAN: {error.strerror}",
                hint="Linux 6.7 or newer is needed",
            ) from error
    if found != [(3, 4)]:
        raise WriteTrackingError(f"one page was written, the kernel reports pages {found}")


def require_fault_handling() -> None:
    """Show on a page of our own that a system call is held at it, and given what we put there.

    Raises:
        FaultServiceError: it is not; the hint says what to do.
    """
    page = memoryview(bytearray(b"\x5a" * PAGE_BYTES))
    with ExitStack() as stack:
        memory, address, _memfd = stack.enter_context(_own_memory(1))
        copy = os.memfd_create("mktme-probe", os.MFD_CLOEXEC)
        stack.callback(os.close, copy)
        worker = stack.enter_context(ThreadPoolExecutor(1))
        descriptor = open_fault_handling()
        stack.callback(os.close, descriptor)  # should we fail, this lets the worker go
        register_fault_handling(descriptor, address, PAGE_BYTES)
        uffd = Userfaultfd(descriptor)
        work = worker.submit(os.pwrite, copy, memory, 0)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(_PROBE_TIMEOUT_S * 1000)
        events = uffd.read()
        if events != [Fault(address, write=False, protected=False)]:
            raise FaultServiceError(f"one page was read, the kernel reports {events}")
        uffd.copy(address, page, PAGE_BYTES)
        work.result(_PROBE_TIMEOUT_S)
        if os.pread(copy, PAGE_BYTES, 0) != page:
            raise FaultServiceError("a system call did not see the page it waited for")


@contextmanager
def _own_memory(pages: int) -> Iterator[tuple[mmap.mmap, int, int]]:
    """A memfd like guest RAM's: mapping, its address, descriptor."""
    with ExitStack() as stack:
        memfd = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
        stack.callback(os.close, memfd)
        os.ftruncate(memfd, pages * PAGE_BYTES)
        memory = stack.enter_context(mmap.mmap(memfd, pages * PAGE_BYTES))
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        del anchor  # else the mapping could not be closed
        yield memory, address, memfd


def _open(flags: int) -> int:
    """From the device if we may, else by the system call, as the plugin does (userfaultfd.c).

    Args:
        flags: for the system call; the device's stop the kernel's own faults in any case.
    """
    with suppress(OSError):
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(device, _NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(device)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.syscall(_SYSCALL_NUMBER, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def _enable(descriptor: int, features: int) -> None:
    fcntl.ioctl(descriptor, _API, bytearray(struct.pack("<QQQ", _API_VERSION, features, 0)))


def _register(descriptor: int, address: int, size_bytes: int, mode: int) -> None:
    argument = struct.pack("<QQQQ", address, size_bytes, mode, 0)
    fcntl.ioctl(descriptor, _REGISTER, bytearray(argument))


def _permit() -> str:
    return f"sudo setfacl -m u:$USER:rw {DEVICE}"
