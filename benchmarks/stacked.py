"""Ten products of the mean of eight batches: all at once, one by one, or as the default does.

``ms with a look``: of the first of all, which sees whether the losses agree.
"""

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
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle, Problem
from bilevel.stacked import PATIENCE
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
    oracles = {way: Oracle(Problem(inner, inner), *layouts) for way in ("chosen", "all", "each")}
    u = torch.randn_like(point[1])

    def run(way: str) -> float:
        start = time.perf_counter()
        pull = oracles[way].record(*point, oracles[way].joint([Draw(batch) for batch in data]))
        for _ in range(PRODUCTS):
            pull.product(u)
        return time.perf_counter() - start

    for oracle in oracles.values():
        oracle.cost.hessian_products = PATIENCE  # as later in a run
    looked = run("chosen")
    chosen = oracles["chosen"].problem.habit.stacks[batches]
    for way, together in (("all", batches), ("each", 1)):
        oracles[way].problem.habit.stacks[batches] = together
        run(way)
    rounds = [{way: run(way) for way in oracles} for _ in range(repeats)]  # in turn
    row: dict[str, Any] = {"chosen": chosen}
    for way in oracles:
        row[f"ms {way}"] = 1e3 * statistics.median(each[way] for each in rounds)
    ratios = sorted(each["each"] / each["chosen"] for each in rounds)
    row |= {"times faster": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
    return row | {"ms with a look": 1e3 * looked}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [
        {
            "network": name,
            "rows of a batch": size,
            **measure(name, size, options.batches, options.repeats),
        }
        for name, sizes in SIZES.items()
        for size in sizes
    ]
    write("stacked", rows)
