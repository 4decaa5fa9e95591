"""Where EM starts: means by scikit-learn's k-means or k-means++, drawn or given; weights; covariances."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Covariance
from tgmm_nn.maximization import scatter
from tgmm_nn.statistics import Statistics, hard_statistics, per_element
from tgmm_nn.survey import Candidates

__all__ = ["Start", "n_candidates", "nearest", "reseed"]
WEIGHT_STARTS = ("uniform", "kmeans")
COVARIANCE_STARTS = ("empirical", "global", "eye")


def n_candidates(n_components: int) -> int:
    """Return how many distinct rows a start looks at; of more data it takes a sample."""
    return max(20_000, 100 * n_components)


def kmeans(found: Candidates, n_components: int, n_init: int, generator: torch.Generator) -> Tensor:
    """Return the centres of scikit-learn's k-means (k-means++, best of ``n_init``), shape ``(K, d)``; on the CPU."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rows, weights = _for_sklearn(found)
    with warnings.catch_warnings():
        # Rows that differ by rounding alone may be one cluster to it: duplicate centres are handled by EM itself.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(n_components, n_init=n_init, random_state=_seed(generator)).fit(rows, sample_weight=weights)
    return torch.from_numpy(model.cluster_centers_).to(found.rows)


def kpp(found: Candidates, n_components: int, n_init: int, generator: torch.Generator) -> Tensor:
    """Return rows drawn by scikit-learn's greedy k-means++, shape ``(K, d)``; the tightest of ``n_init`` draws."""
    from sklearn.cluster import kmeans_plusplus

    rows, weights = _for_sklearn(found)
    seeds = [_seed(generator) for _ in range(n_init)]
    draws = (kmeans_plusplus(rows, n_components, sample_weight=weights, random_state=seed)[1] for seed in seeds)
    return min((found.rows[torch.from_numpy(draw)] for draw in draws), key=lambda means: _inertia(found, means))


def random_rows(found: Candidates, n_components: int, n_init: int, generator: torch.Generator) -> Tensor:
    """Return different rows drawn by weight, shape ``(K, d)``; the tightest of ``n_init`` draws."""
    weights = found.weights.cpu().double()
    draws = [torch.multinomial(weights, n_components, generator=generator) for _ in range(n_init)]
    return min((found.rows[draw.to(found.rows.device)] for draw in draws), key=lambda means: _inertia(found, means))


MEANS: dict[str, Callable[[Candidates, int, int, torch.Generator], Tensor]] = {
    "kmeans": kmeans,
    "kpp": kpp,
    "random": random_rows,
}


