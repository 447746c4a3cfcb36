# SPDX-License-Identifier: GPL-2.0-or-later
"""MACs of lines when lines are written: by updates, by rekeying, and by what ends half-way."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mktme.engine.dram import Dram, Region, mac_path
from mktme.engine.errors import DramFullError, IntegrityError
from mktme.engine.integrity import Violation

from .macs import (
    ALL_LINES,
    LINE,
    MAC,
    NO_ENCRYPT,
    OTHER_MAC,
    PAGE,
    PAGES,
    PLAIN,
    POISON,
    TME,
    Platform,
    content,
    split,
)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    platform = Platform(tmp_path)
    yield platform
    platform.dram.close()


# --- writes -----------------------------------------------------------------------------------


class Noting(Dram):
    """Notes writes."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.writes: list[tuple[str, int]] = []

    def write(self, address: int, buffer: bytes | bytearray | memoryview) -> None:
        self.writes.append(("ciphertext", address))
        super().write(address, buffer)

    def write_macs(self, address: int, entries: bytes | bytearray | memoryview) -> None:
        self.writes.append(("MACs", address))
        super().write_macs(address, entries)


def test_write_makes_a_poisoned_line_good(platform: Platform) -> None:
    platform.write(3, content(1))
    platform.line(3 * PAGE, b"x" * LINE)
    platform.entry(3 * PAGE + LINE, bytes(4))
    assert platform.read(3)[1] == 0b11
    kinds = [platform.controller.violation_at(3 * PAGE + at) for at in (0, LINE)]
    assert kinds == [Violation.MISMATCH, Violation.NO_MAC]
    # Nothing but the lines named is looked at; line 1's ciphertext is there, but not its MAC.
    assert platform.write(3, content(1), mask=0b100) == 0
    assert platform.read(3)[1] == 0b11
    assert platform.write(3, content(1), mask=0b010) == 0
    assert platform.read(3)[1] == 0b01
    assert platform.write(3, content(1)) == 1
    assert platform.accepts(3, content(1))


def test_write_of_the_same_leaves_a_mac_that_is_there_alone(platform: Platform) -> None:
    """A bad one too: that it is bad would take a hash of each line that did not change."""
    platform.write(3, content(1))
    platform.entry(3 * PAGE, b"x" * 4)
    assert platform.write(3, content(1)) == 0
    assert platform.read(3)[1] == 1
    platform.write(3, content(2))
    platform.write(3, content(1))
    assert platform.accepts(3, content(1))


def test_update_without_a_change_writes_nothing(tmp_path: Path) -> None:
    platform = Platform(tmp_path, Noting)
    platform.write(3, content(1))
    dram = platform.dram
    assert isinstance(dram, Noting)
    # Nothing had a MAC that would have to go first.
    assert dram.writes == [("ciphertext", 3 * PAGE), ("MACs", 3 * PAGE)]
    dram.writes.clear()
    assert platform.write(3, content(1)) == 0
    assert platform.write(3, content(1), mask=0xFF) == 0
    assert dram.writes == []
    assert platform.write(3, content(2), mask=0xFF) == 0xFF
    assert [what for what, _ in dram.writes] == ["MACs", "ciphertext", "MACs"]
    dram.close()


@pytest.mark.parametrize("keyid", [TME, PLAIN, NO_ENCRYPT])
def test_write_without_integrity_takes_the_mac_away(platform: Platform, keyid: int) -> None:
    platform.write(3, content(1))
    platform.write(3, content(2), keyid, mask=0b110)
    for number in range(64):
        had = platform.entry(3 * PAGE + number * LINE)
        assert (had == bytes(4)) == (number in (1, 2))
    assert platform.read(3, MAC)[1] == 0b110


def test_never_written_lines_stay_so_under_every_keyid(platform: Platform) -> None:
    platform.write(3, content(1), mask=1)
    for keyid in (MAC, OTHER_MAC, TME, PLAIN):
        lines, poisoned = platform.read(3, keyid)
        assert lines[1:] == [bytes(LINE)] * 63
        assert poisoned & ~1 == 0


