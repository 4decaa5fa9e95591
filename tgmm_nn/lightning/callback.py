"""`EMCallback`: EM on embeddings while a network trains. It decides when; the layer knows how."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from tgmm_nn import checks
from tgmm_nn.distributed import broadcast_from_rank_zero, is_distributed, sum_over_ranks
from tgmm_nn.lightning.sources import Embeddings, find_mixture
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.schedules import PolynomialDecay

__all__ = ["EMCallback"]


class EMCallback(lightning.Callback):
    r"""Run EM on a network's embeddings while the network trains.

    Every update happens in ``on_train_batch_end``, after backward and the optimizer's step, and once per optimizer
    step under gradient accumulation. Validation and the saved checkpoint therefore see the same mixture. Every number
    that has to survive a resume is a buffer of the mixture. With several ranks the sums are added over ranks before
    any buffer is written, so that they all hold the same mixture, the one that a single process would.

    Training goes on from a mixture that is already fitted; a fresh one is started by its own ``initialize`` on
    embeddings of the epoch ``start_epoch`` or later: as soon as ``init_samples`` rows have been seen in it by all
    ranks, else at its last batch.

    Args:
        module: Name of the `GaussianMixture` in the LightningModule.
        embeddings: Dotted name of the submodule whose output, ``(..., d)``, is clustered; or ``"outputs:<key>"`` for a
            key of what ``training_step`` returned. Several calls in a step are joined.
        mode: ``"minibatch"`` makes one stepwise EM update per optimizer step. ``"full"`` keeps the rows of the epoch
            and makes ``n_iterations`` exact EM updates on them at its last batch.
        start_epoch: First epoch, from 0, in which the mixture is started and updated; a float in (0, 1) is the share of
            ``max_epochs`` that has passed at that epoch's end.
        stop_epoch: First epoch without EM again; None goes on to the end.
        every_n_epochs: EM runs in every so many epochs, counted from the first; the others are not looked at.
        every_n_steps: In ``"minibatch"``, an update is made at every so many optimizer steps of the training, from the
            rows of that step.
        step_size: Constant share of a batch in ``"minibatch"``; None takes the decreasing :math:`(t + t_0)^{-\kappa}`.
        decay: :math:`\kappa` of that schedule, in (0.5, 1].
        offset: :math:`t_0` of that schedule, at least 1.
        n_iterations: EM updates per epoch in ``"full"``.
        init_samples: Rows over all ranks that start a fresh mixture.
        output_key: Key, or place, of the embeddings where the submodule returns a dictionary, a tuple or a list.
        channel_dim: Dimension that holds the features: -1 for ``(..., d)``, 1 for maps ``(B, d, H, W)``.
        normalize: Whether to scale each row to unit length. The mixture is then one of unit vectors: give it such rows
            to score.
        max_rows_per_step: Most rows that EM takes from a step of this rank; of more, as many are drawn.
        prefix: What the logged names start with.
        prog_bar: Whether the progress bar shows the log-likelihood.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range or of the other mode, or, at the start, if a name does not exist.

    References:
        Cappé and Moulines, On-line expectation-maximization algorithm for latent data models, 2009.

    Example:
        >>> callback = EMCallback(module="gmm", embeddings="encoder", mode="minibatch", start_epoch=10)
        >>> callback.state_key
        "EMCallback{'module': 'gmm', 'embeddings': 'encoder', 'prefix': 'em'}"
    """

    def __init__(
        self,
        module: str = "gmm",
        embeddings: str = "encoder",
        mode: Literal["minibatch", "full"] = "minibatch",
        *,
        start_epoch: int | float = 0,
        stop_epoch: int | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int = 1,
        step_size: float | None = None,
        decay: float = 0.6,
        offset: float = 10.0,
        n_iterations: int = 1,
        init_samples: int = 10_000,
        output_key: str | int | None = None,
        channel_dim: int = -1,
        normalize: bool = False,
        max_rows_per_step: int | None = None,
        prefix: str = "em",
        prog_bar: bool = True,
    ) -> None:
        for name, value in (("module", module), ("prefix", prefix)):
            checks.check_string(name, value)
        checks.check_choice("mode", mode, ("minibatch", "full"))
        if step_size is not None:
            checks.check_number("step_size", step_size, 0.0, 1.0, strict=True)
        for name, number in (("n_iterations", n_iterations), ("init_samples", init_samples)):
            checks.check_integer(name, number)
        checks.check_bool("prog_bar", prog_bar)
        _check_epochs(start_epoch, stop_epoch)
        for name, number in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            checks.check_integer(name, number)
        _check_mode("minibatch", mode, step_size=(step_size, None), every_n_steps=(every_n_steps, 1))
        _check_mode("full", mode, n_iterations=(n_iterations, 1))
        self.module, self.mode, self.start_epoch = module, mode, start_epoch
        self.stop_epoch, self.every_n_epochs, self.every_n_steps = stop_epoch, every_n_epochs, every_n_steps
        self.step_size, self.schedule = step_size, PolynomialDecay(decay, offset)
        self.n_iterations, self.init_samples = n_iterations, init_samples
        self.prefix, self.prog_bar = prefix, prog_bar
        self.source = Embeddings(embeddings, output_key, channel_dim, normalize, max_rows_per_step)
        self._bank: list[Tensor] = []
        self._started = False
        self._last_step = 0
        self._first_epoch = 0
        self._last_value: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback in a checkpoint; two callbacks on two mixtures have two."""
        return self._generate_state_key(module=self.module, embeddings=self.source.source, prefix=self.prefix)

    # ---------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raise if ``module`` or ``embeddings`` names nothing."""
        if stage == "fit":
            find_mixture(pl_module, self.module)
            self.source.check(pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start listening; a mixture that a checkpoint or the user has fitted is not started again."""
        self._started = find_mixture(pl_module, self.module).fitted_
        self._first_epoch = self._epoch_to_start(trainer.max_epochs)
        self._last_step = trainer.global_step
        self.source.attach(trainer, pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget rows of an epoch that was cut short."""
        self.source.take()
        self._bank = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once the optimizer has stepped, and at the epoch's last batch."""
        self.source.receive(outputs)
        last = trainer.is_last_batch
        if trainer.global_step == self._last_step and not last:
            return
        self._last_step = trainer.global_step
        gmm = find_mixture(pl_module, self.module)
        rows = self._take(gmm, trainer.global_step)
        due = trainer.global_step % self.every_n_steps == 0
        value = self._update(gmm, rows, due, last) if self._runs_in(trainer.current_epoch) else None
        value = _mean_log_density(gmm, rows) if value is None else value
        # A batch without a usable row repeats the value before it: a logged nan would end an EarlyStopping.
        self._last_value = value if self._last_value is None else torch.where(value.isnan(), self._last_value, value)
        self._log(pl_module, gmm, self._last_value, len(rows))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop listening, and say so if the mixture was never started."""
        if not self._started:
            rank_zero_warn(
                f"EM never started on {self.module!r}: training ended before an epoch from {self._first_epoch} on had "
                f"given as many finite rows as it has components; its parameters are those of a fresh layer."
            )
        self._release()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening: after a failure or Ctrl-C no other hook is called."""
        self._release()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._release()

    # --------------------------------------------------------------------------------------------------- inside

    def _runs_in(self, epoch: int) -> bool:
        """Return whether EM runs in an epoch."""
        since = epoch - self._first_epoch
        stopped = self.stop_epoch is not None and epoch >= self.stop_epoch
        return since >= 0 and since % self.every_n_epochs == 0 and not stopped

    def _update(self, gmm: GaussianMixture, rows: Tensor, due: bool, last: bool) -> Tensor | None:
        """Start the mixture or move it; return the mean log-likelihood before an update, None where there was none."""
        if not self._started or self.mode == "full":
            self._bank.append(rows)
        if not self._started:
            self._start(gmm, last)
            if self.mode == "minibatch":
                return None  # this batch is part of the start
        if not self._started:
            return None
        if self.mode == "minibatch":
            if not due:
                return None
            return gmm.em_step(
                rows, step_size=self.step_size or self.schedule(gmm.n_updates.to(gmm.running_count.dtype))
            )
        if not last:
            return None
        bank, self._bank = torch.cat(self._bank), []
        return [gmm.em_step(bank) for _ in range(self.n_iterations)][-1]

    def _epoch_to_start(self, max_epochs: int | None) -> int:
        """Return the first epoch of EM, and warn if training ends before it."""
        if isinstance(self.start_epoch, int):
            first = self.start_epoch
        elif max_epochs is None or max_epochs < 1:
            raise ValueError(
                f"Expected `start_epoch` as an epoch where `max_epochs` is not set, but got {self.start_epoch}."
            )
        else:
            first = math.ceil(round(self.start_epoch * max_epochs, 9)) - 1
        if max_epochs is not None and 0 <= max_epochs <= first:
            rank_zero_warn(f"EM does not run: start_epoch={first} is not reached with max_epochs={max_epochs}.")
        return first

    def _start(self, gmm: GaussianMixture, last: bool) -> None:
        """Initialise from the rows of all ranks as soon as there are enough of them, the same on each rank."""
        local = torch.tensor([sum(map(len, self._bank))], device=gmm.means_.device)
        seen = int(sum_over_ranks(local))
        if seen < gmm.n_components or (seen < self.init_samples and not last):
            return
        rows = torch.cat(self._bank)
        if is_distributed():
            rows = torch.cat(gather_all_tensors(rows))
        rows = rows[torch.isfinite(rows).all(-1)]
        if len(rows) < gmm.n_components:
            return
        gmm.initialize(rows)
        broadcast_from_rank_zero(gmm.buffers(recurse=False))
        self._started = True
        if self.mode == "minibatch":
            self._bank = []

    def _take(self, gmm: GaussianMixture, step: int) -> Tensor:
        rows = self.source.take(step)
        if rows is not None:
            return rows
        if not self._started and not self._bank:
            raise RuntimeError(
                f"Expected embeddings={self.source.source!r} to give rows in every training step, but its forward was "
                "not called; name a submodule that the training step calls."
            )
        return gmm.means_.new_empty(0, gmm.n_features)

    def _log(self, pl_module: lightning.LightningModule, gmm: GaussianMixture, value: Tensor, n_rows: int) -> None:
        weights = gmm.weights_
        values = {
            "log_likelihood": value,
            "effective_components": torch.special.entr(weights).sum().exp(),
            "smallest_weight": weights.amin(),
        }
        for name, number in values.items():
            pl_module.log(
                f"{self.prefix}/{name}",
                number,
                on_step=False,
                on_epoch=True,
                prog_bar=self.prog_bar and name == "log_likelihood",
                batch_size=max(n_rows, 1),
                sync_dist=True,
            )

    def _release(self) -> None:
        self.source.detach()
        self._bank = []


def _check_epochs(start_epoch: Any, stop_epoch: Any) -> None:
    """Raise unless the two are epochs, the first of them perhaps a share, in this order."""
    if isinstance(start_epoch, float):
        checks.check_share("start_epoch", start_epoch)
    else:
        checks.check_integer("start_epoch", start_epoch, minimum=0)
    checks.check_integer("stop_epoch", stop_epoch, optional=True)
    if stop_epoch is not None and stop_epoch <= start_epoch:
        raise ValueError(f"Expected `stop_epoch` above start_epoch={start_epoch}, but got {stop_epoch}.")


def _check_mode(mode: str, chosen: str, **options: tuple[Any, Any]) -> None:
    """Raise if an option, given with its default, is set although it belongs to another mode than the chosen one."""
    for name, (value, default) in options.items():
        if chosen != mode and value != default:
            raise ValueError(
                f"Expected `{name}` only with mode={mode!r}, but got {value} with mode={chosen!r}; "
                f"set {name}={'null' if default is None else default}."
            )


@torch.no_grad()
def _mean_log_density(gmm: GaussianMixture, rows: Tensor) -> Tensor:
    """Return the mean log-density of the finite rows; nan where there are none."""
    density = gmm(rows)
    return torch.where(torch.isfinite(density), density, torch.nan).nanmean()
