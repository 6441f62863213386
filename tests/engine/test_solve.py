"""solve and the step level: structures, counters, history, ends, and the progress bar."""

import io
import math
import sys
from collections import Counter, OrderedDict
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import bilevel
from bilevel import ConjugateGradient, Implicit, Problem, Unrolled
from bilevel.loop import _Source
from bilevel.problem import Pullback
from tests.engine import oracles
from tests.tables import METHODS, NESTED, QUADRATIC, RIDGES, Weights, flat, leaves, t

FIELDS = (
    "k outer_loss inner_loss hypergrad_norm outer_step inner_step outer_trials inner_trials "
    "residual gradients hessian_products loss_evaluations seconds"
).split()


def run(case=RIDGES[0], **options):
    return bilevel.solve(case.outer, case.inner, case.x, case.y, **{"steps": 4, **options})


def numbers(result):
    """The history without the clock."""
    return [{k: v for k, v in r.asdict().items() if k != "seconds"} for r in result.history]


def same(a, b):
    """Two results are equal bit for bit."""
    assert repr(numbers(a)) == repr(numbers(b))
    for p, q in ((a.x, b.x), (a.y, b.y)):
        assert all(torch.equal(u, v) for u, v in zip(leaves(p), leaves(q), strict=True))


# -- structures -----------------------------------------------------------------------------------

TREES = {
    "tensor": lambda d: torch.tensor([0.3, -0.2], dtype=d),
    "scalar": lambda d: torch.tensor(0.3, dtype=d),
    "dict": lambda d: {"a": torch.ones(2, 2, dtype=d), "b": [torch.tensor(0.1, dtype=d)]},
    "named": lambda d: Weights(torch.full((2, 1), 0.2, dtype=d), torch.zeros(1, dtype=d)),
    "ordered": lambda d: OrderedDict(z=torch.ones(1, dtype=d), a=torch.zeros(3, dtype=d)),
    "tuple": lambda d: (torch.ones(2, dtype=d), (torch.zeros((), dtype=d),), []),
    "expanded": lambda d: torch.tensor([0.5], dtype=d).expand(3),
    "transposed": lambda d: torch.arange(6, dtype=d).reshape(2, 3).T / 10,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", TREES)
def test_structure_type_and_inputs(kind, dtype):
    x, y = TREES[kind](dtype), TREES[kind](dtype)
    before = [leaf.clone() for leaf in leaves(x) + leaves(y)]

    def inner(x, y):
        assert type(x) is type(y)
        return ((flat(y) - 2 * flat(x).sin()) ** 2).sum()

    def outer(x, y):
        return ((flat(y) - 0.7) ** 2).sum() + 0.1 * (flat(x) ** 2).sum()

    result = bilevel.solve(outer, inner, x, y, steps=5)
    for found, given in ((result.x, x), (result.y, y)):
        assert type(found) is type(given)
        if isinstance(given, dict):
            assert list(found) == list(given)
        got = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves(found)]
        assert got == [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves(given)]
        assert not any(leaf.requires_grad for leaf in leaves(found))
    now = leaves(x) + leaves(y)
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert result.history[-1].outer_loss < result.history[0].outer_loss
    storage = {leaf.data_ptr() for leaf in now if leaf.numel()}
    assert not storage & {leaf.data_ptr() for leaf in leaves(result.x) if leaf.numel()}


def test_leaves_of_two_types_keep_theirs():
    x = {"w": torch.ones(2), "b": torch.zeros(1, dtype=torch.float64)}

    def inner(x, y):
        assert (x["w"].dtype, x["b"].dtype) == (torch.float32, torch.float64)
        return ((y - x["w"].double().sum() - x["b"]) ** 2).sum()

    result = bilevel.solve(lambda x, y: ((y - 1) ** 2).sum(), inner, x, t([0.0, 1.0]), steps=5)
    assert (result.x["w"].dtype, result.x["b"].dtype) == (torch.float32, torch.float64)


def test_inputs_that_require_gradients():
    x, y = t([0.5]).requires_grad_(), t([0.1]).requires_grad_()
    result = bilevel.solve(
        lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum(), x, y, steps=3
    )
    assert x.grad is None and y.grad is None and float(x.detach()) == 0.5
    assert not result.x.requires_grad
    with torch.no_grad():  # and a caller without gradients hinders nothing
        again = bilevel.solve(
            lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum(), x, y, steps=3
        )
    assert torch.equal(again.x, result.x)


