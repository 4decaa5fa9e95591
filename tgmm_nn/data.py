"""Rows to fit on, in memory or streamed, as passes over batches of one form."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from threading import Event
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.statistics import accumulator_dtype, wider_dtype

__all__ = ["Rows", "checked", "is_mapped", "is_stream", "pieces", "read_ahead", "untouched_generators"]

# Numbers that are looked at and widened at once where all rows lie in memory, or in a mapped file.
BATCH = 2**22

# Batches of a stream of fewer numbers than the first are put together up to the second: an E-step of few rows
# takes as long as one of many. Copies of the first are made by one thread, which disturbs no other computation.
SMALL, GATHERED = 2**15, 2**20

Part = tuple[Tensor, Tensor | None]
Batch = tuple[Tensor, Tensor | None, Tensor | None]
T = TypeVar("T")


def is_stream(x: Any) -> bool:
    """Return whether ``x`` gives batches of rows, as a ``DataLoader`` does, rather than being rows itself."""
    rows = isinstance(x, (Tensor, list, tuple, str, Mapping)) or hasattr(x, "__array__")
    return isinstance(x, Iterable) and not rows


def is_mapped(x: Any) -> bool:
    """Return whether ``x`` is an array in a file, which may be larger than memory: it is never copied whole."""
    return isinstance(x, np.memmap) and x.ndim > 1


def pieces(x: np.memmap[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Give an array ``(n, ..., d)`` along its first axis, about `BATCH` numbers at a time; one piece where n is 0."""
    size = max(1, BATCH * len(x) // max(1, x.size))
    return (x[start : start + size] for start in range(0, max(1, len(x)), size))


class Rows:
    """Rows with their weights, on one device and in at least one dtype, as often as they are asked for.

    Args:
        x: Tensor, array or list of shape ``(..., d)``, or an iterable of batches such as a ``DataLoader``; of a batch
            that is a tuple or list the first element is taken.
        sample_weight: Weight of each row, shape ``(...)``. For a stream the index of the weights in its batches.
        n_features: Number of features d.
        like: Tensor whose device the rows are moved to, and whose dtype they are widened to.
        log_prior: Log-prior of each row over components, shape ``(n, K)``; not for a stream.
        shared: Whether they are this rank's part of the rows of all ranks; then it may be empty.

    Raises:
        TypeError: If an argument holds no real numbers, or ``x`` is an iterator, which gives one pass only.
        ValueError: If an argument has the wrong shape.
    """

    def __init__(
        self,
        x: Any,
        sample_weight: Any,
        n_features: int,
        like: Tensor,
        log_prior: Tensor | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self.n_features, self.like, self.streamed, self.shared = n_features, like, is_stream(x), shared
        self.shape: tuple[int, ...] | None = None  # as it was given; a stream has none
        if self.streamed:
            if isinstance(x, Iterator):
                raise TypeError(
                    f"Expected `x` to be iterable more than once, but got {type(x).__name__}, which is used up by one "
                    "pass; give a DataLoader, a list of rows or a tensor."
                )
            if sample_weight is not None and not isinstance(sample_weight, int):
                raise TypeError(
                    f"Expected `sample_weight` to be the index of the weights in the batches of {type(x).__name__}, "
                    f"but got {type(sample_weight).__name__}; its rows may come in any order."
                )
            checks.check_integer("sample_weight", sample_weight, minimum=0, optional=True)
        else:
            mapped = is_mapped(x)
            x = x if mapped else checks.to_tensor("x", x, like.dtype).detach()
            form = _form(x) if mapped else x
            checks.check_rows("x", form, n_features)
            self.shape = tuple(x.shape)
            sample_weight = checks.to_weights(sample_weight, self.shape[:-1], like.dtype, like.device)
            x = x.reshape(-1, n_features)
            x = x if mapped else x.to(like.device)
        self.x, self.sample_weight, self.log_prior = x, sample_weight, log_prior
        self.given = like.dtype  # that of the last batch, before it was widened

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """Make one pass: batches of rows ``(n, d)``, weights ``(n,)`` and log-priors; generators end as they began."""
        with (
            untouched_generators(self.x) if self.streamed else nullcontext(),
            closing(self._streamed() if self.streamed else self._in_memory()) as batches,  # ends the thread that reads
        ):
            yield batches

    @contextmanager
    def checked_batches(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Make one pass over rows of positive weight with their weights, and raise at one that is not finite.

        Raises:
            ValueError: If a row or weight is not finite, or a weight is negative.
        """
        with self.batches() as batches:
            yield (checked(rows, weight) for rows, weight, _ in batches)

    @contextmanager
    def watched_batches(self) -> Iterator[Iterator[Batch]]:
        """Make one pass as `batches` does, and raise at its end where one of `checked_batches` would have.

        Nothing is read on the host before, so that a pass over batches on a GPU does not wait for each.

        Raises:
            ValueError: If a row or weight was not finite, or a weight negative.
        """
        bad = torch.zeros(2, dtype=torch.int64, device=self.like.device)
        n_rows = 0

        def watch(batch: Batch) -> Batch:
            nonlocal n_rows
            rows, weight, _ = batch
            n_rows += len(rows)
            bad[0] += (~torch.isfinite(rows).all(-1)).sum()
            if weight is not None:
                bad[1] += (~_is_weight(weight)).sum()
            return batch

        with self.batches() as batches:
            yield map(watch, batches)
        _raise_if_bad(bad.tolist(), n_rows)

    def widen(self, dtype: torch.dtype) -> None:
        """Compute in ``dtype`` at least, where rows of other ranks ask for it."""
        self.like = self.like.to(wider_dtype(dtype, self.like.dtype))

    def none(self) -> Tensor:
        """Return rows ``(0, d)``, such as a rank has that no row was given to."""
        return self.like.new_empty(0, self.n_features)

    def _in_memory(self) -> Generator[Batch, None, None]:
        size = max(1, BATCH // self.n_features)
        for start in range(0, max(1, len(self.x)), size):
            part = slice(start, start + size)
            weight, log_prior = (None if v is None else v[part] for v in (self.sample_weight, self.log_prior))
            yield self._widened(checks.to_tensor("x", self.x[part], self.like.dtype)), weight, log_prior

    def _streamed(self) -> Generator[Batch, None, None]:
        def groups(batches: Iterable[Any]) -> Generator[Part, None, None]:
            return gathered(map(self._of_batch, batches))

        # A loader with workers reads ahead itself.
        with closing(groups(self.x) if getattr(self.x, "num_workers", 0) else read_ahead(self.x, groups)) as ahead:
            for rows, weight in ahead:
                yield self._widened(rows), weight, None

    def _of_batch(self, batch: Any) -> Part:
        """Return the rows ``(n, d)`` of a stream's batch, and their weights."""
        several = isinstance(batch, (tuple, list))
        if not (several and len(batch)) and not isinstance(batch, Tensor) and not hasattr(batch, "__array__"):
            raise TypeError(
                f"Expected the batches of `x` to be tensors, or tuples whose first element is one, but got "
                f"{type(batch).__name__}."
            )
        rows = checks.to_tensor("x", batch[0] if several else batch, self.like.dtype).detach()
        checks.check_rows("x", rows, self.n_features)
        flat = rows.reshape(-1, self.n_features)
        if self.sample_weight is None:
            return flat, None
        if not several or len(batch) <= self.sample_weight:
            raise ValueError(
                f"Expected batches of `x` that hold weights at index sample_weight={self.sample_weight}, but got "
                f"{len(batch) if several else 'no'} elements."
            )
        weights = checks.to_weights(batch[self.sample_weight], rows.shape[:-1], self.like.dtype, self.like.device)
        return flat, weights

    def _widened(self, rows: Tensor) -> Tensor:
        self.given = rows.dtype
        return rows.to(self.like.device, wider_dtype(rows.dtype, self.like.dtype))


def read_ahead(
    stream: Iterable[Any], through: Callable[[Iterator[Any]], Iterator[T]] | None = None
) -> Generator[T, None, None]:
    """Give what a stream gives, of which a thread reads the next element while the caller is busy with the last.

    Errors of the stream are raised where its element would have come. The thread ends with the stream, or when this
    generator is closed, after the element of the stream that it is reading then.

    Args:
        stream: Gives elements.
        through: Makes of them what is given, in that thread; None gives them as they are.

    Example:
        >>> list(read_ahead(range(3)))
        [0, 1, 2]
    """
    end: Any = object()
    closed = Event()
    # What a thread does not take over from the one that starts it.
    grad, device = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def settle() -> None:
        torch.set_grad_enabled(grad)
        if device is not None:
            torch.cuda.set_device(device)

    def read() -> Iterator[Any]:
        for element in stream:
            if closed.is_set():  # what is given may be made of many
                return
            yield element

    with ThreadPoolExecutor(1, "tgmm_nn.read_ahead", settle) as thread:
        try:
            elements = read() if through is None else through(read())
            ahead = thread.submit(next, elements, end)
            while (element := ahead.result()) is not end:
                ahead = thread.submit(next, elements, end)
                yield element
        finally:
            closed.set()


def gathered(parts: Iterable[Part]) -> Generator[Part, None, None]:
    """Put small parts on the CPU together that follow each other and are of the same dtypes; give others as they are.

    They are copied at once, since a stream may use their memory again, or hold them in files or larger arrays; and to
    one place, since memory of each would lie in what a larger array left, and the next one would need a new place.

    Example:
        >>> [len(rows) for rows, _ in gathered((torch.zeros(n, 64), None) for n in (16, 8, 512, 4))]
        [24, 512, 4]
    """
    group: Part | None = None
    filled = 0
    for part in parts:
        rows, weight = part
        small = rows.numel() < SMALL and rows.device.type == "cpu"
        if group and not (small and _kind(*part) == _kind(*group) and filled + len(rows) <= len(group[0])):
            yield _first(filled, *group)
            group = None
        if not small:
            yield part
            continue
        if not group:
            n_rows, filled = GATHERED // rows.shape[-1], 0
            group = rows.new_empty(n_rows, rows.shape[-1]), None if weight is None else weight.new_empty(n_rows)
        for memory, values in zip(group, part, strict=True):
            if memory is not None and values is not None:
                memory[filled : filled + len(rows)] = values
        filled += len(rows)
        if filled + len(rows) > len(group[0]):  # no place for another such part: it need not be waited for
            yield _first(filled, *group)
            group = None
    if group:
        yield _first(filled, *group)


def _kind(rows: Tensor, weight: Tensor | None) -> tuple[torch.dtype, torch.dtype | None]:
    return rows.dtype, None if weight is None else weight.dtype


def _first(size: int, rows: Tensor, weight: Tensor | None) -> Part:
    return rows[:size], None if weight is None else weight[:size]


def _form(x: np.memmap[Any, Any]) -> Tensor:
    """Return a tensor of the shape and dtype of a mapped array, without its numbers."""
    return checks.to_tensor("x", np.empty((0, *x.shape[1:]), x.dtype), torch.float32).new_empty(x.shape, device="meta")


def checked(rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows of positive weight and their weights, in the dtype of sums, or raise."""
    wide = accumulator_dtype(rows.device)
    bad_rows = int((~torch.isfinite(rows).all(-1)).sum())
    _raise_if_bad([bad_rows, 0 if weight is None else int((~_is_weight(weight)).sum())], len(rows))
    if weight is None:
        return rows, torch.ones(len(rows), dtype=wide, device=rows.device)
    rows, weight = rows[weight > 0], weight[weight > 0]
    narrow = weight.to(rows.dtype)
    if not bool((narrow > 0).all() & torch.isfinite(narrow.sum())):
        raise ValueError(
            f"Expected `sample_weight` in the range of {rows.dtype}, but got {float(weight.min()):.3g} to "
            f"{float(weight.max()):.3g}; rescale them."
        )
    return rows, weight.to(wide)


def _is_weight(weight: Tensor) -> Tensor:
    """Return which weights can be."""
    return torch.isfinite(weight) & (weight >= 0)


def _raise_if_bad(bad: list[int], n_rows: int) -> None:
    """Raise if any of so many rows, or of their weights, cannot be fitted."""
    bad_rows, bad_weights = bad
    if bad_rows:
        raise ValueError(
            f"Expected `x` to be finite, but {bad_rows} of {n_rows} rows hold nan or infinity; drop or impute them."
        )
    if bad_weights:
        raise ValueError(
            f"Expected `sample_weight` to be finite and at least 0, but {bad_weights} of {n_rows} are negative, nan or "
            "infinite; give such rows the weight 0 or drop them."
        )


@contextmanager
def untouched_generators(stream: Any) -> Iterator[None]:
    """Leave the global generators, and a loader's own, as they were.

    Iterating a ``DataLoader`` advances torch's, and augmentation may advance any. With the same state before each pass
    it also gives the same rows in each pass.
    """
    owners = (stream, getattr(stream, "sampler", None), getattr(stream, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    own = [(generator, generator.get_state()) for generator in found if isinstance(generator, torch.Generator)]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for generator, state in own:
                generator.set_state(state)
