"""Problems of other kinds than those that the defaults were chosen on, to see what a default is
worth where nobody has looked; what was learned from them since, docs/evidence.md tells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.networks import network, scores, squares, trained
from benchmarks.problems import Case, Shuffled, images_of, logits, solved


def _some(count: int, g: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As many training digits, and the validation ones."""
    (images, labels), validation = images_of("digits")
    picked = torch.randperm(len(images), generator=g)[:count]
    return (images[picked], labels[picked]), validation


def denoising(seed: int) -> Case:
    """Six filters and their weights in a smoothed analysis prior, from twenty noisy images."""
    g = torch.Generator().manual_seed(seed)
    (images, _), _ = images_of("digits")
    clean = F.interpolate(images[:20].view(-1, 1, 8, 8), scale_factor=2, mode="bilinear")
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=g)
    x = {"weights": torch.full((6,), -3.0), "filters": 0.3 * torch.randn(6, 1, 3, 3, generator=g)}

    def inner(x: dict[str, Tensor], y: Tensor) -> Tensor:
        response = F.conv2d(y, x["filters"], padding=1)
        lengths = (response.square() + 1e-3).sqrt().sum((0, 2, 3))
        return (y - noisy).square().sum() / 2 + x["weights"].exp() @ lengths

    def outer(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return 100 * (y - clean).square().mean()

    def objective(x: dict[str, Tensor]) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), noisy)))

    return Case(outer, inner, x, noisy.clone(), objective)


def factorization(seed: int) -> Case:
    """A penalty per row and per column of a matrix of rank 3, of which a quarter is known; y starts
    far from any solution, and where a penalty vanishes it needs thousands of steps to one."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randn(60, 3, generator=g), torch.randn(50, 3, generator=g)
    ratings = rows @ columns.T + 0.5 * torch.randn(60, 50, generator=g)
    drawn = torch.rand(60, 50, generator=g)
    known, held = (drawn < 0.25).float(), ((drawn > 0.25) & (drawn < 0.4)).float()
    start = {
        key: 0.3 * torch.randn(n, 5, generator=torch.Generator().manual_seed(same))
        for key, n, same in (("rows", 60, 7), ("columns", 50, 8))  # for all seeds
    }
    x = {"rows": torch.full((60,), -3.0), "columns": torch.full((50,), -3.0)}

    def error(y: dict[str, Tensor], mask: Tensor) -> Tensor:
        return (mask * (y["rows"] @ y["columns"].T - ratings)).square().sum() / mask.sum()

    def inner(x: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        penalties = [(x[key].exp()[:, None] * y[key].square()).mean() for key in y]
        return error(y, known) + torch.stack(penalties).sum()

    def outer(x: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
        return error(y, held)

    def objective(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
        return float(outer(x, trained(lambda y: inner(x, y), y)))

    return Case(outer, inner, x, start, objective, local=True)


def elastic_net(seed: int) -> Case:
    """Two penalties, one with a kink but for rounding it off; more features than examples."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    w = draw(100) * (torch.rand(100, generator=g, dtype=torch.float64) < 0.1)
    A, B = draw(50, 100), draw(50, 100)
    a, b = A @ w + 0.5 * draw(50), B @ w + 0.5 * draw(50)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        lengths = (y.square() + 1e-4).sqrt().sum()
        fit = (A @ y - a).square().mean() / 2
        return fit + x[0].exp() * lengths + x[1].exp() * y.square().sum() / 2

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (B @ y - b).square().mean() / 2

    zeros = torch.zeros(100, dtype=torch.float64)

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), zeros)))

    return Case(outer, inner, torch.full((2,), -2.0, dtype=torch.float64), zeros, objective)


