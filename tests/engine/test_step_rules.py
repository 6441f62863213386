"""Step-size rules on lines: bounds that are proven, paths that are computed by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.rules import Adam, Armijo, Fixed, Line, Moments, Polyak, Steepest
from bilevel.steps import armijo, envelope, polyak, schedule
from tests.tables import t


class Quadratic:
    """f(x) = x'Hx/2 with largest curvature L, along the steepest descent from a random x."""

    def __init__(self, seed, n=5, power=3.0):
        rng = np.random.default_rng(seed)
        self.lam = 10 ** rng.uniform(-power, power, n)
        self.L = self.lam.max()
        self.x = rng.standard_normal(n)
        self.g = self.lam * self.x
        self.norm2 = float(self.g @ self.g)
        self.value = self.f(self.x)

    def f(self, x):
        return float(self.lam @ x**2) / 2

    def phi(self, step):
        return self.f(self.x - step * self.g)

    def line(self):
        return Line(t(self.value), t(-self.norm2), lambda step: t(self.phi(step)))


def line_of(a, value=1.0):
    """phi(s) = value - s + a s^2 / 2: with c = 1/2, accepted up to s = 1 / a."""
    return Line(t(value), t(-1.0), lambda s: t(value - s + a * s * s / 2))


seeds = st.integers(0, 2**31)
exact = settings(max_examples=100, deadline=None, derandomize=True)


@exact
@given(
    seed=seeds,
    start=st.floats(1e-6, 1e6),
    c=st.floats(0.01, 0.9),
    shrink=st.floats(0.1, 0.9),
)
def test_armijo_lower_bound(seed, start, c, shrink):
    """min{start, 2 shrink (1 - c) / L} <= step <= f / (c ||g||^2), and the condition holds."""
    q = Quadratic(seed)
    found = armijo(q.phi, q.value, -q.norm2, start, c=c, shrink=shrink, max_trials=1000)
    assert found.accepted
    assert found.step >= min(start, 2 * shrink * (1 - c) / q.L) * (1 - 1e-9)
    assert found.step <= q.value / (c * q.norm2) * (1 + 1e-9)
    assert found.value == q.phi(found.step) <= q.value - c * found.step * q.norm2
    if found.trials > 1:  # the first trial on the grid that is accepted
        refused = found.step / shrink
        assert q.phi(refused) > q.value - c * refused * q.norm2 - 1e-12 * q.value
        assert found.step == pytest.approx(start * shrink ** (found.trials - 1), rel=1e-9)
    else:
        assert found.step == start


@exact
@given(seed=seeds, c=st.floats(0.1, 5))
def test_polyak_lower_bound(seed, c):
    """(f - inf f) / (c ||g||^2) >= 1 / (2 c L), with equality along the stiffest direction."""
    q = Quadratic(seed)
    step = float(polyak(t(q.value), t(q.norm2), c))
    assert step >= 1 / (2 * c * q.L) * (1 - 1e-12)
    assert step == pytest.approx(q.value / (c * q.norm2), rel=1e-14)
    lower_bound_below = float(polyak(t(q.value + 1), t(q.norm2), c))
    assert lower_bound_below > step
    x = np.zeros(5)
    x[q.lam.argmax()] = 2.0
    q.x, q.g = x, q.lam * x
    stiff = float(polyak(t(q.f(x)), t(float(q.g @ q.g)), c))
    assert stiff == pytest.approx(1 / (2 * c * q.L), rel=1e-12)


@pytest.mark.parametrize(
    ("gap", "norm2"),
    [(-1.0, 2.0), (1.0, 0.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)],
)
def test_polyak_step_is_zero_where_it_is_not_defined(gap, norm2):
    assert float(polyak(t(gap), t(norm2))) == 0.0


