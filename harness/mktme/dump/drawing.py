# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump map`: pictures of an image, PNG or SVG.

Colours are viridis and cividis, which are perceptually uniform and the same order of light and dark
for the colour-blind and on paper, and for KeyIDs those of Okabe and Ito ("Color Universal Design",
2008). Grey is what was never written, always.
"""

from __future__ import annotations

import enum
import io
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mktme.dump.cluster import HERE, Workers
from mktme.dump.pictures import Outline, Panel, Picture, Request, make_picture
from mktme.dump.pixels import Layout, Order, What
from mktme.dump.randomness import entropy_of_random
from mktme.engine.xts import PAGE_BYTES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_OKABE_ITO: Final = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
)
_MORE: Final = "#000000"  # KeyIDs beyond the seven that have most
_UNWRITTEN: Final = "#d4d4d4"
_INK: Final = "#222222"
_PALE: Final = 0.75  # how much of white a KeyID's colour has where nothing was written
_MAX_NAMES: Final = 12
_PATCHES_A_ROW: Final = 2

# The figure's measures, in dots.
_DPI: Final = 160
_PANEL_DOTS: Final = 1024  # a panel's longer side at most; of two, three quarters of it
_MIN_WIDTH: Final = 900
_MARGIN: Final = 170
_GAP: Final = 260
_TOP: Final = 70
_FOOT: Final = 64
_PATCH: Final = 30
_BAR: Final = 120
_BAR_HEIGHT: Final = 26


class Format(enum.Enum):
    """How a picture is kept."""

    PNG = "png"
    SVG = "svg"


def picture_png(request: Request, workers: Workers = HERE) -> bytes:
    """A picture as a PNG file; raises as `make_picture`."""
    return render(make_picture(request, workers), Format.PNG)


def picture_svg(request: Request, workers: Workers = HERE) -> bytes:
    """A picture as an SVG file, UTF-8, that needs no other; raises as `make_picture`."""
    return render(make_picture(request, workers), Format.SVG)


def render(picture: Picture, form: Format) -> bytes:
    """Draw a picture: the bytes of a file, the same for the same picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {
        "font.family": "sans-serif",
        "font.size": 8,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        # Text that can be read, searched and spoken; and no ID or date that differs next time.
        "svg.fonttype": "none",
        "svg.hashsalt": "mktme",
        "text.parse_math": False,  # a file's name may have a $ in it
    }
    with mpl.rc_context():
        mpl.rcdefaults()  # not what the user's matplotlibrc says
        mpl.rcParams.update(settings)
        figure = Figure(dpi=_DPI, facecolor="white")
        _draw(figure, picture)
        file = io.BytesIO()
        title = " | ".join(one.title for one in picture.panels)
        metadata: dict[str, Any] = {"Title": f"{picture.what.value}: {title}"}
        metadata |= {"Date": None} if form is Format.SVG else {"Software": None}
        figure.savefig(file, format=form.value, metadata=metadata)
        return file.getvalue()


