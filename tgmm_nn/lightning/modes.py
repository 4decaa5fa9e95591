"""What becomes of the rows of training steps: one class per mode of the callback."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.assignment import Assignment
from tgmm_nn.distributed import broadcast_from_rank_zero
from tgmm_nn.lightning.bank import Bank
from tgmm_nn.lightning.health import matching
from tgmm_nn.lightning.monitor import Monitor
from tgmm_nn.lightning.ranks import count_over_ranks, gather_rows
from tgmm_nn.maximization import EVERYTHING
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.schedules import PolynomialDecay
from tgmm_nn.statistics import Statistics

__all__ = ["Accumulate", "EMStep", "Full", "Minibatch", "Mode", "start_on"]


class EMStep:
    """An E-step of this rank and an M-step of all.

    Args:
        monitor: Is told of each E-step.
        step_size: Constant share of the rows in the running sums, or None.
        decreasing: Share by the number of updates, where there is no constant one; None is exact EM.
        raise_on_nonfinite: Whether a row that is not finite, on any rank, raises; else it is left out and counted.

    Attributes:
        assign: Gives how rows are shared; None leaves it to the mixture.
        learned: What an M-step may move.

    Raises:
        TypeError: If ``step_size`` is no number.
        ValueError: If it is outside (0, 1].
    """

    def __init__(
        self, monitor: Monitor, step_size: float | None, decreasing: PolynomialDecay | None, *, raise_on_nonfinite: bool
    ) -> None:
        self.monitor = monitor
        if step_size is not None:
            checks.check_number("step_size", step_size, 0.0, 1.0, strict=True)
        self.step_size, self.decreasing, self.raise_on_nonfinite = step_size, decreasing, raise_on_nonfinite
        self.assign: Callable[[GaussianMixture, Tensor], Assignment | None] | None = None
        self.learned = EVERYTHING

    def expect(self, gmm: GaussianMixture, rows: Tensor, *, again: bool = False) -> Statistics:
        """Return the sums of this rank's rows; ``again`` says that the same rows were counted before."""
        sums = gmm.statistics(rows, assignment=None if self.assign is None else self.assign(gmm, rows))
        if again:
            return sums._replace(skipped=torch.zeros_like(sums.skipped))
        self.monitor.expect(sums)
        return sums

    def maximize(self, gmm: GaussianMixture, statistics: Statistics) -> Tensor:
        """Add the sums of all ranks, and update; return the mean log-likelihood before the update."""
        total = statistics.over_ranks()
        if self.raise_on_nonfinite and (n := int(total.skipped)):
            raise_nonfinite(n)
        step_size: float | Tensor | None = self.step_size
        if step_size is None and self.decreasing is not None:
            step_size = self.decreasing(gmm.n_updates.to(gmm.running_count.dtype))
        return gmm.update(total, step_size, learned=self.learned)


class Mode(ABC):
    """Collects the rows of steps, and updates a mixture from them; every rank calls each method alike.

    Attributes:
        by_epoch: Whether an update is due once in an epoch, and not at each step, unless told otherwise.
        has_windows: Whether what was collected is for one update, so that the epoch's last batch has to make it.
    """

    by_epoch = has_windows = True

    @abstractmethod
    def collect(self, gmm: GaussianMixture, rows: Tensor, step: int) -> None:
        """Take in this rank's rows of a step."""

    @abstractmethod
    def update(self, gmm: GaussianMixture) -> Tensor | None:
        """Move the mixture; return the rows of this rank that it was moved by, or None where it was not."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what an epoch left over that was cut short."""


class Minibatch(Mode):
    """One stepwise update from the rows of one step."""

    by_epoch = has_windows = False

    def __init__(self, em: EMStep) -> None:
        self.em = em
        self._rows: Tensor | None = None

    def collect(self, gmm: GaussianMixture, rows: Tensor, step: int) -> None:
        """Take in the rows of the newest step."""
        self._rows = rows

    def update(self, gmm: GaussianMixture) -> Tensor | None:
        """Make one update."""
        rows, self._rows = self._rows, None
        if rows is not None:
            self.em.maximize(gmm, self.em.expect(gmm, rows))
        return rows

    def forget(self) -> None:
        """Drop the rows."""
        self._rows = None


