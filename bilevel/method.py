"""A method is a hypergradient and an update per level: one outer iteration on flat vectors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import require
from bilevel.average import Average
from bilevel.drawn import Drawn, drawn
from bilevel.host import Numbers, numbers, unsound
from bilevel.hypergradients import HYPERGRADIENTS, Estimate, Hypergradient, InnerStep
from bilevel.inner_solver import run_solver
from bilevel.lag import LOST, arrived, corrected, has_solution, is_behind, is_flattered, is_lost
from bilevel.layout import Layout, Variable
from bilevel.lengths import STRAIGHT, leap
from bilevel.linear import is_conjugate
from bilevel.problem import Draw, Oracle, Problem, make_oracle
from bilevel.record import Record
from bilevel.require import takes
from bilevel.rules import (
    Adam,
    Armijo,
    Line,
    Move,
    Polyak,
    Rule,
    Steepest,
)
from bilevel.state import State
from bilevel.trials import Response, Trials

RULES = "one such as bilevel.rules.Armijo() or Fixed(step=0.1), or use bisls, bisps or fixed"
SOLVERS = (
    "a torch.optim.Optimizer class, a function(parameters) that makes one, or a function "
    "solver(x, y, batches)"
)


Point = tuple[Tensor, Tensor]
# outer, inner, for the Hessian, more outer ones: what a step takes
Batches = tuple[Any, list[Any], "list[Any] | None", "list[Any] | None"]
ANGLE = 0.1  # of a direction with the steepest one, its cosine, that is enough
PATIENCE = 10  # iterations that x waits at most for y; corrections of one
ROUNDS = 3  # of inner steps and a Newton step, after which y is where a first step is judged


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
        require.function("Method", "direction", self.direction, "a function(g, moments, share)", 3)
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

    def heeded(self, d: Tensor, h: Estimate) -> Tensor:
        """d, or 0 where Polyak steps, which try nothing and have a floor, would go as far along an
        h that points anywhere: where conjugate gradients end farther from solving than zero is."""
        solver: Any = getattr(self.hypergradient, "solver", None)
        heeds = isinstance(self.outer_rule, Polyak) and is_conjugate(solver)
        return torch.where(h.residual > 1, 0.0, d) if heeds and h.residual is not None else d

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
        alone = self.is_alone(outer_batch, more_outer_batches)
        outers = (outer_batch, *(more_outer_batches or []))
        batches = drawn(oracle, self.wanted(state), draws, outers, hessian_batches, alone)
        outer, hessian = batches.outer, batches.hessian
        still = self.is_still(batches.batched, bool(batches.others))
        kappa = 1.0 if batches.alone else state.agreement.kappa(batches.many)
        h = self.hypergradient.estimate(oracle, x, y, outer, hessian, path, state.q, state.learned)
        searches = self.outer_rule.searches(state.k, state.outer_last)
        if searches and self.refreshes:
            y, h = self._refreshed(oracle, state, batches, draws[0], y, h, path)

        d, moments = self.direction(h.grad, state.moments, state.lengths.share)
        lost = still and self._is_lost(state, h)
        if lost:
            moments, searches = state.moments, False
        d = d if searches else self.heeded(d, h)
        if searches and oracle.problem.project is not None:
            d = feasible(oracle, x, h.grad, d, state.outer_last or 1.0)
        response = self.response if searches else None
        first = state.outer_last is None
        trials = Trials(
            *(oracle, (x, y), outer, hessian[0], h, d, response, inner.size),
            *(kappa, first, state.lengths.allowed(kappa)),
        )
        line = trials.line
        leapt = None if lost else self._leapt(state, trials, line, h, kappa)
        stay = Move(0.0, state.outer_last) if lost else None
        move = stay or leapt or self.outer_rule(line, state.k, state.outer_last)
        if leapt is False:
            move = move._replace(trials=move.trials + 1)
        new_x, new_y = trials.reach(move.size)
        point = new_x, y if new_y is None else new_y
        steps = inner.value, inner.size, inner.spoiled
        n = numbers(oracle, batches, state.average, steps, h, trials, move, point, self.leaps)
        failure = n.failure(move)
        agreement, average = state.agreement, state.average
        if n.alpha > 0:
            agreement = agreement.add(n.own / n.alpha, n.seen / n.alpha, batches.many)
        flattered = 0 if still else self._flattered(state, h, n, move)
        # a failed search leaves a good point to go on from; numbers that are not finite do not
        if n.sound:
            searched = move  # by the search alone

            def judged() -> tuple[Move, Point]:
                joint = oracle.joint(hessian)
                settled = partial(self._settled, oracle, state, draws, joint, inner, h)
                return arrived(oracle, outer, trials, line, searched, settled)

            here, found = (x, y), (move, point)
            stays = LOST <= flattered < LOST + PATIENCE
            leapt = None if stays else leapt
            move, point = self._follow_up(
                oracle, state, draws[0], h, n, here, found, judged, lost, stays
            )
            n = n._replace(alpha=float(move.size))
        lengths = state.lengths
        if self.leaps and not first:  # which is sought over many decades, often where F is flat
            moved = n.alpha * n.length
            lengths = lengths.after(leapt is not None, bool(leapt), moved, n.norm, n.gain)
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
            outer_batches=batches.many,
            gradients=cost.gradients,
            hessian_products=cost.hessian_products,
            loss_evaluations=cost.loss_evaluations,
            seconds=state.seconds,
            failure=failure,
        )
        if not n.sound:
            return replace(state, k=state.k + 1, cost=cost, failures=0), record

        learned = h.learned[-1]._replace(concave=float(h.learned[-1].concave))
        learned = learned._replace(flattered=flattered % (LOST + PATIENCE))
        if still:  # noise, where there is some, is not to be fitted closer
            concave = learned.concave if batches.batched else learned.lately
            learned = learned.judge(math.inf if lost else n.apart, concave)
            learned = learned._replace(unsolved=learned.unsolved + 1 if n.residual > 1 else 0)
        if average and math.isfinite(n.difference):
            average = average.compare(n.difference).add(oracle, x, y)
        elif self.averages and batches.noisy:
            average = Average(x, y)
        new = replace(
            state,
            vectors=(x, y) if move.failed else point,
            k=state.k + 1,
            outer_last=move.last,
            inner_last=inner.last,
            lengths=lengths,
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

    def _follow_up(
        self,
        oracle: Oracle,
        state: State,
        judge: Draw,
        h: Estimate,
        n: Numbers,
        here: Point,
        found: tuple[Move, Point],
        judged: Callable[[], tuple[Move, Point]],
        lost: bool,
        stays: bool,
    ) -> tuple[Move, Point]:
        """The step that was ``found`` and where it leads; a shorter one, or none, where y has yet
        to arrive; and y nearer to its solution, where it lags behind.

        Args:
            here: where the step begins.   judged: the step, where it is the first.
            lost: see :func:`bilevel.lag.is_lost`.   stays: whether x does, for f is flattered.
        """
        move, point = found
        # on y's way from the user's start h is of another place than y*(x), and x waits where the
        # first step gains less than what y still has to go
        waits = self.may_wait(state) and is_behind(n.here, n.there, move.gain)
        if self.may_begin(state) and n.alpha > 0 and has_solution(h) and not waits:
            move, point = judged()
            if move.last is None and state.k >= PATIENCE:
                move = move._replace(last=float(move.size))
        behind = lost or waits or is_behind(n.here, n.there, float(move.size) * abs(n.slope))
        if self.corrects and not self.fresh and behind and not move.failed:
            if waits or stays:
                move, point = Move(0.0, state.outer_last, move.trials), here
            y, learned = corrected(oracle, *point, h, judge)
            h.learned.append(learned)
            point = point[0], y
        return move, point

    def _flattered(self, state: State, h: Estimate, n: Numbers, move: Move) -> int:
        """Iterations in a row, with this one, in which f was too low for a y that lags, as noise
        may keep it, against which corrections do little."""
        follows = self.corrects and not self.fresh and state.outer_last is not None
        gain = float(move.size) * abs(n.slope)
        if not (follows and has_solution(h) and is_flattered(n.here, n.there, gain, n.residual)):
            return 0
        return state.learned.flattered + 1

    def _is_lost(self, state: State, h: Estimate) -> bool:
        """Whether x is to stay for want of a hypergradient, which going on with its system may yet
        give; of a g without noise."""
        solver: Any = getattr(self.hypergradient, "solver", None)
        goes_on = is_conjugate(solver) and solver.warm_start and not self.fresh
        begun = self._settles and state.outer_last is not None and has_solution(h)
        if h.residual is None or not (goes_on and begun):
            return False
        return is_lost(h.residual, state.learned.unsolved)

    def _leapt(
        self, state: State, trials: Trials, line: Line, h: Estimate, kappa: float
    ) -> Move | Literal[False] | None:
        """A leap over a kink; False where it was refused, None where none was tried."""
        leaps = self.leaps and state.outer_last is not None and state.lengths.shrunk
        if not (leaps and bool(line.slope < 0)):
            return None
        d, norm = torch.stack([torch.linalg.vector_norm(v) for v in (trials.d, h.grad)]).tolist()
        t = state.lengths.leap(d, norm, state.outer_last, kappa)
        if not t:
            return None
        move = leap(line, t, state.lengths.allowed(kappa), state.outer_last)
        return move if move and trials.straight(t, STRAIGHT) else False

    def _refreshed(
        self,
        oracle: Oracle,
        state: State,
        batches: Drawn,
        judge: Draw,
        y: Tensor,
        h: Estimate,
        path: Sequence[InnerStep],
    ) -> tuple[Tensor, Estimate]:
        """A y nearer to y*(x), and the hypergradient there: as long as f changes by more on the
        way than a step like the last one gains."""
        x, last = state.vectors[0], state.outer_last
        for _ in range(0 if last is None else PATIENCE):
            d, _ = self.direction(h.grad, state.moments, state.lengths.share)
            gain = (last or 0.0) * torch.dot(h.grad, d).abs()
            if not (has_solution(h) and bool(is_behind(h.lag, h.lag, gain))):
                break
            nearer, learned = corrected(oracle, x, y, h, judge)
            h.learned.append(learned)
            if nearer is y:
                break
            y, q = nearer, h.q
            h = self.hypergradient.estimate(
                oracle, x, y, batches.outer, batches.hessian, path, q, learned
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


def _along(oracle: Oracle, x: Tensor, y: Tensor, gy: Tensor, draw: Draw, t: float) -> Tensor:
    return oracle.value("inner", x, y - t * gy, draw)


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
