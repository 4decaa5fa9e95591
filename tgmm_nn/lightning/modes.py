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
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.health import matching
from tgmm_nn.lightning.learner import Learner
from tgmm_nn.lightning.monitor import Monitor
from tgmm_nn.lightning.ranks import count_over_ranks
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
        self.assign: Callable[[Learner, Batch], Assignment | None] | None = None
        self.learned = EVERYTHING

    def expect(self, learner: Learner, batch: Batch, *, again: bool = False) -> Statistics:
        """Return the sums of this rank's rows; ``again`` says that the same rows were counted before."""
        sums = learner.statistics(batch, None if self.assign is None else self.assign(learner, batch))
        if again:
            return sums._replace(skipped=torch.zeros_like(sums.skipped))
        self.monitor.expect(sums)
        return sums

    def maximize(self, learner: Learner, statistics: Statistics) -> Tensor:
        """Add the sums of all ranks, and update; return the mean log-likelihood before the update."""
        total, gmm = statistics.over_ranks(), learner.gmm
        if self.raise_on_nonfinite:
            raise_nonfinite(int(total.skipped))
        step_size: float | Tensor | None = self.step_size
        if step_size is None and self.decreasing is not None:
            step_size = self.decreasing(gmm.n_updates.to(gmm.running_count.dtype))
        return learner.update(total, step_size, self.learned)


class Mode(ABC):
    """Collects the rows of steps, and updates a mixture from them; every rank calls each method alike.

    Attributes:
        by_epoch: Whether an update is due once in an epoch, and not at each step, unless told otherwise.
        has_windows: Whether what was collected is for one update, so that the end of an epoch has to make it.
    """

    by_epoch = has_windows = True

    @abstractmethod
    def collect(self, learner: Learner, batch: Batch, step: int) -> None:
        """Take in this rank's rows of a step."""

    @abstractmethod
    def update(self, learner: Learner) -> Batch | None:
        """Move the mixture; return rows of this rank that components may start anew on, None where nothing was done."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what an epoch left over that was cut short."""


class Minibatch(Mode):
    """One stepwise update from the rows of one step."""

    by_epoch = has_windows = False

    def __init__(self, em: EMStep) -> None:
        self.em = em
        self._batch: Batch | None = None

    def collect(self, learner: Learner, batch: Batch, step: int) -> None:
        """Take in the rows of the newest step."""
        self._batch = batch

    def update(self, learner: Learner) -> Batch | None:
        """Make one update, and return its rows."""
        batch, self._batch = self._batch, None
        if batch is not None:
            self.em.maximize(learner, self.em.expect(learner, batch))
        return batch

    def forget(self) -> None:
        """Drop the rows."""
        self._batch = None


class Accumulate(Mode):
    """Exact EM without a bank: the sums of all steps since the last update, then one M-step."""

    def __init__(self, em: EMStep) -> None:
        self.em = em
        self._sums: Statistics | None = None
        self._newest: Batch | None = None

    def collect(self, learner: Learner, batch: Batch, step: int) -> None:
        """Make the E-step of the rows; the mixture stays the same until the update, so that sums add up."""
        sums = self.em.expect(learner, batch)
        self._sums = sums if self._sums is None else self._sums.merge(sums)
        self._newest = batch

    def update(self, learner: Learner) -> Batch | None:
        """Make the M-step, and return the rows of the last step: those before are not kept."""
        sums, newest = self._sums, self._newest
        self.forget()
        if sums is not None:
            self.em.maximize(learner, sums)
        return newest

    def forget(self) -> None:
        """Drop the sums."""
        self._sums = self._newest = None


