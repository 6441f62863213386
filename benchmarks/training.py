"""Deep networks as y: the default, the same with gradient steps, and loops with a tuned Adam.

A deep network that is trained on batches for a while is nowhere near a minimum of g, so that there
is no F to compare: what counts is f on all of its data, at the x and y that a run ends with.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel
from benchmarks.problems import Shuffled, images_of
from benchmarks.report import write
from bilevel import ConjugateGradient, Implicit
from tasks.data import load_text

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS = (1e-2, 1e-1, 1.0)
CHANNELS = 8


@dataclass
class Deep:
    """Arguments of ``bilevel.solve``, and the outer loss on all of its data."""

    outer: Callable[..., Tensor]
    inner: Callable[..., Tensor]
    x: Tensor
    y: nn.Module
    data: dict[str, Any]
    whole: tuple[Tensor, ...]

    def end(self, x: Tensor, y: nn.Module) -> float:
        with torch.no_grad():
            return float(self.outer(x, y, self.whole))


def penalty(network: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in network.parameters()]).sum()


class Mixed(nn.Module):
    """Five operations on the same channels, weighted."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=wide, dilation=wide),
                nn.GroupNorm(1, CHANNELS),
            )
            for wide in (1, 2)
        ]
        pools = [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]
        self.operations = nn.ModuleList([nn.Identity(), *convolutions, *pools])

    def forward(self, z: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([w * op(z) for w, op in zip(weights, self.operations, strict=True)]).sum(
            0
        )


class Supernet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.cells = nn.ModuleList(Mixed() for _ in range(3))
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, images: Tensor, x: Tensor) -> Tensor:
        z = self.stem(images.view(-1, 1, 8, 8))
        for cell, weights in zip(self.cells, x.softmax(1), strict=True):
            z = cell(z, weights)
            z = F.max_pool2d(z, 2) if cell is self.cells[0] else z
        return self.head(z.mean((2, 3)))


def supernet(seed: int) -> Deep:
    """The architecture of a network, five operations in each of three places; digits (DARTS)."""
    (images, labels), _ = images_of("digits")
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    parts = [(images[i], labels[i]) for i in (order[:500], order[500:1000])]

    def outer(x: Tensor, y: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(y(batch[0], x), batch[1])

    def inner(x: Tensor, y: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return outer(x, y, batch) + 3e-4 * penalty(y)

    data = {"inner_data": Shuffled(*parts[0], size=64), "outer_data": Shuffled(*parts[1], size=64)}
    return Deep(outer, inner, 1e-3 * torch.randn(3, 5), Supernet(), data, parts[1])


def weights(seed: int) -> Deep:
    """The weights of 1,500 digits of MNIST of which half are labelled at random; a LeNet."""
    (images, labels), (seen, right) = images_of("mnist")
    torch.manual_seed(seed)
    images, labels = images[:1500], labels[:1500].clone()
    wrong = torch.rand(1500) < 0.5
    labels[wrong] = torch.randint(10, (int(wrong.sum()),))
    network = nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5, 2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 5, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)),
    )

    def outer(x: Tensor, y: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(y(batch[0]), batch[1])

    def inner(x: Tensor, y: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses = F.cross_entropy(y(batch[0]), batch[1], reduction="none")
        return (x[batch[2]].sigmoid() * losses).mean() + 1e-4 * penalty(y)

    validation = seen[:500], right[:500]
    data = {
        "inner_data": Shuffled(images, labels, torch.arange(1500), size=64),
        "outer_data": Shuffled(*validation, size=128),
    }
    return Deep(outer, inner, torch.zeros(1500), network, data, validation)


class Recurrent(nn.Module):
    """Scores of the next character, for each of those before it."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 16)
        self.recurrence = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.recurrence(self.embedding(text))[0])


def domains(seed: int, length: int = 24) -> Deep:
    """Weights of four sources of text: as it is, backwards, out of order, random; a GRU."""
    text = load_text()
    characters = len(text.vocabulary)
    lines = text.train[: 6600 * length].view(-1, length)
    torch.manual_seed(seed)
    lines = lines[torch.randperm(len(lines))]
    sources = [
        lines[:800],
        lines[800:1600].flip(1),
        lines[1600:2400][:, torch.randperm(length)],
        torch.randint(characters, (800, length)),
    ]

    def losses(y: nn.Module, text: Tensor) -> Tensor:
        scores = y(text[:, :-1]).transpose(1, 2)
        return F.cross_entropy(scores, text[:, 1:], reduction="none").mean(1)

    def outer(x: Tensor, y: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return losses(y, batch[0]).mean()

    def inner(x: Tensor, y: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mixture = 4 * x.softmax(0)[batch[1]]
        return (mixture * losses(y, batch[0])).mean() + 1e-5 * penalty(y)

    validation = lines[2400:3200]
    data = {
        "inner_data": Shuffled(torch.cat(sources), torch.arange(4).repeat_interleave(800), size=64),
        "outer_data": Shuffled(validation, size=64),
    }
    return Deep(outer, inner, torch.zeros(4), Recurrent(characters), data, (validation,))


PROBLEMS: dict[str, Callable[[int], Deep]] = {
    "supernet": supernet,
    "weights of examples": weights,
    "domains of text": domains,
}


def methods() -> Iterator[tuple[str, bilevel.Method]]:
    yield "bisls-adam", bilevel.bisls()
    yield "gradient steps", replace(bilevel.bisls(), training=None)
    few = Implicit(ConjugateGradient(steps=10))
    for rate in RATES:
        solver = partial(torch.optim.Adam, lr=rate)
        for step in STEPS:
            yield (
                f"adam {step:g}, y {rate:g}",
                bilevel.fixed("adam", step, hypergradient=few, inner_solver=solver),
            )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for problem in options.problems:
        for name, method in methods():
            for seed in range(options.seeds):
                rows.append({"problem": problem, "method": name, "seed": seed})
                rows[-1].update(run(PROBLEMS[problem](seed), method, options.steps, seed))
                print(rows[-1], flush=True)
    write("training", rows)


def run(deep: Deep, method: bilevel.Method, steps: int, seed: int) -> dict[str, float]:
    """f at the end, and what it has cost."""
    begun = time.perf_counter()
    result = bilevel.solve(
        *(deep.outer, deep.inner, deep.x, deep.y),
        **{"method": method, "steps": steps, "seed": seed, "progress": False},
        **deep.data,
    )
    last = result.history[-1]
    return {
        "f": deep.end(result.x, result.y),
        "gradients": last.gradients,
        "products": last.hessian_products,
        "seconds": time.perf_counter() - begun,
    }
