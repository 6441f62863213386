"""Poisson regression with the optimal value of every batch known.

    f_B(w) = mean over the batch of  exp(<x, w>) - y <x, w>

is convex and neither Lipschitz nor smooth on the whole space. The best w* of all data gives every
batch its value f_B(w*), which is what SPS* and IAM step by (arXiv 2504.01898). Without the constant
log y! the values may be negative, and 0 is no lower bound of them.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optim

from .__main__ import positive
from .cells import Cells, Result, band, milestones, spread
from .cells import add_arguments as add_common
from .data.batches import Batches, generator
from .errors import require
from .figures import Curve
from .models import minimize
from .run import curves, start

SUMMARY = """Poisson regression with exponential link, where the optimal value of every batch is
known: SPS* and IAM, which step by it and have nothing to tune, against SGD with and without
momentum over a grid of step sizes; and what happens when the optimal values are wrong."""

DATA = ()
PRESETS: dict[str, dict[str, object]] = {
    "default": {"steps": 500, "repeats": 3},
    "paper": {"steps": 1500, "repeats": 3},
    "quick": {"steps": 20, "repeats": 1},
}
RATES = tuple(10.0 ** (e / 2) for e in range(-6, 2))
ERRORS = (-0.1, -0.02, 0.02, 0.1)  # of the optimal values


class Contender(NamedTuple):
    """How the optimizer is made, from the parameters and a step size (None: as it is)."""

    make: Callable[[list[Tensor], Any], Any]
    oracle: bool = True
    tuned: bool = False


METHODS = {
    "SPS*": Contender(lambda p, lr: optim.SPSPlus(p)),
    "IAM": Contender(lambda p, cap: optim.IAM(p, max_lr=math.inf)),
    "IAM, linear averaging": Contender(lambda p, lr: optim.IAM(p, "linear", max_lr=math.inf)),
    "IAM, capped": Contender(lambda p, lr: optim.IAM(p, max_lr=lr), tuned=True),
    "SGD": Contender(lambda p, lr: torch.optim.SGD(p, lr), oracle=False, tuned=True),
    "SGD, momentum 0.9": Contender(
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, dampening=0.9), oracle=False, tuned=True
    ),
}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--samples", type=positive, default=1000, help="of the data")
    add("--features", type=positive, default=10, help="beside the constant one")
    add("--batch", type=positive, default=20, help="samples per batch")
    add_common(parser, 5, "data sets, each with its own batches")


@dataclass(frozen=True)
class Regression:
    """The data, and the best parameters on all of them.

    Attributes:
        x: shape (n, features + 1), float64; the last column is 1.
        y: counts, shape (n,).
        best: w*, shape (features + 1,).
    """

    x: Tensor
    y: Tensor
    best: Tensor

    @classmethod
    def draw(cls, samples: int, features: int, seed: int) -> Regression:
        """Normal features of norm about 1, parameters of norm about 2, counts."""
        g = generator(seed, 0)
        x = torch.randn(samples, features, generator=g, dtype=torch.float64) / features**0.5
        x = torch.cat([x, torch.ones(samples, 1, dtype=torch.float64)], dim=1)
        truth = 2 * torch.randn(features + 1, generator=g, dtype=torch.float64)
        y = torch.poisson((x @ truth).exp(), generator=g)
        solution = minimize(
            lambda p: poisson_loss(p["w"], x, y), {"w": torch.zeros_like(truth)}, tolerance=1e-10
        )
        return cls(x, y, solution["w"])

    def gap(self, w: Tensor) -> float:
        """f(w) - f(w*) on all data; inf where that is no number."""
        gap = poisson_loss(w, self.x, self.y) - poisson_loss(self.best, self.x, self.y)
        return max(gap.item(), 0.0) if math.isfinite(gap) else math.inf


def poisson_loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """mean exp(<x, w>) - y <x, w>."""
    predictor = x @ w
    return (predictor.exp() - y * predictor).mean()


def poisson_slope(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of :func:`poisson_loss`."""
    return ((x @ w).exp() - y) @ x / len(y)


