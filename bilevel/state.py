"""What goes from one outer iteration to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.average import Average
from bilevel.layout import Layout, Variable
from bilevel.lengths import Lengths
from bilevel.linear import Learned
from bilevel.noise import Agreement, Noise
from bilevel.problem import Cost
from bilevel.rules import Moments
from bilevel.secants import Secants

MEMORY = 0.9  # weight of the mean of inner losses, where a new one counts for 1


class Training(NamedTuple):
    """Of a y that is trained as networks are, see :func:`bilevel.inner.trains`.

    Attributes:
        moments: of the direction, shape of y.   last: what its step-size rule carries over.
        level: mean of the inner losses of late, C of Zhang & Hager 2004.   weight: their Q.
    """

    moments: Moments = Moments()
    last: float | None = None
    level: float = 0.0
    weight: float = 0.0

    def saw(self, value: float) -> Training:
        weight = MEMORY * self.weight + 1
        return self._replace(level=self.level + (value - self.level) / weight, weight=weight)


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
        lengths: of the steps of late.   moments: of the direction, shape of x.
        q: the solution of the last linear system, shape of y; None where there is none.
        average: of the iterates; None where batches leave no noise.
        solver: that of the user, as :mod:`bilevel.inner_solver` keeps it.
        cost, seconds: of the run so far.
        failures: outer searches that failed, one after the other.
        noise: of the Hessian, where the number of batches that it averages is 'auto'.
        agreement: of outer batches, where their number is 'auto'.
        learned: from the linear systems.
        secants: of the hypergradients, where nothing has noise.
        kinks: over which widths those of g are rounded off; None: not known yet.
    """

    layouts: tuple[Layout, Layout] = field(repr=False)
    vectors: tuple[Tensor, Tensor] = field(repr=False)
    k: int = 0
    outer_last: float | None = None
    inner_last: float | None = None
    lengths: Lengths = Lengths()
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
    secants: Secants = field(default=Secants(), repr=False)
    kinks: tuple[float, ...] | None = None

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
