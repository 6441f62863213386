"""The batches of an outer step: those that the hypergradient is of, and those that judge it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

from bilevel.noise import averaged
from bilevel.problem import Draw, Joint, Oracle

# outer, inner, for the Hessian, more outer ones: what :meth:`bilevel.method.Method.step` takes
Batches = tuple[Any, Sequence[Any], "Sequence[Any] | None", "Sequence[Any] | None"]
Wanted = tuple[tuple[int, int], tuple[int, int]]  # see :meth:`bilevel.method.Method.wanted`


class Drawn(NamedTuple):
    """The draws of an outer step.

    Attributes:
        outer, hessian: of the hypergradient.   fresh, others: none of it, to judge these.
        many: outer draws.   alone: whether f is the same in all that there are.
        batched: whether g has batches, or draws.   noisy: whether there are any of f or g.
    """

    outer: Draw
    hessian: Sequence[Draw]
    fresh: Sequence[Draw]
    others: Sequence[Draw]
    many: int
    alone: bool
    batched: bool
    noisy: bool


def drawn(
    oracle: Oracle,
    wanted: Wanted,
    draws: Sequence[Draw],
    outer_batches: Sequence[Any],
    hessian_batches: Sequence[Any] | None,
    alone: bool,
) -> Drawn:
    """As many of the batches as are wanted, or as there are.

    Args:
        draws: of the inner steps.   outer_batches: at least one, or None.
        hessian_batches: None: those of the inner steps again, from the last one on.
        alone: whether the first outer batch is the only one that there is.
    """
    (m, judges), (count, more) = wanted
    outers = [Draw(batch) for batch in outer_batches]
    given = draws[::-1] if hessian_batches is None else [Draw(b) for b in hessian_batches]
    # of a loss that draws random numbers, draws are what elsewhere batches are
    random = oracle.problem.habit.random
    if alone and "outer" in random:
        alone, outers = False, [Draw(outer_batches[0]) for _ in range(m + judges)]
    if "inner" in random:
        given = [Draw(draw.batch) for draw in islice(cycle(given), count + more)]
    hessian = oracle.distinct(given)
    m = averaged(m, judges, len(outers))
    return Drawn(
        # a batch that comes twice counts twice, as m says
        outer=Joint(outers[:m]) if m > 1 else outers[0],
        hessian=hessian[:count],
        fresh=outers[m : m + judges],
        others=hessian[count : count + more],
        many=m,
        alone=alone,
        batched=draws[0].batch is not None or "inner" in random,
        noisy=bool(random) or any(draw.batch is not None for draw in (*outers, *draws)),
    )