def run(options: Namespace) -> dict[str, Any]:
    require("matplotlib", "drawing figures")
    if options.samples <= options.features:
        raise ValueError(
            f"--samples {options.samples} must exceed --features {options.features}: "
            f"the best parameters are unique then"
        )
    run = start(options)
    seeds = [options.seed + i for i in range(options.repeats)]
    problems = [Regression.draw(options.samples, options.features, seed) for seed in seeds]
    plan: list[tuple[str, float | None, float]] = []
    for name, method in METHODS.items():
        plan += [(name, lr, 0.0) for lr in (RATES if method.tuned else (None,))]
        if method.oracle and not method.tuned:
            plan += [(name, None, error) for error in ERRORS]
    cells = Cells(run, options.resume, len(plan) * len(problems), options.quiet)
    results = {
        (name, lr, error): [
            cells(
                partial(train, problem, METHODS[name], lr, error, options, seed),
                method=name, lr=lr, error=error, steps=options.steps, data=seed,
            )
            for seed, problem in zip(seeds, problems, strict=True)
        ]
        for name, lr, error in plan
    }  # fmt: skip

    def final(name: str, lr: float | None = None, error: float = 0.0) -> list[float]:
        return [result["rows"][-1]["gap"] for result in results[name, lr, error]]

    best = {
        name: min(RATES, key=lambda lr: spread("", final(name, lr))[""]) if method.tuned else None
        for name, method in METHODS.items()
    }
    draw(run.folder, options.steps, results, best, final)
    oracle = [name for name, method in METHODS.items() if method.oracle and not method.tuned]
    return run.summarize(
        {
            "data": f"{options.samples} samples, {options.features} features and a constant",
            "optimal value": spread("f*", [optimum(problem) for problem in problems])["f*"],
            "final gap": [
                {
                    "method": name, "step size": lr,
                    **spread("f(w) - f*", final(name, lr)),
                    "moves away from w*": sum(r["moved away"] or 0 for r in results[name, lr, 0.0])
                    if METHODS[name].oracle else None,
                }
                for name, lr in best.items()
            ],
            "final gap over the grid": [
                {"step size": lr}
                | {n: spread("", final(n, lr))[""] for n, m in METHODS.items() if m.tuned}
                for lr in RATES
            ],
            "final gap with wrong optimal values": [
                {"error": error} | {n: spread("", final(n, None, error))[""] for n in oracle}
                for error in sorted((0.0, *ERRORS))
            ],
        }
    )  # fmt: skip


def optimum(problem: Regression) -> float:
    return poisson_loss(problem.best, problem.x, problem.y).item()


def train(
    problem: Regression,
    method: Contender,
    lr: float | None,
    error: float,
    options: Namespace,
    seed: int,
) -> Result:
    """One run from zero: the gap on all data on the way, and how often z moved away from w*.

    z is the point that steps; with optimal values that are exact, or too high, none of its steps
    leads away.
    """
    w = torch.zeros_like(problem.best).requires_grad_()
    optimizer = method.make([w], lr)
    data = Batches(problem.x, problem.y, options.batch, seed)
    stream = (batch for _ in iter(int, 1) for batch in data)
    ticks, rows, away = set(milestones(options.steps)), [], 0
    distance = torch.linalg.vector_norm(w.detach() - problem.best)
    for t in range(options.steps + 1):
        if t in ticks:
            rows.append({"iteration": t, "gap": problem.gap(w.detach())})
        if t == options.steps:
            break
        batch = next(stream)
        with torch.no_grad():
            w.grad = poisson_slope(w, *batch)
            if method.oracle:
                target = poisson_loss(problem.best, *batch) + error
                optimizer.step(loss=poisson_loss(w, *batch), target=target)
                z = optimizer.state[w].get("z", w)
                now = torch.linalg.vector_norm(z - problem.best)
                away += bool(now > distance * (1 + 1e-12))
                distance = now
            else:
                optimizer.step()
                if not bool(w.isfinite().all()):
                    rows += [{"iteration": s, "gap": math.inf} for s in sorted(ticks) if s > t]
                    break
    return {"rows": rows, "moved away": away if method.oracle else None}


def draw(
    folder: Any,
    steps: int,
    results: dict[tuple[str, float | None, float], list[Result]],
    best: dict[str, float | None],
    final: Callable[..., list[float]],
) -> None:
    """The gap against the step size, against the iteration, and against the error of f*."""
    gap = "f(w) - f*"
    shown = {
        name: (name if lr is None else f"{name}, step {lr:.2g}", results[name, lr, 0.0])
        for name, lr in best.items()
        if name != "IAM, capped"
    }
    curves(
        folder / "gap.png",
        {
            label: band([t + 1 for t in milestones(steps)], [gaps(r) for r in runs])
            for label, runs in shown.values()
        },
        "iteration + 1", f"{gap} on all data",
        "best step size of each: median and range", log_y=True, log_x=True,
    )  # fmt: skip
    flat = [name for name, method in METHODS.items() if not method.tuned]
    begin = max(gaps(r)[0] for r in results[flat[0], None, 0.0])

    def over(keys: Sequence[float], runs: Sequence[Sequence[float]]) -> Curve:
        table = [[min(v, 10 * begin) for v in values] for values in runs]
        return band(keys, list(zip(*table, strict=True)))

    curves(
        folder / "sensitivity.png",
        {
            name: over(RATES, [final(name, lr if method.tuned else None) for lr in RATES])
            for name, method in METHODS.items()
        },
        "step size (of IAM, capped: its cap; SPS*, IAM: none)", f"final {gap}",
        f"{steps} iterations: median and range", log_y=True, log_x=True,
    )  # fmt: skip
    errors = sorted((0.0, *ERRORS))
    curves(
        folder / "wrong-optimum.png",
        {
            name: over(errors, [final(name, None, error) for error in errors])
            for name in flat
        },
        "error of the optimal values given", f"final {gap}",
        f"{steps} iterations: median and range", log_y=True,
    )  # fmt: skip


def gaps(result: Result) -> list[float]:
    return [row["gap"] for row in result["rows"]]
