"""The network that the experiments share, and checks of what they are built from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from tgmm_nn.checks import check_integer

__all__ = ["Perceptron", "as_input", "check_kind", "check_network"]


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
        if not isinstance(sizes, (list, tuple)) or len(sizes) < 2:
            raise ValueError(f"Expected `sizes` with the widths of input and output at least, but got {sizes!r}.")
        for size in sizes:
            check_integer("sizes", size)
        layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
        for before, after in pairwise(sizes[1:]):
            layers += [nn.ReLU(), nn.Linear(before, after)]
        super().__init__(*layers)


def as_input(model: lightning.LightningModule, x: Tensor) -> Tensor:
    """Return rows on the device and in the dtype of a model's networks, which ``trainer.precision`` decides."""
    return x.to(device=model.device, dtype=model.dtype)  # type: ignore[arg-type]  # no string: torch's own dtype


def check_kind(name: str, density: Any, kind: type, option: str) -> None:
    """Raise unless a density is of the kind that a model learns; ``option`` is the option of `gmm` that gives one.

    Raises:
        TypeError: If it is of another.
    """
    if not isinstance(density, kind):
        raise TypeError(
            f"Expected `{name}` to be a {kind.__name__}, but got {type(density).__name__}; set gmm={option}."
        )


@torch.no_grad()
def check_network(model: lightning.LightningModule, name: str, n_inputs: int, n_outputs: int) -> None:
    """Raise unless a network of a model maps rows of ``n_inputs`` features to ``n_outputs``, before any time is spent.

    Raises:
        ValueError: If it takes other rows, or gives other features.
    """
    network: nn.Module = getattr(model, name)
    was_training, found = network.training, ""
    gpus = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):  # a random map draws, and training is to draw what it would have drawn
            shape = network.eval()(as_input(model, torch.zeros(2, n_inputs))).shape
        found = "" if shape == (2, n_outputs) else f"{shape[-1]} features"
    except RuntimeError as error:
        found = str(error)
    finally:
        network.train(was_training)
    if found:
        raise ValueError(
            f"Expected `{name}` to map {n_inputs} features to {n_outputs}, but got {found}; set model.{name}.sizes."
        )
