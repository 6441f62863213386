"""Random losses, gradients, options and accidents: never a NaN, never a step back.

BILEVEL_FUZZ=N takes about N steps instead of some thousands.
"""

import math
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optim
from tests.optim.tables import POLYAK

LENGTH = 50
EXAMPLES = max(1, int(os.environ.get("BILEVEL_FUZZ", 0)) // LENGTH // len(POLYAK))
EVIL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-38, -1e-38, 1e-300, 1e38, -1e38, 3e38, 1e308]
SHAPES = ((3,), (2, 2))


def number(rng, evil):
    """A number of any size; with probability ``evil`` one at the edge of arithmetic."""
    if rng.random() < evil:
        return rng.choice(EVIL)
    return rng.gauss(0, 1) * 10 ** rng.uniform(-6, 6)


@pytest.mark.parametrize("method", POLYAK, ids=str)
@settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES == 1,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    seed=st.integers(0, 2**31),
    evil=st.sampled_from([0.0, 0.02, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    foreach=st.booleans(),
)
def test_never_nan_never_back(method, seed, evil, dtype, foreach):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    optimizer = method(params, foreach=foreach)
    for _ in range(LENGTH):
        loss, target = number(rng, evil), number(rng, evil)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype) * number(rng, evil)
        event = rng.random()
        if event < 0.05:
            params[rng.randrange(2)].grad = None
        elif event < 0.1 and method.average:
            optimizer.eval()
            assert not any(p.isnan().any() for p in params)
            optimizer.train()
        elif event < 0.15:
            state, optimizer = optimizer.state_dict(), method(params, foreach=foreach)
            optimizer.load_state_dict(state)
        before = [base(optimizer, p) for p in params]
        optimizer.step(loss=loss, target=target)
        check(method, optimizer, params, before, loss, target)


def base(optimizer, p):
    return optimizer.state.get(p, {}).get("z", p).detach().clone()


def check(method, optimizer, params, before, loss, target):
    """Finite parameters; no step where something was not finite; no step uphill."""
    step = optimizer.last.step
    assert 0 <= step < math.inf
    if not optimizer.last.active:
        _, n, d, _ = optimizer.last
        assert step == pytest.approx(optimizer.param_groups[0]["lr"] * n / d)
    used = [loss] if method.make is optim.ClippedSGD else [loss, target]
    finite = all(math.isfinite(v) for v in used) and all(
        p.grad is None or p.grad.isfinite().all() for p in params
    )
    assert finite or step == 0
    uphill = size = 0.0
    for p, z in zip(params, before, strict=True):
        new = base(optimizer, p)
        assert p.isfinite().all() and new.isfinite().all(), optimizer.last
        if step == 0:
            assert torch.equal(new, z)
        elif p.grad is not None:
            uphill += float((p.grad.double() * (new.double() - z.double())).sum())
            size += float((p.grad.double() * z.double()).abs().sum())
    if not optimizer.param_groups[0].get("weight_decay"):
        assert uphill <= 1e-2 * size  # downhill, up to the rounding of the parameters
