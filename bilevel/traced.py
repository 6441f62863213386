"""What stands in for the oracle, the solvers and the step-size rules inside a graph.

Each answers as its plain form does, without counting and without looking at the host; loops are
loops of the graph. :mod:`bilevel.graph` makes an iteration of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.func import grad_and_value

from bilevel.compiled import second_derivatives
from bilevel.linear import Learned, Product, Solver, is_conjugate, seen
from bilevel.problem import Draw, Oracle
from bilevel.rules import Armijo, Fixed, Polyak, Rule, as_seen
from bilevel.steps import rounding_of, schedule

Loss = Callable[[Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, ...]
# t -> phi(t), evaluations of a loss; and f where y bends, see :meth:`bilevel.trials.Trials.gain`
Phi = Callable[[Tensor], "tuple[Tensor, Tensor | int] | tuple[Tensor, Tensor | int, Tensor]"]


class Found(NamedTuple):
    """:class:`bilevel.rules.Move`, in float64; ``evaluations`` of a loss; whether it ``leapt``."""

    size: Tensor
    last: Tensor
    trials: Tensor
    failed: Tensor
    evaluations: Tensor
    leapt: Tensor
    gain: Tensor


class Run(Draw):
    """Several draws as one, their number a tensor: ``of(j)`` for j < ``many``."""

    def __init__(self, of: Callable[[Tensor], Draw], many: Tensor) -> None:
        super().__init__()
        self.of, self.many = of, many


class Traced:
    """What an estimate asks of :class:`Oracle`, inside a graph and without counting; on the draw
    ``whole``, g_yy is had as a matrix."""

    def __init__(self, oracle: Oracle, whole: Draw | None) -> None:
        self._oracle, self._whole = oracle, whole

    def mean(
        self, level: str, draw: Draw, function: Callable[[Loss], Tensors], zeros: Tensors
    ) -> Tensors:
        """What ``function`` makes of the loss on each of the draws, linear in the loss, averaged:
        a loop of the graph, which is as large for many as for one."""

        def on(draw: Draw) -> Tensors:
            return function(partial(self._call, level, self._oracle._batch(level, draw)))

        if not isinstance(draw, Run):
            return on(draw)

        def add(j: Tensor, *sums: Tensor) -> Tensors:
            return j + 1, *(a + b for a, b in zip(sums, on(draw.of(j)), strict=True))

        first = torch.zeros((), dtype=torch.int64)
        _, *sums = while_loop(lambda j, *sums: j < draw.many, add, (first, *zeros))
        return tuple(total / draw.many for total in sums)

    def _call(self, level: str, batch: tuple[Any, ...], x: Tensor, y: Tensor) -> Tensor:
        return self._oracle.call(level, x, y, batch)

    def value(self, level: str, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        return self.mean(level, draw, lambda loss: (loss(x, y),), (x.new_zeros(()),))[0]

    def outer_gradients(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        def function(loss: Loss) -> Tensors:
            (fx, fy), value = grad_and_value(loss, argnums=(0, 1))(x, y)
            return value, fx, fy

        zeros = (y.new_zeros(()), torch.zeros_like(x), torch.zeros_like(y))
        value, fx, fy = self.mean("outer", draw, function, zeros)
        return value, fx, fy

    def inner_gradient(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        def function(loss: Loss) -> Tensors:
            return grad_and_value(loss, argnums=1)(x, y)

        gy, value = self.mean("inner", draw, function, (torch.zeros_like(y), y.new_zeros(())))
        return value, gy

    def inner_gradient_beside(
        self, x: Tensor, y: Tensor, other: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor]:
        def function(loss: Loss) -> Tensors:
            gy, value = grad_and_value(loss, argnums=1)(x, y)
            return value, gy, loss(x, other)

        zeros = (y.new_zeros(()), torch.zeros_like(y), y.new_zeros(()))
        value, gy, there = self.mean("inner", draw, function, zeros)
        return value, gy, there

    def record(self, x: Tensor, y: Tensor, draw: Draw) -> TracedProducts:
        if draw is not self._whole:
            return TracedProducts(self, (x, y), draw, *self.inner_gradient(x, y, draw))
        unit = torch.eye(len(y), dtype=y.dtype)

        def function(loss: Loss) -> Tensors:
            gy, value = grad_and_value(loss, argnums=1)(x, y)
            product = second_derivatives(lambda x, y, batch: loss(x, y))["product"]
            return gy, value, torch.func.vmap(lambda u: product(x, y, u, ()))(unit)

        zeros = (torch.zeros_like(y), y.new_zeros(()), torch.zeros_like(unit))
        gy, value, hessian = self.mean("inner", draw, function, zeros)
        # made only now: torch 2.13 forgets what objects from before a vmap in a loop are given
        return TracedProducts(self, (x, y), draw, value, gy, hessian)

    def joint(self, draws: Sequence[Draw]) -> Draw:
        return draws[0]  # which is one already

    def project(self, x: Tensor) -> Tensor:
        return x


@dataclass
class TracedProducts:
    """:class:`bilevel.problem.Products` in a graph; each product linearises anew, or is one with
    the matrix, which spares many small operations."""

    oracle: Traced
    point: tuple[Tensor, Tensor]
    draw: Draw
    value: Tensor
    gradient: Tensor
    hessian: Tensor | None = None

    def _apply(self, name: str, u: Tensor, *like: Tensor) -> Tensors:
        def function(loss: Loss) -> Tensors:
            functions = second_derivatives(lambda x, y, batch: loss(x, y))
            found = functions[name](*self.point, u, ())
            return found if isinstance(found, tuple) else (found,)

        zeros = tuple(torch.zeros_like(t) for t in like)
        return self.oracle.mean("inner", self.draw, function, zeros)

    def product(self, u: Tensor) -> Tensor:
        return self._apply("product", u, u)[0] if self.hessian is None else self.hessian @ u

    def both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        gxy, gyy = self._apply("both", u, *self.point)
        return gxy, gyy

    def forward(self, d: Tensor) -> Tensor:
        return self._apply("forward", d, self.point[1])[0]


class Counted:
    """A solver with its products counted; conjugate gradients as a loop of the graph."""

    def __init__(self, solver: Solver, learned: Learned) -> None:
        self.solver = solver
        self.halvings = learned.halvings
        self.counts: list[Tensor | int] = []
        # as seen so far, the last; a list, as torch 2.13 forgets here
        self.concave = [torch.as_tensor(learned.concave)]

    @property
    def warm_start(self) -> bool:
        return getattr(self.solver, "warm_start", False)

    def __call__(self, product: Product, b: Tensor, q0: Tensor | None) -> Tensor:
        solver = self.solver
        if not is_conjugate(solver):

            def counted(u: Tensor, *index: int) -> Tensor:
                self.counts.append(1)
                return product(u, *index)

            return solver(counted, b, q0)

        def going(i: Tensor, *state: Tensor) -> Tensor:
            return (i < solver.steps) & state[4]

        def advance(i: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return i + 1, *solver.advance(product, enough, state)

        enough, begun = solver.begin(product, b, q0, solver.enough(self.halvings))
        enough = enough.to(b.dtype)
        state = [part.clone() for part in begun]
        if solver.steps == 1:  # a loop costs more than its only step
            taken, last = state[4].long(), solver.advance(product, enough, tuple(state))
        else:
            taken, *last = while_loop(going, advance, (torch.zeros((), dtype=torch.int64), *state))
        self.counts.append(taken + int(q0 is not None))
        self.concave.append(seen(self.concave[-1], *last[5:7]))
        return last[0]


def move(
    rule: Rule,
    value: Tensor,
    slope: Tensor,
    phi: Phi,
    k: Any,
    last: Tensor,
    kappa: Tensor | float = 0.0,
    extrapolates: bool = False,
    leap: tuple[Tensor, Tensor] | None = None,
) -> Found:
    """``rule`` along a :class:`bilevel.rules.Line`, as numbers of float64, after a leap over kinks
    is tried, if one is given: its length and by how much phi may rise."""
    nothing = torch.zeros((), dtype=torch.float64)
    if isinstance(rule, Armijo):
        return search(rule, value, slope, phi, last, kappa, extrapolates, leap)
    still = nothing, nothing, nothing, nothing > 0, nothing
    if isinstance(rule, Fixed):
        return Found(nothing + schedule(rule.step, k, rule.decay), last, *still)
    assert isinstance(rule, Polyak)
    upper = last.nan_to_num(0.0) if rule.upper is None else rule.upper
    return Found(rule.size(value, slope, upper, k), last, *still)


def search(
    rule: Armijo,
    value: Tensor,
    slope: Tensor,
    phi: Phi,
    last: Tensor,
    kappa: Tensor | float,
    extrapolates: bool = False,
    leap: tuple[Tensor, Tensor] | None = None,
) -> Found:
    """:meth:`Armijo.__call__`, its cases as masks and its trials as a loop of the graph; the first
    of them is a leap, see :func:`bilevel.lengths.leap`."""
    rounding = rounding_of(value.double(), value.dtype)
    value, slope = value.double(), slope.double()
    sound = value.isfinite() & slope.isfinite()
    descends = sound & (slope < 0)
    allowed = rounding + rule.slack * value.abs()
    start, far, brackets = _opening(rule, slope, rounding, last, extrapolates)
    c = rule.share(torch.as_tensor(kappa, dtype=torch.float64), brackets)
    nothing = torch.zeros_like(value)
    length, most = leap or (nothing, nothing)
    leaps = descends & (length > 0)

    def going(tally: Tensor) -> Tensor:
        return tally[-1] == 0

    def trial(tally: Tensor) -> tuple[Tensor]:
        t, best, lowest, bent, *flags, left, trials, evaluations, _ = tally.unbind()
        accepted, growing, far, leaping = (flag > 0 for flag in flags)
        seen, cost, *there = phi(t)
        seen = seen.double()
        rise = torch.where(leaping, most, c * t * slope + allowed)
        ok = seen.isfinite() & (seen <= value + rise)
        better = ok & (~accepted | (seen < lowest))
        refused = ~ok & ~accepted
        left = left - torch.where(far | leaping, 0.0, 1.0)
        turns = accepted & ~better & growing & (best == start)  # up is worse: down from the start
        done = (better & (leaping | ~brackets)) | (accepted & ~better & ~turns) | (left <= 0)
        growing = growing & ~refused & ~turns
        following = torch.where(growing, 2.0, 0.5) * torch.where(turns, start, t)
        following = torch.where(far & refused, last, following)
        new = _Tally(
            t=torch.where(leaping & refused, start, following),
            best=torch.where(better, t, best),
            lowest=torch.where(better, seen, lowest),
            bent=torch.where(better, there[0].double() if there else seen, bent),
            accepted=accepted | better,
            growing=growing,
            far=far & (leaping | ~refused),
            leaping=leaping & ~refused,
            left=left,
            trials=trials + 1,
            evaluations=evaluations + cost,
            done=done,
        )
        return (new.stacked(),)

    begun = _Tally(
        t=torch.where(leaps, length, start),
        best=nothing,
        lowest=value,
        bent=value,
        accepted=nothing,
        growing=brackets,
        far=far,
        leaping=leaps,
        left=nothing + rule.max_trials,
        trials=nothing,
        evaluations=nothing,
        done=~descends,
    )
    (tally,) = while_loop(going, trial, (begun.stacked(),))
    found = _Tally(*tally.unbind())
    leapt, accepted = found.leaping > 0, found.accepted > 0
    size = torch.where(accepted, found.best, 0.0)
    failed = (~sound | (descends & ~accepted)).double()
    remembered = torch.maximum(found.best, rule.retain * last.nan_to_num(0.0))
    last = torch.where(accepted & ~leapt, remembered, last)
    return Found(size, last, found.trials, failed, found.evaluations, leapt, value - found.bent)


class _Tally(NamedTuple):
    """What goes from one trial of a search to the next, as one vector of float64.

    Attributes:
        t: the next step tried.   best, lowest: the best one accepted, and phi there.
        bent: phi there where y bends with y*.   growing: whether steps are doubled.
        far: whether t is one of those that come before ``left``, the trials that are.
        leaping: whether t is a leap.
    """

    t: Tensor
    best: Tensor
    lowest: Tensor
    bent: Tensor
    accepted: Tensor
    growing: Tensor
    far: Tensor
    leaping: Tensor
    left: Tensor
    trials: Tensor
    evaluations: Tensor
    done: Tensor

    def stacked(self) -> Tensor:
        return torch.stack([n.double() for n in self])


def _opening(
    rule: Armijo, slope: Tensor, rounding: Tensor, last: Tensor, extrapolates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where a search starts; whether that is farther than by itself; whether it brackets."""
    if rule.reset == "fixed":
        never = torch.zeros_like(last, dtype=torch.bool)
        return torch.full_like(last, rule.initial), never, never
    first = last.isnan()
    start = last * (rule.growth if rule.reset == "grow" else 1)
    start = torch.where(first, rule.opening(slope, rounding), start)
    decrease = -slope * start
    lost = ~first & (decrease < 8 * rounding) & (rule.reset == "grow")
    far = lost & (decrease > 0) & (not extrapolates)
    further = as_seen(start, decrease, rounding)
    return torch.where(far, further, torch.where(lost, last, start)), far, first
