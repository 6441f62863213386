"""The average of the iterates, and when it is the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.average import JUDGED, POWER, Average
from bilevel.layout import Layout
from bilevel.problem import Problem, make_oracle

D = torch.tensor([1.0, 3.0, 0.4], dtype=torch.float64)  # curvature of F


def draws(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, 3, dtype=torch.float64, generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inner(x: Tensor, y: Tensor, batch: Tensor | None = None) -> Tensor:
    return ((y - x) ** 2).sum()


def outer(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    """F(x) = x D x / 2 on average, with noise in the linear term."""
    return y @ (D * y) / 2 + batch.mean(0) @ y


def noisy(method: str | bilevel.Method, batches: Any, steps: int = 60, **options: Any) -> Any:
    x, y = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    return bilevel.solve(
        outer, inner, x, y, outer_data=batches, method=method, steps=steps, inner_steps=2, **options
    )


def objective(x: Tensor) -> float:
    return float(x @ (D * x) / 2)


def test_weights_are_those_of_the_polynomial() -> None:
    points = np.random.default_rng(0).normal(size=(40, 2, 3))
    x, y = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    oracle = make_oracle(Problem(outer, inner), Layout(x, "x"), Layout(y, "y"))
    average = Average(*torch.tensor(points[0]))
    for point in points[1:]:
        average = average.add(oracle, *torch.tensor(point))
    # c_t = (p + 1) / (t + p + 1) gives the t-th point, from 0, the weight C(t + p, p) / sum
    weights = np.array([np.prod([(t + i) / i for i in range(1, POWER + 1)]) for t in range(40)])
    expected = np.tensordot(weights / weights.sum(), points, 1)
    np.testing.assert_allclose(np.stack([average.x, average.y]), expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd", "bisps"])
def test_under_noise_the_answer_is_far_better_than_the_iterate(method: str) -> None:
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        batches = draws(60, 4, seed)
        batches -= batches.mean((0, 1))  # so that F is exact over a pass
        result = noisy(method, list(batches), steps=400)
        assert result.state.average.ahead
        iterate = result.state.vectors[0]
        assert not torch.equal(iterate, result.x)
        ratios.append(objective(result.x) / objective(iterate))
    assert np.exp(np.mean(np.log(ratios))) < 0.5


def test_without_noise_the_answer_is_the_iterate() -> None:
    batch = torch.zeros(4, 3, dtype=torch.float64)
    result = noisy("bisls-sgd", [batch])
    assert not result.state.average.ahead
    assert torch.equal(result.x, result.state.vectors[0])
    assert objective(result.x) < 1e-12


def test_without_batches_there_is_no_average() -> None:
    x = torch.ones(3, dtype=torch.float64)
    result = bilevel.solve(lambda x, y: (y * y).sum(), inner, x, x, steps=20)
    assert result.state.average is None


def test_hand_tuned_steps_are_not_averaged() -> None:
    result = noisy("sgd", list(draws(8, 4)), steps=20)
    assert result.state.average is None and torch.equal(result.x, result.state.vectors[0])


def test_the_comparison_is_that_of_fresh_batches() -> None:
    """gain, computed again from the states of the run."""
    batches = list(draws(30, 4))
    seen: list[Any] = []
    noisy("bisls-adam", batches, steps=30, callback=lambda s, r: seen.append((s, r)) and None)
    gain = 0.0
    for t in range(1, 30):
        before, record = seen[t - 1][0].average, seen[t][1]
        difference = record.outer_loss - float(outer(before.x, before.y, batches[t]))
        gain += (JUDGED + 1) / (t + JUDGED) * (difference - gain)
        assert seen[t][0].average.gain == pytest.approx(gain, rel=1e-12)


def test_the_average_stays_feasible() -> None:
    """Also in a set that is not convex: the unit sphere."""

    def project(x: Tensor) -> Tensor:
        return x / x.norm()

    result = noisy("bisls-sgd", list(draws(40, 4)), steps=40, project=project)
    average = result.state.average
    assert float(average.x.norm()) == pytest.approx(1, abs=1e-12)


def test_an_average_that_is_no_number_begins_anew() -> None:
    def outer_with_hole(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return outer(x, y, batch) / (batch[0, 0] != 7)

    batches = list(draws(20, 4))
    seen = []
    noisy("bisls-sgd", batches, steps=20, callback=lambda s, r: seen.append(s) and None)
    state = seen[-1]
    broken = state.average._replace(y=torch.full((3,), torch.nan, dtype=torch.float64))
    problem = bilevel.Problem(outer_with_hole, inner)
    after, _ = bilevel.bisls("sgd").step(problem, replace(state, average=broken), batches[0], 2)
    assert after.average.terms == 1 and torch.isfinite(after.average.x).all()


def test_pairs_whose_y_starts_afresh_have_no_average() -> None:
    """Each pair has a y of its own, of which a mean says nothing."""
    x, y = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    pairs = [(batch, batch) for batch in draws(9, 1)]

    def average(warm_start: bool) -> Any:
        given = {"data": pairs, "steps": 20, "warm_start": warm_start}
        return bilevel.solve(outer, inner, x, y, **given).state.average

    assert average(True) is not None and average(False) is None
