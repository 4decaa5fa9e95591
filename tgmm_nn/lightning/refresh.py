"""Encode the training rows anew, with the network as it is at an epoch's end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import lightning
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from tgmm_nn.data import untouched_generators
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.sources import Embeddings

__all__ = ["check_predict_step", "encode_again"]


def check_predict_step(pl_module: lightning.LightningModule) -> None:
    """Raise unless the module has a ``predict_step`` of its own: Lightning's hands a whole batch to ``forward``."""
    if not is_overridden("predict_step", pl_module):
        raise TypeError(
            f"Expected {type(pl_module).__name__} to have a `predict_step` that encodes a training batch, for "
            "refresh=True; write one, or set refresh=False."
        )


@torch.no_grad()
def encode_again(trainer: lightning.Trainer, pl_module: lightning.LightningModule, source: Embeddings) -> Batch:
    """Return the rows of an epoch's batches, passed by ``predict_step`` in evaluation mode.

    To be called at an epoch's last batch only: a loader with persistent workers has one iterator, and starting it over
    in mid-epoch would cut the epoch short. No global generator is advanced, so that training goes on as it would have.

    Args:
        trainer: The trainer; it gives the loader, of which as many batches are taken as training took.
        pl_module: The module, whose ``predict_step`` is called with each batch.
        source: Listens to what passes.

    Raises:
        TypeError: If there is more than one training loader.
        RuntimeError: If nothing passes.
    """
    loader = trainer.train_dataloader
    if isinstance(loader, (dict, list, tuple)) or loader is None:
        raise TypeError(f"Expected one training loader with refresh=True, but got {type(loader).__name__}.")
    parts: list[Batch] = []
    limit = trainer.num_training_batches
    with (
        untouched_generators(loader),
        evaluation(pl_module),
        source.alone(),
        trainer.precision_plugin.forward_context(),
    ):
        for number, batch in enumerate(islice(loader, None if limit == float("inf") else int(limit))):
            placed = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            outputs = pl_module.predict_step(placed, number)
            source.receive(outputs, placed, "predict_step")
            seen = source.take(number)
            if seen is None:
                raise RuntimeError(
                    f"Expected `predict_step` to pass a training batch by embeddings={source.source!r}, for "
                    "refresh=True, but nothing arrived; override predict_step, or set refresh=False."
                )
            parts.append(seen)
    return Batch.joined(parts)


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Put a module and its parts into evaluation mode, and each back into its own."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
