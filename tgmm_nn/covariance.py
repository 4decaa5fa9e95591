r"""Covariance families: three structures, each per component or tied.

=================  ==============  =====================  ==========================
name               element         ``covariances_``       free covariance parameters
=================  ==============  =====================  ==========================
full               ``(K, d, d)``   ``(K, d, d)``          K d (d + 1) / 2
diag               ``(K, d)``      ``(K, d)``             K d
spherical          ``(K,)``        ``(K,)``               K
tied_full          ``(1, d, d)``   ``(d, d)``             d (d + 1) / 2
tied_diag          ``(1, d)``      ``(d,)``               d
tied_spherical     ``(1,)``        ``()``                 1
=================  ==============  =====================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from tgmm_nn.structure import Covariance, writes_into_parts
from tgmm_nn.triangular import blocks_of, in_parts, inverse_of_lower, inverse_of_root

__all__ = ["COVARIANCES", "Covariance", "Diagonal", "Full", "Spherical"]


class Full(Covariance):
    """Any symmetric positive definite matrix; the element is the matrix itself, the factor upper triangular.

    Example:
        >>> Full().public_shape(3, 2), Full(tied=True).public_shape(3, 2)
        ((3, 2, 2), (2, 2))
    """

    def shape(self, n_features: int) -> tuple[int, ...]:
        return (n_features, n_features)

    def n_parameters(self, n_features: int) -> int:
        return n_features * (n_features + 1) // 2

    def whole(self) -> Covariance:
        return Whole(self.tied)

    def of_few(self) -> Covariance:
        return PACKED[self.tied]

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a[..., None] * b[..., None, :]

    def variances(self, element: Tensor) -> Tensor:
        return element.diagonal(0, -2, -1)

    def eigenvalues(self, element: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(element)

    def add_to_diagonal_(self, element: Tensor, value: float | Tensor) -> Tensor:
        self.variances(element).add_(value.unsqueeze(-1) if isinstance(value, Tensor) else value)
        return element

    def matrix(self, element: Tensor, n_features: int) -> Tensor:
        return element

    def is_positive(self, covariance: Tensor, dtype: torch.dtype | None = None, factor: Tensor | None = None) -> Tensor:
        if factor is None:
            remaining, exists = in_parts(self._remaining, covariance)
            return exists & self._is_clear(remaining, covariance, dtype)
        return self._is_clear(self.variances(factor).square().reciprocal(), covariance, dtype)

    def is_factor(self, factor: Tensor) -> Tensor:
        return (self.variances(factor) > 0).all(-1) & (factor.tril(-1) == 0).all(-1).all(-1)

    def factor(self, covariance: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        inverse, exists = inverse_of_root(covariance)
        factor = inverse.mT.to(dtype or covariance.dtype)
        return factor, exists & (factor.sum((-2, -1)).abs() < torch.inf)

    def root(self, factor: Tensor) -> Tensor:
        return inverse_of_lower(factor.mT)

    def square(self, factor: Tensor) -> Tensor:
        return factor @ factor.swapaxes(-1, -2)

    def apply(self, element: Tensor, rows: Tensor) -> Tensor:
        return (element @ rows[..., None])[..., 0]

    def unwhiten(self, factor: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        def both_sides(factor: Tensor, second: Tensor) -> tuple[Tensor]:
            half = torch.linalg.solve_triangular(factor.mT, second, upper=False)
            return (torch.linalg.solve_triangular(factor.mT, half.mT, upper=False),)

        (second,) = in_parts(both_sides, factor, second)
        return torch.linalg.solve_triangular(factor.mT, first.unsqueeze(-1), upper=False).squeeze(-1), second

    def log_det(self, factor: Tensor, n_features: int) -> Tensor:
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def inner(self, a: Tensor, b: Tensor, n_features: int) -> Tensor:
        return (a * b).sum((-2, -1))

    def block(self, element: Tensor, dims: Tensor) -> Tensor:
        return element[..., dims[:, None], dims]

    def condition(self, covariance: Tensor, given: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        cross = covariance[..., rest[:, None], given]
        lower = torch.linalg.cholesky(self.block(covariance, given))
        half = torch.linalg.solve_triangular(lower, cross.mT, upper=False)
        regression = torch.linalg.solve_triangular(lower.mT, half, upper=True).mT
        return regression, self.block(covariance, rest) - half.mT @ half

    def whiten(self, x: Tensor, means: Tensor, factor: Tensor) -> Tensor:
        # One product for each factor and block of its columns; the means are whitened apart and subtracted.
        rows, blocks = x.expand(len(factor), -1, -1), list(blocks_of(x.shape[-1]))
        shift = means.unsqueeze(-2).bmm(factor.expand(len(means), -1, -1))
        if len(blocks) == 1:
            return rows.bmm(factor) - shift
        return torch.cat([rows[..., :j].bmm(factor[..., :j, i:j]) - shift[..., i:j] for i, j in blocks], -1)

    def whitened_second(self, y: Tensor, r: Tensor) -> Tensor:
        return self.pool((y * r.unsqueeze(-1)).mT @ y)

    def features(self, x: Tensor) -> Tensor:
        d, n = x.shape
        if not writes_into_parts():
            first, second = torch.triu_indices(d, d, device=x.device).unbind()
            return x[first] * x[second]
        pairs = x.new_empty(self.n_products(d), n)  # a list of products would be copied once more
        self.writer(x.contiguous(), pairs)()
        return pairs

    def writer(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        parts = out.split(list(range(len(x), 0, -1)))
        products = [(x[i:], row, part) for i, (row, part) in enumerate(zip(x, parts, strict=True))]

        def write() -> None:
            for rows, row, part in products:
                torch.mul(rows, row, out=part)

        return write

    def dual(self, matrix: Tensor, n_features: int) -> Tensor:
        i, j = self._pairs(matrix)
        return matrix[..., i, j] * torch.where(i == j, 1.0, 2.0).to(matrix.dtype)

    def pack(self, element: Tensor) -> Tensor:
        i, j = self._pairs(element)
        return element[..., i, j]

    def unpack(self, features: Tensor, n_features: int) -> Tensor:
        matrix = features.new_zeros(*features.shape[:-1], n_features, n_features)
        i, j = self._pairs(matrix)
        matrix[..., i, j] = features
        matrix[..., j, i] = features
        return matrix

    def unconstrained(self, factor: Tensor) -> Tensor:
        return factor.triu(1) + torch.diag_embed(self.variances(factor).log())

    def constrained(self, free: Tensor) -> Tensor:
        return free.triu(1) + torch.diag_embed(self.variances(free).exp())

    def normals(self, means: Tensor, factor: Tensor) -> Distribution:
        return MultivariateNormal(means, scale_tril=self.root(factor))

    def space(self, n_rows: int, n_features: int, like: Tensor) -> Tensor:
        # A product of features is a row of its own; without any, rows are copied as they are.
        if self.tied:
            return super().space(n_rows, n_features, like)
        return like.new_empty(self.n_monomials(n_features), n_rows)

    def _remaining(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return what remains of each variance given the features before it, and which covariances have a factor."""
        lower, info = torch.linalg.cholesky_ex(covariance)
        return self.variances(lower).square(), info == 0

    def _is_clear(self, remaining: Tensor, covariance: Tensor, dtype: torch.dtype | None) -> Tensor:
        # What remains of a variance may be rounding alone, where rows lie in a plane or a feature is constant.
        numbers = torch.finfo(dtype or covariance.dtype)
        noise = 10 * covariance.shape[-1] * numbers.eps * self.variances(covariance)
        return (remaining > noise.clamp_(min=numbers.tiny)).all(-1)

    @staticmethod
    def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device).unbind()
        return i, j


