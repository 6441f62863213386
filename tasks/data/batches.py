"""Re-iterables of minibatches, episodes and blocks of text, reproducible and resumable.

Data sets here fit on the device, so a batch is one ``index_select`` there: no workers, no copies.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def generator(seed: int, *path: int) -> torch.Generator:
    """A CPU generator whose stream depends on (seed, \\*path) only."""
    digest = hashlib.blake2b(repr((int(seed), *path)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def count(value: int, name: str) -> int:
    """The value, if it is a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


class Epochs(ABC):
    """An endless sequence of epochs of ``len(self)`` batches; iterating once yields one epoch.

    What epoch e holds depends on the seed and e alone, never on the device, on global random
    state, or on what was drawn before. Every ``iter`` starts the next epoch, also where the last
    one was left early. :meth:`state_dict` is the place of the latest batch handed out; the first
    ``iter`` after :meth:`load_state_dict` finishes the interrupted epoch from there::

        data.load_state_dict(saved)
        for batch in data:      # the rest of the interrupted epoch
            ...
        for batch in data:      # the next one, whole
            ...

    Runs that are to see the same batches each take a new object, or one set back by
    ``load_state_dict`` to the ``state_dict`` it had when new.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        self._epoch = 0
        self._position = 0  # batches of this epoch already handed out
        self._restored = False

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch."""

    @abstractmethod
    def _start(self, epoch: int) -> Callable[[int], Any]:
        """The function from position to batch in this epoch."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """The numbers that give a position its meaning."""

    def __iter__(self) -> Iterator[Any]:
        if self._position and not self._restored:  # left early: the next epoch
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = False
        epoch, first = self._epoch, self._position
        batch = self._start(epoch)
        for position in range(first, len(self)):
            if position + 1 < len(self):
                self._epoch, self._position = epoch, position + 1
            else:
                self._epoch, self._position = epoch + 1, 0
            yield batch(position)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it refers to; plain numbers."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position saved from data of the same size, batch size and seed."""
        mine = self.state_dict()
        if set(state) != set(mine):
            raise ValueError(
                f"this is no position in {type(self).__name__}: it holds "
                f"{sorted(state)}, not {sorted(mine)}"
            )
        for key, value in self._identity().items():
            if state[key] != value:
                raise ValueError(
                    f"this position was saved with {key} {state[key]}, and here {key} is {value}: "
                    f"the batches would not be the same; build the data as they were"
                )
        if state["epoch"] < 0 or not 0 <= state["position"] < len(self):
            raise ValueError(
                f"there is no batch {state['position']} of epoch {state['epoch']}: "
                f"an epoch has {len(self)} batches"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._restored = True


def endless(data: Epochs) -> Iterator[Any]:
    """The batches of one epoch after the other."""
    while True:
        yield from data


class Batches(Epochs):
    """Shuffled minibatches (images, labels).

    Every epoch holds each sample once. Where ``size`` does not divide their number n, the last
    batch of the epoch is smaller; with ``drop_last=True`` it is left out (other samples in each
    epoch), so that all batches have one shape, as compiled code prefers.

    Args:
        images: shape (n, ...), any device.
        labels: shape (n, ...), same device.
        size: samples per batch; larger than n gives one batch of n.
        seed: the order of epoch e depends on (seed, e) only.
        drop_last: leave out the last, smaller batch of each epoch.

    Example:
        >>> data = Batches(torch.arange(5.0), torch.arange(5), size=2, seed=0)
        >>> sorted(label for _, labels in data for label in labels.tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self, images: Tensor, labels: Tensor, size: int, seed: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__(seed)
        self.images, self.labels, self.drop_last = images, labels, drop_last
        self.samples = len(images)
        if self.samples == 0 or len(labels) != self.samples:
            raise ValueError(
                f"batches need as many images as labels, and one at least: "
                f"there are {self.samples} images and {len(labels)} labels"
            )
        if images.device != labels.device:
            raise ValueError(
                f"images are on {images.device} and labels on {labels.device}: move both to one"
            )
        self.size = min(count(size, "size"), self.samples)

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.size)
        return whole + (rest > 0 and not self.drop_last)

    def _identity(self) -> dict[str, Any]:
        names = ("seed", "samples", "size", "drop_last")
        return {name: getattr(self, name) for name in names}

    def _start(self, epoch: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        order = torch.randperm(self.samples, generator=generator(self.seed, epoch))
        order = order.to(self.images.device)

        def batch(position: int) -> tuple[Tensor, Tensor]:
            index = order[position * self.size : (position + 1) * self.size]
            return self.images.index_select(0, index), self.labels.index_select(0, index)

        return batch


class Episodes(Epochs):
    """Few-shot problems: pairs (support, query), each a batch (images, labels) of the same classes.

    An episode draws ``n_way`` classes and, of each, ``k_shot`` support and ``queries`` query
    images, all different. Labels are 0 ... n_way - 1 in the order drawn; images are in the order
    of their labels.

    The support is the inner batch and the query the outer one. ``bilevel.solve(data=...)`` takes
    (outer batch, inner batch): give it ``Episodes(..., outer_first=True)``.

    Args:
        images, labels: the classes to draw from, e.g. ``*dataset.train``.
        n_way: classes per episode.
        k_shot, queries: images of each class in the support and in the query.
        seed: episode i of epoch e depends on (seed, e, i) only.
        per_epoch: episodes per epoch.
        outer_first: yield (query, support) instead.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        n_way: int = 5,
        k_shot: int = 1,
        queries: int = 15,
        seed: int = 0,
        per_epoch: int = 100,
        outer_first: bool = False,
    ) -> None:
        super().__init__(seed)
        self.images, self.outer_first = images, outer_first
        self.n_way, self.k_shot = count(n_way, "n_way"), count(k_shot, "k_shot")
        self.queries, self.per_epoch = count(queries, "queries"), count(per_epoch, "per_epoch")
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images)} images and {len(labels)} labels")
        present, counts = labels.cpu().unique(return_counts=True)
        if len(present) < n_way:
            raise ValueError(f"cannot draw n_way={n_way} classes: there are {len(present)}")
        if int(counts.min()) < k_shot + queries:
            raise ValueError(
                f"an episode takes k_shot + queries = {k_shot} + {queries} different images of a "
                f"class, and class {int(present[counts.argmin()])} has {int(counts.min())}"
            )
        self._members = labels.cpu().argsort(stable=True).split(counts.tolist())

    def __len__(self) -> int:
        return self.per_epoch

    def _identity(self) -> dict[str, Any]:
        names = ("seed", "n_way", "k_shot", "queries", "per_epoch")
        return {**{name: getattr(self, name) for name in names}, "samples": len(self.images)}

    def _start(self, epoch: int) -> Callable[[int], tuple[tuple[Tensor, Tensor], ...]]:
        device = self.images.device
        of_way = torch.arange(self.n_way, device=device)
        shots = (self.k_shot, self.queries)

        def episode(position: int) -> tuple[tuple[Tensor, Tensor], ...]:
            draw = generator(self.seed, epoch, position)
            rows = []
            for way in torch.randperm(len(self._members), generator=draw)[: self.n_way].tolist():
                members = self._members[way]
                chosen = torch.randperm(len(members), generator=draw)[: sum(shots)]
                rows.append(members[chosen])
            drawn = torch.stack(rows).to(device)  # n_way x (k_shot + queries)
            support, query = (
                (self.images.index_select(0, index.flatten()), of_way.repeat_interleave(shot))
                for index, shot in zip(drawn.split(shots, dim=1), shots, strict=True)
            )
            return (query, support) if self.outer_first else (support, query)

        return episode


