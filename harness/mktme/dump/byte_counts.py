# SPDX-License-Identifier: GPL-2.0-or-later
"""How often each byte is in each page: the one loop for which NumPy is not fast enough.

Numba compiles it when this module is imported, which takes a second: whoever needs it imports it
where he does. See docs/adr/0016-numba.md.
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np
import numpy.typing as npt

_TABLES: Final = 4
_ONE: Final = np.uint32(1)
# Read-only takes both kinds.
_PAGES: Final = numba.types.Array(numba.uint8, 2, "C", readonly=True)


def count_bytes(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count the bytes of pages by value, without Python's lock.

    Args:
        pages: uint8, shape (n, size), C-contiguous; size is less than 2^32 and a multiple of 4.

    Returns:
        int64, shape (n, 256).

    Raises:
        TypeError: it is no such array.
        ValueError: the size is no multiple of 4.
    """
    if pages.shape[-1] % _TABLES:
        raise ValueError(f"the size of a page is a multiple of {_TABLES}, not {pages.shape[-1]}")
    counts = np.empty((len(pages), 256), np.int64)
    _count(pages, counts)
    return counts


@numba.njit(numba.void(_PAGES, numba.int64[:, ::1]), nogil=True)  # type: ignore[untyped-decorator]
def _count(pages: npt.NDArray[np.uint8], counts: npt.NDArray[np.int64]) -> None:
    # Tables that take turns: in one, a byte that comes again has to wait for its count.
    tables = np.empty((_TABLES, 256), np.uint32)
    for number in range(len(pages)):
        page = pages[number]
        tables[:] = 0
        for at in range(0, len(page), _TABLES):
            for table in range(_TABLES):
                tables[table, page[at + table]] += _ONE
        for value in range(256):
            counts[number, value] = tables[:, value].sum()