def coreset(seed: int) -> Case:
    """Weights of 400 digits that sum to one, and are to be few: their entropy counts."""
    (images, labels), validation = _some(400, torch.Generator().manual_seed(seed))
    start = torch.zeros(65, 10)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(logits(y, images), labels, reduction="none")
        return x.softmax(0) @ losses + 0.005 / 2 * y.square().sum()

    def outer(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        entropy = -(x.softmax(0) @ x.log_softmax(0))
        return F.cross_entropy(logits(y, batch[0]), batch[1]) + 0.02 * entropy

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), start), validation))

    data = {"outer_data": Shuffled(*validation, size=64)}
    return Case(outer, inner, torch.zeros(400), start, objective, data)


def poisoning(seed: int) -> Case:
    """What to add to 30 of 300 digits to harm a classifier most; F is negative, and not convex."""
    g = torch.Generator().manual_seed(seed)
    (images, labels), validation = _some(300, g)
    start = torch.zeros(65, 10)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        spoiled = torch.cat([images[:30] + x, images[30:]])
        return F.cross_entropy(logits(y, spoiled), labels) + 0.01 / 2 * y.square().sum()

    def outer(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.02 / 30 * x.square().sum() - F.cross_entropy(logits(y, batch[0]), batch[1])

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), start), validation))

    data = {"outer_data": Shuffled(*validation, size=128)}
    return Case(outer, inner, 0.01 * torch.randn(30, 64, generator=g), start, objective, data)


def decays(seed: int) -> Case:
    """A decay for each tensor of a network and a smoothing of its labels, a fifth of them wrong."""
    g = torch.Generator().manual_seed(seed)
    (images, labels), validation = _some(200, g)
    images = images + 0.3 * torch.randn(images.shape, generator=g)
    wrong = torch.rand(200, generator=g) < 0.2
    labels = torch.where(wrong, torch.randint(10, (200,), generator=g), labels)

    def inner(x: Any, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        s = x["smoothing"].sigmoid()
        fit = F.cross_entropy(scores(y, batch[0]), F.one_hot(batch[1], 10) * (1 - s) + s / 10)
        return fit + squares({key: (d / 2).exp() * y[key] for key, d in x["decays"].items()})

    def outer(x: Any, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(scores(y, batch[0]), batch[1])

    def objective(x: Any, y: dict[str, Tensor]) -> float:
        return float(outer(x, trained(lambda y: inner(x, y, (images, labels)), y), validation))

    y = network(100)
    x = {"decays": {key: torch.tensor(-7.0) for key in y}, "smoothing": torch.tensor(-3.0)}
    data = {
        "outer_data": Shuffled(*validation, size=100),
        "inner_data": Shuffled(images, labels, size=50),
    }
    return Case(outer, inner, x, y, objective, data, local=True)


def tolls(seed: int) -> Case:
    """Tolls on half of 15 roads, for most revenue from drivers who choose among 40 routes."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=g, dtype=torch.float64)
    routes, demand = (draw(40, 15) < 0.25).double(), 10.0
    free, capacity = 1 + draw(15), 3 + 5 * draw(15)
    own = (draw(15) < 0.5).double()

    def flow(y: Tensor) -> Tensor:
        return demand * (routes.T @ y.softmax(0))

    def inner(x: Tensor, y: Tensor) -> Tensor:
        f = flow(y)
        cost = (free + x * own) @ f + (f.square() / (2 * capacity)).sum()
        spread = y.softmax(0) @ y.log_softmax(0)
        return cost / demand + 0.3 * spread + 1e-4 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return 0.01 * x.square().sum() - (x * own) @ flow(y) / demand

    zeros = torch.zeros(40, dtype=torch.float64)

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), zeros)))

    return Case(outer, inner, torch.zeros(15, dtype=torch.float64), zeros, objective)


UNSEEN: dict[str, Callable[[int], Case]] = {
    "analysis denoising": denoising,
    "matrix factorization": factorization,
    "elastic net": elastic_net,
    "coreset": coreset,
    "poisoning": poisoning,
    "decays of a network": decays,
    "tolls": tolls,
}
