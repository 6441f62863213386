"""Modules inside the losses: randomness replayed, buffers, attention, tied and frozen weights."""

import copy
import random

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import bilevel
from bilevel import ConjugateGradient, Implicit, Unrolled
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle, Problem
from tests.engine import oracles
from tests.tables import flat, relative

cross_entropy = nn.functional.cross_entropy


def ridge_of(module):
    return 0.05 * sum((p**2).sum() for p in module.parameters())


def images(n=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 5, 4, generator=rng, dtype=torch.float64)
    return inputs, (inputs.mean((1, 2)) > 0).long() + (inputs[:, 0, 0] > 1).long()


def losses(train=None, test=None):
    (a, la), (b, lb) = train or images(), test or images(seed=1)
    return (
        lambda x, y: cross_entropy(y(x(b)), lb),
        lambda x, y: cross_entropy(y(x(a)), la) + ridge_of(y),
    )


def pair(features, width):
    torch.manual_seed(0)
    return features().double(), nn.Linear(width, 3).double()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs):
        return self.attend(inputs, inputs, inputs, need_weights=False)[0].mean(1)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, inputs):
        return self.layer(inputs).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, inputs):
        return self.lstm(inputs)[0][:, -1]


class Tied(nn.Module):
    """One matrix used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.first(inputs).tanh()).mean(1)


def flattened():
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.Dropout(0.3), nn.Tanh())


KINDS = {
    "attention": (Attention, 4),
    "transformer with dropout": (Transformer, 4),
    "lstm": (Recurrent, 3),
    "tied": (Tied, 4),
    "dropout": (flattened, 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hypergradient_of_a_module(kind):
    """Against the mixed derivative by differences of gradients, dropout held fixed by a seed."""
    x, y = pair(*KINDS[kind])
    outer, inner = losses()
    if "dropout" in kind:
        x.eval()
    h = bilevel.hypergradient(outer, inner, x, y, method=Implicit(ConjugateGradient(60, 1e-13)))
    slow = bilevel.hypergradient(
        outer, inner, x, y, method=bilevel.FiniteDifference(ConjugateGradient(60, 1e-9))
    )
    assert relative(h.grad, flat(slow.grad)) < 1e-5
    assert list(h.grad) == [name for name, _ in x.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unrolled", [False, True])
def test_a_run_with_a_module(kind, unrolled):
    x, y = pair(*KINDS[kind])
    outer, inner = losses()
    method = bilevel.bisls(hypergradient=Unrolled() if unrolled else None)
    names = {k: v.shape for k, v in x.state_dict().items()}
    given = list(x.parameters())
    result = bilevel.solve(outer, inner, x, y, method=method, steps=8, inner_steps=5, seed=1)
    assert result.x is x and result.y is y
    assert all(a is b for a, b in zip(given, x.parameters(), strict=True))
    assert {k: v.shape for k, v in x.state_dict().items()} == names
    assert not any(record.failure for record in result.history)
    if "dropout" not in kind:
        assert result.history[-1].outer_loss < result.history[0].outer_loss
    assert all(p.grad is None for p in [*x.parameters(), *y.parameters()])
    assert all(p.requires_grad for p in [*x.parameters(), *y.parameters()])
    # the state's vector is what the Modules hold
    assert torch.equal(flat(list(x.parameters())).detach(), result.state.vectors[0])


def test_tied_weights_stay_tied():
    x, y = pair(Tied, 4)
    outer, inner = losses()
    assert len(list(x.parameters())) == 3
    before = x.first.weight.detach().clone()
    h = bilevel.hypergradient(outer, inner, x, y)
    assert sorted(h.grad) == ["first.bias", "first.weight", "second.bias"]
    bilevel.solve(outer, inner, x, y, steps=3)
    assert x.second.weight is x.first.weight and not torch.equal(before, x.first.weight)

    # the derivative with respect to the one matrix is the sum over its two uses
    untied = copy.deepcopy(x)
    untied.second.weight = nn.Parameter(untied.first.weight.detach().clone())
    method = Implicit(ConjugateGradient(60, 1e-13))
    one = bilevel.hypergradient(outer, inner, x, y, method=method).grad
    two = bilevel.hypergradient(outer, inner, untied, y, method=method).grad
    both = two["first.weight"] + two["second.weight"]
    assert torch.allclose(one["first.weight"], both, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(one["first.weight"], two["first.weight"], rtol=1e-2)


class Shared(nn.Module):
    """One layer used twice, under three names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layers = nn.ModuleList([self.layer, self.layer])

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs).tanh()
        return inputs.mean(1)


