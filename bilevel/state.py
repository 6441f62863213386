"""What goes from one outer iteration to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.alike import clamp
from bilevel.average import Average
from bilevel.layout import Layout, Variable
from bilevel.lengths import Lengths
from bilevel.linear import Learned
from bilevel.noise import Agreement, Noise
from bilevel.problem import Cost
from bilevel.rules import Moments

MEMORY = 0.9  # of inner losses, see :class:`Level`; OUTER: of outer ones
OUTER = 0.8


class Level(NamedTuple):
    """How high losses were of late: C of Zhang & Hager 2004, a mean in which each counts ``memory``
    times as much as the one after it, and Q, the sum of the weights. A search that may end there
    goes farther along a valley than one that has to descend. Numbers, or tensors in a graph."""

    mean: Any = 0.0
    weight: Any = 0.0

    def saw(self, loss: Any, memory: float) -> Level:
        weight = memory * self.weight + 1
        return Level(self.mean + (loss - self.mean) / weight, weight)

    def above(self, loss: Any) -> Any:
        """By how much, if it is."""
        return clamp(self.mean - loss, 0.0)


class Training(NamedTuple):
    """Of a y that is trained as networks are, see :func:`bilevel.inner.trains`.

    Attributes:
        moments: of the direction, shape of y.   last: what its step-size rule carries over.
        level: of inner losses.
    """

    moments: Moments = Moments()
    last: float | None = None
    level: Level = Level()


@dataclass(frozen=True)
class State:
    """All that changes from one outer iteration to the next; never modified in place.

    ``x`` and ``y`` are the answer so far, in the variables as the user gave them: new tensors, or
    the Module with the values written in. The answer is ``vectors``, or the average of the iterates
    where fresh batches find it better.

    Attributes:
        layouts: of x and y, between the variables and flat vectors.
        vectors: the iterate that the next step starts from: x and y, flat, 1-dim.
        k: iterations so far.
        outer_last, inner_last: what the step-size rules carry over; None: nothing yet.
        training: of y, where it is trained as networks are.
        lengths: of the steps of late.   level: of outer losses, where hypergradients are exact.
        moments: of the direction, shape of x.
        q: the solution of the last linear system, shape of y; None where there is none.
        average: of the iterates; None where batches leave no noise.
        solver: that of the user, as :mod:`bilevel.inner_solver` keeps it.
        cost, seconds: of the run so far.
        failures: outer searches that failed, one after the other.
        noise: of the Hessian, where the number of batches that it averages is 'auto'.
        agreement: of outer batches, where their number is 'auto'.
        learned: from the linear systems.
    """

    layouts: tuple[Layout, Layout] = field(repr=False)
    vectors: tuple[Tensor, Tensor] = field(repr=False)
    k: int = 0
    outer_last: float | None = None
    inner_last: float | None = None
    lengths: Lengths = Lengths()
    level: Level = Level()
    moments: Moments = Moments()
    q: Tensor | None = field(default=None, repr=False)
    average: Average | None = field(default=None, repr=False)
    solver: Any = field(default=None, repr=False)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    failures: int = 0
    noise: Noise = Noise()
    agreement: Agreement = Agreement()
    learned: Learned = Learned()
    training: Training = field(default=Training(), repr=False)

    @property
    def x(self) -> Variable:
        return self.layouts[0].export(self.answer[0])

    @property
    def y(self) -> Variable:
        return self.layouts[1].export(self.answer[1])

    @property
    def answer(self) -> tuple[Tensor, Tensor]:
        average = self.average
        return (average.x, average.y) if average and average.ahead else self.vectors
