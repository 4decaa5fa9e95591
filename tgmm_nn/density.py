"""`MixtureDensity`: what a mixture says of rows, as a layer, wherever its parameters come from."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily

from tgmm_nn import checks, few, functional
from tgmm_nn.covariance import Covariance
from tgmm_nn.data import Rows, is_mapped, is_stream, pieces
from tgmm_nn.functional import Parameters
from tgmm_nn.statistics import accumulator_dtype, wider_dtype

__all__ = ["MixtureDensity", "full_precision"]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off where it is on; a meta tensor has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def log_density(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    """Return the log-density of rows ``(n, d)``, by the form for few of them where it is their case."""
    value = few.log_density(x, parameters, covariance)
    return functional.log_density(x, parameters, covariance) if value is None else value


class MixtureDensity(nn.Module):
    """Log-density and responsibilities of a mixture, differentiable in the rows.

    Rows are tensors, arrays or lists of any float or integer dtype and on any device; they are moved to the mixture's
    device, and results are in float32, or in float64 where the rows or the mixture are.
    """

    covariance: Covariance
    chunk_size: int | None

    @abstractmethod
    def mixture(self) -> Parameters:
        """Return the parameters."""

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.mixture().means.shape[0]

    @property
    def n_features(self) -> int:
        """Number of features d."""
        return self.mixture().means.shape[1]

    def forward(self, x: Any) -> Tensor:
        r"""Return the log-density :math:`\log p(x)` of each row, in nats.

        Differentiable in ``x``; computed outside autocast, in float32 or the wider of the dtypes of ``x`` and the
        mixture.

        Args:
            x: Rows, shape ``(..., d)``.

        Returns:
            Tensor of shape ``(...)``; −inf at infinity, nan where ``x`` is nan.

        Raises:
            TypeError: If ``x`` holds no real numbers.
            ValueError: If the last dimension of ``x`` is not d.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> GaussianMixture(2, 1)(torch.zeros(3, 1))
            tensor([-0.9189, -0.9189, -0.9189])
        """
        return self._map_rows(log_density, x)

    def score_samples(self, x: Any) -> Tensor:
        """Return the log-density of each row: the same as calling the layer."""
        return self(x)

    def log_density_and_entropy(self, x: Any) -> tuple[Tensor, Tensor]:
        """Return the log-density of each row and the entropy of its responsibilities, in nats, each of shape ``(...)``.

        The entropy is 0 for a row that belongs to one component, and log K for one that belongs to all alike.
        """
        density, entropy = self._map_rows(functional.log_density_and_entropy, x).unbind(-1)
        return density, entropy

    def squared_distances(self, x: Any) -> Tensor:
        r"""Return :math:`(x - \mu_k)^\top \Sigma_k^{-1} (x - \mu_k)`, shape ``(..., K)``; differentiable in ``x``."""
        return self._map_rows(functional.squared_distances, x, whitened=True)

    def log_joint(self, x: Any) -> Tensor:
        r"""Return :math:`\log \pi_k N(x; \mu_k, \Sigma_k)`, shape ``(..., K)``, in nats; differentiable in ``x``."""
        return self._map_rows(functional.log_joint, x)

    def log_responsibilities(self, x: Any) -> Tensor:
        r"""Return :math:`\log p(k | x)`, shape ``(..., K)``; differentiable in ``x``, nan for a row at infinity."""
        return self._map_rows(lambda *args: functional.log_joint(*args).mT.log_softmax(0).mT.contiguous(), x)

    def predict_proba(self, x: Any) -> Tensor:
        """Return the responsibilities of the components for each row, shape ``(..., K)``."""
        # Along the first axis of (K, n) an operation runs over many rows; MKL's exponential is slow where it vanishes.
        return self._map_rows(lambda *args: functional.log_joint(*args).mT.softmax(0).mT.contiguous(), x)

    def predict(self, x: Any) -> Tensor:
        """Return the most probable component of each row, shape ``(...)``, int64; 0 where a row is not finite."""
        return self._map_rows(lambda *args: functional.log_joint(*args).argmax(-1), x)

    def to_distribution(self) -> MixtureSameFamily:
        """Return the same mixture as `torch.distributions` has it, in the mixture's dtype; differentiable.

        It does not follow later updates. Its components are a batch of ``MultivariateNormal``, or where features are
        uncorrelated, of ``Independent`` normals.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> GaussianMixture(2, 1).to_distribution().log_prob(torch.zeros(3, 1))
            tensor([-0.9189, -0.9189, -0.9189])
        """
        weights, means, factor = self.mixture()
        with full_precision(means.device):
            normals = self.covariance.normals(means.clone(), factor)
            # Logarithms, since a weight of 0 that is given as a probability becomes the dtype's epsilon.
            return MixtureSameFamily(Categorical(logits=functional.log_weights(weights)), normals)

    @torch.no_grad()
    def score(self, x: Any, *, sample_weight: Any = None) -> float:
        """Return the mean log-density of the rows in nats; raise where a row is not finite."""
        total, weight = self._total(functional.log_density, x, sample_weight)
        return total / weight

    @torch.no_grad()
    def bic(self, x: Any, *, sample_weight: Any = None) -> float:
        r"""Return the Bayesian information criterion, :math:`-2 \log L + p \log n`; smaller is better.

        p is `n_parameters`, and n the total weight of the rows.

        References:
            Schwarz, Estimating the dimension of a model, 1978.
        """
        total, weight = self._total(functional.log_density, x, sample_weight)
        return -2.0 * total + self.n_parameters * math.log(weight)

    @torch.no_grad()
    def aic(self, x: Any, *, sample_weight: Any = None) -> float:
        r"""Return Akaike's information criterion, :math:`-2 \log L + 2 p`; smaller is better.

        References:
            Akaike, A new look at the statistical model identification, 1974.
        """
        return -2.0 * self._total(functional.log_density, x, sample_weight)[0] + 2.0 * self.n_parameters

    @torch.no_grad()
    def icl(self, x: Any, *, sample_weight: Any = None) -> float:
        r"""Return the integrated completed likelihood criterion; smaller is better.

        .. math:: -2 \sum_n \max_k \log \pi_k N(x_n; \mu_k, \Sigma_k) + p \log n,

        which is `bic` and a penalty for rows that belong to no component clearly.

        References:
            Biernacki, Celeux and Govaert, Assessing a mixture model for clustering with the integrated completed
            likelihood, 2000.
        """
        total, weight = self._total(lambda *args: functional.log_joint(*args).amax(-1), x, sample_weight)
        return -2.0 * total + self.n_parameters * math.log(weight)

    @property
    def n_parameters(self) -> int:
        """Number of free parameters: weights, means and covariances."""
        k, d = self.n_components, self.n_features
        return k - 1 + k * d + self.covariance.leading(k) * self.covariance.n_parameters(d)

    def _map_rows(self, function: Callable[..., Tensor], x: Any, *, whitened: bool = False) -> Tensor:
        """Apply a function of rows and parameters to ``(..., d)``, outside autocast; to a file in pieces."""
        if not isinstance(x, Tensor) and is_mapped(x) and len(parts := list(pieces(x))) > 1:
            return torch.cat([self._map_rows(function, part, whitened=whitened) for part in parts])
        parameters = self.mixture()
        rows, shape = self._rows(x, parameters.means)
        with full_precision(rows.device):
            size = self.chunk_size or functional.rows_of_densities(
                rows, parameters.means, self.covariance, whitened=whitened
            )
            value = functional.map_rows(
                lambda part: function(part, parameters, self.covariance), rows, parameters, size
            )
        return value if len(shape) == 1 else value.reshape(shape + value.shape[1:])

    def _rows(self, x: Any, means: Tensor) -> tuple[Tensor, torch.Size]:
        """Return ``x`` as rows ``(n, d)`` in the wider of its dtype and the means', and its shape but for features."""
        if not isinstance(x, Tensor) and is_stream(x):
            raise TypeError(f"Expected `x` as rows, but got {type(x).__name__}; take its batches one by one.")
        x, n_features = checks.to_tensor("x", x, means.dtype), means.shape[1]
        checks.check_rows("x", x, n_features)
        rows, dtype = x if x.ndim == 2 else x.reshape(-1, n_features), wider_dtype(x.dtype, means.dtype)
        if rows.dtype != dtype or rows.device != means.device:
            rows = rows.to(means.device, dtype)
        return rows, x.shape[:-1]

    def _total(self, function: Callable[..., Tensor], x: Any, sample_weight: Any) -> tuple[float, float]:
        """Return the weighted sum over finite rows of a function of rows, and the total weight of the rows."""
        means = self.mixture().means
        total = weights = torch.zeros((), dtype=accumulator_dtype(means.device), device=means.device)
        with Rows(x, sample_weight, self.n_features, means).checked_batches() as batches:
            for rows, weight in batches:
                total = total + (weight * self._map_rows(function, rows)).sum()
                weights = weights + weight.sum()
        if not float(weights) > 0:
            raise ValueError("Expected `x` with at least one row of positive weight, but got none.")
        return float(total), float(weights)
