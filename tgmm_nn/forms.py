r"""The rule by which an E-step takes one of its forms: by shapes alone, and by the rounding that moments would carry.

Also how many rows each form takes at once, which densities share. `tgmm_nn.expectation` and `tgmm_nn.functional` have
the forms themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgmm_nn.covariance import Covariance
from tgmm_nn.products import SUMMED
from tgmm_nn.statistics import Parameters
from tgmm_nn.triangular import BLOCK, in_parts

__all__ = [
    "conditioning",
    "goes_by_blocks",
    "has_few_moments",
    "moment_rounding",
    "rows_of_blocks",
    "rows_of_moments",
    "rows_of_triangles",
    "rows_per_chunk",
]

# Full covariances have few moments up to so many features, and where components are more: products in float64 are then
# no slower than whitening in float32, which moves more than it adds.
FEW = 32

# Features from which on full matrices are used by blocks; narrower ones are a product for each component.
WIDE = 2 * BLOCK

# Moments of a row, at most and in multiples of the numbers that whitening forms, up to which it is faster to form them
# than to go by blocks of features: of full covariances those of up to about 90 features.
FORMED, WIDEST = 4, 4500


def has_few_moments(means: Tensor, covariance: Covariance) -> bool:
    """Return whether products of moments in float64 are no slower than rows whitened in float32, by shapes."""
    n_components, n_features = means.shape
    return covariance.is_narrow(n_features) or (n_features <= FEW and n_features < n_components)


def goes_by_blocks(means: Tensor, covariance: Covariance, moments: bool) -> bool:
    """Return whether full matrices are many blocks, or with ``moments`` those of a row too many to be formed."""
    n_features = means.shape[-1]
    too_many = covariance.n_monomials(n_features) > min(FORMED * means.numel(), WIDEST)
    return not covariance.is_narrow(n_features) and (n_features >= WIDE or (moments and too_many))


def rows_per_chunk(width: int, element_size: int, least: int = 64) -> int:
    """Return how many rows of ``width`` numbers stay below 4 MB, above which fresh arrays fault at each use.

    A multiple of 16: where rows are columns of a matrix, its own rows then begin with a line of the cache, which makes
    products and sums a fifth faster.
    """
    return min(max(4_000_000 // (width * element_size) // 16 * 16, least), 8192)


def rows_of_moments(means: Tensor, covariance: Covariance, dtype: torch.dtype) -> int:
    """Return how many rows of moments are formed at once: at least 256, since fewer are not products at full rate.

    Products of features take an operation for each feature, which pays in larger chunks, of some 12 MB.
    """
    n_components, n_features = means.shape
    rows = rows_per_chunk(max(n_components, covariance.n_monomials(n_features)), dtype.itemsize, least=256)
    return rows if covariance.is_narrow(n_features) else 3 * rows


def rows_of_blocks(means: Tensor, dtype: torch.dtype, moments: bool) -> int:
    """Return how many rows are whitened by blocks at once.

    Each chunk adds to K · d² sums, so that it should not have fewer rows than those have columns.
    """
    rows = rows_per_chunk(means.numel(), dtype.itemsize)
    return max(2 * means.shape[-1], min(SUMMED, rows) if moments else rows)


def rows_of_triangles(means: Tensor, dtype: torch.dtype) -> int:
    """Return for how many rows densities are formed at once that go by blocks, of which one is kept at a time."""
    return max(2 * means.shape[-1], rows_per_chunk(len(means) * BLOCK, dtype.itemsize))


def moment_rounding(
    mean_squares: Tensor,
    parameters: Parameters,
    covariance: Covariance,
    dtype: torch.dtype,
    n_rows: int,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Return by about what fraction of itself moments in a dtype move a covariance.

    .. math:: \tfrac13 \sqrt m \, \epsilon \, b

    with m the rows of a chunk, since totals are in float64, and b from `conditioning`. Sums of m unlike numbers of one
    sign are off by a multiple of :math:`\sqrt m \epsilon`; the third is measured: in float32, for 1 to 150 features,
    conditions up to 1e6, and components up to 300 standard deviations apart, of which one may have few rows, moments
    are seldom off by more than twice this, and mostly by less than a tenth.

    Args:
        mean_squares: Mean square of each feature about the reference point of the moments, in the rows of each
            component or more, shape ``(K, d)``.
        parameters: Parameters of the E-step.
        covariance: Structure of the covariances.
        dtype: Dtype of the rows.
        n_rows: Number of rows.
        chunk_size: Rows in a chunk; None is what an E-step chooses.

    References:
        Higham, The accuracy of floating point summation, 1993.
    """
    means, by_blocks = parameters.means, goes_by_blocks(parameters.means, covariance, moments=True)
    size = rows_of_blocks(means, dtype, moments=True) if by_blocks else rows_of_moments(means, covariance, dtype)
    rows = min(n_rows, chunk_size or size)
    return conditioning(mean_squares, parameters.factor, covariance) * (torch.finfo(dtype).eps * rows**0.5 / 3)


def conditioning(mean_squares: Tensor, factor: Tensor, covariance: Covariance) -> Tensor:
    r"""Return the squared range of rows in standard deviations of their component, for the worst one.

    With :math:`m_k` the mean squares of rows whitened by component k, as if features were independent of each other,

    .. math:: b = \max_k \sqrt{\max_i m_{ki} \sum_i m_{ki}}, \qquad m_{ki} = \sum_j s_{kj}^2 (P_k)_{ji}^2

    A relative rounding by ε of each entry of :math:`\sum_n r_{nk} x_n x_n^\top`, independent of the others, becomes an
    entry of standard deviation :math:`\epsilon \sqrt{m_{ki} m_{kj}}` in the whitened covariance. The norm of a random
    matrix is about that of the largest of its rows, ε b, and at most twice as much.

    Args:
        mean_squares: Mean square :math:`s_k^2` of each feature about the reference point, shape ``(K, d)``.
        factor: Factors P of the precisions.
        covariance: Structure of the covariances.

    References:
        Bandeira and van Handel, Sharp nonasymptotic bounds on the norm of random matrices with independent entries,
        2016.
    """

    def whitened(factor: Tensor, mean_squares: Tensor) -> tuple[Tensor]:
        return (covariance.whiten(torch.zeros_like(mean_squares[:1]), -mean_squares, factor.square()),)

    (squares,) = in_parts(whitened, factor, mean_squares)
    return (squares.amax(-1) * squares.sum(-1)).sqrt().amax()
