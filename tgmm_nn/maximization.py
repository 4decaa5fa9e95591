r"""The M-step: parameters that maximise the expected log-likelihood, or log-posterior, given the sums of an E-step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Covariance
from tgmm_nn.priors import NO_PRIORS, Priors
from tgmm_nn.statistics import Parameters, Statistics, per_element

__all__ = ["EVERYTHING", "Learned", "estimate_covariances", "maximize", "maximize_watched", "scatter"]

PARTS = ("weights", "means", "covariances")

# A component of less weight is one without rows: a float32 mixture could not hold what so little says.
TINY = torch.finfo(torch.float32).tiny


class Learned(NamedTuple):
    r"""Which components' parameters an M-step moves; the others stay as they are, and the M-step is exact given them.

    A covariance is taken about the mean that its component has, also where that is not the rows' own. Free weights
    share what the frozen ones leave. A tied covariance moves if that of any component may.

    Attributes:
        weights: Booleans, shape ``(K,)``, or None where all move.
        means: The same.
        covariances: The same.
    """

    weights: Tensor | None = None
    means: Tensor | None = None
    covariances: Tensor | None = None

    @classmethod
    def from_options(
        cls,
        n_components: int,
        update: Collection[str] = PARTS,
        frozen_components: Sequence[int] = (),
        device: torch.device | None = None,
    ) -> Learned:
        """Return what is learned where only the parts in ``update`` are, and of these not those of some components.

        Raises:
            ValueError: If a component does not exist.

        Example:
            >>> Learned.from_options(3, update=["means"], frozen_components=[1]).means
            tensor([ True, False,  True])
        """
        for k in frozen_components:
            checks.check_integer("frozen_components", k, minimum=0, maximum=n_components - 1)
        if set(frozen_components) == set(range(n_components)):
            raise ValueError(f"Expected `frozen_components` to leave one of {n_components} free, but got all of them.")
        if not frozen_components and set(update) == set(PARTS):
            return EVERYTHING
        free = torch.ones(n_components, dtype=torch.bool, device=device)
        free[list(frozen_components)] = False
        return cls(*(free if part in update else torch.zeros_like(free) for part in PARTS))

    @property
    def is_partial(self) -> bool:
        """Whether anything is frozen."""
        return any(part is not None for part in self)


EVERYTHING = Learned()


def maximize(
    statistics: Statistics,
    current: Parameters,
    covariance: Covariance,
    reg_covar: float = 0.0,
    reg_covar_relative: bool = False,
    priors: Priors = NO_PRIORS,
    learned: Learned = EVERYTHING,
) -> Parameters:
    r"""Return the parameters that maximise the expected complete-data log-likelihood, or log-posterior.

    .. math::
        \pi_k = \frac{n_k}{\sum_j n_j}, \qquad \mu_k = o_k + \frac{S^{(1)}_k}{n_k}, \qquad
        T_k = S^{(2)}_k - \frac{[S^{(1)}_k S^{(1)\top}_k]}{n_k}, \qquad
        \Sigma_k = \frac{T_k}{n_k}, \quad \Sigma_{tied} = \frac{\sum_k T_k}{\sum_k n_k},

    and then ``reg_covar`` is added to the diagonal. Priors are further rows in the sums and in the numbers that are
    divided by: `tgmm_nn.priors.Priors` has their formulas.

    A component that no row supports keeps its mean and covariance, or takes the mode of their prior, and gets weight 0,
    or that of the prior. Where all weights would vanish they stay. A covariance that has no factor is lifted on its
    diagonal once, else the current factor stays. Without any row or prior nothing changes.

    Args:
        statistics: Sums of an E-step.
        current: Parameters to keep where the sums determine none.
        covariance: Structure of the covariances.
        reg_covar: Number added to the diagonal of each covariance.
        reg_covar_relative: Read ``reg_covar`` as a fraction of the mean variance of the data, so that EM does not
            depend on units.
        priors: Conjugate priors, on the device of the sums.
        learned: What may move.

    Returns:
        Parameters in the dtype of ``current``, computed in the dtype of the sums.
    """
    found = _find(statistics, current, covariance, reg_covar, reg_covar_relative, priors, learned)
    # Both factorisations are always made: to look whether the first succeeded would read a value on the host.
    lifted = covariance.lift_(found.covariances, ~covariance.is_positive(found.covariances))
    return found.parameters(current, *covariance.factor(lifted, current.means.dtype))


def maximize_watched(
    statistics: Statistics,
    current: Parameters,
    covariance: Covariance,
    dtype: torch.dtype,
    reg_covar: float = 0.0,
    reg_covar_relative: bool = False,
    priors: Priors = NO_PRIORS,
    learned: Learned = EVERYTHING,
) -> tuple[Parameters, bool]:
    """Make the M-step of `maximize` where the host may look: covariances take a second factor only if one is singular.

    Args:
        statistics: See `maximize`.
        current: See there.
        covariance: See there.
        dtype: Dtype of what the sums come from.
        reg_covar: See `maximize`.
        reg_covar_relative: See there.
        priors: See there.
        learned: See there.

    Returns:
        Parameters as `maximize` returns them, and whether a covariance that may move is singular to the dtype.
    """
    found = _find(statistics, current, covariance, reg_covar, reg_covar_relative, priors, learned)
    factor, exists = covariance.factor(found.covariances, current.means.dtype)
    clear = exists & covariance.is_positive(found.covariances, dtype, factor)
    singular = bool((found.known & ~clear).any())
    if singular:
        # Sums in float64 tell narrower covariances apart than rows in float32 do, but not such as vanish there.
        in_range = (covariance.variances(found.covariances) > torch.finfo(dtype).tiny).all(-1)
        positive = covariance.is_positive(found.covariances) & in_range
        factor, exists = covariance.factor(covariance.lift_(found.covariances, ~positive), current.means.dtype)
    elif bool((found.known & exists).all()):  # as almost always: large factors take long to write once more
        return found.parameters(current, factor), False
    return found.parameters(current, factor, exists), singular


class _Found(NamedTuple):
    """Maximisers before any covariance is lifted.

    Attributes:
        weights: Shape ``(K,)``.
        means: Shape ``(K, d)``; the current ones where no row supports one.
        covariances: Elements.
        known: Which elements rows or a prior determine, and may move.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    known: Tensor

    def parameters(self, current: Parameters, factor: Tensor, exists: Tensor | None = None) -> Parameters:
        """Return these with a factor of their covariances, and the current one where none ``exists``; None: all do."""
        if exists is not None:
            factor = torch.where(per_element(self.known & exists, factor), factor, current.factor)
        return Parameters(self.weights.to(current.means.dtype), self.means.to(current.means.dtype), factor)


