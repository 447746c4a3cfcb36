# SPDX-License-Identifier: GPL-2.0-or-later
"""Key tables that are ready for use, for tests of what stands on them."""

from __future__ import annotations

from mktme.engine.keys import KeyTable
from mktme.engine.rng import Rng
from mktme.engine.xts import Algorithm


def activated(
    keyid_bits: int = 6, algorithm: Algorithm = Algorithm.AES_XTS_128, rng: Rng | None = None
) -> KeyTable:
    """A key table as a successful write to IA32_TME_ACTIVATE leaves it."""
    keys = KeyTable(rng)
    keys.draw_tme_key(algorithm)
    keys.activate(keyid_bits)
    return keys
