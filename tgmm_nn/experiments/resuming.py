"""What a checkpoint decides when it is taken up again, against what the config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from tgmm_nn.experiments.options import read_checkpoint
from tgmm_nn.experiments.rows import RowsDataModule

__all__ = ["check_resume", "check_width", "config_of"]

# What a resume takes from the checkpoint whatever the config says, and what carries it there.
RESTORED = {
    "model._target_": "the model",
    "gmm.n_components": "the mixture",
    "gmm.covariance_type": "the mixture",
    "model.learning_rate": "the optimizer",
    "model.weight_decay": "the optimizer",
    "data.scale": "the scaling of the rows",
}
# How a mixture starts, which is over once EM has started it.
OF_START = dict.fromkeys(
    ("gmm.n_init", "gmm.init_means", "gmm.init_weights", "gmm.init_covariances"), "the mixture, as it was started,"
)


def config_of(checkpoint: Path) -> DictConfig | None:
    """Return the config of the run that saved a checkpoint, which lies in its folder; None where it does not."""
    for folder in checkpoint.absolute().parents[:2]:
        if (folder / "config.yaml").is_file():
            try:
                config = OmegaConf.load(folder / "config.yaml")
            except YAMLError as error:
                raise ValueError(
                    f"Expected the config.yaml of the run that saved {checkpoint} in {folder}, but it is no YAML; mend "
                    "it, or move it away."
                ) from error
            return config if isinstance(config, DictConfig) and "model" in config and "inputs" in config else None
    return None


def check_width(saved: DictConfig, data: RowsDataModule, checkpoint: Path) -> None:
    """Raise if rows have another width than those that a checkpoint was trained on.

    Raises:
        ValueError: With the file of the rows.
    """
    if saved.inputs.n_features != data.n_features:
        raise ValueError(
            f"Expected `x` of {data.rows.source} with {saved.inputs.n_features} features, those that {checkpoint} was "
            f"trained on, but got {data.n_features}; name rows like those of the training by data and data.path."
        )


def check_resume(cfg: DictConfig, data: RowsDataModule) -> None:
    """Raise if a training that is resumed would ignore an option, or if its rows do not fit.

    Nothing is compared where the ``config.yaml`` of the run is not beside its checkpoint's folder.

    Args:
        cfg: The config of the run that goes on.
        data: Its rows.

    Raises:
        ValueError: If the config differs from that of the checkpoint's run in what the checkpoint restores.
    """
    path = Path(str(cfg.ckpt_path))
    saved = config_of(path)
    if saved is None:
        return
    check_width(saved, data, path)
    started = _is_started(read_checkpoint(path)) and not cfg.em.get("refit")
    for name, part in (RESTORED | OF_START if started else RESTORED).items():
        group, _, key = name.partition(".")
        if key not in (saved.get(group) or {}) or key not in cfg[group]:
            continue
        was, wanted = OmegaConf.select(saved, name), OmegaConf.select(cfg, name)
        if was != wanted:
            raise ValueError(
                f"Expected `{name}` as the checkpoint was trained with, {was!r}, but got {wanted!r}; a resume goes on "
                f"with {part} of {path}: {_how_to_repeat(name, was)}, or start anew without ckpt_path."
            )


def _how_to_repeat(name: str, value: Any) -> str:
    """Return what makes an option what it was."""
    if name == "model._target_":
        return "give the experiment that it is of"
    return f"set {name}={'null' if value is None else value}"


def _is_started(checkpoint: dict[str, Any]) -> bool:
    """Return whether EM had started the mixture of a checkpoint."""
    return any(bool(value) for name, value in checkpoint["state_dict"].items() if name.split(".")[-1] == "fitted")
