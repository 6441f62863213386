"""Searches compare values: these have to be of the loss that gradients belong to."""

import copy
import random
from functools import partial

import pytest
import torch
from torch import nn

import bilevel
from benchmarks.larger import EVERY
from tasks.errors import MissingData
from tests.tables import t

rows = torch.Generator().manual_seed(0)
Z, z = torch.randn(30, 6, generator=rows), torch.randn(30, 1, generator=rows)


def network():
    torch.manual_seed(0)
    frozen = nn.Linear(6, 8).requires_grad_(False)
    return nn.Sequential(frozen, nn.Tanh(), nn.Linear(8, 1))


def outer(x, y):
    return ((y(Z + 0.1) - z) ** 2).mean()


def penalized(x, y, parameters):
    return ((y(Z) - z) ** 2).mean() + x.exp() * sum((p**2).sum() for p in parameters)


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd", "bisps"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_penalty_on_all_that_requires_gradients(method, compile, tmp_path):
    """Written by a filter, it is the same as without one; also after an interrupt."""

    def run(inner, **more):
        return bilevel.solve(
            outer, inner, torch.tensor(0.0), network(), method=method, steps=6, **more
        )

    def filtered(x, y):
        return penalized(x, y, [p for p in y.parameters() if p.requires_grad])

    plain = run(lambda x, y: penalized(x, y, y[2].parameters()))
    if compile:
        with pytest.warns(RuntimeWarning, match="asks whether its variables require gradients"):
            found = run(filtered, compile=True)
    else:
        found = run(filtered)
        path = tmp_path / "c"
        run(filtered, checkpoint=path, callback=lambda state, record: record.k == 2)
        again = run(filtered, checkpoint=path, resume=True)
        assert torch.equal(again.x, found.x)
    assert found.history[-1].failure is None and found.x != 0
    torch.testing.assert_close(found.x, plain.x, rtol=1e-2 if compile else 1e-4, atol=0)


def test_attention_whose_fast_path_is_another_function():
    """nn.TransformerEncoderLayer in eval mode zeroes padded places where nothing requires grad."""
    torch.manual_seed(0)
    y = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    data, padded = torch.randn(6, 5, 8), torch.zeros(6, 5, dtype=torch.bool)
    padded[:, 3:] = True
    goal = torch.randn(6, 5, 8)

    def inner(x, y):
        out = y(data, src_key_padding_mask=padded)
        return ((out - goal) ** 2).mean() + x.exp() * sum((p**2).sum() for p in y.parameters())

    def outer(x, y):
        return ((y(data + 0.1, src_key_padding_mask=padded) - goal) ** 2).mean()

    result = bilevel.solve(outer, inner, torch.tensor(-6.0), y, steps=3, inner_steps=5)
    assert sum(record.inner_failures for record in result.history) == 0


def weighted(x, y, hide):
    losses = ((y(Z) - z) ** 2)[:, 0]
    seen = losses.detach() if hide else losses
    return (torch.sigmoid(x[0] + x[1] * seen) * losses).mean()


@pytest.mark.parametrize("hide", [False, True])
def test_a_part_that_is_detached_is_told(hide, recwarn):
    bilevel.solve(
        outer,
        lambda x, y: weighted(x, y, hide),
        torch.tensor([0.0, -1.0]),
        network(),
        steps=1,
    )
    told = [str(w.message) for w in recwarn if "hidden from autograd" in str(w.message)]
    assert len(told) == hide
    if hide:
        assert "the inner loss changes" in told[0] and "fixed(...)" in told[0]


def test_fixed_steps_may_detach(recwarn):
    x, method = torch.tensor([0.0, -1.0]), bilevel.fixed("adam", 0.01, 0.1)
    bilevel.solve(outer, lambda x, y: weighted(x, y, True), x, network(), steps=1, method=method)
    assert not recwarn


def test_a_detached_part_of_the_outer_loss():
    def detached(x, y):
        return (y * y.detach()).sum() + (x**2).sum()

    with pytest.warns(RuntimeWarning, match="in y the outer loss changes 2.0[0-9] times"):
        bilevel.solve(detached, lambda x, y: ((y - x) ** 2).sum(), t([1.0, 2.0]), t([0.5, 1.0]),
                      steps=1)  # fmt: skip


