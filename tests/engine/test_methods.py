"""BiSPS, BiSLS and fixed steps: against NumPy, hand-written loops, and known failures."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel
import optim
from bilevel import ConjugateGradient, Implicit, Method, Problem, Unrolled
from bilevel.inner_solver import run_solver
from bilevel.layout import Layout
from bilevel.problem import Draw, make_oracle
from bilevel.rules import LEAST_C, Adam, Armijo, Steepest
from tests.engine import oracles
from tests.tables import (
    METHODS,
    NESTED,
    QUADRATIC,
    RIDGES,
    dense,
    flat,
    leaves,
    like,
    relative,
    t,
)

EXACT = Implicit(ConjugateGradient(200, 0.0))


def run(case, method, steps, inner_steps=10, **options):
    return bilevel.solve(
        case.outer,
        case.inner,
        case.x,
        case.y,
        method=method,
        steps=steps,
        inner_steps=inner_steps,
        **options,
    )


# -- BiSPS ----------------------------------------------------------------------------------------


def test_bisps_is_its_formulas():
    """Seven iterations in NumPy: both Polyak steps, floors, ceilings, warm start."""
    case, inner_steps = QUADRATIC, 3
    A, B, lower, p, floor = 0.02, 0.5, 0.008, 0.8, -15.0
    method = bilevel.bisps(
        A, B, lower, Implicit(dense), outer_lower_bound=0.0, inner_lower_bound=floor, c=p
    )
    result = run(case, method, 7, inner_steps)
    H, J = case.H, case.cross(case.X)
    x, y = case.X, flat(case.y).numpy()
    regimes = set()
    for k, record in enumerate(result.history):
        for _ in range(inner_steps):
            gy = H @ (y - case.solution(x))
            g = float(case.inner(t(x), t(y)))
            assert g > floor
            beta = min((g - floor) / (p * gy @ gy), B / math.sqrt(k + 1))
            regimes.add(("inner", beta == B / math.sqrt(k + 1)))
            y = y - beta * gy
        h = case.outer_x(x, y) - J.T @ np.linalg.solve(H, case.outer_y(x, y))
        f = case.value(x, y)
        free = f / (p * h @ h)
        alpha = min(max(lower / math.sqrt(k + 1), free), A / math.sqrt(k + 1))
        regimes.add(("outer", int(alpha > free) - int(alpha < free)))
        assert record.outer_loss == pytest.approx(f, rel=1e-10)
        assert record.hypergrad_norm == pytest.approx(np.linalg.norm(h), rel=1e-10)
        assert record.outer_step == pytest.approx(alpha, rel=1e-10)
        assert record.inner_step == pytest.approx(beta, rel=1e-10)
        assert (record.outer_trials, record.inner_trials) == (0, 0)
        x = x - alpha * h
    assert relative(result.x, x) < 1e-10 and relative(result.y, y) < 1e-10
    assert len(regimes) == 5, regimes


def test_bisps_bounds_fall_like_one_over_the_root():
    """With Polyak values that are always too long or too short, the bounds are the steps."""
    case = RIDGES[0]
    high = bilevel.bisps(1e-3, 1e-3, 0.0, outer_lower_bound=-1e9, inner_lower_bound=-1e9)
    for k, record in enumerate(run(case, high, 6, 2).history):
        assert record.outer_step == 1e-3 / math.sqrt(k + 1) == record.inner_step
    low = bilevel.bisps(1e-2, 1e-3, 1e-3, outer_lower_bound=-1e-9, c=1e9)
    for k, record in enumerate(run(case, low, 6, 2).history):
        assert record.outer_step == 1e-3 / math.sqrt(k + 1)


@pytest.mark.parametrize("case", [QUADRATIC, RIDGES[0]], ids=str)
def test_bisps_without_bounds_measures_them(case):
    """Its default: three searches in seven iterations and none between them."""
    result = run(case, bilevel.bisps(inner_lower_bound=-1e3), 7)
    assert [bool(r.outer_trials) for r in result.history] == [k in (0, 1, 3) for k in range(7)]
    first, last = (case.F(flat(x).numpy()) for x in (case.x, result.x))
    assert last < first


# -- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_improves_the_value_function(name):
    for case in (RIDGES[0], NESTED):
        if case is NESTED and "bis" not in name:
            continue  # hand-tuned steps are tuned for the ridge
        if case is NESTED and name == "bisps bounded":
            continue
        before = run(case, METHODS[name](), 0)
        assert relative(before.x, flat(case.x)) == 0
        result = run(case, METHODS[name](), 25)
        start, end = (case.F(flat(x).numpy()) for x in (case.x, result.x))
        assert end < start, (case, name)
        assert result.reason == "all 25 steps were taken"
        assert not any(record.failure for record in result.history)


@pytest.mark.parametrize("direction", ["adam", "sgd"])
@pytest.mark.parametrize("case", [QUADRATIC, NESTED], ids=str)
def test_bisls_finds_the_optimum(direction, case):
    result = run(case, bilevel.bisls(direction, hypergradient=EXACT), 50, 20)
    optimum = case.F(case.optimum)
    gap = case.F(flat(result.x).numpy()) - optimum
    assert abs(gap) < 2e-3 * (case.F(case.X) - optimum)


def test_bisls_sgd_with_exact_parts_is_gradient_descent_on_the_value_function():
    """With y* solved in closed form and an exact hypergradient, x moves along -F' with a step
    that fulfils Armijo on F itself: the tangent response is y* for a quadratic."""
    case = QUADRATIC
    method = bilevel.bisls(
        "sgd",
        hypergradient=EXACT,
        inner_solver=lambda x, y, batches: t(case.solution(flat(x).numpy())),
    )
    x, problem = case.X, Problem(case.outer, case.inner)
    state = method.init(case.x, case.y)
    for k in range(8):
        h = 1e-4
        g = np.array([(case.F(x + h * e) - case.F(x - h * e)) / (2 * h) for e in np.eye(len(x))])
        state, record = method.step(problem, state, None, 1)
        new = flat(state.x).numpy()
        alpha = record.outer_step
        assert relative(new, x - alpha * g) < 1e-7
        gain = case.F(x) - case.F(new)
        assert gain >= LEAST_C * alpha * g @ g * (1 - 1e-6)
        longer = case.F(x) - case.F(x - 2 * alpha * g)
        if k:  # doubled from the last, halved until accepted
            assert longer < alpha * g @ g or record.outer_trials == 1
        x = new


@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_one_odd_batch_costs_a_search_and_not_the_step(direction):
    """Where f curves up at once on one batch alone, the step falls, and grows from a quarter
    of the one before it in the next iteration."""

    def outer(x, y, batch):
        anchor, steepness = batch
        return (t([1.0, 0.3]) * (y - 1) ** 2).sum() + steepness * ((y - anchor) ** 2).sum()

    method = bilevel.bisls(
        direction, hypergradient=EXACT, inner_solver=lambda x, y, batches: x.clone()
    )
    problem = Problem(outer, lambda x, y: ((y - x) ** 2).sum())
    state, steps = method.init(t([40.0, -30.0]), t([0.0, 0.0])), []
    for k in range(6):
        state, record = method.step(problem, state, (state.x, 1e4 if k == 4 else 0.0), 1)
        steps.append(record.outer_step)
    assert 0 < steps[4] < steps[3] / 16
    assert steps[5] > 0.28 * steps[3]


def adam_as(direction):
    # 2^60 + sqrt(v) rounds to 2^60: A is the identity times a power of two, which is exact
    rule, scale = (Adam(0.0, 0.999, 2.0**60), 2.0**60) if direction else (Steepest(), 1.0)
    return Method("test", EXACT, rule, Armijo(scale), Armijo(1.0))


@pytest.mark.parametrize("case", [QUADRATIC, RIDGES[1]], ids=str)
def test_adam_with_the_identity_reproduces_sgd(case):
    """Bit for bit."""
    adam, sgd = (run(case, adam_as(flag), 10) for flag in (True, False))
    assert torch.equal(flat(adam.x), flat(sgd.x)) and torch.equal(flat(adam.y), flat(sgd.y))
    for a, s in zip(adam.history, sgd.history, strict=True):
        assert a.outer_step == s.outer_step * 2.0**60
        assert (a.outer_trials, a.outer_loss) == (s.outer_trials, s.outer_loss)
    assert relative(run(case, adam_as(False), 10).x, case.X) > 1e-3


@pytest.mark.parametrize("power", [-60, -20, 20])
def test_bisls_adam_does_not_depend_on_the_scale_of_the_outer_loss(power):
    case = RIDGES[0]
    plain = run(case, "bisls-adam", 10)
    scaled = bilevel.solve(
        lambda x, y: 2.0**power * case.outer(x, y), case.inner, case.x, case.y, steps=10
    )
    assert relative(scaled.x, plain.x) < 1e-12
    steps = [[r.outer_step for r in result.history] for result in (plain, scaled)]
    assert steps[0] == steps[1] and len(set(steps[0])) > 1


@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_first_steps_hardly_matter(direction):
    """Eight decades of first steps at both levels end within a factor."""
    case = QUADRATIC
    optimum, start = case.F(case.optimum), case.F(case.X)
    gaps = []
    for outer, inner in ((1e-4, 1e-4), (1e-4, 1e4), (1.0, 1.0), (1e4, 1e-4), (1e4, 1e4)):
        method = bilevel.bisls(direction, outer_step=outer, inner_step=inner)
        gaps.append(case.F(flat(run(case, method, 20).x).numpy()) - optimum)
    assert max(gaps) < 0.05 * (start - optimum)
    assert max(gaps) < 30 * min(gaps) + 1e-6 * (start - optimum)


# -- the line search of finding 1 -----------------------------------------------------------------


def toy(seed=0):
    """Linear hyper-representation: x maps 6 features to 3, y is a ridge regression on them."""
    rng = np.random.default_rng(seed)
    A, C = t(rng.standard_normal((200, 6))), t(rng.standard_normal((100, 6)))
    w = t(rng.standard_normal(6))
    a, c = (M @ w + 0.3 * t(rng.standard_normal(len(M))) for M in (A, C))

    def inner(x, y, batch=slice(None)):
        return ((A[batch] @ x @ y - a[batch]) ** 2).mean() / 2 + 0.005 * (y**2).sum()

    def outer(x, y, batch=slice(None)):
        return ((C[batch] @ x @ y - c[batch]) ** 2).mean() / 2

    return outer, inner, t(0.5 * rng.standard_normal((6, 3))), t(np.zeros(3))


@pytest.mark.parametrize("response", ["tangent", "refine", "unrolled"])
@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_without_slack_no_search_fails_on_a_deterministic_toy(response, direction):
    outer, inner, x, y = toy()
    options, inner_steps = {"response": response}, 2
    if response == "unrolled":
        options = {"hypergradient": Unrolled()}
    if response == "refine":  # which differentiates one more inner step than the hypergradient
        options["hypergradient"] = Implicit(ConjugateGradient(50, 1e-10))
        inner_steps = 10  # and so needs y near the solution
    method = bilevel.bisls(direction, slack=0.0, **options)
    result = bilevel.solve(outer, inner, x, y, method=method, steps=200, inner_steps=inner_steps)
    assert result.reason == "all 200 steps were taken"
    assert sum(record.failure is not None for record in result.history) == 0
    assert result.history[-1].outer_loss < 0.5 * result.history[0].outer_loss
    assert np.mean([record.outer_trials for record in result.history[1:]]) < 3.5


def test_frozen_searches_along_its_own_slope():
    """Where f hardly depends on x itself, no t satisfies a test with the full slope."""
    result = run(RIDGES[0], bilevel.bisls("sgd", response="frozen"), 12)
    assert not any(record.failure for record in result.history)


def naive(steps=60, inner_steps=5, carry=True):
    """Finding 1 of the method's notes: base f(x, y), trial f(x', y'(x')) on a refined y', slack
    0, and the exhausted step of a failed search stored."""
    outer, inner, x, y = toy()
    rng = np.random.default_rng(1)
    failures, trials, alpha = 0, 0, 0.5

    def descend(x, y, batch, count):
        for _ in range(count):
            y = y.detach().requires_grad_()
            y = (y - 0.3 * torch.autograd.grad(inner(x, y, batch), y)[0]).detach()
        return y

    for _ in range(steps):
        for _ in range(inner_steps):
            y = descend(x, y, rng.integers(0, 200, 32), 1)
        batch, phi = rng.integers(0, 200, 32), rng.integers(0, 100, 32)
        h = bilevel.hypergradient(outer, inner, x, y, phi, batch, Implicit(ConjugateGradient(9)))
        base, norm2 = float(h.value), float((h.grad**2).sum())
        step, found = 2 * alpha, False
        for _ in range(30):
            trials += 1
            trial = x - step * h.grad
            if float(outer(trial, descend(trial, y, batch, 1), phi)) <= base - 0.1 * step * norm2:
                found = True
                break
            step /= 2
        if found:
            x = trial
        failures += not found
        if found or carry:
            alpha = step
    return failures, trials / steps, alpha


def test_naive_base_collapses_and_ours_does_not():
    failures, trials, alpha = naive()
    assert failures > 15 and trials > 8
    outer, inner, x, y = toy()
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 200, 32) for _ in range(300)]
    heldout = [rng.integers(0, 100, 32) for _ in range(60)]
    for response in ("tangent", "refine"):
        result = bilevel.solve(
            outer,
            inner,
            x,
            y,
            inner_data=batches,
            outer_data=heldout,
            method=bilevel.bisls("sgd", response=response),
            steps=60,
            inner_steps=5,
        )
        ours = sum(record.failure is not None for record in result.history)
        assert ours <= (0 if response == "tangent" else 6), response
        assert len(result.history) == 60
        assert np.mean([record.outer_trials for record in result.history]) < 6


def test_a_failed_search_leaves_everything():
    oracles.failed_step_not_carried()


def test_ten_failures_in_a_row_end_the_run():
    def outer(x, y):
        bad = torch.tensor(math.nan) if not torch.is_grad_enabled() else 0.0
        return ((y - 1) ** 2).sum() + (x**2).sum() + bad

    case = RIDGES[0]
    result = bilevel.solve(outer, case.inner, case.x, case.y, steps=50)
    assert len(result.history) == 10 and result.state.failures == 10
    assert "no acceptable step in 40 trials, 10 iterations in a row" in result.reason
    assert torch.equal(result.x, case.x)
    assert torch.isfinite(result.y).all()


# -- projection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bisls-adam", "bisls-sgd", "bisps", "sgd", "adam"])
def test_every_point_is_feasible_and_the_tested_one_is_applied(name):
    case = QUADRATIC
    low, high = -0.6, 0.25
    tested, calls, hits = [], [], []

    def outer(x, y):
        assert torch.all((x.detach() >= low) & (x.detach() <= high))
        if not torch.is_grad_enabled():
            tested.append((x.clone(), y.clone()))
        return case.outer(x, y)

    def inner(x, y):
        assert torch.all((x.detach() >= low - 1e-15) & (x.detach() <= high + 1e-15))
        return case.inner(x, y)

    def project(x):
        calls.append(x.clone())
        hits.append(bool(torch.any((x < low) | (x > high))))
        return x.clamp_(low, high)  # in place: it is given a copy

    x = case.x.clone()
    assert float(x.max()) > high  # the start is not feasible
    result = bilevel.solve(
        outer,
        inner,
        x,
        case.y,
        method=bilevel.fixed("adam", 0.3, 0.2) if name == "adam" else name,
        steps=8,
        inner_steps=10,
        project=project,
    )
    assert torch.equal(x, case.x)
    assert len(calls) >= 9
    assert any(hits[1:]) and torch.equal(result.x.clamp(low, high), result.x)
    if name.startswith("bisls"):
        assert any(torch.equal(result.x, p) and torch.equal(result.y, q) for p, q in tested)


@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_projected_solution(direction):
    """Against L-BFGS-B on the value function, with bounds that are active."""
    case, low, high = QUADRATIC, -0.1, 0.2
    found = scipy.optimize.minimize(
        case.F, np.zeros(len(case.X)), bounds=[(low, high)] * len(case.X), tol=1e-12
    )
    assert np.any(np.isclose(found.x, low) | np.isclose(found.x, high))
    result = run(
        case,
        bilevel.bisls(direction, hypergradient=EXACT),
        40,
        20,
        project=lambda x: x.clamp(low, high),
    )
    gap = case.F(flat(result.x).numpy()) - found.fun
    assert gap < 1e-3 * (case.F(np.clip(case.X, low, high)) - found.fun)


# -- y --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
def test_warm_start(warm):
    """False: y begins at the given y in every outer iteration."""
    case, size, alpha = RIDGES[0], 0.3, 0.2
    method = bilevel.fixed("sgd", alpha, size, EXACT)
    result = run(case, method, 4, 3, warm_start=warm)
    x, y = case.X, flat(case.y).numpy()
    for _ in range(4):
        if not warm:
            y = flat(case.y).numpy()
        for _ in range(3):
            y = y - size * case.hessian(x) @ (y - case.solution(x))
        h = case.outer_x(x, y) - np.exp(x) * y * np.linalg.solve(
            case.hessian(x), case.outer_y(x, y)
        )
        x = x - alpha * h
    assert relative(result.x, x) < 1e-10 and relative(result.y, y) < 1e-10


def by_hand(case, make, steps, inner_steps, alpha):
    """fixed SGD on x over a torch optimizer on y that lives through the run."""
    x = like(case.x, case.X)
    parts = [leaf.clone().requires_grad_() for leaf in leaves(case.y)]
    made = make(parts)
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    for _ in range(steps):
        for _ in range(inner_steps):
            optimizer.zero_grad()
            loss = case.inner(x, like_parts(case.y, parts))
            if hasattr(optimizer, "searches"):
                optimizer.step(lambda: case.inner(x, like_parts(case.y, parts)))  # noqa: B023
            else:
                loss.backward()
                optimizer.step()
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.item())
            elif scheduler is not None:
                scheduler.step()
        y = like(case.y, flat(parts).detach().numpy())
        h = bilevel.hypergradient(case.outer, case.inner, x, y, method=EXACT)
        x = like(x, flat(x).numpy() - alpha * flat(h.grad).numpy())
    return x, y


def like_parts(tree, parts):
    from tests.engine.test_problems import like_of

    return like_of(tree, parts)


def two_groups(parameters):
    return torch.optim.SGD(
        [{"params": parameters[:1], "lr": 0.05}, {"params": parameters[1:], "lr": 0.2}]
    )


def scheduled(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)


def plateau(parameters):
    """Shrinks the rate wherever the loss did not fall by nine tenths."""
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.5)
    reduce = torch.optim.lr_scheduler.ReduceLROnPlateau
    return optimizer, reduce(optimizer, factor=0.7, patience=0, threshold=0.9)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam,
        torch.optim.SGD,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.AdamW, lr=0.05),
        two_groups,
        scheduled,
        plateau,
        optim.SLS,
        partial(optim.SLSB, max_lr=0.1),
        optim.AdaSLS,
    ],
)
@pytest.mark.parametrize("case", [RIDGES[0], NESTED], ids=str)
def test_inner_solver_optimizers(make, case):
    method = bilevel.fixed("sgd", 1e-3, 1.0, EXACT, inner_solver=make)
    result = run(case, method, 4, 3)
    x, y = by_hand(case, make, 4, 3, 1e-3)
    assert relative(result.y, flat(y)) < 1e-12
    assert relative(result.x, flat(x)) < 1e-12
    assert relative(result.y, flat(case.y)) > 1e-4


@pytest.mark.parametrize("case", [RIDGES[0], NESTED], ids=str)
def test_inner_solver_that_evaluates_as_often_as_it_likes(case):
    """LBFGS asks for the loss and its gradient by a closure."""
    solver = partial(torch.optim.LBFGS, max_iter=60, line_search_fn="strong_wolfe")
    method = bilevel.fixed("sgd", 1e-12, 1.0, EXACT, inner_solver=solver)  # x stays where it is
    result = run(case, method, 3, 2)
    assert relative(result.y, case.solution(flat(case.x).numpy())) < 1e-4
    assert result.history[-1].gradients > 3 * (2 + 2)  # each of them is counted


@pytest.mark.parametrize("name", ["bisls-adam", "bisls-sgd", "bisps", "fixed"])
def test_inner_solver_function(name):
    """The closed form as the inner solver: x gets to the optimum."""
    case, seen = NESTED, []

    def solver(x, y, batches):
        assert type(x) is dict and type(y) is dict and batches == [None] * 2
        seen.append(y)
        return like(case.y, case.solution(flat(x).numpy()))

    make = {
        "bisls-adam": bilevel.bisls,
        "bisls-sgd": partial(bilevel.bisls, "sgd"),
        "bisps": bilevel.bisps,
        "fixed": partial(bilevel.fixed, "sgd", 1e-4),
    }[name]
    result = run(case, make(hypergradient=EXACT, inner_solver=solver), 60, 2)
    assert len(seen) == 60
    optimum, start = case.F(case.optimum), case.F(case.X)
    assert case.F(flat(result.x).numpy()) - optimum < 0.02 * (start - optimum)


def test_inner_solver_trains_a_module_in_place():
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(20, 3, generator=rng, dtype=torch.float64)
    a = A @ t([1.0, -2.0, 0.5]) + 0.1
    y = torch.nn.Linear(3, 1).double()

    def inner(x, y):
        ridge = sum((p**2).sum() for p in y.parameters())
        return ((y(A)[:, 0] - a) ** 2).mean() + x.exp() * ridge

    def outer(x, y):
        return ((y(A + 0.1)[:, 0] - a) ** 2).mean()

    def solver(x, y, batches):
        optimizer = torch.optim.LBFGS(y.parameters(), max_iter=50, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = inner(x, y)
            loss.backward()
            return loss

        optimizer.step(closure)

    start = copy.deepcopy(y)
    method = bilevel.bisls(inner_solver=solver)
    result = bilevel.solve(outer, inner, t(0.0), y, method=method, steps=15)
    assert result.y is y and result.reason.startswith("all 15")
    loss = inner(result.x, y)
    grads = torch.autograd.grad(loss, list(y.parameters()))
    assert flat(grads).norm() < 0.3
    assert (y.weight - start.weight).abs().max() > 0.1
    assert result.history[-1].outer_loss < 0.5 * result.history[0].outer_loss


def test_inner_solver_that_searches_draws_once():
    """Its trials see what the first evaluation of their draw saw, the next draw something new."""
    masks = []

    def inner(x, y):
        masks.append(torch.rand(3, dtype=torch.float64))
        return (masks[-1] * (y - x) ** 2).sum() * 50

    x, y = t([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.float64)
    oracle = make_oracle(Problem(lambda x, y: y.sum(), inner), Layout(x, "x"), Layout(y, "y"))
    torch.manual_seed(0)
    run_solver(optim.SLS, oracle, x, y, [Draw() for _ in range(3)], None, tells=False)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    drawn = [torch.rand(3, dtype=torch.float64) for _ in range(3)]
    assert torch.equal(after, torch.get_rng_state())
    found = [[torch.equal(m, d) for d in drawn].index(True) for m in masks]
    assert found == sorted(found) and set(found) == {0, 1, 2}
    assert oracle.cost.gradients == 3 and oracle.cost.loss_evaluations == len(masks) - 3 > 3


@pytest.mark.parametrize("fails", [False, True])
def test_inner_solver_leaves_the_gradients_of_a_module(fails):
    y = torch.nn.Linear(3, 1).double()
    y(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    grads, values = [p.grad for p in y.parameters()], [p.grad.clone() for p in y.parameters()]
    calls = []

    def inner(x, y):
        calls.append(0)
        if fails and len(calls) > 10:
            raise OSError("no more")
        return (x - y.weight).square().sum() + y.bias.square().sum()

    method = bilevel.fixed("sgd", 0.1, inner_solver=torch.optim.SGD)
    start = t([1.0, 2.0, 3.0])
    run = partial(bilevel.solve, lambda x, y: y.weight.square().sum(), inner, start, y)
    if fails:
        with pytest.raises(OSError, match="no more"):
            run(method=method, steps=1, inner_steps=20)
    else:
        run(method=method, steps=2)
    for p, grad, value in zip(y.parameters(), grads, values, strict=True):
        assert p.grad is grad and torch.equal(grad, value)


def test_inner_solver_that_is_no_solver():
    case = RIDGES[0]
    for bad in (lambda parameters: "sgd", lambda parameters: None):
        with pytest.raises(TypeError, match="inner_solver returned.*torch.optim.Optimizer"):
            run(case, bilevel.bisls(inner_solver=bad), 2)
    with pytest.raises(ValueError, match="structure"):
        run(case, bilevel.bisls(inner_solver=lambda x, y, b: torch.zeros(3).double()), 2)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bilevel.bisls("sdg"), ["direction='sdg'", "'adam'", "'sgd'"]),
        (lambda: bilevel.bisls(reset="shrink"), ["reset='shrink'", "'grow'"]),
        (lambda: bilevel.bisls(response="exact"), ["response='exact'", "'tangent'"]),
        (lambda: bilevel.bisls(outer_step=0.0), ["outer_step=0.0", "positive"]),
        (lambda: bilevel.bisls(inner_step=-1.0), ["inner_step=-1.0", "positive"]),
        (lambda: bilevel.bisls(inner_step=math.inf), ["inner_step=inf", "finite"]),
        (lambda: bilevel.bisls(slack=-0.1), ["slack=-0.1", ">= 0"]),
        (lambda: bilevel.bisps(max_outer_step=0.0), ["max_outer_step=0.0", "positive"]),
        (lambda: bilevel.bisps(min_outer_step=0.1), ["min_outer_step=0.1", "max_outer_step"]),
        (lambda: bilevel.bisps(1.0, 1.0, 2.0), ["min_outer_step=2.0", "ceiling"]),
        (lambda: bilevel.bisps(c=0.0), ["c=0.0", "positive"]),
        (
            lambda: bilevel.bisls(hypergradient=Unrolled(), inner_solver=torch.optim.SGD),
            ["inner_solver", "Unrolled(", "not recorded", "Implicit"],
        ),
        (lambda: bilevel.fixed("rmsprop"), ["direction='rmsprop'", "'adam'"]),
        (lambda: bilevel.fixed(outer_step=-1.0), ["outer_step=-1.0", "positive"]),
    ],
)
def test_settings_that_cannot_be(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_settings_of_another_kind():
    with pytest.raises(TypeError, match="inner_step='big'.*positive"):
        bilevel.fixed(inner_step="big")


def test_methods_are_values():
    """Frozen, comparable, hashable, with a repr that tells the settings; they pickle."""
    import pickle

    method = bilevel.bisls("sgd", outer_step=0.5)
    assert method == bilevel.bisls("sgd", outer_step=0.5) != bilevel.bisls("sgd")
    assert hash(method) == hash(bilevel.bisls("sgd", outer_step=0.5))
    assert "0.5" in repr(method) and "ConjugateGradient" in repr(method)
    assert pickle.loads(pickle.dumps(method)) == method
    with pytest.raises(AttributeError):
        method.name = "other"


@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_first_steps_leave_no_trace(direction):
    """Runs from steps over eight decades agree in every bit, on batches as well."""
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(48, 4, generator=generator) * torch.tensor([1.0, 3.0, 0.1, 30.0])
    b = A @ torch.tensor([1.0, -1.0, 2.0, 0.1]) + torch.randn(48, generator=generator)
    rows = [(A[i : i + 8], b[i : i + 8]) for i in range(0, 48, 8)]

    def error(x, y, batch):
        return (batch[0] @ y - batch[1]).square().mean() / 2

    def penalised(x, y, batch):
        return error(x, y, batch) + (x.exp() * y * y).sum() / 2

    ends = []
    for first in itertools.product((1e-4, 0.3, 1.0, 1e4), repeat=2):
        result = bilevel.solve(
            *(error, penalised, torch.zeros(4), torch.zeros(4)),
            **{"outer_data": rows[:3], "inner_data": rows[3:], "steps": 12, "inner_steps": 2},
            method=bilevel.bisls(direction, *first),
        )
        ends.append(torch.cat([*result.state.vectors, result.x, result.y]))
    assert all(torch.equal(end, ends[0]) for end in ends)
    assert (ends[0][:4] != 0).all()


# -- places and numbers far away -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solution_at_infinity_is_not_left_again(method, dtype):
    """Labels of pure noise: the best penalty has no end, and where F is flat x stays near."""
    g = torch.Generator().manual_seed(1)
    A, B, a, b = (
        torch.randn(*n, generator=g).to(dtype) for n in ((40, 10), (200, 10), (40,), (200,))
    )
    seen = []
    bilevel.solve(
        lambda x, y: ((B @ y - b) ** 2).mean(),
        lambda x, y: ((A @ y - a) ** 2).mean() + x.exp() * (y**2).sum(),
        *(torch.tensor(0.0, dtype=dtype), torch.zeros(10, dtype=dtype)),
        method=method,
        steps=100,
        callback=lambda state, record: seen.append(float(state.vectors[0])),
    )
    F = [  # in closed form
        float(((B.double() @ y - b) ** 2).mean())
        for x in seen
        for y in [
            torch.linalg.solve(
                A.double().T @ A.double() / 40 + math.exp(x) * torch.eye(10),
                A.double().T @ a.double() / 40,
            )
        ]
    ]
    assert F[-1] < (b.double() ** 2).mean() * (1 + 1e-5) and max(F[30:]) < 1.001 * F[-1]


@pytest.mark.parametrize("target", [-3.0, -1.25, 0.5, 2.25])
def test_bisps_stays_where_it_has_converged(target):
    result = bilevel.solve(
        lambda x, y: (y - target) ** 2 / 2 + x**2 / 20,
        lambda x, y: (y - x) ** 2 / 2 + 1,
        *(t(0.0), t(0.0)),
        method="bisps",
        steps=100,
    )
    assert float(result.x) == pytest.approx(target / 1.1, abs=1e-2)


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd", "bisps", "adam", "sgd"])
def test_a_derivative_that_is_not_finite_is_told(method):
    result = bilevel.solve(
        lambda x, y: ((y - 0.3) ** 2).sum() + (y - y.detach()).square().sum().sqrt(),  # 0/0
        lambda x, y: ((y - 1) ** 2).sum() + (x.exp() * y**2).sum(),
        *(torch.zeros(3), torch.zeros(3)),
        method=method,
        tol=1e-6,
    )
    assert result.reason == "stopped at iteration 0: the norm of the hypergradient is nan"


def test_an_inner_loss_that_overflows_is_told_as_it_is():
    result = bilevel.solve(
        lambda x, y: y**2,
        lambda x, y: torch.where(y > 0.5, math.inf, (y - x) ** 2),
        *(t(0.4), t(0.3)),
        method=bilevel.fixed("sgd", 0.1, 10.0),
        inner_steps=3,
    )
    assert result.reason.endswith("the inner loss is inf")


def test_refining_needs_steps_of_ones_own():
    with pytest.raises(ValueError, match="response='refine' with inner_solver"):
        bilevel.bisls(response="refine", inner_solver=lambda x, y, batches: x)


def test_autocast_belongs_inside_the_losses():
    def inner(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return ((y - x) ** 2).sum().float()

    bilevel.solve(inner, inner, torch.ones(2), torch.zeros(2), steps=2)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="inside the loss"):
        bilevel.solve(inner, inner, torch.ones(2), torch.zeros(2), steps=2)


def test_bisps_stays_where_its_system_is_left_unsolved():
    """A floor of Polyak's step would be taken along an h that points anywhere."""
    scales = t([1e-3, 1.0, 1e3])

    def inner(x, y):
        return (scales * (y - x) ** 2).sum()

    def outer(x, y):
        return ((y - 1) ** 2).sum()

    def records(steps, bound=0.1):
        solver = bilevel.ConjugateGradient(steps, rtol=0.0, warm_start=False)
        method = bilevel.bisps(bound, 1e-4, bound, Implicit(solver))
        return bilevel.solve(
            outer, inner, t([0.0, 0.5, 0.9]), t([0.2, 0.4, 0.3]), method=method, steps=3
        ).history

    with pytest.warns(RuntimeWarning, match="x stayed where it was in 3 of 3"):
        unsolved = records(1)
    solved = records(3)
    assert all(r.residual > 1 and r.outer_step == 0 and r.failure is None for r in unsolved)
    assert all(r.residual < 1 and r.outer_step > 0 for r in solved)
