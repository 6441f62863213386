"""How the time of an iteration grows: parameters, inner steps, terms, batch, and its number.

Two things should be seen: time in proportion to the work once the work exceeds the dispatch, and
the same time for the ten-thousandth iteration as for the hundredth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import bilevel
from benchmarks import small
from benchmarks.report import write

STEP = 1e-2


def quadratic(size: int) -> tuple[Any, Any, Tensor, Tensor]:
    """Elementwise: the cheapest losses of their size, so that the engine's own share is seen."""

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return ((y - x) ** 2 + 0.5 * y * y).sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return ((y - 1) ** 2).sum()

    return outer, inner, torch.zeros(size), torch.zeros(size)


def per_iteration(repeats: int, *problem: Any, **options: Any) -> list[float]:
    """Milliseconds of each iteration after the first."""
    records = bilevel.solve(*problem, steps=repeats + 1, **options).history
    marks = [record.seconds for record in records]
    return [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]


def row(what: str, at: float, work: float, times: list[float]) -> dict[str, Any]:
    middle = statistics.median(times)
    cells = {"what": what, "at": at, "ms": middle, "min": min(times), "max": max(times)}
    return cells | {"us per unit of work": 1e3 * middle / work}


def method(terms: int) -> Any:
    solver = bilevel.Neumann(terms=terms, step=0.1)
    return bilevel.fixed("sgd", STEP, STEP, bilevel.Implicit(solver))


def logistic(batch: int, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pieces = small.batches(1, max(1, batch // 64))
    whole = (torch.cat([f for f, _ in pieces]), torch.cat([t for _, t in pieces]))
    start = torch.zeros(22)
    data = {"outer_data": [whole], "inner_data": [whole]}
    return (small.outer, small.inner, start, start), data | options


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks growth")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120, help="for the sizes, about")
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--largest", type=int, default=8, help="10 to this many parameters")
    parser.add_argument("--out", default="docs/measured")
    options = parser.parse_args(argv)
    n, rows = options.repeats, []
    began = time.perf_counter()
    for exponent in range(2, options.largest + 1):
        size = 10**exponent
        times = per_iteration(n, *quadratic(size), method=method(3), inner_steps=1)
        rows.append(row("parameters", size, size, times))
        left = options.seconds - (time.perf_counter() - began)
        if 10 * 1e-3 * sum(times) > left:
            break
    for count in (1, 10, 100):
        times = per_iteration(n, *quadratic(1000), method=method(3), inner_steps=count)
        rows.append(row("inner steps", count, count, times))
    for count in (1, 10, 100):
        times = per_iteration(n, *quadratic(1000), method=method(count), inner_steps=1)
        rows.append(row("terms of the series", count, count, times))
    for count in (64, 6_400, 640_000):
        problem, data = logistic(count)
        times = per_iteration(n, *problem, method=method(3), inner_steps=1, **data)
        rows.append(row("batch", count, count, times))
    for compile in (False, True):
        problem, data = logistic(64)
        times = per_iteration(
            options.iterations, *problem, method=method(3), inner_steps=1, compile=compile, **data
        )
        tenth = max(1, len(times) // 10)
        for name, part in (("second", times[tenth : 2 * tenth]), ("last", times[-tenth:])):
            what = f"{name} tenth of the iterations, compile={compile}"
            rows.append(row(what, len(times), 1, part))
    write("growth", rows, options.out)
