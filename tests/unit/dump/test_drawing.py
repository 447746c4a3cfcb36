# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures as files: the colours that are to be there, at the places where they are to be."""

from __future__ import annotations

import base64
import io
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from mktme.dump.cluster import Source
from mktme.dump.drawing import Format, picture_png, picture_svg, render
from mktme.dump.pictures import Request, make_picture
from mktme.dump.pixels import Order, What
from mktme.engine.sidecar import PageRange

from .conftest import DRAM_BYTES, PAGE, VM_BASE, VM_KEYID, MakeImage, describe
from .contents import prose

GREY = (0xD4, 0xD4, 0xD4)
SVG = "{http://www.w3.org/2000/svg}"


def decode(png: bytes) -> npt.NDArray[np.uint8]:
    channels: npt.NDArray[np.float32] = imread(io.BytesIO(png), format="png")
    return np.rint(channels[..., :3] * 255).astype(np.uint8)


def count(picture: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture.astype(int) - colour) <= 1).all(axis=2).sum())


def viridis(entropy: float) -> tuple[int, int, int]:
    red, green, blue, _ = colormaps["viridis"](entropy / 8)
    return round(red * 255), round(green * 255), round(blue * 255)


def raster(svg: bytes) -> npt.NDArray[np.uint8]:
    """The first picture in an SVG file: a pixel each."""
    found = re.search(rb"data:image/png;base64,([^\"]+)\"", svg)
    assert found is not None
    return decode(base64.b64decode(found[1]))


@pytest.mark.parametrize("order", Order)
def test_pixels_have_the_colours_of_the_scale(make_image: MakeImage, order: Order) -> None:
    """4 of 256 pages are constant, and 4 are of all values."""
    data = {at * PAGE: b"a" * PAGE for at in range(4)}
    data |= {at * PAGE: bytes(range(256)) * 16 for at in range(8, 12)}
    picture = decode(picture_png(Request(Source(make_image(data)), order=order)))
    page_dots = (1024 // 16) ** 2
    frame = 0.05 * page_dots
    for colour, pages in ((viridis(0), 4), (viridis(8), 4)):
        assert abs(count(picture, colour) - pages * page_dots) < 4 * frame
    grey = count(picture, GREY)
    assert 200 * page_dots < grey < 249 * page_dots  # the VM's outline and name are over some


def test_svg_has_the_same_pixels_and_text_that_is_text(make_image: MakeImage) -> None:
    data = {0: b"a" * PAGE, 3 * PAGE: random.Random(1).randbytes(PAGE)}
    svg = picture_svg(Request(Source(make_image(data, name="a $ sign$"))))
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    texts = ["".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")]
    assert "DRAM: a $ sign$" in texts
    assert "entropy of page (bits per byte)" in texts
    assert "never written" in texts
    assert "alice" in texts
    assert any(
        text.startswith("1 pixel = 1 page (4 KiB); addresses: system-physical") for text in texts
    )
    references = re.findall(rb'(?:href|src)="(?!#|data:)([^"]+)"', svg)
    assert references == []  # self-contained
    pixels = raster(svg)
    # One row and column of the 16 by 16 for each page, whatever size it is stored at.
    step = pixels.shape[0] // 16
    assert tuple(pixels[step // 2, step // 2]) == viridis(0)


def test_same_picture_is_the_same_file(make_image: MakeImage) -> None:
    request = Request(Source(make_image({0: prose(PAGE)})))
    picture = make_picture(request)
    for form in Format:
        assert render(picture, form) == render(make_picture(request), form)


def test_settings_of_the_user_do_not_matter(make_image: MakeImage) -> None:
    picture = make_picture(Request(Source(make_image({0: prose(PAGE)}))))
    for form in Format:
        expected = render(picture, form)
        with mpl.rc_context({"image.origin": "lower", "axes.titlesize": 40, "font.weight": "bold"}):
            assert render(picture, form) == expected
            assert mpl.rcParams["image.origin"] == "lower"  # and are as they were


def test_keyids_beyond_the_colours_share_one(make_image: MakeImage) -> None:
    pages = tuple(PageRange(base=at * PAGE, size_bytes=PAGE, keyid=at) for at in range(1, 12))
    record = msgspec.structs.replace(describe(), pages=pages, vms=())
    svg = picture_svg(Request(Source(make_image({0: prose(12 * PAGE)}, record)), What.KEYID))
    texts = ["".join(one.itertext()).strip() for one in ET.fromstring(svg).iter(f"{SVG}text")]
    assert "KeyID 0, aes-xts-128" in texts
    assert "5 more KeyIDs" in texts
    assert sum(text.startswith("KeyID") for text in texts) == 7


@pytest.mark.parametrize("what", [What.WRITTEN, What.KEYID])
def test_other_pictures(make_image: MakeImage, what: What) -> None:
    """4 of the VM's 128 pages were written, in the middle of the picture's lower half."""
    request = Request(Source(make_image({VM_BASE + 40 * PAGE: prose(4 * PAGE)})), what)
    picture = decode(picture_png(request))
    assert picture.shape[1] >= 900
    page_dots = (1024 // 16) ** 2
    patch = page_dots // 4  # the legend's, at most

    def pages(colour: tuple[int, int, int]) -> float:
        return count(picture, colour) / page_dots

    if what is What.WRITTEN:
        red, green, blue, _ = (round(one * 255) for one in colormaps["cividis"](1.0))
        assert pages((red, green, blue)) == pytest.approx(4, abs=0.5)
        assert pages(GREY) == pytest.approx(252, abs=12)
        return
    okabe_ito = ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00))
    colours = dict(zip(make_picture(request).keyids, okabe_ito, strict=True))

    def pale(keyid: int) -> tuple[int, int, int]:
        red, green, blue = (round(255 * 0.75 + 0.25 * one) for one in colours[keyid])
        return red, green, blue

    assert pages(colours[VM_KEYID]) == pytest.approx(4, abs=0.5)
    assert 0 < count(picture, colours[0]) < patch
    assert pages(pale(VM_KEYID)) == pytest.approx(124, abs=12)
    assert pages(pale(0)) == pytest.approx(128, abs=12)


def test_two_beside_each_other_fit(make_image: MakeImage, tmp_path: Path) -> None:
    plaintext = tmp_path / "plain.raw"
    plaintext.write_bytes(prose(DRAM_BYTES))
    source = Source(make_image({0: prose(PAGE)}))
    alone = decode(picture_png(Request(source)))
    both = decode(picture_png(Request(source, plaintext=Source(plaintext, raw=True))))
    assert alone.shape[1] < both.shape[1] < 2200
    # Nothing is cut off: the figure's edge is white all around.
    for edge in (both[0], both[-1], both[:, 0], both[:, -1], alone[:, 0], alone[:, -1], alone[-1]):
        assert (edge == 255).all()


@pytest.mark.parametrize("pages", [1, 2, 3, 5])
def test_tiny_image(tmp_path: Path, pages: int) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(prose(pages * PAGE))
    for order in Order:
        picture = decode(picture_png(Request(Source(path, raw=True), order=order)))
        assert count(picture, GREY) < 2000  # the legend's
