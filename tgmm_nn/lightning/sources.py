"""Where callbacks' rows come from: a forward hook on a submodule, or a key of what the step returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tgmm_nn import checks
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.statistics import wider_dtype

__all__ = ["OUTPUTS", "STEPS", "Embeddings", "find_mixture", "item", "returned_item", "submodule"]

OUTPUTS = "outputs:"
STEPS = {"train": "training_step", "validate": "validation_step", "test": "test_step"}


def submodule(root: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the submodule with a dotted name, or raise an error that lists what exists."""
    try:
        return root.get_submodule(name)
    except AttributeError:
        known = ", ".join(repr(key) for key, _ in root.named_modules() if key) or "none"
        raise ValueError(
            f"Expected `{argument}` to name a submodule of {type(root).__name__} ({known}), but got {name!r}."
        ) from None


def find_mixture(root: nn.Module, name: str) -> GaussianMixture:
    """Return the mixture with a dotted name, or raise."""
    gmm = submodule(root, name, "module")
    if not isinstance(gmm, GaussianMixture):
        raise TypeError(f"Expected module={name!r} to be a GaussianMixture, but got {type(gmm).__name__}.")
    return gmm


def attach_mixture(root: nn.Module, name: str, gmm: nn.Module) -> None:
    """Make a mixture or a classifier a submodule, unless it is that already; raise where the name is taken."""
    if getattr(root, name, None) is gmm:
        return
    if hasattr(root, name):
        raise ValueError(
            f"Expected `name` to be free in {type(root).__name__}, but {name!r} is there already; choose another name, "
            "or give it as `module` if it is the mixture."
        )
    root.add_module(name, gmm)


def item(container: Any, key: str | int, owner: str, argument: str) -> Any:
    """Return what a dictionary, a tuple or a list holds under a key or at a place, or raise and list what there is."""
    if isinstance(container, Mapping) and key in container:
        return container[key]
    if isinstance(container, (tuple, list)) and isinstance(key, int) and key < len(container):
        return container[key]
    there = sorted(container, key=str) if isinstance(container, Mapping) else None
    size = f"{len(container)} elements" if isinstance(container, (tuple, list)) else type(container).__name__
    raise ValueError(f"Expected {owner} to hold {argument}={key!r}, but got {there or size}.")


def returned_item(outputs: Any, source: str, step: str, argument: str) -> Any:
    """Return what a step returned under the key of ``"outputs:<key>"``, or raise and list what there is."""
    key = source.removeprefix(OUTPUTS)
    if not isinstance(outputs, Mapping) or key not in outputs:
        known = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"Expected `{step}` to return a dictionary with {key!r} for {argument}={source!r}, but got {known}."
        )
    return outputs[key]


