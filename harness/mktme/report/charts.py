# SPDX-License-Identifier: GPL-2.0-or-later
"""The page's charts: Matplotlib draws them, and they become part of the page.

What Matplotlib writes is a document of its own, so it is taken apart and put together for HTML:
style attributes become attributes (the page's policy forbids the former), identifiers begin with
the chart's own, and colours get the class of their role, by which the style sheet turns them for a
dark page. Text stays text, in the page's font.

Colours are told apart by who does not see them all (Okabe and Ito, 2008), and never the only
difference: the second series has dashes or another hatch, and each has its name beside it.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from mktme.engine.xts import LINE_BYTES, PAGE_BYTES
from mktme.proof.entropy import BIN_BITS, BINS, EntropyComparison
from mktme.proof.timeline import Timeline
from mktme.report.dumps import DumpMap

INK, GRID, BAND, FIRST, SECOND, LIMIT = (
    "#1d1f22",
    "#d5d7da",
    "#e8eaed",
    "#0072b2",
    "#d55e00",
    "#5b6068",
)
_ROLES: Final = {INK: "ink", GRID: "grid", BAND: "band", FIRST: "c1", SECOND: "c2", LIMIT: "c3"}
_KEYID_COLOURS: Final = (
    "#56b4e9",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#0072b2",
    "#d55e00",
    "#f0e442",
)
"""Of KeyIDs from 1 on, again and again; KeyID 0 is grey."""
_KEYID_0: Final = "#8d939b"
_WIDTH, _HEIGHT = 4.4, 2.45  # inches of 72 units: the width of a telephone
_POINTS: Final = 120
"""The most points of a line: more are not seen."""
_ROWS: Final = 16
"""The most rows of a table beside a chart; the JSON has all samples."""
_STEPS: Final = (1, 2, 5, 10)
_MIB: Final = 1 << 20
_SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mktme",
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0,
    "legend.labelspacing": 0.3,
}


_Grid: TypeAlias = tuple[npt.NDArray[Any], tuple[float, float, float, float]]
"""Rows of cells, and where they begin and end: left, right, bottom, top."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart, and the same for who does not see it.

    Attributes:
        id: unique in the page.
        title: what it shows.
        description: what is to be seen, in words.
        svg: an element for HTML.
        head: of the table: what its columns are.
        rows: the chart's figures.
    """

    id: str
    title: str
    description: str
    svg: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Rate:
    """A counter's rate: means over intervals, `edges` being where these begin and end."""

    edges: npt.NDArray[np.float64]
    per_s: npt.NDArray[np.float64]


def entropy_chart(one: str, name: str, found: EntropyComparison) -> Chart:
    """Pages by their entropy: as the guest has them above, as they are in DRAM below."""
    sides = (
        ("in the guest", found.plaintext, FIRST, found.plaintext_mean),
        ("in DRAM", found.ciphertext, SECOND, found.ciphertext_mean),
    )
    edges = np.arange(BINS + 1) * BIN_BITS
    with _figure(_HEIGHT + 0.6) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, (what, bins, colour, _mean) in zip(panels, sides, strict=True):
            share = 100 * np.array(bins, float) / max(1, found.pages)
            axes.bar(edges[:-1], share, BIN_BITS, align="edge", color=colour, linewidth=0)
            axes.set_ylabel("% of pages")
            axes.set_title(what, loc="left", fontsize=10, pad=4)
            axes.set_ylim(0, max(1.0, float(share.max(initial=0))) * 1.08)
            axes.yaxis.set_major_locator(MaxNLocator(3, steps=_STEPS))
            axes.grid(axis="x", visible=False)
        panels[1].set_xlim(0, 8)
        panels[1].set_xlabel("entropy, bits a byte")
        return _chart(
            figure,
            one,
            f"Entropy of {name}'s pages",
            f"{found.pages:,} pages: {found.plaintext_mean:.2f} bits a byte on average in the"
            f" guest, {found.ciphertext_mean:.2f} in DRAM.",
            ("bits a byte", "pages in the guest", "pages in DRAM"),
            (
                (f"{low:g} to {low + BIN_BITS:g}", f"{before:,}", f"{after:,}")
                for low, before, after in zip(
                    edges.tolist(), found.plaintext, found.ciphertext, strict=False
                )
                if before or after
            ),
        )


