"""How hypergradients change along the steps of late, and the direction that follows: L-BFGS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAIRS = 10  # steps that are remembered at most
ROOM = 2**22  # numbers of these, and as many of the changes along them
DOUBT = 0.5  # what is supposed of ``off`` before anything is known
TRUSTED = 0.07  # ``off`` up to which the pairs are those of a smooth F
KEPT = 0.8  # weight of the mean of ``off``, where a new one counts for the rest
COLLAPSED = 16.0  # times as far as the last step F would have been least, by its slopes
LONGER = 32.0  # times as far as the last step is the first trial of a search then, at most
BENDS = 1e-3  # least cosine of a step with the change along it; F is to be convex there


class Secants(NamedTuple):
    """Pairs (s, z) of a step and the change of the hypergradient along it, where neither f nor g
    has noise.

    Along a step the mean of the slopes at its two ends is the change of F, if F is quadratic there
    and h is its gradient; at a kink, or with an h that is not that of F, it is not. As a share of
    the change of the slope the difference tells how far the pairs are to be trusted. Where they
    are, d = -H h with Hz = s, the inverse of their curvature, crosses curved valleys that a
    direction of the first order creeps along.

    Attributes:
        x, h, f: of the iteration before; None, None, 0 where there is none.
        steps, changes: one pair to a row, the newest first, shape (pairs, n); None: no pair yet.
        longer: times as far as the last step the next is to try, since the slopes at its ends say
            that F is least there: ``COLLAPSED`` to ``LONGER``; 1 otherwise, or where it was a
            ``newton`` one.
        newton: whether the step from x is.
        off: mean of |f(x+) - f(x) - (a + b) / 2| / |b - a|, a = <h, s> and b = <h+, s>, each 1 at
            most; the late ones count most.

    Reference: Liu & Nocedal 1989.
    """

    x: Tensor | None = None
    h: Tensor | None = None
    f: float = 0.0
    steps: Tensor | None = None
    changes: Tensor | None = None
    longer: float = 1.0
    newton: bool = False
    off: float = DOUBT

    def add(self, x: Tensor, h: Tensor, value: Tensor) -> Secants:
        """With the step to x, where f is ``value`` and h the hypergradient."""
        here = self._replace(x=x, h=h, f=float(value), longer=1.0, newton=False)
        if self.x is None or self.h is None:
            return here
        s, z = x - self.x, h - self.h
        norms = torch.linalg.vector_norm(s) * torch.linalg.vector_norm(z)
        a, b, norm = torch.stack([torch.dot(self.h, s), torch.dot(h, s), norms]).tolist()
        if a != b:
            off = min(abs(here.f - self.f - (a + b) / 2) / abs(b - a), 1.0)
            longer = min(a / (a - b), LONGER) if a < b else LONGER
            longer = longer if longer >= COLLAPSED and not self.newton else 1.0
            here = here._replace(off=KEPT * self.off + (1 - KEPT) * off, longer=longer)
        if not b - a > BENDS * norm:
            return here
        most = min(PAIRS, ROOM // len(x))
        return here._replace(
            steps=_first(most, s, self.steps), changes=_first(most, z, self.changes)
        )

    @property
    def trusted(self) -> bool:
        return self.steps is not None and len(self.steps) > 0 and self.off <= TRUSTED

    def along(self, h: Tensor, A: Tensor | float = 1.0) -> Tensor:
        """-H h by the two loops of L-BFGS, from H = t A^-1 with a diagonal A and the t that the
        newest pair has; steps along it have a length of about one."""
        assert self.steps is not None and self.changes is not None
        pairs = list(zip(self.steps, self.changes, strict=True))
        d, weights = -h, []
        for s, z in pairs:
            weights.append(torch.dot(s, d) / torch.dot(s, z))
            d = d - weights[-1] * z
        s, z = pairs[0]
        d = torch.dot(s, z) / torch.dot(z, z / A) * (d / A)
        for s, z in reversed(pairs):
            d = d + (weights.pop() - torch.dot(z, d) / torch.dot(s, z)) * s
        return d


def _first(most: int, row: Tensor, rows: Tensor | None) -> Tensor:
    """``row``, and of the others as many as there is room for."""
    below = row.new_zeros(0, len(row)) if rows is None else rows
    return torch.cat([row[None], below])[:most]
