r"""EM and densities of few rows on a CPU, where calling an operation takes longer than what it computes.

A call of torch takes some microseconds and one of NumPy a tenth of that, however few the numbers. So here NumPy
computes in the memory of the tensors, and torch makes the larger products, by the formulas of
`tgmm_nn.functional.log_density`, `tgmm_nn.expectation.moment_statistics` and `tgmm_nn.maximization.maximize`.

Which rows are few is a matter of shapes, and the E-step of them leaves out rows and shares as the general one does. Of
densities and M-steps the ordinary case alone is here: finite rows, components that all have rows, and covariances of
which none is nearly singular. In any other, a function says so before anything is changed, and the caller takes the
general form, which has an answer for all of them. Values are read to tell: on a CPU there is nothing to wait for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tgmm_nn.assignment import LEAST_SHARE
from tgmm_nn.covariance import Covariance
from tgmm_nn.functional import LOG_2PI
from tgmm_nn.maximization import TINY
from tgmm_nn.statistics import Parameters, Statistics, per_element

__all__ = ["Sums", "are_here", "expectation", "log_density", "maximize", "update"]

# Numbers up to which calls take longer than what they compute, in a density, an E-step and an M-step.
SCORED, SUMMED, ESTIMATED = 2**15, 2**17, 2**16

# Multiplications up to which a product is NumPy's: for more it starts threads, which slow those of torch.
MULTIPLIED = 2**17

# Where no feature of a centred row is larger, no squared length overflows float32.
FAR = 1e16

# A component of less weight may consist of shares that are none: see `tgmm_nn.assignment.LEAST_SHARE`.
RARE = 1e-15

# A variance over what is left of it, given features before, up to which no look at rounding is needed.
CLEAR = 1e9

LARGEST = float(np.finfo(np.float32).max)

# Buffers that an M-step writes, in the order of `_maximum`, and those that minibatch EM reads.
RUNNING = ("running_count", "running_first", "running_second", "running_origin")
WRITTEN = ("weights_", "means_", "factor_", *RUNNING, "running_step_size", "fitted")

# Of NumPy. A structure of covariances takes them where the operators that tensors have as well are enough.
Array = Any

array, tensor = Tensor.numpy, torch.from_numpy


def log_density(x: Tensor, parameters: Parameters, covariance: Covariance) -> Tensor | None:
    r"""Return :math:`\log p(x_n)` of rows ``(n, d)``, shape ``(n,)``; or None."""
    if not (are_here(x, *parameters) and x.dtype == torch.float32):  # first of all: sizes may be symbolic
        return None
    if not 0 < len(x) * max(parameters.means.shape) <= SCORED:
        return None
    form = _joint_by_moments if covariance.is_narrow(x.shape[1]) else _joint_by_whitening
    with np.errstate(all="ignore"):
        joint = form(array(x, force=True), [array(p) for p in parameters], covariance)
        if joint is None:
            return None
        largest = _exponential(joint)
        value = largest + np.log(joint.sum(0))
        return tensor(value.astype(np.float32)) if math.isfinite(value.sum()) else None


class Sums(NamedTuple):
    """Sums of rows: `tgmm_nn.statistics.Statistics` in arrays.

    Attributes:
        count: Shape ``(K,)``.
        first: Shape ``(K, d)``.
        second: Elements.
        origin: Shape ``(d,)`` or ``(K, d)``.
        totals: Log-likelihood, that of the classification, rows, and skipped rows, shape ``(4,)``.
    """

    count: Array
    first: Array
    second: Array
    origin: Array
    totals: Array

    @classmethod
    def of(cls, statistics: Statistics) -> Sums | None:
        """Return the same sums, in the same memory but for the totals; or None."""
        count, first, second, *totals, origin, _ = statistics
        if second.numel() > ESTIMATED or not are_here(count, first, second, *totals, origin):
            return None
        if not count.dtype == first.dtype == second.dtype == torch.float64:
            return None
        return cls(array(count), array(first), array(second), array(origin), np.array([t.item() for t in totals]))

    def merge(self, other: Sums, gamma: float, covariance: Covariance) -> Sums:
        r"""Return these and :math:`\gamma` times other sums, about this one's reference point and with its totals."""
        delta = other.origin - self.origin
        first = other.first + other.count[:, None] * delta
        shift = covariance.outer(first, delta) + covariance.outer(delta, other.first)
        second = self.second + gamma * (other.second + covariance.pool(shift))
        return Sums(self.count + gamma * other.count, self.first + gamma * first, second, self.origin, self.totals)

    def statistics(self, covariance: Covariance) -> Statistics:
        """Return the same sums, in the same memory."""
        log_likelihood, classification, rows, skipped = tensor(self.totals).unbind()
        totals = (log_likelihood, classification, rows, skipped)
        sums = (tensor(self.count), tensor(self.first), tensor(self.second))
        return Statistics(*sums, *totals, tensor(self.origin), covariance)


