"""``compile=True``: outer iterations taken in a compiled graph, several to a call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bilevel.attention import twice_differentiable
from bilevel.distributed import Ranks
from bilevel.drawn import Batches
from bilevel.host import failure as why
from bilevel.hypergradients import Implicit
from bilevel.linear import CONCAVE, StochasticNeumann, is_conjugate
from bilevel.method import Method
from bilevel.noise import MOST, averaged, settles
from bilevel.pool import Pool, Room, skeleton
from bilevel.problem import Cost, Oracle, Problem, is_small
from bilevel.randomness import Randomness, all_generators, restore_generators
from bilevel.record import Record
from bilevel.rules import Armijo, Fixed, Move, Polyak
from bilevel.scalars import Scalars
from bilevel.state import State

if TYPE_CHECKING:
    from bilevel.graph import Row  # torch.compile is slow to import

SLOTS = 256  # iterations in one call at most
# where torch 2.13 lends one buffer to several tensors, those of a loop may be written over before
# their last reader: with two Hessian batches results were wrong from the second iteration on
OPTIONS = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,  # a third less compiling; newer than torch 2.4
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
    "force_pointwise_cat": True,  # a view less for each number of a row; a tenth less time
}
WAIT = 0.1  # about the seconds in one call: a key, the bar and the clock wait for its end


class Chunks:
    """Iterations in the graph where they can be, and as the method takes them where not.

    The first iteration of a run is plain, after which the state has all its parts; so are those
    in which it is not known yet whether kinks of g are to be rounded off, those in which x may wait
    for y, those whose batches have other shapes than the first, and those in which a Polyak rule
    measures.

    Args:
        problem: the plain one.
        source: of the batches, with ``next``, ``state_dict`` and ``load_state_dict``.
        tol, most_failures: what ends a run, see :func:`bilevel.solve`.
        singly: one iteration to a call, for someone who looks in between.
    """

    def __init__(
        self,
        method: Method,
        problem: Problem,
        state: State,
        source: Any,
        *,
        tol: float | None,
        most_failures: int,
        singly: bool,
    ) -> None:
        self.method, self.source = method, source
        self.problem, self.compiled = problem, replace(problem, compile=True)
        self.compiled.habit.random = problem.habit.random  # what one has seen, both know
        self.start = state.vectors[1]
        ends = (-1.0 if tol is None else tol, most_failures)
        self.ends = [torch.tensor(end, dtype=torch.float64) for end in ends]
        self.most = 1 if singly else SLOTS
        self.seconds = 0.0  # of one iteration, as last seen
        self._prepared: dict[Any, _Prepared] = {}  # for how the batches are joined
        self.usable = True
        if reason := _unfit(method, problem, state):
            self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        self.compiled.habit.recorded = self.problem.habit.recorded
        self.usable, self.problem = False, self.compiled
        warnings.warn(
            f"compile=True does not serve whole iterations here, because {reason}; going on with "
            f"compiled derivatives alone, to the same result.",
            RuntimeWarning,
            stacklevel=5,
        )

    def __call__(self, state: State, batches: Batches, limit: int) -> tuple[State, list[Record]]:
        """Between 1 and ``limit`` iterations, the first of them on ``batches``."""
        if self.usable and self.problem.habit.recorded:
            self._refuse("a loss asks whether its variables require gradients")
        if self.usable and state.learned.concave > CONCAVE:
            self._refuse(
                "the inner loss is concave in places, where linear systems are solved otherwise"
            )
        if self.usable and self._is_quiet(state, batches):
            self._refuse("neither loss has noise, so that y is brought nearer as often as it takes")
        if self.usable and state.kinks:
            self._refuse("the inner loss has kinks, which are rounded off by calls of Python")
        count = self._count(state, limit)
        if count:
            joined = self._joined(state, batches)
            drawn = Pool(joined.loop, self.source.different())
            fits, ready = drawn.add(batches), self._prepared.get(joined.kind)
            if ready is None:
                ready = self._prepare(state, batches, drawn if fits else None, joined)
            if fits and ready is not None and drawn.form == ready.form:
                if found := self._several(
                    ready, state, joined, drawn, min(count, ready.room.slots)
                ):
                    return found
        state, record = self.method.step(self.problem, state, *batches)
        return state, [record]

    def _is_quiet(self, state: State, batches: Batches) -> bool:
        outer, inner, _, more = batches
        watched = self._joined(state, batches).watched[1]
        still = self.method.is_still(inner[0] is not None, watched)
        return self.method.is_quiet(still, self.method.is_alone(outer, more))

    def _count(self, state: State, limit: int) -> int:
        """How many iterations from here on can be in the graph."""
        early = state.k == 0 or state.q is None or state.kinks is None
        if not self.usable or early or self.method.may_begin(state) or self.method.may_wait(state):
            return 0
        rules = (
            (self.method.outer_rule, state.outer_last),
            (self.method.inner_rule, state.inner_last),
        )
        measuring = [(r, last) for r, last in rules if isinstance(r, Polyak)]
        settling = "auto" in (self.method.outer_batches, self.method.hypergradient.batches)
        limit = min(limit, SLOTS, int(WAIT / self.seconds) if self.seconds else SLOTS)
        for ahead in range(max(1, limit)):
            if any(rule.searches(state.k + ahead, last) for rule, last in measuring):
                return ahead
            if settling and settles(state.k + ahead):
                return ahead + 1
        return max(1, limit)

    @property
    def _implicit(self) -> Implicit:
        assert isinstance(self.method.hypergradient, Implicit)  # or it is unfit
        return self.method.hypergradient

    def _joined(self, state: State, batches: Batches) -> _Joined:
        (m, judges), (count, more) = self.method.wanted(state)
        outers, given = 1 + len(batches[3] or []), len(batches[2] or [None])
        m = averaged(m, judges, outers)
        count, joins = min(count, given), self._implicit.average != 1
        return _Joined(
            (outers > 1, joins and given > 1),
            (outers > m, joins and more > 0 and given > count),
            (m, count if joins else 1),
        )

    def _prepare(
        self, state: State, batches: Batches, drawn: Pool | None, joined: _Joined
    ) -> _Prepared | None:
        """The function and the room for the batches; or a refusal."""
        if drawn is None:
            self._refuse("its batches are not (nests of) tensors of the same shapes")
            return None
        randomness = Randomness(self.start.device)
        before = randomness.state()
        self.method.step(self.problem, state, *batches)  # to see, and for nothing else
        if any(not torch.equal(*pair) for pair in zip(before, randomness.state(), strict=True)):
            randomness.restore(before)
            self._refuse("a loss draws random numbers, which a graph would draw otherwise")
            return None
        from torch._inductor import config

        from bilevel.compiled import compiled  # torch.compile is slow to import
        from bilevel.graph import Iterations

        rows = list(drawn.counts)
        for level, j in ((0, 0), (2, 1)):
            if joined.loop[j]:
                rows[level] = joined.many[j]
                if joined.watched[j]:  # the number may change
                    rows[level] = MOST + 1
        room = drawn.room(rows, self.most)
        firsts = (batches[0], batches[1][0], (batches[2] or [None])[0])
        has = [bool(stacks) for stacks in room.stacks]
        iterations = Iterations(
            method=self.method,
            oracle=Oracle(self.problem, *state.layouts),
            skeletons=(skeleton(firsts[0]), skeleton(firsts[1]), skeleton(firsts[2])),
            counts=(drawn.counts[1] * has[1], drawn.counts[2] * has[2]),
            slots=room.slots,
            steps=len(batches[1]),
            moments=state.moments.m is not None,
            averaged=state.average is not None,
            joins=joined.loop,
            watches=joined.watched,
            alone=self.method.is_alone(batches[0], batches[3]),
            matrix=is_conjugate(self._implicit.solver) and is_small(self.problem.habit, self.start),
        )
        options = {key: value for key, value in OPTIONS.items() if hasattr(config, key)}
        graph = compiled(iterations.__call__, dynamic=False, options=options)
        ready = _Prepared(graph, drawn.form, room)
        self._prepared[joined.kind] = ready
        return ready

    def _several(
        self, ready: _Prepared, state: State, joined: _Joined, drawn: Pool, count: int
    ) -> tuple[State, list[Record]] | None:
        """As many iterations as the graph takes, or None where it cannot be compiled."""
        began = time.perf_counter()
        position = self.source.state_dict(), all_generators(self.start.device)
        asked, wanted = 1, self.method.wanted(state)
        while asked < count:
            asked += 1
            try:
                if not drawn.add(self.source.next(*wanted)):
                    break
            except Exception:  # to come again after those that have their batches
                break
        outcome = self._run(ready, state, joined, drawn)
        if outcome and not outcome[0]:  # the plain iteration is to take it
            outcome = None
        taken = int(outcome[0]) if outcome else 1
        if taken < asked:  # the source must not be ahead of the state
            self.source.load_state_dict(position[0])
            restore_generators(position[1], self.start.device)
            for _ in range(taken - 1):
                self.source.next(*wanted)
        if outcome is None:
            return None
        self.seconds = (time.perf_counter() - began) / taken
        return self._unpack(state, outcome, taken, began, joined)

    def _run(
        self, ready: _Prepared, state: State, joined: _Joined, drawn: Pool
    ) -> tuple[Tensor, ...] | None:
        ready.room.fill(drawn)
        scalars = torch.tensor(Scalars.of(state), dtype=torch.float64)
        average = (None, None) if state.average is None else state.average[:2]
        vectors = [*state.vectors, state.q, *state.moments[:2], *average]
        given = [t for t in vectors if t is not None]
        counts = torch.tensor(drawn.iterations), tuple(map(torch.tensor, joined.many))
        stored = ready.room.stacks, ready.room.places
        try:
            with twice_differentiable(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, of its own parts
                return ready.graph(*counts, *self.ends, self.start, *stored, scalars, given)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self._refuse(f"they cannot be compiled ({type(error).__name__}: {first})")
            return None

    def _unpack(
        self, state: State, outcome: tuple[Tensor, ...], taken: int, began: float, joined: _Joined
    ) -> tuple[State, list[Record]]:
        """The outcome of the graph as a state and records, as the plain path makes them."""
        from bilevel.graph import Row

        _, _, rows, scalars, x, y, q, *rest = outcome
        columns = Row(*rows[:taken].unbind(1))
        spent = time.perf_counter() - began
        records, cost = _records(state, columns, spent, joined.many)
        moments, average = state.moments, state.average
        new = replace(
            state,
            vectors=(x, y),
            q=q,
            moments=moments._replace(m=rest[0], v=rest[1]) if moments.m is not None else moments,
            average=average and average._replace(x=rest[-2], y=rest[-1]),
            cost=cost,
            seconds=state.seconds + spent,
        )
        new = Scalars(*scalars.tolist()).into(new)
        if columns.finite[-1]:
            k = new.k - 1
            new = replace(new, noise=new.noise.settle(k), agreement=new.agreement.settle(k))
        return new, records


def _records(
    state: State, columns: Row, spent: float, many: tuple[int, int]
) -> tuple[list[Record], Cost]:
    """Of the iterations that follow a state, from what the graph reports of them; and what the run
    has cost by then. ``many``: outer and Hessian batches."""
    taken, cost = len(columns.value), replace(state.cost)
    row = type(columns)(*(column.tolist() for column in columns))
    counts = {
        name: getattr(columns, name).long()
        for name in ("outer_trials", "inner_trials", "inner_failures")
    }
    for name in ("gradients", "hessian_products", "loss_evaluations"):  # of the whole run so far
        counts[name] = getattr(cost, name) + getattr(columns, name).cumsum(0).long()
        setattr(cost, name, int(counts[name][-1]))
    whole = {name: column.tolist() for name, column in counts.items()}
    failure: list[str | None] = [None] * taken
    for j, (failed, finite) in enumerate(zip(row.failed, row.finite, strict=True)):
        if failed or not finite:
            move = Move(row.outer_step[j], None, whole["outer_trials"][j], bool(failed))
            failure[j] = why(row.value[j], row.inner_value[j], row.norm[j], bool(finite), move)
    records = Record.several(
        k=range(state.k, state.k + taken),
        outer_loss=row.value,
        inner_loss=row.inner_value,
        hypergrad_norm=row.norm,
        outer_step=row.outer_step,
        inner_step=row.inner_step,
        residual=row.residual,
        lag=row.lag,
        hessian_batches=[many[1]] * taken,
        outer_batches=[many[0]] * taken,
        seconds=[state.seconds + spent * (j + 1) / taken for j in range(taken)],
        failure=failure,
        **whole,
    )
    return records, cost


class _Joined(NamedTuple):
    """Of the outer and of the Hessian batches of an iteration: whether they are joined, in a loop
    of the graph; whether one more judges them; and how many they are."""

    loop: tuple[bool, bool]
    watched: tuple[bool, bool]
    many: tuple[int, int]

    @property
    def kind(self) -> Any:
        """What a graph is made for; any numbers are of one kind."""
        return self.loop, self.watched


class _Prepared(NamedTuple):
    """A graph, the form of the batches of one iteration of it, and the room for several."""

    graph: Callable[..., Any]
    form: Any
    room: Room


def _unfit(method: Method, problem: Problem, state: State) -> str | None:
    """Why the iterations of a method cannot be in one graph; None: they may."""
    hypergradient, rules = method.hypergradient, (method.outer_rule, method.inner_rule)
    device = state.vectors[1].device
    if type(hypergradient) is not Implicit:
        return f"{hypergradient!r} is not Implicit(...)"
    if isinstance(hypergradient.solver, StochasticNeumann) and hypergradient.solver.form != "sum":
        return f"{hypergradient.solver!r} draws a random number"
    if any(type(rule) not in (Armijo, Fixed, Polyak) for rule in rules):
        return f"the step-size rules {rules!r} are not all known to the graph"
    if method.refreshes:
        return "y starts afresh in every iteration and is brought nearer as often as it takes"
    if method.response == "refine":
        return "the response 'refine' takes inner steps inside the search"
    if method.inner_solver is not None:
        return "an inner_solver is a program of its own"
    if problem.project is not None:
        return "a projection is a program of its own"
    if device.type != "cpu":
        return f"the variables are on {device}, and loops of a graph run on the CPU"
    return "several ranks solve the problem" if Ranks(device).size > 1 else None
