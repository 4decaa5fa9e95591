"""What a checkpoint says of rows, new ones or those it was trained on: their components and their log-density."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchmetrics import MeanMetric

from tgmm_nn.classifier import MixtureClassifier
from tgmm_nn.experiments.networks import as_input
from tgmm_nn.experiments.options import KEYS_OF, OF_TRAINING_ALONE, build, key_of, printable, read_checkpoint
from tgmm_nn.experiments.reports import Row, clustering_scores, format_table
from tgmm_nn.experiments.resuming import check_width, config_of
from tgmm_nn.experiments.rows import RowsDataModule
from tgmm_nn.experiments.running import contents, open_folder, write_results
from tgmm_nn.metrics import EffectiveComponents, NegativeLogLikelihood
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.outliers import OutlierScore

__all__ = ["evaluate", "rebuild", "score_rows"]

# Groups of the config that say what the model is.
OF_BUILDING = ("model", "gmm", "prior")
OF_MODEL = (*OF_BUILDING, "experiment")
# What the choice of an option of such a group decides.
DECIDED_BY = {
    "experiment": ("model._target_", "gmm._target_"),
    "model": ("model._target_",),
    "gmm": ("gmm._target_",),
    "prior": tuple(f"prior.{name}" for name in KEYS_OF["prior"]),
}
# A row is an outlier where the log-density is below that of this share of the mixture's own samples.
OUTLIER_SHARE = 0.05
N_SAMPLES = 10_000


class Scores(NamedTuple):
    """What a mixture says of a batch.

    The most probable component, its probability and the log-density in nats, each ``(B,)``, the responsibilities
    ``(B, K)``, and of a classifier the predicted class ``(B,)``.
    """

    component: Tensor
    probability: Tensor
    log_density: Tensor
    responsibilities: Tensor
    by_class: Tensor | None


def evaluate(cfg: DictConfig, data: RowsDataModule, overrides: Sequence[str]) -> list[Row]:
    """Score all rows by a checkpoint, batch by batch, and write what it says of them into the run's folder.

    ``assignments.csv`` has the most probable component of each row, its probability, the predicted class where the
    model is a classifier, and the label where there is one. ``log_density.csv`` has the log-density of each row's
    embedding in nats, and whether it is an outlier: less likely than 95 % of the mixture's own samples.

    Args:
        cfg: The config; the model is that of the ``config.yaml`` beside the checkpoint's folder, where it is there.
        data: The rows, in the units of those of the training; they are scaled as those were.
        overrides: What the command line said: an option of another model than the checkpoint's is refused.

    Returns:
        A table of one row: number of rows, mean log-density, effective number of components, share of outliers and,
        with labels, how they agree with the components or predicted classes.

    Raises:
        ValueError: If there is no checkpoint, it holds another model, or its mixture was never started.
    """
    if cfg.ckpt_path is None:
        raise ValueError("Expected `ckpt_path` with train=false, the checkpoint to score rows by, but got None.")
    trainer: lightning.Trainer = build(cfg.trainer, logger=False)  # knows the device, and the precision
    model = rebuild(cfg, read_checkpoint(cfg.ckpt_path), data, overrides).eval().to(trainer.strategy.root_device)
    trainer.precision_plugin.convert_module(model)
    folder = Path(cfg.paths.output_dir)
    open_folder(folder, printable(_as_used(cfg)))
    print(data.description(), flush=True)
    rows = [score_rows(model, data, folder)]
    write_results(rows, folder)
    print(f"\n{format_table(rows)}\n\nEverything lies in {folder}\n{contents(folder)}")
    return rows


def rebuild(
    cfg: DictConfig, checkpoint: Any, data: RowsDataModule, overrides: Sequence[str]
) -> lightning.LightningModule:
    """Return the model of a checkpoint, scale the rows as those that it was trained on, and put both in the config.

    Raises:
        TypeError: If the config is of what is not trained.
        ValueError: If the checkpoint is of no run, of another model, or of rows of another width.
    """
    expected = "Expected `ckpt_path` to be"
    path = Path(str(cfg.ckpt_path))
    scaling = _scaling_of(checkpoint)
    if scaling is None:
        raise ValueError(
            f"{expected} a checkpoint of a run, with the model and the scaling of its rows, but got {path}."
        )
    saved = config_of(path)
    alone = ""
    if saved is None:
        alone = (
            f"; the config.yaml of its run is not beside it in {path.absolute().parent}: put it there, or give "
            "experiment=NAME and all else as the checkpoint was trained"
        )
        cfg.inputs = {**data.inputs(), "n_classes": data.n_classes or cfg.inputs.n_classes}
    else:
        _check_overrides(cfg, saved, overrides)
        check_width(saved, data, path)
        for group in (*OF_BUILDING, "inputs"):
            cfg[group] = saved[group]
    model = build(cfg.model)
    if not isinstance(model, lightning.LightningModule):
        raise TypeError(f"Expected `model` with train=false to be one that is trained, but got {type(model).__name__}.")
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{expected} a checkpoint of a {type(model).__name__} as the config has it, but {path} is not: {said:.300}"
            f"{alone}"
        ) from error
    if not _mixture(model).fitted_:
        raise ValueError(f"{expected} one whose mixture has been started, but EM had not begun when {path} was saved.")
    data.load_state_dict({"scaling": scaling})
    return model


@torch.no_grad()
def score_rows(model: lightning.LightningModule, data: RowsDataModule, folder: Path) -> Row:
    """Write ``assignments.csv`` and ``log_density.csv``, and return the table's row; memory is that of a batch.

    Only the component or class of each row, an integer, is kept to the end.
    """
    mixture = _mixture(model)
    samples, _ = mixture.sample(N_SAMPLES, generator=torch.Generator(mixture.means_.device).manual_seed(0))
    outlier = OutlierScore(mixture).calibrate(samples, quantile=1.0 - OUTLIER_SHARE)
    density, spread, outside = NegativeLogLikelihood(), EffectiveComponents(mixture.n_components), MeanMetric()
    found: list[Tensor] = []
    folder.mkdir(parents=True, exist_ok=True)
    with _CsvWriter(folder / "assignments.csv") as assignments, _CsvWriter(folder / "log_density.csv") as densities:
        for scores, label in _batches(model, data):
            is_outlier = ~(-scores.log_density <= outlier.threshold)
            own = {"component": scores.component, "probability": scores.probability, "class": scores.by_class}
            assignments.write({**own, "label": label})
            densities.write({"log_density": scores.log_density, "outlier": is_outlier.int()})
            density.update(scores.log_density.cpu())
            spread.update(scores.responsibilities.cpu())
            outside.update(is_outlier.float().cpu())
            found.append((scores.component if scores.by_class is None else scores.by_class).cpu())
    return {
        "method": "mixture of the checkpoint",
        "rows": len(data.rows),
        "log-density": -float(density.compute()),
        "effective components": float(spread.compute()),
        "outliers": float(outside.compute()),
        **_agreement(torch.cat(found), data.labels, model),
    }


class _CsvWriter:
    """A file of comma-separated columns, which is written batch by batch, each row behind its place.

    Where an error ends it, half a file is none: it is removed.

    Args:
        file: Where it goes.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.n_rows = file, 0

    def __enter__(self) -> _CsvWriter:
        self._stream = self.file.open("w", newline="")
        self._writer = csv.writer(self._stream)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.close()
        if kind is not None:
            self.file.unlink()

    def write(self, columns: dict[str, Tensor | None]) -> None:
        """Append columns ``(B,)``, those that are not None; floats with the seven digits that float32 holds."""
        there = {name: column.tolist() for name, column in columns.items() if column is not None}
        if not self.n_rows:
            self._writer.writerow(["row", *there])
        for row in zip(*there.values(), strict=True):
            self._writer.writerow([self.n_rows, *(f"{v:.7g}" if isinstance(v, float) else v for v in row)])
            self.n_rows += 1


