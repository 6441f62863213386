"""Inner losses that are not convex: |g_yy| in place of g_yy, and what is remembered of it."""

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch

import bilevel
from bilevel import ConjugateGradient, Implicit, chunks
from bilevel.layout import Layout
from bilevel.linear import CONCAVE, FLOOR
from bilevel.problem import Draw, Problem, Pullback, make_oracle
from tests.tables import absolute, relative, t

SPECTRUM = np.array([4.0, 1.5, 0.3, -0.8])


def system(seed=0):
    """g_yy of the given spectrum, g_xy and f_y at random."""
    rng = np.random.default_rng(seed)
    V = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    return V @ np.diag(SPECTRUM) @ V.T, rng.standard_normal((3, 4)), rng.standard_normal(4)


def test_every_system_of_an_estimate_has_the_absolute_hessian():
    """h = f_x - g_xy |g_yy|^-1 f_y, w = -|g_yy|^-1 g_yx d and s = -|g_yy|^-1 g_y, at a saddle."""
    H, C, a = system()
    tH, tC, ta = t(H), t(C), t(a)
    problem = Problem(
        lambda x, y: ta @ y + (x**2).sum(), lambda x, y: y @ tH @ y / 2 + x @ tC @ y + y.sum()
    )
    x, y, d = t([0.3, -1.0, 2.0]), t([1.0, 0.5, -0.25, 2.0]), t([1.0, 2.0, -1.0])
    oracle = make_oracle(problem, Layout(x, "x"), Layout(y, "y"))
    h = Implicit(ConjugateGradient(20, 0.0)).estimate(oracle, x, y, Draw(), [Draw()], [], None)
    inverse = absolute(H, FLOOR)
    assert relative(h.grad.numpy(), 2 * x.numpy() - C @ inverse @ a) < 1e-10
    assert h.learned[-1].concave == pytest.approx(0.8 / 4.0)
    slope, _, follow = h.respond(d)
    w = -inverse @ C.T @ d.numpy()
    assert float(slope) == pytest.approx(float(h.grad @ d), rel=1e-10)
    assert relative(follow(0.5, x + 0.5 * d)[0].numpy(), y.numpy() + 0.5 * w) < 1e-9
    gy = H @ y.numpy() + C.T @ x.numpy() + 1
    assert relative(h.newton()[0].numpy(), -inverse @ gy) < 1e-9


def test_the_call_of_a_subclass_is_its_own():
    class Twice(ConjugateGradient):
        def __call__(self, product, b, q0=None):
            return 2 * super().__call__(product, b, q0)

    A = torch.diag(t([1.0, 2.0]))

    def hypergradient(solver):
        return bilevel.hypergradient(
            lambda x, y: y.sum(),
            lambda x, y: y @ A @ y / 2 - x @ y,
            *(t([1.0, 1.0]), t([0.0, 0.0])),
            method=Implicit(solver),
        ).grad

    assert torch.equal(hypergradient(Twice(10)), 2 * hypergradient(ConjugateGradient(10)))


def test_nothing_is_concave_of_a_convex_loss():
    from benchmarks.problems import CASES

    for name in ("ridge, condition 1e4", "regularization, breast-cancer", "distillation, batch 64"):
        state = CASES[name](0).solve("bisls-adam", steps=10, inner_steps=10, seed=0).state
        assert state.learned.concave <= CONCAVE, name


def test_images_that_train_a_network():
    """Of a network the Hessian is indefinite nearly everywhere. Solved as if it were not, F ends
    where it starts, at 2.3."""
    from benchmarks.networks import NETWORKS

    case = NETWORKS["distillation into a network"](0)
    result = case.solve("bisls-adam", steps=30, inner_steps=10, seed=0)
    assert case.value(case.x, case.y) > 2
    assert case.value(result.x, result.y) < 1
    assert result.state.learned.concave > CONCAVE


