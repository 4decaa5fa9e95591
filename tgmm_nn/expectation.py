r"""The E-step: the sums that an M-step needs, in three forms with one result.

`whitened_statistics` forms :math:`y = P_k^\top (x - \mu_k)` for every component and sums about each component's own
mean: as accurate as the dtype can be. `moment_statistics` writes the mixture as an exponential family, with two matrix
products in all: faster, and accurate where the dtype has digits for the squared range of the data (`moment_rounding`).
`blockwise_statistics` sums the same moments of rows with many features, whose products would be too many to write.
`expectation` takes one of them by a stated rule.

Notation is that of `tgmm_nn.functional`. Nothing here reads a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tgmm_nn.assignment import SOFT, Assignment, Shares, responsibilities, revivable
from tgmm_nn.covariance import Covariance
from tgmm_nn.forms import goes_by_blocks, has_few_moments, rows_of_blocks, rows_of_moments, rows_per_chunk
from tgmm_nn.functional import (
    chunks,
    joint_of_distances,
    mixture_mean,
    natural_parameters,
)
from tgmm_nn.monomials import Monomials, masked, row_lengths
from tgmm_nn.products import SUMMED, product, summed
from tgmm_nn.statistics import Parameters, Statistics, accumulator_dtype
from tgmm_nn.triangular import (
    second_moments,
    second_moments_of_each,
    symmetric,
    whitened_blocks,
    whitening,
)

__all__ = [
    "blockwise_statistics",
    "expectation",
    "expectations",
    "moment_statistics",
    "moment_statistics_of_each",
    "whitened_statistics",
]

Sums = tuple[Tensor, ...]

# Products n · d² of a batch up to which it is quicker to write all of them at once than to pick half of them.
SMALL = 2**18


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
    """Make an E-step over any number of rows.

    The form is chosen by shapes alone, but for ``moments``, where a caller who may look at values has done so:

    - untied full covariances of 128 features and more, or with ``moments`` where a row has too many of them to form:
      `blockwise_statistics`;
    - ``moments``: `moment_statistics` in the dtype of the rows;
    - else, for float32 rows whose moments are hardly more numbers than the row (`Covariance.is_narrow`: all families
      but the untied full one), or which have at most 32 features and fewer than there are components:
      `moment_statistics` in float64, whose digits are enough for what float32 rows can tell apart;
    - else, for float64 rows, and on devices without float64: `whitened_statistics`.

    Args:
        x: Rows, shape ``(n, d)``.
        parameters: Parameters of the E-step, in any dtype.
        covariance: Structure of the covariances.
        sample_weight: Non-negative weight of each row, shape ``(n,)``.
        log_prior: Log-prior of each row over components, shape ``(n, K)``.
        assignment: How a row is shared among components.
        moments: Whether `moment_rounding` allows moments in the dtype of the rows.
        chunk_size: Rows in a chunk; None chooses by the size of the arrays.

    Returns:
        Statistics about each component's own mean, or about the mixture's, totals in float64.
    """
    origin = mixture_mean(parameters).to(x.dtype)
    how: dict[str, Any] = {"assignment": assignment, "moments": moments, "chunk_size": chunk_size, "origin": origin}
    [sums] = expectations(x, [parameters], covariance, sample_weight, log_prior, **how)
    return sums


def expectations(
    x: Tensor,
    mixtures: Sequence[Parameters],
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    *,
    origin: Tensor,
    assignment: Assignment = SOFT,
    moments: bool = False,
    chunk_size: int | None = None,
) -> list[Statistics]:
    """Make E-steps of several mixtures of one size, which share what is formed of the rows where they go by moments.

    Arguments are those of `expectation`, but for ``mixtures``, the parameters of each, and ``origin``, the reference
    point of moments, shape ``(d,)``, in the dtype of the rows.
    """
    if assignment.offset is not None:
        mixtures = [revivable(parameters) for parameters in mixtures]
    wide, means, of_rows = accumulator_dtype(x.device), mixtures[0].means, (sample_weight, log_prior, assignment)
    how: dict[str, Any] = {"chunk_size": chunk_size}
    if goes_by_blocks(means, covariance, moments):
        how |= {"moments": moments, "origin": origin}
        return [blockwise_statistics(x, parameters, covariance, *of_rows, **how) for parameters in mixtures]
    if moments or (x.dtype != wide and has_few_moments(means, covariance)):
        how |= {"dtype": x.dtype if moments else wide, "origin": origin}
        return moment_statistics_of_each(x, mixtures, covariance, *of_rows, **how)
    return [whitened_statistics(x, parameters, covariance, *of_rows, **how) for parameters in mixtures]


def whitened_statistics(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    assignment: Assignment = SOFT,
    *,
    chunk_size: int | None = None,
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
        chunk_size: Rows in a chunk; None chooses by the size of the arrays.

    Returns:
        Statistics about ``parameters.means``, totals in float64 (float32 where the device has no float64).

    References:
        Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM algorithm, 1977.
    """
    wide, (n_components, n_features) = accumulator_dtype(x.device), parameters.means.shape
    origin = mixture_mean(parameters).to(x.dtype)
    about = parameters.about(origin).to(x.dtype)
    # Where a component is so narrow, or so far, that |y|² overflows, 0 · inf would make its sums nan.
    bound = (torch.finfo(x.dtype).max / n_features) ** 0.5

    def sums(rows: Tensor, weight: Tensor | None, prior: Tensor | None) -> Sums:
        y = covariance.whiten(rows - origin, about.means, about.factor)
        squared = torch.linalg.vector_norm(y, dim=-1).square()
        shares = responsibilities(joint_of_distances(squared, about, covariance), weight, prior, assignment)
        y.clamp_(-bound, bound).nan_to_num_(0.0)
        first = (shares.r.unsqueeze(1) @ y).squeeze(1)
        return (*_totals(shares, wide), shares.r.sum(-1), first, covariance.whitened_second(y, shares.r))

    size = chunk_size or rows_per_chunk(n_components * n_features, x.element_size())
    *totals, count, first, second = _sum_of_chunks(sums, chunks(size, x, sample_weight, log_prior), wide)
    first, second = covariance.unwhiten(about.factor.to(wide), first, second)
    return _statistics(len(x), totals, count, first, second, origin.to(wide) + about.means.to(wide), covariance)


