"""Where the callback's rows come from: a forward hook on a submodule, or a key of what ``training_step`` returned."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tgmm_nn.mixture import GaussianMixture

__all__ = ["Embeddings", "find_mixture", "submodule"]

OUTPUTS = "outputs:"


def submodule(root: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the submodule with a dotted name, or raise an error that lists what exists."""
    modules = dict(root.named_modules())
    if name not in modules or not name:
        known = ", ".join(repr(key) for key in modules if key) or "none"
        raise ValueError(
            f"Expected `{argument}` to name a submodule of {type(root).__name__} ({known}), but got {name!r}."
        )
    return modules[name]


def find_mixture(root: nn.Module, name: str) -> GaussianMixture:
    """Return the mixture with a dotted name, or raise."""
    gmm = submodule(root, name, "module")
    if not isinstance(gmm, GaussianMixture):
        raise TypeError(f"Expected module={name!r} to be a GaussianMixture, but got {type(gmm).__name__}.")
    return gmm


class Embeddings:
    """Rows of the training batches since they were last taken, detached, as they pass through the network.

    Args:
        source: Dotted name of a submodule whose output is ``(..., d)``, or ``"outputs:<key>"``, a key of the
            dictionary that ``training_step`` returned.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._parts: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    @property
    def output_key(self) -> str | None:
        """Key of the training step's output, or None where a submodule is hooked."""
        return self.source.removeprefix(OUTPUTS) if self.source.startswith(OUTPUTS) else None

    def check(self, pl_module: lightning.LightningModule) -> None:
        """Raise unless the source names something that can exist."""
        if self.output_key is None:
            submodule(pl_module, self.source, "embeddings")
        elif not self.output_key:
            raise ValueError(f"Expected `embeddings` to be 'outputs:<key>', but got {self.source!r}.")

    def attach(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start listening. The hook only stores: an update here would fall between forward and backward."""
        if self.output_key is not None:
            return

        def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if trainer.training:
                self._store(output)

        self._handle = submodule(pl_module, self.source, "embeddings").register_forward_hook(store)

    def detach(self) -> None:
        """Stop listening and forget what was stored."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._parts = None, []

    def receive(self, outputs: Any) -> None:
        """Take the rows from what ``training_step`` returned, where they come from there."""
        if self.output_key is None:
            return
        if not isinstance(outputs, dict) or self.output_key not in outputs:
            known = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(
                f"Expected `training_step` to return a dictionary with {self.output_key!r} for "
                f"embeddings={self.source!r}, but got {known}."
            )
        self._store(outputs[self.output_key])

    def take(self) -> Tensor | None:
        """Return the rows since the last call as ``(n, d)`` and forget them; None where there were none."""
        parts, self._parts = self._parts, []
        return torch.cat(parts) if parts else None

    def _store(self, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise TypeError(
                f"Expected embeddings={self.source!r} to give a tensor of shape (..., d), but got "
                f"{type(output).__name__}; name a submodule that returns one."
            )
        self._parts.append(output.detach().reshape(-1, output.shape[-1]))
