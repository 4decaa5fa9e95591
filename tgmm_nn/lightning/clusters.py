"""`ClusterMetricsCallback`: how well a mixture fits the embeddings of a stage, and their labels."""

from __future__ import annotations

from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.clustering import AdjustedRandScore, NormalizedMutualInfoScore

from tgmm_nn import checks
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.sources import STEPS, Embeddings, find_mixture
from tgmm_nn.metrics import (
    BIC,
    EffectiveComponents,
    MatchedAccuracy,
    NegativeLogLikelihood,
    Purity,
    ResponsibilityCalibration,
)
from tgmm_nn.mixture import GaussianMixture

__all__ = ["ClusterMetricsCallback"]


class ClusterMetricsCallback(lightning.Callback):
    """Log how a mixture fits the embeddings of a stage, and how its components fit their labels.

    At the end of each of the stage's epochs, over all its batches, dataloaders and ranks, it logs under ``prefix`` the
    ``negative_log_likelihood`` in nats per row, ``bic`` and ``effective_components``; and where ``targets`` says where
    labels are, ``accuracy`` by optimal matching, ``purity``, ``calibration_error``, ``nmi`` and ``ari``. Each batch is
    scored by the mixture of that moment, also by one that has not started yet, so that no value is missing in the first
    epoch. The sanity check is not looked at. Rows whose log-density is not finite are left out, as in EM; an epoch
    without a row logs nan.

    Args:
        module: Name of the `GaussianMixture` in the LightningModule.
        embeddings: Dotted name of the submodule whose output, ``(..., d)``, is scored; or ``"outputs:<key>"`` for a key
            of what the stage's step returned.
        targets: Where the labels are, one integer for each row of embeddings: key, or place, in the batch, or
            ``"outputs:<key>"``. Rows with a negative label are unlabelled: they count for the density only. None logs
            what needs no labels.
        n_classes: Number of classes of the labels; goes with ``targets``.
        stage: Whose batches are scored: ``"train"``, ``"validate"`` or ``"test"``.
        output_key: As in `EMCallback`.
        channel_dim: As in `EMCallback`; labels of maps are ``(B, H, W)``.
        normalize: As in `EMCallback`.
        prefix: What the logged names start with.
        prog_bar: Whether the progress bar shows the accuracy or, without labels, the negative log-likelihood.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range or, when the stage runs, if a name does not exist or there is not one
            label for each row.
        RuntimeError: If a batch of the stage gives no embeddings.

    Example:
        >>> callback = ClusterMetricsCallback("gmm", "encoder", targets=1, n_classes=10)
        >>> callback.state_key
        "ClusterMetricsCallback{'module': 'gmm', 'embeddings': 'encoder', 'stage': 'validate', 'prefix': 'val'}"
    """

    def __init__(
        self,
        module: str = "gmm",
        embeddings: str = "encoder",
        *,
        targets: str | int | None = None,
        n_classes: int | None = None,
        stage: Literal["train", "validate", "test"] = "validate",
        output_key: str | int | None = None,
        channel_dim: int = -1,
        normalize: bool = False,
        prefix: str = "val",
        prog_bar: bool = False,
    ) -> None:
        for name, value in (("module", module), ("prefix", prefix)):
            checks.check_string(name, value)
        checks.check_bool("prog_bar", prog_bar)
        checks.check_integer("n_classes", n_classes, optional=True)
        _check_targets(targets, n_classes)
        self.module, self.targets, self.n_classes, self.stage = module, targets, n_classes, stage
        self.prefix, self.prog_bar = prefix, prog_bar
        self.source = Embeddings(embeddings, output_key, channel_dim, normalize, stage=stage, targets=targets)
        self._density = self._clustering = MetricCollection({})

    @property
    def state_key(self) -> str:
        """Name of this callback in a checkpoint; two callbacks that log different names have two."""
        return self._generate_state_key(
            module=self.module, embeddings=self.source.source, stage=self.stage, prefix=self.prefix
        )

    # ---------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raise if ``module`` or ``embeddings`` names nothing."""
        if stage in ("fit", self.stage):
            find_mixture(pl_module, self.module)
            self.source.check(pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start listening and counting, in the stage's epochs."""
        if trainer.state.stage != self.stage:
            return
        self._release()
        gmm = find_mixture(pl_module, self.module)
        self._make_metrics(gmm)
        # Each rank has seen integers of no row at least, so that all can be joined.
        self._score(gmm, *Batch.of(gmm.means_[:0]))
        self.source.attach(trainer, pl_module)

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Start here where training was resumed within an epoch: its start is not told of again."""
        if trainer.state.stage == self.stage and not self._density:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the rows of one of the stage's batches."""
        if trainer.state.stage != self.stage:
            return
        self.source.receive(outputs, batch)
        seen = self.source.take()
        if seen is None:
            raise RuntimeError(
                f"Expected embeddings={self.source.source!r} to give rows in every {STEPS[self.stage]}, but its "
                "forward was not called; name a submodule that the step calls."
            )
        self._score(find_mixture(pl_module, self.module), *seen)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log, and stop listening, in the stage's epochs."""
        if trainer.state.stage != self.stage:
            return
        density, clustering = self._density.compute(), self._clustering.compute()
        if clustering and bool(clustering[f"{self.prefix}/accuracy"].isnan()):  # nmi and ari of no row are 0 and 1
            clustering = dict.fromkeys(clustering, torch.nan)
        shown = f"{self.prefix}/{'accuracy' if clustering else 'negative_log_likelihood'}"
        for name, value in {**density, **clustering}.items():
            # Equal on all ranks already; without a reduction Lightning would warn.
            pl_module.log(name, value, prog_bar=self.prog_bar and name == shown, batch_size=1, sync_dist=True)
        self._release()

    # The stages are alike: of the three hooks that a method serves, only the chosen stage's goes past its first line.
    on_validation_epoch_start = on_test_epoch_start = on_train_epoch_start
    on_validation_batch_start = on_test_batch_start = on_train_batch_start
    on_validation_batch_end = on_test_batch_end = on_train_batch_end
    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening: after a failure or Ctrl-C no other hook is called."""
        self._release()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._release()

    # --------------------------------------------------------------------------------------------------- inside

    def _make_metrics(self, gmm: GaussianMixture) -> None:
        """Make an epoch's metrics: of all rows, and of those with a label."""
        k, c = gmm.n_components, self.n_classes
        density = _collect(
            self.prefix,
            negative_log_likelihood=NegativeLogLikelihood(),
            bic=BIC(gmm.n_parameters),
            effective_components=EffectiveComponents(k),
        )
        self._density = density.to(gmm.means_.device)
        if c is not None:
            clustering = _collect(
                self.prefix,
                accuracy=MatchedAccuracy(k, c),
                purity=Purity(k, c),
                calibration_error=ResponsibilityCalibration(k, c),
                nmi=NormalizedMutualInfoScore(),
                ari=AdjustedRandScore(),
            )
            self._clustering = clustering.to(gmm.means_.device)

    @torch.no_grad()
    def _score(self, gmm: GaussianMixture, rows: Tensor, labels: Tensor) -> None:
        """Add rows to the metrics; each takes what its ``update`` names."""
        log_density = gmm(rows)
        usable = torch.isfinite(log_density)
        r = gmm.predict_proba(rows[usable])
        self._density.update(log_density=log_density[usable], responsibilities=r)
        if self.n_classes is not None:
            target = labels[usable]
            known = target >= 0
            self._clustering.update(preds=r.argmax(-1)[known], responsibilities=r[known], target=target[known])

    def _release(self) -> None:
        self.source.detach()
        self._density = self._clustering = MetricCollection({})


def _collect(prefix: str, **metrics: Metric | MetricCollection) -> MetricCollection:
    """Return metrics that are computed together, under names with a prefix."""
    return MetricCollection(metrics, prefix=f"{prefix}/", compute_groups=False)


def _check_targets(targets: Any, n_classes: int | None) -> None:
    """Raise unless targets come with their number of classes."""
    if (targets is None) != (n_classes is None):
        raise ValueError(
            f"Expected `targets` and `n_classes` both or none, but got targets={targets!r} and n_classes={n_classes}."
        )
