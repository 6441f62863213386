"""Problems with closed forms of y*(x), F(x) and dF/dx: what a method is off by, exactly."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import bilevel
from bilevel.api import STANDARD
from bilevel.presets import DEFAULT

from .__main__ import positive
from .compare import add_methods, best, best_by_direction, compare, draw, report_grid
from .data import batches
from .data.batches import generator
from .errors import require
from .run import start

Rows = tuple[Tensor, Tensor]

LABEL = "gap F(x) - F*"


class Exact(Protocol):
    """A bilevel least-squares problem in float64.

    Both losses take a batch of rows (features, targets), and are means over its rows.

    Attributes:
        x, y: where runs start.
        inner_rows, outer_rows: all rows of the two levels.
        optimum: x*, the minimiser of F, or the best that was found.
        facts: for the summary.
    """

    x: Tensor
    y: Tensor
    inner_rows: Rows
    outer_rows: Rows
    optimum: Tensor
    facts: dict[str, Any]

    def inner(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor: ...
    def outer(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor: ...
    def solution(self, x: Tensor) -> Tensor:
        """y*(x)."""
        ...

    def gap(self, x: Tensor) -> Tensor:
        """F(x) - F(x*), 0-dim."""
        ...

    def gradient(self, x: Tensor) -> Tensor:
        """dF/dx."""
        ...


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--condition", type=condition, default=100.0, help="number of g_yy's data term, >= 1")
    add("--batch", type=positive, help="rows per batch at both levels (default: all, no noise)")
    add_methods(parser)


def condition(text: str) -> float:
    """A condition number, as an option's type."""
    value = float(text)
    if not 1 <= value < 1e13:
        raise ArgumentTypeError(f"must lie between 1 and 1e13, where float64 ends, not {text}")
    return value


def report(options: Namespace, problem: Exact) -> dict[str, Any]:
    """Run and measure the methods and the grid on the problem; the task's summary."""
    require("matplotlib", "drawing figures")  # before any work is lost
    run = start(options)

    outer, inner, feeds = losses(problem, options)

    def solve(method: bilevel.Method, **manners: Any) -> bilevel.Result:
        return bilevel.solve(
            outer,
            inner,
            problem.x,
            problem.y,
            method=method,
            inner_steps=options.inner_steps,
            **feeds(),
            **manners,
        )

    def measure(x: Tensor, y: Tensor) -> dict[str, float]:
        # the same for all methods: they share the default hypergradient
        return {
            "gap": float(problem.gap(x)),
            "gradient_norm": float(problem.gradient(x).norm()),
            "hypergradient_error": error(problem, x, y, DEFAULT)["error"],
        }

    ours, grid = compare(run, options, solve, measure, score="gap")
    shown = [*ours, *best_by_direction(grid)]
    chosen = best(grid)
    noise = "all rows" if options.batch is None else f"batches of {options.batch}"
    draw(run, shown, f"{options.task}, condition {options.condition:g}, {noise}", label=LABEL)
    return run.summarize(
        {
            **problem.facts,
            "gap at the start": float(problem.gap(problem.x)),
            "best cell of the grid": chosen.name if chosen else None,
            "methods": [a.row() for a in shown],
            "hypergradients at (x, y*(x)) of the start": [
                {"hypergradient": repr(h), **error(problem, problem.x, None, h)} for h in STANDARD
            ],
            "grid": report_grid(run, grid),
        }
    )


def losses(problem: Exact, options: Namespace) -> tuple[Any, Any, Callable[[], dict[str, Any]]]:
    """The two losses, and what makes their data anew: on all rows, or on batches of them."""
    if options.batch is None:
        outer = partial(problem.outer, rows=problem.outer_rows)
        return outer, partial(problem.inner, rows=problem.inner_rows), dict

    def feed(rows: Rows) -> Any:
        return batches(*rows, size=options.batch, seed=options.seed, drop_last=True)

    return (
        problem.outer,
        problem.inner,
        lambda: {
            "outer_data": feed(problem.outer_rows),
            "inner_data": feed(problem.inner_rows),
        },
    )


def error(
    problem: Exact, x: Tensor, y: Tensor | None, kind: bilevel.hypergradients.Hypergradient
) -> dict[str, Any]:
    """||h - dF/dx|| / ||dF/dx|| for the hypergradient h on all rows at (x, y), and its cost.

    y None: y*(x).
    """
    y = problem.solution(x) if y is None else y
    rows = problem.outer_rows, problem.inner_rows
    if not problem.inner(x, y, rows[1]).isfinite() or not problem.outer(x, y, rows[0]).isfinite():
        return {"error": math.nan}  # where a run exploded
    h = bilevel.hypergradient(problem.outer, problem.inner, x, y, *rows, method=kind)
    exact = problem.gradient(x)
    return {
        "error": float((h.grad - exact).norm() / exact.norm()),
        "residual": None if h.residual is None else float(h.residual),
        "gradients": h.gradients,
        "hessian_products": h.hessian_products,
    }


def spectral(
    samples: int, features: int, condition: float, seed: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of random rows  sqrt(samples) U diag(sqrt s) V^T.

    Their second moment has the eigenvalues s, in geometric progression from 1 to 1 / condition.

    Returns:
        U of shape (samples, features) and V, square, with orthonormal columns; s.
    """
    if samples < features:
        raise ValueError(
            f"{samples} samples cannot span {features} variables: take at least {features}"
        )
    draw = generator(*seed)

    def orthonormal(rows: int) -> Tensor:
        normal = torch.randn(rows, features, generator=draw, dtype=torch.float64)
        q: Tensor = torch.linalg.qr(normal)[0]
        return q

    s = torch.logspace(0, -1, features, base=condition, dtype=torch.float64)
    return orthonormal(samples), s, orthonormal(features)
