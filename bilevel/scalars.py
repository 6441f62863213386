"""The numbers of a state, which a graph takes and gives as one vector of float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.alike import where
from bilevel.lengths import Lengths
from bilevel.linear import Learned
from bilevel.noise import Agreement, Noise
from bilevel.state import State


class Scalars(NamedTuple):
    """What goes from one iteration to the next beside the vectors: numbers, or tensors in a graph.

    Attributes:
        k, failures: of :class:`State`.   outer_last, inner_last: likewise, NaN for None.
        n, w: of :class:`Moments`.   terms, gain: of :class:`Average`.
        excess, excesses: of :class:`Noise`, the mean and its terms.
        signal, spread, slopes: of :class:`Agreement`, the two means and their terms.
        concave, halvings: of :class:`Learned`, of which the rest is 0 where a graph is used.
        longest, latest, budget, farthest: those of :class:`Lengths`.
    """

    k: Any
    failures: Any
    outer_last: Any
    inner_last: Any
    n: Any
    w: Any
    terms: Any
    gain: Any
    excess: Any
    excesses: Any
    signal: Any
    spread: Any
    slopes: Any
    concave: Any
    halvings: Any
    longest: Any
    latest: Any
    budget: Any
    farthest: Any

    @classmethod
    def of(cls, state: State) -> Scalars:
        outer_last, inner_last = (
            math.nan if last is None else last for last in (state.outer_last, state.inner_last)
        )
        terms, gain = (state.average.terms, state.average.gain) if state.average else (0, 0.0)
        return cls(
            k=state.k,
            failures=state.failures,
            outer_last=outer_last,
            inner_last=inner_last,
            n=state.moments.n,
            w=state.moments.w,
            terms=terms,
            gain=gain,
            excess=state.noise.level,
            excesses=state.noise.terms,
            signal=state.agreement.signal,
            spread=state.agreement.noise,
            slopes=state.agreement.terms,
            concave=state.learned.concave,
            halvings=state.learned.halvings,
            **state.lengths._asdict(),
        )

    def into(self, state: State) -> State:
        """The state with these numbers, Python's, in place of its own."""
        outer_last, inner_last = (
            None if math.isnan(last) else last for last in (self.outer_last, self.inner_last)
        )
        average = state.average
        return replace(
            state,
            k=int(self.k),
            failures=int(self.failures),
            outer_last=outer_last,
            inner_last=inner_last,
            moments=state.moments._replace(n=int(self.n), w=self.w),
            average=average and average._replace(terms=int(self.terms), gain=self.gain),
            noise=self.noise._replace(batches=state.noise.batches, terms=int(self.excesses)),
            agreement=self.agreement._replace(
                batches=state.agreement.batches, terms=int(self.slopes)
            ),
            learned=Learned(self.concave, int(self.halvings)),
            lengths=self.lengths,
        )

    # of 1 batch: how many there are is said beside these

    @property
    def noise(self) -> Noise:
        return Noise(1, self.excess, self.excesses)

    @property
    def agreement(self) -> Agreement:
        return Agreement(1, self.signal, self.spread, self.slopes)

    @property
    def learned(self) -> Learned:
        return Learned(self.concave, self.halvings)

    @property
    def lengths(self) -> Lengths:
        return Lengths(*(getattr(self, name) for name in Lengths._fields))

    def where(self, condition: Tensor, others: Scalars) -> Scalars:
        """These, or the others, in a graph."""
        return Scalars(*(where(condition, a, b) for a, b in zip(self, others, strict=True)))
