"""Expectation-maximisation from one start to convergence, as a function of tensors; the layer writes what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tgmm_nn import functional
from tgmm_nn.assignment import HARD, SOFT, Assignment
from tgmm_nn.covariance import Covariance
from tgmm_nn.data import Rows, Survey
from tgmm_nn.functional import Parameters
from tgmm_nn.maximization import EVERYTHING, Learned
from tgmm_nn.priors import Priors
from tgmm_nn.statistics import Statistics

__all__ = [
    "POLISH",
    "Fit",
    "Options",
    "RaceReport",
    "Report",
    "Run",
    "fit_from",
    "progress",
    "race",
    "race_progress",
    "sum_over",
]


EStep = Callable[[Tensor, Tensor | None, Tensor | None], Statistics]

# M-steps of a race between two decisions.
ROUND = 3

# M-steps that may follow convergence after a race.
POLISH = 10


class Options(NamedTuple):
    """What shapes a run of EM; see `tgmm_nn.GaussianMixture` for each."""

    covariance: Covariance
    priors: Priors
    cem: bool
    max_iter: int
    tol: float
    reg_covar: float
    reg_covar_relative: bool
    chunk_size: int | None
    learned: Learned = EVERYTHING
    polish: int = 0

    def maximize(self, statistics: Statistics, current: Parameters) -> Parameters:
        """Return the M-step at ``statistics``."""
        ridge = (self.reg_covar, self.reg_covar_relative)
        return functional.maximize(statistics, current, self.covariance, *ridge, self.priors, self.learned)

    def singular(self, statistics: Statistics, dtype: torch.dtype) -> list[int]:
        """Return the elements that rows of a dtype determine as covariances which are singular to its precision."""
        ridge = (self.reg_covar, self.reg_covar_relative)
        element, known = functional.estimate_covariances(statistics, self.covariance, *ridge, self.priors)
        positive = self.covariance.is_positive(element, torch.finfo(dtype).eps)
        return (known & ~positive).nonzero().flatten().tolist()


class Fit(NamedTuple):
    """A finished run of EM.

    Attributes:
        parameters: Final parameters, in the dtype of the sums.
        statistics: Sums from which the last M-step made them.
        history: Objective before each M-step and after the last, in nats per unit of row weight.
        lower_bound: Mean log-likelihood at the final parameters, in nats.
        converged: Whether the last change of the objective was below ``tol``.
    """

    parameters: Parameters
    statistics: Statistics
    history: list[float]
    lower_bound: float
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
            "lower_bound": self.lower_bound,
            "objective": self.objective,
            "n_iter": len(self.history) - 1,
            "converged": int(self.converged),
            "fitted": 1,
        }


class Report(Protocol):
    """What is told after each E-step: how many M-steps came before it, the objectives so far, and how it ended."""

    def __call__(self, n_iter: int, history: list[float], end: str) -> None:
        """Tell a user."""


class RaceReport(Protocol):
    """What is told after each round of a race: how many M-steps each run has made, and which go on, best first."""

    def __call__(self, n_iter: int, runs: list[Run]) -> None:
        """Tell a user."""


def sum_over(
    data: Rows,
    parameters: Parameters,
    covariance: Covariance,
    *,
    assignment: Assignment = SOFT,
    moments: bool = False,
    chunk_size: int | None = None,
    checked: bool = False,
) -> Statistics:
    """Return the E-step's sums of one pass over all rows; ``checked`` raises where one is not finite."""
    how: dict[str, Any] = {"assignment": assignment, "moments": moments, "chunk_size": chunk_size}
    with data.checked_batches() if checked else data.batches() as batches:
        sums = (functional.expectation(rows, parameters, covariance, *of_rows, **how) for rows, *of_rows in batches)
        total = next(sums, None)
        if total is None:
            raise ValueError("Expected `x` to give at least one batch of rows, but it gave none.")
        return reduce(Statistics.merge, sums, total)


class Run(NamedTuple):
    """EM from one of several starts, at the end of an E-step.

    Attributes:
        number: Which start it came from, counted from one.
        parameters: Parameters of that E-step, in the dtype of the sums.
        expected: Sums of that E-step.
        history: Objectives so far, one for each E-step, in nats per unit of row weight.
    """

    number: int
    parameters: Parameters
    expected: Statistics
    history: list[float]

    @property
    def objective(self) -> float:
        """The last objective; −inf where it is not a number, so that runs can be compared."""
        return -math.inf if math.isnan(self.history[-1]) else self.history[-1]


