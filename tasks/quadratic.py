"""Random quadratic problems, coupled at both levels, whose optimum is known.

    f(x, y) = mean_i (r_i.(x, y) - e_i)^2 / 2        g(x, y) = mean_i (w_i.(x, y) - c_i)^2 / 2

Both are means over ``samples`` rows, so that batches of rows make the stochastic problem. g_yy has
the condition number asked for; the second moment of f's rows in (x, y) has the condition 10, as in
the simulated problems of benchmark_bilevel. y*(x) is affine in x and F quadratic, hence

    y*(x) = k - K x,   F(x) = mean_i ((R x)_i - t_i)^2 / 2,   R = R_x - R_y K,   t = e - R_y k.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import Tensor

from . import exact
from .__main__ import positive
from .data.batches import generator
from .exact import Rows, spectral

SUMMARY = """Minimise random quadratic bilevel problems of a chosen condition number. Optimum and
hypergradient are known: reports F(x) - F* and the hypergradient's error, without noise or with
batches, beside a grid of hand-tuned steps."""

DATA = ()
PRESETS: dict[str, dict[str, object]] = {
    "default": {"steps": 200},
    "paper": {
        **{"outer_dim": 100, "inner_dim": 100, "samples": 1024, "condition": 10.0},
        **{"batch": 64, "steps": 2000, "grid": "large"},
    },
    "quick": {"steps": 20, "grid": "none"},
}
OUTER_CONDITION = 10.0
NOISE = 0.1


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--outer-dim", type=positive, default=20, metavar="D", help="size of x")
    add("--inner-dim", type=positive, default=40, metavar="D", help="size of y")
    add("--samples", type=positive, default=1000, metavar="N", help="rows of each loss")
    exact.add_arguments(parser)


def run(options: Namespace) -> dict[str, Any]:
    return exact.report(options, Quadratic(options))


class Quadratic:
    """The problem drawn from ``options.seed``; see :class:`tasks.exact.Exact`."""

    def __init__(self, options: Namespace) -> None:
        d, m, n, seed = options.outer_dim, options.inner_dim, options.samples, options.seed
        if n < d + m:
            raise ValueError(
                f"--samples {n} cannot span x and y of --outer-dim {d} and --inner-dim {m}: "
                f"take at least {d + m}"
            )
        draw = generator(seed, 0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        U, s, V = spectral(n, m, options.condition, (seed, 1))
        self.Wy = n**0.5 * (U * s.sqrt()) @ V.T
        self.Wx = n**0.5 * (U @ normal(m, d) / m**0.5 + normal(n, d) / n**0.5) / 2**0.5
        U, s, V = spectral(n, d + m, OUTER_CONDITION, (seed, 2))
        self.Rx, self.Ry = (n**0.5 * (U * s.sqrt()) @ V.T).split([d, m], 1)
        x, y = normal(d), normal(m)  # meet the targets but for noise
        c = self.Wx @ x + self.Wy @ y + NOISE * normal(n)
        e = self.Rx @ x + self.Ry @ y + NOISE * normal(n)

        K = torch.linalg.lstsq(self.Wy, torch.cat([self.Wx, c[:, None]], 1)).solution
        self.K, self.k = K[:, :d], K[:, d]
        self.R, self.t = self.Rx - self.Ry @ self.K, e - self.Ry @ self.k
        self.optimum = torch.linalg.lstsq(self.R, self.t[:, None]).solution[:, 0]
        curvature = torch.linalg.svdvals(self.R)

        place = options.device
        for name, value in list(vars(self).items()):
            setattr(self, name, value.to(place))
        self.x = torch.zeros(d, dtype=torch.float64, device=place)
        self.y = torch.zeros(m, dtype=torch.float64, device=place)
        self.inner_rows: Rows = (torch.cat([self.Wx, self.Wy], 1), c.to(place))
        self.outer_rows: Rows = (torch.cat([self.Rx, self.Ry], 1), e.to(place))
        self.facts = {
            "x, y": f"{d}, {m} variables",
            "condition of g_yy": options.condition,
            "condition of F''": float((curvature[0] / curvature[-1]) ** 2),
            "F*": float(self.value(self.optimum)),
        }

    def outer(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        features, targets = rows
        return (features @ torch.cat([x, y]) - targets).square().mean() / 2

    inner = outer  # on rows of its own

    def solution(self, x: Tensor) -> Tensor:
        return self.k - self.K @ x

    def value(self, x: Tensor) -> Tensor:
        """F(x)."""
        return (self.R @ x - self.t).square().mean() / 2

    def gap(self, x: Tensor) -> Tensor:
        # by Pythagoras, without the cancellation of F(x) - F*
        return (self.R @ (x - self.optimum)).square().mean() / 2

    def gradient(self, x: Tensor) -> Tensor:
        return self.R.T @ (self.R @ x - self.t) / len(self.t)
