"""The inner steps of an iteration, each on a draw of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.host import unsound
from bilevel.hypergradients import InnerStep
from bilevel.inner_solver import run_solver
from bilevel.linear import CONCAVE
from bilevel.problem import Draw, Oracle
from bilevel.rules import Line, Move
from bilevel.state import State, Training

if TYPE_CHECKING:
    from bilevel.method import Method


@dataclass
class Inner:
    """What the inner steps lead to, and their path as far as the hypergradient asks for it."""

    y: Tensor
    last: float | None
    solver: Any
    training: Training
    value: float | Tensor = float("nan")
    spoiled: float | Tensor = 0.0  # not finite where any loss on the way was not
    size: float | Tensor = 0.0
    gain: float = 0.0  # of g by searched steps, each on its own batch
    trials: int = 0
    failures: int = 0
    path: list[InnerStep] = field(default_factory=list)

    def took(self, value: Tensor, move: Move) -> None:
        """A step from a y with that loss."""
        self.value, self.size = value, move.size
        self.spoiled = self.spoiled + unsound(value)
        self.gain += move.gain if math.isfinite(move.gain) else 0.0
        self.trials += move.trials
        self.failures += move.failed


def inner_steps(method: Method, oracle: Oracle, state: State, draws: Sequence[Draw]) -> Inner:
    """The inner steps from y at x, one on each draw."""
    x, y = state.vectors
    out = Inner(y, state.inner_last, state.solver, state.training)
    if method.inner_solver is not None:
        out.y, out.solver = run_solver(
            method.inner_solver, oracle, x, y, draws, state.solver, tells=state.k == 0
        )
    elif trains(method, oracle, state, draws):
        _train(method, oracle, state, draws, out)
    else:
        _descend(method, oracle, state, draws, out)
    return out


def _descend(
    method: Method, oracle: Oracle, state: State, draws: Sequence[Draw], out: Inner
) -> None:
    """Gradient steps."""
    x, y = state.vectors
    keep, window = method.hypergradient.keep, method.hypergradient.window
    first_kept = 0 if window is None else max(0, len(draws) - window)
    for t, draw in enumerate(draws):
        kept = keep != "nothing" and t >= first_kept
        graph = oracle.record(x, y, draw) if kept and keep == "graphs" else None
        if graph is not None:
            value, gy = graph.value, graph.gradient
        else:
            value, gy = oracle.inner_gradient(x, y, draw)
        d = -gy
        line = Line(value, torch.dot(gy, d), partial(_along, oracle, x, y, d, draw))
        move = method.inner_rule(line, state.k, out.last)
        if kept:
            out.path.append(InnerStep(y, draw, move.size, graph))
        y = y + move.size * d
        out.last = move.last
        out.took(value, move)
    out.y = y


def trains(method: Method, oracle: Oracle, state: State, draws: Sequence[Draw]) -> bool:
    """Whether y is to be trained as networks are: where g is not convex and its batches differ.

    Not where it starts afresh, nor where what goes back along the steps, or takes one more,
    supposes them along -g_y.
    """
    plain = method.response == "refine" or method.hypergradient.keep != "nothing"
    if method.training is None or method.fresh or plain or state.learned.concave <= CONCAVE:
        return False
    if method.hypergradient.batches == "auto":  # looks whether there are others
        return state.noise.terms > 0
    return len(oracle.distinct(draws)) > 1


def _train(method: Method, oracle: Oracle, state: State, draws: Sequence[Draw], out: Inner) -> None:
    """Steps along a direction with momentum, after which g may be as high as it was of late.

    A search along -g_y that asks for a decrease on each batch takes what is best for the moment,
    and leads a deep network to where g is ever more curved and steps ever shorter. (As the greedy
    steps of Roulet et al. 2024, arXiv 2407.06183.)
    """
    assert method.training is not None  # or it is not for :func:`trains`
    x, y = state.vectors
    training, (direction, rule) = state.training, method.training
    for draw in draws:
        value, gy = oracle.inner_gradient(x, y, draw)
        training = training.saw(float(value))
        d, moments = direction(gy, training.moments)
        along = partial(_along, oracle, x, y, d, draw)
        above = max(training.level - float(value), 0.0)
        move = rule(Line(value, torch.dot(gy, d), along, above=above), state.k, training.last)
        y = y + move.size * d
        training = training._replace(moments=moments, last=move.last)
        out.took(value, move)
    out.y, out.training = y, training


def _along(oracle: Oracle, x: Tensor, y: Tensor, d: Tensor, draw: Draw, t: float) -> Tensor:
    return oracle.value("inner", x, y + t * d, draw)
