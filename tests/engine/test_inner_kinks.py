"""Where g has kinks: a short way along y's tangent loses, inner steps stop, and a run tells."""

import math
import random
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import bilevel
from benchmarks.networks import example_weights
from benchmarks.unseen import coreset
from bilevel import Implicit, Problem, iteration, kinks
from bilevel.layout import Layout
from bilevel.linear import ConjugateGradient
from bilevel.problem import Draw, make_oracle
from bilevel.record import Record
from tests.tables import t

TOLD = "y stopped at a kink of g"


def near_kink(x, y):
    """y* follows x, but for what |y| takes of it; autograd's slope of |y| at 0 is 0."""
    return (y - x).square().sum() / 2 + 0.1 * y.abs().sum()


def oracle_of(inner, x, y, outer=lambda x, y: y.sum()):
    return make_oracle(Problem(outer, inner), Layout(x, "x"), Layout(y, "y")), x, y


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.0032, 0.0051])
def test_how_much_g_may_lose_by_a_short_way(margin, first):
    """Of t it loses 0.1 t - t^2 / 2: 0.005 at most, and nothing from 0.2 on."""
    oracle, x, y = oracle_of(near_kink, t([0.0]), t([0.0]))
    h = Implicit(ConjugateGradient(rtol=0.0)).estimate(
        oracle, x, y, Draw(None), [Draw(None)], [], None
    )
    follow = h.respond(t([1.0]), first, margin).follow
    for far in (0.01, 0.03, 0.05, 0.1, 0.15, 0.17, 0.19, 0.21, 0.4, 3.0):
        trusted = bool(follow(far, x + far).trusted)
        if not first:
            assert trusted == (0.1 * far - far**2 / 2 <= margin)
        else:  # no margin, and second order is to tell what g gains
            assert trusted == (far > 0.2 and 0.1 * far <= 0.9 * far**2 / 2)


def test_the_margin_is_what_inner_steps_gained():
    """All that g has fallen by where it is known to be concave, with batches or without; nothing
    where it is not."""
    A = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margins = []

    class Watched(Implicit):
        def estimate(self, *args):
            h = super().estimate(*args)
            respond = h.respond

            def watched(d, first=False, margin=0.0):
                margins.append(float(margin))
                return respond(d, first, margin)

            h.respond = watched
            return h

    def inner(x, y, rows=None):
        rows = A if rows is None else rows
        return (rows @ y - 1).square().mean() + (x.exp() * y.square()).sum()

    def outer(x, y):
        return (A @ y - 2).square().mean()

    x, y = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    method = bilevel.bisls(hypergradient=Watched(ConjugateGradient(rtol=1e-3)))
    state = method.init(x, y)
    problem = Problem(outer, inner)
    for k in range(4):
        start = state
        if k > 1:  # as of a network
            start = replace(state, learned=state.learned._replace(concave=0.1))
        state, _ = method.step(problem, start, None, 3)
        X, Y = start.vectors
        there = iteration.inner_steps(
            method, make_oracle(problem, *start.layouts), start, [Draw(None)] * 3
        )
        fallen = float(inner(X, Y) - inner(X, there.y))
        assert there.gain == pytest.approx(fallen, rel=1e-9) and fallen > 0
        assert margins[-1] == (there.gain if k > 1 else 0.0)
    batches = [A[:10], A[10:20], A[20:]]
    convex, concave = (
        replace(state, learned=state.learned._replace(concave=share)) for share in (0.0, 0.1)
    )
    method.step(problem, convex, None, batches)
    assert margins[-1] == 0.0
    method.step(problem, concave, None, batches)
    assert margins[-1] > 0
    # nothing where f has a batch, and nobody knows of others
    told = Problem(lambda x, y, batch: outer(x, y), inner)
    method.step(told, concave, A, batches)
    assert margins[-1] == 0.0
    # a slack may let g rise: that is no margin
    slack = replace(method, inner_rule=replace(method.inner_rule, slack=10.0, initial=1e3))
    far = replace(concave, inner_last=1e3)
    assert (
        iteration.inner_steps(slack, make_oracle(problem, *far.layouts), far, [Draw(None)]).gain < 0
    )
    slack.step(problem, far, None, 1)
    assert margins[-1] == 0.0