def expect(
    several: Sequence[Parameters], data: Rows, found: Survey, options: Options
) -> list[tuple[Statistics, float]]:
    r"""Make the E-steps of several mixtures in one pass over the rows; return the sums and the objective of each.

    An E-step takes `moment_statistics` where that forms fewer numbers from a row than whitening does, and the
    conditioning of the parameters leaves half of the digits of the data's dtype, :math:`b\,\varepsilon \le
    \sqrt\varepsilon`; it takes `whitened_statistics` elsewhere.

    Args:
        several: Parameters of each mixture.
        data: Finite rows.
        found: What a first pass over them found.
        options: What shapes the runs.

    Raises:
        ValueError: If a stream gives other rows than in the first pass.
    """
    covariance = options.covariance
    bound = torch.finfo(found.dtype).eps ** -0.5

    def how(parameters: Parameters) -> dict[str, Any]:
        narrower = functional.moment_width(parameters, covariance) <= parameters.means.numel()
        scale = found.scale(functional.mixture_mean(parameters))  # moments are taken about the mixture's mean
        moments = narrower and bool(functional.conditioning(scale, parameters, covariance) <= bound)
        assignment = HARD if options.cem else SOFT
        return {"assignment": assignment, "moments": moments, "chunk_size": options.chunk_size}

    if len(several) == 1:
        sums = [sum_over(data, several[0], covariance, checked=data.streamed, **how(several[0]))]
    else:
        sums = sums_over(data, [_step(p, covariance, **how(p)) for p in several])
    if data.streamed and (n_rows := int(sums[0].rows + sums[0].skipped)) != found.n_rows:
        raise ValueError(
            f"Expected `x` to give the same rows in each pass, but after one of {found.n_rows} rows a pass of "
            f"{n_rows} followed."
        )
    climbed = [total.classification if options.cem else total.log_likelihood for total in sums]
    log_priors = [options.priors.log_density(*parameters, covariance) for parameters in several]
    return [
        (total, float((value + log_prior) / total.weight()))
        for total, value, log_prior in zip(sums, climbed, log_priors, strict=True)
    ]


def _step(parameters: Parameters, covariance: Covariance, **how: Any) -> EStep:
    """Return the E-step of a mixture as a function of a batch."""
    return lambda rows, *of_rows: functional.expectation(rows, parameters, covariance, *of_rows, **how)


def sums_over(data: Rows, steps: Sequence[EStep]) -> list[Statistics]:
    """Return the sums of several E-steps, all made batch by batch in one pass over rows in memory."""
    with data.batches() as batches:
        totals, *parts = ([step(*batch) for step in steps] for batch in batches)
    return [reduce(Statistics.merge, sums) for sums in zip(totals, *parts, strict=True)]


def fit_from(start: Parameters, data: Rows, found: Survey, options: Options, report: Report) -> Fit:
    r"""Run EM until its objective changes by less than ``tol``.

    .. math::
        \frac1N \Big( \sum_n \log p(x_n) + \log p(\pi, \mu, \Sigma) \Big),

    with the log-likelihood of the classification, :math:`\sum_n \max_k \log \pi_k N(x_n; \mu_k, \Sigma_k)`, in place of
    the first term for classification EM. Without regularisation it never falls.

    The parameters stay in the dtype of the sums between steps. Up to ``polish`` M-steps follow while the change is
    above a hundredth of ``tol``.

    Args:
        start: Parameters to start from, in the dtype of the sums.
        data: Finite rows.
        found: What a first pass over them found.
        options: What shapes the run.
        report: Is told after each E-step.
    """
    parameters = start
    [(expected, objective)] = expect([parameters], data, found, options)
    history, polish = [objective], options.polish
    report(0, history, "")
    for n_iter in range(1, options.max_iter + 1):
        statistics, parameters = expected, options.maximize(expected, parameters)
        [(expected, objective)] = expect([parameters], data, found, options)
        history.append(objective)
        change = abs(history[-1] - history[-2])
        converged = change < options.tol
        done = converged and (polish == 0 or change < options.tol / 100)
        last = done or n_iter == options.max_iter
        report(n_iter, history, "" if not last else "converged" if converged else "stopped")
        if last:
            break
        polish -= converged
    return Fit(parameters, statistics, history, float(expected.mean_log_likelihood()), converged)


