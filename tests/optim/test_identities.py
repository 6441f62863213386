"""What the theory says exactly, one test per identity (method notes of the papers in ``optim``)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optim
from tests.optim import reference as ref
from tests.optim.tables import AVERAGES, METHODS, ORACLES, POLYAK, LeastSquares, flat


def run(optimizer, problem, params, steps, **kwargs):
    """Points of the parameters after every step, the start first."""
    points = [flat(params)]
    for t in range(steps):
        problem.step(optimizer, t, params, **kwargs)
        points.append(flat(params))
    return np.array(points)


def scalar(optimizer, x, f, steps, target=0.0):
    """Points of a single number under loss f."""
    points = [x.item()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        optimizer.step(loss=loss, target=target)
        points.append(x.item())
    return points


def number(value):
    return torch.nn.Parameter(torch.tensor(float(value), dtype=torch.float64))


def base(optimizer, params):
    """z, which is the parameter itself where nothing is averaged."""
    return flat([optimizer.state.get(p, {}).get("z", p) for p in params])


# 1. After an uncapped step the linear model of the sampled loss is at its target.
@pytest.mark.parametrize("safeguard", [None, 0.5, 50.0, "ema"])
@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_half_space(beta, adam, safeguard):
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    make, metric = (
        (optim.ScheduleFreeAdamSPS, {"betas": (beta, 0.9)})
        if adam
        else (optim.ScheduleFreeSPS, {"beta": beta})
    )
    optimizer = make(params, safeguard=safeguard, **metric)
    seen = 0
    for t in range(40):
        y = flat(params)
        f, g, l = problem.batch(t, y)
        problem.step(optimizer, t, params, target=l - 1)
        last = optimizer.last
        excess = f + g @ (base(optimizer, params) - y) - (l - 1)
        if last.numerator > 0:
            unguarded = last.denominator if "safeguard" not in last.active else None
            if unguarded is not None:
                assert excess == pytest.approx(0, abs=1e-9 * (1 + abs(last.numerator)))
            else:
                assert 0 < excess < last.numerator
            seen += 1
    assert seen > 10


# 2. Fejer: with the oracle, z never moves away from a solution, whatever is sampled.
@pytest.mark.parametrize("method", ORACLES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_fejer(method, noise):
    for seed in range(2):
        problem = LeastSquares(seed=seed, noise=noise)
        params = problem.params()
        optimizer = method(params)
        star = problem.solution
        distance = np.linalg.norm(problem.start - star)
        order = np.random.default_rng(seed)
        for _ in range(60):
            problem.step(optimizer, int(order.integers(7)), params)
            new = np.linalg.norm(base(optimizer, params) - star)
            assert new <= distance * (1 + 1e-14)
            distance = new
            inside = np.linalg.norm(flat(params) - star)
            assert inside <= np.linalg.norm(problem.start - star) * (1 + 1e-12)
        assert distance < 0.9 * np.linalg.norm(problem.start - star)


@settings(max_examples=25, deadline=None)
@given(
    beta=st.floats(0, 1),
    cap=st.floats(1e-3, 1e3),
    power=st.sampled_from([0.0, 1.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_fejer_any_beta_any_cap(beta, cap, power, seed):
    problem = LeastSquares(seed=seed, noise=0.3)
    params = problem.params()
    optimizer = optim.ScheduleFreeSPS(params, beta=beta, max_lr=cap, weight_lr_power=power)
    distance = np.linalg.norm(problem.start - problem.solution)
    for t in range(20):
        problem.step(optimizer, t, params)
        new = np.linalg.norm(base(optimizer, params) - problem.solution)
        assert new <= distance * (1 + 1e-14)
        distance = new


# 3, 4. beta = 0 is SPS+ on z; beta = 1 is IAM with 1 / (1 + lambda) = c.
def test_beta_0_is_sps_plus():
    problem = LeastSquares(noise=0.3)
    a, b = problem.params(), problem.params()
    left = run(optim.ScheduleFreeSPS(a, beta=0.0), problem, a, 60)
    np.testing.assert_allclose(left, run(optim.SPSPlus(b), problem, b, 60), rtol=1e-12, atol=1e-12)


def test_beta_1_is_iam():
    problem = LeastSquares(noise=0.3)
    a, b = problem.params(), problem.params()
    sf = optim.ScheduleFreeSPS(a, beta=1.0, weight_lr_power=0.0, r=0.0)
    iam = optim.IAM(b, averaging=0.0, max_lr=math.inf)
    for t in range(60):
        iam.param_groups[0]["averaging"] = float(t)  # c = 1 / (t + 1), the uniform weights
        problem.step(sf, t, a)
        problem.step(iam, t, b)
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-12, atol=1e-12)


# 5. IAM is heavy-ball momentum.
def test_iam_is_heavy_ball():
    problem, lam = LeastSquares(noise=0.3), 4.0
    params = problem.params()
    optimizer = optim.IAM(params, averaging=lam)
    previous = current = problem.start
    for t in range(60):
        _, g, _ = problem.batch(t, current)
        problem.step(optimizer, t, params)
        step = optimizer.last.step / (1 + lam)
        following = current - step * g + lam / (1 + lam) * (current - previous)
        np.testing.assert_allclose(flat(params), following, rtol=1e-11, atol=1e-11)
        previous, current = current, flat(params)


# 6. D = I is the plain method; a fixed D is the plain method in coordinates D^{1/2} x.
@pytest.mark.parametrize("d", [1.0, 7.0])
def test_fixed_metric(d):
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    # eps dwarfs sqrt(v): D = eps I up to 1e-9, and the metric is a change of units
    adam = optim.ScheduleFreeAdamSPS(params, betas=(0.9, 0.99), eps=d * 1e12)
    for t, (y, _) in enumerate(ref.schedule_free(problem.batch, problem.start, 40)):
        problem.step(adam, t, params)
        np.testing.assert_allclose(flat(params), y, rtol=1e-7, atol=1e-7)


# 7. The first Adam step's denominator is the 1-norm, and the step has one length everywhere.
@pytest.mark.parametrize("make", [optim.IAMAdam, optim.ScheduleFreeAdamSPS])
def test_first_adam_step(make):
    problem = LeastSquares()
    params = problem.params()
    f, g, l = problem.batch(0, problem.start)
    optimizer = make(params, eps=1e-30)
    optimizer.param_groups[0]["cap"] = math.inf
    problem.step(optimizer, 0, params)
    assert optimizer.last.denominator == pytest.approx(np.abs(g).sum(), rel=1e-12)
    move = problem.start - base(optimizer, params)
    np.testing.assert_allclose(move, (f - l) / np.abs(g).sum() * np.sign(g), rtol=1e-10)


# 8. In place y and z are explicit x, y, z with weight decay: see test_reference.py. Here in eval
#    mode for every method at once, after many steps.
@pytest.mark.parametrize("method", AVERAGES, ids=str)
def test_three_points_lie_on_a_line(method):
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    optimizer = method(params)
    for t in range(100):
        problem.step(optimizer, t, params)
    y, z = flat(params), base(optimizer, params)
    optimizer.eval()
    beta = optimizer._betas(optimizer.param_groups[0])[0]
    np.testing.assert_allclose(y, (1 - beta) * z + beta * flat(params), rtol=1e-10, atol=1e-10)


# 9. Closed forms.
def test_on_absolute_value():
    def loss(x):
        return x.abs()

    x = number(3)
    assert scalar(optim.SPSPlus([x]), x, loss, 1)[-1] == 0
    x = number(3)
    points = scalar(optim.IAM([x], max_lr=math.inf), x, loss, 30)
    np.testing.assert_allclose(points, 3 * 0.9 ** np.arange(31), rtol=1e-12)
    x = number(3)
    points = scalar(optim.IAM([x], averaging="linear", max_lr=math.inf), x, loss, 30)
    np.testing.assert_allclose(points, 3 / (1 + np.arange(31)), rtol=1e-12)
    x = number(3)
    optimizer = optim.ScheduleFreeSPS([x])
    scalar(optimizer, x, loss, 1)
    optimizer.eval()
    assert x.item() == pytest.approx(0, abs=1e-15)


def test_on_a_parabola():
    a = 2.5

    def loss(x):
        return a / 2 * x * x

    x = number(3)
    np.testing.assert_allclose(
        scalar(optim.SPS([x]), x, loss, 20), 3 * 0.5 ** np.arange(21), rtol=1e-12
    )
    x = number(3)
    optimizer = optim.IAM([x], max_lr=math.inf)
    np.testing.assert_allclose(
        scalar(optimizer, x, loss, 40), 3 * 0.95 ** np.arange(41), rtol=1e-11
    )
    assert optimizer.last.step == pytest.approx((1 / 1.9 - 0.5) / a, rel=1e-8)
    x = number(3)
    points = scalar(optim.IAM([x], averaging="linear", max_lr=math.inf), x, loss, 30)
    exact = [3 * math.gamma(t + 1.5) / (math.gamma(1.5) * math.gamma(t + 2)) for t in range(31)]
    np.testing.assert_allclose(points, exact, rtol=1e-11)


@pytest.mark.parametrize(
    "beta, exact",
    [
        (0.0, [3, 1.5, 1.125, 0.875, 0.703125, 0.58125]),
        (0.9, [3, 1.5, 1.125, 0.93125, 0.81, 0.7253625]),
        (1.0, [3, 1.5, 1.125, 0.9375, 0.8203125, 0.73828125]),
    ],
)
def test_schedule_free_on_a_parabola(beta, exact):
    x = number(3)
    optimizer = optim.ScheduleFreeSPS([x], beta=beta, weight_lr_power=0.0)
    for value in exact:
        optimizer.eval()
        assert x.item() == pytest.approx(value, rel=1e-12)
        optimizer.train()
        y = x.item()
        scalar(optimizer, x, lambda x: 1.25 * x * x, 1)
        assert optimizer.state[x]["z"].item() == pytest.approx(y / 2, rel=1e-12)


# 10. Telescoping identity, exact for every beta, and the rate of the last iterate.
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 1.0])
def test_telescoping(beta):
    problem = LeastSquares(noise=0.5)
    every = range(7)
    star = np.linalg.solve(
        sum(problem.a[i].T @ problem.a[i] for i in every),
        sum(problem.a[i].T @ problem.b[i] for i in every),
    )
    problem.solution = star  # of the mean, not of any batch

    def mean(x):
        losses, gradients, targets = zip(*(problem.batch(i, x) for i in every), strict=True)
        return np.mean(losses) - np.mean(targets), np.mean(gradients, axis=0)

    def bregman(u, w):
        fw, gw = mean(w)
        return mean(u)[0] - fw - gw @ (u - w)

    params = problem.params()
    optimizer = optim.ScheduleFreeSPS(params, beta=beta, weight_lr_power=0.0)
    x = problem.start
    for t in range(30):
        y = flat(params)
        z = base(optimizer, params) if t else problem.start
        gap, gradient = mean(y)
        numerator = gap + gradient @ (z - y)  # E_t[N_t]
        optimizer.eval()
        previous, x = (x, flat(params))
        optimizer.train()
        s = max(t, 1)  # S_t = 1 / c_t
        if t:
            exact = s * mean(x)[0] - (s - 1) * mean(previous)[0]
            breg = (s - 1) * bregman(previous, y) - s * bregman(x, y)
            assert numerator == pytest.approx(exact + breg, abs=1e-10)
            a = (1 - beta) * s + beta
            assert breg >= beta * (s - 1) / a * bregman(previous, y) - 1e-10
        problem.step(optimizer, t, params)


@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
def test_last_iterate_bound(beta):
    """E f(x_T) - f* <= G D / sqrt(T) on mean |a_i x - b_i|, averaged over seeds."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    kinks = b / a
    star = min(kinks, key=lambda x: np.abs(a * x - b).mean())
    steps, gaps = 64, []
    for seed in range(8):
        order = np.random.default_rng(seed).integers(20, size=steps)
        x = number(star + 3)
        optimizer = optim.ScheduleFreeSPS([x], beta=beta, weight_lr_power=0.0)
        for i in order:
            optimizer.zero_grad()
            loss = (a[i] * x - b[i]).abs()
            loss.backward()
            optimizer.step(loss=loss, target=abs(a[i] * star - b[i]))
        optimizer.eval()
        gaps.append(np.abs(a * x.item() - b).mean() - np.abs(a * star - b).mean())
    assert np.mean(gaps) <= np.abs(a).max() * 3 / math.sqrt(steps)


