"""Regularization: choose one penalty per feature of a logistic regression.

    min_x  mean log(1 + e^{-b a.w*(x)})  on validation rows (a, b)
    w*(x) = argmin_w  mean log(1 + e^{-b a.w})  on training rows + sum_j e^{x_j} w_j^2 / 2

Whenever penalties are measured, the regression is solved anew to its optimum on all training rows.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bilevel

from .__main__ import positive
from .compare import add_methods, best, best_by_direction, compare, draw, report_grid
from .data import batches
from .data.dataset import Part
from .data.tables import TABLES, Table, load_table
from .errors import require
from .figures import curves
from .run import start

SUMMARY = """Choose one penalty per feature of a logistic regression by its loss on validation rows.
Compares methods without learning rates with a grid of hand-tuned steps, with the best single
penalty for all features, and with none."""

DATA = TABLES
STEPS = {"breast-cancer": 200, "ijcnn1-like": 200, "ijcnn1": 200}
BATCH = {"breast-cancer": None, "ijcnn1-like": 256, "ijcnn1": 256}
PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "paper": {"data": "ijcnn1", "batch": 64, "steps": 3000, "grid": "large"},
    "quick": {"steps": 20, "grid": "none"},
}
SINGLE = torch.linspace(-12, 4, 25, dtype=torch.float64)  # log-penalties for all features


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--batch",
        type=positive,
        help="rows per batch at both levels (default: all of breast-cancer, else 256)",
    )
    add_methods(parser)


def run(options: Namespace) -> dict[str, Any]:
    require("matplotlib", "drawing figures")  # before any work is lost
    options.steps = options.steps or STEPS[options.data]
    options.batch = options.batch or BATCH[options.data]
    table = load_table(options.data, options.root, options.device)
    run = start(options)
    task = Regularization(table, options)

    ours, grid = compare(run, options, task.solve, task.measure)
    shown = [*ours, *best_by_direction(grid)]
    chosen = best(grid)
    draw(run, shown, f"regularization, {options.data}", log_y=False)
    learned = {a.name: a.result.x for a in shown if a.result}
    places = list(range(len(task.x)))
    curves(
        run.folder / "penalties.png",
        {name: (places, x.tolist()) for name, x in learned.items()},
        "feature",
        "log-penalty x",
        f"{options.data}: the penalties learned",
    )
    return run.summarize(
        {
            "data": repr(table),
            "best cell of the grid": chosen.name if chosen else None,
            "methods": [a.row() for a in shown],
            "references": task.references(),
            "grid": report_grid(run, grid),
        }
    )


class Regularization:
    """The problem: the two losses, and the measure of penalties x."""

    def __init__(self, table: Table, options: Namespace) -> None:
        self.table, self.options = table, options
        self.x = torch.zeros_like(table.train[0][0])
        self.y = torch.zeros_like(self.x)

    def inner(self, x: Tensor, y: Tensor, rows: Part) -> Tensor:
        return loss(y, rows) + (x.exp() * y.square()).sum() / 2

    def outer(self, x: Tensor, y: Tensor, rows: Part) -> Tensor:
        return loss(y, rows)

    def feed(self, rows: Part) -> Any:
        if self.options.batch is None:
            return [rows]
        return batches(*rows, size=self.options.batch, seed=self.options.seed, drop_last=True)

    def solve(self, method: bilevel.Method, **manners: Any) -> bilevel.Result:
        return bilevel.solve(
            self.outer,
            self.inner,
            self.x,
            self.y,
            outer_data=self.feed(self.table.validation),
            inner_data=self.feed(self.table.train),
            method=method,
            inner_steps=self.options.inner_steps,
            **manners,
        )

    def solution(self, x: Tensor, begin: Tensor) -> Tensor:
        """w*(x) by Newton's method from ``begin``, damped; nan where x is not finite."""
        if not x.isfinite().all():
            return torch.full_like(begin, torch.nan)
        features, labels = self.table.train
        penalties = x.exp().clamp(max=1e30)  # of runs that explode
        w = begin if begin.isfinite().all() else self.y
        for _ in range(100):
            chance = torch.sigmoid(-labels * (features @ w))
            slopes = penalties * w - features.T @ (labels * chance) / len(labels)
            if not slopes.abs().max() > 1e-10:
                break
            curvature = features.T @ ((chance * (1 - chance))[:, None] * features) / len(labels)
            step = torch.linalg.solve(curvature + torch.diag(penalties), slopes)
            value, size = self.inner(x, w, self.table.train), 1.0
            while size > 1e-10 and not self.inner(x, w - size * step, self.table.train) < value:
                size /= 2
            if size <= 1e-10:
                break  # at the end of what float64 can tell
            w = w - size * step
        return w

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Loss and accuracy of the regression solved with the penalties x."""
        w = self.solution(x, y)
        out: dict[str, float] = {}
        for name, rows in (("validation", self.table.validation), ("test", self.table.test)):
            right = (rows[0] @ w) * rows[1] > 0
            out[f"{name}_loss"] = float(loss(w, rows))
            out[f"{name}_accuracy"] = float(right.double().mean())
        return out

    def references(self) -> list[dict[str, Any]]:
        """What one penalty for all features attains: the start's, none, the best of many."""
        one = [(float(x), self.measure(self.x + x, self.y)) for x in SINGLE.flip(0)]
        best_x, best_one = min(one, key=lambda pair: pair[1]["validation_loss"])
        name = f"one for all, best of {len(one)}: e^{best_x:.3g}"
        return [
            {"penalties": "the start: 1 for all", **self.measure(self.x, self.y)},
            {"penalties": f"next to none: e^{float(SINGLE[0]):.3g} for all", **one[-1][1]},
            {"penalties": name, **best_one},
        ]


def loss(w: Tensor, rows: Part) -> Tensor:
    """Mean logistic loss of the weights w, shape (p,)."""
    features, labels = rows
    return F.softplus(-labels * (features @ w)).mean()
