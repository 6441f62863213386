"""Deep networks as y: the default, the same with gradient steps, and loops with a tuned Adam.

A deep network that is trained on batches for a while is nowhere near a minimum of g, so that there
is no F to compare: what counts is f on all of its data, at the x and y that a run ends with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel
from benchmarks.networks import squares
from benchmarks.problems import Case, Shuffled, images_of, outcome
from benchmarks.report import write
from bilevel import ConjugateGradient, Implicit
from tasks.data import load_text

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS = (1e-2, 1e-1, 1.0)
CHANNELS = 8


def case(
    outer: Callable[..., Tensor],
    inner: Callable[..., Tensor],
    decay: float,
    point: tuple[Tensor, nn.Module],
    data: dict[str, Any],
    whole: tuple[Tensor, ...],
) -> Case:
    """With a penalty on y, and f on all of its data as what counts."""

    def penalised(x: Tensor, y: nn.Module, batch: Any) -> Tensor:
        return inner(x, y, batch) + decay * squares(dict(y.named_parameters()))

    def objective(x: Tensor, y: nn.Module) -> float:
        with torch.no_grad():
            return float(outer(x, y, whole))

    return Case(outer, penalised, *point, objective, data, local=True)


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
        parts = [w * op(z) for w, op in zip(weights, self.operations, strict=True)]
        return torch.stack(parts).sum(0)


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


def supernet(seed: int) -> Case:
    """The architecture of a network, five operations in each of three places; digits (DARTS)."""
    (images, labels), _ = images_of("digits")
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    parts = [(images[i], labels[i]) for i in (order[:500], order[500:1000])]

    def outer(x: Tensor, y: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(y(batch[0], x), batch[1])

    data = {"inner_data": Shuffled(*parts[0], size=64), "outer_data": Shuffled(*parts[1], size=64)}
    point = 1e-3 * torch.randn(3, 5), Supernet()
    return case(outer, outer, 3e-4, point, data, parts[1])


def weights(seed: int) -> Case:
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
        return (x[batch[2]].sigmoid() * losses).mean()

    validation = seen[:500], right[:500]
    data = {
        "inner_data": Shuffled(images, labels, torch.arange(1500), size=64),
        "outer_data": Shuffled(*validation, size=128),
    }
    return case(outer, inner, 1e-4, (torch.zeros(1500), network), data, validation)


class Recurrent(nn.Module):
    """Scores of the next character, for each of those before it."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 16)
        self.recurrence = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.recurrence(self.embedding(text))[0])


def domains(seed: int, length: int = 24) -> Case:
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
        return (mixture * losses(y, batch[0])).mean()

    validation = lines[2400:3200]
    data = {
        "inner_data": Shuffled(torch.cat(sources), torch.arange(4).repeat_interleave(800), size=64),
        "outer_data": Shuffled(validation, size=64),
    }
    point = torch.zeros(4), Recurrent(characters)
    return case(outer, inner, 1e-5, point, data, (validation,))


PROBLEMS: dict[str, Callable[[int], Case]] = {
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
                found = outcome(PROBLEMS[problem](seed), method, options.steps, 10, seed)
                costs = {key: found[key] for key in ("gradients", "products", "seconds")}
                names = {"problem": problem, "method": name, "seed": seed}
                rows.append({**names, "f": found["objective"], **costs})
                print(rows[-1], flush=True)
    write("training", rows)
