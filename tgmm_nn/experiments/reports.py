"""What a run prints and draws at its end."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torchmetrics.functional.clustering import adjusted_rand_score, normalized_mutual_info_score

from tgmm_nn.metrics import MatchedAccuracy
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting import new_axes, plot_curves, plot_images, plot_latent, save

__all__ = ["Row", "clustering_report", "clustering_scores", "format_table", "if_started", "plot_metrics", "titled"]

Row = dict[str, str | float]


def clustering_scores(clusters: Tensor, y: Tensor) -> dict[str, float]:
    """Return accuracy after optimal matching, normalised mutual information and adjusted Rand index of labels."""
    clusters, y = clusters.cpu(), y.cpu()
    accuracy = MatchedAccuracy(int(clusters.max()) + 1, int(y.max()) + 1)
    return {
        "accuracy": float(accuracy(clusters, y)),
        "nmi": float(normalized_mutual_info_score(clusters, y)),
        "ari": float(adjusted_rand_score(clusters, y)),
    }


def clustering_report(
    gmm: GaussianMixture, z: Tensor, x: Tensor, y: Tensor, image_shape: tuple[int, int], folder: Path, seed: int
) -> list[Row]:
    """Compare a mixture on embeddings with its baselines, and draw the latent space and each component's mean image.

    Args:
        gmm: Fitted mixture of the embeddings.
        z: Embeddings, shape ``(N, d)``.
        x: Images as rows, shape ``(N, height · width)``.
        y: Classes, for scoring only, shape ``(N,)``.
        image_shape: Height and width.
        folder: Where the pictures go.
        seed: Seed of the baselines.

    Returns:
        A row for each method with ``method``, ``accuracy``, ``nmi`` and ``ari``.
    """
    k = gmm.n_components
    pixel_mixture = GaussianMixture(
        k, x.shape[1], n_init=gmm.n_init, reg_covar=1e-2, max_iter=500, random_state=seed, dtype=torch.float64
    )
    methods = {
        f"mixture carried through training ({gmm.covariance_type})": gmm.predict(z),
        "k-means on the embeddings": _kmeans(z, k, seed),
        "k-means on pixels": _kmeans(x, k, seed),
        "full mixture on pixels (reg_covar=0.01)": pixel_mixture.fit_predict(x, sync=False),  # the other ranks are done
    }
    _draw(gmm, z, x, y, image_shape, folder)
    rows: list[Row] = [{"method": name, **clustering_scores(clusters, y)} for name, clusters in methods.items()]
    return [if_started(gmm, rows[0]), *rows[1:]]


def if_started(gmm: GaussianMixture, row: Row) -> Row:
    """Return a mixture's row of a table; without its numbers, which mean nothing, where EM never started the mixture.

    Example:
        >>> if_started(GaussianMixture(2, 2), {"method": "mixture", "nmi": 0.5})
        {'method': 'mixture: not started, EM never ran', 'nmi': ''}
    """
    if gmm.fitted_:
        return row
    return {**dict.fromkeys(row, ""), "method": f"{row['method']}: not started, EM never ran"}


def titled(gmm: GaussianMixture, title: str) -> str:
    """Return a picture's title, which says so where the mixture was not started.

    Example:
        >>> titled(GaussianMixture(2, 2), "epoch 3")
        'epoch 3; mixture not started'
    """
    return title if gmm.fitted_ else f"{title}; mixture not started"


def format_table(rows: list[Row]) -> str:
    """Return rows as aligned text, numbers to three places.

    Example:
        >>> print(format_table([{"method": "a", "nmi": 0.5}, {"method": "longer", "nmi": 1.0}]))
        method    nmi
        a       0.500
        longer  1.000
    """
    names = list(rows[0])
    cells = [names] + [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [any(isinstance(row[name], (float, int)) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def plot_metrics(file: Path, picture: Path) -> None:
    """Draw the curves of loss and log-likelihood from a ``metrics.csv``."""
    with file.open(newline="") as lines:
        records = list(csv.DictReader(lines))
    curves = {}
    for name in ("loss", "em/log_likelihood", "em/effective_components", "train/accuracy"):
        points = [(float(r["epoch"]), float(r[name])) for r in records if r.get(name)]
        if points:
            epochs, values = zip(*points, strict=True)
            curves[name] = (epochs, values)
    if curves:
        save(plot_curves(curves)[0], picture)


def _kmeans(x: Tensor, n_clusters: int, seed: int) -> Tensor:
    labels = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(x.cpu().numpy())
    return torch.from_numpy(labels).long()


def _draw(gmm: GaussianMixture, z: Tensor, x: Tensor, y: Tensor, image_shape: tuple[int, int], folder: Path) -> None:
    by_component, by_class = new_axes(1, 2)
    plot_latent(gmm, z, title=titled(gmm, "coloured by component; ellipses of 2 sd"), ax=by_component)
    plot_latent(gmm, z, y, title="coloured by class; numbers are components", ax=by_class)
    save(by_class, folder / "latent.png")

    r = gmm.predict_proba(z).to(x)
    images = (r.mT @ x / r.sum(0).clamp(min=1e-12)[:, None]).reshape(-1, *image_shape)
    titles = [f"component {k}, {float(w):.0%}" for k, w in enumerate(gmm.weights_)]
    axes = plot_images(images, titles, title=titled(gmm, "mean image of each component, and its weight"))
    save(axes[0], folder / "components.png")
