"""Batches evaluated as one, which changes nothing but the time."""

import warnings
from collections import namedtuple
from dataclasses import replace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilevel
from bilevel import stacked
from bilevel.layout import Layout
from bilevel.problem import Draw, Joint, Oracle, Problem

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


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("bilevel.problem.PATIENCE", 0)


class Watched:
    """A loss that counts its calls."""

    def __init__(self, loss):
        self.loss, self.calls = loss, 0

    def __call__(self, x, y, batch):
        self.calls += 1
        return self.loss(x, y, batch)


def oracle_of(inner, x=X, y=Y):
    watched = Watched(inner)
    return watched, Oracle(Problem(lambda x, y: y.sum(), watched), Layout(x, "x"), Layout(y, "y"))


def together(oracle, parts=PARTS):
    return oracle.joint([Draw(part) for part in parts])


def derivatives(oracle, x, y, draw):
    pull = oracle.record(x, y, draw)
    u, d = y.sin(), x.cos()
    gradients = oracle.inner_gradients(x, y, draw)
    beside = oracle.inner_gradient_beside(x, y, 2 * y, draw)
    value = oracle.value("inner", x, y, draw)
    second = pull.product(u), *pull.both(u), pull.forward(d)
    return [pull.value, pull.gradient, *second, *gradients, *beside, value]


def mean_of_each(loss, x, y, parts=PARTS):
    """The same of each batch, by an oracle that knows of one only."""
    _, oracle = oracle_of(loss, x, y)
    each = [derivatives(oracle, x, y, Draw(part)) for part in parts]
    return [torch.stack(found).mean(0) for found in zip(*each, strict=True)]


def agree(found, expected, error=1e-11):
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=error, atol=error) for a, b in pairs)


def weighed(x, y, batch):
    """Normalised within a batch; where all weights are the same, as at the start, nothing of it
    shows in the value, and nothing in the gradients."""
    weights = (batch[2] * x[5]).tanh().exp()
    return (weights * losses(x, y, batch)).sum() / weights.sum() + (y - x @ MIX).square().sum() / 3


def standardised(x, y, batch):
    rows = (batch[0] - batch[0].mean(0)) / batch[0].std(0)
    return mean(x, y, (rows, *batch[1:]))


def worst(x, y, batch):
    return losses(x, y, batch).max() + (y - x @ MIX).square().sum()


def total(x, y, batch):
    return losses(x, y, batch).sum() + (y - x @ MIX).square().sum()


def contrasted(x, y, batch):
    scores = batch[0] @ y.view(5, 3)
    negatives = F.cross_entropy(scores @ scores.T, torch.arange(len(scores)))
    return negatives + (y - x @ MIX).square().sum()


def sized(x, y, batch):
    return mean(x, y, (batch[0].view(8, 5), *batch[1:]))


def padded(x, y, batch):
    """Of the rows that are not padding, of which each batch has others."""
    labels = batch[1].where(batch[2] % 7 > 2, -100)
    scores = (batch[0] * (1 + x[:5].tanh())) @ y.view(5, 3)
    return F.cross_entropy(scores, labels, ignore_index=-100) + (y - x @ MIX).square().sum()


def flooded(x, y, batch):
    return (losses(x, y, batch).mean() - 1.2).abs() + (y - x @ MIX).square().sum()


def differentiated(x, y, batch):
    """Takes derivatives itself."""
    slope = torch.func.jacrev(lambda rows: (rows @ y.view(5, 3)).tanh().sum())(batch[0])
    return mean(x, y, batch) + slope.square().mean() * x.square().sum()


LOSSES = [mean, weighed, standardised, worst, total, contrasted, sized, padded, flooded]
LOSSES.append(differentiated)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_it_is_the_mean_of_each_in_fewer_calls(loss, start):
    x, y = X.clone(), start * Y
    x[5] *= start
    watched, oracle = oracle_of(loss, x, y)
    for _ in range(2):
        watched.calls = 0
        draw = together(oracle)
        assert agree(derivatives(oracle, x, y, draw), mean_of_each(loss, x, y))
    # of several largest rows, max has one gradient plainly, and another in vmap: such a one is not
    tied = loss is worst and start == 0
    assert watched.calls == (15 if tied else 5)
    assert oracle.problem.habit.stacks == {3: 1 if tied else 3}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False).double()

    def forward(self, rows):
        return self.head(self.norm(self.hidden(rows)).tanh())


