"""Rows of a step, with their labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tgmm_nn.classifier import UNLABELLED

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Rows ``(n, d)`` and the label of each ``(n,)``, −1 where it has none."""

    rows: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Tensor, labels: Tensor | None = None) -> Batch:
        """Return rows with their labels, or without."""
        none = torch.full((len(rows),), UNLABELLED, dtype=torch.int64, device=rows.device)
        return cls(rows, none if labels is None else labels)

    @classmethod
    def joined(cls, parts: Iterable[Batch]) -> Batch:
        """Return several as one."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def where(self, kept: Tensor) -> Batch:
        """Return those for which ``kept``, booleans ``(n,)``, is true."""
        return Batch(self.rows[kept], self.labels[kept])

    def finite(self) -> Tensor:
        """Return which rows are finite, booleans ``(n,)``."""
        return torch.isfinite(self.rows).all(-1)