class Once(nn.Module):
    """The same, under one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(self.layer(inputs).tanh()).tanh().mean(1)


class Checkpointed(Shared):
    """The same, whose activations are computed again on the way back."""

    def forward(self, inputs):
        return torch.utils.checkpoint.checkpoint(super().forward, inputs, use_reentrant=False)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("kind", [Shared, Checkpointed])
def test_layers_of_several_names_and_checkpointed_ones(kind, level):
    """To the last bit, and with the parameters that the Module had."""

    def found(kind):
        modules = [*pair(kind, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()]
        (a, la), (b, lb) = images(), images(seed=1)
        if level == 0:
            x, y, loss = modules[0], modules[1], lambda x, y, z: y(x(z))
        else:
            x, y, loss = modules[2], modules[0], lambda x, y, z: x(y(z))
        given = list(modules[0].parameters())
        result = bilevel.solve(
            lambda x, y: cross_entropy(loss(x, y, b), lb),
            lambda x, y: cross_entropy(loss(x, y, a), la) + ridge_of(y),
            *(x, y),
            **{"steps": 6, "inner_steps": 3},
        )
        assert all(p is q for p, q in zip(given, modules[0].parameters(), strict=True))
        assert all(isinstance(p, nn.Parameter) for p in modules[0].parameters())
        return result.state.vectors

    for one, other in zip(found(kind), found(Once), strict=True):
        assert torch.equal(one, other)


def test_frozen_parameters_are_not_touched():
    x, y = pair(flattened, 4)
    x[1].bias.requires_grad_(False)
    y.bias.requires_grad_(False)
    frozen = [x[1].bias.clone(), y.bias.clone()]
    outer, inner = losses()
    h = bilevel.hypergradient(outer, inner, x, y)
    assert list(h.grad) == ["1.weight"]
    result = bilevel.solve(outer, inner, x, y, steps=4)
    assert torch.equal(x[1].bias, frozen[0]) and torch.equal(y.bias, frozen[1])
    assert not x[1].bias.requires_grad and not y.bias.requires_grad
    assert [v.numel() for v in result.state.vectors] == [80, 12]


def test_buffers_are_not_touched():
    """BatchNorm in eval mode, and a buffer of the user's own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, inputs):
            return self.scale * self.norm(inputs).mean(1)

    x, y = pair(Net, 4)
    x.eval()
    x.norm.running_mean.fill_(0.3)
    before = {k: v.clone() for k, v in x.named_buffers()}
    outer, inner = losses()
    bilevel.solve(outer, inner, x, y, steps=4)
    assert all(torch.equal(before[k], v) for k, v in x.named_buffers())


