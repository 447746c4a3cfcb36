# SPDX-License-Identifier: GPL-2.0-or-later
"""userfaultfd from Python: what this kernel and user may do (include/uapi/linux/userfaultfd.h)."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from mktme.datapath.link import RamBlock
from mktme.datapath.pages import PageTracker
from mktme.engine.errors import MktmeError
from mktme.engine.xts import PAGE_BYTES

DEVICE: Final = Path("/dev/userfaultfd")
FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
FEATURE_WP_UNPOPULATED: Final = 1 << 13
FEATURE_WP_ASYNC: Final = 1 << 15

_NEW: Final = 0xAA00  # USERFAULTFD_IOC_NEW
_API: Final = 0xC018AA3F  # UFFDIO_API
_REGISTER: Final = 0xC020AA00  # UFFDIO_REGISTER
_API_VERSION: Final = 0xAA
_REGISTER_MODE_WP: Final = 1 << 1
_SYSCALL_NUMBER: Final = 323  # userfaultfd(2) on x86-64
_USER_MODE_ONLY: Final = 1


class WriteTrackingError(MktmeError):
    """The kernel does not track writes to shared memory for this user."""


def open_write_tracking() -> int:
    """A userfaultfd with asynchronous write tracking of shared memory.

    Raises:
        WriteTrackingError: this user may not have one, or the kernel is too old.
    """
    descriptor = _open()
    argument = bytearray(
        struct.pack(
            "<QQQ",
            _API_VERSION,
            FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC,
            0,
        )
    )
    try:
        fcntl.ioctl(descriptor, _API, argument)
    except OSError as error:
        os.close(descriptor)
        raise WriteTrackingError(
            f"kernel {os.uname().release} has no asynchronous write tracking",
            hint="Linux 6.7 or newer is needed (Debian 13's, or 12's from bookworm-backports)",
        ) from error
    return descriptor


def register_write_tracking(descriptor: int, address: int, size_bytes: int) -> None:
    """Track writes to a range of this process's shared memory (UFFDIO_REGISTER, mode WP)."""
    argument = struct.pack("<QQQQ", address, size_bytes, _REGISTER_MODE_WP, 0)
    fcntl.ioctl(descriptor, _REGISTER, bytearray(argument))


@contextmanager
def tracked_memory(pages: int) -> Iterator[tuple[mmap.mmap, PageTracker, int, int]]:
    """Memory of our own as guest RAM would be: a tracked memfd.

    Yields:
        The mapping, its tracker, the memfd and the userfaultfd.
    """
    with ExitStack() as stack:
        uffd = open_write_tracking()
        stack.callback(os.close, uffd)
        memfd = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
        stack.callback(os.close, memfd)
        size = pages * PAGE_BYTES
        os.ftruncate(memfd, size)
        memory = mmap.mmap(memfd, size)
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        del anchor  # else the mapping could not be closed
        stack.callback(memory.close)
        register_write_tracking(uffd, address, size)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, pagemap)
        yield memory, PageTracker(pagemap, [RamBlock(address, size, 0)]), memfd, uffd


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


def _open() -> int:
    """From the device if we may, else by the system call, as the plugin does (ram_link.c).

    Without privileges that gives one that does not stop the kernel's own faults (Linux 5.11);
    asynchronous tracking stops none, and takes note of theirs as well.
    """
    with suppress(OSError):
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(device, _NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(device)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.syscall(_SYSCALL_NUMBER, _USER_MODE_ONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        reason = os.strerror(ctypes.get_errno())
        raise WriteTrackingError(
            f"no permission for userfaultfd: {reason}",
            hint=f"sudo setfacl -m u:$USER:rw {DEVICE}",
        )
    return descriptor
