"""How far to go along a direction: Polyak, Armijo, schedules and the envelope around them.

A rule sees only a line, phi(t) = loss(x + t d) on one fixed batch: phi(0), the slope phi'(0) and
phi(.) itself. With d = -g the slope is -||g||^2; with a preconditioned d = -A^{-1} g it is
-||g||^2 in the norm of A^{-1}: every method of the papers finds its own norm in the slope.

The functions on tensors (:func:`polyak`, :func:`envelope`) never synchronise with the host;
:func:`armijo` compares values and therefore must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def polyak(gap: Tensor, norm2: Tensor, c: float = 1.0) -> Tensor:
    """The Polyak step  [gap]_+ / (c ||g||^2),  zero where it is not defined.

    Args:
        gap: loss minus its lower bound (or minus its optimal value), any shape.
        norm2: squared norm of the gradient in the norm of the step, same shape.
        c: scale, > 0; 1 is the exact projection, larger is more careful.

    A zero gradient, a loss below its bound, NaN and inf give a step of zero: never backward.

    Reference: Loizou et al. 2021 (SPS); BiSLS/SPS (arXiv 2305.18666), eqs. (10)-(11).
    """
    step = gap.clamp_min(0) / (c * norm2)
    return torch.where(torch.isfinite(step) & torch.isfinite(gap), step, torch.zeros_like(step))


def envelope(step: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """min{max{lower, step}, upper}: the step of BiSPS, SPSB and SLSB (arXiv 2305.18666).

    ``upper`` wins where the two bounds cross.
    """
    return torch.clamp(torch.clamp(step, min=lower), max=upper)


def schedule(initial: float, k: int | Tensor, power: float = 0.5) -> float | Tensor:
    """initial / (k + 1)^power: power 1/2 for convex and non-convex, 1 for strongly convex."""
    return initial / (k + 1) ** power


def rounding_of(value: Any, dtype: torch.dtype) -> Any:
    """By how much two evaluations of a loss of this value may differ and be the same: a sum of many
    terms is a few units of its precision from right, 8 at most. Numbers or tensors."""
    return 8 * torch.finfo(dtype).eps * abs(value)


class Search(NamedTuple):
    """Outcome of a line search; ``step`` and ``value`` are those of the accepted trial."""

    step: float
    value: float
    trials: int
    accepted: bool


def armijo(
    phi: Callable[[float], float],
    value: float,
    slope: float,
    start: float,
    *,
    predicted: Callable[[float], float] | None = None,
    c: float = 0.1,
    shrink: float = 0.5,
    grow: float | None = None,
    slack: float = 0.0,
    max_trials: int = 40,
) -> Search:
    """A t with  phi(t) <= phi(0) + c t phi'(0) + slack.

    Args:
        phi: the line; called with t > 0, may return NaN or inf (such a trial is refused).
        value: phi(0).
        slope: phi'(0) < 0.
        start: first t tried.
        predicted: t -> change of phi to first order, instead of t phi'(0), for a line that a
            projection bends; a trial where it is positive is refused.
        c: share of the predicted decrease that is asked for, in (0, 1).
        shrink: factor after a refusal, in (0, 1).
        grow: None: the first accepted trial is taken. A factor > 1: the best of the grid
            start * grow^j, as far as phi falls from trial to trial: upwards, or downwards where
            that does not. Where phi has one valley, any start on the grid leads to the same step.
        slack: allowed excess; at least the rounding error of phi.
        max_trials: evaluations of phi at most.

    When no trial is accepted the step is 0 and the value phi(0).

    Reference: Armijo 1966; Vaswani et al. 2019 (SLS); BiSLS (arXiv 2305.18666) for the slack.
    """
    t, best = start, Search(0.0, value, 0, False)
    factor = shrink if grow is None else grow
    for trials in range(1, max_trials + 1):
        v = phi(t)
        change = t * slope if predicted is None else predicted(t)
        ok = math.isfinite(v) and change <= 0 and v <= value + c * change + slack
        if ok and not (best.accepted and v >= best.value):
            best = Search(t, v, trials, True)
            if grow is None:
                return best
        elif best.accepted and (factor < 1 or best.step != start):  # one trial too far
            return best._replace(trials=trials)
        elif grow is not None:
            factor, t = 1 / grow, best.step if best.accepted else t
        t *= factor
    return best._replace(trials=max_trials)
