"""Metrics of clusters and mixtures that torchmetrics does not have, as torchmetrics metrics with additive states."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_specificity_at_sensitivity,
)

from tgmm_nn.checks import check_integer
from tgmm_nn.plotting import new_axes, plot_contingency, plot_reliability
from tgmm_nn.statistics import accumulator_dtype

__all__ = [
    "BIC",
    "Contingency",
    "EffectiveComponents",
    "MatchedAccuracy",
    "NegativeLogLikelihood",
    "Purity",
    "ResponsibilityCalibration",
    "detection_scores",
]


class _Number(Metric):
    """A metric of one number, which is drawn as a point, or as a curve of several."""

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Any, Axes]:
        """Draw a value, or a sequence of values as a curve; None computes one. Return the figure and its axes."""
        ax = ax or new_axes()[0]
        self._plot(val, ax)
        return ax.figure, ax


class _Sums(_Number):
    """A number from sums in float64 (float32 on devices without it), also in a module that is cast to less."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def move(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            device = fn(torch.zeros(0, device=tensor.device)).device
            return tensor.to(device, accumulator_dtype(device))

        return super()._apply(move, exclude_state)


# ------------------------------------------------------------------------------------------- clusters and classes


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


class MatchedAccuracy(_Number, _Labelled):
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


class Purity(_Number, _Labelled):
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


class ResponsibilityCalibration(_Sums):
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
        _check_responsibilities(responsibilities, self.n_components)
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


# -------------------------------------------------------------------------------------------------------- densities