# -- solve is the loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_solve_is_a_loop_over_the_step_level(name):
    case, steps = QUADRATIC if "bis" in name else RIDGES[0], 5
    method = METHODS[name]()
    result = run(case, method=method, steps=steps, inner_steps=4)
    problem, state = Problem(case.outer, case.inner), method.init(case.x, case.y)
    # the first look: a gradient of each loss, and where steps are searched whether values and
    # gradients belong together
    searches = method.outer_rule.searches(0, None) or method.inner_rule.searches(0, None)
    history, first = [], (6, 18) if searches else (2, 0)
    for _ in range(steps):
        state, record = method.step(problem, state, None, 4)
        history.append(record)
    assert torch.equal(result.x, state.x) and torch.equal(result.y, state.y)
    for a, b in zip(result.history, history, strict=True):
        a, b = a.asdict(), b.asdict()
        for what, cost in zip(("gradients", "loss_evaluations"), first, strict=True):
            assert a.pop(what) == b.pop(what) + cost
        del a["seconds"], b["seconds"]
        assert repr(a) == repr(b)


def test_solve_is_a_loop_with_batches():
    """The order of the batches: inner steps, and those of the next ones for the Hessian; cycled."""

    def inner(x, y, batch):
        return ((y - batch * x) ** 2).sum()

    def outer(x, y, batch):
        return ((y - batch) ** 2).sum() + 0.01 * (x**2).sum()

    inner_data, outer_data = [t(1.0 + j / 7) for j in range(7)], [t(0.5), t(0.8)]
    x, y = t([0.5, 2.0]), t([0.0, 0.0])
    for name in ("bisls-adam", "bisls-sgd", "bisps"):
        method = bilevel.loop.PRESETS[name]()
        result = bilevel.solve(
            outer,
            inner,
            x,
            y,
            inner_data=inner_data,
            outer_data=outer_data,
            method=name,
            steps=6,
            inner_steps=3,
        )
        problem, state, at = Problem(outer, inner), method.init(x, y), 0
        for k in range(6):
            taken = [inner_data[(at + j) % 7] for j in range(5)]
            at += 3
            more = [outer_data[(k + 1) % 2]]
            state, _ = method.step(problem, state, outer_data[k % 2], taken[:3], taken[3:], more)
        assert torch.equal(result.x, state.x) and torch.equal(result.y, state.y)


@pytest.mark.parametrize("count", [11, 12, 13])
def test_y_learns_from_every_batch(count):
    """Ten steps and two for the Hessian are twelve: the last two of a list of as many as that would
    have no other turn."""
    stepped = []

    def record(x, y, batches):
        stepped.extend(batches)
        return y - 0.02 * (y - x)

    for method in (bilevel.fixed(inner_solver=record), bilevel.bisls(inner_solver=record)):
        stepped.clear()
        bilevel.solve(
            lambda x, y: (y - 1) ** 2,
            lambda x, y, j: 0.5 * (y - x - j) ** 2,
            *(t(0.0), t(0.0)),
            **{"inner_data": list(range(count)), "steps": count, "method": method},
        )
        assert [stepped.count(j) for j in range(count)] == [10] * count


def test_pairs():
    """data=: both levels of an iteration see one episode, and every inner step the same batch."""
    seen = []

    def inner(x, y, batch):
        seen.append(("inner", batch[0]))
        return ((y - batch[1] * x) ** 2).sum()

    def outer(x, y, batch):
        seen.append(("outer", batch[0]))
        return ((y - batch[1]) ** 2).sum()

    episodes = [(("o", t(1.0 + j)), ("i", t(2.0 - j / 3))) for j in range(3)]
    episodes = [((j, o[1]), (j, i[1])) for j, (o, i) in enumerate(episodes)]
    order = []

    def callback(state, record):
        order.append({j for _, j in seen})
        seen.clear()

    bilevel.solve(
        outer,
        inner,
        t([1.0]),
        t([0.0]),
        data=episodes,
        steps=5,
        callback=callback,
        warm_start=False,
    )
    assert order == [{0}, {1}, {2}, {0}, {1}]


@pytest.mark.parametrize("compile", [False, True])
def test_a_method_with_a_fresh_y_is_one_without_a_warm_start(compile):
    def solve(method, **options):
        return bilevel.solve(
            lambda x, y: ((y - 1) ** 2).sum() + 0.1 * (x**2).sum(),
            lambda x, y: ((y - x) ** 2).sum() + (y**4).sum(),
            *(t([1.0, -2.0]), t([3.0, 0.5])),
            **{"method": method, "steps": 6, "inner_steps": 2, "compile": compile, **options},
        )

    method = bilevel.fixed("sgd", 0.1, 0.05)
    fresh = solve(replace(method, fresh=True))
    assert torch.equal(fresh.x, solve(method, warm_start=False).x)
    assert not torch.allclose(fresh.x, solve(method).x, rtol=1e-3)


