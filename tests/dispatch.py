"""What operations do beside their result: the largest storage that one makes, and values that go to the host."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Note the largest storage that an operation makes, in bytes and in elements."""

    def __init__(self):
        super().__init__()
        self.bytes = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type != "meta":
                size = 0 if t.untyped_storage().data_ptr() in given else t.untyped_storage().nbytes()
                self.bytes = max(self.bytes, size)
                self.elements = max(self.elements, size // t.element_size())
        return out


class HostReads(TorchDispatchMode):
    """Count the operations that give a tensor's value to the host, which on a GPU wait for all work before them.

    Args:
        forbidden: Whether to raise at the first.
    """

    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "allclose", "_unique2")

    def __init__(self, forbidden=False):
        super().__init__()
        self.counts, self.forbidden = Counter(), forbidden

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in self.READS:
            self.counts[name] += 1
            if self.forbidden:
                raise AssertionError(f"{func} reads a value on the host")
        return func(*args, **(kwargs or {}))
