"""One outer iteration in tensors alone, to be compiled whole, and a loop of several around it.

A small problem is bound by dispatch: what Python does between two operations costs more than they
do. So here the searches and the conjugate gradients are loops of the graph, and nothing looks at
the host. :meth:`bilevel.method.Method._step` is the plain form of the same iteration, and its
oracle: the two agree to rounding, counters included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from bilevel.average import Average
from bilevel.host import slopes, unsound
from bilevel.hypergradients import Estimate, Followed, Implicit
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

        def going(i: Tensor, go: Tensor, *rest: Tensor) -> Tensor:
            return go & (i < count)

        def once(
            i: Tensor, go: Tensor, rows: Tensor, scalars: Tensor, *vectors: Tensor
        ) -> tuple[Tensor, ...]:
            stored = stacks, places
            old = Scalars(*scalars.unbind())
            row, new, new_vectors = self._once(i, joined, start, stored, old, vectors)
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

    def _draw(self, level: int, stored: tuple[list[list[Tensor]], Tensor], at: Tensor) -> Draw:
        """The outer, inner or Hessian batch at a place."""
        stacks, places = stored
        if not stacks[level]:
            return Draw(None)
        row = places[level].index_select(0, at.reshape(1))
        picked = [stack.index_select(0, row).squeeze(0) for stack in stacks[level]]
        return Draw(rebuild(self.skeletons[level], iter(picked)))

    def _once(
        self,
        i: Tensor,
        joined: tuple[Tensor, Tensor],
        start: Tensor,
        stored: tuple[list[list[Tensor]], Tensor],
        old: Scalars,
        vectors: Sequence[Tensor],
    ) -> tuple[Row, Scalars, list[Tensor]]:
        """Iteration i of the call: its row, and the scalars and vectors after it."""
        x, before, q, *rest = vectors
        noise = Noise(1, old.level, old.levels)
        agreement = Agreement(1, old.signal, old.noise, old.slopes)
        # copies: two views of one tensor may not enter the loop of a search together
        lengths = Lengths(*(length.clone() for length in old.lengths))
        m: Tensor | int = joined[0] if self.joins[0] else 1
        fixed = max(1, self.counts[1])
        drawn = joined[1] + int(self.watches[1]) if self.joins[1] else fixed
        many = joined[1] if self.joins[1] else 1

        def outer_of(j: Tensor | int) -> Draw:
            return self._draw(0, stored, i * (m + int(self.watches[0])) + j)

        def of(j: Tensor | int) -> Draw:
            return self._draw(2, stored, i * drawn + j)

        outer = Run(outer_of, joined[0]) if self.joins[0] else self._draw(0, stored, i)
        hessian = [Run(of, joined[1])] if self.joins[1] else [of(j) for j in range(fixed)]
        oracle = Traced(self.oracle, hessian[0] if self.matrix else None)

        begin = start if self.method.fresh else before
        inner = self._inner(oracle, i, stored, (x, begin), old.k, old.inner_last)
        y = inner.y

        # the hypergradient; chunks lets Implicit alone pass, and Traced stands in for its oracle
        learned = Learned(old.concave, old.halvings)
        solver = Counted(self.method.hypergradient.solver, learned)  # type: ignore[attr-defined]
        h = Implicit(solver).estimate(oracle, x, y, outer, hessian, [], q)  # type: ignore[arg-type]
        solver.counts.append(1)  # the cross term
        assert h.inner_value is not None and h.q is not None and h.residual is not None
        here = there = h.lag
        if self.watches[1]:
            assert h.elsewhere is not None
            excess, there = h.elsewhere(of(joined[1]))
            noise = noise.add(excess.double(), joined[1])
        first, second = rest[:2] if self.moments else (None, None)
        # counts are tensors in a graph, as in Average below; the arithmetic on them is the same
        moments = Moments(first, second, old.n, old.w)
        d, moved = self.method.direction(h.grad, moments, lengths.share)
        d = self.method.heeded(d, h)

        lasts = old.outer_last, lengths
        kappa = 1.0 if self.alone else agreement.kappa(m)
        step = self._outer(oracle, (x, y), outer, h, d, old.k, lasts, kappa, (m, many))
        new_x, new_y, alpha, failed = step.x, step.y, step.size, step.failed
        if step.follows:
            solver.counts.append(1)  # g_yx d

        told = self.watches[0] and step.follows
        if told:
            _, fx, fy = oracle.outer_gradients(x, y, outer_of(joined[0]))
            own, seen = slopes(h, (fx, fy), (new_x - x, new_y - y))
            agreement = agreement.add(own.double() / alpha, seen.double() / alpha, m)

        # what is kept: all of it, or, where numbers are not finite, nothing
        norm, evaluations = torch.linalg.vector_norm(h.grad), step.evaluations
        inner_value = h.inner_value + unsound(inner.spoiled).to(x.dtype)
        finite = torch.stack([h.value, inner_value, norm]).isfinite().all()
        finite = finite & new_x.isfinite().all() & new_y.isfinite().all()
        flattered = torch.zeros_like(finite)
        if self.method.corrects and not self.method.fresh:
            assert here is not None and there is not None
            lag = here.double(), there.double(), alpha * step.slope.double().abs()
            behind = is_behind(*lag)
            flattered = flattered if self.still else is_flattered(*lag, h.residual)
            judge = self._draw(1, stored, i * self.counts[0])
            new_y, products, looks, concave_new = _corrected(
                oracle, behind & finite & ~failed, new_x, new_y, h, judge, solver
            )
            solver.counts.append(products)
            solver.concave.append(concave_new)
            evaluations = evaluations + looks
        kept = [torch.where(failed, x, new_x), torch.where(failed, y, new_y), h.q]
        if self.moments:
            assert moved.m is not None and moved.v is not None
            kept += [moved.m, moved.v]
        terms, gain = old.terms, old.gain
        if self.averaged:
            ax, ay = rest[-2:]
            difference = (h.value - oracle.value("outer", ax, ay, outer)).double()
            seen = difference.isfinite()
            judged = Average(ax, ay, terms, gain).compare(difference)  # type: ignore[arg-type]
            added = Average(ax, ay, terms.to(x.dtype)).add(oracle, x, y)  # type: ignore[arg-type]
            kept += [torch.where(seen, added.x, x), torch.where(seen, added.y, y)]
            terms = torch.where(seen, terms + 1, 1.0)
            gain = torch.where(seen, judged.gain, 0.0)
        new_vectors = [
            torch.where(finite, new, old)
            for new, old in zip(kept, [x, before, q, *rest], strict=True)
        ]
        new = old._replace(
            outer_last=step.last,
            inner_last=inner.last,
            n=moved.n,
            w=moved.w,
            terms=terms,
            gain=gain,
            level=noise.level,
            levels=noise.terms,
            signal=agreement.signal,
            noise=agreement.noise,
            slopes=agreement.terms,
            concave=solver.concave[-1].double(),
            halvings=learned.judge(step.apart).halvings if self.still else old.halvings,
            **step.lengths._asdict(),
        ).where(finite, old)
        new = new._replace(
            k=old.k + 1, failures=torch.where(finite & failed, old.failures + 1, 0.0)
        )
        row = Row(
            value=h.value,
            inner_value=inner_value,
            norm=norm,
            outer_step=alpha,
            inner_step=inner.size,
            residual=h.residual,
            finite=finite,
            outer_trials=step.trials,
            inner_trials=inner.trials,
            inner_failures=inner.failures,
            failed=failed,
            gradients=torch.zeros_like(alpha)
            + self.steps
            + m
            + many
            + told
            + self.watches[1]
            + step.follows * many * step.trials,
            hessian_products=many * sum(solver.counts, torch.zeros_like(alpha))
            + int(self.watches[1]),
            loss_evaluations=inner.trials + evaluations + m * int(self.averaged),
            concave=solver.concave[-1],
            flattered=flattered,
        )
        return row, new, new_vectors

    def _inner(
        self,
        oracle: Traced,
        i: Tensor,
        stored: tuple[list[list[Tensor]], Tensor],
        point: tuple[Tensor, Tensor],
        k: Tensor,
        last: Tensor,
    ) -> _Inner:
        """The inner steps of iteration i of the call."""
        x, y = point

        def step(t: Tensor, y: Tensor, tally: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            last, spoiled, _, trials, failures = tally.unbind()
            draw = self._draw(1, stored, i * self.counts[0] + t % max(1, self.counts[0]))
            value, gy = oracle.inner_gradient(x, y, draw)

            def phi(t: Tensor) -> tuple[Tensor, int]:
                return oracle.value("inner", x, y - t.to(y.dtype) * gy, draw), 1

            found = move(self.method.inner_rule, value, -torch.dot(gy, gy), phi, k, last)
            size, last, more, failed, *_ = found
            value = value.double() + unsound(spoiled)  # from the first on that is not finite
            tally = torch.stack([last, value, size, trials + more, failures + failed])
            return t + 1, y - size.to(y.dtype) * gy, tally

        nothing = torch.zeros((), dtype=torch.float64)
        tally = torch.stack([last, nothing, nothing, nothing, nothing])
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
        outer: Draw,
        h: Estimate,
        d: Tensor,
        k: Tensor,
        lasts: tuple[Tensor, Lengths],
        kappa: Tensor | float,
        many: tuple[Tensor | int, Tensor | int],
    ) -> _Outer:
        """The outer step along d; ``many``: outer and Hessian batches in one evaluation."""
        (x, y), (last, lengths) = point, lasts
        rule, follow = self.method.outer_rule, None
        rise, first = lengths.allowed(kappa), last.isnan()
        length, norm = (torch.linalg.vector_norm(v).double() for v in (d, h.grad))
        most = ceiling(h.value) + rise
        apart: Tensor | float = torch.nan
        slope = torch.dot(h.grad, d)
        if isinstance(rule, Armijo):
            if self.method.response == "frozen":
                slope = torch.dot(h.direct, d)
            else:
                slope, apart, follow = h.respond(d, first)

        leap = lengths.leap(length, norm, last, kappa) * self.method.leaps

        def reach(t: Tensor) -> tuple[Tensor, Followed]:
            t = t.to(x.dtype)
            xt = x + t * d
            return xt, follow(t, xt) if follow is not None else Followed(y, True, y)

        def phi(t: Tensor) -> tuple[Tensor, Tensor | int, Tensor]:
            xt, (yt, trusted, bent, off) = reach(t)
            value = oracle.value("outer", xt, yt, outer)
            if follow is None:
                return value, many[0], value
            assert isinstance(trusted, Tensor)
            there = oracle.value("outer", xt, bent, outer)
            twice = trusted & ~first & (there <= most)
            value = torch.where(trusted & first, there, torch.where(twice, value, torch.inf))
            value = torch.where((t == leap) & (off > STRAIGHT), torch.inf, value)
            return value, (trusted + 0 + twice) * many[0] + many[1], there

        found = move(rule, h.value, slope, phi, k, last, kappa, True, (leap, rise))
        size, last, trials, failed, evaluations, leapt, gain = found
        searched = lengths.refused().where((leap > 0) & (slope < 0), lengths)
        moved = size * length
        ended = searched.found(moved, norm, gain).where((moved > 0) & (norm > 0), searched)
        after = lengths.leapt(gain).where(leapt, ended)
        after = lengths.where(first, after)
        new_x, followed = reach(size)
        new_y = torch.where(size > 0, followed.y, y)
        follows = follow is not None
        return _Outer(
            *(new_x, new_y, size, last, trials, failed > 0, evaluations, slope, apart, follows),
            after if self.method.leaps else lengths,
        )


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
