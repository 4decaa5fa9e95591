r"""Parameters of a mixture, the additive sums that EM needs, and the algebra that chunks, batches and ranks share.

Notation: :math:`r_{nk}` is the responsibility of component k for row n times the row's weight, :math:`o_k` the
reference point, and :math:`[A]` the part of a matrix that a covariance structure keeps: all of it, its diagonal, or the
mean of its diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tgmm_nn.distributed import is_distributed, sum_over_ranks

__all__ = [
    "Moments",
    "Parameters",
    "Statistics",
    "accumulator_dtype",
    "check_like",
    "hard_statistics",
    "per_element",
    "statistics_of",
    "wider_dtype",
]


class Moments(Protocol):
    """What sums ask of a covariance structure: how to form its part of an outer product, and how to share it."""

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the structure's part of each ``a bᵀ``."""

    def pool(self, per_component: Tensor) -> Tensor:
        """Sum over components where the structure is tied."""

    def features(self, x: Tensor) -> Tensor:
        """Return the structure's part of each ``x xᵀ`` as independent entries, for columns x."""

    def pack(self, element: Tensor) -> Tensor:
        """Return the independent entries of the structure's parts."""

    def unpack(self, features: Tensor, n_features: int) -> Tensor:
        """Return the structure's parts from (sums of) features, or packed entries."""


class Parameters(NamedTuple):
    """Parameters of a mixture of K components in d features.

    Attributes:
        weights: Mixing weights, shape ``(K,)``.
        means: Means, shape ``(K, d)``.
        factor: Factor of the precisions in the structure's shape, leading axis ``K``, or 1 when tied.
    """

    weights: Tensor
    means: Tensor
    factor: Tensor

    def about(self, origin: Tensor) -> Parameters:
        """Return the parameters of the same mixture of rows that are taken about a reference point."""
        return Parameters(self.weights, self.means - origin, self.factor)

    def to(self, dtype: torch.dtype) -> Parameters:
        """Return the same parameters in another dtype."""
        return Parameters(*(p.to(dtype) for p in self))