@pytest.mark.filterwarnings(f"ignore:{TOLD}:RuntimeWarning")
def test_rectifiers_do_not_stop_x():
    """Where g may lose nothing, 0.91 is left of 0.94."""
    case = example_weights(0)
    result = case.solve("bisls-adam", steps=100)
    assert case.value(result.x, result.y) < 0.4


def test_steps_that_lose_what_the_next_gain_lead_nowhere():
    """Where g is convex, following x may cost it nothing: 0.37, for 0.50 where it may cost what
    inner steps gain."""
    case = coreset(4)
    result = case.solve("bisls-adam", steps=100, seed=4)
    assert case.value(result.x, result.y) < 0.4


A, A_VAL = (
    torch.randn(n, 12, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for n in (30, 90)
)
W = torch.arange(12.0, dtype=torch.float64).clamp_max(3) * (torch.arange(12) % 2)


def lasso(rounded, penalties=1):
    def inner(x, y):
        size = (y.square() + 1e-3).sqrt() if rounded else y.abs()
        return (A @ (y - W) - 1).square().mean() / 2 + (x.exp() * size).sum()

    def outer(x, y):
        return (A_VAL @ (y - W)).square().mean()

    start = torch.full((penalties,), -3.0, dtype=torch.float64)
    return outer, inner, start, torch.zeros(12, dtype=torch.float64)


def hinge(rounded):
    labels = (A @ W).sign() * torch.where(torch.arange(30) < 8, -1.0, 1.0)

    def inner(x, y):
        short = 1 - labels * (A @ y)
        lost = F.softplus(short, beta=30) if rounded else short.relu()
        return (x.sigmoid() * lost).mean() + 0.01 * y.square().sum()

    def outer(x, y):
        return F.softplus(-(A_VAL @ W).sign() * (A_VAL @ y)).mean()

    return outer, inner, torch.zeros(30, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)


def sharp(direction="adam", **options):
    """Which leaves kinks as they are."""
    return replace(bilevel.bisls(direction, **options), rounds=False)


def told(*problem, **options):
    options = {"method": sharp(), **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = bilevel.solve(*problem, **options)
    return result, any(TOLD in str(w.message) for w in caught)


@pytest.mark.parametrize("options", [{}, {"method": sharp("sgd")}], ids=str)
@pytest.mark.parametrize("problem", [lasso, hinge])
def test_a_y_that_stopped_at_a_kink_is_told(problem, options):
    assert told(*problem(False), **options)[1]
    assert not told(*problem(True), **options)[1]


def test_what_is_advised_serves():
    ends = [told(*hinge(rounded))[0] for rounded in (False, True)]
    start = ends[0].history[0].outer_loss
    stopped, went_on = (start - result.history[-1].outer_loss for result in ends)
    assert stopped < 0.05 and went_on > 0.2

    outer, inner, x, y = lasso(False)
    every = torch.linspace(-4, -1, 31, dtype=torch.float64)
    losses = [float(outer(x, shrunk(x))) for x in every]
    for direction in ("adam", "sgd"):
        x = told(*lasso(True), method=sharp(direction))[0].x
        assert float(outer(x, shrunk(x))) < 1.02 * min(losses) < losses[10]


def shrunk(x, steps=4000):
    """The argmin of the lasso, by proximal gradient steps."""
    y = torch.zeros(12, dtype=torch.float64)
    step = len(A) / torch.linalg.matrix_norm(A, 2) ** 2
    for _ in range(steps):
        y = y - step * A.T @ (A @ (y - W) - 1) / len(A)
        y = y.sign() * (y.abs() - step * x.exp()).clamp_min(0)
    return y


@pytest.mark.parametrize(
    "options",
    [
        {"method": "bisps"},
        {"method": "adam"},
        {"method": sharp(inner_solver=lambda y: torch.optim.SGD(y, 0.1))},
        {"steps": 5},
    ],
    ids=["bisps", "adam", "solver", "few"],
)
def test_only_steps_that_are_searched_tell(options):
    assert not told(*lasso(False), **options)[1]


def test_a_look_leaves_generators_and_interrupts_as_they_are(monkeypatch):
    def noisy(look):
        def looked(*args):
            torch.rand(3)
            random.random()
            return look(*args)

        return looked

    drawn = []
    for look in (lambda *args: False, noisy(kinks.at_kink)):
        monkeypatch.setattr(kinks, "at_kink", look)
        random.seed(0)
        told(*lasso(False), seed=0)
        drawn.append((float(torch.rand(())), random.random()))
    assert drawn[0] == drawn[1]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(kinks, "at_kink", interrupted)
    result, _ = told(*lasso(False))
    assert len(result.history) == 100 and "interrupted from the keyboard" in result.reason


def test_a_run_that_ended_otherwise_is_not_looked_at(monkeypatch):
    looks = []
    monkeypatch.setattr(kinks, "tell", lambda *args: looks.append(args))
    outer, inner, x, y = lasso(False)
    calls = []

    def failing(x, y):
        calls.append(1)
        if len(calls) > 400:
            raise RuntimeError("no more")
        return inner(x, y)

    assert "no more" in told(outer, failing, x, y)[0].reason and not looks
    told(*lasso(False), steps=3)
    assert len(looks) == 1


def test_a_loss_without_second_derivatives_is_not_looked_at():
    """Its g_yy may be zero without a word, so that any bend would be a jump."""
    method = bilevel.bisls(hypergradient=bilevel.FiniteDifference(ConjugateGradient()))
    assert not told(*lasso(False), method=method)[1]


def test_steps_that_shrink_with_a_penalty_are_no_kink():
    """g becomes a thousand times as steep, and steps as much shorter."""
    result, said = told(
        lambda x, y: (y.exp() - 1e-3).square().sum() + (x - 9).square().sum(),
        lambda x, y: x.exp() * (y - 1).square().sum(),
        t(0.0),
        t([0.0, 2.0]),
    )
    assert kinks.shrank(result.history) and not said


def test_a_loss_that_raises_where_only_a_look_is_taken_ends_nothing(monkeypatch):
    def raises(*args):
        raise RuntimeError("no second derivative")

    monkeypatch.setattr(kinks, "at_kink", raises)
    result, said = told(*lasso(False))
    assert result.reason == "all 100 steps were taken" and not said


@pytest.mark.parametrize(
    ("inner", "y", "kinked"),
    [
        (lambda x, y: y.abs().sum(), [0.01], True),
        (lambda x, y: y.abs().sum() + 0.02 * y.square().sum(), [0.01], True),
        (lambda x, y: y.abs().sum(), [9.0], False),  # too far for steps of 0.1
        (lambda x, y: 3 * y.square().sum(), [0.3], False),
        (lambda x, y: (y.square() + 1e-3).sqrt().sum(), [0.01], False),
        (lambda x, y: y.exp().sum(), [0.3], False),
        (lambda x, y: (y - 7).sum() * 0, [0.3], False),
    ],
    ids=["|y|", "and smooth", "far", "square", "rounded", "exp", "flat"],
)
def test_what_is_a_kink(inner, y, kinked):
    oracle, x, y = oracle_of(lambda x, y: inner(x, y) + 0 * x.sum(), t([1.0]), t(y))
    assert not kinks.at_kink(oracle, x, y, Draw(None), 0.0, 0.1)  # steps of no length
    assert kinks.at_kink(oracle, x, y, Draw(None), 1e-3, 0.1) is kinked


def test_how_much_shorter_steps_are():
    def history(steps):
        rest = dict.fromkeys(Record.__dataclass_fields__, 0)
        return [Record(**rest | {"inner_step": step}) for step in steps]

    assert not kinks.shrank([]) and not kinks.shrank(history([1.0] + 8 * [1e-3]))
    assert kinks.shrank(history([1.0] + 9 * [1e-3]))
    assert not kinks.shrank(history([1.0] + 9 * [1 / 8]))
    assert kinks.shrank(history([1.0] + 11 * [1e-3] + [1.0] + 3 * [1e-3]))  # most of the last
    assert not kinks.shrank(history([1.0] + 10 * [1e-3] + [1.0, 1.0, 1e-3]))
    assert not kinks.shrank(history(20 * [math.nan]))
