"""Room for what belongs to axes, also in a caller's figure, which may have no layout of its own."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox, BboxTransform

__all__ = ["add_colorbar", "add_legend", "has_layout", "is_narrow", "is_small", "label"]

# Sizes of a legend inside axes, in points: the first that fits.
LEGEND_SIZES = (9, 8, 7, 6, 5)
# Of a legend; more are counted.
MOST_NAMES = 32
# Width of axes in inches below which they are those of a panel among others.
NARROW = 4.0


def has_layout(ax: Axes) -> bool:
    """Return whether the figure makes room for what stands beside axes."""
    return ax.figure.get_layout_engine() is not None


def is_narrow(ax: Axes) -> bool:
    """Return whether axes are those of a panel among others, and names and legends have to be short."""
    return _size(ax)[0] < NARROW


def is_small(ax: Axes) -> bool:
    """Return whether all that belongs to axes has to stand in a narrow place."""
    return is_narrow(ax) and not has_layout(ax)


def add_legend(
    ax: Axes,
    handles: Sequence[Any] | None = None,
    title: str | None = None,
    *,
    below: bool = False,
    columns: int | None = None,
) -> None:
    """Explain marks, beside the axes or below and so never over the data; nothing where there is nothing to explain.

    In a figure without a layout, which would leave no room beside the axes, the legend stands inside.
    """
    handles = list(ax.get_legend_handles_labels()[0] if handles is None else handles)
    if not handles:
        return
    if len(handles) > MOST_NAMES:
        more = Line2D([], [], ls="", label=f"and {len(handles) - MOST_NAMES} more")
        handles = [*handles[:MOST_NAMES], more]
    if not has_layout(ax):
        size = 7 if is_small(ax) else 9
        small: dict[str, Any] = {"markerscale": 0.1 * size, "handlelength": 1.6, "labelspacing": 0.3}
        ax.legend(handles=handles, title=title, title_fontsize=size, fontsize=size, loc="best", framealpha=0.7, **small)
        return
    fitting = 1 if below and is_narrow(ax) else columns or (3 if below else -(-len(handles) // 16))
    where: Literal["upper center", "upper left"] = "upper center" if below else "upper left"
    anchor, pad = ((0.5, 0.0), 4.2) if below else ((1.01, 1.0), 0.0)
    ax.legend(
        handles=handles, title=title, fontsize=8 if is_narrow(ax) else 10, ncols=fitting, frameon=False, loc=where,
        bbox_to_anchor=anchor, borderaxespad=pad,
    )  # fmt: skip


def add_colorbar(image: Any, ax: Axes, text: str, **options: Any) -> None:
    """Explain shades by a bar beside the axes; `label` then makes room for it."""
    bar = ax.figure.colorbar(image, ax=ax, **options)
    size = 8 if is_small(ax) else 10
    bar.set_label(text, fontsize=size)
    bar.ax.tick_params(labelsize=size)


def label(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Name what is seen, the last step of a picture; a title that is wider than its axes goes on in a new line.

    In a figure without a layout the axes then shrink until their names and bars stand in the part of the figure that
    is theirs, and their legend, which is inside, is written as small as fits in them.

    Warns:
        UserWarning: If no legend fits, and so none is drawn.
    """
    if has_layout(ax) or ax.get_subplotspec() is None:
        wide, high = _size(ax)
        _write(ax, title, _filled(xlabel, wide, ax), _filled(ylabel, high, ax))
        return
    if is_small(ax):
        _small(ax)
    for _ in range(4):
        wide, high = _size(ax)
        _write(ax, title, _filled(xlabel, wide, ax), _filled(ylabel, high, ax))
        if not _shrink(ax):
            break
    _fit_legend(ax)


