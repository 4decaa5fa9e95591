"""scikit-learn's digits, 1797 images of 8 × 8 pixels, shipped in its wheel: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tgmm_nn.checks import check_integer, check_number, check_share

__all__ = ["DigitsDataModule", "LabelledDigitsDataModule", "NeighbourPairs", "Rows"]


class Rows(Dataset[dict[str, Tensor]]):
    """Rows with their labels, a whole batch at a time.

    Args:
        x: Rows, shape ``(N, d)``.
        y: Labels, shape ``(N,)``.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch: ``x``, ``(B, d)``, and ``y``, ``(B,)``."""
        rows = torch.as_tensor(indices)
        return {"x": self.x[rows], "y": self.y[rows]}


class NeighbourPairs(Rows):
    """Rows, each with one of its nearest neighbours, drawn anew each time: a contrastive loss's positives.

    Args:
        x: Rows, shape ``(N, d)``.
        y: Labels, for scoring only, shape ``(N,)``.
        n_neighbors: Number of neighbours to draw from.
    """

    def __init__(self, x: Tensor, y: Tensor, n_neighbors: int) -> None:
        super().__init__(x, y)
        index = NearestNeighbors(n_neighbors=n_neighbors).fit(x.numpy())
        self.neighbours = torch.from_numpy(index.kneighbors(return_distance=False))  # of no query: a row is not its own

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch: ``x`` and ``neighbour``, both ``(B, d)``, and ``y``, ``(B,)``."""
        rows = torch.as_tensor(indices)
        draw = torch.randint(self.neighbours.shape[1], rows.shape)
        return {**super().__getitems__(indices), "neighbour": self.x[self.neighbours[rows, draw]]}


class DigitsDataModule(lightning.LightningDataModule):
    """Batches of digits, pixels in [0, 1], in shuffled order, the short last batch kept.

    Args:
        batch_size: Rows in a batch.
        n_neighbors: Neighbours in pixel space from which a row's positive is drawn.
        num_workers: Processes that load batches.

    Attributes:
        x: All images as rows, shape ``(1797, 64)``.
        y: Their digits, shape ``(1797,)``; for scoring only.
        image_shape: ``(8, 8)``.
    """

    image_shape = (8, 8)

    def __init__(self, batch_size: int = 256, n_neighbors: int = 5, num_workers: int = 0) -> None:
        super().__init__()
        check_integer("batch_size", batch_size)
        check_integer("n_neighbors", n_neighbors)
        check_integer("num_workers", num_workers, minimum=0)
        self.batch_size, self.n_neighbors, self.num_workers = batch_size, n_neighbors, num_workers
        self.x, self.y = _digits()

    def setup(self, stage: str) -> None:
        """Find the neighbours."""
        if stage == "fit":
            self.pairs = NeighbourPairs(self.x, self.y, self.n_neighbors)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return shuffled batches of rows and neighbours."""
        return _shuffled(self.pairs, self.batch_size, self.num_workers)


class LabelledDigitsDataModule(lightning.LightningDataModule):
    """Batches of the digits below ``n_classes`` with their labels, and held-out rows that training never sees.

    Args:
        batch_size: Rows in a batch; the short last one is kept.
        n_classes: Classes that are known; the digits from here on are none of them.
        test_size: Share of each known class that is held out.
        seed: Seed of the split.
        num_workers: Processes that load batches.

    Attributes:
        x: Training images as rows, shape ``(N, 64)``.
        y: Their digits, shape ``(N,)``.
        x_test: Held-out images of known classes.
        y_test: Their digits.
        x_unknown: Images of the other digits.
        image_shape: ``(8, 8)``.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> data = LabelledDigitsDataModule(n_classes=5)
        >>> len(data.x), len(data.x_test), len(data.x_unknown)
        (630, 271, 896)
    """

    image_shape = (8, 8)

    def __init__(
        self, batch_size: int = 128, n_classes: int = 10, test_size: float = 0.3, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size)
        check_integer("n_classes", n_classes, maximum=10)
        check_number("test_size", test_size)
        check_share("test_size", float(test_size))
        check_integer("seed", seed, minimum=0)
        check_integer("num_workers", num_workers, minimum=0)
        self.batch_size, self.n_classes, self.num_workers = batch_size, n_classes, num_workers
        x, y = _digits()
        known = y < n_classes
        train, test = train_test_split(
            known.nonzero()[:, 0].numpy(), test_size=test_size, stratify=y[known].numpy(), random_state=seed
        )
        self.x, self.y, self.x_test, self.y_test, self.x_unknown = x[train], y[train], x[test], y[test], x[~known]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return shuffled batches of training rows and their labels."""
        return _shuffled(Rows(self.x, self.y), self.batch_size, self.num_workers)


def _digits() -> tuple[Tensor, Tensor]:
    """Return all images as rows of pixels in [0, 1], and their digits."""
    digits = load_digits()
    return torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()


def _shuffled(rows: Rows, batch_size: int, num_workers: int) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(
        rows,
        batch_size=batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_already_a_batch,
    )


def _already_a_batch(batch: Any) -> Any:
    return batch
