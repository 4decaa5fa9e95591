"""What happens around a training: where it writes, how it is interrupted, what it says at its end."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException

from tgmm_nn.experiments.drawing import plot_metrics
from tgmm_nn.experiments.interrupt import InterruptCheckpoint
from tgmm_nn.experiments.options import read_checkpoint
from tgmm_nn.experiments.reports import Row, column_names, format_table

__all__ = [
    "check_launcher",
    "contents",
    "discard",
    "fit",
    "make_report",
    "open_folder",
    "resume_command",
    "words_of_run",
    "write_results",
]

# What lies in a run's folder, a word each; the first pattern that fits counts.
CONTENTS = (
    ("config.yaml", "every option of the run, and its command"),
    ("results.csv", "the table"),
    ("metrics.csv", "what was logged in each epoch"),
    ("curves.png", "loss, likelihood and scores by epoch"),
    ("latent.png", "embeddings by component and by class"),
    ("latent_epoch_*.png", "embeddings while training went on"),
    ("latent.gif", "the same as an animation"),
    ("latent_frames/*", "what the animation is drawn from"),
    ("density.png", "density of the embeddings, and outliers"),
    ("contingency.png", "component × class"),
    ("samples.png", "samples of the mixture"),
    ("weights.csv", "weight of each component by epoch"),
    ("weights.png", "the same as a picture, with births and deaths"),
    ("components.png", "image of each component"),
    ("outliers.png", "outlier scores"),
    ("classes.png", "predicted class × class"),
    ("criterion.csv", "the criterion of each fit"),
    ("criterion.png", "the criterion over the number of components"),
    ("assignments.csv", "component of each row, and its probability"),
    ("log_density.csv", "log-density of each row in nats, and whether it is an outlier"),
    ("checkpoints/*.ckpt", "resumes by ckpt_path=FILE"),
    ("hparams.yaml", "for the logger"),
    ("tensorboard/*", "for `tensorboard --logdir`"),
    ("wandb/*", "for `wandb sync`"),
)
# How the config.yaml of a run begins.
WRITTEN = "# python "
# Hydra's own words that say how a sweep is made, or where a run writes.
OF_SWEEP = ("hydra.mode=", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher", "hydra.run.dir=")
# What Hydra and we write before training starts.
BEFORE_TRAINING = {".hydra", "config.yaml", "hparams.yaml", "multirun.yaml"}


def check_launcher(trainer: lightning.Trainer, *, in_sweep: bool) -> None:
    """Raise if the processes of a trainer would each start a sweep again.

    Raises:
        ValueError: In a sweep, if the trainer launches its processes by this program's own command line.
    """
    launcher = trainer.strategy.launcher
    # Lightning offers no public name for it.
    if in_sweep and type(launcher).__name__ == "_SubprocessScriptLauncher" and trainer.world_size > 1:
        raise ValueError(
            "Expected a sweep with trainer.strategy=ddp_fork or ddp_spawn, or with one device, but got a strategy that "
            "starts this command, and with it the whole sweep, again in each process; choose one of these, or make the "
            "runs one by one."
        )


def open_folder(folder: Path, config: str) -> str:
    """Make a run's folder, write ``config.yaml``, and return what it holds: the command, and each option.

    Raises:
        ValueError: If an earlier run's config or metrics lie there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.csv", "config.yaml"):
        if (folder / name).exists():
            raise ValueError(f"Expected `hydra.run.dir` to be new, but {folder} holds the {name} of an earlier run.")
    text = f"# {_command(sys.argv)}\n{config}"
    (folder / "config.yaml").write_text(text)
    return text


def discard(folder: Path) -> None:
    """Remove the folder of a run that never trained and, below the current folder, those above that are left empty.

    Nothing is removed from a folder in which anything else lies, a config.yaml that no run wrote included.
    """
    if not folder.is_dir() or any(path.name not in BEFORE_TRAINING for path in folder.iterdir()):
        return
    config = folder / "config.yaml"
    if config.exists() and not config.read_text().startswith(WRITTEN):
        return
    shutil.rmtree(folder)
    for above in folder.parents:
        if Path.cwd() not in above.parents or any(above.iterdir()):
            return
        above.rmdir()


def fit(
    trainer: lightning.Trainer,
    model: lightning.LightningModule,
    data: lightning.LightningDataModule,
    ckpt_path: str | None,
) -> None:
    """Train; after Ctrl-C say how to resume, and where a checkpoint leaves nothing to train, say so.

    Raises:
        SystemExit: After Ctrl-C, with code 1.
    """
    done = None if ckpt_path is None else read_checkpoint(ckpt_path)["global_step"]
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except MisconfigurationException as error:
        if "restored a checkpoint with current_epoch" not in str(error):
            raise
        raise ValueError(
            f"Expected `trainer.max_epochs` above the epochs that {ckpt_path} has behind it, but got "
            f"{trainer.max_epochs}; raise it to go on."
        ) from error
    except (KeyboardInterrupt, SystemExit):
        where = f"Interrupted in epoch {trainer.current_epoch}"
        checkpoint = _latest_checkpoint(trainer)
        if checkpoint is None:
            print(f"\n{where}, before a checkpoint was saved.", file=sys.stderr)
        else:
            print(f"\n{where}; resume by\n  {resume_command(_own_words(), checkpoint)}", file=sys.stderr)
        raise SystemExit(1) from None
    if model.dtype in (torch.bfloat16, torch.float16):
        model.float()  # for the report: NumPy has no bfloat16
    if done == trainer.global_step:
        print(
            f"\nNothing was trained: {ckpt_path} had finished its {trainer.current_epoch} epochs; to go on, raise "
            f"trainer.max_epochs above {trainer.max_epochs}."
        )


