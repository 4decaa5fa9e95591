"""Run an experiment: ``python train.py [experiment=NAME] [seed=1] [gmm.n_components=12] [ckpt_path=FILE] ...``."""

from __future__ import annotations

import csv
import difflib
import logging
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import hydra
import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from threadpoolctl import threadpool_limits

from tgmm_nn.checks import check_integer
from tgmm_nn.experiments.reports import Row, format_table, plot_metrics

KEYS = (
    "name", "seed", "num_threads", "train", "ckpt_path", "inputs",
    "data", "model", "gmm", "callbacks", "logger", "trainer", "paths",
)  # fmt: skip


# Hints of Lightning and torchmetrics that do not apply: data in memory, short epochs, a run's own folder.
NOT_FOR_US = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*exists and is not empty.*",  # it holds config.yaml; a folder with an earlier run's metrics is refused
    ".*LeafSpec.*is deprecated.*",
    "Sparse invariant checks.*",
    "The dirpath has changed.*",  # a resumed run writes into a folder of its own
)


def check_keys(cfg: DictConfig) -> None:
    """Raise if the config's top has a key that nothing reads, which Hydra accepts from an experiment file."""
    for key in map(str, cfg):
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Expected the config's top-level keys to be among {', '.join(KEYS)}, but got {key!r}{hint}"
            )
    for key in map(str, cfg.paths):
        if key != "output_dir":
            raise ValueError(f"Expected the config's `paths` to hold output_dir alone, but got {key!r}")


def check_values(cfg: DictConfig) -> None:
    """Raise if a value that no constructor of ours checks has the wrong type, or if a checkpoint does not exist."""
    check_integer("seed", cfg.seed, minimum=0, maximum=2**32 - 1)
    check_integer("num_threads", cfg.num_threads, optional=True)
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, minimum=-1)
    if cfg.ckpt_path is None:
        return
    if not Path(str(cfg.ckpt_path)).is_file():
        raise ValueError(f"Expected `ckpt_path` to be a file, but got {cfg.ckpt_path!r}.")
    try:
        torch.load(cfg.ckpt_path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"Expected `ckpt_path` to be a checkpoint of a run, but got {cfg.ckpt_path!r}.") from error


def build(node: DictConfig | None, **options: Any) -> Any:
    """Instantiate a node of the config, as plain containers: a DictConfig in a state would not load as weights only."""
    return None if node is None else hydra.utils.instantiate(node, _convert_="all", **options)


def train(cfg: DictConfig) -> list[Row]:
    """Build what the config says, train, and report; everything is written to the run's folder."""
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
        threadpool_limits(cfg.num_threads)  # scikit-learn's and NumPy's
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build(cfg.data)
    cfg.inputs = data.inputs()
    model = build(cfg.model)
    callbacks = {name: callback for name, callback in build(cfg.callbacks).items() if callback is not None}
    for name, callback in callbacks.items():
        if not isinstance(callback, lightning.Callback):
            raise TypeError(f"Expected `callbacks.{name}` to build a callback, but got {callback!r}.")
    trainer = build(cfg.trainer, callbacks=list(callbacks.values()), logger=build(cfg.get("logger")) or False)

    folder = Path(cfg.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "metrics.csv").exists():
        raise ValueError(f"Expected `hydra.run.dir` to be new, but {folder} holds the metrics of an earlier run.")
    resolved = OmegaConf.to_yaml(cfg, resolve=True)
    (folder / "config.yaml").write_text(resolved)
    print(resolved, flush=True)

    try:
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        latest = getattr(trainer.checkpoint_callback, "best_model_path", "")
        hint = f"; resume with ckpt_path={latest}" if latest else ""
        print(f"\nInterrupted in epoch {trainer.current_epoch}{hint}", file=sys.stderr)
        raise
    if not trainer.is_global_zero:
        return []

    rows: list[Row] = model.report(data, folder, cfg.seed)
    write_results(rows, folder)
    print(f"\n{format_table(rows)}\n\nEverything lies in {folder}")
    return rows


def write_results(rows: list[Row], folder: Path) -> None:
    """Write the table of the end of a run, and the curves."""
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if (folder / "metrics.csv").exists():
        plot_metrics(folder / "metrics.csv", folder / "curves.png")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Compose the config and train."""
    for hint in NOT_FOR_US:
        warnings.filterwarnings("ignore", message=hint)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        check_keys(cfg)
        check_values(cfg)
        train(cfg)
    except (TypeError, ValueError, RuntimeError) as error:
        # A wrong option, in the words of our own checks or of load_state_dict: a traceback would only hide them.
        if not str(error).startswith(("Expected `", "Expected the config", "Error(s) in loading state_dict")):
            raise
        sys.exit(str(error))


if __name__ == "__main__":
    main()
