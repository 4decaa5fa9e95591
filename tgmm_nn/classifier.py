"""`MixtureClassifier`: a mixture for each class, as a generative classifier and a density in one."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tgmm_nn import checks
from tgmm_nn.assignment import Assignment
from tgmm_nn.class_starts import UNLABELLED, class_starts, total_over
from tgmm_nn.distributed import on_all_ranks
from tgmm_nn.maximization import Learned
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.state import CovarianceType
from tgmm_nn.statistics import Statistics

__all__ = ["UNLABELLED", "MixtureClassifier"]


class MixtureClassifier(nn.Module):
    r"""Class-conditional Gaussian mixtures, learned by EM from rows with and without labels.

    .. math::
        p(x, c) = \sum_{k \in c} \pi_k N(x; \mu_k, \Sigma_k), \qquad p(x) = \sum_c p(x, c), \qquad
        p(c | x) = p(x, c) / p(x),

    where the components of class c are c M, …, c M + M − 1, for M ``components_per_class``. It is one `GaussianMixture`
    whose E-step may share a row among the components of its class only: nothing of EM is written twice. Calling it
    gives log p(x, c), which cross-entropy takes as logits; a network in front of it learns by gradient while its
    parameters, which are buffers, learn by EM.

    With one component for each class, ``"tied_full"`` is linear discriminant analysis and ``"full"`` the quadratic one.

    Labels are integers from 0 to C − 1, and −1 for a row without a label, which is shared among all components
    (semi-supervised learning). A class that no row belongs to keeps its parameters, its weight included; under a
    ``step_size``, where the running sums are its rows, its weight fades with them.

    Args:
        n_classes: Number of classes C.
        n_features: Number of features d.
        components_per_class: Number of components M of each class.
        covariance_type: As in `GaussianMixture`; a tied covariance is shared by all classes.
        ignore_index: Label of rows that are left out, as in dense maps; None leaves out none.
        weight_concentration_prior: As in `GaussianMixture`, of its C · M components, as are the options below.
        mean_prior: See `GaussianMixture`.
        mean_precision_prior: See `GaussianMixture`.
        covariance_prior: See `GaussianMixture`.
        degrees_of_freedom_prior: See `GaussianMixture`.
        init_means: A name, applied within each class, or means of shape ``(C · M, d)``.
        init_weights: A name, applied within each class, or weights of shape ``(C · M,)``, of which each class takes the
            proportions; what classes weigh, their rows say.
        init_covariances: A name, applied within each class, or covariances.
        n_init: Draws of the means of a class, of which the tightest is taken.
        random_state: See `GaussianMixture`.
        cem: See `GaussianMixture`.
        max_iter: See `GaussianMixture`.
        tol: See `GaussianMixture`.
        reg_covar: See `GaussianMixture`.
        reg_covar_relative: See `GaussianMixture`.
        warm_start: See `GaussianMixture`.
        verbose: See `GaussianMixture`.
        verbose_interval: See `GaussianMixture`.
        chunk_size: See `GaussianMixture`.
        device: See `GaussianMixture`.
        dtype: See `GaussianMixture`.

    Attributes:
        mixture: The `GaussianMixture` of C · M components: density, samples, files, metrics.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    References:
        Hastie and Tibshirani, Discriminant analysis by Gaussian mixtures, 1996.
        Nigam, McCallum, Thrun and Mitchell, Text classification from labeled and unlabeled documents using EM, 2000.

    Example:
        >>> x = torch.cat([torch.randn(50, 2) - 4, torch.randn(50, 2) + 4])
        >>> y = torch.arange(100) // 50
        >>> model = MixtureClassifier(n_classes=2, n_features=2).fit(x, y)
        >>> model(x).shape, model.predict(torch.tensor([[-4.0, -4.0], [4.0, 4.0]]))
        (torch.Size([100, 2]), tensor([0, 1]))
    """

    def __init__(
        self,
        n_classes: int,
        n_features: int,
        components_per_class: int = 1,
        covariance_type: CovarianceType = "full",
        *,
        ignore_index: int | None = None,
        weight_concentration_prior: Any = None,
        mean_prior: Any = None,
        mean_precision_prior: Any = None,
        covariance_prior: Any = None,
        degrees_of_freedom_prior: Any = None,
        init_means: Any = "kmeans",
        init_weights: Any = "uniform",
        init_covariances: Any = "empirical",
        n_init: int = 1,
        random_state: int | None = None,
        cem: bool = False,
        max_iter: int = 100,
        tol: float = 1e-4,
        reg_covar: float = 1e-6,
        reg_covar_relative: bool = False,
        warm_start: bool = False,
        verbose: bool | Literal["bar"] = False,
        verbose_interval: int = 10,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer("n_classes", n_classes)
        checks.check_integer("components_per_class", components_per_class)
        if ignore_index is not None:
            checks.check_integer("ignore_index", ignore_index, minimum=-(2**62))
            if UNLABELLED <= ignore_index < n_classes:
                raise ValueError(
                    f"Expected `ignore_index` to be no class (0 to {n_classes - 1}), and not {UNLABELLED}, the mark "
                    f"of unlabelled rows, but got {ignore_index}."
                )
        self.n_classes, self.components_per_class, self.ignore_index = n_classes, components_per_class, ignore_index
        self.mixture = GaussianMixture(
            n_classes * components_per_class,
            n_features,
            covariance_type,
            weight_concentration_prior=weight_concentration_prior,
            mean_prior=mean_prior,
            mean_precision_prior=mean_precision_prior,
            covariance_prior=covariance_prior,
            degrees_of_freedom_prior=degrees_of_freedom_prior,
            init_means=init_means,
            init_weights=init_weights,
            init_covariances=init_covariances,
            n_init=n_init,
            random_state=random_state,
            cem=cem,
            max_iter=max_iter,
            tol=tol,
            reg_covar=reg_covar,
            reg_covar_relative=reg_covar_relative,
            warm_start=warm_start,
            verbose=verbose,
            verbose_interval=verbose_interval,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
        )

    def get_extra_state(self) -> dict[str, int]:
        """Return how the components are divided among classes, which travels with ``state_dict``."""
        return {"n_classes": self.n_classes, "components_per_class": self.components_per_class}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Do nothing: the division was compared before any buffer was written."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Here, before the mixture's buffers are read, and not by an entry in the list of errors, which comes after.
        found = state_dict.get(f"{prefix}_extra_state", self.get_extra_state())
        if found != self.get_extra_state():
            raise ValueError(f"Expected a state of {self.get_extra_state()}, but got one of {found}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def n_features(self) -> int:
        """Number of features d."""
        return self.mixture.n_features

    def extra_repr(self) -> str:
        """Return what the mixture does not show."""
        return f"{self.n_classes}, components_per_class={self.components_per_class}, ignore_index={self.ignore_index}"

    # ------------------------------------------------------------------------------------------------ prediction

    def forward(self, x: Any) -> Tensor:
        """Return log p(x, c) in nats, shape ``(..., C)``, differentiable in ``x``: logits of the classes."""
        return self._by_class(self.mixture.log_joint(x)).logsumexp(-1)

    def log_density(self, x: Any) -> Tensor:
        """Return log p(x) in nats, shape ``(...)``, differentiable in ``x``."""
        return self.mixture(x)

    def predict_proba(self, x: Any) -> Tensor:
        """Return p(c | x), shape ``(..., C)``."""
        return self(x).softmax(-1)

    def predict(self, x: Any) -> Tensor:
        """Return the most probable class of each row, shape ``(...)``, int64."""
        return self(x).argmax(-1)

    # -------------------------------------------------------------------------------------------------- learning

    def log_prior(self, y: Any) -> Tensor:
        """Return what labels say of components: 0 where a row may belong to one and −inf where not, ``(..., C · M)``.

        A row without a label, or with ``ignore_index``, may belong to any.

        Raises:
            TypeError: If ``y`` holds no integers.
            ValueError: If a label is out of range.
        """
        y = self._labels(y)
        of_component = torch.arange(self.mixture.n_components, device=y.device) // self.components_per_class
        allowed = (y[..., None] == of_component) | ((y < 0) | (y >= self.n_classes))[..., None]
        return torch.where(allowed, 0.0, -torch.inf).to(self.mixture.means_)

    @torch.no_grad()
    def statistics(self, x: Any, y: Any, sample_weight: Any = None, assignment: Assignment | None = None) -> Statistics:
        """Return the sums that an M-step needs (the E-step), of this rank's rows alone; see `GaussianMixture`.

        Args:
            x: Rows, shape ``(..., d)``.
            y: Labels, integers, shape ``(...)``; −1 marks a row without one.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            assignment: How a row is shared among the components that its label allows.

        Raises:
            TypeError: If ``y`` holds no integers, or another argument no real numbers.
            ValueError: If a label is out of range, or an argument has the wrong shape.
        """
        x, labels, weight = self._checked(x, y, sample_weight)
        return self.mixture.statistics(x, weight, self.log_prior(labels), assignment)

    @torch.no_grad()
    def em_step(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        step_size: float | Tensor | None = None,
        *,
        assignment: Assignment | None = None,
        sync: bool = True,
    ) -> Tensor:
        r"""Make one EM update on rows with labels; see `GaussianMixture.em_step`.

        Returns:
            Mean of log p(x, c) of labelled and log p(x) of other rows before the update in nats, shape ``()``.
        """
        checks.check_step_size(step_size)
        if not torch.compiler.is_compiling() and not self.mixture.fitted_ and not bool((self._labels(y) >= 0).any()):
            raise ValueError("Expected `y` with labelled rows to start from, but got none; all classes are alike yet.")
        sums = self.statistics(x, y, sample_weight, assignment)
        return self.update(sums.over_ranks() if sync else sums, step_size)

    @torch.no_grad()
    def update(
        self, statistics: Statistics, step_size: float | Tensor | None = None, *, learned: Learned | None = None
    ) -> Tensor:
        """Make the M-step of sums that are there already, those of all ranks; see `GaussianMixture.update`."""
        return self.mixture.update(statistics, step_size, learned=self.learned(statistics, step_size, learned))

    def learned(
        self, statistics: Statistics, step_size: float | Tensor | None = None, learned: Learned | None = None
    ) -> Learned:
        """Return what an M-step may move: of ``learned``, the classes that the sums hold rows of."""
        seen = statistics.count if step_size is None else statistics.count + self.mixture.running_count
        free = (self._by_class(seen).sum(-1) > 0).repeat_interleave(self.components_per_class)
        given = Learned() if learned is None else learned
        return Learned(*(free if part is None else free & part for part in given))

    @torch.no_grad()
    def initialize(self, x: Any, y: Any, *, sample_weight: Any = None, sync: bool = True) -> MixtureClassifier:
        """Start each class from its own rows, as the options say; a class without rows keeps its parameters.

        Args:
            x: Finite rows, shape ``(..., d)``; those without a label have no part in the start.
            y: Labels, integers, shape ``(...)``; at least M rows of each class that has any.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            sync: Whether the rows of all ranks are one data set, as in `fit`; then every rank has to call this.

        Returns:
            The classifier itself.

        Raises:
            TypeError: If ``y`` holds no integers, or another argument no real numbers.
            ValueError: If no row has a label, a class has rows but fewer than M, a label is out of range, a row is not
                finite, or an argument has the wrong shape; nothing is changed then.
            RuntimeError: If another rank failed; nothing is changed then.

        Warns:
            UserWarning: If a class has no rows.
        """
        trial = self._started(*self._flat(x, y, sample_weight, sync), sync)
        self.mixture.load_state_dict(trial.state_dict())
        return self

    @torch.no_grad()
    def fit(self, x: Any, y: Any, *, sample_weight: Any = None, sync: bool = True) -> MixtureClassifier:
        r"""Start each class from its own rows, and run EM on all rows until the objective settles.

        .. math::
            \frac1N \Big( \sum_{y_n \ge 0} \log p(x_n, y_n) + \sum_{y_n = -1} \log p(x_n)
            + \log p(\pi, \mu, \Sigma) \Big)

        Args:
            x: Finite rows, shape ``(..., d)``.
            y: Labels, integers, shape ``(...)``; −1 marks a row without one.
            sample_weight: Non-negative weight of each row, shape ``(...)``.
            sync: Whether the rows of all ranks are one data set; then every rank has to call this, perhaps with few
                rows or none. False fits this rank's rows alone.

        Returns:
            The classifier itself.

        Raises:
            TypeError: If ``y`` holds no integers, or another argument no real numbers.
            ValueError: As in `initialize` and `GaussianMixture.fit`; nothing is changed then.
            RuntimeError: If another rank failed; nothing is changed then.

        Warns:
            UserWarning: As `initialize` and `GaussianMixture.fit` do.
        """
        rows, labels, weight = self._flat(x, y, sample_weight, sync)
        warm = self.mixture.warm_start and self.mixture.fitted_
        trial = copy.deepcopy(self.mixture) if warm else self._started(rows, labels, weight, sync)
        log_prior = self.log_prior(labels)
        allowed = total_over((log_prior > -torch.inf).any(0).to(torch.int64), sync) > 0
        free = self._by_class(allowed).any(-1)  # classes that a row may belong to
        trial.warm_start = True
        learned = Learned(*(free.repeat_interleave(self.components_per_class),) * 3)
        trial.fit(rows, sample_weight=weight, log_prior=log_prior, learned=learned, sync=sync)
        self.mixture.load_state_dict(trial.state_dict())
        return self

    # --------------------------------------------------------------------------------------------------- inside

    def _by_class(self, of_components: Tensor) -> Tensor:
        """Return numbers of components, ``(..., C · M)``, as ``(..., C, M)``."""
        return of_components.unflatten(-1, (self.n_classes, self.components_per_class))

    def _labels(self, y: Any) -> Tensor:
        """Return labels as integers on the mixture's device, or raise; reads their range on the host."""
        y = checks.to_tensor("y", y, torch.int64)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"Expected `y` to hold integers, but got {y.dtype}.")
        y = y.detach().to(self.mixture.means_.device, torch.int64)
        wrong = (y < UNLABELLED) | (y >= self.n_classes)
        if self.ignore_index is not None:
            wrong = wrong & (y != self.ignore_index)
        if not torch.compiler.is_compiling() and bool(wrong.any()):
            besides = "" if self.ignore_index is None else f" and ignore_index={self.ignore_index}"
            raise ValueError(
                f"Expected `y` to hold classes from 0 to {self.n_classes - 1}, {UNLABELLED} for rows without a label"
                f"{besides}, but got {y[wrong].unique()[:10].tolist()}."
            )
        return y

    def _checked(self, x: Any, y: Any, sample_weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return rows, their labels, and their weights, which are zero where a row is ignored; or raise."""
        x = checks.to_tensor("x", x, self.mixture.means_.dtype)
        checks.check_rows("x", x, self.n_features)
        labels = self._labels(y)
        if labels.shape != x.shape[:-1]:
            raise ValueError(
                f"Expected `y` of shape {tuple(x.shape[:-1])}, one label for each row of `x`, but got "
                f"{tuple(labels.shape)}."
            )
        if sample_weight is not None:
            sample_weight = checks.to_tensor("sample_weight", sample_weight, self.mixture.means_.dtype)
            checks.check_sample_weight(sample_weight, tuple(x.shape[:-1]))
            sample_weight = sample_weight.to(labels.device)
        if self.ignore_index is not None:
            used = (labels != self.ignore_index).to(self.mixture.means_.dtype)
            sample_weight = used if sample_weight is None else torch.where(used > 0, sample_weight, 0.0)
        return x, labels, sample_weight

    def _flat(self, x: Any, y: Any, sample_weight: Any, sync: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the rows ``(n, d)`` that weigh anything, their labels and weights ``(n,)``; or raise, on all ranks."""
        device = self.mixture.means_.device
        x, labels, weight = on_all_ranks(lambda: self._checked(x, y, sample_weight), device, sync=sync)
        rows, labels = x.reshape(-1, self.n_features).to(labels.device), labels.reshape(-1)
        weight = None if weight is None else weight.reshape(-1)
        if weight is None:
            return rows, labels, None
        used = weight != 0  # those that are ignored weigh nothing
        return rows[used], labels[used], None if sample_weight is None else weight[used]

    def _started(self, rows: Tensor, labels: Tensor, weight: Tensor | None, sync: bool) -> GaussianMixture:
        """Return a mixture that starts in each class from its own rows."""
        sums = class_starts(self.mixture, self.n_classes, rows, labels, weight, sync)
        return copy.deepcopy(self.mixture).initialize_from(sums, self.learned(sums))
