"""How many inner batches the second derivatives are of, where the method chooses."""

import math
import statistics
from itertools import pairwise

import pytest
import torch

import bilevel
from bilevel import ConjugateGradient, FiniteDifference, Implicit, StochasticNeumann
from bilevel.lag import is_behind
from bilevel.layout import Layout
from bilevel.noise import ALLOWED, BOUND, LOOKS_BACK, MOST, SKEWED, Noise, settles
from bilevel.problem import Draw, Problem, make_oracle

N = 6
TARGET = torch.arange(1.0, N + 1, dtype=torch.float64) / N


def spd(noise, generator):
    """A Hessian whose mean over batches is diagonal; the batch's own is positive definite."""
    rows = torch.randn(noise, N, generator=generator, dtype=torch.float64)
    return rows.T @ rows / noise + 0.05 * torch.eye(N, dtype=torch.float64)


def batches(rows, count=64, seed=0):
    """Hessians of the mean squares of so many rows: the fewer, the noisier."""
    generator = torch.Generator().manual_seed(seed)
    return [spd(rows, generator) for _ in range(count)]


def inner(x, y, H):
    return y @ H @ y / 2 - y.sum() + (1 + x.tanh() / 2) @ (y * y) / 20


def outer(x, y):
    return TARGET @ y + x.square().sum() / 10  # one right side for all iterations


def solve(rows, **options):
    start = torch.zeros(N, dtype=torch.float64)
    options = {"steps": 33, "inner_steps": 4, "inner_data": batches(rows)} | options
    return bilevel.solve(outer, inner, start, start, **options)


def test_the_excess_is_that_of_the_hessians():
    x, y = torch.full((N,), 0.3, dtype=torch.float64), TARGET.flip(0).clone()
    oracle = make_oracle(Problem(outer, inner), Layout(x, "x"), Layout(y, "y"))
    H = batches(7, 3)
    for make, error in ((Implicit, 1e-10), (FiniteDifference, 1e-6)):
        h = make(ConjugateGradient(50, 0.0), average="auto").estimate(
            oracle, x, y, Draw(), [Draw(H[0]), Draw(H[1])], [], None
        )
        penalty = torch.diag(1 + x.tanh() / 2) / 10
        here, there = (H[0] + H[1]) / 2 + penalty, H[2] + penalty
        q = torch.linalg.solve(here, TARGET)
        expected = (q @ there @ q) / (q @ here @ q) - 1
        excess, lag = h.elsewhere(Draw(H[2]))
        assert float(excess) == pytest.approx(float(expected), rel=error)
        gradient = there @ y - 1
        assert float(lag) == pytest.approx(float(q @ gradient), rel=error)
        excess, lag = h.elsewhere(oracle.joint([Draw(H[0]), Draw(H[1])]))
        assert abs(float(excess)) < 10 * error
        assert float(lag) == pytest.approx(float(h.lag), rel=error)


def test_nothing_is_watched_where_there_is_but_one_batch():
    start, (H,) = torch.zeros(N, dtype=torch.float64), batches(7, 1)
    for g, inner_batches, hessian_batches in (
        (inner, [H, H], None),
        (inner, [H, H], [H, H]),
        (lambda x, y: inner(x, y, H), 2, None),
    ):
        method = bilevel.bisls("adam")
        given = None, inner_batches, hessian_batches
        state, record = method.step(Problem(outer, g), method.init(start, start), *given)
        assert state.noise.terms == 0 and record.hessian_batches == 1
        # two steps, f, and g with its graph; and one a trial
        assert record.gradients == 2 + 2 + record.outer_trials


def test_a_lag_that_two_batches_do_not_agree_on_is_noise():
    for scale in (1.0, -1.0, 1e-8):
        seen = [
            is_behind(scale * here, scale * 1.0, 0.0) for here in (-1.0, 0.3, 0.4, 1, 2, 2.9, 3.1)
        ]
        assert seen == [False, False, True, True, True, True, False]
    assert is_behind(-2.0, -2.0, 1.9) and not is_behind(-2.0, -2.0, 2.1)
    here, there = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.5])
    assert is_behind(here, there, torch.tensor(1.2)).tolist() == [False, True]


def test_the_excess_falls_like_one_over_the_number_of_batches():
    """What the rule is built on, where all is known: q = (mean of m H)^-1 b."""
    generator = torch.Generator().manual_seed(1)

    def excess(m):
        found = []
        for _ in range(4000):
            here = sum(spd(60, generator) for _ in range(m)) / m
            q = torch.linalg.solve(here, TARGET)
            found.append(float(q @ spd(60, generator) @ q / (q @ here @ q)) - 1)
        return statistics.mean(found)

    one = excess(1)
    assert one > 0.05
    assert excess(4) == pytest.approx(one / 4, rel=0.35)


