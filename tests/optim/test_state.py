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
    before = copy.deepcopy(saved["state"])
    for t in range(3):
        problem.step(fresh, t, other)
    for key, kept in before.items():
        for name, value in kept.items():
            assert torch.equal(value, saved["state"][key][name])


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