def expectation(x: Tensor, parameters: Parameters, covariance: Covariance) -> Sums | None:
    """Make the E-step of rows ``(n, d)``, with soft shares and about the mixture's mean; or None, by shape and kind."""
    if not (are_here(x, *parameters) and x.dtype == torch.float32):
        return None
    (n, d), n_components, form = x.shape, len(parameters.means), covariance.of_few()
    # Of fewer rows it is likely that a component has none, for which the M-step is the general one.
    if not (4 * n_components <= n and n * max(n_components, form.n_monomials(d)) <= SUMMED):
        return None
    with np.errstate(all="ignore"):
        family, theta, monomials = _natural(array(x, force=True), [array(p) for p in parameters], form)
        columns, products = monomials[1 : 1 + d], monomials[1 + d :]
        usable = _masked(columns)
        if not form.tied:
            form.features_of_few(columns, products)
        shares, largest, log_total = _shares(_product(theta, monomials), usable)
        sums = _product(shares, monomials.T)
        if not sums[:, 0].min() > RARE:
            shares *= shares > LEAST_SHARE
            sums = _product(shares, monomials.T)
        count, first = sums[:, 0], sums[:, 1 : 1 + d]
        second: Array = sums[:, 1 + d :]
        classification = largest.sum()
        log_likelihood = classification + log_total.sum()
        if form.tied:
            of_all = tensor(columns)
            second = array(covariance.whitened_second(of_all.mT[None], of_all.new_ones(1, n)))
            trace = 0.5 * covariance.inner(family.precision, second, d)[0]
            classification, log_likelihood = classification - trace, log_likelihood - trace
        else:
            second = form.unpack(second, d)
        n_usable = n if usable is None else usable.sum()
        totals = np.array([log_likelihood, classification, n_usable, n - n_usable], np.float64)
        return Sums(count, first, second, family.origin, totals)


def maximize(sums: Sums, buffers: Mapping[str, Any], covariance: Covariance, reg_covar: float) -> bool:
    """Make the M-step of `tgmm_nn.steps.MixtureSteps.maximize` in the memory of a layer's buffers, or return False."""
    written = [buffers[name] for name in WRITTEN]
    if not _are_writable(written):
        return False
    with np.errstate(all="ignore"):
        return _write(sums, written, covariance, reg_covar)


def update(
    batch: Sums, buffers: Mapping[str, Any], covariance: Covariance, reg_covar: float, step_size: float | None
) -> Tensor | None:
    """Make the update of `tgmm_nn.steps.MixtureSteps.update` in the memory of a layer's buffers.

    Args:
        batch: Sums of rows.
        buffers: Buffers by name.
        covariance: Structure of the covariances.
        reg_covar: Number added to the diagonal of each covariance.
        step_size: Share of the rows in the running sums, in (0, 1]; None is exact EM.

    Returns:
        The mean log-likelihood of the rows, or None.
    """
    written, counters = [buffers[name] for name in WRITTEN], [buffers["n_updates"], buffers["n_skipped"]]
    weight, skipped = batch.count.sum(), batch.totals[3]
    if not (weight > 0.0 and skipped >= 0.0 and _are_writable([*written, *counters])):
        return None
    sums, share = batch, array(buffers["running_step_size"])
    with np.errstate(all="ignore"):
        if step_size is not None:
            gamma = (share[0] or weight) * (1.0 / step_size - 1.0)
            count, first, second, origin = (array(buffers[name]) for name in RUNNING)
            sums = batch.merge(Sums(count, first, second, origin, batch.totals), gamma, covariance)
        if not _write(sums, written, covariance, reg_covar):
            return None
        share[0] = step_size or 1.0
        for counter, more in zip(counters, (1, int(skipped)), strict=True):
            array(counter)[0] += more
        torch.autograd.graph.increment_version(counters)
        return tensor(np.array(batch.totals[0] / weight, array(buffers["weights_"]).dtype))


