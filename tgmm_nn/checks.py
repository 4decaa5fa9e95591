"""Checks of arguments and tensors; each raises one error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_array",
    "check_bool",
    "check_choice",
    "check_device",
    "check_dtype",
    "check_exact",
    "check_generator",
    "check_integer",
    "check_log_prior",
    "check_number",
    "check_rows",
    "check_sample_weight",
    "check_share",
    "check_squares",
    "check_step_size",
    "check_string",
    "check_symmetric",
    "check_values",
    "check_weights",
    "to_tensor",
    "to_weights",
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
        raise TypeError(
            f"Expected `{name}` to be an integer{alternative}, but got {_shown(value)} ({type(value).__name__})."
        )
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


def check_bool(name: str, value: Any, *, alternative: str = "") -> None:
    """Raise unless ``value`` is True or False; ``alternative`` is what else the error offers."""
    if not isinstance(value, bool):
        expected = f"True, False or {alternative}" if alternative else "True or False"
        raise TypeError(f"Expected `{name}` to be {expected}, but got {value!r} ({type(value).__name__}).")


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


def check_dtype(name: str, value: Any) -> torch.dtype | None:
    """Return ``value`` as float32 or float64, also from its name, or None; raise where it is anything else.

    A narrower mixture has no Cholesky factor worth its name.
    """
    for dtype in (torch.float32, torch.float64):
        if value in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
            return dtype
    if value is not None:
        raise ValueError(f"Expected `{name}` to be torch.float32, torch.float64 or None, but got {value!r}.")
    return None


def check_device(name: str, value: Any) -> torch.device | None:
    """Return ``value`` as a device, or None; raise where it names none."""
    if value is None:
        return None
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        torch.empty(0, device=value)  # whether it has a name says nothing about whether it is there
        return torch.device(value)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"Expected `{name}` to be a device such as 'cpu' or 'cuda:0' that is there, or None, but got {value!r}."
        ) from error


def check_generator(name: str, value: Any) -> None:
    """Raise unless ``value`` is a source of randomness or None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"Expected `{name}` to be a torch.Generator or None, but got {type(value).__name__}.")


def check_symmetric(name: str, value: Tensor, *, matrix: bool) -> None:
    """Raise unless the last two axes hold symmetric matrices, where ``matrix`` says that they hold matrices."""
    if matrix and not torch.allclose(value, value.mT, rtol=1e-4, atol=1e-6 * float(value.abs().max())):
        raise ValueError(f"Expected `{name}` to be symmetric; symmetrise by (c + c.mT) / 2.")


