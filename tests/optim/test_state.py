"""Save, load, go on: bit for bit, by every road, in both modes."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import optim
from tests.optim.tables import AVERAGES, METHODS, ONCE, LeastSquares, flat

ROWS = [m for m in METHODS if m in ONCE or "beta 0" in m.name or "ema" in m.name]
MODES = [(m, e) for m in ROWS for e in (False, True) if m.average or not e]
SHAPES = ((3,), (2, 2), (), (150, 120))


def through_file(optimizer, make, params):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(params)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


def through_values(optimizer, make, params):
    """A format that keeps values alone, not which tensors were one."""
    state = copy.copy(optimizer.state_dict())
    state["state"] = {
        k: {n: torch.from_numpy(t.numpy().copy()) for n, t in kept.items()}
        for k, kept in state["state"].items()
    }
    fresh = make(params)
    fresh.load_state_dict(state)
    return fresh


def start(method, dtype, steps):
    problem = LeastSquares(SHAPES, noise=0.3)
    params = problem.params(dtype)
    optimizer = method([{"params": params[:2]}, {"params": params[2:]}])
    for t in range(steps):
        problem.step(optimizer, t, params)
    return problem, params, optimizer


def go_on(problem, params, optimizer, steps=6):
    if hasattr(optimizer, "train"):
        optimizer.train()
    for t in range(7, 7 + steps):
        problem.step(optimizer, t, params)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("road", [through_file, through_values])
@pytest.mark.parametrize("method, evaluate", MODES, ids=str)
def test_resume(method, evaluate, road, dtype):
    problem, params, optimizer = start(method, dtype, 7)
    if evaluate:
        optimizer.eval()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = road(optimizer, method, [{"params": copies[:2]}, {"params": copies[2:]}])
    expected = go_on(problem, params, optimizer)
    for a, b in zip(expected, go_on(problem, copies, fresh), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("flat_keys", [False, True])
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("method", ONCE, ids=str)
def test_distributed_checkpoint(method, cleared, flat_keys):
    """The functions of torch.distributed.checkpoint name the state by the parameters."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat_keys)
    inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)

    def network():
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).double()
        return made, method(made.parameters())

    def train(net, optimizer, steps):
        for t in steps:

            def loss(t=t):
                return ((net(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean() + 1 / (t + 2)

            if method.search:
                optimizer.step(loss)
                continue
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step(loss=value, target=0.0)

    net, optimizer = network()
    train(net, optimizer, range(4))
    if cleared:
        optimizer.zero_grad()
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(net, optimizer, options=options))
    if not flat_keys:
        assert set(saved["state"]) <= {name for name, _ in net.named_parameters()}
    other, fresh = network()
    other.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(other, fresh, saved, options=options)
    for each in ((net, optimizer), (other, fresh)):
        train(*each, range(4, 9))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "make, other, missing",
    [
        (optim.ScheduleFreeAdamSPS, torch.optim.Adam, "safeguard.*train_mode"),
        (optim.ScheduleFreeSPS, optim.SPS, "beta.*train_mode"),
        (optim.SPS, torch.optim.SGD, "c, lower_bound, max_lr"),
        (optim.SPS, optim.SafeguardedSPS, "c, max_lr"),
        (optim.SLSB, optim.SLS, "decay"),
    ],
)
def test_state_of_another_optimizer(make, other, missing):
    x = torch.nn.Parameter(torch.ones(2))
    x.grad = torch.ones(2)
    state = other([x]).state_dict()
    optimizer = make([x])
    before = copy.deepcopy(optimizer.state_dict())
    told = (
        rf"{make.__name__} got the state of another.*{missing}.*state_dict\(\) of {make.__name__}"
    )
    with pytest.raises(ValueError, match=told):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("road", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("method, evaluate", MODES, ids=str)
def test_copies(method, evaluate, road):
    problem, params, optimizer = start(method, torch.float64, 7)
    if evaluate:
        optimizer.eval()
    copies, other = road((params, optimizer))
    expected = go_on(problem, params, optimizer)
    got = go_on(problem, copies, other)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ROWS, ids=str)
def test_loading_shares_nothing(method):
    problem, params, optimizer = start(method, torch.float64, 3)
    saved = optimizer.state_dict()
    other = problem.params()
    fresh = method([{"params": other[:2]}, {"params": other[2:]}])
    fresh.load_state_dict(saved)
    before = copy.deepcopy(saved)
    for t in range(3):
        problem.step(fresh, t, other)
    for key, kept in before["state"].items():
        for name, value in kept.items():
            assert torch.equal(value, saved["state"][key][name])
    for name, value in before["param_groups"][0].get("memory", {}).items():
        assert torch.equal(value, saved["param_groups"][0]["memory"][name])


@pytest.mark.parametrize("method", AVERAGES, ids=str)
def test_modes_are_idempotent(method):
    problem, params, optimizer = start(method, torch.float64, 9)
    y = flat(params)
    optimizer.train()
    np.testing.assert_array_equal(flat(params), y)
    optimizer.eval()
    x = flat(params)
    optimizer.eval()
    np.testing.assert_array_equal(flat(params), x)
    optimizer.train()
    np.testing.assert_allclose(flat(params), y, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", [m for m in ROWS if not m.search], ids=str)
def test_state_moved_by_hand(method):
    """Tools that replace the tensors in ``state`` by copies elsewhere are common."""
    problem, a, left = start(method, torch.float64, 5)
    _, b, right = start(method, torch.float64, 5)
    for t in range(5, 8):
        for kept in right.state.values():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor):
                    kept[name] = value.clone()
        memory = right.param_groups[0].get("memory", {})
        memory.update({name: value.clone() for name, value in memory.items()})
        problem.step(left, t, a)
        problem.step(right, t, b)
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-13)


def test_group_added_later():
    x, y = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = optim.ScheduleFreeAdamSPS([x], max_lr=0.1)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [y]})
        optimizer.zero_grad()
        loss = (x**2).sum() + (y**2).sum()
        loss.backward()
        optimizer.step(loss=loss)
    assert optimizer.state[y]["step"] == 2
    assert (y < 1).all()
