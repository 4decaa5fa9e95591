"""Figures, their files, and the marks that tell numbered things apart: in colour, to the colour-blind and in grey."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from tgmm_nn import checks

__all__ = ["Mark", "animate", "count", "dot", "mark", "new_axes", "save"]

# Okabe and Ito, Color universal design, 2008, without the yellow, which is lost on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "os^DvPX*<>ph"
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (1, 1.2)), (0, (3, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\")
DPI = 120
# Of axes with a legend beside them.
SIZE = (7.5, 5.2)


class Mark(NamedTuple):
    """How the things with one number are drawn: points, lines and areas."""

    color: str
    marker: str
    line: Any
    hatch: str


def mark(number: int) -> Mark:
    """Return the mark of a number from 0; no two of the first 84 are alike, nor any two markers of the first 12.

    Example:
        >>> mark(0).color, mark(0).marker, mark(12).marker == mark(0).marker, mark(12) == mark(0)
        ('#0072B2', 'o', True, False)
    """
    return Mark(
        *(values[number % len(values)] for values in (COLORS, MARKERS, LINES, HATCHES))  # lengths without a common part
    )


def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.0, 5.0)) -> list[Axes]:
    """Return the axes of a new figure, row by row, with text large enough to read; `save` writes it.

    Args:
        rows: Number of rows of axes.
        columns: Number of axes in a row.
        size: Width and height of one of the axes, with its labels, in inches.

    Example:
        >>> len(new_axes(2, 3))
        6
    """
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="compressed", dpi=DPI)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.tick_params(labelsize=11)
        for text, points in ((ax.title, 13), (ax.xaxis.label, 12), (ax.yaxis.label, 12)):
            text.set_fontsize(points)
    return axes


def percent(share: float) -> str:
    """Return a share as text, with a place behind the point where it is small."""
    return f"{100 * share:.{int(0 < abs(share) < 0.0095)}f} %"


def number(value: float, digits: int = 4) -> str:
    """Return a number as text with a true minus, as the ticks of axes have it.

    Example:
        >>> number(-40.612, 3)
        '−40.6'
    """
    return f"{value:.{digits}g}".replace("-", "−")


def count(n: int, what: str) -> str:
    """Return a number of things as text.

    Example:
        >>> count(1, "row"), count(1200, "row")
        ('1 row', '1,200 rows')
    """
    return f"{n:,} {what}{'s'[: n != 1]}"


def dot(number: int, name: str) -> Line2D:
    """Return what a legend shows for the points with a mark."""
    return Line2D([], [], ls="", color=mark(number).color, marker=mark(number).marker, label=name)


def save(ax: Axes, file: str | os.PathLike[str]) -> None:
    """Write the figure that the axes belong to; its folder is made.

    Args:
        ax: Any axes of the figure.
        file: Where to; its suffix decides the format.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = _figure_of(ax)
    if file.suffix.lower() == ".png":
        _write_png(figure, file)
    else:
        figure.savefig(file, dpi=DPI)


def lay_out_like(ax: Axes, other: Axes) -> None:
    """Place axes as those of a figure of the same size are, which is laid out: neither is a layout made, nor kept."""
    _figure_of(ax).set_layout_engine("none")
    ax.set_position(other.get_position(original=True))


def _figure_of(ax: Axes) -> Figure:
    return ax.figure if isinstance(ax.figure, Figure) else ax.figure.figure


def _write_png(figure: Figure, file: Path) -> None:
    """Lay out and draw once: `savefig` draws a figure with a layout twice, at first for where things come to stand."""
    canvas, dpi = figure.canvas, figure.dpi
    try:
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(file, pil_kwargs={"compress_level": 3})  # type: ignore[no-untyped-call]
    finally:
        figure.set_canvas(canvas)
        figure.set_dpi(dpi)


def animate(pictures: Sequence[str | os.PathLike[str]], file: str | os.PathLike[str], seconds: float = 0.6) -> None:
    """Join pictures of equal size in one animated GIF, which repeats; the last is shown four times as long.

    Args:
        pictures: Files of the pictures, in order.
        file: Where to, a name that ends in ``.gif``.
        seconds: How long a picture is shown.

    Raises:
        TypeError: If ``seconds`` is no number.
        ValueError: If there is no picture, ``seconds`` is not above 0, or the pictures differ in size.
    """
    checks.check_number("seconds", seconds, strict=True)
    images = []
    for picture in pictures:
        with Image.open(picture) as image:
            images.append(image.convert("RGB").quantize(64))
    if not images or len({image.size for image in images}) > 1:
        raise ValueError(
            f"Expected `pictures` with at least one picture, all of one size, but got {[i.size for i in images]}."
        )
    durations = [int(1000 * seconds)] * (len(images) - 1) + [int(4000 * seconds)]
    images[0].save(file, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)
