# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory controller: KeyIDs of pages, updates, reads."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mktme.engine.controller import BATCH_PAGES, MemoryController
from mktme.engine.dram import Dram
from mktme.engine.errors import AddressError, DramFullError, KeyIdError
from mktme.engine.keys import KeyTable
from mktme.engine.sidecar import (
    PageRange,
    PlatformRecord,
    Sidecar,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.tme import ExclusionRange
from mktme.engine.xts import Algorithm

from .conftest import activated

MIB = 1 << 20
PAGES = 512
DRAM_BYTES = PAGES * 4096
ALL_LINES = 2**64 - 1
KEY = bytes(range(32))

Words = NDArray[np.uint64]


class SmallDram(Dram):
    """Notes writes, and is full once it took ``space_bytes``."""

    writes: list[tuple[int, int]]
    space_bytes: int

    def write(self, address: int, buffer: bytes | bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        fits = min(len(view), self.space_bytes)
        super().write(address, view[:fits])
        self.writes.append((address, fits))
        self.space_bytes -= fits
        if fits < len(view):
            raise DramFullError("full", address=address + fits)


class Platform:
    """KeyID 1: direct AES-XTS-128, 2: random AES-XTS-256, 3: not encrypted."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "dram"
        self.dram = SmallDram.create(self.path, DRAM_BYTES)
        self.dram.writes = []
        self.dram.space_bytes = 1 << 40
        self.keys = activated(keyid_bits=3)
        self.keys.program_direct(1, Algorithm.AES_XTS_128, KEY)
        self.keys.program_random(2, Algorithm.AES_XTS_256)
        self.keys.program_no_encrypt(3)
        self.controller = MemoryController(self.dram, self.keys)

    def stored(self, page: int) -> bytes:
        """What is in the file."""
        with self.path.open("rb") as file:
            file.seek(page * 4096)
            return file.read(4096)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    platform = Platform(tmp_path)
    yield platform
    platform.dram.close()


@pytest.fixture
def controller(platform: Platform) -> MemoryController:
    return platform.controller


def random_pages(count: int, seed: int = 1) -> Words:
    pages = np.random.default_rng(seed).integers(0, 2**64, (count, 512), np.uint64)
    pages.flags.writeable = False  # update_pages leaves its plaintext alone
    return pages


def numbers(*pages: int) -> NDArray[np.int64]:
    return np.array(pages, np.int64)


def masks(*values: int) -> Words:
    return np.array(values, np.uint64)


# --- KeyIDs and addresses ---------------------------------------------------------------------


def test_reference_carries_the_keyid_above_the_address(controller: MemoryController) -> None:
    assert controller.maxphyaddr == 46
    assert controller.reference(5, 0x1234) == 5 << 43 | 0x1234
    assert controller.split(5 << 43 | 0x1234) == (5, 0x1234)
    assert controller.split(controller.reference(7, (1 << 43) - 1)) == (7, (1 << 43) - 1)
    assert controller.split(controller.reference(0, 0)) == (0, 0)


def test_reference_out_of_range_is_refused(controller: MemoryController) -> None:
    for reference in (-1, 1 << 46):
        with pytest.raises(AddressError):
            controller.split(reference)
    for address in (-1, 1 << 43):
        with pytest.raises(AddressError):
            controller.reference(0, address)
    for keyid in (-1, 8):
        with pytest.raises(KeyIdError):
            controller.reference(keyid, 0)


def test_dram_must_be_addressable(platform: Platform) -> None:
    MemoryController(platform.dram, platform.keys, maxphyaddr=21)  # 2 MiB
    with pytest.raises(AddressError, match="20 address bits"):
        MemoryController(platform.dram, platform.keys, maxphyaddr=20)


def test_keyids_take_their_address_bits_once_they_are_activated(platform: Platform) -> None:
    keys = KeyTable()
    controller = MemoryController(platform.dram, keys)
    assert controller.address_bits == 46
    assert controller.split(1 << 45) == (0, 1 << 45)
    keys.draw_tme_key(Algorithm.AES_XTS_128)
    keys.activate(15)
    assert controller.address_bits == 31
    assert controller.split(1 << 45) == (1 << 14, 0)


def test_pages_are_keyid_0s_until_they_are_assigned(controller: MemoryController) -> None:
    assert controller.page_ranges() == (PageRange(base=0, size_bytes=DRAM_BYTES, keyid=0),)
    controller.assign(4096, 8192, 2)
    controller.assign(8192, 4096, 1)
    assert [controller.keyid_at(address) for address in (4095, 4096, 8192, 12287, 12288)] == [
        0, 2, 1, 1, 0,
    ]  # fmt: skip
    assert controller.page_ranges() == (
        PageRange(base=0, size_bytes=4096, keyid=0),
        PageRange(base=4096, size_bytes=4096, keyid=2),
        PageRange(base=8192, size_bytes=4096, keyid=1),
        PageRange(base=12288, size_bytes=DRAM_BYTES - 12288, keyid=0),
    )


def test_bad_assignment_is_refused(controller: MemoryController) -> None:
    for base, size_bytes in ((64, 4096), (0, 100), (-4096, 4096), (DRAM_BYTES, 4096)):
        with pytest.raises(AddressError):
            controller.assign(base, size_bytes, 1)
    with pytest.raises(KeyIdError, match="0 to 7"):
        controller.assign(0, 4096, 8)
    with pytest.raises(AddressError):
        controller.keyid_at(DRAM_BYTES)
    assert len(controller.page_ranges()) == 1


def test_reset_gives_every_page_to_keyid_0_and_excludes_none(platform: Platform) -> None:
    controller = platform.controller
    controller.assign(0, MIB, 1)
    controller.exclude(ExclusionRange(mask=0, base=0))
    controller.reset()
    assert controller.page_ranges() == (PageRange(base=0, size_bytes=DRAM_BYTES, keyid=0),)
    controller.update_pages(numbers(5), random_pages(1))
    assert platform.stored(5) != random_pages(1).tobytes()


# --- updates and reads ------------------------------------------------------------------------


def test_updated_pages_read_back(controller: MemoryController) -> None:
    controller.assign(0, MIB, 1)
    plaintext = random_pages(BATCH_PAGES)
    pages = np.arange(3, 3 + BATCH_PAGES)
    assert (controller.update_pages(pages, plaintext) == ALL_LINES).all()
    assert np.array_equal(controller.read_pages(3, BATCH_PAGES), plaintext)


def test_dram_holds_aes_xts_with_the_address_as_tweak(platform: Platform) -> None:
    platform.controller.assign(0, DRAM_BYTES, 1)
    plaintext = random_pages(2)
    platform.controller.update_pages(numbers(7, 9), plaintext)
    for page, content in zip((7, 9), plaintext, strict=True):
        for offset in range(0, 4096, 64):
            mode = modes.XTS((page * 4096 + offset).to_bytes(16, "little"))
            line = content.tobytes()[offset : offset + 64]
            expected = Cipher(algorithms.AES(KEY), mode).encryptor().update(line)
            assert platform.stored(page)[offset : offset + 64] == expected
    assert platform.stored(8) == bytes(4096)


def test_sidecar_and_key_are_enough_to_decrypt_the_image(platform: Platform) -> None:
    platform.controller.assign(4096, 8192, 1)
    plaintext = random_pages(2)
    platform.controller.update_pages(numbers(1, 2), plaintext)
    sidecar = Sidecar(
        platform=PlatformRecord(
            maxphyaddr=platform.controller.maxphyaddr,
            keyid_bits=platform.keys.keyid_bits,
            dram_bytes=platform.dram.size_bytes,
        ),
        keys=platform.keys.describe(),
        exclusion=None,
        vms=(),
        pages=platform.controller.page_ranges(),
    )
    write_sidecar(sidecar_path(platform.path), sidecar)
    assert read_sidecar(sidecar_path(platform.path)) == sidecar
    text = sidecar_path(platform.path).read_text()
    assert KEY[:8].hex() not in text

    # From here on, as somebody who never saw this project.
    described = json.loads(text)
    (entry,) = (one for one in described["keys"] if one["keyid"] == 1)
    assert entry["algorithm"] == "aes-xts-128"
    (run,) = (one for one in described["pages"] if one["keyid"] == 1)
    unit = described["data_unit_bytes"]
    image = platform.path.read_bytes()
    decrypted = b""
    for address in range(run["base"], run["base"] + run["size_bytes"], unit):
        mode = modes.XTS(address.to_bytes(16, "little"))
        decryptor = Cipher(algorithms.AES(KEY), mode).decryptor()
        decrypted += decryptor.update(image[address : address + unit])
    assert decrypted == plaintext.tobytes()


def test_wrong_keyid_reads_garbage(controller: MemoryController) -> None:
    controller.assign(0, 4096, 1)
    plaintext = random_pages(1)
    controller.update_pages(numbers(0), plaintext)
    assert np.array_equal(controller.read_pages(0, 1, keyid=1), plaintext)
    for keyid in (0, 2, 3):
        assert (controller.read_pages(0, 1, keyid=keyid) != plaintext).all()


def test_keyid_3_is_not_encrypted(platform: Platform) -> None:
    platform.controller.assign(0, 4096, 3)
    plaintext = random_pages(1)
    platform.controller.update_pages(numbers(0), plaintext)
    assert platform.stored(0) == plaintext.tobytes()
    assert np.array_equal(platform.controller.read_pages(0, 1), plaintext)


def test_exclusion_is_exact_and_of_keyid_0_alone(platform: Platform) -> None:
    """Pages 4 to 7 are excluded; KeyID 4 has the TME key, and is no KeyID 0 all the same."""
    controller = platform.controller
    controller.exclude(ExclusionRange(mask=(1 << 46) - 4 * 4096, base=4 * 4096))
    plaintext = random_pages(12)
    flipped = plaintext ^ np.uint64(1)
    for keyid in range(5):
        controller.assign(0, 12 * 4096, keyid)
        assert controller.update_pages(np.arange(12), plaintext).all()
        in_plaintext = [
            page for page in range(12) if platform.stored(page) == plaintext[page].tobytes()
        ]
        assert in_plaintext == {0: [4, 5, 6, 7], 3: list(range(12))}.get(keyid, [])
        assert np.array_equal(controller.read_pages(0, 12), plaintext)
        # Single lines go another way.
        controller.update_pages(np.arange(12), flipped, masks(*[2] * 12))
        line_in_plaintext = platform.stored(5)[64:128] == flipped[5, 8:16].tobytes()
        assert line_in_plaintext == (keyid in (0, 3))


def test_without_the_exclusion_its_plaintext_is_decrypted_to_garbage(
    controller: MemoryController,
) -> None:
    controller.exclude(ExclusionRange(mask=(1 << 46) - 4096, base=0))
    controller.update_pages(numbers(0), random_pages(1))
    assert np.array_equal(controller.read_pages(0, 1), random_pages(1))
    controller.exclude(None)
    assert (controller.read_pages(0, 1) != random_pages(1)).all()


def test_keyids_may_differ_within_a_batch(controller: MemoryController) -> None:
    for page, keyid in enumerate([1, 1, 2, 3, 1, 0]):
        controller.assign(page * 4096, 4096, keyid)
    plaintext = random_pages(6)
    controller.update_pages(np.arange(6), plaintext)
    assert np.array_equal(controller.read_pages(0, 6), plaintext)
    for page, keyid in enumerate([1, 1, 2, 3, 1, 0]):
        one = controller.read_pages(page, 1, keyid=keyid)
        assert np.array_equal(one, plaintext[page : page + 1])
    flipped = plaintext ^ np.uint64(1)
    changed = controller.update_pages(np.arange(6), flipped, masks(*[1 << 63 | 1] * 6))
    assert changed.tolist() == [1 << 63 | 1] * 6
    mixed = plaintext.copy()
    mixed[:, :8], mixed[:, -8:] = flipped[:, :8], flipped[:, -8:]
    assert np.array_equal(controller.read_pages(0, 6), mixed)


def test_only_lines_in_the_masks_are_encrypted(platform: Platform) -> None:
    platform.controller.update_pages(numbers(4), random_pages(1), masks(1 << 5))
    stored = platform.stored(4)
    assert stored[5 * 64 : 6 * 64] != bytes(64)
    assert stored[: 5 * 64] == bytes(5 * 64)
    assert stored[6 * 64 :] == bytes(58 * 64)


def test_masks_of_changed_lines(controller: MemoryController) -> None:
    plaintext = random_pages(3)
    pages = numbers(10, 11, 13)
    assert controller.update_pages(pages, plaintext).tolist() == [ALL_LINES] * 3
    assert controller.update_pages(pages, plaintext).tolist() == [0, 0, 0]
    after = plaintext.copy()
    after[0, 0] ^= np.uint64(1)  # line 0
    after[2, 511] ^= np.uint64(1 << 63)  # line 63
    after[2, 8 * 7 + 3] ^= np.uint64(1)  # line 7
    # Marked and changed, not marked but changed, marked but not changed.
    assert controller.update_pages(pages, after, masks(3, 3, 1 << 63 | 2)).tolist() == [
        1, 0, 1 << 63,
    ]  # fmt: skip
    assert controller.update_pages(pages, after).tolist() == [0, 0, 1 << 7]


def test_first_write_of_zeros_counts_and_encrypts(platform: Platform) -> None:
    zeros = np.zeros((1, 512), np.uint64)
    assert platform.controller.update_pages(numbers(0), zeros, masks(6)).tolist() == [6]
    assert platform.stored(0)[64:128] != bytes(64)
    assert platform.controller.update_pages(numbers(0), zeros, masks(6)).tolist() == [0]
    assert not platform.controller.read_pages(0, 1).any()


def test_another_key_changes_the_ciphertext(controller: MemoryController) -> None:
    controller.update_pages(numbers(0), random_pages(1))
    controller.assign(0, 4096, 2)
    assert controller.update_pages(numbers(0), random_pages(1)).tolist() == [ALL_LINES]
    assert np.array_equal(controller.read_pages(0, 1), random_pages(1))


@pytest.mark.parametrize("keyid", range(4))
def test_lines_never_written_are_zeros_whatever_the_keyid(
    controller: MemoryController, keyid: int
) -> None:
    plaintext = random_pages(1)
    controller.update_pages(numbers(1), plaintext, masks(1 << 9))
    pages = controller.read_pages(0, 3, keyid=keyid)
    lines = pages.reshape(-1, 8)
    written = 64 + 9
    assert not np.delete(lines, written, axis=0).any()
    assert np.array_equal(lines[written], plaintext[0, 72:80]) == (keyid == 0)


def test_writes_are_of_runs_of_changed_pages(platform: Platform) -> None:
    plaintext = random_pages(5).copy()
    pages = numbers(1, 2, 3, 7, 8)
    platform.controller.update_pages(pages, plaintext)
    assert platform.dram.writes == [(4096, 3 * 4096), (7 * 4096, 2 * 4096)]
    platform.dram.writes.clear()
    platform.controller.update_pages(pages, plaintext)
    platform.controller.update_pages(pages, plaintext, masks(1, 0, ALL_LINES, 2, 4))
    assert platform.dram.writes == []
    plaintext[1] ^= np.uint64(1)
    plaintext[3] ^= np.uint64(1)
    platform.controller.update_pages(pages, plaintext)
    assert platform.dram.writes == [(2 * 4096, 4096), (7 * 4096, 4096)]


def test_read_into_a_given_array(controller: MemoryController) -> None:
    controller.update_pages(numbers(0, 1), random_pages(2))
    out = np.empty((3, 512), np.uint64)
    assert controller.read_pages(0, 3, out=out) is out
    assert np.array_equal(out[:2], random_pages(2))
    assert not out[2].any()


def test_read_of_more_than_a_batch(controller: MemoryController) -> None:
    plaintext = random_pages(300)
    for start in range(0, 300, BATCH_PAGES):
        part = plaintext[start : start + BATCH_PAGES]
        controller.update_pages(np.arange(start, start + len(part)), part)
    assert np.array_equal(controller.read_pages(0, 300), plaintext)
    assert controller.read_pages(0, 0).shape == (0, 512)


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("keyid", range(5))
def test_page_of_a_fault_is_read_as_any_other(
    platform: Platform, keyid: int, excluded: bool
) -> None:
    """Pages written, never written, written in part, and one with a line of odd ciphertext."""
    controller = platform.controller
    controller.assign(0, 4 * 4096, keyid)
    if excluded:
        controller.exclude(ExclusionRange(mask=(1 << 46) - 4 * 4096, base=0))
    controller.update_pages(numbers(0), random_pages(1))
    controller.update_pages(numbers(2), random_pages(1, seed=2), masks(0b1010))
    controller.update_pages(numbers(3), random_pages(1, seed=3))
    platform.dram.write(3 * 4096 + 5 * 64, bytes(8))
    expected = controller.read_pages(0, 4)
    for page in range(4):
        out = np.full((1, 512), 1, np.uint64)
        assert controller.read_page(page, out) == 0
        assert np.array_equal(out[0], expected[page])


def test_bad_read_of_a_fault_is_refused(controller: MemoryController) -> None:
    out = np.empty((1, 512), np.uint64)
    for page in (-1, PAGES):
        with pytest.raises(AddressError, match="not in DRAM"):
            controller.read_page(page, out)
    for bad in (np.empty((2, 512), np.uint64), np.empty((1, 1024), np.uint64)[:, ::2]):
        with pytest.raises(ValueError, match=r"must be C-contiguous with shape \(1, 512\)"):
            controller.read_page(0, bad)


def test_read_of_lines(controller: MemoryController) -> None:
    controller.update_pages(numbers(0, 1), random_pages(2))
    data = random_pages(2).tobytes()
    assert controller.read(4096 - 64, 192) == data[4096 - 64 : 4096 + 128]
    assert controller.read(8192, 64) == bytes(64)
    assert controller.read(128, 0) == b""
    assert controller.read(0, 64, keyid=2) != data[:64]
    for address, size_bytes in ((1, 64), (0, 63), (-64, 64), (DRAM_BYTES, 64)):
        with pytest.raises(AddressError):
            controller.read(address, size_bytes)
    with pytest.raises(KeyIdError):
        controller.read(0, 64, keyid=8)


@pytest.mark.parametrize("with_masks", [False, True])
def test_full_dram_keeps_what_was_written_and_a_retry_completes(
    platform: Platform, with_masks: bool
) -> None:
    plaintext = random_pages(4)
    pages = numbers(0, 1, 5, 6)
    line_masks = masks(*[ALL_LINES] * 4) if with_masks else None
    platform.dram.space_bytes = 2 * 4096 + 1000
    with pytest.raises(DramFullError) as caught:
        platform.controller.update_pages(pages, plaintext, line_masks)
    assert caught.value.address == 5 * 4096 + 1000
    assert np.array_equal(platform.controller.read_pages(0, 2), plaintext[:2])
    assert not platform.controller.read_pages(6, 1).any()
    platform.dram.space_bytes = 1 << 40
    changed = platform.controller.update_pages(pages, plaintext, line_masks)
    # 1000 bytes are 15 lines and part of the next.
    assert changed.tolist() == [0, 0, (ALL_LINES) & ~(2**15 - 1), ALL_LINES]
    assert np.array_equal(platform.controller.read_pages(5, 2), plaintext[2:])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_really_full_file_system_then_space(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    try:
        with Dram.create(tmp_path / "dram", DRAM_BYTES) as dram:
            controller = MemoryController(dram, activated())
            plaintext = random_pages(BATCH_PAGES)
            pages = np.arange(BATCH_PAGES)
            with pytest.raises(DramFullError):
                controller.update_pages(pages, plaintext)
            subprocess.run(["mount", "-o", "remount,size=1m", tmp_path], check=True)
            controller.update_pages(pages, plaintext)
            assert np.array_equal(controller.read_pages(0, BATCH_PAGES), plaintext)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


BAD_UPDATES: list[tuple[Any, Any, Any, type[Exception]]] = [
    ([0], random_pages(1), None, TypeError),
    (np.array([0.0]), random_pages(1), None, TypeError),
    (numbers(0), random_pages(1).view(np.int64), None, TypeError),
    (numbers(0), random_pages(1), np.array([1]), TypeError),
    (numbers(0), random_pages(2), None, ValueError),
    (numbers(0), random_pages(1).reshape(-1), None, ValueError),
    (numbers(0, 1), np.asfortranarray(random_pages(2)), None, ValueError),
    (numbers(0), random_pages(1), masks(1, 2), ValueError),
    (numbers(1, 0), random_pages(2), None, ValueError),
    (numbers(1, 1), random_pages(2), None, ValueError),
    (numbers(0).reshape(1, 1), random_pages(1), None, ValueError),
    (np.arange(BATCH_PAGES + 1), random_pages(BATCH_PAGES + 1), None, ValueError),
    (numbers(-1), random_pages(1), None, AddressError),
    (numbers(0, PAGES), random_pages(2), None, AddressError),
    (np.array([2**63 + 1], np.uint64), random_pages(1), None, AddressError),
]


@pytest.mark.parametrize(("pages", "plaintext", "line_masks", "error"), BAD_UPDATES)
def test_bad_update_is_refused(
    platform: Platform, pages: Any, plaintext: Any, line_masks: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        platform.controller.update_pages(pages, plaintext, line_masks)
    assert platform.dram.writes == []


def test_empty_update_is_fine(controller: MemoryController) -> None:
    assert controller.update_pages(numbers(), random_pages(0)).shape == (0,)
    assert controller.update_pages(numbers(), random_pages(0), masks()).shape == (0,)


def test_bad_read_is_refused(controller: MemoryController) -> None:
    for first, count in ((-1, 1), (PAGES, 1), (0, PAGES + 1), (0, -1)):
        with pytest.raises(AddressError):
            controller.read_pages(first, count)
    with pytest.raises(KeyIdError):
        controller.read_pages(0, 1, keyid=8)
    with pytest.raises(ValueError, match="out must be"):
        controller.read_pages(0, 2, out=np.empty((1, 512), np.uint64))


# --- against a model --------------------------------------------------------------------------

MODEL_PAGES = 12
page_sets = st.sets(st.integers(0, MODEL_PAGES - 1), min_size=1).map(sorted)
line_sets = st.one_of(st.just(0), st.just(ALL_LINES), st.integers(0, ALL_LINES))


@given(data=st.data())
@settings(deadline=None)
def test_any_sequence_of_updates_agrees_with_a_model(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    platform = Platform(tmp_path_factory.mktemp("model"))
    controller = platform.controller
    keyids = data.draw(
        st.lists(st.integers(0, 3), min_size=MODEL_PAGES, max_size=MODEL_PAGES), label="keyids"
    )
    for page, keyid in enumerate(keyids):
        controller.assign(page * 4096, 4096, keyid)
    content: dict[tuple[int, int], bytes] = {}  # (page, line): plaintext, once written
    for _ in range(data.draw(st.integers(1, 4), label="updates")):
        pages = data.draw(page_sets, label="pages")
        # Few different lines, so that some do not change; zeros among them.
        seed = data.draw(st.integers(0, 2**32), label="seed")
        generator = np.random.default_rng(seed)
        plaintext = generator.integers(0, 2, (len(pages), 64, 1), np.uint64).repeat(8, axis=2)
        whole = data.draw(st.booleans(), label="whole")
        line_masks = [ALL_LINES if whole else data.draw(line_sets) for _ in pages]
        expected = []
        for row, page in enumerate(pages):
            mask = 0
            for line in range(64):
                if not line_masks[row] >> line & 1:
                    continue
                new = plaintext[row, line].tobytes()
                # Not encrypted, zeros cannot be told from what was never written.
                old = content.get((page, line), bytes(64) if keyids[page] == 3 else None)
                mask |= (new != old) << line
                content[page, line] = new
            expected.append(mask)
        changed = controller.update_pages(
            numbers(*pages),
            plaintext.reshape(len(pages), 512),
            None if whole else masks(*line_masks),
        )
        assert changed.tolist() == expected
    plain = controller.read_pages(0, MODEL_PAGES).reshape(MODEL_PAGES, 64, 8)
    for page in range(MODEL_PAGES):
        for line in range(64):
            assert plain[page, line].tobytes() == content.get((page, line), bytes(64))
    platform.dram.close()
