"""Checks of arguments and tensors; each raises one error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_array",
    "check_bool",
    "check_choice",
    "check_dtype",
    "check_finite",
    "check_integer",
    "check_number",
    "check_rows",
    "check_sample_weight",
    "check_share",
    "check_squares",
    "check_step_size",
    "check_string",
    "check_symmetric",
    "check_weights",
]


def check_integer(
    name: str, value: Any, minimum: int = 1, *, maximum: int | None = None, optional: bool = False
) -> None:
    """Raise unless ``value`` is an integer of at least ``minimum`` (or None where ``optional``).

    Example:
        >>> check_integer("n_components", 0)
        Traceback (most recent call last):
        ...
        ValueError: Expected `n_components` to be at least 1, but got 0.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        alternative = " or None" if optional else ""
        raise TypeError(f"Expected `{name}` to be an integer{alternative}, but got {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise ValueError(f"Expected `{name}` to be at least {minimum}, but got {value}.")
    if maximum is not None and int(value) > maximum:
        raise ValueError(f"Expected `{name}` to be at most {maximum}, but got {value}.")


def check_number(
    name: str, value: Any, minimum: float = 0.0, maximum: float = math.inf, *, strict: bool = False
) -> None:
    """Raise unless ``value`` is a finite number in ``[minimum, maximum]``, or above ``minimum`` where ``strict``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Expected `{name}` to be a number, but got {value!r} ({type(value).__name__}).")
    # Comparisons only, which compiled code can trace: nan fails them all.
    large_enough = value > minimum if strict else value >= minimum  # type: ignore[operator]
    if not (large_enough and value <= maximum and value < math.inf):
        lower = f"above {minimum:g}" if strict else f"at least {minimum:g}"
        upper = f" and at most {maximum:g}" if math.isfinite(maximum) else " and finite"
        raise ValueError(f"Expected `{name}` to be {lower}{upper}, but got {value}.")


def check_share(name: str, value: float) -> None:
    """Raise unless ``value`` is in (0, 1), both ends excluded."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"Expected `{name}`, given as a float, to be between 0 and 1, but got {value}.")


def check_bool(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be True or False, but got {value!r} ({type(value).__name__}).")


def check_string(name: str, value: Any) -> None:
    """Raise unless ``value`` is a string with something in it."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"Expected `{name}` to be a non-empty string, but got {value!r} ({type(value).__name__}).")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of the strings in ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_dtype(name: str, value: Any) -> None:
    """Raise unless ``value`` is None, float32 or float64: a narrower mixture has no Cholesky factor worth its name."""
    if value is not None and value not in (torch.float32, torch.float64):
        raise ValueError(f"Expected `{name}` to be torch.float32, torch.float64 or None, but got {value!r}.")


def check_symmetric(name: str, value: Tensor, *, matrix: bool) -> None:
    """Raise unless the last two axes hold symmetric matrices, where ``matrix`` says that they hold matrices."""
    if matrix and not torch.allclose(value, value.mT, rtol=1e-4, atol=1e-6 * float(value.abs().max())):
        raise ValueError(f"Expected `{name}` to be symmetric; symmetrise by (c + c.mT) / 2.")


def check_rows(name: str, x: Any, n_features: int) -> None:
    """Raise unless ``x`` is a real tensor of shape ``(..., n_features)``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"Expected `{name}` to be a tensor, but got {type(x).__name__}; convert it by torch.as_tensor.")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` to hold real numbers, but got {x.dtype}.")
    if x.ndim == 0 or x.shape[-1] != n_features:
        raise ValueError(
            f"Expected `{name}` of shape (..., {n_features}) for a mixture of {n_features} features, "
            f"but got {tuple(x.shape)}."
        )


def check_sample_weight(sample_weight: Any, shape: tuple[int, ...]) -> None:
    """Raise unless ``sample_weight`` is a real tensor of ``shape``, that of the rows without their features."""
    if not isinstance(sample_weight, Tensor) or sample_weight.is_complex():
        kind = sample_weight.dtype if isinstance(sample_weight, Tensor) else type(sample_weight).__name__
        raise TypeError(f"Expected `sample_weight` to be a real tensor, but got {kind}.")
    if tuple(sample_weight.shape) != tuple(shape):
        raise ValueError(
            f"Expected `sample_weight` of shape {tuple(shape)}, one number for each row of `x`, "
            f"but got {tuple(sample_weight.shape)}."
        )


def check_squares(name: str, x: Tensor) -> None:
    """Raise if the squared length of a row overflows the dtype of ``x``; reads one value on the host."""
    if not bool(torch.isfinite(x.square().sum())):
        raise ValueError(
            f"Expected `{name}` small enough that its squares add up in {x.dtype}, but its largest value is "
            f"{float(x.abs().max()):.3g}; rescale it or give it in float64."
        )


def check_finite(name: str, x: Tensor) -> None:
    """Raise if ``x`` holds a nan or an infinity; reads one value on the host."""
    bad = int((~torch.isfinite(x)).unsqueeze(-1).flatten(1).any(-1).sum())
    if bad:
        raise ValueError(
            f"Expected `{name}` to be finite, but {bad} of {x.shape[0]} rows hold nan or infinity; drop or impute them."
        )


def check_array(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return ``value`` as a new finite tensor of ``shape``, in the dtype and on the device of ``like``."""
    try:
        tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected `{name}` to be a tensor, array, list or number, but got {value!r}.") from error
    if tuple(tensor.shape) != shape:
        raise ValueError(f"Expected `{name}` of shape {shape}, but got {tuple(tensor.shape)}.")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"Expected `{name}` to be finite, but it holds nan or infinity.")
    return tensor


def check_weights(name: str, weights: Tensor) -> None:
    """Raise unless ``weights`` are non-negative and sum to one (to 1e-3, so that rounded numbers pass)."""
    total = float(weights.sum(dtype=torch.float32))
    if bool((weights < 0).any()) or abs(total - 1.0) > 1e-3:
        raise ValueError(f"Expected `{name}` to be non-negative and to sum to 1, but they sum to {total:.6g}.")


def check_step_size(step_size: Any) -> None:
    """Raise unless ``step_size`` is None, a number in (0, 1], or a tensor of one element (whose value is not read)."""
    if isinstance(step_size, Tensor):
        if step_size.numel() != 1 or step_size.is_complex():
            raise ValueError(f"Expected `step_size` to hold one real number, but got shape {tuple(step_size.shape)}.")
    elif step_size is not None:
        check_number("step_size", step_size, 0.0, 1.0, strict=True)
