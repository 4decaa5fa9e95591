"""scikit-learn's digits, 1797 images of 8 × 8 pixels, shipped in its wheel: nothing is downloaded."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from tgmm_nn.experiments.rows import RowsDataModule
from tgmm_nn.experiments.tables import Scaling, Table

__all__ = ["DigitsDataModule", "LabelledDigitsDataModule"]

IMAGE_SHAPE = (8, 8)
REMARK = "for rows of your own, set data=npz data.path=FILE.npz"


class DigitsDataModule(RowsDataModule):
    """Batches of digits, pixels in [0, 1], in shuffled order, the short last batch kept.

    Args:
        batch_size: Rows in a batch.
        n_neighbors: Neighbours in pixel space from which a row's positive is drawn.
        num_workers: Processes that load batches.

    Example:
        >>> DigitsDataModule().x.shape
        torch.Size([1797, 64])
    """

    remark = REMARK

    def __init__(self, batch_size: int = 256, n_neighbors: int = 5, num_workers: int = 0) -> None:
        super().__init__(
            *_digits(), IMAGE_SHAPE, batch_size=batch_size, n_neighbors=n_neighbors, num_workers=num_workers
        )


class LabelledDigitsDataModule(RowsDataModule):
    """Batches of the digits below ``n_classes`` with their labels, and held-out rows that training never sees.

    Args:
        batch_size: Rows in a batch; the short last one is kept.
        n_classes: Classes that are known; the digits from here on are none of them.
        test_size: Share of each known class that is held out.
        seed: Seed of the split.
        num_workers: Processes that load batches.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> data = LabelledDigitsDataModule(n_classes=5)
        >>> len(data.x), len(data.x_test), len(data.x_unknown)
        (630, 271, 896)
    """

    remark = REMARK

    def __init__(
        self, batch_size: int = 128, n_classes: int = 10, test_size: float = 0.3, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__(
            *_digits(),
            IMAGE_SHAPE,
            batch_size=batch_size,
            n_classes=n_classes,
            test_size=test_size,
            seed=seed,
            num_workers=num_workers,
        )


def _digits() -> tuple[Table, Tensor]:
    """Return all images as rows of pixels in [0, 1], and their digits."""
    digits = load_digits()
    scaling = Scaling(factor=torch.tensor(1 / 16, dtype=torch.float64))
    table = Table([digits.data], "scikit-learn's digits", scaling)
    return table, torch.from_numpy(digits.target).long()
