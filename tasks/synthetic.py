"""A function whose curvature grows with its gradient, and step sizes that need not know it.

    f(x) = L0 L1^2 / 72 x^4 + L0 / 4 x^2 + f*,    x in R, minimiser 0

is (L0, L1)-smooth: |f''(x)| <= L0 + L1 |f'(x)| (arXiv 2405.15010, section 5). All losses here are
shifted by f*, and the bounds with them, which changes no step and keeps the digits of f(x) - f*.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch

import optim

from .cells import Cells, Result, band, milestones, spread
from .cells import add_arguments as add_common
from .data.batches import generator
from .dog import DoG
from .errors import require
from .figures import panels
from .files import write_csv
from .run import start

SUMMARY = """Minimise an (L0, L1)-smooth function of one variable, for L1 = 1, 10, 100, 1000, by
gradient descent, clipped gradient descent, Polyak, DecSPS, AdaSPS, DoG and the inexact Polyak step.
A panel for each: the gap to the minimum against the iteration."""

DATA = ()
PRESETS: dict[str, dict[str, object]] = {
    "default": {"steps": 1000},
    "paper": {"steps": 1000, "repeats": 1},
    "quick": {"steps": 60, "repeats": 1},
}
SHARPNESS = (1.0, 10.0, 100.0, 1000.0)
RATES = tuple(10.0**-e for e in range(9))
GRIDS = {
    "gradient descent": (math.inf,),
    "clipped GD": (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0),
}
CLOSE = 1e-2  # the gap that iterations are counted to
SOLVED = 1e-16  # gaps below it are alike


class Setting(NamedTuple):
    """Learning rate and clipping norm; None where a method has none."""

    lr: float | None = None
    max_norm: float | None = None


@dataclass(frozen=True)
class Quartic:
    """The function above its minimum, and its derivative."""

    L1: float
    L0: float = 1.0

    def gap(self, x: torch.Tensor) -> torch.Tensor:
        """f(x) - f*."""
        return self.L0 * self.L1**2 / 72 * x**4 + self.L0 / 4 * x**2

    def slope(self, x: torch.Tensor) -> torch.Tensor:
        """f'(x)."""
        return self.L0 * self.L1**2 / 18 * x**3 + self.L0 / 2 * x


class Contender(NamedTuple):
    """How the optimizer is made, from the parameter, the setting and the number of steps; and
    whether it is given f* or the lower bound."""

    make: Callable[[list[torch.Tensor], Any, int], Any]
    knows_minimum: bool = False


METHODS = {
    "gradient descent": Contender(lambda p, s, T: optim.ClippedSGD(p, *s)),
    "clipped GD": Contender(lambda p, s, T: optim.ClippedSGD(p, *s)),
    "Polyak": Contender(lambda p, s, T: optim.SPSPlus(p), knows_minimum=True),
    "DecSPS": Contender(lambda p, s, T: optim.DecSPS(p)),
    "AdaSPS": Contender(lambda p, s, T: optim.AdaSPS(p)),
    "DoG": Contender(lambda p, s, T: DoG(p)),
    "inexact Polyak": Contender(lambda p, s, T: optim.InexactPolyak(p, steps=T)),
}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--minimum", type=float, default=1.0, metavar="F", help="f*; the lower bound is 0")
    add("--start", type=float, default=5.0, metavar="X", help="x_0 of the first repetition")
    add_common(parser, 5, "starts: --start, and others drawn from [1/2, 2] times it")


def run(options: Namespace) -> dict[str, Any]:
    if not 0 <= options.minimum < math.inf:
        raise ValueError(f"--minimum must be at least its lower bound 0, not {options.minimum}")
    if not 0 < abs(options.start) < math.inf:
        raise ValueError(f"--start must be a number other than the solution 0: {options.start}")
    require("matplotlib", "drawing figures")
    run = start(options)
    starts = draw_starts(options.start, options.repeats, options.seed)
    total = len(METHODS) * len(SHARPNESS) * len(starts)
    cells = Cells(run, options.resume, total, options.quiet)
    tuned = {name: product(RATES, norms) for name, norms in GRIDS.items()}
    grid = {name: [Setting(*cell) for cell in tuned[name]] for name in tuned}

    chosen: dict[str, dict[float, tuple[Setting, list[Result]]]] = {}
    for name, L1 in product(METHODS, SHARPNESS):
        setting = search(grid[name], L1, starts, options.steps) if name in grid else Setting()
        results = [
            cells(
                partial(descent, METHODS[name], L1, setting, x, options.steps, options.minimum),
                method=name, L1=L1, **setting._asdict(), steps=options.steps, start=x,
            )
            for x in starts
        ]  # fmt: skip
        chosen.setdefault(name, {})[L1] = setting, results

    ticks = milestones(options.steps)
    panels(
        run.folder / "gap.png",
        {
            name: {
                f"L1 = {L1:g}": band([t + 1 for t in ticks], drawn(results))
                for L1, (_, results) in by_sharpness.items()
            }
            for name, by_sharpness in chosen.items()
        },
        "iteration + 1",
        f"best gap so far, f(x) - f* (at least {SOLVED:g})",
        f"L0 = 1, {len(starts)} starts: median and range",
        log_x=True,
        log_y=True,
        columns=4,
    )
    table = [row(name, L1, *chosen[name][L1]) for name, L1 in product(METHODS, SHARPNESS)]
    write_csv(run.folder / "table.csv", list(table[0]), table)
    return run.summarize(
        {"starts": starts, "iterations": options.steps, "gaps at the end": table,
         "from L1 = 10 to 1000": [growth(name, chosen[name]) for name in METHODS]}
    )  # fmt: skip


