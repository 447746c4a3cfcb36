# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose pages are whose: an image's pages told apart by what encrypts them.

A zone is a KeyID, or the part of KeyID 0 that the platform excludes from encryption.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.dump.image import DumpImage
from mktme.engine.keys import MAX_KEYID_BITS, KeyDescription
from mktme.engine.xts import PAGE_BYTES

EXCLUDED: Final = 1 << MAX_KEYID_BITS
"""The zone of KeyID 0's plaintext (MSRs 983H and 984H); no KeyID has this number."""

_AT_A_TIME: Final = 1 << 20


class Zones:
    """The zones of an image's pages.

    Args:
        image: the image; one that nothing describes is all KeyID 0.
    """

    def __init__(self, image: DumpImage) -> None:
        runs = (
            () if image.sidecar is None else sorted(image.sidecar.pages, key=lambda one: one.base)
        )
        self._starts = np.array([one.base for one in runs], np.int64)
        self._ends = np.array([one.base + one.size_bytes for one in runs], np.int64)
        self._keyids = np.array([one.keyid for one in runs], np.uint16)
        self._exclusion = None if image.sidecar is None else image.sidecar.exclusion
        self._pages = -(-image.size_bytes // PAGE_BYTES)

    def of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """The zones of pages, uint16, by their numbers, int64, both of shape (n,)."""
        addresses = numbers * PAGE_BYTES
        found = np.zeros(len(numbers), np.uint16)
        if len(self._starts):
            run = np.searchsorted(self._starts, addresses, "right") - 1
            inside = (run >= 0) & (addresses < self._ends[run])
            found[inside] = self._keyids[run[inside]]
        if self._exclusion is not None:
            mask = self._exclusion.mask
            out = (addresses & mask) == (self._exclusion.base & mask)
            found[out & (found == 0)] = EXCLUDED
        return found

    def sizes(self) -> dict[int, int]:
        """How many pages each zone has, if it has any, ascending."""
        sizes = np.zeros(EXCLUDED + 1, np.int64)
        if self._exclusion is None:
            np.add.at(sizes, self._keyids, (self._ends - self._starts) // PAGE_BYTES)
            sizes[0] += self._pages - int(sizes.sum())
        else:
            for first in range(0, self._pages, _AT_A_TIME):
                numbers = np.arange(first, min(self._pages, first + _AT_A_TIME))
                sizes += np.bincount(self.of(numbers), minlength=EXCLUDED + 1)
        return {int(zone): int(sizes[zone]) for zone in np.flatnonzero(sizes)}


def zone_key(image: DumpImage, zone: int) -> KeyDescription | None:
    """How a zone is encrypted; None if nothing is known."""
    if zone != EXCLUDED:
        return image.key(zone)
    platform = image.key(0)
    return None if platform is None else KeyDescription(0, platform.mode, None)
