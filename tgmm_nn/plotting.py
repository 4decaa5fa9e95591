"""Pictures of mixtures. Each function draws into axes that are given, or into new ones, and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from tgmm_nn.mixture import GaussianMixture

__all__ = [
    "new_axes",
    "plot_contingency",
    "plot_curves",
    "plot_images",
    "plot_latent",
    "plot_reliability",
    "plot_scores",
    "principal_plane",
    "save",
]

COLORS = colormaps["tab10"]


def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.0, 5.0)) -> list[Axes]:
    """Return the axes of a new figure, row by row; `save` writes it."""
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def save(ax: Axes, file: Path) -> None:
    """Write the figure that the axes belong to; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = ax.figure if isinstance(ax.figure, Figure) else ax.figure.figure
    figure.savefig(file, dpi=120)


def principal_plane(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of rows ``(n, d)`` and their directions of largest variance ``(d, 2)``; one is zero for d = 1."""
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    plane = x.new_zeros(x.shape[-1], 2)
    found = directions[:2].mT
    plane[:, : found.shape[1]] = found
    # A direction's sign is arbitrary: fix it, so that pictures of successive epochs do not flip.
    largest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    return mean, plane * torch.where(largest < 0, -1.0, 1.0)


def plot_latent(
    gmm: GaussianMixture,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    n_std: Sequence[float] = (2.0,),
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    r"""Scatter rows in their principal plane, with each component's ellipse of ``n_std`` standard deviations.

    A component projects to :math:`N(V^\top (\mu - \bar x), V^\top \Sigma V)`; its number stands at its mean. An
    ellipse is as opaque as its component is heavy, at least faintly visible. A mixture that is not fitted shows none.

    Args:
        gmm: Mixture of d features.
        x: Rows, shape ``(n, d)``.
        labels: Integer that colours each row, shape ``(n,)``; None colours by the most probable component.
        n_std: Radii of the ellipses in standard deviations.
        title: Title of the axes.
        ax: Axes to draw into.
    """
    ax = ax or new_axes()[0]
    x = x.detach().to(gmm.means_)
    mean, plane = principal_plane(x)
    colors = gmm.predict(x) if labels is None and gmm.fitted_ else labels
    points = ((x - mean) @ plane).cpu().numpy()
    shades = "0.5" if colors is None else COLORS(colors.cpu().numpy() % COLORS.N)
    ax.scatter(points[:, 0], points[:, 1], s=6, alpha=0.5, linewidths=0, c=shades)
    if gmm.fitted_:
        _draw_components(ax, gmm, mean, plane, n_std, own_colors=labels is None)
    else:
        title = f"{title} (mixture not started)"
    if labels is not None:
        _name_colors(ax, labels)
    ax.set(title=title, xlabel="first principal direction", ylabel="second principal direction", aspect="equal")
    ax.autoscale_view()
    return ax


def plot_images(
    images: Tensor, titles: Sequence[str], axes: Sequence[Axes] | None = None, title: str = ""
) -> list[Axes]:
    """Show grey images ``(K, height, width)``, dark where the value is high, one to each of the axes."""
    columns = min(len(images), 5)
    axes = list(axes or new_axes(-(-len(images) // columns), columns, size=(1.8, 2.1)))
    for ax, image, label in zip(axes, images, titles, strict=False):
        ax.imshow(image.cpu().numpy(), cmap="gray_r")
        ax.set_title(label, fontsize=9)
    for ax in axes:
        ax.set_axis_off()
    axes[0].figure.suptitle(title)
    return axes


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], axes: Sequence[Axes] | None = None
) -> list[Axes]:
    """Draw one curve over epochs under another; each entry is its name with x and y values."""
    axes = list(axes or new_axes(len(curves), 1, size=(7.0, 2.6)))
    for ax, (name, (epochs, values)) in zip(axes, curves.items(), strict=True):
        ax.plot(epochs, values, color="C0")
        ax.set(ylabel=name, xlabel="epoch")
        ax.grid(alpha=0.3)
    return axes


def plot_contingency(table: Tensor, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw the numbers of rows by cluster and class as a heat map, dark where there are many.

    Up to 15 clusters and classes each cell holds its number. Clusters and classes stand in the order of the table.

    Args:
        table: Numbers of rows, shape ``(K, C)``.
        title: Title of the axes.
        ax: Axes to draw into.

    Example:
        >>> ax = plot_contingency(torch.tensor([[9, 1], [0, 5]]))
        >>> [text.get_text() for text in ax.texts]
        ['9', '1', '0', '5']
    """
    ax = ax or new_axes()[0]
    largest = max(int(table.max()), 1)
    image = ax.imshow(table.cpu().numpy(), cmap="Greys", vmin=0, vmax=largest, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="rows")
    ax.set(title=title, xlabel="class", ylabel="cluster")
    for axis, size in ((ax.yaxis, table.shape[0]), (ax.xaxis, table.shape[1])):
        axis.set_major_locator(FixedLocator(range(size)) if size <= 15 else MaxNLocator(integer=True))
    if max(table.shape) <= 15:
        for k, c in torch.ones_like(table).nonzero().tolist():
            number = int(table[k, c])
            color = "white" if 2 * number > largest else "black"
            ax.text(c, k, str(number), ha="center", va="center", fontsize=9, color=color)
    return ax


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
        ax: Axes to draw into.

    Example:
        >>> nan = torch.nan
        >>> ax = plot_reliability(torch.tensor([nan, 0.9]), torch.tensor([nan, 0.7]), torch.tensor([0.0, 1.0]))
        >>> ax.get_title()
        'calibration error 0.200'
    """
    ax = ax or new_axes()[0]
    error = torch.where(share == 0, 0.0, (accuracy - confidence).abs() * share).sum()
    ax.stairs(
        share.tolist(), torch.linspace(0, 1, len(share) + 1).tolist(), fill=True, color="0.85", label="share of rows"
    )
    ax.plot([0, 1], [0, 1], ls="--", color="0.4", label="calibrated")
    ax.plot(confidence.tolist(), accuracy.tolist(), marker="o", color="C0", label="accuracy of a bin")
    ax.set(title=f"{title} calibration error {float(error):.3f}".strip(), xlabel="confidence", ylabel="accuracy")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(loc="upper left", fontsize=8)
    return ax


def _name_colors(ax: Axes, labels: Tensor) -> None:
    """Add a legend of the labels, where there are not too many to tell apart."""
    values = labels.unique().tolist()
    if len(values) <= COLORS.N:
        dots = [Line2D([], [], ls="", marker="o", color=COLORS(v % COLORS.N), label=str(v)) for v in values]
        ax.legend(handles=dots, title="class", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_components(
    ax: Axes, gmm: GaussianMixture, mean: Tensor, plane: Tensor, n_std: Sequence[float], *, own_colors: bool
) -> None:
    """Add each component's ellipses and number, in the colour of its rows or in black."""
    centres = ((gmm.means_ - mean) @ plane).cpu()
    covariances = (plane.mT @ gmm.covariance_matrices() @ plane).cpu()
    opacity = (gmm.weights_ / gmm.weights_.max()).clamp(min=0.15).tolist()
    for k, (x, y) in enumerate(centres.tolist()):
        color = COLORS(k % COLORS.N) if own_colors else "black"
        for radius in n_std:
            ax.add_patch(_ellipse((x, y), covariances[k], radius, color, opacity[k]))
        box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.7}
        ax.annotate(str(k), (x, y), ha="center", va="center", weight="bold", bbox=box)