# 11. Invariances.
SCALE_FREE = [
    m
    for m in POLYAK
    if (m.oracle or m.options.get("safeguard") == "ema")
    and m.options.get("max_lr", 1.0 if m.make is optim.IAM else math.inf) == math.inf
]


@pytest.mark.parametrize("method", SCALE_FREE, ids=str)
def test_scale_of_the_loss(method):
    points = []
    for factor, shift in ((1.0, 0.0), (1e3, -7.0)):
        problem = LeastSquares(noise=0.3)
        params = problem.params()
        optimizer = method(params, **({"eps": 1e-300} if "adam" in method.name else {}))
        for t in range(30):
            optimizer.zero_grad()
            loss = factor * problem.loss(t, params) + shift
            loss.backward()
            optimizer.step(loss=loss, target=factor * problem.target(t) + shift)
        points.append(flat(params))
    np.testing.assert_allclose(*points, rtol=1e-7, atol=1e-7)


def test_rotation_and_units():
    """SPS+ and schedule-free SPS do not see a rotation, nor the units of x."""
    problem, turned = LeastSquares(noise=0.3), LeastSquares(noise=0.3)
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))
    q = 10 * q
    turned.a, turned.start = problem.a @ q.T / 100, q @ problem.start
    turned.solution = q @ problem.solution
    for make in (optim.SPSPlus, optim.ScheduleFreeSPS):
        a, b = problem.params(), turned.params()
        left = run(make(a), problem, a, 30) @ q.T
        np.testing.assert_allclose(left, run(make(b), turned, b, 30), rtol=1e-7, atol=1e-7)


