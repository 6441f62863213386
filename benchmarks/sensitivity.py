"""Final loss against the tuning parameter, over five decades: ``python -m benchmarks sensitivity``.

Every rule has at most one number to set: a learning rate, a cap, a safeguard, a scale. Each is
multiplied by 10^-3 ... 10^2 around 1 (0.01 for methods in Adam's metric); how far the curve stays
flat is how little that number matters. Two problems: logistic regression (convex, not fitted
exactly) and a small network on the digits data. Median and range over seeds of the full training
loss at the point the method returns. Oracle rules get the batch's loss at a reference solution.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import optim

FACTORS = [10.0**e for e in range(-3, 3)]
Loss = Callable[[list[Tensor], Tensor], Tensor]


class Problem(NamedTuple):
    """Losses of a list of parameters on the rows of a batch."""

    name: str
    loss: Loss
    start: Callable[[int], list[Tensor]]
    rows: int
    reference: list[Tensor]


class Row(NamedTuple):
    """A method, with its tuning parameter for a factor of 1."""

    name: str
    panel: str
    make: Callable[..., Any]
    parameter: str
    unit: float = 1.0
    options: dict[str, Any] = {}
    oracle: bool = False


def rows(steps: int) -> list[Row]:
    """The methods in the order of the figure."""
    made = [
        Row("SGD", "hand-tuned", torch.optim.SGD, "lr"),
        Row("Adam", "hand-tuned", torch.optim.Adam, "lr", 0.01),
        Row("ClippedSGD", "hand-tuned", optim.ClippedSGD, "lr", options={"max_norm": 1.0}),
    ]
    try:
        import schedulefree

        made += [
            Row("schedulefree SGD", "hand-tuned", schedulefree.SGDScheduleFree, "lr"),
            Row("schedulefree AdamW", "hand-tuned", schedulefree.AdamWScheduleFree, "lr", 0.01),
        ]
    except ImportError:
        pass
    sf, sf_adam = optim.ScheduleFreeSPS, optim.ScheduleFreeAdamSPS
    return made + [
        Row("SPS", "Polyak", optim.SPS, "max_lr"),
        Row("SPSPlus (oracle)", "Polyak", optim.SPSPlus, "max_lr", oracle=True),
        Row("SafeguardedSPS", "Polyak", optim.SafeguardedSPS, "safeguard"),
        Row("SPSB", "Polyak", optim.SPSB, "max_lr"),
        Row("InexactPolyak", "Polyak", optim.InexactPolyak, "steps", steps),
        Row("DecSPS", "decreasing, searches", optim.DecSPS, "max_lr"),
        Row("AdaSPS", "decreasing, searches", optim.AdaSPS, "c"),
        Row("SLS", "decreasing, searches", optim.SLS, "max_lr"),
        Row("SLSB", "decreasing, searches", optim.SLSB, "max_lr"),
        Row("AdaSLS", "decreasing, searches", optim.AdaSLS, "max_lr"),
        Row("IAM (oracle)", "averaging", optim.IAM, "max_lr", oracle=True),
        Row("IAMAdam (oracle)", "averaging", optim.IAMAdam, "max_lr", 0.1, oracle=True),
        Row("ScheduleFreeSPS (oracle)", "averaging", sf, "max_lr", oracle=True),
        Row("ScheduleFreeSPS (ema)", "averaging", sf, "max_lr", options={"safeguard": "ema"}),
        Row("ScheduleFreeAdamSPS (oracle)", "averaging", sf_adam, "max_lr", 0.01, oracle=True),
        Row(
            "ScheduleFreeAdamSPS (ema)", "averaging", sf_adam, "max_lr", 0.01,
            {"safeguard": "ema"},
        ),
    ]  # fmt: skip


def logistic() -> Problem:
    """Logistic regression with 20 features of unequal scale and a tenth of the labels flipped."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 20, generator=g) * torch.logspace(-1, 0.5, 20)
    y = (x @ torch.randn(20, generator=g) > 0).float()
    y = torch.where(torch.rand(500, generator=g) < 0.1, 1 - y, y)

    def loss(w: list[Tensor], i: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(x[i] @ w[0], y[i])

    def start(seed: int) -> list[Tensor]:
        return [torch.randn(20, generator=torch.Generator().manual_seed(seed))]

    solution = [torch.zeros(20, requires_grad=True)]
    newton = torch.optim.LBFGS(solution, max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        newton.zero_grad()
        value = loss(solution, torch.arange(500))
        value.backward()
        return value

    newton.step(closure)
    return Problem("logistic regression", loss, start, 500, solution)


def network() -> Problem:
    """64-32-10 perceptron on the digits that ship inside scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)

    def loss(w: list[Tensor], i: Tensor) -> Tensor:
        return cross_entropy((x[i] @ w[0] + w[1]).relu() @ w[2] + w[3], y[i])

    def start(seed: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        return [
            torch.randn(64, 32, generator=g) / 8, torch.zeros(32),
            torch.randn(32, 10, generator=g) / math.sqrt(32), torch.zeros(10),
        ]  # fmt: skip

    teacher = [p.requires_grad_() for p in start(99)]
    adam = torch.optim.Adam(teacher, lr=0.01)
    for _ in range(300):
        adam.zero_grad()
        loss(teacher, torch.arange(len(y))).backward()
        adam.step()
    return Problem("network on digits", loss, start, len(y), teacher)


def final_loss(problem: Problem, row: Row, factor: float, seed: int, steps: int) -> float:
    """Full training loss at the returned point, inf where it is not finite."""
    params = [torch.nn.Parameter(p) for p in problem.start(seed)]
    value = row.unit * factor
    if row.parameter == "steps":
        value = max(1, round(value))
    optimizer = row.make(params, **{row.parameter: value}, **row.options)
    ours, search = row.make.__module__.startswith("optim"), row.panel.startswith("dec")
    search = search and hasattr(optim, row.name) and "SLS" in row.name
    if hasattr(optimizer, "train"):
        optimizer.train()
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(problem.rows, (20,), generator=g)
        if search:
            optimizer.step(lambda batch=batch: problem.loss(params, batch))
            continue
        optimizer.zero_grad()
        loss = problem.loss(params, batch)
        loss.backward()
        with torch.no_grad():
            target = problem.loss(problem.reference, batch) if row.oracle else None
        optimizer.step(**({"loss": loss, "target": target} if ours else {}))
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    with torch.no_grad():
        result = float(problem.loss(params, torch.arange(problem.rows)))
    return result if math.isfinite(result) else math.inf


def draw(results: dict[str, Any], made: list[Row], path: str) -> None:
    """One row of panels per problem, one column per family."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(row.panel for row in made))
    figure, axes = plt.subplots(
        len(results), len(panels), figsize=(4 * len(panels), 3.6 * len(results)),
        sharex=True, sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, (name, result) in zip(axes, results.items(), strict=True):
        top = 2 * result["initial"]
        for axis, panel in zip(line, panels, strict=True):
            for row in made:
                if row.panel == panel:
                    runs = [[min(v, top) for v in values] for values in result["final"][row.name]]
                    middle = [statistics.median(v) for v in runs]
                    (curve,) = axis.plot(FACTORS, middle, ".-", label=row.name)
                    low, high = [min(v) for v in runs], [max(v) for v in runs]
                    axis.fill_between(FACTORS, low, high, alpha=0.15, color=curve.get_color())
            axis.axhline(result["reference"], color="gray", linestyle=":", linewidth=1)
            axis.set(xscale="log", yscale="log", title=f"{name}: {panel}")
            axis.legend(fontsize=6)
        line[0].set_ylabel("final training loss")
    for axis in axes[-1]:
        axis.set_xlabel("tuning parameter / its unit")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sensitivity",
        description="Final loss against the tuning parameter of every method.",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="docs/optim_sensitivity", help="path without suffix")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    made, results = rows(args.steps), {}
    for problem in (logistic(), network()):
        everything = torch.arange(problem.rows)
        with torch.no_grad():
            reference = float(problem.loss(problem.reference, everything))
            initial = float(problem.loss(problem.start(0), everything))
        final = {}
        for row in made:
            final[row.name] = [
                [final_loss(problem, row, f, seed, args.steps) for seed in range(args.seeds)]
                for f in FACTORS
            ]
            print(
                f"{problem.name:20} {row.name:30}",
                *(f"{statistics.median(v):9.3g}" for v in final[row.name]),
                flush=True,
            )
        results[problem.name] = {"reference": reference, "initial": initial, "final": final}
    units = {row.name: [row.parameter, row.unit] for row in made}
    record = {"steps": args.steps, "factors": FACTORS, "units": units, "problems": results}
    with open(args.out + ".json", "w") as file:
        json.dump(record, file, indent=1)
    draw(results, made, args.out + ".png")


if __name__ == "__main__":
    main()
