"""One run on several processes (torchrun): every loss is the mean over the ranks.

A loss is a mean over its batch, so that the loss of the concatenated batch is the mean of the
shards' losses, and so are its gradients and Hessian products. The oracle is all that the engine
ever sees of the losses: where each of its answers is averaged in one collective, every rank
computes with the same bits, and takes the same decision and step without being told.

A loss that fails on one rank fails on all: each collective carries a flag, so that no rank waits
for one that has gone another way. Without a process group, or with one rank, nothing here runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.layout import Layout, leaves
from bilevel.problem import Cost, Draw, Oracle, Products

T = TypeVar("T")


class LostRank(RuntimeError):
    """A collective did not come back: a rank died, hangs, or has gone another way."""


class Ranks:
    """The processes of the default group, and what they tell each other.

    Args:
        device: of the variables; its backend carries the collectives.
    """

    def __init__(self, device: torch.device) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if active else (0, 1)
        self.device = device

    # -- one collective each -----------------------------------------------------------------------

    def parted(self, error: Exception) -> bool:
        """Whether this rank alone may have met the error, so that the others wait elsewhere."""
        return self.size > 1 and not getattr(error, "on_every_rank", False)

    def mean(self, call: Callable[[], Sequence[Tensor]], like: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the ranks of each tensor that ``call()`` gives; shapes as in ``like``.

        Half precision is averaged, and comes back where ``like`` has it, by way of float32.
        """
        dtype = torch.promote_types(like[0].dtype, torch.float32)
        failed: Exception | None = None
        try:
            parts = list(call())
        except Exception as error:
            failed, parts = error, [torch.zeros_like(t) for t in like]
        flag = torch.full((1,), float(failed is not None), dtype=dtype, device=self.device)
        flat = torch.cat([*(p.detach().reshape(-1).to(dtype) for p in parts), flag])
        self._collect(dist.all_reduce, flat)
        if flat[-1] != 0:
            self._fail(failed)
        pieces = (flat[:-1] / self.size).split([t.numel() for t in like])
        return [p.view(t.shape).to(t.dtype) for p, t in zip(pieces, like, strict=True)]

    def numbers(self, function: Callable[[], int]) -> list[int]:
        """``function()`` of every rank. Where it raises on one, all raise."""
        if self.size == 1:
            return [int(function())]
        failed, number = None, 0
        try:
            number = int(function())
        except Exception as error:
            failed = error
        mine = torch.tensor([failed is not None, number], dtype=torch.int64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._collect(dist.all_gather, found, mine)
        told = torch.stack(found).tolist()
        if any(flag for flag, _ in told):
            self._fail(failed)
        return [number for _, number in told]

    def first(self, function: Callable[[], T]) -> T:
        """``function()`` of rank 0, which alone runs it; its exception is that of every rank."""
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = function()
            except Exception as error:
                told[1] = error
        self._collect(dist.broadcast_object_list, told, 0, None, self.device)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def gather(self, mine: T) -> list[T]:
        """``mine`` of every rank, on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size if self.rank == 0 else []
        self._collect(dist.gather_object, mine, found if self.rank == 0 else None)
        return found

    # -- made of them ------------------------------------------------------------------------------

    def same(self, what: str, function: Callable[[], T]) -> T:
        """``function()``, which must give the same bits on every rank."""
        if self.size == 1:
            return function()
        found: list[T] = []

        def run() -> int:
            found.append(function())
            return digest(found[0])

        if len(set(self.numbers(run))) > 1:
            error = RuntimeError(
                f"{what} differs between the {self.size} ranks, which must all have the same; "
                f"compute it from what is equal everywhere, or average it with "
                f"torch.distributed.all_reduce."
            )
            raise _agreed(error)
        return found[0]

    def read(self, function: Callable[[], T]) -> T:
        """``function()``, the batches of this rank; tells where their sizes differ."""
        if self.size == 1:
            return function()
        found: list[T] = []
        rows: list[list[int]] = []

        def run() -> int:
            found.append(function())
            rows.append([t.shape[0] for _, t in leaves(found[0], "") if _is_batch(t)])
            return digest(rows[0])

        if len(set(self.numbers(run))) > 1:
            warnings.warn(
                f"the ranks read batches of different sizes (rank {self.rank}: {rows[0]}), but "
                f"each rank counts the same, so that rows of a small batch weigh more; use "
                f"drop_last=True, or weigh the losses.",
                RuntimeWarning,
                stacklevel=3,
            )
        return found[0]

    def start(
        self, layouts: Sequence[Layout], vectors: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x and y of rank 0 on every rank; also what its Modules hold beside the variables."""
        if self.size == 1:
            return vectors
        self.same("the structure of x and y", lambda: [(a.paths, a.shapes) for a in layouts])
        for layout in layouts:
            if layout.module is not None:
                held = [p for p in layout.module.parameters() if not p.requires_grad]
                for tensor in (*held, *layout.module.buffers()):
                    self._collect(dist.broadcast, tensor.data, 0)
        for vector in vectors:
            self._collect(dist.broadcast, vector, 0)
        return vectors

    # -- failure -----------------------------------------------------------------------------------

    def _collect(self, collective: Callable[..., Any], *args: Any) -> None:
        # NCCL moves objects by way of the present GPU, which need not be that of the variables
        on_gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        try:
            with on_gpu:
                collective(*args)
        except RuntimeError as error:
            raise LostRank(
                f"rank {self.rank} of {self.size} lost the others: one has died, hangs, or raised "
                f"an error of its own ({error}). Restart all of them, in any number, with "
                f"checkpoint=... and resume=True; how long they wait for each other is the timeout "
                f"of init_process_group."
            ) from error

    def _fail(self, mine: Exception | None) -> None:
        """Raise on every rank what was raised on one: its own error where all have the same."""
        told: list[Any] = [None] * self.size
        message = None if mine is None else f"{type(mine).__name__}: {mine}"
        self._collect(dist.all_gather_object, told, message)
        if mine is not None and told.count(message) == self.size:
            raise _agreed(mine)
        rank = next(r for r, said in enumerate(told) if said is not None)
        raise _agreed(RuntimeError(f"on rank {rank} of {self.size}: {told[rank]}")) from mine


def _agreed(error: Exception) -> Exception:
    # read by getattr; an attribute keeps the class of the user's error, a subclass would not
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def digest(value: Any) -> int:
    """64 bits of SHA-256 of a tensor, a tuple of tensors, or anything with a true ``repr``."""
    sha = hashlib.sha256()
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, Tensor):
            host = part.detach().cpu().contiguous()
            sha.update(ctypes.string_at(host.data_ptr(), host.nbytes))
        else:
            sha.update(repr(part).encode())
    return int.from_bytes(sha.digest()[:8], "big", signed=True)


