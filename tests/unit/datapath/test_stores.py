# SPDX-License-Identifier: GPL-2.0-or-later
"""The store tracker: no mark is lost, whenever it is set."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.datapath.stores import StoreTracker

PAGES = 1 << 10
LINES = PAGES * 64

Marks = npt.NDArray[np.uint8]


def numbers(*pages: int) -> npt.NDArray[np.int64]:
    return np.array(pages, dtype=np.int64)


@pytest.fixture
def marks() -> Marks:
    return np.zeros(LINES, dtype=np.uint8)


def test_take_gets_and_clears(marks: Marks) -> None:
    tracker = StoreTracker(marks)
    marks[[3 * 64, 3 * 64 + 63, 5 * 64 + 1]] = 1
    assert tracker.take(numbers(3, 4)).tolist() == [1 << 63 | 1, 0]
    assert marks.nonzero()[0].tolist() == [5 * 64 + 1]
    assert tracker.take(numbers(3, 4, 5)).tolist() == [0, 0, 2]
    assert not marks.any()


def test_take_of_nothing(marks: Marks) -> None:
    taken = StoreTracker(marks).take(numbers())
    assert taken.shape == (0,)
    assert taken.dtype == np.uint64


def test_peek_leaves_marks(marks: Marks) -> None:
    tracker = StoreTracker(marks)
    marks[7 * 64 + 9] = 1
    assert tracker.peek(numbers(7)).tolist() == [1 << 9]
    assert tracker.peek(numbers(6, 7)).tolist() == [0, 1 << 9]
    assert tracker.take(numbers(7)).tolist() == [1 << 9]


def test_any_value_but_zero_is_a_mark(marks: Marks) -> None:
    # The plugin writes 1; a hostile QEMU writes what it likes.
    marks[64:128] = np.arange(192, 256)
    assert StoreTracker(marks).take(numbers(1)).tolist() == [2**64 - 1]
    assert not marks.any()


def test_marked_pages_are_found_once_and_in_order() -> None:
    pages = 3 << 15  # three sweeps
    marks = np.zeros(pages * 64, dtype=np.uint8)
    tracker = StoreTracker(marks)
    assert tracker.marked_pages().tolist() == []
    expected = [0, 1, (1 << 15) - 1, 1 << 15, (2 << 15) + 5, pages - 1]
    for page in expected:
        marks[page * 64 : page * 64 + 64 : 9] = 1
    assert tracker.marked_pages().tolist() == expected
    assert tracker.marked_pages().tolist() == expected  # it takes nothing


@given(st.dictionaries(st.integers(0, PAGES - 1), st.integers(1, 2**64 - 1), max_size=30))
def test_masks_are_the_marks(wanted: dict[int, int]) -> None:
    marks = np.zeros(LINES, dtype=np.uint8)
    for page, mask in wanted.items():
        for line in range(64):
            marks[page * 64 + line] = mask >> line & 1
    tracker = StoreTracker(marks)
    found = tracker.marked_pages()
    assert found.tolist() == sorted(wanted)
    assert dict(zip(found.tolist(), tracker.take(found).tolist(), strict=True)) == wanted
    assert not marks.any()


class Racing(np.ndarray[Any, np.dtype[np.uint8]]):
    """A store map that a vCPU marks at the worst moment: just after it was copied."""

    late: ClassVar[list[int]] = []

    def __getitem__(self, key: Any) -> Any:
        copy = super().__getitem__(key)
        while isinstance(key, np.ndarray) and self.late:
            self.reshape(-1)[self.late.pop()] = 1
        return copy


def test_mark_set_between_copy_and_clear_is_found_the_next_time() -> None:
    marks = np.zeros(LINES, dtype=np.uint8).view(Racing)
    tracker = StoreTracker(marks)
    marks[2 * 64] = 1
    Racing.late.append(2 * 64 + 1)
    assert tracker.take(numbers(2)).tolist() == [1]
    assert Racing.late == []  # the moment came
    assert tracker.take(numbers(2)).tolist() == [2]


# A vCPU as the plugin has it: the store, then its mark. Each store is of another value, mostly to
# the same few lines, so that stores and takes meet. It goes on until the last byte is set, or there
# is nobody any more to set it.
VCPU = """
import mmap, os, random, struct, sys
parent = os.getppid()
memory, lines = mmap.mmap(int(sys.argv[1]), 0), int(sys.argv[2])
draw = random.Random(1).random
value = 0
while not memory[-1] and os.getppid() == parent:
    value += 1
    line = int(lines * draw() ** 4)
    struct.pack_into("<Q", memory, 8 * line, value)
    memory[lines * 8 + line] = 1
print(value)
"""


@pytest.fixture
def shared() -> Iterator[tuple[int, mmap.mmap]]:
    with ExitStack() as stack:
        descriptor = os.memfd_create("ram-and-map")
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, LINES * 9 + 1)
        yield descriptor, mmap.mmap(descriptor, 0)  # closed by its last view


def test_no_store_of_a_running_vcpu_is_lost(shared: tuple[int, mmap.mmap]) -> None:
    """What is read after each take is, in the end, what the vCPU wrote."""
    descriptor, memory = shared
    ram = np.frombuffer(memory, dtype=np.uint64, count=LINES)
    marks = np.frombuffer(memory, dtype=np.uint8, count=LINES, offset=LINES * 8)
    tracker = StoreTracker(marks)
    mirror = np.zeros(LINES, dtype=np.uint64)

    def drain() -> int:
        pages = tracker.marked_pages()
        masks = tracker.take(pages)
        bits = np.unpackbits(masks.view(np.uint8), bitorder="little").reshape(-1, 64)
        rows, columns = bits.nonzero()
        lines = pages[rows] * 64 + columns
        mirror[lines] = ram[lines]
        return len(lines)

    command = [sys.executable, "-c", VCPU, str(descriptor), str(LINES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[descriptor]) as vcpu:
        assert vcpu.stdout is not None
        takes_with_marks = 0
        while takes_with_marks < 300:
            assert vcpu.poll() is None
            takes_with_marks += drain() > 0
        memory[-1] = 1
        stores = int(vcpu.stdout.read())
    drain()
    assert stores >= 300
    assert ram.max() == stores
    assert np.array_equal(mirror, ram)
    assert not marks.any()
