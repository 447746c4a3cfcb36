# SPDX-License-Identifier: GPL-2.0-or-later
"""The short version of `make soak`, and what it says of memory that does not keep what it was told.

Both guests fill more memory than their window holds.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mktme.engine.xts import PAGE_BYTES
from mktme.service.client import EngineClient
from mktme.vm.console import VmError
from mktme.vm.platform import Platform, Vm

from . import soak

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB = 1 << 20
CHUNK_BYTES = 4 * MIB
SOLID_BITS = 8


def test_short_soak() -> None:
    config = soak.soak_config()
    with Platform(config.memory_bytes) as platform, platform.launch(config) as vm:
        done = soak.soak(vm, soak.SHORT, seconds=0)
    assert done.steps == len(soak.SHORT)
    assert done.bytes_fetched > 10 * soak.WINDOW_MIB * MIB
    assert soak.WINDOW_MIB * MIB // 2 < done.peak_bytes <= soak.WINDOW_MIB * MIB


def pages_of_solid_bits(engine: EngineClient, vm: Vm) -> list[int]:
    """DRAM addresses of pages that hold memtester's pattern: a word and its complement in turn."""
    found: list[int] = []
    for offset in range(0, vm.config.memory_bytes, CHUNK_BYTES):
        data = engine.read(vm.uuid, offset, CHUNK_BYTES)
        words = np.frombuffer(data, np.uint64).reshape(-1, PAGE_BYTES // 8)
        even, odd = words[:, ::2], words[:, 1::2]
        pattern = (even == ~odd).all(axis=1) & (even == words[:, :1]).all(axis=1)
        found += (vm.base + offset + np.flatnonzero(pattern) * PAGE_BYTES).tolist()
    return found


def test_memory_that_is_wrong_is_found() -> None:
    """The control: a bit of ciphertext is flipped in some of what memtester has filled."""
    config = soak.soak_config()
    with (
        Platform(config.memory_bytes) as platform,
        platform.launch(config) as vm,
        ThreadPoolExecutor() as pool,
        platform.dram_path.open("r+b") as dram,
    ):
        verified = pool.submit(soak.verify_memory, vm.domain.console, 32, (SOLID_BITS,))
        flipped = 0
        while not verified.done():
            for address in pages_of_solid_bits(platform.engine, vm)[::16]:
                (byte,) = os.pread(dram.fileno(), 1, address)
                os.pwrite(dram.fileno(), bytes([byte ^ 1]), address)
                flipped += 1
        assert flipped
        with pytest.raises(VmError, match="FAILURE"):
            verified.result()
