"""Rows of arrays, in memory or in files, that are checked once, and scaled batch by batch as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgmm_nn.checks import check_choice, check_number

__all__ = ["Scaling", "Summary", "Table", "scaling_of"]

# Numbers that are widened at once.
CHUNK = 2**22
# Squares of larger numbers leave float32.
LARGEST = 1e18


class Scaling(NamedTuple):
    """The map from the rows of a file to those that a network sees, :math:`(x - o) f`.

    ``offset`` o and ``factor`` f are float64, of shape ``(d,)`` or ``()``.
    """

    offset: Tensor = torch.zeros((), dtype=torch.float64)
    factor: Tensor = torch.ones((), dtype=torch.float64)

    def __call__(self, rows: NDArray[np.float64]) -> Tensor:
        """Return scaled rows ``(n, d)`` in float32."""
        return ((torch.from_numpy(rows) - self.offset) * self.factor).float()


class Summary(NamedTuple):
    """Mean and standard deviation of each feature, ``(d,)`` in float64, and the largest absolute value."""

    mean: Tensor
    deviation: Tensor
    largest: float


class Table:
    """Rows ``(N, d)`` of one or several arrays ``(n, ...)``, read and scaled where they are indexed.

    Args:
        parts: Arrays of numbers that agree but for their first axis; mapped files stay files.
        source: What errors call the rows.
        scaling: Map from the arrays' rows to those that are given; None leaves them as they are.

    Example:
        >>> table = Table([np.arange(6).reshape(3, 2), np.ones((1, 2))], "two arrays")
        >>> len(table), table.n_features, table[torch.tensor([3, 1])]
        (4, 2, tensor([[1., 1.],
                [2., 3.]]))
    """

    def __init__(self, parts: Sequence[NDArray[Any]], source: str, scaling: Scaling | None = None) -> None:
        self.parts, self.source, self.scaling = list(parts), source, scaling or Scaling()
        self.n_features = int(np.prod(parts[0].shape[1:]))
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return rows by their places, or a slice of them: scaled, shape ``(n, d)``, float32."""
        places = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index.numpy()
        return self.scaling(self._read(places))

    def summary(self) -> Summary:
        """Return mean, spread and range of the rows before they are scaled, in one pass.

        Raises:
            ValueError: If a row is not finite.
        """
        first = self._read(np.zeros(1, dtype=np.int64))
        sums, squares, largest = np.zeros(self.n_features), np.zeros(self.n_features), 0.0
        bad: list[int] = []
        size = max(1, CHUNK // self.n_features)
        with np.errstate(over="ignore", invalid="ignore"):  # told by what comes out
            for start in range(0, len(self), size):
                rows = self._read(np.arange(start, min(start + size, len(self))))
                bad += (start + np.flatnonzero(~np.isfinite(rows).all(-1))).tolist()
                away = rows - first  # sums about zero would lose the spread of rows far from it
                sums, squares = sums + away.sum(0), squares + np.square(away).sum(0)
                largest = max(largest, float(np.abs(rows).max()))
            if bad:
                raise ValueError(
                    f"Expected `x` of {self.source} to be finite, but {len(bad)} of {len(self)} rows hold nan or "
                    f"infinity, the first is row {self.name_of(bad[0])}; drop or impute them."
                )
            mean = sums / len(self)
            variance = np.maximum(squares / len(self) - np.square(mean), 0.0)
        return Summary(torch.from_numpy(first[0] + mean), torch.from_numpy(np.sqrt(variance)), largest)

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Give all rows in their order, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def name_of(self, place: int) -> str:
        """Return what an error calls a row: its place, in its own file where there are several."""
        number = int(np.searchsorted(self._ends, place, side="right"))
        part = self.parts[number]
        file = getattr(part, "filename", None)
        return str(place) if file is None else f"{place - (self._ends[number] - len(part))} of {Path(file).name}"

    def _read(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = np.empty((len(places), self.n_features))
        part_of = np.searchsorted(self._ends, places, side="right")
        for number in np.unique(part_of):
            here = part_of == number
            part = self.parts[number]
            found = part[places[here] - (self._ends[number] - len(part))]
            rows[here] = found.reshape(len(found), self.n_features)
        return rows


def scaling_of(scale: str | float | None, table: Table, *, are_images: bool) -> Scaling:
    """Return the map that ``scale`` asks for, after a pass over the rows.

    Args:
        scale: ``"standardize"`` gives each feature mean 0 and variance 1 (a constant one is 0); a number divides all;
            None leaves them as they are; ``"auto"`` divides images by their largest absolute value, which takes pixels
            to [0, 1], and standardizes other rows, so that no feature counts more for its unit.
        table: The rows.
        are_images: Whether they are images.

    Raises:
        TypeError: If ``scale`` is none of these.
        ValueError: If ``scale`` is none of these, a row is not finite, or scaled rows leave float32.

    Example:
        >>> table = Table([np.array([[0, 7], [200, 7]])], "an array")
        >>> scaling_of("standardize", table, are_images=False)(np.array([[200.0, 7.0]]))
        tensor([[1., 0.]])
        >>> scaling_of("auto", table, are_images=True)(np.array([[100.0, 50.0]]))
        tensor([[0.5000, 0.2500]])
    """
    if isinstance(scale, str):
        check_choice("scale", scale, ("auto", "standardize"))
    elif scale is not None:
        check_number("scale", scale, strict=True)
    found = table.summary()
    if scale == "standardize" or (scale == "auto" and not are_images):
        scaling = Scaling(found.mean, torch.where(found.deviation > 0, 1.0 / found.deviation, 1.0))
        largest = found.largest if bool(torch.isfinite(found.deviation).all()) else torch.inf
        fits = largest < 1e150  # what was squared here
    else:
        divisor = found.largest or 1.0 if scale == "auto" else scale or 1.0
        scaling = Scaling(factor=torch.tensor(1.0 / float(divisor), dtype=torch.float64))
        fits = found.largest / float(divisor) < LARGEST
    if not fits:
        raise ValueError(
            f"Expected `x` of {table.source} in the range of float32, but its largest value is {found.largest:.3g}; "
            "rescale it, or set data.scale=standardize."
        )
    return scaling
