"""Components that starve and start anew, which of them is which after a refit, and how far they move."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.distributed import broadcast_from_rank_zero, sum_over_ranks
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.learner import Learner
from tgmm_nn.lightning.ranks import gather_rows
from tgmm_nn.maximization import Learned
from tgmm_nn.mixture import GaussianMixture

__all__ = ["Health", "badly_explained", "matching"]

WORST = 0.1


class Health:
    """Start components anew whose weight was below ``min_weight`` after each of the last ``patience`` updates.

    Their new means are rows that the mixture explains badly, and their running statistics start anew as well. All is
    decided on numbers that are the same on every rank.

    Args:
        min_weight: Smallest weight of a healthy component, below 1/K; None starts none anew.
        patience: How many updates on end a component may be below it.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.
    """

    def __init__(self, min_weight: float | None = None, patience: int = 10) -> None:
        if min_weight is not None:
            checks.check_number("min_weight", min_weight, 0.0, 1.0, strict=True)
        checks.check_integer("patience", patience)
        self.min_weight, self.patience = min_weight, patience
        self._starving: Tensor | None = None

    def begin(self, gmm: GaussianMixture, starving: Sequence[int] = ()) -> None:
        """Raise if every component could starve; go on with the counts of a checkpoint, or from zero."""
        k = gmm.n_components
        if self.min_weight is not None and self.min_weight * k >= 1:
            raise ValueError(
                f"Expected `min_weight` below 1/K = {1 / k:.4g}, but got {self.min_weight}: the equal shares with "
                "which components start would be too small."
            )
        counts = list(starving) if len(starving) == k else [0] * k
        self._starving = torch.tensor(counts, dtype=torch.int64, device=gmm.weights_.device)

    def after_update(self, learner: Learner, batch: Batch, learned: Learned, step: int) -> int:
        """Count an update, and return how many components were started anew; every rank has to call this.

        Args:
            learner: The mixture after the update.
            batch: Rows of this rank; a component of a class starts anew on rows of that class.
            learned: What may move; a component whose mean may not is left alone.
            step: Number of the step; seeds the draw.
        """
        if self.min_weight is None or self._starving is None:
            return 0
        starves = learner.gmm.weights_ < self.min_weight
        if learned.means is not None:
            starves = starves & learned.means
        self._starving = torch.where(starves, self._starving + 1, 0)
        due = (self._starving >= self.patience).nonzero().flatten()
        classes = learner.classes()[due]
        return sum(
            self._reseed(learner.gmm, due[classes == c], learner.of_class(batch, c), learned, step)
            for c in classes.unique().tolist()
        )

    def state_dict(self) -> list[int]:
        """Return for how many updates each component has starved."""
        return [] if self._starving is None else self._starving.tolist()

    def _reseed(self, gmm: GaussianMixture, due: Tensor, rows: Tensor, learned: Learned, step: int) -> int:
        """Start components anew on badly explained rows, each on the nearest; return how many rows there were."""
        means = badly_explained(gmm, rows, len(due), step)
        due = due[: len(means)]  # the others stay due where there are too few rows
        if len(due) and self._starving is not None:
            old, new = linear_sum_assignment(torch.cdist(gmm.means_[due].to(means), means).cpu().numpy())
            gmm.reseed(
                due[torch.from_numpy(old).to(due.device)], means[torch.from_numpy(new).to(means.device)], learned
            )
            self._starving[due] = 0
        return len(due)


@torch.no_grad()
def badly_explained(gmm: GaussianMixture, rows: Tensor, number: int, step: int) -> Tensor:
    """Return different rows, drawn from the tenth of all ranks' rows that has the lowest density.

    Not the lowest of all, which are outliers more often than the middle of a cluster that no component covers.

    Args:
        gmm: The mixture.
        rows: Finite rows of this rank, shape ``(n, d)``.
        number: How many to draw; fewer come back where there are fewer.
        step: Seed of the draw.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = rows[torch.isfinite(rows).all(-1)]
    density = gmm(rows)
    everywhere = torch.cat(gather_rows(density[:, None])).flatten()
    most = max(number, math.ceil(WORST * len(everywhere)))
    worst = density <= everywhere.sort().values[:most].amax() if len(everywhere) else density < 0
    # Sorted, so that the draw does not depend on which rank held a row.
    candidates = torch.cat(gather_rows(rows[worst])).unique(dim=0)
    draw = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(step), device="cpu")[:number]
    return candidates[draw.to(candidates.device)]


@torch.no_grad()
def matching(old: GaussianMixture, new: GaussianMixture, rows: Tensor, classes: Tensor) -> Tensor:
    r"""Return which new component is each old one: the one-to-one matching that shares most of the rows.

    .. math:: \max_\sigma \sum_k \sum_n p_{old}(k | x_n) \, p_{new}(\sigma(k) | x_n)

    over the rows of all ranks; every rank has to call this.

    Args:
        old: The mixture before.
        new: The mixture after.
        rows: Rows of this rank, shape ``(n, d)``.
        classes: Class of each component, shape ``(K,)``: a component is only matched to one of its own.

    References:
        Kuhn, The Hungarian method for the assignment problem, 1955.
    """
    finite = rows[torch.isfinite(rows.square().sum(-1))]
    shared = torch.zeros(old.n_components, new.n_components, dtype=new.running_count.dtype, device=rows.device)
    for part in finite.split(8192):
        shared += (old.predict_proba(part).mT @ new.predict_proba(part)).to(shared)
    shared = torch.where(classes[:, None] == classes, sum_over_ranks(shared), -1.0)
    _, order = linear_sum_assignment(shared.cpu().numpy(), maximize=True)
    found = torch.from_numpy(order).to(rows.device)
    broadcast_from_rank_zero([found])
    return found
