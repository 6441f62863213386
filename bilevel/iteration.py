"""One outer iteration on flat vectors, as :class:`bilevel.method.Method` takes it: inner steps, the
hypergradient, a search along a direction, and what follows where y lags behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import kinks
from bilevel.average import Average
from bilevel.drawn import Batches, Drawn, drawn
from bilevel.heading import Heading, heading, solves
from bilevel.host import Numbers, numbers
from bilevel.hypergradients import Estimate, FiniteDifference
from bilevel.inner import Inner, inner_steps
from bilevel.lag import (
    IN_A_ROW,
    NEAR,
    WAITS,
    arrived,
    corrected,
    has_solution,
    is_behind,
    is_exact,
    is_flattered,
    is_lost,
)
from bilevel.lengths import STRAIGHT, leap
from bilevel.linear import CONVEX, Learned
from bilevel.problem import Draw, Oracle
from bilevel.record import Record
from bilevel.rules import Line, Move
from bilevel.secants import Secants
from bilevel.state import State
from bilevel.trials import Trials

if TYPE_CHECKING:
    from bilevel.method import Method  # which takes its iterations by this module

Point = tuple[Tensor, Tensor]
ANGLE = 0.1  # of a direction with the steepest one, its cosine, that is enough
FADES = 0.8  # what was seen of negative curvature, in an iteration without noise that meets none
ROUNDS = 3  # of inner steps and a Newton step, after which y is where a first step is judged


def iterate(method: Method, oracle: Oracle, state: State, batches: Batches) -> tuple[State, Record]:
    """The state after an iteration, and its record, both with the seconds from before it."""
    outer_batch, inner_batches, hessian_batches, more = batches
    draws = [Draw(batch) for batch in inner_batches]
    inner = inner_steps(method, oracle, state, draws)
    alone = method.is_alone(outer_batch, more)
    outers = (outer_batch, *(more or []))
    picked = drawn(oracle, method.wanted(state), draws, outers, hessian_batches, alone)
    return Iteration(method, oracle, state, draws, picked, inner).take()


class Found(NamedTuple):
    """An outer step.

    Attributes:
        trials: those of the search.   line: as it was seen.
        move: how far.   point: where to.
        leapt: the move, if it is a leap over a kink; False where one was refused, None where none
            was tried.
        heading: of the search.   lost: see :func:`bilevel.lag.is_lost`.
        behind: whether y was found to lag behind there, see :func:`bilevel.lag.is_behind`.
    """

    trials: Trials
    line: Line
    move: Move
    point: Point
    leapt: Move | Literal[False] | None
    heading: Heading
    lost: bool
    behind: bool = True


@dataclass(frozen=True)
class Iteration:
    """An iteration after its inner steps.

    Args:
        draws: of the inner steps.   batches: of the outer step.   inner: what the former led to.
    """

    method: Method
    oracle: Oracle
    state: State
    draws: Sequence[Draw]
    batches: Drawn
    inner: Inner

    def take(self) -> tuple[State, Record]:
        y, h, heading = self._estimate()
        found = self._search(y, h, heading)
        n = self._numbers(found, h)
        flattered = self._flattered(found, h, n)
        taken = found
        if n.sound:  # a failed search leaves a good point to go on from; other numbers do not
            taken = self._follow_up(found, h, n, IN_A_ROW <= flattered < IN_A_ROW + WAITS)
        widths = self._kinks(h) if n.sound else self.state.kinks
        record = self._record(taken.move, h, n, n.failure(found.move))
        state = self._remember(taken, h, n, flattered)
        return state if widths == state.kinks else kinks.rounded_off(state, widths), record

    @property
    def still(self) -> bool:
        """Whether g is the same in all that is given."""
        return self.method.is_still(self.batches.batched, bool(self.batches.others))

    @property
    def quiet(self) -> bool:
        """Whether nothing has noise, see :meth:`bilevel.method.Method.is_quiet`."""
        return self.method.is_quiet(self.still, self.batches.alone)

    @property
    def judge(self) -> Draw:
        """On which y + s has to be better: another batch than those of the system; all of them
        where nothing has noise."""
        return self.oracle.joint(self.batches.hessian) if self.quiet else self.draws[0]

    @property
    def kappa(self) -> float:
        batches = self.batches
        return 1.0 if batches.alone else self.state.agreement.kappa(batches.many)

    @property
    def searches(self) -> bool:
        return self.method.outer_rule.searches(self.state.k, self.state.outer_last)

    def _estimate(self) -> tuple[Tensor, Estimate, Heading]:
        """y, as the inner steps leave it or nearer to y*(x), the hypergradient there, and where it
        points."""
        y, state = self.inner.y, self.state
        close = self.quiet and (state.k == 0 or state.learned.close)
        h = self._hypergradient(y, state.q, state.learned._replace(close=close))
        if self.searches and (self.method.refreshes or self.quiet):
            return self._refreshed(y, h)
        return y, h, self._heading(h)

    def _hypergradient(self, y: Tensor, q: Tensor | None, learned: Learned) -> Estimate:
        x, batches, path = self.state.vectors[0], self.batches, self.inner.path
        return self.method.hypergradient.estimate(
            self.oracle, x, y, batches.outer, batches.hessian, path, q, learned
        )

    def _refreshed(self, y: Tensor, h: Estimate) -> tuple[Tensor, Estimate, Heading]:
        """A y nearer to y*(x), and the rest there: as long as f changes by more on the way than a
        step like the last one gains. Where h is that of F but for this, than ``NEAR`` of that, as
        long as corrections halve it."""
        state, heading = self.state, self._heading(h)
        if state.outer_last is None:
            return y, h, heading
        near = NEAR if self.quiet and not state.kinks and solves(h) else 1.0
        for _ in range(WAITS):
            gain = near * (heading.last or 0.0) * torch.dot(h.grad, heading.d).abs()
            if h.lag is None or not bool(is_behind(h.lag, h.lag, gain)):
                break
            nearer, learned = corrected(self.oracle, state.vectors[0], y, h, self.judge)
            h.learned.append(learned)
            if nearer is y:
                break
            lag, y = h.lag.abs(), nearer
            h = self._hypergradient(y, h.q, learned)
            if near < 1 and h.lag is not None and bool(h.lag.abs() > lag / 2):
                near = 1.0
            heading = self._heading(h)
        return y, h, heading

    def _search(self, y: Tensor, h: Estimate, heading: Heading) -> Found:
        """How far along which direction."""
        method, oracle, state, batches = self.method, self.oracle, self.state, self.batches
        x = state.vectors[0]
        lost = self._is_lost(h)
        searches = self.searches and not lost
        d = heading.d if searches else method.heeded(heading.d, h)
        if searches and oracle.problem.project is not None:
            d = feasible(oracle, x, h.grad, d, state.outer_last or 1.0)
        trials = Trials(
            oracle,
            (x, y),
            batches.outer,
            batches.hessian[0],
            h,
            d,
            method.response if searches else None,
            self.inner.size,
            self.kappa,
            first=state.outer_last is None,
            rise=state.lengths.allowed(self.kappa),
            margin=self._margin(h),
        )
        line = trials.line
        leapt = None if lost or heading.newton else self._leapt(trials, line, h)
        stay = Move(0.0, state.outer_last) if lost else None
        move = stay or leapt or method.outer_rule(line, state.k, heading.last)
        if leapt is False:
            move = move._replace(trials=move.trials + 1)
        if heading.newton or (heading.last != state.outer_last and not move.size):
            move = move._replace(last=state.outer_last)
        new_x, new_y = trials.reach(move.size)
        point = new_x, y if new_y is None else new_y
        if lost:
            heading = heading._replace(moments=state.moments)
        return Found(trials, line, move, point, leapt, heading, lost)

    def _heading(self, h: Estimate) -> Heading:
        free = self.quiet and self.oracle.problem.project is None
        return heading(self.method, self.state, h, free)

    def _margin(self, h: Estimate) -> float:
        """By how much g may lose where y follows x: what the inner steps gained, where g is that of
        a network, which may have kinks; elsewhere steps that lose what the next gain lead nowhere.
        Nothing where nothing is known of other batches."""
        may_lose = not has_solution(h) and self.kappa > 0
        return max(self.inner.gain, 0.0) if may_lose else 0.0

    def _is_lost(self, h: Estimate) -> bool:
        """Whether x is to stay for want of a hypergradient; of a g without noise."""
        may = self.still and self.method.may_stay(self.state)
        if not may or h.residual is None or not has_solution(h):
            return False
        return is_lost(h.residual, self.state.learned.unsolved)

    def _leapt(self, trials: Trials, line: Line, h: Estimate) -> Move | Literal[False] | None:
        """A leap over a kink; False where it was refused, None where none was tried."""
        lengths, last, kappa = self.state.lengths, self.state.outer_last, self.kappa
        if not (self.method.may_leap(self.state) and bool(line.slope < 0)):
            return None
        d, norm = torch.stack([torch.linalg.vector_norm(v) for v in (trials.d, h.grad)]).tolist()
        t = lengths.leap(d, norm, last, kappa)
        if not t:
            return None
        move = leap(line, t, lengths.allowed(kappa), last)
        return move if move and trials.straight(t, STRAIGHT) else False

    def _numbers(self, found: Found, h: Estimate) -> Numbers:
        inner = self.inner.value, self.inner.size, self.inner.spoiled
        return numbers(
            *(self.oracle, self.batches, self.state.average, inner, h),
            *(found.trials, found.move, found.point, self.method.leaps),
        )

    def _flattered(self, found: Found, h: Estimate, n: Numbers) -> int:
        """Iterations in a row, with this one, in which f was too low for a y that lags, as noise
        may keep it, against which corrections do little."""
        follows = self.method.follows
        if self.still or not follows or self.state.outer_last is None or not has_solution(h):
            return 0
        gain = float(found.move.size) * abs(n.slope)
        if not is_flattered(n.here, n.there, gain, n.residual):
            return 0
        return self.state.learned.flattered + 1

    def _follow_up(self, found: Found, h: Estimate, n: Numbers, stays: bool) -> Found:
        """The step; a shorter one, or none, where y has yet to arrive; and y nearer to its
        solution, where it lags behind. ``stays``: whether x does, for f is flattered."""
        method, state, move, point = self.method, self.state, found.move, found.point
        # on y's way from the user's start h is of another place than y*(x), and x waits where the
        # first step gains less than what y still has to go
        waits = method.may_wait(state) and is_behind(n.here, n.there, move.gain)
        if method.may_begin(state) and n.alpha > 0 and has_solution(h) and not waits:
            settled = partial(self._settled, self.oracle.joint(self.batches.hessian), h)
            outer = self.batches.outer
            move, point = arrived(self.oracle, outer, found.trials, found.line, move, settled)
            if move.last is None and state.k >= WAITS:
                move = move._replace(last=float(move.size))
        gain = float(move.size) * abs(n.slope)
        behind = found.lost or waits or is_behind(n.here, n.there, gain)
        # where nothing has noise, the next iteration begins with that
        at_once = waits or found.lost or not self.quiet
        if method.follows and behind and at_once and not move.failed:
            if waits or stays:
                move = Move(0.0, state.outer_last, move.trials)
                point = found.trials.x, found.trials.y
            y, learned = corrected(self.oracle, *point, h, self.judge)
            h.learned.append(learned)
            point = point[0], y
        leapt = None if stays else found.leapt
        return found._replace(move=move, point=point, leapt=leapt, behind=behind)

    def _settled(self, hessian: Draw, h: Estimate, x: Tensor, y: Tensor, lag: float) -> Tensor:
        """y near y*(x), for a look: nothing is kept of it."""
        assert h.q is not None
        state = replace(self.state, inner_last=self.inner.last)
        for _ in range(ROUNDS):
            if lag and abs(torch.dot(h.q, self.oracle.inner_gradient(x, y, hessian)[1])) <= lag:
                break
            there = replace(state, vectors=(x, y))
            y = inner_steps(self.method, self.oracle, there, self.draws).y
            y, _ = corrected(self.oracle, x, y, h, self.judge, there=True)
        return y

    def _remember(self, taken: Found, h: Estimate, n: Numbers, flattered: int) -> State:
        """What goes on to the next iteration."""
        state, batches, move = self.state, self.batches, taken.move
        x, y = here = taken.trials.x, taken.trials.y
        if not n.sound:
            return replace(state, k=state.k + 1, cost=self.oracle.cost, failures=0)
        agreement, average, lengths = state.agreement, state.average, state.lengths
        if n.alpha > 0:
            agreement = agreement.add(n.own / n.alpha, n.seen / n.alpha, batches.many)
        # a first search is over many decades, often where F is flat
        if taken.heading.newton:
            lengths = lengths.passed()
        elif self.method.leaps and state.outer_last is not None:
            moved, leapt = float(move.size) * n.length, taken.leapt
            lengths = lengths.after(leapt is not None, bool(leapt), moved, n.norm, n.gain)
        if average and math.isfinite(n.difference):
            average = average.compare(n.difference).add(self.oracle, x, y)
        elif self.method.averages and batches.noisy:
            average = Average(x, y)
        return replace(
            state,
            vectors=here if move.failed else taken.point,
            k=state.k + 1,
            outer_last=move.last,
            inner_last=self.inner.last,
            training=self.inner.training,
            lengths=lengths,
            moments=taken.heading.moments,
            secants=Secants() if move.failed else taken.heading.secants,
            q=h.q,
            average=average,
            solver=self.inner.solver,
            cost=self.oracle.cost,
            failures=state.failures + 1 if move.failed else 0,
            noise=state.noise.add(n.excess, len(batches.hessian)).settle(state.k),
            agreement=agreement.settle(state.k),
            learned=self._learned(taken, h, n, flattered),
        )

    def _kinks(self, h: Estimate) -> tuple[float, ...] | None:
        """Over which widths the kinks of g are rounded off from now on; None: not known yet."""
        known, may = self.state.kinks, self.method.rounds and self.oracle.may_round
        if known is not None:
            return kinks.sharper(known, self.state.k) if self.still else known
        if not may or h.newton is None or isinstance(self.method.hypergradient, FiniteDifference):
            return ()
        return kinks.found(self.oracle, self.state, self.inner.y, self.batches.hessian[0])

    def _learned(self, taken: Found, h: Estimate, n: Numbers, flattered: int) -> Learned:
        learned = h.learned[-1]._replace(concave=float(h.learned[-1].concave))
        learned = learned._replace(flattered=flattered % (IN_A_ROW + WAITS))
        if self.still:  # noise, where there is some, is not to be fitted closer
            concave = learned.concave if self.batches.batched else learned.lately
            learned = learned.judge(math.inf if taken.lost else n.apart, concave)
            learned = learned._replace(unsolved=learned.unsolved + 1 if n.residual > 1 else 0)
            exact = self.quiet and has_solution(h)
            exact = exact and is_exact(n.residual, learned.halvings, taken.behind)
            learned = learned._replace(exact=learned.exact + 1 if exact else 0)
        close = self.quiet and bool(learned.lately <= CONVEX)
        if close:  # y may have come to where g is convex
            learned = learned._replace(concave=FADES * learned.concave)
        return learned._replace(close=close, lately=0.0)

    def _record(self, move: Move, h: Estimate, n: Numbers, failure: str | None) -> Record:
        inner, cost = self.inner, self.oracle.cost
        return Record(
            k=self.state.k,
            outer_loss=n.value,
            inner_loss=n.inner_value,
            hypergrad_norm=n.norm,
            outer_step=float(move.size),
            inner_step=n.beta,
            outer_trials=move.trials,
            inner_trials=inner.trials,
            inner_failures=inner.failures,
            residual=None if h.residual is None else n.residual,
            lag=(n.here + n.there) / 2 if has_solution(h) else None,
            hessian_batches=len(self.batches.hessian),
            outer_batches=self.batches.many,
            gradients=cost.gradients,
            hessian_products=cost.hessian_products,
            loss_evaluations=cost.loss_evaluations,
            seconds=self.state.seconds,
            failure=failure,
        )


def feasible(oracle: Oracle, x: Tensor, g: Tensor, d: Tensor, t: float) -> Tensor:
    """d, or -g of the same length where the projection leaves too little of what d would gain.

    On the way from x to P(x - t g) the loss always falls, if x is not stationary. Along another
    direction it may not: scaled by an A, x may even stay where it is at a point that is no
    solution. d is kept where P(x + t d) gains ``ANGLE`` of the same per length at least, as
    -A^{-1} g does without a projection wherever the scales of A are within a factor of 400.
    """
    unit = partial(F.normalize, dim=0, eps=torch.finfo(g.dtype).tiny)
    steepest = -torch.linalg.vector_norm(d) * unit(g)
    scaled, plain = (torch.dot(g, unit(oracle.project(x + t * s) - x)) for s in (d, steepest))
    return torch.where(scaled <= ANGLE * plain, d, steepest)
