"""Density heads on a classifier: which inputs it does not know, and mixtures in place of a softmax layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgmm_nn.checks import check_number
from tgmm_nn.classifier import MixtureClassifier
from tgmm_nn.experiments.drawing import (
    draw_components,
    draw_contingency,
    draw_density,
    draw_latent,
    draw_samples,
    mean_images,
)
from tgmm_nn.experiments.networks import as_input, check_kind, check_network
from tgmm_nn.experiments.reports import Row, if_started
from tgmm_nn.experiments.rows import RowsDataModule
from tgmm_nn.metrics import Contingency, detection_scores
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.outliers import OutlierScore
from tgmm_nn.plotting import plot_contingency, plot_scores, save

FIRST, SINGLE = "log-density, a Gaussian for each class", "one Gaussian on the features"

__all__ = ["GenerativeClassifier", "OutlierDetection", "energy", "softmax_score"]


def softmax_score(logits: Tensor) -> Tensor:
    """Return minus the largest softmax probability of logits ``(..., C)``, shape ``(...)``: large where it is unsure.

    References:
        Hendrycks and Gimpel, A baseline for detecting misclassified and out-of-distribution examples in neural
        networks, 2017.
    """
    return -logits.softmax(-1).amax(-1)


def energy(logits: Tensor) -> Tensor:
    """Return minus the log of the summed exponentials of logits ``(..., C)``, shape ``(...)``.

    References:
        Liu, Wang, Owens and Li, Energy-based out-of-distribution detection, 2020.
    """
    return -logits.logsumexp(-1)


def _accuracy(predicted: Tensor, y: Tensor) -> float:
    return float((predicted == y).float().mean())


def _detection(method: str, inside: Tensor, outside: Tensor, accuracy: float | str = "") -> Row:
    """Return a row of a table: how scores of known rows and of others differ, and the accuracy where there is one."""
    return {"method": method, **detection_scores(inside, outside), "accuracy": accuracy}


class _DensityHead(lightning.LightningModule):
    """An encoder and a classifier by densities of its features, learned by Adam."""

    def __init__(
        self, encoder: nn.Module, density: MixtureClassifier, learning_rate: float, weight_decay: float
    ) -> None:
        super().__init__()
        check_number("learning_rate", learning_rate, strict=True)
        check_number("weight_decay", weight_decay)
        check_kind("density", density, MixtureClassifier, "classifier")
        self.encoder, self.density = encoder, density
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def on_fit_start(self) -> None:
        """Raise if no row is held out to be scored on, or widths do not fit, before any time is spent."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RowsDataModule):
            return
        check_network(self, "encoder", data.n_features, self.density.n_features)
        if not len(data.test):
            raise ValueError(
                f"Expected `test_size`, the share of {data.rows.source} to hold out and score on, but got None; set "
                "data.test_size=0.3."
            )

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the features of a batch."""
        features: Tensor = self.encoder(batch["x"])
        return features

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)


class OutlierDetection(_DensityHead):
    """Classify rows, and tell by a density of the features which rows are of no known class.

    The features are learned by cross-entropy and reconstruction: what a classifier alone keeps says little of rows that
    it was not made for. The density is a Gaussian for each class, which `EMCallback` learns while the network trains.

    Args:
        encoder: Network to features.
        decoder: Network from features back to pixels.
        density: Classifier of the features, which holds the densities.
        reconstruction: Weight of the squared error, summed over pixels.
        learning_rate: Of Adam.
        weight_decay: Of Adam.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        density: MixtureClassifier,
        *,
        reconstruction: float = 1.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        check_number("reconstruction", reconstruction)
        super().__init__(encoder, density, learning_rate, weight_decay)
        self.decoder, self.reconstruction = decoder, reconstruction
        self.head = nn.Linear(density.n_features, density.n_classes)

    def on_fit_start(self) -> None:
        """Raise if there is nothing to be told apart, before any time is spent."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RowsDataModule):
            return
        check_network(self, "decoder", self.density.n_features, data.n_features)
        if not len(data.unknown):
            raise ValueError(
                f"Expected `n_classes` below the classes of {data.rows.source}, so that rows of the others can "
                f"be told apart, but got {data.n_classes}; set data.n_classes."
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return cross-entropy and reconstruction."""
        z = self.encoder(batch["x"])
        error = (self.decoder(z) - batch["x"]).square().sum(-1).mean()
        loss = F.cross_entropy(self.head(z), batch["y"]) + self.reconstruction * error
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True, batch_size=len(z))
        return loss

    @torch.no_grad()
    def report(self, data: RowsDataModule, folder: Path, seed: int) -> list[Row]:
        """Score held-out rows of known classes against the others, beside the baselines, and draw the scores."""
        self.eval()
        pixels = [as_input(self, part) for part in (data.x, data.x_test, data.x_unknown)]
        features = [self.encoder(part) for part in pixels]
        y_test = data.y_test.to(self.device)
        score = OutlierScore(self.density).calibrate(features[1])
        self._draw(score, features[1], features[2], data, folder, seed)
        return [
            *(if_started(self.density.mixture, row) for row in self._by_density(features, y_test)),
            *self._by_logits(features, y_test),
            *self._baselines(features, pixels, data.y, y_test, seed),
        ]

    def _by_density(self, features: list[Tensor], y: Tensor) -> list[Row]:
        """Return a row for each score of the density: features of training, known and other rows, known classes."""
        _, test, unknown = features
        right = _accuracy(self.density.predict(test), y)
        plain = OutlierScore(self.density)
        rows = [_detection(FIRST, plain(test), plain(unknown), right)]
        for name in ("mahalanobis", "relative_mahalanobis"):
            score = OutlierScore(self.density, name)
            rows.append(_detection(name.replace("_", " "), score(test), score(unknown)))
        return rows

    def _by_logits(self, features: list[Tensor], y: Tensor) -> list[Row]:
        """Return a row for each score of the softmax layer."""
        test, unknown = (self.head(part) for part in features[1:])
        right = _accuracy(test.argmax(-1), y)
        scores = {"maximum softmax probability": softmax_score, "energy of the logits": energy}
        return [_detection(name, score(test), score(unknown), right) for name, score in scores.items()]

    def _baselines(
        self, features: list[Tensor], pixels: list[Tensor], y_train: Tensor | None, y: Tensor, seed: int
    ) -> list[Row]:
        """Return a row for each density that is fitted to the end's features, without labels, or to pixels."""
        n_classes, (train, test, unknown) = self.density.n_classes, features
        how: dict[str, Any] = {"reg_covar": 1e-2, "random_state": seed, "max_iter": 300}
        rows = []
        for name, k in ((f"log-density, {3 * n_classes} components without labels", 3 * n_classes), (SINGLE, 1)):
            gmm = GaussianMixture(k, train.shape[1], **how).fit(train, sync=False)  # each rank has all rows
            rows.append(_detection(name, -gmm(test), -gmm(unknown)))
        raw = MixtureClassifier(n_classes, pixels[0].shape[1], **how).fit(pixels[0], y_train, sync=False)
        score, right = OutlierScore(raw), _accuracy(raw.predict(pixels[1]), y)
        return [*rows, _detection("a Gaussian for each class on pixels", score(pixels[1]), score(pixels[2]), right)]

    def _draw(
        self,
        score: OutlierScore,
        test: Tensor,
        unknown: Tensor,
        data: RowsDataModule,
        folder: Path,
        seed: int,
    ) -> None:
        """Draw scores, the features of known and other classes, and what the decoder makes of the densities."""
        gmm, other = self.density.mixture, torch.full((len(unknown),), self.density.n_classes)
        groups = {"known classes, held out": score(test), "other classes": score(unknown)}
        title = "Outlier scores: how unlikely the features are"
        scores = plot_scores(groups, threshold=float(score.threshold), xlabel="−log p(x), nats", title=title)
        save(scores, folder / "outliers.png")
        n_classes = self.density.n_classes
        names = {**{c: f"class {c}" for c in range(n_classes)}, n_classes: "other classes"}
        z = torch.cat([test, unknown])
        draw_latent(gmm, z, torch.cat([data.y_test, other]), folder, names)
        draw_density(gmm, z, folder, score)
        draw_components(gmm, self.decoder(gmm.means_), data.image_shape, folder, "Decoded mean")
        draw_samples(gmm, z, folder, seed, data.image_shape, self.decoder)
        draw_contingency(gmm.predict(test).cpu(), data.y_test, gmm.n_components, folder)


