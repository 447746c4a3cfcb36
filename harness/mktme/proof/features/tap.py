# SPDX-License-Identifier: GPL-2.0-or-later
"""A network device of the host's with several queues: QEMU's user-mode network has one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mktme.proof.features.subject import FeatureError, SkippedError

HOST_ADDRESS: Final = "198.18.77.1"
GUEST_ADDRESS: Final = "198.18.77.2"
"""Of the network that is for tests of network devices (RFC 2544, RFC 6890)."""
PREFIX: Final = 30

_TUN: Final = Path("/dev/net/tun")
# Linux, include/uapi/linux/if_tun.h; struct ifreq of netdevice(7).
_TUNSETIFF: Final = 0x4004_54CA
_TUNSETQUEUE: Final = 0x4004_54D9
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_DETACH_QUEUE: Final = 0x0400
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFREQ: Final = struct.Struct("16sH22x")


@contextlib.contextmanager
def multi_queue_tap() -> Iterator[str]:
    """A tap device with several queues, up, at `HOST_ADDRESS`; its name.

    It is not persistent: it is gone when this process and the QEMU that has opened it are, however
    they end. The queue that it is made with is detached, for nobody reads it.

    Raises:
        SkippedError: only who may administer the host's network can make one.
        FeatureError: it cannot be given its address.
    """
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SkippedError(f"{_TUN}: {error.strerror}") from error
    try:
        kind = _IFF_TAP | _IFF_MULTI_QUEUE | _IFF_NO_PI | _IFF_VNET_HDR
        try:
            made = fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(b"mktme%d", kind))
        except PermissionError as error:
            raise SkippedError(
                "a network device with several queues is for root to make"
            ) from error
        name: bytes = _IFREQ.unpack(made)[0].rstrip(b"\0")
        fcntl.ioctl(descriptor, _TUNSETQUEUE, _IFREQ.pack(name, _IFF_DETACH_QUEUE))
        device = name.decode()
        _ip("address", "add", f"{HOST_ADDRESS}/{PREFIX}", "dev", device)
        _ip("link", "set", device, "up")
        yield device
    finally:
        os.close(descriptor)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FeatureError(f"ip {' '.join(words)}: {done.stderr.strip()}")