# 12. Safeguarded SPS is clipping; M -> 0 is SPS; a huge M is gradient descent with step N / M.
@pytest.mark.parametrize("m", [1e-12, 4.0, 1e12])
def test_safeguard_is_clipping(m):
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    optimizer = optim.SafeguardedSPS(params, safeguard=m)
    x = problem.start
    for t in range(10):
        f, g, l = problem.batch(t, x)
        l -= 1
        norm = np.linalg.norm(g)
        eta = (f - l) / (math.sqrt(m) * max(norm, math.sqrt(m)))
        problem.step(optimizer, t, params, target=l)
        move = x - flat(params)
        np.testing.assert_allclose(
            move, eta * min(1, math.sqrt(m) / norm) * g, rtol=1e-9, atol=1e-15
        )
        if m < 1e-6:
            assert optimizer.last.step == pytest.approx((f - l) / norm**2)
        if m > 1e6:
            assert optimizer.last.step == pytest.approx((f - l) / m)
        x = flat(params)


# 13. The moving average by hand; rho = 0 has no effect.
def test_moving_average_by_hand():
    x = number(1)
    optimizer = optim.SafeguardedSPS([x], safeguard="ema", rho=0.75)
    for gradient, m in ((2.0, 4.0), (4.0, 7.0), (1.0, 5.5), (0.0, 4.125)):
        x.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step(loss=1.0)
        assert optimizer.last.denominator == pytest.approx(max(gradient**2, m))
    assert optimizer.last.step == 0 and optimizer.last.active == "zero gradient+safeguard"