class Rounded(torch.autograd.Function):
    """Straight through: the gradient of x, the value of what it is rounded to."""

    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("level", ["outer", "inner"])
def test_a_straight_through_estimator_is_told(level):
    """x stood still without a word, as steps of y alone were looked at."""

    def masked(x, y, rounds):
        mask = Rounded.apply(x) if rounds else x.sigmoid()
        return ((Z @ (mask * y) - z[:, 0]) ** 2).mean() + 0.1 * (y**2).sum()

    levels = [partial(masked, rounds=level == name) for name in ("outer", "inner")]
    x, y = torch.linspace(-1, 1, 6), torch.linspace(-0.5, 1, 6)
    with pytest.warns(RuntimeWarning, match=f"in x the {level} loss changes 0.00 times"):
        bilevel.solve(*levels, x, y, steps=1)


@pytest.mark.parametrize("level", ["outer", "inner"])
def test_random_numbers_from_elsewhere_are_refused(level):
    def noisy(x, y):
        return ((y - x) ** 2).sum() * (1 + random.random()) + 1

    def calm(x, y):
        return ((y - x) ** 2).sum() + 1

    losses = {"outer": (noisy, calm), "inner": (calm, noisy)}[level]
    with pytest.raises(ValueError, match=f"the {level} loss differs.*torch's global generators"):
        bilevel.solve(*losses, t([1.0]), t([0.5]), steps=1)


@pytest.mark.parametrize("name", EVERY)
def test_no_loss_of_the_benchmarks_is_said_to_hide_anything(name, recwarn):
    try:
        case = EVERY[name](0)
    except MissingData as error:
        pytest.skip(str(error))
    case.solve("bisls-adam", steps=1, inner_steps=1, seed=0)
    assert not [w for w in recwarn if "hidden" in str(w.message)]


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: y.abs().sum() + ((y - 1) ** 2).sum(),
        lambda y: torch.relu(y).sum() + ((y - 1) ** 2).sum(),
        lambda y: torch.relu(1 - torch.outer(t([1.0, -2.0]), y)).sum() + (y**2 + y).sum(),
        lambda y: (y - t([0.3, -0.2, 0.1])).abs().amax() + (y**2).sum() + y.sum(),
    ],
)  # fmt: skip
def test_a_start_on_a_kink_is_not_taken_for_a_detached_part(loss, recwarn):
    bilevel.solve(
        lambda x, y: ((y - 2) ** 2).sum(),
        lambda x, y: loss(y) + ((y - x) ** 2).sum(),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        steps=1,
    )
    assert not [w for w in recwarn if "hidden" in str(w.message)]


def test_a_network_that_starts_dead(recwarn):
    """Blank inputs and biases of zero: the gradient at the very kink of a ReLU is zero."""
    torch.manual_seed(0)
    y = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    with torch.no_grad():
        y[0].bias.zero_()
    images = torch.zeros(8, 1, 8, 8)
    images[:, :, 3:5, 3:5] = torch.rand(8, 1, 2, 2)
    classes = torch.arange(8) % 3

    def inner(x, y):
        loss = nn.functional.cross_entropy(y(images), classes)
        return loss + x.exp() * sum((p**2).sum() for p in y.parameters())

    bilevel.solve(lambda x, y: nn.functional.cross_entropy(y(images + 0.1), classes), inner,
                  torch.tensor(-5.0), copy.deepcopy(y), steps=1)  # fmt: skip
    assert not [w for w in recwarn if "hidden" in str(w.message)]


def test_a_loss_that_is_defined_at_the_start_alone(recwarn):
    """What the look tries beside the start is not the user's to answer for."""

    def inner(x, y):
        if (y > 0).any():
            raise ValueError("y has to be at most 0")
        return ((y - x) ** 2).sum()

    bilevel.solve(lambda x, y: ((y + 2) ** 2).sum(), inner, t([-1.0]), t([0.0]), steps=1)
    assert not [w for w in recwarn if "hidden" in str(w.message)]
