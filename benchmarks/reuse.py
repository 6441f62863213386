"""A default iteration on features of LeNet, with and without doing them once a search."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel
from benchmarks.report import write
from bilevel.problem import Problem
from bilevel.reuse import Keeping
from tasks.models import lenet_features


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="*", default=[8, 28], help="of the images")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [
        {"images": f"{side} x {side}", "inner batches": kind, **measure(side, kind, options)}
        for side in options.sides
        for kind in ("a new one each step", "the same")
    ]
    write(f"reuse-{options.device}", rows)


def measure(side: int, kind: str, options: argparse.Namespace) -> dict[str, float | str]:
    """Seconds of one iteration from the same state, in turn with reuse and without."""
    torch.manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        images = torch.rand(options.batch, 1, side, side, device=options.device)
        return images, torch.randint(10, (options.batch,), device=options.device)

    def outer(x: nn.Module, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(x(batch[0]) @ y, batch[1])

    def inner(x: nn.Module, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return outer(x, y, batch) + 5e-4 * y.square().sum()

    first = batch()
    batches = [first] * 10 if kind == "the same" else [batch() for _ in range(10)]
    method = bilevel.bisls()
    features = lenet_features((1, side, side)).to(options.device)
    problems = {True: Problem(outer, inner), False: Problem(outer, inner)}
    problems[False].habit.keeping = {level: Keeping(pays=False) for level in ("outer", "inner")}
    state = method.init(features, torch.zeros(84, 10, device=options.device))
    for _ in range(3):  # from where steps have found their length
        state, _ = method.step(problems[True], state, first, batches)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.repeats):
        for reuse, problem in problems.items():
            start = time.perf_counter()
            method.step(problem, state, first, batches)[1]
            times[reuse].append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(times[True], times[False], strict=True))
    return {
        "ms": 1e3 * statistics.median(times[True]),
        "ms without": 1e3 * statistics.median(times[False]),
        "times faster": statistics.median(ratios),
        "min": ratios[0],
        "max": ratios[-1],
        "pays": str(problems[True].habit.keeping["inner"].pays),
    }
