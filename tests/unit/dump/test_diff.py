# SPDX-License-Identifier: GPL-2.0-or-later
"""Two images of the same memory: what is equal, what changed, and what that tells of XTS."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from mktme.dump.cluster import Source, Workers
from mktme.dump.diff import Change, DiffReport, Return, ZoneDiff, dump_diff
from mktme.dump.image import DumpChangedError, DumpError
from mktme.engine.sidecar import PageRange

from .conftest import DRAM_BYTES, PAGE, VM_BASE, VM_KEYID, MakeImage, describe
from .contents import KEY, encrypt, prose

LINE = 64
PAGES = 16
TEXT = prose(PAGES * PAGE)


def image(make_image: MakeImage, name: str, plaintext: bytes, key: bytes = KEY) -> Source:
    return Source(make_image({VM_BASE: encrypt(plaintext, VM_BASE, key)}, name=name))


def only(report: DiffReport) -> ZoneDiff:
    (found,) = report.keyids
    return found


def test_same_plaintext_same_address_same_key_is_the_same_ciphertext(
    make_image: MakeImage,
) -> None:
    """Encrypted twice, and nobody could tell: XTS has no freshness."""
    found = only(dump_diff(image(make_image, "a", TEXT), image(make_image, "b", TEXT)))
    assert found.lines == Change(PAGES * 64, 0, 0, 0)
    assert found.pages == Change(PAGES, 0, 0, 0)
    assert (found.keyid_a, found.keyid_b) == (VM_KEYID, VM_KEYID)
    assert found.bits_changed is None
    # The controls: under another key, and at another address.
    other_key = KEY[::-1]
    found = only(dump_diff(image(make_image, "c", TEXT), image(make_image, "d", TEXT, other_key)))
    assert found.lines == Change(0, PAGES * 64, 0, 0)
    assert found.bits_changed == pytest.approx(0.5, abs=0.005)
    moved = Source(make_image({VM_BASE: encrypt(TEXT, 0)}, name="e"))
    assert only(dump_diff(image(make_image, "f", TEXT), moved)).lines.equal == 0


def test_what_changed_and_changed_back_is_equal(make_image: MakeImage) -> None:
    rng = random.Random(1)
    before, between, after = TEXT, bytearray(TEXT), bytearray(TEXT)
    lines = rng.sample(range(PAGES * 64), 60)
    for line in lines:
        between[line * LINE : (line + 1) * LINE] = rng.randbytes(LINE)
    kept, other = lines[:20], lines[20:25]
    for line in kept:
        after[line * LINE : (line + 1) * LINE] = between[line * LINE : (line + 1) * LINE]
    for line in other:
        after[line * LINE : (line + 1) * LINE] = rng.randbytes(LINE)
    a, b, c = (
        image(make_image, name, bytes(data))
        for name, data in (("a", before), ("b", between), ("c", after))
    )
    found = only(dump_diff(a, b, c))
    assert found.lines == Change(PAGES * 64 - 60, 60, 0, 0)
    assert found.returned == Return(back=35, kept=20, neither=5)
    assert only(dump_diff(a, c)).lines.equal == PAGES * 64 - 25
    assert only(dump_diff(a, b)).returned is None


def test_block_that_changed_is_the_only_one_that_differs(make_image: MakeImage) -> None:
    """One byte of plaintext is one 16-byte block of ciphertext, half of its bits."""
    after = bytearray(TEXT)
    for line in range(40):
        for block in range(1 + line % 4):
            after[line * LINE + block * 16 + 3] ^= 1
    found = only(dump_diff(image(make_image, "a", TEXT), image(make_image, "b", bytes(after))))
    assert found.blocks_changed == (10, 10, 10, 10)
    assert found.bits_changed == pytest.approx(0.5, abs=0.03)
    assert found.pages == Change(PAGES - 1, 1, 0, 0)
    in_plain = only(
        dump_diff(
            Source(make_image({VM_BASE: TEXT}, name="c")),
            Source(make_image({VM_BASE: bytes(after)}, name="d")),
        )
    )
    assert in_plain.blocks_changed == found.blocks_changed
    assert in_plain.bits_changed == 1 / 128


def test_what_is_in_one_alone(make_image: MakeImage) -> None:
    page = encrypt(TEXT[:PAGE], 0)
    a = Source(make_image({0: page, 2 * PAGE: page[: 10 * LINE], 9 * PAGE: page}, name="a"))
    b = Source(make_image({PAGE: page, 2 * PAGE: page[: 7 * LINE], 9 * PAGE: page}, name="b"))
    found = only(dump_diff(a, b))
    assert found.pages == Change(equal=1, changed=1, only_a=1, only_b=1)
    assert found.lines == Change(equal=71, changed=0, only_a=67, only_b=64)
    assert (
        dump_diff(Source(make_image({}, name="c")), Source(make_image({}, name="d"))).keyids == ()
    )


def test_page_that_changed_its_keyid(make_image: MakeImage) -> None:
    record = describe()
    pages = (*record.pages[:2], PageRange(base=0xC0000, size_bytes=PAGE, keyid=9))
    data = {0xC0000: encrypt(TEXT[: 2 * PAGE], 0xC0000)}
    a = Source(make_image(data, name="a"))
    b = Source(make_image(data, msgspec.structs.replace(record, pages=pages), name="b"))
    report = dump_diff(a, b)
    assert [(one.keyid_a, one.keyid_b, one.pages.equal) for one in report.keyids] == [
        (0, 0, 1),
        (0, 9, 1),
    ]


@pytest.mark.parametrize("workers", [Workers(threads=1, task_bytes=3 * PAGE), Workers(threads=4)])
def test_however_they_are_cut_up(make_image: MakeImage, workers: Workers) -> None:
    rng = random.Random(2)
    data = {at * PAGE: prose(PAGE, at % 3) for at in rng.sample(range(256), 100)}
    later = {at: prose(PAGE, at % 5) for at in rng.sample(sorted(data), 80)}
    a, b = Source(make_image(data, name="a")), Source(make_image(later, name="b"))
    report = dump_diff(a, b, a, workers)
    assert report == dump_diff(a, b, a)
    total = sum(
        one.pages.equal + one.pages.changed + one.pages.only_a + one.pages.only_b
        for one in report.keyids
    )
    assert total == 100
    assert sum(one.pages.only_a for one in report.keyids) == 20


def test_images_that_are_not_of_one_memory(make_image: MakeImage, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(TEXT)
    whole = Source(make_image({}))
    with pytest.raises(DumpError, match="not the same memory"):
        dump_diff(whole, Source(small, raw=True))
    with pytest.raises(DumpError, match="not the same memory"):
        dump_diff(whole, whole, Source(small, raw=True))
    with pytest.raises(DumpError, match="No such file"):
        dump_diff(whole, Source(tmp_path / "none", raw=True))


def test_image_that_changes_meanwhile(make_image: MakeImage) -> None:
    a, b = image(make_image, "a", TEXT), image(make_image, "b", TEXT)

    def write(_done: int, _total: int) -> None:
        with b.path.open("r+b") as file:
            file.truncate(DRAM_BYTES)

    with pytest.raises(DumpChangedError, match="b: changed"):
        dump_diff(a, b, progress=write)
