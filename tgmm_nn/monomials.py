"""What E-steps and densities form of rows: which of them can be used, and what products of moments are taken of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tgmm_nn.structure import Covariance, writes_into_parts

__all__ = ["Monomials", "masked", "row_lengths"]

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def row_lengths(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the length of each centred row, and whether it is finite and its square does not overflow a dtype."""
    rows = rows.detach()
    # A norm takes ten times as long where a row's numbers do not lie side by side.
    length = torch.linalg.vector_norm(rows, dim=-1) if rows.stride(-1) == 1 else rows.square().sum(-1).sqrt()
    return length, length < 0.99 * torch.finfo(dtype).max ** 0.5  # the norm is rounded, and so is a sum of squares


def masked(rows: Tensor, usable: Tensor) -> Tensor:
    """Return rows with those that are not usable replaced by zero."""
    # A choice with a condition for each row takes five times as long.
    return rows.nan_to_num(0.0, 0.0, 0.0) * usable[:, None]


class Monomials:
    r"""Gives :math:`[1; x; [x x^\top]]` of each row x of a chunk, in memory that all chunks of one size share.

    Rows are about a reference point, and those that cannot be used are zero. A tied structure has no products of
    features: what components have in common tells none apart. Memory and its views are made once, since views of many
    features take half as long as what is written into them.

    Args:
        covariance: Structure whose `Covariance.features` are taken.
        origin: Reference point, shape ``(d,)``, in the dtype of the monomials.
        once: Whether there is one chunk of few rows only, for which fewer operations are faster than shared memory.

    Example:
        >>> from tgmm_nn.covariance import Diagonal
        >>> monomials, usable = Monomials(Diagonal(), torch.zeros(2))(torch.tensor([[2.0, 3.0], [torch.nan, 1.0]]))
        >>> monomials.mT
        tensor([[1., 2., 3., 4., 9.],
                [1., 0., 0., 0., 0.]])
        >>> usable
        tensor([ True, False])
    """

    def __init__(self, covariance: Covariance, origin: Tensor, *, once: bool = False) -> None:
        self._covariance, self._origin, self._once = covariance, origin, once
        # The memory, the part of it that holds x, and what writes the features of that into the rest.
        self._parts: tuple[Tensor, Tensor, Callable[[], object] | None] | None = None

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return them for rows ``(n, d)``, shape ``(1 + d + F, n)``, valid until the next call; and which are usable.

        Those are finite, and their squared distance from the reference point is in the range of their dtype.
        """
        covariance, origin = self._covariance, self._origin
        if self._once or not writes_into_parts():
            away = (rows - origin).to(origin.dtype)
            _, usable = row_lengths(away, rows.dtype)
            away = masked(away, usable)
            products = [] if covariance.tied else [covariance.features(away.mT)]
            return torch.cat([away.new_ones(1, len(away)), away.mT, *products]), usable
        if self._parts is None or self._parts[0].shape[1] != len(rows):
            space = covariance.space(len(rows), rows.shape[1], origin)
            ones, columns, features = space.tensor_split([1, 1 + rows.shape[-1]])
            ones.fill_(1.0)
            self._parts = space, columns, None if covariance.tied else covariance.writer(columns, features)
        space, columns, write = self._parts
        torch.sub(rows, origin, out=columns.mT)
        _, usable = row_lengths(columns.mT, rows.dtype)
        # Bit by bit, since nan times zero is none: half the time of replacing what is not finite, and a product.
        bits = BITS[columns.dtype]
        columns.view(bits).bitwise_and_(usable.to(bits).neg_())
        if write is not None:
            write()
        return space, usable
