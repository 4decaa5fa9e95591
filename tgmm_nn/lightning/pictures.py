"""`LatentPlotCallback`: the latent space and the mixture in it, as pictures while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.lightning.sources import Embeddings, find_mixture
from tgmm_nn.plotting import plot_latent, save

__all__ = ["LatentPlotCallback"]


class LatentPlotCallback(lightning.Callback):
    """Draw an epoch's embeddings in two dimensions with the components' 2-sd ellipses, every so often and at the end.

    Put it behind `EMCallback`, so that the picture shows the mixture after the epoch's last update. Rank zero draws
    its own rows. Files are ``latent_epoch_<epoch>.png``, coloured by the most probable component.

    Args:
        module: Name of the `GaussianMixture` in the LightningModule.
        embeddings: Dotted name of the submodule whose output is drawn, or ``"outputs:<key>"``.
        every_n_epochs: Epochs between pictures.
        max_rows: Most rows in a picture.
        output_key: As in `EMCallback`.
        channel_dim: As in `EMCallback`.
        normalize: As in `EMCallback`.
        folder: Where pictures go; None takes the trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        module: str = "gmm",
        embeddings: str = "encoder",
        *,
        every_n_epochs: int = 10,
        max_rows: int = 5000,
        output_key: str | int | None = None,
        channel_dim: int = -1,
        normalize: bool = False,
        folder: str | None = None,
    ) -> None:
        checks.check_string("module", module)
        if folder is not None:
            checks.check_string("folder", folder)
        checks.check_integer("every_n_epochs", every_n_epochs)
        checks.check_integer("max_rows", max_rows)
        self.module, self.source = module, Embeddings(embeddings, output_key, channel_dim, normalize)
        self.every_n_epochs, self.max_rows, self.folder = every_n_epochs, max_rows, folder
        self._rows: list[Tensor] = []

    @property
    def state_key(self) -> str:
        """Name of this callback in a checkpoint."""
        return self._generate_state_key(module=self.module, embeddings=self.source.source)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raise if ``module`` or ``embeddings`` names nothing."""
        if stage == "fit":
            find_mixture(pl_module, self.module)
            self.source.check(pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen in the epochs that are drawn."""
        self._release()
        if self._is_due(trainer) and trainer.is_global_zero:
            self.source.attach(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's rows, and draw at the epoch's last batch."""
        if not (self._is_due(trainer) and trainer.is_global_zero):
            return
        self.source.receive(outputs, batch)
        seen = self.source.take()
        missing = self.max_rows - sum(map(len, self._rows))
        if seen is not None and missing > 0:
            self._rows.append(seen.rows[:missing].float().cpu())
        if trainer.is_last_batch and self._rows:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop listening."""
        self._release()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening: after a failure or Ctrl-C no other hook is called."""
        self._release()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._release()

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.current_epoch % self.every_n_epochs == 0 or last

    def _draw(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        epoch = trainer.current_epoch
        gmm = find_mixture(pl_module, self.module)
        title = f"epoch {epoch}" if gmm.fitted_ else f"epoch {epoch}; mixture not started"
        ax = plot_latent(gmm, torch.cat(self._rows), title=title)
        save(ax, Path(self.folder or trainer.default_root_dir) / f"latent_epoch_{epoch:04d}.png")
        self._release()

    def _release(self) -> None:
        self.source.detach()
        self._rows = []
