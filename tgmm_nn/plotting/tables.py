"""Counts as heat maps, scores as histograms, confidence against accuracy, and images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.plotting.figures import SIZE, mark, new_axes, number, percent
from tgmm_nn.plotting.places import add_colorbar, add_legend, is_small, label

__all__ = ["plot_contingency", "plot_images", "plot_reliability", "plot_scores"]


def plot_contingency(
    table: Any,
    *,
    clusters: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    xlabel: str = "class",
    ylabel: str = "cluster",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw the numbers of rows by cluster and class as a heat map, dark where there are many.

    Up to 15 clusters and classes each cell holds its number. Clusters and classes stand in the order of the table.

    Args:
        table: Numbers of rows, shape ``(K, C)``.
        clusters: Names of the K clusters; None numbers them.
        classes: Names of the C classes; None numbers them.
        xlabel: What a column is.
        ylabel: What a row is.
        title: Title of the axes.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If ``table`` holds no real numbers.
        ValueError: If ``table`` is not ``(K, C)`` or holds a number that is negative or not finite, or names are not as
            many.

    Example:
        >>> ax = plot_contingency(torch.tensor([[9, 1], [0, 5]]))
        >>> [text.get_text() for text in ax.texts]
        ['9', '1', '0', '5']
    """
    table = checks.to_tensor("table", table, torch.float64).detach().cpu()
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"Expected `table` of numbers of rows, shape (K, C), but got {tuple(table.shape)}.")
    if not bool(((table >= 0) & (table < torch.inf)).all()):
        raise ValueError("Expected `table` of numbers of rows, but it holds a negative number, nan or infinity.")
    ax = ax or new_axes()[0]
    largest = max(int(table.max()), 1)
    image = ax.imshow(table.numpy(), cmap="Greys", vmin=0, vmax=largest, aspect="auto")
    add_colorbar(image, ax, "number of rows")
    _name_ticks(ax.yaxis, "clusters", clusters, table.shape[0])
    _name_ticks(ax.xaxis, "classes", classes, table.shape[1])
    if max(table.shape) <= 15:
        for k, c in torch.ones_like(table).nonzero().tolist():
            rows = int(table[k, c])
            color = "white" if 2 * rows > largest else "black"
            # It stands inside: the layout need not ask for its size.
            ax.text(
                c, k, str(rows), ha="center", va="center", fontsize=7 if is_small(ax) else 10, color=color
            ).set_in_layout(False)
    label(ax, title, xlabel, ylabel)
    return ax


def _name_ticks(axis: Axis, argument: str, names: Sequence[str] | None, size: int) -> None:
    """Write names or numbers at an axis of a table, each where there is room."""
    axis.set_major_locator(FixedLocator(range(size)) if size <= 15 else MaxNLocator(integer=True))
    if names is not None:
        if len(names) != size:
            raise ValueError(f"Expected `{argument}` to name all {size}, but got {len(names)} names.")
        axis.set_ticks(range(size), list(names), fontsize=11 if size <= 15 else 8)


