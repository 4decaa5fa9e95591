"""Metrics of rows with a cluster and a class: their table is the state, so that batches and ranks add up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from tgmm_nn.checks import check_integer
from tgmm_nn.metrics.base import Number, Sums, check_responsibilities
from tgmm_nn.plotting import plot_contingency, plot_reliability

__all__ = ["Contingency", "MatchedAccuracy", "Purity", "ResponsibilityCalibration"]


class _Labelled(Metric):
    """A metric of rows with a cluster and a class; their table is the state, so that batches and ranks add up."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

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
        _check_labels("preds", preds, self.n_clusters)
        _check_labels("target", target, self.n_classes)
        self.contingency = self.contingency + _count(self.contingency.shape, preds, target)


class Contingency(_Labelled):
    r"""Numbers of rows by cluster and class, the table :math:`m_{kc}`.

    The table is the state: batches and ranks add up.

    Args:
        n_clusters: Number of clusters K.
        n_classes: Number of classes C.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If a size is below 1 or, on update, shapes differ or a label is out of range.

    Example:
        >>> metric = Contingency(n_clusters=2, n_classes=3)
        >>> metric(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 2]))
        tensor([[0, 1, 1],
                [2, 0, 0]])
    """

    def compute(self) -> Tensor:
        """Return the table, shape ``(K, C)``, int64."""
        return self.contingency

    def _wrap_compute(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        wrapped = super()._wrap_compute(compute)

        # A table of one cell comes back as a number from torchmetrics, which squeezes every result.
        @functools.wraps(wrapped)
        def table() -> Tensor:
            return wrapped().reshape(self.n_clusters, self.n_classes)

        return table

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Any, Axes]:
        """Draw a table as a heat map; None computes it. Return the figure and its axes."""
        ax = plot_contingency(self.compute() if val is None else val, ax=ax)
        return ax.figure, ax


class MatchedAccuracy(Number, _Labelled):
    r"""Accuracy of a clustering after the optimal matching of clusters to classes.

    With the contingency table :math:`m_{kc}`, the number of rows in cluster k and class c,

    .. math:: \max_\sigma \frac{1}{N} \sum_k m_{k \sigma(k)},

    over all one-to-one matchings σ of clusters to classes. The numbers of clusters and classes may differ; what stays
    unmatched counts as wrong.

    Args:
        n_clusters: Number of clusters K.
        n_classes: Number of classes C.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If a size is below 1 or, on update, shapes differ or a label is out of range.

    References:
        Kuhn, The Hungarian method for the assignment problem, 1955.

    Example:
        >>> metric = MatchedAccuracy(n_clusters=2, n_classes=2)
        >>> metric(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 0]))
        tensor(0.7500)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def matching(self) -> tuple[Tensor, Tensor]:
        """Return the matched clusters and their classes, each of shape ``(min(K, C),)``."""
        return _match(self.contingency)

    def compute(self) -> Tensor:
        """Return the accuracy, shape ``()``; nan before any row."""
        return self.contingency[self.matching()].sum() / self.contingency.sum()


class Purity(Number, _Labelled):
    r"""Share of rows in the most frequent class of their cluster.

    With the contingency table :math:`m_{kc}`, the number of rows in cluster k and class c,

    .. math:: \frac{1}{N} \sum_k \max_c m_{kc} .

    Several clusters may share a class, so that purity rises with the number of clusters: compare it at one K.

    Args:
        n_clusters: Number of clusters K.
        n_classes: Number of classes C.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If a size is below 1 or, on update, shapes differ or a label is out of range.

    References:
        Manning, Raghavan and Schütze, Introduction to Information Retrieval, 16.3, 2008.

    Example:
        >>> metric = Purity(n_clusters=3, n_classes=2)
        >>> metric(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]))
        tensor(0.7500)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def compute(self) -> Tensor:
        """Return the purity, shape ``()``; nan before any row."""
        return self.contingency.amax(1).sum() / self.contingency.sum()