def test_modules_are_evaluated_as_one():
    """One of which depends on the batch as a whole."""
    torch.manual_seed(3)
    x, y = nn.Linear(5, 5).double(), Layers()

    def loss(x, y, batch):
        return F.cross_entropy(y(x(batch[0])), batch[1]) + y.head.weight.square().sum()

    layouts = Layout(x, "x"), Layout(y, "y")
    point = layouts[0].flatten(x), layouts[1].flatten(y)
    watched, oracle = oracle_of(loss, x, y)
    derivatives(oracle, *point, together(oracle))
    watched.calls = 0
    found = derivatives(oracle, *point, together(oracle))
    assert watched.calls == 5
    oracle.problem.habit.stacks[3] = 1
    assert agree(found, derivatives(oracle, *point, together(oracle)))


def test_counters_count_the_batches():
    _, plain = oracle_of(mean)
    plain.problem.habit.stacks[3] = 1
    _, oracle = oracle_of(mean)
    for each in (plain, oracle):
        derivatives(each, X, Y, together(each))
    assert oracle.cost == plain.cost
    assert oracle.cost.gradients == 9 and oracle.cost.hessian_products == 9


# -- losses that do not bear it ------------------------------------------------------------


def asking(x, y, batch):
    value = mean(x, y, batch)
    return value if value.item() < 1e9 else 2 * value


def branching(x, y, batch):
    value = mean(x, y, batch)
    return value if value < 1e9 else 2 * value


def dropped(x, y, batch):
    return mean(x, y, (F.dropout(batch[0], 0.5), *batch[1:]))


def elsewhere(x, y, batch):
    return mean(x, y, batch) * float(numpy.ones(1)[0] + 0 * batch[0].numpy().sum())


KEPT = []


def keeping(x, y, batch):
    """As people do to draw a curve, later."""
    value = mean(x, y, batch)
    KEPT.append(value.detach())
    return value


SHARED = torch.zeros((), dtype=torch.float64)


def writing(x, y, batch):
    value = mean(x, y, batch)
    SHARED.mul_(0.9).add_(value.detach())
    return value


def hooked(x, y, batch):
    """Gradients that are clipped where they are large, which is not here."""
    scores = (batch[0] * (1 + x[:5].tanh())) @ y.view(5, 3)
    if scores.requires_grad:
        scores.register_hook(lambda gradient: gradient.clamp(-9, 9))
    return F.cross_entropy(scores, batch[1]) + (y - x @ MIX).square().sum() / 3


class Copying(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a):
        return a.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class Stubborn(Copying):
    """Whose second derivative alone asks for numbers."""

    @staticmethod
    def backward(ctx, g):
        return Asking.apply(g)


class Asking(Copying):
    @staticmethod
    def backward(ctx, g):
        return g if float(g.abs().max()) < 1e9 else 2 * g


def stubborn(x, y, batch):
    return mean(x, Stubborn.apply(y.view(5, 3) * batch[2].clamp(1, 1)[0]).view(15), batch)


LONELY = [asking, branching, dropped, elsewhere, keeping, writing, hooked, stubborn]


@pytest.mark.parametrize("loss", LONELY)
def test_what_does_not_bear_it_is_evaluated_alone(loss):
    torch.manual_seed(1)
    watched, oracle = oracle_of(loss)
    for _ in range(2):
        draw = together(oracle)
        found = derivatives(oracle, X, Y, draw)
        assert agree(derivatives(oracle, X, Y, draw), found)
        if loss is not dropped:
            assert agree(found, mean_of_each(mean, X, Y))
        watched.calls = 0
        oracle.inner_gradient(X, Y, draw)
        assert watched.calls == 3
    assert oracle.problem.habit.stacks == {3: 1}
    assert all(torch.isfinite(value + 0) for value in KEPT)  # which vmap's own could not tell


