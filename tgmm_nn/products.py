"""Matrix products on a CPU by the library that is fast there; the results differ by rounding only."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["SUMMED", "may_derive", "prefers_onednn", "product", "summed"]

CHOICES = ("auto", "mkl", "onednn")

# Multiplications from which on oneDNN is faster although it prepares each product.
LARGE = 2**19

# Numbers that float32 adds up in one piece, at most: the rounding of a sum grows with the root of their number.
SUMMED = 1024


def may_derive(*tensors: Tensor) -> bool:
    """Return whether a derivative of any tensor may be taken: most ways to one do not tell.

    Forward derivatives are taken where no gradient is recorded, and what is exported without one may record it later.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    told = any(tensor.requires_grad for tensor in tensors)
    return torch.is_grad_enabled() and (told or torch.compiler.is_compiling())


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices."""
    return _onednn(a, b) if _by_onednn(a, b) else a @ b


def summed(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices, where it is a sum of many rows.

    In pieces of `SUMMED` rows, since MKL adds small products up row by row; oneDNN has pieces of its own.
    """
    whole = a.shape[-1] // SUMMED * SUMMED
    if _by_onednn(a, b):
        # With a much larger matrix first, and its rows contiguous, the rate rises from 310 to 350 GFLOP/s (32 times
        # 1,392 times 2,145 numbers), or from 170 to 310 (16 times 8,192 times 153).
        is_larger = b.mT.is_contiguous() and b.shape[1] > 2 * len(a)
        return _onednn(b.mT, a.mT).mT if is_larger else _onednn(a, b)
    if a.dtype != torch.float32 or whole == 0:
        return a @ b
    pieces = a[:, :whole].unflatten(1, (-1, SUMMED)).transpose(0, 1).bmm(b[:whole].unflatten(0, (-1, SUMMED)))
    return torch.addmm(pieces.sum(0), a[:, whole:], b[whole:])


@cache
def prefers_onednn() -> bool:
    """Return whether float32 products on the CPU are left to oneDNN, rather than to what torch is built with, MKL.

    MKL takes its AVX2 kernels on processors of AMD, also where they have AVX-512, and is then half as fast as oneDNN.
    So oneDNN is taken there, and nowhere else: on AMD without AVX-512 both are alike, on Intel MKL is fast itself. The
    environment variable ``TGMM_NN_PRODUCT`` (``"mkl"`` or ``"onednn"``; ``"auto"`` is this rule) decides otherwise,
    before the first product.

    Raises:
        ValueError: If the variable is something else.
    """
    choice = os.environ.get("TGMM_NN_PRODUCT") or "auto"
    if choice not in CHOICES:
        raise ValueError(
            f"Expected the environment variable TGMM_NN_PRODUCT to be one of {', '.join(map(repr, CHOICES))}, "
            f"but got {choice!r}."
        )
    if choice == "mkl" or not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return choice == "onednn" or (torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_amd())


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text(errors="ignore")


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether a product goes to oneDNN, whose kernel has no derivative and can't be traced."""
    here = a.dtype == torch.float32 and a.device.type == "cpu" and not torch.compiler.is_compiling()
    here = here and not may_derive(a, b)
    return here and a.numel() * b.shape[-1] >= LARGE and prefers_onednn()
