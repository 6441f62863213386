"""How many outer batches f is the mean of, and what a search asks for."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bilevel
from bilevel import Problem
from bilevel.data import Cycle
from bilevel.noise import Agreement, settles
from bilevel.rules import LEAST_C, MOST_C, Armijo

H = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
J = torch.tensor([[1.0, 0.5], [-0.4, 0.7], [0.2, -1.1]], dtype=torch.float64)  # of y* = J x
X, Y = torch.tensor([1.0, -2.0]).double(), torch.zeros(3, dtype=torch.float64)
EXACT = bilevel.Implicit(bilevel.ConjugateGradient(steps=9, rtol=1e-14))


def inner(x: Tensor, y: Tensor) -> Tensor:
    return (y - J @ x) @ H @ (y - J @ x) / 2


def outer(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    return (y**4).sum() / 4 + (x @ x) / 10 + batch.mean(0) @ y


def draws(count: int, size: int, seed: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, size, 3, dtype=torch.float64, generator=made))


def solve(data: Any, method: Any = "bisls-adam", **options: Any) -> bilevel.Result:
    options = {"steps": 20, "inner_steps": 3} | options
    return bilevel.solve(outer, inner, X, Y, outer_data=data, method=method, **options)


def test_kappa_is_what_the_two_slopes_say() -> None:
    """S = 3 and N = 8 in all: means over unequal numbers of batches."""
    seen = Agreement()
    assert seen.kappa(1) == 0.0
    for m, s, n in ((1, 2.0, 6.0), (2, 4.0, 10.0), (4, 3.0, 8.0)):
        seen = seen.add(-(s + n / m), -s, m)
    assert (seen.signal, seen.noise, seen.terms) == pytest.approx((3.0, 8.0, 3))
    for m in (1, 2, 8):
        assert seen.kappa(m) == pytest.approx(3 / (3 + 8 / m))
    for own, fresh in ((0.0, -1.0), (1.0, -1.0), (math.nan, -1.0), (-1.0, math.inf)):
        assert seen.add(own, fresh, 1) == seen
    assert Agreement(1, 1.0, -1.0, 3).kappa(1) == Agreement(1, 1.0, -9.0, 3).kappa(2) == 1.0
    against = Agreement().add(-1.0, 0.5, 1)  # what the step gains is lost elsewhere
    assert against.kappa(8) == 0.0 and against.settle(0).batches == 8


@pytest.mark.parametrize("level, batches", [(0.0, 1), (0.3, 1), (0.5, 2), (1.0, 4), (9.0, 8)])
def test_batches_bring_kappa_near_what_is_wanted(level: float, batches: int) -> None:
    seen = Agreement(1, 2.0, 2.0 * level, 5)
    assert seen.settle(3).batches == batches
    assert seen.settle(4) == seen and Agreement().settle(3).batches == 1


def test_what_a_search_asks_for() -> None:
    auto = Armijo(c="auto")
    shares = [auto.share(kappa) for kappa in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0, -2.0, 1.4)]
    expected = [MOST_C, MOST_C, 0.5, 0.3, LEAST_C, LEAST_C, MOST_C, LEAST_C]
    assert shares == pytest.approx(expected)
    assert auto.share(0.0, auto.brackets(None)) == LEAST_C
    assert auto.share(0.0, auto.brackets(1.0)) == MOST_C
    anew = Armijo(c="auto", reset="fixed")
    assert anew.share(0.0, anew.brackets(None)) == MOST_C
    assert Armijo(c=0.1).share(0.5) == Armijo(c=0.1).share(0.5, brackets=True) == 0.1


def test_the_slopes_are_those_of_the_step_on_both_batches() -> None:
    """Recomputed from the step that was taken; y follows by the tangent, and f is not quadratic."""
    batches = draws(4, 1, seed=2)
    method = replace(bilevel.bisls("adam", hypergradient=EXACT), inner_solver=lambda x, y, b: J @ x)
    problem, state = Problem(outer, inner), method.init(X, Y)
    state = replace(state, agreement=Agreement(2, 0.0, 0.0, 0))
    new, record = method.step(problem, state, batches[0], 1, None, batches[1:])
    (x1, y1), y0 = new.vectors, J @ X
    assert torch.allclose(y1, J @ x1) and record.outer_batches == 2

    def slope(batch: Tensor) -> float:
        x, y = X.clone().requires_grad_(), y0.clone().requires_grad_()
        fx, fy = torch.autograd.grad(outer(x, y, batch), (x, y))
        return float(fx @ (x1 - X) + fy @ (y1 - y0)) / record.outer_step

    own = (slope(batches[0]) + slope(batches[1])) / 2
    fresh = slope(batches[2])
    found = new.agreement
    assert found.signal == pytest.approx(-fresh, rel=1e-10)
    assert found.noise == pytest.approx(2 * (fresh - own), rel=1e-10)
    # two gradients of f, one more to judge, one of g with its graph, and one a trial
    assert record.gradients == 2 + 1 + 1 + record.outer_trials


def test_several_batches_are_one_of_their_mean() -> None:
    batches = draws(4, 5)
    method = replace(bilevel.bisls("adam"), corrects=False)
    together = replace(method.init(X, Y), agreement=Agreement(4, 0.0, 0.0, 0))
    several, _ = method.step(Problem(outer, inner), together, batches[0], 3, None, batches[1:])
    joined = replace(method, outer_batches=1)
    one, _ = joined.step(Problem(outer, inner), method.init(X, Y), torch.cat(batches), 3)
    # the fourth is left to judge
    three = torch.cat(batches[:3])
    same, _ = joined.step(Problem(outer, inner), method.init(X, Y), three, 3)
    assert torch.allclose(several.vectors[0], same.vectors[0], rtol=1e-12)
    assert not torch.allclose(several.vectors[0], one.vectors[0], rtol=1e-6)


def test_a_search_asks_for_most_where_nothing_is_known() -> None:
    """Of one batch alone, without others: none is known; of no batch, or the only one: no noise."""
    batch, seen = draws(1, 4)[0], []

    class Told(Armijo):
        def __call__(self, line: Any, k: int, last: Any) -> Any:
            seen.append(line.kappa)
            return super().__call__(line, k, last)

    method = replace(bilevel.bisls(), outer_rule=Told(c="auto"))
    state = method.init(X, Y)
    fixed = replace(method, outer_batches=1)
    for stepper, more in ((method, None), (method, []), (method, [batch]), (fixed, [])):
        stepper.step(Problem(outer, inner), state, batch, 1, None, more)
    method.step(Problem(lambda x, y: outer(x, y, batch), inner), state, None, 1)
    assert seen == [0.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("noise, wanted", [(0.01, 1), (9.0, 8)])
def test_batches_follow_their_noise(noise: float, wanted: int) -> None:
    result = solve([noise * batch for batch in draws(400, 1)], steps=33)
    counts = [record.outer_batches for record in result.history]
    assert counts[0] == 1 and counts[-1] == wanted
    changes = [k for k in range(1, len(counts)) if counts[k] != counts[k - 1]]
    assert all(settles(k - 1) for k in changes)


@pytest.mark.parametrize("method", ["bisls-sgd", bilevel.bisls(response="refine")], ids=str)
def test_every_search_chooses(method: Any) -> None:
    result = solve([9 * batch for batch in draws(400, 1)], method)
    assert max(record.outer_batches for record in result.history) == 8


def test_where_there_is_nothing_to_choose() -> None:
    batch = draws(1, 1)
    for data, options in (
        (batch, {}),
        (draws(9, 1), {"method": "adam"}),
        (draws(9, 1), {"method": "bisps"}),
        (draws(9, 1), {"method": bilevel.bisls(response="frozen")}),
    ):
        result = solve(data, **options)
        assert all(record.outer_batches == 1 for record in result.history)
        assert result.state.agreement == Agreement()
    pairs = [(batch, 0) for batch in draws(9, 1)]
    episodes = bilevel.solve(outer, lambda x, y, b: inner(x, y), X, Y, data=pairs)
    assert episodes.state.agreement == Agreement()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_of_a_fixed_order_every_batch_is_learned_from(count: int) -> None:
    """A list is read in the same order in each pass; what judges one step is used by the next."""
    batches, used = draws(count, 1), []

    class Recorded(bilevel.Implicit):
        def estimate(self, oracle: Any, x: Any, y: Any, outer: Any, *rest: Any) -> Any:
            used.append([id(draw.batch) for draw in outer.draws])
            return super().estimate(oracle, x, y, outer, *rest)

    solve(batches, bilevel.bisls(hypergradient=Recorded(bilevel.ConjugateGradient())), steps=24)
    assert min(count - 1, 2) <= max(map(len, used)) <= count - 1  # one is left to judge
    flat = [i for several in used for i in several]
    ids = [id(b) for b in batches]
    assert flat == [ids[j % count] for j in range(len(flat))]  # none is left out


class Noisy(IterableDataset):
    """Draws a number for every batch from the global generator of torch, Python and NumPy."""

    def __iter__(self) -> Any:
        import random

        import numpy as np

        for _ in range(7):
            yield torch.rand(1) + random.random() + np.random.rand()


@pytest.mark.parametrize("kind", ["list", "shuffled", "own generator", "random"])
@pytest.mark.parametrize("stop", range(9))
def test_a_position_with_a_look_ahead_is_restored(kind: str, stop: int) -> None:
    import random

    import numpy as np

    def cycle() -> Cycle:
        numbers = TensorDataset(torch.arange(12.0))
        own = torch.Generator().manual_seed(5)
        data: Any = {
            "list": [torch.tensor(float(j)) for j in range(4)],
            "shuffled": DataLoader(numbers, 3, shuffle=True),
            "own generator": DataLoader(numbers, 3, shuffle=True, generator=own),
            "random": Noisy(),
        }[kind]
        return Cycle(data, "outer_data")

    def number(batch: Any) -> list[float]:
        return (batch[0] if isinstance(batch, list) else batch).flatten().tolist()

    def read(it: Cycle) -> list[float]:
        """Two, and a look at the third."""
        found = [*number(it.next()), *number(it.next())]
        return found + number(it.peek())

    from bilevel.randomness import all_generators, restore_generators

    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    whole = cycle()
    for _ in range(stop):
        read(whole)
    saved, generators = whole.state_dict(), all_generators(torch.device("cpu"))
    expected = [read(whole) for _ in range(5)]
    torch.manual_seed(7), random.seed(8), np.random.seed(9)
    again = cycle()
    again.load_state_dict(saved)
    restore_generators(generators, torch.device("cpu"))
    assert [read(again) for _ in range(5)] == expected


def test_an_error_ahead_comes_in_its_turn() -> None:
    def broken() -> Any:
        yield 1
        raise RuntimeError("at two")

    class Data:
        def __iter__(self) -> Any:
            return broken()

    cycle = Cycle(Data(), "outer_data")
    assert cycle.next() == 1 and cycle.peek() is None and cycle.peek() is None
    with pytest.raises(RuntimeError, match="at two"):
        cycle.next()
    cycle = Cycle([1, None], "outer_data")
    assert cycle.next() == 1 and cycle.peek() is None and cycle.peek() is None
    with pytest.raises(TypeError, match="outer_data gave None as a batch"):
        cycle.next()


def test_the_graph_computes_the_same() -> None:
    slopes_of = ((-1.0, -0.4), (-1.0, 0.3), (0.5, -0.2), (math.nan, 1.0), (-1.0, math.nan))
    for signal, noise in ((2.0, 3.0), (-1.0, 2.0), (0.0, 0.0), (2.0, -0.5), (2.0, -2.0)):
        for own, fresh in slopes_of:
            for m, terms in ((1, 0), (4, 3), (8, 40)):
                plain = Agreement(m, signal, noise, terms)
                given = Agreement(m, *(torch.tensor(float(v)).double() for v in plain[1:]))
                assert float(given.kappa(torch.tensor(m))) == pytest.approx(plain.kappa(m))
                slopes = torch.tensor(own).double(), torch.tensor(fresh).double()
                found = given.add(*slopes, torch.tensor(m))
                assert [*map(float, found)] == pytest.approx([*plain.add(own, fresh, m)])


def test_the_noise_falls_like_one_over_the_number_of_batches() -> None:
    """What the rule is built on: N is the same, whatever m is."""
    method = bilevel.bisls("sgd", hypergradient=EXACT, inner_solver=lambda x, y, b: J @ x)
    batches, near = draws(5 * 1000, 1, seed=4), 0.1 * X

    def level(m: int) -> float:
        found = []
        for i in range(0, len(batches), 5):
            state = replace(method.init(near, Y), agreement=Agreement(m, 0.0, 0.0, 0))
            more = batches[i + 1 : i + m + 1]
            found.append(method.step(Problem(outer, inner), state, batches[i], 1, None, more)[0])
        return statistics.mean(s.agreement.noise for s in found)

    expected = float((J * J).sum())  # of -J^T e along itself, with e of unit variance
    assert level(1) == pytest.approx(expected, rel=0.15)
    assert level(4) == pytest.approx(expected, rel=0.3)
