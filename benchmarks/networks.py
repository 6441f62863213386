"""Bilevel problems whose y are the parameters of a network, so that g is not convex: F(x) is f at
the minimum of g that is nearest to a given y."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Case, Shuffled, images_of


def trained(inner: Callable[[Any], Tensor], start: dict[str, Tensor], steps: int = 600) -> Any:
    """The argmin nearby of a loss that is not convex: a long run of Adam, its step falling to
    zero."""
    y = {key: value.clone().requires_grad_() for key, value in start.items()}
    optimizer = torch.optim.Adam(y.values(), lr=1e-2)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        inner(y).backward()
        optimizer.step()
        falling.step()
    return {key: value.detach() for key, value in y.items()}


def network(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "W1": torch.randn(64, 32, generator=g) / 8,
        "b1": torch.zeros(32),
        "W2": torch.randn(32, 10, generator=g) / 32**0.5,
        "b2": torch.zeros(10),
    }


def scores(y: dict[str, Tensor], images: Tensor) -> Tensor:
    return F.relu(images @ y["W1"] + y["b1"]) @ y["W2"] + y["b2"]


def squares(y: dict[str, Tensor]) -> Tensor:
    return torch.stack([(part * part).sum() for part in y.values()]).sum()


def network_distillation(seed: int, size: int = 256, decay: float = 1e-3) -> Case:
    """Twenty learned images with learned soft labels; a network with a hidden layer trained on
    them."""
    train, _ = images_of("digits")
    start = network(100)
    x = {
        "images": torch.rand(20, 64, generator=torch.Generator().manual_seed(seed)),
        "labels": 3 * F.one_hot(torch.arange(20) % 10, 10).float(),
    }

    def inner(x: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        loss = F.cross_entropy(scores(y, x["images"]), x["labels"].softmax(1))
        return loss + decay / 2 * squares(y)

    def outer(x: Any, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(scores(y, batch[0]), batch[1])

    def objective(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
        return float(outer(x, trained(lambda y: inner(x, y), y), train))

    data = {"outer_data": Shuffled(*train, size=size)}
    return Case(outer, inner, x, start, objective, data, local=True)


def domains(seed: int, size: int = 100, decay: float = 2e-3) -> Case:
    """Weights of eight sources of training images, of which one is clean and one only noisy, the
    others rotated, inverted, or with wrong labels; a network trained on all of them."""
    train, validation = images_of("digits")
    g = torch.Generator().manual_seed(seed)
    images, labels, sources = [], [], torch.arange(8).repeat_interleave(100)
    for source in range(8):
        index = torch.randperm(len(train[0]), generator=g)[:100]
        z, t = train[0][index].view(-1, 8, 8), train[1][index]
        if source < 3:
            z = torch.rot90(z, source + 1, (1, 2))
        elif source == 3:
            z = 1 - z
        elif source == 4:
            t = torch.randint(10, (100,), generator=g)
        elif source == 5:
            z = z + 0.5 * torch.randn(z.shape, generator=g)
        elif source == 6:
            t = (t + 1) % 10
        images.append(z.flatten(1))
        labels.append(t)
    everything = torch.cat(images), torch.cat(labels), sources
    few = validation[0][:150], validation[1][:150]
    start = network(100)

    def inner(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses = F.cross_entropy(scores(y, batch[0]), batch[1], reduction="none")
        return (8 * x.softmax(0)[batch[2]] * losses).mean() + decay / 2 * squares(y)

    def outer(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(scores(y, batch[0]), batch[1])

    def objective(x: Tensor, y: dict[str, Tensor]) -> float:
        return float(outer(x, trained(lambda y: inner(x, y, everything), y), few))

    data = {"outer_data": [few], "inner_data": Shuffled(*everything, size=size)}
    return Case(outer, inner, torch.zeros(8), start, objective, data, local=True)


def initialization(seed: int, tasks: int = 4, decay: float = 0.5) -> Case:
    """A start for sinusoids of ten points each, from which a penalised displacement adapts a
    network to each; new ones in every iteration, y starting afresh."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (1, 20), "b": (20,), "c": (20, 20), "d": (20,), "e": (20, 1), "f": (1,)}
    scale = {"a": 1.0, "b": 0.0, "c": 20**-0.5, "d": 0.0, "e": 20**-0.5, "f": 0.0}
    x = {key: scale[key] * torch.randn(shape, generator=g) for key, shape in shapes.items()}

    def predicted(x: dict[str, Tensor], y: dict[str, Tensor], t: Tensor) -> Tensor:
        P = {key: x[key] + y[key] for key in x}
        h = torch.tanh(t @ P["a"] + P["b"][:, None])
        h = torch.tanh(h @ P["c"] + P["d"][:, None])
        return h @ P["e"] + P["f"][:, None]

    def errors(x: Any, y: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((predicted(x, y, batch[0]) - batch[1]) ** 2).mean((1, 2))

    def inner(x: Any, y: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return errors(x, y, batch).sum() + decay / 2 * squares(y)

    def outer(x: Any, y: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return errors(x, y, batch).mean()

    def still(count: int) -> dict[str, Tensor]:
        return {key: torch.zeros(count, *shape) for key, shape in shapes.items()}

    def objective(x: Any) -> float:
        query, support = _sinusoids(100, torch.Generator().manual_seed(9))
        return float(outer(x, trained(lambda y: inner(x, y, support), still(100)), query))

    data = {"data": _Sinusoids(tasks), "warm_start": False}
    return Case(outer, inner, x, still(tasks), objective, data)


def _sinusoids(count: int, g: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Query and support points of as many sinusoids."""
    height = 0.5 + 1.5 * torch.rand(count, 1, 1, generator=g)
    phase = torch.pi * torch.rand(count, 1, 1, generator=g)
    points = [6 * torch.rand(count, 10, 1, generator=g) - 3 for _ in range(2)]
    return [(t, height * torch.sin(t + phase)) for t in points]


class _Sinusoids:
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        g = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        for _ in range(1000):
            yield _sinusoids(self.count, g)


def edges(seed: int, size: int = 60, decay: float = 5e-3) -> Case:
    """Which edges a graph has, for a network on it that is trained on a third of the nodes, all at
    once, so that g has kinks."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (size,), generator=g)
    likely = torch.where(labels[:, None] == labels, 0.15, 0.08)
    pairs = torch.triu_indices(size, size, 1).unbind()
    there = (torch.rand(size, size, generator=g) < likely)[pairs]
    told = F.one_hot(labels, 3) + 1.5 * torch.randn(size, 3, generator=g)
    features = torch.cat([told, torch.randn(size, 5, generator=g)], 1)
    train, validation = torch.arange(0, 20), torch.arange(20, 40)

    def scores(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        one_way = torch.zeros(size, size).index_put(pairs, x.sigmoid())
        adjacency = one_way + one_way.T + torch.eye(size)
        root = adjacency.sum(1).rsqrt()
        adjacency = root[:, None] * adjacency * root
        return adjacency @ F.relu(adjacency @ features @ y["W1"]) @ y["W2"]

    def inner(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores(x, y)[train], labels[train]) + decay * squares(y)

    def outer(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores(x, y)[validation], labels[validation])

    def objective(x: Tensor, y: dict[str, Tensor]) -> float:
        return float(outer(x, trained(lambda y: inner(x, y), y)))

    y = {
        "W1": 0.3 * torch.randn(8, 16, generator=g),
        "W2": 0.3 * torch.randn(16, 3, generator=g),
    }
    return Case(outer, inner, torch.where(there, 2.0, -4.0), y, objective, local=True)


def example_weights(
    seed: int, size: int | None = None, wrong: int = 48, decay: float = 1e-3
) -> Case:
    """A weight for each of 120 examples, many of a wrong label; a network trained on all of them
    at once, so that g has kinks, or on batches of a size."""
    g = torch.Generator().manual_seed(seed)
    rows, few = torch.randn(120, 6, generator=g), torch.randn(300, 6, generator=g)
    labels, true = ((z[:, 0] * z[:, 1] > 0).long() for z in (rows, few))
    labels[:wrong] = 1 - labels[:wrong]
    everything = rows, labels, torch.arange(120)

    def inner(x: Tensor, y: dict[str, Tensor], batch: Any = everything) -> Tensor:
        losses = F.cross_entropy(scores(y, batch[0]), batch[1], reduction="none")
        return (x[batch[2]].sigmoid() * losses).mean() + decay * squares(y)

    def outer(x: Any, y: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores(y, few), true)

    def objective(x: Tensor, y: dict[str, Tensor]) -> float:
        return float(outer(x, trained(lambda y: inner(x, y), y)))

    y = {
        "W1": torch.randn(6, 16, generator=g) / 3**0.5,
        "b1": torch.zeros(16),
        "W2": torch.randn(16, 2, generator=g) / 8**0.5,
        "b2": torch.zeros(2),
    }
    data = {"inner_data": Shuffled(*everything, size=size)} if size else {}
    return Case(outer, inner, torch.zeros(120), y, objective, data, local=True)


def absolute_errors_of_network(seed: int, size: int | None = None) -> Case:
    """A weight for each of sixty absolute errors of a network, of which fifteen are gross."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    A, B, w = draw(60, 5), draw(200, 5), draw(5)
    a, b = (A @ w).sin() + 0.1 * draw(60), (B @ w).sin()
    a[:15] += 4 * draw(15)
    y = {"W1": draw(5, 16) / 5**0.5, "b1": torch.zeros(16), "W2": draw(16, 1) / 4}
    y["b2"] = torch.zeros(1)
    every = torch.arange(60)

    def inner(x: Tensor, y: dict[str, Tensor], i: Tensor = every) -> Tensor:
        errors = (scores(y, A[i])[:, 0] - a[i]).abs()
        return (x[i].sigmoid() * errors).mean() + 1e-3 * squares(y)

    def outer(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return (scores(y, B)[:, 0] - b).square().mean()

    def objective(x: Tensor, y: dict[str, Tensor]) -> float:
        return float(outer(x, trained(lambda y: inner(x, y), y, 1500)))

    data = {} if size is None else {"inner_data": list(every.view(-1, size))}
    return Case(outer, inner, torch.zeros(60), y, objective, data, local=True)


NETWORKS: dict[str, Callable[[int], Case]] = {
    "distillation into a network": network_distillation,
    "domain weights of a network": domains,
    "initialization of a network": initialization,
    "edges of a graph": edges,
    "weights of examples": example_weights,
    "weights of examples, batch 30": partial(example_weights, size=30),
    "absolute errors of a network": absolute_errors_of_network,
    "absolute errors of a network, batches": partial(absolute_errors_of_network, size=20),
}