class Start(NamedTuple):
    """How EM starts: each a name, or a tensor of what is given, on the CPU in float64.

    Attributes:
        means: Key of `MEANS`, or shape ``(K, d)``.
        weights: ``"uniform"``; ``"kmeans"``, the shares of the rows nearest to each mean; or shape ``(K,)``.
        covariances: ``"empirical"``, of the rows nearest to each mean; ``"global"``, of all rows; ``"eye"``; or
            elements.
    """

    means: str | Tensor
    weights: str | Tensor
    covariances: str | Tensor

    @classmethod
    def from_options(
        cls,
        covariance: Covariance,
        n_components: int,
        n_features: int,
        init_means: Any = "kmeans",
        init_weights: Any = "uniform",
        init_covariances: Any = "empirical",
    ) -> Start:
        """Check what a user gave: a name, or a tensor, array, list or number.

        Raises:
            TypeError: If one is neither.
            ValueError: If a name is unknown, or what is given has the wrong shape or is no valid parameter.
        """
        k, d, like = n_components, n_features, torch.zeros((), dtype=torch.float64, device="cpu")
        means, weights, covariances = init_means, init_weights, init_covariances
        if _is_given("init_means", means, MEANS):
            means = checks.check_array("init_means", means, like, (k, d))
        if _is_given("init_weights", weights, WEIGHT_STARTS):
            weights = checks.check_array("init_weights", weights, like, (k,))
            checks.check_weights("init_weights", weights)
            weights = weights / weights.sum()
        if _is_given("init_covariances", covariances, COVARIANCE_STARTS):
            covariances = covariance.given("init_covariances", covariances, k, d, like)
        return cls(means, weights, covariances)

    def mixture(
        self, found: Candidates, covariance: Covariance, n_init: int, generator: torch.Generator, n_components: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return starting weights, means and covariances, without regularisation, in the dtype of sums.

        Args:
            found: Rows to start from, sorted.
            covariance: Structure of the covariances.
            n_init: Number of draws of the means, of which the tightest is taken.
            generator: Source of randomness, on the CPU.
            n_components: Number of components K.
        """
        means = self._means(found, n_components, n_init, generator)
        labels = nearest(found.rows, means)
        sums = hard_statistics(found.rows, labels, means, covariance, found.weights)
        return self._weights(sums), means.to(sums.first), self._covariances(found, labels, sums, covariance)

    @property
    def is_estimated(self) -> bool:
        """Whether the covariances are estimated from rows, and may need regularisation."""
        return isinstance(self.covariances, str) and self.covariances != "eye"

    def _means(self, found: Candidates, n_components: int, n_init: int, generator: torch.Generator) -> Tensor:
        if not isinstance(self.means, str):
            return self.means.to(found.rows)
        if len(found.rows) <= n_components:  # nothing to choose: each distinct row is a mean, some of them twice
            return found.rows[torch.arange(n_components, device=found.rows.device) % len(found.rows)]
        python_state = random.getstate()  # importing scikit-learn moves Python's own generator
        try:
            return MEANS[self.means](found, n_components, n_init, generator)
        finally:
            random.setstate(python_state)

    def _weights(self, sums: Statistics) -> Tensor:
        if not isinstance(self.weights, str):
            return self.weights.to(sums.count)
        shares = sums.count / sums.weight()
        return shares if self.weights == "kmeans" else torch.full_like(shares, 1.0 / len(shares))

    def _covariances(self, found: Candidates, labels: Tensor, sums: Statistics, covariance: Covariance) -> Tensor:
        if not isinstance(self.covariances, str):
            return self.covariances.to(sums.second)
        if self.covariances == "eye":
            return covariance.identity(len(sums.first), sums.first.shape[1], sums.second)
        if self.covariances == "global":
            return _of_all(found, covariance).expand_as(sums.second)
        return _of_clusters(found, labels, sums, covariance)


def reseed(statistics: Statistics, reseeded: Tensor, means: Tensor, covariance: Covariance) -> Statistics:
    r"""Return sums in which some components start anew about given means, each with an equal share of the rows.

    Their covariance is that within all components, :math:`\sum_k T_k / \sum_k n_k`; the others keep theirs, and what
    they weigh beside each other. The total weight stays, so that the next batch counts as it would have.

    Args:
        statistics: Sums to change.
        reseeded: Which components start anew, booleans, shape ``(K,)``.
        means: Their means, shape ``(K, d)``; rows of the others are not read.
        covariance: Structure of the covariances.
    """
    n_k, total = statistics.count, statistics.weight()
    within, mass = scatter(statistics, covariance), covariance.pool(n_k)
    pooled = within.sum(0, keepdim=True) / total
    own = within / per_element(torch.where(mass > 0, mass, 1.0), within)
    anew = covariance.pool(reseeded.to(n_k)) > 0
    kept = torch.where(reseeded, 0.0, n_k)
    share = torch.where(kept.sum() > 0, kept.sum(), 1.0) / (~reseeded).sum().clamp(min=1)
    count = torch.where(reseeded, share, kept)
    centre = statistics.origin + statistics.first / torch.where(n_k > 0, n_k, 1.0)[:, None]
    element = torch.where(per_element(anew, own), pooled, own)
    sums = Statistics.of(
        count=count,
        first=torch.zeros_like(statistics.first),
        second=element * per_element(covariance.pool(count), element),
        origin=torch.where(reseeded[:, None], means.to(centre), centre),
        covariance=covariance,
    )
    return sums.scale(total / sums.weight())


def nearest(x: Tensor, means: Tensor) -> Tensor:
    """Return the index of the mean nearest to each row, shape ``(n,)``."""
    return _distances(x, means)[1]


def _distances(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's distance to the nearest mean, and which one that is, shape ``(n,)``."""
    origin = means.mean(0)  # distances are formed by a matrix product, which cancels far from zero
    parts = [torch.cdist(rows - origin, means - origin).min(-1) for rows in x.split(8192)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _inertia(found: Candidates, means: Tensor) -> float:
    """Return the weighted sum of squared distances to the nearest mean."""
    return float((found.weights * _distances(found.rows, means)[0].square()).sum())


def _of_all(found: Candidates, covariance: Covariance) -> Tensor:
    """Return the covariance of all rows as one element."""
    untied = type(covariance)(tied=False)
    labels = torch.zeros(len(found.rows), dtype=torch.int64, device=found.rows.device)
    sums = hard_statistics(found.rows, labels, found.rows[:1], untied, found.weights)
    return scatter(sums, untied) / sums.weight()


def _of_clusters(found: Candidates, labels: Tensor, sums: Statistics, covariance: Covariance) -> Tensor:
    """Return the covariance of each cluster; pooled where one has no two distinct rows, of all rows where none has."""
    distinct = torch.bincount(labels, minlength=len(sums.count))
    within, mass = scatter(sums, covariance), covariance.pool(sums.count)
    pooled = within.sum(0, keepdim=True) / sums.weight()
    if not bool((distinct > 1).any()):
        pooled = _of_all(found, covariance)
    varies = covariance.pool((distinct > 1).to(mass)) > 0
    own = within / per_element(torch.where(mass > 0, mass, 1.0), within)
    return torch.where(per_element(varies, within), own, pooled)


def _is_given(name: str, value: Any, names: Collection[str]) -> bool:
    """Return whether ``value`` is given as numbers; raise where it is a string that is not among ``names``."""
    if isinstance(value, str):
        checks.check_choice(name, value, names)
    return not isinstance(value, str)


def _for_sklearn(found: Candidates) -> tuple[Any, Any]:
    """Return rows and weights as arrays; weights up to one, since they are cast to the dtype of the rows there."""
    return found.rows.cpu().numpy(), (found.weights / found.weights.max()).cpu().numpy()


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (), generator=generator, device="cpu"))
