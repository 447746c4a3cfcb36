# SPDX-License-Identifier: GPL-2.0-or-later
"""Entropy of guests' pages, on both sides, against a real engine."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import pytest

from mktme.engine.keys import KeyMode
from mktme.proof.entropy import compare_entropy

from ..conftest import Guests
from ..fake_qemu import PAGE
from .fake_vm import vm_of_qemu


def definition(page: bytes) -> float:
    """Shannon, 1948."""
    shares = [count / len(page) for count in Counter(page).values()]
    return -sum(share * math.log2(share) for share in shares)


@pytest.mark.parametrize("mode", [KeyMode.RANDOM, KeyMode.NO_ENCRYPT])
def test_guest_and_dram(guests: Guests, mode: KeyMode) -> None:
    """Encryption moves every page to the right; without it, nothing moves."""
    qemu, added = guests.link(40, 24, mode=mode)
    text = b"the same words again and again. " * 128
    qemu.store(5 * PAGE, text * 10)
    qemu.dma(50 * PAGE, os.urandom(3 * PAGE))
    guests.client.flush(qemu.vm)
    vm = vm_of_qemu(guests.client, qemu, added)
    dram = Path(guests.client.welcome.dram_path)
    found = compare_entropy(vm, dram)
    assert found.pages == found.written_pages == sum(found.plaintext) == sum(found.ciphertext) == 13
    assert found.plaintext[int(definition(text) * 4)] == 10
    assert found.plaintext[-1] == 3
    assert found.plaintext_mean == pytest.approx((10 * definition(text) + 3 * 7.955) / 13, abs=0.05)
    if mode is KeyMode.RANDOM:
        assert found.ciphertext[-1] == 13
        assert found.ciphertext_mean == pytest.approx(7.955, abs=0.02)
    else:
        assert found.ciphertext == found.plaintext
        assert found.ciphertext_mean == found.plaintext_mean


def test_few_are_drawn_of_many(guests: Guests) -> None:
    qemu, added = guests.link(64)
    qemu.store(0, os.urandom(64 * PAGE))
    guests.client.flush(qemu.vm)
    vm = vm_of_qemu(guests.client, qemu, added)
    found = compare_entropy(vm, Path(guests.client.welcome.dram_path), sample_pages=10)
    assert (found.written_pages, found.pages) == (64, 10)
    assert sum(found.ciphertext) == 10


def test_guest_that_wrote_nothing(guests: Guests) -> None:
    qemu, added = guests.link(64)
    vm = vm_of_qemu(guests.client, qemu, added)
    found = compare_entropy(vm, Path(guests.client.welcome.dram_path))
    assert (found.pages, found.written_pages, found.plaintext_mean) == (0, 0, 0.0)
    assert not any(found.plaintext)


def test_lines_that_were_never_written_do_not_count(guests: Guests) -> None:
    """Half a page of noise is as random as it can be, in DRAM and in the guest."""
    qemu, added = guests.link(64)
    qemu.store(PAGE, os.urandom(2 * PAGE))
    guests.client.flush(qemu.vm)
    vm = vm_of_qemu(guests.client, qemu, added)
    dram = Path(guests.client.welcome.dram_path)
    with dram.open("r+b") as file:
        file.seek(vm.base + PAGE + PAGE // 2)
        file.write(bytes(PAGE // 2 + PAGE))
    found = compare_entropy(vm, dram)
    assert found.pages == 1
    assert found.plaintext_mean == pytest.approx(7.91, abs=0.03)
    assert found.ciphertext_mean == pytest.approx(7.91, abs=0.03)