def _find(
    statistics: Statistics,
    current: Parameters,
    covariance: Covariance,
    reg_covar: float = 0.0,
    reg_covar_relative: bool = False,
    priors: Priors = NO_PRIORS,
    learned: Learned = EVERYTHING,
) -> _Found:
    posterior = _with_priors(statistics, priors)
    means, within = centred(posterior, covariance)
    alive = _supported(posterior.count)
    if learned.means is not None:
        means = torch.where(learned.means[:, None], means, current.means.to(means))
        within = posterior.about(means).second  # about a mean that is not their own, rows scatter more
    element, known = _covariances(statistics, within, covariance, reg_covar, reg_covar_relative, priors)
    if learned.covariances is not None:
        known = known & (covariance.pool(learned.covariances.to(statistics.count)) > 0)
    weights = _weights(priors.weights(statistics.count), current.weights, learned.weights)
    return _Found(weights, torch.where(alive[:, None], means, current.means), element, known)


def estimate_covariances(
    statistics: Statistics,
    covariance: Covariance,
    reg_covar: float = 0.0,
    reg_covar_relative: bool = False,
    priors: Priors = NO_PRIORS,
) -> tuple[Tensor, Tensor]:
    """Return the covariances of `maximize`, before any is lifted, and which of them rows or a prior determine."""
    _, within = centred(_with_priors(statistics, priors), covariance)
    return _covariances(statistics, within, covariance, reg_covar, reg_covar_relative, priors)


