"""Where EM starts: means by scikit-learn's k-means or drawn rows, equal weights, covariances of the nearest rows."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from tgmm_nn.covariance import Covariance
from tgmm_nn.functional import scatter
from tgmm_nn.statistics import Statistics, accumulator_dtype, per_element, statistics_of

__all__ = ["MEANS", "canonical_order", "hard_statistics", "nearest", "starting_statistics"]


def canonical_order(x: Tensor) -> Tensor:
    """Return the rows sorted by their values, so that a seeded choice of rows does not depend on how they arrived.

    Example:
        >>> canonical_order(torch.tensor([[2, 0], [1, 5], [1, 3]]))
        tensor([[1, 3],
                [1, 5],
                [2, 0]])
    """
    order = torch.arange(len(x), device=x.device)
    for column in reversed(x.unbind(-1)):
        order = order[column[order].argsort(stable=True)]
    return x[order]


def kmeans(x: Tensor, n_components: int, n_init: int, generator: torch.Generator) -> Tensor:
    """Return the centres of scikit-learn's k-means (k-means++, best of ``n_init``), shape ``(K, d)``; on the CPU."""
    python_state = random.getstate()  # importing scikit-learn moves Python's own generator
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    random.setstate(python_state)
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    with warnings.catch_warnings():
        # Fewer distinct rows than components: the duplicate centres are handled by EM itself.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(n_components, n_init=n_init, random_state=seed).fit(x.cpu().numpy())
    return torch.from_numpy(model.cluster_centers_).to(x)


def random_rows(x: Tensor, n_components: int, n_init: int, generator: torch.Generator) -> Tensor:
    """Return ``n_components`` different rows drawn uniformly, shape ``(K, d)``; ``n_init`` has nothing to choose by."""
    return x[torch.randperm(len(x), generator=generator)[:n_components].to(x.device)]


MEANS: dict[str, Callable[[Tensor, int, int, torch.Generator], Tensor]] = {"kmeans": kmeans, "random": random_rows}


def nearest(x: Tensor, means: Tensor) -> Tensor:
    """Return the index of the mean nearest to each row, shape ``(n,)``."""
    origin = means.mean(0)  # distances are formed by a matrix product, which cancels far from zero
    return torch.cat([torch.cdist(rows - origin, means - origin).argmin(-1) for rows in x.split(8192)])


def hard_statistics(x: Tensor, labels: Tensor, origin: Tensor, covariance: Covariance) -> Statistics:
    r"""Sum rows that belong wholly to one component each.

    Args:
        x: Rows, shape ``(n, d)``.
        labels: Component of each row, integers in [0, K), shape ``(n,)``.
        origin: Reference point of each component, shape ``(K, d)``.
        covariance: Structure that shapes the second moment.

    Returns:
        Statistics about ``origin`` with a log-likelihood of 0.
    """
    return reduce(
        Statistics.merge,
        (_hard_chunk(rows, k, origin, covariance) for rows, k in zip(x.split(4096), labels.split(4096), strict=True)),
    )


def starting_statistics(
    x: Tensor, n_components: int, covariance: Covariance, method: str, n_init: int, generator: torch.Generator
) -> Statistics:
    r"""Return the statistics, of total weight one, whose M-step is the start of EM.

    The means are chosen by ``method``, every component weighs 1 / K, and its covariance is that of the rows nearest to
    its mean, or the pooled one where there are not two of them.

    Args:
        x: Finite rows, at least as many as components, shape ``(n, d)``.
        n_components: Number of components K.
        covariance: Structure of the covariances.
        method: Key of `MEANS`.
        n_init: Number of k-means runs, of which the tightest is taken.
        generator: Source of randomness, on the CPU.
    """
    x = canonical_order(x)
    means = MEANS[method](x, n_components, n_init, generator)
    weights = torch.full((n_components,), 1.0 / n_components, dtype=means.dtype, device=x.device)
    sums = hard_statistics(x, nearest(x, means), means, covariance)
    return statistics_of(weights, means, _cluster_covariances(sums, covariance), covariance)


def _cluster_covariances(sums: Statistics, covariance: Covariance) -> Tensor:
    """Return the covariance of each cluster, pooled over clusters where a cluster has no two rows to vary."""
    within, mass = scatter(sums, covariance), covariance.pool(sums.count)
    pooled = within.sum(0, keepdim=True) / sums.weight()
    return torch.where(per_element(mass >= 2, within), within / per_element(mass.clamp(min=1), within), pooled)


def _hard_chunk(x: Tensor, labels: Tensor, origin: Tensor, covariance: Covariance) -> Statistics:
    wide = accumulator_dtype(x.device)
    columns = (x - origin.to(x.dtype)[labels]).mT.contiguous()
    members = torch.nn.functional.one_hot(labels, len(origin)).to(x.dtype).mT
    features = (members @ covariance.features(columns).mT).to(wide)
    zero = torch.zeros((), dtype=wide, device=x.device)
    return Statistics(
        count=members.sum(-1).to(wide),
        first=(members @ columns.mT).to(wide),
        second=covariance.pool(covariance.unpack(features, x.shape[-1])),
        log_likelihood=zero,
        rows=zero + len(x),
        skipped=zero,
        origin=origin,
        covariance=covariance,
    )
