"""Steps under a decreasing bound against their rivals where no batch is fitted exactly.

Regularised logistic regression (1,000 samples, 30 features, batches of 20), of which the gap
f(x) - f* after the last step is measured, from initial bounds 1 to 1000. "alike": all batches of
one distribution. "mixed": every tenth batch has features ten times as large, and few iterations.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

import optim
from benchmarks.report import table, write
from tasks.cells import band
from tasks.figures import Curve, panels

ROWS, FEATURES, BATCH = 1000, 30, 20
RIDGE = 1e-2
STEPS = {"alike": 4000, "mixed": 200}
BOUNDS = (1.0, 10.0, 100.0, 1000.0)
FLOOR = 1e-12  # to which f* is known
CEILING = 10.0  # of the figure


class Contender(NamedTuple):
    """How it is made from the parameters and a bound, its panel in the figure, the decay of its
    learning rate where it has one, and whether it takes the bound at all."""

    make: Callable[[list[Tensor], float], Any]
    panel: str
    decay: float | None = None
    bounded: bool = True


METHODS = {
    "SPSB": Contender(lambda p, b: optim.SPSB(p, max_lr=b), "decreasing bound"),
    "SLSB": Contender(lambda p, b: optim.SLSB(p, max_lr=b), "decreasing bound"),
    "SGD, 1/sqrt(k+1)": Contender(torch.optim.SGD, "decreasing bound", 0.5),
    "DecSPS, c0 = 1": Contender(lambda p, b: optim.DecSPS(p, max_lr=b), "decreasing bound"),
    "AdaSPS": Contender(lambda p, b: optim.AdaSPS(p), "other rules", bounded=False),
    "SPSmax": Contender(lambda p, b: optim.SPS(p, max_lr=b), "other rules"),
    "SLS": Contender(lambda p, b: optim.SLS(p, max_lr=b), "other rules"),
    "SGD, constant": Contender(torch.optim.SGD, "other rules", 0.0),
    "DecSPS, c0 = 0.1": Contender(lambda p, b: optim.DecSPS(p, 0.1, b), "decreasing bound"),
}


class Problem(NamedTuple):
    """Losses log(1 + exp(-b <a, x>)) + ridge / 2 |x|^2, and their smallest mean."""

    a: Tensor  # (batches, BATCH, FEATURES), times the labels
    minimum: float

    def loss(self, x: Tensor, batch: int | slice = slice(None)) -> Tensor:
        return softplus(-self.a[batch] @ x).mean() + RIDGE / 2 * (x * x).sum()


def problem(setup: str, seed: int) -> Problem:
    """Labels drawn with the probabilities of a model, so that none fits them all."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(ROWS, FEATURES, generator=g, dtype=torch.float64)
    true = torch.randn(FEATURES, generator=g, dtype=torch.float64) / math.sqrt(FEATURES)
    likely = torch.sigmoid(2 * a @ true)
    labels = 2.0 * (torch.rand(ROWS, generator=g, dtype=torch.float64) < likely) - 1
    a = (a * labels[:, None]).reshape(-1, BATCH, FEATURES)
    if setup == "mixed":
        a[::10] *= 10
    return Problem(a, minimum(Problem(a, math.nan)))


def minimum(problem: Problem) -> float:
    """f*, by Newton's method: a strongly convex f is within |gradient|^2 / (2 ridge) of it."""
    x = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    for _ in range(100):
        f = problem.loss(x)
        (g,) = torch.autograd.grad(f, x, create_graph=True)
        if float(g.detach().square().sum()) / (2 * RIDGE) < FLOOR:
            return float(f.detach())
        hessian = torch.stack([torch.autograd.grad(e, x, retain_graph=True)[0] for e in g])
        step, t = torch.linalg.solve(hessian, g.detach()), 1.0
        with torch.no_grad():
            while problem.loss(x - t * step) > f - t / 4 * (g @ step):
                t /= 2
            x -= t * step
    raise RuntimeError("f* was not found in 100 Newton steps: give the problem a larger RIDGE")


def descend(method: Contender, bound: float, made: Problem, seed: int, steps: int) -> list[float]:
    """The gaps after a quarter of the steps and after all."""
    x = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = method.make([x], bound)
    g = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(made.a), (steps,), generator=g).tolist()
    gaps = []
    for k, batch in enumerate(batches, 1):
        if isinstance(optimizer, optim.SLS | optim.SLSB):
            optimizer.step(lambda batch=batch: made.loss(x, batch))
        else:
            optimizer.zero_grad()
            loss = made.loss(x, batch)
            loss.backward()
            if method.decay is None:
                optimizer.step(loss=loss)
            else:
                optimizer.param_groups[0]["lr"] = bound / k**method.decay
                optimizer.step()
        if k in (steps // 4, steps):
            with torch.no_grad():
                gap = float(made.loss(x)) - made.minimum
            gaps.append(max(gap, FLOOR) if math.isfinite(gap) else math.inf)
    return gaps


def pivot(rows: Sequence[dict[str, Any]]) -> str:
    """Median and range of the final gaps, one line per method, one column per bound."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        head = {"set-up": row["set-up"], "method": row["method"]}
        line = lines.setdefault((row["set-up"], row["method"]), head)
        low, high = min(row["gaps"]), max(row["gaps"])
        line[f"{row['bound']:g}"] = f"{row['gap']:.1e} ({low:.1e} to {high:.1e})"
    return table(list(lines.values()))


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    series: dict[str, dict[str, Curve]] = {}
    for name, method in METHODS.items():
        for setup in STEPS:
            runs = [r for r in rows if (r["set-up"], r["method"]) == (setup, name)]
            if runs:
                title = f"{setup} batches, {runs[0]['steps']} steps\n{method.panel}"
                drawn = [[min(gap, CEILING) for gap in r["gaps"]] for r in runs]
                series.setdefault(title, {})[name] = band(
                    [r["bound"] for r in runs], list(zip(*drawn, strict=True))
                )
    panels(
        path, dict(sorted(series.items())), "initial bound, or initial learning rate of SGD",
        f"final gap f(x) - f* (at most {CEILING:g})", log_x=True, log_y=True, columns=2,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs=2, default=list(STEPS.values()), metavar="K",
                        help="of alike and of mixed batches")  # fmt: skip
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--folder", default="docs/measured", help="of single-level.json")
    parser.add_argument("--figure", default="docs/single-level.png")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    kept = Path(options.folder) / "single-level.json"
    rows = json.loads(kept.read_text())["rows"] if options.resume and kept.exists() else []
    for setup, steps in zip(STEPS, options.steps, strict=True):
        problems = [problem(setup, seed) for seed in range(options.seeds)]
        for name in options.methods:
            method = METHODS[name]
            for bound in BOUNDS:
                cell = {"set-up": setup, "method": name, "bound": bound, "steps": steps}
                if any(cell.items() <= r.items() and len(r["gaps"]) == options.seeds for r in rows):
                    continue
                if method.bounded or bound == BOUNDS[0]:
                    runs = [
                        descend(method, bound, p, seed, steps) for seed, p in enumerate(problems)
                    ]
                early, late = (list(gaps) for gaps in zip(*runs, strict=True))
                rows.append({
                    **cell, "gap": statistics.median(late),
                    "gap at a quarter": statistics.median(early), "gaps": late,
                })  # fmt: skip
            write("single-level", rows, options.folder)  # what is finished is kept
    print(pivot(rows))
    draw(rows, options.figure)