class Blocks(Epochs):
    """Shuffled blocks of a text: (tokens, targets), int64 of shape (size, length) each.

    Targets are the tokens one further on. An epoch cuts the text, from a random offset below
    ``length``, into blocks that do not overlap; what is left over at the ends (fewer than
    2 ``length`` tokens, and fewer than ``size`` blocks) comes in other epochs.

    Args:
        tokens: shape (n,), e.g. ``text.train``.
        length: tokens per block.
        size: blocks per batch.
        seed: epoch e depends on (seed, e) only.
    """

    def __init__(self, tokens: Tensor, length: int, size: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.tokens, self.length = tokens, count(length, "length")
        self.size, self.samples = count(size, "size"), len(tokens)
        self._blocks = (self.samples - self.length) // self.length  # wherever the cut begins
        if self._blocks < self.size:
            raise ValueError(
                f"{self.samples} tokens are too few for one batch of {size} blocks of {length}: "
                f"that takes {(size + 1) * length}; use smaller or fewer blocks"
            )

    def __len__(self) -> int:
        return self._blocks // self.size

    def _identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("seed", "samples", "length", "size")}

    def _start(self, epoch: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        draw = generator(self.seed, epoch)
        offset = int(torch.randint(self.length, (), generator=draw))
        order = torch.randperm(self._blocks, generator=draw) * self.length + offset
        order = order.to(self.tokens.device)
        within = torch.arange(self.length + 1, device=self.tokens.device)

        def batch(position: int) -> tuple[Tensor, Tensor]:
            starts = order[position * self.size : (position + 1) * self.size]
            window = self.tokens[starts[:, None] + within]
            return window[:, :-1], window[:, 1:]

        return batch
