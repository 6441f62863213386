"""Ten products of the mean of eight batches: one evaluation of all rows, or one for each batch."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.report import write
from bilevel import joined
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle, Problem
from tasks.models import convnet

PRODUCTS = 10
SIZES = {
    "softmax 64-10": (16, 64, 256),
    "MLP 64-32-10": (16, 64, 256),
    "softmax 784-10": (16, 64, 256),
}
SIZES |= {"MLP 784-256-256-10": (16, 64, 256), "ConvNet 3x8": (8, 32, 64), "ConvNet 3x32": (8, 32)}


def network(name: str) -> nn.Module:
    kind, shape = name.split()
    if kind == "ConvNet":
        return convnet((1, 28, 28), 10, width=int(shape.partition("x")[2]))
    sizes = [int(size) for size in shape.split("-")]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def measure(name: str, size: int, batches: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = network(name)
    net = partial(functional_call, module)
    shape = (1, 28, 28) if "ConvNet" in name else (next(module.parameters()).shape[1],)

    def inner(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        decay = sum(v.square().sum() for v in y.values())
        return F.cross_entropy(net(y, (batch[0],)), batch[1]) + x.exp() * decay

    x, y = torch.zeros(()), {key: p.detach() for key, p in module.named_parameters()}
    layouts = Layout(x, "x"), Layout(y, "y")
    point = layouts[0].flatten(x), layouts[1].flatten(y)
    data = [(torch.randn(size, *shape), torch.randint(10, (size,))) for _ in range(batches)]
    oracles = {way: Oracle(Problem(inner, inner), *layouts) for way in ("joined", "each")}
    oracles["each"].problem.habit.joins["inner", batches] = joined.Joins(1)
    u = torch.randn_like(point[1])

    def run(way: str) -> float:
        start = time.perf_counter()
        pull = oracles[way].record(*point, oracles[way].joint([Draw(batch) for batch in data]))
        for _ in range(PRODUCTS):
            pull.product(u)
        return time.perf_counter() - start

    for way in oracles:
        run(way)  # the first one looks whether the losses agree
    rounds = [{way: run(way) for way in oracles} for _ in range(repeats)]  # in turn
    times = {way: [each[way] for each in rounds] for way in oracles}
    ratios = sorted(b / a for a, b in zip(times["joined"], times["each"], strict=True))
    medians = {f"ms {way}": 1e3 * statistics.median(taken) for way, taken in times.items()}
    return {
        **medians,
        "times faster": statistics.median(ratios),
        "min": ratios[0],
        "max": ratios[-1],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    limit = joined.MOST_ENTRIES.copy()
    joined.MOST_ENTRIES.clear()  # to see what it would be like beyond
    rows = [
        {
            "network": name,
            "rows of a batch": size,
            **measure(name, size, options.batches, options.repeats),
        }
        for name, sizes in SIZES.items()
        for size in sizes
    ]
    joined.MOST_ENTRIES.update(limit)
    write("joined", rows)
