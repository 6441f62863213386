"""What a run reports: one record per outer iteration, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from bilevel.layout import Variable


@dataclass(frozen=True)
class Record:
    """One outer iteration. Also a mapping: ``record['k']``, ``dict(record)``.

    Attributes:
        k: number of the iteration, from 0.
        outer_loss, inner_loss: f and g on the batches at hand after the inner steps, before the
            outer step; with ``Unrolled``, g before the last inner step.
        hypergrad_norm: Euclidean norm of the hypergradient.
        outer_step, inner_step: alpha, and the beta of the last inner step.
        outer_trials, inner_trials: evaluations by the line searches of this iteration; the inner
            ones are summed over the inner steps.
        inner_failures: inner searches without an acceptable step.
        residual: relative residual of the linear system; None where there is none.
        lag: by how much f is higher at y than at y*(x), to first order: <q, g_y>, with q the
            solution of that system, on the batches of the hypergradient and on others where there
            are some; None where y has no y* to be behind of.
        hessian_batches: how many inner batches the second derivatives are of; 1 where there are
            no batches, or steps are unrolled.
        outer_batches: how many outer batches the outer loss is the mean of.
        gradients, hessian_products, loss_evaluations, seconds: cost of the whole run so far.
            Gradients and loss evaluations together count the calls of the two losses.
        failure: None, or what went wrong in words.
    """

    k: int
    outer_loss: float
    inner_loss: float
    hypergrad_norm: float
    outer_step: float
    inner_step: float
    outer_trials: int
    inner_trials: int
    inner_failures: int
    residual: float | None
    lag: float | None
    hessian_batches: int
    outer_batches: int
    gradients: int
    hessian_products: int
    loss_evaluations: int
    seconds: float
    failure: str | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(f"{name!r} is not in a record, which has {', '.join(self.keys())}")
        return getattr(self, name)

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    @classmethod
    def several(cls, **columns: Iterable[Any]) -> list[Record]:
        """One of each row of columns of all fields: in half of the time of as many calls, which
        counts where an iteration takes 20 microseconds.

        Raises:
            TypeError: a field is missing, or there is none of a name.   ValueError: columns are
                of different lengths.
        """
        names, records = list(columns), []
        if set(names) != {f.name for f in fields(cls)}:
            raise TypeError(f"columns of all fields are needed, got {', '.join(names)}")
        for values in zip(*columns.values(), strict=True):
            record = cls.__new__(cls)
            record.__dict__.update(zip(names, values, strict=True))  # frozen once it is made
            records.append(record)
        return records

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """The outcome of :func:`bilevel.solve`.

    Attributes:
        x, y: the solution, in the structure that was given; a Module is the one that was given.
            Under noisy batches the average of the last iterates, where fresh batches find it
            better; the last iterate is in ``state.vectors``.
        reason: why the run ended, in words.
        history: one :class:`Record` per outer iteration.
        state: to go on from, at the step level.
    """

    x: Variable
    y: Variable
    reason: str
    history: list[Record]
    state: Any
