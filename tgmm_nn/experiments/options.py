"""What the config of a run says: checked before anything is built, built, and printed."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from tgmm_nn.checks import check_bool, check_integer, check_string
from tgmm_nn.experiments.errors import RESERVED, unknown_key

__all__ = [
    "build",
    "build_named",
    "check_keys",
    "check_overrides",
    "check_values",
    "check_words",
    "key_of",
    "printable",
    "read_checkpoint",
]

# Groups of which an option is always chosen.
GROUPS = (
    *("data", "model", "prior", "gmm", "em", "metrics", "callbacks", "logger", "trainer", "paths", "hydra"),
    "experiment",
)
# Keys of the config's top, and of the groups that build nothing. Hydra takes any key from an experiment file.
KEYS = (
    *("name", "seed", "num_threads", "train", "ckpt_path", "inputs", "data", "model", "prior", "gmm", "em", "metrics"),
    *("callbacks", "logger", "trainer", "paths"),
)
KEYS_OF = {
    "inputs": ("n_features", "image_shape", "n_classes", "targets"),
    "paths": ("output_dir",),
    "prior": ("weight_concentration", "mean", "mean_precision", "covariance", "degrees_of_freedom"),
}
# With train=false: groups that have no say, with why, and what counts of those that have.
OF_TRAINING_ALONE = ("em", "metrics", "callbacks", "logger")
OF_TRAINING = dict.fromkeys((*OF_TRAINING_ALONE, "debug"), "which trains and logs nothing") | {
    "data": "which scores all rows, scaled as those of the training",
    "trainer": "which takes a device and a precision alone",
}
OF_EVALUATION = (
    *("data", "data._target_", "data.path", "data.batch_size"),
    *("trainer", "trainer._target_", "trainer.accelerator", "trainer.devices", "trainer.strategy"),
    *("trainer.precision", "trainer.enable_progress_bar"),
)


# ------------------------------------------------------------------------------------------------------------- checks


def check_words(words: Sequence[str]) -> None:
    """Raise if words of the command line are no overrides, in a way that Hydra has no clear words for.

    Raises:
        ValueError: If a key stands behind dashes, or a group is given no option.
    """
    for place, word in enumerate(words):
        key, equals, value = word.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if key.startswith("--") and ("." in name or name in KEYS):
            meant = value if equals else next(iter(words[place + 1 : place + 2]), "VALUE")
            raise ValueError(f"Expected options as KEY=VALUE, without dashes, but got {word!r}; write {name}={meant}.")
        if key in GROUPS and value == "null":
            raise ValueError(f"Expected `{key}` to name an option, but got null; name one, or leave it out.")


def check_keys(cfg: DictConfig) -> None:
    """Raise if the config has a key that nothing reads, at its top or in a node that builds something.

    Raises:
        ValueError: With the nearest known key.
    """
    _check_known("the config's top", map(str, cfg), KEYS)
    for group, known in KEYS_OF.items():
        _check_known(f"the config's `{group}`", map(str, cfg.get(group) or ()), known)
    for path, node in _targets(OmegaConf.to_container(cfg, resolve=False)):
        parameters = _parameters(node["_target_"])
        if parameters is not None:
            _check_known(f"the config's `{path}`", (key for key in node if key not in RESERVED), parameters)


def check_values(cfg: DictConfig) -> None:
    """Raise if a value that no constructor of ours checks has the wrong type, or if a checkpoint cannot be read."""
    check_integer("seed", cfg.seed, minimum=0, maximum=2**32 - 1)
    check_integer("num_threads", cfg.num_threads, optional=True)
    check_bool("train", cfg.train)
    check_string("name", cfg.name)
    check_string("paths.output_dir", cfg.paths.output_dir)
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, minimum=-1)
    check_integer("trainer.accumulate_grad_batches", cfg.trainer.accumulate_grad_batches)
    check_integer("trainer.log_every_n_steps", cfg.trainer.log_every_n_steps, minimum=0)
    _check_cpus(cfg.trainer)
    if cfg.ckpt_path is not None:
        read_checkpoint(cfg.ckpt_path)


def check_overrides(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Raise if the command line sets what a run decides itself or, with ``train=false``, what then has no effect.

    Args:
        cfg: The config.
        overrides: What the command line says.

    Raises:
        ValueError: With the name of the key.
    """
    for override in overrides:
        key = key_of(override)
        if key.split(".")[0] == "inputs":
            raise ValueError(
                f"Expected no `{key}`, which a run takes from its data, but got {override!r}; leave it out."
            )
        why = OF_TRAINING.get(key.split(".")[0])
        if not cfg.train and why and key not in OF_EVALUATION:
            raise ValueError(f"Expected no `{key}` with train=false, {why}, but got {override!r}; leave it out.")