class AveragedOracle(Oracle):
    """An oracle whose every answer is the mean over the ranks, in one collective.

    Kinks stay as they are: each rank would round off others.

    Args:
        local: the oracle of this rank, plain or compiled; its counters are the run's.
    """

    may_round = False

    def __init__(self, local: Oracle) -> None:
        self._local = local
        self.problem, self.x, self.y = local.problem, local.x, local.y
        self.ranks = Ranks(local.y.device)

    @property
    def cost(self) -> Cost:
        return self._local.cost

    @cost.setter
    def cost(self, cost: Cost) -> None:
        self._local.cost = cost

    def _scalar(self, like: Tensor) -> Tensor:
        return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))

    def value(self, level: str, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        like = [self._scalar(y)]
        return self.ranks.mean(lambda: [self._local.value(level, x, y, draw)], like)[0]

    def distinct(self, draws: Sequence[Draw]) -> Sequence[Draw]:
        """All of them: a batch may come twice to one rank, but each must do as much."""
        alike = draws[0].batch is None and "inner" not in self.problem.habit.random
        return draws[:1] if alike else draws

    def dependence(
        self, level: str, x: Tensor, y: Tensor, draw: Draw
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        def call() -> list[Tensor]:
            value, gradients = self._local.dependence(level, x, y, draw)
            pairs = zip(gradients, (x, y), strict=True)
            found = [torch.zeros_like(like) if g is None else g for g, like in pairs]
            enters = [torch.full_like(value, float(g is not None)) for g in gradients]
            return [*found, value, *enters]

        gx, gy, value, *enters = self.ranks.mean(call, [x, y, *[self._scalar(y)] * 3])
        return value, (gx if enters[0] > 0 else None, gy if enters[1] > 0 else None)

    def outer_gradients(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        def call() -> tuple[Tensor, ...]:
            value, fx, fy = self._local.outer_gradients(x, y, draw)
            return fx, fy, value

        fx, fy, value = self.ranks.mean(call, (x, y, self._scalar(y)))
        return value, fx, fy

    def inner_gradient(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        def call() -> tuple[Tensor, ...]:
            value, gy = self._local.inner_gradient(x, y, draw)
            return gy, value

        gy, value = self.ranks.mean(call, (y, self._scalar(y)))
        return value, gy

    def inner_gradient_beside(
        self, x: Tensor, y: Tensor, other: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor]:
        def call() -> tuple[Tensor, ...]:
            value, gy, there = self._local.inner_gradient_beside(x, y, other, draw)
            return gy, value, there

        gy, value, there = self.ranks.mean(call, (y, self._scalar(y), self._scalar(y)))
        return value, gy, there

    def inner_gradients(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        def call() -> tuple[Tensor, ...]:
            value, gx, gy = self._local.inner_gradients(x, y, draw)
            return gx, gy, value

        gx, gy, value = self.ranks.mean(call, (x, y, self._scalar(y)))
        return value, gx, gy

    def record(self, x: Tensor, y: Tensor, draw: Draw) -> Products:
        return AveragedProducts(self, self._local, x, y, draw)

    def project(self, x: Tensor) -> Tensor:
        if self.problem.project is None:
            return x
        return self.agreed("the projection of x", lambda: self._local.project(x))

    def agreed(self, what: str, function: Callable[[], Tensor]) -> Tensor:
        return self.ranks.same(what, function)


class AveragedProducts:
    """:class:`Products`, each averaged in one collective; every rank keeps its own graph."""

    def __init__(
        self, oracle: AveragedOracle, local: Oracle, x: Tensor, y: Tensor, draw: Draw
    ) -> None:
        self._ranks, self._x, self._y = oracle.ranks, x, y

        def call() -> tuple[Tensor, ...]:
            self._own = local.record(x, y, draw)
            return self._own.gradient, self._own.value

        self.gradient, self.value = self._ranks.mean(call, (y, oracle._scalar(y)))

    def product(self, u: Tensor) -> Tensor:
        return self._ranks.mean(lambda: (self._own.product(u),), (self._y,))[0]

    def both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        gxy, gyy = self._ranks.mean(lambda: self._own.both(u), (self._x, self._y))
        return gxy, gyy

    def forward(self, d: Tensor) -> Tensor:
        return self._ranks.mean(lambda: (self._own.forward(d),), (self._y,))[0]
