"""Several batches as one: one call of ``torch.func.vmap``, whose mean, and all that is derived from
it, is that of the losses of each, whatever they do with the rows of a batch.

A product of a small problem takes the time of its dispatch, eight batches that of eight.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.layout import leaves, rebuild
from bilevel.reuse import Watching, tensors

# entries of the largest tensor of the loss of all batches: beyond, caches of a core no longer hold
# it, and one batch after the other is as fast or faster (`python -m benchmarks stacked`)
MOST_ENTRIES = {"cpu": 2**20}


def stacked(batches: Sequence[Any]) -> Any:
    """All of them, nests of tensors of the same shapes, along a new first dimension; None where
    they are anything else."""
    each = [list(leaves(batch, "")) for batch in batches]
    if not each[0] or len({len(parts) for parts in each}) > 1:
        return None
    found = []
    for column in zip(*each, strict=True):
        paths, parts = zip(*column, strict=True)
        if len(set(paths)) > 1 or not all(map(_is_plain, parts)):
            return None
        if len({(t.shape, t.dtype, t.device) for t in parts}) > 1:
            return None
        found.append(torch.stack(parts))
    return rebuild(batches[0], iter(found))


def _is_plain(leaf: Any) -> bool:
    # a subclass may be anything, and so may what belongs to a graph
    strided = type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_nested
    return strided and not leaf.requires_grad


def mean_of_each(loss: Callable[[Any], Tensor], batches: Any) -> Tensor:
    """The mean of the loss over stacked batches.

    Raises:
        RuntimeError, ValueError: a loss that vmap cannot take: one that asks for numbers, or draws
            them at random, writes into what is shared, or leaves torch.
    """
    found = torch.func.vmap(loss)(batches)
    if not isinstance(found, Tensor) or found.dim() != 1:
        raise ValueError("not a 0-dim tensor of each batch")
    return found.mean()


class Largest(Watching):
    """Sees how many entries the largest tensor has that an operation makes: ``entries``."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(t.numel() for t in tensors((made,))), 0)
        return made


class Remaining(TorchFunctionMode):
    """Sees what functions return, and whether any of it is still held by someone: a loss that keeps
    its tensors, to show them later, would be left with what only vmap understands."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self._seen += [weakref.ref(t) for t in tensors((made,))]
        return made

    @property
    def any(self) -> bool:
        return any(seen() is not None for seen in self._seen)


def few_enough(count: int, of_all: int, of_one: int, device: torch.device) -> int:
    """How many of so many batches are to be evaluated as one, a divisor: by the entries of the
    largest tensor in a loss of all, and of one of them."""
    if of_all == of_one:  # it is not one that grows with the batches
        return count
    most = MOST_ENTRIES.get(device.type, math.inf) * count / of_all
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(most, 1))
