r"""Conjugate priors of a mixture, as pseudo-observations that are merged into the sums of the data.

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \qquad \mu_k | \Sigma_k \sim N(m_k, \Sigma_k / \kappa_k), \qquad
    \Sigma_k \sim \mathrm{InverseWishart}(\Psi_k, \nu_k),

each alone or together. The last is the inverse Wishart density restricted to the family, so that Ψ and ν mean the same
in all six; a tied family has one Ψ and one ν. A mean prior without one on covariances has a flat prior on Σ.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Covariance
from tgmm_nn.statistics import Statistics, accumulator_dtype

__all__ = ["NO_PRIORS", "Priors"]


class Priors(NamedTuple):
    r"""Priors in the shapes of the mixture; None where there is none.

    With the sums of the data, :math:`n_k`, :math:`\bar x_k` and the scatter :math:`S_k`, the posterior mode is

    .. math::
        \pi_k \propto \max(0, n_k + \alpha_k - 1), \qquad \mu_k = \frac{n_k \bar x_k + \kappa_k m_k}{n_k + \kappa_k},
        \qquad \Sigma_k = \frac{S_k + \frac{\kappa_k n_k}{\kappa_k + n_k}
        (\bar x_k - m_k)(\bar x_k - m_k)^\top + \Psi_k}{n_k + 1 + \nu_k + d + 1}

    (without the terms of a prior that is not there, the 1 being that of the mean prior). Its numerator is the scatter
    of the data together with :math:`\kappa_k` rows about :math:`m_k` whose scatter is :math:`\Psi_k`: see
    `observations`.

    Attributes:
        concentration: α, shape ``(K,)``.
        mean: m, shape ``(K, d)``.
        mean_precision: κ, how many rows the mean prior counts as, shape ``(K,)``.
        scale: Ψ as elements, leading axis K, or 1 when tied.
        degrees_of_freedom: ν, shape ``(K,)``, or ``(1,)`` when tied.

    References:
        Murphy, Machine Learning: A Probabilistic Perspective, 2012, section 11.4.2.8.
        Fraley and Raftery, Bayesian regularization for normal mixture estimation and model-based clustering, 2007.
    """

    concentration: Tensor | None = None
    mean: Tensor | None = None
    mean_precision: Tensor | None = None
    scale: Tensor | None = None
    degrees_of_freedom: Tensor | None = None

    @classmethod
    def from_options(
        cls,
        covariance: Covariance,
        n_components: int,
        n_features: int,
        *,
        weight_concentration_prior: Any = None,
        mean_prior: Any = None,
        mean_precision_prior: Any = None,
        covariance_prior: Any = None,
        degrees_of_freedom_prior: Any = None,
    ) -> Priors:
        """Check the priors that a user gave as tensors, arrays, lists or numbers, and broadcast them.

        Raises:
            TypeError: If one is no tensor, array, list or number.
            ValueError: If one has the wrong shape or range, or half of a prior is missing.
        """
        _check_pair("mean_prior", mean_prior, "mean_precision_prior", mean_precision_prior)
        _check_pair("covariance_prior", covariance_prior, "degrees_of_freedom_prior", degrees_of_freedom_prior)
        k, d, like = n_components, n_features, torch.zeros((), dtype=torch.float64, device="cpu")
        leading = covariance.leading(k)
        concentration = mean = mean_precision = scale = degrees_of_freedom = None
        if weight_concentration_prior is not None:
            concentration = _positive("weight_concentration_prior", weight_concentration_prior, k, like)
        if mean_prior is not None:
            mean = checks.check_array("mean_prior", mean_prior, like, (k, d), (d,), ()).expand(k, d).clone()
            mean_precision = _positive("mean_precision_prior", mean_precision_prior, k, like)
        if covariance_prior is not None:
            scale = covariance.given("covariance_prior", covariance_prior, k, d, like)
            degrees_of_freedom = _positive(
                "degrees_of_freedom_prior", degrees_of_freedom_prior, leading, like, above=d - 1
            )
        return cls(concentration, mean, mean_precision, scale, degrees_of_freedom)

    @property
    def exist(self) -> bool:
        """Whether there is any."""
        return any(prior is not None for prior in self)

    def to(self, device: torch.device) -> Priors:
        """Return the same priors on another device, in float64 where it has that."""
        wide = accumulator_dtype(device)
        return Priors(*(None if prior is None else prior.to(device, wide) for prior in self))

    def observations(self, like: Statistics) -> Statistics | None:
        r"""Return the sums of the pseudo-observations; None where neither means nor covariances have a prior.

        They are :math:`\kappa_k` rows whose mean is :math:`m_k` and whose scatter is :math:`\Psi_k`.
        """
        if self.mean is None and self.scale is None:
            return None
        return Statistics.of(
            count=torch.zeros_like(like.count) if self.mean_precision is None else self.mean_precision,
            first=torch.zeros_like(like.first),
            second=torch.zeros_like(like.second) if self.scale is None else self.scale,
            origin=like.origin if self.mean is None else self.mean,
            covariance=like.covariance,
        )

    def weights(self, count: Tensor) -> Tensor:
        r"""Return the unnormalised modes of the weights, :math:`\max(0, n_k + \alpha_k - 1)`, shape ``(K,)``."""
        return count if self.concentration is None else (count + self.concentration - 1.0).clamp(min=0.0)

    def degrees(self, count: Tensor, covariance: Covariance, n_features: int) -> Tensor:
        r"""Return what a scatter is divided by, :math:`n_k (+ 1) (+ \nu + d + 1)`, pooled when tied."""
        degrees = covariance.pool(count if self.mean is None else count + 1.0)
        if self.degrees_of_freedom is not None:
            degrees = degrees + self.degrees_of_freedom + n_features + 1.0
        return degrees

    def log_density(self, weights: Tensor, means: Tensor, factor: Tensor, covariance: Covariance) -> Tensor:
        r"""Return the log-density of the priors at a mixture, in nats, shape ``()``.

        A component of weight zero has left the Dirichlet term: with α < 1 that term grows without bound as a weight
        vanishes, and the objective falls at the step that empties a component. Oracles: ``torch.distributions`` and
        ``scipy.stats.invwishart``.

        Args:
            weights: Mixing weights, shape ``(K,)``.
            means: Means, shape ``(K, d)``.
            factor: Factor P of the precisions.
            covariance: Structure of the covariances.
        """
        n_features = means.shape[-1]
        log_det = covariance.log_det(factor, n_features)
        value = means.new_zeros(())
        if self.concentration is not None:
            alpha = self.concentration
            log_weights = torch.where(weights > 0, weights, 1.0).log()
            value = value + ((alpha - 1.0) * log_weights - torch.lgamma(alpha)).sum() + torch.lgamma(alpha.sum())
        if self.mean is not None and self.mean_precision is not None:
            away = means - self.mean
            distance = (away * covariance.apply(covariance.square(factor), away)).sum(-1)
            spread = 0.5 * n_features * (self.mean_precision / (2.0 * math.pi)).log()
            value = value + (spread + log_det - 0.5 * self.mean_precision * distance).sum()
        if self.scale is not None and self.degrees_of_freedom is not None:
            nu = self.degrees_of_freedom
            root, _ = covariance.factor(self.scale)
            constant = nu * covariance.log_det(root, n_features) + 0.5 * nu * n_features * math.log(2.0)
            trace = covariance.inner(self.scale, covariance.square(factor), n_features)
            kernel = (nu + n_features + 1.0) * log_det - 0.5 * trace
            value = value + (kernel - constant - torch.mvlgamma(0.5 * nu, n_features)).sum()
        return value


NO_PRIORS = Priors()


def _check_pair(name: str, value: Any, partner: str, of_partner: Any) -> None:
    """Raise if one half of a prior is given without the other."""
    if (value is None) != (of_partner is None):
        given, missing = (partner, name) if value is None else (name, partner)
        raise ValueError(
            f"Expected `{missing}` together with `{given}`, but got None; the two are one prior, so give both or none."
        )


def _positive(name: str, value: Any, size: int, like: Tensor, *, above: float = 0.0) -> Tensor:
    """Return one number, or one for each of ``size`` components, as a tensor, if all of them exceed ``above``."""
    numbers = checks.check_array(name, value, like, *dict.fromkeys([(), (size,)])).expand(size).clone()
    if not bool((numbers > above).all()):
        why = " (the number of features minus 1)" if above else ""
        raise ValueError(f"Expected `{name}` to be above {above:g}{why}, but got {float(numbers.min()):g}.")
    return numbers
