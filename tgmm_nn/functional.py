r"""The mathematics of EM as pure functions of tensors; they know no module and no state.

Notation: x is a row of d features, :math:`\mu_k` the mean of component k, P the factor of its precision
(:math:`\Sigma_k^{-1} = P_k P_k^\top`), :math:`\pi_k` its weight, :math:`r_{nk}` the responsibility of k for row n times
the row's weight, and :math:`n_k = \sum_n r_{nk}`. Log-densities are in nats.

The density comes in two forms with one result. Where features mix within each component, rows are whitened by every
component's factor. Where float32 rows have hardly more moments than numbers (`Covariance.is_narrow`), the mixture is an
exponential family whose products are formed in float64: faster than K · d differences for each row, and with digits
enough for what float32 rows can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tgmm_nn.covariance import Covariance
from tgmm_nn.forms import goes_by_blocks, rows_of_moments, rows_of_triangles, rows_per_chunk
from tgmm_nn.monomials import masked, row_lengths
from tgmm_nn.products import may_derive
from tgmm_nn.statistics import Parameters, accumulator_dtype
from tgmm_nn.triangular import whitened_blocks, whitening

__all__ = [
    "Parameters",
    "chunks",
    "distance",
    "joint_of_distances",
    "log_density",
    "log_density_and_entropy",
    "log_joint",
    "log_weights",
    "map_rows",
    "mixture_mean",
    "natural_parameters",
    "rows_of_densities",
    "squared_distances",
]

LOG_2PI = math.log(2.0 * math.pi)


def mixture_mean(parameters: Parameters) -> Tensor:
    """Return the mean of the mixture, shape ``(d,)``: about it float32 products are safe far from zero."""
    return parameters.means.mT @ parameters.weights


def log_weights(weights: Tensor) -> Tensor:
    """Return the logarithms of weights; that of 0 is −∞ and has no gradient, where its own would turn into nan."""
    if not may_derive(weights):
        return weights.log()
    positive = weights > 0
    return torch.where(positive, torch.where(positive, weights, 1.0).log(), -torch.inf)


def log_joint(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return the log of each weighted component density.

    .. math::
        \log \pi_k + \log N(x_n; \mu_k, \Sigma_k)
        = \log \pi_k + \log |P_k| - \tfrac12 |P_k^\top (x_n - \mu_k)|^2 - \tfrac d2 \log 2\pi

    Args:
        x: Rows, shape ``(n, d)``.
        parameters: Parameters in the dtype of ``x``.
        covariance: Structure of the covariances.

    Returns:
        Tensor of shape ``(n, K)``, in nats.

    Example:
        >>> from tgmm_nn.covariance import Spherical
        >>> one = Parameters(torch.ones(1), torch.zeros(1, 1), torch.ones(1))
        >>> log_joint(torch.zeros(1, 1), one, Spherical())
        tensor([[-0.9189]])
    """
    moments = _takes_moments(x, covariance)
    rows, origin = _centred(x, parameters, accumulator_dtype(x.device) if moments else x.dtype)
    return _joint(rows, parameters, origin, covariance, moments).to(x.dtype).mT


