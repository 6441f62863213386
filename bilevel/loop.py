"""The only loop of the package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

import torch

from bilevel import checkpoint as files
from bilevel import doubts, kinks, require
from bilevel.data import Cycle, refuse_shared
from bilevel.distributed import Ranks
from bilevel.drawn import Batches
from bilevel.layout import Variable
from bilevel.method import Method
from bilevel.noise import averaged
from bilevel.presets import PRESETS
from bilevel.problem import Draw, Problem, make_oracle
from bilevel.progress import Bar
from bilevel.record import Record, Result
from bilevel.state import State
from bilevel.validate import NotFinite, validated

MAX_FAILURES = 10  # outer searches that fail one after the other before the run gives up


def solve(
    outer: Callable[..., torch.Tensor],
    inner: Callable[..., torch.Tensor],
    x: Variable,
    y: Variable,
    *,
    outer_data: Any = None,
    inner_data: Any = None,
    method: str | Method = "bisls-adam",
    data: Any = None,
    steps: int = 100,
    inner_steps: int = 10,
    warm_start: bool = True,
    project: Callable[[Any], Any] | None = None,
    tol: float | None = None,
    callback: Callable[[State, Record], bool | None] | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    compile: bool = False,
    seed: int | None = None,
) -> Result:
    """min_x f(x, y*(x)) with y*(x) = argmin_y g(x, y), without learning rates.

    Args:
        outer, inner: f and g: ``loss(x, y, batch)``, or ``loss(x, y)`` where that level has no
            data; each returns a 0-dim tensor.
        x, y: where to start. Each a tensor, a nest of dict / list / tuple of floating tensors, or
            a Module, which is called inside the losses as usual (``y(x(images))``). Trees are not
            modified; a Module ends holding the solution.
        outer_data, inner_data: re-iterables of batches (a DataLoader, a list), cycled. Of the
            outer ones an iteration of :func:`bisls` reads up to eight, as their noise asks for;
            second derivatives are of those inner ones that y learns from next.
        method: 'bisls-adam', 'bisls-sgd', 'bisps', 'adam', 'sgd', or an object made by
            :func:`bisls`, :func:`bisps` or :func:`fixed`.
        data: instead of the two, an iterable of (outer_batch, inner_batch) pairs, one per outer
            iteration, for episodic problems.
        steps: outer iterations, >= 0. inner_steps: inner steps in each, >= 1.
        warm_start: False: y, and an optimizer that is the ``inner_solver``, start afresh from the
            given y in every outer iteration; where the inner steps leave y so far from its
            solution that this outweighs an outer step, it is brought nearer before the step.
        project: to the feasible set of x, applied to every trial (a Module: dict of parameters).
        tol: stop when the norm of the hypergradient is at most this.
        callback: called with (state, record) after every iteration; True stops. A Module has its
            present values once ``state.x`` or ``state.y`` is read.
        progress: a bar on stderr; None: where that is a terminal.
        checkpoint: path of a file that is rewritten, atomically, every ``checkpoint_every``
            iterations and at the end; with ``resume``, a run goes on from it if it exists, to the
            same result bit for bit (to rounding, where batches of several sizes meet ``compile``);
            without, an old file is kept as ``<path>.old``. A run that ended by ``tol`` has ended;
            one that a callback stopped goes on.
        compile: take whole iterations in a graph of torch.compile, several to a call: for long
            runs of small problems, since compiling takes a minute. See docs/speed.md; falls
            back, with a warning.
        seed: of torch's generators. Same seed, same machine, same bits.

    Where ``torch.distributed`` is initialised with several ranks, they solve one problem, whose
    losses are the means of the ranks' losses: every rank calls solve alike and passes its own
    shard as ``outer_data`` and ``inner_data``, in batches of equal sizes. The start is that of
    rank 0, the seed of rank r is ``seed + r``, every rank returns the same result, rank 0 shows
    the bar and writes the checkpoint. See docs/distributed.md.

    Returns:
        A :class:`Result`: x, y, reason, history, state. Numerical failure (a loss that is not
        finite, a search that keeps failing) and an interrupt from the keyboard end the run with
        their reason and the last good x and y.

    Raises:
        TypeError, ValueError: misuse, before any work is lost.
        OSError: a checkpoint that cannot be written, at the start.
        Whatever a loss or the data raises in the first iteration, and a callback in any.
        RuntimeError: ranks that cannot be reached, or have come to different points.

    Example:
        >>> import torch, bilevel
        >>> A, b = torch.eye(2), torch.tensor([1.0, 2.0])
        >>> inner = lambda x, y: ((A @ y - b) ** 2).sum() + x.exp() * (y**2).sum()
        >>> outer = lambda x, y: ((y - torch.tensor([0.5, 1.0])) ** 2).sum()
        >>> result = bilevel.solve(outer, inner, torch.tensor(-2.0), torch.zeros(2), steps=50)
        >>> abs(float(result.x)) < 1e-2  # y* = b / (1 + e^x) meets the target at x = 0
        True

    Reference: Fan et al. 2023 (arXiv 2305.18666).
    """
    method = _method(method)
    _check(
        steps=steps,
        inner_steps=inner_steps,
        warm_start=warm_start,
        tol=tol,
        callback=callback,
        progress=progress,
        checkpoint=checkpoint,
        resume=resume,
        checkpoint_every=checkpoint_every,
        compile=compile,
        seed=seed,
        twice=data is not None and (outer_data is not None or inner_data is not None),
    )
    # plain numbers, of NumPy's, for the words and the file
    steps, inner_steps, checkpoint_every = map(index, (steps, inner_steps, checkpoint_every))
    tol = None if tol is None else float(tol)
    problem = Problem(outer, inner, project)
    warm_start = warm_start and not method.fresh
    if not warm_start:
        # where every pair of batches has a y of its own, the mean of several is nobody's
        method = replace(method, fresh=True, averages=method.averages and data is None)
    state = method.init(x, y)
    ranks = Ranks(state.vectors[1].device)
    if seed is not None:
        torch.manual_seed(index(seed) + ranks.rank)
    oracle = make_oracle(problem, *state.layouts)
    if data is None:
        oracle.require_data(outer_data, inner_data)
    source = _Source(outer_data, inner_data, data, inner_steps, ranks)
    if checkpoint is not None:
        source.refuse_shared()
    state = replace(state, vectors=ranks.start(state.layouts, state.vectors))
    start = state.vectors[1]

    saver = files.Saver(checkpoint, method, problem.habit, source, ranks)
    history: list[Record] = []
    if resume and saver.exists():
        state, history = saver.restore(state)
    saver.note(state, history)
    saver.prepare()
    batches = draw = None
    take: _Take = partial(_singly, method, problem)
    if compile:
        from bilevel.chunks import Chunks  # torch.compile is slow to import

        begin = replace(state, vectors=(state.vectors[0], start))
        ends: dict[str, Any] = {"tol": tol, "most_failures": MAX_FAILURES}
        take = Chunks(method, problem, begin, source, **ends, singly=callback is not None)
    ended = _reached(tol, history)  # by the run that is resumed
    bar = Bar(steps, progress if ranks.rank == 0 else False, state.k)
    try:
        if state.k == 0 and steps > 0:
            batches = ranks.read(partial(source.next, *method.wanted(state)))
            rules = method.outer_rule, method.inner_rule
            searches = any(rule.searches(0, None) for rule in rules)
            first = batches[0], batches[1][0]
            try:
                feasible = validated(oracle, *state.vectors, *first, searches=searches)
                state = replace(state, vectors=(feasible, start), cost=oracle.cost)
            except NotFinite as error:  # which ends the run, in its first iteration
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        while state.k < steps and not ended:
            before = begin = state
            if not warm_start:
                begin = replace(state, vectors=(state.vectors[0], start), solver=None)
            limit = steps - state.k
            if checkpoint is not None:
                limit = min(limit, checkpoint_every - state.k % checkpoint_every)
            try:
                if batches is None:
                    batches = ranks.read(partial(source.next, *method.wanted(state)))
                draw = Draw(batches[1][0])
                state, records = take(begin, batches, limit)
            except Exception as error:
                if not history or ranks.parted(error):
                    raise  # the other ranks wait elsewhere, and end when this one does
                # hours of work are not thrown away for one bad batch
                ended = f"stopped at iteration {state.k}: {type(error).__name__}: {error}"
                warnings.warn(
                    f"{ended}; the result holds the last good point.", RuntimeWarning, stacklevel=2
                )
                break
            batches, record = None, records[-1]  # the one that may end the run
            history += records
            if len(records) == 1 and record.failure is not None and state.failures == 0:
                # the state is that at its beginning, where y may be the start
                state = replace(state, vectors=before.vectors, solver=before.solver)
            saver.note(state, history)
            bar.update(record)
            ended = _failed(state, history)
            if not ended and callback is not None and _stops(ranks, callback, state, record):
                ended = f"the callback stopped the run at iteration {record.k}"
            ended = ended or _reached(tol, history)
            if not ended and state.k % checkpoint_every == 0:
                saver.write()
        else:
            if draw is not None:
                kinks.tell(method, oracle, state, draw, history, ranks)
    except KeyboardInterrupt:
        if ranks.size > 1:
            raise  # it met each rank at another place
        ended = f"interrupted from the keyboard at iteration {state.k}"
    finally:
        bar.close()
    saver.write()
    doubts.tell(history, method.corrects)
    kinks.tell_rounded(state)
    return Result(state.x, state.y, ended or _all_taken(state.k, steps), history, state)


# (state, batches, limit) -> the state after between 1 and ``limit`` iterations, their records
_Take = Callable[[State, Batches, int], tuple[State, list[Record]]]


def _singly(
    method: Method, problem: Problem, state: State, batches: Batches, limit: int
) -> tuple[State, list[Record]]:
    state, record = method.step(problem, state, *batches)
    return state, [record]


def _check(
    *,
    steps: Any,
    inner_steps: Any,
    warm_start: Any,
    tol: Any,
    callback: Any,
    progress: Any,
    checkpoint: Any,
    resume: Any,
    checkpoint_every: Any,
    compile: Any,
    seed: Any,
    twice: bool,
) -> None:
    """Refuse arguments of :func:`solve` that are none; ``twice``: data is given in both ways."""
    for name, count, least in (
        ("steps", steps, 0),
        ("inner_steps", inner_steps, 1),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        require.whole("", name, count, least)
    for name, value in (("warm_start", warm_start), ("resume", resume)):
        require.flag("", name, value)
    if progress is not None:
        require.flag("", "progress", progress)
    if tol is not None:
        require.number("", "tol", tol, "[0, inf)", ", or None to take all steps")
    if seed is not None:
        require.whole("", "seed", seed, least=None)
    if callback is not None:
        require.function("", "callback", callback, "a function(state, record)", 2)
    if checkpoint is not None:
        require.path("checkpoint", checkpoint)
    if twice:
        raise ValueError(
            "data was given together with outer_data or inner_data, which it replaces: it yields "
            "(outer_batch, inner_batch) pairs; leave out data, or the two."
        )
    if resume and checkpoint is None:
        raise ValueError("resume=True without a checkpoint: pass checkpoint='path/to/file'.")
    require.flag("", "compile", compile)


def _all_taken(k: int, steps: int) -> str:
    """Why a run of ``steps`` steps ends that nothing else has ended, after k iterations."""
    if k <= steps:
        return f"all {steps} steps were taken"
    return (
        f"no step was taken: the checkpoint already has {k} iterations, and steps = {steps} counts "
        f"those as well"
    )


def _failed(state: State, history: list[Record]) -> str | None:
    """Why a run ends after the last of these iterations, if it has failed for good."""
    record = history[-1]
    if record.failure is None or 0 < state.failures < MAX_FAILURES:
        return None
    reason = f"stopped at iteration {record.k}: {record.failure}"
    if not state.failures:
        return reason
    return (
        f"{reason}, {state.failures} iterations in a row, with the hypergradient's norm at "
        f"{record.hypergrad_norm:.3g} of {history[0].hypergrad_norm:.3g} at first"
    )


def _reached(tol: float | None, history: list[Record]) -> str | None:
    """Why a run ends after the last of these iterations, if it is tol that ends it."""
    if tol is None or not history or history[-1].failure is not None:
        return None
    norm = history[-1].hypergrad_norm
    if not norm <= tol:
        return None
    return f"the hypergradient's norm {norm:.3g} is at most tol = {tol:g}"


def _stops(
    ranks: Ranks, callback: Callable[[State, Record], bool | None], state: State, record: Record
) -> bool:
    """Whether the callback of any rank says so."""

    def said() -> bool:
        answer: Any = callback(state, record)
        if getattr(answer, "shape", None) == ():  # a comparison of tensors or NumPy scalars
            answer = answer.item()
        if answer is not None and not isinstance(answer, bool):
            raise TypeError(
                f"callback returned {require.shown(answer)} ({type(answer).__name__}), of which it "
                f"is unclear whether to stop; return True to stop, False or None to go on."
            )
        return bool(answer)

    return any(ranks.numbers(said))


class _Source:
    """The batches of one outer iteration, as :meth:`bilevel.method.Method.step` takes them.

    What only judges, or is differentiated twice, is looked at ahead of its turn: where the order is
    always the same, a batch that has no other turn would never be learned from.
    """

    def __init__(self, outer: Any, inner: Any, pairs: Any, steps: int, ranks: Ranks) -> None:
        self._cycles = {
            name: Cycle(data, name)
            for name, data in (("outer_data", outer), ("inner_data", inner), ("data", pairs))
            if data is not None
        }
        self._steps, self._alone = steps, ranks.size == 1
        # how many batches a pass has, and how many can be different ones, on the rank that has the
        # most: those with fewer give some again
        self._lengths, self._different = (
            {
                name: max(ranks.numbers(partial(getattr, cycle, count)))
                for name, cycle in self._cycles.items()
            }
            for count in ("length", "different")
        )

    def next(self, outer: tuple[int, int], hessian: tuple[int, int]) -> Batches:
        """As many batches for f, and for the second derivatives of g, as a method wants: those
        that it is to average, and those that tell whether they are enough."""
        if "data" in self._cycles:
            first, inner = _pair(self._cycles["data"].next())
            alone = self._lengths["data"] == 1 and first is not None
            return first, [inner] * self._steps, [inner], [] if alone else None
        first, more = None, None
        if "outer_data" in self._cycles:
            cycle, length = self._cycles["outer_data"], self._lengths["outer_data"]
            count, judges = outer
            first, *more = cycle.take(averaged(count, judges, length))
            if judges and length > 1:  # its turn comes in the next iteration
                judge = cycle.peek()
                if judge is None and not self._alone:
                    cycle.next()  # raises, as every rank must, or none
                more = [*more, judge] if judge is not None else more or None
        if "inner_data" not in self._cycles:
            return first, [None] * self._steps, None, more
        cycle = self._cycles["inner_data"]
        inner = cycle.take(self._steps)
        # theirs, too: y will learn from them
        drawn = cycle.look(1 if self._lengths["inner_data"] == 1 else sum(hessian))
        if not self._alone:  # ranks need as many each, to compute the same things
            drawn = drawn[: self._different["inner_data"]]
        elif len(drawn) > 1:
            drawn = list({id(batch): batch for batch in drawn}.values())
        return first, inner, drawn, more

    def different(self) -> tuple[int, int, int]:
        """How many outer, inner and Hessian batches can be different ones, as of :class:`Cycle`."""
        pairs = self._different.get("data", 1)
        inner = self._different.get("inner_data", pairs)
        return self._different.get("outer_data", pairs), inner, inner

    def refuse_shared(self) -> None:
        """Refuse data that can tell one position only, but is read at two."""
        refuse_shared(self._cycles.values())

    def state_dict(self) -> dict[str, Any]:
        return {name: cycle.state_dict() for name, cycle in self._cycles.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if sorted(state) != sorted(self._cycles):
            raise ValueError(
                f"the checkpoint was written with {', '.join(sorted(state)) or 'no data'}, but "
                f"{', '.join(sorted(self._cycles)) or 'no data'} was given; resume with the data "
                f"of the interrupted run."
            )
        for name, cycle in self._cycles.items():
            cycle.load_state_dict(state[name])


def _pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(
            f"data gave a {type(pair).__name__}, but must give pairs (outer_batch, inner_batch); "
            f"use outer_data and inner_data for two independent series of batches."
        )
    return pair[0], pair[1]


def _method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        require.choice("", "method", method, list(PRESETS))
        return PRESETS[method]()
    names = ", ".join(map(repr, PRESETS))
    raise TypeError(
        f"method={require.shown(method)} is {require.kind(method)}, neither a name nor a method. "
        f"Give one of {names}, or one built by bilevel.bisls(...), bisps(...) or fixed(...)."
    )
