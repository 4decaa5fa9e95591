"""The network that the experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from tgmm_nn.checks import check_integer

__all__ = ["Perceptron"]


class Perceptron(nn.Sequential):
    """Multilayer perceptron with ReLU between, ``(..., sizes[0])`` to ``(..., sizes[-1])``.

    Args:
        sizes: Widths from input to output.

    Raises:
        TypeError: If a width is no integer.
        ValueError: If there are fewer than two, or one is below 1.

    Example:
        >>> import torch
        >>> Perceptron([4, 8, 3])(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if isinstance(sizes, (str, int)) or len(sizes) < 2:
            raise ValueError(f"Expected `sizes` with the widths of input and output at least, but got {sizes!r}.")
        for size in sizes:
            check_integer("sizes", size)
        layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
        for before, after in pairwise(sizes[1:]):
            layers += [nn.ReLU(), nn.Linear(before, after)]
        super().__init__(*layers)
