"""Which mark each component and each label has: neighbours differ, and equal marks mean agreement."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tgmm_nn.plotting.figures import COLORS, LINES, MARKERS

__all__ = ["component_marks", "match_labels", "spread_marks"]

# Number of marks before one comes again.
N_MARKS = math.lcm(len(COLORS), len(MARKERS), len(LINES))


def component_marks(means: Tensor) -> dict[int, int]:
    """Return the number of the mark of each component, such that those of one colour are far from each other.

    Colours are given greedily, each component that whose nearest bearer is farthest away; markers are all different
    as long as there are enough.

    Args:
        means: Means in the plane, shape ``(K, 2)``, or along a line, ``(K, 1)``.

    Example:
        >>> marks = component_marks(torch.arange(8.0)[:, None])
        >>> [marks[k] % len(COLORS) for k in range(8)]
        [0, 1, 2, 3, 4, 5, 6, 0]
    """
    distance = torch.cdist(means, means).fill_diagonal_(math.inf)
    colors = torch.full((len(means),), -1)
    for k in [*range(len(means))] * 3:  # later rounds know all the others
        bearers = colors[:, None] == torch.arange(len(COLORS))
        nearest = torch.where(bearers, distance[k, :, None], math.inf).amin(0)
        if colors[k] < 0 or nearest.max() > nearest[colors[k]]:
            colors[k] = nearest.argmax()
    used: Counter[int] = Counter()
    markers: Counter[int] = Counter()
    marks = {}
    for k, color in enumerate(colors.tolist()):
        candidates = range(color, N_MARKS, len(COLORS))
        marks[k] = min(candidates, key=lambda n: (used[n], markers[n % len(MARKERS)], n))
        used[marks[k]] += 1
        markers[marks[k] % len(MARKERS)] += 1
    return marks


def match_labels(components: Tensor, labels: Tensor) -> dict[int, int]:
    """Return the component of each label that has one in the one-to-one matching with the most agreeing rows.

    Args:
        components: Component of each row, shape ``(n,)``.
        labels: Label of each row, shape ``(n,)``; a negative one is none.

    Example:
        >>> match_labels(torch.tensor([1, 1, 0, 0]), torch.tensor([5, 5, 7, -1]))
        {7: 0, 5: 1}
    """
    ks, k = components[labels >= 0].unique(return_inverse=True)
    values, v = labels[labels >= 0].unique(return_inverse=True)
    table = torch.zeros(len(ks), len(values)).index_put_((k, v), torch.tensor(1.0), accumulate=True)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return {int(values[column]): int(ks[row]) for row, column in pairs if table[row, column] > 0}


def spread_marks(labels: list[int], matched: Mapping[int, int], marks: Mapping[int, int]) -> dict[int, int]:
    """Return the number of the mark of each label: that of its component, or one that no component has.

    Example:
        >>> spread_marks([3, 4], {4: 1}, {0: 5, 1: 0})
        {3: 1, 4: 0}
    """
    free = (number for number in itertools.count() if number not in marks.values())
    return {label: marks[matched[label]] if label in matched else next(free) for label in labels}
