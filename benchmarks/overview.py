"""All that ``contest`` has measured: a picture, and tables.

Each method's mean objective beside that of the best cell, relative to its size. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.contest import OURS, Cell
from benchmarks.report import table

CLOSE = 1.0  # per cent, which count as level
FARTHEST = 100.0  # per cent that are drawn; what is farther stands at the edge

Problem = dict[str, dict[str, Any]]  # by method, 'cell' for the best of fixed steps


def measured(folder: Path) -> dict[str, dict[str, Problem]]:
    """Rows by file, problem and method."""
    files: dict[str, dict[str, Problem]] = {}
    for path in sorted(folder.glob("contest*.json")):
        problems = files.setdefault(path.stem, {})
        for row in json.loads(path.read_text())["rows"]:
            method = Cell.parse(row["method"]).method
            name = "cell" if method in ("adam", "sgd") else method
            problems.setdefault(row["problem"], {})[name] = row
    return files


def beside(problem: Problem, method: str) -> float:
    """Per cent by which a method ends above the best cell; NaN where it was not run."""
    cell, row = problem["cell"]["objective"], problem.get(method)
    return math.nan if row is None else 100 * (row["objective"] - cell) / abs(cell)


def shown(row: dict[str, Any]) -> str:
    return f"{row['objective']:.3g} ({row['best seed']:.3g} to {row['worst seed']:.3g})"


def rows(problems: dict[str, Problem]) -> list[dict[str, str]]:
    """One of each problem."""
    return [
        {
            "problem": name,
            "`bisls-adam`": shown(of["bisls-adam"]),
            **{f"`{m}`": f"{of[m]['objective']:.3g}" if m in of else "" for m in OURS[1:]},
            "best cell": f"{shown(of['cell'])}, {of['cell']['method']}",
            "above it by, %": f"{beside(of, 'bisls-adam'):.1f}",
            "trials": f"{of['bisls-adam']['trials']:.1f}",
            "products": f"{of['bisls-adam']['products']:.0f}",
        }
        for name, of in problems.items()
    ]


def draw(problems: dict[str, Problem], path: Path) -> None:
    """A row for each problem, that on which the default gains most at the top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(problems, key=lambda name: -beside(problems[name], "bisls-adam"))
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.19 * len(names)), layout="constrained")
    axis.axvspan(-CLOSE, CLOSE, color="0.85")
    axis.axvline(0, color="0.4", linewidth=1)
    styles = {"bisps": ("x", "0.6", 20), "bisls-sgd": ("o", "tab:orange", 20)}
    for method, (marker, color, size) in {**styles, "bisls-adam": ("o", "tab:blue", 45)}.items():
        found = [beside(problems[name], method) for name in names]
        inside = [min(value, FARTHEST) for value in found]
        axis.scatter(inside, range(len(names)), size, color, marker=marker, label=method, zorder=2)
        for y, value in enumerate(found):
            if value > FARTHEST and method == "bisls-adam":
                axis.text(FARTHEST - 3, y, f"{value:.0f} %", ha="right", va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(-1, len(names))
    axis.set_xlim(-FARTHEST - 4, FARTHEST + 4)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_xlabel("objective above that of the best cell, % of it (at the edge: more)")
    axis.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=Path("docs/measured"))
    parser.add_argument("--figure", type=Path, default=Path("docs/contest.png"))
    options = parser.parse_args(argv)
    files = measured(options.measured)
    if not files:
        parser.error(f"no contest*.json in {options.measured}; run python -m benchmarks contest")
    for file, problems in files.items():
        print(f"\n{file}\n\n{table(rows(problems))}")
    every = {name: of for problems in files.values() for name, of in problems.items()}
    apart = [beside(of, "bisls-adam") for of in every.values()]
    lower, level = sum(a < -CLOSE for a in apart), sum(abs(a) <= CLOSE for a in apart)
    print(
        f"\n{len(apart)} problems: the default is lower by more than {CLOSE:g} % on {lower}, "
        f"within that on {level}, higher on {len(apart) - lower - level}"
    )
    draw(every, options.figure)
    print(f"drawn to {options.figure}")
