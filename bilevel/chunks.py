"""``compile=True``: outer iterations taken in a compiled graph, several to a call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.average import Average
from bilevel.distributed import Ranks
from bilevel.hypergradients import Implicit
from bilevel.layout import leaves, rebuild
from bilevel.linear import CONCAVE, ConjugateGradient, Learned, StochasticNeumann
from bilevel.method import Batches, Method, State, _failure
from bilevel.noise import MOST, Agreement, Noise, averaged, settles
from bilevel.problem import Oracle, Problem, is_small
from bilevel.randomness import Randomness, all_generators, restore_generators
from bilevel.record import Record
from bilevel.rules import Armijo, Fixed, Moments, Move, Polyak

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
ROOM = 2**26  # bytes of batches in one call at most
WAIT = 0.1  # about the seconds in one call: a key, the bar and the clock wait for its end


class Chunks:
    """Iterations in the graph where they can be, and as the method takes them where not.

    The first iteration of a run is plain, after which the state has all its parts; so are those
    in which x may wait for y, those whose batches have other shapes than the first, and those in
    which a Polyak rule measures.

    Args:
        problem: the plain one.
        source: of the batches, with ``next``, ``state_dict`` and ``load_state_dict``.
        fresh: whether y starts at that of ``state`` in every iteration.
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
        fresh: bool,
        tol: float | None,
        most_failures: int,
        singly: bool,
    ) -> None:
        self.method, self.source = method, source
        self.problem, self.compiled = problem, replace(problem, compile=True)
        self.fresh, self.start = fresh, state.vectors[1]
        ends = (-1.0 if tol is None else tol, most_failures)
        self.ends = [torch.tensor(end, dtype=torch.float64) for end in ends]
        self.most = 1 if singly else SLOTS
        self.seconds = 0.0  # of one iteration, as last seen
        self._prepared: dict[Any, _Prepared] = {}  # for how the batches are joined
        self.usable = True
        if reason := _unfit(method, problem, state):
            self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        self.usable, self.problem = False, self.compiled
        warnings.warn(
            f"compile=True does not serve whole iterations here, because {reason}; going on with "
            f"compiled derivatives alone, to the same result.",
            RuntimeWarning,
            stacklevel=5,
        )

    def __call__(self, state: State, batches: Batches, limit: int) -> tuple[State, list[Record]]:
        """Between 1 and ``limit`` iterations, the first of them on ``batches``."""
        if self.usable and state.learned.concave > CONCAVE:
            self._refuse(
                "the inner loss is concave in places, where linear systems are solved otherwise"
            )
        count = self._count(state, limit)
        if count:
            joined = self._joined(state, batches)
            form, tensors = _parts(batches, joined)
            ready = self._prepared.get(joined.kind)
            if ready is None:
                ready = self._prepare(state, batches, form, tensors, joined)
            if ready is not None and form == ready.form:
                if found := self._several(ready, state, joined, tensors, min(count, ready.slots)):
                    return found
        state, record = self.method.step(self.problem, state, *batches)
        return state, [record]

    def _count(self, state: State, limit: int) -> int:
        """How many iterations from here on can be in the graph."""
        if not self.usable or state.k == 0 or state.q is None or self.method.may_wait(state):
            return 0
        rules = (
            (self.method.outer_rule, state.outer_last),
            (self.method.inner_rule, state.inner_last),
        )
        measuring = [(r, last) for r, last in rules if isinstance(r, Polyak)]
        settling = max(state.noise.terms, state.agreement.terms) > 0
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
        self, state: State, batches: Batches, form: Any, tensors: Any, joined: _Joined
    ) -> _Prepared | None:
        """The function and the room for the batches; or a refusal."""
        if form is None:
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

        rows = [len(level) for level in tensors]
        for level, j in ((0, 0), (2, 1)):
            if joined.loop[j]:
                rows[level] = joined.many[j]
                if joined.watched[j]:  # the number may change
                    rows[level] = MOST + 1
        heads = [level[0] if level else () for level in tensors]
        room = sum(n * t.nbytes for n, head in zip(rows, heads, strict=True) for t in head)
        slots = max(1, min(self.most, ROOM // max(1, room)))
        stacks = [
            [t.new_empty(slots * n, *t.shape) for t in head]
            for n, head in zip(rows, heads, strict=True)
        ]
        firsts = (batches[0], batches[1][0], (batches[2] or [None])[0])
        iterations = Iterations(
            self.method,
            Oracle(self.problem, *state.layouts),
            tuple(_skeleton(batch) for batch in firsts),
            (len(tensors[1]), len(tensors[2])),
            slots,
            len(batches[1]),
            state.moments.m is not None,
            state.average is not None,
            self.fresh,
            joined.loop,
            joined.watched,
            self.method.is_alone(batches[0], batches[3]),
            isinstance(self._implicit.solver, ConjugateGradient)
            and is_small(self.problem.habit, self.start),
        )
        options = {key: value for key, value in OPTIONS.items() if hasattr(config, key)}
        graph = compiled(iterations.__call__, dynamic=False, options=options)
        ready = _Prepared(graph, form, stacks, slots)
        self._prepared[joined.kind] = ready
        return ready

    def _several(
        self, ready: _Prepared, state: State, joined: _Joined, first: Any, count: int
    ) -> tuple[State, list[Record]] | None:
        """As many iterations as the graph takes, or None where it cannot be compiled."""
        began = time.perf_counter()
        position = self.source.state_dict(), all_generators(self.start.device)
        drawn, asked, wanted = [first], 1, self.method.wanted(state)
        while len(drawn) < count:
            asked += 1
            try:
                form, tensors = _parts(self.source.next(*wanted), joined)
            except Exception:  # to come again after those that have their batches
                break
            if form != ready.form or [*map(len, tensors)] != [*map(len, first)]:
                break
            drawn.append(tensors)
        outcome = self._run(ready, state, joined, drawn)
        if outcome and not outcome[0]:  # g is concave, of which the plain iteration will tell
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
        self, ready: _Prepared, state: State, joined: _Joined, drawn: Sequence[Any]
    ) -> tuple[Tensor, ...] | None:
        for level, stacks in enumerate(ready.stacks):
            for j, stack in enumerate(stacks):
                rows = [batch[j] for iteration in drawn for batch in iteration[level]]
                torch.stack(rows, out=stack[: len(rows)])
        average, moments = state.average, state.moments
        lasts = [math.nan if t is None else t for t in (state.outer_last, state.inner_last)]
        terms, gain = (average.terms, average.gain) if average else (0, 0.0)
        known = state.noise.level, state.noise.terms, *state.agreement[1:], *state.learned
        scalars = torch.tensor(
            [state.k, *lasts, moments.n, terms, gain, state.failures, *known], dtype=torch.float64
        )
        vectors = [*state.vectors, state.q, moments.m, moments.v, *(average or (None,))[:2]]
        given = [t for t in vectors if t is not None]
        counts = torch.tensor(len(drawn)), tuple(map(torch.tensor, joined.many))
        try:
            with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, of its own parts
                return ready.graph(*counts, *self.ends, self.start, ready.stacks, scalars, given)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self._refuse(f"they cannot be compiled ({type(error).__name__}: {first})")
            return None

    def _unpack(
        self, state: State, outcome: tuple[Tensor, ...], taken: int, began: float, joined: _Joined
    ) -> tuple[State, list[Record]]:
        """The outcome of the graph as a state and records, as the plain path makes them."""
        from bilevel.graph import SCALARS, Row

        _, _, rows, scalars, x, y, q, *rest = outcome
        k, outer_last, inner_last, n, terms, gain, failures, *known = scalars.tolist()
        noise, noises, signal, unlike, agreed, concave, halvings = known
        assert len(SCALARS) == scalars.numel()
        moments = state.moments
        if moments.m is not None:
            moments = Moments(rest[0], rest[1], int(n))
        average = state.average and Average(rest[-2], rest[-1], int(terms), gain)
        cost = replace(state.cost)
        spent = time.perf_counter() - began
        records = []
        for j, values in enumerate(rows[:taken].tolist()):
            row = Row(*values)
            cost.gradients += int(row.gradients)
            cost.hessian_products += int(row.hessian_products)
            cost.loss_evaluations += int(row.loss_evaluations)
            failure, trials = None, int(row.outer_trials)
            if row.failed or not row.finite:
                move = Move(row.outer_step, None, trials, bool(row.failed))
                failure = _failure(row.value, row.inner_value, row.norm, bool(row.finite), move)
            records.append(
                Record(
                    k=state.k + j,
                    outer_loss=row.value,
                    inner_loss=row.inner_value,
                    hypergrad_norm=row.norm,
                    outer_step=row.outer_step,
                    inner_step=row.inner_step,
                    outer_trials=trials,
                    inner_trials=int(row.inner_trials),
                    inner_failures=int(row.inner_failures),
                    residual=row.residual,
                    hessian_batches=joined.many[1],
                    outer_batches=joined.many[0],
                    gradients=cost.gradients,
                    hessian_products=cost.hessian_products,
                    loss_evaluations=cost.loss_evaluations,
                    seconds=state.seconds + spent * (j + 1) / taken,
                    failure=failure,
                )
            )
        new = State(
            state.layouts,
            (x, y),
            int(k),
            None if math.isnan(outer_last) else outer_last,
            None if math.isnan(inner_last) else inner_last,
            moments,
            q,
            average,
            state.solver,
            cost,
            state.seconds + spent,
            int(failures),
            Noise(state.noise.batches, noise, int(noises)).settle(int(k) - 1),
            Agreement(state.agreement.batches, signal, unlike, int(agreed)).settle(int(k) - 1),
            Learned(concave, int(halvings)),
        )
        return new, records


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
    stacks: list[list[Tensor]]
    slots: int


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
    if method.response == "refine":
        return "the response 'refine' takes inner steps inside the search"
    if method.inner_solver is not None:
        return "an inner_solver is a program of its own"
    if problem.project is not None:
        return "a projection is a program of its own"
    if device.type != "cpu":
        return f"the variables are on {device}, and loops of a graph run on the CPU"
    return "several ranks solve the problem" if Ranks(device).size > 1 else None


def _parts(batches: Batches, joined: _Joined) -> tuple[Any, list[list[Sequence[Tensor]]]]:
    """The form of one iteration's batches, which others must have as well to be stacked with it,
    and the tensors: of each level, of each of its batches. None where there is something else.
    Any number of batches that are joined are of one form."""
    outer, inner, hessian, more = batches
    if len(inner) > 1 and all(batch is inner[0] for batch in inner):
        inner = inner[:1]
    levels = [outer, *(more or [])], inner, hessian or [None]
    form, found = [], []
    for level, loop in zip(levels, (joined.loop[0], False, joined.loop[1]), strict=True):
        first, tensors = None, []
        for batch in level:  # plain statements: this is done in every iteration
            kind, ts = _tensors(batch)
            for t in ts:
                kind += (t.shape, t.dtype, t.device)
            if not kind or kind != (first or kind):
                return None, []
            first = kind
            if ts:
                tensors.append(ts)
        form.append((0 if loop else len(level), first))
        found.append(tensors)
    return form, found


def _tensors(batch: Any) -> tuple[tuple[Any, ...], Sequence[Tensor]]:
    """(its structure, its tensors) of a batch; ((), ...) where it holds anything else."""
    if batch is None:
        return (None,), ()
    if type(batch) is tuple or type(batch) is list:  # the usual ones, at once
        for t in batch:
            if not isinstance(t, Tensor):
                break
        else:
            return (type(batch), len(batch)), batch
    pairs = list(leaves(batch, ""))
    tensors = [leaf for _, leaf in pairs]
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        return (), ()
    return (type(batch), tuple(path for path, _ in pairs)), tensors


def _skeleton(batch: Any) -> Any:
    return None if batch is None else rebuild(batch, iter([None] * len(list(leaves(batch, "")))))
