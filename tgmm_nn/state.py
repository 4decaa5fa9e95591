"""`MixtureState`: the buffers of a mixture, and how they are set, moved, cast, loaded and read as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.density import MixtureDensity, full_precision
from tgmm_nn.functional import Parameters
from tgmm_nn.persistence import keep_wide, mismatch
from tgmm_nn.priors import NO_PRIORS, Priors
from tgmm_nn.statistics import Statistics, accumulator_dtype, statistics_of

__all__ = ["CovarianceType", "MixtureState"]

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


class MixtureState(MixtureDensity):
    r"""Mixture whose parameters, running sums and counters are buffers, always updated in place.

    Args:
        n_components: Number of components K.
        n_features: Number of features d.
        covariance_type: Name of the family.
        device: Device of the buffers.
        dtype: Dtype of the parameters, float32 or float64, or its name. Sums are kept in float64.

    Attributes:
        weights_: Mixing weights, shape ``(K,)``.
        means_: Means, shape ``(K, d)``.
        factor_: Factor P of the precisions, :math:`\Sigma^{-1} = P P^\top`, with a leading axis of K, or of 1 when
            tied.
        priors: Conjugate priors, on the CPU.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer("n_components", n_components)
        checks.check_integer("n_features", n_features)
        checks.check_choice("covariance_type", covariance_type, COVARIANCES)
        self.covariance = COVARIANCES[covariance_type]
        self._priors, self._priors_on_device = NO_PRIORS, NO_PRIORS
        self.chunk_size: int | None = None
        self.history_: list[float] = []
        self._n_draws = 0
        self._register_buffers(
            (int(n_components), int(n_features)),
            checks.check_device("device", device) or torch.get_default_device(),
            checks.check_dtype("dtype", dtype) or torch.promote_types(torch.get_default_dtype(), torch.float32),
        )
        self.reset_parameters()

    def _register_buffers(self, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        element = (self.covariance.leading(size[0]), *self.covariance.shape(size[1]))
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

    # ---------------------------------------------------------------------------------------------- parameters

    @property
    def covariance_type(self) -> str:
        """Name of the family; it can't be changed, since it shapes the buffers."""
        return next(name for name, structure in COVARIANCES.items() if structure == self.covariance)

    def mixture(self) -> Parameters:
        """Return the parameters; they are the buffers themselves."""
        return Parameters(self.weights_, self.means_, self.factor_)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the layer fresh: equal weights, zero means, unit covariances, counters at zero."""
        fresh = self._fresh()
        self._write(fresh)  # the factor of a unit covariance is the unit covariance
        self._begin(statistics_of(*fresh, self.covariance))
        self.n_skipped.zero_()
        self.fitted.zero_()

    @torch.no_grad()
    def set_parameters(self, weights: Any, means: Any, covariances: Any) -> MixtureState:
        """Set the mixture.

        Its own expected sums become the running ones, so that minibatch EM moves it by its share only.

        Args:
            weights: Non-negative and summing to one, shape ``(K,)``.
            means: Shape ``(K, d)``.
            covariances: Positive definite, in the shape of ``covariances_``.

        Returns:
            The layer itself.

        Raises:
            TypeError: If one is no tensor, array, list or number.
            ValueError: If one has the wrong shape or is no valid parameter; nothing is changed then.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> gmm = GaussianMixture(2, 1, "spherical").set_parameters([0.5, 0.5], [[0.0], [3.0]], [1.0, 4.0])
            >>> gmm.covariances_
            tensor([1., 4.])
        """
        wide = self.running_second
        k, d = self.n_components, self.n_features
        weights = checks.check_array("weights", weights, wide, (k,))
        checks.check_weights("weights", weights)
        means = checks.check_array("means", means, wide, (k, d))
        elements = self.covariance.given("covariances", covariances, k, d, wide, broadcast=False)
        with full_precision(elements.device):
            factor, _ = self.covariance.factor(elements)
        weights = weights / weights.sum()
        self._check_range(Parameters(weights, means, factor), "`means` and `covariances`")
        self._write(Parameters(weights, means, factor))
        self._begin(statistics_of(weights, means, elements, self.covariance))
        self.fitted.fill_(1)
        return self

    @property
    def covariances_(self) -> Tensor:
        """Covariances in the shape of the family, computed from the factor."""
        return self.covariance.public(self._elements()).to(self.factor_.dtype)

    def covariance_matrices(self) -> Tensor:
        """Return every component's covariance as a matrix, whatever the family, shape ``(K, d, d)``."""
        elements = self._elements().to(self.factor_.dtype)
        return self.covariance.matrix(elements, self.n_features).expand(self.n_components, -1, -1)

    def condition_numbers(self) -> Tensor:
        """Return the largest over the smallest eigenvalue of each covariance, shape ``(K,)``, or ``(1,)`` when tied."""
        # Those of the precision are one over those of the covariance.
        eigenvalues = self.covariance.eigenvalues(self.covariance.square(self.factor_.to(self.running_second.dtype)))
        return eigenvalues.amax(-1) / eigenvalues.amin(-1)

    @torch.no_grad()
    def permute_components(self, order: Any) -> None:
        """Make component ``order[k]`` the new component k, its running statistics with it.

        Args:
            order: Permutation of the components, integers, shape ``(K,)``.

        Raises:
            ValueError: If ``order`` is no permutation of 0, …, K − 1; nothing is changed then.

        Example:
            >>> from tgmm_nn import GaussianMixture
            >>> gmm = GaussianMixture(2, 1, "diag").set_parameters([0.7, 0.3], [[0.0], [1.0]], [[1.0], [1.0]])
            >>> gmm.permute_components([1, 0]); gmm.weights_
            tensor([0.3000, 0.7000])
        """
        order = torch.as_tensor(order, device=self.means_.device)
        if not torch.equal(order.sort().values, torch.arange(self.n_components, device=order.device)):
            raise ValueError(
                f"Expected `order` to be a permutation of 0 to {self.n_components - 1}, but got {order.tolist()}."
            )
        for name in ("weights_", "means_", "running_count", "running_first", "running_origin"):
            getattr(self, name).copy_(getattr(self, name)[order])
        if not self.covariance.tied:
            self.factor_.copy_(self.factor_[order])
            self.running_second.copy_(self.running_second[order])

    @property
    def fitted_(self) -> bool:
        """Whether the parameters were set: by `fit`, `initialize`, `set_parameters`, `maximize` or `em_step`."""
        return bool(self.fitted.item())

    @property
    def converged_(self) -> bool:
        """Whether the last `fit` converged; False where `initialize` or `set_parameters` came after it."""
        return bool(self.converged.item())

    @property
    def n_iter_(self) -> int:
        """Number of M-steps of the last `fit`; 0 where `initialize` or `set_parameters` came after it."""
        return int(self.n_iter.item())

    @property
    def lower_bound_(self) -> float:
        """Mean log-likelihood per row at the end of the last `fit`, in nats; nan without one."""
        return float(self.lower_bound.item())

    @property
    def objective_(self) -> float:
        """What EM climbed in the last `fit`, at its end, in nats per row; nan without one.

        The mean log-likelihood, plus the priors' log-density divided by the number of rows; with ``cem=True`` the
        likelihood is that of the classification. Like `converged_`, `n_iter_` and `lower_bound_` it reports on that
        fit: `em_step` and `maximize` move the mixture on and leave it.
        """
        return float(self.objective.item())

    # ------------------------------------------------------------------------------------- casts, moves and states

    def save_state_dict(self) -> dict[str, Any]:
        """Return what ``state_dict()`` returns: buffers, and the options that decide their shapes."""
        return dict(self.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state, as every module does; where that raises, the layer is left as it was.

        Raises:
            RuntimeError: If it is the state of another mixture, or where ``strict``, lacks a buffer or holds more.
        """
        before = {name: (buffer, buffer.clone()) for name, buffer in self.named_buffers(recurse=False)}
        history, n_draws = self.history_, self._n_draws
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except BaseException:  # torch compares the keys last
            for name, (buffer, values) in before.items():
                self._buffers[name] = buffer.copy_(values)
            self.history_, self._n_draws = history, n_draws
            raise

    def get_extra_state(self) -> dict[str, Any]:
        """Return what travels with ``state_dict`` besides buffers: options that shape it, the trace of `fit`, draws."""
        return {**self._shape(), "history": list(self.history_), "n_draws": self._n_draws}

    def _shape(self) -> dict[str, Any]:
        """Return the options that decide the shapes of buffers, as plain values."""
        return {name: getattr(self, name) for name in ("covariance_type", "n_components", "n_features")}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore trace and number of draws; the options were compared before any buffer was written."""
        self.history_, self._n_draws = list(state.get("history", [])), state.get("n_draws", 0)

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
        # torch copies buffers before the extra state arrives, so that a foreign mixture has to be found here.
        if problem := mismatch(state_dict, prefix, self._shape(), dict(self.named_buffers(recurse=False))):
            error_msgs.append(problem)
            return
        self.history_ = []  # that of the state follows, where it has one
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # With assign=True the buffers are now the state's own tensors, of whatever dtype and device.
        loaded = dict(self.named_buffers(recurse=False))
        self._buffers.update(keep_wide(loaded, loaded, SUMS))
        self._move_priors()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixtureState:
        """Move or cast the buffers, but keep parameters at float32 or wider and sums in float64."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(keep_wide(before, dict(self.named_buffers(recurse=False)), SUMS))
        self._move_priors()
        return self

    @property
    def priors(self) -> Priors:
        """The conjugate priors, broadcast, on the CPU in float64; set at construction."""
        return self._priors

    def _set_priors(self, priors: Priors) -> None:
        self._priors = priors
        self._move_priors()

    def _move_priors(self) -> None:
        """Keep a copy of the priors beside the buffers, so that no step has to move them."""
        self._priors_on_device = self._priors.to(self.means_.device)

    # --------------------------------------------------------------------------------------------------- inside

    def _elements(self) -> Tensor:
        """Return the covariances as elements in the dtype of the sums."""
        with full_precision(self.factor_.device):
            return self.covariance.square(self.covariance.root(self.factor_.to(self.running_second.dtype)))

    def _wide(self) -> Parameters:
        """Return a copy of the parameters in the dtype of the sums."""
        return Parameters(*(p.to(self.running_second.dtype, copy=True) for p in self.mixture()))

    def _fresh(self) -> Parameters:
        """Return the parameters of a fresh layer in the dtype of the sums."""
        k, d, like = self.n_components, self.n_features, self.running_second
        return Parameters(
            like.new_full((k,), 1.0 / k),
            like.new_zeros(k, d),
            self.covariance.identity(k, d, like),
        )

    def _snapshot(self) -> Parameters:
        """Return a copy of the parameters: what refers to them must not change with the next update."""
        return Parameters(self.weights_.clone(), self.means_.clone(), self.factor_.clone())

    def running_statistics(self) -> Statistics:
        """Return the sums that minibatch EM blends the next batch into; they are the buffers themselves."""
        sums = (self.running_count, self.running_first, self.running_second)
        return Statistics.of(*sums, self.running_origin, self.covariance)

    def _check_range(self, parameters: Parameters, name: str) -> None:
        """Raise, naming what they come from, if parameters overflow or variances vanish in the dtype of the buffers."""
        narrow = parameters.to(self.means_.dtype)
        elements = self.covariance.square(self.covariance.root(parameters.factor)).to(self.means_.dtype)
        in_range = [bool(torch.isfinite(values).all()) for values in (*narrow, elements)]
        if not all(in_range) or not bool((self.covariance.variances(elements) > 0).all()):
            raise ValueError(
                f"Expected {name} in the range of {self.means_.dtype}, but the mixture leaves it; rescale "
                "the features, or make the mixture with dtype=torch.float64."
            )

    def _write(self, parameters: Parameters) -> None:
        self.weights_.copy_(parameters.weights)
        self.means_.copy_(parameters.means)
        self.factor_.copy_(parameters.factor)

    def _begin(self, statistics: Statistics) -> None:
        """Keep sums of total weight one as the running ones, and forget how an earlier mixture was reached."""
        self._keep(statistics.count, statistics.first, statistics.second, statistics.origin)
        self.running_step_size.zero_()  # no batch's share: see MixtureEM._decayed
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
