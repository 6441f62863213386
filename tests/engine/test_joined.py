"""Batches evaluated as one: where, and only where, the loss of all rows is the mean of theirs."""

from collections import namedtuple

import numpy
import pytest
import torch
import torch.nn.functional as F

import bilevel
from bilevel import joined
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle, Problem

G = torch.Generator().manual_seed(5)


def t(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=G)


ROWS, LABELS, MIX = t(24, 5), torch.randint(3, (24,), generator=G), t(6, 15) / 4
PLACES = torch.arange(24)
X, Y = t(6), t(15)
PARTS = [(ROWS[i : i + 8], LABELS[i : i + 8], PLACES[i : i + 8]) for i in (0, 8, 16)]


def losses(x, y, batch):
    features = batch[0] * (1 + x[:5].tanh())
    return F.cross_entropy(features @ y.view(5, 3), batch[1], reduction="none")


def mean(x, y, batch):
    return losses(x, y, batch).mean() + (y - x @ MIX).square().sum() / 3


class Watched:
    """A loss that counts its calls, and the rows of the last one."""

    def __init__(self, loss):
        self.loss, self.calls, self.rows = loss, 0, 0

    def __call__(self, x, y, batch):
        self.calls, self.rows = self.calls + 1, len(batch[0])
        return self.loss(x, y, batch)


def oracle_of(inner, x=X, y=Y):
    watched = Watched(inner)
    return watched, Oracle(Problem(lambda x, y: y.sum(), watched), Layout(x, "x"), Layout(y, "y"))


def together(oracle):
    return oracle.joint([Draw(part) for part in PARTS])


def derivatives(oracle, x, y, draw):
    pull = oracle.record(x, y, draw)
    u, d = y.sin(), x.cos()
    gradients = oracle.inner_gradients(x, y, draw)
    beside = oracle.inner_gradient_beside(x, y, 2 * y, draw)
    value = oracle.value("inner", x, y, draw)
    return [pull.value, pull.gradient, pull.product(u), *pull.both(u), pull.forward(d)] + [
        *gradients,
        *beside,
        value,
    ]


def mean_of_each(loss, x, y):
    """The same of each batch, by an oracle that knows of one only."""
    _, oracle = oracle_of(loss)
    each = [derivatives(oracle, x, y, Draw(part)) for part in PARTS]
    return [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]


def agree(found, expected):
    return all(
        torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(found, expected, strict=True)
    )


def test_a_mean_over_rows_is_evaluated_once():
    watched, oracle = oracle_of(mean)
    draw = together(oracle)
    assert agree(derivatives(oracle, X, Y, draw), mean_of_each(mean, X, Y))
    watched.calls = 0
    assert agree(derivatives(oracle, X, Y, draw), mean_of_each(mean, X, Y))
    assert (watched.calls, watched.rows) == (5, 24)  # not 15


def test_counters_count_the_batches():
    _, plain = oracle_of(mean)
    plain.problem.habit.joins["inner", 3] = joined.Joins(1)
    _, oracle = oracle_of(mean)
    for each in (plain, oracle):
        derivatives(each, X, Y, together(each))
    assert oracle.cost == plain.cost
    assert oracle.cost.gradients == 9 and oracle.cost.hessian_products == 9


def weighed(x, y, batch):
    """Normalised within a batch; where all weights are the same, as at the start, nothing of it
    shows in the value, and nothing in the gradient of y."""
    weights = (batch[2] * x[5]).tanh().exp()
    return (weights * losses(x, y, batch)).sum() / weights.sum() + y.square().sum() / 3


def standardised(x, y, batch):
    rows = (batch[0] - batch[0].mean(0)) / batch[0].std(0)
    return mean(x, y, (rows, *batch[1:]))


def worst(x, y, batch):
    return losses(x, y, batch).max() + y.square().sum()


def total(x, y, batch):
    return losses(x, y, batch).sum() + y.square().sum()


def contrasted(x, y, batch):
    scores = batch[0] @ y.view(5, 3)
    return F.cross_entropy(scores @ scores.T, torch.arange(len(scores))) + x.square().sum()


def sized(x, y, batch):
    return mean(x, y, (batch[0].view(8, 5), *batch[1:]))


@pytest.mark.parametrize("loss", [weighed, standardised, worst, total, contrasted, sized])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_what_is_no_mean_over_rows_is_left_as_it_is(loss, start):
    x, y = X.clone(), start * Y
    x[5] *= start
    watched, oracle = oracle_of(loss)
    for _ in range(2):
        assert agree(derivatives(oracle, x, y, together(oracle)), mean_of_each(loss, x, y))
        assert watched.rows == 8
    assert oracle.problem.habit.joins["inner", 3].batches == 1


def test_it_is_looked_at_again():
    """At the first point nothing shows, not in the value and not in a gradient."""

    def later(x, y, batch):
        apart = batch[0].mean(0).square().sum() * (x[5] - X[5]).square()
        return mean(x, y, batch) + apart * y.square().sum()

    moved = X + 1.0
    watched, oracle = oracle_of(later)
    derivatives(oracle, X, Y, together(oracle))
    assert watched.rows == 24
    assert agree(derivatives(oracle, moved, Y, together(oracle)), mean_of_each(later, moved, Y))
    assert watched.rows == 8


