# SPDX-License-Identifier: GPL-2.0-or-later
"""How long something takes, told from any number of times in constant memory."""

from __future__ import annotations

from typing import Final

import numpy as np

_STEPS_PER_OCTAVE: Final = 8
_SHORTEST_NS: Final = 256
_OCTAVES: Final = 32  # up to 18 minutes


class Latencies:
    """A histogram whose buckets grow by a ninth to an eighth: what it tells is good to 6 %."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = [0] * (_OCTAVES * _STEPS_PER_OCTAVE)

    def add(self, nanoseconds: int) -> None:
        """It took that long, once more."""
        if nanoseconds < _SHORTEST_NS:
            index = 0
        else:
            # As a floating-point number: the exponent, and the first three bits of the rest.
            exponent = nanoseconds.bit_length() - 1
            octave = exponent - 8
            index = octave * _STEPS_PER_OCTAVE + (nanoseconds >> exponent - 3 & 7)
        self._counts[min(index, len(self._counts) - 1)] += 1

    @property
    def count(self) -> int:
        """How many times there were."""
        return sum(self._counts)

    def percentile(self, share: float) -> float | None:
        """What a share of the times did not exceed, in seconds; None if there were none.

        Args:
            share: 0.5 for the median.
        """
        total = self.count
        if not total:
            return None
        index = int(np.searchsorted(np.cumsum(self._counts), share * total))
        octave, step = divmod(index, _STEPS_PER_OCTAVE)
        middle = _SHORTEST_NS * (1 << octave) * (1 + (step + 0.5) / _STEPS_PER_OCTAVE)
        return middle / 1e9
