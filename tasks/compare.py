"""Runs of several methods on one problem, side by side, and the grid of hand-tuned steps.

A comparison that was interrupted, even killed, goes on with ``--resume``: what is finished is not
run again, and the run that was under way goes on from its checkpoint. The folder ``attempts`` of
the run keeps, for each method and each cell, its checkpoint and what was measured.
"""

from __future__ import annotations

import json
import math
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import bilevel
from bilevel import Record, Result
from bilevel.checkpoint import load as load_checkpoint

from .__main__ import positive
from .files import write_csv, write_json
from .run import Run, add_resume, curves, progress

#: Ours, by name; nothing about them depends on the task.
METHODS: dict[str, Callable[..., bilevel.Method]] = {
    "bisls-adam": lambda **options: bilevel.bisls("adam", **options),
    "bisls-sgd": lambda **options: bilevel.bisls("sgd", **options),
    "bisps": lambda **options: bilevel.bisps(**options),
}

#: Outer steps by direction, and inner steps: every pair is a run.
GRIDS: dict[str, tuple[dict[str, tuple[float, ...]], tuple[float, ...]]] = {
    "none": ({}, ()),
    "tiny": ({"adam": (1e-3, 1e-2), "sgd": (1e-1, 1e0)}, (1e-1,)),
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


def add_methods(parser: ArgumentParser) -> None:
    """The options of a comparison of several of our methods."""
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"those to run, of {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--inner-steps", type=positive, default=10, help="inner steps per outer iteration"
    )
    add_arguments(parser)