@pytest.mark.parametrize("level", ["outer", "inner"])
def test_batch_norm_statistics_are_refused_and_restored(level):
    """A sentence that names the buffers and three ways out; and nothing is left changed."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, inputs):
            return self.norm(inputs).mean(1)

    x, y = pair(Net, 4)
    (a, la), (b, lb) = images(), images(seed=1)

    def features(inputs, which):
        x.norm.train(which == level)
        return x(inputs)

    def outer(x_, y):
        return cross_entropy(y(features(b, "outer")), lb)

    def inner(x_, y):
        return cross_entropy(y(features(a, "inner")), la) + ridge_of(y)

    before = {k: v.clone() for k, v in x.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        bilevel.solve(outer, inner, x, y, steps=4)
    for words in (
        f"the {level} loss changes the buffers",
        "x.norm.running_mean",
        ".eval()",
        "track_running_stats=False",
        "GroupNorm",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in x.state_dict().items())
    free = nn.BatchNorm1d(5, track_running_stats=False).double()
    x.norm = free
    assert len(bilevel.solve(outer, inner, x, y, steps=2).history) == 2


# -- randomness -----------------------------------------------------------------------------------


def test_dropout_is_replayed():
    oracles.dropout_replayed()


def test_different_draws_have_different_masks():
    drop = nn.Dropout(0.5)
    x, y = torch.ones(50), torch.ones(50)
    problem = Problem(lambda x, y: drop(x * y).sum(), lambda x, y: (drop(y) ** 2).sum())
    oracle = Oracle(problem, Layout(x, "x"), Layout(y, "y"))
    values = {float(oracle.value("outer", x, y, Draw())) for _ in range(6)}
    assert len(values) > 3
    draw = Draw()
    assert len({float(oracle.value("outer", x, y, draw)) for _ in range(6)}) == 1


def test_the_global_generator_ends_where_it_would_have():
    """As if every draw had been evaluated once; trials and products consume nothing."""
    drop = nn.Dropout(0.5)
    x, y = torch.ones(7), torch.ones(7)
    problem = Problem(lambda x, y: drop(x * y).sum(), lambda x, y: (drop(y) ** 2).sum())
    oracle = Oracle(problem, Layout(x, "x"), Layout(y, "y"))
    torch.manual_seed(3)
    draw = Draw()
    oracle.value("outer", x, y, draw)
    once = torch.get_rng_state()
    for _ in range(3):
        oracle.value("outer", 2 * x, y, draw)
        oracle.outer_gradients(x, y, draw)
    assert torch.equal(torch.get_rng_state(), once)
    oracle.value("outer", x, y, Draw())
    assert not torch.equal(torch.get_rng_state(), once)


def test_a_deterministic_loss_leaves_the_generators_alone():
    outer, inner = losses()
    x, y = pair(Attention, 4)
    torch.manual_seed(4)
    random.seed(4)
    state, other = torch.get_rng_state(), random.getstate()
    bilevel.solve(outer, inner, x, y, steps=3)
    bilevel.check(outer, inner, x, y, methods=[Implicit(ConjugateGradient())])
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == other


def test_a_loss_that_raises_restores_the_generator():
    """A replay that ends in an exception does not leave the generator rewound."""
    draw = Draw()
    calls = []

    def loss(x, y):
        calls.append(torch.rand(()))
        if len(calls) == 2:
            raise RuntimeError("broken")
        return (x * y).sum()

    x = y = torch.ones(2)
    oracle = Oracle(Problem(loss, loss), Layout(x, "x"), Layout(y, "y"))
    oracle.value("outer", x, y, draw)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        oracle.value("outer", x, y, draw)
    assert torch.equal(torch.get_rng_state(), state) and calls[0] == calls[1]


def test_a_loss_that_differentiates_by_itself():
    """u(s) = y0 s + y1 s^2 is to follow u' = x: with u' by autograd as with u' written out."""
    s = torch.linspace(0, 1, 7, dtype=torch.float64)

    def by_autograd(x, y):
        points = s.clone().requires_grad_()
        u = y[0] * points + y[1] * points**2
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return ((slope - x) ** 2).mean() + 0.1 * (y * y).sum()

    def written_out(x, y):
        return ((y[0] + 2 * y[1] * s - x) ** 2).mean() + 0.1 * (y * y).sum()

    def solve(inner):
        return bilevel.solve(
            lambda x, y: (y[0] + y[1] - 1) ** 2,
            inner,
            *(torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)),
            steps=5,
        )

    one, other = solve(by_autograd), solve(written_out)
    torch.testing.assert_close(one.x, other.x, rtol=1e-9, atol=1e-12)
    assert one.history[-1].loss_evaluations == other.history[-1].loss_evaluations


def test_a_module_in_a_tree_is_refused_in_words():
    tree = {"head": torch.nn.Linear(2, 2)}
    with pytest.raises(TypeError, match=r"x\['head'\] is a Module .*nn.ModuleDict"):
        bilevel.solve(lambda x, y: y.sum(), lambda x, y: y.sum(), tree, torch.zeros(2))