def key_of(override: str) -> str:
    """Return the key that an override sets.

    Example:
        >>> key_of("+gmm.n_components=3")
        'gmm.n_components'
    """
    return override.lstrip("+~").split("=", 1)[0]


def read_checkpoint(path: Any) -> dict[str, Any]:
    """Return what a run saved, on the CPU; nothing in the file is executed.

    Raises:
        ValueError: If there is no file, or it is no checkpoint of a run.
    """
    if not Path(str(path)).is_file():
        raise ValueError(f"Expected `ckpt_path` to be a file, but got {path!r}.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not {"state_dict", "global_step"} <= set(saved):
            raise KeyError("state_dict")
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"Expected `ckpt_path` to be a checkpoint of a run, but got {path!r}.") from error
    return dict(saved)


def _check_cpus(trainer: DictConfig) -> None:
    """Raise if a trainer takes more processes on the CPU than it has cores: the first would wait for all the others."""
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available())
    most = max(2, os.cpu_count() or 1)  # two, to try what several do, run on any machine
    if on_cpu and str(trainer.devices).isdigit() and int(trainer.devices) > most:
        raise ValueError(
            f"Expected `trainer.devices` of at most {most} on this machine's CPU, but got {trainer.devices}: each is a "
            "process of its own."
        )


def _check_known(where: str, keys: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in keys:
        if key not in known:
            raise ValueError(unknown_key(where, key, difflib.get_close_matches(key, known, n=1), known))


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each node that builds something, with its dotted name."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))


def _parameters(target: str) -> list[str] | None:
    """Return the names that a constructor takes; None where it takes any, or cannot be imported: building it tells."""
    try:
        parameters = inspect.signature(hydra.utils.get_object(target)).parameters.values()
    except Exception:
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in parameters]


# ----------------------------------------------------------------------------------------------------- build and print


def build(node: Any, **options: Any) -> Any:
    """Instantiate a node, as plain containers: a DictConfig in a state would not load as weights only.

    A node whose ``_target_`` is null is switched off, and gives None; what is no node stays what it is.
    """
    if not isinstance(node, DictConfig):
        return node
    if "_target_" in node and node["_target_"] is None:
        return None
    return hydra.utils.instantiate(node, _convert_="all", **options)


def build_named(kind: type, nodes: dict[str, DictConfig | None]) -> list[Any]:
    """Instantiate nodes by name, and return those that are not switched off.

    Raises:
        TypeError: If a node builds nothing of the kind: its ``_target_`` is missing, as it is where a name is misspelt.
    """
    built = {name: build(node) for name, node in nodes.items()}
    for name, value in built.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"Expected `{name}` to build a {kind.__name__}, but got {value!r}; is the name misspelt?")
    return [value for value in built.values() if value is not None]


def printable(cfg: DictConfig) -> str:
    """Return a config as YAML with its values filled in, but each group once: a reference to a group stays one.

    Example:
        >>> print(printable(OmegaConf.create({"k": 3, "gmm": {"size": "${k}"}, "model": {"gmm": "${gmm}"}})), end="")
        k: 3
        gmm:
          size: 3
        model:
          gmm: ${gmm}
    """
    return OmegaConf.to_yaml(OmegaConf.create(_filled(cfg)))


def _filled(node: DictConfig) -> dict[str, Any]:
    raw: Any = OmegaConf.to_container(node, resolve=False)
    filled: dict[str, Any] = {}
    for key in node:
        value, written = node[key], raw[key]
        if isinstance(value, DictConfig):
            filled[str(key)] = written if isinstance(written, str) else _filled(value)
        else:
            filled[str(key)] = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
    return filled
