"""Rows to fit on, in memory or streamed, as passes over batches of one form."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Diagonal
from tgmm_nn.maximization import scatter
from tgmm_nn.statistics import Statistics, accumulator_dtype, hard_statistics, wider_dtype

__all__ = ["Candidates", "Rows", "Survey", "is_stream", "survey", "untouched_generators"]

# Numbers that are looked at and widened at once where all rows lie in memory.
BATCH = 2**22

# Numbers that are hashed at once: larger arrays of them leave the cache.
HASHED = 2**16

Batch = tuple[Tensor, Tensor | None, Tensor | None]


def is_stream(x: Any) -> bool:
    """Return whether ``x`` gives batches of rows, as a ``DataLoader`` does, rather than being rows itself."""
    rows = isinstance(x, (Tensor, list, tuple, str, Mapping)) or hasattr(x, "__array__")
    return isinstance(x, Iterable) and not rows


class Rows:
    """Rows with their weights, on one device and in at least one dtype, as often as they are asked for.

    Args:
        x: Tensor, array or list of shape ``(..., d)``, or an iterable of batches such as a ``DataLoader``; of a batch
            that is a tuple or list the first element is taken.
        sample_weight: Weight of each row, shape ``(...)``. For a stream the index of the weights in its batches.
        n_features: Number of features d.
        like: Tensor whose device the rows are moved to, and whose dtype they are widened to.
        log_prior: Log-prior of each row over components, shape ``(n, K)``; not for a stream.
    """

    def __init__(
        self, x: Any, sample_weight: Any, n_features: int, like: Tensor, log_prior: Tensor | None = None
    ) -> None:
        self.n_features, self.like, self.streamed = n_features, like, is_stream(x)
        self.shape: tuple[int, ...] | None = None  # as it was given; a stream has none
        if self.streamed:
            if isinstance(x, Iterator):
                raise TypeError(
                    f"Expected `x` to be iterable more than once, but got {type(x).__name__}, which is used up by one "
                    "pass; give a DataLoader, a list of rows or a tensor."
                )
            if sample_weight is not None and not isinstance(sample_weight, int):
                raise TypeError(
                    f"Expected `sample_weight` to be the index of the weights in the batches of {type(x).__name__}, "
                    f"but got {type(sample_weight).__name__}; its rows may come in any order."
                )
            checks.check_integer("sample_weight", sample_weight, minimum=0, optional=True)
        else:
            x = checks.to_tensor("x", x, like.dtype).detach()
            checks.check_rows("x", x, n_features)
            sample_weight = checks.to_weights(sample_weight, x, like.dtype, like.device)
            self.shape = tuple(x.shape)
            x = x.reshape(-1, n_features).to(like.device)
        self.x, self.sample_weight, self.log_prior = x, sample_weight, log_prior

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """Make one pass: batches of rows ``(n, d)``, weights ``(n,)`` and log-priors; generators end as they began."""
        with untouched_generators(self.x) if self.streamed else nullcontext():
            yield self._streamed() if self.streamed else self._in_memory()

    @contextmanager
    def checked_batches(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Make one pass over rows of positive weight with their weights, and raise at one that is not finite.

        Raises:
            ValueError: If a row or weight is not finite, or a weight is negative.
        """
        with self.batches() as batches:
            yield (_checked(rows, weight) for rows, weight, _ in batches)

    def _in_memory(self) -> Iterator[Batch]:
        size = max(1, BATCH // self.n_features)
        parts = self.x.split(size)
        weights = [None] * len(parts) if self.sample_weight is None else self.sample_weight.split(size)
        priors = [None] * len(parts) if self.log_prior is None else self.log_prior.split(size)
        for rows, weight, log_prior in zip(parts, weights, priors, strict=True):
            yield self._widened(rows), weight, log_prior

    def _streamed(self) -> Iterator[Batch]:
        for batch in self.x:
            rows, weight = self._of_batch(batch)
            yield self._widened(rows.reshape(-1, self.n_features)), weight, None

    def _of_batch(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return the rows of a stream's batch, and their weights."""
        several = isinstance(batch, (tuple, list))
        if not (several and len(batch)) and not isinstance(batch, Tensor) and not hasattr(batch, "__array__"):
            raise TypeError(
                f"Expected the batches of `x` to be tensors, or tuples whose first element is one, but got "
                f"{type(batch).__name__}."
            )
        rows = checks.to_tensor("x", batch[0] if several else batch, self.like.dtype).detach()
        checks.check_rows("x", rows, self.n_features)
        if self.sample_weight is None:
            return rows, None
        if not several or len(batch) <= self.sample_weight:
            raise ValueError(
                f"Expected batches of `x` that hold weights at index sample_weight={self.sample_weight}, but got "
                f"{len(batch) if several else 'no'} elements."
            )
        return rows, checks.to_weights(batch[self.sample_weight], rows, self.like.dtype, self.like.device)

    def _widened(self, rows: Tensor) -> Tensor:
        return rows.to(self.like.device, wider_dtype(rows.dtype, self.like.dtype))


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
        n_rows: Number of rows of positive weight.
        mean: Mean of each feature, shape ``(d,)``.
        variance: Variance of each feature, shape ``(d,)``.
        dtype: Dtype of the rows as they are computed with.
        candidates: Rows from which EM may start.
    """

    n_rows: int
    mean: Tensor
    variance: Tensor
    dtype: torch.dtype
    candidates: Candidates

    def scale(self, origin: Tensor) -> Tensor:
        """Return the root mean square of each feature about a reference point, shape ``(d,)``."""
        return (self.variance + (self.mean - origin).square()).sqrt()


def survey(data: Rows, size: int, minimum: int) -> Survey:
    """Look at all rows once, and raise if they can't be fitted.

    Args:
        data: Rows of shape ``(n, d)``.
        size: Largest number of candidates to keep.
        minimum: Smallest number of rows of positive weight, ``n_components``.

    Raises:
        ValueError: If there are too few rows, or if rows or weights are not finite, too large or negative.
    """
    n_rows, sums, pending = 0, list[Statistics](), list[Candidates]()
    with data.checked_batches() as batches:
        for rows, weight in batches:
            if not len(rows):
                continue
            checks.check_squares("x", rows)
            n_rows += len(rows)
            labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            sums.append(hard_statistics(rows, labels, rows[:1], Diagonal(), weight))
            sums = [reduce(Statistics.merge, sums)]
            pending.append(Candidates(rows + 0.0, weight))  # minus zero is zero
            if sum(len(candidates.rows) for candidates in pending) > 2 * size:  # not each time: batches may be small
                pending = [Candidates.union(pending).smallest(size)]
    if n_rows < minimum:
        of_weight = "" if data.sample_weight is None else " of positive weight"
        raise ValueError(f"Expected `x` with at least n_components={minimum} rows{of_weight}, but got {n_rows}.")
    weight = sums[0].weight()
    mean = sums[0].origin[0].to(weight.dtype) + sums[0].first[0] / weight
    variance = scatter(sums[0], Diagonal())[0] / weight
    found = Candidates.union(pending).smallest(size).sorted()
    return Survey(n_rows, mean, variance.clamp(min=0.0), found.rows.dtype, found)


def _checked(rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows of positive weight and their weights, in the dtype of sums, or raise."""
    bad = int((~torch.isfinite(rows).all(-1)).sum())
    if bad:
        raise ValueError(
            f"Expected `x` to be finite, but {bad} of {len(rows)} rows hold nan or infinity; drop or impute them."
        )
    wide = accumulator_dtype(rows.device)
    if weight is None:
        return rows, torch.ones(len(rows), dtype=wide, device=rows.device)
    bad = int((~(torch.isfinite(weight) & (weight >= 0))).sum())
    if bad:
        raise ValueError(
            f"Expected `sample_weight` to be finite and at least 0, but {bad} of {len(weight)} are negative, nan or "
            "infinite; give such rows the weight 0 or drop them."
        )
    rows, weight = rows[weight > 0], weight[weight > 0]
    narrow = weight.to(rows.dtype)
    if not bool((narrow > 0).all() & torch.isfinite(narrow.sum())):
        raise ValueError(
            f"Expected `sample_weight` in the range of {rows.dtype}, but got {float(weight.min()):.3g} to "
            f"{float(weight.max()):.3g}; rescale them."
        )
    return rows, weight.to(wide)


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


@contextmanager
def untouched_generators(stream: Any) -> Iterator[None]:
    """Leave the global generators, and a loader's own, as they were.

    Iterating a ``DataLoader`` advances torch's, and augmentation may advance any. With the same state before each pass
    it also gives the same rows in each pass.
    """
    owners = (stream, getattr(stream, "sampler", None), getattr(stream, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    own = [(generator, generator.get_state()) for generator in found if isinstance(generator, torch.Generator)]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for generator, state in own:
                generator.set_state(state)
