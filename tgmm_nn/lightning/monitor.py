"""What the callback tells of a mixture in training."""

from __future__ import annotations

import torch
from torch import Tensor

from tgmm_nn.distributed import sum_over_ranks
from tgmm_nn.functional import Parameters, distance
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.statistics import Statistics

__all__ = ["Monitor"]


class Monitor:
    """Numbers of an epoch, kept on the device until the epoch ends: a log call in every step would cost more than EM.

    The log-likelihood comes from EM's own E-steps, which give it for nothing; the rows of the epoch's first step give
    the entropy, and the log-likelihood where EM makes no E-step.

    Args:
        min_weight: A component is dead that weighs less, or nothing where this is None.

    Attributes:
        births: How often each component was born in the epoch, shape ``(K,)``.
        deaths: How often each died in it, shape ``(K,)``.
    """

    def __init__(self, min_weight: float | None = None) -> None:
        self.min_weight = min_weight
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier training logged."""
        self._logged: Tensor | None = None

    @torch.no_grad()
    def begin(self, gmm: GaussianMixture) -> None:
        """Start an epoch."""
        self._first: Tensor | None = None
        self._expected = gmm.running_count.new_zeros(2)
        self._n_reseeded = 0
        self.births = self.deaths = torch.zeros_like(gmm.weights_)
        self._started = gmm.fitted.clone()
        self.follow(gmm)

    @torch.no_grad()
    def follow(self, gmm: GaussianMixture) -> None:
        """Measure from here on how far the components move."""
        self._before = Parameters(*(p.clone() for p in gmm.mixture()))
        self._alive = self._are_alive(gmm)

    @torch.no_grad()
    def see(self, gmm: GaussianMixture, rows: Tensor) -> None:
        """Add up log-density and entropy of the finite rows of an epoch's first step, and count these."""
        if self._first is not None:
            return
        density, entropy = gmm.log_density_and_entropy(rows)
        finite = torch.isfinite(density)
        values = torch.stack([torch.where(finite, v, 0.0) for v in (density, torch.ones_like(density), entropy)])
        self._first = values.sum(-1, dtype=self._expected.dtype)

    @torch.no_grad()
    def expect(self, statistics: Statistics) -> None:
        """Add the log-likelihood and the weight of the rows of an E-step of this rank."""
        self._expected = self._expected + torch.stack([statistics.log_likelihood, statistics.weight()])

    @torch.no_grad()
    def count(self, gmm: GaussianMixture, n_reseeded: int) -> None:
        """Count births and deaths of an update."""
        alive = self._are_alive(gmm)
        self.births = self.births + (alive & ~self._alive).to(self.births)
        self.deaths = self.deaths + (self._alive & ~alive).to(self.deaths)
        self._alive = alive
        self._n_reseeded += n_reseeded

    @torch.no_grad()
    def values(self, gmm: GaussianMixture) -> dict[str, Tensor]:
        """Return what is logged, the same on every rank; every rank has to call this."""
        weights, first = gmm.weights_, self._expected.new_zeros(3) if self._first is None else self._first
        expected, first = sum_over_ranks(torch.cat([self._expected, first])).split([2, 3])
        likelihood = torch.where(expected[1] > 0, expected[0] / expected[1], first[0] / first[1])
        means = torch.stack([likelihood, first[2] / first[1]])
        # An epoch without a usable row repeats the one before it: a logged nan would end an EarlyStopping.
        self._logged = means if self._logged is None else torch.where(means.isnan(), self._logged, means)
        values = {
            "log_likelihood": self._logged[0],
            "entropy": self._logged[1],
            "effective_components": torch.special.entr(weights).sum().exp(),
            "smallest_weight": weights.amin(),
            "condition_number": gmm.condition_numbers().amax(),
            "moved": weights @ distance(gmm.means_, self._before, gmm.covariance),
            "births": self.births.sum(),
            "deaths": self.deaths.sum(),
            "reseeded": weights.new_tensor(self._n_reseeded),
            "started": torch.where(expected[1] > 0, 1, self._started.flatten()[0]),
        }
        return {name: value.to(weights.dtype) for name, value in values.items()}

    def _are_alive(self, gmm: GaussianMixture) -> Tensor:
        return gmm.weights_ > 0 if self.min_weight is None else gmm.weights_ >= self.min_weight
