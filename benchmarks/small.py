"""One outer iteration of a problem bound by dispatch: eager, ``compile=True``, and a JAX scan.

Logistic regression with a penalty per feature in the shape of ijcnn1: 22 features, batches of 64.
A SOBA-like step is one inner step, one step on the linear system and one outer step, their sizes
fixed; whole runs of ``bilevel.solve`` are timed, batches, records and all, after a first run that
compiles. The scan has its batches on the device, and reports the losses alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bilevel
from benchmarks.peers import INSTALL
from benchmarks.report import installed, write

STEPS = {"inner": 0.1, "linear": 0.1, "outer": 0.01}


@dataclass(frozen=True)
class OneStep:
    """v - step (g_yy v - f_y), from the v of the iteration before: the linear system of SOBA."""

    step: float
    warm_start = True

    def __call__(self, product: Callable[..., Tensor], b: Tensor, v: Tensor | None) -> Tensor:
        v = torch.zeros_like(b) if v is None else v
        return v - self.step * (product(v) - b)


SOBA = bilevel.fixed(
    "sgd", STEPS["outer"], STEPS["inner"], bilevel.Implicit(OneStep(STEPS["linear"]))
)


def outer(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    features, labels = batch
    return F.softplus(-labels * (features @ y)).mean()


def inner(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return outer(x, y, batch) + 0.5 * (x.exp() * y * y).sum()


def batches(seed: int, count: int = 64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, 22)
    weights = torch.randn(22, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(count):
        features = torch.randn(64, 22, generator=g) * scale
        found.append((features, (features @ weights + 0.3 * torch.randn(64, generator=g)).sign()))
    return found


def contestants(steps: int) -> dict[tuple[str, str], Callable[[], int] | str]:
    """(step, how) -> a run that says how many iterations it took."""
    data = {"outer_data": batches(1), "inner_data": batches(2)}
    start = torch.zeros(22)

    def run(method: Any, inner_steps: int, compile: bool, count: int) -> Callable[[], int]:
        def call() -> int:
            bilevel.solve(
                *(outer, inner, start, start),
                method=method,
                inner_steps=inner_steps,
                steps=count,
                compile=compile,
                **data,
            )
            return count

        return call

    few = max(2, steps // 20)
    return {
        ("SOBA-like step", "eager"): run(SOBA, 1, False, few),
        ("SOBA-like step", "compile=True"): run(SOBA, 1, True, steps),
        ("SOBA step", "jax scan"): soba_in_jax(steps),
        ("bisls-adam, 10 inner steps", "eager"): run("bisls-adam", 10, False, few),
        ("bisls-adam, 10 inner steps", "compile=True"): run("bisls-adam", 10, True, steps),
    }


def soba_in_jax(steps: int) -> Callable[[], int] | str:
    jax = installed("jax")
    if jax is None:
        return INSTALL
    jnp = jax.numpy

    def f(y: Any, batch: Any) -> Any:
        return jax.nn.softplus(-batch[1] * (batch[0] @ y)).mean()

    def g(x: Any, y: Any, batch: Any) -> Any:
        return f(y, batch) + 0.5 * (jnp.exp(x) * y * y).sum()

    def step(state: Any, drawn: Any) -> Any:
        x, y, v = state
        first, hessian, out = drawn
        y = y - STEPS["inner"] * jax.grad(g, 1)(x, y, first)
        value, fy = jax.value_and_grad(f)(y, out)
        _, pull = jax.vjp(lambda x, y: jax.grad(g, 1)(x, y, hessian), x, y)
        cross, product = pull(v)
        return (x + STEPS["outer"] * cross, y, v - STEPS["linear"] * (product - fy)), value

    def stacked(seed: int) -> Any:
        pairs = batches(seed)
        picked = [pairs[i % len(pairs)] for i in range(steps)]
        return tuple(jnp.array(torch.stack(part).numpy()) for part in zip(*picked, strict=True))

    drawn = (stacked(2), stacked(3), stacked(1))
    scan = jax.jit(lambda state, drawn: jax.lax.scan(step, state, drawn))
    start = (jnp.zeros(22),) * 3

    def call() -> int:
        jax.block_until_ready(scan(start, drawn))
        return steps

    return call


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks small")
    parser.add_argument("--steps", type=int, default=2000, help="of a run; eager: a twentieth")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="docs/measured")
    options = parser.parse_args(argv)
    given = contestants(options.steps)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in given}
    first: dict[tuple[str, str], float] = {}
    for k in range(options.repeats + 1):
        for key, call in given.items():
            if isinstance(call, str):
                continue
            began = time.perf_counter()
            count = call()
            spent = time.perf_counter() - began
            if k == 0:
                first[key] = spent
            else:
                times[key].append(1e6 * spent / count)
    rows = []
    for key, call in given.items():
        t = times[key]
        eager = times.get((key[0], "eager"), t)
        if isinstance(call, str):
            cells: dict[str, Any] = dict.fromkeys(("us", "min", "max", "eager /", "first s"), "-")
        else:
            ratio = statistics.median(e / c for e, c in zip(eager, t, strict=True))
            cells = {"us": statistics.median(t), "min": min(t), "max": max(t)}
            cells |= {"eager /": ratio, "first s": first[key]}
        note = call if isinstance(call, str) else ""
        rows.append({"iteration": key[0], "how": key[1], **cells, "note": note})
    write("small", rows, options.out)
