"""`GaussianMixture`: a Gaussian mixture as a PyTorch layer.

What it says of rows is in `tgmm_nn.density`, its buffers are in `tgmm_nn.state`, EM on them in `tgmm_nn.learning`, and
the mathematics in `tgmm_nn.functional`; this file holds the options, and what makes other mixtures and files of one.
"""

from __future__ import annotations

import inspect
import os
from typing import Any, Literal

import torch
from torch import Tensor

from tgmm_nn import checks, exchange, marginals, persistence, sampling
from tgmm_nn.density import full_precision
from tgmm_nn.initialization import Start
from tgmm_nn.learning import MixtureEM
from tgmm_nn.priors import Priors
from tgmm_nn.state import CovarianceType
from tgmm_nn.trainable import TrainableGaussianMixture

__all__ = ["GaussianMixture"]

STARTS = ("init_means", "init_weights", "init_covariances")


def _starting(name: str) -> property:
    """Return a property of a starting value, checked when it is set and read in the shape in which users see it."""

    def read(self: GaussianMixture) -> str | Tensor:
        value = self._start[STARTS.index(name)]
        return self.covariance.public(value) if name == "init_covariances" and isinstance(value, Tensor) else value

    def write(self: GaussianMixture, value: Any) -> None:
        given = {start: getattr(self, start) for start in STARTS} | {name: value}
        self._start = Start.from_options(self.covariance, self.n_components, self.n_features, **given)

    return property(read, write)


def _prior(field: str) -> property:
    """Return a property that reads a prior and can't be set: another value than at construction has no effect."""
    return property(lambda self: getattr(self.priors, field))


