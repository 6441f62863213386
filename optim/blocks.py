"""Where the numbers of a step lie: parameters, gradients and state, as lists for the kernels.

A *cohort* is a set of parameters that have been stepped together so far: same group, device and
dtype, and one shared count ``step`` of the gradients they have seen. Cohorts only ever split (when
some of their parameters miss a gradient), so that Adam's bias correction is right for every one of
them and still costs one scalar.

A *block* is what the kernels see at a time. On an accelerator, and in the plain version, a block is
a whole cohort, tensor by tensor. On the CPU, list kernels are loops in disguise and large arrays
leave the cache between two of them; there a block is a piece of a large tensor, or a pack of small
ones whose state lies side by side. Of a DTensor the kernels see this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten

from optim.distributed import local, local_gradient, placement
from optim.vectors import Flat, Lists, Plain, Vector

PIECE = 1 << 18  # elements of a CPU block: few enough for the cache, enough to pay for the calls
SMALL = 1 << 14  # tensors below this many elements are packed

Group = dict[str, Any]
Count: TypeAlias = "Tensor | None"  # gradients seen by a cohort (shape (1,)), if needed


def precise(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state: that of the parameter, float32 for bfloat16 and float16."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def wide(device: torch.device) -> torch.dtype:
    """Dtype of the scalars: float64, which Apple's GPU does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def kernels(device: torch.device) -> type[Plain]:
    """The fast kernels of a device."""
    return Flat if device.type == "cpu" else Lists


def precise_copy(p: Tensor) -> Tensor:
    """A contiguous copy of a parameter in the dtype of the state."""
    return p.detach().to(precise(p.dtype), copy=True, memory_format=torch.contiguous_format)


class Block:
    """Lists of equal length: parameters, gradients, and state by name (``z``, ``v``, ``x``...)."""

    do: Plain  # the kernels for these lists
    k: Tensor  # step + 1, where there is a step

    def __init__(self, group: Group, step: Count, params: Vector, state: dict[str, Vector]):
        self.group, self.step, self.params, self.state = group, step, params, state
        self.device, self.dtype = params[0].device, precise(params[0].dtype)

    def read(self, again: bool = False) -> tuple[Vector, Vector]:
        """(y, g) in the dtype of the state; ``again``: both are as in the last call."""
        y = [local(p.detach()) for p in self.params]
        return self._cast(y), self._cast([local_gradient(p) for p in self.params])

    def write(self, y: Vector) -> None:
        """Parameters <- y, which :meth:`read` gave and a move has changed."""
        if self.params[0].dtype != self.dtype:  # else y is the parameters
            for p, q in zip(self.params, y, strict=True):
                local(p).copy_(q)

    def _cast(self, tensors: Vector) -> Vector:
        return [t if t.dtype == self.dtype else t.to(self.dtype) for t in tensors]


class Piece(Block):
    """A piece of one large contiguous tensor: flat views of everything."""

    def __init__(self, group: Group, step: Count, p: Tensor, g: Tensor, state: dict[str, Vector]):
        super().__init__(group, step, [p], state)
        self.g = g

    def read(self, again: bool = False) -> tuple[Vector, Vector]:
        return self._cast(self.params), self._cast([self.g])


class Pack(Block):
    """Small (or oddly strided) tensors, gathered for the step and scattered after it."""

    def __init__(self, group: Group, step: Count, params: Vector, states: list[dict[str, Tensor]]):
        self.views: dict[str, Vector] = {}
        state = {}
        for name in _names(states[0]):
            state[name] = [flatten([s[name] for s in states])]
            self.views[name] = list(unflatten(state[name][0], params))
            for s, view in zip(states, self.views[name], strict=True):
                s[name] = view
        super().__init__(group, step, params, state)
        self.states = states
        self.gathered: tuple[Tensor, Tensor] | None = None

    def holds(self) -> bool:
        """Whether the state in the optimizer is still the one that lies here."""
        return all(
            s[name] is view
            for name, views in self.views.items()
            for s, view in zip(self.states, views, strict=True)
        )

    def read(self, again: bool = False) -> tuple[Vector, Vector]:
        if self.gathered is None or not again:
            g = flatten([local_gradient(p) for p in self.params])
            self.gathered = flatten(self.params).to(self.dtype), g.to(self.dtype)
        y, g = self.gathered
        return [y], [g]

    def write(self, y: Vector) -> None:
        torch._foreach_copy_(self.params, list(unflatten(y[0], self.params)))
        self.gathered = None


