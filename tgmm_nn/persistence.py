"""What a layer's buffers go through: casts that must not narrow them, and states that must fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tgmm_nn.statistics import accumulator_dtype

__all__ = ["keep_wide", "mismatch"]


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
    for name, buffer in buffers.items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and value.shape != buffer.shape:
            return f"Expected `{prefix}{name}` of shape {tuple(buffer.shape)}, but got {tuple(value.shape)}."
    return None