@pytest.mark.parametrize("beside", [False, True])
def test_what_does_not_bear_it_only_later(beside):
    """A branch on numbers that is first met elsewhere."""

    def late(x, y, batch):
        value = mean(x, y, batch)
        return value + (value.item() > 0) * y.square().sum() if x[0] > X[0] else value

    moved = X + 1.0
    watched, oracle = oracle_of(late)
    derivatives(oracle, X, Y, together(oracle))
    assert oracle.problem.habit.stacks == {3: 3}
    draw, before = together(oracle), oracle.cost.gradients
    if beside:
        oracle.inner_gradient_beside(moved, Y, Y, draw)
        assert oracle.cost.gradients == before + 3
    else:
        pull, products = oracle.record(moved, Y, draw), oracle.cost.hessian_products
        pull.product(Y)
        assert oracle.cost.hessian_products == products + 3
    assert oracle.problem.habit.stacks == {3: 1}
    watched.calls = 0
    assert agree(derivatives(oracle, moved, Y, draw), mean_of_each(late, moved, Y))
    assert watched.calls == 15  # it is not tried again


def test_what_is_wrong_is_told_as_of_one_batch():
    def broken(x, y, batch):
        return losses(x, y, batch) if x[0] > X[0] else mean(x, y, batch)

    _, oracle = oracle_of(broken)
    draw = together(oracle)
    oracle.inner_gradient(X, Y, draw)
    with pytest.raises(TypeError, match=r"returned shape \(8,\)"):
        oracle.inner_gradient(X + 1, Y, draw)


def test_random_numbers_move_on_as_if_each_batch_were_evaluated():
    found = []
    for size in (3, 1):
        torch.manual_seed(7)
        _, oracle = oracle_of(dropped)
        if size == 1:
            oracle.problem.habit.stacks[3] = 1
        found.append([oracle.inner_gradient(X, Y, together(oracle))[1], torch.rand(1).double()])
    assert agree(*found, error=0)


def test_an_interrupted_look_is_none():
    def stopped(x, y, batch):
        raise KeyboardInterrupt

    _, oracle = oracle_of(stopped)
    with pytest.raises(KeyboardInterrupt):
        oracle.inner_gradient(X, Y, together(oracle))
    assert oracle.problem.habit.stacks == {}


def test_a_wrong_rule_is_seen(monkeypatch):
    monkeypatch.setattr(
        torch.func, "vmap", lambda loss: lambda b: torch.stack([loss(PARTS[0])] * 3)
    )
    watched, oracle = oracle_of(mean)
    assert agree(derivatives(oracle, X, Y, together(oracle)), mean_of_each(mean, X, Y))
    assert oracle.problem.habit.stacks == {3: 1}


def test_outer_batches_are_evaluated_one_by_one():
    watched = Watched(mean)
    oracle = Oracle(Problem(watched, mean), Layout(X, "x"), Layout(Y, "y"))
    oracle.outer_gradients(X, Y, Joint([Draw(part) for part in PARTS]))
    assert watched.calls == 3 and oracle.problem.habit.stacks == {}


def test_not_before_it_pays(monkeypatch):
    """A hypergradient alone, or the first of a run, would pay for a look more than it gains."""
    monkeypatch.setattr("bilevel.problem.PATIENCE", 12)
    watched, oracle = oracle_of(mean)
    calls = []
    for _ in range(3):
        watched.calls = 0
        pull = oracle.record(X, Y, together(oracle))
        calls.append(watched.calls)
        for _ in range(2):
            pull.product(Y)
    assert calls[:2] == [3, 3] and oracle.problem.habit.stacks == {3: 3}


# -- which, and how many -------------------------------------------------------------------


