"""Comparisons of many short runs: what is finished is kept, and not computed again on resuming."""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .__main__ import positive
from .figures import Curve
from .files import write
from .run import Run, add_resume, progress

Result = dict[str, Any]
MODEL = "model.pt"  # the best of the models that were trained, where they are worth keeping


class Cells:
    """The results of a comparison's runs, one line each in ``cells.jsonl``.

    ``cells(compute, method="sgd", lr=0.1)`` is the result of ``compute()``, or the one that an
    interrupted comparison has kept under that key. ``rows`` in a result go into the history, with
    the key in front, so that an interrupted comparison and an uninterrupted one write the same.

    Args:
        run: its folder.
        resume: whether results are taken over.
        total: of the runs, for the progress bar.
        quiet: no bar.
    """

    def __init__(self, run: Run, resume: bool, total: int, quiet: bool) -> None:
        self.run, self.path = run, run.folder / "cells.jsonl"
        self._kept: dict[str, Result] = {}
        run.keep(0)  # the rows come again from the results
        if resume and self.path.exists():
            self._kept = dict(_whole_lines(self.path))
            lines = [json.dumps([key, result]) for key, result in self._kept.items()]
            write(self.path, "".join(line + "\n" for line in lines).encode())
        else:
            for left in (self.path, run.folder / MODEL):
                left.unlink(missing_ok=True)
        self._bar = iter(progress(range(total), total, "runs", quiet))

    def __call__(self, compute: Callable[[], Result], **key: Any) -> Result:
        name = json.dumps(key)
        if name not in self._kept:
            line = json.dumps([name, compute()])
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._kept[name] = json.loads(line)[1]
        for row in self._kept[name].get("rows", ()):
            self.run.record({**key, **row})
        next(self._bar, None)
        return self._kept[name]


def _whole_lines(path: Path) -> Iterable[tuple[str, Result]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            key, result = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            return
        yield key, result


def add_arguments(parser: ArgumentParser, repeats: int, what: str) -> None:
    """The options that every comparison of single-level optimizers has."""
    parser.add_argument("--repeats", type=positive, default=repeats, help=what)
    add_resume(parser)


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of repeated measurements, as columns of a table."""
    ordered = sorted(values)
    return {name: statistics.median(ordered), "from": ordered[0], "to": ordered[-1]}


def band(xs: Sequence[float], runs: Sequence[Sequence[float]]) -> Curve:
    """The median of several runs at each x, and the range between them."""
    columns = [sorted(column) for column in zip(*runs, strict=True)]
    medians = [statistics.median(column) for column in columns]
    return xs, medians, [c[0] for c in columns], [c[-1] for c in columns]


def milestones(steps: int, count: int = 40) -> list[int]:
    """Whole numbers from 0 to ``steps``, about ``count`` of them, evenly on a logarithmic scale."""
    return sorted({0, steps, *(round(steps ** (i / count)) for i in range(count))})