def are_here(*tensors: Tensor) -> bool:
    """Return whether tensors are memory that NumPy can share, and nobody follows what becomes of them.

    Derivatives, compilers, tracers, transforms and modes that watch what is dispatched would miss what NumPy does.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return False
    here = all(type(t) is Tensor and t.is_cpu and not t.requires_grad for t in tensors)
    return here and not torch._C._len_torch_dispatch_stack() and forward_ad._current_level < 0


def _are_writable(buffers: Sequence[Tensor]) -> bool:
    """Return whether buffers `are_here`, and torch would write into them.

    It does not into inference tensors out of that mode, nor where a tensor overlaps itself.
    """
    ours = torch.is_inference_mode_enabled()
    return are_here(*buffers) and all(b.is_contiguous() and (ours or not b.is_inference()) for b in buffers)


class _Family:
    """A mixture as an exponential family about its mean: see `tgmm_nn.functional.natural_parameters`."""

    def __init__(self, parameters: Sequence[Array], covariance: Covariance) -> None:
        weights, means, factor = (p.astype(np.float64) for p in parameters)
        n_features = means.shape[1]
        self.origin = (weights @ means).astype(np.float32).astype(np.float64)
        self.precision, means = covariance.square(factor), means - self.origin
        self.linear = covariance.apply(self.precision, means)
        constant = _constant(weights, factor, n_features, covariance) - 0.5 * (means * self.linear).sum(-1)
        self.constant = constant[:, None]
        # Where it is the same for all components, it tells none apart.
        self.quadratic = () if covariance.tied else (-0.5 * covariance.dual(self.precision, n_features),)


def _natural(rows: Array, parameters: Sequence[Array], form: Covariance) -> tuple[_Family, Array, Array]:
    """Return a mixture, what makes a product with ``[1; x; [x xᵀ]]`` of rows the joint, and memory for these.

    The ones and the rows about the mean are there already, the products of features are not.
    """
    family, (n, d) = _Family(parameters, form), rows.shape
    width = form.n_monomials(d)
    space = _empty(width * (n + len(family.linear)))
    monomials, theta = space[: width * n].reshape(width, n), space[width * n :].reshape(-1, width)
    np.concatenate((family.constant, family.linear, *family.quadratic), 1, out=theta)
    monomials[0] = 1.0
    np.subtract(rows.T, family.origin[:, None], out=monomials[1 : 1 + d])
    return family, theta, monomials


def _joint_by_moments(rows: Array, parameters: Sequence[Array], covariance: Covariance) -> Array | None:
    d, form = rows.shape[1], covariance.of_few()
    _, theta, monomials = _natural(rows, parameters, form)
    columns, products = monomials[1 : 1 + d], monomials[1 + d :]
    if not np.abs(columns).max() < FAR:
        return None
    if not form.tied:
        form.features_of_few(columns, products)
        return _product(theta, monomials)
    # The term that all components share needs no product with each.
    factor, zero = parameters[2].astype(np.float64), np.zeros((1, d))
    y = form.whiten(tensor(columns.T), tensor(zero), tensor(factor))
    return _product(theta, monomials) - 0.5 * array(y.square().sum(-1))


def _joint_by_whitening(rows: Array, parameters: Sequence[Array], covariance: Covariance) -> Array | None:
    weights, means, factor = parameters
    origin = weights @ means
    rows = np.subtract(rows, origin, out=_empty(rows.size, np.float32).reshape(rows.shape))
    if not np.abs(rows).max() < FAR:
        return None
    shift = (origin - means)[:, None] @ factor
    y = torch.baddbmm(tensor(shift), tensor(rows).expand(len(means), -1, -1), tensor(factor))
    joint: Array = np.square(array(torch.linalg.vector_norm(y, dim=-1)))
    joint *= -0.5
    joint += _constant(weights, factor, rows.shape[1], covariance)[:, None]
    return joint


def _masked(columns: Array) -> Array | None:
    """Set columns to 0 that are not finite, or whose squared length is not in float32; return which are left, or None.

    None says that all are.
    """
    if np.abs(columns).max() < FAR:
        return None
    usable = np.linalg.norm(columns, axis=0) < 0.99 * LARGEST**0.5
    columns[:, ~usable] = 0.0
    return usable


def _constant(weights: Array, factor: Array, n_features: int, covariance: Covariance) -> Array:
    r"""Return :math:`\log \pi_k + \log |P_k| - \tfrac d2 \log 2 \pi`."""
    scales = covariance.variances(factor)
    return np.log(weights) + np.log(scales).sum(-1) * (n_features / scales.shape[-1]) - 0.5 * n_features * LOG_2PI


def _shares(joint: Array, usable: Array | None) -> tuple[Array, Array, Array]:
    """Return the shares of columns ``(K, n)``, their largest logarithms, and what these lack of the log-density.

    Where a column is not ``usable``, all of it is zero.
    """
    largest = _exponential(joint)
    total = joint.sum(0)
    joint /= total
    log_total = np.log(total)
    if usable is not None:
        for values in (joint, largest, log_total):
            np.multiply(values, usable, out=values)
    return joint, largest, log_total


def _exponential(joint: Array) -> Array:
    """Turn logarithms ``(K, n)`` into what they are of over each column's largest, in place, and return the largest."""
    largest = joint.max(0)
    joint -= largest
    np.exp(joint, out=joint)
    return largest