class GaussianMixture(MixtureEM):
    r"""Gaussian mixture whose parameters are buffers: log-density forward, EM as a no-grad update.

    .. math:: p(x) = \sum_{k=1}^K \pi_k N(x; \mu_k, \Sigma_k)

    A fresh layer is a valid density, with equal weights, zero means and unit covariances. That is a symmetric point
    which `em_step` alone cannot leave: give it a start by `initialize`, `fit` or `set_parameters`.

    Rows ``x`` may be tensors, arrays or lists of any float or integer dtype and on any device; integers are computed
    with in the mixture's dtype, and `fit` refuses those that it rounds. `fit`, `initialize`, `statistics`, `score`,
    `bic`, `aic` and `icl` also take a ``DataLoader`` (or any iterable of batches that can be iterated more than once):
    of a batch that is a tuple they use the first element, and ``sample_weight`` is then the index of the weights in it.

    Args:
        n_components: Number of components K.
        n_features: Number of features d.
        covariance_type: ``"full"``, ``"diag"``, ``"spherical"`` (one per component), ``"tied_full"``, ``"tied_diag"``
            or ``"tied_spherical"`` (shared by all components). `tgmm_nn.covariance` has the table of shapes.
        weight_concentration_prior: α of a Dirichlet prior on the weights, a number or ``(K,)``. Below 1 it empties weak
            components. `tgmm_nn.priors` has the formulas of all priors; they may be tensors, arrays, lists or numbers.
        mean_prior: m of a Gaussian prior on the means, :math:`N(m_k, \Sigma_k / \kappa)`, shape ``(d,)`` or ``(K, d)``.
        mean_precision_prior: κ, the number of rows that the mean prior counts as; a number or ``(K,)``.
        covariance_prior: Ψ of an inverse Wishart prior on the covariances, in the family's shape, with or without the
            leading K; a number is that multiple of the identity. Together with a mean prior it is
            Normal-inverse-Wishart.
        degrees_of_freedom_prior: ν, above d - 1; a number, or ``(K,)`` where covariances are not tied.
        init_means: Starting means: ``"kmeans"`` (scikit-learn's), ``"kpp"`` (k-means++), ``"random"`` (rows of the
            data), or given, shape ``(K, d)``. Of more than 20,000 distinct rows (or 100 K) a sample is taken for the
            start.
        init_weights: Starting weights: ``"uniform"``, ``"kmeans"`` (the share of rows nearest to each starting mean),
            or given, shape ``(K,)``.
        init_covariances: Starting covariances: ``"empirical"`` (of the rows nearest to each starting mean),
            ``"global"`` (of all rows), ``"eye"``, or given as ``covariance_prior`` is.
        n_init: Number of starts. `initialize` takes the tightest of so many; `fit` races them by objective, beside as
            many by ``"kpp"`` where they are by ``"kmeans"``: all run EM, of many rows on a sample, the poorer half is
            dropped every ten iterations, and the one that is left runs on all rows until a change of ``tol / 100``.
            Means that are given are one start.
        random_state: Seed of the starts and samples; None derives it from ``torch.initial_seed()``. Global generators
            are neither seeded nor advanced.
        cem: Run classification EM: each row belongs wholly to its most probable component, and the likelihood of that
            classification is climbed.
        max_iter: Largest number of M-steps in one `fit`.
        tol: `fit` has converged when its objective changes by less than this, in nats per row; of several starts, the
            one that is left goes on to a hundredth of it, as far as ``max_iter`` allows.
        reg_covar: Number added to the diagonal of each covariance.
        reg_covar_relative: Read ``reg_covar`` as a fraction of the mean variance of the data, so that EM does not
            depend on units.
        warm_start: Let `fit` go on from the mixture as it is, where it is fitted, rather than from a new start.
        verbose: Print the objective in `fit`, or show a progress bar where it is ``"bar"``.
        verbose_interval: Iterations between the lines that ``verbose`` prints.
        chunk_size: Rows per pass through memory; None chooses by the size of the arrays.
        device: Device of the buffers.
        dtype: Dtype of the parameters, float32 or float64, or its name. Sums are kept in float64.

    Attributes:
        weights_: Mixing weights, shape ``(K,)``.
        means_: Means, shape ``(K, d)``.
        covariances_: Covariances, shape by family; computed from the factor.
        factor_: Factor P of the precisions, :math:`\Sigma^{-1} = P P^\top`, with a leading axis of K, or of 1 when
            tied.
        history_: Objective of the last `fit` before each M-step and after the last, in nats per row.
        priors: The conjugate priors, broadcast; `tgmm_nn.priors.Priors`.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range, or half of a prior is missing.

    References:
        Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM algorithm, 1977.
        Celeux and Govaert, A classification EM algorithm for clustering and two stochastic versions, 1992.
        Fraley and Raftery, Bayesian regularization for normal mixture estimation and model-based clustering, 2007.
        Cappé and Moulines, On-line expectation-maximization algorithm for latent data models, 2009.

    Example:
        >>> x = torch.cat([torch.randn(100, 2) - 4, torch.randn(100, 2) + 4])
        >>> gmm = GaussianMixture(n_components=2, n_features=2).fit(x)
        >>> gmm(x).shape, gmm.predict_proba(x).shape, gmm.converged_
        (torch.Size([200]), torch.Size([200, 2]), True)
    """

    init_means = _starting("init_means")
    init_weights = _starting("init_weights")
    init_covariances = _starting("init_covariances")
    weight_concentration_prior = _prior("concentration")
    mean_prior = _prior("mean")
    mean_precision_prior = _prior("mean_precision")
    degrees_of_freedom_prior = _prior("degrees_of_freedom")

    def __init__(
        self,
        n_components: int,
        n_features: int,
        covariance_type: CovarianceType = "full",
        *,
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
        super().__init__(n_components, n_features, covariance_type, device=device, dtype=dtype)
        self.n_init, self.max_iter, self.verbose_interval = n_init, max_iter, verbose_interval
        self.tol, self.reg_covar, self.reg_covar_relative = tol, reg_covar, reg_covar_relative
        self.random_state, self.chunk_size = random_state, chunk_size
        self.cem, self.warm_start, self.verbose = cem, warm_start, verbose
        size = (self.covariance, self.n_components, self.n_features)
        self._set_priors(
            Priors.from_options(
                *size,
                weight_concentration_prior=weight_concentration_prior,
                mean_prior=mean_prior,
                mean_precision_prior=mean_precision_prior,
                covariance_prior=covariance_prior,
                degrees_of_freedom_prior=degrees_of_freedom_prior,
            )
        )
        self._start = Start.from_options(*size, init_means, init_weights, init_covariances)

    @property
    def covariance_prior(self) -> Tensor | None:
        """Scale of the inverse Wishart prior in the shape of ``covariances_``."""
        return None if self.priors.scale is None else self.covariance.public(self.priors.scale)

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for device and dtype, as plain values and tensors on the CPU."""
        names = [name for name in inspect.signature(GaussianMixture).parameters if name not in ("device", "dtype")]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Return every option."""
        n_components, n_features, covariance_type, *options = self.options().items()
        shown = (f"{name}={tuple(v.shape) if isinstance(v, Tensor) else repr(v)}" for name, v in options)
        return ", ".join((f"{n_components[1]}, {n_features[1]}, {covariance_type[1]!r}", *shown))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write options and state to a file, which `load` reads; an older file is replaced only when all is written."""
        options = {**self.options(), "dtype": str(self.means_.dtype).removeprefix("torch.")}
        persistence.write(path, options, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> GaussianMixture:
        """Return the mixture that `save` has written: options, parameters, counters, history and running sums.

        The file is read as weights only: nothing in it is executed.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If the file is corrupt or holds anything else.
        """
        names = inspect.signature(GaussianMixture).parameters
        options, state = persistence.read(path, names)
        try:
            gmm = cls(**{**options, "device": "cpu"})
            gmm.load_state_dict(state)
            persistence.check_valid(dict(gmm.named_buffers()), gmm.covariance)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Expected `path` to be a file of a valid mixture, but {str(path)!r} is not: {error}"
            ) from error
        return gmm if device is None else gmm.to(device)

    # --------------------------------------------------------------------------------- samples and other mixtures

    @torch.no_grad()
    def sample(
        self,
        n: int,
        component: int | None = None,
        confidence: float | None = None,
        std_range: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw rows, also of a shell about the component that each is drawn from; exact, without rejection.

        Args:
            n: Number of rows.
            component: The only component to draw from; None draws components by weight.
            confidence: Draw from the ellipsoid that holds this share of the component, in (0, 1].
            std_range: Draw between these two Mahalanobis distances from the component's mean; the second may be
                infinite.
            generator: Source of randomness. None takes the layer's own stream, of which each call takes the next part;
                torch's global generator is not advanced. The stream is that of ``random_state``; without one it is that
                of ``torch.initial_seed()`` and the parameters, so that different mixtures do not share their noise.

        Returns:
            Rows of shape ``(n, d)`` in the mixture's dtype, and the component of each, shape ``(n,)``, int64.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of range, both ``confidence`` and ``std_range`` are given, or the shell holds less
                probability than float64 can represent.

        Example:
            >>> rows, components = GaussianMixture(2, 3).sample(5, std_range=(3.0, float("inf")))
            >>> rows.shape, bool((rows.norm(dim=-1) >= 3).all())
            (torch.Size([5, 3]), True)
        """
        checks.check_integer("n", n, minimum=0)
        if component is not None:
            checks.check_integer("component", component, minimum=0, maximum=self.n_components - 1)
        bounds = sampling.check_shell(confidence, std_range, self.n_features)
        checks.check_generator("generator", generator)
        source = sampling.stream(self.random_state, self._n_draws, self.mixture()) if generator is None else generator
        with full_precision(self.means_.device):
            rows, ids = sampling.draw(int(n), self._wide(), self.covariance, component, bounds, source)
        self._n_draws += generator is None  # only now: a shell that can't be drawn from changes nothing
        return rows.to(self.means_.dtype), ids

    @torch.no_grad()
    def marginal(self, dims: Any) -> GaussianMixture:
        """Return the mixture of some features alone, as a new layer; its priors and given starting values are dropped.

        Args:
            dims: Features to keep, in this order: an integer or several, negative ones counted from the end.

        Raises:
            TypeError: If ``dims`` are no integers.
            ValueError: If one is out of range or named twice, or there is none.

        Example:
            >>> gmm = GaussianMixture(1, 2, "diag").set_parameters([1.0], [[1.0, 2.0]], [[3.0, 4.0]])
            >>> gmm.marginal(1).means_, gmm.marginal(1).covariances_
            (tensor([[2.]]), tensor([[4.]]))
        """
        keep, _ = marginals.check_dims(dims, self.n_features)
        return self._sibling(*marginals.marginal(self._wide(), self.covariance, keep.to(self.means_.device)))

    @torch.no_grad()
    def condition(self, dims: Any, values: Any) -> GaussianMixture:
        """Return the mixture of the other features where those in ``dims`` have ``values``, as a new layer.

        Its components are those of this mixture, its weights their posterior probabilities, and its features the others
        in ascending order; its priors and given starting values are dropped.

        Args:
            dims: Features that are known: an integer or several, negative ones counted from the end.
            values: Their values, a number or shape ``(m,)``.

        Raises:
            TypeError: If ``dims`` are no integers, or ``values`` no numbers.
            ValueError: If a feature is out of range or named twice, none is left, or ``values`` do not fit.

        Example:
            >>> gmm = GaussianMixture(1, 2).set_parameters([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.5, 1.0]]])
            >>> gmm.condition(0, 2.0).means_, gmm.condition(0, 2.0).covariances_
            (tensor([[1.]]), tensor([[[0.7500]]]))
        """
        given, rest = marginals.check_dims(dims, self.n_features)
        if not len(rest):
            raise ValueError(f"Expected `dims` to leave a feature, but got all {self.n_features}.")
        shapes = ((len(given),), ()) if len(given) == 1 else ((len(given),),)
        values = checks.check_array("values", values, self.running_second, *shapes).reshape(-1)
        given, rest = given.to(values.device), rest.to(values.device)
        return self._sibling(*marginals.conditional(self._wide(), self.covariance, given, values, rest))

    def to_parameters(self) -> TrainableGaussianMixture:
        """Return the same mixture as parameters that learn by gradient; this one stays as it is.

        Example:
            >>> gmm = GaussianMixture(2, 3)
            >>> [tuple(parameter.shape) for parameter in gmm.to_parameters().parameters()]
            [(2,), (2, 3), (2, 3, 3)]
        """
        return TrainableGaussianMixture(self)

    @classmethod
    def from_sklearn(
        cls, fitted: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = torch.float64
    ) -> GaussianMixture:
        """Return a layer with the parameters of a fitted ``sklearn.mixture.GaussianMixture`` and the options it shares.

        What it reports of its fit comes along: ``converged_``, ``n_iter_`` and ``lower_bound_``.

        Raises:
            TypeError: If ``fitted`` is anything else.
            ValueError: If it is not fitted.
        """
        gmm = cls(**exchange.options_of(fitted), device=device, dtype=dtype)
        gmm.set_parameters(fitted.weights_, fitted.means_, fitted.covariances_)
        gmm.converged.fill_(int(fitted.converged_))
        gmm.n_iter.fill_(fitted.n_iter_)
        gmm.lower_bound.fill_(float(fitted.lower_bound_))
        return gmm

    def to_sklearn(self) -> Any:
        """Return a fitted ``sklearn.mixture.GaussianMixture`` of equal log-density.

        scikit-learn has no ``tied_diag`` and no ``tied_spherical``: they become ``tied``, with more free parameters. It
        has no priors, no relative ridge and no classification EM either: what it fits further is maximum likelihood.
        """
        names = ("n_components", "n_init", "max_iter", "tol", "reg_covar", "warm_start", "init_means", "init_weights")
        attributes = {
            "converged_": self.converged_,
            "n_iter_": self.n_iter_,
            "lower_bound_": self.lower_bound_,
        }
        options = {name: getattr(self, name) for name in names}
        options["random_state"] = None if self.random_state is None else self.random_state % 2**32  # NumPy's range
        return exchange.to_sklearn(self._wide(), self.covariance, self.covariance_type, options, attributes)

    def _sibling(self, weights: Tensor, means: Tensor, elements: Tensor) -> GaussianMixture:
        """Return a new layer of another number of features, with the options that do not depend on that."""
        kept = {name: value for name, value in self.options().items() if not isinstance(value, Tensor)}
        kept["n_features"] = means.shape[-1]
        gmm = type(self)(**kept, device=self.means_.device, dtype=self.means_.dtype)
        gmm.set_parameters(weights, means, self.covariance.public(elements))
        return gmm