@exact
@given(step=st.floats(0, 10), lower=st.floats(0, 10), upper=st.floats(0, 10))
def test_envelope(step, lower, upper):
    assert float(envelope(t(step), lower, upper)) == min(max(lower, step), upper)
    assert float(envelope(t(step), t(lower), t(upper))) == min(max(lower, step), upper)


def test_schedule():
    found = [schedule(3.0, k) for k in range(5)]
    assert np.allclose(found, [3 / math.sqrt(k) for k in (1, 2, 3, 4, 5)], rtol=1e-15)
    assert [schedule(3.0, k, 1) for k in range(3)] == [3.0, 1.5, 1.0]
    assert schedule(3.0, 7, 0) == 3.0
    assert [float(Fixed(2.0, 0.5)(line_of(1.0), k, None).size) for k in (0, 3)] == [2.0, 1.0]


@pytest.mark.parametrize("seed", range(4))
def test_polyak_becomes_scheduled_sgd(seed):
    """After k0 = (2 c L bound)^2 the step is the bound: SPSB is SGD with the schedule."""
    q, c = Quadratic(seed, power=0.5), 1.3
    bound = 20 / q.L
    rule, k0 = Polyak(c=c, upper=bound), math.ceil((2 * c * q.L * bound) ** 2)
    for k in (k0, k0 + 1, 10 * k0):
        assert float(rule(q.line(), k, None).size) == bound / math.sqrt(k + 1)
    early = float(rule(q.line(), 0, None).size)
    assert early == pytest.approx(min(q.value / (c * q.norm2), bound), rel=1e-14)
    assert early < bound


def test_polyak_rule():
    """min{max{lower_k, gap / (c |slope|)}, upper_k} in every regime, at k = 3: bounds halved."""
    line = Line(t(5.0), t(-4.0), None)
    rule = Polyak(lower_bound=3.0, c=2.0, lower=0.1, upper=1.0)
    assert float(rule(line, 3, None).size) == 2 / (2 * 4)
    assert float(Polyak(3.0, 2.0, 0.1, 0.2)(line, 3, None).size) == 0.1  # ceiling
    assert float(Polyak(3.0, 2.0, 0.8, 2.0)(line, 3, None).size) == 0.4  # floor
    # a loss below its bound: the bound is wrong, the ceiling alone counts
    assert float(Polyak(9.0, 2.0, 0.1, 1.0)(line, 3, None).size) == 0.5
    # no descent, no step
    assert float(rule(Line(t(5.0), t(0.0), None), 3, None).size) == 0.0
    assert float(rule(Line(t(5.0), t(math.nan), None), 3, None).size) == 0.0
    # never NaN
    assert math.isfinite(float(rule(Line(t(math.nan), t(-4.0), None), 3, None).size))


def test_polyak_measures_its_ceiling():
    """A line search at k = 0, 1, 3, 7 finds 2 = the largest power of two below 1/a = 3."""
    rule, last, searched = Polyak(lower_bound=-1e9), None, []
    for k in range(9):
        assert rule.searches(k, last) == (k in (0, 1, 3, 7))
        move = rule(line_of(1 / 3), k, last)
        last = move.last
        searched += [k] if move.trials else []
        # the ceiling since the last measurement at m: 2 sqrt(m + 1) / sqrt(k + 1)
        m = max(j for j in (0, 1, 3, 7) if j <= k)
        factor = float(move.size) / (2 * math.sqrt((m + 1) / (k + 1)))
        # a later search starts at the doubled ceiling, so it lands within a factor of two
        assert 0.5 < factor <= 1.5 + 1e-9
        assert float(move.size) <= 3 + 1e-9
    assert searched == [0, 1, 3, 7]


# -- the search -----------------------------------------------------------------------------------

CURVATURES = [1 / 3, 1 / 3, 1.0, 1.0, 1 / 3, 1 / 3, 1 / 3]


