# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a page is in a picture, and what of it is shown."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.dump.analysis import page_entropy
from mktme.dump.cluster import HERE, Source, Workers
from mktme.dump.image import DumpError, DumpImage
from mktme.dump.pictures import Request, make_picture
from mktme.dump.pixels import MAX_SIDE, Layout, Order, View, What, hilbert
from mktme.engine.sidecar import GuestSegment

from .conftest import DRAM_BYTES, PAGE, VM_BASE, VM_BYTES, VM_KEYID, MakeImage, describe
from .contents import prose


@pytest.mark.parametrize("side", [1, 2, 4, 32, 512])
def test_hilbert_curve_visits_every_pixel_and_never_jumps(side: int) -> None:
    rows, columns = hilbert(side, np.arange(side * side))
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == side * side
    assert (np.abs(np.diff(rows)) + np.abs(np.diff(columns)) == 1).all()
    assert (rows[0], columns[0]) == (0, 0)
    assert (rows[-1], columns[-1]) == (0, side - 1)
    if side > 1:
        quarters = np.split(np.stack((rows, columns), axis=1) // (side // 2), 4)
        assert [set(map(tuple, one.tolist())) for one in quarters] == [
            {(0, 0)},
            {(1, 0)},
            {(1, 1)},
            {(0, 1)},
        ]


@given(pages=st.integers(1, 1 << 26), order=st.sampled_from(Order))
def test_layout_has_room_for_all_and_not_for_twice_as_much(pages: int, order: Order) -> None:
    layout = Layout.of(View(((0, 0, pages * PAGE),), pages * PAGE), order)
    assert layout.pixels * layout.pixel_pages >= pages > (layout.pixels - 1) * layout.pixel_pages
    assert layout.side <= MAX_SIDE
    assert layout.side**2 >= layout.pixels
    assert layout.side == 1 or (layout.side // 2) ** 2 < layout.pixels
    if layout.pixel_pages > 1:
        assert layout.pixels > MAX_SIDE**2 // 2


def test_rows_are_one_below_the_other() -> None:
    layout = Layout.of(View(((0, 0, 10 * PAGE),), 10 * PAGE), Order.ROW)
    assert layout.side == 4
    grid = layout.arrange(np.arange(10.0), -1)
    assert grid.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]


def split_vm(make_image: MakeImage, data: dict[int, bytes]) -> Path:
    """A VM whose last quarter is behind a hole, as q35's memory above 4 GiB."""
    record = describe()
    low, high = VM_BYTES * 3 // 4, VM_BYTES // 4
    segments = (
        GuestSegment(guest_physical=0, ram_offset=0, size_bytes=low),
        GuestSegment(guest_physical=VM_BYTES, ram_offset=low, size_bytes=high),
    )
    vm = msgspec.structs.replace(record.vms[0], segments=segments)
    return make_image(data, msgspec.structs.replace(record, vms=(vm,)))


def test_vm_is_shown_by_guest_physical_address(make_image: MakeImage) -> None:
    path = split_vm(make_image, {VM_BASE + PAGE: prose(PAGE), VM_BASE + VM_BYTES - PAGE: b"x" * 64})
    with DumpImage.open(path) as image:
        view = View.vm(image, "alice")
    low = VM_BYTES * 3 // 4 // PAGE
    assert view.size_bytes == VM_BYTES * 5 // 4
    numbers = np.arange(VM_BASE // PAGE, (VM_BASE + VM_BYTES) // PAGE)
    shown = view.shown(numbers)
    assert shown.tolist() == [*range(low), *range(128, 128 + 32)]
    assert view.inner(shown).tolist() == numbers.tolist()
    assert view.inner(np.array([low, 127, 160])).tolist() == [-1, -1, -1]
    picture = make_picture(Request(Source(path), What.WRITTEN, vm="alice"))
    (panel,) = picture.panels
    assert np.flatnonzero(~np.isnan(panel.values.shown)).tolist() == [1, 159]
    assert panel.values.shown[159] == 1 / 64
    assert np.flatnonzero(~panel.there).tolist() == list(range(low, 128))
    assert panel.outlines == ()
    with pytest.raises(DumpError, match="no VM is named 'bob'"):
        make_picture(Request(Source(path), vm="bob"))


def test_entropy_of_pages(make_image: MakeImage) -> None:
    data = {0: prose(PAGE), VM_BASE: random.Random(1).randbytes(PAGE), VM_BASE + PAGE: b"a" * PAGE}
    picture = make_picture(Request(Source(make_image(data))))
    (panel,) = picture.panels
    assert picture.layout.pixel_pages == 1
    assert np.flatnonzero(~np.isnan(panel.values.shown)).tolist() == [0, 64, 65]
    for at in data:
        page = np.frombuffer(data[at], np.uint8).reshape(1, PAGE)
        expected = page_entropy(page, np.array([64]))[0][0]
        assert panel.values.shown[at // PAGE] == pytest.approx(expected, abs=1e-5)
    assert [one.name for one in panel.outlines] == ["alice"]
    assert np.flatnonzero(panel.outlines[0].pixels).tolist() == list(range(64, 64 + 128))
    assert np.flatnonzero(panel.zones == VM_KEYID).tolist() == list(range(64, 64 + 128))
    assert list(picture.keyids) == [VM_KEYID, 0]


def test_pixel_of_several_pages_is_the_mean_of_those_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mktme.dump.pixels.MAX_SIDE", 2)
    path = tmp_path / "raw"
    pages = [b"a" * PAGE, bytes(PAGE), bytes(range(256)) * 16, bytes(PAGE)]
    path.write_bytes(b"".join(pages) + bytes(9 * PAGE) + b"z")
    picture = make_picture(Request(Source(path, raw=True)))
    assert (picture.layout.pixel_pages, picture.layout.pixels) == (4, 4)
    (panel,) = picture.panels
    assert panel.values.shown.tolist()[0] == 4.0  # (0 + 8) / 2
    assert np.isnan(panel.values.shown[1:3]).all()
    written = make_picture(Request(Source(path, raw=True), What.WRITTEN)).panels[0].values.shown
    assert written[0] == 0.5
    assert written[3] == 1 / (2 * 64)  # the last pixel has two pages, the second not whole


def test_difference(make_image: MakeImage) -> None:
    text = prose(4 * PAGE)
    later = bytearray(text)
    later[PAGE : PAGE + 64] = b"!" * 64
    later[2 * PAGE : 3 * PAGE] = bytes(PAGE)
    a = Source(make_image({0: text}, name="a"))
    b = Source(make_image({0: bytes(later), 9 * PAGE: text[:64]}, name="b"))
    (panel,) = make_picture(Request(a, What.DIFFERENCE, other=b)).panels
    shown = panel.values.shown
    assert shown[:4].tolist() == [0, 1 / 64, 1, 0]
    assert shown[9] == 1
    assert np.isnan(shown[10:]).all()
    assert panel.title == "a → b"


def test_beside_its_plaintext(make_image: MakeImage, tmp_path: Path) -> None:
    path = split_vm(make_image, {VM_BASE: random.Random(1).randbytes(PAGE)})
    whole, vm = tmp_path / "whole.raw", tmp_path / "alice.raw"
    whole.write_bytes(bytes(VM_BASE) + prose(PAGE) + bytes(DRAM_BYTES - VM_BASE - PAGE))
    vm.write_bytes(prose(PAGE) + bytes(VM_BYTES * 5 // 4 - PAGE))
    for plaintext, name in ((whole, None), (whole, "alice"), (vm, "alice")):
        request = Request(Source(path), plaintext=Source(plaintext, raw=True), vm=name)
        left, right = make_picture(request).panels
        at = 0 if name else VM_BASE // PAGE
        assert np.flatnonzero(~np.isnan(left.values.shown)).tolist() == [at]
        assert np.flatnonzero(~np.isnan(right.values.shown)).tolist() == [at]
        assert left.values.shown[at] > 7.9
        assert right.values.shown[at] < 4
        assert right.title == f"plaintext: {plaintext.name}"
    with pytest.raises(DumpError, match="not the same memory") as caught:
        make_picture(Request(Source(path), plaintext=Source(vm, raw=True)))
    assert "--vm" in (caught.value.hint or "")


def test_vm_that_has_no_memory_yet(make_image: MakeImage) -> None:
    record = describe()
    vm = msgspec.structs.replace(record.vms[0], segments=())
    path = make_image({}, msgspec.structs.replace(record, vms=(vm,)))
    with pytest.raises(DumpError, match="VM 'alice' has no memory yet") as caught:
        make_picture(Request(Source(path), vm="alice"))
    assert caught.value.hint


def test_requests_that_make_no_sense(make_image: MakeImage) -> None:
    source = Source(make_image({}))
    for request in (
        Request(source, What.DIFFERENCE),
        Request(source, What.ENTROPY, other=source),
        Request(source, What.DIFFERENCE, other=source, plaintext=source),
    ):
        with pytest.raises(ValueError, match="difference"):
            make_picture(request)


def test_however_it_is_cut_up(make_image: MakeImage) -> None:
    rng = random.Random(3)
    source = Source(make_image({at * PAGE: prose(PAGE, at) for at in rng.sample(range(256), 90)}))
    request = Request(source)
    shown = make_picture(request, HERE).panels[0].values.shown
    for workers in (Workers(threads=1, task_bytes=PAGE), Workers(threads=4, task_bytes=5 * PAGE)):
        again = make_picture(request, workers).panels[0].values.shown
        assert np.array_equal(shown, again, equal_nan=True)
