"""The average of the iterates: the answer where the noise of the batches outweighs progress."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bilevel.problem import Draw, Oracle

POWER = 16  # the t-th pair weighs t^16: about the last seventeenth of the run counts
JUDGED = 3  # likewise of the comparison: about the last quarter
LEAST_PAIRS = 10  # pairs before the average may be the answer


class Average(NamedTuple):
    """Polynomial-decay average of the pairs (x_t, y_t), beside the iterate on every fresh batch.

    A searched step fits the batch at hand and cannot shrink with the noise; the average of the
    iterates does. Nor can it be better where x still travels, or where y starts afresh: so both
    are judged, on batches that neither has seen, and the better one is the answer.

    Attributes:
        x, y: the averages.   terms: their number.
        gain: mean of f(x_t, y_t) - f(x, y), each on the batch of iteration t, weighted by t^3.

    Reference: Polyak & Juditsky 1992; Shamir & Zhang 2013 for the weights.
    """

    x: Tensor
    y: Tensor
    terms: int = 1
    gain: float = 0.0

    @property
    def ahead(self) -> bool:
        return self.terms >= LEAST_PAIRS and self.gain > 0

    def add(self, oracle: Oracle, x: Tensor, y: Tensor) -> Average:
        """With one pair more."""
        weight = (POWER + 1) / (self.terms + POWER + 1)
        mean_x = oracle.project(self.x.lerp(x, weight))
        return self._replace(x=mean_x, y=self.y.lerp(y, weight), terms=self.terms + 1)

    def compare(self, difference: float) -> Average:
        """After f(x_t, y_t) - f(x, y) was found on a fresh batch."""
        weight = (JUDGED + 1) / (self.terms + JUDGED)
        return self._replace(gain=self.gain + weight * (difference - self.gain))

    def value(self, oracle: Oracle, outer: Draw) -> Tensor:
        return oracle.value("outer", self.x, self.y, outer)
