"""A tiny LightningModule with a mixture inside, and a trainer that writes nothing."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tgmm_nn import GaussianMixture

# Hints of Lightning that do not apply to runs this small.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec.",
        ".*Trainer already configured with model summary",
        ".*GPU available but not used",
        "You defined a `validation_step` but have no `val_dataloader`",
        "This process .* is multi-threaded:DeprecationWarning",
    )
]


class Toy(lightning.LightningModule):
    """Linear encoder of 3 features to 2, trained by regression; the mixture may take part in the loss."""

    def __init__(self, covariance_type="full", *, density_weight=0.0, learning_rate=0.01, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.encoder, self.idle = nn.Linear(3, 2), nn.Identity()
        with torch.no_grad():
            self.encoder.weight.copy_(torch.randn(2, 3, generator=generator))
            self.encoder.bias.zero_()
        self.gmm = GaussianMixture(3, 2, covariance_type, random_state=0, **{"reg_covar": 0.1, **options})
        self.density_weight, self.learning_rate = density_weight, learning_rate
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        z = self.encoder(batch[0])
        self.seen.append(z.detach().clone())
        loss = (z - 1).square().mean() - self.density_weight * self.gmm(z).mean()
        return {"loss": loss, "z": z}

    def predict_step(self, batch, batch_idx):
        return self.gmm(self.encoder(batch[0]))

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.predict_step(batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.encoder.parameters(), lr=self.learning_rate)


def rows(n=44, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(3, 3, generator=generator)
    return centres[torch.arange(n) % 3] + torch.randn(n, 3, generator=generator)


def loader(x=None, batch_size=10, **options):
    return DataLoader(TensorDataset(rows() if x is None else x), batch_size=batch_size, **options)


def trainer(*callbacks, max_epochs=2, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(
        max_epochs=max_epochs, accelerator="cpu", callbacks=list(callbacks), **{"devices": 1, **quiet, **options}
    )


def state(gmm):
    """Copy every buffer."""
    return {name: buffer.clone() for name, buffer in gmm.named_buffers()}
