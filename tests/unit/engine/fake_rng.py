# SPDX-License-Identifier: GPL-2.0-or-later
"""A random number generator whose output is known, and that fails on demand."""

from __future__ import annotations

import hashlib

from mktme.engine.rng import EntropyError, Rng


class FakeRng(Rng):
    """Gives each key once, and remembers it.

    Attributes:
        broken: whether it gives nothing.
        given: the keys, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.broken = False
        self.given: list[bytes] = []

    def fill(self, buffer: memoryview) -> None:
        if self.broken:
            raise EntropyError("broken on purpose")
        key = hashlib.shake_128(len(self.given).to_bytes(4, "little")).digest(len(buffer))
        buffer[:] = key
        self.given.append(key)
