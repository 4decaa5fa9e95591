"""How the E-step shares rows among components: softly, wholly, at a temperature, or with offsets that balance them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tgmm_nn.statistics import Parameters

__all__ = ["HARD", "LOG2_E", "SOFT", "Assignment", "Shares", "responsibilities", "revivable"]

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


class Shares(NamedTuple):
    """How rows were shared.

    Attributes:
        r: Responsibilities times the rows' weights, shape ``(K, n)``.
        weight: Weights of the rows, 0 where one did not enter, shape ``(n,)``.
        log_likelihood: Weighted sum of the rows' log-densities, in nats.
        classification: The same of each row's largest weighted component density.
        usable: Which rows entered, shape ``(n,)``.
    """

    r: Tensor
    weight: Tensor
    log_likelihood: Tensor
    classification: Tensor
    usable: Tensor


def responsibilities(
    joint: Tensor,
    sample_weight: Tensor | None,
    log_prior: Tensor | None,
    assignment: Assignment,
    usable: Tensor | bool = True,
) -> Shares:
    """Share rows among components.

    Components come first, since a softmax over the first axis runs along the rows. All is in base 2: where it
    underflows, as it does for components far apart, the natural exponential is many times slower on a CPU.

    Args:
        joint: Logarithm in base 2 of each weighted component density, shape ``(K, n)``.
        sample_weight: Weight of each row, shape ``(n,)``.
        log_prior: Log-prior of each row over components in nats, shape ``(n, K)``.
        assignment: How a row is shared among components.
        usable: Which rows may enter, shape ``(n,)``; all that have any density do.
    """
    if log_prior is not None:
        joint = torch.add(joint, log_prior.mT, alpha=LOG2_E)
        joint = torch.where(joint.isnan().any(0), -math.inf, joint)  # also 0 · nan is nan
    r, largest, total = _softmax(joint)
    log_p = largest + total.log2()
    usable, scores = _is_bounded(largest) & usable, joint
    if assignment.is_tilted:
        scores = joint / assignment.temperature
        if assignment.offset is not None:
            scores = torch.add(scores, assignment.offset[:, None], alpha=LOG2_E)
        r, highest, total = _softmax(scores)
        usable = usable & _is_bounded(highest)
    weight = usable.to(joint.dtype)
    if sample_weight is not None:
        sample_weight = sample_weight.to(joint.dtype)
        usable = usable & torch.isfinite(sample_weight) & (sample_weight >= 0)
        weight = torch.where(usable, sample_weight, 0.0)
    if assignment.hard:
        r = torch.zeros_like(r).scatter_(0, scores.argmax(0)[None], weight[None].to(r.dtype))
    else:
        r.mul_(weight / total)
    in_nats = weight / LOG2_E
    return Shares(r, weight, log_p @ in_nats, largest @ in_nats, usable)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return powers of two relative to the largest of each row, that largest score, and the sum of the powers.

    All are finite where no score is: the largest is then the dtype's least number, and the sum, of at least the largest
    power, is 1.
    """
    largest = scores.amax(0).clamp_(min=torch.finfo(scores.dtype).min)
    r = (scores - largest).exp2_()
    return r, largest, r.sum(0).clamp_(min=1.0)


def _is_bounded(largest: Tensor) -> Tensor:
    """Return which rows have a score between the dtype's least and largest number."""
    return largest.abs() < torch.finfo(largest.dtype).max


def revivable(parameters: Parameters) -> Parameters:
    """Return parameters whose weights have a logarithm, so that offsets can bring back a component of weight zero."""
    weights = parameters.weights.clamp(min=torch.finfo(torch.float32).tiny)
    return Parameters(weights, parameters.means, parameters.factor)
