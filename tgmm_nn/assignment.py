"""How the E-step shares rows among components: softly, wholly, at a temperature, or with offsets that balance them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tgmm_nn.statistics import Parameters

__all__ = ["HARD", "SOFT", "Assignment", "Shares", "responsibilities", "revivable"]

# Shares below this part of the largest are none, and a component without others is one without rows. Not far below
# begin the subnormal numbers of float32, which slow its products up to ten times on processors of Intel.
LEAST_SHARE = 1e-35


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

    Components come first, since sums over the first axis run along the rows. One whose density is not finite, as
    where infinities cancel, is infinitely far away. A row with a log-prior of nan or infinity does not enter.

    Args:
        joint: Logarithm of each weighted component density in nats, shape ``(K, n)``; written into.
        sample_weight: Weight of each row, shape ``(n,)``.
        log_prior: Log-prior of each row over components in nats, shape ``(n, K)``.
        assignment: How a row is shared among components.
        usable: Which rows may enter, shape ``(n,)``; all that have any density do.
    """
    joint.nan_to_num_(-math.inf, -math.inf, -math.inf)
    if log_prior is not None:
        prior = log_prior.mT
        joint = torch.where((prior < math.inf).all(0), joint + prior, -math.inf)
    scores = joint
    r, total, largest = _exponential(joint.clone() if assignment.is_tilted or assignment.hard else joint)
    log_p = largest + total.log()
    usable = _is_bounded(largest) & usable
    if assignment.is_tilted:
        scores = joint / assignment.temperature
        if assignment.offset is not None:
            scores = scores + assignment.offset[:, None]
        r, total, highest = _exponential(scores.clone() if assignment.hard else scores)
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
    return Shares(r, weight, log_p @ weight, largest @ weight, usable)


def _exponential(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn scores into what a softmax over components divides by its sum, in place; return it, the sum and the largest.

    The largest score of a row is the least number where all are −inf, and the sum 1.
    """
    largest = scores.amax(0).clamp_(min=torch.finfo(scores.dtype).min)
    # Limited before, since MKL takes fifty times as long for an exponential that vanishes; what is small is zero after.
    r = torch.threshold_(scores.sub_(largest).clamp_(min=math.log(LEAST_SHARE) - 1.0).exp_(), LEAST_SHARE, 0.0)
    return r, r.sum(0).clamp_(min=1.0), largest


def _is_bounded(largest: Tensor) -> Tensor:
    """Return which rows have a score above the dtype's least number."""
    return largest > torch.finfo(largest.dtype).min


def revivable(parameters: Parameters) -> Parameters:
    """Return parameters whose weights have a logarithm, so that offsets can bring back a component of weight zero."""
    weights = parameters.weights.clamp(min=torch.finfo(torch.float32).tiny)
    return Parameters(weights, parameters.means, parameters.factor)