def _write(sums: Sums, written: Sequence[Tensor], covariance: Covariance, reg_covar: float) -> bool:
    """Write the M-step of sums into the buffers `WRITTEN`, or return False."""
    new = _maximum(sums, covariance, reg_covar)
    if new is None:
        return False
    for buffer, value in zip(written, new, strict=True):
        array(buffer)[...] = value
    # A backward pass that still needs the old values has to find out.
    torch.autograd.graph.increment_version(written)
    return True


def _maximum(sums: Sums, covariance: Covariance, reg_covar: float) -> tuple[Any, ...] | None:
    """Return what the M-step of sums makes of the buffers `WRITTEN`; or None."""
    count, first, second, origin, _ = sums
    total = count.sum()
    if not (count.min() > TINY and total < math.inf):
        return None
    shift = first / count[:, None]
    element = second - covariance.pool(covariance.outer(first, shift))
    element /= per_element(covariance.pool(count), element)
    diagonal = element if element.ndim < 3 else np.einsum("kii->ki", element)
    diagonal += reg_covar
    factor = _factor(element)
    if factor is None or not np.abs(factor).max() < LARGEST:
        return None
    if not (covariance.variances(factor) ** 2 * covariance.variances(element)).max() < CLEAR:
        return None
    return count / total, origin + shift, factor, count, first, second, origin, 1.0, 1


def _factor(element: Array) -> Array | None:
    """Return the factor P of the inverse of each covariance, or None."""
    if element.ndim < 3:  # variances
        return 1.0 / np.sqrt(element)
    lower, info = torch.linalg.cholesky_ex(tensor(element))
    if array(info).any():
        return None
    return array(torch.linalg.solve_triangular(lower, _identity(element.shape[-1]), upper=False).mT)


@cache
def _identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64, device="cpu")


def _empty(size: int, dtype: type[np.floating[Any]] = np.float64) -> Array:
    """Return memory that begins with a line of the cache: where else it did, MKL would round otherwise in each call."""
    item = np.dtype(dtype).itemsize
    space = np.empty(size + 64 // item, dtype)
    start = -space.__array_interface__["data"][0] % 64 // item
    return space[start : start + size]


def _product(a: Array, b: Array) -> Array:
    """Return ``a @ b``."""
    return a @ b if len(a) * b.size <= MULTIPLIED else array(torch.mm(tensor(a), tensor(b)))