def test_erased_memory_has_no_macs(platform: Platform) -> None:
    region = platform.dram.allocate(16 * PAGE)
    platform.controller.assign(0, PAGES * PAGE, MAC)
    platform.controller.update_pages(np.arange(32), content(1, 32))
    platform.dram.free(region)
    assert platform.dram.allocate(16 * PAGE) == region == Region(0, 16 * PAGE)
    poisoned = np.empty(32, np.uint64)
    found = platform.controller.read_pages(0, 32, poisoned=poisoned)
    assert not poisoned.any()
    assert not found[:16].any()
    assert np.array_equal(found[16:], content(1, 32)[16:])


# --- rekeying ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [TME, PLAIN, MAC, OTHER_MAC, NO_ENCRYPT])
@pytest.mark.parametrize("before", [TME, PLAIN, MAC, OTHER_MAC, NO_ENCRYPT])
def test_rekeyed_pages_read_under_the_new_keyid(
    platform: Platform, before: int, after: int
) -> None:
    written = 0x0FF0_0000_0000_0001
    for page in (3, 5):
        platform.write(page, content(page), before, mask=written)
    old = [platform.pair(3 * PAGE + at) for at in range(0, PAGE, LINE)]
    platform.controller.rekey_pages(2, 4, after)
    for page in (3, 5):
        lines, poisoned = platform.read(page)
        assert poisoned == 0
        assert lines == [
            line if written >> number & 1 else bytes(LINE)
            for number, line in enumerate(split(content(page)))
        ]
    # In plaintext nothing tells zeros that were written from a page's other lines.
    is_written = ALL_LINES if before == NO_ENCRYPT else written
    for number in range(64):
        has_mac = platform.entry(3 * PAGE + number * LINE) != bytes(4)
        assert has_mac == (after in (MAC, OTHER_MAC) and bool(is_written >> number & 1))
    if after != before:
        # The old lines with their old MACs are nothing to it.
        for number, pair in enumerate(old):
            platform.pair(3 * PAGE + number * LINE, pair)
        assert platform.read(3)[1] == (written if after in (MAC, OTHER_MAC) else 0)


def test_poisoned_page_is_not_rekeyed(platform: Platform) -> None:
    """Its garbage would get a good MAC."""
    for page in (3, 4):
        platform.write(page, content(page))
    platform.line(4 * PAGE + LINE, b"x" * LINE)
    before = platform.path.read_bytes(), mac_path(platform.path).read_bytes()
    for keyid in (OTHER_MAC, PLAIN):
        with pytest.raises(IntegrityError) as caught:
            platform.controller.rekey_pages(3, 2, keyid)
        assert (caught.value.address, caught.value.keyid) == (4 * PAGE + LINE, MAC)
        assert (platform.path.read_bytes(), mac_path(platform.path).read_bytes()) == before
        assert platform.controller.keyid_at(3 * PAGE) == MAC
    platform.write(4, content(4))
    platform.controller.rekey_pages(3, 2, OTHER_MAC)
    assert platform.accepts(4, content(4))


# --- writes that end half-way -----------------------------------------------------------------


class Failing(Dram):
    """Has space for ``good`` more writes and ``part_bytes`` of the next one."""

    good = 1 << 30
    part_bytes = 0

    def write(self, address: int, buffer: bytes | bytearray | memoryview) -> None:
        self._write(super().write, address, buffer, 1)

    def write_macs(self, address: int, entries: bytes | bytearray | memoryview) -> None:
        self._write(super().write_macs, address, entries, 16)

    def _write(
        self,
        write: Callable[[int, memoryview], None],
        address: int,
        buffer: bytes | bytearray | memoryview,
        stands_for: int,
    ) -> None:
        view = memoryview(buffer).cast("B")
        self.good -= 1
        fits = len(view) if self.good >= 0 else min(self.part_bytes, len(view) - 4)
        write(address, view[:fits])
        if fits < len(view):
            raise DramFullError("full", address=address + fits * stands_for)


