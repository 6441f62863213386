"""Agreement with published packages where they are right; see docs/optim.md for the figures."""

import numpy as np
import pytest
import torch

import optim
from tests.optim.tables import LeastSquares, RandomSteps, flat


def largest(ours, theirs):
    """Largest relative difference of two points."""
    a, b = flat(ours), flat(theirs)
    return float(np.max(np.abs(a - b) / (np.abs(b) + 1e-300)))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("evaluate", [False, True])
def test_schedulefree_adamw(decay, evaluate):
    """At a cap that always binds, SF-Adam-SPS is AdamWScheduleFree at that learning rate."""
    schedulefree = pytest.importorskip("schedulefree")
    problem = RandomSteps(50)
    a, b = problem.params(), problem.params()
    lr = 1e-3
    ours = optim.ScheduleFreeAdamSPS(a, max_lr=lr, warmup_steps=10, weight_decay=decay)
    theirs = schedulefree.AdamWScheduleFree(b, lr=lr, warmup_steps=10, weight_decay=decay)
    theirs.train()
    for t in range(50):
        problem.step(ours, t, a, target=-1e6)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        theirs.step()
    if evaluate:
        ours.eval()
        theirs.eval()
    assert largest(a, b) < 1e-12


def test_schedulefree_sgd():
    schedulefree = pytest.importorskip("schedulefree")
    problem = RandomSteps(50)
    a, b = problem.params(), problem.params()
    ours = optim.ScheduleFreeSPS(a, max_lr=1e-3)
    theirs = schedulefree.SGDScheduleFree(b, lr=1e-3, momentum=0.9)
    theirs.train()
    for t in range(50):
        problem.step(ours, t, a, target=-1e6)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        theirs.step()
    assert largest(a, b) < 1e-12


def test_sps_safe():
    sps_safe = pytest.importorskip("sps_safe")
    problem = RandomSteps(50)
    a, b = problem.params(), problem.params()
    ours, theirs = optim.SafeguardedSPS(a, safeguard=4.0), sps_safe.SPS_safe(b, M=4.0)
    for t in range(50):
        problem.step(ours, t, a, target=0.0)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        theirs.step(loss=torch.tensor(problem.losses[t]))
    assert largest(a, b) < 1e-12


def test_ima_sps_safe():
    """Constant averaging without a safeguard; with one, IAM has no counterpart here."""
    sps_safe = pytest.importorskip("sps_safe")
    problem = RandomSteps(50)
    a, b = problem.params(), problem.params()
    ours = optim.IAM(a, averaging=1.0, max_lr=np.inf)
    theirs = sps_safe.IMA_SPS_safe(b, lambd=1.0, M=1e-12)
    for t in range(50):
        problem.step(ours, t, a, target=0.0)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        theirs.step(loss=torch.tensor(problem.losses[t]))
    assert largest(a, b) < 1e-12


def test_momo_without_momentum():
    """Momo with beta = 0 is SPS with a cap."""
    momo = pytest.importorskip("momo")
    problem = LeastSquares()
    a, b = problem.params(), problem.params()
    ours = optim.SPS(a, max_lr=0.3, lower_bound=-3.0)
    theirs = momo.Momo(b, lr=0.3, beta=0.0, lb=-3.0)
    for t in range(50):
        loss = problem.step(ours, t, a, target=None)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        theirs.step(loss=loss)
    assert largest(a, b) < 1e-12


def test_torch_clipping():
    problem = RandomSteps(50)
    a, b = problem.params(), problem.params()
    ours, theirs = optim.ClippedSGD(a, lr=0.1, max_norm=1.5), torch.optim.SGD(b, lr=0.1)
    for t in range(50):
        problem.step(ours, t, a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(b, 1.5)
        theirs.step()
    assert largest(a, b) < 1e-6  # torch divides by the norm plus 1e-6


def test_torch_adam_without_momentum():
    """IAM-Adam that does not average, at a binding cap, is torch's Adam with beta1 = 0."""
    problem = RandomSteps(50)
    a, b = problem.params(), problem.params()
    ours = optim.IAMAdam(a, averaging=0.0, max_lr=1e-3)
    theirs = torch.optim.Adam(b, lr=1e-3, betas=(0.0, 0.999))
    for t in range(50):
        problem.step(ours, t, a, target=-1e6)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        theirs.step()
    assert largest(a, b) < 1e-12
