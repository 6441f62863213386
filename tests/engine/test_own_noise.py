"""Losses that draw random numbers themselves: each draw is what elsewhere a batch is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import Problem
from bilevel.average import Average
from bilevel.noise import Agreement, Noise
from tests.engine.test_agreement import EXACT, H, J, X, Y


def still(x: Tensor, y: Tensor) -> Tensor:
    return (y - J @ x) @ H @ (y - J @ x) / 2


def spread(batch: Tensor) -> Tensor:
    """A Hessian: the fewer rows, the farther from its mean."""
    return H + batch.T @ batch / len(batch)


def inner(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    return (y - J @ x) @ spread(batch) @ (y - J @ x) / 2


def outer(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    return (y**4).sum() / 4 + (x @ x) / 10 + 3 * batch.mean(0) @ y


class Drawing:
    """A loss that draws its batch; remembers the first few, in their order."""

    def __init__(self, loss: Any, rows: int) -> None:
        self.loss, self.rows = loss, rows
        self.drawn: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        batch = torch.randn(self.rows, 3, dtype=torch.float64)
        if len(self.drawn) < 5 and not any(torch.equal(batch, seen) for seen in self.drawn):
            self.drawn.append(batch)
        return self.loss(x, y, batch)


def test_it_is_seen_which_loss_draws() -> None:
    for losses, random in (
        ((Drawing(outer, 1), still), {"outer"}),
        ((lambda x, y: y @ y, Drawing(inner, 1)), {"inner"}),
        ((lambda x, y: y @ y, still), set()),
    ):
        problem = Problem(*losses)
        bilevel.bisls().step(problem, bilevel.bisls().init(X, Y), None, 2)
        assert problem.habit.random == random


def each_alone(outer: Any, inner: Any) -> Problem:
    """Two batches are evaluated one after the other, as two draws are: the same to the last bit."""
    problem = Problem(outer, inner)
    problem.habit.stacks.update({2: 1})
    return problem


def test_a_step_is_that_on_as_many_batches() -> None:
    """Two draws of f, and one that judges them: as with the same numbers given as batches."""
    method = replace(bilevel.bisls("adam", hypergradient=EXACT), inner_solver=lambda x, y, b: J @ x)
    # not the first search, which asks for the same share whatever is known
    state = replace(method.init(X, Y), agreement=Agreement(2, 0.0, 0.0, 0), outer_last=2.0)
    loss = Drawing(outer, 1)
    problem = Problem(loss, still)
    problem.habit.random.add("outer")
    torch.manual_seed(3)
    new, record = method.step(problem, state, None, 1)
    first, *others = loss.drawn
    assert len(others) == 2 and record.outer_batches == 2
    given, plain = method.step(each_alone(outer, still), state, first, 1, None, others)
    assert all(torch.equal(a, b) for a, b in zip(new.vectors, given.vectors, strict=True))
    assert new.agreement == given.agreement and new.agreement.terms == 1
    assert replace(record, seconds=0.0) == replace(plain, seconds=0.0)
    assert new.average is not None  # the answer may be the average of the iterates


def test_a_hypergradient_is_that_of_as_many_draws() -> None:
    """Two draws of g, and one that judges them."""
    method = replace(bilevel.bisls("sgd"), inner_solver=lambda x, y, b: J @ x + 0.1)
    state = replace(method.init(X, Y), noise=Noise(2, 0.0, 0))
    loss = Drawing(inner, 2)
    problem = Problem(lambda x, y: (y**4).sum() + (x @ x) / 10, loss)
    problem.habit.random.add("inner")
    torch.manual_seed(4)
    new, record = method.step(problem, state, None, 1)
    assert len(loss.drawn) == 3 and record.hessian_batches == 2
    given, plain = method.step(
        each_alone(problem.outer, inner), state, None, [loss.drawn[0]], loss.drawn
    )
    assert all(torch.equal(a, b) for a, b in zip(new.vectors, given.vectors, strict=True))
    assert new.noise == given.noise and new.noise.terms == 1
    assert replace(record, seconds=0.0) == replace(plain, seconds=0.0)


@pytest.mark.parametrize("rows, batches", [(1, 8), (4_000, 1)])
def test_as_many_as_the_noise_asks_for(rows: int, batches: int) -> None:
    result = bilevel.solve(Drawing(outer, rows), still, X, Y, steps=33, inner_steps=3, seed=1)
    assert result.history[-1].outer_batches == batches
    assert result.history[-1].hessian_batches == 1  # g draws nothing
    result = bilevel.solve(
        lambda x, y: (y**4).sum() / 4 + y.sum(), Drawing(inner, rows), X, Y, steps=33, inner_steps=3
    )
    assert result.history[-1].hessian_batches == batches
    assert result.history[-1].outer_batches == 1


def test_the_only_batch_of_a_loss_that_draws_is_several() -> None:
    """As a list of one batch with dropout: f is another in each draw, though the batch is not."""
    noisy = Drawing(outer, 1)
    one = [torch.zeros(())]
    result = bilevel.solve(
        lambda x, y, batch: noisy(x, y) + batch, still, X, Y, outer_data=one, steps=33, seed=1
    )
    assert result.history[-1].outer_batches == 8


def test_pairs_are_as_before() -> None:
    """What another draw of the same pair says, says nothing of another pair."""
    noisy = Drawing(outer, 1)
    pairs = [(torch.zeros(()), torch.zeros(())) for _ in range(9)]
    result = bilevel.solve(
        lambda x, y, b: noisy(x, y) + b, lambda x, y, b: still(x, y), X, Y, data=pairs, steps=20
    )
    assert result.state.agreement == Agreement()


@pytest.mark.parametrize("method", ["adam", "bisps"])
def test_methods_that_do_not_choose_take_one(method: str) -> None:
    result = bilevel.solve(Drawing(outer, 1), still, X, Y, method=method, steps=20, inner_steps=3)
    assert all(record.outer_batches == 1 for record in result.history)
    assert isinstance(result.state.average, Average) == (method == "bisps")


def test_what_draws_is_resumed(tmp_path: Any) -> None:
    def run(steps: int, **rest: Any) -> bilevel.Result:
        losses = Drawing(outer, 1), Drawing(inner, 2)
        return bilevel.solve(*losses, X, Y, steps=steps, inner_steps=3, seed=5, **rest)

    whole, path = run(23), tmp_path / "run"
    run(11, checkpoint=path)
    again = run(23, checkpoint=path, resume=True)
    for a, b in zip(whole.state.vectors, again.state.vectors, strict=True):
        assert torch.equal(a, b)
    assert whole.state.agreement == again.state.agreement and whole.state.agreement.terms > 16
    assert whole.state.noise == again.state.noise


def test_noise_is_met_as_that_of_batches_is() -> None:
    """The end of a run, beside that of the same loss with batches, and of one draw a step."""

    def end(loss: Any, method: Any, **data: Any) -> float:
        found = []
        for seed in range(5):
            result = bilevel.solve(
                loss, still, X, Y, method=method, steps=100, inner_steps=5, seed=seed, **data
            )
            found.append(float(outer(result.x, J @ result.x, torch.zeros(1, 3).double())))
        return sum(found) / len(found)

    made = torch.Generator().manual_seed(0)
    batches = list(torch.randn(500, 1, 3, dtype=torch.float64, generator=made))
    own = end(Drawing(outer, 1), "bisls-adam")
    given = end(outer, "bisls-adam", outer_data=batches)
    one = end(Drawing(outer, 1), replace(bilevel.bisls(), outer_batches=1, averages=False))
    assert own < one / 5 and given < one / 5  # 0 at x = 0
