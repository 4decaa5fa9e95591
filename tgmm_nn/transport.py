"""Balanced assignment of rows to components by entropic optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from tgmm_nn.assignment import Assignment, revivable
from tgmm_nn.covariance import Covariance
from tgmm_nn.distributed import stack_over_ranks
from tgmm_nn.functional import chunks, log_joint, rows_per_chunk
from tgmm_nn.statistics import Parameters, accumulator_dtype

__all__ = ["sinkhorn"]


def sinkhorn(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    marginals: Tensor,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    *,
    epsilon: float = 1.0,
    n_iterations: int = 10,
    sync: bool = True,
    chunk_size: int | None = None,
) -> Assignment:
    r"""Return the assignment that gives each component its share of the rows: entropic optimal transport.

    .. math::
        \max_r \sum_{nk} r_{nk} \log N(x_n; \mu_k, \Sigma_k) - \varepsilon \sum_{nk} r_{nk} \log r_{nk}, \qquad
        \sum_k r_{nk} = w_n, \qquad \sum_n r_{nk} = m_k = \sum_n w_n \frac{a_{nk} t_k}{\sum_j a_{nj} t_j}

    for marginals t, where :math:`a_{nk}` is 0 if the log-prior forbids a component for a row, and else 1: with labels
    each class is balanced within. The solution is an `Assignment` of temperature ε, whose offsets f an iteration scales
    until the sums over rows are met; the sums over components always are. All is done in logarithms, so that a small ε
    does not underflow, and component weights play no part: a component of weight zero comes back.

    Args:
        x: Rows, shape ``(n, d)``.
        parameters: Parameters of the E-step.
        covariance: Structure of the covariances.
        marginals: t, the shares of the components, shape ``(K,)``.
        sample_weight: Weight of each row, shape ``(n,)``.
        log_prior: Log-prior of each row over components, shape ``(n, K)``, added to the log-density.
        epsilon: ε in nats; 1 is as soft as EM is, towards 0 rows are assigned wholly.
        n_iterations: Number of times that the offsets are scaled.
        sync: Whether the rows of all ranks are balanced together; then every rank has to call this.
        chunk_size: Rows in a chunk; None chooses by the size of the arrays.

    References:
        Cuturi, Sinkhorn distances: lightspeed computation of optimal transport, 2013.
        Asano, Rupprecht and Vedaldi, Self-labelling via simultaneous clustering and representation learning, 2020.
    """
    parameters = revivable(parameters)
    size = chunk_size or rows_per_chunk(parameters.means.numel(), x.element_size())
    wide = accumulator_dtype(x.device)
    target, log_weights = marginals.to(wide).log(), parameters.weights.to(wide).log()

    def log_sums(offset: Tensor, temperature: float, density: bool) -> Tensor:
        """Return the log of each component's sum of shares, over all rows that can be used, shape ``(K,)``."""
        parts = []
        for rows, weight, prior in chunks(size, x, sample_weight, log_prior):
            joint = log_joint(rows, parameters, covariance)
            if prior is not None:
                joint = joint + prior
            scores = (joint / temperature if density else torch.where(joint > -torch.inf, 0.0, -torch.inf)) + offset
            usable = torch.isfinite(joint.amax(-1)) & torch.isfinite(scores.amax(-1))
            shares = scores.log_softmax(-1)
            if weight is not None:
                positive = torch.isfinite(weight) & (weight > 0)
                shares = shares + torch.where(positive, weight, 0.0).log()[:, None]
            parts.append(torch.where(usable[:, None], shares, -torch.inf).to(wide).logsumexp(0))
        return stack_over_ranks(torch.stack(parts).logsumexp(0), sync=sync).logsumexp(0)

    mass = log_sums(target.to(x), 1.0, density=False)
    offset = target - log_weights / epsilon
    for _ in range(n_iterations):
        found = log_sums(offset.to(x), epsilon, density=True)
        # A component that no row may take, or that is to get none, has no share to scale.
        offset = torch.where(torch.isfinite(mass) & torch.isfinite(found), offset + mass - found, offset)
    return Assignment(temperature=epsilon, offset=offset.to(x.dtype))
