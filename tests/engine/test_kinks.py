"""Where f has kinks: steps of a search shrink away short of them, and longer ones lead across."""

import math
import warnings

import pytest
import torch
from torch import Tensor

import bilevel
from benchmarks.stumbles import flat_penalty, saddle
from bilevel import lengths
from bilevel.lengths import AFTER_LOSS, AFTER_REFUSAL, BUDGET_KEPT, SHRUNK, Lengths, leap
from bilevel.rules import Armijo, Line
from tests.tables import flat, t


def largest_error(seed, dtype=torch.float32):
    """f = max |y - b| of a y that is linear in x: 0 at the optimum, whose gradients are of one
    coordinate each."""
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(12, 12, generator=g, dtype=dtype) / 12**0.5 + torch.eye(12, dtype=dtype)
    b = torch.randn(12, generator=g, dtype=dtype)
    zeros = torch.zeros(12, dtype=dtype)
    return (
        lambda x, y: (y - b).abs().max(),
        lambda x, y: (y - M @ x).square().sum() / 2,
        *(zeros, zeros),
    ), lambda x: float((M @ x - b).abs().max())


def sparse(seed):
    """Corrections x of targets, few of which are wrong: f has a kink in every entry of x."""
    g = torch.Generator().manual_seed(seed)
    A, B, w = (torch.randn(*n, generator=g) for n in ((60, 10), (60, 10), (10,)))
    a = A @ w + 0.1 * torch.randn(60, generator=g)
    a[:8] += 5 * torch.randn(8, generator=g)

    def outer(x, y):
        return (B @ (y - w)).square().mean() + 0.02 * x.abs().sum()

    def inner(x, y):
        return (A @ y - a + x).square().mean() + 0.01 * y.square().sum()

    def objective(x):
        H = A.T @ A / 60 + 0.01 * torch.eye(10)
        return float(outer(x, torch.linalg.solve(H, A.T @ (a - x) / 60)))

    return (outer, inner, torch.full((60,), 0.01), torch.zeros(10)), objective


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd"])
@pytest.mark.parametrize(("problem", "share"), [(largest_error, 0.45), (sparse, 0.65)])
def test_kinks_do_not_stop_a_run(problem, share, method):
    """Without leaps, 0.63 of the start is left of the largest error and 0.8 of the other
    (`bisls-adam`), or more; they are stopped and go on to be."""
    ends = []
    for seed in range(3):
        arguments, objective = problem(seed)
        result = bilevel.solve(*arguments, method=method)
        assert result.reason == "all 100 steps were taken"
        assert sum(r.outer_trials for r in result.history) < 200
        ends.append(objective(result.x) / objective(arguments[2]))
    assert sum(ends) / 3 < share


def test_a_smooth_loss_sees_no_leap(monkeypatch):
    """Not one bit of a ridge's run changes by them."""
    g = torch.Generator().manual_seed(1)
    A, a, B, b = (torch.randn(*n, generator=g) for n in ((40, 20), (40,), (200, 20), (200,)))

    def solve():
        return bilevel.solve(
            lambda x, y: (B @ y - b).square().mean(),
            lambda x, y: (A @ y - a).square().mean() + (x.exp() * y.square()).sum(),
            *(torch.zeros(20), torch.zeros(20)),
        )

    with_leaps = solve()
    monkeypatch.setattr(lengths, "SHRUNK", math.inf)
    assert torch.equal(with_leaps.x, solve().x)


def test_steps_that_shrink_are_seen():
    seen = Lengths().found(16.0, 2.0, 0.0)  # 8 per length of the gradient
    assert seen == Lengths(8.0, 8.0, 0.0, 16.0)
    for step in (2.0, 0.5, 1e-3, 1e-3, 1e-3):  # means of it and the last: 5, 2.75, 1.4, ...
        assert not seen.shrunk and seen.leap(0.5, 1.0, 1.0, 1.0) == 0
        seen = seen.found(3 * step, 3.0, 0.0)
    for _ in range(2):
        seen = seen.found(1e-3, 1.0, 0.0)
    assert (seen.longest, seen.farthest) == (8.0, 16.0)
    assert seen.latest == pytest.approx(0.0873, abs=1e-2)
    assert seen.shrunk and SHRUNK * seen.latest < 8.0
    assert seen.leap(0.5, 1.0, 1.0, 1.0) == 16.0  # t ||d|| is the longest, times ||h||
    assert seen.leap(0.5, 4.0, 1.0, 1.0) == 32.0  # but no farther than a search has led
    # nor where a search goes half as far, nor where nothing is known of other batches
    assert seen.leap(0.5, 1.0, 7.99, 0.1) == 16.0 and seen.leap(0.5, 1.0, 8.0, 0.1) == 0
    assert seen.leap(0.5, 1.0, 1.0, 0.0) == 0
    # one batch of a gradient ten times as small is no longest step
    assert Lengths(1.0, 1.0).found(1.0, 0.1, 0.0).longest == 5.5


