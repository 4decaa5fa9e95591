"""`EMCallback`: EM on embeddings while a network trains. It decides when; the layer knows how."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning
from lightning_utilities.core.rank_zero import rank_zero_warn

from tgmm_nn import checks
from tgmm_nn.classifier import MixtureClassifier
from tgmm_nn.lightning.assigning import Assigning
from tgmm_nn.lightning.bank import Bank
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.health import Health
from tgmm_nn.lightning.learner import Learner
from tgmm_nn.lightning.modes import Accumulate, EMStep, Full, Minibatch, Mode, raise_nonfinite, start_on
from tgmm_nn.lightning.monitor import Monitor
from tgmm_nn.lightning.options import check_dependencies, check_learned, check_neighbours
from tgmm_nn.lightning.ranks import count_over_ranks
from tgmm_nn.lightning.refresh import check_predict_step, encode_again
from tgmm_nn.lightning.schedule import Schedule
from tgmm_nn.lightning.sources import Embeddings, attach_mixture
from tgmm_nn.maximization import PARTS, Learned
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.schedules import PolynomialDecay

__all__ = ["EMCallback"]

MODES = ("minibatch", "accumulate", "full")
STARTS = ("initialize", "fit")


class EMCallback(lightning.Callback):
    r"""Run EM on a network's embeddings while the network trains.

    Every update happens in ``on_train_batch_end``, after backward and the optimizer's step, and once per optimizer step
    under gradient accumulation; what an epoch collects is used at its last batch. Validation and the saved checkpoint
    therefore see the same mixture. Every number that has to survive a resume is a buffer of the mixture, or a plain
    number in the callback's state. With several ranks the sums are added over ranks before any buffer is written, so
    that they all hold the same mixture, the one that a single process would.

    Training goes on from a mixture that is already fitted; a fresh one is started on embeddings of the epoch
    ``start_epoch`` or later: as soon as ``init_samples`` rows have been seen in it by all ranks, else at its last
    batch. It is never started twice, also not after a resume.

    Logged at each epoch's end, from the first, under ``prefix``: ``log_likelihood`` in nats, the mean over the rows
    that EM used, before their update; ``entropy`` of the responsibilities in nats, the mean over the rows of the
    epoch's first step (as is the log-likelihood where EM does not run); ``effective_components``, the exponential of
    the entropy of the weights; ``smallest_weight``; ``condition_number``, the largest of a covariance; ``moved``, how
    far the means moved in the epoch, a weighted mean in standard deviations; ``births``, ``deaths``, ``reseeded``;
    ``started``, 1 where the log-likelihood is of a mixture that was started, and 0 where it is of a fresh layer.

    Args:
        module: Name of the `GaussianMixture` or `MixtureClassifier` in the LightningModule; or a mixture, which is made
            a submodule of it under ``name`` before a checkpoint is restored, so that a foreign module's checkpoints
            carry it. After ``ddp_fork`` and ``ddp_spawn``, which train in processes of their own, it is in the
            checkpoint alone.
        embeddings: Dotted name of the submodule whose output, ``(..., d)``, is clustered; or ``"outputs:<key>"`` for a
            key of what ``training_step`` returned. Several calls in a step are joined.
        mode: ``"minibatch"`` makes stepwise EM updates, each from the rows of a step. ``"accumulate"`` makes exact EM
            updates, each from the sums of the steps since the last one; ``"full"`` keeps their rows in a bank, and
            makes ``n_iterations`` EM updates on it. Both use at an epoch's last batch what they have.
        targets: Where labels for a `MixtureClassifier` are, one for each row: key, or place, in the batch, or
            ``"outputs:<key>"``; −1 marks a row without. None learns from rows alone.
        name: Name under which a mixture that is given as ``module`` is attached.
        start_epoch: First epoch, from 0, in which the mixture is started and updated; a float in (0, 1) is the share of
            ``max_epochs`` that has passed at that epoch's end.
        stop_epoch: First epoch without EM again; None goes on to the end.
        every_n_epochs: EM runs in every so many epochs, counted from the first; the others are not looked at.
        every_n_steps: Optimizer steps of the training from one update to the next. None is 1 in ``"minibatch"``, and an
            epoch in the other modes.
        step_size: Constant share of an update's rows in the running sums. None takes the decreasing
            :math:`(t + t_0)^{-\kappa}` in ``"minibatch"``, and exact EM in the other modes.
        decay: :math:`\kappa` of that schedule, in (0.5, 1].
        offset: :math:`t_0` of that schedule, at least 1.
        n_iterations: In ``"full"``, EM iterations of an update.
        tol: In ``"full"``, the iterations stop where the mean log-likelihood changes by less; None makes all of them.
        refit: In ``"full"``, whether each update starts the mixture anew, on the rows of all ranks, which each rank
            gathers; components keep the indices of those before that they share most rows with.
        bank_size: In ``"full"``, rows that are kept over all ranks, and from epoch to epoch. None keeps all rows, until
            they have been used.
        bank_policy: Of a bank of a size: ``"fifo"`` keeps the newest rows, ``"reservoir"`` a uniform sample of all.
        bank_per_component: Of a bank of a size: whether it is divided into banks of the components, for the rows that
            were most probably theirs when they came.
        min_fill: In ``"full"``, rows over all ranks that an update takes; with fewer in the bank there is none.
        save_bank: Whether checkpoints carry a bank of a size; else it fills anew after a resume.
        refresh: In ``"full"``, whether the bank is replaced at an epoch's last batch by the training rows encoded anew,
            by ``predict_step`` in evaluation mode: all are then embeddings of the same network.
        init: How a fresh mixture starts: by its ``"initialize"``, or by a whole ``"fit"`` of its ``n_init`` starts.
        init_samples: Rows over all ranks that start a fresh mixture.
        assignment: How rows are shared: ``"soft"``, ``"hard"`` as in classification EM, or by ``"sinkhorn"``, which
            gives each component its share. None leaves it to the mixture's ``cem``.
        epsilon: Entropic regularisation of ``"sinkhorn"``, in nats.
        sinkhorn_iterations: Iterations of ``"sinkhorn"``.
        marginals: What ``"sinkhorn"`` gives the components: ``"uniform"`` shares, or their ``"weights"``.
        temperature: T of ``"soft"`` and ``"sinkhorn"``, for :math:`r_{nk} \propto (\pi_k N_k)^{1/T}`.
        temperature_epochs: Epochs, since the first of EM, in which T falls to 1 geometrically: deterministic annealing.
            None keeps T.
        update: What is learned, of ``"weights"``, ``"means"`` and ``"covariances"``; the rest is frozen.
        frozen_components: Components that keep their parameters.
        min_weight: A component that weighs less after each of ``patience`` updates is started anew on a badly explained
            row, with its running statistics; None starts none anew. Below 1/K.
        patience: See ``min_weight``.
        on_nonfinite: Whether rows that are not finite are left out and counted, ``"skip"``, or ``"raise"`` on all ranks
            before anything is changed.
        output_key: Key, or place, of the embeddings where the submodule returns a dictionary, a tuple or a list.
        channel_dim: Dimension that holds the features: -1 for ``(..., d)``, 1 for maps ``(B, d, H, W)``.
        normalize: Whether to scale each row to unit length. The mixture is then one of unit vectors: give it such rows
            to score.
        max_rows_per_step: Most rows that EM takes from a step of this rank; of more, as many are drawn.
        prefix: What the logged names start with.
        prog_bar: Whether the progress bar shows the log-likelihood.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range or of another mode, or, at the start, if a name does not exist.

    References:
        Cappé and Moulines, On-line expectation-maximization algorithm for latent data models, 2009.

    Example:
        >>> callback = EMCallback(module="gmm", embeddings="encoder", mode="minibatch", start_epoch=10)
        >>> callback.state_key
        "EMCallback{'module': 'gmm', 'embeddings': 'encoder', 'prefix': 'em'}"
    """

    def __init__(
        self,
        module: str | GaussianMixture | MixtureClassifier = "gmm",
        embeddings: str = "encoder",
        mode: Literal["minibatch", "accumulate", "full"] = "minibatch",
        *,
        targets: str | int | None = None,
        name: str = "gmm",
        start_epoch: int | float = 0,
        stop_epoch: int | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        step_size: float | None = None,
        decay: float = 0.6,
        offset: float = 10.0,
        n_iterations: int = 1,
        tol: float | None = None,
        refit: bool = False,
        bank_size: int | None = None,
        bank_policy: Literal["fifo", "reservoir"] = "fifo",
        bank_per_component: bool = False,
        min_fill: int = 1,
        save_bank: bool = False,
        refresh: bool = False,
        init: Literal["initialize", "fit"] = "initialize",
        init_samples: int = 10_000,
        assignment: Literal["soft", "hard", "sinkhorn"] | None = None,
        epsilon: float = 1.0,
        sinkhorn_iterations: int = 30,
        marginals: Literal["uniform", "weights"] = "uniform",
        temperature: float = 1.0,
        temperature_epochs: int | None = None,
        update: Collection[str] = PARTS,
        frozen_components: Sequence[int] = (),
        min_weight: float | None = None,
        patience: int = 10,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        output_key: str | int | None = None,
        channel_dim: int = -1,
        normalize: bool = False,
        max_rows_per_step: int | None = None,
        prefix: str = "em",
        prog_bar: bool = True,
    ) -> None:
        options = {name: value for name, value in locals().items() if name != "self"}
        checks.check_string("module", name if isinstance(module, (GaussianMixture, MixtureClassifier)) else module)
        checks.check_choice("mode", mode, MODES)
        checks.check_choice("init", init, STARTS)
        checks.check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        checks.check_integer("init_samples", init_samples)
        for flag in ("refresh", "save_bank", "prog_bar"):
            checks.check_bool(flag, options[flag])
        for text in ("name", "prefix"):
            checks.check_string(text, options[text])
        if not name.isidentifier():
            raise ValueError(f"Expected `name` to be one word, the name of a new attribute, but got {name!r}.")
        check_learned(update, frozen_components, min_weight, refit)
        self.attached = None if isinstance(module, str) else module
        self.module = module if isinstance(module, str) else name
        self.mode, self.init, self.init_samples = mode, init, init_samples
        self.save_bank, self.refresh = save_bank, refresh
        self.learned = tuple(update), tuple(frozen_components)
        self.prefix, self.prog_bar = prefix, prog_bar
        self.source = Embeddings(embeddings, output_key, channel_dim, normalize, max_rows_per_step, targets=targets)
        self.schedule = Schedule(start_epoch, stop_epoch, every_n_epochs, every_n_steps)
        self.assigning = Assigning(assignment, epsilon, sinkhorn_iterations, marginals, temperature, temperature_epochs)
        self.bank = Bank(bank_size, bank_policy, per_component=bank_per_component)
        self.health, self.monitor = Health(min_weight, patience), Monitor(min_weight)
        decreasing = PolynomialDecay(decay, offset) if mode == "minibatch" else None
        self.em = EMStep(self.monitor, step_size, decreasing, raise_on_nonfinite=on_nonfinite == "raise")
        full = Full(self.em, self.bank, n_iterations=n_iterations, tol=tol, min_fill=min_fill, refit=refit)
        modes: dict[str, Mode] = {"minibatch": Minibatch(self.em), "accumulate": Accumulate(self.em), "full": full}
        self._mode = modes[mode]
        check_dependencies(EMCallback, options)
        self._learner: Learner | None = None
        self._waiting: list[tuple[int, Batch]] = []
        self._started = self._heard = self._moved = self._is_open = False
        self._last_step = self._first_epoch = self._epoch = 0
        self._saved: Mapping[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Name of this callback in a checkpoint; two callbacks on two mixtures have two."""
        return self._generate_state_key(module=self.module, embeddings=self.source.source, prefix=self.prefix)

    # ---------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Attach the mixture if it was given, and raise if ``module`` or ``embeddings`` names nothing."""
        if self.attached is not None:
            attach_mixture(pl_module, self.module, self.attached)
        if stage == "fit":
            Learner.find(pl_module, self.module, self.source.targets is not None)
            self.source.check(pl_module)
            check_neighbours(trainer, self)
            if self.refresh:
                check_predict_step(pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start listening; a mixture that a checkpoint or the user has fitted is not started again."""
        self._learner = Learner.find(pl_module, self.module, self.source.targets is not None)
        gmm = self._learner.gmm
        if self._learner.classifier is not None and self.source.targets is None and not gmm.fitted_:
            raise ValueError(f"Expected `targets` to start the MixtureClassifier {self.module!r} from, but got None.")
        self._started, self._heard, self._moved = gmm.fitted_, False, False
        self._first_epoch = self.schedule.first_epoch(trainer.max_epochs)
        self._last_step, self._epoch = trainer.global_step, trainer.current_epoch
        self.em.learned = Learned.from_options(gmm.n_components, *self.learned, gmm.means_.device)
        # What an earlier training left here is not this one's, but for what a checkpoint brings.
        self.health.begin(gmm, self._saved.get("starving", ()))
        self.bank.begin(gmm.n_components, gmm.seed)
        if self.save_bank and self._saved.get("bank"):
            self.bank.load_state_dict(self._saved["bank"], gmm.means_.device)
        self.monitor.reset()
        self._saved = {}
        self._begin_epoch()
        self.source.attach(trainer, pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget rows of an epoch that was cut short."""
        self._epoch = trainer.current_epoch
        self._begin_epoch()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once the optimizer has stepped, and at the epoch's last batch."""
        self.source.receive(outputs, batch)
        previous, step = self._last_step, trainer.global_step
        last = trainer.is_last_batch or 0 < trainer.max_steps <= step
        if step == previous and not last:
            return
        self._last_step = step
        seen = self._take(step)
        self.monitor.see(self.learner.gmm, seen.rows)
        if not self.schedule.runs_in(self._epoch, self._first_epoch) or not self._collect(seen, step, last):
            return
        if last and self.refresh:
            self._mode.forget()
            self._mode.collect(self.learner, encode_again(trainer, pl_module, self.source), step)
        ends = last and self._mode.has_windows
        if ends or self.schedule.is_due(step, previous, default=last or not self._mode.by_epoch):
            self._update(step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log what became of the mixture in the epoch; validation and the checkpoint see the same."""
        if self._is_open:  # training was stopped before the last batch
            self._update(self._last_step)
        for name, value in self.monitor.values(self.learner.gmm).items():
            shown = self.prog_bar and name == "log_likelihood"
            # All ranks hold the same numbers: the mean over them only tells Lightning so.
            pl_module.log(f"{self.prefix}/{name}", value, prog_bar=shown, sync_dist=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop listening, and say so if the mixture was never started."""
        runs = any(self.schedule.runs_in(epoch, self._first_epoch) for epoch in range(trainer.current_epoch))
        if self._started and runs and not self._moved:
            rank_zero_warn(
                f"EM made no update on {self.module!r}: look at `every_n_steps`, `min_fill`, and when it started."
            )
        if not self._started:
            rank_zero_warn(
                f"EM never started on {self.module!r}: training ended before an epoch from {self._first_epoch} on had "
                f"given enough finite rows (as many as components; for a classifier, of each class that has labels); "
                f"its parameters are those of a fresh layer."
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

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beside the mixture's buffers, as plain numbers, and a bank that is to be saved."""
        bank = self.bank.state_dict() if self.save_bank else {}
        return {"starving": self.health.state_dict(), "bank": bank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` gave until training starts."""
        self._saved = state_dict

    # --------------------------------------------------------------------------------------------------- inside

    @property
    def learner(self) -> Learner:
        """The mixture, with the labels that it learns from; there while training runs."""
        if self._learner is None:
            raise RuntimeError("Expected EMCallback to be in a training that has started, but it is not.")
        return self._learner

    def _take(self, step: int) -> Batch:
        """Return the rows of this rank since the last step; raise if none arrives on any rank in the first."""
        gmm, seen = self.learner.gmm, self.source.take(step)
        if not self._heard:
            self._heard = bool(count_over_ranks(int(seen is not None), gmm.means_.device))
        if not self._heard:
            raise RuntimeError(
                f"Expected embeddings={self.source.source!r} to give rows in every training step, but its forward was "
                "not called; name a submodule that the training step calls."
            )
        if seen is None:
            return Batch.of(gmm.means_.new_empty(0, gmm.n_features))
        if seen.rows.shape[-1] != gmm.n_features:
            raise ValueError(
                f"Expected embeddings={self.source.source!r} of {gmm.n_features} features for the mixture "
                f"{self.module!r}, but got {seen.rows.shape[-1]} along channel_dim={self.source.channel_dim}."
            )
        return self.learner.used(seen)

    def _collect(self, batch: Batch, step: int, last: bool) -> bool:
        """Hand the rows of a step to the mode, or wait for a start; return whether an update may follow."""
        parts = [(step, batch)]
        if not self._started:
            self._waiting += parts
            if not self._start(last):
                return False
            parts, self._waiting = self._waiting, []
            if self.mode == "minibatch":
                return False  # these rows are part of the start
        for at, part in parts:
            self._mode.collect(self.learner, part, at)
        self._is_open = self._mode.has_windows
        return True

    def _start(self, last: bool) -> bool:
        """Start a fresh mixture as soon as all ranks have seen enough rows; return whether it was."""
        gmm = self.learner.gmm
        seen = count_over_ranks(sum(len(batch.rows) for _, batch in self._waiting), gmm.means_.device)
        if seen < self.init_samples and not last:
            return False
        batch = Batch.joined(part for _, part in self._waiting)
        bad = count_over_ranks(int((~batch.finite()).sum()), batch.rows.device)
        if self.em.raise_on_nonfinite:
            raise_nonfinite(bad)
        self._started = start_on(self.learner, batch, self.init)
        if self._started:
            self._moved = True
            self.monitor.follow(gmm)
            if self.mode == "minibatch":  # the other modes meet these rows again, and count them then
                gmm.n_skipped.add_(bad)
        return self._started

    def _update(self, step: int) -> None:
        """Move the mixture, and look after its components."""
        self._is_open = False
        batch = self._mode.update(self.learner)
        if batch is not None:
            self._moved = True
            n_reseeded = self.health.after_update(self.learner, batch, self.em.learned, step)
            self.monitor.count(self.learner.gmm, n_reseeded)

    def _begin_epoch(self) -> None:
        self.source.take()
        self._mode.forget()
        self._waiting, self._is_open = [], False
        self.monitor.begin(self.learner.gmm)
        self.em.assign = partial(self.assigning.of, epoch=self._epoch - self._first_epoch)

    def _release(self) -> None:
        self.source.detach()
        self._mode.forget()
        self._waiting, self._is_open = [], False
