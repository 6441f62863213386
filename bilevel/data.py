"""Batches without end from a re-iterable, with a position that survives a restart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bilevel.randomness import all_generators, restore_generators
from bilevel.require import shown

CPU = torch.device("cpu")
UNKNOWN = 2**31  # batches; more than anyone asks for


class Cycle:
    """The batches of ``data`` again and again; a new pass calls ``iter(data)`` anew.

    The position is the number of batches of the present pass and the generators at its start, so
    that a shuffling DataLoader goes on with the same order; where batches were looked at ahead of
    their turn, the position before them. Data that has ``state_dict`` and
    ``load_state_dict`` (a stateful loader) keeps its own position. A sampler that has
    ``set_epoch`` (a DistributedSampler) is told the number of the pass, and so shuffles anew; so
    is a batch sampler, and the sampler in it. What workers draw that stay from pass to pass
    (``persistent_workers``) depends on all their passes, and is not resumed.

    Attributes:
        length: how many batches a pass has; ``UNKNOWN`` where the data does not tell.
        different: how many can be different ones; ``UNKNOWN`` where each pass has its own.

    Raises:
        TypeError: the data cannot be iterated over, or only once, or gives rows.
        ValueError: it is empty.
    """

    def __init__(self, data: Any, name: str) -> None:
        if isinstance(data, type) or not hasattr(data, "__iter__") | hasattr(data, "__getitem__"):
            raise TypeError(
                f"{name} is {shown(data)} ({type(data).__name__}), which cannot be iterated over; "
                f"pass a DataLoader or a list of batches."
            )
        if isinstance(data, dict | str | bytes) or hasattr(data, "__array__"):  # a Tensor has it
            raise TypeError(
                f"{name} is a {type(data).__name__}, which is one batch rather than a series of "
                f"batches; pass [batch], or a DataLoader."
            )
        if _is_batch(data):
            pairs = "pairs (outer_batch, inner_batch), as [((V, v), (A, a))],"
            raise TypeError(
                f"{name} is a {type(data).__name__} of {len(data)} tensors with as many rows each, "
                f"such as (inputs, labels), which is one batch rather than a series of batches; "
                f"pass {pairs if name == 'data' else '[(inputs, labels)],'} or a DataLoader."
            )
        if isinstance(data, Iterator):
            raise TypeError(
                f"{name} is a {type(data).__name__}, which can be iterated over only once, but is "
                f"needed again and again; pass a DataLoader, or list({name})."
            )
        # a Dataset of episodes is (outer_batch, inner_batch) pairs
        if isinstance(data, Dataset) and not hasattr(data, "__iter__") and name != "data":
            raise TypeError(
                f"{name} is a {type(data).__name__}, a dataset of single rows rather than a series "
                f"of batches; pass DataLoader(dataset, batch_size=...), with batch_size=None if "
                f"its items are batches already."
            )
        self.data, self.name = data, name
        self._iterator: Iterator[Any] | None = None
        self._position = 0
        self._passes = 0  # begun so far
        stay = bool(getattr(data, "persistent_workers", False))
        self._starts = stay and not hasattr(data, "load_state_dict")  # workers that stay
        self._start: dict[str, Any] = {}
        # what comes next, where it was read already: the batch or why there is none, and the state
        # before it
        self._ahead: deque[tuple[Any, Exception | None, dict[str, Any]]] = deque()
        try:
            self.length = len(data)
        except (TypeError, NotImplementedError):  # as of an IterableDataset
            self.length = UNKNOWN
        self._listed = type(data) in (list, tuple)  # and draws no random numbers
        self.different = self.length if self._listed else UNKNOWN

    def next(self) -> Any:
        return self.take(1)[0]

    def take(self, count: int) -> list[Any]:
        if not self._listed:
            return [self._next() for _ in range(count)]
        found = self._listing(count)
        self._position = (self._position + count) % len(self.data)
        return found

    def peek(self) -> Any:
        """What ``next`` will give; None where it will raise."""
        try:
            return self.look(1)[0]
        except Exception:  # in its turn
            return None

    def look(self, count: int) -> list[Any]:
        """What ``take`` will give, or raise."""
        if self._listed:
            return self._listing(count)
        self._look(count)
        for _, error, _ in islice(self._ahead, count):
            if error is not None:
                raise error
        return [batch for batch, _, _ in islice(self._ahead, count)]

    def _look(self, count: int) -> None:
        while len(self._ahead) < count and not (self._ahead and self._ahead[-1][1]):
            before = self._state()
            try:
                self._ahead.append((self._read(), None, before))
            except Exception as error:
                self._ahead.append((None, error, before))

    def _listing(self, count: int) -> list[Any]:
        """The next ones of a list, which need not be read to be looked at."""
        data, at = self.data, self._position
        length = len(data)
        if not length:
            raise self._empty()
        at = at if at < length else 0  # it may have become shorter
        found = [data[at]] if count == 1 else list(data[at : at + count])
        if len(found) < count:
            found = [data[(at + j) % length] for j in range(count)]
        for batch in found:
            if batch is None:
                raise self._none()
        return found

    def _empty(self) -> ValueError:
        return ValueError(
            f"{self.name} is empty: iterating over it gave no batch; pass at least one "
            f"(with a DataLoader, see drop_last and the length of its dataset)."
        )

    def _none(self) -> TypeError:
        return TypeError(
            f"{self.name} gave None as a batch, which stands for no batch at all; give "
            f"something else, or pass {self.name}=None and write a loss without a batch."
        )

    def _next(self) -> Any:
        if not self._ahead:
            return self._read()
        batch, error, _ = self._ahead.popleft()
        if error is not None:
            raise error
        return batch

    def _read(self) -> Any:
        batch = self._advance()
        if batch is None:
            raise self._none()
        return batch

    def _advance(self) -> Any:
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._position == 0:
                raise self._empty() from None
            self._begin()
            return self._advance()
        self._position += 1
        return batch

    def _begin(self) -> None:
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._passes)
        self._passes += 1
        self._start = self._generators()
        if self._starts:
            # the iterator that starts them draws one number more than those of later passes
            iter(self.data)
            self._restore(self._start)
        self._starts = False
        self._iterator = iter(self.data)
        self._position = 0

    def _samplers(self) -> list[Any]:
        """A DataLoader's sampler and batch sampler, and the sampler in that, each once."""
        batches = getattr(self.data, "batch_sampler", None)
        found = [getattr(self.data, "sampler", None), batches, getattr(batches, "sampler", None)]
        return list({id(sampler): sampler for sampler in found if sampler is not None}.values())

    def _own(self) -> list[torch.Generator]:
        """Generators that the data itself carries: a DataLoader's and its samplers'."""
        found = [getattr(holder, "generator", None) for holder in (self.data, *self._samplers())]
        return [g for g in dict.fromkeys(found) if isinstance(g, torch.Generator)]

    def _generators(self) -> dict[str, Any]:
        own = [generator.get_state() for generator in self._own()]
        return {"global": all_generators(CPU), "own": own}

    def _restore(self, states: dict[str, Any]) -> None:
        if not states:
            return
        restore_generators(states["global"], CPU)
        own, saved = self._own(), states["own"]
        if len(own) != len(saved):
            raise ValueError(
                f"{self.name} has {len(own)} torch.Generator of its own, but the checkpoint "
                f"holds {len(saved)}; resume with the data of the interrupted run."
            )
        for generator, state in zip(own, saved, strict=True):
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        if not self._ahead:
            return self._state()
        # a pass that begins among them draws from the generators as they were then
        return {**self._ahead[0][2], "ahead": [before.get("now", {}) for *_, before in self._ahead]}

    def _state(self) -> dict[str, Any]:
        if self._listed:
            return {"position": self._position, "length": self.length}
        if hasattr(self.data, "load_state_dict"):
            return {"data": self.data.state_dict(), "position": self._position}
        return {
            "position": self._position,
            "length": self.length,
            "passes": self._passes,
            "start": self._start,
            "now": self._generators(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the global generators are left as they are."""
        present = all_generators(CPU)
        keeps = hasattr(self.data, "load_state_dict")  # a position of its own
        if ("data" in state, "passes" in state) != (keeps, not (keeps or self._listed)):
            raise ValueError(
                f"{self.name} is a {type(self.data).__name__}, but the checkpoint was written with "
                f"data that keeps its position otherwise (a list, a DataLoader and data with a "
                f"state_dict differ); resume with the data of the interrupted run."
            )
        if not keeps and state["length"] != self.length:
            raise ValueError(
                f"{self.name} has {self.length} batches, but had {state['length']} when the "
                f"checkpoint was written; resume with the data of the interrupted run."
            )
        self._ahead.clear()
        self._go(state)
        for count, now in enumerate(state.get("ahead", []), 1):
            self._restore(now)
            self._look(count)
        restore_generators(present, CPU)

    def _go(self, state: dict[str, Any]) -> None:
        if "data" in state:
            self.data.load_state_dict(state["data"])
            self._iterator, self._position = iter(self.data), state["position"]
            return
        if self._listed:
            self._position = state["position"]
            if self._position > len(self.data):
                raise self._shorter(len(self.data), self._position)
            return
        self._iterator, self._position, self._passes = None, 0, state["passes"]
        if not self._passes:
            return
        self._restore(state["start"])
        self._passes -= 1
        self._begin()
        self._start = state["start"]
        assert self._iterator is not None
        for _ in islice(self._iterator, state["position"]):
            self._position += 1
        if self._position != state["position"]:
            raise self._shorter(self._position, state["position"])
        self._restore(state["now"])

    def _shorter(self, found: int, saved: int) -> ValueError:
        return ValueError(
            f"{self.name} ended after {found} batches, but the checkpoint was written after "
            f"{saved}; resume with the data of the interrupted run."
        )


def _is_batch(data: Any) -> bool:
    """Whether it is (inputs, labels) rather than a list of batches that are a tensor each."""
    if type(data) not in (list, tuple) or not all(isinstance(part, Tensor) for part in data):
        return False
    rows = {part.size(0) if part.dim() else None for part in data}
    return len(rows) == 1 and rows != {None} and len({(p.dim(), p.dtype) for p in data}) > 1


def refuse_shared(cycles: Iterable[Cycle]) -> None:
    """Refuse two cycles of one object that keeps a position of its own.

    Raises:
        ValueError: there are two.
    """
    for one, other in combinations(cycles, 2):
        data = one.data
        own = hasattr(data, "load_state_dict") or getattr(data, "persistent_workers", False)
        if data is other.data and own:
            raise ValueError(
                f"{one.name} and {other.name} are the same {type(data).__name__}, which keeps one "
                f"position but is read at two, so that a checkpoint could not be gone on from; "
                f"make one for each, or leave out checkpoint."
            )
