r"""The mathematics of EM as pure functions of tensors; they know no module and no state.

Notation: x is a row of d features, :math:`\mu_k` the mean of component k, P the factor of its precision
(:math:`\Sigma_k^{-1} = P_k P_k^\top`), :math:`\pi_k` its weight, :math:`r_{nk}` the responsibility of k for row n times
the row's weight, and :math:`n_k = \sum_n r_{nk}`. Log-densities are in nats.

The E-step comes in two forms with one result. `whitened_statistics` forms :math:`y = P_k^\top (x - \mu_k)` for every
component and sums about each component's own mean: as accurate as the dtype can be. `moment_statistics` writes the
mixture as an exponential family, with two matrix products in all: faster, and accurate where `conditioning` is
moderate. The M-step is `maximize`, from `tgmm_nn.maximization`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce

import torch
from torch import Tensor

from tgmm_nn.assignment import SOFT, Assignment, responsibilities, revivable
from tgmm_nn.covariance import Covariance
from tgmm_nn.maximization import estimate_covariances, maximize, scatter
from tgmm_nn.statistics import Parameters, Statistics, accumulator_dtype

__all__ = [
    "Parameters",
    "chunks",
    "conditioning",
    "distance",
    "estimate_covariances",
    "expectation",
    "log_density",
    "log_density_and_entropy",
    "log_joint",
    "log_weights",
    "map_rows",
    "maximize",
    "mixture_mean",
    "moment_statistics",
    "moment_width",
    "rows_per_chunk",
    "scatter",
    "squared_distances",
    "whitened_statistics",
]

LOG_2PI = math.log(2.0 * math.pi)


def mixture_mean(parameters: Parameters) -> Tensor:
    """Return the mean of the mixture, shape ``(d,)``: about it float32 products are safe far from zero."""
    return parameters.weights @ parameters.means


def log_weights(weights: Tensor) -> Tensor:
    """Return the logarithms of weights; that of 0 is −∞ and has no gradient, where its own would turn into nan."""
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
    rows, about, _ = _centre(x, parameters)
    return _log_joint_of_whitened(covariance.whiten(rows, about.means, about.factor), about, covariance).mT


def squared_distances(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return the squared Mahalanobis distances :math:`(x_n - \mu_k)^\top \Sigma_k^{-1} (x_n - \mu_k)`, ``(n, K)``."""
    rows, about, _ = _centre(x, parameters)
    return covariance.whiten(rows, about.means, about.factor).square().sum(-1).mT


