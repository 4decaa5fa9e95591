"""Expectation-maximisation from one start to convergence, as a function of tensors; the layer writes what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tgmm_nn.assignment import HARD, SOFT, Assignment
from tgmm_nn.covariance import Covariance
from tgmm_nn.data import Rows
from tgmm_nn.distributed import attempt, raise_on_all_ranks
from tgmm_nn.expectation import expectations
from tgmm_nn.forms import moment_rounding
from tgmm_nn.maximization import EVERYTHING, Learned, estimate_covariances, maximize, maximize_watched
from tgmm_nn.priors import Priors
from tgmm_nn.statistics import Parameters, Statistics
from tgmm_nn.survey import Survey

__all__ = [
    "Expected",
    "Fit",
    "Options",
    "Report",
    "Run",
    "advance",
    "begin",
    "expect",
    "fit_from",
    "maximize_from",
    "progress",
    "sum_over",
]


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

    def maximize(self, statistics: Statistics, current: Parameters) -> Parameters:
        """Return the M-step at ``statistics``."""
        ridge = (self.reg_covar, self.reg_covar_relative)
        return maximize(statistics, current, self.covariance, *ridge, self.priors, self.learned)

    def maximize_watched(
        self, statistics: Statistics, current: Parameters, dtype: torch.dtype
    ) -> tuple[Parameters, bool]:
        """Return the same, and whether a covariance that rows of a dtype determine is singular to its precision."""
        ridge = (self.reg_covar, self.reg_covar_relative)
        return maximize_watched(statistics, current, self.covariance, dtype, *ridge, self.priors, self.learned)

    def singular(self, statistics: Statistics, dtype: torch.dtype) -> list[int]:
        """Return the elements that rows of a dtype determine as covariances which are singular to its precision."""
        ridge = (self.reg_covar, self.reg_covar_relative)
        element, known = estimate_covariances(statistics, self.covariance, *ridge, self.priors)
        positive = self.covariance.is_positive(element, dtype)
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
        """What EM climbed, at the final parameters; −inf where it is not a number."""
        return comparable(self.history[-1])

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


def comparable(objective: float) -> float:
    """Return an objective, or −inf where it is not a number, so that runs can be compared."""
    return -math.inf if math.isnan(objective) else objective


class Report(Protocol):
    """What is told after each E-step: how many M-steps came before it, the objectives so far, and how it ended."""

    def __call__(self, n_iter: int, history: list[float], end: str) -> None:
        """Tell a user."""


def sum_over(
    data: Rows,
    mixtures: Sequence[Parameters],
    covariance: Covariance,
    origin: Tensor,
    *,
    assignment: Assignment = SOFT,
    moments: bool = False,
    chunk_size: int | None = None,
    checked: bool = False,
) -> list[Statistics]:
    """Return the sums of several mixtures' E-steps of one pass over all rows, those of all ranks where they are shared.

    Nothing is read on the host while the pass goes on.

    Args:
        data: Rows; a rank that shares with others may have none.
        mixtures: Parameters of each E-step.
        covariance: Structure of the covariances.
        origin: Reference point of moments.
        assignment: How a row is shared among components.
        moments: See `expectation`.
        chunk_size: See `expectation`.
        checked: Whether to raise, at the end of the pass, where a row was not finite; else they are left out.

    Raises:
        ValueError: If a row was not finite, or a stream gave no batch.
        RuntimeError: If another rank failed: no rank goes on, or waits for it.
    """

    def expect(rows: Tensor, *of_rows: Tensor | None) -> list[Statistics]:
        how: dict[str, Any] = {"assignment": assignment, "moments": moments, "chunk_size": chunk_size}
        return expectations(rows, mixtures, covariance, *of_rows, origin=origin.to(rows.dtype), **how)

    def merged(some: list[Statistics], others: list[Statistics]) -> list[Statistics]:
        return [sums.merge(more) for sums, more in zip(some, others, strict=True)]

    def of_this_rank() -> list[Statistics]:
        with data.watched_batches() if checked else data.batches() as batches:
            sums = (expect(*batch) for batch in batches)
            total = next(sums, None)
            if total is None and not data.shared:
                raise ValueError("Expected `x` to give at least one batch of rows, but it gave none.")
            return expect(data.none()) if total is None else reduce(merged, sums, total)

    if not data.shared:
        return of_this_rank()
    sums, error = attempt(of_this_rank)
    if sums is None:  # a number of rows that is none says so to the others, in the message that they wait for
        sums = [of_none._replace(rows=torch.full_like(of_none.rows, torch.nan)) for of_none in expect(data.none())]
    totals = [of_one.over_ranks() for of_one in sums]
    if bool(torch.isnan(totals[0].rows)):
        raise_on_all_ranks(error)
    return totals


class Expected(NamedTuple):
    """An E-step over all rows.

    Attributes:
        sums: What the M-step needs.
        objective: What EM climbs, in nats per unit of row weight.
        rounding: That of moments in the dtype of the rows, see `rounding_of_moments`; 0 for sums of other forms.
    """

    sums: Statistics
    objective: float
    rounding: float


def expect(
    mixtures: Sequence[Parameters], roundings: Sequence[float], data: Rows, found: Survey, options: Options
) -> list[Expected]:
    r"""Make an E-step of each mixture over all rows.

    It sums moments in the dtype of the rows where their rounding leaves half of its digits; elsewhere `expectation`
    chooses a form by shapes. Mixtures of one form share a pass over the rows.

    Args:
        mixtures: Parameters of each E-step.
        roundings: For each that of moments; infinity takes the form that is chosen by shapes anyhow.
        data: Finite rows.
        found: What a first pass over them found.
        options: What shapes the run.

    Raises:
        ValueError: If a stream gives other rows than in the first pass.
    """
    by_moments = [leaves_half(rounding, found.dtype) for rounding in roundings]
    assignment = HARD if options.cem else SOFT
    how: dict[str, Any] = {"assignment": assignment, "chunk_size": options.chunk_size, "checked": data.streamed}
    sums = dict[int, Statistics]()
    for moments in sorted(set(by_moments)):
        which = [number for number, fast in enumerate(by_moments) if fast == moments]
        some = [mixtures[number] for number in which]
        of_form = sum_over(data, some, options.covariance, found.origin, moments=moments, **how)
        if data.streamed and (n_rows := int(of_form[0].rows + of_form[0].skipped)) != found.n_rows:
            raise ValueError(
                f"Expected `x` to give the same rows in each pass, but after one of {found.n_rows} rows a pass of "
                f"{n_rows} followed."
            )
        sums |= zip(which, of_form, strict=True)

    def expected(number: int) -> Expected:
        of_one = sums[number]
        climbed = of_one.classification if options.cem else of_one.log_likelihood
        log_prior = options.priors.log_density(*mixtures[number], options.covariance)
        objective = float((climbed + log_prior) / of_one.weight())
        return Expected(of_one, objective, roundings[number] if by_moments[number] else 0.0)

    return [expected(number) for number in range(len(mixtures))]


def rounding_of_moments(
    parameters: Parameters, found: Survey, options: Options, sums: Statistics | None = None
) -> float:
    """Return how far moments in the dtype of the rows may move a covariance, as a fraction of it.

    A component of few rows may lie farther out than all rows do on average, or be broader: its mean tells, and of
    covariances that are not tied its own second moments, where an E-step was made.
    """
    origin, covariance = found.origin.to(parameters.means.dtype), options.covariance
    squares = torch.maximum(found.scale(origin).square(), (parameters.means - origin).square())
    if sums is not None and not covariance.tied:
        count, away = sums.count.clamp(min=torch.finfo(torch.float32).tiny)[:, None], sums.origin - origin
        own = (covariance.variances(sums.second) + 2.0 * sums.first * away) / count + away.square()
        squares = torch.maximum(squares, own)
    return float(moment_rounding(squares, parameters, covariance, found.dtype, found.n_rows, options.chunk_size))


def leaves_half(rounding: float, dtype: torch.dtype) -> bool:
    """Return whether a rounding leaves half of the digits of a dtype."""
    return rounding <= torch.finfo(dtype).eps ** 0.5


def maximize_from(
    expected: Expected, parameters: Parameters, data: Rows, found: Survey, options: Options
) -> tuple[Statistics, Parameters, float]:
    """Make an M-step; return the sums that it is made from, and the rounding of moments at its end, as well.

    A component may become so narrow in one step that its covariance is what moments round away. The E-step is then made
    again in a precise form.
    """
    sums = expected.sums
    new, singular = options.maximize_watched(sums, parameters, found.dtype)
    rounding = rounding_of_moments(new, found, options, sums)
    if expected.rounding and (singular or not leaves_half(rounding, found.dtype)):
        [precise] = expect([parameters], [math.inf], data, found, options)
        sums = precise.sums
        new, _ = options.maximize_watched(sums, parameters, found.dtype)
        rounding = rounding_of_moments(new, found, options, sums)
    return sums, new, rounding


class Run(NamedTuple):
    """EM from one start, at the end of an E-step.

    Attributes:
        parameters: Parameters of that E-step, in the dtype of the sums.
        statistics: Sums from which the last M-step made them; before the first, those of the E-step.
        expected: That E-step.
        history: Objectives so far, one for each E-step, in nats per unit of row weight.
        number: Which of several starts it came from.
    """

    parameters: Parameters
    statistics: Statistics
    expected: Expected
    history: list[float]
    number: int = 1

    @property
    def objective(self) -> float:
        """What EM climbed so far; −inf where it is not a number."""
        return comparable(self.history[-1])

    def has_converged(self, tol: float) -> bool:
        """Return whether the last M-step changed the objective by less than ``tol``."""
        return len(self.history) > 1 and abs(self.history[-1] - self.history[-2]) < tol

    def precise(self, data: Rows, found: Survey, options: Options) -> Run:
        """Return the run with its E-step in a precise form."""
        [expected] = expect([self.parameters], [math.inf], data, found, options)
        return self._replace(expected=expected, history=[*self.history[:-1], expected.objective])

    def is_over(self, options: Options) -> bool:
        """Return whether it has converged, or made as many M-steps as it may."""
        return self.has_converged(options.tol) or len(self.history) > options.max_iter


def begin(starts: Mapping[int, Parameters], data: Rows, found: Survey, options: Options) -> list[Run]:
    """Return a run from each start, by number, after its first E-step."""
    mixtures = list(starts.values())
    roundings = [rounding_of_moments(start, found, options) for start in mixtures]
    each = zip(starts.items(), expect(mixtures, roundings, data, found, options), strict=True)
    return [Run(start, at.sums, at, [at.objective], number) for (number, start), at in each]


def advance(runs: Sequence[Run], data: Rows, found: Survey, options: Options) -> list[Run]:
    """Make one EM iteration of each run; their E-steps share what is formed of the rows."""
    steps = [maximize_from(run.expected, run.parameters, data, found, options) for run in runs]
    statistics, mixtures, roundings = zip(*steps, strict=True)
    each = zip(runs, mixtures, statistics, expect(mixtures, roundings, data, found, options), strict=True)
    return [Run(new, sums, at, [*run.history, at.objective], run.number) for run, new, sums, at in each]


def fit_from(start: Parameters, data: Rows, found: Survey, options: Options, report: Report, goal: float) -> Fit:
    r"""Run EM until its objective changes by less than a goal.

    .. math::
        \frac1N \Big( \sum_n \log p(x_n) + \log p(\pi, \mu, \Sigma) \Big),

    with the log-likelihood of the classification, :math:`\sum_n \max_k \log \pi_k N(x_n; \mu_k, \Sigma_k)`, in place of
    the first term for classification EM. Without regularisation it never falls.

    The parameters stay in the dtype of the sums between steps.

    Args:
        start: Parameters to start from, in the dtype of the sums.
        data: Finite rows.
        found: What a first pass over them found.
        options: What shapes the run.
        report: Is told after each E-step.
        goal: Change at which to stop, at most ``tol``. A run that reaches ``max_iter`` in between has converged, too.
    """
    [run] = begin({1: start}, data, found, options)
    report(0, run.history, "")
    for n_iter in range(1, options.max_iter + 1):
        [run], end = advance([run], data, found, options), ""
        if run.has_converged(goal) or n_iter == options.max_iter:
            end = "converged" if run.has_converged(options.tol) else "stopped"
        report(n_iter, run.history, end)
        if end:
            break
    lower_bound = float(run.expected.sums.mean_log_likelihood())
    return Fit(run.parameters, run.statistics, run.history, lower_bound, run.has_converged(options.tol))


@contextmanager
def progress(verbose: bool | str, interval: int, max_iter: int) -> Iterator[Report]:
    """Give what tells a user how a run goes: nothing, a line every ``interval`` iterations, or a progress bar."""
    if verbose == "bar":
        from tqdm.auto import tqdm

        with tqdm(total=max_iter, desc="EM", unit="it") as bar:

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
            print(f"EM: iteration {n_iter}, objective {history[-1]:.6f} nats per row{change}{ended}", flush=True)

    yield line
