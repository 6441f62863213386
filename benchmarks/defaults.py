"""Why the defaults are what they are: each choice beside its alternatives and a tuned grid."""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

import bilevel
from benchmarks.problems import CASES, outcome
from benchmarks.report import write
from bilevel.method import Method
from bilevel.presets import SEARCHED_ADAM
from bilevel.rules import Adam, Armijo

STEPS, INNER = 100, 10


def cg(steps: int, rtol: float) -> bilevel.Implicit:
    return bilevel.Implicit(bilevel.ConjugateGradient(steps, rtol))


def variants() -> dict[str, Method]:
    """The default of BiSLS-Adam with one thing changed at a time."""
    default = bilevel.bisls("adam")

    def armijo(**changes: object) -> Method:
        return replace(default, outer_rule=replace(Armijo(), **changes))  # type: ignore[arg-type]

    def adam(**changes: object) -> Method:
        return replace(default, direction=replace(SEARCHED_ADAM, **changes))  # type: ignore[arg-type]

    return {
        "bisls-adam": default,
        "bisls-sgd": bilevel.bisls("sgd"),
        "bisps": bilevel.bisps(),
        "response frozen": replace(default, response="frozen"),
        "response refine": replace(default, response="refine"),
        "response refine, slack 0.01": replace(armijo(slack=0.01), response="refine"),
        "c = 0.1": armijo(c=0.1),
        "slack 0.01": armijo(slack=0.01),
        "growth 2": replace(armijo(growth=2.0), inner_rule=Armijo(growth=2.0)),
        "no average": replace(default, averages=False),
        "reset last": armijo(reset="last"),
        "reset fixed": armijo(reset="fixed"),
        "start 1e-4": bilevel.bisls("adam", 1e-4, 1e-4),
        "start 1e4": bilevel.bisls("adam", 1e4, 1e4),
        "CG rtol 1e-3, 50 steps": bilevel.bisls("adam", hypergradient=cg(50, 1e-3)),
        "CG 3 steps": bilevel.bisls("adam", hypergradient=cg(3, 0.1)),
        "Neumann 10 terms": bilevel.bisls(
            "adam", hypergradient=bilevel.Implicit(bilevel.Neumann(10))
        ),
        "beta1 = 0": adam(beta1=0.0),
        "beta1 = 0.9": adam(beta1=0.9),
        "eps = 1e-8": adam(eps=1e-8),
        "not normalised": adam(normalised=False, eps=1e-8),
        "plain Adam, beta1 = 0.9": replace(default, direction=Adam()),
    }


def grid(kind: str) -> dict[str, Method]:
    """Fixed steps of two directions: 6 x 3 pairs; wide: 7 x 7, constant and falling."""
    if kind == "none":
        return {}
    wide = kind == "wide"
    outer_steps = [10.0**e for e in (range(-5, 2) if wide else range(-3, 3))]
    inner_steps = [10.0**e for e in (range(-4, 3) if wide else range(-2, 1))]
    found = {}
    for direction in ("adam", "sgd"):
        for alpha in outer_steps:
            for beta in inner_steps:
                for decay in (0.0, 0.5) if wide else (0.0,):
                    step = alpha * (10 if direction == "sgd" else 1)
                    method = bilevel.fixed(direction, step, beta, decay=decay)
                    falling = " falling" if decay else ""
                    found[f"{direction} {step:g} {beta:g}{falling}"] = method
    return found


def run(job: tuple[str, str, int]) -> dict[str, float]:
    """One run of a named method on a named case."""
    case, name, seed = job
    torch.set_num_threads(1)
    method = (variants() | grid("usual") | grid("wide"))[name]
    return outcome(CASES[case](seed), method, STEPS, INNER, seed)


def summary(case: str, name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    means = {
        key: statistics.mean(r[key] for r in runs)
        for key in ("objective", "trials", "failed", "gradients", "products", "seconds")
    }
    worst = max(r["objective"] for r in runs)
    return {"problem": case, "method": name, **means, "worst seed": worst}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--variants", nargs="*", default=list(variants()))
    parser.add_argument("--grid", choices=("usual", "wide", "none"), default="usual")
    parser.add_argument("--name", default="defaults", help="of the file that is written")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    cells = list(grid(options.grid))
    jobs = [
        (case, name, seed)
        for case in options.cases
        for name in [*options.variants, *cells]
        for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    rows = []
    for case in options.cases:

        def runs(name: str, case: str = case) -> list[dict[str, float]]:
            return [found[case, name, seed] for seed in range(options.seeds)]

        rows += [summary(case, name, runs(name)) for name in options.variants]
        if cells:
            tuned = min((summary(case, name, runs(name)) for name in cells), key=_objective)
            searched = sum(r["seconds"] for name in cells for r in runs(name)) / options.seeds
            tuned["method"] = f"best of {len(cells)} fixed: {tuned['method']}"
            rows.append(tuned | {"search seconds": searched})
    names = list(dict.fromkeys(key for row in rows for key in row))
    write(options.name, [{name: row.get(name, "") for name in names} for row in rows])


def _objective(row: dict[str, Any]) -> float:
    return float(row["objective"])
