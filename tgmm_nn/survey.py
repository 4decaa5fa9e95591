"""What a first pass over rows finds, on this rank or on all: their number and spread, and rows to start from."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Diagonal
from tgmm_nn.data import Rows, checked
from tgmm_nn.distributed import rows_of_each_rank
from tgmm_nn.maximization import scatter
from tgmm_nn.statistics import Statistics, accumulator_dtype, hard_statistics

__all__ = ["Candidates", "Found", "Survey", "look"]

# Numbers that are hashed at once: larger arrays of them leave the cache.
HASHED = 2**16


class Candidates(NamedTuple):
    """Rows from which EM may start, and what each weighs.

    Up to ``size`` distinct rows are all kept. Of more, those are kept whose hash is smallest: a sample of the distinct
    rows that is uniform and does not depend on the order of rows, on how they are batched, or on how often they are
    repeated, with their exact total weights (a bottom-k sketch).

    Attributes:
        rows: Shape ``(m, d)``.
        weights: Shape ``(m,)``, in float64 where the device has it.

    References:
        Cohen and Kaplan, Summarizing data using bottom-k sketches, 2007.

    Example:
        >>> rows, weights = torch.tensor([[3.0], [1.0], [3.0]]), torch.tensor([1.0, 2.0, 1.0])
        >>> Candidates(rows, weights).smallest(size=10).sorted()
        Candidates(rows=tensor([[1.],
                [3.]]), weights=tensor([2., 2.]))
    """

    rows: Tensor
    weights: Tensor

    def smallest(self, size: int) -> Candidates:
        """Return the ``size`` distinct rows of smallest hash; those of a union are those of its parts' together."""
        hashes, which = _hashes(self.rows).unique(return_inverse=True)  # ascending
        places = torch.arange(len(which), device=which.device)
        first = torch.full_like(hashes, len(which)).scatter_reduce_(0, which, places, "amin")
        totals = self.weights.new_zeros(len(hashes)).index_add_(0, which, self.weights)
        return Candidates(self.rows[first[:size]], totals[:size])

    @classmethod
    def union(cls, parts: Iterable[Candidates]) -> Candidates:
        """Return the rows of all parts."""
        rows, weights = zip(*parts, strict=True)
        return cls(torch.cat(rows), torch.cat(weights))

    def sorted(self) -> Candidates:
        """Return them in ascending order, so that a seeded choice does not depend on how they arrived."""
        rows, which = self.rows.unique(dim=0, return_inverse=True)
        return Candidates(rows, self.weights.new_zeros(len(rows)).index_add_(0, which, self.weights))


class Survey(NamedTuple):
    """What a first pass finds in rows that can be fitted.

    Attributes:
        n_rows: Number of rows, those of weight zero among them: what each further pass has to give.
        mean: Mean of each feature, shape ``(d,)``.
        variance: Variance of each feature, shape ``(d,)``.
        dtype: Dtype of the rows as they are computed with.
        candidates: Rows from which EM may start.
        weight: Total weight of the rows.
        shared: Whether they are the rows of all ranks.
    """

    n_rows: int
    mean: Tensor
    variance: Tensor
    dtype: torch.dtype
    candidates: Candidates
    weight: Tensor
    shared: bool = False

    @property
    def origin(self) -> Tensor:
        """Reference point of the rows' moments, shape ``(d,)``: their mean, rounded to their dtype."""
        return self.mean.to(self.dtype)

    def scale(self, origin: Tensor) -> Tensor:
        """Return the root mean square of each feature about a reference point, shape ``(d,)``.

        Not below the rounding of the rows' dtype: also a constant feature is known no better.
        """
        scale = (self.variance + (self.mean - origin).square()).sqrt()
        largest = torch.maximum(origin.abs(), scale.amax())
        return torch.maximum(scale, torch.finfo(self.dtype).eps * largest)


