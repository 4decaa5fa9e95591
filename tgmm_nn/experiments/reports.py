"""What a run prints and draws at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torchmetrics.functional.clustering import adjusted_rand_score, normalized_mutual_info_score

from tgmm_nn.experiments.drawing import (
    draw_components,
    draw_contingency,
    draw_density,
    draw_latent,
    draw_samples,
    mean_images,
)
from tgmm_nn.metrics import MatchedAccuracy
from tgmm_nn.mixture import GaussianMixture

__all__ = [
    "Row",
    "clustering_report",
    "clustering_scores",
    "column_names",
    "format_table",
    "if_started",
    "matching_hint",
]

Row = dict[str, str | float]

# Of a full mixture of the rows themselves: of more, its covariances take minutes, and more rows than there are.
MOST_FEATURES = 128


def clustering_scores(clusters: Tensor, y: Tensor | None) -> dict[str, float]:
    """Return how clusters agree with classes or, where no row has a class, how rows are spread over the clusters.

    Args:
        clusters: Cluster of each row, shape ``(N,)``.
        y: Class of each row, negative where it has none, shape ``(N,)``; None where no row has.

    Returns:
        ``accuracy`` after optimal matching, normalised mutual information ``nmi`` and adjusted Rand index ``ari``; the
        last two are left out where all rows are of one class, which tells nothing of how classes are kept apart. Or the
        exponential of the entropy of the clusters' shares, ``effective clusters``, and the ``largest share``.

    Example:
        >>> clustering_scores(torch.tensor([0, 0, 1, 1]), None)
        {'effective clusters': 2.0, 'largest share': 0.5}
    """
    clusters = clusters.cpu()
    if y is None or not bool((y >= 0).any()):
        share = clusters.bincount() / len(clusters)
        return {
            "effective clusters": float(torch.special.entr(share).sum().exp()),
            "largest share": float(share.max()),
        }
    known = y.cpu() >= 0
    clusters, y = clusters[known], y.cpu()[known]
    accuracy = float(MatchedAccuracy(int(clusters.max()) + 1, int(y.max()) + 1)(clusters, y))
    if len(y.unique()) == 1:
        return {"accuracy": accuracy}
    return {
        "accuracy": accuracy,
        "nmi": float(normalized_mutual_info_score(clusters, y)),
        "ari": float(adjusted_rand_score(clusters, y)),
    }


def clustering_report(
    gmm: GaussianMixture,
    z: Tensor,
    x: Tensor,
    y: Tensor | None,
    image_shape: tuple[int, int] | None,
    folder: Path,
    seed: int,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> list[Row]:
    """Compare a mixture on embeddings with its baselines, and draw what it found.

    Args:
        gmm: Fitted mixture of the embeddings.
        z: Embeddings, shape ``(N, d)``.
        x: What was embedded, shape ``(N, D)``; the same tensor as ``z`` where rows are embeddings already.
        y: Classes, for scoring only, shape ``(N,)``; None where there are none.
        image_shape: Height and width where rows are images.
        folder: Where the pictures go.
        seed: Seed of the baselines and of samples.
        decode: Network from embeddings to images, where there is one.

    Returns:
        A row for each method with ``method`` and its `clustering_scores`. A full mixture of the rows themselves is
        among them up to 128 features.
    """
    k, rows = gmm.n_components, "rows" if image_shape is None else "pixels"
    methods = {
        f"{'mixture' if x is z else 'mixture carried through training'} ({gmm.covariance_type})": gmm.predict(z),
        "k-means on the embeddings": _kmeans(z, k, seed),
    }
    if x is not z:
        methods[f"k-means on {rows}"] = _kmeans(x, k, seed)
    if x is not z and x.shape[1] <= MOST_FEATURES:
        how: dict[str, Any] = {
            "n_init": gmm.n_init,
            "reg_covar": 1e-2,
            "max_iter": 500,
            "random_state": seed,
            "dtype": torch.float64,
        }
        raw = GaussianMixture(k, x.shape[1], **how)
        methods[f"full mixture on {rows} (reg_covar=0.01)"] = raw.fit_predict(x, sync=False)  # the other ranks are done

    draw_latent(gmm, z, y, folder)
    draw_density(gmm, z, folder)
    if gmm.fitted_ and y is not None:
        draw_contingency(gmm.predict(z), y, gmm.n_components, folder)
    draw_components(gmm, mean_images(gmm.predict_proba(z), x), image_shape, folder, "Mean image")
    draw_samples(gmm, z, folder, seed, image_shape, decode)

    table: list[Row] = [{"method": name, **clustering_scores(clusters, y)} for name, clusters in methods.items()]
    return [if_started(gmm, table[0]), *table[1:]]


def if_started(gmm: GaussianMixture, row: Row) -> Row:
    """Return a mixture's row of a table; without its numbers, which mean nothing, where EM never started the mixture.

    Example:
        >>> if_started(GaussianMixture(2, 2), {"method": "mixture", "nmi": 0.5})
        {'method': 'mixture: not started, EM never ran', 'nmi': ''}
    """
    if gmm.fitted_:
        return row
    return {**dict.fromkeys(row, ""), "method": f"{row['method']}: not started, EM never ran"}


def column_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns of rows that may differ in them, in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def format_table(rows: Sequence[Row]) -> str:
    """Return rows as aligned text, numbers to three places; a cell that a row lacks is empty.

    Example:
        >>> print(format_table([{"method": "a", "nmi": 0.5}, {"method": "longer", "nmi": 1.0}]))
        method    nmi
        a       0.500
        longer  1.000
    """
    names = column_names(rows)
    cells = [names] + [[_cell(row, name) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [any(isinstance(row.get(name), (float, int)) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def matching_hint(n_components: int, labels: Tensor | None) -> str:
    """Return what the accuracy says where a mixture has another number of components than there are classes.

    Args:
        n_components: Number of components.
        labels: Class of each row, negative where it has none, shape ``(N,)``; None where no row has.

    Example:
        >>> matching_hint(3, torch.tensor([0, 1, 1]))
        'The accuracy matches components with classes one to one, 3 with 2: for as many, set gmm.n_components=2.'
        >>> matching_hint(2, torch.tensor([0, 1, 1]))
        ''
    """
    n_classes = 0 if labels is None else len(labels[labels >= 0].unique())
    if n_classes in (0, n_components):
        return ""
    return (
        f"The accuracy matches components with classes one to one, {n_components} with {n_classes}: for as many, set "
        f"gmm.n_components={n_classes}."
    )


def _cell(row: Row, name: str) -> str:
    """Return the text of a row in a column."""
    value = row.get(name, "")
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _kmeans(x: Tensor, n_clusters: int, seed: int) -> Tensor:
    labels = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(x.cpu().numpy())
    return torch.from_numpy(labels).long()
