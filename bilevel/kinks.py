"""Where y has stopped at a kink of g: of an absolute value, a hinge, a rectifier."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.distributed import Ranks
from bilevel.hypergradients import FiniteDifference
from bilevel.problem import Draw, Oracle
from bilevel.randomness import all_generators, restore_generators
from bilevel.record import Record
from bilevel.rules import Armijo
from bilevel.state import State

if TYPE_CHECKING:
    from bilevel.method import Method

FEWEST = 10  # iterations, before which nothing has stopped
SHORTER = 8  # times shorter than the longest are steps that have
FARTHER = 8  # times as far is each look as the one before it
JUMPS = 0.2  # share of itself by which the slope changes where a search notices
SMOOTH = 0.02  # share by which g_yy says that it does where it hardly changes


def tell(
    method: Method, oracle: Oracle, state: State, draw: Draw, history: list[Record], ranks: Ranks
) -> None:
    """Warn where inner searches have come to nothing since y is at a kink of g."""
    searches = isinstance(method.inner_rule, Armijo) and method.inner_solver is None
    differentiates = not isinstance(method.hypergradient, FiniteDifference)
    step = state.inner_last
    trained = state.training.last is not None  # by steps of another scale
    if trained or not (searches and differentiates and step and shrank(history)):
        return
    longest = max(record.inner_step for record in history)
    device = state.vectors[1].device
    random = all_generators(device)  # to be left as the run has left them
    try:
        found = at_kink(oracle, *state.vectors, draw, step, longest)
    except Exception as error:  # of a loss: nothing that only warns is to end a run
        if ranks.parted(error):
            raise
        return
    finally:
        restore_generators(random, device)
    if found:
        warnings.warn(
            f"y stopped at a kink of g: inner steps fell from {longest:.1g} to {step:.1g}, since "
            f"g_y jumps where second derivatives say that it hardly changes. y may be far from its "
            f"minimum, and the hypergradient off. Round the kink off, over a few hundredths of its "
            f"scale: (z**2 + 1e-3).sqrt() for |z|, F.softplus(z, beta=30) for a hinge relu(z); in "
            f"a network, tanh or softplus instead of ReLU, if x gets nowhere.",
            RuntimeWarning,
            stacklevel=3,
        )


def shrank(history: list[Record]) -> bool:
    """Whether the median of the last quarter of the inner steps is ``SHORTER`` times shorter than
    the longest one, in a run of ``FEWEST`` iterations at least."""
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
    while 0 < step <= longest and step * bend <= SMOOTH * slope:
        there = oracle.inner_gradient(x, y - step * gy, draw)[1]
        if torch.dot(gy, gy - there) >= JUMPS * slope > 0:
            return True
        step *= FARTHER
    return False