class Statistics(NamedTuple):
    r"""Sums over rows about a reference point, in float64 where the device has it.

    .. math::
        n_k = \sum_n r_{nk}, \qquad S^{(1)}_k = \sum_n r_{nk} (x_n - o_k), \qquad
        S^{(2)}_k = \sum_n r_{nk} [(x_n - o_k)(x_n - o_k)^\top]

    They are a vector space: the sums of two batches add up to the sums of their union (`merge`), and a batch that
    counts half is half its sums (`scale`). Chunked, minibatch and distributed EM are these two operations.

    Attributes:
        count: :math:`n_k`, shape ``(K,)``.
        first: :math:`S^{(1)}`, shape ``(K, d)``.
        second: :math:`S^{(2)}` in the structure's shape with a leading axis of ``K``, or of 1 (the sum over k) when
            tied.
        log_likelihood: :math:`\sum_n w_n \log p(x_n)` in nats, shape ``()``.
        classification: :math:`\sum_n w_n \max_k \log \pi_k N(x_n; \mu_k, \Sigma_k)`, the log-likelihood with each
            row given wholly to its most probable component, in nats, shape ``()``.
        rows: Number of rows that entered the sums, shape ``()``.
        skipped: Number of rows left out because they are not finite, shape ``()``.
        origin: Reference point :math:`o`, shape ``(d,)``, or ``(K, d)`` with one for each component.
        covariance: Structure that shapes ``second``.

    Example:
        >>> from tgmm_nn.covariance import Diagonal
        >>> x, k = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
        >>> whole = hard_statistics(x, k, torch.zeros(2, 1), Diagonal())
        >>> parts = hard_statistics(x[:1], k[:1], torch.ones(2, 1), Diagonal()).merge(
        ...     hard_statistics(x[1:], k[1:], torch.zeros(2, 1), Diagonal())
        ... )
        >>> parts.count, parts.about(whole.origin).second.flatten()
        (tensor([2., 1.], dtype=torch.float64), tensor([ 4., 25.], dtype=torch.float64))
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which sums have no use for
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    classification: Tensor
    rows: Tensor
    skipped: Tensor
    origin: Tensor
    covariance: Moments

    @classmethod
    def of(cls, count: Tensor, first: Tensor, second: Tensor, origin: Tensor, covariance: Moments) -> Statistics:
        """Return sums that come from no rows, with totals of zero."""
        zero = torch.zeros((), dtype=count.dtype, device=count.device)
        return cls(count, first, second, zero, zero, zero, zero, origin, covariance)

    def merge(self, other: Statistics) -> Statistics:
        """Return the sums of both, about this one's reference point.

        Named, not ``+``: on a tuple a forgotten operator concatenates in silence.

        Raises:
            ValueError: If the other sums are of another structure or shape.
        """
        check_like(other, self.covariance, self.first)
        return self._with(a + b for a, b in zip(self.sums(), other.about(self.origin).sums(), strict=True))

    def scale(self, factor: float | Tensor) -> Statistics:
        """Return the sums of the same rows, each counting ``factor`` times."""
        return self._with(factor * s for s in self.sums())

    def about(self, origin: Tensor) -> Statistics:
        r"""Return the same sums about another reference point :math:`o'`; exact but for rounding.

        With :math:`\delta = o - o'`, :math:`S^{(1)\prime} = S^{(1)} + n \delta` and
        :math:`S^{(2)\prime} = S^{(2)} + [S^{(1)} \delta^\top] + [\delta S^{(1)\top}] + n [\delta \delta^\top]`.
        """
        if origin is self.origin:
            return self
        dtype = self.first.dtype
        delta = (self.origin.to(dtype) - origin.to(dtype)).expand_as(self.first)
        outer = self.covariance.outer
        n_delta = self.count[:, None] * delta
        shift = outer(self.first + n_delta, delta) + outer(delta, self.first)
        first, second = self.first + n_delta, self.second + self.covariance.pool(shift)
        totals = (self.log_likelihood, self.classification, self.rows, self.skipped)
        return Statistics(self.count, first, second, *totals, origin, self.covariance)

    def sums(self) -> tuple[Tensor, ...]:
        """The additive part: everything but the reference point and the structure."""
        totals = (self.log_likelihood, self.classification, self.rows, self.skipped)
        return (self.count, self.first, self.second, *totals)

    def weight(self) -> Tensor:
        """Total weight of the rows, the sum of ``count``, shape ``()``."""
        return self.count.sum()

    def mean_log_likelihood(self) -> Tensor:
        """Average log-likelihood in nats per unit of row weight, shape ``()``; nan when there are no rows."""
        return self.log_likelihood / self.weight()

    def flatten(self) -> Tensor:
        """Return all sums as one vector, the message that ranks exchange; `unflatten` undoes it.

        Of a symmetric matrix it holds one half: K (d + 1) (d + 2) / 2 numbers for full covariances, and four totals.
        """
        return torch.cat([s.reshape(-1) for s in self._packed()])

    def unflatten(self, flat: Tensor) -> Statistics:
        """Return statistics shaped like these with the sums in ``flat``."""
        packed = self._packed()
        parts = flat.split([s.numel() for s in packed])
        count, first, second, *totals = (p.reshape(s.shape) for p, s in zip(parts, packed, strict=True))
        return self._with([count, first, self.covariance.unpack(second, first.shape[-1]), *totals])

    def _packed(self) -> tuple[Tensor, ...]:
        """Return the sums, the second moment as its independent entries."""
        count, first, second, *totals = self.sums()
        return (count, first, self.covariance.pack(second), *totals)

    def over_ranks(self) -> Statistics:
        """Return the sums over all ranks, as one message; every rank has to call this. These themselves when alone."""
        return self.unflatten(sum_over_ranks(self.flatten())) if is_distributed() else self

    def _with(self, sums: Iterable[Tensor]) -> Statistics:
        """Return other sums, in the order of `sums`, about the same reference point."""
        count, first, second, log_likelihood, classification, rows, skipped = sums
        totals = (log_likelihood, classification, rows, skipped)
        return Statistics(count, first, second, *totals, self.origin, self.covariance)


def check_like(statistics: Statistics, covariance: Moments, first: Tensor) -> None:
    """Raise unless ``statistics`` are sums of a structure and shape: broadcasting would mix others in silence."""
    if not isinstance(statistics, Statistics):
        raise TypeError(f"Expected `statistics` to be Statistics, but got {type(statistics).__name__}.")
    if statistics.covariance != covariance or statistics.first.shape != first.shape:
        raise ValueError(
            f"Expected `statistics` of {covariance} with sums of shape {tuple(first.shape)}, "
            f"but got {statistics.covariance} with {tuple(statistics.first.shape)}; take them from the same mixture."
        )


def statistics_of(weights: Tensor, means: Tensor, covariances: Tensor, covariance: Moments) -> Statistics:
    r"""Return the expected sums of one row drawn from a mixture.

    They are :math:`n_k = \pi_k`, a first moment of zero about the means, and a second of :math:`\pi_k \Sigma_k`.
    `maximize` maps them back to the same parameters.

    Args:
        weights: Mixing weights, shape ``(K,)``.
        means: Means, shape ``(K, d)``; also the reference points.
        covariances: Covariances in the structure's shape, leading axis ``K``, or 1 when tied.
        covariance: Structure of the covariances.
    """
    wide = accumulator_dtype(means.device)
    count = weights.to(wide)
    second = covariances.to(wide) * per_element(covariance.pool(count), covariances)
    return Statistics.of(count, torch.zeros_like(means, dtype=wide), second, means, covariance)


def hard_statistics(
    x: Tensor, labels: Tensor, origin: Tensor, covariance: Moments, sample_weight: Tensor | None = None
) -> Statistics:
    r"""Sum rows that belong wholly to one component each.

    Args:
        x: Rows, at least one, shape ``(n, d)``.
        labels: Component of each row, integers in [0, K), shape ``(n,)``.
        origin: Reference point of each component, shape ``(K, d)``.
        covariance: Structure that shapes the second moment.
        sample_weight: Weight of each row, shape ``(n,)``.

    Returns:
        Statistics about ``origin`` with a log-likelihood of 0.
    """
    weight = x.new_ones(len(x)) if sample_weight is None else sample_weight.to(x.dtype)
    width = len(covariance.features(x[:1].mT))  # of the products of a row, d (d + 1) / 2 for full matrices
    size = min(4096, max(256, 2**21 // width))
    chunks = zip(x.split(size), labels.split(size), weight.split(size), strict=True)
    return reduce(Statistics.merge, (_hard_chunk(rows, k, w, origin, covariance) for rows, k, w in chunks))


def _hard_chunk(x: Tensor, labels: Tensor, weight: Tensor, origin: Tensor, covariance: Moments) -> Statistics:
    wide = accumulator_dtype(x.device)
    columns = (x - origin.to(x.dtype)[labels]).mT.contiguous()
    members = torch.nn.functional.one_hot(labels, len(origin)).to(x.dtype).mT * weight
    features = (members @ covariance.features(columns).mT).to(wide)
    second = covariance.pool(covariance.unpack(features, x.shape[-1]))
    count, first = members.sum(-1).to(wide), (members @ columns.mT).to(wide)
    return Statistics.of(count, first, second, origin, covariance)._replace(rows=count.new_full((), len(x)))


def per_element(value: Tensor, element: Tensor) -> Tensor:
    """Return one number per element, shaped to broadcast against the elements."""
    return value.reshape(-1, *(1,) * (element.ndim - 1))


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of totals on ``device``: float64 where it exists."""
    return torch.float32 if device.type == "mps" else torch.float64


def wider_dtype(given: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in for rows of any real dtype: that of the mixture, or float64 for float64 rows."""
    return torch.float64 if given == torch.float64 else dtype