def draw_starts(first: float, count: int, seed: int) -> list[float]:
    """``first``, and others with logarithms uniform around it."""
    draws = torch.rand(count, generator=generator(seed), dtype=torch.float64)
    return [first, *(first * 4 ** (draws - 0.5)).tolist()[1:]]


def descent(
    method: Contender, L1: float, setting: Setting, start: float, steps: int, minimum: float
) -> Result:
    """The gaps of one run, and how many iterations until they are below :data:`CLOSE`."""
    f = Quartic(L1)
    x = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    optimizer = method.make([x], setting, steps)
    target = 0.0 if method.knows_minimum else -minimum  # shifted by f*, as the loss
    gaps = []
    for t in range(steps + 1):
        with torch.no_grad():
            gap = f.gap(x)
            gaps.append(gap.item())
            if not math.isfinite(gaps[-1]) or gaps[-1] == 0:
                gaps += [gaps[-1]] * (steps - t)  # it stays there
                break
            x.grad = f.slope(x)
        if t < steps:
            optimizer.step(loss=gap, target=target)
    ticks, best = milestones(steps), list(accumulate(gaps, min))
    return {
        "rows": [{"iteration": t, "gap": gaps[t], "best gap": best[t]} for t in ticks],
        "iterations": next((t for t, gap in enumerate(gaps) if gap <= CLOSE), None),
    }


def search(grid: Sequence[Setting], L1: float, starts: Sequence[float], steps: int) -> Setting:
    """The setting whose final gap from the worst start is smallest; of equal ones the fastest.

    All settings at once; ``optim.ClippedSGD``, with which the chosen one is run, does the same.
    """
    f = Quartic(L1)
    lr, norm = torch.tensor(grid, dtype=torch.float64).T[..., None]
    x = torch.tensor(starts, dtype=torch.float64).expand(len(grid), -1)
    late = torch.zeros_like(x)
    for _ in range(steps):
        g = f.slope(x)
        x = x - lr * (norm / g.abs()).clamp(max=1.0) * g.where(g != 0, 0.0).nan_to_num(math.inf)
        late = late + (f.gap(x) > CLOSE)
    gaps = f.gap(x).nan_to_num(math.inf).clamp(min=SOLVED).amax(1)
    return min(zip(gaps.tolist(), late.amax(1).tolist(), grid, strict=True))[-1]


def drawn(results: Sequence[Result]) -> list[list[float]]:
    return [[max(gap, SOLVED) for gap in best_so_far(r)] for r in results]


def best_so_far(result: Result) -> list[float]:
    return [row["best gap"] for row in result["rows"]]


def row(name: str, L1: float, setting: Setting, results: Sequence[Result]) -> dict[str, Any]:
    """For the table of methods."""
    counts = [r["iterations"] for r in results]
    best = spread("best gap", [best_so_far(r)[-1] for r in results])
    middle = spread("", [math.inf if c is None else c for c in counts])[""]
    return {
        "method": name,
        "L1": L1,
        "lr": setting.lr,
        "clip": setting.max_norm,
        **best,
        "last gap": spread("", [r["rows"][-1]["gap"] for r in results])[""],
        f"iterations to {CLOSE:g}": None if math.isinf(middle) else middle,
        "reached by": f"{sum(c is not None for c in counts)} of {len(counts)}",
    }


def growth(name: str, chosen: dict[float, tuple[Setting, list[Result]]]) -> dict[str, Any]:
    """How much the best gap of the median start grows per decade of L1 >= 10."""
    low, high = SHARPNESS[1], SHARPNESS[-1]
    decades = math.log10(high / low)
    gaps = [spread("", [best_so_far(r)[-1] for r in chosen[L1][1]])[""] for L1 in (low, high)]
    ratio = max(gaps[1], SOLVED) / max(gaps[0], SOLVED)
    return {"method": name, "best gap, times per decade": ratio ** (1 / decades)}
