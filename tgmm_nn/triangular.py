"""Large triangular and symmetric matrices by blocks, so that no product is spent on the half that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tgmm_nn.products import product

__all__ = [
    "BLOCK",
    "CACHED",
    "blocks_of",
    "in_parts",
    "inverse_of_lower",
    "inverse_of_root",
    "second_moments",
    "second_moments_of_each",
    "symmetric",
    "whitened_blocks",
    "whitening",
]

# Rows or columns of a block: narrower ones are not products at full rate.
BLOCK = 64

# Numbers in the matrices that are worked on at once: they stay in a processor's cache.
CACHED = 2**19


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


def in_parts(function: Callable[..., tuple[Tensor, ...]], *matrices: Tensor) -> tuple[Tensor, ...]:
    """Return what a function of batches of matrices ``(K, d, d)`` gives, of large ones a few at a time.

    On a CPU fresh arrays that don't fit into its cache take as long as what is done with them.
    """
    size = max(1, CACHED // matrices[0].shape[-1] ** 2)
    if matrices[0].ndim != 3 or len(matrices[0]) <= size or matrices[0].device.type != "cpu":
        return function(*matrices)
    results = [function(*part) for part in zip(*(m.split(size) for m in matrices), strict=True)]
    return tuple(torch.cat(values) for values in zip(*results, strict=True))


def inverse_of_lower(lower: Tensor) -> Tensor:
    """Return the inverse of each lower triangular matrix.

    By triangular solves, since batched LU can fail inside MKL, and large ones by halves, so that they are products.
    """
    if not _goes_by_halves(lower):
        return _solved(lower)
    (inverse,) = in_parts(lambda part: (_inverse(part),), lower)
    return inverse


def inverse_of_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the inverse of each symmetric matrix's Cholesky factor L, and which matrices have one.

    Large ones go by halves,

    .. math::
        L^{-1} = \begin{pmatrix} L_1^{-1} & 0 \\ -L_2^{-1} B L_1^{-1} & L_2^{-1} \end{pmatrix}, \qquad
        L_1 L_1^\top = A_{11}, \quad B = A_{21} L_1^{-\top}, \quad L_2 L_2^\top = A_{22} - B B^\top,

    so that almost all of it is products: LAPACK's own runs at a fifth of their rate on a processor of AMD. Measured up
    to a condition of 1e13, the inverse is off by at most three times as much as LAPACK's.
    """
    if not _goes_by_halves(matrix):
        lower, info = torch.linalg.cholesky_ex(matrix)
        return inverse_of_lower(lower), info == 0
    inverse, exists = in_parts(_inverse_of_root, matrix)
    return inverse, exists


def _goes_by_halves(matrix: Tensor) -> bool:
    """Return whether matrices are large, and no gradient is recorded, which forbids to write into parts of one."""
    return matrix.ndim == 3 and matrix.shape[-1] > BLOCK and not torch.is_grad_enabled()


def _inverse(lower: Tensor) -> Tensor:
    n = lower.shape[-1]
    if n <= BLOCK:
        return _solved(lower)
    first, last = slice(0, n // 2), slice(n // 2, None)
    inverse, other = _inverse(lower[..., first, first]), _inverse(lower[..., last, last])
    return _lower(inverse, (other @ (lower[..., last, first] @ inverse)).neg_(), other)


def _inverse_of_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    n = matrix.shape[-1]
    if n <= BLOCK:
        lower, info = torch.linalg.cholesky_ex(matrix)
        return _solved(lower), info == 0
    first, last = slice(0, n // 2), slice(n // 2, None)
    inverse, exists = _inverse_of_root(matrix[..., first, first])
    below = matrix[..., last, first] @ inverse.mT
    other, others = _inverse_of_root(torch.baddbmm(matrix[..., last, last], below, below.mT, alpha=-1.0))
    return _lower(inverse, (other @ (below @ inverse)).neg_(), other), exists & others


def _lower(first: Tensor, below: Tensor, last: Tensor) -> Tensor:
    """Return lower triangular matrices of their parts."""
    n, end = first.shape[-1], first.shape[-1] + last.shape[-1]
    matrix = first.new_empty(*first.shape[:-2], end, end)
    matrix[..., :n, :n], matrix[..., n:, :n], matrix[..., n:, n:] = first, below, last
    matrix[..., :n, n:].zero_()
    return matrix


def _solved(lower: Tensor) -> Tensor:
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)