class Whole(Full):
    """Full matrices with all d² products of a row as features: one step for few rows, twice the numbers for many."""

    def n_products(self, n_features: int) -> int:
        return n_features**2

    def features(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) * x).flatten(0, 1)

    def writer(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        return partial(torch.mul, x.unsqueeze(1), x, out=out.unflatten(0, self.shape(len(x))))

    def dual(self, matrix: Tensor, n_features: int) -> Tensor:
        return matrix.flatten(-2)

    def pack(self, element: Tensor) -> Tensor:
        return element.flatten(-2)

    def unpack(self, features: Tensor, n_features: int) -> Tensor:
        return features.unflatten(-1, self.shape(n_features))


class Packed(Full):
    """Full matrices in arrays of NumPy, which indexes and multiplies small ones in less time than torch."""

    def features_of_few(self, x: Any, out: Any) -> None:
        start = 0
        for i, row in enumerate(x):
            stop = start + len(x) - i
            np.multiply(x[i:], row, out=out[start:stop])
            start = stop

    def dual(self, matrix: Any, n_features: int) -> Any:
        upper, _, times = _indices(n_features)
        return matrix.reshape(len(matrix), -1)[:, upper] * times

    def unpack(self, features: Any, n_features: int) -> Any:
        _, whole, _ = _indices(n_features)
        return features[:, whole].reshape(-1, *self.shape(n_features))


@cache
def _indices(n_features: int) -> tuple[Any, Any, Any]:
    """Return where in a matrix its upper triangle is, where in that the matrix is, and how often."""
    i, j = np.triu_indices(n_features)
    whole = np.empty((n_features, n_features), np.intp)
    whole[i, j] = whole[j, i] = np.arange(len(i))
    return i * n_features + j, whole.ravel(), np.where(i == j, 1.0, 2.0)


class Uncorrelated(Covariance):
    """Diagonal and spherical matrices: their elements are variances, and features tell nothing of each other."""

    def eigenvalues(self, element: Tensor) -> Tensor:
        return self.variances(element)

    def is_positive(self, covariance: Tensor, dtype: torch.dtype | None = None, factor: Tensor | None = None) -> Tensor:
        return (self.variances(covariance) > torch.finfo(dtype or covariance.dtype).tiny).all(-1)

    def is_factor(self, factor: Tensor) -> Tensor:
        return (self.variances(factor) > 0).all(-1)

    def root(self, factor: Tensor) -> Tensor:
        return factor.reciprocal()

    def square(self, factor: Tensor) -> Tensor:
        return factor * factor

    def unwhiten(self, factor: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.apply(factor.reciprocal(), first), second / factor.square()

    def condition(self, covariance: Tensor, given: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        return covariance.new_zeros(len(covariance), len(rest), len(given)), self.block(covariance, rest)

    def unconstrained(self, factor: Tensor) -> Tensor:
        return factor.log()

    def constrained(self, free: Tensor) -> Tensor:
        return free.exp()

    def normals(self, means: Tensor, factor: Tensor) -> Distribution:
        return Independent(Normal(means, self.variances(self.root(factor))), 1)


class Diagonal(Uncorrelated):
    """A diagonal matrix; the element is its diagonal, the factor one over the standard deviations."""

    def shape(self, n_features: int) -> tuple[int, ...]:
        return (n_features,)

    def n_parameters(self, n_features: int) -> int:
        return n_features

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def variances(self, element: Tensor) -> Tensor:
        return element

    def add_to_diagonal_(self, element: Tensor, value: float | Tensor) -> Tensor:
        return element.add_(value[..., None] if isinstance(value, Tensor) else value)

    def matrix(self, element: Tensor, n_features: int) -> Tensor:
        return torch.diag_embed(element)

    def factor(self, covariance: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        factor = covariance.rsqrt().to(dtype or covariance.dtype)
        return factor, factor.amax(-1) < torch.inf

    def apply(self, element: Tensor, rows: Tensor) -> Tensor:
        return element * rows

    def log_det(self, factor: Tensor, n_features: int) -> Tensor:
        return factor.log().sum(-1)

    def inner(self, a: Tensor, b: Tensor, n_features: int) -> Tensor:
        return (a * b).sum(-1)

    def block(self, element: Tensor, dims: Tensor) -> Tensor:
        return element[..., dims]

    def whiten(self, x: Tensor, means: Tensor, factor: Tensor) -> Tensor:
        return (x - means.unsqueeze(-2)) * factor.unsqueeze(-2)

    def whitened_second(self, y: Tensor, r: Tensor) -> Tensor:
        return self.pool(torch.einsum("kn,knd->kd", r, y.square()))

    def features(self, x: Tensor) -> Tensor:
        return x.square()

    def writer(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        return partial(torch.mul, x, x, out=out)

    def dual(self, matrix: Tensor, n_features: int) -> Tensor:
        return matrix

    def pack(self, element: Tensor) -> Tensor:
        return element

    def unpack(self, features: Tensor, n_features: int) -> Tensor:
        return features


class Spherical(Uncorrelated):
    """A multiple of the identity; the element is that number.

    It is the mean of the diagonal, so its maximiser is T / f as in the others.
    """

    def shape(self, n_features: int) -> tuple[int, ...]:
        return ()

    def n_parameters(self, n_features: int) -> int:
        return 1

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).mean(-1)

    def variances(self, element: Tensor) -> Tensor:
        return element[..., None]

    def add_to_diagonal_(self, element: Tensor, value: float | Tensor) -> Tensor:
        return element.add_(value)

    def matrix(self, element: Tensor, n_features: int) -> Tensor:
        return element[..., None, None] * torch.eye(n_features, dtype=element.dtype, device=element.device)

    def factor(self, covariance: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        factor = covariance.rsqrt().to(dtype or covariance.dtype)
        return factor, factor < torch.inf

    def apply(self, element: Tensor, rows: Tensor) -> Tensor:
        return element[..., None] * rows

    def log_det(self, factor: Tensor, n_features: int) -> Tensor:
        return n_features * factor.log()

    def inner(self, a: Tensor, b: Tensor, n_features: int) -> Tensor:
        return n_features * a * b

    def block(self, element: Tensor, dims: Tensor) -> Tensor:
        return element

    def whiten(self, x: Tensor, means: Tensor, factor: Tensor) -> Tensor:
        return (x - means.unsqueeze(-2)) * factor[:, None, None]

    def whitened_second(self, y: Tensor, r: Tensor) -> Tensor:
        return self.pool((r * y.square().mean(-1)).sum(-1))

    def features(self, x: Tensor) -> Tensor:
        return x.square().mean(0, keepdim=True)

    def features_of_few(self, x: Any, out: Any) -> None:
        np.square(x).mean(0, keepdims=True, out=out)

    def dual(self, matrix: Tensor, n_features: int) -> Tensor:
        return n_features * matrix[..., None]

    def pack(self, element: Tensor) -> Tensor:
        return element.unsqueeze(-1)

    def unpack(self, features: Tensor, n_features: int) -> Tensor:
        return features[..., 0]


PACKED = (Packed(), Packed(tied=True))

COVARIANCES: dict[str, Covariance] = {
    "full": Full(),
    "diag": Diagonal(),
    "spherical": Spherical(),
    "tied_full": Full(tied=True),
    "tied_diag": Diagonal(tied=True),
    "tied_spherical": Spherical(tied=True),
}
