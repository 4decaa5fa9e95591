"""Large triangular and symmetric matrices by blocks, so that no product is spent on the half that is known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["blocks_of", "inverse_of_lower", "symmetric"]

# Rows or columns of a block: narrower ones are not products at full rate.
BLOCK = 64


def blocks_of(n_features: int) -> Iterator[tuple[int, int]]:
    """Give blocks of columns of a triangle, whose products need not touch its empty half; one where that is small."""
    size = BLOCK if n_features >= 2 * BLOCK else n_features
    return ((start, min(start + size, n_features)) for start in range(0, n_features, size))


def symmetric(rows: list[Tensor]) -> Tensor:
    """Return symmetric matrices of blocks of rows, each up to the diagonal."""
    if len(rows) == 1:
        return rows[0]
    n_features = rows[-1].shape[-1]
    matrix = rows[-1].new_empty(*rows[-1].shape[:-2], n_features, n_features)
    for block in rows:
        size, end = block.shape[-2:]
        matrix[..., end - size : end, :end] = block
        matrix[..., : end - size, end - size : end] = block[..., : end - size].mT
    return matrix


def inverse_of_lower(lower: Tensor) -> Tensor:
    """Return the inverse of each lower triangular matrix, by halves, so that large ones are products.

    By triangular solves at the bottom: batched LU can fail inside MKL.
    """
    d = lower.shape[-1]
    if d <= BLOCK:
        eye = torch.eye(d, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    first, last = inverse_of_lower(lower[..., : d // 2, : d // 2]), inverse_of_lower(lower[..., d // 2 :, d // 2 :])
    below = -last @ (lower[..., d // 2 :, : d // 2] @ first)
    above = torch.zeros_like(below.mT)
    return torch.cat([torch.cat([first, above], -1), torch.cat([below, last], -1)], -2)
