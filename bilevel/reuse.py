"""Work of a loss that need be done once: what y does not enter, while x and the batch stay.

An inner search evaluates g(x, y - t g_y) where g and g_y were evaluated just before. Where y is a
head on features, of x or of a frozen network, these are most of the cost of a trial, and the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Watching an operation takes some 20 microseconds of Python: for each, so many floating-point
# operations of a core, or of a GPU, are to be saved
WORTH = {"cpu": 1e6}
WORTH_ELSEWHERE = 1e9
PLAIN = (Tensor, nn.Parameter)  # others may be anything
MOST_ONCE = 3  # pairs of x and batch evaluated but once, after which some go unwatched
MOST_RESTS = 2**10  # of those at most, at a time


@dataclass
class Keeping:
    """Of one of the losses: whether keeping results pays.

    Attributes:
        pays: whether it does; not where y enters nearly everything, and where the work is small
            beside watching it. None: not known yet.
        once: watched pairs of x and batch in a row at which the loss was evaluated once, as by
            fixed steps, in a first look, or in a first search.
        rests: pairs to come that are not watched: the more, the longer that has been so.
        proven: whether a value with kept results has once been compared with one without, for
            memory that is written where torch does not see it (``.data``, NumPy).
    """

    pays: bool | None = None
    once: int = 0
    rests: int = 0
    proven: bool = False

    def saw(self, hits: int) -> None:
        """A pair at which so many results were had again."""
        self.once = 0 if hits else self.once + 1
        self.rests = min(2 ** (self.once - 2), MOST_RESTS) if self.once >= MOST_ONCE else 0


@dataclass
class Habit:
    """What the first evaluations of the losses have shown.

    Attributes:
        keeping: of each level.
        largest: entries of the largest tensor in the inner loss. None: not known.
        differentiates: whether a loss takes derivatives itself, as of a network by its inputs.
        random: levels whose loss draws random numbers.
        recorded: whether a loss is another one where no graph is recorded, as where it asks which
            parameters require gradients.
        stacks: of so many inner batches, how many are evaluated as one, see
            :mod:`bilevel.stacked`.
    """

    keeping: dict[str, Keeping] = field(
        default_factory=lambda: {level: Keeping() for level in ("outer", "inner")}
    )
    largest: int | None = None
    differentiates: bool = False
    random: set[str] = field(default_factory=set)
    recorded: bool = False
    stacks: dict[int, int] = field(default_factory=dict)


T = TypeVar("T")


class Differentiating(Protocol):
    differentiates: bool  # whether a loss takes derivatives itself


def without_graph(known: Differentiating, loss: Callable[[], T]) -> T:
    """``loss()``, without a graph; where it takes derivatives itself, with those of its own."""
    try:
        with torch.set_grad_enabled(known.differentiates):
            return loss()
    except RuntimeError as error:
        if known.differentiates or "does not require grad" not in str(error):
            raise
    known.differentiates = True
    with torch.enable_grad():
        return loss()


class Reuse:
    """Evaluates one of the losses, keeping what y does not enter until the next x or batch."""

    def __init__(self, habit: Habit, level: str) -> None:
        self._habit, self._level = habit, level
        self._at: tuple[Tensor, Any] | None = None
        self._kept: Kept | None = None

    def evaluate(self, x: Tensor, y: Tensor, batch: Any, loss: Callable[[], Tensor]) -> Tensor:
        """``loss()``; of the same x and batch, the very objects, what is kept is not done again."""
        habit, keeping = self._habit, self._habit.keeping[self._level]
        if keeping.pays is False:
            return loss()
        if self._at is None or self._at[0] is not x or self._at[1] is not batch:
            self._next((x, batch), keeping)
        kept = self._kept
        if kept is None:
            return loss()
        with kept.apart_from(y):
            value = loss()
        if kept.hits and not keeping.proven:
            keeping.proven = True
            # what draws random numbers would draw others now
            plain = value if self._level in habit.random else loss()
            if not torch.equal(plain.nan_to_num(), value.nan_to_num()):
                keeping.pays, value = False, plain
        if keeping.pays is None:
            worth = WORTH.get(y.device.type, WORTH_ELSEWHERE)
            keeping.pays = kept.flops > worth * kept.operations
            if habit.largest is None and self._level == "inner":  # or a resumed run's
                habit.largest = kept.largest
        if not keeping.pays:
            self._at = self._kept = None
        return value

    def _next(self, pair: tuple[Tensor, Any], keeping: Keeping) -> None:
        if self._kept is not None:
            keeping.saw(self._kept.hits)
        self._at = pair
        self._kept = None if keeping.rests else Kept()
        keeping.rests = max(keeping.rests - 1, 0)


class Watching(TorchDispatchMode):
    """A mode that keeps torch's compiler out, which it would import, and take seconds for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return "torch._dynamo" in sys.modules


