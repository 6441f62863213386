"""What a Hessian product and a whole hypergradient cost, in gradients of the inner loss."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bilevel
from benchmarks.report import seconds, write
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle, Problem


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.Tanh(),
        nn.Linear(256, 256),
        nn.Tanh(),
        nn.Linear(256, 10),
    )


def convnet() -> nn.Module:
    def block(channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GroupNorm(32, 32),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]

    return nn.Sequential(*block(1), *block(32), *block(32), nn.Flatten(), nn.Linear(32 * 9, 10))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--products", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = []
    for name, model in (("mlp 784-256-256-10", mlp()), ("convnet 3x32", convnet())):
        rows.append({"model": name, **measure(model.to(options.device), options)})
    write(f"products-{options.device}", rows)


def flops(call: Callable[[], object]) -> int:
    """Of the matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Weights of the examples are x, the model is y: hyper-cleaning at the size of a batch."""
    n, K = options.batch, options.products
    images = torch.rand(n, 1, 28, 28, device=options.device)
    labels = torch.arange(n, device=options.device) % 10
    x = torch.zeros(n, device=options.device)

    def inner(x: torch.Tensor, y: nn.Module) -> torch.Tensor:
        losses = F.cross_entropy(y(images), labels, reduction="none")
        decay = sum((p * p).sum() for p in y.parameters())
        return (x.sigmoid() * losses).mean() + 1e-3 * decay

    def outer(x: torch.Tensor, y: nn.Module) -> torch.Tensor:
        return F.cross_entropy(y(images), labels)

    layouts = Layout(x, "x"), Layout(model, "y")
    oracle = Oracle(Problem(outer, inner), *layouts)
    X, Y = layouts[0].flatten(x), layouts[1].flatten(model)
    draw = Draw()
    pull = oracle.record(X, Y, draw)
    u = torch.randn_like(Y)
    method = bilevel.Implicit(bilevel.Neumann(terms=K, step=1e-3))

    def estimate() -> None:
        method.estimate(oracle, X, Y, Draw(), [draw], [], None)

    # in turn, so that a drift of the machine's speed meets all of them
    times: dict[str, list[float]] = {"gradient": [], "product": [], "whole": []}
    for _ in range(options.repeats):
        times["gradient"] += seconds(lambda: oracle.inner_gradient(X, Y, draw), 1, 1)
        times["product"] += seconds(lambda: pull.product(u), 1, 1)
        times["whole"] += seconds(estimate, 1, 0)
    middle = {key: statistics.median(value) for key, value in times.items()}
    ratios = sorted(p / g for p, g in zip(times["product"], times["gradient"], strict=True))
    return {
        "gradient ms": 1e3 * middle["gradient"],
        "product / gradient": middle["product"] / middle["gradient"],
        "min": ratios[0],
        "max": ratios[-1],
        "its arithmetic": flops(lambda: pull.product(u))
        / flops(lambda: oracle.inner_gradient(X, Y, draw)),
        f"{K}-product hypergradient / {K + 3} gradients": middle["whole"]
        / ((K + 3) * middle["gradient"]),
    }
