# SPDX-License-Identifier: GPL-2.0-or-later
"""What the page shows of DRAM images: all that it asks of `mktme.dump` is asked here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mktme.dump.analysis import page_entropy, written_lines
from mktme.dump.cluster import read_pages, whole_pages
from mktme.dump.image import DumpImage
from mktme.dump.zones import EXCLUDED, Zones, zone_key
from mktme.engine.text import spelled
from mktme.engine.xts import PAGE_BYTES
from mktme.proof.entropy import BINS, coarse

MAP_CELLS: Final = 1 << 17
"""The most cells of a map: 512 MiB are shown page by page."""


@dataclass(frozen=True, slots=True)
class KeyIdFigures:
    """The pages under one KeyID.

    Attributes:
        excluded: whether they are what the platform excludes from KeyID 0's encryption.
        key: how it is programmed, in words.
        vms: whose pages they are.
        pages: how many are assigned to it.
        written_pages: of these, those that have a line that is not all zeros.
        entropy: written pages a bin, as in `mktme.proof.entropy.EntropyComparison`.
        entropy_mean: of the written pages, bits a byte; None without any.
    """

    keyid: int
    excluded: bool
    key: str
    vms: tuple[str, ...]
    pages: int
    written_pages: int
    entropy: tuple[int, ...]
    entropy_mean: float | None


@dataclass(frozen=True, slots=True)
class DumpFigures:
    """What is said of an image in figures; in JSON, too.

    Attributes:
        name: what the reader calls it.
        sidecar: whether something says under which KeyID a page is.
    """

    name: str
    size_bytes: int
    written_pages: int
    sidecar: bool
    keyids: tuple[KeyIdFigures, ...]


@dataclass(frozen=True, slots=True)
class DumpMap:
    """An image, drawn: cells in the order of addresses, each of so many pages.

    Attributes:
        cell_pages: pages a cell.
        entropy: the mean of a cell's written pages, bits a byte; NaN where nothing was written:
            float32, shape (cells,).
        keyid: the KeyID of a cell's first page: uint16, shape (cells,).
    """

    cell_pages: int
    entropy: npt.NDArray[np.float32]
    keyid: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Look:
    """A look at one image."""

    figures: DumpFigures
    map: DumpMap


def look_at(path: Path, name: str | None = None) -> Look:
    """Read an image that has its description beside it.

    Args:
        path: the image.
        name: what to call it; None for its file's name.

    Raises:
        DumpError: it cannot be read as what it is said to be, or changed meanwhile.
    """
    with DumpImage.open(path) as image:
        zones = Zones(image)
        pages = -(-image.size_bytes // PAGE_BYTES)
        cell_pages = max(1, -(-pages // MAP_CELLS))
        cells = -(-pages // cell_pages)
        total = np.zeros(cells)
        count = np.zeros(cells, np.int64)
        found: dict[int, tuple[npt.NDArray[np.int64], float]] = {}
        for data, numbers in read_pages(image, whole_pages(image, image.data_ranges())):
            lines = written_lines(data).sum(axis=1, dtype=np.int64)
            written = lines > 0
            entropy, _ = page_entropy(data[written], lines[written])
            numbers = numbers[written]
            np.add.at(total, numbers // cell_pages, entropy)
            np.add.at(count, numbers // cell_pages, 1)
            theirs = zones.of(numbers)
            for zone in np.unique(theirs).tolist():
                of_it = entropy[theirs == zone]
                bins, bits = found.get(zone, _NOTHING)
                found[zone] = bins + np.array(coarse(of_it)), bits + float(of_it.sum())
        image.check_unchanged()
        owners = zones.of(np.arange(0, pages, cell_pages))
        with np.errstate(invalid="ignore"):
            mean = (total / count).astype(np.float32)
        return Look(
            DumpFigures(
                name=spelled(path.name if name is None else name),
                size_bytes=image.size_bytes,
                written_pages=int(count.sum()),
                sidecar=image.sidecar is not None,
                keyids=tuple(
                    _of_zone(image, zone, assigned, *found.get(zone, _NOTHING))
                    for zone, assigned in zones.sizes().items()
                ),
            ),
            DumpMap(cell_pages, mean, np.where(owners == EXCLUDED, np.uint16(0), owners)),
        )


_NOTHING: Final = (np.zeros(BINS, np.int64), 0.0)


def _of_zone(
    image: DumpImage, zone: int, pages: int, bins: npt.NDArray[np.int64], bits: float
) -> KeyIdFigures:
    key = zone_key(image, zone)
    words = "not known"
    if zone == EXCLUDED:
        words = "excluded: plaintext"
    elif key is not None:
        cipher = () if key.algorithm is None else (key.algorithm.value,)
        words = ", ".join((*cipher, key.mode.value))
    written = int(bins.sum())
    sidecar = image.sidecar
    return KeyIdFigures(
        keyid=0 if zone == EXCLUDED else zone,
        excluded=zone == EXCLUDED,
        key=words,
        vms=() if sidecar is None else tuple(vm.name for vm in sidecar.vms if vm.keyid == zone),
        pages=pages,
        written_pages=written,
        entropy=tuple(bins.tolist()),
        entropy_mean=bits / written if written else None,
    )
