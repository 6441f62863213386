"""How long steps are that searches find. Where they shrink away: leaps over kinks of f, and longer
memory of a direction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from bilevel.alike import where
from bilevel.rules import Line, Move

SHRUNK = 32  # times shorter than the longest step: hardly ever without a kink
BUDGET_KEPT = 0.95  # of what was gained, from one iteration to the next
AFTER_LOSS, AFTER_REFUSAL = 0.95, 0.5  # shares of its length that a leap keeps
EXACT = 8  # hypergradients of F itself in a row, after which long memory is of no harm
LONG = 0.9  # memory then
STRAIGHT = 0.1  # share by which g may be off where a leap leads: f is judged along y's tangent
FARTHER = 2  # times as far as the last search, or it is no leap


class Lengths(NamedTuple):
    """How long the steps are that searches find, lately and at most.

    Short of a kink of f (an absolute value, a hinge, a maximum) a step gains no longer than to
    the kink, and the next one starts nearer to it: steps shrink without end, far from any
    minimum. In units of the gradient, alpha ||d|| / ||h||, a step is one over a curvature where f
    is smooth, and keeps its order of magnitude.

    Where they have shrunk by ``SHRUNK``, the longest of them is tried before a search, though no
    farther than a search has led, and taken where f does not rise by more than the steps of late
    have gained, as far as other batches see that as well. It gets shorter where it loses or is
    refused, and searches go on alone once it is no longer far from theirs. What it leads across a
    kink to is a hypergradient of the other side. First searches do not count, which range over
    decades from where F may be flat; gains are those where y bends with y*, since along a tangent
    f may fall for ever.

    Without a kink steps shrink as well, where noise or a curved valley asks for it. The mean of the
    gradients then is of more of them, as it is where the valley is that of F: see :meth:`memory`.

    Attributes:
        latest: of the steps that searches found, in those units; a running mean, of which each new
            step counts half.
        longest: the largest of these.   farthest: alpha ||d|| at most.
        budget: sum of what steps gained, less ``1 - BUDGET_KEPT`` in each iteration; not below 0.

    Numbers, or tensors in a graph. Reference: Zhang & Hager 2004 for a search that is not monotone.
    """

    longest: Any = 0.0
    latest: Any = 0.0
    budget: Any = 0.0
    farthest: Any = 0.0

    @property
    def shrunk(self) -> Any:
        return SHRUNK * self.latest < self.longest

    @property
    def share(self) -> Any:
        """Length of the late ones over that of the longest, between 1 / ``SHRUNK`` and 1."""
        least = self.longest / SHRUNK
        late = where(self.latest > least, self.latest, least)
        return where(late > 0, late / (self.longest + (late <= 0)), 1.0)

    def memory(self, exact: int) -> Any:
        """beta1 of a direction: 1 - share^(1/4) / 2, a half, and up to 0.79 as steps shrink to a
        32nd; ``LONG`` where that many hypergradients in a row were ``exact``, see
        :class:`bilevel.linear.Learned`. Along others momentum goes on where F has long risen."""
        return LONG if exact >= EXACT else 1 - self.share**0.25 / 2

    def allowed(self, kappa: Any) -> Any:
        """By how much f may rise; ``kappa``: see :class:`bilevel.noise.Agreement`."""
        return self.shrunk * self.budget * kappa

    def leap(self, d: Any, h: Any, last: Any, kappa: Any) -> Any:
        """The alpha to be tried first, 0 for none, from the lengths of d and h and the alpha of the
        last search; none where nothing is known of other batches (``kappa`` is 0)."""
        far = self.longest * h
        alpha = self.shrunk * (kappa > 0) * where(far < self.farthest, far, self.farthest)
        alpha = alpha / (d + (d <= 0))  # lengths may be lost in rounding
        # steps that grow, as on the way from a saddle, are not to be held back by a leap
        return where(alpha > FARTHER * last, alpha, 0 * alpha)

    def leapt(self, gain: Any) -> Lengths:
        """After a leap that was taken."""
        shorter = where(gain <= 0, self.longest * AFTER_LOSS, self.longest)
        return self._replace(longest=shorter)._earn(gain)

    def refused(self) -> Lengths:
        """After one that was not."""
        return self._replace(longest=self.longest * AFTER_REFUSAL)

    def passed(self) -> Lengths:
        """After a step of another kind, which says nothing of lengths."""
        return self._earn(0 * self.budget)

    def found(self, far: Any, h: Any, gain: Any) -> Lengths:
        """After a search, which found an alpha ||d|| of ``far``; ``h``: the length of it."""
        step = far / (h + (h <= 0))  # never by 0
        # the mean, as a batch of a small gradient has long ones
        latest = where(self.latest > 0, (self.latest + step) / 2, step)
        longest = where(latest > self.longest, latest, self.longest)
        farthest = where(far > self.farthest, far, self.farthest)
        return self._replace(longest=longest, latest=latest, farthest=farthest)._earn(gain)

    def after(self, tried: Any, leapt: Any, moved: Any, norm: Any, gain: Any) -> Lengths:
        """After an iteration.

        Args:
            tried: whether a leap was.   leapt: whether it was taken.
            moved: length of the step.   norm: of the hypergradient.   gain: of the step.
        """
        searched = self.refused().where(tried, self)
        found = searched.found(moved, norm, gain).where((moved > 0) & (norm > 0), searched)
        return self.leapt(gain).where(leapt, found)

    def _earn(self, gain: Any) -> Lengths:
        budget = BUDGET_KEPT * (self.budget + gain)
        return self._replace(budget=where(budget > 0, budget, 0 * budget))

    def where(self, condition: Any, others: Lengths) -> Lengths:
        """These, or the others."""
        return Lengths(*(where(condition, a, b) for a, b in zip(self, others, strict=True)))


def leap(line: Line, t: float, rise: float, last: float | None) -> Move | None:
    """The move to t, if f rises there by ``rise`` at most."""
    if line.change(t) > 0:  # a projection turns it back
        return None
    gain = float(line.value) - float(line.phi(t))
    return Move(t, last, 1, gain=gain) if math.isfinite(gain) and gain >= -rise else None