def add_arguments(parser: ArgumentParser) -> None:
    """The options that every comparison has."""
    add_resume(parser)
    parser.add_argument(
        "--grid",
        type=_grid,
        default="small",
        metavar="GRID",
        help="hand-tuned steps to compare with, every pair of them a run of its own: "
        + ", ".join(f"{name} {len(cells(name))} runs" for name in GRIDS)
        + "; or one pair, direction outer/inner, such as 'adam 0.001/0.1'",
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


def _grid(text: str) -> str:
    """A grid by name or the one cell that it is, as an option's type."""
    if text not in GRIDS and _cell(text) is None:
        raise ArgumentTypeError(
            f"{text!r} is neither one of {', '.join(GRIDS)} nor a pair of steps, such as "
            f"'adam 0.001/0.1'"
        )
    return text


def _cell(text: str) -> Cell | None:
    """What ``str`` of a cell says, read back."""
    direction, _, steps = text.partition(" ")
    try:
        outer, inner = map(float, steps.split("/"))
    except ValueError:
        return None
    known = direction in ("adam", "sgd") and all(0 < step < math.inf for step in (outer, inner))
    return Cell(direction, outer, inner) if known else None


def cells(grid: str) -> list[Cell]:
    """The runs of a grid; or of the one cell that it names."""
    if cell := _cell(grid):
        return [cell]
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
        score: what is compared, the lower the better: a key of the marks.
        result: what ``bilevel.solve`` returned; None while it runs.
        marks: where it was measured: the iterations done, the cost so far, and what was measured.
    """

    name: str
    cell: Cell | None = None
    score: str = "validation_loss"
    result: Result | None = None
    marks: list[dict[str, float]] = field(default_factory=list)

    @property
    def final(self) -> float:
        """The score at the end; infinite where that is no number."""
        value = self.marks[-1][self.score]
        return value if math.isfinite(value) else math.inf

    def row(self) -> dict[str, Any]:
        """For the table of methods."""
        assert self.result is not None
        return {"method": self.name, **self.marks[-1], "stopped": stopped(self.result)}


def stopped(result: Result) -> str:
    """Why a run ended early; empty where it did not."""
    return "" if result.reason.startswith("all ") else result.reason


#: Solves the problem by a method, handing these on to ``bilevel.solve``: steps, seed, callback, ...
Solve = Callable[..., Result]
#: (x, y) -> numbers by name, the score among them.
Measure = Callable[[Any, Any], Mapping[str, float]]


def compare(
    run: Run,
    options: Namespace,
    solve: Callable[..., Result],
    measure: Measure,
    score: str = "validation_loss",
    marks: int = 20,
) -> tuple[list[Attempt], list[Attempt]]:
    """Our methods, ``options.methods``, and the cells of ``options.grid``, measured less often.

    Args:
        solve: ``solve(method, **manners)`` runs ``bilevel.solve(..., method=method, **manners)``.
        measure, score, marks: as for :func:`attempt`.
    """

    def one(name: str, method: bilevel.Method, cell: Cell | None = None) -> Attempt:
        def run_it(**manners: Any) -> Result:
            return solve(method, **manners)

        often = marks if cell is None else max(1, marks // 4)
        return attempt(run, name, run_it, measure, options, cell, often, score)

    ours = [one(name, METHODS[name]()) for name in dict.fromkeys(options.methods)]
    grid = [
        one(str(cell), cell.method(), cell)
        for cell in progress(cells(options.grid), desc="grid", quiet=options.quiet)
    ]
    return ours, grid


def attempt(
    run: Run,
    name: str,
    solve: Solve,
    measure: Measure,
    options: Namespace,
    cell: Cell | None = None,
    marks: int = 20,
    score: str = "validation_loss",
) -> Attempt:
    """Run a method, write its history, and measure it about ``marks`` times on the way.

    With ``options.resume``, a finished attempt is read, and one that was interrupted goes on from
    its checkpoint: the history, the marks and the result are those of an uninterrupted run, the
    seconds apart.

    Args:
        solve: runs with the manners that it is given; see :data:`Solve`.
        measure: the score among them. Its time is not the method's: records count the seconds of
            the steps alone.
        options: of the task: steps, seed, quiet, resume.
        score: what is compared, and the history's last column.
    """
    steps = options.steps
    out = Attempt(name, cell, score)
    memory = Memory(run, name, steps, options.resume)
    out.marks = memory.marks
    every = max(1, steps // marks)

    def mark(state: Any, record: Record) -> None:
        row: dict[str, Any] = {"run": name, **record.asdict(), score: None}
        done = record.k + 1
        if done % every == 0 or done in (1, steps):
            measured = measure(state.x, state.y)
            row[score] = measured[score]
            out.marks.append({"iterations": done, **cost(record), **measured})
            memory.write()
        run.record(row)

    manners = {
        "seed": options.seed,
        "checkpoint": memory.checkpoint,
        "checkpoint_every": every,
        "progress": False if options.quiet else None,
    }
    if memory.reason is not None or memory.missing:
        # nothing is left to do, or the kill came between the checkpoint and its row
        out.result = solve(**manners, steps=memory.done, resume=True)
        if memory.missing:
            mark(out.result.state, out.result.history[-1])
    if memory.reason is not None:
        assert out.result is not None
        out.result = replace(out.result, reason=memory.reason)
        return out
    out.result = solve(**manners, steps=steps, resume=memory.done > 0, callback=mark)
    if out.result.reason.startswith("interrupted"):
        raise KeyboardInterrupt
    if out.result.history and stopped(out.result):
        # where a run broke off: its last record, of which no callback is told, and its last good
        # point
        last = out.result.history[-1]
        recorded = sum(row["run"] == name for row in run.rows)
        if recorded < len(out.result.history):
            run.record({"run": name, **last.asdict(), score: None})
        measured = measure(out.result.x, out.result.y)
        out.marks.append({"iterations": last.k + 1, **cost(last), **measured})
    memory.write(out.result.reason)
    return out


class Memory:
    """What ``attempts`` in the run's folder holds of one attempt, and its rows in the history.

    What the history has no rows of did not happen: files that an older run left behind are not
    taken for this one's.

    Args:
        run: whose rows are cut back to those that the checkpoint knows of.
        name: of the attempt.
        steps: outer iterations that it is to take.
        resume: whether to look for an interrupted run at all.

    Attributes:
        done: iterations in the checkpoint.
        missing: whether the last of them has no row in the history yet.
        reason: why the attempt ended; None where it has not.
        marks: what was measured up to there.
    """

    def __init__(self, run: Run, name: str, steps: int, resume: bool) -> None:
        folder = run.folder / "attempts"
        folder.mkdir(exist_ok=True)
        stem = re.sub(r"[^\w.+-]+", "-", name)
        self.checkpoint, self.path = folder / f"{stem}.pt", folder / f"{stem}.json"
        self.options = {key: value for key, value in run.config.items() if key != "steps"}
        self.steps, self.done, self.missing = steps, 0, False
        self.reason: str | None = None
        self.marks: list[dict[str, float]] = []
        named = [row["run"] == name for row in run.rows]
        first = named.index(True) if any(named) else len(named)
        if resume and self.path.exists() and self.checkpoint.exists():
            self._read(sum(named))
        if self.reason is None:
            run.keep(first + min(self.done, sum(named)))
        if self.done == 0:
            self.checkpoint.unlink(missing_ok=True)
            self.write()

    def _read(self, rows: int) -> None:
        saved = json.loads(self.path.read_text(encoding="utf-8"))
        done = load_checkpoint(self.checkpoint)["k"]
        if saved["options"] != self.options or rows < done - 1 or done == 0:
            return
        if saved["steps"] != self.steps:
            raise ValueError(
                f"--resume --steps {self.steps}: the run in {self.path.parents[1]} was to take "
                f"{saved['steps']} steps, at which its methods are compared; give that number, or "
                f"another folder with --out"
            )
        self.done, self.missing, self.reason = done, rows < done, saved["reason"]
        marks = [{key: float(value) for key, value in mark.items()} for mark in saved["marks"]]
        self.marks = [
            {**mark, **{key: int(mark[key]) for key in COUNTS}}
            for mark in marks
            if mark["iterations"] <= done - self.missing
        ]

    def write(self, reason: str | None = None) -> None:
        content = {"options": self.options, "steps": self.steps, "reason": reason}
        write_json(self.path, {**content, "marks": self.marks})


COUNTS = ("iterations", "gradients", "hessian_products", "loss_evaluations")


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
    """The one with the lowest score, a validation loss: the test set has no say in it."""
    return min(attempts, key=lambda a: a.final, default=None)


def best_by_direction(grid: Sequence[Attempt]) -> list[Attempt]:
    """The best cell of each direction."""
    directions = dict.fromkeys(a.cell.direction for a in grid if a.cell)
    found = (best(a for a in grid if a.cell and a.cell.direction == d) for d in directions)
    return [a for a in found if a]


def report_grid(run: Run, grid: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Write ``grid.csv``, every cell of the grid; returns its rows, best first."""
    rows: list[dict[str, Any]] = []
    for a in sorted(grid, key=lambda a: a.final):
        assert a.cell is not None
        rows.append({"direction": a.cell.direction, "outer step": a.cell.outer_step,
                     "inner step": a.cell.inner_step, **a.row()})  # fmt: skip
        del rows[-1]["method"]
    if rows:
        write_csv(run.folder / "grid.csv", list(rows[0]), rows)
    return rows


def draw(
    run: Run,
    shown: Sequence[Attempt],
    title: str,
    log_y: bool = True,
    label: str = "validation loss",
) -> None:
    """The score against outer iterations, against all evaluations, and against time."""
    for name, key, what in (
        ("iterations", "iterations", "outer iterations"),
        ("work", "work", "gradients + Hessian products + loss evaluations / 3"),
        ("seconds", "seconds", "time of the steps [s]"),
    ):
        series = {a.name: ([m[key] for m in a.marks], [m[a.score] for m in a.marks]) for a in shown}
        path = run.folder / f"{shown[0].score.replace('_', '-')}-{name}.png"
        curves(path, series, what, label, title, log_y)
