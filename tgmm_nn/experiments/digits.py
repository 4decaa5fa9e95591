"""scikit-learn's digits, 1797 images of 8 × 8 pixels, shipped in its wheel: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tgmm_nn.checks import check_integer

__all__ = ["DigitsDataModule", "NeighbourPairs"]


class NeighbourPairs(Dataset[dict[str, Tensor]]):
    """Rows, each with one of its nearest neighbours, drawn anew each time: a contrastive loss's positives.

    Args:
        x: Rows, shape ``(N, d)``.
        y: Labels, for scoring only, shape ``(N,)``.
        n_neighbors: Number of neighbours to draw from.
    """

    def __init__(self, x: Tensor, y: Tensor, n_neighbors: int) -> None:
        self.x, self.y = x, y
        index = NearestNeighbors(n_neighbors=n_neighbors).fit(x.numpy())
        self.neighbours = torch.from_numpy(index.kneighbors(return_distance=False))  # of no query: a row is not its own

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch: ``x`` and ``neighbour``, both ``(B, d)``, and ``y``, ``(B,)``."""
        rows = torch.as_tensor(indices)
        draw = torch.randint(self.neighbours.shape[1], rows.shape)
        return {"x": self.x[rows], "neighbour": self.x[self.neighbours[rows, draw]], "y": self.y[rows]}


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
        digits = load_digits()
        self.x = torch.from_numpy(digits.data).float() / 16
        self.y = torch.from_numpy(digits.target).long()

    def setup(self, stage: str) -> None:
        """Find the neighbours."""
        if stage == "fit":
            self.pairs = NeighbourPairs(self.x, self.y, self.n_neighbors)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return shuffled batches of rows and neighbours."""
        return DataLoader(
            self.pairs,
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_already_a_batch,
        )


def _already_a_batch(batch: Any) -> Any:
    return batch
