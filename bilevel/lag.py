"""Where y lags behind y*(x): how that is noticed, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.hypergradients import Estimate
from bilevel.linear import CONCAVE, Learned
from bilevel.problem import Draw, Oracle
from bilevel.rules import LEAST_C, Line, Move
from bilevel.trials import Trials

HALVINGS = 10  # of a first step at most
FIRST_OFF = 0.25  # share by which g may be off at the end of a first step that needs no other look
IN_A_ROW = 3  # iterations that go wrong, of which x stays in the last
WAITS = 10  # iterations that x waits at most for y; corrections of one
NEAR = 0.01  # times what a step gains, by which f may be other at y* where h is to be that of F
FLATTERED = 2  # times what a step gains, by which f is too low where y lags
SOLVED = 0.2  # residual of the system of q, up to which its <q, g_y> is to be trusted so far
SETTLED = 0.1  # of what a step is to gain, by which f may still change on the way to y*


def has_solution(h: Estimate) -> bool:
    """Whether there is a y* that y may be near, as far as is known."""
    return h.newton is not None and bool(h.learned[-1].concave <= CONCAVE)


def is_lost(residual: float | Tensor, unsolved: int) -> bool:
    """Whether the system of q has been left unsolved for so long that h tells nothing of F.

    Where g is all but flat in some directions of y, as with penalties of e^-20, no number of
    products that is at hand solves it. f then falls along such directions with F rising, and g sees
    nothing of it. A residual above one now and then is of no harm: conjugate gradients pass it.

    Args:
        residual: of this iteration.   unsolved: iterations before it, in a row.
    """
    return unsolved >= IN_A_ROW - 1 and bool(residual > 1)


def is_behind(here: Any, there: Any, gain: Any) -> Any:
    """Whether y lags by more than the outer step is to gain, and noise alone would not tell so.

    Args:
        here, there: the lag on two independent batches, of which the mean is to exceed half of the
            difference twice; the same number where there is but one. Numbers or tensors.
    """
    lag, spread = abs(here + there) / 2, abs(here - there) / 2
    return (lag > gain) & (lag > 2 * spread)


def is_flattered(here: Any, there: Any, gain: Any, residual: Any) -> Any:
    """Whether f is lower than it would be at y*, by more than steps gain: as in :func:`is_behind`,
    of a system with that residual.

    Where that is so again and again, and no correction brings y near, f falls since y stays behind,
    and F rises.
    """
    solved = residual <= SOLVED
    return is_behind(here, there, FLATTERED * gain) & (here + there < 0) & solved


def is_exact(residual: float, halvings: int | Tensor, behind: bool) -> bool:
    """Whether, f and g without noise, h is the slope of F but for a tenth or so: its system is
    solved, needs not be solved closer, and y is not behind."""
    return residual <= SOLVED and bool(halvings == 0) and not behind


def arrived(
    oracle: Oracle,
    outer: Draw,
    trials: Trials,
    line: Line,
    move: Move,
    settled: Callable[[Tensor, Tensor, float], Tensor],
) -> tuple[Move, tuple[Tensor, Tensor]]:
    """The first step of a run, halved until f has fallen where y has settled, and where it leads.

    It is found over many decades along a tangent of y*, and at its end y may solve nothing: g_yy
    may be gone there, so that any y serves g, or y* may have turned. What is lost so, no later step
    may find again. Where g is not nearly what second order says there, f with y near y*, before and
    after, tells, once a run. Where even the shortest
    of the halves gains nothing so, y does not settle, and the step is as it was. One that was
    halved is not to be remembered (``last`` is None), so that the next search is a first one, too.

    Args:
        settled: (x, y, lag) -> y near y*(x), or as it is where f lags by no more than that.
    """

    def reach(t: float) -> tuple[Tensor, Tensor]:
        x, y = trials.reach(t)
        return x, trials.y if y is None else y

    def change(t: float) -> float:
        return LEAST_C * line.change(t)

    def value(point: tuple[Tensor, Tensor], lag: float = 0.0) -> float:
        x, y = point
        return float(oracle.value("outer", x, settled(x, y, lag), outer))

    size, start = float(move.size), (trials.x, trials.y)
    if trials.straight(size, FIRST_OFF):
        return move, reach(size)
    # from where it starts, y is mostly near; at the end <q, g_y> may tell of another place
    found = value(reach(size))
    if found <= value(start, SETTLED * abs(change(size))) + change(size):
        return move, reach(size)

    base = value(start)

    def gains(t: float) -> bool:
        return value(reach(t)) <= base + change(t)

    halves = [size / 2**i for i in range(1, HALVINGS + 1)]
    if found <= base + change(size) or not gains(halves[-1]):
        return move, reach(size)
    i, t = next((i, t) for i, t in enumerate(halves, 1) if gains(t))
    return move._replace(size=t, last=None, trials=move.trials + i), reach(t)


def corrected(
    oracle: Oracle, x: Tensor, y: Tensor, h: Estimate, judge: Draw, *, there: bool = False
) -> tuple[Tensor, Learned]:
    """y + s or y + s/4 with the Newton step g_yy s = -g_y, or y: the first that is better; and what
    is known of the systems by then.

    The inner steps bring y near y*(x) as slowly as g is ill-conditioned, and where f gains by y
    staying behind, x drifts to where they are slower still. One more system with the matrix of
    the hypergradient makes up for it; where that belongs to one batch, another one judges.

    Args:
        x, y: where the outer step has led to.   h: the hypergradient before it.
        there: whether the system is that of x and y, and not of where h is.
    """
    if h.newton is None:
        return y, h.learned[-1]
    s, learned = h.newton(at=(x, y)) if there else h.newton()
    best = oracle.value("inner", x, y, judge)
    for t in (1.0, 0.25):
        if bool(oracle.value("inner", x, y + t * s, judge) < best):
            return y + t * s, learned
    return y, learned
