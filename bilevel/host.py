"""What the host looks at of an iteration, all of it at once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.average import Average
from bilevel.drawn import Drawn
from bilevel.hypergradients import Estimate
from bilevel.problem import Oracle
from bilevel.rules import Move
from bilevel.trials import Trials


class Numbers(NamedTuple):
    """Numbers, or tensors of one, of an outer step that was taken.

    Attributes:
        value, inner_value, norm: f, g and |h| before it.   residual: of the system of q.
        alpha, beta: the outer and the last inner step.   length: of the direction d.
        finite: whether the point after it is.
        difference: of f here and at the average of the iterates.
        slope: <h, d>.   apart: see :class:`bilevel.hypergradients.Course`.
        here, there: the lag of f, on the batches of h and on another one.
        excess: of the curvature along q on that one, see :class:`bilevel.noise.Noise`.
        gain: of f where y bends, see :meth:`bilevel.trials.Trials.gain`.
        own, seen: slopes along the step, see :class:`bilevel.noise.Agreement`.
    """

    value: Any
    inner_value: Any
    norm: Any
    length: Any
    alpha: Any
    beta: Any
    residual: Any
    finite: Any
    difference: Any
    slope: Any
    here: Any
    there: Any
    excess: Any
    apart: Any
    gain: Any
    own: Any
    seen: Any

    def on_host(self, device: torch.device) -> Numbers:
        """All of them, at the cost of waiting once."""
        wide = (torch.as_tensor(number, dtype=torch.float64, device=device) for number in self)
        return Numbers(*torch.stack(list(wide)).tolist())

    @property
    def sound(self) -> bool:
        """Whether all that a step is computed from, and where it has led to, is finite."""
        return all(map(math.isfinite, (self.value, self.inner_value, self.norm))) and self.finite

    def failure(self, move: Move) -> str | None:
        """What was wrong with the iteration, in words."""
        return failure(self.value, self.inner_value, self.norm, self.finite, move)


def numbers(
    oracle: Oracle,
    drawn: Drawn,
    average: Average | None,
    inner: tuple[float | Tensor, float | Tensor, float | Tensor],
    h: Estimate,
    trials: Trials,
    move: Move,
    reached: tuple[Tensor, Tensor],
    measures: bool,
) -> Numbers:
    """Of an outer step that leads to ``reached``.

    Args:
        inner: g at the last inner step, its size, and 0, or what is not finite where any g on the
            way was not.   measures: whether the length of d is asked for; NaN otherwise.
    """
    (x, y), (new_x, new_y), (inner_value, beta, spoiled) = (trials.x, trials.y), reached, inner
    own = seen = excess = h.value * math.nan
    follows = trials.response not in (None, "frozen")  # or y stays behind
    if drawn.fresh and h.fy is not None and follows:
        _, fx, fy = oracle.outer_gradients(x, y, drawn.fresh[0])
        own, seen = slopes(h, (fx, fy), (new_x - x, new_y - y))
    here = there = torch.zeros_like(h.value) if h.lag is None else h.lag
    if drawn.others and h.elsewhere:
        excess, there = h.elsewhere(drawn.others[0])
    average_value = average.value(oracle, drawn.outer) if average else h.value
    if h.inner_value is not None:
        inner_value = h.inner_value
    return Numbers(
        value=h.value,
        inner_value=inner_value + spoiled,
        norm=torch.linalg.vector_norm(h.grad),
        length=torch.linalg.vector_norm(trials.d) if measures else math.nan,
        alpha=move.size,
        beta=beta,
        residual=math.nan if h.residual is None else h.residual,
        finite=new_x.isfinite().all() & new_y.isfinite().all(),
        difference=h.value - average_value,
        slope=trials.slope,
        here=here,
        there=there,
        excess=excess,
        apart=trials.apart,
        gain=trials.gain(move.size),
        own=own,
        seen=seen,
    ).on_host(x.device)


def slopes(
    h: Estimate, fresh: tuple[Tensor, Tensor], step: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """<f_x, dx> + <f_y, dy> of the draw that h was computed on, and of a fresh one with these f_x
    and f_y."""
    assert h.fy is not None
    (fx, fy), (dx, dy) = fresh, step
    own = torch.dot(h.direct, dx) + torch.dot(h.fy, dy)
    return own, torch.dot(fx, dx) + torch.dot(fy, dy)


def unsound(value: Tensor) -> Tensor:
    """It, where it is not finite; or 0."""
    return torch.where(value.isfinite(), 0.0, value)


def failure(value: float, inner_value: float, norm: float, finite: float, move: Move) -> str | None:
    for what, number in (
        ("the inner loss", inner_value),  # first, since y enters the outer one
        ("the outer loss", value),
        ("the norm of the hypergradient", norm),
    ):
        if not math.isfinite(number):
            return f"{what} is {number}"
    if move.failed and not move.trials:
        return "the slope of the outer line search is not finite"
    if move.failed:
        return f"the outer line search found no acceptable step in {move.trials} trials"
    if not finite:
        return "the step led to a point that is not finite"
    return None
