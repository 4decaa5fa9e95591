"""What a mixture's buffers go through: casts that must not narrow them, states that must fit, and files."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Covariance
from tgmm_nn.statistics import accumulator_dtype

__all__ = ["check_valid", "keep_wide", "mismatch", "read", "write"]

DTYPES = ("float32", "float64")

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
    own = {name: state_dict[prefix + name] for name in buffers if prefix + name in state_dict}
    extra = state_dict.get(f"{prefix}_extra_state", {})
    return _wrong_extra(extra, f"{prefix}_extra_state", options) or _wrong_buffers(own, prefix, buffers)


def _wrong_extra(extra: Any, name: str, options: Mapping[str, Any]) -> str | None:
    """Say what is wrong with what travels besides buffers, or return None."""
    if not isinstance(extra, Mapping):
        return f"Expected `{name}` to be a dictionary of options, but got {type(extra).__name__}."
    theirs = {option: extra[option] for option in options if option in extra}
    ours = {option: options[option] for option in theirs}
    if not all(isinstance(value, (int, str)) for value in theirs.values()) or theirs != ours:
        return (
            f"Expected the state of a GaussianMixture with {ours}, but got one with {theirs}; "
            "build the layer with these options."
        )
    history, n_draws = extra.get("history", []), extra.get("n_draws", 0)
    if not isinstance(history, list) or not all(isinstance(value, float) for value in history):
        return f"Expected `{name}` to hold the history as a list of floats, but got {history!r:.60}."
    if not isinstance(n_draws, int) or n_draws < 0:
        return f"Expected `{name}` to hold the number of draws as an integer from 0 on, but got {n_draws!r:.60}."
    return None


def _wrong_buffers(own: Mapping[str, Any], prefix: str, buffers: Mapping[str, Tensor]) -> str | None:
    """Say which value can't be copied into its buffer, or return None."""
    for name, value in own.items():
        if not isinstance(value, Tensor) or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            return f"Expected `{prefix}{name}` to be a real tensor, but got {kind}."
        if value.shape != buffers[name].shape:
            return f"Expected `{prefix}{name}` of shape {tuple(buffers[name].shape)}, but got {tuple(value.shape)}."
    return None


def check_valid(buffers: Mapping[str, Tensor], covariance: Covariance) -> None:
    """Raise unless the buffers of a mixture hold one.

    That is finite numbers (reports of a fit may be nan), weights that sum to one, a factor that is the Cholesky factor
    of a precision, sums of no negative weight, shares up to one, and counters from zero on.

    Args:
        buffers: Buffers by name.
        covariance: Structure of the covariances.
    """
    for name, buffer in buffers.items():
        if name not in ("lower_bound", "objective"):
            checks.check_values(name, buffer)
        if not buffer.is_floating_point() or name in ("running_count", "running_step_size"):
            checks.check_number(name, float(buffer.min()), 0.0)
    for name in ("fitted", "converged", "running_step_size"):
        checks.check_number(name, float(buffers[name]), 0.0, 1.0)
    checks.check_weights("weights_", buffers["weights_"])
    if not bool(covariance.is_factor(buffers["factor_"]).all()):
        raise ValueError("Expected `factor_` to be the Cholesky factor of precisions, but it is not.")


def write(path: str | os.PathLike[str], options: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a mixture to a file; where that fails or is interrupted, an older file stays as it was.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If ``path`` is a folder.
    """
    target = Path(path).resolve()  # the file behind a link, not the link, is replaced
    if not target.parent.is_dir():
        raise FileNotFoundError(f"Expected `path` in a folder that exists, but there is no {str(target.parent)!r}.")
    if target.is_dir():
        raise IsADirectoryError(f"Expected `path` to be a file, but {str(target)!r} is a folder.")
    content = {"format": FORMAT, "version": VERSION, "options": dict(options), "state": dict(state)}
    handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file, _check_sums():
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
    content = _content(path, expected)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{expected} holds something else; a state_dict is loaded by load_state_dict.")
    version, options, state = content.get("version"), _named(content.get("options")), _named(content.get("state"))
    if not isinstance(version, int) or version != VERSION:
        raise ValueError(f"{expected} is of version {version!r:.60}, not {VERSION}; update tgmm_nn.")
    if options is None or state is None:
        raise ValueError(f"{expected} has no options or no state.")
    if unknown := [name for name in options if name not in names]:
        raise ValueError(f"{expected} has unknown options {unknown!r:.60}; update tgmm_nn.")
    if not isinstance(dtype := options.get("dtype"), str) or dtype not in DTYPES:
        raise ValueError(f"{expected} is of dtype {dtype!r:.60}, not one of {', '.join(DTYPES)}.")
    # Before a layer of that size is built.
    size = (options.get("n_components"), options.get("n_features"))
    means = state.get("means_")
    if not all(isinstance(n, int) for n in size) or not isinstance(means, Tensor) or tuple(means.shape) != size:
        raise ValueError(f"{expected} has means that are not of the shape of its options, {size!r:.60}.")
    return options, state


def _content(path: str | os.PathLike[str], expected: str) -> Any:
    """Return what a file holds as plain data, or raise with what was ``expected``."""
    with Path(path).open("rb"):  # is there a file, and may it be read?
        pass
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch compares no check sums
                raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile archive makes the reader stumble over
        raise ValueError(
            f"{expected} can't be read as plain data ({type(error).__name__}); nothing was run."
        ) from error


def _named(value: Any) -> dict[str, Any] | None:
    """Return ``value`` if it is a dictionary with names for keys."""
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None


@contextmanager
def _check_sums() -> Iterator[None]:
    """Let torch write check sums, also where a user has turned them off: they tell a damaged file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _umask() -> int:
    """Return the mask of permissions of new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
