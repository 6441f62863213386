"""A Hessian that is had as a matrix, where that is cheaper than its products one by one."""

import pytest
import torch

import bilevel
from bilevel import problem as module
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle, Problem, Pullback

G = torch.Generator().manual_seed(11)
ROWS = torch.randn(30, 12, dtype=torch.float64, generator=G)
X, Y, U = (torch.randn(n, dtype=torch.float64, generator=G) for n in (12, 12, 12))


def inner(x, y):
    r = ROWS @ y
    return (r.cos() + r.square()).mean() + (x.exp() * (y - x.roll(1)).square()).sum() / 3


def outer(x, y):
    return (y.sin() * torch.arange(12.0, dtype=torch.float64)).sum() + x.square().sum()


class Plain(torch.autograd.Function):
    """y^2 without a rule for vmap."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return Twice.apply(y, g)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, g):
        ctx.save_for_backward(y, g)
        return 2 * y * g

    @staticmethod
    def backward(ctx, u):
        y, g = ctx.saved_tensors
        return torch.from_numpy(2 * u.detach().numpy() * g.numpy()), 2 * y * u


def products(loss, count, y=Y, known=True):
    oracle = Oracle(Problem(outer, loss), Layout(X, "x"), Layout(y, "y"))
    if known:
        oracle.value("inner", X, y, Draw())
    pull = oracle.record(X, y, Draw())
    return pull, [pull.product(U[: y.numel()]) for _ in range(count)], oracle


def test_it_is_the_same_product():
    pull, found, oracle = products(inner, 8)
    assert pull._hessian is not None and pull._hessian.shape == (12, 12)
    assert oracle.cost.hessian_products == 8
    exact = torch.autograd.functional.hessian(lambda y: inner(X, y), Y) @ U
    for product in found:
        torch.testing.assert_close(product, exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(pull.both(U)[1], exact, rtol=1e-13, atol=1e-13)


def test_not_before_it_pays():
    assert products(inner, 1)[0]._hessian is None
    assert products(inner, 2)[0]._hessian is not None
    assert products(inner, 40, known=False)[0]._hessian is None  # nobody knows what it costs


def test_where_it_is_larger(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 11)
    assert products(inner, 40)[0]._hessian is None
    monkeypatch.undo()
    monkeypatch.setattr(module, "ENTRIES", 30 * 12 - 1)
    assert products(inner, 40)[0]._hessian is None
    monkeypatch.setattr(module, "ENTRIES", 30 * 12)
    assert products(inner, 40)[0]._hessian is not None


def test_a_loss_whose_rows_cannot_be_had_at_once():
    pull, found, oracle = products(lambda x, y: (Plain.apply(y) * ROWS[0].exp()).sum(), 9)
    assert pull._hessian is None
    for product in found:
        torch.testing.assert_close(product, 2 * ROWS[0].exp() * U, rtol=1e-13, atol=0)
    again = oracle.record(X, Y, Draw())
    for _ in range(9):
        again.product(U)
    assert again._hessian is None and oracle.problem.habit.largest is None  # not tried again


def test_a_gradient_that_y_does_not_enter():
    pull, found, _ = products(lambda x, y: (y * ROWS[0]).sum(), 9)
    assert all(torch.equal(product, torch.zeros(12, dtype=torch.float64)) for product in found)


@pytest.mark.parametrize("method", ["bisls-adam", "bisps"])
def test_runs_with_and_without(method, monkeypatch):
    """To rounding; and the matrix was there."""
    made = []
    rows = Pullback._rows

    def spy(self):
        made.append(rows(self))
        return made[-1]

    monkeypatch.setattr(Pullback, "_rows", spy)
    with_it = bilevel.solve(outer, inner, X, Y, method=method, steps=4)
    assert len(made) >= 3 and all(hessian is not None for hessian in made)
    monkeypatch.setattr(module, "ROWS", 0)
    made.clear()
    without = bilevel.solve(outer, inner, X, Y, method=method, steps=4)
    assert not made
    torch.testing.assert_close(with_it.x, without.x, rtol=1e-9, atol=1e-11)
    one, other = (result.history[-1] for result in (with_it, without))
    assert one.hessian_products == other.hessian_products
