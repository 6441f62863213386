"""Where y has stopped at a kink of g: of an absolute value, a hinge, a rectifier."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.problem import Draw, Oracle
from bilevel.record import Record
from bilevel.rules import Armijo
from bilevel.state import State

if TYPE_CHECKING:
    from bilevel.method import Method

FEWEST = 10  # iterations that tell
SHORTER = 8  # times than the longest step, or nothing has stopped
FARTHER = 8  # times as far from one look to the next
JUMPS, SMOOTH = 0.2, 0.02  # change of the slope over the slope: of searches' concern; next to none


def tell(method: Method, oracle: Oracle, state: State, draw: Draw, history: list[Record]) -> None:
    """Warn where inner searches have come to nothing since y is at a kink of g."""
    if not isinstance(method.inner_rule, Armijo) or method.inner_solver or not shrank(history):
        return
    step, longest = state.inner_last, max(record.inner_step for record in history)
    try:
        found = step is not None and at_kink(oracle, *state.vectors, draw, step, longest)
    except Exception:  # of a loss: nothing that only warns is to end a run
        return
    if found:
        warnings.warn(
            f"y stopped at a kink of g: inner steps fell from {longest:.1g} to {step:.1g}, since "
            f"g_y jumps where second derivatives say that it hardly changes. y may be far from its "
            f"minimum, and the hypergradient off. Round the kink off, over a few hundredths of its "
            f"scale: (z**2 + 1e-3).sqrt() for |z|, F.softplus(z, beta=30) for a hinge relu(z), and "
            f"tanh or softplus for ReLU in a network.",
            RuntimeWarning,
            stacklevel=3,
        )


def shrank(history: list[Record]) -> bool:
    """Whether inner steps are ``SHORTER`` times shorter, lately, than the longest one was."""
    late = sorted(record.inner_step for record in history[3 * len(history) // 4 :])
    longest = max((record.inner_step for record in history), default=0.0)
    return len(history) >= FEWEST and SHORTER * late[len(late) // 2] < longest


def at_kink(oracle: Oracle, x: Tensor, y: Tensor, draw: Draw, step: float, longest: float) -> bool:
    """Whether, along an inner step of a length between these, g_y jumps where g_yy says that it
    hardly changes.

    Where g is smooth, an Armijo step ends about where the slope has changed by its own size, as
    <g_y, g_yy g_y> says; at a kink that says next to nothing. One product, a gradient for each
    eightfold.
    """
    pull = oracle.record(x, y, draw)
    gy = pull.gradient
    slope = torch.dot(gy, gy)
    bend = torch.dot(gy, pull.product(gy)).abs()
    while step <= longest and step * bend <= SMOOTH * slope:
        there = oracle.inner_gradient(x, y - step * gy, draw)[1]
        if torch.dot(gy, gy - there) >= JUMPS * slope > 0:
            return True
        step *= FARTHER
    return False
