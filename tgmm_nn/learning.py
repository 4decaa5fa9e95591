"""`MixtureEM`: a mixture that learns by EM to convergence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tgmm_nn.data import Rows, is_stream
from tgmm_nn.density import full_precision
from tgmm_nn.distributed import (
    broadcast_from_rank_zero,
    check_same_on_all_ranks,
    is_distributed,
    is_rank_zero,
    on_all_ranks,
)
from tgmm_nn.fitting import Fit, Options, fit_from, progress
from tgmm_nn.functional import distance
from tgmm_nn.initialization import Start, n_candidates
from tgmm_nn.maximization import EVERYTHING, Learned, maximize
from tgmm_nn.racing import FINISH, race, race_progress
from tgmm_nn.statistics import Parameters, Statistics, statistics_of
from tgmm_nn.steps import MixtureSteps
from tgmm_nn.survey import Candidates, Found, Survey, look

__all__ = ["MixtureEM"]

# Options on which the messages that ranks exchange depend, or what each makes of them.
OF_A_RUN = ("n_init", "cem", "max_iter", "tol", "reg_covar", "reg_covar_relative")

Self = TypeVar("Self", bound="MixtureEM")


class MixtureEM(MixtureSteps):
    """Expectation-maximisation from starts that the rows give; `tgmm_nn.GaussianMixture` documents the options."""

    _start: Start

    @property
    def seed(self) -> int:
        """Seed of the mixture's own draws: ``random_state``, or torch's initial seed where that is None."""
        return torch.initial_seed() if self.random_state is None else self.random_state

    @torch.no_grad()
    def initialize(self: Self, x: Any, *, sample_weight: Any = None, sync: bool = True) -> Self:
        """Set a start for EM from the rows ``x``, by ``init_means``, ``init_weights`` and ``init_covariances``.

        Args:
            x: Finite rows, at least K of them, shape ``(n, d)``, or a stream of them; moved to the mixture's device.
            sample_weight: Non-negative weight of each row, shape ``(n,)``.
            sync: Whether the rows of all ranks are one data set, as in `fit`; then every rank has to call this.

        Returns:
            The layer itself.

        Raises:
            TypeError: If an argument holds no real numbers.
            ValueError: If ``x`` has the wrong width, too few rows, or values that are not finite; nothing is changed
                then.
            RuntimeError: If another rank failed; nothing is changed then.
        """
        _, found = self._survey(x, sample_weight, sync=sync)
        parameters, statistics = next(self._starts(found, 1, self.n_init))
        self._check_range(parameters, "`x`")
        self._write(parameters)
        self._begin(statistics)
        self.fitted.fill_(1)
        return self

    @torch.no_grad()
    def initialize_from(self: Self, statistics: Statistics, learned: Learned = EVERYTHING) -> Self:
        """Set a start for EM by the M-step of sums, such as those of rows whose components are known.

        Unlike after `maximize`, a first minibatch moves the mixture by its share only.

        Args:
            statistics: Sums of rows; priors weigh against their number.
            learned: What may move; the rest stays.

        Returns:
            The layer itself.

        Raises:
            TypeError: If ``statistics`` are no `Statistics`.
            ValueError: If they are of another covariance structure or size.
        """
        self.maximize(statistics, learned)
        self._begin(statistics.scale(1.0 / statistics.weight()))
        return self

    def fit(
        self: Self,
        x: Any,
        *,
        sample_weight: Any = None,
        log_prior: Any = None,
        learned: Learned = EVERYTHING,
        sync: bool = True,
    ) -> Self:
        """Run EM on ``x`` until the objective changes by less than ``tol``, or for ``max_iter`` M-steps.

        The layer is written once, at the end. A stream is iterated once for the start and once for each E-step, and
        gives the same mixture as its rows in memory; a thread reads its next batch while EM is at the last. A
        ``numpy.memmap`` is read batch by batch.

        Of several starts (``n_init``) one is kept by a race. Where they are made by k-means, as many starts by
        k-means++ take part. EM runs from all of them on a sample of at most max(20,000, 100 K) distinct rows, first on
        a quarter of it (with a ``log_prior`` on all rows); their E-steps share a pass over the rows and what is formed
        there. After every ten M-steps the half of poorer objective is dropped, and of starts that came to the same
        objective all but one; runs that converged wait. The one that is left goes on with all rows until a change of
        ``tol / 100``; of this run, which may make another ``max_iter`` M-steps, tell ``history_``, ``n_iter_`` and
        ``converged_``, whether it came to ``tol``. A race may drop the start that would have ended highest.

        In a ``torch.distributed`` world the rows of all ranks are one data set, and each rank ends with the mixture
        that one process would find: ranks exchange what the first pass found, the start is rank zero's, and the sums
        of each E-step are added. A rank may have few rows or none, also a stream without a batch, as long as all ranks
        together have K. What fails on one rank raises on all. Rank zero alone prints and warns.

        Args:
            x: Finite rows, at least K of them, shape ``(n, d)``, or a stream of them; moved to the mixture's device.
            sample_weight: Non-negative weight of each row, shape ``(n,)``; a row of weight 2 counts as two rows.
            log_prior: Log-prior of each row over components, shape ``(n, K)``, for rows in memory; see `statistics`.
            learned: What M-steps may move; the rest stays as the start has it.
            sync: Whether the rows of all ranks are one data set; then every rank has to call this, with the same
                options. False fits this rank's rows alone.

        Returns:
            The layer itself.

        Raises:
            TypeError: If an argument holds no real numbers.
            ValueError: If ``x`` has the wrong width, too few rows, or values that are not finite, or if no start leads
                to a finite mixture; nothing is changed then.
            RuntimeError: If another rank failed; nothing is changed then.

        Warns:
            UserWarning: If ``max_iter`` M-steps did not converge, rows had to be left out, a covariance is singular, or
                the mixture's dtype rounds its means by a tenth of a standard deviation.
        """
        for doubt in self._fit(x, sample_weight, log_prior, learned, sync=sync):
            warnings.warn(doubt, stacklevel=2)
        return self

    def fit_predict(self, x: Any, *, sample_weight: Any = None, sync: bool = True) -> Tensor:
        """Fit the mixture and return the most probable component of each row of this rank, ``(n,)``; see `fit`."""
        if is_stream(x):
            raise TypeError(f"Expected `x` as rows, but got {type(x).__name__}; call fit, then predict batch by batch.")
        for doubt in self._fit(x, sample_weight, sync=sync):
            warnings.warn(doubt, stacklevel=2)
        return self.predict(x)

    # --------------------------------------------------------------------------------------------------- inside

    @torch.no_grad()
    def _fit(
        self, x: Any, sample_weight: Any, log_prior: Any = None, learned: Learned = EVERYTHING, *, sync: bool = True
    ) -> list[str]:
        """Run EM, write the best mixture, and return what a user should know of it."""
        data, found = self._survey(x, sample_weight, log_prior, sync=sync)
        options, speaks = self._em_options(learned), is_rank_zero() or not found.shared
        warm = self._is_warm(found)
        n_starts = 1 if warm or isinstance(self._start.means, Tensor) else self.n_init
        if n_starts > 1:
            start = self._raced(data, found, options)
        elif warm:
            start = Parameters(*_of_rank_zero(self._wide(), found))
        else:
            start, _ = next(self._starts(found, 1, 1))
        reporter = progress(speaks and self.verbose, self.verbose_interval, self.max_iter)
        with full_precision(self.means_.device), reporter as report:
            goal = self.tol * (FINISH if n_starts > 1 else 1.0)
            best = fit_from(start, data, found, options, report, goal)
        if not math.isfinite(best.objective):
            raise ValueError(
                f"Expected `x` to lead EM to a finite mixture, but the objective ended as {best.history[-1]}; rescale "
                "the features, or raise `reg_covar`."
            )
        self._check_range(best.parameters, "`x`")
        self._write(best.parameters)
        self._begin(best.statistics.scale(1.0 / best.statistics.weight()))
        self.history_ = best.history
        for name, value in best.outcome.items():
            getattr(self, name).fill_(value)
        return list(self._doubts(best, options, found.dtype)) if speaks else []

    def _raced(self, data: Rows, found: Survey, options: Options) -> Parameters:
        """Return the parameters to which the best of ``n_init`` starts has come at the end of a race."""
        # K-means often ends in one partition, which need not lead to the best mixture: k-means++ has more variety.
        methods = ["kmeans", "kpp"] if self._start.means == "kmeans" else [self._start.means]
        # The first half drops out on few rows; a log-prior belongs to the rows one by one.
        few = found.candidates.smallest(n_candidates(self.n_components) // 4).sorted()
        fields = [data]
        if data.log_prior is None:
            samples = [found.candidates] if len(few.rows) == len(found.candidates.rows) else [few, found.candidates]
            fields = [self._as_all(sample, found) for sample in samples]
        seen = found._replace(candidates=few)
        starts = [start for method in methods for start, _ in self._starts(seen, self.n_init, 1, method)]
        left, speaks = dict(enumerate(starts, start=1)), is_rank_zero() or not found.shared
        with full_precision(self.means_.device), race_progress(speaks and self.verbose, len(starts)) as report:
            for field in fields:
                size = 1 if field is fields[-1] else (len(left) + 1) // 2
                left = {run.number: run.parameters for run in race(left, field, found, options, report, left=size)}
        [best] = left.values()
        return Parameters(*_of_rank_zero(best, found))

    def _as_all(self, sample: Candidates, found: Survey) -> Rows:
        """Return a sample as rows that weigh as much as all, since priors weigh against them."""
        weights = sample.weights * (found.weight / sample.weights.sum())
        return Rows(sample.rows, weights, self.n_features, self.means_)

    def _doubts(self, fit: Fit, options: Options, dtype: torch.dtype) -> Iterator[str]:
        """Say what a user should know of a fit of rows of a dtype: where it ended, and what was left out or rounded."""
        if not fit.converged:
            advice = "raise `max_iter` or `tol`" if fit.last_change > -self.tol else "it fell: raise `reg_covar`"
            yield (
                f"EM did not converge in max_iter={self.max_iter} iterations (last change of the objective: "
                f"{fit.last_change:.3g} nats per row, tol={self.tol:g}); {advice}."
            )
        if skipped := int(fit.statistics.skipped):
            yield (
                f"EM left out {skipped} rows, whose squared distance from the components overflows {dtype}; drop them, "
                "or give them in float64."
            )
        if singular := options.singular(fit.statistics, dtype):
            yield (
                f"The rows of {singular} (by component, 0 where all share one covariance) lie in a plane or on a "
                f"point to the precision of {dtype}: their covariance is singular, and was lifted on its diagonal or "
                "kept from before. Raise `reg_covar`, or set a `covariance_prior`."
            )
        narrow = fit.parameters.means.to(self.means_.dtype).to(fit.parameters.means)
        away = distance(narrow, fit.parameters, self.covariance)
        if rounded := (away > 0.1).nonzero().flatten().tolist():
            yield (
                f"The means of {rounded} are rounded to {self.means_.dtype} by up to {float(away.max()):.2g} of their "
                "standard deviations: far from zero for their spread, or collapsed onto few rows. Make the mixture "
                "with dtype=torch.float64, centre the features, or raise `reg_covar`."
            )

    def _data(self, x: Any, sample_weight: Any, log_prior: Any, shared: bool) -> Rows:
        """Return training rows, or raise."""
        data = Rows(x, sample_weight, self.n_features, self.means_, shared=shared)
        if log_prior is not None:
            if data.shape is None:
                raise ValueError("Expected `log_prior` only with rows in memory, but got it with a stream.")
            data.log_prior = self._flat_log_prior(log_prior, data.shape[:-1], self.means_)
        if data.shape is not None and len(data.shape) != 2:
            raise ValueError(f"Expected `x` of shape (n, {self.n_features}), but got {data.shape}.")
        return data

    def _survey(self, x: Any, sample_weight: Any, log_prior: Any = None, *, sync: bool) -> tuple[Rows, Survey]:
        """Return training rows and what a first pass finds in those of all ranks, or raise, on all ranks alike."""
        device, shared, size = self.means_.device, sync and is_distributed(), n_candidates(self.n_components)
        if shared:
            check_same_on_all_ranks({**self._shape(), **{name: getattr(self, name) for name in OF_A_RUN}})

        def of_this_rank() -> tuple[Rows, Found]:
            data = self._data(x, sample_weight, log_prior, shared)
            return data, look(data, size)

        with full_precision(device):
            data, found = on_all_ranks(of_this_rank, device, sync=sync)
            if shared:
                found = found.over_ranks(data, size)
            survey = found.survey(data, size, self.n_components)
        if shared:
            data.widen(survey.dtype)  # sums of ranks add up about one reference point, which is rounded to it
        return data, survey

    def _is_warm(self, found: Survey) -> bool:
        """Return whether EM goes on from the parameters as they are, as rank zero has it."""
        warm = torch.tensor([self.warm_start and self.fitted_], dtype=torch.int64, device=self.means_.device)
        return bool(_of_rank_zero([warm], found)[0])

    def _starts(
        self, found: Survey, n_starts: int, n_init: int, means: str | Tensor | None = None
    ) -> Iterator[tuple[Parameters, Statistics]]:
        """Give starts of EM, parameters and the sums of total weight one that they belong to.

        By ``init_means``, or by another choice of ``means``.
        """
        choice = self._start if means is None else self._start._replace(means=means)
        # Covariances that are given are taken as they are.
        ridge = (self.reg_covar, self.reg_covar_relative) if self._start.is_estimated else (0.0, False)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(n_starts):
            with full_precision(self.means_.device):
                weights, places, elements = self._draw(choice, found, n_init, generator)
                # Equal weights here, since an M-step keeps neither mean nor covariance of one that weighs nothing.
                equal = torch.full_like(weights, 1.0 / len(weights))
                sums = statistics_of(equal, places, elements, self.covariance)
                start = maximize(sums, self._fresh(), self.covariance, *ridge)
                sums = statistics_of(weights, places, elements, self.covariance)
            yield Parameters(weights, start.means, start.factor), sums

    def _draw(self, choice: Start, found: Survey, n_init: int, generator: torch.Generator) -> Sequence[Tensor]:
        """Return starting weights, means and covariances; on all ranks those that rank zero draws."""

        def draw() -> tuple[Tensor, Tensor, Tensor]:
            if found.shared and not is_rank_zero():
                fresh = self._fresh()
                return fresh.weights, fresh.means, fresh.factor  # of the shapes and the dtype that will arrive
            return choice.mixture(found.candidates, self.covariance, n_init, generator, self.n_components)

        return _of_rank_zero(on_all_ranks(draw, self.means_.device, sync=found.shared), found)


def _of_rank_zero(tensors: Sequence[Tensor], found: Survey) -> Sequence[Tensor]:
    """Return rank zero's tensors, on each rank that shares its rows; else these."""
    if not found.shared:
        return tensors
    copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    broadcast_from_rank_zero(copies)
    return copies
