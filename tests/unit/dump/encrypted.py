# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of guests' memory, encrypted with none of the engine's code."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec

from mktme.engine.sidecar import GuestSegment, Sidecar

from ...vectors import reference
from .conftest import PAGE, VM_BASE, describe

LINE = 64
_RANDOM = Random(7)
KEY = _RANDOM.randbytes(64)  # of AES_XTS_256
OTHER_KEY = _RANDOM.randbytes(64)
STRUCTURED = b"of a guest's own" * (PAGE // 16)
"""A page like those that memory is full of: with equal blocks side by side."""


def encrypted(key: bytes, address: int, plaintext: bytes) -> bytes:
    """Lines as DRAM holds them."""
    return b"".join(
        reference.encrypt(key, (address + at).to_bytes(16, "little"), plaintext[at : at + LINE])
        for at in range(0, len(plaintext), LINE)
    )


def vm_pages(pages: dict[int, bytes], key: bytes = KEY) -> dict[int, bytes]:
    """Pages of the VM, by number in its RAM, as contents of an image."""
    return {
        VM_BASE + number * PAGE: encrypted(key, VM_BASE + number * PAGE, plaintext)
        for number, plaintext in pages.items()
    }


def with_segments(*segments: tuple[int, int, int]) -> Sidecar:
    """The sidecar of a VM with this map of its memory: guest-physical, RAM offset, size."""
    sidecar = describe()
    vm = msgspec.structs.replace(
        sidecar.vms[0],
        segments=tuple(
            GuestSegment(guest_physical=at, ram_offset=offset, size_bytes=size)
            for at, offset, size in segments
        ),
    )
    return msgspec.structs.replace(sidecar, vms=(vm,))


def key_file(path: Path, key: bytes = KEY) -> Path:
    """A key, as its owner keeps it."""
    path.touch(0o600)
    path.write_bytes(key)
    return path
