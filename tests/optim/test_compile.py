"""torch.compile, captured CUDA graphs, and the kernels of accelerators."""

import shutil

import numpy as np
import pytest
import torch

import optim
from optim import blocks
from optim.vectors import Lists
from tests.optim.tables import POLYAK, RandomSteps, flat

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU",
)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "make, options, backend",
    [
        (optim.SPS, {}, "aot_eager"),
        pytest.param(
            *(optim.ScheduleFreeAdamSPS, {"max_lr": 0.1, "safeguard": "ema"}, "inductor"),
            marks=compiler,
        ),
    ],
)
def test_compiled_step(make, options, backend):
    problem = RandomSteps(4)
    problem.shapes = ((3,), (2, 2), (1,))  # torch.compile itself loses writes to 0-dim float64
    a, b = problem.params(), problem.params()
    eager, compiled = make(a, **options), make(b, **options)

    def step(loss, target):
        compiled.step(loss=loss, target=target)

    torch._dynamo.reset()
    fast = torch.compile(step, backend=backend)
    for t in range(4):
        problem.step(eager, t, a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        fast(torch.tensor(problem.losses[t]), torch.tensor(problem.targets[t]))
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-9)
        assert compiled.last[:3] == pytest.approx(eager.last[:3])


def test_compiled_after_an_eager_step():
    """The layout of the eager step is not that of the compiler."""
    problem = RandomSteps(4)
    problem.shapes = ((3,), (2, 2), (1,))  # as above
    a, b = problem.params(), problem.params()
    eager, compiled = (optim.ScheduleFreeAdamSPS(p, max_lr=0.1) for p in (a, b))
    torch._dynamo.reset()
    fast = torch.compile(lambda loss: compiled.step(loss=loss, target=0.0), backend="aot_eager")
    for t in range(4):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.full_like(p, 0.1 + t)
            q.grad = p.grad.clone()
        loss = torch.tensor(1.0 + t)
        eager.step(loss=loss, target=0.0)
        if t == 1:
            fast(loss)
        else:
            compiled.step(loss=loss, target=0.0)
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-9)


@pytest.mark.parametrize("method", POLYAK, ids=str)
def test_list_kernels(method, monkeypatch):
    """What runs on an accelerator, run on the CPU."""
    problem = RandomSteps(20)
    a, b = problem.params(), problem.params()
    plain, lists = method(a, foreach=False), method(b)
    monkeypatch.setattr(blocks, "kernels", lambda device: Lists)
    visited = []
    for t in range(20):
        visited.append(flat(b))
        problem.step(plain, t, a)
        problem.step(lists, t, b)
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-11)
    if hasattr(lists, "best"):
        lowest = np.argmin(problem.losses - problem.targets)
        np.testing.assert_array_equal(flat(lists.best()), visited[lowest])
    x = flat(b)
    b[0].grad[0] = torch.nan
    lists.step(loss=1.0, target=0.0)
    np.testing.assert_array_equal(flat(b), x)


@cuda
@pytest.mark.parametrize("method", POLYAK, ids=str)
def test_cuda_graph(method):
    problem = RandomSteps(10)
    a = problem.params()
    b = [torch.nn.Parameter(p.detach().cuda()) for p in a]
    eager, captured = method(a), method(b)
    loss, target = (torch.zeros((), dtype=torch.float64, device="cuda") for _ in range(2))
    for p in b:
        p.grad = torch.zeros_like(p)

    def feed(t):
        for p, q in zip(a, b, strict=True):
            q.grad.copy_(p.grad)
        loss.fill_(problem.losses[t])
        target.fill_(problem.targets[t])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in range(3):
            problem.step(eager, t, a)
            feed(t)
            captured.step(loss=loss, target=target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(loss=loss, target=target)
    for t in range(3, 10):
        problem.step(eager, t, a)
        feed(t)
        graph.replay()
        host = [p.cpu() for p in b]
        np.testing.assert_allclose(flat(a), flat(host), rtol=1e-5, atol=1e-7)


@cuda
@pytest.mark.parametrize("method", POLYAK, ids=str)
def test_cuda_does_not_synchronise(method):
    problem = RandomSteps(5)
    params = [torch.nn.Parameter(p.detach().cuda()) for p in problem.params()]
    optimizer = method(params)
    loss = torch.tensor(2.0, device="cuda")
    for t in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        torch.cuda.set_sync_debug_mode("error" if t else "default")
        try:
            optimizer.step(loss=loss, target=0.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
