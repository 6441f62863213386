"""How many inner batches the second derivatives are averaged over: as their noise asks for."""

from __future__ import annotations

import math
from typing import NamedTuple

ALLOWED = 0.06  # excess of curvature
MOST = 8  # batches
MEMORY = 16  # iterations that the mean looks back
BOUND = 2 * ALLOWED * MOST  # of s, so that no batch counts for more than a run of others


class Noise(NamedTuple):
    """By how much the curvature along q is underrated by the batches that q was solved with.

    q = H^-1 f_y, with the Hessian H of m batches, goes far where these happen to be flat. On an
    independent batch, with the Hessian H', there is more curvature, by a part that falls like 1/m:

        <q, H' q> / <q, H q> - 1  =  s / m  on average.

    It is measured in every iteration on a batch that nothing else has seen, and m = 1, 2, 4 or 8
    brings it near ``ALLOWED``. m changes after iterations 0, 1, 3, 7, 15, ... only, since those
    between can be taken in one call of a compiled graph.

    Attributes:
        batches: m.   level: mean of s.   terms: iterations in it.
    """

    batches: int = 1
    level: float = 0.0
    terms: int = 0

    def add(self, excess: float, batches: int) -> Noise:
        """With <q, H' q> / <q, H q> - 1 of a q of so many batches; NaN where it is not known."""
        if math.isnan(excess):
            return self
        s = min(max(batches * excess, -BOUND), BOUND)
        weight = 1 / min(self.terms + 1, MEMORY)
        return self._replace(level=self.level + weight * (s - self.level), terms=self.terms + 1)

    def settle(self, k: int) -> Noise:
        """For the iteration after the k-th."""
        if not settles(k) or not self.terms:
            return self
        wanted = min(max(self.level / ALLOWED, 1), MOST)
        return self._replace(batches=2 ** round(math.log2(wanted)))


def settles(k: int) -> bool:
    return (k + 1) & k == 0
