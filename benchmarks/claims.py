"""The claims of the BiSLS paper at both levels, each with a number: see docs/paper-bisls.md.

``steps``: final objective over pairs of fixed steps, and over the first steps of BiSLS.
``accepted``: the steps that searches accept beside the tuned one. ``reset``: where searches
start. ``bounds``: BiSPS under bounds that fall and that do not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bilevel
from benchmarks.contest import decades
from benchmarks.problems import CASES, INNER, STEPS, quadratic
from benchmarks.report import write
from bilevel.rules import Line, Move, Polyak
from tasks.cells import spread

CASE = "distillation, batch 256"
OUTER, INNER_STEPS = decades(-5, 1), decades(-4, 2)
FIRST = decades(-4, 4)[::2]  # of BiSLS, for both levels
NOISY = "quadratic, noisy"
BOUNDS = (1.0, 10.0, 100.0)
LENGTHS = (100, 400, 1600)


class Constant(Polyak):
    """BiSPS under bounds that stay as they are at k = 0."""

    def __call__(self, line: Line, k: int, last: float | None) -> Move:
        return super().__call__(line, 0, last)


class Job(NamedTuple):
    """One run: what is varied, and its two numbers."""

    case: str
    what: str
    a: float = math.nan
    b: float = math.nan
    steps: int = STEPS
    seed: int = 0

    def method(self) -> bilevel.Method:
        kind, _, text = self.what.partition(" ")
        detail: Any = text  # a name, which bilevel checks
        if kind == "fixed":
            return bilevel.fixed(detail, self.a, self.b)
        if kind == "bisls":
            return bilevel.bisls(detail, self.a, self.b)
        if kind == "reset":
            return bilevel.bisls("sgd", reset=detail)
        falling = bilevel.bisps(self.a, self.a)
        if detail == "falling":
            return falling
        rules: dict[str, Any] = {
            name: Constant(rule.lower_bound, rule.c, rule.lower, rule.upper)
            for name in ("outer_rule", "inner_rule")
            if isinstance(rule := getattr(falling, name), Polyak)
        }
        return replace(falling, averages=False, **rules)


def run(job: Job) -> dict[str, Any]:
    """The true objective at the end, trials and the outer steps taken."""
    torch.set_num_threads(1)
    case = CASES[job.case](job.seed)
    result = case.solve(job.method(), steps=job.steps, inner_steps=INNER, seed=job.seed)
    # the iterate: the average of the iterates is an answer of its own
    x = result.state.layouts[0].export(result.state.vectors[0])
    return {
        "iterate": case.value(x, result.state.vectors[1]),
        "objective": case.value(result.x, result.y),
        "trials": statistics.mean(r.outer_trials for r in result.history),
        "sizes": [r.outer_step for r in result.history],
    }


def best_value(seed: int) -> float:
    """min F of the noisy quadratic: F is quadratic, so one Newton step from zero is exact."""
    case = quadratic(seed)

    def F(x: Tensor) -> float:
        return case.objective(x)

    d = case.x.numel()
    eye = torch.eye(d, dtype=torch.float64)
    zero = F(0 * eye[0])
    plus, minus = [F(e) for e in eye], [F(-e) for e in eye]
    gradient = torch.tensor([(p - m) / 2 for p, m in zip(plus, minus, strict=True)])
    hessian = torch.tensor(
        [[F(eye[i] + eye[j]) - plus[i] - plus[j] + zero for j in range(d)] for i in range(d)],
        dtype=torch.float64,
    )
    return F(-torch.linalg.solve(hessian, gradient.double()))


def heat_maps(
    path: Path,
    maps: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    y_label: str,
    x_label: str,
    value_label: str,
) -> None:
    """Draw tables of numbers side by side on one common logarithmic scale, dark is large.

    Args:
        path: of the PNG file.
        maps: by title: row values, column values, and the numbers row by row; those that are not
            finite are drawn as the darkest, with a cross.
        y_label, x_label: what rows and columns are.
        value_label: what the numbers are.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    finite = [v for _, _, values in maps.values() for v in values if math.isfinite(v)]
    # what is far above the best is bad enough: a scale up to it has no shades for the rest
    top = min(max(finite), 20 * min(finite))
    scale = LogNorm(min(finite), top)
    size = (4.6 * len(maps) + 0.8, 4.2)
    figure, axis = plt.subplots(1, len(maps), squeeze=False, figsize=size, layout="constrained")
    grid = axis[0]
    for axes, (title, (rows, columns, values)) in zip(grid, maps.items(), strict=True):
        table = [list(values[i : i + len(columns)]) for i in range(0, len(values), len(columns))]
        shown = axes.imshow(
            [[v if math.isfinite(v) else top for v in row] for row in table],
            norm=scale, cmap="Greys", origin="lower", aspect="auto",
        )  # fmt: skip
        for i, row in enumerate(table):
            for j, v in enumerate(row):
                text = f"{v:.2g}" if v < 1000 else "x"
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=7,
                    color="white" if not v < (min(finite) * top) ** 0.5 else "black",
                )  # fmt: skip
        axes.set_xticks(range(len(columns)), [f"{v:g}" for v in columns])
        axes.set_yticks(range(len(rows)), [f"{v:g}" for v in rows])
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
    figure.colorbar(shown, ax=list(grid), label=value_label)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def steps(pool: Any, seeds: int, figure: Path) -> list[dict[str, Any]]:
    rows, maps = [], {}
    for what, alphas, betas in (
        ("fixed adam", OUTER, INNER_STEPS),
        ("bisls adam", FIRST, FIRST),
    ):
        jobs = [Job(CASE, what, a, b, seed=s) for a in alphas for b in betas for s in range(seeds)]
        ends = [found["objective"] for found in pool.map(run, jobs)]
        medians = [
            statistics.median(ends[i : i + seeds]) for i in range(0, len(ends), seeds)
        ]  # of each pair
        worse = sum(end > 3 for end in ends)  # than guessing, 2.3, by far
        rows.append(
            {
                "method": what,
                "pairs": len(medians),
                "runs": len(ends),
                "diverged": worse,
                "best": min(medians),
                "median": statistics.median(medians),
                "worst": max(medians),
                "worst / best": max(medians) / min(medians),
                "share within 5 % of best": statistics.mean(
                    m <= 1.05 * min(medians) for m in medians
                ),
            }
        )
        maps[what] = (alphas, betas, medians)
    heat_maps(
        figure,
        {
            "Adam: outer and inner step": maps["fixed adam"],
            "BiSLS-Adam: first outer and inner step": maps["bisls adam"],
        },
        "outer step",
        "inner step",
        "final outer loss",
    )
    return rows