class Accumulate(Mode):
    """Exact EM without a bank: the sums of all steps since the last update, then one M-step."""

    def __init__(self, em: EMStep) -> None:
        self.em = em
        self._sums: Statistics | None = None
        self._rows: Tensor | None = None

    def collect(self, gmm: GaussianMixture, rows: Tensor, step: int) -> None:
        """Make the E-step of the rows; the mixture stays the same until the update, so that sums add up."""
        sums = self.em.expect(gmm, rows)
        self._sums = sums if self._sums is None else self._sums.merge(sums)
        self._rows = rows

    def update(self, gmm: GaussianMixture) -> Tensor | None:
        """Make the M-step."""
        sums, rows = self._sums, self._rows
        self.forget()
        if sums is not None:
            self.em.maximize(gmm, sums)
        return rows

    def forget(self) -> None:
        """Drop the sums."""
        self._sums = self._rows = None


class Full(Mode):
    """Several EM iterations on a bank of rows.

    Args:
        em: One iteration.
        bank: Keeps the rows; without a size it is emptied after each update.
        n_iterations: Most iterations of an update.
        tol: The iterations stop where the mean log-likelihood changes by less, in nats; None makes all of them.
        min_fill: Rows over all ranks that an update takes.
        refit: Whether each update starts the mixture anew on the bank, its components matched to those before.
    """

    def __init__(
        self, em: EMStep, bank: Bank, *, n_iterations: int, tol: float | None, min_fill: int, refit: bool
    ) -> None:
        checks.check_integer("n_iterations", n_iterations)
        checks.check_integer("min_fill", min_fill)
        checks.check_bool("refit", refit)
        if tol is not None:
            checks.check_number("tol", tol, strict=True)
        self.em, self.bank = em, bank
        self.n_iterations, self.tol, self.min_fill, self.refit = n_iterations, tol, min_fill, refit
        self.has_windows = bank.size is None

    def collect(self, gmm: GaussianMixture, rows: Tensor, step: int) -> None:
        """Put rows into the bank."""
        self.bank.add(rows, step, gmm.predict(rows) if self.bank.per_component else None)

    def update(self, gmm: GaussianMixture) -> Tensor | None:
        """Iterate EM on the bank."""
        rows = self.bank.rows()
        self._tell_of_nonfinite(gmm)
        if count_over_ranks(len(rows), rows.device) < self.min_fill:
            return None
        if self.has_windows:
            self.bank.clear()
        before = copy.deepcopy(gmm) if self.refit else None
        if before is not None:
            start_on(gmm, rows, gmm.initialize)
            gmm.n_updates.copy_(before.n_updates)
        last: float | None = None
        for iteration in range(self.n_iterations):
            value = self.em.maximize(gmm, self.em.expect(gmm, rows, again=iteration > 0))
            if self.tol is not None:  # the same number on every rank
                last, change = float(value), None if last is None else abs(float(value) - last)
                if change is not None and not change >= self.tol:
                    break
        if before is not None:
            gmm.permute_components(matching(before, gmm, rows))
        return rows

    def _tell_of_nonfinite(self, gmm: GaussianMixture) -> None:
        """Count, or raise because of, rows that a bank of a size has not taken in on any rank."""
        if self.bank.size is None:
            return  # they are in it, and the E-step leaves them out
        n, self.bank.n_dropped = count_over_ranks(self.bank.n_dropped, gmm.means_.device), 0
        if n and self.em.raise_on_nonfinite:
            raise_nonfinite(n)
        gmm.n_skipped.add_(n)

    def forget(self) -> None:
        """Empty a bank of one epoch; one of a size goes on."""
        if self.has_windows:
            self.bank.clear()


def start_on(gmm: GaussianMixture, rows: Tensor, start: Callable[[Tensor], object]) -> bool:
    """Start a mixture on the finite rows of all ranks, the same on each; return False where they are too few."""
    everywhere = torch.cat(gather_rows(rows))
    everywhere = everywhere[torch.isfinite(everywhere).all(-1)]
    if len(everywhere) < gmm.n_components:
        return False
    start(everywhere)
    broadcast_from_rank_zero(gmm.buffers(recurse=False))
    return True


def raise_nonfinite(number: int) -> None:
    """Raise because of rows that are not finite."""
    raise ValueError(
        f"Expected finite rows, with on_nonfinite='raise', but got {number} over all ranks that are not; find the step "
        "at which the network diverged, or set on_nonfinite=skip."
    )
