"""When EM runs: in which epochs, and at which steps of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from tgmm_nn import checks

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Epochs and optimizer steps of EM.

    Args:
        start_epoch: First epoch, from 0; a float in (0, 1) is the share of ``max_epochs`` that has passed at its end.
        stop_epoch: First epoch without EM again; None goes on to the end.
        every_n_epochs: EM runs in every so many epochs, counted from the first.
        every_n_steps: Optimizer steps of the training from one update to the next; None leaves it to the mode.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> schedule = Schedule(start_epoch=0.5, every_n_epochs=2)
        >>> first = schedule.first_epoch(max_epochs=10)
        >>> first, [epoch for epoch in range(10) if schedule.runs_in(epoch, first)]
        (4, [4, 6, 8])
    """

    start_epoch: int | float = 0
    stop_epoch: int | None = None
    every_n_epochs: int = 1
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        start, stop = self.start_epoch, self.stop_epoch
        if isinstance(start, float):  # NumPy's integers are none
            checks.check_share("start_epoch", start)
        else:
            checks.check_integer("start_epoch", start, minimum=0)
        checks.check_integer("stop_epoch", stop, optional=True)
        if stop is not None and stop <= start:
            raise ValueError(f"Expected `stop_epoch` above start_epoch={start}, but got {stop}.")
        checks.check_integer("every_n_epochs", self.every_n_epochs)
        checks.check_integer("every_n_steps", self.every_n_steps, optional=True)

    def first_epoch(self, max_epochs: int | None) -> int:
        """Return the first epoch of EM; warn if training ends before it, and raise if a share has no end to go by."""
        if not isinstance(self.start_epoch, float):
            first = int(self.start_epoch)
        elif max_epochs is None or max_epochs < 1:
            raise ValueError(
                f"Expected `start_epoch` as an epoch where `max_epochs` is not set, but got {self.start_epoch}."
            )
        else:
            first = math.ceil(round(self.start_epoch * max_epochs, 9)) - 1
        if self.stop_epoch is not None and self.stop_epoch <= first:
            raise ValueError(f"Expected `stop_epoch` above the first epoch of EM, {first}, but got {self.stop_epoch}.")
        if max_epochs is not None and 0 <= max_epochs <= first:
            rank_zero_warn(f"EM does not run: start_epoch={first} is not reached with max_epochs={max_epochs}.")
        return first

    def runs_in(self, epoch: int, first: int) -> bool:
        """Return whether EM runs in an epoch."""
        stopped = self.stop_epoch is not None and epoch >= self.stop_epoch
        return epoch >= first and (epoch - first) % self.every_n_epochs == 0 and not stopped

    def is_due(self, step: int, previous: int, default: bool) -> bool:
        """Return whether an update belongs to the steps after ``previous`` up to ``step``, of which there may be more.

        Args:
            step: Number of optimizer steps made.
            previous: Number of them at the batch before.
            default: What holds where ``every_n_steps`` is None.
        """
        n: Any = self.every_n_steps
        return default if n is None else step // n > previous // n