# Whole entries: no file system ends a write inside of one.
PARTS = [0, 4, 100, 132, 248, 500, 4096 + 1000]


@pytest.mark.parametrize("part_bytes", PARTS)
@pytest.mark.parametrize("good", range(7))
@pytest.mark.parametrize("back", [False, True], ids=["again", "back"])
def test_update_that_ends_half_way_leaves_nothing_that_passes_and_a_retry_heals(
    tmp_path: Path, good: int, part_bytes: int, back: bool
) -> None:
    """Two runs of pages, so six writes; a retry may find other contents, the old ones too."""
    platform = Platform(tmp_path, Failing)
    dram = platform.dram
    assert isinstance(dram, Failing)
    pages, old, new = np.array([3, 4, 9]), content(1, 3), content(2, 3)
    new[:, 100:300] = old[:, 100:300]
    platform.controller.assign(0, PAGES * PAGE, MAC)
    platform.controller.update_pages(pages, old)
    dram.good, dram.part_bytes = good, part_bytes
    is_cut = good < 6
    if is_cut:
        with pytest.raises(DramFullError) as caught:
            platform.controller.update_pages(pages, new)
        assert caught.value.address // PAGE in pages
    else:
        platform.controller.update_pages(pages, new)
    dram.good = 1 << 30
    bad = 0
    for row, page in enumerate(pages.tolist()):
        lines, poisoned = platform.read(page)
        for number, line in enumerate(lines):
            if poisoned >> number & 1:
                assert line == POISON
                bad += 1
            else:
                assert line in (split(old[row])[number], split(new[row])[number])
    assert is_cut or bad == 0
    wanted = old if back else new
    platform.controller.update_pages(pages, wanted)
    assert np.array_equal(platform.controller.read_pages(0, 10)[pages], wanted)
    dram.close()


