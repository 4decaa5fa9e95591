"""What the metrics of clusters and of densities share: numbers that are drawn, sums in float64, checks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchmetrics import Metric

from tgmm_nn.plotting import new_axes
from tgmm_nn.statistics import accumulator_dtype

__all__ = ["Number", "Sums", "check_floating", "check_responsibilities"]


class Number(Metric):
    """A metric of one number, which is drawn as a point, or as a curve of several."""

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Any, Axes]:
        """Draw a value, or a sequence of values as a curve; None computes one. Return the figure and its axes."""
        ax = ax or new_axes()[0]
        self._plot(val, ax)
        return ax.figure, ax


class Sums(Number):
    """A number from sums in float64 (float32 on devices without it), also in a module that is cast to less."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def move(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            device = fn(torch.zeros(0, device=tensor.device)).device
            return tensor.to(device, accumulator_dtype(device))

        return super()._apply(move, exclude_state)


def check_floating(name: str, value: Tensor) -> None:
    """Raise unless a tensor holds floating numbers."""
    if not value.is_floating_point():
        raise TypeError(f"Expected `{name}` to hold floating numbers, but got {value.dtype}.")


def check_responsibilities(responsibilities: Tensor, n_components: int) -> None:
    """Raise unless the last dimension holds probabilities of ``n_components``."""
    check_floating("responsibilities", responsibilities)
    if responsibilities.ndim == 0 or responsibilities.shape[-1] != n_components:
        raise ValueError(
            f"Expected `responsibilities` of shape (..., {n_components}), but got {tuple(responsibilities.shape)}."
        )
    off = (responsibilities.sum(-1, dtype=accumulator_dtype(responsibilities.device)) - 1).abs()
    # Negated comparisons, so that nan fails; half precision rounds each number by up to eps / 2.
    tolerance = max(1e-3, 2 * torch.finfo(responsibilities.dtype).eps)
    if not bool((responsibilities >= 0).all() & (off <= tolerance).all()):
        raise ValueError(
            "Expected `responsibilities` to be non-negative and to sum to 1 over the last dimension, but they do not; "
            "give what `predict_proba` returns."
        )
