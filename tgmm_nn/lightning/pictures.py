"""`LatentPlotCallback`: the latent space and the mixture in it, as pictures of a training and as one animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from matplotlib.axes import Axes
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.lightning.sources import Embeddings, find_mixture
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting import Plane, animate, limits_of, plot_latent, principal_plane, save
from tgmm_nn.plotting.figures import lay_out_like
from tgmm_nn.plotting.latent import check_radii
from tgmm_nn.plotting.marks import component_marks

__all__ = ["LatentPlotCallback"]


DRAWN = ("weights_", "means_", "factor_", "fitted")


class LatentPlotCallback(lightning.Callback):
    """Draw an epoch's embeddings in two dimensions with the components' ellipses, every so often and at the end.

    Put it behind `EMCallback`, so that the picture shows the mixture after the epoch's last update. Rank zero draws
    its own finite rows. Files are ``latent_epoch_<epoch>.png``, coloured by the most probable component, each in the
    principal plane of its rows. At the end of training all are drawn again, in the plane of the last and with common
    limits, so that they can be compared, and joined in ``latent.gif``.

    For that the rows and the mixture of each picture are kept in ``latent_frames/epoch_<epoch>.pt``, at most
    ``max_rows`` · d · 4 bytes each; the last epoch is drawn at the end only. A resumed training goes on from those of
    the epochs before it, where they are still there: in its own folder, or in the one that the checkpoint names.

    Args:
        module: Name of the `GaussianMixture` in the LightningModule.
        embeddings: Dotted name of the submodule whose output is drawn, or ``"outputs:<key>"``.
        every_n_epochs: Epochs between pictures.
        max_rows: Most rows in a picture.
        n_std: Radii of the ellipses in standard deviations.
        gif: Whether to keep rows and mixtures, and to join the pictures at the end.
        seconds: How long the animation shows a picture; the last is shown four times as long.
        output_key: As in `EMCallback`.
        channel_dim: As in `EMCallback`.
        normalize: As in `EMCallback`.
        folder: Where pictures go; None takes the trainer's ``default_root_dir``.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> callback = LatentPlotCallback("gmm", "encoder", every_n_epochs=5, n_std=[2.0], folder="pictures")
        >>> callback.every_n_epochs, callback.n_std
        (5, (2.0,))
    """

    def __init__(
        self,
        module: str = "gmm",
        embeddings: str = "encoder",
        *,
        every_n_epochs: int = 10,
        max_rows: int = 5000,
        n_std: Sequence[float] = (1.0, 2.0),
        gif: bool = True,
        seconds: float = 0.6,
        output_key: str | int | None = None,
        channel_dim: int = -1,
        normalize: bool = False,
        folder: str | None = None,
    ) -> None:
        checks.check_string("module", module)
        if folder is not None:
            checks.check_string("folder", folder)
        checks.check_integer("every_n_epochs", every_n_epochs)
        checks.check_integer("max_rows", max_rows)
        checks.check_bool("gif", gif)
        checks.check_number("seconds", seconds, strict=True)
        self.module, self.source = module, Embeddings(embeddings, output_key, channel_dim, normalize)
        self.every_n_epochs, self.max_rows, self.folder = every_n_epochs, max_rows, folder
        self.n_std, self.gif, self.seconds = check_radii(n_std), gif, seconds
        self._rows: list[Tensor] = []
        self._frames: list[Path] = []

    @property
    def state_key(self) -> str:
        """Name of this callback in a checkpoint."""
        return self._generate_state_key(module=self.module, embeddings=self.source.source)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raise if ``module`` or ``embeddings`` names nothing."""
        if stage == "fit":
            find_mixture(pl_module, self.module)
            self.source.check(pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take up the frames of the epochs before a resume, as far as they are there."""
        known = {file.name: file for file in [*self._frames, *(self._folder(trainer) / "latent_frames").glob("*.pt")]}
        before = [self._frame(trainer, epoch).name for epoch in range(trainer.current_epoch)]
        self._frames = [known[name] for name in before if name in known and known[name].is_file()]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen in the epochs that are drawn."""
        self._release()
        if self._is_due(trainer) and trainer.is_global_zero:
            self.source.attach(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's rows, and draw at the epoch's last batch."""
        if not (self._is_due(trainer) and trainer.is_global_zero):
            return
        self.source.receive(outputs, batch)
        seen = self.source.take()
        missing = self.max_rows - sum(map(len, self._rows))
        if seen is not None and missing > 0:
            rows = seen.rows[:missing].float().cpu()
            self._rows.append(rows[torch.isfinite(rows).all(-1)])
        if trainer.is_last_batch and any(map(len, self._rows)):
            self._draw(trainer, find_mixture(pl_module, self.module))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop listening, and join the pictures."""
        self._release()
        frames = [frame for frame in self._frames if frame.is_file()]
        if self.gif and trainer.is_global_zero and frames:
            self._join(trainer, frames)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening: after a failure or Ctrl-C no other hook is called."""
        self._release()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return where the frames are, as plain strings."""
        return {"frames": [str(frame.absolute()) for frame in self._frames]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` gave until training starts."""
        self._frames = [Path(frame) for frame in state_dict["frames"]]

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.current_epoch % self.every_n_epochs == 0 or last

    def _folder(self, trainer: lightning.Trainer) -> Path:
        return Path(self.folder or trainer.default_root_dir)

    def _file(self, trainer: lightning.Trainer, epoch: int) -> Path:
        return self._folder(trainer) / f"latent_epoch_{epoch:04d}.png"

    def _frame(self, trainer: lightning.Trainer, epoch: int) -> Path:
        return self._folder(trainer) / "latent_frames" / f"epoch_{epoch:04d}.pt"

    def _draw(self, trainer: lightning.Trainer, gmm: GaussianMixture) -> None:
        """Draw the epoch's rows, and keep what it takes to draw them again."""
        rows, epoch = torch.cat(self._rows), trainer.current_epoch
        if not (self.gif and epoch + 1 == trainer.max_epochs):  # else the end of training draws it, at once
            save(self._picture(gmm, rows, epoch), self._file(trainer, epoch))
        if self.gif:
            frame = self._frame(trainer, epoch)
            frame.parent.mkdir(parents=True, exist_ok=True)
            state = {name: value.cpu() for name, value in gmm.named_buffers() if name in DRAWN}
            torch.save({"epoch": epoch, "rows": rows, "covariance_type": gmm.covariance_type, "state": state}, frame)
            self._frames.append(frame)
        self._release()

    def _join(self, trainer: lightning.Trainer, frames: list[Path]) -> None:
        """Draw all pictures again, in one plane and with the same limits, and join them."""
        contents = [read_frame(frame) for frame in frames]
        plane = _of_the_last(principal_plane(contents[-1][1]))
        radius = max(self.n_std, default=0.0)
        limits = torch.stack([limits_of(plane.project(rows), _flat(plane, gmm), radius) for gmm, rows, _ in contents])
        common = torch.stack([limits[:, 0].amin(0), limits[:, 1].amax(0)])
        flat = _flat(plane, contents[-1][0])
        marks = None if flat is None else component_marks(flat.means_)
        # All are laid out as the last is, which has all to show: what moves is the mixture, and not its frame.
        last = self._picture(*contents[-1], plane, common, marks)
        files = [self._file(trainer, epoch) for *_, epoch in contents]
        save(last, files[-1])
        for content, file in zip(contents[:-1], files, strict=False):
            ax = self._picture(*content, plane, common, marks)
            lay_out_like(ax, last)
            save(ax, file)
        animate(files, self._folder(trainer) / "latent.gif", self.seconds)

    def _picture(
        self,
        gmm: GaussianMixture,
        rows: Tensor,
        epoch: int,
        plane: Plane | None = None,
        limits: Tensor | None = None,
        marks: dict[int, int] | None = None,
    ) -> Axes:
        """Draw an epoch."""
        ax = plot_latent(gmm, rows, n_std=self.n_std, plane=plane, limits=limits, marks=marks)
        ax.set_title(f"Epoch {epoch}\n{ax.get_title()}")
        return ax

    def _release(self) -> None:
        self.source.detach()
        self._rows = []


def read_frame(file: Path) -> tuple[GaussianMixture, Tensor, int]:
    """Return the mixture, the rows and the epoch of a picture."""
    frame = torch.load(file, weights_only=True)
    rows, state = frame["rows"], frame["state"]
    gmm = GaussianMixture(len(state["weights_"]), rows.shape[1], frame["covariance_type"], device="cpu")
    gmm.load_state_dict(state, strict=False)  # without the running sums, which nobody draws
    return gmm, rows, frame["epoch"]


def _of_the_last(plane: Plane) -> Plane:
    """Return a plane whose names are true of every epoch's picture; what it holds of the variance is not."""
    first, second = (name.split(" (")[0] for name in plane.names)
    of = " of the last epoch" if "principal" in first else ""
    return plane._replace(names=(first + of, second + of))


def _flat(plane: Plane, gmm: GaussianMixture) -> GaussianMixture | None:
    return plane.project_mixture(gmm) if gmm.fitted_ else None