def log_density(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return :math:`\log p(x_n) = \log \sum_k \pi_k N(x_n; \mu_k, \Sigma_k)`, shape ``(n,)``; −∞ at infinity.

    Differentiable, also twice. Oracle: ``torch.distributions.MixtureSameFamily``.
    """
    # inf - inf would give nan: a row at infinity, or whose square is there, is scored apart and has no gradient.
    rows, about, _ = _centre(x, parameters)
    near, usable = _mask_rows(rows)
    y = covariance.whiten(near, about.means, about.factor)
    value = _log_joint_of_whitened(y, about, covariance).logsumexp(0)
    return torch.where(usable, value, torch.where(torch.isnan(x).any(-1), torch.nan, -torch.inf))


def log_density_and_entropy(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return the log-density of each row and the entropy of its responsibilities, both in nats, shape ``(n, 2)``.

    .. math:: H(r_n) = -\sum_k r_{nk} \log r_{nk}, \qquad r_{nk} = p(k | x_n)
    """
    joint = log_joint(x, parameters, covariance)
    return torch.stack([joint.logsumexp(-1), torch.special.entr(joint.softmax(-1)).sum(-1)], -1)


def whitened_statistics(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    assignment: Assignment = SOFT,
) -> Statistics:
    r"""Sum what the M-step needs, about each component's own mean.

    With :math:`y_{nk} = P_k^\top (x_n - \mu_k)` the sums :math:`\sum_n r_{nk} y_{nk}` and
    :math:`\sum_n r_{nk} y_{nk} y_{nk}^\top` are of order one wherever the component is and however narrow; they are
    mapped back by :math:`P_k^{-\top}` in float64. Rows that are not finite (or so far away that their squared length is
    not) are left out, without reading a value on the host.

    Args:
        x: Rows, shape ``(n, d)``.
        parameters: Parameters of the E-step; centred in their own dtype, then used in that of ``x``.
        covariance: Structure of the covariances.
        sample_weight: Non-negative weight of each row, shape ``(n,)``; a row of weight 2 counts as two rows.
        log_prior: Log-prior of each row over components in nats, shape ``(n, K)``, added to the joint; −inf forbids a
            component, and a row for which all are forbidden counts as skipped.
        assignment: How a row is shared among components.

    Returns:
        Statistics about ``parameters.means``, totals in float64 (float32 where the device has no float64).

    References:
        Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM algorithm, 1977.
    """
    rows, about, origin = _centre(x, parameters)
    rows, usable = _mask_rows(rows)
    y = covariance.whiten(rows, about.means, about.factor)
    joint = _log_joint_of_whitened(y, about, covariance)
    r, log_likelihood, classification, usable = responsibilities(joint, usable, sample_weight, log_prior, assignment)
    # Where a component is so narrow, or so far, that |y|² overflows, 0 · inf would make its sums nan.
    bound = (torch.finfo(y.dtype).max / y.shape[-1]) ** 0.5
    y = y.clamp(-bound, bound).nan_to_num(0.0)
    wide = accumulator_dtype(x.device)
    root = covariance.root(about.factor.to(wide))
    return Statistics(
        count=r.sum(-1).to(wide),
        first=covariance.apply(root, torch.einsum("kn,knd->kd", r, y).to(wide)),
        second=covariance.congruence(root, covariance.whitened_second(y, r).to(wide)),
        log_likelihood=log_likelihood.to(wide),
        classification=classification.to(wide),
        rows=usable.sum().to(wide),
        skipped=(~usable).sum().to(wide),
        origin=origin.to(wide) + about.means.to(wide),
        covariance=covariance,
    )


def moment_statistics(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    assignment: Assignment = SOFT,
) -> Statistics:
    r"""Sum the same as `whitened_statistics`, about one reference point and by two matrix products.

    With :math:`\phi(x) = [1, \tilde x, [\tilde x \tilde x^\top]]` about the reference point o, and
    :math:`A_k = P_k P_k^\top`,

    .. math::
        \log \pi_k N(x_n; \mu_k, \Sigma_k) = \langle \phi(x_n), \theta_k \rangle, \qquad
        \theta_k = [\log \pi_k + \log |P_k| - \tfrac d2 \log 2\pi - \tfrac12 \tilde\mu_k^\top A_k \tilde\mu_k,\;
        A_k \tilde\mu_k,\; -\tfrac12 A_k],

    and the sums are :math:`\sum_n r_{nk} \phi(x_n)`. The relative error of a covariance is about `conditioning` times
    the dtype's epsilon.

    Args and returns are those of `whitened_statistics`, but for the reference point, the mixture's mean.
    """
    n_features = x.shape[-1]
    rows, about, origin = _centre(x, parameters)
    rows, usable = _mask_rows(rows)
    columns = rows.mT.contiguous()
    phi = torch.cat([torch.ones_like(columns[:1]), columns, covariance.features(columns)])
    joint = _natural_parameters(about, covariance) @ phi
    r, log_likelihood, classification, usable = responsibilities(joint, usable, sample_weight, log_prior, assignment)
    wide = accumulator_dtype(x.device)
    sums = (r @ phi.mT).to(wide)
    return Statistics(
        count=sums[:, 0],
        first=sums[:, 1 : 1 + n_features],
        second=covariance.pool(covariance.unpack(sums[:, 1 + n_features :], n_features)),
        log_likelihood=log_likelihood.to(wide),
        classification=classification.to(wide),
        rows=usable.sum().to(wide),
        skipped=(~usable).sum().to(wide),
        origin=origin,
        covariance=covariance,
    )


def expectation(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    *,
    assignment: Assignment = SOFT,
    moments: bool = False,
    chunk_size: int | None = None,
) -> Statistics:
    """E-step over any number of rows: the sums of chunks that fit the cache, merged.

    Args:
        x: Rows, shape ``(n, d)``.
        parameters: Parameters of the E-step, in any dtype.
        covariance: Structure of the covariances.
        sample_weight: Non-negative weight of each row, shape ``(n,)``.
        log_prior: Log-prior of each row over components, shape ``(n, K)``.
        assignment: How a row is shared among components.
        moments: Use `moment_statistics`, where `conditioning` allows it.
        chunk_size: Rows in a chunk; None chooses by the size of the arrays.
    """
    form = moment_statistics if moments else whitened_statistics
    if assignment.offset is not None:
        parameters = revivable(parameters)
    sums = partial(form, parameters=parameters, covariance=covariance, assignment=assignment)
    width = moment_width(parameters, covariance) if moments else parameters.means.numel()
    size = chunk_size or rows_per_chunk(width, x.element_size())
    parts = chunks(size, x, sample_weight, log_prior)
    return reduce(Statistics.merge, (sums(row, sample_weight=w, log_prior=p) for row, w, p in parts))


def moment_width(parameters: Parameters, covariance: Covariance) -> int:
    """Return how many numbers `moment_statistics` forms from a row; `whitened_statistics` forms K · d."""
    return 1 + parameters.means.shape[-1] + len(covariance.features(parameters.means[:1].mT))


def chunks(
    size: int, x: Tensor, sample_weight: Tensor | None, log_prior: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Give rows, their weights and their log-priors, ``size`` at a time."""
    if len(x) <= size:  # in one piece where the number of rows may be symbolic
        return iter([(x, sample_weight, log_prior)])
    rows = x.split(size)
    weights = [None] * len(rows) if sample_weight is None else sample_weight.split(size)
    priors = [None] * len(rows) if log_prior is None else log_prior.split(size)
    return zip(rows, weights, priors, strict=True)


def rows_per_chunk(width: int, element_size: int) -> int:
    """Return how many rows of ``width`` numbers stay below 4 MB, above which fresh arrays fault at each use."""
    return min(max(4_000_000 // (width * element_size), 256), 8192)


def map_rows(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Parameters, *, chunk_size: int | None = None
) -> Tensor:
    """Apply a function of rows ``(n, d)`` chunk by chunk; in one piece where the number of rows may be symbolic."""
    size = chunk_size or rows_per_chunk(parameters.means.numel(), x.element_size())
    if torch.compiler.is_compiling() or len(x) <= size:
        return function(x)
    return torch.cat([function(rows) for rows in x.split(size)])


def distance(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    """Return the Mahalanobis distance of one row per component, ``(K, d)``, from that component's mean, ``(K,)``."""
    away = x - parameters.means
    return (away * covariance.apply(covariance.square(parameters.factor), away)).sum(-1).clamp(min=0.0).sqrt()


def conditioning(scale: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    r"""Return the squared range of the data in standard deviations of its narrowest component.

    .. math:: b = \max_k s^\top |A_k| s, \qquad A_k = P_k P_k^\top

    The covariance error of `moment_statistics` is at most about b times the dtype's epsilon.

    Args:
        scale: Root mean square s of each feature about the reference point, shape ``(d,)``.
        parameters: Parameters of the E-step.
        covariance: Structure of the covariances.
    """
    precision = covariance.square(parameters.factor).abs()
    return (covariance.dual(precision, len(scale)) @ covariance.features(scale[:, None])).amax()


def _centre(x: Tensor, parameters: Parameters) -> tuple[Tensor, Parameters, Tensor]:
    """Return rows and parameters about the mixture's mean, in the dtype of the rows, and that mean.

    Far from zero a product of raw rows would cancel. The mean is rounded to the rows' dtype, so that their difference
    is exact, and the parameters are centred before they are rounded.
    """
    origin = mixture_mean(parameters).to(x.dtype)
    about = Parameters(parameters.weights, parameters.means - origin, parameters.factor)
    return x - origin, about.to(x.dtype), origin


def _log_joint_of_whitened(y: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor:
    n_features = y.shape[-1]
    normaliser = covariance.log_det(parameters.factor, n_features) - 0.5 * n_features * LOG_2PI
    constant = log_weights(parameters.weights) + normaliser
    return constant.unsqueeze(-1) - 0.5 * y.square().sum(-1)


def _natural_parameters(parameters: Parameters, covariance: Covariance) -> Tensor:
    """Return θ of `moment_statistics` for centred parameters, shape ``(K, 1 + d + F)``."""
    weights, means, factor = parameters
    n_components, n_features = means.shape
    precision = covariance.square(factor)
    linear = covariance.apply(precision, means)
    constant = (
        weights.log() + covariance.log_det(factor, n_features) - 0.5 * (n_features * LOG_2PI + (means * linear).sum(-1))
    )
    quadratic = covariance.dual(precision, n_features).expand(n_components, -1)
    return torch.cat([constant[:, None], linear, -0.5 * quadratic], -1)


def _mask_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Replace centred rows that are not finite, or whose squared length overflows, by zero; say which rows stay."""
    usable = torch.isfinite(rows.square().sum(-1))
    return torch.where(usable[:, None], rows, 0.0), usable
