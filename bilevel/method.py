"""A method is a hypergradient and an update per level: settings, which :mod:`bilevel.iteration`
follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bilevel import require
from bilevel.attention import twice_differentiable
from bilevel.hypergradients import HYPERGRADIENTS, Estimate, Hypergradient
from bilevel.iteration import iterate
from bilevel.lag import WAITS
from bilevel.layout import Layout, Variable
from bilevel.linear import is_conjugate
from bilevel.problem import Problem, make_oracle
from bilevel.record import Record
from bilevel.require import takes
from bilevel.rules import Adam, Armijo, Moments, Polyak, Rule, Steepest
from bilevel.state import State
from bilevel.trials import Response

RULES = "one such as bilevel.rules.Armijo() or Fixed(step=0.1), or use bisls, bisps or fixed"
SOLVERS = (
    "a torch.optim.Optimizer class, a function(parameters) that makes one, or a function "
    "solver(x, y, batches)"
)


@dataclass(frozen=True)
class Method:
    """One outer iteration: inner steps, a hypergradient, an outer step.

    Built by :func:`bisls`, :func:`bisps` and :func:`fixed`.

    Attributes:
        name: for people.   hypergradient: see :class:`bilevel.hypergradients.Hypergradient`.
        direction: (h, moments, beta1) -> the outer direction, shape of x, and new moments.
        outer_rule, inner_rule: how far steps go, see :class:`bilevel.rules.Rule`.
        training: direction and rule of the inner steps where y is trained as networks are, see
            :func:`bilevel.inner.trains`; None: as elsewhere.
        response: on which y a trial is judged, see :class:`bilevel.trials.Trials`.
        inner_solver: instead of steps by ``inner_rule``, see :func:`bisls`; None: those.
        averages: whether the average of the iterates may be the answer where there are batches,
            see :class:`bilevel.average.Average`.
        corrects: whether a y that lags behind y*(x) is brought nearer by a Newton step, and x waits
            for one that comes from far: see :func:`bilevel.lag.corrected` and :meth:`may_wait`.
        fresh: y starts afresh in every iteration, and is brought nearer before the step instead.
        rounds: whether kinks of g that its second derivatives miss are rounded off, see
            :func:`bilevel.kinks.found`.
        outer_batches: of how many the outer loss is the mean, >= 1; 'auto': as many as
            :class:`bilevel.noise.Agreement` says.

    Raises:
        TypeError, ValueError: an attribute is none of these, or an ``inner_solver`` is combined
            with what its steps would have to be known for.
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
    rounds: bool = True
    outer_batches: int | Literal["auto"] = "auto"
    training: tuple[Adam | Steepest, Rule] | None = None

    def __post_init__(self) -> None:
        require.instance("Method", "name", self.name, str, "a string")
        require.made_by(
            "", "hypergradient", self.hypergradient, "estimate", "a hypergradient", HYPERGRADIENTS
        )
        require.function("Method", "direction", self.direction, "a function(g, moments, beta1)", 3)
        for name in ("outer_rule", "inner_rule"):
            rule = getattr(self, name)
            require.made_by("Method", name, rule, "searches", "a rule of steps", RULES)
        if self.training is not None:
            require.pair("Method", "training", self.training, "(Adam(), Armijo(c=0.7)), or None")
            direction, rule = self.training
            require.function("Method", "training", direction, "a function(g, moments, beta1)", 3)
            require.made_by("Method", "training", rule, "searches", "a rule of steps", RULES)
        require.choice("Method", "response", self.response, get_args(Response))
        for name in ("averages", "corrects", "fresh", "rounds"):
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
        """The state at the start. x and y are read, never modified.

        Raises:
            TypeError, ValueError: x or y is no variable, see :class:`bilevel.layout.Layout`.
        """
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

    def is_quiet(self, still: bool, alone: bool) -> bool:
        """Whether F and its gradient can be had as near as is asked, since neither g nor f has
        noise, and a search goes by them."""
        return still and alone and self.follows and self._settles and self.leaps

    def is_alone(self, outer_batch: Any, more: Sequence[Any] | None) -> bool:
        """Whether f is the same in all that is given: no batch, or no other where some are asked
        for; ``more`` as :meth:`step` takes them."""
        asked = self.outer_batches == "auto" and more is not None
        return outer_batch is None or (asked and not more)

    @property
    def follows(self) -> bool:
        """Whether y goes on from one iteration to the next, and a lag of it is seen."""
        return self.corrects and not self.fresh

    @property
    def leaps(self) -> bool:
        """Whether steps may go over kinks: searches that remember them do, upwards as well."""
        return isinstance(self.outer_rule, Armijo) and self.outer_rule.reset == "grow"

    @property
    def whole(self) -> float:
        """What a search goes on from whose first trial is a step of 1."""
        return 1 / self.outer_rule.growth if isinstance(self.outer_rule, Armijo) else 1.0

    def scales(self, moments: Moments) -> Tensor | float:
        """Of the entries of a direction."""
        return self.direction.scales(moments) if isinstance(self.direction, Adam) else 1.0

    def heeded(self, d: Tensor, h: Estimate) -> Tensor:
        """d, or 0 where Polyak steps, which try nothing and have a floor, would go as far along an
        h that points anywhere: where conjugate gradients end farther from solving than zero is."""
        solver: Any = getattr(self.hypergradient, "solver", None)
        heeds = isinstance(self.outer_rule, Polyak) and is_conjugate(solver)
        return torch.where(h.residual > 1, 0.0, d) if heeds and h.residual is not None else d

    def may_wait(self, state: State) -> bool:
        """Whether x has not moved yet, and may stay for another iteration."""
        searches = self.outer_rule.searches(state.k, None)
        return self.follows and searches and state.outer_last is None and state.k < WAITS

    def may_leap(self, state: State) -> bool:
        """Whether a step may be over a kink: where those of late are short."""
        return self.leaps and state.outer_last is not None and state.lengths.shrunk

    def may_stay(self, state: State) -> bool:
        """Whether x may stay for want of a hypergradient, which going on with its system may yet
        give: see :func:`bilevel.lag.is_lost`."""
        solver: Any = getattr(self.hypergradient, "solver", None)
        goes_on = is_conjugate(solver) and solver.warm_start and not self.fresh
        return goes_on and self._settles and state.outer_last is not None

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

        Raises:
            TypeError, ValueError: misuse. Whatever a loss raises.
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
        oracle = make_oracle(problem, *state.layouts, state.kinks or ())
        oracle.require_data(outer_batch, inner_batches[0], "{}_batch", "a batch")
        oracle.cost = replace(state.cost)
        given = outer_batch, inner_batches, hessian_batches, more_outer_batches
        with twice_differentiable():
            state, record = iterate(self, oracle, state, given)
        seconds = state.seconds + time.perf_counter() - start
        return replace(state, seconds=seconds), replace(record, seconds=seconds)
