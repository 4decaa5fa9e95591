"""Rows that EM keeps between steps: all since the last update, the newest, or a uniform sample of all that came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.ranks import gather_rows, this_rank

__all__ = ["Bank"]

POLICIES = ("fifo", "reservoir")
SLACK = 1.125


class Held(NamedTuple):
    """Rows ``(n, d)``, and of each its label, its key and the bank that it belongs to, all ``(n,)``."""

    rows: Tensor
    labels: Tensor
    keys: Tensor
    banks: Tensor

    @classmethod
    def joined(cls, parts: list[Held]) -> Held:
        """Return several as one."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def where(self, kept: Tensor) -> Held:
        """Return those for which ``kept``, booleans ``(n,)``, is true."""
        return Held(*(tensor[kept] for tensor in self))


class Bank:
    """Rows of the training steps, of which the ranks together keep ``size``; all, where ``size`` is None.

    Each row has a key, and those with the smallest keys are kept. It is the row's age for ``"fifo"``, so that the
    newest stay, and a random number for ``"reservoir"``, so that at any time what stays is a uniform sample, without
    replacement, of all rows that came. The keys of all ranks are compared: together they hold what one process would.

    Args:
        size: Most rows that are kept over all ranks.
        policy: ``"fifo"`` or ``"reservoir"``.
        per_component: Whether each component has a bank of its own, of ``size / K`` rows, for those that were most
            probably its own when they came: a component of few rows keeps older ones.

    Attributes:
        n_dropped: How many rows of this rank were not finite, since it was last set to zero.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    References:
        Vitter, Random sampling with a reservoir, 1985.
    """

    def __init__(self, size: int | None = None, policy: str = "fifo", *, per_component: bool = False) -> None:
        checks.check_integer("bank_size", size, optional=True)
        checks.check_choice("bank_policy", policy, POLICIES)
        checks.check_bool("bank_per_component", per_component)
        self.size, self.policy, self.per_component = size, policy, per_component
        self.n_dropped = 0
        self._parts: list[Held] = []
        self._n_banks, self._seed = 1, 0

    def begin(self, n_components: int, seed: int) -> None:
        """Prepare for a mixture of K components; the draws of a reservoir depend on seed, step and rank alone."""
        self._seed, self.n_dropped = seed, 0
        self.clear()
        if self.per_component:
            self._n_banks = n_components
        if self.size is not None and self.size < self._n_banks:
            raise ValueError(
                f"Expected `bank_size` of at least {self._n_banks}, one row for each component, but got {self.size}."
            )

    def add(self, batch: Batch, step: int, components: Tensor | None = None) -> None:
        """Take in the rows of a step of this rank; a bank of a size counts those that are not finite, and drops them.

        Args:
            batch: Rows and their labels.
            step: Number of the step, larger than those before.
            components: The most probable component of each row, shape ``(n,)``, where each has a bank of its own.
        """
        if not self.per_component or components is None:
            components = torch.zeros_like(batch.labels)
        held = Held(*batch, self._keys(len(batch.rows), step).to(batch.rows.device), components)
        if self.size is None:
            self._parts.append(held)
            return
        finite = batch.finite()
        self.n_dropped += int((~finite).sum())
        self._parts.append(held.where(finite))
        # Rows too many are dropped now and then: a copy of the bank at every step would cost more than EM.
        if sum(len(part.rows) for part in self._parts) > SLACK * self.size:
            self._compact()

    def batch(self) -> Batch | None:
        """Return this rank's rows of the bank, None where nothing came; every rank has to call this."""
        if not self._parts:
            return None
        held = self._compact()
        if self.size is not None:
            # A row may be among the smallest keys here, and not over all ranks.
            parts = gather_rows(torch.stack([held.keys, held.banks.to(held.keys.dtype)], -1))
            keys, banks = torch.cat(parts).unbind(-1)
            kept = _smallest(keys, banks, self._quota())
            held = held.where(kept.split([len(part) for part in parts])[this_rank()[0]])
            self._parts = [held]
        return Batch(held.rows, held.labels)

    def clear(self) -> None:
        """Forget all rows."""
        self._parts = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rows of all ranks; every rank has to call this."""
        if self.batch() is None:
            return {}
        held = self._parts[0]
        columns = (held.rows, *(tensor[:, None] for tensor in held[1:]))
        return {name: torch.cat(gather_rows(t)).cpu() for name, t in zip(Held._fields, columns, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take this rank's part of rows that `state_dict` gave, on any number of ranks."""
        rank, n_ranks = this_rank()
        rows, *columns = (state[name][rank::n_ranks].to(device) for name in Held._fields)
        held = Held(rows, *(column[:, 0] for column in columns))
        self._parts = [held if self.per_component else held._replace(banks=torch.zeros_like(held.banks))]

    def _quota(self) -> int:
        return (self.size or 0) // self._n_banks

    def _compact(self) -> Held:
        """Join the parts, and drop the rows that this rank alone already knows to be too many."""
        held = Held.joined(self._parts)
        if self.size is not None:
            held = held.where(_smallest(held.keys, held.banks, self._quota()))
        self._parts = [held]
        return held

    def _keys(self, n: int, step: int) -> Tensor:
        rank, n_ranks = this_rank()
        if self.policy == "reservoir":
            # Seeds of steps and ranks must differ, and a generator's state must not have to be saved.
            generator = torch.Generator().manual_seed(((self._seed * 1_000_003 + step) * 4099 + rank) % 2**63)
            return torch.rand(n, dtype=torch.float64, generator=generator, device="cpu")
        # Within a step the rows of rank 0 come first: the order in which one process would read the whole batch.
        places = (rank + (1.0 + torch.arange(n, dtype=torch.float64, device="cpu")) / (n + 1)) / n_ranks
        return -(step + places)


def _smallest(keys: Tensor, banks: Tensor, size: int) -> Tensor:
    """Return which rows have one of the ``size`` smallest keys of their bank, booleans ``(n,)``."""
    order = keys.argsort()
    order = order[banks[order].argsort(stable=True)]
    sorted_banks = banks[order].contiguous()
    place = torch.arange(len(order), device=keys.device) - torch.searchsorted(sorted_banks, sorted_banks)
    return torch.zeros(len(keys), dtype=torch.bool, device=keys.device).index_put((order,), place < size)
