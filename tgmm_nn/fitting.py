"""Expectation-maximisation from one start to convergence, as a function of tensors; the layer writes what comes out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tgmm_nn import functional
from tgmm_nn.covariance import Covariance
from tgmm_nn.functional import Parameters
from tgmm_nn.statistics import Statistics, accumulator_dtype

__all__ = ["Fit", "Options", "fit_from"]


class Options(NamedTuple):
    """What shapes a run of EM; see `tgmm_nn.GaussianMixture` for each."""

    covariance: Covariance
    max_iter: int
    tol: float
    reg_covar: float
    reg_covar_relative: bool
    chunk_size: int | None


class Fit(NamedTuple):
    """A finished run of EM.

    Attributes:
        parameters: Final parameters, in the dtype of the sums.
        statistics: Sums from which the last M-step made them.
        history: Mean log-likelihood before each M-step and after the last, in nats.
        converged: Whether the last change was below ``tol``.
    """

    parameters: Parameters
    statistics: Statistics
    history: list[float]
    converged: bool

    @property
    def objective(self) -> float:
        """What EM climbed, at the final parameters; −inf where it is not a number, so that restarts can be compared."""
        return -math.inf if math.isnan(self.history[-1]) else self.history[-1]

    @property
    def last_change(self) -> float:
        """Change of the objective by the last M-step."""
        return self.history[-1] - self.history[-2]

    @property
    def outcome(self) -> dict[str, float | int]:
        """Values of the layer's buffers that report on a fit."""
        return {
            "lower_bound": self.history[-1],
            "objective": self.objective,
            "n_iter": len(self.history) - 1,
            "converged": int(self.converged),
            "fitted": 1,
        }


def fit_from(start: Statistics, x: Tensor, fresh: Parameters, options: Options) -> Fit:
    r"""Run EM from the M-step of ``start`` until the mean log-likelihood changes by less than ``tol``.

    The parameters stay in the dtype of the sums between steps. An E-step takes `moment_statistics` where that forms
    fewer numbers from a row than whitening does, and the conditioning of the current parameters leaves half of the
    digits of the data's dtype, :math:`b\,\varepsilon \le \sqrt\varepsilon`; it takes `whitened_statistics` elsewhere.

    Args:
        start: Statistics whose M-step is the start.
        x: Finite rows, shape ``(n, d)``.
        fresh: Parameters to keep where the start determines none.
        options: What shapes the run.
    """

    def maximize(statistics: Statistics, current: Parameters) -> Parameters:
        return functional.maximize(
            statistics, current, options.covariance, options.reg_covar, options.reg_covar_relative
        )

    parameters, statistics, history = maximize(start, fresh), start, list[float]()
    scale, bound = _scale(x), torch.finfo(x.dtype).eps ** -0.5
    narrower = functional.moment_width(parameters, options.covariance) <= parameters.means.numel()
    while True:
        moments = narrower and bool(functional.conditioning(scale, parameters, options.covariance) <= bound)
        expected = functional.expectation(
            x, parameters, options.covariance, moments=moments, chunk_size=options.chunk_size
        )
        history.append(float(expected.mean_log_likelihood()))
        converged = len(history) > 1 and abs(history[-1] - history[-2]) < options.tol
        if converged or len(history) > options.max_iter:
            return Fit(parameters, statistics, history, converged)
        parameters, statistics = maximize(expected, parameters), expected


def _scale(x: Tensor) -> Tensor:
    """Return the standard deviation of each feature, in float64 where the device has it, chunk by chunk."""
    wide = accumulator_dtype(x.device)
    mean = x.mean(0, dtype=wide)
    square = sum(((rows - mean).square().sum(0) for rows in x.split(8192)), torch.zeros_like(mean))
    return (square / len(x)).sqrt()
