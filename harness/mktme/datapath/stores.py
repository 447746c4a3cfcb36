# SPDX-License-Identifier: GPL-2.0-or-later
"""The `stores` tracker: which lines the plugin saw a vCPU store to.

The plugin sets one byte a line in memory shared with us (``qemu-plugin/store_map.h``). We copy,
clear what we saw, put up a full fence, and only then may the RAM be read: a store that we miss
in the copy sets its byte after our clear, and is seen the next time.
"""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.engine.pages import pack_masks
from mktme.engine.xts import LINES_PER_PAGE

_SWEEP_PAGES: Final = 1 << 15  # 2 MiB of map at a time keeps the copy in the L2 cache
_fence_lock: Final = threading.Lock()


def _full_fence() -> None:
    """Order our clears before the reads of guest RAM that follow.

    x86 lets a load pass an older store (SDM vol. 3A, 8.2.3.4). Taking a lock is a locked
    instruction, which is a full fence; Python offers no plainer one.
    """
    with _fence_lock:
        pass


class StoreTracker:
    """Reads and clears a store map.

    Args:
        store_map: uint8, shape (lines,), shared with QEMU and live.
    """

    def __init__(self, store_map: npt.NDArray[np.uint8]) -> None:
        self._lines = store_map.reshape(-1, LINES_PER_PAGE)

    def take(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Get and clear the marks of `pages`; the pages' RAM may be read on return.

        Args:
            pages: page numbers in RAM offset order, shape (n,).

        Returns:
            uint64, shape (n,): bit i is set if line i of the page was stored to.
        """
        seen = self._lines[pages]
        rows, lines = np.nonzero(seen)
        self._lines[pages[rows], lines] = 0
        _full_fence()
        return pack_masks(seen != 0)

    def peek(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """The marks of `pages` as `take` gives them, left as they are."""
        return pack_masks(self._lines[pages] != 0)

    def marked_pages(self) -> npt.NDArray[np.int64]:
        """Numbers of the pages with a mark, ascending: a sweep over the whole map."""
        found = []
        for start in range(0, len(self._lines), _SWEEP_PAGES):
            # On the live map flatnonzero would count and collect in two passes and raise when
            # a byte changes between them, hence the copy.
            words = self._lines[start : start + _SWEEP_PAGES].copy().view(np.uint64)
            hits = np.flatnonzero(words) // (LINES_PER_PAGE // 8)
            found.append(np.unique(hits) + start)
        return np.concatenate(found)