def _ellipse(centre: tuple[float, float], covariance: Tensor, radius: float, color: Any, alpha: float) -> Ellipse:
    """Return the curve of Mahalanobis distance ``radius`` about ``centre``."""
    variances, directions = torch.linalg.eigh(covariance)
    width, height = (2.0 * radius * variances.clamp(min=0).sqrt()).tolist()
    angle = float(torch.rad2deg(torch.atan2(directions[1, 0], directions[0, 0])))
    return Ellipse(centre, width, height, angle=angle, fill=False, lw=1.8, ec=color, alpha=alpha)


def plot_scores(
    scores: Mapping[str, Tensor], *, threshold: float | None = None, xlabel: str = "score", ax: Axes | None = None
) -> Axes:
    """Draw a histogram of the scores of each group of rows, and where a threshold lies.

    Args:
        scores: Finite scores of each group, shape ``(n,)``, by its name; the hatched ones tell groups apart in grey.
        threshold: Where to draw a line.
        xlabel: What the scores are.
        ax: Axes to draw into.
    """
    ax = ax or new_axes()[0]
    everything = torch.cat([values.flatten().cpu() for values in scores.values()])
    # The far tail would leave no room for the rest.
    low, high = float(everything.min()), float(everything.quantile(0.98))
    bins = torch.linspace(low, max(high, low + 1e-6), 50).tolist()
    for number, (name, values) in enumerate(scores.items()):
        clipped = values.flatten().cpu().clamp(max=high).numpy()
        hatch = ("", "///", "...", "xxx")[number % 4]
        ax.hist(clipped, bins=bins, density=True, alpha=0.6, label=name, hatch=hatch, color=COLORS(number))
    if threshold is not None:
        ax.axvline(threshold, color="black", ls="--", label="threshold")
    ax.set(xlabel=xlabel, ylabel="density of rows")
    ax.legend(fontsize=8)
    return ax