def _write(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    size = float(ax.title.get_fontsize())
    letters = max(14, int(72 * _size(ax)[0] / (0.56 * size)))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    # To look for a place of its own above ticks at the top takes a title as long as all the rest of a layout.
    place = 1.0 if ax.xaxis.get_ticks_position() in {"bottom", "default"} else None
    ax.set_title("\n".join(textwrap.fill(line, letters) for line in title.split("\n")), y=place, fontsize=size)


def _size(ax: Axes) -> tuple[float, float]:
    """Return the width and height of the place of axes in inches, which those of one scale need not fill."""
    place = ax.get_position(original=True).transformed(ax.figure.transSubfigure)
    return place.width / ax.figure.dpi, place.height / ax.figure.dpi


def _filled(text: str, inches: float, ax: Axes) -> str:
    """Return the name of an axis in lines as long as the axis, without what is in brackets where that is too long."""
    letters = max(12, int(1.15 * 72 * inches / (0.5 * float(ax.xaxis.label.get_fontsize()))))
    text = text.split(" (", maxsplit=1)[0] if len(text) > letters else text
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))


def _small(ax: Axes) -> None:
    """Write names no larger than axes of the usual size of a panel have room for."""
    for text, points in ((ax.title, 9), (ax.xaxis.label, 9), (ax.yaxis.label, 9)):
        text.set_fontsize(min(points, text.get_fontsize()))
    ax.tick_params(labelsize=8)


def _cell(ax: Axes) -> Bbox:
    """Return the part of the figure that is the axes': to the middle of the gaps between them and their neighbours."""
    spec = ax.get_subplotspec().get_topmost_subplotspec()  # type: ignore[union-attr]  # the caller has looked
    bottoms, tops, lefts, rights = spec.get_gridspec().get_grid_positions(ax.figure)  # type: ignore[arg-type]
    rows, columns = spec.rowspan, spec.colspan
    left = 0.0 if columns.start == 0 else (rights[columns.start - 1] + lefts[columns.start]) / 2
    right = 1.0 if columns.stop == len(rights) else (rights[columns.stop - 1] + lefts[columns.stop]) / 2
    top = 1.0 if rows.start == 0 else (bottoms[rows.start - 1] + tops[rows.start]) / 2
    bottom = 0.0 if rows.stop == len(tops) else (bottoms[rows.stop - 1] + tops[rows.stop]) / 2
    return Bbox.from_extents(left + 0.004, bottom + 0.004, right - 0.004, top - 0.004)


def _shrink(ax: Axes) -> bool:
    """Shrink axes and their bars, as far as something stands out of their cell; return whether anything did."""
    parts = [ax, *(image.colorbar.ax for image in ax.images if image.colorbar is not None)]
    legend = ax.get_legend()
    if legend is not None:
        legend.set_in_layout(False)  # it is inside, and no reason to shrink
    seen = Bbox.union([box for part in parts if (box := part.get_tightbbox()) is not None])
    seen, cell = seen.transformed(ax.figure.transSubfigure.inverted()), _cell(ax)
    own = Bbox.union([part.get_position(original=True) for part in parts])
    out = [max(0.0, cell.x0 - seen.x0), max(0.0, cell.y0 - seen.y0)]
    out += [max(0.0, seen.x1 - cell.x1), max(0.0, seen.y1 - cell.y1)]
    if max(out) < 1e-3:
        return False
    room = Bbox.from_extents(own.x0 + out[0], own.y0 + out[1], own.x1 - out[2], own.y1 - out[3])
    if room.x1 - room.x0 < 0.2 * own.width or room.y1 - room.y0 < 0.2 * own.height:
        return False  # too small a cell: better overlap than vanish
    change = BboxTransform(own, room)
    for part in parts:
        part.set_position(part.get_position(original=True).transformed(change))
        part.set_in_layout(True)  # a layout that the caller makes later places them anew
    return True


def _fit_legend(ax: Axes) -> None:
    """Write a legend inside axes as large as fits in them."""
    legend = ax.get_legend()
    if legend is None:
        return
    axes = ax.get_window_extent()
    for size in LEGEND_SIZES[2:] if is_small(ax) else LEGEND_SIZES:
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_fontsize(size)
        seen = legend.get_window_extent()
        room = size * ax.figure.dpi / 72  # about it
        if seen.width + room <= axes.width and seen.height + room <= axes.height:
            return
    legend.remove()
    warnings.warn(
        "The legend of a picture does not fit in its axes, and is left out; make the figure larger, or with a layout "
        "that leaves room beside axes: plt.subplots(..., layout='constrained').",
        stacklevel=3,
    )