def check_rows(name: str, x: Tensor, n_features: int) -> None:
    """Raise unless ``x`` is a real tensor of shape ``(..., n_features)``."""
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` to hold real numbers, but got {x.dtype}.")
    if x.layout != torch.strided:
        raise TypeError(f"Expected `{name}` to be dense, but got {x.layout}; convert it by x.to_dense().")
    if x.ndim == 0 or x.shape[-1] != n_features:
        hint = "; write one feature as x[:, None]" if n_features == x.ndim == 1 else ""
        raise ValueError(
            f"Expected `{name}` of shape (..., {n_features}) for a mixture of {n_features} features, "
            f"but got {tuple(x.shape)}{hint}."
        )


def to_weights(sample_weight: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the weights of rows, of a shape without features, flat on a device, or raise; None stays None."""
    if sample_weight is None:
        return None
    weight = to_tensor("sample_weight", sample_weight, dtype).detach()
    check_sample_weight(weight, shape)
    return weight.reshape(-1).to(device)


def check_sample_weight(sample_weight: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``sample_weight`` is real and of ``shape``, that of the rows without their features."""
    if sample_weight.is_complex():
        raise TypeError(f"Expected `sample_weight` to hold real numbers, but got {sample_weight.dtype}.")
    if tuple(sample_weight.shape) != tuple(shape):
        raise ValueError(
            f"Expected `sample_weight` of shape {tuple(shape)}, one number for each row of `x`, "
            f"but got {tuple(sample_weight.shape)}."
        )


def check_log_prior(log_prior: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``log_prior`` holds floating numbers and is of ``shape``, that of responsibilities."""
    if not log_prior.is_floating_point():
        raise TypeError(f"Expected `log_prior` to hold floating numbers, but got {log_prior.dtype}.")
    if tuple(log_prior.shape) != tuple(shape):
        raise ValueError(
            f"Expected `log_prior` of shape {tuple(shape)}, one number for each row and component, "
            f"but got {tuple(log_prior.shape)}."
        )


def check_squares(name: str, x: Tensor) -> None:
    """Raise if the squares of finite rows overflow their dtype; reads one value on the host."""
    if not bool(torch.isfinite(x.square().sum())):
        raise ValueError(
            f"Expected `{name}` small enough that its squares add up in {x.dtype}, but its largest value is "
            f"{float(x.abs().max()):.3g}; rescale it{'' if x.dtype == torch.float64 else ' or give it in float64'}."
        )


def check_exact(name: str, given: torch.dtype, x: Tensor) -> None:
    """Raise if integers of dtype ``given`` were rounded when they became ``x``; reads one value on the host."""
    if given.is_floating_point or given.itemsize < 4 or x.dtype != torch.float32 or not x.numel():
        return
    if (largest := float(x.abs().max())) > 2**24:
        raise ValueError(
            f"Expected `{name}`, which holds {given}, to be at most 2**24 in size, as far as float32 has every "
            f"integer, but its largest value is {largest:.10g}; give it in float64, or subtract an offset."
        )


def to_tensor(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor as it is, and anything that NumPy can read as a tensor of real numbers.

    Arrays keep their dtype; lists and numbers, which have none, take ``dtype``.

    Raises:
        TypeError: If ``value`` is no tensor, array, list or number, or holds no real numbers.

    Example:
        >>> to_tensor("x", [[1, 2], [3, 4]], torch.float32)
        tensor([[1., 2.],
                [3., 4.]])
    """
    if isinstance(value, Tensor):
        return value
    try:
        if not isinstance(value, (list, tuple, numbers.Real)) and not hasattr(value, "__array__"):
            raise TypeError
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise TypeError
        # Other byte orders, negative strides and long doubles are NumPy's own; a read-only array is only read here.
        wide = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        own = np.ascontiguousarray(array, dtype=wide).reshape(array.shape)
        # A filter is changed only where there is something to filter: other threads would see it.
        with nullcontext() if own.flags.writeable else warnings.catch_warnings():
            if not own.flags.writeable:
                warnings.simplefilter("ignore")
            tensor = torch.from_numpy(own)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f" of dtype {value.dtype}" if isinstance(value, np.ndarray) else ""
        ragged = "; its rows differ in length" if "inhomogeneous" in str(error) else ""
        if ragged and isinstance(value[0], (Tensor, np.ndarray)):
            ragged = "; batches that differ in length are a stream: DataLoader(batches, batch_size=None)"
        raise TypeError(
            f"Expected `{name}` to be a tensor, array, list or number that holds real numbers, "
            f"but got {_shown(value)} ({type(value).__name__}{kind}){ragged}."
        ) from error
    return tensor if hasattr(value, "__array__") else tensor.to(dtype)


def check_array(name: str, value: Any, like: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """Return ``value`` as a new finite tensor of one of ``shapes``, in the dtype and on the device of ``like``."""
    tensor = to_tensor(name, value, like.dtype)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` to hold real numbers, but got {tensor.dtype}.")
    tensor = tensor.detach().to(like.device, like.dtype, copy=True)
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join("a number" if shape == () else f"shape {shape}" for shape in shapes)
        raise ValueError(f"Expected `{name}` of {expected}, but got {tuple(tensor.shape)}.")
    check_values(name, tensor)
    return tensor


def check_values(name: str, tensor: Tensor) -> None:
    """Raise if a tensor holds a nan or an infinity; reads one value on the host."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"Expected `{name}` to be finite, but it holds nan or infinity.")


def _shown(value: Any) -> str:
    """Return what an error shows of a value: its beginning."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_weights(name: str, weights: Tensor) -> None:
    """Raise unless ``weights`` are non-negative and sum to one (to 1e-3, so that rounded numbers pass)."""
    total, smallest = float(weights.sum(dtype=torch.float32)), float(weights.min())
    if smallest < 0 or abs(total - 1.0) > 1e-3:
        came = f"the smallest is {smallest:.6g}" if smallest < 0 else f"they sum to {total:.6g}"
        raise ValueError(f"Expected `{name}` to be non-negative and to sum to 1, but {came}.")


def check_step_size(step_size: Any) -> None:
    """Raise unless ``step_size`` is None, a number in (0, 1], or a tensor of one element (whose value is not read)."""
    if isinstance(step_size, Tensor):
        if step_size.numel() != 1 or step_size.is_complex() or step_size.dtype == torch.bool:
            raise ValueError(
                f"Expected `step_size` to hold one real number, but got shape {tuple(step_size.shape)} of "
                f"{step_size.dtype}."
            )
    elif step_size is not None:
        check_number("step_size", step_size, 0.0, 1.0, strict=True)
