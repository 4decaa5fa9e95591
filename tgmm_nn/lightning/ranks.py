"""Rows of all ranks, however many each holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from tgmm_nn.distributed import is_distributed, sum_over_ranks

__all__ = ["count_over_ranks", "gather_rows", "this_rank"]


def this_rank() -> tuple[int, int]:
    """Return the number of this rank and how many there are."""
    alone = (0, 1)
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed() else alone


def gather_rows(rows: Tensor) -> list[Tensor]:
    """Return the rows ``(n, d)`` of every rank, in the order of the ranks; every rank has to call this."""
    wide = rows if rows.dtype in (torch.float64, torch.int64) else rows.float()  # not every backend sends halves
    return list(gather_all_tensors(wide.contiguous())) if is_distributed() else [wide]


def count_over_ranks(number: int, device: torch.device) -> int:
    """Return the sum of a number of each rank; every rank has to call this."""
    return int(sum_over_ranks(torch.tensor([number], device=device)))