def moment_statistics(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    assignment: Assignment = SOFT,
    *,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> Statistics:
    r"""Sum the same as `whitened_statistics`, about one reference point and by matrix products.

    With :math:`\phi(x) = [1, \tilde x, [\tilde x \tilde x^\top]]` about the reference point o, and
    :math:`A_k = P_k P_k^\top`,

    .. math::
        \log \pi_k N(x_n; \mu_k, \Sigma_k) = \langle \phi(x_n), \theta_k \rangle, \qquad
        \theta_k = [\log \pi_k + \log |P_k| - \tfrac d2 \log 2\pi - \tfrac12 \tilde\mu_k^\top A_k \tilde\mu_k,\;
        A_k \tilde\mu_k,\; -\tfrac12 A_k],

    and the sums are :math:`\sum_n r_{nk} \phi(x_n)`. Where A is tied, its term is the same for all components: it
    cancels in the responsibilities, and enters the likelihood only as the trace
    :math:`-\tfrac12 \mathrm{tr}(A \sum_n w_n \tilde x_n \tilde x_n^\top)`. `moment_rounding` tells how far sums in
    ``dtype`` move a covariance.

    Args:
        x: See `whitened_statistics`.
        parameters: See there.
        covariance: See there.
        sample_weight: See there.
        log_prior: See there.
        assignment: See there.
        dtype: What the products are formed in; None is the dtype of ``x``.
        chunk_size: See there.

    Returns:
        Statistics about the mixture's mean.

    References:
        Wainwright and Jordan, Graphical models, exponential families, and variational inference, 2008.
    """
    how: dict[str, Any] = {"origin": mixture_mean(parameters).to(x.dtype), "dtype": dtype, "chunk_size": chunk_size}
    of_rows = (sample_weight, log_prior, assignment)
    [sums] = moment_statistics_of_each(x, [parameters], covariance, *of_rows, **how)
    return sums


def moment_statistics_of_each(
    x: Tensor,
    mixtures: Sequence[Parameters],
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    assignment: Assignment = SOFT,
    *,
    origin: Tensor,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> list[Statistics]:
    """Return `moment_statistics` of several mixtures of one size, by the same two products for all of them.

    Arguments are those of `moment_statistics`, but for ``mixtures``, the parameters of each, and ``origin``.
    """
    wide, dtype, (n_components, n_features) = accumulator_dtype(x.device), dtype or x.dtype, mixtures[0].means.shape
    origin = origin.to(dtype)
    few = len(x) * n_features**2 <= SMALL
    form = covariance.whole() if few else covariance

    def coefficients(parameters: Parameters) -> Tensor:
        constant, linear, quadratic = natural_parameters(parameters, origin, form)
        return torch.cat([constant[:, None], linear, *([] if covariance.tied else [quadratic])], 1).to(dtype)

    theta = _joined([coefficients(parameters) for parameters in mixtures])
    monomials_of = Monomials(form, origin, once=few)

    def sums(rows: Tensor, weight: Tensor | None, prior: Tensor | None) -> Sums:
        monomials, usable = monomials_of(rows)
        joints = product(theta, monomials).split(n_components)
        each = [responsibilities(joint, weight, prior, assignment, usable) for joint in joints]
        totals = [(*_totals(shares, wide), *within(monomials[1:].mT, shares.weight)) for shares in each]
        return (summed(_joined([shares.r for shares in each]), monomials.mT), *chain.from_iterable(totals))

    def within(rows: Tensor, weight: Tensor) -> Sums:
        return (_within(rows, weight, covariance),) if covariance.tied else ()

    def statistics(parameters: Parameters, moments: Tensor, *totals: Tensor) -> Statistics:
        count, first, second = moments[:, 0], moments[:, 1 : 1 + n_features], moments[:, 1 + n_features :]
        if not covariance.tied:
            return _statistics(len(x), totals, count, first, form.unpack(second, n_features), origin, covariance)
        log_likelihood, classification, rows, second = totals
        precision = covariance.square(parameters.factor.to(wide))
        trace = -0.5 * covariance.inner(precision, second, n_features).squeeze(0)
        totals = (log_likelihood + trace, classification + trace, rows)
        return _statistics(len(x), totals, count, first, second, origin, covariance)

    size = chunk_size or rows_of_moments(_joined([parameters.means for parameters in mixtures]), covariance, dtype)
    moments, *totals = _sum_of_chunks(sums, chunks(size, x, sample_weight, log_prior), wide)
    width, of_each = len(totals) // len(mixtures), zip(mixtures, moments.split(n_components), strict=True)
    return [statistics(*one, *totals[i * width : (i + 1) * width]) for i, one in enumerate(of_each)]


def blockwise_statistics(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    assignment: Assignment = SOFT,
    *,
    moments: bool = False,
    chunk_size: int | None = None,
    origin: Tensor | None = None,
) -> Statistics:
    """Sum the same as `whitened_statistics` where components have full matrices, which are used block by block.

    All components whiten a block of features in one product, and no product is spent on empty halves. With ``moments``
    the second moments are those of the rows themselves: whitened rows are not kept, nothing has to be mapped back, and
    the error is that of `moment_statistics`.

    Args:
        x: See `whitened_statistics`.
        parameters: See there.
        covariance: See there.
        sample_weight: See there.
        log_prior: See there.
        assignment: See there.
        moments: Whether `moment_rounding` allows moments in the dtype of the rows.
        chunk_size: See there.
        origin: Reference point, shape ``(d,)``; None is the mixture's mean.

    Returns:
        Statistics about each component's own mean, or with ``moments`` about the reference point.
    """
    wide, (n_components, n_features) = accumulator_dtype(x.device), parameters.means.shape
    reference = (mixture_mean(parameters) if origin is None else origin).to(x.dtype)
    about = parameters.about(reference).to(x.dtype)
    maps = whitening(about.means, about.factor)
    size = chunk_size or rows_of_blocks(parameters.means, x.dtype, moments)
    space = x.new_empty(0 if moments else min(size, len(x)) * n_components * n_features)

    def sums(rows: Tensor, weight: Tensor | None, prior: Tensor | None) -> Sums:
        rows = rows - reference
        _, usable = row_lengths(rows, x.dtype)
        rows = masked(rows, usable)
        columns = torch.cat([rows.new_ones(1, len(rows)), rows.mT])
        lengths, place = rows.new_zeros(n_components, len(rows)), 0
        y = rows if moments else space[: n_components * rows.numel()].view(n_components, n_features, len(rows))
        for block in whitened_blocks(columns, maps):
            lengths.add_(block.square().sum(1))
            if not moments:  # where it overflows the share is 0, and 0 · inf would be nan
                y[:, place : place + block.shape[1]] = block.nan_to_num_()
            place += block.shape[1]
        shares = responsibilities(joint_of_distances(lengths, about, covariance), weight, prior, assignment, usable)
        first = shares.r @ rows if moments else (y @ shares.r[..., None]).squeeze(-1)
        second = second_moments(columns[1:], shares.r) if moments else second_moments_of_each(y, shares.r)
        return (*_totals(shares, wide), shares.r.sum(-1), first, *second)

    total = _sum_of_chunks(sums, chunks(size, x, sample_weight, log_prior), wide)
    totals, count, first, second = total[:3], total[3], total[4], symmetric(total[5:])
    if not moments:
        first, second = covariance.unwhiten(about.factor.to(wide), first, second)
        reference = reference.to(wide) + about.means.to(wide)
    return _statistics(len(x), totals, count, first, second, reference, covariance)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one, along their first axis; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _within(rows: Tensor, weight: Tensor, covariance: Covariance) -> Tensor:
    """Return the second moments of all rows, of which a tied covariance needs no others; in pieces as in `summed`."""
    whole = len(rows) // SUMMED * SUMMED if rows.dtype == torch.float32 else 0
    rest = covariance.whitened_second(rows[None, whole:], weight[None, whole:])
    if not whole:
        return rest
    pieces = (of_rows[:whole].unflatten(0, (-1, SUMMED)) for of_rows in (rows, weight))
    return rest + covariance.whitened_second(*pieces)


def _sum_of_chunks(
    sums: Callable[..., Sums], parts: Iterator[tuple[Tensor, Tensor | None, Tensor | None]], wide: torch.dtype
) -> Sums:
    """Return the total of what ``sums`` makes of each chunk, in the dtype of totals."""
    total = tuple(value.to(wide) for value in sums(*next(parts)))
    for part in parts:
        for value, more in zip(total, sums(*part), strict=True):
            value.add_(more)
    return total


def _totals(shares: Shares, wide: torch.dtype) -> Sums:
    """Return likelihood, that of the classification, and number of rows."""
    return (shares.log_likelihood, shares.classification, shares.usable.sum(dtype=wide))


def _statistics(
    n_rows: int,
    totals: Sequence[Tensor],
    count: Tensor,
    first: Tensor,
    second: Tensor,
    origin: Tensor,
    covariance: Covariance,
) -> Statistics:
    log_likelihood, classification, rows = totals
    skipped = n_rows - rows
    return Statistics(count, first, second, log_likelihood, classification, rows, skipped, origin, covariance)