def test_no_memory_no_safeguard():
    problem = LeastSquares(noise=0.3)
    a, b = problem.params(), problem.params()
    left = run(optim.SafeguardedSPS(a, safeguard="ema", rho=0.0), problem, a, 20)
    np.testing.assert_array_equal(left, run(optim.SPS(b), problem, b, 20))


# 16. No dead-lock: after forced negative gaps x keeps moving to z.
@pytest.mark.parametrize("method", [m for m in AVERAGES if "sf" in m.name], ids=str)
def test_no_dead_lock(method):
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    optimizer = method(params)
    for t in range(20):
        problem.step(optimizer, t, params)

    def distance():
        z = base(optimizer, params)
        optimizer.eval()
        x = flat(params)
        optimizer.train()
        return np.linalg.norm(x - z)

    before = distance()
    for t in range(200):
        problem.step(optimizer, t, params, target=1e6)
        assert optimizer.last.step == 0 and "below bound" in optimizer.last.active
    assert distance() < 0.35 * before
    problem.step(optimizer, 0, params, target=-100.0)
    assert optimizer.last.step > 0


# The weights of the average are those of the steps taken, lr and all.
@pytest.mark.parametrize("make", [optim.ScheduleFreeSPS, optim.ScheduleFreeAdamSPS])
def test_lr_weighs_the_average(make):
    x = number(0)
    optimizer = make([x], max_lr=1.0)
    z = []
    for lr in (0.5, 2.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        x.grad = torch.ones_like(x)
        optimizer.step(loss=1e6)
        z.append(optimizer.state[x]["z"].item())
    np.testing.assert_allclose(z, [-0.5, -2.5, -3.5], rtol=1e-7)
    optimizer.eval()
    weights = np.array([0.5, 2.0, 2.0]) ** 2  # of the longest step so far
    assert x.item() == pytest.approx(weights @ z / weights.sum(), rel=1e-7)


# 17. Inexact Polyak: best() is the argmin of the visited points; 1 / sqrt(T); monotone distance.
def test_inexact_polyak():
    problem = LeastSquares()
    problem.a, problem.b, problem.offset = problem.a[:1], problem.b[:1], np.array([0.5])
    params = problem.params()
    optimizer = optim.InexactPolyak(params, steps=400)
    star, distance, visited, losses = problem.solution, math.inf, [], []
    sigma2 = 0.5  # f* - l*
    for t in range(400):
        x = flat(params)
        losses.append(problem.batch(0, x)[0])
        visited.append(x)
        new = np.linalg.norm(x - star)
        if t and losses[-2] - 0.5 >= sigma2 / math.sqrt(400):
            assert new <= distance * (1 + 1e-12)
        distance = new
        problem.step(optimizer, t, params, target=None)
        best = flat(optimizer.best())
        np.testing.assert_array_equal(best, visited[int(np.argmin(losses))])
    assert np.argmin(losses) < 399  # the last point is not the best: the test has teeth
    a, b = problem.params(), problem.params()
    one, many = optim.InexactPolyak(a, steps=1), optim.InexactPolyak(b, steps=100)
    np.testing.assert_array_equal(flat(one.best()), flat(a))  # before the first step
    problem.step(one, 0, a)
    problem.step(many, 0, b)
    assert one.last.step == pytest.approx(10 * many.last.step)
    f, g, l = problem.batch(0, problem.start)
    assert one.last.step == pytest.approx((f - l) / (g @ g))


# A step of zero does not bind the next one, but k, or the sum, has it: g = 0 in the formulas.
@pytest.mark.parametrize("loss, gradient", [(3.0, 0.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_steps_of_zero_of_decsps_and_adasps(loss, gradient):
    seen = [f for f in (4.0, loss, 2.0) if f == f]
    for make, last in (
        (optim.DecSPS, min(1.0, 2.0 / 4.0) / math.sqrt(len(seen))),
        (optim.AdaSPS, 2.0 / 4.0 * math.sqrt(4.0 / sum(max(f, 0.0) for f in seen))),
    ):
        x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make([x])
        for f, g in ((4.0, 2.0), (loss, gradient), (2.0, 2.0)):
            x.grad = torch.full_like(x, g)
            optimizer.step(loss=f)
            assert (optimizer.last.step == 0) == (f is loss)
        assert optimizer.last.step == pytest.approx(last)


# 18. DecSPS, AdaSPS and AdaSLS never grow.
@pytest.mark.parametrize("make", [optim.DecSPS, optim.AdaSPS, optim.AdaSLS])
def test_monotone(make):
    problem = LeastSquares(noise=0.5)
    params = problem.params()
    optimizer = make(params)
    steps = []
    for t in range(50):
        problem.step(optimizer, t, params, target=problem.offset[t % 7] - 0.1)
        steps.append(optimizer.last.step)
    assert all(b <= a * (1 + 1e-15) for a, b in zip(steps, steps[1:], strict=False))
    assert steps[-1] > 0


# 14, 15 are test_edges.py and test_state.py; 19: a bound above the loss never gives a step back.
@pytest.mark.parametrize("method", [m for m in METHODS if not m.search], ids=str)
def test_bound_above_the_loss(method):
    if method.make is optim.ClippedSGD:
        pytest.skip("clipping does not look at the loss")
    problem = LeastSquares()
    params = problem.params()
    optimizer = method(params)
    problem.step(optimizer, 0, params, target=1e9)
    np.testing.assert_array_equal(flat(params), problem.start)
    assert optimizer.last.step == 0 and optimizer.last.active.startswith("below bound")


# Bounded steps end as SGD with the schedule (1.1c of the BiSLS/SPS notes).
@pytest.mark.parametrize("make", [optim.SPSB, optim.SLSB])
def test_bound_takes_over(make):
    problem = LeastSquares(noise=0.5)
    params = problem.params()
    optimizer = make(params, max_lr=1.0)
    for t in range(60):
        problem.step(optimizer, t, params, target=problem.offset[t % 7] - 1)
    curvature = max(np.linalg.norm(a, 2) ** 2 for a in problem.a)
    assert 60 > (2 * curvature) ** 2 / 16
    assert optimizer.last.step == pytest.approx(1 / math.sqrt(60))