def squared_distances(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return the squared Mahalanobis distances :math:`(x_n - \mu_k)^\top \Sigma_k^{-1} (x_n - \mu_k)`, ``(n, K)``."""
    rows, origin = _centred(x, parameters, x.dtype)
    return _squared(rows, parameters.about(origin).to(x.dtype), covariance).mT


def log_density(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return :math:`\log p(x_n) = \log \sum_k \pi_k N(x_n; \mu_k, \Sigma_k)`, shape ``(n,)``; −∞ at infinity.

    Differentiable, also twice. Oracle: ``torch.distributions.MixtureSameFamily``.
    """
    # inf - inf would give nan: a row at infinity, or whose square is there, is scored apart and has no gradient.
    moments = _takes_moments(x, covariance)
    rows, origin = _centred(x, parameters, accumulator_dtype(x.device) if moments else x.dtype)
    length, usable = row_lengths(rows, x.dtype)
    if may_derive(x, *parameters):  # what such a row becomes is not used, but its gradient would be nan
        rows = masked(rows, usable)
    value = _log_sum(_joint(rows, parameters, origin, covariance, moments))
    return torch.where(usable, value, length * -math.inf).to(x.dtype)


def log_density_and_entropy(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return the log-density of each row and the entropy of its responsibilities, both in nats, shape ``(n, 2)``.

    .. math:: H(r_n) = -\sum_k r_{nk} \log r_{nk}, \qquad r_{nk} = p(k | x_n)
    """
    joint = log_joint(x, parameters, covariance)
    return torch.stack([joint.logsumexp(-1), torch.special.entr(joint.softmax(-1)).sum(-1)], -1)


def rows_of_densities(x: Tensor, means: Tensor, covariance: Covariance, *, whitened: bool = False) -> int:
    """Return for how many rows densities are formed at once, or what needs ``whitened`` rows in any case."""
    if _takes_moments(x, covariance) and not whitened:
        return rows_of_moments(means, covariance, accumulator_dtype(x.device))
    if goes_by_blocks(means, covariance, moments=False):
        return rows_of_triangles(means, x.dtype)
    return rows_per_chunk(means.numel(), x.element_size())


def map_rows(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Parameters, size: int) -> Tensor:
    """Apply a function of rows ``(n, d)``, ``size`` at a time; in one piece where their number may be symbolic.

    Where a gradient is recorded, what a chunk forms is not kept but formed again in the backward pass: memory stays
    that of the rows, the values and one chunk, whatever K is.
    """
    _keep_freed_memory(x)
    if torch.compiler.is_compiling() or len(x) <= size:
        return function(x)
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    if recorded and not torch._C._are_functorch_transforms_active():  # which know no checkpoints
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([function(rows) for rows in x.split(size)])


def distance(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    """Return the Mahalanobis distance of one row per component, ``(K, d)``, from that component's mean, ``(K,)``."""
    away = x - parameters.means
    return (away * covariance.apply(covariance.square(parameters.factor), away)).sum(-1).clamp(min=0.0).sqrt()


def chunks(
    size: int, x: Tensor, sample_weight: Tensor | None, log_prior: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Give rows, their weights and their log-priors, ``size`` at a time."""
    _keep_freed_memory(x)
    if len(x) <= size:  # in one piece where the number of rows may be symbolic
        return iter([(x, sample_weight, log_prior)])
    rows = x.split(size)
    weights = [None] * len(rows) if sample_weight is None else sample_weight.split(size)
    priors = [None] * len(rows) if log_prior is None else log_prior.split(size)
    return zip(rows, weights, priors, strict=True)


def _keep_freed_memory(x: Tensor) -> None:
    """Have the allocator keep what a chunk or a call frees for the next one; nothing of it is compiled."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _raise_threshold()


@cache
def _raise_threshold() -> None:
    """Have glibc keep freed arrays of up to 32 MB, once for the process.

    It gives large arrays back to the system, and their pages fault at each use: half of the time of an E-step. Which
    are large follows the largest that was freed so far: here one that is never touched.
    """
    np.empty(2**25 - 2**16, np.uint8)


def _takes_moments(x: Tensor, covariance: Covariance) -> bool:
    """Return whether products in the wider dtype of totals take the place of whitening, by shapes and dtypes."""
    return covariance.is_narrow(x.shape[-1]) and x.dtype != accumulator_dtype(x.device)


def _centred(x: Tensor, parameters: Parameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows about the mixture's mean, and that point, in a dtype that is no narrower than theirs.

    Far from zero a product of raw rows would cancel. The point is rounded to the dtype in which it is subtracted.
    """
    origin = mixture_mean(parameters).to(dtype)
    return x - origin, origin


def joint_of_distances(squared: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    """Return the log of each weighted component density, for squared Mahalanobis distances ``(K, n)``."""
    n_features = parameters.means.shape[-1]
    constant = log_weights(parameters.weights) + covariance.log_det(parameters.factor, n_features)
    return torch.sub((constant - 0.5 * n_features * LOG_2PI).unsqueeze(-1), squared, alpha=0.5)


def natural_parameters(parameters: Parameters, origin: Tensor, covariance: Covariance) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the mixture as an exponential family about a reference point o, computed in the dtype of totals.

    .. math::
        \log \pi_k + \log |P_k| - \tfrac d2 \log 2\pi - \tfrac12 \tilde\mu_k^\top A_k \tilde\mu_k, \qquad
        A_k \tilde\mu_k, \qquad -\tfrac12 A_k, \qquad A_k = P_k P_k^\top, \quad \tilde\mu_k = \mu_k - o

    Returns:
        Shapes ``(K,)``, ``(K, d)``, and ``(K, F)``, or ``(1, F)`` when tied, as `Covariance.dual` has it.
    """
    wide, n_features = accumulator_dtype(origin.device), origin.shape[-1]
    means, factor = parameters.means - origin.to(wide), parameters.factor.to(wide)
    precision = covariance.square(factor)
    linear = covariance.apply(precision, means)
    constant = log_weights(parameters.weights.to(wide)) + covariance.log_det(factor, n_features)
    constant = torch.sub(constant - 0.5 * n_features * LOG_2PI, (means * linear).sum(-1), alpha=0.5)
    return constant, linear, -0.5 * covariance.dual(precision, n_features)


def _squared(rows: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    """Return the squared Mahalanobis distance of each row from each component, shape ``(K, n)``."""
    means, factor = parameters.means, parameters.factor
    if not goes_by_blocks(means, covariance, moments=False):
        return covariance.whiten(rows, means, factor).square().sum(-1)
    columns = torch.cat([torch.ones_like(rows.mT[:1]), rows.mT])  # the length of rows may be symbolic
    lengths = [block.square().sum(1) for block in whitened_blocks(columns, whitening(means, factor))]
    return torch.stack(lengths).sum(0)


def _joint(rows: Tensor, parameters: Parameters, origin: Tensor, covariance: Covariance, moments: bool) -> Tensor:
    """Return the log of each weighted component density, shape ``(K, n)``, for rows about a reference point."""
    if not moments:  # parameters are centred before they are rounded
        about = parameters.about(origin).to(rows.dtype)
        return joint_of_distances(_squared(rows, about, covariance), about, covariance)
    constant, linear, quadratic = natural_parameters(parameters, origin, covariance)
    joint = torch.addmm(constant[:, None], linear, rows.mT)
    if covariance.tied:  # the term that all components share needs no product with each
        y = covariance.whiten(rows, torch.zeros_like(linear[:1]), parameters.factor.to(rows.dtype))
        return joint - 0.5 * y.square().sum(-1)
    return torch.addmm(joint, quadratic, covariance.features(rows.mT))


def _log_sum(joint: Tensor) -> Tensor:
    """Return ``joint.logsumexp(0)``, which takes many times as long where components are far apart, on a CPU."""
    largest, best = joint.max(0, keepdim=True)  # of others the difference would carry the rounding of their own size
    above = largest - joint.log_softmax(0).gather(0, best)
    return torch.where(largest > -math.inf, above, largest).squeeze(0)