class GenerativeClassifier(_DensityHead):
    """Classify by the densities of a mixture for each class, with no linear layer: parity, and a density for free.

    The encoder learns by cross-entropy of log p(x, c), through the mixtures, which `EMCallback` learns by EM on the
    detached features. Beside it a copy of the encoder with a softmax layer learns from the same batches.

    Args:
        encoder: Network to features.
        density: Mixtures of the features.
        learning_rate: Of Adam.
        weight_decay: Of Adam.
    """

    def __init__(
        self,
        encoder: nn.Module,
        density: MixtureClassifier,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(encoder, density, learning_rate, weight_decay)
        norm = nn.LayerNorm(density.n_features, elementwise_affine=False)
        self.encoder = nn.Sequential(encoder, norm)
        self.softmax = nn.Sequential(copy.deepcopy(self.encoder), nn.Linear(density.n_features, density.n_classes))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of both classifiers, which share no parameter."""
        loss = F.cross_entropy(self.density(self.encoder(batch["x"])), batch["y"])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True, batch_size=len(batch["x"]))
        return loss + F.cross_entropy(self.softmax(batch["x"]), batch["y"])

    @torch.no_grad()
    def report(self, data: RowsDataModule, folder: Path, seed: int) -> list[Row]:
        """Compare the two on held-out rows, and draw features and confusions."""
        self.eval()
        x, y = as_input(self, data.x_test), data.y_test.to(self.device)
        z = self.encoder(x)
        logits = {"mixture for each class": self.density(z), "softmax layer": self.softmax(x)}
        self._draw(z, data, folder, seed)
        rows: list[Row] = [
            {
                "method": name,
                "accuracy": float((values.argmax(-1) == y).float().mean()),
                "cross-entropy": float(F.cross_entropy(values, y)),
                "log p(x)": float(self.density.log_density(z).mean()) if "mixture" in name else "",
            }
            for name, values in logits.items()
        ]
        return [if_started(self.density.mixture, rows[0]), *rows[1:]]

    def _draw(self, z: Tensor, data: RowsDataModule, folder: Path, seed: int) -> None:
        """Draw held-out features, which classes are taken for which, and an image of each component."""
        gmm, y = self.density.mixture, data.y_test
        predicted = self.density.predict(z).cpu()
        confusion = Contingency(self.density.n_classes, self.density.n_classes)(predicted, y)
        title = f"Held-out rows, {int((predicted == y).sum())} of {len(y)} right"
        ax = plot_contingency(confusion, ylabel="predicted class", xlabel="true class", title=title)
        save(ax, folder / "classes.png")
        draw_latent(gmm, z, y, folder)
        draw_density(gmm, z, folder)
        draw_contingency(gmm.predict(z).cpu(), y, gmm.n_components, folder)
        images = mean_images(gmm.predict_proba(z), data.x_test)
        draw_components(gmm, images, data.image_shape, folder, "Mean held-out image")
        draw_samples(gmm, z, folder, seed)
