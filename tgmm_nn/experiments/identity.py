"""Clustering of embeddings that are given: EM alone, and no network."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from torch import Tensor, nn

from tgmm_nn.experiments.networks import as_input, check_kind
from tgmm_nn.experiments.reports import Row, clustering_report
from tgmm_nn.experiments.rows import RowsDataModule, check_components
from tgmm_nn.mixture import GaussianMixture

__all__ = ["EmbeddingClustering"]


class EmbeddingClustering(lightning.LightningModule):
    """Show a mixture the rows of each batch as they are; `EMCallback` does the rest, in any of its modes.

    Nothing is learned by gradient. Lightning counts the steps of an optimizer, which checkpoints, loggers and EM go by,
    and several processes need a parameter to share: the one here has no part in anything, and is left as it is.

    Args:
        gmm: Mixture of as many features as the rows have.
    """

    def __init__(self, gmm: GaussianMixture) -> None:
        super().__init__()
        check_kind("gmm", gmm, GaussianMixture, "default")
        self.automatic_optimization = False
        self.gmm, self.latent, self.idle = gmm, nn.Identity(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows themselves, shape ``(B, d)``."""
        rows: Tensor = self.latent(x)
        return rows

    def on_fit_start(self) -> None:
        """Raise if the data have fewer rows than the mixture has components, before any time is spent."""
        check_components(self.gmm, getattr(self.trainer, "datamodule", None))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Pass a batch by the mixture, and count a step."""
        self(batch["x"])
        self.optimizers().step()  # type: ignore[union-attr]  # there is one

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the rows of a batch."""
        return self(batch["x"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that moves nothing."""
        return torch.optim.SGD([self.idle], lr=0.0)

    @torch.no_grad()
    def report(self, data: RowsDataModule, folder: Path, seed: int) -> list[Row]:
        """Score the mixture beside k-means, and draw what it found."""
        x, y = data.sample()
        z = as_input(self, x)
        return clustering_report(self.gmm, z, z, y, data.image_shape, folder, seed)