class NegativeLogLikelihood(_Sums):
    r"""Mean negative log-density of rows, in nats.

    .. math:: -\frac{1}{N} \sum_n \log p(x_n) .

    A row of density zero makes it infinite. Sums are kept in float64.

    Raises:
        TypeError: If, on update, ``log_density`` holds no floating numbers.
        ValueError: If, on update, ``log_density`` holds nan or +inf.

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric(torch.tensor([-1.0, -2.0, -6.0]))
        tensor(3., dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Of shape (1,): compiled code drops in-place writes to 0-d float64.
        self.add_state("total", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_density: Tensor) -> None:
        """Add rows: log-density of each in nats, any shape."""
        _check_floating("log_density", log_density)
        if bool((log_density.isnan() | log_density.isposinf()).any()):
            raise ValueError("Expected `log_density` to hold numbers or -inf, but it holds nan or +inf.")
        self.total = self.total + log_density.sum(dtype=self.total.dtype)
        self.count = self.count + log_density.numel()

    def compute(self) -> Tensor:
        """Return the mean in nats, shape ``()``; nan before any row."""
        return (-self.total / self.count)[0]


class BIC(NegativeLogLikelihood):
    r"""Bayesian information criterion of a density on rows; smaller is better.

    .. math:: -2 \sum_n \log p(x_n) + p \log N

    for p free parameters: what `GaussianMixture.bic` returns, collected in batches.

    Args:
        n_parameters: Number of free parameters p, such as `GaussianMixture.n_parameters`.

    Raises:
        TypeError: If ``n_parameters`` is no integer or, on update, ``log_density`` holds no floating numbers.
        ValueError: If ``n_parameters`` is negative or, on update, ``log_density`` holds nan or +inf.

    References:
        Schwarz, Estimating the dimension of a model, 1978.

    Example:
        >>> metric = BIC(n_parameters=2)
        >>> metric(torch.tensor([-1.0, -2.0, -6.0]))
        tensor(20.1972, dtype=torch.float64)
    """

    def __init__(self, n_parameters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("n_parameters", n_parameters, minimum=0)
        self.n_parameters = n_parameters

    def compute(self) -> Tensor:
        """Return the criterion, shape ``()``; nan before any row."""
        value = -2.0 * self.total + self.n_parameters * self.count.to(self.total.dtype).log()
        return torch.where(self.count > 0, value, math.nan)[0]


class EffectiveComponents(_Sums):
    r"""Effective number of components in use: the exponential of the entropy of the mean responsibility.

    .. math:: \exp\Bigl(-\sum_k \bar r_k \log \bar r_k\Bigr), \qquad \bar r_k = \frac{1}{N} \sum_n r_{nk} .

    It is K where all components take an equal share, and 1 where one takes everything.

    Args:
        n_components: Number of components K.

    Raises:
        TypeError: If ``n_components`` is no integer or, on update, responsibilities are no floating numbers.
        ValueError: If ``n_components`` is below 1 or, on update, the last dimension is not K or a row does not sum
            to 1.

    References:
        Hill, Diversity and evenness: a unifying notation and its consequences, 1973.

    Example:
        >>> metric = EffectiveComponents(n_components=3)
        >>> metric(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]))
        tensor(2.8284, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 1.0

    responsibility: Tensor

    def __init__(self, n_components: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("n_components", n_components)
        self.n_components = n_components
        self.add_state("responsibility", torch.zeros(n_components, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, responsibilities: Tensor) -> None:
        """Add rows: responsibilities of the components, shape ``(..., K)``."""
        _check_responsibilities(responsibilities, self.n_components)
        rows = responsibilities.reshape(-1, self.n_components)
        self.responsibility = self.responsibility + rows.sum(0, dtype=self.responsibility.dtype)

    def compute(self) -> Tensor:
        """Return the number, between 1 and K, shape ``()``; nan before any row."""
        return torch.special.entr(self.responsibility / self.responsibility.sum()).sum().exp()


def detection_scores(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """Return how well scores tell rows of a distribution from others; larger scores are further out.

    Args:
        inside: Scores of rows that belong, shape ``(n,)``.
        outside: Scores of rows that do not, shape ``(m,)``.

    Returns:
        ``auroc``, the probability that an outside row scores above an inside one; ``average_precision`` of calling
        rows outside; ``fpr_at_95_tpr``, the share of outside rows that pass where 95 % of the inside ones do.

    Raises:
        ValueError: If one is empty or holds nan.

    Example:
        >>> detection_scores(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))
        {'auroc': 1.0, 'average_precision': 1.0, 'fpr_at_95_tpr': 0.0}
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if not scores.numel() or bool(scores.isnan().any()):
            raise ValueError(f"Expected `{name}` to hold at least one score and no nan.")
    scores = torch.cat([inside.flatten(), outside.flatten()]).double()
    # Ranks, since torchmetrics takes scores outside [0, 1] through a sigmoid, which rounds large ones to 1.
    ranks = (scores.unique(return_inverse=True)[1] + 1) / (len(scores) + 1)
    out = torch.cat([torch.zeros(inside.numel()), torch.ones(outside.numel())]).long().to(scores.device)
    specificity, _ = binary_specificity_at_sensitivity(1.0 - ranks, 1 - out, min_sensitivity=0.95)
    return {
        "auroc": float(binary_auroc(ranks, out)),
        "average_precision": min(1.0, float(binary_average_precision(ranks, out))),  # it rounds to above 1
        "fpr_at_95_tpr": 1.0 - float(specificity),
    }


# ----------------------------------------------------------------------------------------------------------- inside


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


def _check_floating(name: str, value: Tensor) -> None:
    """Raise unless a tensor holds floating numbers."""
    if not value.is_floating_point():
        raise TypeError(f"Expected `{name}` to hold floating numbers, but got {value.dtype}.")


def _check_labels(name: str, labels: Tensor, size: int) -> None:
    """Raise unless a tensor holds integers from 0 to ``size``, excluded."""
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= size)).any()):
        raise ValueError(f"Expected `{name}` to hold integers in [0, {size}), but got {labels.unique()[:20].tolist()}.")


def _check_responsibilities(responsibilities: Tensor, n_components: int) -> None:
    """Raise unless the last dimension holds probabilities of ``n_components``."""
    _check_floating("responsibilities", responsibilities)
    if responsibilities.ndim == 0 or responsibilities.shape[-1] != n_components:
        raise ValueError(
            f"Expected `responsibilities` of shape (..., {n_components}), but got {tuple(responsibilities.shape)}."
        )
    off = (responsibilities.sum(-1, dtype=accumulator_dtype(responsibilities.device)) - 1).abs()
    # Negated comparisons, so that nan fails; half precision rounds each number by up to eps / 2.
    tolerance = max(1e-3, 2 * torch.finfo(responsibilities.dtype).eps)
    if not bool((responsibilities >= 0).all() & (off <= tolerance).all()):
        raise ValueError(
            "Expected `responsibilities` to be non-negative and to sum to 1 over the last dimension, but they do not; "
            "give what `predict_proba` returns."
        )
