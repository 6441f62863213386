"""Bilevel problems with a metric that needs no trust: F(x) = f(x, y*(x)) on all outer data, the
inner problem solved anew by L-BFGS or in closed form."""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bilevel
from tasks.data import load
from tasks.data.tables import load_table
from tasks.quadratic import Quadratic
from tasks.regularization import Regularization

STEPS, INNER = 100, 10  # of a run


@dataclass
class Case:
    """Arguments of ``bilevel.solve``, and the true objective at an x: f where the inner problem is
    solved; from which y on, says where it has several solutions."""

    outer: Callable[..., Tensor]
    inner: Callable[..., Tensor]
    x: Any
    y: Any
    objective: Callable[..., float]  # of x; of x and y where ``local``
    data: dict[str, Any] = field(default_factory=dict)
    local: bool = False

    def value(self, x: Any, y: Any) -> float:
        """The true objective, infinite where there is none."""
        try:
            value = self.objective(x, y) if self.local else self.objective(x)
        except RuntimeError:  # torch's L-BFGS refuses steps beyond float32, which a huge x asks for
            return math.inf
        return value if math.isfinite(value) else math.inf

    def solve(self, method: str | bilevel.Method, **options: Any) -> bilevel.Result:
        """``bilevel.solve`` on it; options: steps, inner_steps, seed, callback."""
        return bilevel.solve(
            self.outer, self.inner, self.x, self.y, method=method, **options, **self.data
        )


def outcome(
    case: Case, method: str | bilevel.Method, steps: int, inner_steps: int, seed: int
) -> dict[str, float]:
    """One run: the true objective at its end and what it has cost."""
    start = time.perf_counter()
    result = case.solve(method, steps=steps, inner_steps=inner_steps, seed=seed)
    seconds = time.perf_counter() - start
    history = result.history
    return {
        "objective": case.value(result.x, result.y),
        "unfinished": float(result.state.k < steps),
        "trials": statistics.mean(r.outer_trials for r in history),
        "failed": statistics.mean(r.failure is not None for r in history),
        "gradients": history[-1].gradients,
        "products": history[-1].hessian_products,
        "seconds": seconds,
    }


class Shuffled:
    """Minibatches of some tensors, in a new order in every pass."""

    def __init__(self, *tensors: Tensor, size: int) -> None:
        self.tensors, self.size = tensors, size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.tensors[0]))
        for start in range(0, len(order) - self.size + 1, self.size):
            picked = order[start : start + self.size]
            yield tuple(t[picked] for t in self.tensors)