@pytest.mark.parametrize(
    "most, size", [(0, 1), (39, 1), (40, 2), (59, 2), (60, 3), (119, 3), (120, 6)]
)
@pytest.mark.parametrize("wide", [False, True])
def test_as_many_as_the_caches_hold(monkeypatch, most, size, wide):
    """Groups of one size, or their mean would weigh some more; what does not grow with the batches
    does not count."""
    monkeypatch.setitem(stacked.MOST_ENTRIES, "cpu", most)
    parts = [(ROWS[i : i + 4], LABELS[i : i + 4], PLACES[i : i + 4]) for i in range(0, 24, 4)]

    def loss(x, y, batch):
        large = torch.ones(999 if wide else 1, dtype=torch.float64)
        return losses(x, y, batch).mean() + x[5] * (y @ y) * large.mean()

    watched, oracle = oracle_of(loss)
    for _ in range(3):
        found = derivatives(oracle, X, Y, together(oracle, parts))
        assert agree(found, mean_of_each(loss, X, Y, parts))
    assert oracle.cost.gradients == 3 * 3 * 6 and oracle.cost.hessian_products == 3 * 3 * 6
    watched.calls = 0
    oracle.inner_gradient(X, Y, together(oracle, parts))
    assert watched.calls == (1 if wide else 6 // size)


Pair = namedtuple("Pair", "rows labels")


def test_nests_keep_their_structure():
    a, b = ({"p": Pair(ROWS[i : i + 4], [LABELS[i : i + 4]])} for i in (0, 4))
    found, dims = stacked.stacked([a, b])
    assert dims == {"p": Pair(0, [0])}
    assert isinstance(found["p"], Pair) and isinstance(found["p"].labels, list)
    assert torch.equal(found["p"].rows, ROWS[:8].view(2, 4, 5))
    assert torch.equal(found["p"].labels[0], LABELS[:8].view(2, 4))


def test_what_is_the_same_in_all_is_not_copied():
    """A table, of which each batch has its rows."""
    parts = [{"table": ROWS, "rows": PLACES[i : i + 8], "labels": LABELS} for i in (0, 8, 16)]
    found, dims = stacked.stacked(parts)
    assert found["table"] is ROWS and found["labels"] is LABELS and found["rows"].shape == (3, 8)
    assert dims == {"table": None, "rows": 0, "labels": None}

    def loss(x, y, batch):
        picked = batch["table"][batch["rows"]], batch["labels"][batch["rows"]]
        return mean(x, y, (*picked, None))

    watched, oracle = oracle_of(loss)
    for _ in range(2):
        watched.calls = 0
        found = derivatives(oracle, X, Y, together(oracle, parts))
        assert agree(found, mean_of_each(mean, X, Y))
    assert watched.calls == 5
    assert stacked.stacked([parts[0], dict(parts[0])])[1] == dict.fromkeys(parts[0])


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
        [ROWS[:4].numpy(), ROWS[4:8].numpy()],
        [ROWS[:4].to_sparse(), ROWS[4:8].to_sparse()],
        [ROWS[:4].as_subclass(Marked), ROWS[4:8].as_subclass(Marked)],
        [ROWS[:4].clone().requires_grad_(), ROWS[4:8].clone().requires_grad_()],
        [["a", "b"], ["c", "d"]],
    ],
)
def test_what_is_not_alike_is_not_stacked(batches):
    assert stacked.stacked(batches) is None


# -- whole runs ----------------------------------------------------------------------------


def solve(loss, **options):
    hypergradient = bilevel.Implicit(bilevel.ConjugateGradient(), average=3)
    method = replace(bilevel.bisls(hypergradient=hypergradient), outer_batches=1)
    return bilevel.solve(
        lambda x, y, batch: losses(x, y, batch).mean() + x.square().sum() / 9,
        *(loss, X, Y),
        outer_data=PARTS,
        inner_data=PARTS,
        method=method,
        inner_steps=3,
        **options,
    )


@pytest.mark.parametrize("loss", [mean, weighed, asking])
def test_a_run_is_the_same_but_for_rounding(loss, monkeypatch):
    found = solve(loss, steps=6)
    monkeypatch.setattr("bilevel.problem.stacked", lambda batches: None)
    plain = solve(loss, steps=6)
    assert agree([found.x, found.y], [plain.x, plain.y], error=1e-7)
    costs = [(r.gradients, r.hessian_products, r.loss_evaluations) for r in found.history]
    assert costs == [(r.gradients, r.hessian_products, r.loss_evaluations) for r in plain.history]


def test_a_resumed_run_goes_on_as_it_was(tmp_path, monkeypatch):
    """To the same bits, though a first look would find another number."""
    whole = solve(mean, steps=8)
    path = tmp_path / "run.pt"
    solve(mean, steps=4, checkpoint=path)
    monkeypatch.setattr("bilevel.problem.few_enough", lambda *args: 1)
    resumed = solve(mean, steps=8, checkpoint=path, resume=True)
    assert torch.equal(whole.x, resumed.x) and torch.equal(whole.y, resumed.y)


def test_nothing_is_told_of_operations_that_vmap_does_one_by_one():
    def slow(x, y, batch):
        return mean(x, y, batch) + torch.histc(batch[0], 4).sum() * 0 + torch.trace(batch[0])

    _, oracle = oracle_of(slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = derivatives(oracle, X, Y, together(oracle))
    assert agree(found, mean_of_each(slow, X, Y))
