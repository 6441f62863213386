"""Whole iterations in a compiled graph against the plain ones, and where they cannot be."""

import math
import warnings
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
import torch
import torch.nn.functional as F

import bilevel
from bilevel import Problem, chunks, graph
from bilevel.chunks import Chunks
from bilevel.hypergradients import Estimate, Implicit
from bilevel.lag import corrected
from bilevel.layout import Layout
from bilevel.linear import ConjugateGradient, Learned, Neumann
from bilevel.problem import Draw, Oracle
from bilevel.record import Record
from bilevel.traced import Counted, Traced

pytestmark = pytest.mark.filterwarnings("default")  # the compiler warns of its own parts

A = torch.randn(44, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LABELS = (A @ torch.arange(5.0, dtype=torch.float64)).sign()
START = torch.zeros(5, dtype=torch.float64)


def outer(x, y, batch):
    features, labels = batch
    return F.softplus(-labels * (features @ y)).mean()


def direct(x, y, batch):
    """Of x itself as well, to which a search along y as it is can answer."""
    return outer(x, y, batch) + ((x - 1) ** 2 * torch.arange(1.0, 6.0)).sum()


def inner(x, y, batch):
    return outer(x, y, batch) + 0.5 * (x.exp() * y * y).sum()


def batches(size, stop):
    return [(A[i : i + size], LABELS[i : i + size]) for i in range(0, stop, size)]


@dataclass(frozen=True)
class OneStep:
    """A step of gradient descent on the linear system, as a user would write it."""

    warm_start = True

    def __call__(self, product, b, q0):
        q = torch.zeros_like(b) if q0 is None else q0
        return q - 0.3 * (product(q) - b)


class Damped(ConjugateGradient):
    """Conjugate gradients with a __call__ of its own, which counts."""

    def __call__(self, product, b, q0=None):
        return 0.9 * super().__call__(product, b, q0)


SOBA = bilevel.fixed("sgd", 0.05, 0.3, Implicit(OneStep()), decay=0.5)
METHODS = {
    "bisls-adam": (bilevel.bisls("adam"), {"inner_steps": 3}),
    "bisls-sgd, fresh": (
        bilevel.bisls("sgd", slack=1e-6, response="frozen"),
        {"warm_start": False, "inner_steps": 2, "outer": direct, "outer_data": batches(44, 44)},
    ),
    "bisps": (bilevel.bisps(hypergradient=Implicit(Neumann(4))), {"inner_steps": 1}),
    "adam": (
        bilevel.fixed("adam", hypergradient=Implicit(ConjugateGradient(1, 0.0))),
        {"inner_steps": 2},
    ),
    "soba": (SOBA, {"inner_steps": 1}),
    "of one's own": (bilevel.fixed("sgd", 0.05, 0.3, Implicit(Damped(2, 0.0))), {"inner_steps": 1}),
}


@pytest.fixture
def taken(monkeypatch):
    """How many iterations each call of the graph took."""
    found = []
    several = Chunks._several

    def spy(*args):
        outcome = several(*args)
        found.append(None if outcome is None else len(outcome[1]))
        return outcome

    monkeypatch.setattr(Chunks, "_several", spy)
    monkeypatch.setattr(chunks, "SLOTS", 4)
    monkeypatch.setattr(chunks, "WAIT", 1e9)
    return found


def solve(method, compile, **options):
    options = {"outer_data": batches(8, 40), "inner_data": batches(8, 24), "steps": 14} | options
    loss = options.pop("outer", outer)
    return bilevel.solve(loss, inner, START, START, method=method, compile=compile, **options)


def assert_alike(fast, plain, rtol=1e-8, atol=1e-12):
    assert fast.reason == plain.reason
    for one, other in zip(fast.history, plain.history, strict=True):
        for name in set(one.keys()) - {"seconds"}:
            if name == "residual" and other[name] is not None:
                # what conjugate gradients leave is decided by rounding: plain runs on data that
                # differ by 1e-15 have residuals here that differ by their own size
                assert one[name] == pytest.approx(other[name], rel=1e-6, abs=2e-3, nan_ok=True)
            elif isinstance(other[name], float):
                assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-12, nan_ok=True)
            else:  # counters, words
                assert one[name] == other[name], name
    torch.testing.assert_close(fast.x, plain.x, rtol=rtol, atol=atol)
    torch.testing.assert_close(fast.y, plain.y, rtol=rtol, atol=atol)
    assert fast.state.k == plain.state.k and fast.state.failures == plain.state.failures
    assert fast.state.noise == pytest.approx(plain.state.noise, rel=1e-6)
    assert fast.state.agreement == pytest.approx(plain.state.agreement, rel=1e-4)
    assert fast.state.lengths == pytest.approx(plain.state.lengths, rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_iterations_in_the_graph_equal_plain_ones(name, taken):
    method, options = METHODS[name]
    steps = 6 if name == "bisls-adam" else 8  # later, rounding has grown
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = solve(method, True, steps=steps, **options)
    assert not any("compile=True" in str(w.message) for w in caught)
    assert sum(taken) >= 3 and max(taken) > 1
    # plain searches on data that differ by 1e-15 end up to 7e-6 apart in x here, 8e-5 in y
    apart = {"rtol": 1e-3, "atol": 1e-5} if name.startswith("bisls") else {}
    assert_alike(fast, solve(method, False, steps=steps, **options), **apart)


def test_where_x_waits_iterations_are_plain(taken):
    """Whatever trials are judged on: y comes from far, and f says nothing of F on its way."""
    scales = torch.logspace(0, -3, 8, dtype=torch.float64)
    start = torch.zeros(8, dtype=torch.float64)

    def solve(compile):
        return bilevel.solve(
            lambda x, y: ((y - 1) ** 2).sum() / 2 + 0.05 * ((x - 3) ** 2).sum(),
            lambda x, y: (scales * (y - x) ** 2).sum() / 2,
            *(start, start + 5),
            **{"method": bilevel.bisls("sgd", response="frozen"), "compile": compile},
            **{"steps": 7, "inner_steps": 2},
        )

    fast, plain = solve(True), solve(False)
    assert [record.outer_step for record in plain.history][:3] == [0, 0, 0]
    assert sum(taken) == 3  # of seven: the others wait, or are the first to move
    assert_alike(fast, plain)


def test_a_run_ends_where_the_plain_one_does(taken, tmp_path):
    """By tol within a call: neither iterations nor batches beyond it."""
    norms = [record.hypergrad_norm for record in solve(SOBA, False, inner_steps=1).history]
    tol = sorted(norms)[3]
    files = [tmp_path / "fast", tmp_path / "plain"]
    fast, plain = (
        solve(SOBA, file is files[0], inner_steps=1, tol=tol, checkpoint=file) for file in files
    )
    assert "is at most tol" in fast.reason
    assert_alike(fast, plain)
    fast, plain = (torch.load(file)["source"]["outer_data"]["position"] for file in files)
    assert fast == plain


def test_ragged_batches_and_resuming(taken, tmp_path):
    """Batches of another size are taken plainly; a resumed run has the same bits."""
    data = {"outer_data": batches(8, 44), "inner_steps": 1}
    whole = solve(SOBA, True, **data)
    assert max(taken) > 1 and sum(taken) < 13
    assert_alike(whole, solve(SOBA, False, **data))
    path = tmp_path / "c"
    solve(SOBA, True, steps=9, checkpoint=path, checkpoint_every=2, **data)
    rest = solve(SOBA, True, checkpoint=path, resume=True, **data)
    assert torch.equal(rest.x, whole.x) and torch.equal(rest.y, whole.y)
    assert len(rest.history) == 14


def test_hessian_batches_are_chosen_where_the_first_iteration_taught_nothing(taken):
    """f_y = 0 at first, of which no noise is seen."""
    g = torch.Generator().manual_seed(0)
    data = [torch.rand(5, generator=g, dtype=torch.float64) ** 6 * 8 + 0.02 for _ in range(20)]

    def solve(compile):
        return bilevel.solve(
            lambda x, y: 0.2 * ((x - 5) ** 2).sum() + 0.05 * (y.sum() - 6).relu() ** 2,
            lambda x, y, b: (b * (y - x) ** 2).mean() + 0.05 * (y**2).sum(),
            *(START, START),
            inner_data=data,
            steps=9,
            inner_steps=2,
            compile=compile,
        )

    fast, plain = solve(True), solve(False)
    assert len({record.hessian_batches for record in plain.history}) > 1 and any(taken)
    assert_alike(fast, plain, rtol=1e-6)


def test_the_first_step_may_be_in_the_graph(taken):
    """x has stood still on batches that f does not depend on."""

    def solve(compile):
        return bilevel.solve(
            lambda x, y, b: b * ((y - 0.3) ** 2).sum(),
            lambda x, y: (torch.arange(1.0, 6.0) * (y - x.sigmoid()) ** 2).sum() / 2,
            *(START - 4, START),
            outer_data=[torch.tensor(w, dtype=torch.float64) for w in (0, 0, 0, 1, 1, 1, 1, 1, 1)],
            method=bilevel.bisls(hypergradient=Implicit(ConjugateGradient(3, 0.0))),
            steps=9,
            inner_steps=2,
            compile=compile,
        )

    fast, plain = solve(True), solve(False)
    still = [record.outer_step == 0 for record in plain.history]
    assert all(still[:2]) and not all(still) and any(taken)
    assert_alike(fast, plain, rtol=1e-6)


def test_batches_of_a_graph_and_sparse_ones(taken):
    """Features may come from someone's network; a sparse batch is taken plainly, as before."""
    parts = [(a.requires_grad_(), b) for a, b in batches(8, 40)]
    options = {"inner_steps": 1, "steps": 5}
    assert_alike(*(solve(SOBA, c, outer_data=parts, **options) for c in (True, False)))
    assert any(taken)
    sparse = [(a.detach().to_sparse(), b) for a, b in batches(8, 40)]
    with pytest.warns(RuntimeWarning, match="not .nests of. tensors"):
        fast = solve(SOBA, True, outer_data=sparse, **options)
    assert_alike(fast, solve(SOBA, False, outer_data=sparse, **options))


def test_a_failure_leaves_as_many_batches_as_it_found(taken):
    """In the iteration 3, after which their number would change; the labels are noise."""
    g = torch.Generator().manual_seed(0)
    noisy = [(A[i : i + 4], torch.randn(4, generator=g, dtype=A.dtype)) for i in range(0, 44, 4)]

    def solve_noisy(compile, data, steps):
        loss = lambda x, y, batch: ((batch[0] @ y - batch[1]) ** 2).mean()  # noqa: E731
        return bilevel.solve(
            loss,
            lambda x, y, batch: loss(x, y, batch) + (x.exp() * y * y).sum(),
            *(START, START),
            outer_data=data,
            inner_data=noisy,
            method="bisls-sgd",
            steps=steps,
            inner_steps=1,
            compile=compile,
        )

    begun = sum(record.outer_batches for record in solve_noisy(False, 3 * noisy, 3).history)
    spoiled = [(a, b * math.nan if j >= begun else b) for j, (a, b) in enumerate(3 * noisy)]
    fast, plain = (solve_noisy(compile, spoiled, 8) for compile in (True, False))
    assert plain.reason.startswith("stopped at iteration 3") and fast.reason == plain.reason
    for name in ("noise", "agreement"):
        assert getattr(fast.state, name).batches == getattr(plain.state, name).batches


class Refilled:
    """Gives one list, with other tensors each time."""

    def __init__(self, data):
        self.data, self.batch = data, []

    def __iter__(self):
        for new in self.data:
            self.batch[:] = new
            yield self.batch


def test_batches_of_a_list_are_stored_once_and_others_as_they_come(taken, monkeypatch):
    stored = []
    run = Chunks._run

    def spy(self, ready, state, joined, drawn):
        stored.append([len(tensors) for tensors in drawn.tensors])
        return run(self, ready, state, joined, drawn)

    monkeypatch.setattr(Chunks, "_run", spy)
    long = batches(4, 44)  # of 11, more than a call takes
    for data, most in ((batches(8, 40)[:3], 3), (long, 4), (Refilled(long), 4)):
        fast, plain = (solve(SOBA, c, inner_steps=1, outer_data=data) for c in (True, False))
        assert_alike(fast, plain)
        assert max(outer for outer, _, _ in stored) == most
        stored.clear()
    assert taken and all(taken)


def test_numbers_that_are_not_finite_end_it_alike(taken):
    wild = bilevel.fixed("sgd", 1e200, 0.3, Implicit(OneStep()))

    def quartic(x, y, batch):
        return outer(x, y, batch) + ((x - 1) ** 4).sum()

    fast, plain = (solve(wild, compile, inner_steps=1, outer=quartic) for compile in (True, False))
    assert fast.reason == plain.reason and "stopped at iteration" in fast.reason
    torch.testing.assert_close(fast.x, plain.x)


def test_a_callback_sees_every_iteration(taken):
    seen = []
    result = solve(
        SOBA,
        True,
        inner_steps=1,
        callback=lambda state, record: seen.append((state.k, record.k)) or record.k == 5,
    )
    assert seen == [(k + 1, k) for k in range(6)] and len(result.history) == 6
    assert set(taken) == {1}


def test_what_does_not_fit_is_told_and_taken_plainly(taken):
    def dropout(x, y, batch):
        return outer(x, F.dropout(y, 0.5), batch)

    cases = {
        "is not Implicit": (bilevel.fixed(hypergradient=bilevel.Unrolled()), {}),
        "a projection": (SOBA, {"project": lambda x: x.clamp(max=0.5)}),
        "random numbers": (SOBA, {"outer": dropout}),
    }
    for message, (method, options) in cases.items():
        with pytest.warns(RuntimeWarning, match=f"whole iterations here, because .*{message}"):
            fast = solve(method, True, steps=3, inner_steps=1, seed=1, **options)
        assert_alike(fast, solve(method, False, steps=3, inner_steps=1, seed=1, **options))
    assert not taken


@pytest.mark.parametrize("s", [[0.5, -2.0], [2.0, -8.0], [-1.0, 4.0], [math.nan, 1.0]])
@pytest.mark.parametrize("go", [True, False])
def test_the_correction_in_the_graph_is_the_plain_one(s, go):
    """Whole, as a quarter, dropped; and a direction that is no number leaves y as it was."""

    def inner(x, y):
        return ((y - 1) ** 2).sum() + (x * y).sum() * 0

    x, y, s = torch.zeros(2), torch.tensor([0.5, 3.0]), torch.tensor(s)
    oracle = Oracle(Problem(lambda x, y: y.sum(), inner), Layout(x, "x"), Layout(y, "y"))
    h = Estimate(*(None,) * 8, newton=lambda *solver: (s.clone(), 0.0))
    plain = corrected(oracle, x, y, h, Draw())[0] if go else y
    given = (x, y, h, Draw(), Counted(ConjugateGradient(), Learned(torch.zeros(()))))
    found, _, looks, _ = graph._corrected(Traced(oracle, None), torch.tensor(go), *given)
    assert torch.equal(found, plain)
    assert looks == (oracle.cost.loss_evaluations if go else 0)


def test_records_of_rows_are_as_any():
    columns = {f.name: [i, i + 0.5] for i, f in enumerate(fields(Record))}
    one, other = Record.several(**columns)
    assert one == Record(*range(18)) and other["seconds"] == 16.5
    with pytest.raises(FrozenInstanceError):
        one.k = 3
    with pytest.raises(ValueError):
        Record.several(**columns | {"failure": [0]})
    with pytest.raises(TypeError, match="all fields"):
        Record.several(k=[0])