def _batches(model: Any, data: RowsDataModule) -> Iterator[tuple[Scores, Tensor | None]]:
    """Give what the model says of all rows, in their order and a batch at a time, with their labels."""
    density, mixture, start = _density(model), _mixture(model), 0
    for number, rows in enumerate(data.rows.chunks(data.batch_size)):
        z = model.predict_step({"x": as_input(model, rows)}, number)
        joint = mixture.log_joint(z)
        _check_reach(joint.logsumexp(-1), data, start)
        r = joint.softmax(-1)
        probability, component = r.max(-1)
        by_class = density.predict(z) if isinstance(density, MixtureClassifier) else None
        labels = None if data.labels is None else data.labels[start : start + len(rows)]
        start += len(rows)
        yield Scores(component, probability, joint.logsumexp(-1), r, by_class), labels


def _agreement(found: Tensor, labels: Tensor | None, model: Any) -> dict[str, float]:
    """Return scores of clusters, or of predicted classes, among rows with a label that the model knows."""
    density = _density(model)
    if labels is None:
        return {}
    if not isinstance(density, MixtureClassifier):
        return clustering_scores(found, labels)
    known = (labels >= 0) & (labels < density.n_classes)
    return {"accuracy": float((found[known] == labels[known]).float().mean())}


def _density(model: Any) -> GaussianMixture | MixtureClassifier:
    """Return what an experiment's model knows of its embeddings."""
    return model.density if hasattr(model, "density") else model.gmm


def _mixture(model: Any) -> GaussianMixture:
    density = _density(model)
    return density.mixture if isinstance(density, MixtureClassifier) else density


def _check_reach(log_density: Tensor, data: RowsDataModule, start: int) -> None:
    """Raise if a row of a batch is so far from the mixture that it has no log-density."""
    bad = (~torch.isfinite(log_density)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"Expected `x` of {data.rows.source} with rows like those of the training, but the log-density of row "
            f"{data.rows.name_of(start + bad[0])} is {float(log_density[bad[0]])}; rescale the rows, or drop it."
        )


def _as_used(cfg: DictConfig) -> DictConfig:
    """Return a config without what only a training uses."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in OF_TRAINING_ALONE])


def _scaling_of(checkpoint: Any) -> dict[str, Tensor] | None:
    """Return the scaling of rows that the data of a run left in its checkpoint, under the name of their class."""
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        return None
    parts = (part["scaling"] for part in checkpoint.values() if isinstance(part, dict) and "scaling" in part)
    return next(parts, None)


def _check_overrides(cfg: DictConfig, saved: DictConfig, overrides: Sequence[str]) -> None:
    """Raise if the command line asks for another model than the checkpoint's: it would be ignored in silence."""
    for override in overrides:
        key = key_of(override)
        group = key.split(".")[0]
        if group not in OF_MODEL:
            continue
        # What is asked for, in the checkpoint's surroundings: a reference to another group means that group of its run.
        asked = cfg if group == "experiment" else OmegaConf.merge(saved, {group: cfg[group]})
        for name in DECIDED_BY.get(key, (key,)):
            was, wanted = OmegaConf.select(saved, name), OmegaConf.select(asked, name)
            if was != wanted:
                raise ValueError(
                    f"Expected `{name}` as the checkpoint was trained with, {was!r}, but got {wanted!r} by {override}; "
                    "with train=false the model is the checkpoint's: leave it out."
                )
