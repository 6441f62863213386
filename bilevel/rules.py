"""Directions (which way) and step-size rules (how far): an update of either level is one of each.

Both are frozen settings; what changes from call to call is passed in and returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bilevel.alike import clamp, power_of_two, where
from bilevel.noise import settles
from bilevel.steps import armijo, envelope, polyak, rounding_of, schedule

Reset = Literal["grow", "last", "fixed"]
STRETCH = 2.0**20  # of a start at most, so that its decrease is seen: half of a search's halvings
LEAST_C, MOST_C = 0.3, 0.6  # where c is 'auto'


@dataclass
class Line:
    """phi(t) = loss(x + t d) on one fixed draw: all that a rule may see.

    Attributes:
        value: phi(0), 0-dim.   slope: phi'(0), 0-dim, negative on a descent direction.
        phi: t -> phi(t), 0-dim, for t > 0.
        predicted: t -> the change of phi to first order; None: t phi'(0), a straight line.
        kappa: share of the slope that independent batches see as well, in [0, 1]; 0 where it is
            not known.
        extrapolates: whether the y of phi(t) is but a guess far away, as on every outer line:
            where a decrease is lost in rounding, a search then goes no farther to see one.
        above: by how much phi may rise on top of what a search allows, since it has been as high
            of late, on other draws.
    """

    value: Tensor
    slope: Tensor
    phi: Callable[[float], Tensor]
    predicted: Callable[[float], float] | None = None
    kappa: float = 0.0
    extrapolates: bool = False
    above: float = 0.0

    def change(self, t: float) -> float:
        """Of phi from 0 to t, to first order."""
        return t * float(self.slope) if self.predicted is None else self.predicted(t)


class Move(NamedTuple):
    """How far to go. ``last`` is to be passed to the next call of the rule; ``gain``, phi(0) less
    phi(size), is NaN where phi was not evaluated there."""

    size: float | Tensor
    last: float | None
    trials: int = 0
    failed: bool = False
    gain: float = math.nan


class Rule(Protocol):
    def searches(self, k: int, last: float | None) -> bool:
        """Whether the call at iteration k will evaluate phi."""

    def __call__(self, line: Line, k: int, last: float | None) -> Move: ...


@dataclass(frozen=True)
class Fixed:
    """step / (k + 1)^decay, tuned by hand."""

    step: float
    decay: float = 0.0

    def searches(self, k: int, last: float | None) -> bool:
        return False

    def __call__(self, line: Line, k: int, last: float | None) -> Move:
        return Move(schedule(self.step, k, self.decay), last)


@dataclass(frozen=True)
class Armijo:
    """Backtracking line search with slack, and the reset of its starting point.

    Args:
        initial: first step tried, > 0. The first search of a run brackets: from the power of two
            nearest to it, to the best one that can be reached while the loss falls, so that
            the value does not matter but for its trials.
        c: share of the predicted decrease asked for, in (0, 1); 'auto': 1 - kappa, between 0.3
            and 0.6, and 0.3 where a search brackets, which seeks the best and not the longest.
            Where phi is quadratic, c allows 2 (1 - c) times the step that is best for its batch;
            without noise that may be long.
        slack: allowed increase relative to |phi(0)|, >= 0.
        reset: where a search starts: 'grow': ``growth`` times the last accepted step; 'last':
            that step, which can only fall; 'fixed': ``initial`` again.
        growth: > 1. Steps fall by halves at once and come back slowly, so that under noise they
            follow the short ones among those that recent batches allow.
        retain: share of the last step that is remembered at least, in [0, 1), however short the
            one that was found: where phi has kinks, one refusal says little about the next batch.
        max_trials: after which the search has failed: no step is taken, and none remembered.

    Reference: BiSLS (arXiv 2305.18666); the reset options are its options 3, 2 and 1.
    """

    initial: float = 1.0
    c: float | Literal["auto"] = 0.5
    slack: float = 0.0
    reset: Reset = "grow"
    growth: float = 1.2
    max_trials: int = 40
    retain: float = 0.0

    def searches(self, k: int, last: float | None) -> bool:
        return True

    def brackets(self, last: float | None) -> bool:
        return last is None and self.reset != "fixed"

    def share(self, kappa: Any, brackets: Any = False) -> Any:
        """c, as a number, or a tensor where the others are."""
        if self.c != "auto":
            return self.c
        return where(brackets, LEAST_C, clamp(1 - kappa, LEAST_C, MOST_C))

    def opening(self, slope: Any, rounding: Any) -> Any:
        """Where a first search starts: from where the decrease can be seen, if that is near; a
        power of two. Numbers or tensors."""
        seen = clamp(8 * rounding / -slope, self.initial, self.initial * STRETCH)
        return power_of_two(seen)

    def __call__(self, line: Line, k: int, last: float | None) -> Move:
        value, slope = torch.stack([line.value, line.slope]).tolist()
        if not (math.isfinite(value) and math.isfinite(slope)):
            return Move(0.0, last, 0, failed=True)
        if slope >= 0:
            return Move(0.0, last)
        rounding = rounding_of(value, line.value.dtype)

        def predicted(t: float) -> float:
            change = line.change(t)
            return 0.0 if 0 < change <= rounding else change  # where a projection leaves nothing

        search = partial(
            armijo,
            lambda t: float(line.phi(t)),
            value,
            slope,
            predicted=predicted,
            c=self.share(line.kappa, self.brackets(last)),
            slack=rounding + self.slack * abs(value) + line.above,
        )
        start, grow, wasted = last or 0.0, None, 0
        if self.reset == "fixed":
            start = self.initial
        elif last is None:
            start, grow = self.opening(slope, rounding), 2.0
        elif self.reset == "grow":
            start = self.growth * last
            decrease = -predicted(start)
            if line.predicted is not None and decrease <= 0:
                return Move(0.0, last)  # the projection leaves nothing to gain
            if decrease < 8 * rounding:  # lost in the rounding error of phi, where anything passes
                if decrease > 0 and not line.extrapolates:  # as far as it can be seen
                    far = search(start=as_seen(start, decrease, rounding), max_trials=1)
                    if far.accepted:
                        return Move(far.step, far.step, 1, gain=value - far.value)
                    wasted = 1
                start = last
        found = search(start=start, grow=grow, max_trials=self.max_trials)
        trials = found.trials + wasted
        if not found.accepted:
            return Move(0.0, last, trials, failed=True)
        last = max(found.step, self.retain * (last or 0.0))
        return Move(found.step, last, trials, gain=value - found.value)


def as_seen(start: Any, decrease: Any, rounding: Any) -> Any:
    """The step that decreases by what can be seen, if that is near, where ``start`` does by
    ``decrease``. Numbers or tensors."""
    return start * clamp(8 * rounding / decrease, most=STRETCH)


@dataclass(frozen=True)
class Polyak:
    """min{max{lower_k, (phi(0) - lower_bound) / (c |phi'(0)|)}, upper_k}, the step of BiSPS.

    Both bounds fall like 1/sqrt(k+1), whatever steps were taken. ``upper=None`` has it measured
    by a line search in the iterations 0, 1, 3, 7, 15, ..., between which it falls so.

    Args:
        lower_bound: of the loss; 0 for losses that cannot be negative.
        c: scale; at least 1/2 for convergence.
        lower, upper: bounds at k = 0; ``lower`` relative to ``upper`` where that is measured.

    Where the loss is at its bound or below and its gradient is not zero, the bound is not one, and
    the step is the ceiling.
    """

    lower_bound: float = 0.0
    c: float = 1.0
    lower: float = 0.0
    upper: float | None = None

    def searches(self, k: int, last: float | None) -> bool:
        return self.upper is None and (last is None or settles(k))

    def __call__(self, line: Line, k: int, last: float | None) -> Move:
        upper, trials = self.upper, 0
        if upper is None:
            if self.searches(k, last):
                measured = Armijo(growth=2.0)(
                    line, k, None if last is None else last / math.sqrt(k + 1)
                )
                trials = measured.trials
                if measured.last is not None:
                    last = measured.last * math.sqrt(k + 1)
            upper = last if last is not None else 0.0
        return Move(self.size(line.value, line.slope, upper, k), last, trials)

    def size(self, value: Tensor, slope: Tensor, upper: Any, k: Any) -> Tensor:
        """The step of iteration k along a line with phi(0) and phi'(0); ``upper``: at k = 0."""
        lower = self.lower * upper if self.upper is None else self.lower
        gap = value - self.lower_bound
        step = torch.where(gap <= 0, torch.inf, polyak(gap, -slope, self.c))
        size = envelope(step, schedule(lower, k), schedule(upper, k))
        return torch.where(slope < 0, size, 0.0)


class Moments(NamedTuple):
    """Moving averages of the gradient and its square, their number of terms, and the sum of the
    weights that m gives them."""

    m: Tensor | None = None
    v: Tensor | None = None
    n: int = 0
    w: float = 0.0


@dataclass(frozen=True)
class Steepest:
    """d = -g."""

    def __call__(self, g: Tensor, moments: Moments, beta1: Any = 0.5) -> tuple[Tensor, Moments]:
        return -g, moments


@dataclass(frozen=True)
class Adam:
    """d = -A^{-1} m with A = diag(sqrt(v) + eps), both averages corrected for their start.

    The averages are updated once per iteration, before the search.

    Args:
        beta1, beta2: of the moving averages of the gradient and of its square, in [0, 1). beta1 =
            'auto': as :meth:`bilevel.lengths.Lengths.memory` says, from 0.5 to 0.9.
        eps: added to sqrt(v): as it is, or, if ``normalised``, times the largest entry of sqrt(v).
        normalised: average g / ||g||. A search finds the length of the step by itself; a few
            large early gradients would otherwise rule the averages for hundreds of iterations.
        descends: where d does not descend, -A^{-1} g takes its place, which a search asks for.

    Reference: Kingma & Ba 2015; Vaswani et al. 2020 for Armijo in the norm of A^{-1}.
    """

    beta1: float | Literal["auto"] = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    normalised: bool = False
    descends: bool = False

    def __call__(self, g: Tensor, moments: Moments, beta1: Any = 0.5) -> tuple[Tensor, Moments]:
        """The direction, and the averages with g in them.

        Args:
            beta1: what 'auto' stands for, a number or a tensor.
        """
        if self.beta1 != "auto":
            beta1 = self.beta1
        if self.normalised:
            g = g / torch.linalg.vector_norm(g).clamp_min(torch.finfo(g.dtype).tiny)
        m = torch.zeros_like(g) if moments.m is None else moments.m
        v = torch.zeros_like(g) if moments.v is None else moments.v
        n = moments.n + 1
        m = beta1 * m + (1 - beta1) * g
        w = beta1 * moments.w + (1 - beta1)
        v = torch.lerp(g * g, v, self.beta2)
        moments = Moments(m, v, n, w)
        A = self.scales(moments)
        d = -(m / w) / A
        if self.descends:
            d = torch.where(torch.dot(g, d) < 0, d, -g / A)
        return d, moments

    def scales(self, moments: Moments) -> Tensor:
        """The diagonal of A, of averages that have terms."""
        v, n = moments.v, moments.n
        assert v is not None
        root = (v / (1 - self.beta2**n)).sqrt()
        A = root + (self.eps * root.max() if self.normalised else self.eps)
        return A.clamp_min(torch.finfo(v.dtype).tiny)
