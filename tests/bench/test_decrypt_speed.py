# SPDX-License-Identifier: GPL-2.0-or-later
"""Speed that is promised of `mktme dump decrypt`: half of the engine's AES-XTS, or more."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mktme.dump.decrypt import VmMemory, decrypt
from mktme.dump.formats import Format
from mktme.dump.image import DumpImage
from mktme.dump.keys import FileKeys
from mktme.engine.dram import (
    Dram,
    GuestSegment,
    PageRange,
    PlatformRecord,
    Sidecar,
    VmRecord,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.keys import KeyDescription, KeyMode
from mktme.engine.line_key import LineKey
from mktme.engine.xts import Algorithm

from ..unit.dump.conftest import VM_UUID

SIZE = 512 << 20
BATCH = 1 << 20
KEY = bytes(range(32))
SHARE = 0.5


@pytest.fixture
def image() -> Iterator[Path]:
    """All of a VM's memory written, in a file system that is memory: the disk is not measured."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield make(directory / "dram")
    finally:
        shutil.rmtree(directory)


def make(path: Path) -> Path:
    key = LineKey.make(Algorithm.AES_XTS_128, KEY)
    assert key.cipher is not None
    with Dram.create(path, SIZE) as dram:
        plain = np.arange(BATCH // 8, dtype=np.uint64).reshape(-1, 8) // 4
        for base in range(0, SIZE, BATCH):
            addresses = np.arange(base, base + BATCH, 64, dtype=np.uint64)
            dram.write(base, key.cipher.encrypt_lines(plain, addresses).data)
    sidecar = Sidecar(
        platform=PlatformRecord(maxphyaddr=46, keyid_bits=6, dram_bytes=SIZE),
        keys=(KeyDescription(keyid=0, mode=KeyMode.DIRECT, algorithm=Algorithm.AES_XTS_128),),
        vms=(
            VmRecord(
                uuid=VM_UUID,
                name="alice",
                base=0,
                size_bytes=SIZE,
                keyid=0,
                segments=(GuestSegment(guest_physical=0, ram_offset=0, size_bytes=SIZE),),
            ),
        ),
        pages=(PageRange(base=0, size_bytes=SIZE, keyid=0),),
    )
    write_sidecar(sidecar_path(path), sidecar)
    return path


def engine_rate() -> float:
    """Bytes a second that the engine's AES-XTS decrypts, in memory."""
    key = LineKey.make(Algorithm.AES_XTS_128, KEY)
    assert key.cipher is not None
    lines = np.arange(BATCH // 8, dtype=np.uint64).reshape(-1, 8)
    addresses = np.arange(0, BATCH, 64, dtype=np.uint64)
    key.cipher.decrypt_lines(lines, addresses, out=lines)
    started = time.perf_counter()
    for _ in range(SIZE // BATCH):
        key.cipher.decrypt_lines(lines, addresses, out=lines)
    return SIZE / (time.perf_counter() - started)


def command_rate(image: Path, kind: Format) -> float:
    """Bytes a second of all of it: look whether the key fits, read, decrypt, write."""
    out = image.with_name("out")
    with (
        DumpImage.open(image) as opened,
        FileKeys({0: LineKey.make(Algorithm.AES_XTS_128, KEY)}) as keys,
        VmMemory(opened, opened.vm("alice"), keys) as memory,
    ):
        report = decrypt(memory, out, kind, image=image)
    out.unlink()
    return SIZE / report.duration_s


@pytest.mark.parametrize("kind", Format)
def test_decryption_is_as_fast_as_promised(image: Path, kind: Format) -> None:
    """Other work on the machine can only make it slower, so one of three measurements will do."""
    found = [(command_rate(image, kind), engine_rate()) for _ in range(3)]
    rates = ", ".join(f"{ours / 1e9:.2f} of {engine / 1e9:.2f} GB/s" for ours, engine in found)
    print(f"{kind.value}: {rates}")
    assert any(ours >= SHARE * engine for ours, engine in found), rates
