"""One outer iteration in tensors alone, to be compiled whole, and a loop of several around it.

A small problem is bound by dispatch: what Python does between two operations costs more than they
do. So here the searches and the conjugate gradients are loops of the graph, and nothing looks at
the host. :mod:`bilevel.iteration` is the plain form of the same iteration, and its oracle: the two
agree to rounding, counters included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from bilevel.average import Average
from bilevel.host import slopes, unsound
from bilevel.hypergradients import Course, Estimate, Followed, Implicit
from bilevel.lag import is_behind, is_flattered
from bilevel.layout import rebuild
from bilevel.lengths import STRAIGHT, Lengths
from bilevel.linear import CONCAVE, Learned
from bilevel.method import Method
from bilevel.noise import Agreement, Noise
from bilevel.problem import Draw, Oracle
from bilevel.rules import Armijo, Moments
from bilevel.scalars import Scalars
from bilevel.traced import Counted, Run, Traced, move
from bilevel.trials import ceiling


class Row(NamedTuple):
    """What is reported of each iteration: tensors, or one row of float64 as numbers."""

    value: Any
    inner_value: Any
    norm: Any
    outer_step: Any
    inner_step: Any
    residual: Any
    lag: Any
    finite: Any  # whether all of these and the point are
    outer_trials: Any
    inner_trials: Any
    inner_failures: Any
    failed: Any
    gradients: Any
    hessian_products: Any
    loss_evaluations: Any
    concave: Any
    flattered: Any


@dataclass(frozen=True)
class Iterations:
    """The function to compile: as many outer iterations as there are batches.

    Args:
        skeletons: of one outer, inner and Hessian batch: a tree of None each, or None.
        counts: of inner and Hessian batches in one iteration.
        slots: iterations in one call at most.   steps: inner steps in each.
        moments, averaged: whether the state has them.
        joins: whether the outer and the Hessian batches are averaged, as many as the call says;
            watches: whether one more judges them.   alone: whether f has no other batch.
        matrix: whether g_yy is one, being small.
    """

    method: Method
    oracle: Oracle
    skeletons: tuple[Any, Any, Any]
    counts: tuple[int, int]
    slots: int
    steps: int
    moments: bool
    averaged: bool
    joins: tuple[bool, bool]
    watches: tuple[bool, bool]
    alone: bool
    matrix: bool

    def __call__(
        self,
        count: Tensor,
        joined: tuple[Tensor, Tensor],
        tol: Tensor,
        most_failures: Tensor,
        start: Tensor,
        stacks: list[list[Tensor]],
        places: Tensor,
        scalars: Tensor,
        vectors: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """(iterations taken, whether the run goes on, rows, scalars, *vectors)."""
        given = _Given(joined, start, stacks, places)

        def going(i: Tensor, go: Tensor, *rest: Tensor) -> Tensor:
            return go & (i < count)

        def once(
            i: Tensor, go: Tensor, rows: Tensor, scalars: Tensor, *vectors: Tensor
        ) -> tuple[Tensor, ...]:
            row, new, new_vectors = self._once(i, given, Scalars(*scalars.unbind()), vectors)
            go = row.finite & (new.failures < most_failures) & (row.failed | (row.norm > tol))
            cells = torch.stack([cell.double() for cell in row])
            rows = rows.index_copy(0, i[None], cells[None])
            # where g is concave, the systems are solved otherwise than here; where they are not
            # solved, or f is flattered, x may stay: not taken
            fits = (row.concave <= CONCAVE) & ~row.flattered
            if self.still:
                fits = fits & ~(row.residual > 1)
            state = zip((torch.stack(new), *new_vectors), (scalars, *vectors), strict=True)
            kept = (torch.where(fits, *both) for both in state)
            return i + fits, go & fits, rows, *kept

        rows = torch.zeros(self.slots, len(Row._fields), dtype=torch.float64)
        state = (torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool), rows)
        return while_loop(going, once, (*state, scalars.clone(), *(t.clone() for t in vectors)))

    @property
    def still(self) -> bool:
        return self.method.is_still(self.counts[0] > 0, self.watches[1])

    def _once(
        self, i: Tensor, given: _Given, old: Scalars, vectors: Sequence[Tensor]
    ) -> tuple[Row, Scalars, list[Tensor]]:
        """Iteration i of the call: its row, and the scalars and vectors after it."""
        x, before, q, *rest = vectors
        draws = self._draws(i, given)
        oracle = Traced(self.oracle, draws.hessian[0] if self.matrix else None)
        start = given.start if self.method.fresh else before
        inner = self._inner(oracle, draws, (x, start), old)
        here = x, inner.y

        # chunks lets Implicit alone pass, and Traced stands in for its oracle
        solver = Counted(self.method.hypergradient.solver, old.learned)  # type: ignore[attr-defined]
        implicit: Any = Implicit(solver)
        h = implicit.estimate(oracle, *here, draws.outer, draws.hessian, [], q)
        solver.counts.append(1)  # the cross term
        first, second = rest[:2] if self.moments else (None, None)
        # counts are tensors in a graph, as in Average below; the arithmetic on them is the same
        moments = Moments(first, second, old.n, old.w)
        beta1 = old.lengths.memory(0)
        d, moments = self.method.direction(h.grad, moments, beta1)

        step = self._outer(oracle, here, draws, h, self.method.heeded(d, h), old)
        if step.follows:
            solver.counts.append(1)  # g_yx d
        judged = self._judged(oracle, here, draws, h, step, old)
        looked = _looked(h, inner, step)
        nearer = self._nearer(oracle, draws, h, step, judged.there, looked.finite, solver)
        average = self._average(oracle, here, draws, h, old, rest[-2:]) if self.averaged else None
        taken = _Taken(inner, h, moments, step, judged, looked, nearer, average, solver)
        new = self._scalars(taken, old), self._vectors(taken, vectors)
        return self._row(taken, draws), *new

    def _draw(self, level: int, given: _Given, at: Tensor) -> Draw:
        """The outer, inner or Hessian batch at a place."""
        stacks = given.stacks[level]
        if not stacks:
            return Draw(None)
        row = given.places[level].index_select(0, at.reshape(1))
        picked = [stack.index_select(0, row).squeeze(0) for stack in stacks]
        return Draw(rebuild(self.skeletons[level], iter(picked)))

    def _draws(self, i: Tensor, given: _Given) -> _Draws:
        """Those of iteration i of the call."""
        m, many = (n if joins else 1 for n, joins in zip(given.joined, self.joins, strict=True))
        steps, fixed = max(1, self.counts[0]), max(1, self.counts[1])
        drawn = many + int(self.watches[1]) if self.joins[1] else fixed

        def outer(j: Tensor | int) -> Draw:
            return self._draw(0, given, i * (m + int(self.watches[0])) + j)

        def inner(t: Tensor | int) -> Draw:
            return self._draw(1, given, i * self.counts[0] + t % steps)

        def hessian(j: Tensor | int) -> Draw:
            return self._draw(2, given, i * drawn + j)

        return _Draws(
            outer=Run(outer, given.joined[0]) if self.joins[0] else outer(0),
            inner=inner,
            hessian=(
                [Run(hessian, given.joined[1])]
                if self.joins[1]
                else [hessian(j) for j in range(fixed)]
            ),
            fresh=outer(m) if self.watches[0] else None,
            other=hessian(many) if self.watches[1] else None,
            many=(m, many),
        )

    def _inner(
        self, oracle: Traced, draws: _Draws, point: tuple[Tensor, Tensor], old: Scalars
    ) -> _Inner:
        """The inner steps of an iteration."""
        x, y = point

        def step(t: Tensor, y: Tensor, tally: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            last, spoiled, _, trials, failures = tally.unbind()
            draw = draws.inner(t)
            value, gy = oracle.inner_gradient(x, y, draw)

            def phi(t: Tensor) -> tuple[Tensor, int]:
                return oracle.value("inner", x, y - t.to(y.dtype) * gy, draw), 1

            found = move(self.method.inner_rule, value, -torch.dot(gy, gy), phi, old.k, last)
            size, last, more, failed, *_ = found
            value = value.double() + unsound(spoiled)  # from the first on that is not finite
            tally = torch.stack([last, value, size, trials + more, failures + failed])
            return t + 1, y - size.to(y.dtype) * gy, tally

        nothing = torch.zeros((), dtype=torch.float64)
        tally = torch.stack([old.inner_last, *[nothing] * 4])
        carry = (torch.zeros((), dtype=torch.int64), y + 0, tally)
        if self.steps == 1:
            _, y, tally = step(*carry)
        else:
            _, y, tally = while_loop(lambda t, y, tally: t < self.steps, step, carry)
        return _Inner(y, *tally.unbind())

    def _outer(
        self,
        oracle: Traced,
        point: tuple[Tensor, Tensor],
        draws: _Draws,
        h: Estimate,
        d: Tensor,
        old: Scalars,
    ) -> _Outer:
        """The outer step along d."""
        (x, y), last, (m, many) = point, old.outer_last, draws.many
        first = last.isnan()
        # copies: two views of one tensor may not enter the loop of a search together
        lengths = Lengths(*(length.clone() for length in old.lengths))
        kappa = 1.0 if self.alone else old.agreement.kappa(m)
        rise = lengths.allowed(kappa)
        most = ceiling(h.value) + rise
        slope, apart, follow = self._course(h, d, first)
        length, norm = (torch.linalg.vector_norm(v).double() for v in (d, h.grad))
        leap = lengths.leap(length, norm, last, kappa) * self.method.leaps

        def reach(t: Tensor) -> tuple[Tensor, Followed]:
            t = t.to(x.dtype)
            xt = x + t * d
            return xt, follow(t, xt) if follow is not None else Followed(y, True, y)

        def phi(t: Tensor) -> tuple[Tensor, Tensor | int, Tensor]:
            xt, (yt, trusted, bent, off) = reach(t)
            value = oracle.value("outer", xt, yt, draws.outer)
            if follow is None:
                return value, m, value
            assert isinstance(trusted, Tensor)
            there = oracle.value("outer", xt, bent, draws.outer)
            twice = trusted & ~first & (there <= most)
            value = torch.where(trusted & first, there, torch.where(twice, value, torch.inf))
            value = torch.where((t == leap) & (off > STRAIGHT), torch.inf, value)
            return value, (trusted + 0 + twice) * m + many, there

        rule = self.method.outer_rule
        found = move(rule, h.value, slope, phi, old.k, last, kappa, True, (leap, rise))
        new_x, followed = reach(found.size)
        if self.method.leaps:
            tried = (leap > 0) & (slope < 0)
            after = lengths.after(tried, found.leapt, found.size * length, norm, found.gain)
            lengths = lengths.where(first, after)
        return _Outer(
            x=new_x,
            y=torch.where(found.size > 0, followed.y, y),
            size=found.size,
            last=found.last,
            trials=found.trials,
            failed=found.failed > 0,
            evaluations=found.evaluations,
            slope=slope,
            apart=apart,
            follows=follow is not None,
            lengths=lengths,
        )

    def _course(self, h: Estimate, d: Tensor, first: Tensor) -> Course | tuple[Tensor, float, None]:
        """The slope along d, how far two estimates of it are apart, and how y follows."""
        if not isinstance(self.method.outer_rule, Armijo):
            return torch.dot(h.grad, d), torch.nan, None
        if self.method.response == "frozen":
            return torch.dot(h.direct, d), torch.nan, None
        return h.respond(d, first)

    def _judged(
        self,
        oracle: Traced,
        here: tuple[Tensor, Tensor],
        draws: _Draws,
        h: Estimate,
        step: _Outer,
        old: Scalars,
    ) -> _Judged:
        """What batches say that nothing of the step is of."""
        noise, agreement, there = old.noise, old.agreement, h.lag
        if draws.other is not None:
            assert h.elsewhere is not None
            excess, there = h.elsewhere(draws.other)
            noise = noise.add(excess.double(), draws.many[1])
        if draws.fresh is not None and step.follows:
            _, fx, fy = oracle.outer_gradients(*here, draws.fresh)
            own, seen = slopes(h, (fx, fy), (step.x - here[0], step.y - here[1]))
            own, seen = own.double() / step.size, seen.double() / step.size
            agreement = agreement.add(own, seen, draws.many[0])
        return _Judged(noise, agreement, there)

    def _nearer(
        self,
        oracle: Traced,
        draws: _Draws,
        h: Estimate,
        step: _Outer,
        there: Tensor | None,
        finite: Tensor,
        solver: Counted,
    ) -> _Nearer:
        """y nearer to its solution, where it lags behind."""
        flattered = torch.zeros_like(finite)
        if not self.method.follows:
            return _Nearer(step.y, flattered, 0)
        assert h.lag is not None and there is not None
        lag = h.lag.double(), there.double(), step.size * step.slope.double().abs()
        if not self.still:
            flattered = is_flattered(*lag, h.residual)
        behind = is_behind(*lag) & finite & ~step.failed
        y, products, looks, concave = _corrected(
            oracle, behind, step.x, step.y, h, draws.inner(0), solver
        )
        solver.counts.append(products)
        solver.concave.append(concave)
        return _Nearer(y, flattered, looks)

    def _average(
        self,
        oracle: Traced,
        here: tuple[Tensor, Tensor],
        draws: _Draws,
        h: Estimate,
        old: Scalars,
        averages: Sequence[Tensor],
    ) -> Average:
        """The average of the iterates with one more; that alone, where f is not finite at it."""
        x, y = averages
        difference = (h.value - oracle.value("outer", x, y, draws.outer)).double()
        seen = difference.isfinite()
        average: Any = Average
        judged = average(x, y, old.terms, old.gain).compare(difference)
        added = average(x, y, old.terms.to(x.dtype)).add(oracle, *here)
        return average(
            *(torch.where(seen, *both) for both in zip(added[:2], here, strict=True)),
            terms=torch.where(seen, old.terms + 1, 1.0),
            gain=torch.where(seen, judged.gain, 0.0),
        )

    def _row(self, taken: _Taken, draws: _Draws) -> Row:
        """What is reported; evaluations are those that the oracle of a plain one counts."""
        inner, h, _, step, judged, looked, nearer, _, solver = taken
        (m, many), nothing = draws.many, torch.zeros_like(step.size)
        told = draws.fresh is not None and step.follows
        other = int(draws.other is not None)
        gradients = nothing + self.steps + m + many + told + other
        looks = inner.trials + (step.evaluations + nearer.evaluations)
        return Row(
            value=h.value,
            inner_value=looked.inner_value,
            norm=looked.norm,
            outer_step=step.size,
            inner_step=inner.size,
            residual=h.residual,
            lag=(h.lag + judged.there) / 2,
            finite=looked.finite,
            outer_trials=step.trials,
            inner_trials=inner.trials,
            inner_failures=inner.failures,
            failed=step.failed,
            gradients=gradients + step.follows * many * step.trials,
            hessian_products=many * sum(solver.counts, nothing) + other,
            loss_evaluations=looks + m * int(self.averaged),
            concave=solver.concave[-1],
            flattered=nearer.flattered,
        )

    def _scalars(self, taken: _Taken, old: Scalars) -> Scalars:
        """After it; where numbers are not finite, those before."""
        step, (noise, agreement, _), average = taken.step, taken.judged, taken.average
        halvings = old.learned.judge(step.apart).halvings if self.still else old.halvings
        new = old._replace(
            outer_last=step.last,
            inner_last=taken.inner.last,
            n=taken.moments.n,
            w=taken.moments.w,
            terms=average.terms if average else old.terms,
            gain=average.gain if average else old.gain,
            excess=noise.level,
            excesses=noise.terms,
            signal=agreement.signal,
            spread=agreement.noise,
            slopes=agreement.terms,
            concave=taken.solver.concave[-1].double(),
            halvings=halvings,
            **step.lengths._asdict(),
        ).where(taken.looked.finite, old)
        failed = taken.looked.finite & step.failed
        return new._replace(k=old.k + 1, failures=torch.where(failed, old.failures + 1, 0.0))

    def _vectors(self, taken: _Taken, old: Sequence[Tensor]) -> list[Tensor]:
        """After it; where numbers are not finite, those before."""
        failed, x = taken.step.failed, old[0]
        new = [
            torch.where(failed, x, taken.step.x),
            torch.where(failed, taken.inner.y, taken.nearer.y),
            taken.h.q,
            *(taken.moments[:2] if self.moments else ()),
            *(taken.average[:2] if taken.average else ()),
        ]
        return [torch.where(taken.looked.finite, *both) for both in zip(new, old, strict=True)]


class _Given(NamedTuple):
    """What a call is given beside the state: how many batches are joined, where y starts afresh,
    the different batches of each level, and which of them each iteration takes."""

    joined: tuple[Tensor, Tensor]
    start: Tensor
    stacks: list[list[Tensor]]
    places: Tensor


class _Draws(NamedTuple):
    """The batches of one iteration; ``inner``: of an inner step; ``fresh`` and ``other``: of f and
    of g, to judge the others; ``many``: outer and Hessian ones in one evaluation."""

    outer: Draw
    inner: Callable[[Any], Draw]
    hessian: list[Draw]
    fresh: Draw | None
    other: Draw | None
    many: tuple[Any, Any]


class _Inner(NamedTuple):
    """What the inner steps lead to; ``spoiled`` is not finite where any loss was not."""

    y: Tensor
    last: Tensor
    spoiled: Tensor
    size: Tensor
    trials: Tensor
    failures: Tensor


class _Outer(NamedTuple):
    """What the outer step leads to; ``follows``: whether y does, along its tangent."""

    x: Tensor
    y: Tensor
    size: Tensor
    last: Tensor
    trials: Tensor
    failed: Tensor
    evaluations: Any
    slope: Tensor
    apart: Any
    follows: bool
    lengths: Lengths


class _Looked(NamedTuple):
    """g, |h|, and whether these, f and the point that the step leads to are finite."""

    inner_value: Tensor
    norm: Tensor
    finite: Tensor


class _Judged(NamedTuple):
    """``there``: how far y lags behind, on another batch."""

    noise: Noise
    agreement: Agreement
    there: Tensor | None


class _Nearer(NamedTuple):
    """y after the correction, whether f is flattered, and the evaluations."""

    y: Tensor
    flattered: Tensor
    evaluations: Any


class _Taken(NamedTuple):
    """An iteration."""

    inner: _Inner
    h: Any  # its Estimate
    moments: Moments
    step: _Outer
    judged: _Judged
    looked: _Looked
    nearer: _Nearer
    average: Average | None
    solver: Counted


def _looked(h: Estimate, inner: _Inner, step: _Outer) -> _Looked:
    assert h.inner_value is not None
    inner_value = h.inner_value + unsound(inner.spoiled).to(h.value.dtype)
    norm = torch.linalg.vector_norm(h.grad)
    finite = torch.stack([h.value, inner_value, norm]).isfinite().all()
    finite = finite & step.x.isfinite().all() & step.y.isfinite().all()
    return _Looked(inner_value, norm, finite)


def _corrected(
    oracle: Traced,
    behind: Tensor,
    x: Tensor,
    y: Tensor,
    h: Estimate,
    judge: Draw,
    solver: Counted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`bilevel.lag.corrected` where y is behind: y, products, evaluations, concavity."""

    def correct(go: Tensor, y: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        assert h.newton is not None
        counted = Counted(solver.solver, Learned(counts[2], solver.halvings))
        s, _ = h.newton(counted)
        products = torch.zeros_like(counts[0]) + sum(counted.counts)
        best = oracle.value("inner", x, y, judge)
        whole, quarter = (oracle.value("inner", x, y + t * s, judge) < best for t in (1.0, 0.25))
        nearer = torch.where(whole, y + s, torch.where(quarter, y + 0.25 * s, y))
        looks = torch.where(whole, 2.0, 3.0).double()
        return ~go, nearer, torch.stack([products, looks, counted.concave[-1].double()])

    nothing = torch.zeros((), dtype=torch.float64)
    begun = torch.stack([nothing, nothing, solver.concave[-1].double()])
    _, y, counts = while_loop(lambda go, y, counts: go.clone(), correct, (behind, y.clone(), begun))
    return y, *counts.unbind()
