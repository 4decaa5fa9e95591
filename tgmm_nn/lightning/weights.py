"""`WeightHistoryCallback`: what each component weighs at the end of each epoch, and when one dies or is born."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.lightning.callback import EMCallback
from tgmm_nn.lightning.sources import find_mixture
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting import plot_weights, save

__all__ = ["WeightHistoryCallback", "read_weights"]

FIELDS = ("epoch", "component", "weight", "births", "deaths")
Line = tuple[int, int, float, int, int]


class WeightHistoryCallback(lightning.Callback):
    """Write the weights of a mixture's components at each epoch's end to ``weights.csv``, and draw them at the end.

    The file has a line for each epoch and component, from the first epoch of EM on, as its log ``started`` says; an
    epoch that only gave the rows to start from, at its end, is left out, as in the curves of the metrics: ``epoch``,
    ``component``, ``weight``, and how often the component was born and died in the epoch, ``births`` and ``deaths``, as
    `EMCallback` counts them by its ``min_weight``. Each epoch is written at its end, so that what is there survives an
    interruption. A resumed training goes on from the lines of the epochs before it, where they are still there: in its
    own folder, or in the one that the checkpoint names. ``weights.png`` is drawn by `plot_weights` at the end.

    Put it behind `EMCallback`. Rank zero writes.

    Args:
        module: Name of the `GaussianMixture` in the LightningModule.
        folder: Where the files go; None takes the trainer's ``default_root_dir``.

    Raises:
        TypeError: If an option has the wrong type.

    Example:
        >>> WeightHistoryCallback("gmm").state_key
        "WeightHistoryCallback{'module': 'gmm'}"
    """

    def __init__(self, module: str = "gmm", *, folder: str | None = None) -> None:
        checks.check_string("module", module)
        if folder is not None:
            checks.check_string("folder", folder)
        self.module, self.folder = module, folder
        self._file: Path | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback in a checkpoint."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raise if ``module`` names no mixture."""
        if stage == "fit":
            find_mixture(pl_module, self.module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin the file by the lines of the epochs before a resume, as far as they are there."""
        file = Path(self.folder or trainer.default_root_dir) / "weights.csv"
        earlier = next((path for path in (file, self._file) if path is not None and path.is_file()), None)
        self._file = file
        if trainer.is_global_zero:
            lines = [] if earlier is None else _read(earlier)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="") as stream:
                csv.writer(stream).writerows([FIELDS, *(line for line in lines if line[0] < trainer.current_epoch)])

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write what the components weigh."""
        gmm = find_mixture(pl_module, self.module)
        if self._file is None or not trainer.is_global_zero or not _started(trainer, gmm):
            return
        columns = (gmm.weights_, *_events(trainer, gmm))
        with self._file.open("a", newline="") as stream:
            csv.writer(stream).writerows(
                (trainer.current_epoch, k, f"{weight:.6g}", int(births), int(deaths))
                for k, (weight, births, deaths) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
            )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the weights; nothing where the mixture never started."""
        if trainer.is_global_zero and self._file is not None and _read(self._file):
            epochs, weights, births, deaths = read_weights(self._file)
            save(plot_weights(weights, epochs, births=births, deaths=deaths), self._file.with_name("weights.png"))

    def state_dict(self) -> dict[str, Any]:
        """Return where the file is, as a plain string."""
        return {"file": None if self._file is None else str(self._file.absolute())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` gave until training starts."""
        self._file = None if state_dict["file"] is None else Path(state_dict["file"])


def read_weights(file: Path) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Return the E epochs of a ``weights.csv``, and weights, births and deaths of the K components, each ``(E, K)``."""
    lines = _read(file)
    epochs = sorted({line[0] for line in lines})
    n_components = 1 + max((line[1] for line in lines), default=-1)
    places = {epoch: place for place, epoch in enumerate(epochs)}
    table = torch.zeros(3, len(epochs), n_components)
    for epoch, component, *values in lines:
        table[:, places[epoch], component] = torch.tensor(values)
    weights, births, deaths = table
    return epochs, weights, births, deaths


def _read(file: Path) -> list[Line]:
    with file.open(newline="") as stream:
        return [
            (int(epoch), int(component), float(weight), int(births), int(deaths))
            for epoch, component, weight, births, deaths in list(csv.reader(stream))[1:]
        ]


def _callback_of(trainer: lightning.Trainer, gmm: GaussianMixture) -> EMCallback | None:
    """Return the callback that runs EM on a mixture, if there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # it has callbacks
        if isinstance(callback, EMCallback) and callback.learner.gmm is gmm:
            return callback
    return None


def _started(trainer: lightning.Trainer, gmm: GaussianMixture) -> bool:
    """Return whether the epoch was one of a started mixture, and not the one whose rows started it."""
    callback = _callback_of(trainer, gmm)
    logged = None if callback is None else trainer.callback_metrics.get(f"{callback.prefix}/started")
    return gmm.fitted_ and (logged is None or bool(logged > 0))


def _events(trainer: lightning.Trainer, gmm: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Return how often each component was born and died in the epoch; never where no callback runs EM on it."""
    callback = _callback_of(trainer, gmm)
    if callback is not None:
        return callback.monitor.births, callback.monitor.deaths
    nothing = torch.zeros_like(gmm.weights_)
    return nothing, nothing
