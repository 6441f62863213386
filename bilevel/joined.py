"""Several batches as one, where a loss says the same of it: an evaluation instead of one for each.

A product of a small problem takes the time of its dispatch, eight batches that of eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.layout import leaves, rebuild
from bilevel.reuse import Watching, tensors

# entries of the largest tensor of the loss of all the rows: beyond, caches of a core no longer hold
# them, and several batches are as fast or faster (`python -m benchmarks joined`)
MOST_ENTRIES = {"cpu": 2**20}


class Joins(NamedTuple):
    """Of a loss and a number of batches.

    Attributes:
        batches: how many are evaluated as one; 1: none.   times: that they were.
    """

    batches: int
    times: int = 0

    @property
    def looks(self) -> bool:
        """Whether to see that it is so: at the times 1, 2, 4, 8, ... of them. At the start all
        weights may be equal, and hide that they are normalised within a batch."""
        return self.times + 1 & self.times == 0


def joined(batches: Sequence[Any]) -> Any:
    """The rows of all batches, nests of tensors of the same shapes; None where they are not."""
    each = [list(leaves(batch, "")) for batch in batches]
    columns = list(zip(*each, strict=False))
    if not columns or len({len(parts) for parts in each}) > 1:
        return None
    rows = []
    for column in columns:
        paths, tensors = zip(*column, strict=True)
        if len(set(paths)) > 1 or not all(map(_has_rows, tensors)):
            return None
        if len({(t.shape, t.dtype, t.device) for t in tensors}) > 1:
            return None
        rows.append(torch.cat(tensors))
    return rebuild(batches[0], iter(rows))


def _has_rows(leaf: Any) -> bool:
    # a subclass may be anything, and so may what belongs to a graph
    plain = type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_nested
    return plain and leaf.dim() > 0 and not leaf.requires_grad


class Largest(Watching):
    """Sees how many entries the largest tensor has that an operation makes: ``entries``."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(t.numel() for t in tensors((made,))), 0)
        return made

    def batches(self, count: int, device: torch.device) -> int:
        """How many of so many batches, whose rows it was, are few enough: a divisor."""
        most = MOST_ENTRIES.get(device.type, math.inf) * count / self.entries
        return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(most, 1))