def race(starts: Sequence[Parameters], data: Rows, found: Survey, options: Options, report: RaceReport) -> Run:
    """Run EM from all starts at once, drop the poorer half after every few M-steps, and return the run that is left.

    This is successive halving by the objective; short runs of EM from several starts, of which the best goes on, are
    the case of one round. Runs of one objective are taken as one. All runs share each pass over the rows.

    Args:
        starts: Parameters to start from, in the dtype of the sums.
        data: Finite rows.
        found: What a first pass over them found.
        options: What shapes the runs; none makes more than ``max_iter`` M-steps.
        report: Is told after each decision.

    References:
        Biernacki, Celeux and Govaert, Choosing starting values for the EM algorithm for getting the highest likelihood
        in multivariate Gaussian mixture models, 2003.
        Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, 2016.
    """
    same = options.tol / 100
    first = expect(starts, data, found, options)
    runs = [Run(n, p, s, [v]) for n, (p, (s, v)) in enumerate(zip(starts, first, strict=True), start=1)]
    runs = best_of(runs, len(runs), same)  # k-means often finds the same partition again
    report(0, runs)
    while len(runs) > 1 and (left := options.max_iter + 1 - len(runs[0].history)):
        for _ in range(min(ROUND, left)):
            runs = advance(runs, data, found, options)
        runs = best_of(runs, (len(runs) + 1) // 2, same)
        report(len(runs[0].history) - 1, runs)
    return runs[0]


def advance(runs: Sequence[Run], data: Rows, found: Survey, options: Options) -> list[Run]:
    """Make an M-step of each run, and then their E-steps in one pass over the rows."""
    moved = [options.maximize(run.expected, run.parameters) for run in runs]
    stepped = zip(runs, moved, expect(moved, data, found, options), strict=True)
    return [Run(run.number, p, s, [*run.history, v]) for run, p, (s, v) in stepped]


def best_of(runs: Sequence[Run], size: int, same: float) -> list[Run]:
    """Return the ``size`` runs of the best objectives, best first; of runs whose objectives are the ``same``, one."""
    kept = list[Run]()
    for run in sorted(runs, key=lambda run: -run.objective):  # stable: of equals the first start
        if not kept or kept[-1].objective - run.objective > same:
            kept.append(run)
    return kept[:size]


@contextmanager
def progress(verbose: bool | str, interval: int, max_iter: int, start: int, n_starts: int) -> Iterator[Report]:
    """Give what tells a user how a run goes: nothing, a line every ``interval`` iterations, or a progress bar."""
    name = f"EM, start {start} of {n_starts}" if n_starts > 1 else "EM"
    if verbose == "bar":
        from tqdm.auto import tqdm

        with tqdm(total=max_iter, desc=name, unit="it") as bar:

            def advance(n_iter: int, history: list[float], end: str) -> None:
                bar.total = n_iter if end else max_iter  # a fit that converges early is complete as well
                bar.set_postfix(objective=f"{history[-1]:.6g}", refresh=False)
                bar.update(n_iter - bar.n)

            yield advance
        return

    def line(n_iter: int, history: list[float], end: str) -> None:
        if verbose and (end or n_iter % interval == 0):
            change = f", change {history[-1] - history[-2]:+.2e}" if n_iter else ""
            ended = f", {end}" if end else ""
            print(f"{name}: iteration {n_iter}, objective {history[-1]:.6f} nats per row{change}{ended}", flush=True)

    yield line


@contextmanager
def race_progress(verbose: bool | str, n_starts: int) -> Iterator[RaceReport]:
    """Give what tells a user how a race goes: nothing, a line for each decision, or a bar of starts that are out."""
    name = f"EM, race of {n_starts} starts"
    if verbose == "bar":
        from tqdm.auto import tqdm

        with tqdm(total=n_starts - 1, desc=name, unit="start") as bar:

            def advance_bar(n_iter: int, runs: list[Run]) -> None:
                bar.update(n_starts - len(runs) - bar.n)

            yield advance_bar
        return

    def line(n_iter: int, runs: list[Run]) -> None:
        if verbose:
            best = runs[0]
            print(
                f"{name}: iteration {n_iter}, {len(runs)} left, the best is {best.number} with objective "
                f"{best.objective:.6f} nats per row of the sample",
                flush=True,
            )

    yield line
