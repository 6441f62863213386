"""A y that is trained as networks are: momentum, and a search that lets g be as high as of late."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from benchmarks.problems import images_of
from bilevel import Implicit, kinks
from bilevel.inner import inner_steps, trains
from bilevel.noise import Noise
from bilevel.presets import TRAINING_C
from bilevel.problem import Draw, Problem, make_oracle
from bilevel.rules import Armijo, Line
from bilevel.state import Training
from tests.tables import t

rng = np.random.default_rng(0)
A, B = t(rng.standard_normal((24, 5))), t(rng.standard_normal(24))
BATCHES = [(A[8 * i : 8 * i + 8], B[8 * i : 8 * i + 8]) for i in range(3)]


def inner(x, y, batch):
    """A network with a hidden layer, and a penalty."""
    hidden = torch.tanh(batch[0] @ y[:15].view(5, 3))
    return ((hidden @ y[15:] - batch[1]) ** 2).mean() + (x.exp() * y**2).mean()


def outer(x, y, batch):
    return inner(torch.full_like(x, -9.0), y, batch)


def start(method="bisls-adam", **changes):
    """A run in its second iteration, when g is known not to be convex."""
    method = bilevel.presets.PRESETS[method]() if isinstance(method, str) else method
    x, y = t(np.full(18, -4.0)), t(np.random.default_rng(1).standard_normal(18))
    state = method.init(x, y)
    known = state.learned._replace(concave=0.3)
    oracle = make_oracle(Problem(outer, inner), *state.layouts)
    known = {"learned": known, "noise": state.noise.add(0.5, 1)}
    return method, oracle, replace(state, k=1, **{**known, **changes})


def test_inner_steps_are_those_of_adam_with_a_search():
    """Recomputed by hand, over two calls: averages of the gradient and its square, both corrected;
    the longest of 1.2 times the last step and its halves with

        g(y + t d) <= max{g, C} + 0.7 t <g_y, d>,

    C the mean of the losses so far with weights 0.9^j."""
    method, oracle, state = start()
    draws = [Draw(batch) for batch in BATCHES * 2]
    first = inner_steps(method, oracle, state, draws)
    state = replace(state, vectors=(state.vectors[0], first.y), training=first.training)
    second = inner_steps(method, oracle, state, draws)

    x, y = start()[2].vectors
    m, v, level, weight, last, higher = 0, 0, 0.0, 0.0, None, 0
    for n, batch in enumerate(BATCHES * 4, 1):
        y = y.detach().requires_grad_()
        value = inner(x, y, batch)
        (g,) = torch.autograd.grad(value, y)
        value = value.detach()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        d = -m / (1 - 0.9**n) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
        if g @ d >= 0:
            d = -g / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
        level = (0.9 * weight * level + float(value)) / (0.9 * weight + 1)
        weight = 0.9 * weight + 1
        with torch.no_grad():
            if last is None:  # the first search is over a grid, and tested with the rules
                size = _first(x, y, d, g, value, batch)
            else:
                size, most = 1.2 * last, max(float(value), level)
                while inner(x, y + size * d, batch) > most + TRAINING_C * size * (g @ d):
                    size /= 2
            y = y + size * d
            higher += float(inner(x, y, batch)) > float(value)
        last = size
        if n == len(draws):
            assert torch.allclose(y, first.y, rtol=1e-9)
    assert torch.allclose(y, second.y, rtol=1e-9)
    assert second.training.last == pytest.approx(last, rel=1e-9)
    assert second.training.level == pytest.approx(level, rel=1e-12)
    assert higher > 0  # else the mean was of no use


def _first(x, y, d, g, value, batch):
    line = Line(value, g @ d, lambda s: inner(x, y + s * d, batch))
    return Armijo(1.0, TRAINING_C)(line, 1, None).size


def test_which_are_trained():
    draws = [Draw(batch) for batch in BATCHES]

    def are(*args, draws=draws, **changes):
        method, oracle, state = start(*args, **changes)
        return trains(method, oracle, state, draws)

    assert are() and are("bisls-sgd")
    convex = start()[2].learned._replace(concave=0.0)
    assert not are(learned=convex)
    # one batch, shuffled in every pass: the average looks for others, and finds none
    assert not are(noise=Noise())
    one = bilevel.bisls(hypergradient=Implicit(bilevel.ConjugateGradient()))
    assert are(one, noise=Noise()) and not are(one, draws=draws[:1] * 3)
    # what goes back along the steps, takes one more, or takes others
    assert not are("bisps") and not are("adam") and not are("sgd")
    assert not are(bilevel.bisls(hypergradient=bilevel.Unrolled()))
    assert not are(bilevel.bisls(response="refine"))
    assert not are(replace(bilevel.bisls(), fresh=True))
    assert are(bilevel.bisls(hypergradient=Implicit(bilevel.Neumann(5, 0.1))))


def test_the_mean_is_that_of_zhang_and_hager():
    training, level, weight = Training(), 0.0, 0.0
    for value in (3.0, -1.0, 7.0):
        training = training.saw(value)
        level, weight = (0.9 * weight * level + value) / (0.9 * weight + 1), 0.9 * weight + 1
        assert training.level == pytest.approx(level, rel=1e-14)
        assert training.weight == pytest.approx(weight, rel=1e-14)


@pytest.mark.parametrize("above, size", [(0.0, 0.25), (1.6, 1.0)])
def test_a_search_may_end_above(above, size):
    """On phi(s) = 2 (s - 1/4)^2 and 1 below where phi(0) + above allows."""
    line = Line(t(0.125), t(-1.0), lambda s: t(2 * (s - 0.25) ** 2), above=above)
    assert Armijo(c=0.5)(line, 5, 1.0 / 1.2).size == size


def loaders(seed):
    train, validation = TensorDataset(A, B), TensorDataset(A[:12], B[:12])
    g = torch.Generator().manual_seed(seed)
    return {
        "outer_data": DataLoader(validation, 6, shuffle=True, generator=g),
        "inner_data": DataLoader(train, 6, shuffle=True, generator=g),
    }


@pytest.fixture(scope="module")
def whole():
    x, y = (v.clone() for v in start()[2].vectors)
    return x, y, bilevel.solve(outer, inner, x, y, steps=14, seed=0, progress=False, **loaders(3))


def test_stopped_and_resumed(tmp_path, whole):
    class Stop(Exception):
        pass

    def stop(state, record):
        assert record.k < 7 or state.training.last is not None
        if record.k == 7:
            raise Stop

    x, y, result = whole
    file, options = tmp_path / "run.pt", {"steps": 14, "progress": False}
    with pytest.raises(Stop):
        bilevel.solve(
            *(outer, inner, x, y), checkpoint=file, checkpoint_every=1, callback=stop, seed=0,
            **options, **loaders(3),
        )  # fmt: skip
    resumed = bilevel.solve(
        *(outer, inner, x, y), checkpoint=file, resume=True, **options, **loaders(3)
    )
    assert torch.equal(resumed.x, result.x) and torch.equal(resumed.y, result.y)
    one, other = resumed.state.training, result.state.training
    assert (one.level, one.weight) == (other.level, other.weight) != (0.0, 0.0)


def test_other_steps_are_no_sign_of_a_kink(monkeypatch):
    """Those of Adam are of another scale than the gradient steps before them."""
    looked = []
    monkeypatch.setattr(kinks, "shrank", lambda history: looked.append(1))
    method, oracle, state = start(inner_last=0.1)
    for training in (Training(), Training(last=0.1)):
        given = replace(state, training=training)
        kinks.tell(method, oracle, given, Draw(BATCHES[0]), [], None)
    assert looked == [1]


def test_a_deep_network_is_trained():
    """Gradient steps that fall on each batch leave ten times the loss."""
    images, labels = (part[:700] for part in images_of("digits")[0])
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
    start = nn.Sequential(*hidden, nn.Linear(64, 10))

    def outer(x, network, batch):
        return F.cross_entropy(network(batch[0]), batch[1])

    def inner(x, network, batch):
        penalty = sum((p**2).sum() for p in network.parameters())
        return outer(x, network, batch) + x.exp() * penalty

    def after(method):
        data = [
            DataLoader(TensorDataset(images, labels), 64, shuffle=True, generator=g)
            for g in (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
        ]
        result = bilevel.solve(
            *(outer, inner, torch.tensor(-12.0), copy.deepcopy(start)),
            **{"outer_data": data[0], "inner_data": data[1], "steps": 12, "method": method},
            **{"seed": 0, "progress": False},
        )
        with torch.no_grad():
            return float(outer(None, result.y, (images, labels)))

    method = bilevel.bisls()
    assert after(method) < after(replace(method, training=None)) / 4


def test_scores_of_sequences():
    """F.cross_entropy of transposed scores, of which torch knows no fourth pass, has g_yx d."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 4, 3, generator=g, dtype=torch.float64)
    labels = torch.randint(5, (6, 4), generator=g)

    def sequences(x, y):
        losses = F.cross_entropy((inputs @ y).transpose(1, 2), labels, reduction="none")
        return (x.exp() * losses.mean(1)).mean() + (y**2).sum()

    x, y = torch.randn(6, generator=g, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    method = bilevel.bisls()
    state = method.init(x, y)
    oracle = make_oracle(Problem(lambda x, y: y.sum(), sequences), *state.layouts)
    d = torch.randn(6, generator=g, dtype=torch.float64)
    here, at = state.vectors
    got = oracle.record(here, at, Draw()).forward(d)
    ahead, behind = (oracle.inner_gradient(here + s * d, at, Draw())[1] for s in (1e-6, -1e-6))
    assert torch.allclose(got, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)
    bilevel.solve(lambda x, y: (y**2).sum(), sequences, x, y, steps=3, progress=False)
