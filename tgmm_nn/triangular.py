"""Large triangular and symmetric matrices by blocks, so that no product is spent on the half that is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tgmm_nn.products import product

__all__ = [
    "BLOCK",
    "blocks_of",
    "inverse_of_lower",
    "second_moments",
    "second_moments_of_each",
    "symmetric",
    "whitened_blocks",
    "whitening",
]

# Rows or columns of a block: narrower ones are not products at full rate.
BLOCK = 64


def blocks_of(n_features: int) -> Iterator[tuple[int, int]]:
    """Give blocks of columns of a triangle, whose products need not touch its empty half; one where that is small."""
    size = BLOCK if n_features >= 2 * BLOCK else n_features
    return ((start, min(start + size, n_features)) for start in range(0, n_features, size))


def whitening(means: Tensor, factor: Tensor) -> list[Tensor]:
    r"""Return maps that whiten a block of features each by upper triangular factors, for all components at once.

    With a first row of ones in the columns, :math:`[-P^\top \mu_k, P^\top] [1; x] = P^\top (x - \mu_k)`.

    Args:
        means: Means, shape ``(K, d)``.
        factor: Factors P, shape ``(K, d, d)``.

    Returns:
        For features i to j the map of the first j, shape ``(K, j - i, 1 + j)``.
    """
    shift = -(means.unsqueeze(-2) @ factor).mT
    return [torch.cat([shift[:, i:j], factor[:, :j, i:j].mT], -1) for i, j in blocks_of(means.shape[-1])]


def whitened_blocks(columns: Tensor, maps: Sequence[Tensor]) -> Iterator[Tensor]:
    """Give columns ``(1 + d, n)``, a row of ones first, after each of the `whitening` maps, shape ``(K, j - i, n)``."""
    return (product(m.flatten(0, 1), columns[: m.shape[-1]]).unflatten(0, m.shape[:2]) for m in maps)


def second_moments(columns: Tensor, r: Tensor) -> list[Tensor]:
    """Return the sums of ``r x xᵀ`` over columns ``(d, n)``, for r of shape ``(K, n)``, as blocks for `symmetric`."""
    blocks = ((columns[i:j] * r[:, None], columns[:j].mT) for i, j in blocks_of(len(columns)))
    return [product(a.flatten(0, 1), b).unflatten(0, a.shape[:2]) for a, b in blocks]


def second_moments_of_each(columns: Tensor, r: Tensor) -> list[Tensor]:
    """Return the same where each component has columns of its own, shape ``(K, d, n)``."""
    blocks = list(blocks_of(columns.shape[1]))
    return [torch.stack([product(y[i:j] * w, y[:j].mT) for y, w in zip(columns, r, strict=True)]) for i, j in blocks]


def symmetric(rows: Sequence[Tensor]) -> Tensor:
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

    By triangular solves at the bottom, and where a gradient is recorded, which forbids to write into parts of a matrix:
    batched LU can fail inside MKL.
    """
    if lower.shape[-1] <= BLOCK or torch.is_grad_enabled():
        return _solved(lower)
    inverse = torch.zeros_like(lower)
    _invert(lower, inverse)
    return inverse


def _invert(lower: Tensor, out: Tensor) -> None:
    """Write the inverse into a part of a matrix of zeros: fresh large arrays take longer than the products."""
    if lower.shape[-1] <= BLOCK:
        out.copy_(_solved(lower))
        return
    first, last = slice(0, lower.shape[-1] // 2), slice(lower.shape[-1] // 2, None)
    for half in (first, last):
        _invert(lower[..., half, half], out[..., half, half])
    below = out[..., last, last] @ (lower[..., last, first] @ out[..., first, first])
    out[..., last, first] = below.neg_()


def _solved(lower: Tensor) -> Tensor:
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)
