"""Which of several starts EM goes on from: a race of short runs, of which the poorer half drops out again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from tgmm_nn.data import Rows
from tgmm_nn.fitting import Options, Run, advance, begin
from tgmm_nn.statistics import Parameters
from tgmm_nn.survey import Survey

__all__ = ["FINISH", "best_of", "race", "race_progress"]

# M-steps between two decisions: the order of runs after fewer says little of that at their ends.
ROUND = 10

# Part of ``tol`` at which the run that is left stops: the best of many whole runs is one that by chance stopped late,
# and beside the race a few more steps cost little.
FINISH = 0.01


class RaceReport(Protocol):
    """What is told after each decision: the runs that are left, best first."""

    def __call__(self, runs: list[Run]) -> None:
        """Tell a user."""


def race(
    starts: Mapping[int, Parameters], data: Rows, found: Survey, options: Options, report: RaceReport, *, left: int = 1
) -> list[Run]:
    """Run EM from all starts, drop the poorer half after every few M-steps, and return those that are left, best first.

    This is successive halving by the objective. Runs that come to one objective are taken as one, and a run that has
    converged waits for the others.

    Args:
        starts: Parameters to start from, in the dtype of the sums, by number.
        data: Finite rows.
        found: What a first pass over them found.
        options: What shapes the runs; none makes more than ``max_iter`` M-steps.
        report: Is told after each decision.
        left: At how many runs to stop.

    References:
        Biernacki, Celeux and Govaert, Choosing starting values for the EM algorithm for getting the highest likelihood
        in multivariate Gaussian mixture models, 2003.
        Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, 2016.
    """
    same = options.tol / 100
    runs = begin(starts, data, found, options)
    # k-means often finds the same partition again.
    runs = best_of(_told_apart(runs, data, found, options), len(runs), same)
    report(runs)
    while len(runs) > left:
        for _ in range(ROUND):
            going = [run for run in runs if not run.is_over(options)]
            if not going:
                break
            waiting = [run for run in runs if run.is_over(options)]
            runs = [*waiting, *advance(going, data, found, options)]
        over = all(run.is_over(options) for run in runs)
        runs = _told_apart(runs, data, found, options)
        runs = best_of(runs, left if over else max(left, (len(runs) + 1) // 2), same)
        report(runs)
    return runs


def _told_apart(runs: Sequence[Run], data: Rows, found: Survey, options: Options) -> list[Run]:
    """Return runs with precise objectives where these differ from another run's by no more than their rounding."""

    def is_close(run: Run) -> bool:
        return any(0 < abs(run.objective - other.objective) <= run.expected.rounding for other in runs)

    return [run.precise(data, found, options) if is_close(run) else run for run in runs]


def best_of(runs: Sequence[Run], size: int, same: float) -> list[Run]:
    """Return the ``size`` runs of the best objectives, best first; of runs of the ``same`` objective, the first.

    Which of them is best would be a matter of rounding.
    """
    groups = list[list[Run]]()
    for run in sorted(runs, key=lambda run: -run.objective):
        if groups and groups[-1][0].objective - run.objective <= same:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [min(group, key=lambda run: run.number) for group in groups[:size]]


@contextmanager
def race_progress(verbose: bool | str, n_starts: int) -> Iterator[RaceReport]:
    """Give what tells a user how a race goes: nothing, a line for each decision, or a bar of starts that are out."""
    name = f"EM, race of {n_starts} starts"
    if verbose == "bar":
        from tqdm.auto import tqdm

        with tqdm(total=n_starts - 1, desc=name, unit="start") as bar:

            def drop(runs: list[Run]) -> None:
                bar.update(n_starts - len(runs) - bar.n)

            yield drop
        return

    def line(runs: list[Run]) -> None:
        if verbose:
            best = f"the best is {runs[0].number} with objective {runs[0].objective:.6f} nats per row"
            print(f"{name}: {len(runs)} left, {best}", flush=True)

    yield line
