"""`MixtureSteps`: E- and M-steps of a mixture on its buffers, without gradient and without waiting for a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tgmm_nn import checks, few
from tgmm_nn.assignment import HARD, SOFT, Assignment
from tgmm_nn.data import Rows, is_mapped, is_stream
from tgmm_nn.density import full_precision
from tgmm_nn.distributed import is_distributed
from tgmm_nn.expectation import expectation
from tgmm_nn.fitting import Options, sum_over
from tgmm_nn.functional import mixture_mean
from tgmm_nn.initialization import reseed
from tgmm_nn.maximization import EVERYTHING, Learned
from tgmm_nn.state import MixtureState
from tgmm_nn.statistics import Statistics, check_like
from tgmm_nn.transport import sinkhorn

__all__ = ["MixtureSteps"]

MARGINALS = ("uniform", "weights")


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


class MixtureSteps(MixtureState):
    """Mixture that makes E-steps and M-steps; `tgmm_nn.GaussianMixture` documents the options."""

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

    @torch.no_grad()
    def statistics(
        self, x: Any, sample_weight: Any = None, log_prior: Any = None, assignment: Assignment | None = None
    ) -> Statistics:
        """Return the sums that an M-step needs (the E-step), of this rank's rows alone.

        Rows that are not finite, or whose weight is negative or not finite, are left out and counted.

        Args:
            x: Rows, shape ``(..., d)``, or a stream of them.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            log_prior: Log-prior of each row over components in nats, shape ``(..., K)``, added to the joint: labels,
                masks or links. −inf forbids a component; a row for which all are forbidden is left out, and so is one
                with nan or infinity among them.
            assignment: How a row is shared among components, such as what `sinkhorn` returns; None is hard with
                ``cem=True``, else soft.

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
            sums = self._expect(x, sample_weight, log_prior, assignment)
            return sums.statistics(self.covariance) if isinstance(sums, few.Sums) else sums
        if log_prior is not None:
            raise ValueError("Expected `log_prior` only with rows, but got it with a stream, whose order is not known.")
        return self._sum_over(x, sample_weight, None, assignment)

    def maximize(self, statistics: Statistics, learned: Learned = EVERYTHING) -> None:
        """Set the parameters to the maximisers given the sums (the M-step), and keep the sums as the running ones.

        Args:
            statistics: Sums of an E-step.
            learned: What may move; the rest is frozen.

        Raises:
            TypeError: If ``statistics`` are no `Statistics`.
            ValueError: If they are of another covariance structure or size.
        """
        check_like(statistics, self.covariance, self.running_first)
        found = few.Sums.of(statistics) if self._is_ordinary(learned) else None
        if found is None or not few.maximize(found, self._buffers, self.covariance, self.reg_covar):
            self._maximize_by_torch(statistics, learned)

    @torch.no_grad()
    def _maximize_by_torch(self, statistics: Statistics, learned: Learned) -> None:
        usable, current = _is_usable(statistics), self.mixture()
        with full_precision(usable.device):
            new = self._em_options(learned).maximize(statistics, current)
        values = (*new, statistics.count, statistics.first, statistics.second, statistics.origin)
        running = (self.running_count, self.running_first, self.running_second, self.running_origin)
        for value, buffer in zip(values, (*current, *running), strict=True):
            torch.where(usable, value, buffer, out=buffer)
        self.running_step_size.masked_fill_(usable, 1.0)
        self.fitted.logical_or_(usable)

    def em_step(
        self,
        x: Any,
        sample_weight: Any = None,
        step_size: float | Tensor | None = None,
        *,
        log_prior: Any = None,
        assignment: Assignment | None = None,
        learned: Learned = EVERYTHING,
        sync: bool = True,
    ) -> Tensor:
        r"""Make one EM update on ``x``, without gradient, and without waiting for a device.

        With ``step_size`` :math:`\rho_t` the running sums become :math:`S_t = \gamma_t S_{t-1} + s(x)`,
        :math:`\gamma_t = \rho_{t-1} (1 / \rho_t - 1)`, and the M-step is taken at them: for batches of equal size ``x``
        has the share :math:`\rho_t`, a shorter batch a smaller one, and priors meet sums of the effective size
        :math:`n / \rho_t`. The first batch after `fit`, `initialize` or `set_parameters` has exactly that share; after
        an exact step or `maximize` the rows of that step count as they are. In a ``torch.distributed`` world the sums
        of all ranks are added first. Which form the E-step takes is a matter of shapes and of where the rows are:
        `tgmm_nn.few` has that of few rows on a CPU, whose values are at hand, and `tgmm_nn.expectation` all others, in
        which no value is read on the host.

        Args:
            x: Rows, shape ``(..., d)``; rows that are not finite are left out and counted in ``n_skipped``.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            step_size: Share of ``x`` in the running sums, in (0, 1]; None is exact EM on ``x``. A tensor that is out of
                range does not raise, since it may be on a device: it counts as a batch without a usable row.
            log_prior: Log-prior of each row over components, shape ``(..., K)``; see `statistics`.
            assignment: How a row is shared among components; see `statistics`.
            learned: What may move; the rest is frozen.
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
        batch = self._expect(x, sample_weight, log_prior, assignment)
        if isinstance(batch, few.Sums):
            ordinary = self._is_ordinary(learned)
            if ordinary and (value := self._update_few(batch, step_size)) is not None:
                return value
            batch = batch.statistics(self.covariance)
            if ordinary:
                return self._update_by_torch(batch, step_size, learned)
        return self.update(batch.over_ranks() if sync else batch, step_size, learned=learned)

    def update(
        self, statistics: Statistics, step_size: float | Tensor | None = None, *, learned: Learned = EVERYTHING
    ) -> Tensor:
        """Make the M-step of `em_step` from sums that are there already, those of all ranks.

        Args:
            statistics: Sums of this mixture's E-step, perhaps merged from several batches.
            step_size: Share of them in the running sums; see `em_step`.
            learned: What may move; the rest is frozen.

        Returns:
            Mean log-likelihood of the rows in nats, shape ``()``; nan, and nothing changes, where no row is usable.

        Raises:
            TypeError: If ``statistics`` are no `Statistics`.
            ValueError: If they are of another covariance structure or size, or ``step_size`` is out of range.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> gmm = GaussianMixture(1, 1)
            >>> gmm.update(gmm.statistics(torch.zeros(3, 1)).merge(gmm.statistics(torch.ones(1, 1)))); gmm.means_
            tensor(-1.0439)
            tensor([[0.2500]])
        """
        checks.check_step_size(step_size)
        check_like(statistics, self.covariance, self.running_first)
        found = few.Sums.of(statistics) if self._is_ordinary(learned) else None
        value = None if found is None else self._update_few(found, step_size)
        return self._update_by_torch(statistics, step_size, learned) if value is None else value

    @torch.no_grad()
    def _update_by_torch(self, statistics: Statistics, step_size: float | Tensor | None, learned: Learned) -> Tensor:
        batch = sums = statistics
        if step_size is not None:
            # In the dtype of the sums: a share of 0.3 in float32 is off by 1e-8, and the next step multiplies by it.
            rho = torch.as_tensor(step_size, dtype=batch.count.dtype, device=batch.count.device).detach().reshape(1)
            if isinstance(step_size, Tensor):  # it is not read: out of range it counts as a batch without rows
                batch = batch.scale(torch.where((rho > 0) & (rho <= 1), 1.0, 0.0).squeeze())
            sums = batch.merge(self._decayed(rho, batch.weight()))
            before = self.running_step_size.clone()
        usable = _is_usable(sums)
        if self._has_own_steps():
            self.maximize(sums, *(() if learned is EVERYTHING else (learned,)))  # perhaps of sums alone
        else:
            self._maximize_by_torch(sums, learned)
        if step_size is not None:
            torch.where(usable, rho, before, out=self.running_step_size)
        self.n_updates.add_(usable)
        self.n_skipped.add_(batch.skipped.to(torch.int64))
        return batch.mean_log_likelihood().to(self.means_.dtype)

    @torch.no_grad()
    def sinkhorn(
        self,
        x: Any,
        sample_weight: Any = None,
        *,
        log_prior: Any = None,
        marginals: Literal["uniform", "weights"] = "uniform",
        epsilon: float = 1.0,
        n_iterations: int = 30,
        sync: bool = True,
    ) -> Assignment:
        """Return the assignment that gives each component its share of the rows `x`, for `em_step` on them.

        See `tgmm_nn.transport.sinkhorn` for the problem that it solves.

        Args:
            x: Rows, shape ``(..., d)``.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            log_prior: Log-prior of each row over components, shape ``(..., K)``; with labels as −inf, each class is
                balanced within.
            marginals: Whether each component gets as much as any other, or its mixing weight.
            epsilon: Entropic regularisation in nats; 1 is as soft as EM is, towards 0 rows are assigned wholly.
            n_iterations: Number of steps; 30 balance well, whatever the dimension.
            sync: Whether the rows of all ranks are balanced together; then every rank has to call this.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has the wrong shape or range.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> gmm = GaussianMixture(2, 1).set_parameters([0.9, 0.1], [[0.0], [1.0]], [[[1.0]], [[1.0]]])
            >>> x = torch.linspace(-1, 1, 6)[:, None]
            >>> gmm.statistics(x, assignment=gmm.sinkhorn(x)).count.round(decimals=3)
            tensor([3., 3.], dtype=torch.float64)
        """
        checks.check_choice("marginals", marginals, MARGINALS)
        checks.check_number("epsilon", epsilon, strict=True)
        checks.check_integer("n_iterations", n_iterations)
        rows, *of_rows = self._flat(x, sample_weight, log_prior)
        shares = self.weights_ if marginals == "weights" else torch.full_like(self.weights_, 1.0 / self.n_components)
        how: dict[str, Any] = {"epsilon": epsilon, "n_iterations": n_iterations, "chunk_size": self.chunk_size}
        with full_precision(rows.device):
            return sinkhorn(rows, self.mixture(), self.covariance, shares, *of_rows, **how, sync=sync)

    @torch.no_grad()
    def reseed(self, components: Any, means: Any, learned: Learned = EVERYTHING) -> None:
        """Start some components anew, their running statistics with them, so that these don't pull them back.

        Each gets a given mean, the covariance within all components, and the weight 1/K (with priors, the mode given
        these); the others keep their means and covariances, and share the rest as before.

        Args:
            components: Different components, integers, shape ``(m,)``.
            means: Their new means, shape ``(m, d)``.
            learned: Whose weights may move: those of others stay as they are.

        Raises:
            TypeError: If ``means`` hold no real numbers.
            ValueError: If a component does not exist or is named twice, or ``means`` have the wrong shape or are not
                finite; nothing is changed then.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> gmm = GaussianMixture(2, 1, "diag").set_parameters([1.0, 0.0], [[0.0], [9.0]], [[4.0], [1.0]])
            >>> gmm.reseed([1], [[3.0]]); gmm.weights_, gmm.means_.flatten(), gmm.covariances_.flatten().round()
            (tensor([0.5000, 0.5000]), tensor([0., 3.]), tensor([4., 4.]))
        """
        components = torch.as_tensor(components, dtype=torch.int64, device=self.means_.device)
        anew = torch.isin(torch.arange(self.n_components, device=components.device), components)
        if components.ndim != 1 or int(anew.sum()) != len(components):
            raise ValueError(
                f"Expected `components` to be different integers from 0 to {self.n_components - 1}, "
                f"but got {components.tolist()}."
            )
        means = checks.check_array("means", means, self.running_first, (len(components), self.n_features))
        places = self.means_.to(means).index_copy(0, components, means)
        step_size = self.running_step_size.clone()
        sums = reseed(self.running_statistics(), anew, places, self.covariance)
        self.maximize(sums, Learned(learned.weights, means=anew, covariances=anew))
        self.running_step_size.copy_(step_size)  # the next batch counts as it would have

    # --------------------------------------------------------------------------------------------------- inside

    def _em_options(self, learned: Learned = EVERYTHING) -> Options:
        ridge = (self.reg_covar, self.reg_covar_relative)
        run = (self.cem, self.max_iter, self.tol, *ridge, self.chunk_size)
        return Options(self.covariance, self._priors_on_device, *run, learned)

    def _decayed(self, step_size: Tensor, weight: Tensor) -> Statistics:
        """Return the running sums times γ; with no batch before, they count as one batch like this."""
        previous = torch.where(self.running_step_size > 0, self.running_step_size, weight)
        gamma = (previous * (1.0 / step_size - 1.0)).sum()
        return self.running_statistics().scale(torch.where(weight > 0, gamma, 0.0))

    def _has_own_steps(self) -> bool:
        """Return whether a subclass, or somebody on this layer, has put another `update` or `maximize` in place."""
        steps = (MixtureSteps.update, MixtureSteps.maximize)
        return (getattr(self.update, "__func__", None), getattr(self.maximize, "__func__", None)) != steps

    def _is_ordinary(self, learned: Learned) -> bool:
        """Return whether M-steps are those of `few`, as far as options tell."""
        special = learned.is_partial or self._priors.exist or self.reg_covar_relative
        return not (special or self._has_own_steps())

    def _update_few(self, batch: few.Sums, step_size: float | Tensor | None) -> Tensor | None:
        """Make the update of `few.update`, or return None."""
        if isinstance(step_size, Tensor) and not few.are_here(step_size):
            return None
        step_size = None if step_size is None else float(step_size)  # those of NumPy may be narrow
        if step_size is not None and not 0.0 < step_size <= 1.0:
            return None
        return few.update(batch, self._buffers, self.covariance, self.reg_covar, step_size)

    def _assignment(self) -> Assignment:
        return HARD if self.cem else SOFT

    def _expect(
        self, x: Any, sample_weight: Any, log_prior: Any, assignment: Assignment | None
    ) -> Statistics | few.Sums:
        """Return the sums of rows; those of few rows as they are, since tensors of them take time."""
        if not isinstance(x, Tensor) and is_mapped(x):
            return self._sum_over(x, sample_weight, log_prior, assignment)
        rows, *of_rows = self._flat(x, sample_weight, log_prior)
        assignment, mixture = assignment or self._assignment(), self.mixture()
        plain = self.chunk_size is None and not (assignment.hard or assignment.is_tilted)
        # Sums of ranks add up about one point, however many rows each has.
        plain = plain and sample_weight is None and log_prior is None and not is_distributed()
        if plain and (sums := few.expectation(rows, mixture, self.covariance)) is not None:
            return sums
        with torch.no_grad(), full_precision(rows.device):
            how: dict[str, Any] = {"assignment": assignment, "chunk_size": self.chunk_size}
            return expectation(rows, mixture, self.covariance, *of_rows, **how)

    def _sum_over(self, x: Any, sample_weight: Any, log_prior: Any, assignment: Assignment | None) -> Statistics:
        """Return the sums of rows that come batch by batch, from a stream or a file."""
        data = Rows(x, sample_weight, self.n_features, self.means_)
        if data.shape is not None:
            data.log_prior = self._flat_log_prior(log_prior, data.shape[:-1], self.means_)
        how: dict[str, Any] = {"assignment": assignment or self._assignment(), "chunk_size": self.chunk_size}
        parameters = self._snapshot()
        with torch.no_grad(), full_precision(self.means_.device):
            [sums] = sum_over(data, [parameters], self.covariance, mixture_mean(parameters), **how)
        return sums

    def _flat(self, x: Any, sample_weight: Any, log_prior: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return rows ``(n, d)``, their weights and log-priors, checked."""
        rows, shape = self._rows(x, self.means_)
        rows = rows.detach() if rows.requires_grad else rows
        sample_weight = checks.to_weights(sample_weight, shape, rows.dtype, rows.device)
        return rows, sample_weight, self._flat_log_prior(log_prior, shape, rows)

    def _flat_log_prior(self, log_prior: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Return the log-priors of rows of some shape as ``(n, K)``, or raise; None stays None."""
        if log_prior is None:
            return None
        log_prior = checks.to_tensor("log_prior", log_prior, like.dtype)
        checks.check_log_prior(log_prior, (*shape, self.n_components))
        return log_prior.detach().reshape(-1, self.n_components).to(like)


def _is_usable(statistics: Statistics) -> Tensor:
    """Return whether sums hold any row and are finite, without reading that on the host."""
    total = statistics.weight()
    return (total > 0) & (total < torch.inf)
