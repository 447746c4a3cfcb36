# SPDX-License-Identifier: GPL-2.0-or-later
"""A platform with and without integrity, its engine's side and an attacker's."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mktme.engine.controller import MemoryController
from mktme.engine.dram import Dram, mac_path
from mktme.engine.keys import KeyTable
from mktme.engine.xts import Algorithm

from .conftest import activated

PAGES = 64
LINE, PAGE = 64, 4096
ALL_LINES = 2**64 - 1
POISON = b"\xff" * LINE
SHARED_KEY, OTHER_KEY = random.Random(4).randbytes(32), random.Random(5).randbytes(32)

# KeyIDs of `Platform`. PLAIN and MAC have the same key.
TME, PLAIN, MAC, OTHER_MAC, NO_ENCRYPT = range(5)

Words = NDArray[np.uint64]


class Platform:
    """DRAM, and KeyIDs with and without integrity."""

    def __init__(
        self, directory: Path, dram: type[Dram] = Dram, policy: Algorithm = Algorithm.AES_XTS_128
    ) -> None:
        self.path = directory / "dram"
        self.dram = dram.create(self.path, PAGES * PAGE)
        self.keys = keys(policy)
        self.controller = MemoryController(self.dram, self.keys)

    def write(self, page: int, words: Words, keyid: int = MAC, mask: int = ALL_LINES) -> int:
        """Assign a page and write some of its lines; which changed."""
        self.controller.assign(page * PAGE, PAGE, keyid)
        masks = None if mask == ALL_LINES else np.array([mask], np.uint64)
        return int(self.controller.update_pages(np.array([page]), words, masks)[0])

    def read(self, page: int, keyid: int | None = None) -> tuple[list[bytes], int]:
        """A page's lines, and which are poisoned."""
        poisoned = np.zeros(1, np.uint64)
        words = self.controller.read_pages(page, 1, keyid, poisoned=poisoned)
        if keyid is None:  # what a fault gets is the same
            of_fault = np.empty_like(words)
            assert self.controller.read_page(page, of_fault) == poisoned[0]
            assert np.array_equal(of_fault, words)
        return split(words), int(poisoned[0])

    def accepts(self, page: int, words: Words, keyid: int | None = None) -> bool:
        """Whether a page reads as it was written. If not, all of it is poisoned."""
        lines, poisoned = self.read(page, keyid)
        if poisoned:
            assert poisoned == ALL_LINES
            assert lines == [POISON] * 64
            return False
        assert lines == split(words)
        return True

    # What an attacker does: no engine is asked.

    def line(self, address: int, new: bytes | None = None) -> bytes:
        """A line of DRAM; replace it if asked."""
        return access(self.path, address, LINE, new)

    def entry(self, address: int, new: bytes | None = None) -> bytes:
        """A line's entry in the MAC area; replace it if asked."""
        return access(mac_path(self.path), address // 16, 4, new)

    def pair(self, address: int, new: tuple[bytes, bytes] | None = None) -> tuple[bytes, bytes]:
        """Both."""
        line, entry = new or (None, None)
        return self.line(address, line), self.entry(address, entry)


def keys(policy: Algorithm = Algorithm.AES_XTS_128) -> KeyTable:
    table = activated(keyid_bits=3, algorithm=policy)
    table.program_direct(PLAIN, Algorithm.AES_XTS_128, SHARED_KEY)
    table.program_direct(MAC, Algorithm.AES_XTS_128_INTEGRITY, SHARED_KEY)
    table.program_direct(OTHER_MAC, Algorithm.AES_XTS_128_INTEGRITY, OTHER_KEY)
    table.program_no_encrypt(NO_ENCRYPT)
    return table


def access(path: Path, offset: int, size: int, new: bytes | None) -> bytes:
    with path.open("r+b") as file:
        old = os.pread(file.fileno(), size, offset)
        if new is not None:
            assert len(new) == size
            os.pwrite(file.fileno(), new, offset)
    return old


def content(seed: int, count: int = 1) -> Words:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 512), np.uint64)


def split(words: Words) -> list[bytes]:
    data = words.tobytes()
    return [data[at : at + LINE] for at in range(0, len(data), LINE)]


def flipped(data: bytes, bit: int) -> bytes:
    spoilt = bytearray(data)
    spoilt[bit // 8] ^= 1 << bit % 8
    return bytes(spoilt)
