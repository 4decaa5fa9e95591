"""Balanced assignment of rows to components by entropic optimal transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tgmm_nn.assignment import Assignment, revivable
from tgmm_nn.covariance import Covariance
from tgmm_nn.distributed import sum_over_ranks
from tgmm_nn.functional import chunks, log_joint, rows_of_densities
from tgmm_nn.statistics import Parameters, accumulator_dtype

__all__ = ["sinkhorn"]

# Share of the target that is added to the curvature, so that it has an inverse; most that an offset moves at once, in
# units of the temperature; share of the iterations in which the temperature falls.
DAMPING, LONGEST, COOLING = 0.01, 5.0, 0.7


def sinkhorn(
    x: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    marginals: Tensor,
    sample_weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    *,
    epsilon: float = 1.0,
    n_iterations: int = 30,
    sync: bool = True,
    chunk_size: int | None = None,
) -> Assignment:
    r"""Return the assignment that gives each component its share of the rows: entropic optimal transport.

    .. math::
        \max_r \sum_{nk} r_{nk} \log N(x_n; \mu_k, \Sigma_k) - \varepsilon \sum_{nk} r_{nk} \log r_{nk}, \qquad
        \sum_k r_{nk} = w_n, \qquad \sum_n r_{nk} = m_k = \sum_n w_n \frac{a_{nk} t_k}{\sum_j a_{nj} t_j}

    for marginals t, where :math:`a_{nk}` is 0 if the log-prior forbids a component for a row, and else 1: with labels
    each class is balanced within. The solution is an `Assignment` of temperature ε, whose offsets g / ε maximise the
    concave dual; the sums over components are exact, those over rows up to the iterations. Component weights play no
    part, so that a component of weight zero comes back.

    Sinkhorn's own iteration moves an offset by about ε at a time, while the log-densities of separate clusters differ
    by hundreds of nats. Newton's steps on the same dual, at a temperature that falls from that spread to ε, need about
    30 whatever the dimension.

    Args:
        x: Rows, shape ``(n, d)``.
        parameters: Parameters of the E-step.
        covariance: Structure of the covariances.
        marginals: t, the shares of the components, shape ``(K,)``.
        sample_weight: Weight of each row, shape ``(n,)``.
        log_prior: Log-prior of each row over components, shape ``(n, K)``, added to the log-density.
        epsilon: ε in nats; 1 is as soft as EM is, towards 0 rows are assigned wholly.
        n_iterations: Number of steps.
        sync: Whether the rows of all ranks are balanced together; then every rank has to call this.
        chunk_size: Rows in a chunk; None chooses by the size of the arrays.

    References:
        Cuturi, Sinkhorn distances: lightspeed computation of optimal transport, 2013.
        Brauer, Clason, Lorenz and Wirth, A Sinkhorn-Newton method for entropic optimal transport, 2017.
        Asano, Rupprecht and Vedaldi, Self-labelling via simultaneous clustering and representation learning, 2020.
    """
    size = chunk_size or rows_of_densities(x, parameters.means, covariance)
    equal = parameters._replace(weights=torch.full_like(parameters.weights, 1.0 / len(parameters.weights)))
    shares = marginals.to(accumulator_dtype(x.device)).log()

    def scored() -> Iterator[tuple[Tensor, Tensor]]:
        """Give log-densities and weights of rows, chunk by chunk; rows that can't be used weigh nothing."""
        for rows, weight, prior in chunks(size, x, sample_weight, log_prior):
            score = log_joint(rows, equal, covariance).to(shares)
            score = torch.where(shares > -torch.inf, score if prior is None else score + prior, -torch.inf)
            counts = torch.ones_like(score[:, 0]) if weight is None else weight.to(score)
            usable = torch.isfinite(score.amax(-1)) & torch.isfinite(counts) & (counts > 0)
            yield torch.where(usable[:, None], score, 0.0), torch.where(usable, counts, 0.0)

    def add(parts: Iterator[Tensor]) -> Tensor:
        total = torch.stack(list(parts)).sum(0)
        return sum_over_ranks(total) if sync else total

    kept = list(scored()) if len(x) <= size else None  # one chunk need not be scored at each step

    def look() -> Iterator[tuple[Tensor, Tensor]]:
        return scored() if kept is None else iter(kept)

    target, spread = _target(look, add, shares)
    potential, start = torch.zeros_like(target), spread.clamp(min=epsilon)
    cooling = max(1, int(COOLING * n_iterations))
    for step in range(n_iterations):
        temperature = start * (epsilon / start) ** min(1.0, step / cooling)
        potential = potential + _newton_step(look, add, target, potential, temperature)
    # The E-step adds the logarithm of the weights, of which the potential knows nothing.
    offset = (potential - revivable(parameters).weights.to(target).log()) / epsilon
    return Assignment(temperature=epsilon, offset=torch.where(shares > -torch.inf, offset, -torch.inf).to(x.dtype))


Scored = Callable[[], Iterator[tuple[Tensor, Tensor]]]
Add = Callable[[Iterator[Tensor]], Tensor]


def _target(scored: Scored, add: Add, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each component is to get, and how far apart a row's log-densities are on average."""

    def look(score: Tensor, weight: Tensor) -> Tensor:
        allowed = score > -torch.inf
        due = torch.where(allowed, shares, -torch.inf).softmax(-1).nan_to_num(0.0)
        lowest = torch.where(allowed, score, torch.inf).amin(-1)
        return torch.cat([weight @ due, (weight @ (score.amax(-1) - lowest))[None], weight.sum()[None]])

    *due, apart, total = add(look(*part) for part in scored())
    return torch.stack(due), apart / torch.where(total > 0, total, 1.0)


def _newton_step(scored: Scored, add: Add, target: Tensor, potential: Tensor, temperature: Tensor) -> Tensor:
    r"""Return how the potentials move: the curvature's inverse times what each component lacks.

    .. math:: T \Big( \mathrm{diag}(c) - \sum_n w_n r_n r_n^\top \Big)^{-1} (m - c), \qquad c = \sum_n w_n r_n
    """
    k = len(target)

    def look(score: Tensor, weight: Tensor) -> Tensor:
        r = ((score + potential) / temperature).softmax(-1)
        weighted = weight[:, None] * r
        return torch.cat([weighted.sum(0), (weighted.mT @ r).flatten()])

    count, outer = add(look(*part) for part in scored()).split([k, k * k])
    diagonal = count + DAMPING * target + (target <= 0)
    lower, _ = torch.linalg.cholesky_ex(torch.diag(diagonal) - outer.reshape(k, k))
    step = temperature * torch.cholesky_solve((target - count)[:, None], lower)[:, 0]
    step = torch.where(torch.isfinite(step), step, 0.0)
    longest = step.abs().amax()
    return step * (LONGEST * temperature / torch.where(longest > 0, longest, 1.0)).clamp(max=1.0)