def path(rule, curvatures=CURVATURES):
    last, steps, trials = None, [], []
    for k, a in enumerate(curvatures):
        move = rule(line_of(a), k, last)
        assert not move.failed and move.last == move.size
        last = move.last
        steps.append(move.size)
        trials.append(move.trials)
    return steps, trials


@pytest.mark.parametrize(
    ("reset", "steps", "trials"),
    [
        # a search brackets at first: 16, 8, 4 are refused, 1 is worse than 2
        ("grow", [2, 2.4, 0.72, 0.864, 1.0368, 1.24416, 1.492992], [5, 1, 3, 1, 1, 1, 1]),
        ("last", [2, 2, 1, 1, 1, 1, 1], [5, 1, 2, 1, 1, 1, 1]),
        ("fixed", [2, 2, 1, 1, 2, 2, 2], [4, 4, 5, 5, 4, 4, 4]),
    ],
)
def test_resets(reset, steps, trials):
    """Curvatures 1/3 and 1 allow steps of 3 and 1; 'grow' recovers by 1.2, 'last' never."""
    found = path(Armijo(16.0, reset=reset))
    assert found[0] == pytest.approx(steps, rel=1e-12) and found[1] == trials
    # growing twofold stays within a factor of two of what is allowed, at twice the trials
    if reset == "grow":
        twofold = path(Armijo(16.0, growth=2.0))
        assert twofold == ([2, 2, 1, 1, 2, 2, 2], [5, 2, 3, 2, 1, 2, 2])


@pytest.mark.parametrize("initial", [10.0**p for p in range(-6, 7, 3)] + [0.3, 0.7])
@pytest.mark.parametrize("curvature", [1 / 3, 1, 1e-5, 77.0])
def test_first_search_brackets(initial, curvature):
    """Whatever the first step tried: the longest power of two that Armijo's test allows."""
    move = Armijo(initial)(line_of(curvature), 0, None)
    assert move.size == 2.0 ** math.floor(-math.log2(curvature)) and not move.failed
    assert move.trials <= abs(math.log2(initial) - math.log2(move.size)) + 4


def test_first_search_of_any_start_ends_in_the_same_valley():
    """phi is not quadratic, its lowest power of two no longer the longest that is allowed."""
    for p in range(-12, 13):
        line = Line(t(1.0), t(-1.0), lambda s: t(1 - s + 0.45 * abs(s) ** 1.5))
        assert Armijo(1.3 * 2.0**p, c=0.1)(line, 0, None).size == 2.0, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_search_starts_where_something_can_be_seen(dtype):
    """A first step whose decrease is lost in rounding does not stop the search there."""
    noise = torch.finfo(dtype).eps

    def phi(s):  # rounding that speaks against longer steps
        return torch.tensor(1 - s + s * s / 2 + noise * math.sin(1e9 * s), dtype=dtype)

    line = Line(torch.tensor(1.0, dtype=dtype), torch.tensor(-1.0, dtype=dtype), phi)
    for initial in (2.0**-30, 2.0**-20, 1.0):
        assert Armijo(initial)(line, 0, None).size == 1.0
    flat = Line(t(1.0), t(-1e-290), lambda s: t(1.0))  # nothing is ever seen
    move = Armijo(1.0)(flat, 0, None)
    assert not move.failed and move.trials <= 3


@pytest.mark.parametrize(
    ("initial", "curvature"), [(1e3, 1 / 3), (1e-3, 1e-5), (1.0, 0.9), (2.0, 0.1)]
)
def test_first_search_brackets_the_same_in_a_graph(initial, curvature):
    from bilevel.traced import search

    def phi(s):
        return 1 - s + curvature * s**1.5, 1

    rule = Armijo(initial, c=0.1)
    plain = rule(Line(t(1.0), t(-1.0), lambda s: phi(t(s))[0]), 0, None)
    found = search(rule, t(1.0), t(-1.0), phi, t(math.nan), 0.1)
    size, last, trials, failed, looks = map(float, found[:5])
    assert (size, last, int(trials), bool(failed)) == (*plain[:3], plain.failed)
    assert looks == plain.trials


