"""What a run may have got wrong without failing: told once, at its end, from its records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from bilevel.lag import SOLVED, WAITS
from bilevel.record import Record

AWAY = 0.1  # of what a run gained, by which f may be other at y*(x)
FIRST = 3  # iterations, whose mean f the run has changed
SMALL = 0.01  # of f; less is not told, nor what is within three standard errors
ROUNDING = 1e-4  # of the largest f of the run


def tell(history: list[Record], corrects: bool) -> None:
    """Warn where most iterations had next to no hypergradient, or x stayed in them: see
    :func:`bilevel.lag.is_lost` and :func:`bilevel.lag.is_flattered`; where y is not near y*(x) at
    the end; and where f rose.

    Args:
        corrects: whether the method does something about a y that is not.
    """
    for text in (_lost(history), _still(history), not corrects and _away(history), _risen(history)):
        if text:
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def _lost(history: list[Record]) -> str | None:
    loose = [r for r in history if (r.residual or 0) > 1]
    unsolved = [r for r in loose if not (r.outer_step or r.failure or r.outer_trials)]
    if 2 * len(unsolved) > len(history):
        return (
            f"x stayed where it was in {len(unsolved)} of {len(history)} iterations, in which the "
            f"linear system of the hypergradient was left with a residual above 1, as where g is "
            f"all but flat in some directions of y: keep x from there (project=..., bounded "
            f"penalties), add a small penalty on y to g, or allow more products by "
            f"hypergradient=bilevel.Implicit(bilevel.ConjugateGradient(steps=200))."
        )
    if 2 * len(loose) > len(history) >= WAITS:
        return (
            f"the linear system of the hypergradient was left with a residual above 1 in "
            f"{len(loose)} of {len(history)} iterations, so that it says next to nothing of F. "
            f"Where y is kept in a set or stops short of g's minimum (an inner_solver that "
            f"projects, say), write it as a function of free variables, such as tanh(z), or go on "
            f"to the minimum; where g is all but flat or concave, add a small penalty on y to g."
        )
    return None


def _still(history: list[Record]) -> str | None:
    later = [r for r in history if r.k >= WAITS]  # before, x waits for a y that comes from far
    still = [r for r in later if not (r.outer_step or r.failure) and r.outer_trials]
    if not 2 * len(still) > len(later) >= WAITS:
        return None
    return (
        f"x stayed where it was in {len(still)} of {len(history)} iterations, in which y "
        f"was so far from y*(x) that f fell and F rose: keep x from where gradient steps of g "
        f"hardly move y (project=..., bounded penalties), take more inner_steps, or give an "
        f"inner_solver that gets there."
    )


def _away(history: list[Record]) -> str | None:
    """Of a method that leaves y where the inner steps do."""
    _, last = _quarters(history)
    lags = [r.lag for r in last if r.lag is not None and (r.residual or 0) <= SOLVED]
    if len(lags) < WAITS:
        return None
    before, _ = _mean(_losses(history[:FIRST]))
    after, noise = _mean(_losses(last))
    lag, error = _mean(lags)
    gained = before - after
    told = abs(lag) > AWAY * abs(gained) and abs(lag) > 3 * error and abs(lag) > 3 * noise
    if not (told and abs(lag) > SMALL * abs(after)):
        return None
    return (
        f"y ended so far from y*(x) that f is other by about {abs(lag):.2g} there, where the run "
        f"changed f by {gained:.2g}: what was minimised is not F. Take more inner_steps, or an "
        f"inner_solver that goes on to the minimum of the inner loss itself: weight_decay of an "
        f"optimizer keeps y from it, and is to be a part of the loss; a scheduler goes on from one "
        f"outer iteration to the next, and is not to end."
    )


def _risen(history: list[Record]) -> str | None:
    first, last = _quarters(history)
    if min(len(first), len(last)) < WAITS:
        return None
    early, late = _losses(first), _losses(last)
    (before, one), (after, other) = _mean(early), _mean(late)
    told = after - before > 3 * (one + other) or min(late) > max(early)
    most = max(abs(r.outer_loss) for r in history if math.isfinite(r.outer_loss))
    if not (told and after - before > max(SMALL * abs(before), ROUNDING * most)):
        return None
    return (
        f"the outer loss rose, from {before:.4g} early in the run to {after:.4g} in its last "
        f"quarter: steps of a fixed size are too long, or y goes elsewhere than the hypergradient "
        f"says, as where g is not convex or y is far from its minimum. Take more inner_steps or a "
        f"better inner_solver, compare print(bilevel.check(outer, inner, x, y)), or keep an "
        f"earlier x by callback=."
    )


def _quarters(history: list[Record]) -> tuple[list[Record], list[Record]]:
    """The first one, once y has come from its start, and the last; without what failed."""
    n = len(history) // 4
    parts = history[n // 2 : n // 2 + n], history[len(history) - n :]
    first, last = ([r for r in part if r.failure is None] for part in parts)
    return first, last


def _losses(records: list[Record]) -> list[float]:
    return [r.outer_loss for r in records]


def _mean(numbers: Sequence[float]) -> tuple[float, float]:
    """Their mean and its standard error; not finite, rather than an exception, where they are huge:
    a run that has diverged keeps its result."""
    held = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return float(held.mean()), float(held.std()) / math.sqrt(len(numbers))
