# SPDX-License-Identifier: GPL-2.0-or-later
"""Entropy of pages, against its definition, and of guests against a real engine."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.engine.keys import KeyMode
from mktme.proof.entropy import BINS, compare_entropy, histogram, page_entropy

from ..conftest import Guests
from ..fake_qemu import PAGE
from .fake_vm import vm_of_qemu


def definition(page: bytes) -> float:
    """Shannon, 1948."""
    shares = [count / len(page) for count in Counter(page).values()]
    return -sum(share * math.log2(share) for share in shares)


@given(st.lists(st.binary(min_size=1, max_size=PAGE), min_size=1, max_size=3))
def test_is_as_defined(patterns: list[bytes]) -> None:
    pages = [(pattern * PAGE)[:PAGE] for pattern in patterns]
    found = page_entropy(np.frombuffer(b"".join(pages), np.uint8).reshape(-1, PAGE))
    assert found == pytest.approx([definition(page) for page in pages], abs=1e-9)


@pytest.mark.parametrize(
    ("page", "bits"),
    [(bytes(PAGE), 0.0), (bytes(range(256)) * 16, 8.0), (b"\0\1" * 2048, 1.0)],
)
def test_known_pages(page: bytes, bits: float) -> None:
    found = page_entropy(np.frombuffer(page, np.uint8).reshape(1, PAGE))
    assert found.tolist() == [bits]
    bins = histogram(found)
    assert bins.shape == (BINS,)
    assert np.flatnonzero(bins).tolist() == [min(int(bits * 4), BINS - 1)]


def test_no_pages_have_no_entropy() -> None:
    assert page_entropy(np.empty((0, PAGE), np.uint8)).shape == (0,)


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
