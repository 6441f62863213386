"""A method is a hypergradient and an update per level: one outer iteration on flat vectors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import require
from bilevel.average import Average
from bilevel.hypergradients import HYPERGRADIENTS, Estimate, Hypergradient, InnerStep
from bilevel.inner_solver import run_solver
from bilevel.kinks import Kinks, leap
from bilevel.lag import arrived, corrected, has_solution, is_behind, is_lost
from bilevel.layout import Layout, Variable
from bilevel.linear import Learned, is_conjugate
from bilevel.noise import Agreement, Noise, averaged
from bilevel.problem import Cost, Draw, Joint, Oracle, Problem, make_oracle
from bilevel.record import Record
from bilevel.require import takes
from bilevel.rules import (
    Adam,
    Armijo,
    Line,
    Moments,
    Move,
    Rule,
    Steepest,
)
from bilevel.trials import Response, Trials

RULES = "one such as bilevel.rules.Armijo() or Fixed(step=0.1), or use bisls, bisps or fixed"
SOLVERS = (
    "a torch.optim.Optimizer class, a function(parameters) that makes one, or a function "
    "solver(x, y, batches)"
)


# outer, inner, for the Hessian, more outer ones: what a step takes
Batches = tuple[Any, list[Any], "list[Any] | None", "list[Any] | None"]
ANGLE = 0.1  # of a direction with the steepest one, its cosine, that is enough
PATIENCE = 10  # iterations that x waits at most for a y that comes from far; corrections of one
ROUNDS = 3  # of inner steps and a Newton step, after which y is where a first step is judged


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
    kinks: Kinks = Kinks()
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


@dataclass(frozen=True)
class Method:
    """One outer iteration: inner steps, a hypergradient, an outer step.

    Built by :func:`bisls`, :func:`bisps` and :func:`fixed`. ``response`` says on which y a trial is
    judged: see :class:`bilevel.trials.Trials`; ``averages``, whether the average of the iterates
    may be the answer where there are batches: see :class:`bilevel.average.Average`; ``corrects``,
    whether a y that lags behind y*(x) is brought nearer by a Newton step, and x waits for one that
    comes from far: see :func:`corrected` and :meth:`may_wait`;
    ``fresh``: y starts afresh in every iteration, and is brought nearer before the step instead;
    ``outer_batches``, of how many the outer loss is the mean; 'auto': as many as
    :class:`bilevel.noise.Agreement` says.
    """

    name: str
    hypergradient: Hypergradient
    direction: Steepest | Adam
    outer_rule: Rule
    inner_rule: Rule
    response: Response = "tangent"
    inner_solver: Callable[..., Any] | None = None
    averages: bool = True
    corrects: bool = True
    fresh: bool = False
    outer_batches: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        require.instance("Method", "name", self.name, str, "a string")
        require.made_by(
            "", "hypergradient", self.hypergradient, "estimate", "a hypergradient", HYPERGRADIENTS
        )
        require.function("Method", "direction", self.direction, "a function(g, moments)", 2)
        for name in ("outer_rule", "inner_rule"):
            rule = getattr(self, name)
            require.made_by("Method", name, rule, "searches", "a rule of steps", RULES)
        require.choice("Method", "response", self.response, get_args(Response))
        for name in ("averages", "corrects", "fresh"):
            require.flag("Method", name, getattr(self, name))
        if not (isinstance(self.outer_batches, str) and self.outer_batches == "auto"):
            require.whole("Method", "outer_batches", self.outer_batches, hint=", or 'auto'")
        if self.inner_solver is not None:
            count = 1 if callable(self.inner_solver) and takes(self.inner_solver, 1) else 3
            require.function("", "inner_solver", self.inner_solver, SOLVERS, count, classes=True)
        if self.inner_solver is not None and self.hypergradient.keep != "nothing":
            raise ValueError(
                f"inner_solver with {self.hypergradient!r}: the steps of a solver of your own are "
                f"not recorded, so there is nothing to go back through; use bilevel.Implicit(...), "
                f"or leave inner_solver out."
            )

        if self.inner_solver is not None and self.response == "refine":
            raise ValueError(
                "response='refine' with inner_solver: a trial is judged after one more inner step "
                "of the last size, which a solver of your own does not tell; use "
                "response='tangent', or leave inner_solver out."
            )

    def init(self, x: Variable, y: Variable) -> State:
        """The state at the start. x and y are read, never modified."""
        layouts = Layout(x, "x"), Layout(y, "y")
        return State(layouts, (layouts[0].flatten(x), layouts[1].flatten(y)))

    def wanted(self, state: State) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of how many batches the next hypergradient is, and how many more are to tell whether
        these are enough: of the outer loss, and of the inner one."""
        outer, inner = self.outer_batches, self.hypergradient.batches
        return (
            (state.agreement.batches, 1) if outer == "auto" else (outer, 0),
            (state.noise.batches, 1) if inner == "auto" else (inner, 0),
        )

    def is_still(self, batched: bool, watched: bool) -> bool:
        """Whether g is the same in all that is given: no batches, or one where several are asked.

        Args:
            batched: whether g takes batches.   watched: whether one was left to judge the others.
        """
        return not batched or (self.hypergradient.batches == "auto" and not watched)

    def is_alone(self, outer_batch: Any, more: Sequence[Any] | None) -> bool:
        """Whether f is the same in all that is given: no batch, or no other where some are asked
        for; ``more`` as :meth:`step` takes them."""
        asked = self.outer_batches == "auto" and more is not None
        return outer_batch is None or (asked and not more)

    @property
    def leaps(self) -> bool:
        """Whether steps may go over kinks: searches that remember them do, upwards as well."""
        return isinstance(self.outer_rule, Armijo) and self.outer_rule.reset == "grow"

    def may_wait(self, state: State) -> bool:
        """Whether x has not moved yet, and may stay for another iteration."""
        searches = self.outer_rule.searches(state.k, None)
        waits = self.corrects and not self.fresh
        return waits and searches and state.outer_last is None and state.k < PATIENCE

    def may_begin(self, state: State) -> bool:
        """Whether a step would be the first, which is judged by :func:`arrived`, too."""
        searches = self.outer_rule.searches(state.k, None)
        return self._settles and searches and state.outer_last is None

    @property
    def refreshes(self) -> bool:
        """Whether y is brought nearer before each step."""
        return self.fresh and self._settles

    @property
    def _settles(self) -> bool:
        """Whether y may be brought near a solution that trials follow, and by steps of ours."""
        return self.corrects and self.inner_solver is None and self.response == "tangent"

    def step(
        self,
        problem: Problem,
        state: State,
        outer_batch: Any = None,
        inner_batches: Sequence[Any] | int = 1,
        hessian_batches: Sequence[Any] | None = None,
        more_outer_batches: Sequence[Any] | None = None,
    ) -> tuple[State, Record]:
        """One outer iteration.

        Args:
            outer_batch: for the outer loss; None if it takes none.
            inner_batches: one per inner step; a number of steps if the inner loss takes none.
            hessian_batches: for the hypergradient; None: the last inner batches again.
            more_outer_batches: independent of the first, as many as there are at hand: the outer
                loss is the mean of the first ones, and the one after these tells whether they
                agree; none: there is but that one; None: nothing is known of others.

        Returns:
            The new state and the record of this iteration. Where something was not finite or a
            search failed, the state keeps the last good x and the record's ``failure`` says so.
        """
        start = time.perf_counter()
        require.instance("step", "problem", problem, Problem, "bilevel.Problem(outer, inner)")
        require.instance("step", "state", state, State, "what init(x, y) or a step returned")
        if isinstance(inner_batches, int | Integral):
            require.whole("step", "inner_batches", inner_batches)
            inner_batches = [None] * int(inner_batches)
        for name, batches in (
            ("inner_batches", inner_batches),
            ("hessian_batches", hessian_batches),
        ):
            if batches is not None or name == "inner_batches":
                require.several("step", name, batches)
        none = isinstance(more_outer_batches, list | tuple) and not more_outer_batches
        if more_outer_batches is not None and not none:
            require.several("step", "more_outer_batches", more_outer_batches)
        oracle = make_oracle(problem, *state.layouts)
        oracle.require_data(outer_batch, inner_batches[0], "{}_batch", "a batch")
        oracle.cost = replace(state.cost)
        with sdpa_kernel(SDPBackend.MATH):  # the only attention that is twice differentiable
            outcome = self._step(
                oracle, state, outer_batch, inner_batches, hessian_batches, more_outer_batches
            )
        state, record = outcome
        seconds = state.seconds + time.perf_counter() - start
        return replace(state, seconds=seconds), replace(record, seconds=seconds)

    def _step(
        self,
        oracle: Oracle,
        state: State,
        outer_batch: Any,
        inner_batches: Sequence[Any],
        hessian_batches: Sequence[Any] | None,
        more_outer_batches: Sequence[Any] | None,
    ) -> tuple[State, Record]:
        x, _ = state.vectors
        draws = [Draw(batch) for batch in inner_batches]
        y, path, inner = self._inner(oracle, state, draws)
        drawn = self._drawn(oracle, state, draws, outer_batch, hessian_batches, more_outer_batches)
        outer, hessian = drawn.outer, drawn.hessian
        h = self.hypergradient.estimate(oracle, x, y, outer, hessian, path, state.q, state.learned)
        searches = self.outer_rule.searches(state.k, state.outer_last)
        if searches and self.refreshes:
            y, h = self._refreshed(oracle, state, drawn, draws[0], y, h, path)
        lost = self._stays(state, drawn, h)
        d, moments = self.direction(h.grad, state.moments)
        if lost:
            moments, searches = state.moments, False
        if searches and oracle.problem.project is not None:
            d = feasible(oracle, x, h.grad, d, state.outer_last or 1.0)
        response = self.response if searches else None
        first = state.outer_last is None
        rise = state.kinks.allowed(drawn.kappa)
        trials = Trials(
            *(oracle, (x, y), outer, hessian[0], h, d, response, inner.size),
            *(drawn.kappa, first, rise),
        )
        line = trials.line
        leapt = None if lost else self._leapt(state, line, d, h, rise)
        stay = Move(0.0, state.outer_last) if lost else None
        move = stay or leapt or self.outer_rule(line, state.k, state.outer_last)
        new_x, new_y = trials.reach(move.size)
        new_y = y if new_y is None else new_y
        n = self._numbers(oracle, state, drawn, inner, h, trials, move, (new_x, new_y))

        # a failed search leaves a good point to go on from; numbers that are not finite do not
        numeric = not all(map(math.isfinite, (n.value, n.inner_value, n.norm))) or not n.finite
        failure = _failure(n.value, n.inner_value, n.norm, n.finite, move)
        agreement, average = state.agreement, state.average
        if n.alpha > 0:
            agreement = agreement.add(n.own / n.alpha, n.seen / n.alpha, drawn.many)
        # on y's way from the user's start h is of another place than y*(x), and x waits where the
        # first step gains less than what y still has to go
        waits = self.may_wait(state) and is_behind(n.here, n.there, move.gain)
        if self.may_begin(state) and n.alpha > 0 and has_solution(h) and not (waits or numeric):
            settled = partial(self._settled, oracle, state, draws, oracle.joint(hessian), inner, h)
            move, (new_x, new_y) = arrived(oracle, outer, trials, line, move, settled)
            n = n._replace(alpha=float(move.size))
            if move.last is None and state.k >= PATIENCE:
                move = move._replace(last=n.alpha)
        behind = lost or waits or is_behind(n.here, n.there, n.alpha * abs(n.slope))
        if self.corrects and not self.fresh and behind and not (numeric or move.failed):
            if waits:
                new_x, new_y, move = x, y, Move(0.0, None, move.trials)
                n = n._replace(alpha=0.0)
            new_y, learned = corrected(oracle, new_x, new_y, h, draws[0])
            h.learned.append(learned)
        kinks = state.kinks
        if leapt:
            kinks = kinks.leapt(move.gain)
        elif leapt is False:
            move, kinks = move._replace(trials=move.trials + 1), kinks.refused()
        if self.leaps and not leapt and n.alpha > 0:
            # what a first search gains is not to be lost again
            kinks = kinks.found(n.alpha * n.length, n.norm, 0.0 if first else move.gain)
        cost = oracle.cost
        record = Record(
            k=state.k,
            outer_loss=n.value,
            inner_loss=n.inner_value,
            hypergrad_norm=n.norm,
            outer_step=n.alpha,
            inner_step=n.beta,
            outer_trials=move.trials,
            inner_trials=inner.trials,
            inner_failures=inner.failures,
            residual=None if h.residual is None else n.residual,
            hessian_batches=len(hessian),
            outer_batches=drawn.many,
            gradients=cost.gradients,
            hessian_products=cost.hessian_products,
            loss_evaluations=cost.loss_evaluations,
            seconds=state.seconds,
            failure=failure,
        )
        if numeric:
            return replace(state, k=state.k + 1, cost=cost, failures=0), record

        learned = h.learned[-1]._replace(concave=float(h.learned[-1].concave))
        if drawn.still:  # noise, where there is some, is not to be fitted closer
            concave = learned.concave if drawn.batched else learned.lately
            learned = learned.judge(math.inf if lost else n.apart, concave)
            unsolved = learned.unsolved + 1 if n.residual > 1 else 0
            learned = learned._replace(unsolved=unsolved)
        if average and math.isfinite(n.difference):
            average = average.compare(n.difference).add(oracle, x, y)
        elif self.averages and drawn.noisy:
            average = Average(x, y)
        new = replace(
            state,
            vectors=(x, y) if move.failed else (new_x, new_y),
            k=state.k + 1,
            outer_last=move.last,
            inner_last=inner.last,
            kinks=kinks,
            moments=moments,
            q=h.q,
            average=average,
            solver=inner.solver,
            cost=cost,
            failures=state.failures + 1 if move.failed else 0,
            noise=state.noise.add(n.excess, len(hessian)).settle(state.k),
            agreement=agreement.settle(state.k),
            learned=learned._replace(lately=0.0),
        )
        return new, record

    def _stays(self, state: State, drawn: _Drawn, h: Estimate) -> bool:
        """Whether x stays where it is for want of a hypergradient, which going on with the same
        system may yet give."""
        solver: Any = getattr(self.hypergradient, "solver", None)
        goes_on = is_conjugate(solver) and solver.warm_start and drawn.still and not self.fresh
        begun = self._settles and state.outer_last is not None and has_solution(h)
        if h.residual is None or not (goes_on and begun):
            return False
        return is_lost(h.residual, state.learned.unsolved)

    def _leapt(
        self, state: State, line: Line, d: Tensor, h: Estimate, rise: float
    ) -> Move | Literal[False] | None:
        """A leap over a kink; False where it was refused, None where none was tried."""
        if not (self.leaps and state.kinks.shrunk and bool(line.slope < 0)):
            return None
        lengths = torch.stack([torch.linalg.vector_norm(v) for v in (d, h.grad)])
        return leap(line, state.kinks.leap(*lengths.tolist()), rise, state.outer_last) or False

    def _drawn(
        self,
        oracle: Oracle,
        state: State,
        draws: Sequence[Draw],
        outer_batch: Any,
        hessian_batches: Sequence[Any] | None,
        more_outer_batches: Sequence[Any] | None,
    ) -> _Drawn:
        """Which batches the hypergradient is of, and which ones judge it."""
        (m, judges), (count, more) = self.wanted(state)
        outers = [Draw(batch) for batch in (outer_batch, *(more_outer_batches or []))]
        given = draws[::-1] if hessian_batches is None else [Draw(b) for b in hessian_batches]
        alone = self.is_alone(outer_batch, more_outer_batches)
        # of a loss that draws random numbers, draws are what elsewhere batches are
        random = oracle.problem.habit.random
        if alone and "outer" in random:
            alone, outers = False, [Draw(outer_batch) for _ in range(m + judges)]
        if "inner" in random:
            given = [Draw(draw.batch) for draw in islice(cycle(given), count + more)]
        hessian = oracle.distinct(given)
        m = averaged(m, judges, len(outers))
        others = hessian[count : count + more]
        batched = draws[0].batch is not None or "inner" in random
        return _Drawn(
            # a batch that comes twice counts twice, as m says
            outer=Joint(outers[:m]) if m > 1 else outers[0],
            fresh=outers[m : m + judges],
            hessian=hessian[:count],
            others=others,
            many=m,
            kappa=1.0 if alone else state.agreement.kappa(m),
            batched=batched,
            still=self.is_still(batched, bool(others)),
            noisy=bool(random) or any(draw.batch is not None for draw in (*outers, *draws)),
        )

    def _numbers(
        self,
        oracle: Oracle,
        state: State,
        drawn: _Drawn,
        inner: _Inner,
        h: Estimate,
        trials: Trials,
        move: Move,
        reached: tuple[Tensor, Tensor],
    ) -> _Numbers:
        """What the host looks at after an outer step, which leads to ``reached``."""
        x, y, (new_x, new_y) = trials.x, trials.y, reached
        own = seen = excess = h.value * math.nan
        follows = trials.response not in (None, "frozen")  # or y stays behind
        if drawn.fresh and h.fy is not None and follows:
            _, fx, fy = oracle.outer_gradients(x, y, drawn.fresh[0])
            own, seen = slopes(h, (fx, fy), (new_x - x, new_y - y))
        here = there = torch.zeros_like(h.value) if h.lag is None else h.lag
        if drawn.others and h.elsewhere:
            excess, there = h.elsewhere(drawn.others[0])
        average = state.average
        average_value = average.value(oracle, drawn.outer) if average else h.value
        inner_value = h.inner_value if h.inner_value is not None else inner.value
        return _Numbers(
            value=h.value,
            inner_value=inner_value + inner.spoiled,
            norm=torch.linalg.vector_norm(h.grad),
            length=torch.linalg.vector_norm(trials.d) if self.leaps else math.nan,
            alpha=move.size,
            beta=inner.size,
            residual=math.nan if h.residual is None else h.residual,
            finite=new_x.isfinite().all() & new_y.isfinite().all(),
            difference=h.value - average_value,
            slope=trials.slope,
            here=here,
            there=there,
            excess=excess,
            apart=trials.apart,
            own=own,
            seen=seen,
        ).on_host(x.device)

    def _refreshed(
        self,
        oracle: Oracle,
        state: State,
        drawn: _Drawn,
        judge: Draw,
        y: Tensor,
        h: Estimate,
        path: Sequence[InnerStep],
    ) -> tuple[Tensor, Estimate]:
        """A y nearer to y*(x), and the hypergradient there: as long as f changes by more on the
        way than a step like the last one gains."""
        x, last = state.vectors[0], state.outer_last
        for _ in range(0 if last is None else PATIENCE):
            d, _ = self.direction(h.grad, state.moments)
            gain = (last or 0.0) * torch.dot(h.grad, d).abs()
            if not (has_solution(h) and bool(is_behind(h.lag, h.lag, gain))):
                break
            nearer, learned = corrected(oracle, x, y, h, judge)
            h.learned.append(learned)
            if nearer is y:
                break
            y, q = nearer, h.q
            h = self.hypergradient.estimate(
                oracle, x, y, drawn.outer, drawn.hessian, path, q, learned
            )
        return y, h

    def _settled(
        self,
        oracle: Oracle,
        state: State,
        draws: Sequence[Draw],
        hessian: Draw,
        inner: _Inner,
        h: Estimate,
        x: Tensor,
        y: Tensor,
        lag: float,
    ) -> Tensor:
        """y near y*(x), for a look: nothing is kept of it."""
        assert h.q is not None
        state = replace(state, inner_last=inner.last)
        for _ in range(ROUNDS):
            if lag and abs(torch.dot(h.q, oracle.inner_gradient(x, y, hessian)[1])) <= lag:
                break
            y, _, _ = self._inner(oracle, replace(state, vectors=(x, y)), draws)
            y, _ = corrected(oracle, x, y, h, draws[0], there=True)
        return y

    def _inner(
        self, oracle: Oracle, state: State, draws: Sequence[Draw]
    ) -> tuple[Tensor, list[InnerStep], _Inner]:
        """The inner steps from y at x, and their path as far as the hypergradient asks for it."""
        x, y = state.vectors
        out = _Inner(last=state.inner_last, solver=state.solver)
        if self.inner_solver is not None:
            y, out.solver = run_solver(self.inner_solver, oracle, x, y, draws, state.solver)
            return y, [], out
        keep, window = self.hypergradient.keep, self.hypergradient.window
        first_kept = 0 if window is None else max(0, len(draws) - window)
        path: list[InnerStep] = []
        for t, draw in enumerate(draws):
            kept = keep != "nothing" and t >= first_kept
            graph = oracle.record(x, y, draw) if kept and keep == "graphs" else None
            if graph is not None:
                value, gy = graph.value, graph.gradient
            else:
                value, gy = oracle.inner_gradient(x, y, draw)
            line = Line(value, -torch.dot(gy, gy), partial(_along, oracle, x, y, gy, draw))
            move = self.inner_rule(line, state.k, out.last)
            if kept:
                path.append(InnerStep(y, draw, move.size, graph))
            y = y - move.size * gy
            out.value, out.size, out.last = value, move.size, move.last
            out.spoiled = out.spoiled + unsound(value)
            out.trials += move.trials
            out.failures += move.failed
        return y, path, out


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


