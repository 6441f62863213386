"""g averaged over several inner batches before it is differentiated."""

import pytest
import torch

import bilevel
from bilevel import ConjugateGradient, FiniteDifference, Implicit, StochasticNeumann
from bilevel.layout import Layout
from bilevel.problem import Draw, Problem, make_oracle

G = torch.Generator().manual_seed(3)


def t(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=G)


ROWS, TARGETS = t(12, 5), t(12)
X, Y = t(4), t(5)
MIX = t(5, 4)


def inner(x, y, batch):
    """Not quadratic, not symmetric, and a mean over the rows of the batch."""
    rows, targets = batch
    r = rows @ y - targets * x.sum()
    return (r.square() / 2 + r.cos()).mean() + (y - MIX @ x.tanh()).square().sum() / 4


def outer(x, y):
    return (y.sin() * y).sum() + (x.square() * torch.arange(4)).sum()


def batch(*rows):
    return ROWS[list(rows)], TARGETS[list(rows)]


PARTS = [batch(0, 1, 2, 3), batch(4, 5, 6, 7), batch(8, 9, 10, 11)]
EXACT = ConjugateGradient(steps=50, rtol=0)


def derivative(method, **batches):
    return bilevel.hypergradient(outer, inner, X, Y, method=method, **batches)


@pytest.mark.parametrize("make, error", [(Implicit, 1e-12), (FiniteDifference, 1e-6)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_it_is_the_hypergradient_of_all_their_rows(make, error, count):
    found = derivative(make(EXACT, average=count), inner_batches=PARTS[:count])
    whole = derivative(make(EXACT), inner_batch=batch(*range(4 * count)))
    assert torch.allclose(found.grad, whole.grad, rtol=error, atol=error)
    alone = derivative(make(EXACT), inner_batch=PARTS[0])
    assert (count == 1) == torch.allclose(found.grad, alone.grad, rtol=1e-3)


def test_each_batch_is_counted():
    solver = ConjugateGradient(steps=3, rtol=0)
    one = derivative(Implicit(solver), inner_batch=PARTS[0])
    two = derivative(Implicit(solver, average=2), inner_batches=PARTS[:2])
    assert two.hessian_products == 2 * one.hessian_products
    assert two.gradients == one.gradients + 1


@pytest.mark.parametrize(
    "method", [Implicit(EXACT), Implicit(EXACT, average=2), FiniteDifference(), bilevel.Unrolled()]
)
def test_batches_that_nothing_would_use_are_refused(method):
    with pytest.raises(ValueError, match=f"inner_batches has 3 .* uses {method.batches}"):
        derivative(method, inner_batches=PARTS)


def test_a_batch_that_comes_twice_is_one():
    same = Draw(PARTS[0])
    joint = make_oracle(Problem(outer, inner), Layout(X, "x"), Layout(Y, "y")).joint
    assert joint([same, Draw(PARTS[0])]) is same
    assert joint([same, Draw(PARTS[1]), Draw(PARTS[0])]).count == 2
    assert joint([Draw(), Draw()]).count == 1
    seen = []

    def watched(x, y, batch):
        seen.append(id(batch[0]))
        return inner(x, y, batch)

    loader = torch.utils.data.DataLoader(list(zip(ROWS, TARGETS, strict=True)), batch_size=12)
    for data, most in (([PARTS[0]], 1), (PARTS, 3), (loader, 1)):
        seen.clear()
        method = bilevel.bisls(hypergradient=Implicit(EXACT, average=3))
        result = bilevel.solve(
            outer, watched, X, Y, inner_data=data, method=method, steps=1, inner_steps=1
        )
        assert len(set(seen)) >= most
        (record,) = result.history
        # a look at both losses, y, f, and graphs; and those that a trial is judged by
        assert record.gradients == 8 + most * (1 + record.outer_trials)


@pytest.mark.filterwarnings("default")  # the compiler warns of its own parts
@pytest.mark.parametrize("compile", [False, True])
def test_a_trial_follows_the_tangent_of_their_mean(compile):
    """One step is the same on two batches as on one with the rows of both."""
    layouts = Layout(X, "x"), Layout(Y, "y")
    oracle = make_oracle(Problem(outer, inner, compile=compile), *layouts)
    estimates = [
        Implicit(EXACT, average=2).estimate(oracle, X, Y, Draw(), draws, [], None)
        for draws in ([Draw(PARTS[0]), Draw(PARTS[1])], [Draw(batch(*range(8)))])
    ]
    d = t(4)
    courses = [h.respond(d) for h in estimates]
    slopes = [course.slope for course in courses]
    ends = [course.follow(0.3, X + 0.3 * d) for course in courses]
    close = dict(rtol=1e-9, atol=1e-9)
    assert torch.allclose(*slopes, **close) and torch.allclose(ends[0][0], ends[1][0], **close)
    assert bool(ends[0][1]) == bool(ends[1][1])
    assert torch.allclose(*(h.newton()[0] for h in estimates), **close)
    assert torch.allclose(*(h.lag for h in estimates), **close)


def test_a_gradient_beside_a_value():
    oracle = make_oracle(Problem(outer, inner), Layout(X, "x"), Layout(Y, "y"))
    several = oracle.joint([Draw(p) for p in PARTS])
    *found, there = oracle.inner_gradient_beside(X, Y, 2 * Y, several)
    assert (oracle.cost.gradients, oracle.cost.loss_evaluations) == (3, 3)
    every = Draw(batch(*range(12)))
    for mine, other in zip(found, oracle.inner_gradient(X, Y, every), strict=True):
        assert torch.allclose(mine, other, rtol=1e-13)
    assert torch.allclose(there, oracle.value("inner", X, 2 * Y, every), rtol=1e-13)


@pytest.mark.parametrize("average", [0, -1, 1.5, "two", True])
def test_what_counts_no_batches_is_refused(average):
    with pytest.raises((TypeError, ValueError), match="average"):
        Implicit(average=average)


def test_a_series_with_batches_of_its_own_is_refused():
    with pytest.raises(ValueError, match="a batch of its own for each factor"):
        Implicit(StochasticNeumann(5), average=2)