def test_fresh_iterator_per_pass():
    """Data is iterated anew in each pass, so a shuffling loader shuffles again."""
    passes = []

    class Data:
        def __iter__(self):
            passes.append(len(passes))
            return iter([t(1.0), t(2.0)])

    bilevel.solve(
        lambda x, y, b: ((y - b) ** 2).sum(),
        lambda x, y: ((y - x) ** 2).sum(),
        t([0.0]),
        t([0.0]),
        outer_data=Data(),
        method="sgd",  # of one batch in each iteration
        steps=5,
        inner_steps=1,
    )
    assert passes == [0, 1, 2]


# -- determinism and counting ---------------------------------------------------------------------


def noisy(case):
    def inner(x, y):
        keep = torch.nn.functional.dropout(torch.ones(len(case.Y), dtype=torch.float64), 0.3)
        return case.inner(x, keep * y) + 0.1 * (y**2).sum()

    return case.outer, inner


@pytest.mark.parametrize("name", ["bisls-adam", "bisls-sgd", "bisps", "bisls-adam unrolled"])
def test_same_seed_same_bits(name):
    case = RIDGES[0]
    outer, inner = noisy(case)
    results = [
        bilevel.solve(outer, inner, case.x, case.y, method=METHODS[name](), steps=4, seed=seed)
        for seed in (1, 1, 2)
    ]
    same(*results[:2])
    assert not torch.equal(results[0].x, results[2].x)


class Counting:
    """The two losses, with their calls, and the products of every Pullback, counted."""

    def __init__(self, case, monkeypatch):
        self.calls, self.case = Counter(), case
        for name in ("product", "both", "forward"):
            original = getattr(Pullback, name)

            def counted(pull, u, original=original):
                self.calls["products"] += 1
                return original(pull, u)

            monkeypatch.setattr(Pullback, name, counted)

    def outer(self, x, y):
        self.calls["losses"] += 1
        return self.case.outer(x, y)

    def inner(self, x, y):
        self.calls["losses"] += 1
        return self.case.inner(x, y)


@pytest.mark.parametrize("name", METHODS)
def test_counters(name, monkeypatch):
    """gradients + loss_evaluations are the calls of the losses; products are the products."""
    counting = Counting(RIDGES[0], monkeypatch)
    case, seen = counting.case, []

    def callback(state, record):
        assert record.gradients + record.loss_evaluations == counting.calls["losses"]
        assert record.hessian_products == counting.calls["products"]
        seen.append((record.gradients, record.hessian_products, record.loss_evaluations))

    bilevel.solve(
        counting.outer,
        counting.inner,
        case.x,
        case.y,
        method=METHODS[name](),
        steps=4,
        inner_steps=3,
        callback=callback,
    )
    assert len(seen) == 4 and seen == sorted(seen)
    per_step = [b[0] - a[0] for a, b in zip(seen, seen[1:], strict=False)]
    assert min(per_step) >= 3 + 1


@pytest.mark.parametrize("corrects", [True, False])
def test_counts_of_one_iteration_by_hand(corrects):
    """BiSLS-SGD, one inner step: gradients inner + f + the pullback, and one per outer trial on
    the tangent; products CG + residual + response; losses one per trial, inner or outer, and a
    look at the inner loss per outer trial, of which one is refused before f is looked at. A
    correction is one more system, and a look before and after it. In the first iteration kinks of g
    are looked for, in the second f is looked at twice."""
    case = RIDGES[0]
    method = bilevel.bisls("sgd", hypergradient=Implicit(ConjugateGradient(4, 0.0)))
    method = replace(method, corrects=corrects)
    problem = Problem(case.outer, case.inner)
    state, record = method.step(problem, method.init(case.x, case.y), None, 1)
    assert record.gradients == 1 + 1 + 1 + record.outer_trials
    assert record.hessian_products == (4 + 1) + (1 + 4) + corrects * 4
    looks = record.inner_trials + 2 * record.outer_trials - 1 + corrects * 2 + 1
    assert record.loss_evaluations == looks
    if corrects:  # x has waited
        return
    _, record = method.step(problem, state, None, 1)
    assert record.gradients - state.cost.gradients == 1 + 1 + 1 + record.outer_trials
    looks = record.inner_trials + 3 * record.outer_trials
    assert record.loss_evaluations - state.cost.loss_evaluations == looks