def _draw(figure: Figure, picture: Picture) -> None:
    """Lay out the figure in dots, so that a pixel of the picture is a whole number of them."""
    layout = picture.layout
    rows, columns = layout.arrange(np.zeros(layout.pixels), 0).shape
    panel_dots = _PANEL_DOTS if len(picture.panels) == 1 else _PANEL_DOTS * 3 // 4
    dots = max(1, panel_dots // max(rows, columns))
    width, height = columns * dots, rows * dots
    used = len(picture.panels) * width + (len(picture.panels) - 1) * _GAP
    total_width = max(used + 2 * _MARGIN, _MIN_WIDTH)
    patches = _patches(picture)
    bottom = _FOOT + _PATCH * -(-len(patches) // _PATCHES_A_ROW) + _MARGIN // 4
    has_bar = picture.what is not What.KEYID
    if has_bar:
        bottom += _BAR
    total_height = _TOP + height + bottom
    figure.set_size_inches(total_width / _DPI, total_height / _DPI)
    left = (total_width - used) / 2
    for panel in picture.panels:
        box = left / total_width, bottom / total_height, width / total_width, height / total_height
        _draw_panel(figure.add_axes(box), picture, panel)
        left += width + _GAP
    if has_bar:
        bar_width = min(0.75, 900 / total_width)
        at = bottom - _MARGIN // 4 - _BAR_HEIGHT
        box = 0.5 - bar_width / 2, at / total_height, bar_width, _BAR_HEIGHT / total_height
        _draw_bar(figure, figure.add_axes(box), picture)
    figure.legend(
        handles=patches,
        loc="lower center",
        bbox_to_anchor=(0.5, _FOOT / total_height),
        ncols=min(_PATCHES_A_ROW, len(patches)),
        frameon=False,
        borderpad=0,
        handlelength=1.2,
        handleheight=1.2,
    )
    note = "\n".join(_note(picture))
    figure.text(0.5, 16 / total_height, note, ha="center", va="bottom", fontsize=7)


def _draw_panel(axes: Axes, picture: Picture, panel: Panel) -> None:
    layout = picture.layout
    colours = _colours(picture, panel)
    rows, columns = layout.places()
    grid = np.ones((int(rows.max()) + 1, int(columns.max()) + 1, 4))
    grid[..., 3] = 0
    grid[rows, columns] = colours
    height, width = grid.shape[:2]
    axes.imshow(grid, interpolation="none", extent=(0, width, height, 0), aspect="equal")
    axes.set_title(panel.title, fontsize=10, pad=8)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([])
    if layout.order is Order.ROW:
        _row_ticks(axes, layout, height)
    else:
        _hilbert_ticks(axes, layout, height, width)
    for outline in panel.outlines[:_MAX_NAMES]:
        _draw_outline(axes, layout, outline)


def _colours(picture: Picture, panel: Panel) -> npt.NDArray[np.float64]:
    """RGBA of each pixel, shape (pixels, 4)."""
    from matplotlib.colors import to_rgba

    shown = panel.values.shown
    written = ~np.isnan(shown)
    found = np.tile(to_rgba(_UNWRITTEN), (len(shown), 1))
    found[~panel.there, 3] = 0
    if picture.what is What.KEYID:
        for zone, colour in _zone_colours(picture).items():
            own = panel.zones == zone
            found[own & written] = to_rgba(colour)
            found[own & panel.there & ~written, :3] = _PALE + (1 - _PALE) * np.array(
                to_rgba(colour)[:3]
            )
    else:
        found[written] = _scale(picture.what)[0](shown[written] / _scale(picture.what)[1])
    return found


def _scale(what: What) -> tuple[Any, float]:
    """A continuous colour map, and the value at its end."""
    import matplotlib as mpl

    if what is What.ENTROPY:
        return mpl.colormaps["viridis"], 8.0
    return mpl.colormaps["cividis"], 1.0


def _zone_colours(picture: Picture) -> dict[int, str]:
    return {
        zone: _OKABE_ITO[at] if at < len(_OKABE_ITO) else _MORE
        for at, zone in enumerate(picture.keyids)
    }


def _row_ticks(axes: Axes, layout: Layout, height: int) -> None:
    row_bytes = layout.side * layout.pixel_pages * PAGE_BYTES
    step = 1
    while height / step > 8:
        step *= 2
    rows = range(0, height, step)
    axes.set_yticks([*rows], [_size(row * row_bytes) for row in rows])


def _hilbert_ticks(axes: Axes, layout: Layout, height: int, width: int) -> None:
    """Say beside each quarter which addresses it has: left ones left, right ones right."""
    half = layout.side // 2
    quarter = half * half * layout.pixel_pages * PAGE_BYTES
    end = layout.pages * PAGE_BYTES
    if half == 0 or width <= half // 2:
        axes.set_yticks([])
        return

    def label(at: int) -> str:
        return f"{_size(at * quarter)} to\n{_size(min(end, (at + 1) * quarter))}"

    middles = [half / 2, half + half / 2]
    left = [(middles[row], label(at)) for at, row in ((0, 0), (1, 1)) if at * quarter < end]
    right = [(middles[row], label(at)) for at, row in ((3, 0), (2, 1)) if at * quarter < end]
    axes.set_yticks([at for at, _ in left], [text for _, text in left])
    if right:
        other = axes.secondary_yaxis("right")
        other.set_yticks([at for at, _ in right], [text for _, text in right])
        other.spines["right"].set_visible(False)
        other.tick_params(length=0)
    axes.tick_params(length=0)


def _draw_outline(axes: Axes, layout: Layout, outline: Outline) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patheffects import withStroke

    rows, columns = layout.places()
    inside = np.zeros((int(rows.max()) + 3, int(columns.max()) + 3), bool)
    inside[rows + 1, columns + 1] = outline.pixels
    level = _runs(inside[1:, :] != inside[:-1, :])
    upright = _runs((inside[:, 1:] != inside[:, :-1]).T)
    lines = [[(start - 1, row), (end - 1, row)] for row, start, end in level]
    lines += [[(column, start - 1), (column, end - 1)] for column, start, end in upright]
    around = [withStroke(linewidth=2.4, foreground="white")]
    drawn = LineCollection(lines, colors=_INK, linewidths=0.9, path_effects=around, clip_on=False)
    axes.add_collection(drawn)
    at = np.flatnonzero(outline.pixels)
    # The first row that it is in: the upper left of the box around it may be somebody else's.
    top = at[rows[at] == rows[at].min()]
    axes.text(
        float(columns[top].min()) + layout.side / 64,
        float(rows[at].min()) + layout.side / 64,
        outline.name,
        fontsize=8,
        fontweight="bold",
        color=_INK,
        ha="left",
        va="top",
        # No stroke around letters: in an SVG it would make shapes of them.
        bbox={"facecolor": "white", "linewidth": 0, "alpha": 0.8, "pad": 1.5},
    )


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """Runs of flags within rows: row, start, and end."""
    edges = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    return list(zip(row.tolist(), start.tolist(), end.tolist(), strict=True))


def _patches(picture: Picture) -> list[Patch]:
    from matplotlib.patches import Patch

    def patch(colour: str, label: str) -> Patch:
        return Patch(facecolor=colour, edgecolor=_INK, linewidth=0.4, label=label)

    if picture.what is not What.KEYID:
        return [patch(_UNWRITTEN, "never written")]
    colours = _zone_colours(picture)
    named = list(picture.keyids.items())[: len(_OKABE_ITO)]
    found = [patch(colours[zone], name) for zone, name in named]
    if len(picture.keyids) > len(named):
        found.append(patch(_MORE, f"{len(picture.keyids) - len(named)} more KeyIDs"))
    found.append(patch("white", "paler: never written"))
    return found


def _draw_bar(figure: Figure, axes: Axes, picture: Picture) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours, most = _scale(picture.what)
    mapped = ScalarMappable(Normalize(0, most), colours)
    bar = figure.colorbar(mapped, cax=axes, orientation="horizontal")
    bar.outline.set_linewidth(0.4)
    _label_bar(bar, picture)


def _label_bar(bar: Any, picture: Picture) -> None:
    pixels = picture.layout.pixel_pages
    if picture.what is What.ENTROPY:
        random = entropy_of_random(PAGE_BYTES).mean
        bar.set_ticks([0, 2, 4, 6, random], labels=["0", "2", "4", "6", f"{random:.2f} random"])
        of = "page" if pixels == 1 else "pages, mean of a pixel's"
        bar.set_label(f"entropy of {of} (bits per byte)")
        return
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    what = (
        "written lines" if picture.what is What.WRITTEN else "lines that differ, of those written"
    )
    bar.set_label(what)


def _note(picture: Picture) -> tuple[str, str]:
    layout = picture.layout
    pixel = "1 page" if layout.pixel_pages == 1 else f"{layout.pixel_pages} pages"
    size = _size(layout.pixel_pages * PAGE_BYTES)
    first = f"1 pixel = {pixel} ({size})"
    if picture.what is What.KEYID and layout.pixel_pages > 1:
        first += ", the KeyID of the first of them"
    order = (
        f"rows of {_size(layout.side * layout.pixel_pages * PAGE_BYTES)}, from the top"
        if layout.order is Order.ROW
        else "Hilbert curve: upper left, lower left, lower right, upper right"
    )
    return f"{first}; addresses: {picture.addresses}", order


def _size(size_bytes: int) -> str:
    """A size in the largest unit that keeps it short."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << shift:
            return f"{size_bytes / (1 << shift):.4g} {unit}"
    return str(size_bytes)
