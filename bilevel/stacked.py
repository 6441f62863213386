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
# products that are done batch by batch before: a first look costs some ten of each batch, and the
# first cross-entropy in vmap has torch import parts of itself, which takes a second
PATIENCE = 2048


def stacked(batches: Sequence[Any]) -> tuple[Any, Any] | None:
    """All of them, nests of tensors of the same shapes, along a new first dimension, and which
    leaves have it: 0, or None for a tensor that is the same in all, as a table is. None where they
    are anything else."""
    each = [list(leaves(batch, "")) for batch in batches]
    if not each[0] or len({len(parts) for parts in each}) > 1:
        return None
    found: list[Tensor] = []
    dims: list[int | None] = []
    for column in zip(*each, strict=True):
        paths, parts = zip(*column, strict=True)
        if len(set(paths)) > 1 or not all(map(_is_plain, parts)):
            return None
        if len({(t.shape, t.dtype, t.device) for t in parts}) > 1:
            return None
        shared = all(part is parts[0] for part in parts)
        found.append(parts[0] if shared else torch.stack(parts))
        dims.append(None if shared else 0)
    return rebuild(batches[0], iter(found)), rebuild(batches[0], iter(dims))


def _is_plain(leaf: Any) -> bool:
    # a subclass may be anything, and so may what belongs to a graph
    strided = type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_nested
    return strided and not leaf.requires_grad


def mean_of_each(loss: Callable[[Any], Tensor], batches: Any, dims: Any) -> Tensor:
    """The mean of the loss over what :func:`stacked` returns.

    Raises:
        RuntimeError, ValueError: a loss that vmap cannot take: one that asks for numbers, or draws
            them at random, writes into what is shared, or leaves torch.
    """
    found = torch.func.vmap(loss, in_dims=(dims,))(batches)
    if not isinstance(found, Tensor) or found.dim() != 1:
        raise ValueError("not a 0-dim tensor of each batch")
    return found.mean()


class Largest(Watching):
    """Sees how many entries the largest tensor has, of a batch or of what operations make of it:
    ``entries``."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.entries = max((leaf.numel() for _, leaf in leaves(batch, "")), default=0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(t.numel() for t in tensors((made,))), 0)
        return made


class Outliving(TorchFunctionMode):
    """Sees whether anything of a loss outlives it (``any``): a tensor that someone still holds, to
    show it later, and would hold as what only vmap understands; a hook on a gradient, which vmap
    leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []
        self._hooks = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(t) for t in tensors((made,))]
        self._hooks |= func is Tensor.register_hook
        return made

    @property
    def any(self) -> bool:
        return self._hooks or any(made() is not None for made in self._made)


def few_enough(count: int, of_all: int, of_one: int, device: torch.device) -> int:
    """How many of so many batches are to be evaluated as one, a divisor: by the entries of the
    largest tensor in a loss of all of them, and of one."""
    if of_all == of_one:  # it is not one that grows with the batches
        return count
    most = MOST_ENTRIES.get(device.type, math.inf) * count / of_all
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(most, 1))