# -- history and ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_history(name):
    result = run(method=METHODS[name](), steps=4)
    assert [r.k for r in result.history] == [0, 1, 2, 3]
    for record in result.history:
        data = dict(record)
        assert set(FIELDS) <= set(data)
        for key in set(FIELDS) - {"residual"}:
            assert isinstance(data[key], int | float) and math.isfinite(data[key]), key
            assert record[key] == getattr(record, key)
        counts = "k outer_trials inner_trials gradients hessian_products loss_evaluations"
        assert all(type(data[key]) is int for key in counts.split())
        assert (record.residual is None) == ("unrolled" in name)
        if record.residual is not None:
            assert 0 <= record.residual < 1
    seconds = [r.seconds for r in result.history]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert result.state.k == 4
    assert torch.equal(result.state.x, result.x)
    with pytest.raises(KeyError, match="'loss'.*outer_loss"):
        result.history[0]["loss"]


def test_recorded_losses_are_those_of_the_formulas():
    """outer_loss is f(x_k, y after the inner steps), before the outer step."""
    case, points = QUADRATIC, []
    method = bilevel.fixed("sgd", 0.01, 0.2, Implicit(ConjugateGradient(100, 0.0)))
    result = run(case, method=method, steps=3, callback=lambda s, r: points.append((s.x, s.y)))
    x = case.x
    for record, (new, y) in zip(result.history, points, strict=True):
        value = case.value(flat(x).numpy(), flat(y).numpy())
        assert record.outer_loss == pytest.approx(value, rel=1e-12)
        assert record.inner_loss == pytest.approx(float(case.inner(x, y)), rel=1e-12)
        norm = float((flat(new) - flat(x)).norm()) / 0.01
        assert record.hypergrad_norm == pytest.approx(norm, rel=1e-9)
        x = new


def test_all_steps():
    assert run(steps=3).reason == "all 3 steps were taken"
    result = run(steps=0)
    assert result.history == [] and torch.equal(result.x, RIDGES[0].x)
    assert torch.equal(result.y, RIDGES[0].y)


def test_tol():
    norms = [r.hypergrad_norm for r in run(steps=12, method="sgd").history]
    tol = norms[5] * 1.0001
    assert min(norms[:5]) > tol
    result = run(steps=12, method="sgd", tol=tol)
    assert len(result.history) == 6
    assert "at most tol" in result.reason and f"{tol:g}" in result.reason
    assert len(run(steps=3, method="sgd", tol=0.0).history) == 3


def test_numbers_of_numpy():
    plain = run(steps=4, inner_steps=3, seed=2, tol=0.5)
    for whole, real in ((np.int64, np.float32), (np.uint8, np.float64)):
        same(run(steps=whole(4), inner_steps=whole(3), seed=whole(2), tol=real(0.5)), plain)

    class Three:
        def __index__(self):
            return 3

    assert run(steps=Three()).reason == "all 3 steps were taken"


def test_an_optimizer_starts_afresh_with_y():
    """Its state and its schedule, which here has no more steps than one iteration takes."""
    seen = []

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=7)

    result = run(
        method=bilevel.fixed("sgd", 1e-12, inner_solver=make),
        inner_steps=7,
        warm_start=False,
        callback=lambda state, record: seen.append(flat(state.y)) and None,
    )
    assert result.reason == "all 4 steps were taken"
    for y in seen:
        assert (y - seen[0]).norm() < 1e-6 * seen[0].norm()
    assert result.state.solver["scheduler"]["last_epoch"] == 7


@pytest.mark.parametrize("name", ["bisls-adam", "bisls-sgd", "bisps"])
def test_another_default_device(name, tmp_path):
    """Where torch makes tensors of its own; on meta they hold no numbers."""
    case = NESTED
    go = partial(bilevel.solve, case.outer, case.inner, case.x, case.y, method=name, seed=1)
    plain = go(steps=6)
    with torch.device("meta"):
        go(steps=3, checkpoint=tmp_path / "c")
        again = go(steps=6, checkpoint=tmp_path / "c", resume=True)
    assert torch.equal(flat(again.x), flat(plain.x)) and torch.equal(flat(again.y), flat(plain.y))


