"""Cluster a latent space while an autoencoder learns it, by a Lightning callback: handwritten digits, without labels.

python examples/latent_clustering.py
"""

import logging
import warnings

import lightning
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tgmm_nn import GaussianMixture
from tgmm_nn.lightning import ClusterMetricsCallback, EMCallback
from tgmm_nn.metrics import MatchedAccuracy

warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|Sparse invariant|logging interval)")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
NAMES = "em/log_likelihood", "em/effective_components", "train/accuracy"


class Autoencoder(lightning.LightningModule):
    """Learns to reconstruct; knows nothing of EM but that it owns a mixture."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.decoder = nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 64))
        self.gmm = GaussianMixture(10, 10, n_init=5, reg_covar=0.05, reg_covar_relative=True)

    def training_step(self, batch, batch_idx):
        """Return the squared error of a reconstruction."""
        x, _ = batch
        return (self.decoder(self.encoder(x)) - x).square().sum(-1).mean()

    def on_train_epoch_end(self):
        """Print, in every fifth epoch, what the callbacks have logged."""
        if (self.current_epoch + 1) % 5 == 0:
            logged = [float(self.trainer.callback_metrics[name]) for name in NAMES]
            print("{:5d} {:15.2f} {:21.2f} {:9.3f}".format(self.current_epoch + 1, *logged))

    def configure_optimizers(self):
        """Adam on what has gradients: the mixture is buffers, and has none."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


lightning.seed_everything(0, verbose=False)
digits = load_digits()
x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
callbacks = [
    # EM: in the second half of training, three iterations on the embeddings of an epoch, just before the epoch ends.
    EMCallback(module="gmm", embeddings="encoder", mode="full", n_iterations=3, start_epoch=0.5),
    # Scores of what EM found; only these read the labels, element 1 of a batch.
    ClusterMetricsCallback(module="gmm", embeddings="encoder", targets=1, n_classes=10, stage="train", prefix="train"),
]
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
print("epoch  log-likelihood  effective components  accuracy")
model = Autoencoder()
lightning.Trainer(max_epochs=40, callbacks=callbacks, accelerator="cpu", **quiet).fit(
    model, DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
)
clusters = KMeans(10, n_init=10, random_state=0).fit_predict(x)
print(f"k-means on pixels: {MatchedAccuracy(10, 10)(torch.from_numpy(clusters), y):.3f}")
