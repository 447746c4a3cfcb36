# SPDX-License-Identifier: GPL-2.0-or-later
"""What an attacker who has the DIMMs can do: read and change DRAM and its MACs, with no engine.

The attacker is in front of the files that stand for memory, and has no key.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mktme.engine.dram import mac_path
from mktme.engine.errors import DramError
from mktme.engine.integrity import ENTRY_BYTES
from mktme.engine.xts import LINE_BYTES


@dataclass(frozen=True, slots=True)
class Stored:
    """Lines as DRAM holds them.

    Attributes:
        ciphertext: whole lines.
        macs: their entries in the MAC area (`mktme.engine.integrity.MAC_RULE`).
    """

    ciphertext: bytes
    macs: bytes


class Dimms:
    """A platform's DRAM in an attacker's hands.

    Args:
        dram: the image; the MACs are beside it.
    """

    def __init__(self, dram: Path) -> None:
        self._image = dram
        self._macs = mac_path(dram)

    def get(self, address: int, size_bytes: int = LINE_BYTES) -> Stored:
        """Read whole lines and their MACs.

        Raises:
            DramError: they are not there.
        """
        macs_bytes = size_bytes // LINE_BYTES * ENTRY_BYTES
        return Stored(
            _read(self._image, address, size_bytes),
            _read(self._macs, address // LINE_BYTES * ENTRY_BYTES, macs_bytes),
        )

    def put(self, address: int, lines: Stored) -> None:
        """Replace lines and their MACs."""
        self.put_ciphertext(address, lines.ciphertext)
        _write(self._macs, address // LINE_BYTES * ENTRY_BYTES, lines.macs)

    def put_ciphertext(self, address: int, ciphertext: bytes) -> None:
        """Replace lines, and leave the MACs that are there."""
        _write(self._image, address, ciphertext)

    def flip(self, address: int, bit: int = 0) -> None:
        """Flip one bit of the ciphertext byte at an address."""
        (byte,) = _read(self._image, address, 1)
        _write(self._image, address, bytes([byte ^ 1 << bit]))


def _read(path: Path, offset: int, size_bytes: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size_bytes, offset)
    if len(data) != size_bytes:
        raise DramError(f"{path}: no {size_bytes} bytes at {offset:#x}")
    return data


def _write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, offset)
