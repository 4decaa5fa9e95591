"""Where the classes of a classifier start: each from its own rows, as the options of its mixture say."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tgmm_nn.distributed import is_rank_zero, sum_over_ranks
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.statistics import Statistics

__all__ = ["UNLABELLED", "class_starts", "total_over"]

UNLABELLED = -1


def class_starts(
    mixture: GaussianMixture, n_classes: int, rows: Tensor, labels: Tensor, weight: Tensor | None, sync: bool
) -> Statistics:
    """Return the sums at which a mixture of classes starts; those of a class without rows are zero.

    Args:
        mixture: Mixture of which each class has an equal number of components.
        n_classes: Number of classes.
        rows: Rows on this rank, shape ``(n, d)``.
        labels: Their classes, −1 without one, shape ``(n,)``.
        weight: Their weights, shape ``(n,)``.
        sync: Whether the rows of all ranks are one data set; then every rank has to call this.

    Raises:
        ValueError: If no row has a label, or a class has rows but fewer than components.

    Warns:
        UserWarning: If a class has no rows.
    """
    m = mixture.n_components // n_classes
    counts = torch.bincount(labels - UNLABELLED, minlength=n_classes + 1)
    unlabelled, *numbers = total_over(counts, sync).tolist()
    for c, number in enumerate(numbers):
        if 0 < number < m:
            raise ValueError(
                f"Expected `y` with at least components_per_class={m} rows of class {c}, but got {number}."
            )
    if not any(numbers):
        raise ValueError(f"Expected `y` with labelled rows to start from, but got none among {unlabelled}.")
    absent, rest = [c for c, number in enumerate(numbers) if not number], unlabelled > 0
    if len(absent) > 1 and rest and not mixture.fitted_:
        raise ValueError(
            f"Expected `y` with labelled rows of all classes but one at least, but got none of {absent}: they "
            "would start alike, and share the unlabelled rows for ever."
        )
    parts = []
    for c, number in enumerate(numbers):
        own = labels == c
        of_rows = (rows[own], None if weight is None else weight[own])
        parts.append(_class_start(mixture, slice(c * m, (c + 1) * m), *of_rows, number, sync))
    count, first, second, origin = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if mixture.covariance.tied:
        second = second.sum(0, keepdim=True)
    if absent and (is_rank_zero() or not sync):
        then = "they start from their parameters as they are" if rest else "they keep their parameters"
        warnings.warn(f"No row of `y` belongs to the classes {absent}: {then}.", stacklevel=4)
    return Statistics.of(count, first, second, origin, mixture.covariance)


def _class_start(
    mixture: GaussianMixture, own: slice, rows: Tensor, weight: Tensor | None, number: int, sync: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return count, first and second moment and reference points of a class, at its start; zero without rows.

    Args:
        mixture: Mixture of all classes.
        own: The components of the class.
        rows: Its rows on this rank.
        weight: Their weights.
        number: How many rows it has in all.
        sync: Whether these are the rows of all ranks.
    """
    options = {**mixture.options(), "n_components": own.stop - own.start, "verbose": False}
    options |= dict.fromkeys((name for name in options if name.endswith("_prior")), None)
    total = rows.new_tensor(len(rows) if weight is None else float(weight.sum()), dtype=mixture.running_count.dtype)
    total = total_over(total, sync)
    if isinstance(options["init_means"], Tensor):
        options["init_means"] = options["init_means"][own]
    if isinstance(options["init_covariances"], Tensor) and not mixture.covariance.tied:
        options["init_covariances"] = options["init_covariances"][own]
    if isinstance(options["init_weights"], Tensor):
        options["init_weights"] = options["init_weights"][own] / options["init_weights"][own].sum()
    start = GaussianMixture(**options, device=mixture.means_.device, dtype=mixture.means_.dtype)
    if number:
        start.initialize(rows, sample_weight=weight, sync=sync)
    sums = start.running_statistics().scale(total)
    return sums.count, sums.first, sums.second, sums.origin.expand_as(sums.first)


def total_over(numbers: Tensor, sync: bool) -> Tensor:
    """Return the sum over ranks, where these are to be taken together."""
    return sum_over_ranks(numbers) if sync else numbers
