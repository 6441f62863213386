"""How soon the default is where the best tuned cell ends, or within 1 % of it: seconds, gradients
and products.

Reads which cell is the best from the file that ``contest`` has written. Both run from the same
seeds, one after the other; the objective is the true one, and its time is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

import bilevel
from benchmarks.contest import Cell
from benchmarks.larger import EVERY
from benchmarks.problems import INNER, STEPS, Case
from benchmarks.report import write

CLOSE = 0.01  # of the cell's end, by which the default may end above it

Watched = list[tuple[float, bilevel.Record]]


def watched(case: Case, method: str | bilevel.Method, seed: int, every: int) -> Watched:
    """The true objective after every so many iterations and the last one, with its record."""
    seen: Watched = []

    def look(state: bilevel.State, record: bilevel.Record) -> None:
        if state.k % every == 0:
            seen.append((case.value(state.x, state.y), record))

    result = case.solve(method, steps=STEPS, inner_steps=INNER, seed=seed, callback=look)
    last = result.history[-1]
    if not seen or seen[-1][1] is not last:
        seen.append((case.value(result.x, result.y), last))
    return seen


def race(
    case: str, name: str, cell: Cell, seed: int, batches: int | None, every: int
) -> dict[str, float]:
    """One seed; infinite where the default never gets there."""
    tuned = watched(EVERY[case](seed), cell.fixed(batches), seed, every)
    ours = watched(EVERY[case](seed), name, seed, every)
    target, last = tuned[-1]

    def first(limit: float) -> bilevel.Record | None:
        return next((record for value, record in ours if value <= limit), None)

    there, close = first(target), first(target + CLOSE * abs(target))
    in_time = [value for value, record in ours if record.seconds <= last.seconds]
    return {
        "cell ends at": target,
        "default by then": in_time[-1] if in_time else math.inf,
        "default ends at": ours[-1][0],
        "cell's seconds": last.seconds,
        "default's seconds": ours[-1][1].seconds,
        "seconds to the cell's end": there.seconds if there else math.inf,
        "seconds to within 1 %": close.seconds if close else math.inf,
        "iterations": there.k + 1 if there else math.inf,
        "gradients and products": there.gradients + there.hessian_products if there else math.inf,
        "those of the cell": last.gradients + last.hessian_products,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="default: all of the file")
    parser.add_argument("--method", default="bisls-adam")
    parser.add_argument(
        "--cell-batches", type=int, help="of the cell's Hessian; default: as many as ours takes"
    )
    parser.add_argument(
        "--every", type=int, default=1, help="iterations between looks at the true objective"
    )
    parser.add_argument("--contest", type=Path, default=Path("docs/measured/contest.json"))
    parser.add_argument("--name", default="race", help="of the file that is written")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.contest.exists():
        parser.error(f"{options.contest} is missing; run python -m benchmarks contest first")
    rows: list[dict[str, Any]] = []
    for row in json.loads(options.contest.read_text())["rows"]:
        cell = Cell.parse(row["method"])
        if cell.method not in ("adam", "sgd") or row["problem"] not in (
            options.cases or [row["problem"]]
        ):
            continue
        runs = [
            race(row["problem"], options.method, cell, seed, options.cell_batches, options.every)
            for seed in range(options.seeds)
        ]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        took = medians["cell's seconds"]
        faster = {
            "times faster": took / medians["seconds to the cell's end"],
            "times faster to within 1 %": took / medians["seconds to within 1 %"],
        }
        rows.append({"problem": row["problem"], "cell": str(cell), **medians, **faster})
        write(options.name, rows)  # what is finished is kept