@pytest.mark.parametrize("last", [None, 0.7, 1e-3])
@pytest.mark.parametrize(
    "rule",
    [
        Armijo(c="auto", retain=0.5),
        Armijo(0.3, c="auto", reset="fixed", retain=0.5),
        Armijo(c=0.4, reset="last", slack=1e-6, retain=0.2),
    ],
)
def test_a_search_is_the_same_in_a_graph(rule, last):
    """What it takes, what it remembers, what it asks for; on lines that allow long steps, short
    ones after many halvings, and none."""
    from bilevel.traced import search

    def kinked(s, at, left):  # the share of the decrease that is left beyond `at`
        return torch.where(s <= at, 1 - s, 1 - left * s), 1

    found = set()
    lines = ((2.0, 0.1), (0.5, 0.45), (0.02, 0.1), (0.02, 0.35), (1e-5, 0.1), (0.0, -0.5))
    for at, left in lines:
        phi = partial(kinked, at=at, left=left)
        for kappa in (0.0, 0.5, 1.0):
            line = Line(t(1.0), t(-1.0), lambda s, phi=phi: phi(t(s))[0], kappa=kappa)
            plain = rule(line, 3, last)
            carried = t(math.nan if last is None else last)
            graph = search(rule, line.value, line.slope, phi, carried, kappa)
            size, after, trials, failed, *_ = graph
            expected = math.nan if plain.last is None else plain.last
            assert float(size) == pytest.approx(plain.size, rel=1e-12)
            assert float(after) == pytest.approx(expected, rel=1e-12, nan_ok=True)
            assert (int(trials), bool(failed)) == (plain.trials, plain.failed)
            assert not graph.leapt
            if plain.size:
                assert float(graph.gain) == pytest.approx(plain.gain, rel=1e-12)
            found.add((plain.size, plain.last))
    assert len(found) > 2


def test_what_a_projection_leaves_to_rounding_is_no_failure():
    """At the solution long steps gain nothing and short ones are predicted to gain, or lose, less
    than can be told: one of these is taken. What is predicted to lose more is refused."""
    for left, failed in ((1e-15, False), (1e-13, True)):
        line = Line(
            t(1.0), t(-1.0), lambda s: t(1.0 + 1e-4 * s**2), lambda s, e=left: e - 1e-11 * s
        )
        move = Armijo()(line, 3, 1.0)
        assert move.failed == failed
        assert (0 < move.size < 1e-4) != failed


def test_how_much_of_its_last_step_a_search_retains():
    def line(longest):
        return Line(t(1.0), t(-1.0), lambda s: t(1 - s if s <= longest else 2.0))

    for retain, remembered in ((0.0, 1.2 / 64), (0.5, 0.5), (0.01, 1.2 / 64)):
        move = Armijo(retain=retain)(line(0.03), 3, 1.0)
        assert (move.size, move.last, move.trials) == (1.2 / 64, remembered, 7)
    move = Armijo(retain=0.5)(line(1.0), 3, 1.0)  # a fall by half is remembered as it is
    assert move.size == move.last == 0.6
    assert Armijo(retain=0.5, max_trials=3)(line(0.03), 3, 1.0).last == 1.0  # nothing was found
    assert Armijo(retain=0.5)(line(0.03), 0, None).last == 2.0**-6  # nor was there one before


def test_bracketing_stops_where_the_loss_rises():
    """Accepted by Armijo, but past the minimum: the best trial is kept, not the longest."""
    seen = []

    def phi(s):
        seen.append(s)
        return {0.5: 0.8, 1.0: 0.5, 2.0: 0.6}[s]

    found = armijo(phi, 1.0, -0.1, 0.5, c=0.1, grow=2.0)
    assert (found.step, found.value, found.trials) == (1.0, 0.5, 3) and seen == [0.5, 1, 2]


