"""Sums over ranks, rank zero's word for all, and errors that reach all; without ``torch.distributed`` no-ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "attempt",
    "broadcast_from_rank_zero",
    "check_same_on_all_ranks",
    "is_distributed",
    "is_rank_zero",
    "on_all_ranks",
    "raise_on_all_ranks",
    "rows_of_each_rank",
    "sum_over_ranks",
]

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether more than one rank takes part in the default process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_zero() -> bool:
    """Return whether this is the rank that speaks for all; true when alone."""
    return not is_distributed() or dist.get_rank() == 0


def sum_over_ranks(flat: Tensor) -> Tensor:
    """Return the sum of ``flat`` over all ranks as a new tensor; ``flat`` itself when alone.

    Every rank has to call this the same number of times with the same shape.

    Example:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_distributed():
        return flat
    total = flat.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def broadcast_from_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, by rank zero's."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def check_same_on_all_ranks(options: Mapping[str, Any]) -> None:
    """Raise on all ranks unless each has these options alike; every rank has to call this.

    Messages of another shape, or another number of them, would abort or hang.

    Args:
        options: Plain values by name.

    Raises:
        ValueError: Naming the first option that differs, its values, and the rank.
    """
    if not is_distributed():
        return
    of_ranks: list[Mapping[str, Any]] = [options] * dist.get_world_size()
    dist.all_gather_object(of_ranks, options)
    for rank, theirs in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if theirs[name] != value:
                raise ValueError(
                    f"Expected all ranks to have the same `{name}`, but got {value!r} on rank 0 and {theirs[name]!r} "
                    f"on rank {rank}."
                )


def rows_of_each_rank(rows: Tensor) -> Iterator[Tensor]:
    """Give the rows ``(n, d)`` of one rank after the other, however many each has; every rank has to take them all.

    They are held one rank's at a time, so that what is made of them may be small where all rows together are not.

    Example:
        >>> [part.tolist() for part in rows_of_each_rank(torch.ones(1, 2))]
        [[[1.0, 1.0]]]
    """
    if not is_distributed():
        yield rows
        return
    mine = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    mine[dist.get_rank()] = len(rows)
    for rank, number in enumerate(sum_over_ranks(mine).tolist()):
        theirs = rows.contiguous() if rank == dist.get_rank() else rows.new_empty(number, rows.shape[1])
        dist.broadcast(theirs, src=rank)
        yield theirs


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return what ``work`` returns, or the error that it raises: one rank's, that the others have to hear of first."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def on_all_ranks(work: Callable[[], T], device: torch.device, *, sync: bool = True) -> T:
    """Return what ``work`` returns on this rank; where it raises on any rank, raise on all, so that none waits for it.

    Args:
        work: Part of a task in which ranks do not yet talk to each other.
        device: Where messages between ranks are.
        sync: Whether there is a task of all ranks, so that every rank has to call this.

    Raises:
        Exception: What ``work`` raised on this rank.
        RuntimeError: If it raised on others only.
    """
    if not sync or not is_distributed():
        return work()
    made, error = attempt(work)
    if bool(sum_over_ranks(torch.tensor([error is not None], dtype=torch.int64, device=device))):
        raise_on_all_ranks(error)
    return made  # type: ignore[return-value]  # there is no error


def raise_on_all_ranks(error: Exception | None) -> NoReturn:
    """Raise this rank's error, or where it has none, one that tells of another rank's; every rank has to call this."""
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    rank, message = next((rank, message) for rank, message in enumerate(said) if message is not None)
    raise RuntimeError(
        f"Expected every rank to get through its rows, but rank {rank} failed with {message} Nothing was changed here."
    )