def test_how_long_the_late_steps_are():
    for late, share in ((8.0, 1.0), (2.0, 0.25), (0.25, 1 / SHRUNK), (1e-9, 1 / SHRUNK)):
        seen = Lengths(8.0, late)
        assert seen.share == share == float(Lengths(*map(t, seen)).share)
    assert Lengths().share == 1.0 == float(Lengths(*map(t, Lengths())).share)


@pytest.mark.parametrize("steps", [100, 250])
def test_steps_grow_on_the_way_from_a_saddle(steps):
    """Four in seven runs did not get away, as leaps went no farther than searches had led."""
    for seed in range(6):
        case = saddle(seed)
        result = case.solve("bisls-adam", steps=steps)
        assert case.objective(result.x) / float(case.outer(case.x, case.y)) < 0.06


@pytest.mark.parametrize("steps", [100, 250])
def test_leaps_do_not_go_to_and_fro_about_a_smooth_minimum(steps):
    """A run in three did, between two points that the tangent of y* both promised to gain."""
    for seed in (1001, 1003, 1006, 1010):
        case = flat_penalty(seed)
        every = torch.linspace(-14, 6, 2001, dtype=torch.float64)
        least = min(case.objective(x) for x in every)
        assert case.objective(case.solve("bisls-adam", steps=steps).x) / least - 1 < 1e-3


@pytest.mark.filterwarnings("ignore:the outer loss rose")
def test_no_leap_is_farther_than_a_search_has_led():
    """Where the gradient grows, and steps with it, x does not run off."""
    x, y = t([1.0, -2.0]), t([0.5, 0.5])
    result = bilevel.solve(
        lambda x, y: (y - 1).square().sum() + x.square().sum(),
        lambda x, y: (x * y).sum(),  # has no minimum
        *(x, y),
        steps=40,
        inner_steps=3,
    )
    assert result.reason == "all 40 steps were taken"
    assert float(result.x.abs().max()) < 1e7


def test_what_a_leap_may_lose():
    """What steps of late have gained, as far as other batches see it."""
    seen = Lengths(8.0, 0.1).found(0.1, 1.0, 2.0).found(0.1, 1.0, 1.0)
    assert seen.budget == pytest.approx(BUDGET_KEPT * (BUDGET_KEPT * 2 + 1))
    assert seen.allowed(1.0) == seen.budget and seen.allowed(0.25) == seen.budget / 4
    assert seen.allowed(0.0) == 0.0
    assert Lengths(8.0, 8.0, 1.0).allowed(1.0) == 0.0  # where nothing has shrunk
    lost = seen.leapt(-1.0)
    assert lost.longest == AFTER_LOSS * 8
    assert lost.budget == pytest.approx(BUDGET_KEPT * (seen.budget - 1))
    assert seen.leapt(1.0).longest == 8 and seen.leapt(-9.0).budget == 0
    assert seen.refused() == seen._replace(longest=AFTER_REFUSAL * 8)


def absolute(s):
    return (s - 1).abs() + 1


def test_a_leap_over_a_kink():
    line = Line(t(2.0), t(-1.0), lambda s: absolute(t(s)))
    for rise, far in ((0.0, 2.0), (0.5, 2.5)):  # as high as, and higher than at the start
        move = leap(line, far, rise, 0.125)
        assert (move.size, move.last, move.trials) == (far, 0.125, 1)
        assert move.gain == pytest.approx(2 - far) and not move.failed
        assert leap(line, far + 0.01, rise, 0.125) is None
    for bad in (math.nan, math.inf):
        assert leap(Line(t(2.0), t(-1.0), lambda s, bad=bad: t(bad)), 1.0, 9.0, None) is None
    back = Line(t(2.0), t(-1.0), lambda s: t(0.0), predicted=lambda s: 1.0)
    assert leap(back, 1.0, 9.0, None) is None


@pytest.mark.parametrize(("far", "rise"), [(2.0, 0.0), (2.5, 0.5), (2.6, 0.5), (40.0, 0.5)])
def test_a_leap_is_the_same_in_a_graph(far, rise):
    from bilevel.traced import search

    rule = Armijo(growth=2.0, retain=0.25)

    def phi(s):
        return absolute(s), 1

    found = search(rule, t(2.0), t(-1.0), phi, t(0.5), leap=(t(far), t(rise)), kappa=1.0)
    line = Line(t(2.0), t(-1.0), lambda s: absolute(t(s)))
    plain = leap(line, far, rise, 0.5)
    taken, trials = plain is not None, 0
    if not taken:
        plain, trials = rule(line, 3, 0.5), 1
    assert bool(found.leapt) == taken == (far <= 2.5)
    assert (float(found.size), float(found.last)) == (plain.size, plain.last)
    assert int(found.trials) == int(found.evaluations) == plain.trials + trials
    assert float(found.gain) == pytest.approx(plain.gain)
    before = Lengths(8.0, 0.1, 1.0, 0.01)
    graph = Lengths(*map(t, before)).refused().found(found.size, t(2.0), found.gain)
    assert tuple(map(float, graph)) == pytest.approx(
        before.refused().found(plain.size, 2.0, plain.gain)
    )
    for h in (3.0, 1e-4):
        far = before.leap(0.5, h, 1e-5, 1.0)
        assert far == 2 * min(8 * h, 0.01)
        assert float(Lengths(*map(t, before)).leap(*map(t, (0.5, h, 1e-5, 1.0)))) == far
    lost = Lengths(*map(t, before)).leapt(t(-2.0)).where(t(1.0) > 0, graph)
    assert isinstance(lost.longest, Tensor)
    assert tuple(map(float, lost)) == pytest.approx(before.leapt(-2.0))