def keyid_entropy_chart(
    one: str, keyid: str, written_pages: int, bins: Sequence[int], mean: float
) -> Chart:
    """Written pages of a KeyID by their entropy."""
    edges = np.arange(BINS + 1) * BIN_BITS
    with _figure(_HEIGHT - 0.4) as figure:
        axes = figure.subplots()
        share = 100 * np.array(bins, float) / max(1, written_pages)
        axes.bar(edges[:-1], share, BIN_BITS, align="edge", color=SECOND, linewidth=0)
        axes.set_ylabel("% of pages")
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        axes.grid(axis="x", visible=False)
        axes.set_xlim(0, 8)
        axes.set_xlabel("entropy, bits a byte")
        return _chart(
            figure,
            one,
            f"Entropy of pages under KeyID {keyid}",
            f"{written_pages:,} written pages, {mean:.2f} bits a byte on average.",
            ("bits a byte", "pages"),
            (
                (f"{low:g} to {low + BIN_BITS:g}", f"{count:,}")
                for low, count in zip(edges.tolist(), bins, strict=False)
                if count
            ),
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a guest wrote.

    Attributes:
        name: the guest's.
        tracker: what told of it, in words.
        timeline: its counters, at least two samples.
        series: columns of lines and what to call them, one or two; they add up.
    """

    name: str
    tracker: str
    timeline: Timeline
    series: dict[str, str]

    @property
    def peak(self) -> float:
        """The highest point of its chart, MiB/s."""
        rates = [_rate(self.timeline, column).per_s for column in self.series]
        return float(np.sum(rates, axis=0).max()) * LINE_BYTES / _MIB


def traffic_chart(one: str, shown: Traffic, top: float) -> Chart:
    """What a guest changed in DRAM, over time.

    Args:
        one: the chart's id.
        shown: what it wrote.
        top: where the scale ends, MiB/s; the same for guests that are to be compared.
    """
    timeline, series = shown.timeline, shown.series
    rates = {what: _rate(timeline, column) for column, what in series.items()}
    scale = LINE_BYTES / _MIB
    with _figure() as figure:
        axes = figure.subplots()
        _mark_work(axes, timeline)
        below: npt.NDArray[np.float64] | float = 0.0
        for number, (what, rate) in enumerate(rates.items()):
            above = below + rate.per_s * scale
            axes.stairs(
                above,
                rate.edges,
                baseline=below,
                fill=True,
                facecolor=(FIRST, SECOND)[number],
                edgecolor=INK,
                hatch=(None, "////")[number],
                linewidth=0,
                label=what,
            )
            below = above
        axes.set_ylim(0, top * 1.05 or 1)
        _over_time(axes, "MiB/s", timeline)
        total = {what: getattr(timeline, column)[-1] for column, what in series.items()}
        return _chart(
            figure,
            one,
            f"Writes of {shown.name}, by {shown.tracker}",
            f"Memory that changed over {timeline.at_s[-1]:.1f} s: "
            + ", ".join(f"{lines * scale:,.1f} MiB {what}" for what, lines in total.items())
            + ".",
            ("seconds", *(f"{what}, MiB/s" for what in series)),
            _rate_rows(timeline, tuple(series), scale, ",.2f"),
        )


def window_chart(one: str, name: str, timeline: Timeline, window_bytes: int) -> Chart:
    """How much of a guest is plaintext, against what may be."""
    at = np.array(timeline.at_s)
    resident = np.array(timeline.resident_bytes, float) / _MIB
    limit = window_bytes / _MIB
    with _figure() as figure:
        axes = figure.subplots()
        _mark_work(axes, timeline)
        axes.fill_between(at, resident, color=FIRST, linewidth=0, label="plaintext")
        axes.axhline(limit, color=LIMIT, linestyle=(0, (4, 2)), linewidth=1.4, label="window")
        axes.set_ylim(0, max(limit, resident.max()) * 1.12 or 1)
        _over_time(axes, "MiB", timeline)
        every = max(1, -(-len(at) // _ROWS))
        return _chart(
            figure,
            one,
            f"Plaintext of {name} in RAM",
            f"Sampled at {len(at):,} moments: at most {resident.max():,.1f} MiB, of the"
            f" {limit:,.1f} MiB that the window holds.",
            ("seconds", "plaintext, MiB"),
            (
                (f"{when:.1f}", f"{size:,.1f}")
                for when, size in zip(at[::every].tolist(), resident[::every].tolist(), strict=True)
            ),
        )


def paging_chart(one: str, name: str, timeline: Timeline) -> Chart:
    """Page faults and evictions of an `inline` guest over time."""
    series = {"faults": "faults", "pages_evicted": "pages out"}
    with _figure() as figure:
        axes = figure.subplots()
        _mark_work(axes, timeline)
        for (column, what), colour, dashes in zip(
            series.items(), (FIRST, SECOND), ("solid", (0, (3, 1.2))), strict=True
        ):
            rate = _rate(timeline, column)
            axes.stairs(
                rate.per_s,
                rate.edges,
                baseline=None,
                color=colour,
                linestyle=dashes,
                linewidth=1.5,
                label=what,
            )
        axes.set_ylim(0)
        _over_time(axes, "a second", timeline)
        return _chart(
            figure,
            one,
            f"Faults and evictions of {name}",
            f"{timeline.faults[-1]:,} faults and {timeline.pages_evicted[-1]:,} pages out in"
            f" {timeline.at_s[-1]:.1f} s.",
            ("seconds", "faults a second", "pages out a second"),
            _rate_rows(timeline, tuple(series), 1.0, ",.0f"),
        )


def entropy_map(one: str, name: str, shown: DumpMap) -> Chart:
    """An image's pages in the order of their addresses, coloured by entropy."""
    return _map(
        one,
        f"Entropy in {name}",
        "Each cell is" + _cells(shown) + ", left to right, then down; cells without a colour were"
        " never written. Ciphertext and other noise are light, zeros and patterns dark.",
        shown,
        shown.entropy,
        colours=lambda figure, axes, grid: figure.colorbar(
            _picture(axes, grid, cmap="cividis", vmin=0, vmax=8),
            ax=axes,
            label="bits a byte",
            shrink=0.8,
        ),
    )


def keyid_map(one: str, name: str, shown: DumpMap, written: Sequence[int]) -> Chart:
    """An image's written pages in the order of their addresses, coloured by KeyID.

    Args:
        one: the chart's id.
        name: the image's.
        shown: its map.
        written: all KeyIDs that a page was written under; a cell of several pages shows one.
    """
    there = np.where(np.isnan(shown.entropy), np.nan, shown.keyid.astype(np.float32))
    keyids = np.unique(there[~np.isnan(there)]).astype(int).tolist()
    place = {keyid: number for number, keyid in enumerate(keyids)}
    numbers = np.full(there.shape, np.nan)
    for keyid, number in place.items():
        numbers[there == keyid] = number
    palette = [_keyid_colour(keyid) for keyid in keyids] or [_KEYID_0]

    def colours(figure: Figure, axes: Axes, grid: _Grid) -> None:
        picture = _picture(
            axes, grid, cmap=ListedColormap(palette), vmin=-0.5, vmax=len(palette) - 0.5
        )
        bar = figure.colorbar(picture, ax=axes, label="KeyID", shrink=0.8)
        every = max(1, -(-len(keyids) // 12))
        bar.set_ticks(list(range(0, len(keyids), every)), labels=list(map(str, keyids[::every])))
        bar.ax.tick_params(length=0)

    return _map(
        one,
        f"KeyIDs in {name}",
        "Each cell is"
        + _cells(shown)
        + ", the KeyID of the first of them" * (shown.cell_pages > 1)
        + ", left to right, then down; cells without a colour were never written. KeyIDs that were"
        f" written under: {', '.join(map(str, written)) or 'none'}.",
        shown,
        numbers,
        colours,
    )


def _picture(axes: Axes, grid: _Grid, **colours: Any) -> AxesImage:
    values, extent = grid
    return axes.imshow(values, interpolation="none", aspect="auto", extent=extent, **colours)


def _keyid_colour(keyid: int) -> str:
    return _KEYID_COLOURS[(keyid - 1) % len(_KEYID_COLOURS)] if keyid else _KEYID_0


def _cells(shown: DumpMap) -> str:
    return " a page" if shown.cell_pages == 1 else f" {shown.cell_pages:,} pages"


def _map(
    one: str,
    title: str,
    description: str,
    shown: DumpMap,
    values: npt.NDArray[Any],
    colours: Callable[[Figure, Axes, _Grid], object],
) -> Chart:
    width = 1 << max(0, (len(values) - 1).bit_length() + 1) // 2
    rows = -(-len(values) // width)
    grid = np.full(rows * width, np.nan)
    grid[: len(values)] = values
    end = rows * width * shown.cell_pages * PAGE_BYTES / _MIB
    with _figure(_HEIGHT + 0.9) as figure:
        axes = figure.subplots()
        colours(figure, axes, (grid.reshape(rows, width), (0, 1, end, 0)))
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_ylabel("address, MiB")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        return _chart(figure, one, title, description, (), ())


def _mark_work(axes: Axes, timeline: Timeline) -> None:
    if timeline.worked_s is not None:
        axes.axvspan(*timeline.worked_s, color=BAND, linewidth=0, label="workload runs")


def _over_time(axes: Axes, unit: str, timeline: Timeline) -> None:
    axes.set_ylabel(unit)
    axes.set_xlabel("seconds from the first instruction")
    axes.set_xlim(0, timeline.at_s[-1])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, columnspacing=1.2)


def _rate(timeline: Timeline, column: str, points: int = _POINTS) -> _Rate:
    """A counter's rate in at most so many intervals; a counter that fell began anew, from 0."""
    at = np.array(timeline.at_s)
    every = max(1, -(-(len(at) - 1) // points))
    taken = np.unique(np.append(np.arange(0, len(at), every), len(at) - 1))
    values = np.array(getattr(timeline, column), float)[taken]
    return _Rate(at[taken], np.maximum(np.diff(values), 0) / np.diff(at[taken]))


def _rate_rows(
    timeline: Timeline, columns: tuple[str, ...], scale: float, form: str
) -> Iterator[tuple[str, ...]]:
    rates = [_rate(timeline, column, _ROWS) for column in columns]
    edges = rates[0].edges.tolist()
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        figures = (format(float(rate.per_s[number]) * scale, form) for rate in rates)
        yield (f"{low:.1f} to {high:.1f}", *figures)


@contextmanager
def _figure(height: float = _HEIGHT) -> Iterator[Figure]:
    with mpl.rc_context():
        mpl.rcdefaults()  # not what the user's matplotlibrc says
        mpl.rcParams.update(_SETTINGS)
        yield Figure((_WIDTH, height), layout="constrained")


def _chart(
    figure: Figure,
    one: str,
    title: str,
    description: str,
    head: tuple[str, ...],
    rows: Iterator[tuple[str, ...]] | tuple[tuple[str, ...], ...],
) -> Chart:
    return Chart(one, title, description, _svg(figure, one, title, description), head, tuple(rows))


def _svg(figure: Figure, one: str, title: str, description: str) -> str:
    buffer = io.BytesIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.text = element.text if element.tag == "text" else None
        element.tail = None
        old = dict(element.attrib)
        element.attrib.clear()
        for name, value in _attributes(old):
            element.set(name, value)
        _name(element, one)
        _give_roles(element)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {
        "role": "img",
        "aria-labelledby": f"{one}-title",
        "aria-describedby": f"{one}-desc",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{one}-{tag}"})
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attributes(old: dict[str, str]) -> Iterator[tuple[str, str]]:
    """An element's attributes, its style's properties among them."""
    for name, value in old.items():
        if name != "style":
            yield _local(name), value
            continue
        for declaration in value.split(";"):
            what, _, is_ = declaration.partition(":")
            what, is_ = what.strip(), is_.strip()
            if what == "font":  # a shorthand is no attribute; the family is the page's
                yield "font-size", is_.partition(" ")[0]
            elif what and what != "font-family":
                yield what, is_


_REFERENCE: Final = re.compile(r"url\(#([^)]*)\)")


def _name(element: ElementTree.Element, one: str) -> None:
    """Make an element's identifier, and what it refers to, the chart's own."""
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set(name, f"{one}-{value}")
        elif name == "href" and value.startswith("#"):
            element.set(name, f"#{one}-{value[1:]}")
        elif "url(#" in value:
            element.set(name, _REFERENCE.sub(rf"url(#{one}-\1)", value))


def _give_roles(element: ElementTree.Element) -> None:
    if element.tag == "text":
        element.attrib.setdefault("fill", INK)
    roles = [
        f"{name}-{role}"
        for name in ("fill", "stroke")
        if (role := _ROLES.get(element.get(name, "").lower())) is not None
    ]
    if roles:
        element.set("class", " ".join(roles))