class Kept(Watching):
    """Results of operations, had again for the same operands: in the same memory, which nobody
    has written into since.

    Done anew is what y enters, and what draws random numbers, writes, is but a view, or is part of
    a graph. Operands are held, so that nothing else can come to lie where they did.

    Attributes:
        operations: seen so far.   hits: those of them that were not done.
        flops: floating-point operations of the kept ones.   largest: entries of any operand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.hits = self.flops = self.largest = 0
        self._results: dict[Any, _Result] = {}
        self._varying: set[int] = set()  # memory that y has entered

    def apart_from(self, y: Tensor) -> Kept:
        self._varying = {_memory(y)}
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        operands = [*tensors(args), *tensors(kwargs.values())]
        self.largest = max(self.largest, *(t.numel() for t in operands), 0)
        varying = self._varying
        fixed = all(
            _plain(t) and not t.requires_grad and _memory(t) not in varying for t in operands
        )
        same = fixed and _determined(func) and not _trains(func, args)
        key = None
        if same and _makes_new(func):
            key = _described((func, args, tuple(kwargs.items())))
            if (found := self._results.get(key)) and found.untouched():
                self.hits += 1
                return found.value
        value = func(*args, **kwargs)
        results = list(tensors((value,)))
        if not all(map(_plain, results)):
            return value
        memories = map(_memory, results)
        if not same:
            varying.update(memories)
        elif key is not None:
            varying.difference_update(memories)  # what y had entered there is gone
            self._results[key] = _Result(value, operands, results, [t._version for t in results])
            count = flop_registry.get(func.overloadpacket)
            self.flops += count(*args, **kwargs, out_val=value) if count else 0
        return value


class _Result(NamedTuple):
    value: Any
    operands: list[Tensor]
    tensors: Sequence[Tensor]
    versions: list[int]

    def untouched(self) -> bool:
        return all(
            t._version == version and not t.requires_grad
            for t, version in zip(self.tensors, self.versions, strict=True)
        )


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def _plain(t: Tensor) -> bool:
    """Whether its memory and version tell it from others."""
    held = not t.is_inference() and not t._is_zerotensor()  # as forward derivatives make them
    return type(t) in PLAIN and t.layout is torch.strided and held


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _described(value: Any) -> Any:
    """What tells an operand from others."""
    if isinstance(value, Tensor):
        return (
            value.data_ptr(),
            value.shape,
            value.stride(),
            value.dtype,
            value._version,
            value.is_conj(),
            value.is_neg(),
        )
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value  # since 1 == 1.0 == True


@cache
def _determined(func: Any) -> bool:
    """Whether the operands decide the result. Of operations from elsewhere, nobody knows."""
    return (
        isinstance(func, OpOverload)
        and func.namespace == "aten"
        and torch.Tag.nondeterministic_seeded not in func.tags
        and "empty" not in func.name()
    )


@cache
def _switch(func: Any) -> int | None:
    names = [argument.name for argument in func._schema.arguments]
    return names.index("training") if "training" in names else None


def _trains(func: Any, args: Sequence[Any]) -> bool:
    """Whether it is a normalisation that writes its running statistics, which no schema says."""
    place = _switch(func)
    return place is not None and not (place < len(args) and args[place] is False)


@cache
def _makes_new(func: Any) -> bool:
    """Whether it writes nothing, and its result is no view."""
    return not func._schema.is_mutable and all(
        value.alias_info is None for value in func._schema.returns
    )