class Embeddings:
    """Rows of the batches of one stage since they were last taken, detached, as they pass through the network.

    Args:
        source: Dotted name of a submodule, or ``"outputs:<key>"``, a key of the dictionary that the stage's step
            returned.
        output_key: Key, or place, of the tensor where the submodule returns a dictionary, a tuple or a list.
        channel_dim: Dimension that holds the features: -1 for ``(..., d)``, 1 for maps ``(B, d, H, W)``. The others
            are rows.
        normalize: Whether to scale each row to unit length.
        max_rows_per_step: Most rows of a step; of more, as many are drawn, by the number of the step.
        stage: Whose batches are read: ``"train"``, ``"validate"`` or ``"test"``. The sanity check is none of them.
        targets: Where labels are, one for each row: key, or place, in the batch, or ``"outputs:<key>"``; None for none.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range, or ``output_key`` is given for ``"outputs:<key>"``.
    """

    # The one that listens while rows are encoded anew; those of other callbacks must not take these for a batch's.
    _alone: ClassVar[Embeddings | None] = None

    def __init__(
        self,
        source: str,
        output_key: str | int | None = None,
        channel_dim: int = -1,
        normalize: bool = False,
        max_rows_per_step: int | None = None,
        stage: str = "train",
        targets: str | int | None = None,
    ) -> None:
        checks.check_string("embeddings", source)
        if output_key is not None and not isinstance(output_key, str):
            checks.check_integer("output_key", output_key, minimum=0)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"Expected `channel_dim` to be an integer, but got {channel_dim!r}.")
        checks.check_bool("normalize", normalize)
        checks.check_integer("max_rows_per_step", max_rows_per_step, optional=True)
        checks.check_choice("stage", stage, STEPS)
        self.source, self.output_key, self.channel_dim = source, output_key, channel_dim
        if isinstance(targets, str) or targets is None:
            if targets in ("", OUTPUTS):
                raise ValueError(f"Expected `targets` to be a key, a place or 'outputs:<key>', but got {targets!r}.")
        else:
            checks.check_integer("targets", targets, minimum=0)
        self.normalize, self.max_rows_per_step, self.stage = normalize, max_rows_per_step, stage
        self.targets = targets
        if self.returned_key is not None and output_key is not None:
            raise ValueError(
                f"Expected `output_key` only where `embeddings` names a submodule, but got {output_key!r} with "
                f"{source!r}; let {STEPS[stage]} return the tensor itself."
            )
        self._parts: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    @property
    def returned_key(self) -> str | None:
        """Key of the step's output, or None where a submodule is hooked."""
        return self.source.removeprefix(OUTPUTS) if self.source.startswith(OUTPUTS) else None

    def check(self, pl_module: lightning.LightningModule) -> None:
        """Raise unless the source names something that can exist."""
        if self.returned_key is None:
            submodule(pl_module, self.source, "embeddings")
        elif not self.returned_key:
            raise ValueError(f"Expected `embeddings` to be 'outputs:<key>', but got {self.source!r}.")

    def attach(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start listening. The hook only stores: an update here would fall between forward and backward."""
        if self.returned_key is not None:
            return

        def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if trainer.state.stage == self.stage and Embeddings._alone in (None, self):
                self._store(output)

        self._handle = submodule(pl_module, self.source, "embeddings").register_forward_hook(store)

    def detach(self) -> None:
        """Stop listening and forget what was stored."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._parts, self._labels = None, [], []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other source listen."""
        Embeddings._alone = self
        try:
            yield
        finally:
            Embeddings._alone = None

    def receive(self, outputs: Any, batch: Any, step: str | None = None) -> None:
        """Take what comes from the batch, or from what the step returned; ``step`` is another step's name."""
        name = step or STEPS[self.stage]
        if self.returned_key is not None:
            self._store(returned_item(outputs, self.source, name, "embeddings"))
        if self.targets is not None:
            self._label(outputs, batch, name)

    def take(self, step: int = 0) -> Batch | None:
        """Return the rows since the last call, with their labels, and forget them; None where there were none.

        Args:
            step: Number of the step: seeds the draw of ``max_rows_per_step`` rows, so that it does not depend on what
                came before and no global generator is touched.
        """
        parts, labels, self._parts, self._labels = self._parts, self._labels, [], []
        if not parts:
            return None
        batch, most = Batch.of(torch.cat(parts), torch.cat(labels) if labels else None), self.max_rows_per_step
        if most is not None and len(batch.rows) > most:
            generator = torch.Generator().manual_seed(step)
            chosen = torch.randperm(len(batch.rows), generator=generator, device="cpu")[:most]
            batch = batch.where(chosen.sort().values.to(batch.rows.device))
        if not self.normalize:
            return batch
        # Lengths of rows in half precision are too coarse to divide by.
        wide = batch.rows.to(wider_dtype(batch.rows.dtype, torch.float32))
        return batch._replace(rows=nn.functional.normalize(wide, dim=-1))

    def _label(self, outputs: Any, batch: Any, step: str) -> None:
        """Store the labels of the rows that came since the last batch, or raise unless there is one for each."""
        if isinstance(self.targets, str) and self.targets.startswith(OUTPUTS):
            labels = returned_item(outputs, self.targets, step, "targets")
        else:
            labels = item(batch, self.targets, "the batch", "targets")  # type: ignore[arg-type]  # not None here
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"Expected targets={self.targets!r} to give integers, but got {labels.dtype}.")
        new = self._parts[len(self._labels) :]
        for part in new:  # a submodule that is called twice, for two views, has two parts with the same labels
            if labels.numel() != len(part):
                raise ValueError(
                    f"Expected targets={self.targets!r} to give one label for each of the {len(part)} rows of "
                    f"embeddings={self.source!r}, but got shape {tuple(labels.shape)}."
                )
            self._labels.append(labels.detach().reshape(-1).to(part.device, torch.int64))

    def _store(self, output: Any) -> None:
        key, owner = self.output_key, f"the output of {self.source!r}"
        tensor = output if key is None else item(output, key, owner, "output_key")
        if not isinstance(tensor, Tensor) or not -tensor.ndim <= self.channel_dim < tensor.ndim:
            found = f"one of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"Expected embeddings={self.source!r} to give a tensor with dimension channel_dim={self.channel_dim}, "
                f"but got {found}; name a submodule that returns one, or choose by `output_key`."
            )
        # A copy: what follows in the network may change its input in place, as ReLU(inplace=True) does.
        rows = tensor.detach().movedim(self.channel_dim, -1).clone(memory_format=torch.contiguous_format)
        self._parts.append(rows.reshape(-1, rows.shape[-1]))
