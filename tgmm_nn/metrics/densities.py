"""Metrics of densities: likelihood, criterion, components in use, and how well scores tell rows apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_specificity_at_sensitivity,
)

from tgmm_nn.checks import check_integer
from tgmm_nn.metrics.base import Sums, check_floating, check_responsibilities

__all__ = ["BIC", "EffectiveComponents", "NegativeLogLikelihood", "detection_scores"]


class NegativeLogLikelihood(Sums):
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
        check_floating("log_density", log_density)
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


class EffectiveComponents(Sums):
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
        check_responsibilities(responsibilities, self.n_components)
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
