"""Runs of several methods on one problem, side by side, and the grid of hand-tuned steps."""

from __future__ import annotations

import math
import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import bilevel
from bilevel import Record, Result

from .files import write_csv
from .run import Run, curves

#: Ours, by name; nothing about them depends on the task.
METHODS: dict[str, Callable[..., bilevel.Method]] = {
    "bisls-adam": lambda **options: bilevel.bisls("adam", **options),
    "bisls-sgd": lambda **options: bilevel.bisls("sgd", **options),
    "bisps": lambda **options: bilevel.bisps(**options),
}

#: Outer steps by direction, and inner steps: every pair is a run.
GRIDS: dict[str, tuple[dict[str, tuple[float, ...]], tuple[float, ...]]] = {
    "none": ({}, ()),
    "small": ({"adam": (1e-3, 1e-2, 1e-1), "sgd": (1e-1, 1e0, 1e1)}, (1e-1, 1e0)),
    "medium": (
        {"adam": (1e-3, 1e-2, 1e-1), "sgd": (1e-2, 1e-1, 1e0)},
        (1e-2, 1e-1, 1e0),
    ),
    "large": (
        {
            "adam": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0),
            "sgd": (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1),
        },
        (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1),
    ),
}

#: A loss evaluation is the forward third of a gradient; a Hessian product costs about a gradient.
FORWARD = 1 / 3


def add_arguments(parser: ArgumentParser) -> None:
    """The options that every comparison has."""
    parser.add_argument(
        "--grid",
        choices=GRIDS,
        default="small",
        help="hand-tuned steps to compare with, every pair of them a run of its own: "
        + ", ".join(f"{name} {len(cells(name))} runs" for name in GRIDS),
    )


@dataclass(frozen=True)
class Cell:
    """A pair of hand-tuned steps."""

    direction: str
    outer_step: float
    inner_step: float

    def __str__(self) -> str:
        return f"{self.direction} {self.outer_step:g}/{self.inner_step:g}"

    def method(self, **options: Any) -> bilevel.Method:
        return bilevel.fixed(self.direction, self.outer_step, self.inner_step, **options)  # type: ignore[arg-type]


def cells(grid: str) -> list[Cell]:
    """The runs of a grid."""
    outer, inner = GRIDS[grid]
    return [
        Cell(name, alpha, beta)
        for name, alphas in outer.items()
        for alpha in alphas
        for beta in inner
    ]


@dataclass
class Attempt:
    """One method's run on the problem, measured on the way.

    Attributes:
        name: of the method, or of the cell.
        result: what ``bilevel.solve`` returned; None where a cell could not even start.
        marks: where it was measured: the iterations done, the cost so far, and what was measured.
    """

    name: str
    cell: Cell | None = None
    result: Result | None = None
    marks: list[dict[str, float]] = field(default_factory=list)

    @property
    def validation(self) -> float:
        """The validation loss at the end; infinite where that is no number."""
        value = self.marks[-1]["validation_loss"]
        return value if math.isfinite(value) else math.inf

    def row(self) -> dict[str, Any]:
        """For the table of methods."""
        assert self.result is not None
        return {"method": self.name, **self.marks[-1], "stopped": stopped(self.result)}


def stopped(result: Result) -> str:
    """Why a run ended early; empty where it did not."""
    return "" if result.reason.startswith("all ") else result.reason


def attempt(
    run: Run,
    name: str,
    solve: Callable[[Callable[[Any, Record], None]], Result],
    measure: Callable[[Any, Any], Mapping[str, float]],
    steps: int,
    cell: Cell | None = None,
    marks: int = 20,
) -> Attempt:
    """Run a method, write its history, and measure it about ``marks`` times on the way.

    Args:
        solve: runs with the callback that it is given.
        measure: (x, y) -> numbers by name, ``validation_loss`` among them. Its time is not the
            method's: records count the seconds of the steps alone.
        steps: outer iterations of the run.
    """
    out = Attempt(name, cell)
    every = max(1, steps // marks)

    def mark(state: Any, record: Record) -> None:
        row: dict[str, Any] = {"run": name, **record.asdict(), "validation_loss": None}
        done = record.k + 1
        if done % every == 0 or done in (1, steps):
            measured = measure(state.x, state.y)
            row["validation_loss"] = measured["validation_loss"]
            out.marks.append({"iterations": done, **cost(record), **measured})
        run.record(row)

    out.result = solve(mark)
    if out.result.history and out.marks[-1:] and stopped(out.result):
        # where a run broke off: the last good point
        last = out.result.history[-1]
        measured = measure(out.result.x, out.result.y)
        out.marks.append({"iterations": last.k + 1, **cost(last), **measured})
    return out


def cost(record: Record) -> dict[str, float]:
    """The cost so far; ``work`` is all of it in gradients."""
    work = record.gradients + record.hessian_products + FORWARD * record.loss_evaluations
    return {
        "gradients": record.gradients,
        "hessian_products": record.hessian_products,
        "loss_evaluations": record.loss_evaluations,
        "work": work,
        "seconds": record.seconds,
    }


def best(attempts: Iterable[Attempt]) -> Attempt | None:
    """The one with the lowest validation loss; the test set has no say in it."""
    return min(attempts, key=lambda a: a.validation, default=None)


def best_by_direction(grid: Sequence[Attempt]) -> list[Attempt]:
    """The best cell of each direction."""
    directions = dict.fromkeys(a.cell.direction for a in grid if a.cell)
    found = (best(a for a in grid if a.cell and a.cell.direction == d) for d in directions)
    return [a for a in found if a]


def report_grid(run: Run, grid: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Write ``grid.csv``, every cell of the grid; returns its rows, best first."""
    rows: list[dict[str, Any]] = []
    for a in sorted(grid, key=lambda a: a.validation):
        assert a.cell is not None
        rows.append({"direction": a.cell.direction, "outer step": a.cell.outer_step,
                     "inner step": a.cell.inner_step, **a.row()})  # fmt: skip
        del rows[-1]["method"]
    if rows:
        write_csv(run.folder / "grid.csv", list(rows[0]), rows)
    return rows


def draw(run: Run, shown: Sequence[Attempt], title: str, log_y: bool = True) -> None:
    """Validation loss against outer iterations, against all evaluations, and against time."""
    for name, key, label in (
        ("iterations", "iterations", "outer iterations"),
        ("work", "work", "gradients + Hessian products + loss evaluations / 3"),
        ("seconds", "seconds", "time of the steps [s]"),
    ):
        series = {
            a.name: ([m[key] for m in a.marks], [m["validation_loss"] for m in a.marks])
            for a in shown
        }
        path = run.folder / f"validation-loss-{name}.png"
        curves(path, series, label, "validation loss", title, log_y)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of repeated measurements, and their number."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"test accuracy": statistics.fmean(values), "std": deviation, "runs": len(values)}
