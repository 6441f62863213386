"""Each rule against its independent re-computation, and the fast kernels against the plain ones."""

import numpy as np
import pytest
import torch

from tests.optim.tables import METHODS, ONCE, POLYAK, LeastSquares, RandomSteps, flat

STEPS = 100


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_equals_numpy(method, foreach):
    problem = LeastSquares() if method.search else RandomSteps(STEPS)
    params = problem.params()
    optimizer = method([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[0]["foreach"] = foreach
    for t, (x, step) in enumerate(method.numpy(problem.batch, problem.start, STEPS)):
        problem.step(optimizer, t, params)
        np.testing.assert_allclose(flat(params), x, rtol=1e-12, atol=1e-12)
        assert optimizer.last.step == pytest.approx(step, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("method", [m for m in METHODS if m.average], ids=str)
def test_average_equals_numpy(method):
    """The point of eval mode, visited after every seventh step."""
    problem = RandomSteps(STEPS)
    params = problem.params()
    optimizer = method(params)
    options = {"evaluate": True} if "sf" in method.name else {}
    for t, (x, _) in enumerate(method.numpy(problem.batch, problem.start, STEPS, **options)):
        problem.step(optimizer, t, params)
        if t % 7 == 6:
            optimizer.eval()
            np.testing.assert_allclose(flat(params), x, rtol=1e-12, atol=1e-12)
            optimizer.train()


SHAPES = [(200_003,), (130, 130), (17,), (), (3, 4, 5), (1 << 14,), (0,), (5000, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", POLYAK, ids=str)
def test_fast_equals_plain(method, dtype):
    """Pieces, packs, odd strides and missing gradients, through one step after another."""
    torch.manual_seed(0)
    if dtype == torch.bfloat16 and method not in ONCE:
        pytest.skip("one row of a class shows its bfloat16 path")
    start = [torch.randn(s).to(dtype) for s in SHAPES]
    start[1] = start[1].t()
    results = []
    for foreach in (True, False):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = method(params, foreach=foreach)
        for t in range(5):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape).to(dtype)
                if i == 1 and t % 2:
                    p.grad = p.grad.t().contiguous().t()
                if i in (2, 5) and t in (1, 3):
                    p.grad = None
            optimizer.step(loss=3e4 + 1e4 * t, target=-1.0)
        results.append(flat([p.double() for p in params]))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    np.testing.assert_allclose(*results, rtol=tolerance, atol=tolerance)
    moved = np.abs(results[0] - flat([p.double() for p in start])).max()
    assert moved > 1e-4
