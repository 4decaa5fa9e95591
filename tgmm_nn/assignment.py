"""How the E-step shares rows among components: softly, wholly, at a temperature, or with offsets that balance them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tgmm_nn.statistics import Parameters

__all__ = ["HARD", "SOFT", "Assignment", "responsibilities", "revivable"]

LOG2_E = math.log2(math.e)


class Assignment(NamedTuple):
    r"""How the E-step shares a row among components.

    .. math:: r_{nk} \propto \exp\big( \tfrac1T \log \pi_k N(x_n; \mu_k, \Sigma_k) + f_k \big)

    Attributes:
        hard: Whether the whole row goes to the component of the largest of these, as classification EM does.
        temperature: T; above 1 the shares are more equal, as in deterministic annealing.
        offset: f, shape ``(K,)``, or None; `sinkhorn` finds those that balance the components.

    References:
        Celeux and Govaert, A classification EM algorithm for clustering and two stochastic versions, 1992.
        Ueda and Nakano, Deterministic annealing EM algorithm, 1998.
    """

    hard: bool = False
    temperature: float = 1.0
    offset: Tensor | None = None

    @property
    def is_tilted(self) -> bool:
        """Whether the shares are others than the responsibilities p(k | x)."""
        return self.temperature != 1.0 or self.offset is not None


SOFT, HARD = Assignment(), Assignment(hard=True)


def responsibilities(
    joint: Tensor, usable: Tensor, sample_weight: Tensor | None, log_prior: Tensor | None, assignment: Assignment
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weighted responsibilities ``(K, n)``, both weighted log-likelihoods, and which rows entered.

    Components come first, since a softmax over the first axis runs along the rows. The exponential is taken in base 2:
    where it underflows, as it does for components far apart, the natural one is many times slower on a CPU.

    Args:
        joint: Log of each weighted component density, shape ``(K, n)``.
        usable: Which rows may enter, shape ``(n,)``.
        sample_weight: Weight of each row, shape ``(n,)``.
        log_prior: Log-prior of each row over components, shape ``(n, K)``.
        assignment: How a row is shared among components.
    """
    if log_prior is not None:
        joint = joint + log_prior.mT
    largest, best = joint.max(0)
    r = torch.exp2((joint - largest) * LOG2_E)
    total = r.sum(0)
    log_p = largest + total.log()
    usable = usable & torch.isfinite(log_p)
    if assignment.is_tilted:
        scores = joint / assignment.temperature
        if assignment.offset is not None:
            scores = scores + assignment.offset[:, None]
        most, best = scores.max(0)
        r = torch.exp2((scores - most) * LOG2_E)
        total, usable = r.sum(0), usable & torch.isfinite(most)
    weight = usable.to(joint.dtype)
    if sample_weight is not None:
        sample_weight = sample_weight.to(joint.dtype)
        usable = usable & torch.isfinite(sample_weight) & (sample_weight >= 0)
        weight = torch.where(usable, sample_weight, 0.0)
    if assignment.hard:
        r = torch.zeros_like(r).scatter_(0, best[None], weight[None])
    else:
        r = torch.where(usable, r * (weight / total), 0.0)
    log_likelihood, classification = (torch.where(usable, value * weight, 0.0).sum() for value in (log_p, largest))
    return r, log_likelihood, classification, usable


def revivable(parameters: Parameters) -> Parameters:
    """Return parameters whose weights have a logarithm, so that offsets can bring back a component of weight zero."""
    return parameters._replace(weights=parameters.weights.clamp(min=torch.finfo(torch.float32).tiny))