def make_report(
    trainer: lightning.Trainer, model: Any, data: lightning.LightningDataModule, folder: Path, seed: int
) -> list[Row]:
    """Return the table of a run and write what goes with it; after Ctrl-C say how to make the report again.

    Raises:
        SystemExit: After Ctrl-C, with code 1.
    """
    try:
        rows: list[Row] = model.report(data, folder, seed)
        write_results(rows, folder)
    except KeyboardInterrupt:
        checkpoint = _latest_checkpoint(trainer)
        if not isinstance(model, lightning.LightningModule):
            said = "Interrupted before there was a table."
        elif checkpoint is None:
            said = "Interrupted while the report was made; training is finished, but no checkpoint was saved."
        else:
            again = resume_command(_own_words(), checkpoint)
            said = f"Interrupted while the report was made; training is finished. Make the report again by\n  {again}"
        print(f"\n{said}", file=sys.stderr)
        raise SystemExit(1) from None
    return rows


def words_of_run(argv: Sequence[str], overrides: Sequence[str], of_hydra: Sequence[str]) -> list[str]:
    """Return the command line that makes one run of a sweep alone.

    Args:
        argv: The command line of the sweep.
        overrides: What the run overrides.
        of_hydra: What it overrides of Hydra's own options.

    Example:
        >>> words_of_run(["train.py", "-m", "seed=0,1", "-cd", "mine"], ["seed=1"], ["hydra.mode=MULTIRUN"])
        ['train.py', '-cd', 'mine', 'seed=1']
    """
    flags = [word for word in argv[1:] if word.startswith("-") or not ("=" in word or word.startswith("~"))]
    flags = [word for word in flags if word not in ("-m", "--multirun")]
    kept = [word for word in of_hydra if not word.startswith(OF_SWEEP)]
    single = ["hydra.mode=RUN"] if any(word.startswith("hparams_search=") for word in overrides) else []
    return [argv[0], *flags, *kept, *overrides, *single]


def resume_command(argv: Sequence[str], checkpoint: Path) -> str:
    """Return the command that goes on from a checkpoint, into a folder of its own.

    Example:
        >>> resume_command(["train.py", "seed=1", "ckpt_path=old.ckpt"], Path("run/last.ckpt"))
        'python train.py seed=1 ckpt_path=run/last.ckpt'
    """
    kept = [text for text in argv if not text.startswith(("ckpt_path=", "hydra.run.dir="))]
    return _command([*kept, f"ckpt_path={_quoted(str(checkpoint))}"])


def write_results(rows: list[Row], folder: Path) -> None:
    """Write the table of the end of a run, and the curves."""
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=column_names(rows))
        writer.writeheader()
        writer.writerows(rows)
    if (folder / "metrics.csv").exists():
        plot_metrics(folder / "metrics.csv", folder / "curves.png")


def contents(folder: Path) -> str:
    """Return what lies in a run's folder, a line for each kind of file."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [file for file in files if file.parts[0] != ".hydra"]
    rows: list[Row] = []
    for pattern, word in CONTENTS:
        found = [file for file in files if file.match(pattern)]
        files = [file for file in files if file not in found]
        if found:
            rows.append({"file": str(found[0]) if len(found) == 1 else f"{pattern} ({len(found)})", "what": word})
    rows += [{"file": str(file), "what": ""} for file in files]
    return "\n".join(f"  {line}" for line in format_table(rows).splitlines()[1:])


def _command(argv: Sequence[str]) -> str:
    return f"python {shlex.join(argv)}"


def _quoted(text: str) -> str:
    """Return a text as Hydra's grammar reads it: quoted unless it is a plain word."""
    if re.fullmatch(r"[A-Za-z0-9/:_.%@-]+", text):
        return text
    # Backslashes are themselves, but in front of a quote, where they are doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def _own_words() -> Sequence[str]:
    """Return the command line of this run, alone where it is one of a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return sys.argv
    overrides = HydraConfig.get().overrides
    return words_of_run(sys.argv, list(overrides.task), list(overrides.hydra))


def _latest_checkpoint(trainer: lightning.Trainer) -> Path | None:
    """Return what Ctrl-C saved, or else the last checkpoint of an epoch."""
    callbacks: list[lightning.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, InterruptCheckpoint) and callback.saved is not None:
            return callback.saved
    latest = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return Path(latest) if latest else None
