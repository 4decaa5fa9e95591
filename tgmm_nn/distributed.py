"""Sums over ranks, and rank zero's word for all; without ``torch.distributed`` each is a no-op."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["broadcast_from_rank_zero", "is_distributed", "sum_over_ranks"]


def is_distributed() -> bool:
    """Return whether more than one rank takes part in the default process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(flat: Tensor) -> Tensor:
    """Return the sum of ``flat`` over all ranks as a new tensor; ``flat`` itself when alone.

    Every rank has to call this the same number of times with the same shape.

    Example:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_distributed():
        return flat
    total = flat.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def broadcast_from_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, by rank zero's."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
