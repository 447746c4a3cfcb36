# SPDX-License-Identifier: GPL-2.0-or-later
"""What a picture of an image shows, before it is drawn (`mktme.dump.drawing`)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mktme.dump.cluster import HERE, Progress, Source, Workers, fold, whole_pages
from mktme.dump.diff import check_same_size
from mktme.dump.image import DumpError, DumpImage
from mktme.dump.pixels import Layout, Order, PixelWork, Values, View, What, merge_pixels
from mktme.dump.zones import EXCLUDED, Zones, zone_key
from mktme.engine.text import shown
from mktme.engine.xts import PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Outline:
    """A VM's memory in a picture: the pixels that begin in it, bool, shape (pixels,)."""

    name: str
    pixels: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the squares of a picture.

    Attributes:
        title: above it.
        values: what is shown.
        there: whether there is memory: bool, shape (pixels,).
        zones: by pixel, the zone of its first page: uint16, shape (pixels,).
        outlines: VMs.
    """

    title: str
    values: Values
    there: npt.NDArray[np.bool_]
    zones: npt.NDArray[np.uint16]
    outlines: tuple[Outline, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture before it is drawn.

    Attributes:
        panels: one, or two beside each other, of one layout.
        keyids: of zones that it has: what the legend says.
        addresses: whose its addresses are.
    """

    what: What
    layout: Layout
    panels: tuple[Panel, ...]
    keyids: dict[int, str]
    addresses: str


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be shown.

    Attributes:
        image: the image.
        what: what of it.
        order: how its pages follow one another.
        other: a later image of the same memory, for `What.DIFFERENCE`.
        plaintext: an image to show beside it: what its owner sees.
        vm: name of a VM whose memory is shown by guest-physical address, in place of all.
    """

    image: Source
    what: What = What.ENTROPY
    order: Order = Order.HILBERT
    other: Source | None = None
    plaintext: Source | None = None
    vm: str | None = None


def make_picture(
    request: Request, workers: Workers = HERE, progress: Progress | None = None
) -> Picture:
    """Look at an image for a picture.

    Args:
        request: what is to be shown.
        workers: who looks.
        progress: told of tasks done and of all there are, once more for a second panel.

    Raises:
        ValueError: a difference with nothing to compare with, or beside a plaintext.
        DumpError: an image cannot be read; images that do not have the same size; no such VM.
        DumpChangedError: one was written meanwhile.
    """
    if (request.what is What.DIFFERENCE) != (request.other is not None):
        raise ValueError("a difference, and nothing else, has another image")
    if request.what is What.DIFFERENCE and request.plaintext is not None:
        raise ValueError("a difference has no plaintext beside it")
    with ExitStack() as stack:
        image = stack.enter_context(request.image.open())
        view = View.whole(image) if request.vm is None else View.vm(image, request.vm)
        layout = Layout.of(view, request.order)
        kind = "DRAM" if image.sidecar is not None else "memory"
        titles = [f"{kind}: {image.path.name}"]
        if request.other is not None:
            other = stack.enter_context(request.other.open())
            check_same_size(image, other)
            titles = [f"{image.path.name} → {other.path.name}"]
        values = [_look(request.image, image, request, view, layout, workers, progress)]
        if request.other is not None:
            other.check_unchanged()
        if request.plaintext is not None:
            plaintext = stack.enter_context(request.plaintext.open())
            plain_view = _plain_view(image, view, plaintext)
            values.append(
                _look(request.plaintext, plaintext, request, plain_view, layout, workers, progress)
            )
            titles.append(f"plaintext: {plaintext.path.name}")
        inner = view.inner(np.arange(layout.pixels, dtype=np.int64) * layout.pixel_pages)
        zones = Zones(image).of(np.maximum(inner, 0))
        outlines = _outlines(image, inner) if request.vm is None else ()
        panels = tuple(
            Panel(shown(title), one, inner >= 0, zones, outlines)
            for title, one in zip(titles, values, strict=True)
        )
        found, pixels = np.unique(zones[inner >= 0], return_counts=True)
        by_size = sorted(zip(pixels.tolist(), found.tolist(), strict=True), reverse=True)
        keyids = {zone: _zone_name(image, zone) for _, zone in by_size}
        whose = "system-physical" if request.vm is None else f"guest-physical of {request.vm}"
        if image.sidecar is None:
            whose = "of the file"
        return Picture(request.what, layout, panels, keyids, whose)


def _look(
    source: Source,
    image: DumpImage,
    request: Request,
    view: View,
    layout: Layout,
    workers: Workers,
    progress: Progress | None,
) -> Values:
    other = None if request.other is None else request.other.absolute()
    work = PixelWork(source.absolute(), other, request.what, view, layout.pixel_pages)
    data = image.data_ranges()
    if other is not None:
        with other.open() as second:
            data += second.data_ranges()
    regions = whole_pages(image, view.regions(data))
    found = fold(regions, work, merge_pixels, workers, progress)
    image.check_unchanged()
    return Values.of(request.what, found, layout)


def _plain_view(image: DumpImage, view: View, plaintext: DumpImage) -> View:
    """A plaintext has the addresses that are shown, or all of the image's."""
    if -(-plaintext.size_bytes // PAGE_BYTES) * PAGE_BYTES == view.size_bytes:
        return View.whole(plaintext)
    if plaintext.size_bytes == image.size_bytes:
        return view
    raise DumpError(
        f"{plaintext.path} has {plaintext.size_bytes} bytes, what is shown of {image.path.name}"
        f" {view.size_bytes}: not the same memory",
        hint="--vm NAME shows one VM's memory, as a plaintext of that VM has it",
    )


def _outlines(image: DumpImage, inner: npt.NDArray[np.int64]) -> tuple[Outline, ...]:
    vms = () if image.sidecar is None else image.sidecar.vms
    at = inner * PAGE_BYTES
    found = [
        Outline(shown(vm.name), (at >= vm.base) & (at < vm.base + vm.size_bytes)) for vm in vms
    ]
    return tuple(one for one in found if one.pixels.any())


def _zone_name(image: DumpImage, zone: int) -> str:
    key = zone_key(image, zone)
    if key is None:
        return "KeyID 0"
    if zone == EXCLUDED:
        return "KeyID 0, excluded: plaintext"
    cipher = "plaintext" if key.algorithm is None else key.algorithm.value
    return f"KeyID {zone}, {cipher}"
