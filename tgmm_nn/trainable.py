"""`TrainableGaussianMixture`: a mixture as unconstrained parameters, which an optimizer may move freely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tgmm_nn import checks, sampling
from tgmm_nn.density import MixtureDensity, full_precision
from tgmm_nn.functional import Parameters
from tgmm_nn.state import MixtureState
from tgmm_nn.statistics import accumulator_dtype

if TYPE_CHECKING:
    from tgmm_nn.mixture import GaussianMixture

__all__ = ["TrainableGaussianMixture"]

# Stands for the logarithm of a weight of 0: softmax gives 0 for it in every dtype, and unlike −∞ it stays finite under
# weight decay, averaging and clipping.
LOG_ZERO = -1000.0


class TrainableGaussianMixture(MixtureDensity):
    r"""Gaussian mixture whose parameters learn by gradient; the same density as the mixture that it is made from.

    .. math:: \pi = \mathrm{softmax}(\ell), \qquad \Sigma_k^{-1} = P_k P_k^\top, \qquad (P_k)_{ii} = e^{(F_k)_{ii}},

    with the logits ℓ, the means and, in F, the entries of the factor P above its diagonal free. Any real numbers are a
    valid mixture, so that no step of an optimizer can leave the family. Start by EM, go on by gradient together with
    the network before it, and return: conversion is exact up to rounding, both ways.

    A component of weight 0 keeps it, exactly: it has no gradient, and only a prior in EM, or long weight decay, revives
    it. Numbers in half precision are computed with in float32.

    Args:
        mixture: The `GaussianMixture` to start from. Its options, priors among them, are kept for `to_mixture`.

    Attributes:
        logits: Log-weights up to a constant, shape ``(K,)``.
        means: Means, shape ``(K, d)``.
        free_factor: Factor of the precisions with its diagonal as logarithms, in the factor's shape; what lies below
            the diagonal is not used.
        priors: The conjugate priors, on the CPU; `tgmm_nn.priors.Priors`.

    Raises:
        TypeError: If ``mixture`` is no `GaussianMixture`.

    References:
        Jiang, Zheng, Tan, Tang and Zhou, Variational deep embedding: an unsupervised and generative approach to
        clustering, 2017.

    Example:
        >>> from tgmm_nn import GaussianMixture
        >>> x = torch.cat([torch.randn(100, 2) - 4, torch.randn(100, 2) + 4])
        >>> gmm = GaussianMixture(2, 2).fit(x).to_parameters()
        >>> optimizer = torch.optim.Adam(gmm.parameters(), lr=1e-3)
        >>> (-gmm(x).mean()).backward(); optimizer.step()
        >>> gmm.to_mixture().covariances_.shape
        torch.Size([2, 2, 2])
    """

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        if not isinstance(mixture, MixtureState):
            raise TypeError(f"Expected `mixture` to be a GaussianMixture, but got {type(mixture).__name__}.")
        self._kind, self._options = type(mixture), mixture.options()
        self.covariance, self.chunk_size, self.priors = mixture.covariance, mixture.chunk_size, mixture.priors
        dtype, wide = mixture.means_.dtype, accumulator_dtype(mixture.means_.device)
        weights, means, factor = mixture.mixture().to(wide)
        self.logits = nn.Parameter(weights.log().clamp(min=LOG_ZERO).to(dtype))
        self.means = nn.Parameter(means.to(dtype, copy=True))
        self.free_factor = nn.Parameter(self.covariance.unconstrained(factor).to(dtype))

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.means.shape[0]

    @property
    def n_features(self) -> int:
        """Number of features d."""
        return self.means.shape[1]

    def mixture(self) -> Parameters:
        """Return the parameters, in float32 or wider; differentiable."""
        dtype = torch.promote_types(self.means.dtype, torch.float32)
        factor = self.covariance.constrained(self.free_factor.to(dtype))
        return Parameters(self.logits.to(dtype).softmax(0), self.means.to(dtype), factor)

    @torch.no_grad()
    def to_mixture(self) -> GaussianMixture:
        """Return the same mixture as a `GaussianMixture`, with the options of the one that this was made from.

        Raises:
            ValueError: If the parameters are not finite, or a covariance is singular in float64.
        """
        mixture = self.mixture()
        weights, means, factor = mixture.to(accumulator_dtype(self.means.device))
        with full_precision(means.device):
            covariances = self.covariance.public(self.covariance.square(self.covariance.root(factor)))
        gmm = self._kind(**self._options, device=means.device, dtype=mixture.means.dtype)
        gmm.set_parameters(weights, means, covariances)
        return gmm

    def log_prior(self) -> Tensor:
        r"""Return the log-density of the conjugate priors at the mixture, in nats, shape ``()``; 0 without priors.

        It is a density of π, μ and Σ, not of the free numbers, so that EM and gradients climb the same objective,
        :math:`\sum_n \log p(x_n) + \log p(\pi, \mu, \Sigma)`. Over minibatches of n out of N rows, the loss
        ``-(gmm(x).mean() + gmm.log_prior() / N)`` is its negative per row.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> GaussianMixture(1, 1, mean_prior=0.0, mean_precision_prior=1.0).to_parameters().log_prior()
            tensor(-0.9189, grad_fn=<ToCopyBackward0>)
        """
        mixture = self.mixture()
        device = mixture.means.device
        with full_precision(device):
            wide = mixture.to(accumulator_dtype(device))
            return self.priors.to(device).log_density(*wide, self.covariance).to(mixture.means.dtype)

    def rsample(
        self, n: int | Sequence[int], component: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draw rows :math:`x = \mu_k + P_k^{-\top} \epsilon`, with gradients to means and factor.

        The choice of components has no gradient to the weights.

        Args:
            n: Number of rows, or their leading shape.
            component: The only component to draw from; None draws components by weight.
            generator: Source of randomness; None takes torch's global one on the CPU, as ``torch.manual_seed`` seeds
                it. One on the mixture's device spares moving the numbers there.

        Returns:
            Rows of shape ``(n, d)`` or ``(*n, d)`` in the mixture's dtype, and the component of each, int64.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of range.

        References:
            Kingma and Welling, Auto-encoding variational Bayes, 2014.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> rows, components = GaussianMixture(3, 2).to_parameters().rsample((4, 5))
            >>> rows.shape, components.shape, rows.requires_grad
            (torch.Size([4, 5, 2]), torch.Size([4, 5]), True)
        """
        shape = tuple(n) if isinstance(n, (tuple, list)) else (n,)
        for size in shape:
            checks.check_integer("n", size, minimum=0)
        if component is not None:
            checks.check_integer("component", component, minimum=0, maximum=self.n_components - 1)
        checks.check_generator("generator", generator)
        mixture = self.mixture()
        with full_precision(mixture.means.device):
            wide = mixture.to(accumulator_dtype(mixture.means.device))
            source = torch.default_generator if generator is None else generator
            rows, ids = sampling.draw(math.prod(shape), wide, self.covariance, component, None, source)
        return rows.to(mixture.means.dtype).reshape(*shape, self.n_features), ids.reshape(shape)

    def extra_repr(self) -> str:
        """Return what shapes the layer."""
        return f"{self.n_components}, {self.n_features}, {self._options['covariance_type']!r}"
