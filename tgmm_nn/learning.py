"""`MixtureEM`: a mixture that learns by EM to convergence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from tgmm_nn import functional
from tgmm_nn.data import Rows, Survey, is_stream, survey
from tgmm_nn.density import full_precision
from tgmm_nn.fitting import POLISH, Fit, Options, fit_from, progress, race, race_progress
from tgmm_nn.functional import Parameters
from tgmm_nn.initialization import Start, n_candidates, race_size
from tgmm_nn.maximization import EVERYTHING, Learned
from tgmm_nn.statistics import Statistics, statistics_of
from tgmm_nn.steps import MixtureSteps

__all__ = ["MixtureEM"]

Self = TypeVar("Self", bound="MixtureEM")


class MixtureEM(MixtureSteps):
    """Expectation-maximisation from starts that the rows give; `tgmm_nn.GaussianMixture` documents the options."""

    _start: Start

    @property
    def seed(self) -> int:
        """Seed of the mixture's own draws: ``random_state``, or torch's initial seed where that is None."""
        return torch.initial_seed() if self.random_state is None else self.random_state

    @torch.no_grad()
    def initialize(self: Self, x: Any, *, sample_weight: Any = None) -> Self:
        """Set a start for EM from the rows ``x``, by ``init_means``, ``init_weights`` and ``init_covariances``.

        Args:
            x: Finite rows, at least K of them, shape ``(n, d)``, or a stream of them; moved to the mixture's device.
            sample_weight: Non-negative weight of each row, shape ``(n,)``.

        Returns:
            The layer itself.

        Raises:
            TypeError: If an argument holds no real numbers.
            ValueError: If ``x`` has the wrong width, too few rows, or values that are not finite; nothing is changed
                then.
        """
        found = self._survey(self._data(x, sample_weight))
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
        self: Self, x: Any, *, sample_weight: Any = None, log_prior: Any = None, learned: Learned = EVERYTHING
    ) -> Self:
        """Run EM on ``x`` until the objective changes by less than ``tol``, or for ``max_iter`` M-steps.

        Of several starts (``n_init``) one is kept by a race. Where they are made by k-means, as many starts by
        k-means++ take part. EM runs from all of them at once on a sample of the distinct rows (20 K d of them, at least
        2,000 and at most 20,000 or 100 K; with a ``log_prior`` on all rows). After every three M-steps the half of
        poorer objective is dropped, and of starts that came to the same objective all but one. The one that is left
        runs on all rows, from where the race left it, and after convergence for up to ten more M-steps while the
        objective still changes by a hundredth of ``tol``. Of this last run tell ``history_``, ``n_iter_`` and
        ``converged_``. A race may drop the start that would have ended highest.

        Fits the rows that this process holds; `em_step` adds over ranks. The layer is written once, at the end. A
        stream is iterated once for the starts and once for each E-step on all rows, and gives the same mixture as its
        rows in memory.

        Args:
            x: Finite rows, at least K of them, shape ``(n, d)``, or a stream of them; moved to the mixture's device.
            sample_weight: Non-negative weight of each row, shape ``(n,)``; a row of weight 2 counts as two rows.
            log_prior: Log-prior of each row over components, shape ``(n, K)``, for rows in memory; see `statistics`.
            learned: What M-steps may move; the rest stays as the start has it.

        Returns:
            The layer itself.

        Raises:
            TypeError: If an argument holds no real numbers.
            ValueError: If ``x`` has the wrong width, too few rows, or values that are not finite, or if no start leads
                to a finite mixture; nothing is changed then.

        Warns:
            UserWarning: If ``max_iter`` M-steps did not converge, rows had to be left out, a covariance is singular, or
                the mixture's dtype rounds its means by a tenth of a standard deviation.
        """
        for doubt in self._fit(x, sample_weight, log_prior, learned):
            warnings.warn(doubt, stacklevel=2)
        return self

    def fit_predict(self, x: Any, *, sample_weight: Any = None) -> Tensor:
        """Fit the mixture and return the most probable component of each row, shape ``(n,)``; see `fit`."""
        if is_stream(x):
            raise TypeError(f"Expected `x` as rows, but got {type(x).__name__}; call fit, then predict batch by batch.")
        for doubt in self._fit(x, sample_weight):
            warnings.warn(doubt, stacklevel=2)
        return self.predict(x)

    # --------------------------------------------------------------------------------------------------- inside

    @torch.no_grad()
    def _fit(self, x: Any, sample_weight: Any, log_prior: Any = None, learned: Learned = EVERYTHING) -> list[str]:
        """Run EM, write the best mixture, and return what a user should know of it."""
        data, options = self._data(x, sample_weight, log_prior), self._em_options(learned)
        found = self._survey(data)
        warm = self.warm_start and self.fitted_
        n_starts = 1 if warm or isinstance(self._start.means, Tensor) else self.n_init
        number, start = 1, self._wide()
        if n_starts > 1:
            number, n_starts, start = self._race(data, found, options)
            # Starts may differ by less than the tolerance, so that the one that is kept is run beyond it.
            options = options._replace(polish=POLISH)
        elif not warm:
            start, _ = next(self._starts(found, 1, 1))
        reporter = progress(self.verbose, self.verbose_interval, self.max_iter, number, n_starts)
        with full_precision(self.means_.device), reporter as report:
            best = fit_from(start, data, found, options, report)
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
        if self.verbose and n_starts > 1:
            print(f"EM: kept start {number} of {n_starts}, objective {best.objective:.6f} nats per row")
        return list(self._doubts(best, options, found.dtype))

    def _race(self, data: Rows, found: Survey, options: Options) -> tuple[int, int, Parameters]:
        """Return which start is left by a race, of how many, and the parameters that it has come to."""
        field, seen = data, found
        if data.log_prior is None:  # which belongs to the rows one by one
            sample = found.candidates.smallest(race_size(self.n_components, self.n_features)).sorted()
            # Priors weigh in the race as they do on all rows, or on all candidates where these are a sample too.
            weights = sample.weights * (found.candidates.weights.sum() / sample.weights.sum())
            field = Rows(sample.rows, weights, self.n_features, self.means_)
            seen = found._replace(n_rows=len(sample.rows), candidates=sample)
        # K-means often ends in one partition, which need not lead to the best mixture: k-means++ has more variety.
        methods = ["kmeans", "kpp"] if self._start.means == "kmeans" else [self._start.means]
        starts = [start for method in methods for start, _ in self._starts(seen, self.n_init, 1, method)]
        with full_precision(self.means_.device), race_progress(self.verbose, len(starts)) as report:
            kept = race(starts, field, seen, options, report)
        return kept.number, len(starts), kept.parameters

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
        away = functional.distance(narrow, fit.parameters, self.covariance)
        if rounded := (away > 0.1).nonzero().flatten().tolist():
            yield (
                f"The means of {rounded} are rounded to {self.means_.dtype} by up to {float(away.max()):.2g} of their "
                "standard deviations: far from zero for their spread, or collapsed onto few rows. Make the mixture "
                "with dtype=torch.float64, centre the features, or raise `reg_covar`."
            )

    def _data(self, x: Any, sample_weight: Any, log_prior: Any = None) -> Rows:
        """Return training rows, or raise."""
        data = Rows(x, sample_weight, self.n_features, self.means_)
        if log_prior is not None:
            if data.shape is None:
                raise ValueError("Expected `log_prior` only with rows in memory, but got it with a stream.")
            data.log_prior = self._flat_log_prior(log_prior, data.shape[:-1], self.means_)
        if data.shape is not None and len(data.shape) != 2:
            raise ValueError(f"Expected `x` of shape (n, {self.n_features}), but got {data.shape}.")
        return data

    def _survey(self, data: Rows) -> Survey:
        with full_precision(self.means_.device):
            return survey(data, n_candidates(self.n_components), self.n_components)

    def _starts(
        self, found: Survey, n_starts: int, n_init: int, init_means: str | Tensor | None = None
    ) -> Iterator[tuple[Parameters, Statistics]]:
        """Give starts of EM, parameters and the sums of total weight one that they belong to."""
        choice = self._start if init_means is None else self._start._replace(means=init_means)
        # Covariances that are given are taken as they are.
        ridge = (self.reg_covar, self.reg_covar_relative) if self._start.is_estimated else (0.0, False)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(n_starts):
            with full_precision(self.means_.device):
                weights, means, elements = choice.mixture(
                    found.candidates, self.covariance, n_init, generator, self.n_components
                )
                # Equal weights here, since an M-step keeps neither mean nor covariance of one that weighs nothing.
                equal = torch.full_like(weights, 1.0 / len(weights))
                sums = statistics_of(equal, means, elements, self.covariance)
                start = functional.maximize(sums, self._fresh(), self.covariance, *ridge)
                sums = statistics_of(weights, means, elements, self.covariance)
            yield Parameters(weights, start.means, start.factor), sums
