"""What the config of a run says: checked before anything is built, built, printed, and what is wrong in a sentence."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import hydra
import torch
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tgmm_nn.checks import check_integer

__all__ = ["build", "build_named", "check_keys", "check_values", "explain", "printable"]

# Keys of the config's top, and of the groups that build nothing. Hydra takes any key from an experiment file.
KEYS = (
    *("name", "seed", "num_threads", "ckpt_path", "data", "model", "prior", "gmm", "em", "metrics", "callbacks"),
    *("logger", "trainer", "paths"),
)
KEYS_OF = {
    "paths": ("output_dir",),
    "prior": ("weight_concentration", "mean", "mean_precision", "covariance", "degrees_of_freedom"),
}
# What hydra.utils.instantiate reads itself.
RESERVED = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")


# ------------------------------------------------------------------------------------------------------------- checks


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
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, minimum=-1)
    if cfg.ckpt_path is None:
        return
    if not Path(str(cfg.ckpt_path)).is_file():
        raise ValueError(f"Expected `ckpt_path` to be a file, but got {cfg.ckpt_path!r}.")
    try:
        torch.load(cfg.ckpt_path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"Expected `ckpt_path` to be a checkpoint of a run, but got {cfg.ckpt_path!r}.") from error


def _check_known(where: str, keys: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in keys:
        if key not in known:
            raise ValueError(_unknown(where, key, difflib.get_close_matches(key, known, n=1), known))


def _unknown(where: str, key: str, meant: list[str], known: Iterable[str]) -> str:
    """Return the sentence on a key that nothing reads: with what was meant, or else with all that there is."""
    if meant:
        return f"Expected a key of {where}, but got {key!r}; did you mean {' or '.join(map(repr, meant))}?"
    return f"Expected a key of {where}, one of {', '.join(known)}, but got {key!r}."


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


def build(node: DictConfig | None, **options: Any) -> Any:
    """Instantiate a node, as plain containers: a DictConfig in a state would not load as weights only.

    A node whose ``_target_`` is null is switched off, and gives None.
    """
    if node is None or ("_target_" in node and node["_target_"] is None):
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


# -------------------------------------------------------------------------------------------------------------- errors


def explain(error: BaseException) -> str | None:
    """Return what is wrong with an option, in a sentence; None for an error that only a traceback explains."""
    message = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        near = difflib.get_close_matches(option, error.options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"Expected `{group}` to be one of {', '.join(sorted(error.options))}, but got {option!r}{hint}"
    if isinstance(error, InstantiationException):
        return _explain_building(error)
    if isinstance(error, HydraException):
        cause = error.__cause__
        return _explain_override(cause) or message if isinstance(cause, OmegaConfBaseException) else message
    if isinstance(error, OmegaConfBaseException):
        return message.splitlines()[0]
    # In the words of our own checks, or of load_state_dict.
    ours = ("Expected ", "Error(s) in loading state_dict")
    return message if isinstance(error, (TypeError, ValueError, RuntimeError)) and message.startswith(ours) else None


def _explain_override(error: OmegaConfBaseException) -> str | None:
    """Name the key that an override may have meant: a like one in its place, or the same in another place."""
    parent, key = error.parent_node, str(error.key)
    if not isinstance(parent, DictConfig):
        return None
    where = str(parent._get_full_key(None) or "")
    known = [str(name) for name in parent if name not in ("hydra", *RESERVED)]
    near = [f"{where}.{name}".lstrip(".") for name in difflib.get_close_matches(key, known, n=1)]
    same = [path for path in _paths(parent._get_root()) if path.split(".")[-1] == key]
    return _unknown(f"`{where}`" if where else "the config's top", key, near or same[:3], known)


def _paths(node: Any, path: str = "") -> Iterator[str]:
    raw = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node
    for key, value in raw.items() if isinstance(raw, dict) else ():
        if not path and key == "hydra":
            continue
        yield f"{path}{key!s}"
        yield from _paths(value, f"{path}{key!s}.")


def _explain_building(error: InstantiationException) -> str:
    """Say what a constructor did not take, and of which node."""
    cause, (said, _, where) = error.__cause__, str(error).partition("full_key: ")
    package = where.split(".")[-1]
    if isinstance(cause, ModuleNotFoundError) and where.startswith("logger."):
        return f"Expected the package `{package}` for logger={package}, but it is missing: run `pip install {package}`."
    return f"{str(cause or said).strip().rstrip('.')} (in `{where}`)." if where else said
