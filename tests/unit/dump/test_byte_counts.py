# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes counted by compiled code, against NumPy's own counts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.dump.analysis import COMPILED_FROM_BYTES, Sampling, tally_pages
from mktme.dump.byte_counts import count_bytes

from .contents import prose
from .equal import same

PAGE = 4096


def by_numpy(pages: npt.NDArray[np.uint8]) -> list[list[int]]:
    return [np.bincount(page, minlength=256).tolist() for page in pages]


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=3 * PAGE),
            st.integers(0, 255).map(lambda value: bytes([value]) * PAGE),
            st.binary(min_size=1, max_size=5).map(lambda some: (some * PAGE)[:PAGE]),
        ),
        max_size=4,
    ).map(b"".join)
)
def test_all_bytes_of_each_page(data: bytes) -> None:
    data += bytes(-len(data) % PAGE)
    pages = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
    assert not pages.flags.writeable
    counts = count_bytes(pages)
    assert (str(counts.dtype), counts.shape) == ("int64", (len(pages), 256))
    assert counts.tolist() == by_numpy(pages)
    assert count_bytes(pages.copy()).tolist() == by_numpy(pages)


@given(st.integers(0, 9), st.integers(0, 5))
def test_pages_of_other_sizes(words: int, rows: int) -> None:
    pages = np.random.default_rng(words).integers(0, 256, (rows, 4 * words), dtype=np.uint8)
    assert count_bytes(pages).tolist() == by_numpy(pages)


def test_what_is_no_page() -> None:
    pages = np.zeros((2, 2 * PAGE), np.uint8)
    with pytest.raises(ValueError, match="a multiple of 4, not 6"):
        count_bytes(pages[:, :6])
    for other in (
        pages[:, ::2],
        np.zeros((8, 4), np.uint8).T,
        pages.view(np.uint64),
        pages.reshape(-1),
    ):
        with pytest.raises(TypeError):
            count_bytes(other)  # type: ignore[arg-type]


def test_tally_is_the_same() -> None:
    """Lines that were not written as well."""
    pages = np.random.default_rng(1).integers(0, 256, (300, PAGE), dtype=np.uint8)
    pages[100:200] = np.frombuffer(prose(100 * PAGE), np.uint8).reshape(-1, PAGE)
    pages[::3, 64:1024] = 0
    pages[7] = 0
    numbers = np.arange(len(pages))
    assert same(
        tally_pages(pages, numbers, Sampling(2, 3, compiled=True)),
        tally_pages(pages, numbers, Sampling(2, 3, compiled=False)),
    )


def test_only_large_images_wait_for_the_compiler() -> None:
    assert Sampling.for_data(COMPILED_FROM_BYTES).compiled
    assert not Sampling.for_data(COMPILED_FROM_BYTES - PAGE).compiled
    code = (
        "import sys, numpy as np, mktme.cli, mktme.dump.stats\n"
        "from mktme.dump.analysis import Sampling, tally_pages\n"
        "tally_pages(np.ones((1, 4096), np.uint8), np.arange(1), Sampling.for_data(4096))\n"
        "assert 'numba' not in sys.modules\n"
        "tally_pages(np.ones((1, 4096), np.uint8), np.arange(1), Sampling.for_data(1 << 30))\n"
        "assert 'numba' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
