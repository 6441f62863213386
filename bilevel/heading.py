"""Where an outer step points, and how far its search begins: along the direction of the method, or,
where nothing has noise, that of the secants."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients import Estimate
from bilevel.lag import SOLVED, has_solution
from bilevel.rules import Moments
from bilevel.secants import Secants
from bilevel.state import State
from bilevel.steps import rounding_of

if TYPE_CHECKING:
    from bilevel.method import Method


class Heading(NamedTuple):
    """Where to go.

    Attributes:
        d: the direction.   last: what its step-size rule carries over.
        moments, secants: with the hypergradient in them.
        newton: whether d is that of the secants, whose steps have lengths of their own.
    """

    d: Tensor
    last: float | None
    moments: Moments
    secants: Secants
    newton: bool


def heading(method: Method, state: State, h: Estimate, free: bool) -> Heading:
    """Where h points; ``free``: whether nothing has noise and x no bounds, so that the secants may
    know better."""
    beta1 = state.lengths.memory(state.learned.exact)
    d, moments = method.direction(h.grad, state.moments, beta1)
    plain = Heading(d, state.outer_last, moments, Secants(), False)
    if not (free and state.outer_last and solves(h)):
        return plain
    secants = state.secants.add(state.vectors[0], h.grad, h.value)
    if secants.trusted:
        d = secants.along(h.grad, method.scales(moments))
        if bool(torch.dot(h.grad, d) < 0):
            return Heading(d, method.whole, moments, secants._replace(newton=True), True)
    plain = plain._replace(secants=secants)
    return _back(plain, h, state.lengths.farthest, method.whole) if secants.longer > 1 else plain


def solves(h: Estimate) -> bool:
    """Whether h is the gradient of F, as far as is known: secants are of that alone."""
    return h.residual is not None and has_solution(h) and bool(h.residual <= SOLVED)


def _back(heading: Heading, h: Estimate, farthest: float, whole: float) -> Heading:
    """A step that has collapsed comes back, no farther than searches have led (``farthest``), and
    where f is not so flat that this would be lost in rounding."""
    last, longer = heading.last, heading.secants.longer
    slope, norm = torch.dot(h.grad, heading.d), torch.linalg.vector_norm(heading.d)
    value, slope, norm = torch.stack([h.value, slope, norm]).tolist()
    assert last is not None
    if not farthest * -slope > 8 * rounding_of(value, h.value.dtype) * norm:
        return heading
    most = min(longer * last, farthest / norm) * whole
    return heading._replace(last=max(last, most))
