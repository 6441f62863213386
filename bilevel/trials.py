"""The points that an outer search tries: x(t) = P(x + t d), and the y(t) each is judged on."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from bilevel.hypergradients import Estimate, Followed
from bilevel.problem import Draw, Oracle
from bilevel.rules import Line
from bilevel.steps import rounding_of

Response = Literal["tangent", "refine", "frozen"]


def ceiling(value: Tensor) -> Tensor:
    """The loss and its rounding: what is not as low has risen."""
    return value + rounding_of(value, value.dtype)


class Trials:
    """phi(t) = f(x(t), y(t)) along d, with y(t) one of

    * 'tangent': the response that the hypergradient differentiates (see
      :mod:`bilevel.hypergradients`); its slope is that of h, so some t > 0 always passes. Where f
      rises once y bends with y*, t is refused. The first search, which ranges far, goes by the
      bent y; later ones do not, since from y(t) inner steps go but a part of the way to y*;
    * 'refine': one inner step of the last size taken at x(t), at the base as well: closest to the
      paper's words. It answers by a part of the response only, and may find no t where y is far
      from its solution;
    * 'frozen': y itself; blind where f depends on x through y alone.

    None is for rules that try nothing: they see <h, d> as the slope. ``rise`` is by how much f may
    rise where y bends, see :class:`bilevel.lengths.Lengths`; ``margin`` by how much g may lose by
    y's following x: what inner steps gain again. A short way along w may lose where g has kinks.
    """

    def __init__(
        self,
        oracle: Oracle,
        point: tuple[Tensor, Tensor],
        outer: Draw,
        inner: Draw,
        h: Estimate,
        d: Tensor,
        response: Response | None,
        inner_size: float | Tensor,
        kappa: float,
        first: bool,
        rise: float = 0.0,
        margin: float = 0.0,
    ) -> None:
        self._oracle, self._outer, self._inner = oracle, outer, inner
        (self.x, self.y), self.response = point, response
        self._h, self.d, self._inner_size = h, d, inner_size
        self._projects = oracle.problem.project is not None
        self._seen: dict[float, tuple[Tensor, Followed]] = {}
        self._bent: dict[float, Tensor] = {}
        self._follow = None
        self.apart: Tensor | float = math.nan  # see :class:`bilevel.hypergradients.Course`
        self._kappa, self._first, self._rise, self._margin = kappa, first, rise, margin
        self.slope = torch.dot(h.direct if response == "frozen" else h.grad, d)
        if response == "tangent":
            self.slope, self.apart, self._follow = h.respond(d, first, margin)

    @property
    def line(self) -> Line:
        """phi as a rule sees it. Not held: a cycle would keep the graphs of h until collected."""
        # base and trial on the same map y(t), or no t may do
        value = self.phi(0.0) if self.response == "refine" else self._h.value
        predicted = self._predicted if self._projects else None
        return Line(value, self.slope, self.phi, predicted, self._kappa, extrapolates=True)

    def reach(self, t: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """x(t) and y(t); y(t) is None where it cannot be had. A tensor t moves x alone."""
        if isinstance(t, Tensor):
            return self._oracle.project(self.x + t * self.d), self.y
        xt, followed = self._try(t)
        return xt, followed.y if bool(followed.trusted) else None

    def straight(self, t: float, within: float) -> bool:
        """Whether g is there what it is at y, as far as the tangent can tell."""
        return bool(self._try(t)[1].off <= within)

    def _try(self, t: float) -> tuple[Tensor, Followed]:
        if t not in self._seen:
            if len(self._seen) > 2:  # an accepted trial is one of the last three
                del self._seen[next(iter(self._seen))]
            free = self.x + t * self.d
            xt = self._oracle.project(free)
            cut = self._projects and not torch.equal(xt, free)
            if cut and 8 * xt.abs().max() < free.abs().max():
                xt = self._oracle.project(xt)  # what rounding has left of it, from far away
            self._seen[t] = xt, self._respond(t, xt, cut)
        return self._seen[t]

    def _respond(self, t: float, xt: Tensor, cut: bool) -> Followed:
        if self._follow is not None and t > 0:
            if cut:  # the tangent along the arc that the projection leaves of the line
                return self._h.respond(xt - self.x, self._first, self._margin).follow(1.0, xt)
            return self._follow(t, xt)
        y = self.y
        if self.response == "refine":
            y = y - self._inner_size * self._oracle.inner_gradient(xt, y, self._inner)[1]
        return Followed(y, True, y)

    def phi(self, t: float) -> Tensor:
        xt, followed = self._try(t)
        if not bool(followed.trusted):
            return torch.full_like(self._h.value, math.inf)
        value = self._bent[t] = self._oracle.value("outer", xt, followed.bent, self._outer)
        if self._first or followed.bent is followed.y:
            return value
        if not bool(value <= ceiling(self._h.value) + self._rise):
            return torch.full_like(value, math.inf)
        return self._oracle.value("outer", xt, followed.y, self._outer)

    def gain(self, t: float | Tensor) -> Tensor | float:
        """Of f at an accepted trial, where y bends with y*: along the tangent f may fall for ever;
        0 where nothing was tried."""
        if isinstance(t, Tensor) or t not in self._bent:
            return 0.0
        return self._h.value - self._bent[t]

    def _predicted(self, t: float) -> float:
        """<h, x(t) - x>: what the projection cuts off cannot be gained."""
        return float(torch.dot(self._h.grad, self.reach(t)[0] - self.x))