def test_a_projection_is_leapt_with():
    """Onto a box around the optimum: the least largest error is still approached."""
    arguments, objective = largest_error(0)
    result = bilevel.solve(*arguments, project=lambda x: x.clamp(-3, 3))
    assert objective(result.x) < 0.5 * objective(arguments[2])
    assert float(result.x.abs().max()) <= 3


def test_a_rule_that_searches_anew_does_not_leap():
    for reset, leaps in (("grow", True), ("last", False), ("fixed", False)):
        assert bilevel.bisls(reset=reset).leaps == leaps
    for method in (bilevel.bisps(), bilevel.fixed()):
        assert not method.leaps
        (outer, inner, x, y), _ = largest_error(0)
        assert bilevel.solve(outer, inner, x, y, method=method, steps=8).state.lengths == Lengths()


def test_leaps_resume_bit_for_bit(tmp_path):
    arguments, _ = largest_error(2, torch.float64)
    whole = bilevel.solve(*arguments, steps=38)
    assert whole.state.lengths.shrunk  # there is something to forget
    path = tmp_path / "run.pt"
    for steps in (23, 38):
        part = bilevel.solve(*arguments, steps=steps, checkpoint=path, resume=steps == 38)
    assert torch.equal(flat(part.x), flat(whole.x)) and part.state.lengths == whole.state.lengths


def noisy(arguments, kind):
    """The same, but for a noise of f, in batches, or in pairs, where nobody can tell it."""
    outer, inner, x, y = arguments
    draw = torch.Generator().manual_seed(5)
    noise = [0.02 * torch.randn(12, generator=draw, dtype=x.dtype) for _ in range(7)]
    data = {"pairs": {"data": [(n, None) for n in noise]}, "batches": {"outer_data": noise}}
    return (lambda x, y, noise: outer(x, y + noise), inner, x, y), data[kind]


@pytest.mark.parametrize("kind", [None, "batches", "pairs"])
def test_nobody_leaps_where_nothing_is_known_of_other_batches(kind, monkeypatch):
    arguments, _ = largest_error(2, torch.float64)
    options = {}
    if kind:
        arguments, options = noisy(arguments, kind)
    taken = []

    def spy(line, t, rise, last):
        move = leap(line, t, rise, last)
        taken.append(move is not None)
        assert rise > 0
        return move

    monkeypatch.setattr("bilevel.iteration.leap", spy)
    assert bilevel.solve(*arguments, steps=1, **options).state.lengths.budget == 0
    kept = bilevel.solve(*arguments, **options).state.lengths
    assert any(taken) == bool(taken) == (kind != "pairs") and kept.budget > 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["batches", "pairs"])
def test_leaps_in_compiled_iterations(kind, monkeypatch):
    arguments, _ = largest_error(2, torch.float64)
    taken = []

    def spy(line, t, rise, last):
        taken.append(leap(line, t, rise, last))
        return taken[-1]

    monkeypatch.setattr("bilevel.iteration.leap", spy)
    arguments, options = noisy(arguments, kind)
    count = 44  # until a leap that loses is tried
    plain = bilevel.solve(*arguments, steps=count, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = bilevel.solve(*arguments, steps=count, compile=True, **options)
    assert not any("compile=True" in str(w.message) for w in caught)
    steps = [r.outer_step for r in plain.history]
    assert any(taken) == (kind != "pairs")
    assert [r.outer_step for r in fast.history] == pytest.approx(steps, rel=1e-6)
    tried = [r.outer_trials for r in plain.history]
    assert [r.outer_trials for r in fast.history] == tried
    assert fast.state.lengths == pytest.approx(plain.state.lengths, rel=1e-6)
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1e-8, 1e-20])
def test_a_hypergradient_whose_length_is_lost_in_rounding(scale):
    """In float32 the squares of h underflow near the solution: no length is told then."""
    result = bilevel.solve(
        lambda x, y: scale * (y**4).sum(),
        lambda x, y: ((y - x) ** 2).sum(),
        torch.tensor([1.0, 0.3, -2.0]),
        torch.zeros(3),
        steps=200,
    )
    assert "Error" not in result.reason
    assert result.x.abs().max() < 0.1