def _weights(mode: Tensor, current: Tensor, learned: Tensor | None) -> Tensor:
    """Return weights proportional to ``mode``, where they are learned; the current ones where all would vanish."""
    if learned is None:
        total = mode.sum()
        return torch.where(total > 0, mode / total, current)
    free = torch.where(learned, mode, 0.0)
    left = torch.where(learned, current, 0.0).sum()
    return torch.where(learned & (free.sum() > 0), left * free / free.sum(), current)


def _covariances(
    statistics: Statistics,
    within: Tensor,
    covariance: Covariance,
    reg_covar: float,
    reg_covar_relative: bool,
    priors: Priors,
) -> tuple[Tensor, Tensor]:
    """Return elements, written into the scatter ``within``, and which are known."""
    mass = priors.degrees(statistics.count, covariance, statistics.first.shape[-1])
    # A mean prior alone knows no covariance: where no row does either, the old one stays.
    known = _supported(mass if priors.scale is not None else covariance.pool(statistics.count))
    element = within.div_(per_element(mass.clamp(min=TINY), within))
    ridge = reg_covar * _mean_variance(statistics, covariance) if reg_covar_relative else reg_covar
    return covariance.add_to_diagonal_(element, ridge), known


def centred(statistics: Statistics, covariance: Covariance) -> tuple[Tensor, Tensor]:
    r"""Return the weighted means, and the scatter about them, a new tensor, summed over k when tied.

    .. math:: T_k = S^{(2)}_k - [S^{(1)}_k S^{(1)\top}_k] / n_k
    """
    shift = _shift(statistics)
    between = covariance.pool(covariance.outer(statistics.first, shift))
    # Large ones cost more to allocate than to subtract.
    return statistics.origin + shift, torch.sub(statistics.second, between, out=between)


def scatter(statistics: Statistics, covariance: Covariance) -> Tensor:
    """Return the scatter of `centred` alone."""
    return centred(statistics, covariance)[1]


def _shift(statistics: Statistics) -> Tensor:
    """Return the weighted mean of each component about the reference point, zero where no row supports one."""
    return statistics.first / statistics.count.clamp(min=TINY)[:, None]


def _supported(mass: Tensor) -> Tensor:
    """Return which weights are large enough to divide by."""
    return mass > TINY


def _with_priors(statistics: Statistics, priors: Priors) -> Statistics:
    """Merge the pseudo-observations of the priors into the sums.

    About the mean of both: however far a prior's mean is from the data, or a component from its own prior, only
    positive terms are then added.
    """
    pseudo = priors.observations(statistics)
    if pseudo is None:
        return statistics
    ours, theirs = _means(statistics), _means(pseudo)
    count = statistics.count + pseudo.count
    share = (pseudo.count / count.clamp(min=TINY))[:, None]
    return statistics.about((1.0 - share) * ours + share * theirs).merge(pseudo)


def _means(statistics: Statistics) -> Tensor:
    """Return the weighted mean of each component."""
    return statistics.origin + _shift(statistics)


def _mean_variance(statistics: Statistics, covariance: Covariance) -> Tensor:
    """Return the mean over features of the variance of all rows: within components plus between them."""
    count, (means, within) = statistics.count, centred(statistics, covariance)
    total = torch.where(count.sum() > 0, count.sum(), 1.0)
    between = (count[:, None] * (means - count @ means / total).square()).sum(0).mean()
    return (covariance.mean_diagonal(within).sum() + between) / total