@pytest.mark.parametrize(
    "solver", [bilevel.Nystrom(3), bilevel.StochasticNeumann(5, form="random")], ids=repr
)
def test_hypergradients_on_another_default_device(solver):
    case, found = NESTED, []
    method = bilevel.Implicit(solver)
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            h = bilevel.hypergradient(case.outer, case.inner, case.x, case.y, method=method)
            rows = bilevel.check(case.outer, case.inner, case.x, case.y, methods=[method])
        found.append((flat(h.grad), rows.numeric))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_callback():
    seen = []

    def callback(state, record):
        seen.append((state.k, record.k, state.x.clone()))
        return record.k == 2

    result = run(steps=9, callback=callback)
    assert [(a, b) for a, b, _ in seen] == [(1, 0), (2, 1), (3, 2)]
    assert result.reason == "the callback stopped the run at iteration 2"
    assert torch.equal(result.x, seen[-1][2]) and len(result.history) == 3
    same(result, run(steps=3))
    # anything but a true value goes on
    assert len(run(steps=3, callback=lambda s, r: None).history) == 3


def test_state_in_a_callback_is_a_value():
    """A state that was kept is not changed by later iterations."""
    kept = []
    run(NESTED, steps=4, callback=lambda s, r: kept.append((s, flat(s.x).clone())))
    for state, x in kept:
        assert torch.equal(flat(state.x), x)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"),
    [
        (Terminal, None, True),
        (io.StringIO, None, False),
        (Terminal, False, False),
        (io.StringIO, True, True),
    ],
)
def test_progress(monkeypatch, capsys, stream, progress, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    result = run(steps=5, progress=progress)
    text = sys.stderr.getvalue()
    assert bool(text) == shown
    if shown:
        assert text.startswith("\r") and text.endswith("\n") and text.count("\n") == 1
        last = text.split("\r")[-1]
        assert last.startswith("5/5 [====================]")
        assert f"outer {result.history[-1].outer_loss:.4g}" in last and "it/s" in last
    out = capsys.readouterr()
    assert out.out == ""


@pytest.mark.parametrize("where", ["outer", "inner", "callback"])
def test_keyboard_interrupt(where):
    """Ends the run with its reason and the last complete iteration."""
    case, calls = RIDGES[0], Counter()

    def maybe(name, limit):
        calls[name] += 1
        if name == where and calls[name] == limit:
            raise KeyboardInterrupt

    def outer(x, y):
        maybe("outer", 20)  # the first look takes 7
        return case.outer(x, y)

    def inner(x, y):
        maybe("inner", 190)  # the first step alone takes more than a hundred
        return case.inner(x, y)

    result = bilevel.solve(
        outer, inner, case.x, case.y, steps=50, callback=lambda s, r: maybe("callback", 3)
    )
    done = len(result.history)
    assert 1 <= done < 50 and result.state.k == done
    assert result.reason == f"interrupted from the keyboard at iteration {done}"
    same(result, run(steps=done))


# -- numerical failure ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["outer", "inner"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["bisls-adam", "bisls-sgd", "bisps", "sgd", "adam"])
def test_a_loss_that_becomes_not_finite(level, bad, name):
    """Its reason, and the point before the batch that did it."""
    case = RIDGES[0]

    def loss(which):
        base = getattr(case, which)
        if which == level:
            return lambda x, y, scale: scale * base(x, y)
        return base

    count = 3 if level == "outer" else 11  # of which the third iteration looks at two ahead
    data = {f"{level}_data": [t(1.0)] * count + [t(bad)] * 9}
    result = bilevel.solve(
        loss("outer"), loss("inner"), case.x, case.y, method=name, steps=6, inner_steps=3, **data
    )
    assert len(result.history) == 4
    assert result.reason.startswith("stopped at iteration 3: ")
    assert f"the {level} loss is " in result.reason
    assert result.history[-1].failure is not None
    good = bilevel.solve(
        loss("outer"), loss("inner"), case.x, case.y, method=name, steps=3, inner_steps=3, **data
    )
    assert torch.equal(result.x, good.x) and torch.equal(result.y, good.y)


@pytest.mark.parametrize("level", ["outer", "inner"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.filterwarnings("ignore:compile=True does not serve whole iterations")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the compiler's import
def test_a_loss_that_is_not_finite_at_the_start(level, bad, compile):
    """Ends the run where it began, with a word; nothing is raised."""
    case = RIDGES[0]
    losses = {"outer": case.outer, "inner": case.inner}
    losses[level] = lambda x, y: bad * getattr(case, level)(x, y)
    with pytest.warns(RuntimeWarning, match=f"the {level} loss is {bad} at the start; choose"):
        result = bilevel.solve(**losses, x=case.x, y=case.y, compile=compile)
    assert result.reason.startswith(f"stopped at iteration 0: the {level} loss is ")
    assert torch.equal(result.x, case.x) and torch.equal(result.y, case.y)
    assert len(result.history) == 1 and result.history[0].failure


def test_a_hypergradient_that_is_not_finite():
    """sqrt at zero: the loss is finite, its derivative is not."""
    case = RIDGES[0]

    def outer(x, y, at):
        return case.outer(x, y) + ((x * at).abs().sum()).sqrt() * 0.01

    result = bilevel.solve(
        outer, case.inner, case.x, case.y, outer_data=[t(1.0), t(1.0), t(0.0)], steps=9
    )
    assert "the norm of the hypergradient is nan" in result.reason and len(result.history) == 3
    assert torch.isfinite(result.x).all() and torch.isfinite(result.y).all()


def test_divergence_of_fixed_steps_ends_with_a_reason():
    result = run(method=bilevel.fixed("sgd", 1e8, 1e8), steps=200)
    assert (
        "stopped at iteration" in result.reason
        and "the step led to" in result.reason
        or ("loss is" in result.reason or "norm of the hypergradient is" in result.reason)
    )
    assert torch.isfinite(result.x).all() and torch.isfinite(result.y).all()
    assert len(result.history) < 200


def test_hessian_batches_are_the_present_ones():
    oracles.fresh_batches()


def test_unrolled_in_a_method_needs_no_more_calls():
    """The graphs of the inner steps are those of the hypergradient: nothing is evaluated twice."""
    case = RIDGES[0]
    method = bilevel.fixed("sgd", 0.1, 0.1, Unrolled())
    _, record = method.step(Problem(case.outer, case.inner), method.init(case.x, case.y), None, 5)
    assert (record.gradients, record.hessian_products, record.loss_evaluations) == (6, 5, 0)
    method = bilevel.fixed("sgd", 0.1, 0.1, Unrolled(recompute=True))
    _, record = method.step(Problem(case.outer, case.inner), method.init(case.x, case.y), None, 5)
    assert (record.gradients, record.hessian_products, record.loss_evaluations) == (11, 5, 0)


# -- batches --------------------------------------------------------------------------------------


def weighed(x, y, b):
    return (b * (y - 1) ** 2).sum()


def pulled(x, y, b):
    return (b * (y - x) ** 2).sum() + (y**2).sum()


def test_an_outer_batch_that_comes_twice_counts_twice():
    x, y, (a, b) = t([0.5, 0.2]), t([0.1, 0.3]), (t([1.0, 2.0]), t([3.0, 5.0]))
    method = replace(bilevel.bisls("sgd"), outer_batches=3)
    result = bilevel.solve(
        weighed, pulled, x, y, outer_data=[a, a, b], inner_data=[a], method=method, steps=1
    )
    mean = replace(bilevel.bisls("sgd"), outer_batches=1)
    whole = bilevel.solve(
        weighed, pulled, x, y, outer_data=[(2 * a + b) / 3], inner_data=[a], method=mean, steps=1
    )
    one, other = result.history[0], whole.history[0]
    assert one.outer_batches == 3
    assert one.outer_loss == pytest.approx(other.outer_loss, rel=1e-14)
    assert one.hypergrad_norm == pytest.approx(other.hypergrad_norm, rel=1e-12)


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd"])
def test_one_pair_is_one_batch_of_each(method):
    a, b = t([1.0, 2.0]), t([3.0, 5.0])
    start = {"x": t([0.5, 0.2]), "y": t([0.1, 0.3]), "method": method, "steps": 8}
    pair = bilevel.solve(weighed, pulled, data=[(a, b)], **start)
    apart = bilevel.solve(weighed, pulled, outer_data=[a], inner_data=[b], **start)
    assert torch.equal(pair.x, apart.x)


class OfTwo:
    """The first of two ranks, where the other one has three batches."""

    size = 2

    def numbers(self, function):
        return [function(), 3]


def test_a_rank_with_fewer_batches_gives_some_again():
    source = _Source([t(1.0)], [t(2.0), t(3.0)], None, 1, OfTwo())
    _, _, drawn, more = source.next((2, 1), (8, 1))
    assert len(drawn) == 3 and len(more) == 2  # one to average, and one that judges