class Full(Mode):
    """Several EM iterations on a bank of rows.

    Args:
        em: One iteration.
        bank: Keeps the rows; without a size it is emptied after each update.
        n_iterations: Most iterations of an update.
        tol: The iterations stop where the mean log-likelihood changes by less, in nats; None makes all of them.
        min_fill: Rows over all ranks that an update takes.
        refit: Whether each update starts the mixture anew on the bank, its components matched to those before.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.
    """

    def __init__(
        self, em: EMStep, bank: Bank, *, n_iterations: int, tol: float | None, min_fill: int, refit: bool
    ) -> None:
        checks.check_integer("n_iterations", n_iterations)
        checks.check_integer("min_fill", min_fill)
        checks.check_bool("refit", refit)
        if tol is not None:
            checks.check_number("tol", tol, strict=True)
        if bank.size is not None and min_fill > bank.size:
            raise ValueError(f"Expected `min_fill` of at most bank_size={bank.size}, but got {min_fill}.")
        self.em, self.bank = em, bank
        self.n_iterations, self.tol, self.min_fill, self.refit = n_iterations, tol, min_fill, refit
        self.has_windows = bank.size is None

    def collect(self, learner: Learner, batch: Batch, step: int) -> None:
        """Put rows into the bank."""
        self.bank.add(batch, step, learner.components(batch) if self.bank.per_component else None)

    def update(self, learner: Learner) -> Batch | None:
        """Iterate EM on the bank, and return its rows."""
        batch = self.bank.batch()
        if batch is None:
            return None
        self._tell_of_nonfinite(learner.gmm, batch)
        if count_over_ranks(len(batch.rows), batch.rows.device) < self.min_fill:
            return None
        if self.has_windows:
            self.bank.clear()
        if self.refit:
            self._refit(learner, batch)
        else:
            self._iterate(learner, batch)
        return batch

    def forget(self) -> None:
        """Empty a bank of one epoch; one of a size goes on."""
        if self.has_windows:
            self.bank.clear()

    def _iterate(self, learner: Learner, batch: Batch) -> None:
        last: float | None = None
        for iteration in range(self.n_iterations):
            value = self.em.maximize(learner, self.em.expect(learner, batch, again=iteration > 0))
            if self.tol is not None:  # the same number on every rank
                change = None if last is None else abs(float(value) - last)
                last = float(value)
                if change is not None and not change >= self.tol:
                    return

    def _refit(self, learner: Learner, batch: Batch) -> None:
        """Iterate EM from a new start, and give each component the index of the one before that it shares most with."""
        gmm, before = learner.gmm, copy.deepcopy(learner.gmm)
        start_on(learner, batch, "initialize")
        gmm.n_updates.copy_(before.n_updates)
        self._iterate(learner, batch)
        gmm.permute_components(matching(before, gmm, batch.rows, learner.classes()))

    def _tell_of_nonfinite(self, gmm: GaussianMixture, batch: Batch) -> None:
        """Raise because of rows that are not finite on any rank; count those that a bank of a size did not take in."""
        dropped, self.bank.n_dropped = self.bank.n_dropped, 0
        if self.em.raise_on_nonfinite:
            bad = int((~batch.finite()).sum()) + dropped
            raise_nonfinite(count_over_ranks(bad, batch.rows.device))
        if self.bank.size is not None:  # those in a bank without a size are counted by the E-step
            gmm.n_skipped.add_(count_over_ranks(dropped, batch.rows.device))


@torch.no_grad()
def start_on(learner: Learner, batch: Batch, init: str) -> bool:
    """Start a model on the usable rows of all ranks, the same on each; return False where they are too few."""
    usable = batch.where(torch.isfinite(batch.rows.square().sum(-1)))
    if not learner.can_start(usable):
        return False
    learner.start(usable, init)
    broadcast_from_rank_zero(learner.gmm.buffers(recurse=False))
    return True


def raise_nonfinite(number: int) -> None:
    """Raise if rows of any rank were not finite."""
    if number:
        raise ValueError(
            f"Expected finite rows, with on_nonfinite='raise', but got {number} over all ranks that are not; find the "
            "step at which the network diverged, or set on_nonfinite=skip."
        )
