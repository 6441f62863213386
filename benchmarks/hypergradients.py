"""One hypergradient of K Hessian products, side by side with other packages.

In turn in one process on the same arrays, in eager mode. The unit is K + 3 gradients of the inner
loss at the same point, timed in the same rounds; the error is that against conjugate gradients in
float64. The weights of the examples are x (data cleaning), a network y; the inner loss is strongly
convex along the directions met, so that every solver solves the same system.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from benchmarks.peers import Example, calls
from benchmarks.products import convnet, mlp
from benchmarks.report import seconds, write
from bilevel.layout import Layout
from bilevel.linear import curvature
from bilevel.problem import Draw, Oracle, Problem

RIDGE = 10.0  # outweighs the negative curvature of the networks at their start
MODELS: dict[str, Callable[[], nn.Module]] = {
    "softmax 784-10": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    "mlp 784-256-256-10": mlp,
    "convnet 3x32": convnet,
}


def example(model: nn.Module, n: int, dtype: torch.dtype, device: str = "cpu") -> Example:
    """Data cleaning on ``n`` random images at the model's start."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, 28, 28, generator=g).to(device, dtype)
    labels = torch.randint(10, (n,), generator=g).to(device)
    model = model.to(device, dtype)
    names = [name for name, _ in model.named_parameters()]
    ys = [p.detach().clone() for p in model.parameters()]

    def losses(ys: list[Tensor]) -> Tensor:
        outputs = functional_call(model, dict(zip(names, ys, strict=True)), (images,))
        return F.cross_entropy(outputs, labels, reduction="none")

    def inner(x: Tensor, ys: list[Tensor]) -> Tensor:
        return (x.sigmoid() * losses(ys)).mean() + RIDGE * sum((y * y).sum() for y in ys)

    def outer(x: Tensor, ys: list[Tensor]) -> Tensor:
        return losses(ys).mean()

    return Example(torch.zeros(n, dtype=dtype, device=device), ys, inner, outer, 0.0)


def flat(given: Example) -> tuple[Oracle, Tensor, Tensor]:
    """The problem on vectors, and its x and y."""
    layouts = Layout(given.x, "x"), Layout(given.ys, "y")
    oracle = Oracle(Problem(given.outer, given.inner), *layouts)
    return oracle, layouts[0].flatten(given.x), layouts[1].flatten(given.ys)


def measure(model: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    K = options.products
    exact = example(model, options.examples, torch.float64, options.device)
    reference, bound = _reference(exact)
    given = example(model, options.examples, torch.float32, options.device)
    given.step = 1 / bound
    oracle, X, Y = flat(given)

    def ours(solver: Any) -> Callable[[], Tensor]:
        method = bilevel.Implicit(solver)
        return lambda: method.estimate(oracle, X, Y, Draw(), [Draw()], [], None).grad

    def error(call: Callable[[], Tensor]) -> float:
        return float((call().detach().double().cpu() - reference).norm() / reference.norm())

    def conjugate(steps: int) -> Callable[[], Tensor]:
        return ours(bilevel.ConjugateGradient(steps=steps, rtol=0.0))

    neumann = ours(bilevel.Neumann(terms=K, step=given.step))
    series = error(neumann)
    close = next((k for k in range(1, K) if error(conjugate(k)) <= series), K)
    contestants: dict[str, Any] = {
        "bilevel ConjugateGradient": conjugate(K),
        "bilevel Neumann": neumann,
        f"bilevel ConjugateGradient, {close} products": conjugate(close),  # as close as the series
        **calls(given, K),
    }
    timed = {name: call for name, call in contestants.items() if callable(call)}
    units: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.repeats):
        units += [(K + 3) * t for t in seconds(lambda: oracle.inner_gradient(X, Y, Draw()), 3, 1)]
        for name, call in timed.items():
            times[name] += seconds(call, 1, 0)
    unit, rows = statistics.median(units), []
    for name, call in contestants.items():
        row = {"method": name, "error": "-", "ms": "-", "min": "-", "max": "-"}
        row[f"/ {K + 3} gradients"] = "-"
        if name in timed:
            t = times[name]
            row["error"] = error(call)
            row["ms"], row["min"], row["max"] = (
                1e3 * value for value in (statistics.median(t), min(t), max(t))
            )
            row[f"/ {K + 3} gradients"] = statistics.median(t) / unit
        row["note"] = "" if name in timed else call
        rows.append(row)
    return rows


def _reference(exact: Example) -> tuple[Tensor, float]:
    """The hypergradient in float64, solved out, and a bound on the eigenvalues of g_yy."""
    oracle, X, Y = flat(exact)
    pull = oracle.record(X, Y, Draw())
    solver = bilevel.ConjugateGradient(steps=200, rtol=1e-12)
    h = bilevel.Implicit(solver).estimate(oracle, X, Y, Draw(), [Draw()], [], None)
    assert h.residual is not None and float(h.residual) < 1e-10
    return h.grad.cpu(), float(curvature(pull.product, pull.gradient))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks hypergradients")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--products", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="docs/measured")
    options = parser.parse_args(argv)
    rows = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        rows += [{"model": name, **row} for row in measure(make(), options)]
        write(f"hypergradients-{options.device}", rows, options.out)  # what is finished is kept