@pytest.mark.parametrize("last", [None, 0.7])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 1.1])
def test_a_failed_search_is_not_remembered(last, bad):
    seen = []

    def phi(s):
        seen.append(s)
        return t(bad)

    move = Armijo(max_trials=13)(Line(t(1.0), t(-1.0), phi), 5, last)
    assert (move.size, move.last, move.trials, move.failed) == (0.0, last, 13, True)
    assert len(seen) == 13 and len(set(seen)) == 13


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
def test_a_trial_that_is_not_finite_is_refused(bad):
    def phi(s):
        return t(bad if s > 0.3 else 1 - s)

    move = Armijo(1.0)(Line(t(1.0), t(-1.0), phi), 0, None)
    assert (move.size, move.trials, move.failed) == (0.25, 4, False)
    # growing into it keeps the last good one
    move = Armijo(0.125)(Line(t(1.0), t(-1.0), phi), 0, None)
    assert (move.size, move.trials, move.failed) == (0.25, 3, False)


@pytest.mark.parametrize(("value", "slope"), [(math.nan, -1.0), (1.0, math.nan), (math.inf, -1.0)])
def test_a_line_that_is_not_finite_fails_without_a_trial(value, slope):
    move = Armijo()(Line(t(value), t(slope), None), 0, 0.7)
    assert (move.size, move.last, move.trials, move.failed) == (0.0, 0.7, 0, True)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_no_descent_no_step(slope):
    move = Armijo()(Line(t(1.0), t(slope), None), 0, 0.7)
    assert (move.size, move.last, move.trials, move.failed) == (0.0, 0.7, 0, False)


def test_slack():
    """An increase of slack |phi(0)| is allowed, and no more."""
    for value in (4.0, -4.0):
        for excess, ok in ((0.39, True), (0.41, False)):
            line = Line(t(value), t(-1e-9), lambda s, e=excess, v=value: t(v + e))
            assert Armijo(slack=0.1, reset="fixed")(line, 0, None).failed != ok


def test_rounding_is_forgiven_and_does_not_grow_the_step():
    """At a solution the decrease drowns in rounding: accept, but never a longer step."""
    line = Line(t(1.0), t(-1e-18), lambda s: t(1.0 + 1e-16))
    assert Armijo(reset="last")(line, 3, 0.5) == (0.5, 0.5, 1, False, 0.0)
    line = Line(t(1.0), t(-1e-18), lambda s: t(1.0 + 1e-14))
    assert Armijo()(line, 3, 0.5).failed


def test_a_step_lost_in_rounding_finds_its_way_back():
    """1e-9 is too short to be seen in phi, and no reason to stay there."""
    rule, last, trials = Armijo(), 1e-9, []
    for k in range(1, 150):
        g = 1e-3  # phi(s) = 1 - g^2 s + g^2 s^2 / 6: steps up to 3 are allowed
        line = Line(t(1.0), t(-(g**2)), lambda s, g=g: t(1.0 - g**2 * s + g**2 * s**2 / 6))
        move = rule(line, k, last)
        assert not move.failed
        last = move.last
        trials.append(move.trials)
    assert 1 < last <= 3 and max(trials) <= 2


def test_at_the_solution_no_trial_is_as_far_as_rounding_would_let_it():
    """Refused where it could be seen; the step stays what it was."""
    g2 = 1e-18
    line = Line(t(1.0), t(-g2), lambda s: t(1.0 - g2 * s + g2 * s**2 / 6))
    assert Armijo()(line, 3, 0.5) == (0.5, 0.5, 2, False, 0.0)


def test_where_phi_extrapolates_no_trial_is_far():
    """A straight phi falls without end; of a tangent that says nothing of far away."""
    for extrapolates, step in ((False, 8 * 8 * 2.0**-52 / 1e-18), (True, 0.5)):
        line = Line(t(1.0), t(-1e-18), lambda s: t(1.0 - 1e-18 * s), extrapolates=extrapolates)
        move = Armijo()(line, 3, 0.5)
        assert move.size == move.last == pytest.approx(step) and move.trials == 1


