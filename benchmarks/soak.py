"""A long run: memory, live objects and time per iteration, its first quarter beside its last."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
import tracemalloc
from typing import Any, NamedTuple

import torch

import bilevel
from benchmarks.problems import Shuffled
from benchmarks.report import write


class Sample(NamedTuple):
    """After iteration k: seconds since the last look, bytes in memory and of those that Python
    traces, live objects."""

    k: int
    seconds: float
    resident: int
    traced: int
    objects: int
    tensors: int


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=100, help="iterations between two looks")
    parser.add_argument("--method", default="bisls-adam")
    options = parser.parse_args(argv)
    quarters = split(soak(options.method, options.steps, options.every))
    rows: list[dict[str, Any]] = []
    for i, part in enumerate(quarters, 1):
        pace = [look.seconds / options.every for look in part]
        rows.append(
            {"quarter": i, "ms/iteration": 1e3 * statistics.median(pace),
             "MB at its end": part[-1].resident / 2**20,
             "bytes/iteration": growth(part, "resident"),
             "objects/iteration": growth(part, "objects"), "tensors": part[-1].tensors}
        )  # fmt: skip
    tracemalloc.start()
    traced = soak(options.method, min(options.steps, 400), 50)[2:]  # it slows the run down
    tracemalloc.stop()
    print(f"a record keeps {growth(traced, 'traced'):.0f} bytes")
    write("soak", rows)


def split(samples: list[Sample]) -> list[list[Sample]]:
    size = len(samples) // 4
    return [samples[i * size : (i + 1) * size] for i in range(4)]


def growth(samples: list[Sample], what: str) -> float:
    """Of a quantity, per iteration."""
    first, last = samples[0], samples[-1]
    return (getattr(last, what) - getattr(first, what)) / (last.k - first.k)


def soak(method: Any, steps: int, every: int) -> list[Sample]:
    """A penalty per feature of a noisy ridge regression, kept near its prior, on small batches."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 4, dtype=torch.float64)
    targets = inputs[:, 0] + torch.randn(400, dtype=torch.float64)
    samples: list[Sample] = []
    watch = [time.perf_counter()]

    def loss(x: torch.Tensor, y: torch.Tensor, batch: Any) -> torch.Tensor:
        return (batch[0] @ y - batch[1]).square().mean()

    def outer(x: torch.Tensor, y: torch.Tensor, batch: Any) -> torch.Tensor:
        return loss(x, y, batch) + 0.1 * (x * x).sum()

    def inner(x: torch.Tensor, y: torch.Tensor, batch: Any) -> torch.Tensor:
        return loss(x, y, batch) + (x.exp() * y**2).sum()

    def look(state: bilevel.State, record: bilevel.Record) -> None:
        if (record.k + 1) % every == 0:
            samples.append(sample(record.k + 1, watch))

    result = bilevel.solve(
        outer,
        inner,
        torch.full((4,), -1.0, dtype=torch.float64),
        torch.zeros(4, dtype=torch.float64),
        outer_data=Shuffled(inputs[:200], targets[:200], size=20),
        inner_data=Shuffled(inputs[200:], targets[200:], size=20),
        method=method,
        steps=steps,
        inner_steps=1,
        callback=look,
        progress=False,
        seed=0,
    )
    if len(result.history) < steps:
        raise RuntimeError(f"the run ended before its time: {result.reason}")
    return samples


def sample(k: int, watch: list[float]) -> Sample:
    """``watch``: when the iterations since the last look began; the look itself does not count."""
    seconds = time.perf_counter() - watch[0]
    gc.collect()
    found = gc.get_objects()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in found)
    objects = len(found)
    del found
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    traced = tracemalloc.get_traced_memory()[0]
    watch[0] = time.perf_counter()
    return Sample(k, seconds, resident, traced, objects, tensors)
