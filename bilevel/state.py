"""What goes from one outer iteration to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bilevel.average import Average
from bilevel.layout import Layout, Variable
from bilevel.lengths import Lengths
from bilevel.linear import Learned
from bilevel.noise import Agreement, Noise
from bilevel.problem import Cost
from bilevel.rules import Moments


@dataclass(frozen=True)
class State:
    """All that changes from one outer iteration to the next; never modified in place.

    ``x`` and ``y`` are the answer so far, in the variables as the user gave them: new tensors, or
    the Module with the values written in. ``vectors`` is the iterate that the next step starts
    from; the answer is that, or the average of the iterates where fresh batches find it better.
    """

    layouts: tuple[Layout, Layout] = field(repr=False)
    vectors: tuple[Tensor, Tensor] = field(repr=False)
    k: int = 0
    outer_last: float | None = None  # what the step-size rules carry over
    inner_last: float | None = None
    lengths: Lengths = Lengths()
    moments: Moments = Moments()
    q: Tensor | None = field(default=None, repr=False)
    average: Average | None = field(default=None, repr=False)
    solver: Any = field(default=None, repr=False)  # the user's inner solver
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    failures: int = 0  # outer searches that failed, one after the other
    noise: Noise = Noise()  # of the Hessian, where the batches that it averages are 'auto'
    agreement: Agreement = Agreement()  # of outer batches, where their number is 'auto'
    learned: Learned = Learned()  # of the linear systems

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
