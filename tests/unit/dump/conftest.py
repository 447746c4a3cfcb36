# SPDX-License-Identifier: GPL-2.0-or-later
"""DRAM images for the tests of readers, made by the engine's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from uuid import UUID

import pytest

from mktme.engine.dram import Dram
from mktme.engine.keys import KeyDescription, KeyMode
from mktme.engine.sidecar import (
    GuestSegment,
    PageRange,
    PlatformRecord,
    Sidecar,
    VmRecord,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.xts import Algorithm

PAGE = 4096
DRAM_BYTES = 1 << 20
VM_UUID = UUID("11111111-2222-4333-8444-555555555555")
VM_BASE, VM_BYTES, VM_KEYID = 256 << 10, 512 << 10, 3


def describe(size_bytes: int = DRAM_BYTES, name: str = "alice") -> Sidecar:
    """One VM in the middle of DRAM, all of its pages under one KeyID."""
    return Sidecar(
        platform=PlatformRecord(maxphyaddr=46, keyid_bits=6, dram_bytes=size_bytes),
        keys=(
            KeyDescription(keyid=0, mode=KeyMode.PLATFORM, algorithm=Algorithm.AES_XTS_128),
            KeyDescription(keyid=VM_KEYID, mode=KeyMode.DIRECT, algorithm=Algorithm.AES_XTS_256),
        ),
        vms=(
            VmRecord(
                uuid=VM_UUID,
                name=name,
                base=VM_BASE,
                size_bytes=VM_BYTES,
                keyid=VM_KEYID,
                segments=(GuestSegment(guest_physical=0, ram_offset=0, size_bytes=VM_BYTES),),
            ),
        ),
        pages=(
            PageRange(base=0, size_bytes=VM_BASE, keyid=0),
            PageRange(base=VM_BASE, size_bytes=VM_BYTES, keyid=VM_KEYID),
            PageRange(base=VM_BASE + VM_BYTES, size_bytes=size_bytes - VM_BASE - VM_BYTES, keyid=0),
        ),
    )


class MakeImage(Protocol):
    """Makes an image that holds `data` by address, its sidecar beside it."""

    def __call__(
        self, data: dict[int, bytes], sidecar: Sidecar | None = None, name: str = "dram"
    ) -> Path: ...


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    def make(data: dict[int, bytes], sidecar: Sidecar | None = None, name: str = "dram") -> Path:
        record = describe() if sidecar is None else sidecar
        path = tmp_path / name
        with Dram.create(path, record.platform.dram_bytes) as dram:
            for address, content in data.items():
                dram.write(address, content)
        write_sidecar(sidecar_path(path), record)
        return path

    return make