class Found(NamedTuple):
    """What a pass found so far: parts that have yet to be merged, over batches or over ranks.

    Attributes:
        n_rows: Number of rows.
        n_weighty: Number of those of positive weight.
        sums: Sums of all features, as of one component.
        candidates: Rows from which EM may start.
    """

    n_rows: int
    n_weighty: int
    sums: list[Statistics]
    candidates: list[Candidates]

    def over_ranks(self, data: Rows, size: int) -> Found:
        """Return what all ranks found together, the same on each; every rank has to call this.

        The candidates are those of one process with all rows, where all rows have the same dtype.
        """
        wide = accumulator_dtype(data.like.device)
        merged = reduce(Statistics.merge, self.sums) if self.sums else None
        narrow = bool(self.candidates) and self.candidates[0].rows.dtype != torch.float64
        numbers = torch.tensor([[self.n_rows, self.n_weighty, bool(self.candidates), narrow]], device=data.like.device)
        n_rows, n_weighty, n_ranks, n_narrow = torch.cat(list(rows_of_each_rank(numbers))).sum(0).tolist()
        dtype = data.like.dtype if n_narrow == n_ranks else torch.float64
        every = [_sums_of(row) for part in rows_of_each_rank(_row_of(merged, data.none().to(wide))) for row in part]
        rows, weights = self._smallest(size) if self.candidates else (data.none(), data.none()[:, 0])
        kept = list[Candidates]()
        for part in rows_of_each_rank(torch.cat([rows.to(wide), weights.to(wide)[:, None]], -1)):
            kept = [Candidates.union([*kept, Candidates(part[:, :-1].to(dtype), part[:, -1])]).smallest(size)]
        return Found(n_rows, n_weighty, every, kept)

    def _smallest(self, size: int) -> Candidates:
        return Candidates.union(self.candidates).smallest(size)

    def survey(self, data: Rows, size: int, minimum: int) -> Survey:
        """Return a summary, or raise if there are too few rows.

        Args:
            data: The rows that were looked at.
            size: Largest number of candidates to keep.
            minimum: Smallest number of rows of positive weight, ``n_components``.

        Raises:
            ValueError: If there are fewer.
        """
        if self.n_weighty < minimum:
            of_weight = "" if data.sample_weight is None else " of positive weight"
            where = " over all ranks" if data.shared else ""
            raise ValueError(
                f"Expected `x` with at least n_components={minimum} rows{of_weight}{where}, but got {self.n_weighty}."
            )
        sums = reduce(Statistics.merge, self.sums)
        weight = sums.weight()
        mean = sums.origin[0].to(weight.dtype) + sums.first[0] / weight
        variance = (scatter(sums, Diagonal())[0] / weight).clamp(min=0.0)
        found = self._smallest(size).sorted()
        return Survey(self.n_rows, mean, variance, found.rows.dtype, found, weight, data.shared)


def look(data: Rows, size: int) -> Found:
    """Look at this rank's rows once.

    Args:
        data: Rows of shape ``(n, d)``.
        size: Largest number of candidates to keep.

    Raises:
        ValueError: If rows or weights are not finite, too large or negative, or rows are integers that float32 rounds.
    """
    n_rows, n_weighty, sums, pending = 0, 0, list[Statistics](), list[Candidates]()
    with data.batches() as batches:
        for batch, of_batch, _ in batches:
            n_rows += len(batch)
            rows, weight = checked(batch, of_batch)
            if not len(rows):
                continue
            checks.check_exact("x", data.given, rows)
            checks.check_squares("x", rows)
            n_weighty += len(rows)
            labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            sums.append(hard_statistics(rows, labels, rows[:1], Diagonal(), weight))
            sums = [reduce(Statistics.merge, sums)]
            pending.append(Candidates(rows + 0.0, weight))  # minus zero is zero
            if sum(len(candidates.rows) for candidates in pending) > 2 * size:  # not each time: batches may be small
                pending = [Candidates.union(pending).smallest(size)]
    return Found(n_rows, n_weighty, sums, pending)


def _row_of(sums: Statistics | None, none: Tensor) -> Tensor:
    """Return sums of one component as a row of numbers, the message that ranks exchange; no row without sums."""
    if sums is None:
        return none.new_empty(0, 3 * none.shape[1] + 1)
    return torch.cat([s.reshape(-1).to(none) for s in (sums.count, sums.first, sums.second, sums.origin)])[None]


def _sums_of(row: Tensor) -> Statistics:
    """Return the sums that a row of `_row_of` holds."""
    count, first, second, origin = row.split([1, *(len(row) // 3,) * 3])
    return Statistics.of(count, first[None], second[None], origin[None], Diagonal())


def _hashes(rows: Tensor) -> Tensor:
    """Return 64 well-mixed bits for each row, the same wherever it stands: a multilinear hash, then a finaliser."""
    generator = torch.Generator().manual_seed(0)
    factors = 2 * torch.randint(2**62, (rows.shape[-1],), generator=generator, device="cpu").to(rows.device) + 1
    size = max(1, HASHED // rows.shape[-1])
    return torch.cat([_hashes_of_few(few, factors) for few in rows.contiguous().split(size)])


def _hashes_of_few(rows: Tensor, factors: Tensor) -> Tensor:
    bits = rows.view(torch.int32 if rows.element_size() == 4 else torch.int64).to(torch.int64)
    for shift in (32, 16):  # the low bits of round numbers are zero, and a product moves bits only upwards
        bits = bits ^ (bits >> shift)
    mixed = (bits * factors).sum(-1)
    for shift in (31, 29):
        mixed = (mixed ^ (mixed >> shift)) * 0x2545F4914F6CDD1D
    return mixed ^ (mixed >> 32)
