"""How the callback shares rows among components, as plain options."""

from __future__ import annotations

from dataclasses import dataclass

from tgmm_nn import checks
from tgmm_nn.assignment import HARD, Assignment
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.learner import Learner
from tgmm_nn.steps import MARGINALS

__all__ = ["KINDS", "Assigning"]

KINDS = ("soft", "hard", "sinkhorn")


@dataclass(frozen=True)
class Assigning:
    r"""An `Assignment` for the rows of an update.

    The temperature falls geometrically with the epochs e since the first of EM, :math:`T_e = T^{1 - e / E}`, and stays
    at 1 from ``temperature_epochs`` E on: deterministic annealing.

    Args:
        kind: ``"soft"``, ``"hard"``, ``"sinkhorn"``, or None for the mixture's own.
        epsilon: Regularisation of ``"sinkhorn"`` in nats, times the temperature.
        n_iterations: Iterations of ``"sinkhorn"``.
        marginals: What ``"sinkhorn"`` gives each component: ``"uniform"`` shares or the mixing ``"weights"``.
        temperature: T, of the first epoch of EM.
        temperature_epochs: E; None keeps T.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    References:
        Ueda and Nakano, Deterministic annealing EM algorithm, 1998.

    Example:
        >>> [Assigning("soft", temperature=16.0, temperature_epochs=4).temperature_of(epoch) for epoch in range(6)]
        [16.0, 8.0, 4.0, 2.0, 1.0, 1.0]
    """

    kind: str | None = None
    epsilon: float = 1.0
    n_iterations: int = 30
    marginals: str = "uniform"
    temperature: float = 1.0
    temperature_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            checks.check_choice("assignment", self.kind, KINDS)
        checks.check_number("epsilon", self.epsilon, strict=True)
        checks.check_integer("sinkhorn_iterations", self.n_iterations)
        checks.check_choice("marginals", self.marginals, MARGINALS)
        checks.check_number("temperature", self.temperature, strict=True)
        checks.check_integer("temperature_epochs", self.temperature_epochs, optional=True)

    def temperature_of(self, epoch: int) -> float:
        """Return the temperature of an epoch, counted from the first of EM."""
        if self.temperature_epochs is None:
            return self.temperature
        return self.temperature ** max(0.0, 1.0 - epoch / self.temperature_epochs)

    def of(self, learner: Learner, batch: Batch, epoch: int) -> Assignment | None:
        """Return how rows are shared in an epoch; for ``"sinkhorn"`` every rank has to call this."""
        if self.kind is None:
            return None
        if self.kind == "hard":
            return HARD
        temperature = self.temperature_of(epoch)
        if self.kind == "soft":
            return Assignment(temperature=temperature)
        how = {"marginals": self.marginals, "n_iterations": self.n_iterations}
        return learner.sinkhorn(batch, epsilon=self.epsilon * temperature, **how)
