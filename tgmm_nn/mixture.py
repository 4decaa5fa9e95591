"""`GaussianMixture`: a Gaussian mixture as a PyTorch layer.

The mathematics is in `tgmm_nn.functional`; this file holds the state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tgmm_nn import checks, functional, initialization
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.distributed import is_distributed, sum_over_ranks
from tgmm_nn.fitting import Options, fit_from
from tgmm_nn.functional import Parameters
from tgmm_nn.persistence import keep_wide, mismatch
from tgmm_nn.statistics import Statistics, accumulator_dtype, statistics_of

__all__ = ["GaussianMixture"]

CovarianceType = Literal["full", "diag", "spherical", "tied_full", "tied_diag", "tied_spherical"]

SUMS = (
    "running_count",
    "running_first",
    "running_second",
    "running_origin",
    "running_step_size",
    "lower_bound",
    "objective",
)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off; a meta tensor has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class GaussianMixture(nn.Module):
    r"""Gaussian mixture whose parameters are buffers: log-density forward, EM as a no-grad update.

    .. math:: p(x) = \sum_{k=1}^K \pi_k N(x; \mu_k, \Sigma_k)

    A fresh layer is a valid density, with equal weights, zero means and unit covariances. That is a symmetric point
    which `em_step` alone cannot leave: give it a start by `initialize`, `fit` or `set_parameters`.

    Args:
        n_components: Number of components K.
        n_features: Number of features d.
        covariance_type: ``"full"``, ``"diag"``, ``"spherical"`` (one per component), ``"tied_full"``, ``"tied_diag"``
            or ``"tied_spherical"`` (shared by all components). `tgmm_nn.covariance` has the table of shapes.
        init_means: How `initialize` and `fit` choose means: ``"kmeans"`` (scikit-learn's) or ``"random"`` (rows of the
            data).
        n_init: Number of starts. `initialize` takes the tightest of so many k-means runs; `fit` runs EM from each and
            keeps the best.
        random_state: Seed of the starts; None derives it from ``torch.initial_seed()``. Global generators are not
            touched.
        max_iter: Largest number of M-steps in one `fit`.
        tol: `fit` has converged when the mean log-likelihood per row changes by less than this, in nats.
        reg_covar: Number added to the diagonal of each covariance.
        reg_covar_relative: Read ``reg_covar`` as a fraction of the mean variance of the data, so that EM does not
            depend on units.
        chunk_size: Rows per pass through memory; None chooses by the size of the arrays.
        device: Device of the buffers.
        dtype: Floating dtype of the parameters, float32 or wider. Sums are kept in float64.

    Attributes:
        weights_: Mixing weights, shape ``(K,)``.
        means_: Means, shape ``(K, d)``.
        covariances_: Covariances, shape by family; computed from the factor.
        factor_: Factor P of the precisions, :math:`\Sigma^{-1} = P P^\top`, with a leading axis of K, or of 1 when
            tied.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    References:
        Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM algorithm, 1977.
        Cappé and Moulines, On-line expectation-maximization algorithm for latent data models, 2009.

    Example:
        >>> x = torch.cat([torch.randn(100, 2) - 4, torch.randn(100, 2) + 4])
        >>> gmm = GaussianMixture(n_components=2, n_features=2).fit(x)
        >>> gmm(x).shape, gmm.predict_proba(x).shape, bool(gmm.converged_)
        (torch.Size([200]), torch.Size([200, 2]), True)
    """

    _version = 1

    weights_: Tensor
    means_: Tensor
    factor_: Tensor
    running_count: Tensor
    running_first: Tensor
    running_second: Tensor
    running_origin: Tensor
    running_step_size: Tensor
    lower_bound: Tensor
    objective: Tensor
    n_iter: Tensor
    n_updates: Tensor
    n_skipped: Tensor
    fitted: Tensor
    converged: Tensor

    def __init__(
        self,
        n_components: int,
        n_features: int,
        covariance_type: CovarianceType = "full",
        *,
        init_means: Literal["kmeans", "random"] = "kmeans",
        n_init: int = 1,
        random_state: int | None = None,
        max_iter: int = 100,
        tol: float = 1e-4,
        reg_covar: float = 1e-6,
        reg_covar_relative: bool = False,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer("n_components", n_components)
        checks.check_integer("n_features", n_features)
        checks.check_choice("covariance_type", covariance_type, COVARIANCES)
        checks.check_choice("init_means", init_means, initialization.MEANS)
        checks.check_integer("n_init", n_init)
        checks.check_integer("random_state", random_state, minimum=0, maximum=2**63 - 1, optional=True)
        checks.check_integer("max_iter", max_iter)
        checks.check_number("tol", tol)
        checks.check_number("reg_covar", reg_covar)
        checks.check_bool("reg_covar_relative", reg_covar_relative)
        checks.check_integer("chunk_size", chunk_size, optional=True)
        checks.check_dtype("dtype", dtype)
        self.n_components, self.n_features, self.covariance_type = int(n_components), int(n_features), covariance_type
        self.init_means, self.n_init, self.random_state = init_means, n_init, random_state
        self.max_iter, self.tol = max_iter, tol
        self.reg_covar, self.reg_covar_relative, self.chunk_size = reg_covar, reg_covar_relative, chunk_size
        self.covariance = COVARIANCES[covariance_type]
        self.history_: list[float] = []
        self._register_buffers(
            torch.device(device or torch.get_default_device()),
            dtype or torch.promote_types(torch.get_default_dtype(), torch.float32),
        )
        self.reset_parameters()

    def _register_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        size = (self.n_components, self.n_features)
        element = (self.covariance.leading(self.n_components), *self.covariance.shape(self.n_features))
        wide = accumulator_dtype(device)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weights_": (size[:1], dtype),
            "means_": (size, dtype),
            "factor_": (element, dtype),
            "running_count": (size[:1], wide),
            "running_first": (size, wide),
            "running_second": (element, wide),
            "running_origin": (size, wide),
            "running_step_size": ((1,), wide),
            "lower_bound": ((1,), wide),
            "objective": ((1,), wide),
            # Flags are integers, since averaging callbacks subtract buffers; one element, since compiled code drops
            # in-place writes to 0-d float64.
            **{name: ((1,), torch.int64) for name in ("n_iter", "n_updates", "n_skipped", "fitted", "converged")},
        }
        for name, (shape, kind) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the layer fresh: equal weights, zero means, unit covariances, counters at zero."""
        fresh = self._fresh()
        self._write(fresh)  # the factor of a unit covariance is the unit covariance
        self._begin(statistics_of(*fresh, self.covariance))
        self.n_skipped.zero_()
        self.fitted.zero_()

    # ------------------------------------------------------------------------------------------------ the density

    def forward(self, x: Tensor) -> Tensor:
        r"""Return the log-density :math:`\log p(x)` of each row, in nats.

        Differentiable in ``x``; computed outside autocast, in float32 or the wider of the dtypes of ``x`` and the
        mixture.

        Args:
            x: Rows, shape ``(..., d)``.

        Returns:
            Tensor of shape ``(...)``; −inf at infinity, nan where ``x`` is nan.

        Raises:
            ValueError: If the last dimension of ``x`` is not d.

        Example:
            >>> GaussianMixture(2, 1)(torch.zeros(3, 1))
            tensor([-0.9189, -0.9189, -0.9189])
        """
        return self._map_rows(functional.log_density, x)

    def score_samples(self, x: Tensor) -> Tensor:
        """Return the log-density of each row: the same as calling the layer."""
        return self(x)

    def log_responsibilities(self, x: Tensor) -> Tensor:
        r"""Return :math:`\log p(k | x)`, shape ``(..., K)``; differentiable in ``x``, nan for a row at infinity."""
        return self._map_rows(lambda *args: functional.log_joint(*args).log_softmax(-1), x)

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return the responsibilities of the components for each row, shape ``(..., K)``."""
        return self.log_responsibilities(x).exp()

    def predict(self, x: Tensor) -> Tensor:
        """Return the most probable component of each row, shape ``(...)``, int64."""
        return self._map_rows(lambda *args: functional.log_joint(*args).argmax(-1), x)

    @torch.no_grad()
    def score(self, x: Tensor) -> float:
        """Return the mean log-density of the rows in nats."""
        return float(self(x).mean())

    # ------------------------------------------------------------------------------------------------------- EM

    @torch.no_grad()
    def statistics(self, x: Tensor, sample_weight: Tensor | None = None) -> Statistics:
        """Return the sums that an M-step needs (the E-step), of this rank's rows alone.

        Rows that are not finite, or whose weight is negative or not finite, are left out and counted.

        Args:
            x: Rows, shape ``(..., d)``.
            sample_weight: Non-negative weight of each row, shape ``(...)``.

        Example:
            >>> gmm = GaussianMixture(1, 1)
            >>> a, b = gmm.statistics(torch.zeros(3, 1)), gmm.statistics(torch.ones(1, 1))
            >>> gmm.maximize(a.merge(b)); gmm.means_
            tensor([[0.2500]])
        """
        return self._expect(x, sample_weight)

    @torch.no_grad()
    def maximize(self, statistics: Statistics) -> None:
        """Set the parameters to the maximisers given the sums (the M-step), and keep the sums as the running ones.

        Raises:
            TypeError: If ``statistics`` are no `Statistics`.
            ValueError: If they are of another covariance structure or size.
        """
        self._running().check_like(statistics)
        usable = self._maximize(statistics)
        self.running_step_size.copy_(torch.where(usable, 1.0, self.running_step_size))

    @torch.no_grad()
    def em_step(
        self,
        x: Tensor,
        sample_weight: Tensor | None = None,
        step_size: float | Tensor | None = None,
        *,
        sync: bool = True,
    ) -> Tensor:
        r"""Make one EM update on ``x``, without gradient and without reading a value on the host.

        With ``step_size`` :math:`\rho_t` the running sums become :math:`S_t = \gamma_t S_{t-1} + s(x)`,
        :math:`\gamma_t = \rho_{t-1} (1 / \rho_t - 1)`, and the M-step is taken at them: for batches of equal size ``x``
        has the share :math:`\rho_t`, a shorter batch a smaller one. In a ``torch.distributed`` world the sums of all
        ranks are added first.

        Args:
            x: Rows, shape ``(..., d)``; rows that are not finite are left out and counted in ``n_skipped``.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            step_size: Share of ``x`` in the running sums, in (0, 1]; None is exact EM on ``x``. A tensor is not read on
                the host: where it is out of range nothing changes.
            sync: Whether to add the sums of all ranks; then every rank has to call this.

        Returns:
            Mean log-likelihood of the rows before the update in nats, shape ``()``; nan, and nothing changes, where no
            row is usable.

        Raises:
            ValueError: If ``x``, ``sample_weight`` or ``step_size`` has the wrong shape or range.

        References:
            Cappé and Moulines, On-line expectation-maximization algorithm for latent data models, 2009.
        """
        checks.check_step_size(step_size)
        batch = self._expect(x, sample_weight)
        if sync and is_distributed():
            batch = batch.unflatten(sum_over_ranks(batch.flatten()))
        total = batch.weight()
        # In the dtype of the sums: a share of 0.3 in float32 is off by 1e-8, and the next step multiplies by it.
        if isinstance(step_size, Tensor):
            rho = step_size.detach().to(total).reshape(1)
        else:
            rho = total.new_full((1,), 1.0 if step_size is None else step_size)
        # A share given as a tensor is not read: out of range it counts as a batch without rows.
        valid = ((total > 0) & (rho > 0) & (rho <= 1)).squeeze()
        usable = self._maximize(batch if step_size is None else batch.merge(self._decayed(rho, total)), valid)
        self.running_step_size.copy_(torch.where(usable, rho, self.running_step_size))
        self.n_updates.add_(usable)
        self.n_skipped.add_(batch.skipped.to(torch.int64))
        return batch.mean_log_likelihood().to(self.means_.dtype)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> GaussianMixture:
        """Set a start for EM from the rows ``x``.

        Means are chosen by ``init_means``, weights are equal, and covariances are those of the nearest rows.

        Args:
            x: Finite rows, at least K of them, shape ``(n, d)``; moved to the mixture's device.

        Returns:
            The layer itself.

        Raises:
            ValueError: If ``x`` has the wrong width, too few rows, or values that are not finite; nothing is changed
                then.
        """
        rows = self._data(x)
        with full_precision(rows.device):
            start = self._start(rows, self.n_init, self._generator())
            self._maximize(start)
        self._begin(start)
        return self

    @torch.no_grad()
    def fit(self, x: Tensor) -> GaussianMixture:
        """Run EM on ``x`` from ``n_init`` starts and keep the best.

        Each runs until the mean log-likelihood changes by less than ``tol``, or for ``max_iter`` M-steps. Fits the rows
        that this process holds; `em_step` adds over ranks. The layer is written once, at the end.

        Args:
            x: Finite rows, at least K of them, shape ``(n, d)``; moved to the mixture's device.

        Returns:
            The layer itself.

        Raises:
            ValueError: If ``x`` has the wrong width, too few rows, or values that are not finite; nothing is changed
                then.

        Warns:
            UserWarning: If ``max_iter`` M-steps did not converge.
        """
        x, generator = self._data(x), self._generator()
        starts = (self._start(x, 1, generator) for _ in range(self.n_init))
        with full_precision(x.device):
            fits = (fit_from(start, x, self._fresh(), self._em_options()) for start in starts)
            best = max(fits, key=lambda fit: fit.objective)
        self._write(best.parameters)
        self._begin(best.statistics.scale(1.0 / best.statistics.weight()))
        self.history_ = best.history
        for name, value in best.outcome.items():
            getattr(self, name).fill_(value)
        if not best.converged:
            warnings.warn(
                f"EM did not converge in max_iter={self.max_iter} iterations (last change of the mean log-likelihood: "
                f"{best.last_change:.3g}, tol={self.tol:g}); raise `max_iter` or `tol`.",
                stacklevel=3,  # torch.no_grad wraps this method
            )
        return self

    @torch.no_grad()
    def fit_predict(self, x: Tensor) -> Tensor:
        """Fit the mixture and return the most probable component of each row, shape ``(n,)``."""
        return self.fit(x).predict(x)

    # ---------------------------------------------------------------------------------------------- parameters

    @torch.no_grad()
    def set_parameters(self, weights: Any, means: Any, covariances: Any) -> GaussianMixture:
        """Set the mixture.

        Its own expected sums become the running ones, so that minibatch EM moves it by its share only.

        Args:
            weights: Non-negative and summing to one, shape ``(K,)``.
            means: Shape ``(K, d)``.
            covariances: Positive definite, in the shape of ``covariances_``.

        Raises:
            TypeError: If one is no tensor, array, list or number.
            ValueError: If one has the wrong shape or is no valid parameter; nothing is changed then.

        Example:
            >>> gmm = GaussianMixture(2, 1, "spherical").set_parameters([0.5, 0.5], [[0.0], [3.0]], [1.0, 4.0])
            >>> gmm.covariances_
            tensor([1., 4.])
        """
        wide = self.running_second
        k, d = self.n_components, self.n_features
        weights = checks.check_array("weights", weights, (k,), wide)
        checks.check_weights("weights", weights)
        means = checks.check_array("means", means, (k, d), wide)
        shape = self.covariance.public_shape(k, d)
        covariances = self.covariance.internal(checks.check_array("covariances", covariances, shape, wide))
        checks.check_symmetric("covariances", covariances, matrix=len(self.covariance.shape(d)) == 2)
        with full_precision(covariances.device):
            factor, exists = self.covariance.factor(covariances)
        if not bool(exists.all()):
            bad = (~exists).nonzero().flatten().tolist()
            raise ValueError(f"Expected `covariances` to be positive definite, but {bad} (by component) are not.")
        weights = weights / weights.sum()
        self._write(Parameters(weights, means, factor))
        self._begin(statistics_of(weights, means, covariances, self.covariance))
        self.fitted.fill_(1)
        return self

    @property
    def covariances_(self) -> Tensor:
        """Covariances in the shape of the family, computed from the factor."""
        with full_precision(self.factor_.device):
            root = self.covariance.root(self.factor_.to(self.running_second.dtype))
            return self.covariance.public(self.covariance.square(root)).to(self.factor_.dtype)

    def covariance_matrices(self) -> Tensor:
        """Return every component's covariance as a matrix, whatever the family, shape ``(K, d, d)``."""
        elements = self.covariance.internal(self.covariances_)
        return self.covariance.matrix(elements, self.n_features).expand(self.n_components, -1, -1)

    @property
    def fitted_(self) -> bool:
        """Whether the parameters were set: by `fit`, `initialize`, `set_parameters`, `maximize` or `em_step`."""
        return bool(self.fitted.item())

    @property
    def converged_(self) -> bool:
        """Whether the last `fit` converged; False when the parameters were set otherwise since."""
        return bool(self.converged.item())

    @property
    def n_iter_(self) -> int:
        """Number of M-steps of the last `fit`; 0 when the parameters were set otherwise since."""
        return int(self.n_iter.item())

    @property
    def lower_bound_(self) -> float:
        """Mean log-likelihood per row of the last `fit`, of its final parameters, in nats; nan without one."""
        return float(self.lower_bound.item())

    @property
    def objective_(self) -> float:
        """What EM climbed in the last `fit`, of the final parameters, in nats per row."""
        return float(self.objective.item())

    @property
    def n_parameters(self) -> int:
        """Number of free parameters: weights, means and covariances."""
        k, d = self.n_components, self.n_features
        return k - 1 + k * d + self.covariance.leading(k) * self.covariance.n_parameters(d)

    def extra_repr(self) -> str:
        """Return every option that shapes the layer or EM."""
        names = (
            "reg_covar",
            "reg_covar_relative",
            "init_means",
            "n_init",
            "random_state",
            "max_iter",
            "tol",
            "chunk_size",
        )
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.n_components}, {self.n_features}, {self.covariance_type!r}, {options}"

    def _em_options(self) -> Options:
        return Options(
            self.covariance, self.max_iter, self.tol, self.reg_covar, self.reg_covar_relative, self.chunk_size
        )

    # ------------------------------------------------------------------------------------------------ the state

    def get_extra_state(self) -> dict[str, Any]:
        """Return what travels with ``state_dict`` besides buffers: options that shape it, and the trace of `fit`."""
        return {**self._shape(), "history": list(self.history_)}

    def _shape(self) -> dict[str, Any]:
        """Return the options that decide the shapes of buffers, as plain values."""
        return {name: getattr(self, name) for name in ("covariance_type", "n_components", "n_features")}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the trace of `fit`; the options were compared before any buffer was written."""
        self.history_ = list(state.get("history", []))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch copies buffers before the extra state arrives, so a foreign mixture has to be found here.
        if problem := mismatch(state_dict, prefix, self._shape(), dict(self.named_buffers(recurse=False))):
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # With assign=True the buffers are now the state's own tensors, of whatever dtype.
        loaded = dict(self.named_buffers(recurse=False))
        self._buffers.update(keep_wide(loaded, loaded, SUMS))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianMixture:
        """Move or cast the buffers, but keep parameters at float32 or wider and sums in float64."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(keep_wide(before, dict(self.named_buffers(recurse=False)), SUMS))
        return self

    # --------------------------------------------------------------------------------------------------- inside

    def _fresh(self) -> Parameters:
        """Return the parameters of a fresh layer in the dtype of the sums."""
        k, d, like = self.n_components, self.n_features, self.running_second
        return Parameters(
            like.new_full((k,), 1.0 / k),
            like.new_zeros(k, d),
            self.covariance.identity(k, d).to(like),
        )

    def _snapshot(self) -> Parameters:
        """Return a copy of the parameters: what refers to them must not change with the next update."""
        return Parameters(self.weights_.clone(), self.means_.clone(), self.factor_.clone())

    def _running(self) -> Statistics:
        zero = self.running_count.new_zeros(())
        return Statistics(
            self.running_count,
            self.running_first,
            self.running_second,
            zero,
            zero,
            zero,
            self.running_origin,
            self.covariance,
        )

    def _write(self, parameters: Parameters) -> None:
        self.weights_.copy_(parameters.weights)
        self.means_.copy_(parameters.means)
        self.factor_.copy_(parameters.factor)

    def _begin(self, statistics: Statistics) -> None:
        """Keep sums of total weight one as the running ones, and forget how an earlier mixture was reached."""
        self._keep(statistics.count, statistics.first, statistics.second, statistics.origin)
        self.running_step_size.zero_()  # no batch's share: see _decayed
        for counter in (self.n_updates, self.n_iter, self.converged):
            counter.zero_()
        self.lower_bound.fill_(torch.nan)
        self.objective.fill_(torch.nan)
        self.history_ = []

    def _keep(self, count: Tensor, first: Tensor, second: Tensor, origin: Tensor) -> None:
        self.running_count.copy_(count)
        self.running_first.copy_(first)
        self.running_second.copy_(second)
        self.running_origin.copy_(origin)  # one point for all components broadcasts

    def _maximize(self, statistics: Statistics, valid: Tensor | bool = True) -> Tensor:
        """M-step at the sums, which become the running ones, if they are ``valid`` and hold any row; return whether."""
        total = statistics.weight()
        usable = (total > 0) & torch.isfinite(total) & valid
        current, options = self._snapshot(), (self.reg_covar, self.reg_covar_relative)
        with full_precision(total.device):
            new = functional.maximize(statistics, current, self.covariance, *options)
        self._write(Parameters(*(torch.where(usable, ours, old) for ours, old in zip(new, current, strict=True))))
        kept = self._running()
        self._keep(
            torch.where(usable, statistics.count, kept.count),
            torch.where(usable, statistics.first, kept.first),
            torch.where(usable, statistics.second, kept.second),
            torch.where(usable, statistics.origin, kept.origin),
        )
        self.fitted.copy_(torch.maximum(self.fitted, usable.to(torch.int64)))
        return usable

    def _decayed(self, step_size: Tensor, weight: Tensor) -> Statistics:
        """Return the running sums times γ; with no batch before, they count as one batch like this."""
        previous = torch.where(self.running_step_size > 0, self.running_step_size, weight)
        gamma = (previous * (1.0 / step_size - 1.0)).sum()
        return self._running().scale(torch.where(weight > 0, gamma, 0.0))

    def _expect(self, x: Tensor, sample_weight: Tensor | None) -> Statistics:
        rows = self._rows(x)
        if sample_weight is not None:
            checks.check_sample_weight(sample_weight, x.shape[:-1])
            sample_weight = sample_weight.detach().reshape(-1)
        with full_precision(rows.device):
            return functional.expectation(
                rows.detach(), self._snapshot(), self.covariance, sample_weight, chunk_size=self.chunk_size
            )

    def _map_rows(self, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Apply a function of rows and parameters to ``(..., d)``, outside autocast."""
        rows = self._rows(x)
        parameters = Parameters(self.weights_, self.means_, self.factor_)
        with full_precision(rows.device):
            value = functional.map_rows(
                lambda part: function(part, parameters, self.covariance), rows, parameters, chunk_size=self.chunk_size
            )
        return value.reshape(x.shape[:-1] + value.shape[1:])

    def _rows(self, x: Tensor) -> Tensor:
        """Return ``x`` as rows ``(n, d)`` in the wider of its dtype and the mixture's."""
        checks.check_rows("x", x, self.n_features)
        return x.reshape(-1, self.n_features).to(torch.promote_types(x.dtype, self.means_.dtype))

    def _data(self, x: Tensor) -> Tensor:
        """Return training rows on the mixture's device, or raise."""
        rows = self._rows(x).detach().to(self.means_.device)
        if x.ndim != 2:
            raise ValueError(f"Expected `x` of shape (n, {self.n_features}), but got {tuple(x.shape)}.")
        if len(rows) < self.n_components:
            raise ValueError(f"Expected `x` with at least n_components={self.n_components} rows, but got {len(rows)}.")
        checks.check_finite("x", rows)
        checks.check_squares("x", rows)
        return rows

    def _start(self, x: Tensor, n_init: int, generator: torch.Generator) -> Statistics:
        return initialization.starting_statistics(
            x, self.n_components, self.covariance, self.init_means, n_init, generator
        )

    def _generator(self) -> torch.Generator:
        """Return an own generator, so that the global ones are neither seeded nor advanced."""
        seed = torch.initial_seed() if self.random_state is None else self.random_state
        return torch.Generator().manual_seed(seed)
