"""Problems whose outer loss has kinks: absolute values, hinges, maxima. A search alone stops short
of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Case, Shuffled, solved


def ridge(A: Tensor, a: Tensor, penalties: Tensor) -> Tensor:
    """argmin of mean (A y - a)^2 + sum_i penalties_i y_i^2."""
    A, a = A.double(), a.double()
    H = A.T @ A / len(A) + torch.diag(penalties.double())
    return torch.linalg.solve(H, A.T @ a / len(A)).float()


def largest_error(seed: int) -> Case:
    """f = max |y - b|, y a mixture of x; 0 at the optimum."""
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(12, 12, generator=g) / 12**0.5 + torch.eye(12)
    b = torch.randn(12, generator=g)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (y - M @ x).square().sum() / 2

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (y - b).abs().max()

    return Case(*(outer, inner, torch.zeros(12), torch.zeros(12)), lambda x: float(outer(x, M @ x)))


def absolute_errors(seed: int) -> Case:
    """Sum of |y - b| of a y that saturates in x, with a penalty on x."""
    g = torch.Generator().manual_seed(seed)
    M, b = torch.randn(20, 20, generator=g) / 20**0.5, torch.randn(20, generator=g)
    zeros = torch.zeros(20)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (y - M @ (3 * x.tanh())).square().sum() / 2 + y.pow(4).mean() / 4

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (y - b).abs().sum() + 0.1 * x.square().sum()

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), zeros)))

    return Case(outer, inner, torch.full((20,), 0.01), zeros, objective)


def worst_group(seed: int) -> Case:
    """A weight for each of a hundred examples; f is the error of the worst of five groups."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g)
    A, w = draw(100, 10), draw(10)
    a = A @ w + draw(100)
    groups = []
    for i in range(5):
        B = draw(30, 10) * (0.5 + 0.3 * i)
        groups.append((B, B @ (w + 0.5 * draw(10)) + 0.5 * draw(30)))

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x.sigmoid() * (A @ y - a).square()).mean() + 0.01 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(B @ y - b).square().mean() for B, b in groups]).max()

    def objective(x: Tensor) -> float:
        s = x.sigmoid().sqrt()
        return float(outer(x, ridge(s[:, None] * A, s * a, torch.full((10,), 0.01))))

    return Case(outer, inner, torch.zeros(100), torch.zeros(10), objective)


def sparse_corrections(seed: int) -> Case:
    """What to add to sixty targets, eight of them wrong; |x| in f."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g)
    A, w = draw(60, 10), draw(10)
    a = A @ w + 0.1 * draw(60)
    a[:8] += 5 * draw(8)
    B = draw(60, 10)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (A @ y - a + x).square().mean() + 0.01 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (B @ (y - w)).square().mean() + 0.02 * x.abs().sum()

    def objective(x: Tensor) -> float:
        return float(outer(x, ridge(A, a - x, torch.full((10,), 0.01))))

    return Case(outer, inner, torch.full((60,), 0.01), torch.zeros(10), objective)


def hinge(seed: int) -> Case:
    """A penalty per feature of a logistic regression, judged by its hinge loss."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g)
    w = torch.cat([draw(6), torch.zeros(14)])
    A, B = draw(60, 20), draw(200, 20)
    a, b = torch.sign(A @ w + 0.5 * draw(60)), torch.sign(B @ w + 0.5 * draw(200))
    zeros = torch.zeros(20)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-a * (A @ y)).mean() + (x.exp() * y.square()).mean()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return F.relu(1 - b * (B @ y)).mean()

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), zeros)))

    return Case(outer, inner, torch.full((20,), -1.0), zeros, objective)


def quantile(seed: int) -> Case:
    """A penalty per feature of a ridge regression, judged by the 0.7 quantile loss; batches."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g)
    w = torch.cat([torch.ones(4), torch.zeros(11)])
    A, B = draw(400, 15), draw(800, 15)
    a, b = A @ w + 2 * draw(400), B @ w + draw(800)

    def inner(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        A, a = batch
        return (A @ y - a).square().mean() + (x.exp() * y.square()).sum()

    def outer(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        r = batch[1] - batch[0] @ y
        return torch.maximum(0.7 * r, -0.3 * r).mean()

    def objective(x: Tensor) -> float:
        return float(outer(x, ridge(A, a, x.exp()), (B, b)))

    data = {"outer_data": Shuffled(B, b, size=64), "inner_data": Shuffled(A, a, size=64)}
    return Case(outer, inner, torch.zeros(15), torch.zeros(15), objective, data)


KINKED: dict[str, Callable[[int], Case]] = {
    "largest error": largest_error,
    "absolute errors": absolute_errors,
    "worst group": worst_group,
    "sparse corrections": sparse_corrections,
    "hinge": hinge,
    "quantile": quantile,
}
