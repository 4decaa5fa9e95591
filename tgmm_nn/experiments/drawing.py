"""The pictures of the end of a run."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgmm_nn.metrics import Contingency
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.outliers import OutlierScore
from tgmm_nn.plotting import (
    new_axes,
    plot_contingency,
    plot_curves,
    plot_density,
    plot_images,
    plot_latent,
    plot_samples,
    principal_plane,
    save,
)
from tgmm_nn.plotting.figures import count
from tgmm_nn.plotting.latent import legend_room

__all__ = [
    "draw_components",
    "draw_contingency",
    "draw_density",
    "draw_latent",
    "draw_samples",
    "mean_images",
    "plot_metrics",
]

MOST_IMAGES = 25
CURVES = {
    "loss": "loss",
    "elbo": "evidence lower\nbound, nats per row",
    "em/log_likelihood": "log-likelihood,\nnats per row",
    "em/effective_components": "effective number\nof components",
    "train/accuracy": "accuracy",
}


def draw_latent(
    gmm: GaussianMixture, z: Tensor, y: Tensor | None, folder: Path, names: dict[int, str] | None = None
) -> None:
    """Write ``latent.png``: embeddings by component and, where there are labels, by class, in one plane."""
    plane = principal_plane(z)
    axes = new_axes(1, 1 if y is None else 2, size=(6.6 + legend_room(y) / 2, 5.2))
    plot_latent(gmm, z, plane=plane, ax=axes[0])
    if y is not None:
        plot_latent(gmm, z, y, n_std=(1.0,), names=names, plane=plane, ax=axes[1])  # the left one has both
        axes[1].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
    save(axes[0], folder / "latent.png")


def draw_density(gmm: GaussianMixture, z: Tensor, folder: Path, score: OutlierScore | None = None) -> None:
    """Write ``density.png``; without a calibrated score the 1 % of rows of lowest density are its outliers."""
    if gmm.fitted_:
        score = OutlierScore(gmm).calibrate(z, 0.99) if score is None else score
        save(plot_density(gmm, z, score), folder / "density.png")


def draw_contingency(clusters: Tensor, y: Tensor, n_clusters: int, folder: Path) -> None:
    """Write ``contingency.png``: rows by component and class, components ordered by their most frequent class.

    Rows with a negative label have no class; where no row has one, nothing is written. Columns are the classes that
    occur; a component without rows has its row, of zeros.
    """
    clusters, y = clusters.cpu(), y.cpu()
    clusters, y = clusters[y >= 0], y[y >= 0]  # a negative label is none
    if not len(y):
        return
    present, y = y.unique(return_inverse=True)
    table = Contingency(n_clusters, len(present))(clusters, y)
    most, classes = table.max(1)
    order = sorted(range(n_clusters), key=lambda k: (int(classes[k]), -int(most[k])))
    right = int(most.sum())
    title = (
        f"Of {count(len(y), 'row')} {right:,} {'is' if right == 1 else 'are'} of their component's most frequent class"
    )
    ax = new_axes(size=(7.0, max(5.0, min(10.0, 0.45 * n_clusters))))[0]
    names: dict[str, Any] = {"clusters": [f"c{k}" for k in order], "classes": [str(c) for c in present.tolist()]}
    plot_contingency(table[order], **names, ylabel="component", title=title, ax=ax)
    save(ax, folder / "contingency.png")


def mean_images(responsibilities: Tensor, x: Tensor) -> Tensor:
    r"""Return the mean row of each component, weighted by responsibility.

    .. math:: \bar x_k = \sum_n r_{nk} x_n / \sum_n r_{nk}

    Args:
        responsibilities: Responsibilities of the components, shape ``(N, K)``.
        x: Rows, such as images, shape ``(N, D)``.

    Returns:
        Means, shape ``(K, D)``; of a component that is responsible for no row, zeros.

    Example:
        >>> mean_images(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0], [3.0]]))
        tensor([[1.],
                [3.]])
    """
    r = responsibilities.to(x)
    return r.mT @ x / r.sum(0).clamp(min=1e-12)[:, None]


def draw_components(
    gmm: GaussianMixture, images: Tensor, image_shape: tuple[int, int] | None, folder: Path, what: str
) -> None:
    """Write ``components.png``: an image of each component, rows of pixels ``(K, height · width)``; none of others."""
    if image_shape is None:
        return
    titles = [f"c{k}\n{100 * weight:.1f} %" for k, weight in enumerate(gmm.weights_.tolist())]
    started = "" if gmm.fitted_ else " (mixture not started: all components are alike)"
    axes = plot_images(
        images.reshape(-1, *image_shape), titles, title=f"{what} of each component, and its weight{started}"
    )
    save(axes[0], folder / "components.png")


def draw_samples(
    gmm: GaussianMixture,
    z: Tensor,
    folder: Path,
    seed: int,
    image_shape: tuple[int, int] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Write ``samples.png``: decoded samples, a row of images for each component; without a decoder, in the plane."""
    if not gmm.fitted_:
        return
    if decode is None or image_shape is None:
        save(plot_samples(gmm, z, seed=seed)[0], folder / "samples.png")
        return
    heaviest = gmm.weights_.argsort(descending=True)[:MOST_IMAGES].sort().values.tolist()
    generator = torch.Generator(gmm.means_.device).manual_seed(seed)
    samples = torch.cat([gmm.sample(8, component=k, generator=generator)[0] for k in heaviest])
    images = decode(samples.to(z)).reshape(-1, 8, *image_shape).clamp(min=0.0)
    # A row is one picture, its images apart by a column of nothing: axes for each image take ten times as long.
    apart = torch.nn.functional.pad(images, (0, 1), value=torch.nan)
    rows = apart.transpose(1, 2).flatten(2)[..., :-1]
    titles = [f"c{k}" for k in heaviest]
    axes = plot_images(rows, titles, title="Decoded samples, a row for each component, c0 and so on", columns=1)
    for ax, number in itertools.product(axes, range(1, 8)):
        ax.axvline(number * apart.shape[-1] - 1, color="0.4", lw=0.8)  # pixels are white as well
    save(axes[0], folder / "samples.png")


def plot_metrics(file: Path, picture: Path) -> None:
    """Draw curves of a ``metrics.csv``; those of the mixture begin with the epoch in which it was started."""
    with file.open(newline="") as lines:
        records = list(csv.DictReader(lines))
    started = [float(r["epoch"]) for r in records if float(r.get("em/started") or 0) > 0]
    watched = any(r.get("em/started") for r in records)
    start = min(started, default=float("inf")) if watched else 0.0
    curves = {}
    for name, shown in CURVES.items():
        first = start if name.startswith(("em/", "train/")) else 0.0
        points = [(float(r["epoch"]), float(r[name])) for r in records if r.get(name) and float(r["epoch"]) >= first]
        if points:
            epochs, values = zip(*points, strict=True)
            curves[shown] = (epochs, values)
    if curves:
        title = "Training, epoch by epoch" + ("; EM never started" if watched and not started else "")
        save(plot_curves(curves, start=min(started) if started else None, title=title)[0], picture)
