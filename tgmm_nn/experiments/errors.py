"""What is wrong with an option, in a sentence: the one place where errors become words on the terminal."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator
from functools import singledispatch
from typing import Any

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["RESERVED", "explain", "unknown_key"]

# What hydra.utils.instantiate reads itself.
RESERVED = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")


@singledispatch
def explain(error: BaseException) -> str | None:
    """Return what is wrong with an option, in a sentence; None for an error that only a traceback explains.

    Our own checks speak in sentences that begin with a word that torch begins its errors with too: they are told apart
    by the module that raised them. Hydra, OmegaConf and the file system have words of their own, put into ours.

    Example:
        >>> explain(PermissionError(13, "Permission denied", "/outputs"))[:62]
        "Expected to read and write '/outputs', but got 'Permission den"
        >>> explain(ZeroDivisionError("division by zero")) is None
        True
    """
    message = str(error)
    if message.startswith("Error(s) in loading state_dict"):
        said = " ".join(message.split())
        return (
            f"Expected the model and data that `ckpt_path` was trained with, but got others: {said:.300}; give "
            "experiment, model and data.path as its config.yaml has them."
        )
    ours = message.startswith("Expected ") and _raised_in(error).split(".")[0] == "tgmm_nn"
    return message if ours else None


@explain.register
def _of_choice(error: MissingConfigException) -> str:
    """Name the options of a group, and the one that was meant."""
    if not (error.missing_cfg_file and error.options):
        return str(error)
    group, _, option = error.missing_cfg_file.rpartition("/")
    near = difflib.get_close_matches(option, error.options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"Expected `{group}` to be one of {', '.join(sorted(error.options))}, but got {option!r}{hint}"


@explain.register
def _of_override(error: HydraException) -> str:
    """Name the key that an override may have meant: a like one in its place, or the same or a like one elsewhere."""
    if ambiguous := re.match(r"Ambiguous value for argument '([^=]*)=(.*)'", str(error)):
        key, values = ambiguous.groups()
        return (
            f"Expected one value for `{key}`, but got {values!r}; a sweep over them takes -m before it, and a list "
            f"brackets: {key}=[{values}]."
        )
    cause = error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not isinstance(parent := cause.parent_node, DictConfig):
        return str(error)
    key, where = str(cause.key), str(parent._get_full_key(None) or "")
    known = [str(name) for name in parent if name not in ("hydra", *RESERVED)]
    near = [f"{where}.{name}".lstrip(".") for name in difflib.get_close_matches(key, known, n=1)]
    paths = list(_paths(parent._get_root()))
    same = [path for path in paths if path.split(".")[-1] == key]
    alike = difflib.get_close_matches(key, {path.split(".")[-1] for path in paths}, n=1, cutoff=0.7)
    like = [path for path in paths if path.split(".")[-1] in alike]
    return unknown_key(f"`{where}`" if where else "the config's top", key, near or same[:3] or like[:3], known)


@explain.register
def _of_building(error: InstantiationException) -> str:
    """Say what a constructor did not take, and of which node."""
    cause, (said, _, where) = error.__cause__, str(error).partition("full_key: ")
    package = where.split(".")[-1]
    if isinstance(cause, ModuleNotFoundError) and where.startswith("logger."):
        return f"Expected the package `{package}` for logger={package}, but it is missing: run `pip install {package}`."
    hint = "; take trainer=cpu, or trainer=default, which takes what there is" if "backend found" in str(cause) else ""
    return f"{str(cause or said).strip().rstrip('.')} (in `{where}`){hint}." if where else said


@explain.register
def _of_callback(error: UserWarning) -> str | None:
    """Explain what a callback of Hydra's raised, of which Hydra makes a warning."""
    return None if error.__context__ is None else explain(error.__context__)


@explain.register
def _of_reference(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0]


@explain.register
def _of_file(error: OSError) -> str | None:
    """Name the file or folder that is out of reach, and the option that chooses where a run writes."""
    if error.filename is None:
        return None
    return (
        f"Expected to read and write {str(error.filename)!r}, but got {error.strerror!r}; a run writes where "
        "hydra.run.dir=FOLDER says."
    )


def unknown_key(where: str, key: str, meant: list[str], known: Iterable[str]) -> str:
    """Return the sentence on a key that nothing reads: with what was meant, or else with all that there is.

    Example:
        >>> unknown_key("`gmm`", "tool", ["gmm.tol"], ["tol", "cem"])
        "Expected a key of `gmm`, but got 'tool'; did you mean 'gmm.tol'?"
    """
    if meant:
        return f"Expected a key of {where}, but got {key!r}; did you mean {' or '.join(map(repr, meant))}?"
    return f"Expected a key of {where}, one of {', '.join(known)}, but got {key!r}."


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an error; an empty one where it never was."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _paths(node: Any, path: str = "") -> Iterator[str]:
    raw = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node
    for key, value in raw.items() if isinstance(raw, dict) else ():
        if not path and key == "hydra":
            continue
        yield f"{path}{key!s}"
        yield from _paths(value, f"{path}{key!s}.")
