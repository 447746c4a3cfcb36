# SPDX-License-Identifier: GPL-2.0-or-later
"""The comparison of DRAM with RAM, against a real engine: it passes, and it can fail."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import cast

import pytest

from mktme.datapath.shadow import Track
from mktme.proof.guest_ram import CHUNK_BYTES
from mktme.proof.transparency import MemoryComparison, compare_memory, run_workload
from mktme.vm.console import CommandResult, Console, VmError

from ..conftest import Guests
from ..fake_qemu import LINE, PAGE, FakeQemu
from .fake_vm import vm_of_qemu

EXACT = MemoryComparison(
    lines_compared=4096,
    lines_nonzero=100,
    lines_mismatched=0,
    line_marked=0,
    page_marked=0,
    unmarked=0,
)


def compared(
    guests: Guests, *pages: int, track: Track = Track.STORES
) -> tuple[FakeQemu, Callable[[], MemoryComparison]]:
    qemu, added = guests.link(*pages, track=track)
    vm = vm_of_qemu(guests.client, qemu, added)
    return qemu, lambda: compare_memory(vm, guests.client)


def test_exact_memory_passes(guests: Guests) -> None:
    qemu, compare = compared(guests, 40, 24, track=Track.STORES_AND_PAGES)
    qemu.store(5 * PAGE, os.urandom(PAGE))
    qemu.dma(50 * PAGE, b"x")
    guests.client.flush(qemu.vm)
    found = compare()
    assert found == MemoryComparison(64 * 64, 65, 0, 0, 0, 0)
    assert found.passed


def test_causes_of_mismatches_are_told_apart(guests: Guests) -> None:
    """One line of each kind; the store tracker alone, so that what it misses stays behind."""
    qemu, compare = compared(guests)
    qemu.store(2 * PAGE, b"a" * LINE)
    guests.client.flush(qemu.vm)
    assert compare().passed
    qemu.dma(2 * PAGE, b"b" * LINE)  # a line that a store was seen to
    qemu.dma(2 * PAGE + 5 * LINE, b"b" * 2 * LINE)  # two beside it
    qemu.dma(9 * PAGE, b"b" * 3 * LINE)  # three in a page without any
    guests.client.flush(qemu.vm)
    found = compare()
    assert found == MemoryComparison(
        lines_compared=64 * 64,
        lines_nonzero=6,
        lines_mismatched=6,
        line_marked=1,
        page_marked=2,
        unmarked=3,
    )
    assert not found.passed


def test_last_line_counts(guests: Guests) -> None:
    qemu, compare = compared(guests)
    qemu.store(0, b"x")
    qemu.dma(64 * PAGE - 1, b"x")
    guests.client.flush(qemu.vm)
    assert compare().lines_mismatched == 1


def test_data_in_dram_that_ram_does_not_have_is_a_mismatch(guests: Guests) -> None:
    qemu, compare = compared(guests)
    qemu.store(0, b"x" * 2 * LINE)
    guests.client.flush(qemu.vm)
    qemu.dma(0, bytes(LINE))
    assert compare().lines_mismatched == 1


def test_memory_of_zeros_proves_nothing(guests: Guests) -> None:
    qemu, compare = compared(guests)
    guests.client.flush(qemu.vm)
    found = compare()
    assert (found.lines_nonzero, found.lines_mismatched) == (0, 0)
    assert not found.passed


def test_progress_is_told(guests: Guests) -> None:
    pages = 2 * CHUNK_BYTES // PAGE + 1
    qemu, added = guests.link(pages)
    qemu.store(qemu.ram_bytes - 1, b"x")
    guests.client.flush(qemu.vm)
    told: list[tuple[int, int]] = []
    vm = vm_of_qemu(guests.client, qemu, added)
    assert compare_memory(vm, guests.client, lambda done, all_: told.append((done, all_))).passed
    total = pages * PAGE
    assert told == [(CHUNK_BYTES, total), (2 * CHUNK_BYTES, total), (total, total)]


def test_vm_that_is_not_linked_cannot_be_compared(guests: Guests, qemu: FakeQemu) -> None:
    vm = vm_of_qemu(guests.client, qemu, guests.announce(qemu))
    with pytest.raises(VmError, match="alice is not linked"):
        compare_memory(vm, guests.client)


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        ({}, True),
        ({"lines_mismatched": 1, "unmarked": 1}, False),
        ({"lines_nonzero": 0}, False),
    ],
)
def test_verdict(fields: dict[str, int], passed: bool) -> None:
    assert dataclasses.replace(EXACT, **fields).passed == passed


# --- the workload -----------------------------------------------------------------------------


class Says:
    """A console whose guest says one thing to every command."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.commands: list[str] = []

    def run(self, command: str, _timeout_s: float) -> CommandResult:
        self.commands.append(command)
        return CommandResult(self.output, 0)


def test_checksums_of_the_workload() -> None:
    guest = Says("noise\n@mktme sum md5 0ab1\n@mktme sum tmpfs ff\nmore\n@mktme workload done\n")
    assert run_workload(cast("Console", guest), 3) == {"md5": "0ab1", "tmpfs": "ff"}
    assert guest.commands == ["workload 3"]


@pytest.mark.parametrize(
    "output",
    [
        "",
        "@mktme workload done\n",
        "@mktme sum md5 0ab1\n",
        " @mktme sum md5 0ab1\n@mktme workload",
    ],
    ids=["nothing", "no sums", "not done", "half of it"],
)
def test_workload_that_does_not_say_that_it_is_done(output: str) -> None:
    with pytest.raises(VmError, match="did not say that it is done"):
        run_workload(cast("Console", Says(output)))
