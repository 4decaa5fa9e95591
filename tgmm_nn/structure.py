r"""What a covariance structure is, and the laws that each obeys.

A structure is a stateless strategy. It says which part :math:`[A]` of a symmetric d × d matrix it keeps (its
*element*), how such an element is factorised, and how rows are whitened by the factor. Elements carry a leading axis of
K, or of 1 when tied, so that everything broadcasts and nothing else in the package knows which family it works with.

The factor of a covariance Σ is P with :math:`\Sigma^{-1} = P P^\top`; :math:`y = P^\top (x - \mu)` is whitened, and
:math:`\log |\Sigma|^{-1/2} = \log |P|`. It is what scikit-learn calls ``precisions_cholesky_``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from tgmm_nn import checks

__all__ = ["LIFT", "Covariance", "writes_into_parts"]


def writes_into_parts() -> bool:
    """Return whether a part of a tensor can be written into: by neither gradients, compiled code nor transforms."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (torch.is_grad_enabled() or transformed)


# A covariance that cannot be factorised is lifted by this fraction of its mean variance: about the relative error that
# sums of float32 products can carry, and small enough that a float32 factor still represents the result.
LIFT = 1e-6


@dataclass(frozen=True)
class Covariance(ABC):
    r"""Structure of a covariance; subclasses hold no state besides ``tied``.

    Laws that every structure obeys, with :math:`[A]` the element of a matrix (tested for all of them):

    - ``outer`` is bilinear, and ``outer(x, x)`` has mean diagonal :math:`|x|^2 / d`;
    - ``square(root(P)) == c`` for the factor P of every positive definite element c, and ``square(P)`` is its inverse;
    - for a column x, ``dual(A, d) @ features(x)`` is :math:`x^\top A x`, and features unpack into ``outer``; ``pack``
      undoes ``unpack``; ``writer`` writes the features of what the column holds when it is called;
    - ``whiten`` gives rows whose squared length is the Mahalanobis distance, and ``log_det`` the matching normaliser;
    - ``unwhiten`` makes of ``Σ r whiten(x)`` and ``whitened_second(whiten(x), r)`` the sums ``Σ r (x - μ)`` and
      ``Σ r outer(x - μ, x - μ)``;
    - ``inner(A, B, d)`` is :math:`\mathrm{tr}(A B)`, ``block(c, dims)`` the covariance of the features ``dims``, and
      ``condition`` that of the others given them;
    - ``constrained`` makes a factor of any real numbers, and ``constrained(unconstrained(P)) == P`` for every factor;
    - ``normals(μ, P)`` has the mean μ and the covariance ``square(root(P))``.

    Args:
        tied: Whether all components share one covariance.
    """

    tied: bool = False

    @abstractmethod
    def shape(self, n_features: int) -> tuple[int, ...]:
        """Return the shape of one element."""

    @abstractmethod
    def n_parameters(self, n_features: int) -> int:
        """Return the number of free parameters of one element."""

    @abstractmethod
    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the element of each ``a bᵀ``, for ``a`` and ``b`` of shape ``(..., d)``."""

    @abstractmethod
    def variances(self, element: Tensor) -> Tensor:
        """Return the different variances of each element, its diagonal, shape ``(..., d)`` or ``(..., 1)``."""

    @abstractmethod
    def eigenvalues(self, element: Tensor) -> Tensor:
        """Return the different eigenvalues of each element, shape ``(..., d)`` or ``(..., 1)``."""

    @abstractmethod
    def add_to_diagonal_(self, element: Tensor, value: float | Tensor) -> Tensor:
        """Add ``value`` times the identity to elements in place; ``value`` is a number or one per element."""

    @abstractmethod
    def matrix(self, element: Tensor, n_features: int) -> Tensor:
        """Return elements as d × d matrices, shape ``(..., d, d)``."""

    @abstractmethod
    def is_positive(self, covariance: Tensor, dtype: torch.dtype | None = None, factor: Tensor | None = None) -> Tensor:
        """Return which covariances are positive definite, beyond rounding and in the range of a dtype; None is theirs.

        Where their factor is given, no other is made: covariances without one have to be told apart by the caller.
        """

    @abstractmethod
    def is_factor(self, factor: Tensor) -> Tensor:
        """Return which elements are factors: triangular, with a positive diagonal."""

    @abstractmethod
    def factor(self, covariance: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the factor P of each covariance in ``dtype``, or its own, and which of them exist there."""

    @abstractmethod
    def root(self, factor: Tensor) -> Tensor:
        """Return ``L = P⁻ᵀ``, the Cholesky factor of each covariance, from the factor of its precision."""

    @abstractmethod
    def square(self, factor: Tensor) -> Tensor:
        """Return ``A Aᵀ``: the precision of a factor, the covariance of a root."""

    @abstractmethod
    def apply(self, element: Tensor, rows: Tensor) -> Tensor:
        """Return each element times its row, for one row per component, shape ``(K, d)``."""

    @abstractmethod
    def unwhiten(self, factor: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums s ``(K, d)`` and S of whitened rows in the units of the rows: ``P⁻ᵀ s`` and ``P⁻ᵀ S P⁻¹``."""

    @abstractmethod
    def log_det(self, factor: Tensor, n_features: int) -> Tensor:
        """Return the log-determinant of each factor as a d × d matrix."""

    @abstractmethod
    def inner(self, a: Tensor, b: Tensor, n_features: int) -> Tensor:
        """Return ``tr(A B)`` of elements, one number for each."""

    @abstractmethod
    def block(self, element: Tensor, dims: Tensor) -> Tensor:
        """Return the elements' rows and columns ``dims``, integers of shape ``(m,)``."""

    @abstractmethod
    def condition(self, covariance: Tensor, given: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Σ_rg Σ_gg⁻¹`` as matrices, and ``Σ_rr - Σ_rg Σ_gg⁻¹ Σ_gr`` as elements."""

    @abstractmethod
    def whiten(self, x: Tensor, means: Tensor, factor: Tensor) -> Tensor:
        """Return ``Pᵀ (x - μ_k)`` for rows ``(n, d)`` and means ``(K, d)``, shape ``(K, n, d)``."""

    @abstractmethod
    def whitened_second(self, y: Tensor, r: Tensor) -> Tensor:
        """Return the elements of ``Σ_n r_nk y_nk y_nkᵀ`` for whitened rows ``(K, n, d)`` and ``r``, ``(K, n)``."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return the independent entries of ``[x xᵀ]`` for each column x of a ``(d, n)`` matrix, shape ``(F, n)``."""

    @abstractmethod
    def dual(self, matrix: Tensor, n_features: int) -> Tensor:
        """Return what makes a product with `features` the quadratic form ``xᵀ A x``, shape ``(..., F)``."""

    @abstractmethod
    def pack(self, element: Tensor) -> Tensor:
        """Return the independent entries of elements, shape ``(..., F)``; `unpack` undoes it."""

    @abstractmethod
    def unpack(self, features: Tensor, n_features: int) -> Tensor:
        """Return elements from (sums of) features, shape ``(..., F)``."""

    @abstractmethod
    def unconstrained(self, factor: Tensor) -> Tensor:
        """Return a factor as numbers that gradients may move freely, in the same shape: its diagonal as logarithms."""

    @abstractmethod
    def constrained(self, free: Tensor) -> Tensor:
        """Return the factor of free numbers; inverse of `unconstrained`."""

    @abstractmethod
    def normals(self, means: Tensor, factor: Tensor) -> Distribution:
        """Return the components as one batch of distributions, for means ``(K, d)``; differentiable."""

    def whole(self) -> Covariance:
        """Return the structure with the quickest `features` of few rows, which may repeat entries."""
        return self

    def writer(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        """Return what writes the `features` of ``x`` into ``out`` each time that it is called."""
        return lambda: out.copy_(self.features(x))

    def of_few(self) -> Covariance:
        """Return the structure that has `dual`, `unpack` and `features_of_few` for arrays of NumPy."""
        return self

    def features_of_few(self, x: Any, out: Any) -> None:
        """Write the `features` of an array into another."""
        np.multiply(x, x, out=out)

    def n_products(self, n_features: int) -> int:
        """Return the number F of `features`."""
        return self.n_parameters(n_features)

    def n_monomials(self, n_features: int) -> int:
        """Return how many numbers stand for a row in products: a one, the row and its `features`."""
        return 1 + n_features + (0 if self.tied else self.n_products(n_features))

    def space(self, n_rows: int, n_features: int, like: Tensor) -> Tensor:
        """Return an empty matrix for the monomials of rows, of the strides in which they are written fastest."""
        return like.new_empty(n_rows, self.n_monomials(n_features)).mT

    def is_narrow(self, n_features: int) -> bool:
        """Return whether what tells components apart in a row is a product with about as many numbers as it has.

        That of tied covariances is one with the row itself: their quadratic term is the same for all components.
        """
        return self.tied or self.n_parameters(n_features) <= n_features

    def mean_diagonal(self, element: Tensor) -> Tensor:
        """Return the mean of each element's diagonal: the mean variance per feature."""
        return self.variances(element).mean(-1)

    def leading(self, n_components: int) -> int:
        """Return how many elements ``n_components`` components have."""
        return 1 if self.tied else n_components

    def pool(self, per_component: Tensor) -> Tensor:
        """Return what the elements sum over: the components where tied, nothing otherwise."""
        return per_component.sum(0)[None] if self.tied else per_component

    def public(self, element: Tensor) -> Tensor:
        """Return elements without the leading 1 of a tied structure, as users see them."""
        return element.squeeze(0) if self.tied else element

    def internal(self, element: Tensor) -> Tensor:
        """Return elements with the leading 1 of a tied structure; inverse of `public`."""
        return element.unsqueeze(0) if self.tied else element

    def given(
        self, name: str, value: Any, n_components: int, n_features: int, like: Tensor, *, broadcast: bool = True
    ) -> Tensor:
        """Return what a user gave as covariances as elements, or raise; a number is that multiple of the identity.

        Where ``broadcast``, one element serves all components.
        """
        public = self.public_shape(n_components, n_features)
        shapes = dict.fromkeys((public, self.shape(n_features), ()) if broadcast else (public,))
        tensor = checks.check_array(name, value, like, *shapes)
        if tensor.ndim == 0:
            elements = tensor * self.identity(n_components, n_features, tensor)
        else:
            elements = tensor.expand(self.leading(n_components), *self.shape(n_features)).clone()
        checks.check_symmetric(name, elements, matrix=len(self.shape(n_features)) == 2)
        bad = (~self.is_positive(elements)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"Expected `{name}` to be positive definite, but {bad} (by component) are not.")
        return elements

    def public_shape(self, n_components: int, n_features: int) -> tuple[int, ...]:
        """Return the shape of ``covariances_``."""
        return self.shape(n_features) if self.tied else (n_components, *self.shape(n_features))

    def identity(self, n_components: int, n_features: int, like: Tensor | None = None) -> Tensor:
        """Return unit covariances (or their factors), in the dtype and on the device of ``like``, or the default."""
        shape = (self.leading(n_components), *self.shape(n_features))
        return self.add_to_diagonal_(torch.zeros(shape) if like is None else like.new_zeros(shape), 1.0)

    def lift_(self, covariance: Tensor, which: Tensor | bool = True) -> Tensor:
        """Lift some covariances on the diagonal, in place, by a small fraction of their mean variance."""
        return self.add_to_diagonal_(covariance, LIFT * self.mean_diagonal(covariance) * which)