def test_looks_are_few():
    watched, oracle = oracle_of(mean)
    looks = []
    for _ in range(16):
        watched.calls = 0
        oracle.inner_gradient(X, Y, together(oracle))
        looks.append(watched.calls > 1)
    assert [i + 1 for i, look in enumerate(looks) if look] == [1, 2, 4, 8, 16]


def test_random_numbers_are_drawn_for_each_batch():
    def dropped(x, y, batch):
        return mean(x, y, (F.dropout(batch[0], 0.5), *batch[1:]))

    watched, oracle = oracle_of(dropped)
    for _ in range(2):
        draw = together(oracle)
        first = oracle.inner_gradient(X, Y, draw)
        assert agree(oracle.inner_gradient(X, Y, draw), first)
        assert watched.rows == 8


def test_not_where_tensors_leave_the_caches(monkeypatch):
    monkeypatch.setitem(joined.MOST_ENTRIES, "cpu", 24 * 5 - 1)
    watched, oracle = oracle_of(mean)
    oracle.inner_gradient(X, Y, together(oracle))
    assert watched.rows == 8
    monkeypatch.setitem(joined.MOST_ENTRIES, "cpu", 24 * 5)
    watched, oracle = oracle_of(mean)
    oracle.inner_gradient(X, Y, together(oracle))
    assert watched.rows == 24


@pytest.mark.parametrize(
    "most, rows", [(0, 4), (39, 4), (40, 8), (59, 8), (60, 12), (119, 12), (120, 24)]
)
def test_as_many_as_the_caches_hold(monkeypatch, most, rows):
    """Groups of one size, or their mean would weigh some more."""
    monkeypatch.setitem(joined.MOST_ENTRIES, "cpu", most)
    parts = [(ROWS[i : i + 4], LABELS[i : i + 4], PLACES[i : i + 4]) for i in range(0, 24, 4)]
    watched, oracle = oracle_of(mean)
    _, plain = oracle_of(mean)
    plain.problem.habit.joins["inner", 6] = joined.Joins(1)
    for _ in range(3):
        found, expected = (
            derivatives(o, X, Y, o.joint([Draw(part) for part in parts])) for o in (oracle, plain)
        )
        assert agree(found, expected) and watched.rows == rows
    assert oracle.cost == plain.cost


def test_an_interrupted_look_is_none():
    def stopped(x, y, batch):
        if len(batch[0]) > 8:
            raise KeyboardInterrupt
        return mean(x, y, batch)

    _, oracle = oracle_of(stopped)
    with pytest.raises(KeyboardInterrupt):
        oracle.inner_gradient(X, Y, together(oracle))
    assert oracle.problem.habit.joins == {}


Pair = namedtuple("Pair", "rows labels")


def test_nests_keep_their_structure():
    a, b = ({"p": Pair(ROWS[i : i + 4], [LABELS[i : i + 4]])} for i in (0, 4))
    found = joined.joined([a, b])
    assert isinstance(found["p"], Pair) and isinstance(found["p"].labels, list)
    assert torch.equal(found["p"].rows, ROWS[:8]) and torch.equal(found["p"].labels[0], LABELS[:8])


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "batches",
    [
        [None, None],
        [(), ()],
        [ROWS[:4], ROWS[:3]],
        [ROWS[:4], ROWS[:4].float()],
        [(ROWS[:4],), (ROWS[:4], ROWS[:4])],
        [{"a": ROWS[:4]}, {"b": ROWS[:4]}],
        [(ROWS[:4], 0.5), (ROWS[:4], 0.5)],
        [torch.tensor(1.0), torch.tensor(2.0)],
        [ROWS[:4].numpy(), ROWS[4:8].numpy()],
        [ROWS[:4].to_sparse(), ROWS[4:8].to_sparse()],
        [ROWS[:4].as_subclass(Marked), ROWS[4:8].as_subclass(Marked)],
        [ROWS[:4].clone().requires_grad_(), ROWS[4:8].clone().requires_grad_()],
        [["a", "b"], ["c", "d"]],
        [numpy.zeros(3), numpy.zeros(3)],
    ],
)
def test_what_has_no_rows_in_common_is_not_joined(batches):
    assert joined.joined(batches) is None


@pytest.mark.parametrize("loss", [mean, weighed])
def test_a_run_is_the_same_but_for_rounding(loss, monkeypatch):
    def run():
        method = bilevel.bisls(
            hypergradient=bilevel.Implicit(bilevel.ConjugateGradient(), average=3)
        )
        return bilevel.solve(
            lambda x, y, batch: losses(x, y, batch).mean() + x.square().sum() / 9,
            *(loss, X, Y),
            outer_data=PARTS,
            inner_data=PARTS,
            method=method,
            steps=6,
            inner_steps=3,
        )

    found = run()
    monkeypatch.setattr("bilevel.problem.joined", lambda batches: None)
    plain = run()
    assert torch.allclose(found.x, plain.x, rtol=1e-7) and torch.allclose(
        found.y, plain.y, rtol=1e-7
    )
    costs = [(r.gradients, r.hessian_products, r.loss_evaluations) for r in found.history]
    assert costs == [(r.gradients, r.hessian_products, r.loss_evaluations) for r in plain.history]