def slopes(
    h: Estimate, fresh: tuple[Tensor, Tensor], step: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """<f_x, dx> + <f_y, dy> of the draw that h was computed on, and of a fresh one with these f_x
    and f_y."""
    assert h.fy is not None
    (fx, fy), (dx, dy) = fresh, step
    own = torch.dot(h.direct, dx) + torch.dot(h.fy, dy)
    return own, torch.dot(fx, dx) + torch.dot(fy, dy)


def unsound(value: Tensor) -> Tensor:
    """It, where it is not finite; or 0."""
    return torch.where(value.isfinite(), 0.0, value)


def _along(oracle: Oracle, x: Tensor, y: Tensor, gy: Tensor, draw: Draw, t: float) -> Tensor:
    return oracle.value("inner", x, y - t * gy, draw)


def _failure(
    value: float, inner_value: float, norm: float, finite: float, move: Move
) -> str | None:
    for what, number in (
        ("the inner loss", inner_value),  # first, since y enters the outer one
        ("the outer loss", value),
        ("the norm of the hypergradient", norm),
    ):
        if not math.isfinite(number):
            return f"{what} is {number}"
    if move.failed and not move.trials:
        return "the slope of the outer line search is not finite"
    if move.failed:
        return f"the outer line search found no acceptable step in {move.trials} trials"
    if not finite:
        return "the step led to a point that is not finite"
    return None


class _Drawn(NamedTuple):
    """The batches of an outer step.

    Attributes:
        outer, hessian: of the hypergradient.   fresh, others: none of it, to judge these.
        many: outer batches.   kappa: of so many, see :class:`bilevel.noise.Agreement`.
        batched: whether g has batches, or draws.   still: whether it is the same in all of them.
        noisy: whether there are any.
    """

    outer: Draw
    fresh: Sequence[Draw]
    hessian: Sequence[Draw]
    others: Sequence[Draw]
    many: int
    kappa: float
    batched: bool
    still: bool
    noisy: bool


class _Numbers(NamedTuple):
    """What the host looks at of an iteration: numbers, or tensors of one."""

    value: Any
    inner_value: Any
    norm: Any
    length: Any
    alpha: Any
    beta: Any
    residual: Any
    finite: Any
    difference: Any
    slope: Any
    here: Any
    there: Any
    excess: Any
    apart: Any
    own: Any
    seen: Any

    def on_host(self, device: torch.device) -> _Numbers:
        """All of them, at the cost of waiting once."""
        wide = (torch.as_tensor(number, dtype=torch.float64, device=device) for number in self)
        return _Numbers(*torch.stack(list(wide)).tolist())


@dataclass
class _Inner:
    """What the inner steps leave behind."""

    last: float | None
    solver: Any
    value: float | Tensor = float("nan")
    spoiled: float | Tensor = 0.0  # not finite where any loss on the way was not
    size: float | Tensor = 0.0
    trials: int = 0
    failures: int = 0