class ResponsibilityCalibration(Sums):
    r"""Expected calibration error of the largest responsibility.

    A row's confidence is its largest responsibility, and it is a hit where its class is the one that its most probable
    component is matched to, by the optimal matching over all rows seen. With :math:`n_b` rows in bin b, their share of
    hits and their mean confidence,

    .. math:: \sum_b \frac{n_b}{N} \bigl| \mathrm{hits}_b - \mathrm{confidence}_b \bigr| ,

    over bins ((b - 1) / B, b / B]. Counts by bin, component and class are the state: batches and ranks add up.

    Args:
        n_components: Number of components K.
        n_classes: Number of classes C.
        n_bins: Number of bins B of equal width.

    Raises:
        TypeError: If a size is no integer or, on update, responsibilities are no floating numbers.
        ValueError: If a size is below 1 or, on update, shapes differ, a row of responsibilities does not sum to 1, or
            a label is out of range.

    References:
        Guo, Pleiss, Sun and Weinberger, On calibration of modern neural networks, 2017.

    Example:
        >>> metric = ResponsibilityCalibration(n_components=2, n_classes=2)
        >>> metric(torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]]), torch.tensor([1, 0, 0]))
        tensor(0.1667, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    counts: Tensor
    confidence: Tensor

    def __init__(self, n_components: int, n_classes: int, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, size in (("n_components", n_components), ("n_classes", n_classes), ("n_bins", n_bins)):
            check_integer(name, size)
        self.n_components, self.n_classes, self.n_bins = n_components, n_classes, n_bins
        counts = torch.zeros(n_bins, n_components, n_classes, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("confidence", torch.zeros(n_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, responsibilities: Tensor, target: Tensor) -> None:
        """Add rows: responsibilities, shape ``(..., K)``, and the class of each row, shape ``(...)``."""
        check_responsibilities(responsibilities, self.n_components)
        if target.shape != responsibilities.shape[:-1]:
            raise ValueError(
                f"Expected `target` of shape {tuple(responsibilities.shape[:-1])}, one class for each row of "
                f"`responsibilities`, but got {tuple(target.shape)}."
            )
        _check_labels("target", target, self.n_classes)
        confidence, component = responsibilities.to(self.confidence.dtype).max(-1)
        bins = ((confidence * self.n_bins).ceil().long() - 1).clamp(0, self.n_bins - 1)
        self.counts = self.counts + _count(self.counts.shape, bins, component, target)
        self.confidence = self.confidence.index_add(0, bins.reshape(-1), confidence.reshape(-1))

    def compute(self) -> Tensor:
        """Return the calibration error, shape ``()``; nan before any row."""
        hits, rows = self._hits_and_rows()
        return (hits - self.confidence).abs().sum() / rows.sum()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Any, Axes]:
        """Draw the reliability diagram of all rows seen, or values that are given; return the figure and its axes."""
        if val is not None:
            return super().plot(val, ax)
        with self.sync_context():
            hits, rows = self._hits_and_rows()
            ax = plot_reliability(self.confidence / rows, hits / rows, rows / rows.sum(), ax=ax)
        return ax.figure, ax

    def _hits_and_rows(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of hits and of rows by bin."""
        clusters, classes = _match(self.counts.sum(0))
        return self.counts[:, clusters, classes].sum(1), self.counts.sum((1, 2))


def _count(shape: torch.Size, *labels: Tensor) -> Tensor:
    """Return how many rows fall into each cell of a table; one tensor of labels for each of its dimensions."""
    cells = torch.zeros_like(labels[0].reshape(-1), dtype=torch.int64)
    for size, label in zip(shape, labels, strict=True):
        cells = cells * size + label.reshape(-1)
    return torch.bincount(cells, minlength=shape.numel()).reshape(shape)


def _match(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of a table ``(K, C)`` whose one-to-one matching has the largest sum."""
    rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    return torch.from_numpy(rows).to(table.device), torch.from_numpy(columns).to(table.device)


def _check_labels(name: str, labels: Tensor, size: int) -> None:
    """Raise unless a tensor holds integers from 0 to ``size``, excluded."""
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= size)).any()):
        raise ValueError(f"Expected `{name}` to hold integers in [0, {size}), but got {labels.unique()[:20].tolist()}.")