@pytest.mark.parametrize("rows, least, most", [(4000, 1, 1), (60, 2, 4), (8, 8, 8)])
def test_batches_follow_their_noise(rows, least, most):
    known: list[bool] = []
    result = solve(rows, callback=lambda s, r: known.append(s.outer_last is not None))
    counts = [record.hessian_batches for record in result.history]
    assert least <= counts[-1] <= most and counts[0] == 1
    changes = [k for k in range(1, len(counts)) if counts[k] != counts[k - 1]]
    assert all(settles(k - 1) for k in changes)
    # with m batches an iteration differentiates m and one more, a trial m, and products are m;
    # once a step is remembered: before, it is looked at where y has settled, too
    after = result.history[known.index(True) :]
    assert len(after) > 3
    for a, b in pairwise(after):
        m = b.hessian_batches
        assert b.gradients - a.gradients == 4 + 1 + m + 1 + m * b.outer_trials


@pytest.mark.parametrize("method", ["bisls-sgd", "bisps", "adam"])
def test_every_method_chooses(method):
    assert solve(8, method=method).history[-1].hessian_batches == 8


def test_where_there_is_nothing_to_choose():
    noise = Noise()
    for options in (
        {"inner_data": batches(8, 1)},
        {"inner_data": None, "data": [(0, H) for H in batches(8)]},
        {"method": bilevel.bisls(hypergradient=Implicit(average=1))},
    ):
        loss = (lambda x, y, batch: outer(x, y)) if "data" in options else outer
        start = torch.zeros(N, dtype=torch.float64)
        result = bilevel.solve(
            loss, inner, start, start, **({"inner_data": batches(8), "steps": 9} | options)
        )
        assert all(record.hessian_batches == 1 for record in result.history)
        assert result.state.noise == noise
    two = solve(8, method=bilevel.bisls(hypergradient=Implicit(average=2)))
    assert all(record.hessian_batches == 2 for record in two.history)
    assert two.state.noise == noise


def test_at_most_the_batches_that_there_are():
    for count in (2, 5, 7):
        result = solve(8, inner_data=batches(8, count))
        assert result.state.noise.batches >= count
        assert result.history[-1].hessian_batches == count


def test_the_mean_of_what_was_seen():
    noise = Noise()
    for k, excess in enumerate((0.02, 0.05, -0.01)):
        noise = noise.add(excess, 2)
        assert noise.settle(k).batches == 1 and noise.terms == k + 1
    assert noise.level == pytest.approx(0.04)
    assert noise.add(math.nan, 2) == noise
    assert noise.add(math.inf, 2).level == pytest.approx((3 * 0.04 + SKEWED * BOUND) / 4)
    assert noise.add(-math.inf, 2).level == pytest.approx((3 * 0.04 - BOUND) / 4)
    for _ in range(8 * LOOKS_BACK):
        noise = noise.add(ALLOWED, 4)
    assert noise.level == pytest.approx(4 * ALLOWED, rel=1e-3)
    assert [noise.settle(k).batches for k in (14, 15, 16)] == [1, 4, 1]
    assert noise._replace(level=50.0).settle(0).batches == MOST
    assert Noise(4, 0.0, 0).settle(0).batches == 4  # nothing is known


def test_the_same_in_a_graph():
    noise, traced = Noise(), Noise(1, *torch.zeros(2, dtype=torch.float64))
    for excess in [0.02, math.nan, 3.0, -math.inf, *[0.1] * 20]:
        noise = noise.add(excess, 2)
        traced = traced.add(torch.tensor(excess, dtype=torch.float64), 2)
        assert (float(traced.level), int(traced.terms)) == (noise.level, noise.terms)


def test_a_run_that_goes_on(tmp_path):
    """The number of batches, and what it is judged by, survive."""
    whole = solve(8, checkpoint=tmp_path / "whole", checkpoint_every=5)
    for steps in (2, 13, 33):
        result = solve(8, steps=steps, checkpoint=tmp_path / "c", resume=steps > 2)
    assert result.state.noise == whole.state.noise and result.state.noise.batches == 8
    assert torch.equal(result.x, whole.x) and torch.equal(result.y, whole.y)


def test_one_step_at_a_time():
    """A loop of one's own: the last inner batches again."""
    problem, method = Problem(outer, inner), bilevel.bisls()
    state = method.init(*(torch.zeros(N, dtype=torch.float64),) * 2)
    H = batches(8, 40)
    counts = []
    for k in range(20):
        state, record = method.step(problem, state, None, H[k : k + 12])
        counts.append(record.hessian_batches)
    assert counts[-1] == 8
    state, record = method.step(problem, state, None, H[:3])
    assert record.hessian_batches == 3
    before = state.noise
    state, record = method.step(problem, state, None, H[:1])
    assert record.hessian_batches == 1 and state.noise == before  # none is left to judge


def test_a_series_with_batches_of_its_own_is_refused():
    with pytest.raises(ValueError, match="batch of its own"):
        Implicit(StochasticNeumann(5), average="auto")