def plot_reliability(
    confidence: Tensor, accuracy: Tensor, share: Tensor, *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Draw the accuracy of rows over their confidence, by bins of equal width, with the share of rows in each bin.

    Calibrated rows lie on the diagonal; below it they are too confident. The title ends with the expected calibration
    error, the mean distance from the diagonal.

    Args:
        confidence: Mean confidence of the rows in each bin of [0, 1], shape ``(B,)``; nan where a bin is empty.
        accuracy: Accuracy of the rows in each bin, shape ``(B,)``; nan where a bin is empty.
        share: Share of all rows in each bin, shape ``(B,)``.
        title: What the title of the axes starts with.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        ValueError: If the three are not of one length.

    Example:
        >>> nan = torch.nan
        >>> ax = plot_reliability(torch.tensor([nan, 0.9]), torch.tensor([nan, 0.7]), torch.tensor([0.0, 1.0]))
        >>> ax.get_title()
        'calibration error 0.200'
    """
    confidence, accuracy, share = (
        checks.to_tensor(name, value, torch.float64).detach().cpu()
        for name, value in (("confidence", confidence), ("accuracy", accuracy), ("share", share))
    )
    shapes = [tuple(values.shape) for values in (confidence, accuracy, share)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"Expected `confidence`, `accuracy` and `share` of one shape (B,), but got {shapes}.")
    ax = ax or new_axes(size=SIZE)[0]
    error = torch.where(share == 0, 0.0, (accuracy - confidence).abs() * share).sum()
    edges = torch.linspace(0, 1, len(share) + 1).tolist()
    ax.stairs(share.tolist(), edges, fill=True, color="0.85", label="share of rows")
    ax.plot([0, 1], [0, 1], ls="--", color="0.4", label="calibrated")
    ax.plot(confidence.tolist(), accuracy.tolist(), marker="o", color=mark(0).color, label="accuracy of a bin")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    add_legend(ax)
    label(ax, f"{title} calibration error {float(error):.3f}".strip(), "confidence", "accuracy")
    return ax


def plot_scores(
    scores: Mapping[str, Any],
    *,
    threshold: float | None = None,
    xlabel: str = "score",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw a histogram of the scores of each group of rows, and where a threshold lies.

    Groups are outlines with a style and a hatch of their own, so that they can be told apart where they overlap. The
    largest 2 % of all scores would leave no room for the rest: they are counted in the last bar, which the legend says.
    With a threshold it says which share of each group is above it.

    Args:
        scores: Finite scores of each group, shape ``(n,)``, by its name.
        threshold: Where to draw a line; None draws none.
        xlabel: What the scores are, with their unit.
        title: Title of the axes.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If scores are no real numbers.
        ValueError: If there is no group, or one has no score or one that is not finite.

    Example:
        >>> ax = plot_scores({"in": [1.0, 2.0, 3.0], "out": [6.0, 9.0]}, threshold=5.0, xlabel="distance")
        >>> print([text.get_text() for text in ax.get_legend().get_texts()[:3]])
        ['in: 0 % above', 'out: 100 % above', 'threshold 5']
    """
    groups = _groups(scores)
    ax = ax or new_axes(size=SIZE)[0]
    everything = torch.cat(list(groups.values())).sort().values
    low, high = float(everything[0]), float(everything[int(0.98 * (len(everything) - 1))])
    high = max(high, low + 1e-6 * max(1.0, abs(low)))
    bins = torch.linspace(low, high, 41).tolist()
    for place, (name, values) in enumerate(groups.items()):
        above = "" if threshold is None else f": {percent(float((values > threshold).double().mean()))} above"
        color, _, line, hatch = mark(place)
        heights = torch.histogram(values.clamp(max=high), torch.tensor(bins, dtype=torch.float64)).hist
        share = (100 / len(values) * heights).tolist()
        ax.stairs(share, bins, fill=True, fc="none", ec=color, hatch=hatch, lw=0.0)
        ax.stairs(share, bins, color=color, ls=line, lw=2.0, label=name + above)
    if threshold is not None:
        ax.axvline(threshold, color="black", ls="--", lw=1.8, label=f"threshold {number(threshold)}")
    if float(everything[-1]) > high:
        ax.plot([], [], ls="", label=f"the last bar holds\nall above {number(bins[-2])}")
    add_legend(ax)
    label(ax, title, xlabel, "rows of the group, %")
    return ax


def _groups(scores: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the scores of each group as finite numbers, shape ``(n,)``, or raise."""
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"Expected `scores` by the name of their group, such as {{'rows': ...}}, but got {type(scores)}."
        )
    if not scores:
        raise ValueError("Expected `scores` of at least one group, but got none.")
    groups = {}
    for name, values in scores.items():
        groups[name] = checks.to_tensor("scores", values, torch.float64).detach().cpu().double().flatten()
        if not len(groups[name]) or not bool(torch.isfinite(groups[name]).all()):
            raise ValueError(f"Expected `scores` of {name!r} with at least one score, all finite; drop the others.")
    return groups


def plot_images(
    images: Any,
    titles: Sequence[str],
    axes: Sequence[Axes] | None = None,
    title: str = "",
    *,
    columns: int | None = None,
) -> list[Axes]:
    """Show grey images, dark where the value is high, one to each of the axes.

    Args:
        images: Images, shape ``(K, height, width)``, on a common scale of 0 to their largest value.
        titles: What stands above each.
        axes: At least K axes; None makes new ones.
        title: What stands above all.
        columns: Images in a row of new axes; None takes about as many as rows, and five at least.

    Returns:
        The axes.

    Raises:
        TypeError: If ``images`` hold no real numbers, or ``columns`` is no integer.
        ValueError: If ``images`` are not ``(K, height, width)``, titles or axes are too few, or ``columns`` is below 1.

    Example:
        >>> axes = plot_images(torch.rand(2, 8, 8), ["one", "two"])
        >>> [ax.get_title() for ax in axes]
        ['one', 'two']
    """
    images = checks.to_tensor("images", images, torch.float32).detach().cpu()
    if images.ndim != 3 or 0 in images.shape:
        raise ValueError(f"Expected `images` of shape (K, height, width), but got {tuple(images.shape)}.")
    if len(titles) != len(images):
        raise ValueError(f"Expected `titles` for all {len(images)} images, but got {len(titles)}.")
    checks.check_integer("columns", columns, optional=True)
    columns = min(len(images), columns or max(5, math.ceil(math.sqrt(len(images)))))
    height, width = images.shape[1:]
    side = 1.5 if len(images) <= 30 and width <= 2 * height else 0.9
    size = (side * max(1.0, width / height) + 0.2, side + 0.4)
    axes = list(new_axes(-(-len(images) // columns), columns, size=size) if axes is None else axes)
    if len(axes) < len(images):
        raise ValueError(f"Expected `axes` for all {len(images)} images, but got {len(axes)}.")
    largest = float(images[torch.isfinite(images)].max()) if bool(torch.isfinite(images).any()) else 1.0
    for ax, image, text in zip(axes, images, titles, strict=False):
        ax.imshow(image.numpy(), cmap="gray_r", vmin=0.0, vmax=max(largest, 1e-12))
        ax.set_title(text, fontsize=10)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(ax in axes[: len(images)])
    if title:
        axes[0].figure.suptitle(title, fontsize=13, wrap=True)
    return axes