def accepted(pool: Any, seeds: int) -> list[dict[str, Any]]:
    """BiSLS-SGD beside SGD, whose steps have the same meaning."""
    rows = []
    for case in (CASE, "hyper-representation"):
        grid = [Job(case, "fixed sgd", 10 * a, b) for a in OUTER for b in INNER_STEPS]
        ends = [found["objective"] for found in pool.map(run, grid)]
        tuned = grid[min(range(len(grid)), key=ends.__getitem__)]
        jobs = [Job(case, "bisls sgd", 1.0, 1.0, seed=s) for s in range(seeds)]
        searched = list(pool.map(run, jobs))
        again = list(pool.map(run, [tuned._replace(seed=s) for s in range(seeds)]))
        larger = [statistics.mean(size > tuned.a for size in found["sizes"]) for found in searched]
        rows.append(
            {
                "problem": case,
                "tuned step": tuned.a,
                "median accepted": statistics.median(
                    statistics.median(found["sizes"]) for found in searched
                ),
                "share larger": statistics.median(larger),
                "objective, tuned": statistics.median(found["objective"] for found in again),
                "objective, BiSLS-SGD": statistics.median(f["objective"] for f in searched),
            }
        )
    return rows


def reset(pool: Any, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for case in (CASE, "hyper-representation"):
        for kind in ("fixed", "last", "grow"):
            jobs = [Job(case, f"reset {kind}", seed=s) for s in range(seeds)]
            found = list(pool.map(run, jobs))
            rows.append(
                {
                    "problem": case,
                    "reset": kind,
                    **spread("median", [f["objective"] for f in found]),
                    "trials": statistics.median(f["trials"] for f in found),
                    "last step / tenth": statistics.median(
                        statistics.median(f["sizes"][-10:]) / f["sizes"][9] for f in found
                    ),
                }
            )
    return rows


def bounds(pool: Any, seeds: int) -> list[dict[str, Any]]:
    rows = []
    least = [best_value(seed) for seed in range(seeds)]
    for what in ("bisps falling", "bisps constant"):
        for bound in BOUNDS:
            row: dict[str, Any] = {"bounds": what.split()[1], "at k = 0": bound}
            for length in LENGTHS:
                jobs = [Job(NOISY, what, bound, steps=length, seed=s) for s in range(seeds)]
                gaps = [
                    found["iterate"] - low
                    for found, low in zip(pool.map(run, jobs), least, strict=True)
                ]
                row |= {f"gap after {length}": statistics.median(gaps), f"to {length}": max(gaps)}
            rows.append(row)
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = ("steps", "accepted", "reset", "bounds")
    parser.add_argument("--only", nargs="*", choices=kinds, default=list(kinds))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figure", type=Path, default=Path("docs/steps.png"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    with ProcessPoolExecutor(options.workers) as pool:
        if "steps" in options.only:
            write("claims-steps", steps(pool, options.seeds, options.figure))
        for name, claim in (("accepted", accepted), ("reset", reset), ("bounds", bounds)):
            if name in options.only:
                write(f"claims-{name}", claim(pool, options.seeds))
