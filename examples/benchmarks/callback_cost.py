"""Measure what share of training time `EMCallback` takes.

    python examples/benchmarks/callback_cost.py

Two cases. (1) An encoder of a ResNet-18's cost on images of 32 × 32, at batch size 256, with a diagonal mixture of 100
components in 128 dimensions, in every mode; wanted below 5 %. (2) The default experiment with ``mode=full`` and a full
mixture of 10 components in 64 dimensions; wanted below 20 %. The share is the time inside the callback's hooks, its
forward hook included, over the time of the epochs in which EM runs.
"""

import argparse
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path

import hydra
import lightning
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tgmm_nn import GaussianMixture
from tgmm_nn.experiments.reports import format_table
from tgmm_nn.lightning import EMCallback

ROOT = Path(__file__).parents[2]
HOOKS = ("on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end")


class Clock(lightning.Callback):
    """Time inside another callback, and of the epochs from ``first`` on."""

    def __init__(self, callback, first=0):
        self.first, self.counting, self.inside, self.total, self.updates = first, False, 0.0, 0.0, 0
        for name in HOOKS:
            setattr(callback, name, self.timed(getattr(callback, name)))
        callback.source._store = self.timed(callback.source._store)

    def timed(self, function):
        """Wrap a function so that its time is added up."""

        @wraps(function)
        def wrapped(*args, **options):
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.inside += (time.perf_counter() - start) * self.counting

        return wrapped

    def on_train_epoch_start(self, trainer, pl_module):
        """Start the clock, but not in the epochs before."""
        self.counting = trainer.current_epoch >= self.first
        self.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        """Stop it."""
        self.total += (time.perf_counter() - self.begun) * self.counting


class Block(nn.Module):
    """Residual block of two 3 × 3 convolutions."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        """Return the sum of both ways."""
        return (self.body(x) + self.short(x)).relu()


def resnet18(n_features):
    """Return ResNet-18 for images of 32 × 32 (He, Zhang, Ren and Sun, 2016): .56 GFLOP (multiply-adds) an image."""
    blocks = [
        Block(before, after, stride)
        for first, after, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        for before, stride in ((first, stride), (after, 1))
    ]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_features))


class Regression(lightning.LightningModule):
    """Train an encoder of images by any loss: its cost is what matters."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = resnet18(128), nn.Linear(128, 1)
        self.gmm = GaussianMixture(100, 128, "diag", random_state=0)

    def training_step(self, batch, batch_idx):
        """Return a loss."""
        return self.head(self.encoder(batch[0])).square().mean()

    def configure_optimizers(self):
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def quiet(callbacks, **options):
    """Return a trainer that writes nothing."""
    return lightning.Trainer(
        callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def resnet_case(steps, **options):
    """Return a row of the table for one mode: the second epoch, after a start in the first."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(256 * steps, 3, 32, 32)), batch_size=256)
    callback = EMCallback(**options)
    clock = Clock(callback, first=1)
    quiet([callback, clock], max_epochs=2).fit(Regression(), loader)
    return row(f"ResNet-18, batch 256, diag, D = 128, K = 100: {describe(options)}", clock, steps)


def digits_case(epochs, overrides, bare=False):
    """Return a row of the table for the default experiment: as ``train.py`` runs it, or without all other callbacks."""
    with tempfile.TemporaryDirectory() as folder:
        with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            fixed = [f"paths.output_dir={folder}", "gmm.n_features=64", "em.start_epoch=0"]
            quiet_too = ["trainer.enable_progress_bar=false", f"trainer.max_epochs={epochs}"]
            cfg = hydra.compose("train", [*fixed, *quiet_too, *overrides])
        torch.set_num_threads(cfg.num_threads)
        lightning.seed_everything(0, verbose=False)
        data, model, em, metrics, callbacks, logger = (
            hydra.utils.instantiate(node, _convert_="all")
            for node in (cfg.data, cfg.model, cfg.em, cfg.metrics, cfg.callbacks, cfg.logger)
        )
        clock = Clock(em, first=1)
        if bare:
            trainer = quiet([em, clock], max_epochs=epochs)
        else:
            others = {"callbacks": [em, metrics, *callbacks.values(), clock], "logger": list(logger.values())}
            trainer = hydra.utils.instantiate(cfg.trainer, _convert_="all", **others)
        trainer.fit(model, datamodule=data)
    described = ", ".join(text.removeprefix("em.") for text in overrides if "null" not in text)
    how = "the training loop alone" if bare else "as train.py runs it"
    return row(f"digits_contrastive, full, D = 64, K = 10, {how}: {described}", clock, 8 * (epochs - 1))


def describe(options):
    """Return options in a few words."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def row(case, clock, steps):
    """Return what was measured."""
    return {
        "case": case,
        "ms per step": 1e3 * clock.total / steps,
        "ms in the callback": 1e3 * clock.inside / steps,
        "share": f"{100 * clock.inside / clock.total:.2f} %",
    }


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch with the ResNet")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the default experiment")
    arguments = parser.parse_args()
    disable_possible_user_warnings()
    full = ["em.mode=full", "em.step_size=null"]
    rows = [
        resnet_case(arguments.steps, mode="minibatch"),
        resnet_case(arguments.steps, mode="minibatch", assignment="sinkhorn"),
        resnet_case(arguments.steps, mode="accumulate"),
        resnet_case(arguments.steps, mode="full", n_iterations=5),
        digits_case(arguments.epochs, full),
        digits_case(arguments.epochs, full, bare=True),
        digits_case(arguments.epochs, [*full, "em.n_iterations=5"]),
        digits_case(arguments.epochs, ["em.mode=minibatch"]),
    ]
    print(format_table(rows))


if __name__ == "__main__":
    sys.exit(main())
