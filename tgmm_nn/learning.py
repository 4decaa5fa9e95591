"""`MixtureEM`: a mixture that learns by EM: to convergence, by exact updates or on minibatches, without gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tgmm_nn import checks, functional
from tgmm_nn.data import Rows, Survey, is_stream, survey
from tgmm_nn.density import full_precision
from tgmm_nn.distributed import is_distributed, sum_over_ranks
from tgmm_nn.fitting import Fit, Options, fit_from, progress, sum_over
from tgmm_nn.functional import Parameters
from tgmm_nn.initialization import Start, n_candidates
from tgmm_nn.state import MixtureState
from tgmm_nn.statistics import Statistics, statistics_of

__all__ = ["MixtureEM"]

Self = TypeVar("Self", bound="MixtureEM")


def option(name: str, check: Callable[[str, Any], None]) -> Any:
    """Return a property whose values are checked when they are set, and kept as Python's own numbers."""

    def write(self: nn.Module, value: Any) -> None:
        check(name, value)
        setattr(self, f"_{name}", value.item() if isinstance(value, np.generic) else value)

    return property(lambda self: getattr(self, f"_{name}"), write)


def check_verbose(name: str, value: Any) -> None:
    """Raise unless ``value`` is True, False or ``"bar"``."""
    if value != "bar":
        checks.check_bool(name, value, alternative="'bar'")


