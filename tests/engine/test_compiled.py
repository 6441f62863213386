"""The compiled oracle against the plain one, and its fallback."""

import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch

import bilevel
from tests.tables import RIDGES

pytestmark = pytest.mark.filterwarnings("default")  # the compiler warns of its own parts


def run(compile, outer=None, **options):
    case = RIDGES[0]
    return bilevel.solve(
        outer or case.outer,
        case.inner,
        case.x,
        case.y,
        method=replace(bilevel.bisls("sgd"), corrects=False),  # which rounding would judge here
        steps=3,
        inner_steps=3,
        compile=compile,
        **options,
    )


def test_compiled_steps_equal_plain_ones():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = run(True)
    assert not any("cannot be compiled" in str(w.message) for w in caught)
    plain = run(False)
    for one, other in zip(fast.history, plain.history, strict=True):
        assert one.outer_loss == pytest.approx(other.outer_loss, rel=1e-10)
        assert one.hypergrad_norm == pytest.approx(other.hypergrad_norm, rel=1e-8)
        assert one.residual == pytest.approx(other.residual, rel=1e-6)
        assert (one.outer_step, one.outer_trials) == (other.outer_step, other.outer_trials)
        assert (one.gradients, one.hessian_products, one.loss_evaluations) == (
            other.gradients,
            other.hessian_products,
            other.loss_evaluations,
        )
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-9, atol=1e-12)


def test_any_number_of_problems_in_one_process():
    def f(x, y):
        return (y * y).sum()

    def g(x, y):
        return ((y - x) ** 2).sum()

    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True does not|.*cannot be compiled")
        for size in (2, 3):
            start = torch.ones(size, dtype=torch.float64)
            bilevel.solve(f, g, start, start, method="sgd", steps=4, inner_steps=1, compile=True)


def test_modules_are_in_the_graph():
    """With the parameters that they had, a layer of two names among them."""

    def solve(compile):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        x = torch.nn.Sequential(layer, torch.nn.Tanh(), layer).double()
        y, given = torch.nn.Linear(4, 1).double(), list(x.parameters())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "compile=True does not|.*cannot be compiled")
            result = bilevel.solve(
                lambda x, y: (y(x(A)) ** 2).mean() + y(x(A)).mean(),
                lambda x, y: ((y(x(A)) - 1) ** 2).mean() + (y.weight**2).sum(),
                *(x, y),
                **{"method": "sgd", "steps": 4, "inner_steps": 2, "compile": compile},
            )
        assert all(p is q for p, q in zip(given, x.parameters(), strict=True))
        return result.state.vectors

    A = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for fast, plain in zip(solve(True), solve(False), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_compiled_falls_back_to_the_same_bits():
    case = RIDGES[0]

    def outer(x, y):
        return case.outer(x, y) if float(y.detach().sum()) < 1e9 else y.sum()

    with pytest.warns(RuntimeWarning, match="outer loss cannot be compiled.*going on without"):
        fast = run(True, outer)
    assert fast.reason == "all 3 steps were taken"
    torch.testing.assert_close(fast.x, run(False, outer).x, rtol=1e-9, atol=1e-12)


def test_dropout_is_the_same_for_every_compiled_derivative():
    X = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def solve(compile):
        torch.manual_seed(1)
        layers = (torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Dropout(0.5))
        y = torch.nn.Sequential(*layers, torch.nn.Linear(4, 1)).double()

        def outer(x, y):
            return (y(X) - X[:, :1].tanh()).square().mean()

        def inner(x, y):
            return outer(x, y) + x.exp() * sum(p.square().sum() for p in y.parameters())

        x = torch.tensor(-2.0, dtype=torch.float64)
        return bilevel.solve(outer, inner, x, y, steps=6, inner_steps=3, seed=0, compile=compile)

    fast, plain = solve(True), solve(False)
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-8, atol=0)
    for one, other in zip(fast.history, plain.history, strict=True):
        assert one.outer_loss == pytest.approx(other.outer_loss, rel=1e-8)
        assert (one.outer_trials, one.inner_trials) == (other.outer_trials, other.inner_trials)


def test_compiled_functions_die_with_their_problem():
    case = RIDGES[0]
    problem = bilevel.Problem(case.outer, case.inner, compile=True)
    method = bilevel.fixed("sgd", 0.1, 0.1)
    state = method.init(case.x, case.y)
    for _ in range(2):
        state, _ = method.step(problem, state)
    (functions,) = problem.functions.values()
    assert "inner_gradient" in functions
    del functions
    alive = weakref.ref(problem)
    del problem
    gc.collect()
    assert alive() is None
