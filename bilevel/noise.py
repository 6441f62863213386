"""How many batches a hypergradient is averaged over: as their noise asks for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from bilevel.alike import clamp, is_finite, power_of_two, where

ALLOWED = 0.06  # excess of curvature
LEAST_KAPPA = 0.8  # kappa that outer batches are averaged for
MOST = 8  # batches
LOOKS_BACK = 16  # iterations that the mean looks back
BOUND = 2 * ALLOWED * MOST  # of a negative s: no batch counts for more than a run of others
SKEWED = 4  # times as far may a positive one go: patchy curvature shows in a few large values


class Noise(NamedTuple):
    """Of inner batches: by how much those that q was solved with underrate the curvature along it.

    q = H^-1 f_y, with the Hessian H of m batches, goes far where these happen to be flat. On an
    independent batch, with the Hessian H', there is more curvature, by a part that falls like 1/m:

        <q, H' q> / <q, H q> - 1  =  s / m  on average.

    It is measured in every iteration on a batch that nothing else has seen, and m = 1, 2, 4 or 8
    brings it near ``ALLOWED``. m changes after iterations 0, 1, 3, 7, 15, ... only, since those
    between can be taken in one call of a compiled graph.

    Attributes:
        batches: m.   level: mean of s.   terms: iterations in it.

    Numbers, or tensors in a graph but for m, which changes between its calls.
    """

    batches: int = 1
    level: Any = 0.0
    terms: Any = 0

    def add(self, excess: Any, batches: Any) -> Noise:
        """With <q, H' q> / <q, H q> - 1 of a q of so many batches; NaN where it is not known."""
        known = excess == excess
        s = clamp(batches * excess, -BOUND, SKEWED * BOUND)
        level = self.level + _weight(self.terms) * (s - self.level)
        return self._replace(level=where(known, level, self.level), terms=self.terms + known)

    def settle(self, k: int) -> Noise:
        """For the iteration after the k-th."""
        if not settles(k) or not self.terms:
            return self
        return self._replace(batches=_power(self.level / ALLOWED))


class Agreement(NamedTuple):
    """Of the outer batches: how much of what a step gains on its own a fresh one sees as well.

    The slope of f along the step (dx, dy) on the m batches that it was computed from has a part
    that is their noise, which falls like 1/m; on an independent batch that part is zero on average:

        own = S + N / m,    fresh = S,    kappa = S / (S + N / m),

    each <f_x, dx> + <f_y, dy> per unit of the step, the signs turned. It is measured in every
    iteration on a batch that nothing else has seen; m = 1, 2, 4 or 8 brings kappa near
    ``LEAST_KAPPA``, and changes when that of :class:`Noise` does. A search asks for less where
    kappa is large: see :class:`bilevel.rules.Armijo`.

    Attributes:
        batches: m.   signal, noise: means of S and N.   terms: iterations in them.

    Numbers, or tensors in a graph but for m, which changes between its calls.
    """

    batches: int = 1
    signal: Any = 0.0
    noise: Any = 0.0
    terms: Any = 0

    def kappa(self, batches: Any) -> Any:
        """For so many batches, in [0, 1]; 0 where nothing is known."""
        signal, noise = clamp(self.signal, 0.0), clamp(self.noise, 0.0) / batches
        return signal / (signal + noise + (signal <= 0))  # never 0 / 0

    def add(self, own: Any, fresh: Any, batches: Any) -> Agreement:
        """With the slopes of a step of so many batches; nothing where it does not descend."""
        known = (own < 0) & is_finite(own) & is_finite(fresh)
        weight = _weight(self.terms)
        signal = self.signal + weight * (-fresh - self.signal)
        noise = self.noise + weight * (batches * (fresh - own) - self.noise)
        return self._replace(
            signal=where(known, signal, self.signal),
            noise=where(known, noise, self.noise),
            terms=self.terms + known,
        )

    def settle(self, k: int) -> Agreement:
        """For the iteration after the k-th."""
        if not settles(k) or not self.terms:
            return self
        level = self.noise / self.signal if self.signal > 0 else math.inf
        return self._replace(batches=_power(level * LEAST_KAPPA / (1 - LEAST_KAPPA)))


def _weight(terms: Any) -> Any:
    """Of one more in the mean of so many, which looks back as far as ``LOOKS_BACK``."""
    return 1 / clamp(terms + 1, most=LOOKS_BACK)


def _power(wanted: float) -> int:
    return int(power_of_two(clamp(wanted, 1, MOST)))


def averaged(batches: int, judges: int, given: int) -> int:
    """Of how many the mean is where so many are given, of which the last are to judge it."""
    return min(batches, max(1, given - judges))


def settles(k: int) -> bool:
    return (k + 1) & k == 0