@pytest.mark.parametrize("good", range(3))
def test_rekeying_that_ends_half_way_leaves_nothing_that_passes(tmp_path: Path, good: int) -> None:
    platform = Platform(tmp_path, Failing)
    dram = platform.dram
    assert isinstance(dram, Failing)
    platform.write(3, content(1))
    dram.good, dram.part_bytes = good, 100
    with pytest.raises(DramFullError):
        platform.controller.rekey_pages(3, 1, OTHER_MAC)
    dram.good = 1 << 30
    lines, poisoned = platform.read(3)
    for number, line in enumerate(lines):
        assert line == (POISON if poisoned >> number & 1 else split(content(1))[number])
    assert poisoned
    platform.write(3, content(1), OTHER_MAC)
    assert platform.accepts(3, content(1))
    dram.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_space_for_the_ciphertext_and_not_for_its_macs(tmp_path: Path) -> None:
    """32 blocks: 16 pages and their MACs are 17, the next 15 pages are 15, their MACs one more."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], check=True)
    try:
        platform = Platform(tmp_path)
        with platform.dram:
            platform.controller.assign(0, PAGES * PAGE, MAC)
            platform.controller.update_pages(np.arange(16), content(1, 16))
            pages = np.arange(16, 31)
            with pytest.raises(DramFullError, match=r"dram\.mac: cannot write") as caught:
                platform.controller.update_pages(pages, content(2, 15))
            assert caught.value.address == 16 * PAGE
            assert str(mac_path(platform.path)) in str(caught.value.hint)
            poisoned = np.empty(32, np.uint64)
            found = platform.controller.read_pages(0, 32, poisoned=poisoned)
            assert poisoned.tolist() == [0] * 16 + [ALL_LINES] * 15 + [0]
            assert np.array_equal(found[:16], content(1, 16))
            subprocess.run(["mount", "-o", "remount,size=1m", tmp_path], check=True)
            # The ciphertext is there.
            assert not platform.controller.update_pages(pages, content(2, 15)).any()
            assert np.array_equal(platform.controller.read_pages(16, 15), content(2, 15))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# --- against a model --------------------------------------------------------------------------

MODEL_PAGES = 4
CIPHERS = {TME: "TME's", PLAIN: "shared", MAC: "shared", OTHER_MAC: "other", NO_ENCRYPT: None}
WITH_MACS = (MAC, OTHER_MAC)


@dataclass
class Line:
    """What DRAM holds of a line: under which cipher, and whose MAC it has."""

    plaintext: bytes
    cipher: str | None
    mac: int | None

    def is_good(self, keyid: int) -> bool:
        return keyid not in WITH_MACS or self.mac == keyid


class Model:
    """Lines that were written, as a dictionary."""

    def __init__(self) -> None:
        self.keyids = [TME] * MODEL_PAGES
        self.lines: dict[tuple[int, int], Line] = {}

    def write(self, page: int, number: int, plaintext: bytes) -> bool:
        """Write a line; whether its ciphertext changed."""
        keyid, old = self.keyids[page], self.lines.get((page, number))
        new = Line(plaintext, CIPHERS[keyid], keyid if keyid in WITH_MACS else None)
        if keyid == NO_ENCRYPT and not any(plaintext):
            return self.lines.pop((page, number), None) is not None
        if old is not None and (old.plaintext, old.cipher) == (new.plaintext, new.cipher):
            old.mac = new.mac if old.mac is None else old.mac
            return False
        self.lines[page, number] = new
        return True

    def poisoned(self, page: int, keyid: int) -> int:
        return sum(
            1 << number
            for number in range(64)
            if (page, number) in self.lines and not self.lines[page, number].is_good(keyid)
        )


@given(data=st.data())
@settings(deadline=None)
def test_any_sequence_agrees_with_a_model(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    platform = Platform(tmp_path_factory.mktemp("model"))
    controller, model = platform.controller, Model()
    keyids, numbers = st.sampled_from(list(CIPHERS)), st.integers(0, MODEL_PAGES - 1)
    masks = st.one_of(st.just(ALL_LINES), st.integers(0, ALL_LINES))

    def update() -> None:
        page, seed = data.draw(numbers), data.draw(st.integers(0, 3))
        # Few different lines, so that some do not change; zeros among them.
        bits = np.random.default_rng(seed).integers(0, 2, (64, 1), np.uint64)
        words = bits.repeat(8, axis=1).reshape(1, 512)
        mask = data.draw(masks)
        expected = 0
        for number, line in enumerate(split(words)):
            if mask >> number & 1:
                expected |= model.write(page, number, line) << number
        assert platform.write(page, words, model.keyids[page], mask) == expected

    def assign() -> None:
        page, keyid = data.draw(numbers), data.draw(keyids)
        model.keyids[page] = keyid
        controller.assign(page * PAGE, PAGE, keyid)

    def rekey() -> None:
        page, keyid = data.draw(numbers), data.draw(keyids)
        if model.poisoned(page, model.keyids[page]):
            with pytest.raises(IntegrityError):
                controller.rekey_pages(page, 1, keyid)
            return
        before, _ = platform.read(page)
        controller.rekey_pages(page, 1, keyid)
        written = [number for number in range(64) if model.lines.pop((page, number), None)]
        if model.keyids[page] == NO_ENCRYPT and written:
            written = list(range(64))
        model.keyids[page] = keyid
        for number in written:
            # What is noise under the page's KeyID is as good as anything.
            model.write(page, number, before[number])

    def check() -> None:
        for page in range(MODEL_PAGES):
            for keyid in CIPHERS:
                lines, poisoned = platform.read(page, keyid)
                assert poisoned == model.poisoned(page, keyid)
                for number, line in enumerate(lines):
                    held = model.lines.get((page, number))
                    if poisoned >> number & 1:
                        assert line == POISON
                    elif held is None:
                        assert not any(line)
                    else:
                        assert (line == held.plaintext) == (CIPHERS[keyid] == held.cipher)

    for _ in range(data.draw(st.integers(1, 8))):
        data.draw(st.sampled_from([update, assign, rekey]))()
        check()
    platform.dram.close()
