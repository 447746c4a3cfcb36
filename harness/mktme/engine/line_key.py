# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines of DRAM turned into plaintext with what a KeyID's key makes: a cipher, and perhaps MACs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mktme.engine.integrity import LineMacs
from mktme.engine.pages import WORDS_PER_LINE, any_of_line
from mktme.engine.xts import Algorithm, XtsCipher


@dataclass(frozen=True, slots=True)
class LineKey:
    """What reads the lines of one KeyID. Like a cipher, for one thread.

    Attributes:
        cipher: None: they are plaintext.
        macs: None: they have no MACs.
    """

    cipher: XtsCipher | None
    macs: LineMacs | None

    @classmethod
    def make(cls, algorithm: Algorithm, key: bytes | bytearray | memoryview) -> Self:
        """Of a key, which is copied.

        Raises:
            KeyMaterialError: it must not be used.
        """
        cipher = XtsCipher(algorithm, key)
        return cls(cipher, LineMacs(key) if algorithm.has_integrity else None)

    def decrypt(
        self,
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        entries: NDArray[np.uint32] | None = None,
    ) -> NDArray[np.bool_] | None:
        """Decrypt lines in place; those never written stay zeros.

        Args:
            lines: shape (n, 8), uint64, C-contiguous.
            addresses: shape (n,), uint64: their physical addresses, KeyID stripped.
            entries: shape (n,), uint32: what the MAC area has for them; None: do not look.

        Returns:
            bool, shape (n,): which lines do not match their MACs; None if nobody looked.
        """
        # A line that was written begins with eight zeros once in 2^64 times.
        all_written = np.count_nonzero(lines[:, 0]) == len(lines)
        never_written = np.zeros(len(lines), np.bool_)
        if not all_written:
            never_written = ~any_of_line(lines != 0).reshape(-1)
        bad = None
        if self.macs is not None and entries is not None:
            bad = self.macs.find_bad(lines, addresses, never_written, entries)
        if self.cipher is not None and not never_written.all():
            self.cipher.decrypt_lines(lines, addresses, out=lines)
            if not all_written:
                lines[never_written] = 0
        return bad

    def wipe(self) -> None:
        """Overwrite the key."""
        for one in (self.cipher, self.macs):
            if one is not None:
                one.wipe()


def words_of(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Bytes as lines of words: uint8, shape (64 * n,), to uint64, shape (n, 8), the same memory."""
    return data.view(np.uint64).reshape(-1, WORDS_PER_LINE)
