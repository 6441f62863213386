"""One default under every change that should not matter: first steps, scales, precision, inner
steps, batch size. True objective f(x, y*(x)) at the end of each run."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel
from benchmarks.problems import CASES, Case, distillation, outcome, quadratic, representation
from benchmarks.report import write
from bilevel.layout import tree_map

FACTORS = (1e-3, 1e3)
STARTS = [10.0**e for e in range(-4, 5)]
SIZES: dict[str, Callable[[int, int], Case]] = {
    "quadratic, noisy": lambda seed, size: quadratic(seed, size=size),
    "distillation, batch 256": distillation,
    "hyper-representation": representation,
}
SINGLE = ("distillation, batch 256", "hyper-representation", "data cleaning")  # float32


@dataclass(frozen=True)
class Change:
    """What one run changes. A loss, or x, is multiplied by its factor."""

    what: str = ""
    value: str = ""
    starts: tuple[float, float] = (1.0, 1.0)
    f: float = 1.0
    g: float = 1.0
    x: float = 1.0
    double: bool = False
    inner_steps: int = 10
    size: int | None = None


def changes(which: list[str], case: str) -> Iterator[Change]:
    yield Change("none")
    if "starts" in which:
        for pair in itertools.product(STARTS, STARTS):
            yield Change("starts", f"{pair[0]:g} {pair[1]:g}", starts=pair)
    if "scales" in which:
        for factor in FACTORS:
            yield Change("f times", f"{factor:g}", f=factor)
            yield Change("g times", f"{factor:g}", g=factor)
            yield Change("x times", f"{factor:g}", x=factor)
    if "precision" in which and case in SINGLE:
        yield Change("precision", "float64", double=True)
    if "inner" in which:
        for steps in (1, 100):
            yield Change("inner steps", str(steps), inner_steps=steps)
    if "batch" in which and case in SIZES:
        for size in (16, 64, 256):
            yield Change("batch", str(size), size=size)


def changed(case: Case, change: Change) -> Case:
    """The same problem in other units, or in double precision."""

    def cast(t: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return t.to(dtype) if change.double and t.is_floating_point() else t

    def back(x: Any) -> Any:
        return tree_map(lambda t: t / change.x, x)

    def outer(x: Any, y: Any, *batch: Any) -> Tensor:
        return change.f * case.outer(back(x), y, *tree_map(cast, batch))

    def inner(x: Any, y: Any, *batch: Any) -> Tensor:
        return change.g * case.inner(back(x), y, *tree_map(cast, batch))

    def objective(x: Any) -> float:
        return case.objective(tree_map(lambda t: cast(t, torch.float32), back(x)))

    x = tree_map(lambda t: cast(t) * change.x, case.x)
    y = tree_map(cast, case.y)
    return replace(case, outer=outer, inner=inner, x=x, y=y, objective=objective)


ENDED: dict[tuple[Any, ...], dict[str, float]] = {}  # runs from the state after two iterations


def run(job: tuple[str, str, Change, int, int]) -> dict[str, float]:
    name, method, change, steps, seed = job
    torch.set_num_threads(1)
    made = CASES[name](seed) if change.size is None else SIZES[name](seed, change.size)
    case = changed(made, change)
    direction: Any = method.removeprefix("bisls-")  # a name, which bilevel checks
    rule = bilevel.bisls(direction, *change.starts)
    if change.what not in ("none", "starts"):
        return outcome(case, rule, steps, change.inner_steps, seed)
    # first steps are forgotten where the state after two iterations is the same to the last bit; in
    # the first x may wait for y
    state = case.solve(rule, steps=2, inner_steps=change.inner_steps, seed=seed).state
    tensors = (*state.vectors, state.q, *state.moments[:2])
    bits = b"".join(t.numpy().tobytes() for t in tensors if t is not None)
    bits += repr((state.outer_last, state.inner_last, state.noise, state.learned)).encode()
    key = (name, method, steps, seed, bits)
    if key not in ENDED:
        ENDED[key] = outcome(case, rule, steps, change.inner_steps, seed)
    return ENDED[key] | {"state": float(zlib.crc32(bits))}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ("starts", "scales", "precision", "inner", "batch")
    parser.add_argument("--kinds", nargs="*", choices=kinds, default=list(kinds))
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--method", default="bisls-adam", choices=("bisls-adam", "bisls-sgd"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="robustness", help="of the file that is written")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    jobs = [
        (case, options.method, change, options.steps, seed)
        for case in options.cases
        for change in changes(options.kinds, case)
        for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        found = list(pool.map(run, jobs))
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for (case, _, change, _, _), ended in zip(jobs, found, strict=True):
        value = "all" if change.what == "starts" else change.value
        groups.setdefault((case, change.what, value), []).append(ended)
    write(
        options.name,
        [
            {"problem": case, "changed": what, "to": to, **summary(runs, options.seeds)}
            for (case, what, to), runs in groups.items()
        ],
    )


def summary(runs: list[dict[str, float]], seeds: int) -> dict[str, Any]:
    """Over seeds; ``best`` and ``worst`` are means over the seeds of the best and worst start;
    ``different`` counts objectives, or, of first steps, states after two iterations."""
    values = [r["objective"] for r in runs]
    by_seed = [values[seed::seeds] for seed in range(seeds)]
    return {
        "runs": len(runs),
        "different": len({r.get("state", r["objective"]) for r in runs}),
        "best": statistics.mean(min(v) for v in by_seed),
        "worst": statistics.mean(max(v) for v in by_seed),
        "unfinished": sum(r["unfinished"] for r in runs),
        "trials": statistics.mean(r["trials"] for r in runs),
        "failed": statistics.mean(r["failed"] for r in runs),
    }