BATCHES = [torch.rand(6, 3, generator=torch.Generator().manual_seed(i)).double() for i in range(9)]
BENT = [*BATCHES[:4], BATCHES[4] - torch.tensor([0.0, 3.0, 0.0]).double(), *BATCHES[5:]]


def bent_inner(x, y, batch):
    return (batch.mean(0) * y * y).sum() / 2 + (y**4).sum() / 4 - (x * y).sum()


def bent_outer(x, y):
    return ((y - 1) ** 2).sum() + 0.01 * (x * x).sum()


@pytest.mark.parametrize("inner_data, in_the_graph", [(BATCHES, True), (BENT, False)])
def test_the_compiled_loop_ends_where_g_is_concave(inner_data, in_the_graph, monkeypatch):
    """With the numbers of the plain loop, and a word."""
    monkeypatch.setattr(chunks, "SLOTS", 4)
    method = bilevel.bisls("adam", hypergradient=Implicit(ConjugateGradient(20, 0.1)))

    def solve(compile):
        start = torch.full((3,), 0.1, dtype=torch.float64)
        return bilevel.solve(
            *(bent_outer, bent_inner, start, start),
            **{"method": method, "compile": compile, "steps": 12, "inner_steps": 1},
            inner_data=inner_data,
        )

    plain = solve(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = solve(True)
    told = [str(w.message) for w in caught if "is concave in places" in str(w.message)]
    assert len(told) == (0 if in_the_graph else 1)
    assert (plain.state.learned.concave > CONCAVE) == (not in_the_graph)
    assert fast.state.learned.concave == pytest.approx(plain.state.learned.concave, rel=1e-9)
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-8, atol=1e-12)
    for one, other in zip(fast.history, plain.history, strict=True):
        assert one.outer_loss == pytest.approx(other.outer_loss, rel=1e-8)
        assert one.hessian_products == other.hessian_products


def test_it_is_remembered_in_a_checkpoint(tmp_path):
    def solve(steps, **more):
        start = torch.full((3,), 0.1, dtype=torch.float64)
        return bilevel.solve(
            *(bent_outer, bent_inner, start, start),
            **{"inner_data": BENT, "inner_steps": 2, "steps": steps, **more},
        )

    path = tmp_path / "run.pt"
    solve(8, checkpoint=path)
    whole, resumed = solve(12), solve(12, checkpoint=path, resume=True)
    assert whole.state.learned.concave > CONCAVE
    assert whole.state.learned == resumed.state.learned
    assert torch.equal(whole.x, resumed.x)


def test_an_iteration_leaves_no_graph_behind(monkeypatch):
    alive = weakref.WeakSet()
    record = Pullback.__init__

    def spy(self, *args):
        record(self, *args)
        alive.add(self)

    monkeypatch.setattr(Pullback, "__init__", spy)
    problem = Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
    gc.collect()
    gc.disable()
    try:
        for method in (bilevel.bisls(), bilevel.bisls(response="refine"), bilevel.fixed()):
            state = method.init(t(0.0), t([0.0, 0.0]))
            method.step(problem, state)
            assert not alive
    finally:
        gc.enable()


def test_an_estimate_is_gone_with_its_last_reference():
    """It holds the graphs of the second derivatives, which must not wait for the collector."""
    A = torch.diag(t([1.0, 2.0]))
    problem = Problem(lambda x, y: y.sum(), lambda x, y: y @ A @ y / 2 - x @ y)
    x, y = t([1.0, 1.0]), t([0.0, 0.0])
    oracle = make_oracle(problem, Layout(x, "x"), Layout(y, "y"))
    gc.disable()
    try:
        h = Implicit(ConjugateGradient(20)).estimate(oracle, x, y, Draw(), [Draw()], [], None)
        h.respond(t([1.0, 0.0]))
        reference = weakref.ref(h)
        del h
        assert reference() is None
    finally:
        gc.enable()