class Cohort:
    """Parameters stepped together, laid out in blocks; see the module."""

    def __init__(self, group: Group, params: Vector, states: list[dict[str, Tensor]], fast: bool):
        self.placement = placement(params[0])
        self.kernels = kernels(params[0].device) if fast else Plain
        if self.placement is not None and fast:
            self.kernels = Lists  # the state stays in DTensors, for distributed checkpoints
        self.group, self.step = group, states[0].get("step")
        self.params, self.states = params, states
        self.packs: list[Pack] = []
        self.large: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.whole: Block | None = None
        if self.kernels is not Flat:
            self.kept = {name: [s[name] for s in states] for name in _names(states[0])}
            lists = {name: [local(t) for t in ts] for name, ts in self.kept.items()}
            self.whole = Block(group, self.step, params, lists)
            return
        pack: list[tuple[Tensor, dict[str, Tensor]]] = []
        filled = 0
        for p, s in zip(params, states, strict=True):
            if p.numel() >= SMALL and p.is_contiguous() and local_gradient(p).is_contiguous():
                self.large.append((p, s))
                continue
            if pack and filled + p.numel() > PIECE:
                self._close(pack)
                pack, filled = [], 0
            pack.append((p, s))
            filled += p.numel()
        if pack:
            self._close(pack)

    def _close(self, pack: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        params, states = zip(*pack, strict=True)
        self.packs.append(Pack(self.group, self.step, list(params), list(states)))

    def holds(self, state: Mapping[Any, Any]) -> bool:
        """Whether this layout is still that of the optimizer's state and of the gradients."""
        if self.states[0] and state.get(self.params[0]) is not self.states[0]:
            return False
        if self.whole is not None:
            return all(
                s[name] is t
                for name, ts in self.kept.items()
                for s, t in zip(self.states, ts, strict=True)
            )
        return all(pack.holds() for pack in self.packs) and all(
            p.is_contiguous() and local_gradient(p).is_contiguous() for p, _ in self.large
        )

    def blocks(self) -> Iterator[Block]:
        """The blocks of one step."""
        do = self.kernels()
        k = None if self.step is None else self.step.view(()) + 1
        for block in self._blocks():
            block.do = do
            if k is not None:
                block.k = k
            yield block

    def _blocks(self) -> Iterator[Block]:
        if self.whole is not None:
            yield self.whole
        yield from self.packs
        for p, s in self.large:
            names = _names(s)
            flat = [p.detach(), local_gradient(p)] + [s[name] for name in names]
            whole = p.numel() <= PIECE
            views = ([t.view(-1)] if whole else t.view(-1).split(PIECE) for t in flat)
            for y, g, *state in zip(*views, strict=True):
                lists = {name: [t] for name, t in zip(names, state, strict=True)}
                yield Piece(self.group, self.step, y, g, lists)


def lay_out(
    groups: list[Group],
    state: dict[Any, Any],
    active: set[int],
    first: Callable[[Group, Tensor], dict[str, Tensor]],
    fast: bool,
) -> list[Cohort]:
    """The cohorts of the active parameters (by id), splitting those that were broken up.

    ``first`` gives the vectors of a parameter that is met for the first time.
    """
    idle = {
        id(state[p]["step"])
        for group in groups
        for p in group["params"]
        if id(p) not in active and "step" in state.get(p, {})
    }
    members: dict[Any, tuple[Group, Vector, list[dict[str, Tensor]]]] = {}
    counts: dict[Any, Tensor] = {}
    for i, group in enumerate(groups):
        for p in group["params"]:
            if id(p) not in active:
                continue
            kept = state.get(p) or first(group, p)
            if kept:
                state[p] = kept
            if "v" in kept:
                count = kept.get("step")
                if count is None:
                    key: Any = i, p.device, p.dtype
                    zero = torch.zeros(1, dtype=wide(p.device), device=p.device)
                    kept["step"] = counts.setdefault(key, zero)
                elif id(count) in idle:
                    kept["step"] = counts.setdefault(id(count), count.clone())
            key = i, p.device, p.dtype, id(kept.get("step")), placement(p)
            _, params, states = members.setdefault(key, (group, [], []))
            params.append(p)
            states.append(kept)
    return [Cohort(group, params, states, fast) for group, params, states in members.values()]


def _names(state: dict[str, Tensor]) -> list[str]:
    return [name for name in state if name != "step"]
