"""Mixtures of some of the features: a Gaussian mixture is closed under marginals and conditionals."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Covariance
from tgmm_nn.functional import Parameters, log_joint

__all__ = ["check_dims", "conditional", "marginal"]


def check_dims(dims: Any, n_features: int) -> tuple[Tensor, Tensor]:
    """Return the features ``dims``, and the others in ascending order, as integers; or raise."""
    values = dims.tolist() if hasattr(dims, "tolist") else dims
    if not isinstance(values, (numbers.Real, Iterable)) or isinstance(values, str):
        raise TypeError(f"Expected `dims` to be an integer or several, but got {dims!r}.")
    values = list(values) if isinstance(values, Iterable) else [values]
    for value in values:
        checks.check_integer("dims", value, minimum=-n_features, maximum=n_features - 1)
    places = [int(value) % n_features for value in values]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"Expected `dims` to name at least one feature, and each once, but got {values}.")
    rest = [place for place in range(n_features) if place not in set(places)]
    return torch.tensor(places, device="cpu"), torch.tensor(rest, dtype=torch.int64, device="cpu")


def marginal(parameters: Parameters, covariance: Covariance, dims: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return weights, means and covariances of the features ``dims`` alone, integers of shape ``(m,)``.

    .. math:: p(x_a) = \sum_k \pi_k N(x_a; \mu_{k,a}, \Sigma_{k,aa})
    """
    elements = covariance.square(covariance.root(parameters.factor))
    return parameters.weights, parameters.means[:, dims], covariance.block(elements, dims)


def conditional(
    parameters: Parameters, covariance: Covariance, given: Tensor, values: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return weights, means and covariances of the features ``rest`` where those in ``given`` have ``values``.

    .. math::
        p(x_b | x_a = v) = \sum_k \pi'_k N(x_b; \mu_{k,b} + R_k (v - \mu_{k,a}), \Sigma_{k,bb} - R_k \Sigma_{k,ab}),
        \qquad R_k = \Sigma_{k,ba} \Sigma_{k,aa}^{-1}, \quad \pi'_k \propto \pi_k N(v; \mu_{k,a}, \Sigma_{k,aa}).

    Args:
        parameters: Parameters, best in float64.
        covariance: Structure of the covariances.
        given: Features that are known, integers of shape ``(m,)``.
        values: Their values, shape ``(m,)``.
        rest: The other features, integers of shape ``(d - m,)``.

    Raises:
        ValueError: If the density at ``values`` is zero in floating point, so that no component is more probable.
    """
    elements = covariance.square(covariance.root(parameters.factor))
    regression, of_rest = covariance.condition(elements, given, rest)
    away = values - parameters.means[:, given]
    means = parameters.means[:, rest] + (regression @ away.unsqueeze(-1)).squeeze(-1)
    weights, means_given, of_given = marginal(parameters, covariance, given)
    joint = log_joint(values[None], Parameters(weights, means_given, covariance.factor(of_given)[0]), covariance)
    if not bool(torch.isfinite(joint.amax())):
        raise ValueError("Expected `values` at which the mixture has a density, but they are too far from every mean.")
    return joint[0].softmax(-1), means, of_rest
