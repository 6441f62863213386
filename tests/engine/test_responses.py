"""The y(t) that a trial is judged on: slopes, corrections, and where a tangent is refused."""

import math

import numpy as np
import pytest
import torch

import bilevel
from bilevel import ConjugateGradient, Implicit, Neumann, Problem, Unrolled
from bilevel.lag import corrected
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle
from bilevel.trials import Trials
from tests.engine import oracles
from tests.tables import (
    NESTED,
    QUADRATIC,
    RIDGES,
    flat,
    relative,
    t,
)

EXACT = Implicit(ConjugateGradient(200, 0.0))


def estimate(case, method, y=None):
    y = case.y_star if y is None else y
    oracle = Oracle(Problem(case.outer, case.inner), Layout(case.x, "x"), Layout(y, "y"))
    X, Y = flat(case.x), flat(y)
    path = []
    if isinstance(method, Unrolled):
        Y, path = method.descend(oracle, X, Y, Draw())
    return oracle, X, Y, method.estimate(oracle, X, Y, Draw(), [Draw()], path, None)


@pytest.mark.parametrize(
    "method",
    [
        EXACT,
        Implicit(ConjugateGradient(20, rtol=0.1)),
        Implicit(Neumann(3)),
        Implicit(bilevel.Identity()),
        Implicit(bilevel.Nystrom(3)),
        bilevel.FiniteDifference(ConjugateGradient(50, 1e-9)),
        Unrolled(4, step=0.2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("case", [RIDGES[0], RIDGES[1], QUADRATIC, NESTED], ids=str)
def test_slope_is_the_derivative_along_the_response(method, case):
    oracles.tangent_slope(method, case)


@pytest.mark.parametrize("case", [RIDGES[0], QUADRATIC], ids=str)
def test_tangent_is_that_of_the_solution(case):
    """At the inner solution and converged, y(t) = y + t dy*/dx d, by the closed form."""
    oracle, X, Y, h = estimate(case, EXACT)
    d = -h.grad
    follow = h.respond(d).follow
    w = np.linalg.solve(case.H, -case.cross(case.X) @ d.numpy())
    assert relative(follow(1e-3, X + 1e-3 * d)[0] - Y, 1e-3 * w) < 1e-9


def test_correction_solves_a_quadratic():
    oracles.solved_by_newton()


def test_correction_is_judged_by_another_batch():
    """A Newton step of one batch's Hessian is kept, shortened or dropped as another one sees it."""
    H = torch.diag(t([1.0, 100.0]))

    def inner(x, y, center):
        r = y - center - x
        return r @ H @ r / 2

    x, y = t([0.0, 0.0]), t([1.0, -2.0])
    oracle = Oracle(Problem(lambda x, y: (y * y).sum(), inner), Layout(x, "x"), Layout(y, "y"))
    solution = t([3.0, 1.0])
    h = EXACT.estimate(oracle, x, y, Draw(), [Draw(solution)], [], None)
    assert relative(h.newton()[0], solution - y) < 1e-12
    assert relative(h.lag, (2 * y) @ (y - solution)) < 1e-12

    def ends(center):
        return corrected(oracle, x, y, h, Draw(center))[0]

    assert relative(ends(solution), solution) < 1e-12
    assert relative(ends(y + 0.3 * (solution - y)), y + (solution - y) / 4) < 1e-12
    assert torch.equal(ends(y), y)


def flattered(seed):
    """How far f(x, y) is from f(x, y*(x)), relative, where y behind y* looks regularised:
    penalties that fall make g ill-conditioned."""
    draw = np.random.default_rng(seed)
    scale = np.logspace(0, -2, 12)
    A, A2 = draw.normal(size=(20, 12)) * scale, draw.normal(size=(200, 12)) * scale
    w = draw.normal(size=12)
    b, b2 = t(A @ w + 0.5 * draw.normal(size=20)), t(A2 @ w + 0.5 * draw.normal(size=200))
    A, A2 = t(A), t(A2)

    def inner(x, y):
        return ((A @ y - b) ** 2).mean() / 2 + (x.exp() * y * y).sum() / 2

    def outer(x, y):
        return ((A2 @ y - b2) ** 2).mean() / 2

    def truth(x):
        return outer(x, torch.linalg.solve(A.T @ A / 20 + x.exp().diag(), A.T @ b / 20))

    zeros = torch.zeros(12, dtype=torch.float64)
    result = bilevel.solve(outer, inner, zeros, zeros, steps=100, inner_steps=1)
    return abs(result.history[-1].outer_loss / float(truth(result.x)) - 1)


def test_y_does_not_stay_behind_where_that_flatters_f():
    """Without the correction f is off by up to 22 %, 4 % in the median, over these seeds.

    With it one of the eight, whose last steps are long, is at 3.6e-2 when the run ends, the others
    below 3e-3.
    """
    off = [flattered(seed) for seed in range(8)]
    assert np.median(off) < 1e-4 and sorted(off)[-2] < 5e-3 and max(off) < 0.05


def test_unrolled_response_is_the_same_steps_at_the_trial():
    case, size = RIDGES[0], 0.2
    oracle, X, Y, h = estimate(case, Unrolled(4, step=size), case.y)
    d = -h.grad
    follow = h.respond(d).follow
    x, y = X + 0.3 * d, flat(case.y)
    for _ in range(4):
        y = y.requires_grad_()
        y = (y - size * torch.autograd.grad(case.inner(x, y), y)[0]).detach()
    assert torch.allclose(follow(0.3, x)[0], y, rtol=1e-13)


def turning():
    """y* = sin(5 x): at x = 0 the tangent of slope 5 leaves it after a third."""
    x, y = t(0.0), t(0.0)
    return x, y, lambda x, y: (y - 3) ** 2, lambda x, y: (y - (5 * x).sin()) ** 2 / 2


def test_tangent_is_refused_where_the_inner_loss_gets_worse():
    x, y, outer, inner = turning()
    oracle = Oracle(Problem(outer, inner), Layout(x, "x"), Layout(y, "y"))
    h = EXACT.estimate(oracle, x[None], y[None], Draw(), [Draw()], [], None)
    d = -h.grad  # 30
    follow = h.respond(d).follow
    found = []
    for time in np.linspace(1e-3, 0.05, 50):
        p = 30 * time
        worse = (5 * p - math.sin(5 * p)) ** 2 > math.sin(5 * p) ** 2
        point, trusted, *_ = follow(float(time), x + float(time) * d)
        assert bool(trusted) != worse
        if trusted:
            assert float(point) == pytest.approx(5 * p, rel=1e-9)
        found.append(worse)
    assert set(found) == {True, False}


def test_tangent_is_refused_where_the_inner_loss_overflows():
    """From any y: infinite is not better than infinite."""
    x, y = t([0.0]), t([0.0])
    problem = Problem(lambda x, y: -y.sum(), lambda x, y: (x.exp() * (y - 1) ** 2 + y**2).sum())
    oracle = Oracle(problem, Layout(x, "x"), Layout(y, "y"))
    follow = EXACT.estimate(oracle, x, y, Draw(), [Draw()], [], None).respond(-x + 1).follow
    assert bool(follow(1e-3, x + 1e-3)[1]) and not bool(follow(800.0, x + 800.0)[1])


def test_a_first_tangent_is_refused_where_second_order_is_not_what_happens():
    x, y = t([0.0]), t([1.0])  # y* = e^x; half of the second derivative is 1/2
    problem = Problem(lambda x, y: -y.sum(), lambda x, y: ((y - x.exp()) ** 2).sum() / 2)
    oracle = Oracle(problem, Layout(x, "x"), Layout(y, "y"))
    h, d, found = EXACT.estimate(oracle, x, y, Draw(), [Draw()], [], None), t([1.0]), set()
    first, later = h.respond(d, True).follow, h.respond(d).follow
    for s in np.linspace(-4, 4, 41):
        gain = ((1 - np.exp(s)) ** 2 - (1 + s - np.exp(s)) ** 2) / 2
        close = abs(gain - s**2 / 2) <= 0.9 * s**2 / 2 + 1e-12
        assert bool(first(float(s), x + s)[1]) == close
        found.add((close, bool(later(float(s), x + s)[1])))
    assert found == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize(
    ("method", "shape", "start"),
    [
        *(("bisls-adam", "sigmoid", start) for start in (-20.0, -8.0, -4.0, 6.0)),
        *(("bisls-adam", "exp", start) for start in (-20.0, -8.0, -4.0)),
        *(("bisls-sgd", "sigmoid", start) for start in (-8.0, 6.0, 8.0, 15.0)),
        ("bisls-sgd", "exp", -8.0),
        *(
            (method, shape, -4.0)
            for method in ("bisls-sgd", "bisps")
            for shape in ("sigmoid", "exp")
        ),
    ],
)
def test_a_first_step_from_a_saturated_start_stays_near(method, shape, start):
    """y* = sigmoid(x) or e^x: along its tangent, nearly flat, x would go where it is flat again."""
    target, curve = 0.3, getattr(torch, shape)
    result = bilevel.solve(
        lambda x, y: ((y - target) ** 2).sum() / 2,
        lambda x, y: ((y - curve(x)) ** 2).sum() / 2,
        *(torch.full((5,), start), torch.zeros(5)),
        method=method,
    )
    assert float(((curve(result.x) - target) ** 2).sum() / 2) < 1e-6


@pytest.mark.parametrize("times", [1, 60])
def test_rounding_refuses_no_tangent(times):
    """A loss of 1 made of numbers that are so many times larger: too short a step to judge is
    trusted, up to where it can be judged."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(30, 20, generator=g)
    ballast = torch.linspace(0.5, 1.5, 200) * times

    def inner(x, y):
        fit = ((A @ y - 1) ** 2).mean() / 2 + (x.exp() * y * y).sum() / 2
        return (ballast + fit).mean() - ballast.mean()

    x, y = torch.zeros(20), torch.full((20,), 0.1)
    oracle = Oracle(Problem(lambda x, y: y.sum(), inner), Layout(x, "x"), Layout(y, "y"))
    h = EXACT.estimate(oracle, x, y, Draw(), [Draw()], [], None)
    d = -h.grad / h.grad.norm()
    follow = h.respond(d).follow
    refused = [not follow(float(s), x + s * d)[1] for s in torch.logspace(-7, -1, 200)]
    assert sum(refused) == 0


def test_no_step_is_taken_onto_a_refused_tangent():
    """The outer loss would love y = 5 x at any x; the accepted step stays where y* is near."""
    x, y, outer, inner = turning()
    method = bilevel.bisls("sgd", outer_step=64.0)
    problem = Problem(lambda x, y: 100 - y + 0 * x, inner)
    state, record = method.step(problem, method.init(x, y), None, 5)
    p = float(state.x)
    assert p > 0 and record.failure is None and record.outer_trials > 5
    assert (5 * p - math.sin(5 * p)) ** 2 <= math.sin(5 * p) ** 2
    assert float(state.y) == pytest.approx(5 * p, rel=1e-6)


# -- where y* bends -------------------------------------------------------------------------------


def curving(a):
    """y* = Q (x^2, 10 x) with g_yy = Q^-T Q^-1, and f linear in y: along the tangent, straight."""
    Q = t([[1.0, 0.4], [-0.3, 2.0]])
    back = torch.linalg.inv(Q)

    def solution(x):
        return Q @ torch.stack([x[0] ** 2, 10 * x[0]])

    def inner(x, y):
        return ((back @ (y - solution(x))) ** 2).sum() / 2

    return solution, lambda x, y: torch.dot(a, y), inner


@pytest.mark.filterwarnings("default")  # torch.func warns of its own parts
def test_the_bent_response_knows_the_second_order_of_the_solved_loss():
    """d^2/dt^2 f(x + t d, y*(x + t d)) by differences of the solved problem; y off its solution
    by little."""
    rows, labels = t([[1.0, 0.3], [-0.7, 2.0], [0.4, 0.9]]), t([0.5, -1.0, 2.0])

    def inner(x, y):
        return ((rows @ y - labels).exp().sum() + (x.exp() * y**2).sum()) / 3

    def outer(x, y):
        return ((y - 1) ** 2 * t([1.0, 3.0])).sum() + torch.dot(x, y)

    def solved(x):
        y = torch.zeros(2, dtype=torch.float64)
        for _ in range(50):
            gradient = torch.func.grad(inner, 1)(x, y)
            y = y - torch.linalg.solve(torch.func.hessian(inner, 1)(x, y), gradient)
        return y

    x, d = t([0.2, -0.5]), t([0.7, 0.4])
    oracle = Oracle(Problem(outer, inner), Layout(x, "x"), Layout(x, "y"))
    h = EXACT.estimate(oracle, x, solved(x), Draw(), [Draw()], [], None)
    follow, s = h.respond(d).follow, 1e-3

    def second(at):
        values = [float(outer(x + u * d, at(u))) for u in (-s, 0.0, s)]
        return (values[0] - 2 * values[1] + values[2]) / s**2

    truth = second(lambda u: solved(x + u * d))
    assert second(lambda u: follow(u, x + u * d).bent) == pytest.approx(truth, rel=1e-5)
    straight = second(lambda u: follow(u, x + u * d).y)
    assert abs(straight - truth) > 0.1 * abs(truth)  # or there is nothing to tell


def test_the_bent_response_of_a_quadratic_lag_is_exact():
    """With f linear in y and g_yy constant it has the value of the solved problem at any t, from
    a y that lags behind."""
    a, x, lag = t([2.0, 0.7]), t([1.5]), t([0.3, -0.2])
    solution, outer, inner = curving(a)
    y = solution(x) + lag
    oracle = Oracle(Problem(outer, inner), Layout(x, "x"), Layout(y, "y"))
    h = EXACT.estimate(oracle, x, y, Draw(), [Draw()], [], None)
    follow = h.respond(t([1.0])).follow
    for s in (-2.0, 1e-3, 0.5, 30.0):
        there = follow(s, x + s)
        assert float(outer(x, there.bent)) == pytest.approx(
            float(outer(x, solution(x + s) + lag)), rel=1e-10
        )
        assert relative(there.y, y + s * (solution(x + 1) - solution(x - 1)) / 2) < 1e-10


def test_only_a_first_trial_is_judged_where_y_bends():
    """A later one by its straight y, unless f rises where it bends."""
    a, x = t([1.0, -0.2]), t([1.5])
    solution, outer, inner = curving(a)
    y, draw = solution(x), Draw()
    oracle = Oracle(Problem(outer, inner), Layout(x, "x"), Layout(y, "y"))
    h, found = EXACT.estimate(oracle, x, y, draw, [draw], [], None), set()
    for first in (True, False):
        trials = Trials(oracle, (x, y), draw, draw, h, -h.grad, "tangent", 0.0, 1.0, first)
        follow = h.respond(-h.grad).follow
        for s in np.linspace(0.01, 2.0, 50):
            there = follow(float(s), x - float(s) * h.grad)
            rises = bool(outer(x, there.bent) > h.value)
            expected = outer(x, there.bent) if first else math.inf if rises else outer(x, there.y)
            if bool(there.trusted):
                assert float(trials.phi(float(s))) == pytest.approx(float(expected), rel=1e-12)
                assert torch.equal(trials.reach(float(s))[1], there.y)
                found.add((first, rises))
    assert {(True, False), (False, True), (False, False)} <= found


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd"])
def test_a_straight_loss_and_a_bent_solution(method):
    """f = y_1 of y* = (x^2, 10 x): on the tangent f falls for ever, and x went to 8 and on."""
    solution, outer, inner = curving(t([1.0, -0.2]))  # f(y*) = 1.06 x^2
    result = bilevel.solve(
        *(outer, inner, t([1.0]), torch.zeros(2, dtype=torch.float64)),
        method=method,
    )
    least = min(float(outer(None, solution(t([s])))) for s in np.linspace(-5, 5, 10001))
    start, end = (float(outer(None, solution(x))) for x in (t([1.0]), result.x))
    assert end - least < 1e-6 * (start - least)


@pytest.mark.parametrize("steps", [150, 200, 300])
def test_a_solution_that_is_reached_is_not_left(steps):
    """Along the tangent f falls for ever, so that leaps promised gains that no y* has: after 180
    iterations at 1e-17 x was led off, by more in every iteration."""
    _, outer, inner = curving(t([1.0, -0.2]))
    start = t([1.0]), torch.zeros(2, dtype=torch.float64)
    history = bilevel.solve(outer, inner, *start, steps=steps).history
    assert max(r.outer_loss for r in history[60:]) < 1e-4


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd", "bisps"])
def test_a_linear_loss_of_logarithms_of_probabilities(method):
    """y* = log softmax(x), f = -<b, y>: the first step was 5e11 long."""
    b = t([0.1, 0.2, 0.3, 0.25, 0.15])
    result = bilevel.solve(
        lambda x, y: -torch.dot(b, y),
        lambda x, y: ((y - x.log_softmax(0)) ** 2).sum() / 2,
        *(torch.zeros(5, dtype=torch.float64),) * 2,
        method=method,
    )
    entropy = -float(torch.dot(b, b.log()))
    loss = -float(torch.dot(b, result.x.log_softmax(0)))
    assert loss - entropy < {"bisps": 0.05}.get(method, 1e-6)
