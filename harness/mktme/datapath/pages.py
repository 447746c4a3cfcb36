# SPDX-License-Identifier: GPL-2.0-or-later
"""The `pages` tracker: which pages the kernel saw anyone in QEMU's process write to.

The plugin registered guest RAM with a userfaultfd in asynchronous write-protect mode, so the
kernel notes the first write to each page without stopping it. PAGEMAP_SCAN (Linux 6.7,
include/uapi/linux/fs.h) gets the written pages and write-protects them again in one step.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.datapath.link import RamBlock
from mktme.engine.xts import PAGE_BYTES

PAGEMAP_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_PM_SCAN_WP_MATCHING: Final = 1 << 0
_PM_SCAN_CHECK_WPASYNC: Final = 1 << 1
_PAGE_IS_WRITTEN: Final = 1 << 1
# struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages,
# category_inverted, category_mask, category_anyof_mask, return_mask
_SCAN_ARG: Final = struct.Struct("<12Q")
_WALK_END_INDEX: Final = 4
_REGIONS: Final = 4096


class PageTracker:
    """Finds and re-arms written pages.

    Args:
        pagemap: descriptor of QEMU's ``/proc/PID/pagemap``.
        blocks: guest RAM as QEMU has it mapped.
    """

    def __init__(self, pagemap: int, blocks: Sequence[RamBlock]) -> None:
        self._pagemap = pagemap
        self._blocks = tuple(blocks)
        # struct page_region: start, end, categories
        self._regions = np.zeros((_REGIONS, 3), dtype=np.uint64)

    def take(self) -> list[tuple[int, int]]:
        """Get and clear what was written since the last call.

        Returns:
            Runs [start, stop) of page numbers in RAM offset order, ascending.

        Raises:
            OSError: the process is gone, or its RAM is not write-tracked.
        """
        runs = []
        for block in self._blocks:
            end = block.host_address + block.size_bytes
            shift = block.ram_offset - block.host_address
            position = block.host_address
            while position < end:
                regions, position = self._scan(position, end)
                for start, stop, _categories in regions.tolist():
                    runs.append(((start + shift) // PAGE_BYTES, (stop + shift) // PAGE_BYTES))
        return runs

    def _scan(self, start: int, end: int) -> tuple[npt.NDArray[np.uint64], int]:
        argument = bytearray(
            _SCAN_ARG.pack(
                _SCAN_ARG.size,
                _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC,
                start,
                end,
                0,
                self._regions.ctypes.data,
                _REGIONS,
                0,
                0,
                _PAGE_IS_WRITTEN,
                0,
                _PAGE_IS_WRITTEN,
            )
        )
        count = fcntl.ioctl(self._pagemap, PAGEMAP_SCAN, argument)
        walked_to: int = _SCAN_ARG.unpack(argument)[_WALK_END_INDEX]
        return self._regions[:count], walked_to
