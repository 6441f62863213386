"""The defaults against tuned steps and published methods, on every problem, over seeds.

All cells of the grids run with seed 0; the best three of them, and the best of each rival, with
all seeds. Objectives are true ones, f(x, y*(x)) on all outer data.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

import bilevel
from benchmarks.larger import EVERY
from benchmarks.problems import CASES, INNER, STEPS, outcome
from benchmarks.report import write
from benchmarks.rivals import RIVALS
from bilevel.presets import DEFAULT

OURS = ("bisls-adam", "bisls-sgd", "bisps")
SINGLE_LOOP = ("soba", "ma-soba", "s-tfbo")  # one inner step an iteration, INNER times as many
FINALISTS = 3


class Cell(NamedTuple):
    """A method, and where it takes them its outer and inner step and their decay."""

    method: str
    outer: float = math.nan
    inner: float = math.nan
    decay: float = 0.0

    def __str__(self) -> str:
        if math.isnan(self.outer):
            return self.method
        falling = " falling" if self.decay else ""
        return f"{self.method} {self.outer:g} {self.inner:g}{falling}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell that is written so."""
        name, *steps = text.removesuffix(" falling").split()
        if name in ("adam", "sgd") and len(steps) != 2:
            raise argparse.ArgumentTypeError(
                f"{text!r} has {len(steps)} of the two steps of a cell; write 'adam 0.1 0.01' or "
                f"'sgd 1 0.1 falling'."
            )
        return cls(name, *map(float, steps), decay=0.5 if text.endswith(" falling") else 0.0)

    def fixed(self, batches: int | None = None) -> bilevel.Method:
        """``batches``: of the Hessian; None: as the default chooses them."""
        direction: Any = self.method  # a name, which bilevel checks
        h = None if batches is None else replace(DEFAULT, average=batches)
        return bilevel.fixed(direction, self.outer, self.inner, h, decay=self.decay)


def decades(low: int, high: int) -> list[float]:
    return [10.0**e for e in range(low, high + 1)]


def tuned() -> list[Cell]:
    """Fixed steps: 7 x 7 pairs over six decades at each level, constant and falling."""
    return [
        Cell(direction, alpha * (10 if direction == "sgd" else 1), beta, decay)
        for direction in ("adam", "sgd")
        for alpha in decades(-5, 1)
        for beta in decades(-4, 2)
        for decay in (0.0, 0.5)
    ]


def rivals() -> list[Cell]:
    """Published methods, 5 x 4 pairs where they have steps to tune."""
    return [
        cell
        for name, rival in RIVALS.items()
        for cell in (
            [Cell(name, alpha, beta) for alpha in decades(-1, 3) for beta in decades(-2, 1)]
            if rival.steps
            else [Cell(name)]
        )
    ]


def run(job: tuple[str, Cell, int], steps: int = STEPS) -> dict[str, float]:
    """One run; what it ends at, and what it has cost."""
    name, cell, seed = job
    torch.set_num_threads(1)
    case = EVERY[name](seed)
    if cell.method in OURS:
        return outcome(case, cell.method, steps, INNER, seed)
    if cell.method not in RIVALS:
        return outcome(case, cell.fixed(), steps, INNER, seed)
    rival = RIVALS[cell.method]
    tuned = {"outer_step": cell.outer, "inner_step": cell.inner} if rival.steps else {}
    count = steps * (INNER if cell.method in SINGLE_LOOP else 1)
    ended = rival.run(case, steps=count, inner_steps=INNER, seed=seed, **tuned)
    return {
        "objective": case.value(ended.x, ended.y),
        "gradients": ended.cost.gradients,
        "products": ended.cost.hessian_products,
        "seconds": ended.seconds,
    }


def summary(
    case: str, cell: Cell, runs: list[dict[str, float]], searched: list[float]
) -> dict[str, Any]:
    """A row; ``searched``: seconds of the grid that the cell was chosen from."""
    values = [r["objective"] for r in runs]
    return {
        "problem": case,
        "method": str(cell),
        "objective": statistics.mean(values),
        "best seed": min(values),
        "worst seed": max(values),
        **{
            key: statistics.mean(r.get(key, 0.0) for r in runs)
            for key in ("gradients", "products", "trials", "failed", "seconds")
        },
        "grid": len(searched),
        "grid seconds": sum(searched),
    }


def contest(
    pool: ProcessPoolExecutor, case: str, seeds: int, groups: list[list[Cell]], steps: int = STEPS
) -> list[dict[str, Any]]:
    """The rows of a problem: our methods, the best of each group of cells."""

    def runs(cells: list[Cell], first: int) -> dict[Cell, list[dict[str, float]]]:
        jobs = [
            (case, cell, seed) for cell in cells for seed in range(first, seeds if first else 1)
        ]
        found = list(pool.map(partial(run, steps=steps), jobs))
        each = len(found) // len(cells)
        return {cell: found[i * each : (i + 1) * each] for i, cell in enumerate(cells)}

    rows = []
    for group in [[Cell(name)] for name in OURS] + groups:
        began = runs(group, 0)
        best = sorted(group, key=lambda cell: began[cell][0]["objective"])
        best = best[: FINALISTS if group[0].method in ("adam", "sgd") else 1]
        rest = runs(best, 1) if seeds > 1 else {cell: [] for cell in best}
        searched = [began[cell][0]["seconds"] for cell in group]
        found = [summary(case, cell, began[cell] + rest[cell], searched) for cell in best]
        rows.append(min(found, key=lambda row: row["objective"]))
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=EVERY, metavar="CASE")
    parser.add_argument(
        "--cells",
        nargs="+",
        type=Cell.parse,
        metavar="CELL",
        help='fixed steps to run, such as "adam 0.1 1 falling"; default: all 196',
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="outer iterations of a run")
    parser.add_argument("--no-rivals", action="store_true", help="tuned steps only")
    parser.add_argument("--name", default="contest", help="of the file that is written")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    groups = [options.cells or tuned()]
    if not options.no_rivals:
        groups += [[cell for cell in rivals() if cell.method == name] for name in RIVALS]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.workers) as pool:
        for case in options.cases:
            began = time.perf_counter()
            rows += contest(pool, case, options.seeds, groups, options.steps)
            write(options.name, rows)  # what is finished is kept
            print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)
