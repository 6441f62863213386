"""The batches of several iterations, as tensors that a graph takes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.data import UNKNOWN
from bilevel.drawn import Batches
from bilevel.layout import leaves, rebuild

ROOM = 2**26  # bytes of batches in one call at most


class Room(NamedTuple):
    """Where the batches of several iterations are put for a graph.

    Attributes:
        slots: iterations at most.   stacks: of each level, for each tensor of a batch, that of the
            different ones.   places: which of them each iteration takes, one row for each level.
    """

    slots: int
    stacks: list[list[Tensor]]
    places: Tensor

    def fill(self, pool: Pool) -> None:
        with torch.no_grad():  # batches may be part of someone's graph
            for level, stacks in enumerate(self.stacks):
                for j, stack in enumerate(stacks):
                    tensors = [batch[j] for batch in pool.tensors[level]]
                    torch.stack(tensors, out=stack[: len(tensors)])
                rows = pool.rows[level]
                self.places[level, : len(rows)] = torch.tensor(rows)


class Pool:
    """The batches of several iterations: of each level the outer, the inner, the Hessian ones.

    Args:
        loops: whether the outer and the Hessian batches are joined; any number is of one form.
        different: how many of each level can be different ones. Of a list, where a batch that
            comes again is the same as before, it is looked at and stored once.

    Attributes:
        counts: of batches in each iteration.   kinds: what all of them have in common.
        tensors: of the different ones.   rows: which of these each iteration has, one after the
            other.   iterations: how many.
    """

    def __init__(self, loops: tuple[bool, bool], different: Sequence[int]) -> None:
        self.loops, self.different = (loops[0], False, loops[1]), different
        self.counts: tuple[int, ...] = ()
        self.kinds: list[Any] = [None, None, None]
        self.tensors: list[list[Sequence[Tensor]]] = [[], [], []]
        self.rows: list[list[int]] = [[], [], []]
        self.iterations = 0
        self._known: list[dict[int, int]] = [{}, {}, {}]  # of a list: the row of each id

    @property
    def form(self) -> list[Any]:
        """What the batches of another iteration must have as well, to be in the same graph."""
        counted = zip(self.loops, self.counts, self.kinds, strict=True)
        return [(0 if loop else count, kind) for loop, count, kind in counted]

    def add(self, batches: Batches) -> bool:
        """Another iteration; whether it has what those before it have, and tensors only."""
        outer, inner, hessian, more = batches
        if len(inner) > 1 and all(batch is inner[0] for batch in inner):
            inner = inner[:1]
        levels = [outer, *more] if more else [outer], inner, hessian or [None]
        counts = len(levels[0]), len(inner), len(levels[2])
        if counts != (self.counts or counts):
            return False
        for j in range(3):  # plain statements: this is done in every iteration
            known, rows = self._known[j], self.rows[j]
            for batch in levels[j]:
                row = known.get(id(batch))
                if row is None:
                    row = self._keep(j, batch)
                if row is None:  # as it was before this iteration
                    for kept, count in zip(self.rows, counts, strict=True):
                        del kept[self.iterations * count :]
                    return False
                rows.append(row)
        self.counts = counts
        self.iterations += 1
        return True

    def room(self, counts: Sequence[int], slots: int) -> Room:
        """For so many iterations, with so many batches of each level, like those of the first; for
        fewer, where these would take more than ``ROOM`` bytes."""
        heads = [level[0] for level in self.tensors]
        sizes = [sum(t.nbytes for t in head) for head in heads]

        def stored(slots: int) -> list[int]:
            return [min(slots * n, d) for n, d in zip(counts, self.different, strict=True)]

        def size(slots: int) -> int:
            return sum(n * size for n, size in zip(stored(slots), sizes, strict=True))

        if size(slots) > ROOM:
            slots = max(1, min(slots, ROOM // size(1)))
        stacks = [
            [t.new_empty(n, *t.shape) for t in head]
            for n, head in zip(stored(slots), heads, strict=True)
        ]
        return Room(slots, stacks, torch.zeros(3, slots * max(counts), dtype=torch.int64))

    def _keep(self, level: int, batch: Any) -> int | None:
        """The row of one that is not known, or None where it does not fit."""
        kind, tensors = tensors_of(batch)
        for t in tensors:
            if t.layout is not torch.strided:
                return None
            kind += (t.shape, t.dtype, t.device)
        row = len(self.tensors[level])
        if not kind or kind != (self.kinds[level] or kind) or row == self.different[level]:
            return None
        self.kinds[level] = kind
        self.tensors[level].append(tensors)
        if self.different[level] < UNKNOWN:
            self._known[level][id(batch)] = row
        return row


def tensors_of(batch: Any) -> tuple[tuple[Any, ...], Sequence[Tensor]]:
    """(its structure, its tensors) of a batch, which may be filled anew by the time the next one
    comes; ((), ...) where it holds anything else."""
    if batch is None:
        return (None,), ()
    if type(batch) is tuple or type(batch) is list:  # the usual ones, at once
        for t in batch:
            if not isinstance(t, Tensor):
                break
        else:
            return (type(batch), len(batch)), tuple(batch)
    pairs = list(leaves(batch, ""))
    tensors = [leaf for _, leaf in pairs]
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        return (), ()
    return (type(batch), tuple(path for path, _ in pairs)), tensors


def skeleton(batch: Any) -> Any:
    return None if batch is None else rebuild(batch, iter([None] * len(list(leaves(batch, "")))))