# -- directions -----------------------------------------------------------------------------------


def test_adam_is_that_of_torch():
    rng = torch.Generator().manual_seed(0)
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=1.0, betas=(0.9, 0.95), eps=1e-3)
    moments, ours, ascends = Moments(), torch.zeros(6, dtype=torch.float64), 0
    for _ in range(200):
        g = torch.randn(6, generator=rng, dtype=torch.float64)
        ascends += bool(torch.dot(g, Adam(0.9, 0.95, 1e-3)(g, moments)[0]) > 0)
        d, moments = Adam(0.9, 0.95, 1e-3)(g, moments)
        ours = ours + d
        x.grad = g.clone()
        optimizer.step()
        assert torch.allclose(ours, x.detach(), rtol=1e-12)
    assert ascends  # where a search would have another direction


@pytest.mark.parametrize("normalised", [False, True])
def test_adam_falls_back_where_momentum_ascends(normalised):
    adam = Adam(0.9, 0.999, 1e-3, normalised, descends=True)
    g = t([1.0, -2.0])
    moments = Moments()
    for _ in range(4):
        _, moments = adam(g, moments)
    d, new = adam(-0.1 * g, moments)
    assert float(torch.dot(-0.1 * g, d)) < 0
    assert new.n == 5 and float(torch.dot(new.m, g)) > 0  # the average itself went on
    assert torch.equal(torch.sign(d), torch.sign(g))


def test_adam_direction_does_not_depend_on_the_scale():
    rng = torch.Generator().manual_seed(1)
    gradients = [torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(8)]
    paths = []
    for scale in (1.0, 1e-100, 1e-12, 3.0, 1e12, 1e100):
        moments, path = Moments(), []
        for g in gradients:
            d, moments = Adam(0.5, 0.99, 1e-2, normalised=True)(scale * g, moments)
            path.append(d)
        paths.append(torch.stack(path))
    for path in paths[1:]:
        assert torch.allclose(path, paths[0], rtol=1e-10)
    assert paths[0].abs().max() > 0.1


@pytest.mark.parametrize("tensors", [False, True])
def test_adam_remembers_as_long_as_it_is_told(tensors):
    """The mean's weights sum to one at any beta1."""
    rng = torch.Generator().manual_seed(3)
    gradients = torch.rand(4, 5, generator=rng, dtype=torch.float64) + 0.1  # momentum descends
    betas = (0.5, 0.75, 0.875, 0.75)
    moments, weights = Moments(), torch.zeros(4, dtype=torch.float64)
    for i, (g, beta) in enumerate(zip(gradients, betas, strict=True)):
        d, moments = Adam("auto", 0.9, 1e-3)(g, moments, t(beta) if tensors else beta)
        weights *= beta
        weights[i] = 1 - beta
        past = torch.arange(i, -1, -1, dtype=torch.float64)
        v = (0.1 * 0.9 ** past[:, None] * gradients[: i + 1] ** 2).sum(0) / (1 - 0.9 ** (i + 1))
        mean = weights[: i + 1] @ gradients[: i + 1] / weights.sum()
        assert torch.allclose(d, -mean / (v.sqrt() + 1e-3), rtol=1e-12)
        assert float(moments.w) == pytest.approx(float(weights.sum()))
    plain, _ = Adam("auto", 0.9, 1e-3)(g, Moments())
    assert torch.allclose(plain, -g / (g.abs() + 1e-3), rtol=1e-12)


def test_directions_of_a_zero_gradient():
    zero = torch.zeros(3)
    for direction in (Steepest(), Adam(), Adam(normalised=True)):
        d, _ = direction(zero, Moments())
        assert torch.equal(d.abs(), zero)
