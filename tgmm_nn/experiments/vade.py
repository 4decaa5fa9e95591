"""Variational deep embedding: an autoencoder whose latent space has a mixture as its prior."""

from __future__ import annotations

import math
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn

from tgmm_nn.checks import check_integer, check_number
from tgmm_nn.experiments.networks import as_input, check_kind, check_network
from tgmm_nn.experiments.reports import Row, clustering_report, clustering_scores, if_started
from tgmm_nn.experiments.rows import RowsDataModule, check_components
from tgmm_nn.mixture import GaussianMixture

__all__ = ["VariationalClustering", "evidence_lower_bound"]

LOG_2PI = math.log(2.0 * math.pi)


def evidence_lower_bound(
    x: Tensor, reconstruction: Tensor, noise: float, log_prior: Tensor, log_variance: Tensor
) -> Tensor:
    r"""Return a sample of the evidence lower bound of each row, in nats, shape ``(n,)``.

    .. math::
        \log N(x; \hat x(z), \sigma^2 I) + \log p(z) + H[q(z | x)], \qquad z \sim q(z | x) = N(\mu(x), v(x)),

    the entropy of q in closed form.

    Args:
        x: Rows, shape ``(n, d)``.
        reconstruction: Decoded z, shape ``(n, d)``.
        noise: σ.
        log_prior: log p(z) under the mixture, shape ``(n,)``.
        log_variance: log v(x), shape ``(n, latent)``.

    References:
        Kingma and Welling, Auto-encoding variational Bayes, 2014.
        Jiang, Zheng, Tan, Tang and Zhou, Variational deep embedding: an unsupervised and generative approach to
        clustering, 2017.
    """
    error = (x - reconstruction).square().sum(-1) / noise**2
    log_likelihood = -0.5 * (error + x.shape[-1] * (LOG_2PI + 2.0 * math.log(noise)))
    entropy = 0.5 * (log_variance + LOG_2PI + 1.0).sum(-1)
    return log_likelihood + log_prior + entropy


class VariationalClustering(lightning.LightningModule):
    """Pretrain an autoencoder, start a mixture on its codes, then climb the evidence lower bound with it as prior.

    The network learns by gradient, through the mixture's differentiable log-density; the mixture by `EMCallback`, on
    the means of the codes, which pass through ``latent``.

    Args:
        encoder: Network to the mean and the log-variance of a code, ``2 · n_features`` numbers.
        decoder: Network from a code to pixels.
        gmm: The prior.
        pretrain_epochs: Epochs of the plain autoencoder, before the mixture starts.
        noise: Standard deviation σ of pixels about their reconstruction.
        learning_rate: Of Adam.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        gmm: GaussianMixture,
        *,
        pretrain_epochs: int = 40,
        noise: float = 0.2,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        check_integer("pretrain_epochs", pretrain_epochs)
        check_number("noise", noise, strict=True)
        check_number("learning_rate", learning_rate, strict=True)
        check_kind("gmm", gmm, GaussianMixture, "default")
        self.encoder, self.decoder, self.gmm, self.latent = encoder, decoder, gmm, nn.Identity()
        self.pretrain_epochs, self.noise, self.learning_rate = pretrain_epochs, noise, learning_rate
        self.start: dict[str, float] = {}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the codes of rows."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.latent(mean), log_variance.clamp(-8.0, 4.0)

    def on_fit_start(self) -> None:
        """Raise if the data have fewer rows than the mixture has components, or widths do not fit."""
        data = getattr(self.trainer, "datamodule", None)
        check_components(self.gmm, data)
        if isinstance(data, RowsDataModule):
            check_network(self, "encoder", data.n_features, 2 * self.gmm.n_features)
            check_network(self, "decoder", self.gmm.n_features, data.n_features)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the error of reconstruction, and later minus the evidence lower bound."""
        x = batch["x"]
        mean, log_variance = self(x)
        if self.current_epoch < self.pretrain_epochs:
            loss = (self.decoder(mean) - x).square().sum(-1).mean() / (2 * self.noise**2)
        else:
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            bound = evidence_lower_bound(x, self.decoder(z), self.noise, self.gmm(z), log_variance)
            loss = -bound.mean()
            self.log("elbo", -loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True, batch_size=len(x))
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))
        return loss

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the means of the codes of a batch, which the mixture clusters."""
        mean: Tensor = self(batch["x"])[0]
        return mean

    def on_train_epoch_end(self) -> None:
        """Remember how the mixture does at its start."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and self.gmm.fitted_ and not self.start:
            self.start = self._scores(data)

    def get_extra_state(self) -> dict[str, float]:
        """Return what was remembered of the start: it is in the checkpoint, and comes back from a process of a fork."""
        return self.start

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Remember the start of the training that goes on."""
        self.start = dict(state)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    @torch.no_grad()
    def _scores(self, data: RowsDataModule) -> dict[str, float]:
        """Return how the mixture clusters the means of the codes, and the evidence lower bound with the codes drawn."""
        x, y = data.sample()
        x = as_input(self, x)
        mean, log_variance = self(x)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
        z = mean + (0.5 * log_variance).exp() * noise
        bound = evidence_lower_bound(x, self.decoder(z), self.noise, self.gmm(z), log_variance)
        return {
            **clustering_scores(self.gmm.predict(mean), y),
            "elbo": float(bound.mean()),
            "smallest weight": float(self.gmm.weights_.min()),
        }

    @torch.no_grad()
    def report(self, data: RowsDataModule, folder: Path, seed: int) -> list[Row]:
        """Compare the mixture with its start and with k-means, and draw what it found."""
        self.eval()
        ends: dict[str, dict[str, float]] = {
            "mixture at its end": self._scores(data),
            "mixture at its start": self.start,
        }
        x, y = data.sample()
        mean, _ = self(as_input(self, x))
        others = clustering_report(self.gmm, mean, x, y, data.image_shape, folder, seed, self.decoder)[1:]
        rows: list[Row] = [if_started(self.gmm, {"method": name, **scores}) for name, scores in ends.items() if scores]
        return rows + [{**row, "elbo": "", "smallest weight": ""} for row in others]
