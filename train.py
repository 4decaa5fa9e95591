"""Run an experiment: ``python train.py [experiment=NAME] [seed=1] [gmm.n_components=12] [ckpt_path=FILE] ...``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from threadpoolctl import threadpool_limits

from tgmm_nn.experiments.errors import explain
from tgmm_nn.experiments.evaluation import evaluate
from tgmm_nn.experiments.options import (
    build,
    build_named,
    check_keys,
    check_overrides,
    check_values,
    check_words,
    key_of,
    printable,
)
from tgmm_nn.experiments.reports import Row, format_table, matching_hint
from tgmm_nn.experiments.resuming import check_resume
from tgmm_nn.experiments.running import check_launcher, contents, discard, fit, make_report, open_folder
from tgmm_nn.experiments.sweeps import SweepTable

# Hints of Lightning and torchmetrics that do not apply: data in memory, short epochs, a run's own folder.
NOT_FOR_US = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*exists and is not empty.*",  # it holds config.yaml; a folder of an earlier run is refused
    ".*LeafSpec.*is deprecated.*",
    "Sparse invariant checks.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",  # Ctrl-C's: the README says how it goes on
    "The dirpath has changed.*",  # a resumed run writes into a folder of its own
)


def train(cfg: DictConfig) -> list[Row]:
    """Build what the config says, train, and report; everything is written to the run's folder."""
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
        threadpool_limits(cfg.num_threads)  # scikit-learn's and NumPy's
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    overrides = HydraConfig.get().overrides.task
    if not sys.stdout.isatty() and "trainer.enable_progress_bar" not in map(key_of, overrides):
        cfg.trainer.enable_progress_bar = False  # in a file it would be a line for each of its states
    data = build(cfg.data)
    if not cfg.train:
        return evaluate(cfg, data, overrides)
    if cfg.ckpt_path is not None:
        check_resume(cfg, data)
    cfg.inputs = data.inputs()
    model = build(cfg.model)
    others = {f"callbacks.{name}": node for name, node in cfg.callbacks.items()}
    callbacks = build_named(lightning.Callback, {"em": cfg.em, "metrics": cfg.metrics, **others})
    loggers = build_named(Logger, {f"logger.{name}": node for name, node in cfg.logger.items()})
    trainer = build(cfg.trainer, callbacks=callbacks, logger=loggers)
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    check_launcher(trainer, in_sweep=in_sweep)

    folder = Path(cfg.paths.output_dir)
    if trainer.is_global_zero:
        text = open_folder(folder, printable(cfg))
        # Hydra has named each run of a sweep, and what it overrides.
        print(data.description() if in_sweep else f"{text}\n{data.description()}", flush=True)

    if isinstance(model, lightning.LightningModule):  # a choice among mixtures has nothing to train
        fit(trainer, model, data, cfg.ckpt_path)
    if not trainer.is_global_zero:
        return []

    rows = make_report(trainer, model, data, folder, cfg.seed)
    hint = matching_hint(model.gmm.n_components, data.labels) if "accuracy" in rows[0] and hasattr(model, "gmm") else ""
    said = (format_table(rows), hint, f"Everything lies in {folder}\n{contents(folder)}")
    print("\n" + "\n\n".join(filter(None, said)))
    return rows


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Check the config and train; a run with a wrong option leaves nothing behind."""
    for hint in NOT_FOR_US:
        warnings.filterwarnings("ignore", message=hint)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        check_keys(cfg)
        check_values(cfg)
        check_overrides(cfg, HydraConfig.get().overrides.task)
        train(cfg)
    except (KeyboardInterrupt, SystemExit):
        discard(Path(HydraConfig.get().runtime.output_dir))
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # a sweep makes its other runs, and then fails
        discard(Path(HydraConfig.get().runtime.output_dir))
        sys.exit(sentence)


def run() -> None:
    """Run ``main``; a wrong option ends with exit code 1 and one sentence, which a traceback would only hide."""
    warnings.filterwarnings("error", message="Callback SweepTable")  # Hydra would go on without the table
    if "HYDRA_FULL_ERROR" in os.environ:
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra prints errors in words of its own unless it may raise them
    try:
        check_words(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        SweepTable.end_early(interrupted=True)
        sys.exit("\nInterrupted.")
    except SystemExit:
        SweepTable.end_early(interrupted=True)
        raise
    except Exception as error:
        SweepTable.end_early()
        sentence = explain(error)
        if sentence is None:
            raise
        sys.exit(sentence)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


if __name__ == "__main__":
    run()