def solved(inner: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """argmin of a smooth convex function by L-BFGS."""
    y = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [y],
        max_iter=400,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = inner(y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return y.detach()


@cache
def images_of(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Flat images and labels of the training and validation parts; of MNIST 5,000 and 1,000."""
    data = load(name, sizes=None if name == "digits" else (5000, 1000, 1000))
    train, validation = data.train, data.validation
    return (train[0].flatten(1), train[1]), (validation[0].flatten(1), validation[1])


def logits(y: Tensor, features: Tensor) -> Tensor:
    return features @ y[:-1] + y[-1]


def ridge(seed: int, condition: float = 100.0) -> Case:
    """A penalty per feature; the spectrum of the data has the given condition number."""
    g = torch.Generator().manual_seed(seed)
    n, p = 60, 20
    scale = torch.logspace(
        0, -0.5 * float(torch.log10(torch.tensor(condition))), p, dtype=torch.float64
    )
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    w, A, A2 = draw(p), draw(n, p) * scale, draw(n, p) * scale
    b, b2 = A @ w + 0.5 * draw(n), A2 @ w + 0.5 * draw(n)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return ((A @ y - b) ** 2).mean() / 2 + (x.exp() * y * y).sum() / 2

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return ((A2 @ y - b2) ** 2).mean() / 2

    def objective(x: Tensor) -> float:
        return float(outer(x, torch.linalg.solve(A.T @ A / n + torch.diag(x.exp()), A.T @ b / n)))

    zeros = torch.zeros(p, dtype=torch.float64)
    return Case(outer, inner, zeros, zeros.clone(), objective)


def quadratic(seed: int, condition: float = 10.0, size: int = 64) -> Case:
    """Random coupled quadratics with minibatch noise in the linear terms of both levels."""
    g = torch.Generator().manual_seed(seed)
    n, d = 256, 30
    draw = partial(torch.randn, generator=g, dtype=torch.float64)

    def spectrum(low: float) -> Tensor:
        Q = torch.linalg.qr(draw(d, d)).Q
        return Q @ torch.diag(torch.linspace(low, 1, d, dtype=torch.float64)) @ Q.T

    H, P, C = spectrum(1 / condition), spectrum(0.1), 0.3 * draw(d, d) / d**0.5
    noise_x, noise_y, target = 0.5 * draw(n, d), 0.5 * draw(n, d), draw(d)

    def inner(x: Tensor, y: Tensor, batch: tuple[Tensor]) -> Tensor:
        return y @ H @ y / 2 + x @ C @ y + batch[0].mean(0) @ y

    def outer(x: Tensor, y: Tensor, batch: tuple[Tensor]) -> Tensor:
        r = y - target
        return r @ P @ r / 2 + 0.05 * (x @ x) + batch[0].mean(0) @ x + 3

    def objective(x: Tensor) -> float:
        y = -torch.linalg.solve(H, C.T @ x + noise_y.mean(0))
        return float(outer(x, y, (noise_x,)))

    zeros = torch.zeros(d, dtype=torch.float64)
    data = {"outer_data": Shuffled(noise_x, size=size), "inner_data": Shuffled(noise_y, size=size)}
    return Case(outer, inner, zeros, zeros.clone(), objective, data)


def distillation(
    seed: int, size: int = 256, images: int = 10, decay: float = 1e-3, name: str = "digits"
) -> Case:
    """Learned images; a ridge-regularised logistic regression trained on them."""
    train, _ = images_of(name)
    pixels = train[0].shape[1]
    labels = torch.arange(images) % 10

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits(y, x), labels) + decay / 2 * (y * y).sum()

    def outer(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(y, batch[0]), batch[1])

    def objective(x: Tensor) -> float:
        y = solved(lambda y: inner(x, y), torch.zeros(pixels + 1, 10))
        return float(outer(x, y, train))

    start = torch.rand(images, pixels, generator=torch.Generator().manual_seed(seed))
    return Case(
        outer,
        inner,
        start,
        torch.zeros(pixels + 1, 10),
        objective,
        {"outer_data": Shuffled(*train, size=size)},
    )


def representation(seed: int, size: int = 128, decay: float = 1e-3, name: str = "digits") -> Case:
    """Features of a small network, a linear head on top of them, minibatches at both levels."""
    train, validation = images_of(name)
    g = torch.Generator().manual_seed(seed)
    pixels = train[0].shape[1]
    x = {
        "W1": torch.randn(pixels, 32, generator=g) / pixels**0.5,
        "b1": torch.zeros(32),
        "W2": torch.randn(32, 16, generator=g) / 32**0.5,
        "b2": torch.zeros(16),
    }

    def features(x: dict[str, Tensor], images: Tensor) -> Tensor:
        return F.relu(F.relu(images @ x["W1"] + x["b1"]) @ x["W2"] + x["b2"])

    def outer(x: dict[str, Tensor], y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(y, features(x, batch[0])), batch[1])

    def inner(x: dict[str, Tensor], y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return outer(x, y, batch) + decay / 2 * (y * y).sum()

    def objective(x: dict[str, Tensor]) -> float:
        y = solved(lambda y: inner(x, y, train), torch.zeros(17, 10))
        return float(outer(x, y, validation))

    data = {
        "outer_data": Shuffled(*validation, size=size),
        "inner_data": Shuffled(*train, size=size),
    }
    return Case(outer, inner, x, torch.zeros(17, 10), objective, data)


def cleaning(
    seed: int, size: int = 100, corrupted: float = 0.5, decay: float = 0.02, name: str = "digits"
) -> Case:
    """A weight per training example, of which some have a label drawn at random."""
    train, validation = images_of(name)
    g = torch.Generator().manual_seed(seed)
    n = len(train[0])
    wrong = torch.rand(n, generator=g) < corrupted
    labels = torch.where(wrong, torch.randint(10, (n,), generator=g), train[1])
    index = torch.arange(n)
    start = torch.zeros(train[0].shape[1] + 1, 10)

    def inner(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses = F.cross_entropy(logits(y, batch[0]), batch[1], reduction="none")
        return (x[batch[2]].sigmoid() * losses).mean() + decay / 2 * (y * y).sum()

    def outer(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(y, batch[0]), batch[1])

    def objective(x: Tensor) -> float:
        y = solved(lambda y: inner(x, y, (train[0], labels, index)), start)
        return float(outer(x, y, validation))

    data = {"outer_data": [validation], "inner_data": Shuffled(train[0], labels, index, size=size)}
    return Case(outer, inner, torch.zeros(n), start, objective, data)


def regularization(seed: int, name: str = "breast-cancer", size: int | None = None) -> Case:
    """A penalty per feature of a logistic regression: the task of this name."""
    options = Namespace(batch=size, seed=seed, inner_steps=10)
    table = load_table(name, seed=seed)
    task = Regularization(table, options)

    def objective(x: Tensor) -> float:
        return task.measure(x, task.y)["validation_loss"]

    data = {"outer_data": task.feed(table.validation), "inner_data": task.feed(table.train)}
    return Case(task.outer, task.inner, task.x, task.y, objective, data)


def exact(seed: int, condition: float) -> Case:
    """Random quadratics without noise: the task of this name."""
    task = Quadratic(
        Namespace(outer_dim=20, inner_dim=40, samples=1000, condition=condition, seed=seed,
                  device="cpu")
    )  # fmt: skip

    def objective(x: Tensor) -> float:
        return float(task.value(x))

    outer = partial(task.outer, rows=task.outer_rows)
    inner = partial(task.inner, rows=task.inner_rows)
    return Case(outer, inner, task.x, task.y, objective)


def kernel_ridge(seed: int) -> Case:
    """Length scales and noise of a kernel regression in dual form, which is ill-conditioned; no
    batches, no noise in the derivatives."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    A, B = draw(80, 4), draw(60, 4)
    a, b = (torch.sin(2 * Z[:, 0]) + 0.5 * Z[:, 1] ** 2 + 0.2 * draw(len(Z)) for Z in (A, B))

    def kernel(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        scale = x[:4].neg().exp()
        D = (U * scale)[:, None] - (V * scale)[None]
        return torch.exp(-(D * D).sum(-1) / 2)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (y @ kernel(x, A, A) @ y / 2 + x[4].exp() * (y @ y) / 2 - y @ a) / len(A)

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return ((kernel(x, B, A) @ y - b) ** 2).mean()

    def objective(x: Tensor) -> float:
        eye = torch.eye(len(A), dtype=torch.float64)
        return float(outer(x, torch.linalg.solve(kernel(x, A, A) + x[4].exp() * eye, a)))

    zeros = torch.zeros(5, dtype=torch.float64)
    return Case(outer, inner, zeros, torch.zeros(len(A), dtype=torch.float64), objective)


def diffusion(seed: int, cells: int = 60) -> Case:
    """The coefficient e^x of -(e^x u')' = 10, u = 0 at both ends, from noisy values of u at every
    third node; the inner loss is the energy, of condition 5000 and more."""
    g = torch.Generator().manual_seed(seed)
    h = 1 / cells
    places = torch.linspace(h / 2, 1 - h / 2, cells, dtype=torch.float64)
    phase = torch.rand((), generator=g, dtype=torch.float64)
    truth = torch.sin(4 * places + phase) + (places > 0.5)
    observed = torch.arange(1, cells - 1, 3)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        slopes = torch.diff(F.pad(y, (1, 1))) / h
        return h * (x.exp() @ slopes.square()) / 2 - 10 * h * y.sum()

    def end(x: Tensor) -> Tensor:
        k = x.exp() / h
        A = torch.diag(k[:-1] + k[1:]) - torch.diag(k[1:-1], 1) - torch.diag(k[1:-1], -1)
        return torch.linalg.solve(A, torch.full((cells - 1,), 10 * h, dtype=torch.float64))

    u = end(truth)
    noise = torch.randn(len(observed), generator=g, dtype=torch.float64)
    values = u[observed] + 0.01 * u.max() * noise

    def outer(x: Tensor, y: Tensor) -> Tensor:
        misfit = (y[observed] - values).square().mean() / values.square().mean()
        return misfit + 1e-5 * torch.diff(x).square().sum() / h

    def objective(x: Tensor) -> float:
        return float(outer(x, end(x)))

    zeros = torch.zeros(cells, dtype=torch.float64)
    return Case(outer, inner, zeros, zeros[1:].clone(), objective)


def soft_labels(seed: int, size: int = 8, decay: float = 0.02) -> Case:
    """Labels of 300 examples, of which 40 % start wrong, from very small batches."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(10, 4, generator=g)
    A, B = (torch.randn(n, 10, generator=g) for n in (300, 128))
    a, b = ((Z @ W + 0.5 * torch.randn(len(Z), 4, generator=g)).argmax(1) for Z in (A, B))
    wrong = torch.rand(300, generator=g) < 0.4
    a = torch.where(wrong, torch.randint(4, (300,), generator=g), a)
    index = torch.arange(300)

    def inner(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        labels = x[batch[1]].softmax(1)
        return F.cross_entropy(logits(y, batch[0]), labels) + decay / 2 * (y * y).sum()

    def outer(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(y, batch[0]), batch[1])

    start = torch.zeros(11, 4)

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y, (A, index)), start), (B, b)))

    data = {"outer_data": Shuffled(B, b, size=32), "inner_data": Shuffled(A, index, size=size)}
    return Case(outer, inner, 3 * F.one_hot(a, 4).float(), start, objective, data)


CASES: dict[str, Callable[[int], Case]] = {
    "ridge, condition 1e2": ridge,
    "ridge, condition 1e4": lambda seed: ridge(seed, 1e4),
    "quadratic, noisy": quadratic,
    "distillation, batch 256": distillation,
    "distillation, batch 64": lambda seed: distillation(seed, 64),
    "hyper-representation": representation,
    "data cleaning": cleaning,
    "data cleaning, 90 % wrong": lambda seed: cleaning(seed, corrupted=0.9),
    "distillation, 100 images": lambda seed: distillation(seed, images=100),
    "regularization, breast-cancer": regularization,
    "regularization, ijcnn1-like": lambda seed: regularization(seed, "ijcnn1-like", 256),
    "quadratic, condition 1e2": lambda seed: exact(seed, 1e2),
    "quadratic, condition 1e4": lambda seed: exact(seed, 1e4),
}

# where the default leaves something to be gained
HARD: dict[str, Callable[[int], Case]] = {
    "kernel ridge": kernel_ridge,
    "diffusion coefficient": diffusion,
    "soft labels, batch 8": soft_labels,
}
