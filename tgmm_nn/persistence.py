"""What a mixture's buffers go through: casts that must not narrow them, states that must fit, and files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.statistics import accumulator_dtype

__all__ = ["DTYPES", "check_valid", "keep_wide", "mismatch", "read", "write"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}

FORMAT = "tgmm_nn.GaussianMixture"
VERSION = 1


def keep_wide(before: Mapping[str, Tensor], after: Mapping[str, Tensor], sums: Collection[str]) -> dict[str, Tensor]:
    """Return the buffers of a cast or move, but parameters in float32 or wider, and sums in float64.

    A buffer that became too narrow is taken from its original: the digits that the cast dropped are still there.

    Args:
        before: Buffers before, by name.
        after: Buffers after, by name.
        sums: Names of the buffers that hold sums.
    """
    kept = dict(after)
    for name, buffer in after.items():
        lowest = accumulator_dtype(buffer.device) if name in sums else torch.float32
        if buffer.is_floating_point() and (wide := torch.promote_types(buffer.dtype, lowest)) != buffer.dtype:
            kept[name] = before[name].to(buffer.device, wide)
    return kept


def mismatch(
    state_dict: Mapping[str, Any], prefix: str, options: Mapping[str, Any], buffers: Mapping[str, Tensor]
) -> str | None:
    """Say how a state differs from a layer in what shapes it, or return None.

    Args:
        state_dict: State of a whole module.
        prefix: What the layer's names start with in it.
        options: The layer's own options.
        buffers: The layer's own buffers, by name.
    """
    saved = state_dict.get(f"{prefix}_extra_state", {})
    if not isinstance(saved, Mapping):
        return f"Expected `{prefix}_extra_state` to be a dictionary of options, but got {type(saved).__name__}."
    theirs = {name: saved[name] for name in options if name in saved}
    ours = {name: options[name] for name in theirs}
    if theirs != ours:
        return (
            f"Expected the state of a GaussianMixture with {ours}, but got one with {theirs}; "
            "build the layer with these options."
        )
    history = saved.get("history", [])
    if not isinstance(history, list) or not all(isinstance(value, float) for value in history):
        return f"Expected `{prefix}_extra_state` to hold the history as a list of floats, but got {history!r:.60}."
    for name, buffer in buffers.items():
        if (value := state_dict.get(prefix + name)) is None:
            continue
        if not isinstance(value, Tensor) or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            return f"Expected `{prefix}{name}` to be a real tensor, but got {kind}."
        if value.shape != buffer.shape:
            return f"Expected `{prefix}{name}` of shape {tuple(buffer.shape)}, but got {tuple(value.shape)}."
    return None


def check_valid(buffers: Mapping[str, Tensor]) -> None:
    """Raise unless the buffers of a mixture hold one: finite numbers, and weights that sum to one.

    Args:
        buffers: Buffers by name; reports of a fit may be nan.
    """
    for name, buffer in buffers.items():
        if name not in ("lower_bound", "objective"):
            checks.check_values(name, buffer)
    checks.check_weights("weights_", buffers["weights_"])


def write(path: str | os.PathLike[str], options: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a mixture to a file; where that fails or is interrupted, an older file stays as it was."""
    target = Path(path)
    content = {"format": FORMAT, "version": VERSION, "options": dict(options), "state": dict(state)}
    handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
        Path(unfinished).chmod(0o666 & ~_umask())
        Path(unfinished).replace(target)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options and the state that a file holds; nothing in it is executed.

    Args:
        path: File that `write` has written.
        names: Names that options may have.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file is corrupt, or holds anything else.
    """
    expected = f"Expected `path` to be a file that GaussianMixture.save has written, but {str(path)!r}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile archive makes the reader stumble over
        raise ValueError(
            f"{expected} can't be read as plain data ({type(error).__name__}); nothing was run."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{expected} holds something else; a state_dict is loaded by load_state_dict.")
    if content.get("version") != VERSION:
        raise ValueError(f"{expected} is of version {content.get('version')!r}, not {VERSION}; update tgmm_nn.")
    options, state = content.get("options"), content.get("state")
    if not isinstance(options, dict) or not isinstance(state, dict):
        raise ValueError(f"{expected} has no options or no state.")
    if unknown := [name for name in options if name not in names]:
        raise ValueError(f"{expected} has unknown options {unknown!r:.60}; update tgmm_nn.")
    if options.get("dtype") not in DTYPES:
        raise ValueError(f"{expected} is of dtype {options.get('dtype')!r:.60}, not one of {', '.join(DTYPES)}.")
    # Before a layer of that size is built.
    size = (options.get("n_components"), options.get("n_features"))
    means = state.get("means_")
    if not isinstance(means, Tensor) or tuple(means.shape) != size:
        raise ValueError(f"{expected} has means that are not of the shape of its options, {size}.")
    return options, state


def _umask() -> int:
    """Return the mask of permissions of new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
