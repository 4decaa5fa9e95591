"""Clustering metrics that torchmetrics does not have, as torchmetrics metrics with additive states."""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from tgmm_nn.checks import check_integer

__all__ = ["MatchedAccuracy"]


class MatchedAccuracy(Metric):
    r"""Accuracy of a clustering after the optimal matching of clusters to classes.

    With the contingency table :math:`m_{kc}`, the number of rows in cluster k and class c,

    .. math:: \max_\sigma \frac{1}{N} \sum_k m_{k \sigma(k)},

    over all one-to-one matchings σ of clusters to classes. The numbers of clusters and classes may differ; what stays
    unmatched counts as wrong. The table is the state: batches and ranks add up.

    Args:
        n_clusters: Number of clusters K.
        n_classes: Number of classes C.

    Raises:
        ValueError: If, on update, shapes differ or a label is out of range.

    References:
        Kuhn, The Hungarian method for the assignment problem, 1955.

    Example:
        >>> metric = MatchedAccuracy(n_clusters=2, n_classes=2)
        >>> metric(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 0]))
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    contingency: Tensor

    def __init__(self, n_clusters: int, n_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("n_clusters", n_clusters)
        check_integer("n_classes", n_classes)
        self.n_clusters, self.n_classes = n_clusters, n_classes
        self.add_state("contingency", torch.zeros(n_clusters, n_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add rows: cluster and class of each, integers of one shape."""
        if preds.shape != target.shape:
            raise ValueError(
                f"Expected `preds` and `target` of one shape, but got {tuple(preds.shape)} and {tuple(target.shape)}."
            )
        for name, labels, size in (("preds", preds, self.n_clusters), ("target", target, self.n_classes)):
            if labels.is_floating_point() or bool(((labels < 0) | (labels >= size)).any()):
                raise ValueError(
                    f"Expected `{name}` to hold integers in [0, {size}), but got {labels.unique()[:20].tolist()}."
                )
        cells = preds.reshape(-1) * self.n_classes + target.reshape(-1)
        self.contingency += torch.bincount(cells, minlength=self.contingency.numel()).reshape(self.contingency.shape)

    def matching(self) -> tuple[Tensor, Tensor]:
        """Return the matched clusters and their classes, each of shape ``(min(K, C),)``."""
        clusters, classes = linear_sum_assignment(self.contingency.cpu().numpy(), maximize=True)
        return torch.from_numpy(clusters), torch.from_numpy(classes)

    def compute(self) -> Tensor:
        """Return the accuracy, shape ``()``; nan before any row."""
        clusters, classes = self.matching()
        table = self.contingency.cpu()
        return (table[clusters, classes].sum() / table.sum()).to(self.contingency.device)
