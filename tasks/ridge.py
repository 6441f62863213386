"""Ridge regression whose penalties are learned, in closed form.

    g(x, y) = mean (A y - a)^2 / 2 + sum_i e^{x_i} y_i^2 / 2
    f(x, y) = mean (C y - c)^2 / 2 + prior / 2 mean_i x_i^2

With H = A^T A / n + diag(e^x):  y*(x) = H^{-1} A^T a / n,  F(x) = f(x, y*(x)),  and
dF/dx_i = prior x_i / p - e^{x_i} y*_i q_i  with  H q = f_y(y*).

Without the prior F has its infimum at infinite penalties of the features that carry nothing. F is
not convex; its least value F* is sought by L-BFGS on the closed form, from several starts.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import Tensor

from . import exact
from .__main__ import penalty, positive
from .data.batches import generator
from .exact import Rows, spectral
from .models import minimize

SUMMARY = """Learn the penalties of a ridge regression, one per feature or one for all, on a
validation set. Solution, loss and hypergradient have closed forms: reports F(x) - F* and the
hypergradient's error, without noise or with batches, beside a grid of hand-tuned steps."""

DATA = ()
PRESETS: dict[str, dict[str, object]] = {
    "default": {"steps": 200},
    "paper": {"features": 100, "samples": 300, "condition": 1e4, "steps": 1000, "grid": "large"},
    "quick": {"steps": 20, "grid": "none"},
}
STARTS = 10  # random points in [-9, 3]^p from which F* is sought
NOISE = 1.0


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--features", type=positive, default=20, metavar="P", help="half of them carry nothing")
    add("--samples", type=positive, default=60, metavar="N", help="to train; validation: 4 N")
    add("--penalty", choices=("feature", "one"), default="feature", help="what x holds")
    add("--prior", type=penalty, default=1e-3, help="weight of the pull of x to 0, > 0")
    exact.add_arguments(parser)


def run(options: Namespace) -> dict[str, Any]:
    return exact.report(options, Ridge(options))


class Ridge:
    """The problem drawn from ``options.seed``; see :class:`tasks.exact.Exact`."""

    def __init__(self, options: Namespace) -> None:
        p, n, seed = options.features, options.samples, options.seed
        draw = generator(seed, 0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        U, s, V = spectral(n, p, options.condition, (seed, 1))
        A, C = n**0.5 * (U * s.sqrt()) @ V.T, (normal(4 * n, p) * s.sqrt()) @ V.T
        truth = normal(p)
        truth[p // 2 :] = 0
        a, c = A @ truth + NOISE * normal(n), C @ truth + NOISE * normal(4 * n)

        place, self.prior = options.device, options.prior
        self.inner_rows: Rows = (A.to(place), a.to(place))
        self.outer_rows: Rows = (C.to(place), c.to(place))
        count = p if options.penalty == "feature" else 1
        self.x = torch.zeros(count, dtype=torch.float64, device=place)
        self.y = torch.zeros(p, dtype=torch.float64, device=place)
        starts = (12 * torch.rand(STARTS, count, generator=draw, dtype=torch.float64) - 9).to(place)
        found = [minimize(lambda at: self.value(at["x"]), {"x": x}, 1e-11)["x"] for x in starts]
        values = torch.stack([self.value(x) for x in found]).nan_to_num(torch.inf)
        self.optimum, self.least = found[int(values.argmin())], float(values.min())
        self.facts = {
            "features": p,
            "penalties": count,
            "condition of A^T A": options.condition,
            "F*": self.least,
            "||dF/dx|| there": float(self.gradient(self.optimum).norm()),
            f"searches for F* of {STARTS} that end within 1e-6": int(
                (values < self.least + 1e-6).sum()
            ),
        }

    def inner(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        return misfit(y, rows) + (x.exp() * y.square()).sum() / 2

    def outer(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        return misfit(y, rows) + self.prior / 2 * x.square().mean()

    def hessian(self, x: Tensor) -> Tensor:
        A, _ = self.inner_rows
        return A.T @ A / len(A) + torch.diag(x.exp().expand(len(self.y)))

    def solution(self, x: Tensor) -> Tensor:
        A, a = self.inner_rows
        y: Tensor = torch.linalg.solve(self.hessian(x), A.T @ a / len(A))
        return y

    def value(self, x: Tensor) -> Tensor:
        """F(x)."""
        return self.outer(x, self.solution(x), self.outer_rows)

    def gap(self, x: Tensor) -> Tensor:
        return self.value(x) - self.least

    def gradient(self, x: Tensor) -> Tensor:
        C, c = self.outer_rows
        y = self.solution(x)
        q = torch.linalg.solve(self.hessian(x), C.T @ (C @ y - c) / len(C))
        return self.prior * x / len(x) - (x.exp() * y * q).sum_to_size(x.shape)


def misfit(y: Tensor, rows: Rows) -> Tensor:
    """Half the mean squared error of the regression on these rows."""
    features, targets = rows
    return (features @ y - targets).square().mean() / 2