class MixtureEM(MixtureState):
    """Expectation-maximisation on the buffers; `tgmm_nn.GaussianMixture` documents the options."""

    n_init = option("n_init", checks.check_integer)
    max_iter = option("max_iter", checks.check_integer)
    tol = option("tol", checks.check_number)
    reg_covar = option("reg_covar", checks.check_number)
    reg_covar_relative = option("reg_covar_relative", checks.check_bool)
    cem = option("cem", checks.check_bool)
    warm_start = option("warm_start", checks.check_bool)
    verbose = option("verbose", check_verbose)
    verbose_interval = option("verbose_interval", checks.check_integer)
    chunk_size = option("chunk_size", partial(checks.check_integer, optional=True))
    random_state = option("random_state", partial(checks.check_integer, minimum=0, maximum=2**63 - 1, optional=True))

    _start: Start

    @torch.no_grad()
    def statistics(self, x: Any, sample_weight: Any = None, log_prior: Any = None) -> Statistics:
        """Return the sums that an M-step needs (the E-step), of this rank's rows alone.

        Rows that are not finite, or whose weight is negative or not finite, are left out and counted.

        Args:
            x: Rows, shape ``(..., d)``, or a stream of them.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            log_prior: Log-prior of each row over components in nats, shape ``(..., K)``, added to the joint: labels,
                masks or links. −inf forbids a component; a row for which all are forbidden is left out.

        Raises:
            TypeError: If an argument holds no real numbers.
            ValueError: If an argument has the wrong shape, or a stream no batch.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> gmm = GaussianMixture(1, 1)
            >>> a, b = gmm.statistics(torch.zeros(3, 1)), gmm.statistics(torch.ones(1, 1))
            >>> gmm.maximize(a.merge(b)); gmm.means_
            tensor([[0.2500]])
        """
        if not is_stream(x):
            return self._expect(x, sample_weight, log_prior)
        if log_prior is not None:
            raise ValueError("Expected `log_prior` only with rows, but got it with a stream, whose order is not known.")
        data = Rows(x, sample_weight, self.n_features, self.means_)
        with full_precision(self.means_.device):
            return sum_over(data, self._snapshot(), self.covariance, hard=self.cem, chunk_size=self.chunk_size)

    @torch.no_grad()
    def maximize(self, statistics: Statistics) -> None:
        """Set the parameters to the maximisers given the sums (the M-step), and keep the sums as the running ones.

        Raises:
            TypeError: If ``statistics`` are no `Statistics`.
            ValueError: If they are of another covariance structure or size.
        """
        self._running().check_like(statistics)
        usable, current = _is_usable(statistics), self._snapshot()
        with full_precision(usable.device):
            new = self._em_options().maximize(statistics, current)
        self._write(Parameters(*(torch.where(usable, ours, old) for ours, old in zip(new, current, strict=True))))
        kept = self._running()
        self._keep(
            torch.where(usable, statistics.count, kept.count),
            torch.where(usable, statistics.first, kept.first),
            torch.where(usable, statistics.second, kept.second),
            torch.where(usable, statistics.origin, kept.origin),
        )
        self.running_step_size.copy_(torch.where(usable, 1.0, self.running_step_size))
        self.fitted.copy_(torch.maximum(self.fitted, usable.to(torch.int64)))

    @torch.no_grad()
    def em_step(
        self,
        x: Any,
        sample_weight: Any = None,
        step_size: float | Tensor | None = None,
        *,
        log_prior: Any = None,
        sync: bool = True,
    ) -> Tensor:
        r"""Make one EM update on ``x``, without gradient and without reading a value on the host.

        With ``step_size`` :math:`\rho_t` the running sums become :math:`S_t = \gamma_t S_{t-1} + s(x)`,
        :math:`\gamma_t = \rho_{t-1} (1 / \rho_t - 1)`, and the M-step is taken at them: for batches of equal size ``x``
        has the share :math:`\rho_t`, a shorter batch a smaller one, and priors meet sums of the effective size
        :math:`n / \rho_t`. The first batch after `fit`, `initialize` or `set_parameters` has exactly that share; after
        an exact step or `maximize` the rows of that step count as they are. In a ``torch.distributed`` world the sums
        of all ranks are added first.

        Args:
            x: Rows, shape ``(..., d)``; rows that are not finite are left out and counted in ``n_skipped``.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            step_size: Share of ``x`` in the running sums, in (0, 1]; None is exact EM on ``x``. A tensor is not read on
                the host: out of range it counts as a batch without a usable row.
            log_prior: Log-prior of each row over components, shape ``(..., K)``; see `statistics`.
            sync: Whether to add the sums of all ranks; then every rank has to call this.

        Returns:
            Mean log-likelihood of the rows before the update in nats, shape ``()``; nan, and nothing changes, where no
            row is usable.

        Raises:
            TypeError: If an argument holds no real numbers.
            ValueError: If an argument has the wrong shape or range.

        References:
            Cappé and Moulines, On-line expectation-maximization algorithm for latent data models, 2009.
        """
        checks.check_step_size(step_size)
        batch = self._expect(x, sample_weight, log_prior)
        if sync and is_distributed():
            batch = batch.unflatten(sum_over_ranks(batch.flatten()))
        # In the dtype of the sums: a share of 0.3 in float32 is off by 1e-8, and the next step multiplies by it.
        if isinstance(step_size, Tensor):
            rho = step_size.detach().to(batch.count).reshape(1)
            # It is not read: out of range it counts as a batch without rows.
            batch = batch.scale(torch.where((rho > 0) & (rho <= 1), 1.0, 0.0).squeeze())
        else:
            rho = batch.count.new_full((1,), 1.0 if step_size is None else step_size)
        sums = batch if step_size is None else batch.merge(self._decayed(rho, batch.weight()))
        usable, before = _is_usable(sums), self.running_step_size.clone()
        self.maximize(sums)
        self.running_step_size.copy_(torch.where(usable, rho, before))
        self.n_updates.add_(usable)
        self.n_skipped.add_(batch.skipped.to(torch.int64))
        return batch.mean_log_likelihood().to(self.means_.dtype)

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

    def fit(self: Self, x: Any, *, sample_weight: Any = None) -> Self:
        """Run EM on ``x`` from ``n_init`` starts and keep the best.

        Each runs until the objective changes by less than ``tol``, or for ``max_iter`` M-steps. Fits the rows that this
        process holds; `em_step` adds over ranks. The layer is written once, at the end. A stream is iterated once for
        the start and once for each E-step, and gives the same mixture as its rows in memory.

        Args:
            x: Finite rows, at least K of them, shape ``(n, d)``, or a stream of them; moved to the mixture's device.
            sample_weight: Non-negative weight of each row, shape ``(n,)``; a row of weight 2 counts as two rows.

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
        for doubt in self._fit(x, sample_weight):
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
    def _fit(self, x: Any, sample_weight: Any) -> list[str]:
        """Run EM, write the best mixture, and return what a user should know of it."""
        data, options = self._data(x, sample_weight), self._em_options()
        found = self._survey(data)
        warm = self.warm_start and self.fitted_
        n_starts = 1 if warm or isinstance(self._start.means, Tensor) else self.n_init
        starts = iter([self._wide()]) if warm else (start for start, _ in self._starts(found, n_starts, 1))
        fits = []
        for number, start in enumerate(starts, start=1):
            reporter = progress(self.verbose, self.verbose_interval, self.max_iter, number, n_starts)
            with full_precision(self.means_.device), reporter as report:
                fits.append(fit_from(start, data, found, options, report))
        number, best = max(enumerate(fits, start=1), key=lambda numbered: numbered[1].objective)
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

    def _em_options(self) -> Options:
        ridge = (self.reg_covar, self.reg_covar_relative)
        return Options(
            self.covariance, self._priors_on_device, self.cem, self.max_iter, self.tol, *ridge, self.chunk_size
        )

    def _decayed(self, step_size: Tensor, weight: Tensor) -> Statistics:
        """Return the running sums times γ; with no batch before, they count as one batch like this."""
        previous = torch.where(self.running_step_size > 0, self.running_step_size, weight)
        gamma = (previous * (1.0 / step_size - 1.0)).sum()
        return self._running().scale(torch.where(weight > 0, gamma, 0.0))

    def _expect(self, x: Any, sample_weight: Any, log_prior: Any) -> Statistics:
        x = self._checked(x)
        rows = self._rows(x).detach()
        sample_weight = checks.to_weights(sample_weight, x, rows.dtype, rows.device)
        if log_prior is not None:
            log_prior = checks.to_tensor("log_prior", log_prior, rows.dtype)
            checks.check_log_prior(log_prior, (*x.shape[:-1], self.n_components))
            log_prior = log_prior.detach().reshape(-1, self.n_components).to(rows)
        how: dict[str, Any] = {"hard": self.cem, "chunk_size": self.chunk_size}
        with full_precision(rows.device):
            return functional.expectation(rows, self._snapshot(), self.covariance, sample_weight, log_prior, **how)

    def _data(self, x: Any, sample_weight: Any) -> Rows:
        """Return training rows, or raise."""
        data = Rows(x, sample_weight, self.n_features, self.means_)
        if data.shape is not None and len(data.shape) != 2:
            raise ValueError(f"Expected `x` of shape (n, {self.n_features}), but got {data.shape}.")
        return data

    def _survey(self, data: Rows) -> Survey:
        with full_precision(self.means_.device):
            return survey(data, n_candidates(self.n_components), self.n_components)

    def _starts(self, found: Survey, n_starts: int, n_init: int) -> Iterator[tuple[Parameters, Statistics]]:
        """Give starts of EM, parameters and the sums of total weight one that they belong to."""
        # Covariances that are given are taken as they are.
        ridge = (self.reg_covar, self.reg_covar_relative) if self._start.is_estimated else (0.0, False)
        generator = torch.Generator().manual_seed(self._seed())
        for _ in range(n_starts):
            with full_precision(self.means_.device):
                weights, means, elements = self._start.mixture(
                    found.candidates, self.covariance, n_init, generator, self.n_components
                )
                # Equal weights here, since an M-step keeps neither mean nor covariance of one that weighs nothing.
                equal = torch.full_like(weights, 1.0 / len(weights))
                sums = statistics_of(equal, means, elements, self.covariance)
                start = functional.maximize(sums, self._fresh(), self.covariance, *ridge)
                sums = statistics_of(weights, means, elements, self.covariance)
            yield Parameters(weights, start.means, start.factor), sums

    def _seed(self) -> int:
        return torch.initial_seed() if self.random_state is None else self.random_state


def _is_usable(statistics: Statistics) -> Tensor:
    """Return whether sums hold any row and are finite, without reading that on the host."""
    total = statistics.weight()
    return (total > 0) & torch.isfinite(total)
