r"""Step sizes for minibatch EM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from torch import Tensor

from tgmm_nn.checks import check_number

__all__ = ["PolynomialDecay"]


@dataclass(frozen=True)
class PolynomialDecay:
    r"""Step sizes :math:`\rho_t = (t + t_0)^{-\kappa}` for the updates t = 0, 1, 2 and so on.

    With :math:`0.5 < \kappa \le 1` they satisfy the conditions of Robbins and Monro, :math:`\sum_t \rho_t = \infty` and
    :math:`\sum_t \rho_t^2 < \infty`. :math:`\kappa = 1` and :math:`t_0 = 1` give 1, 1/2, 1/3, …, the running average.

    Args:
        decay: :math:`\kappa`.
        offset: :math:`t_0`, at least 1; larger values forget the start more slowly.

    Raises:
        ValueError: If ``decay`` is outside (0.5, 1] or ``offset`` below 1.

    References:
        Cappé and Moulines, On-line expectation-maximization algorithm for latent data models, 2009.

    Example:
        >>> schedule = PolynomialDecay(decay=1.0, offset=1)
        >>> [schedule(t) for t in range(3)]
        [1.0, 0.5, 0.3333333333333333]
    """

    decay: float = 0.6
    offset: float = 10.0

    def __post_init__(self) -> None:
        check_number("decay", self.decay, 0.5, 1.0, strict=True)
        check_number("offset", self.offset, 1.0)

    @overload
    def __call__(self, update: int) -> float: ...
    @overload
    def __call__(self, update: Tensor) -> Tensor: ...
    def __call__(self, update: int | Tensor) -> float | Tensor:
        """Return the step size of update number ``update``, counted from 0; a counter on a device is not read."""
        return (update + self.offset) ** -self.decay
