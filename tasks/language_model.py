"""Pre-training of language models by optimizers whose step sizes set themselves.

GPT-2, an LSTM or T5 learn the next token of a text: schedule-free Adam with Polyak steps
(SF-Adam-SPS, lower bound 0, with a constant and a moving safeguard; arXiv 2511.07767) and the
inexact Polyak step (arXiv 2405.15010), which have no learning rate, against AdamW, schedule-free
AdamW and clipped SGD over a grid of learning rates.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import optim

from .cells import MODEL, Cells, Result, band, spread
from .cells import add_arguments as add_common
from .data.tokens import Tokens
from .dog import DoG
from .errors import require
from .figures import Curve
from .language_models import MODELS, SIZES
from .models import seeded
from .run import Run, curves, start
from .training import (
    DATA as DATA,
)
from .training import (
    PRECISIONS,
    Contender,
    Fit,
    add_text_arguments,
    count_parameters,
    installed,
    linear,
    schedulefree_adamw,
    stable,
    tokens,
    training_batches,
    validation_batches,
    warmup,
)

SUMMARY = """Pre-train a language model on a text: SF-Adam-SPS and the inexact Polyak step, which
have no learning rate, against AdamW, schedule-free AdamW and clipped SGD over a grid of learning
rates. The default is a small model of the characters of tiny-shakespeare."""

PAPER: dict[str, object] = {
    "size": "124m", "steps": 20856, "context": 1024, "batch": 12, "accumulate": 40,
    "precision": "bf16", "tokenizer": "gpt2", "checkpoint_every": 500, "repeats": 1,
}  # fmt: skip
PRESETS: dict[str, dict[str, object]] = {
    "default": {"steps": 200},
    "paper": PAPER,
    "paper-355m": {**PAPER, "size": "355m"},
    "quick": {"steps": 6, "context": 16, "batch": 4, "checkpoint_every": 2},
}
ADAM_RATES = (1e-3, 3e-3, 1e-2)
SGD_RATES = (0.01, 0.1, 1.0, 10.0)
DECAY = 0.1  # of the weights, where an optimizer has it


def adamw(parameters: Any, rate: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=DECAY)


def sf_adam_sps(safeguard: float | str, parameters: Any, rate: None, steps: int) -> Any:
    return optim.ScheduleFreeAdamSPS(
        parameters, betas=(0.9, 0.98), safeguard=safeguard, warmup_steps=warmup(steps),
        weight_decay=DECAY,
    )  # fmt: skip


METHODS: dict[str, Contender] = {
    "SF-Adam-SPS, M = 1": Contender(partial(sf_adam_sps, 1.0)),
    "SF-Adam-SPS, M = 100": Contender(partial(sf_adam_sps, 100.0)),
    "SF-Adam-SPS, moving M": Contender(partial(sf_adam_sps, "ema")),
    "inexact Polyak": Contender(lambda p, rate, steps: optim.InexactPolyak(p, steps)),
    "DecSPS": Contender(lambda p, rate, steps: optim.DecSPS(p)),
    "AdaSPS": Contender(lambda p, rate, steps: optim.AdaSPS(p)),
    "Polyak, f* = 0": Contender(lambda p, rate, steps: optim.SPS(p)),
    "DoG": Contender(lambda p, rate, steps: DoG(p), ours=False),
    "AdamW, linear decay": Contender(adamw, ADAM_RATES, linear, clip=1.0, ours=False),
    "AdamW, warmup-stable": Contender(adamw, ADAM_RATES, stable, clip=1.0, ours=False),
    "schedule-free AdamW": Contender(
        partial(schedulefree_adamw, betas=(0.9, 0.98), weight_decay=DECAY),
        ADAM_RATES, ours=False, package="schedulefree",
    ),
    "clipped SGD": Contender(
        lambda p, rate, steps: optim.ClippedSGD(p, rate, max_norm=1.0), SGD_RATES
    ),
    "SGD": Contender(lambda p, rate, steps: torch.optim.SGD(p, rate), SGD_RATES, ours=False),
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=MODELS, default="gpt", help="T5: the second half of each row from the "
        "first")  # fmt: skip
    sizes = "; ".join(f"{name}: {', '.join(sizes)}" for name, sizes in SIZES.items())
    add("--size", default="small", help=f"of the model ({sizes})")
    add("--dropout", type=float, default=0.0, help="in [0, 1)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"those to run, of {', '.join(map(repr, METHODS))}")  # fmt: skip
    add_text_arguments(parser)
    add_common(parser, 1, "seeds of every run")


def run(options: Namespace) -> dict[str, Any]:
    require("matplotlib", "drawing figures")
    size = SIZES[options.model].get(options.size)
    if size is None:
        raise ValueError(
            f"--size {options.size!r}: the sizes of {options.model} are "
            f"{', '.join(SIZES[options.model])}"
        )
    if not 0 <= options.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), not {options.dropout}")
    methods, missing = installed({name: METHODS[name] for name in options.methods})
    run = start(options)
    data = tokens(run, options)

    def fresh(seed: int) -> nn.Module:
        with seeded(seed, 1):
            model = MODELS[options.model](size, data.vocabulary, options.context, options.dropout)
        return model.to(options.device)

    results = compare(run, options, data, methods, fresh)
    chosen = {name: best(results, name) for name in methods}
    title = f"{options.model}, {options.repeats} seed(s): median and range"
    draw_losses(run, options, results, chosen, title)
    draw_sensitivity(run, results, methods, title)
    return run.summarize(
        {
            "data": repr(data),
            "parameters": count_parameters(fresh(0)),
            "tokens per step": options.batch * options.accumulate * options.context,
            **({"missing": "; ".join(missing)} if missing else {}),
            **tables(results, chosen, "validation loss", "rate"),
        }
    )  # fmt: skip


Results = dict[tuple[str, float | None], list[Result]]


def compare(
    run: Run,
    options: Namespace,
    data: Tokens,
    methods: dict[str, Contender],
    fresh: Callable[[int], nn.Module],
    teacher: Callable[..., Any] | None = None,
    cells: Cells | None = None,
    **what: Any,
) -> Results:
    """Every method at every rate with every seed.

    Args:
        fresh: seed -> a new model; each seed has its own order of the batches too.
        teacher: batch -> target, for the oracles.
        cells: of a comparison that this one belongs to; None: one of its own.
        what: more of what tells these runs from others.
    """
    plan = [(name, rate) for name, m in methods.items() for rate in (m.rates or (None,))]
    cells = cells or Cells(run, options.resume, len(plan) * options.repeats, options.quiet)
    validation = validation_batches(data, options)
    results: Results = {}
    for seed in range(options.seed, options.seed + options.repeats):
        for name, rate in plan:
            key = {"method": name, "rate": rate, "seed": seed, "steps": options.steps, **what}

            def fit(key: dict[str, Any] = key) -> Result:
                torch.manual_seed(key["seed"])  # of dropout
                training = Fit(
                    fresh(key["seed"]), methods[key["method"]], key["rate"],
                    training_batches(data, options, key["seed"]), validation, options.steps,
                    options.accumulate, teacher, PRECISIONS[options.precision],
                    run.folder / "checkpoint.pt", options.checkpoint_every, key,
                )  # fmt: skip
                result = training(options.resume)
                training.keep_best(run.folder / MODEL, finals([result])[0])
                return result

            results.setdefault((name, rate), []).append(cells(fit, **key))
    return results


def tables(
    results: Results, chosen: dict[str, float | None], loss: str, rate: str
) -> dict[str, list[dict[str, Any]]]:
    """Of a summary: the chosen rate of each method, and all rates; ``loss`` and ``rate`` name
    the tables and the column of rates."""
    return {
        loss: [
            {
                "method": name, rate: value,
                **spread("loss", finals(results[name, value])),
                "first step": steps(results[name, value], 0),
                "last step": steps(results[name, value], -1),
            }
            for name, value in chosen.items()
        ],
        f"{loss} over the grid": [
            {"method": name, rate: value, **spread("loss", finals(runs))}
            for (name, value), runs in results.items()
        ],
    }  # fmt: skip


def finals(results: Sequence[Result]) -> list[float]:
    """The validation losses at the end."""
    return [result["rows"][-1]["validation loss"] for result in results]


def steps(results: Sequence[Result], index: int) -> float | None:
    """The median step size in the first or last row after a step; None where none was recorded."""
    sizes = [result["rows"][1:][index]["step size"] for result in results]
    return None if None in sizes else spread("", sizes)[""]


def best(results: Results, name: str) -> float | None:
    """The rate with the lowest median of the final validation losses."""
    rates = [rate for method, rate in results if method == name]
    return min(rates, key=lambda rate: spread("", finals(results[name, rate]))[""])


def label(name: str, rate: float | None) -> str:
    return name if rate is None else f"{name}, {rate:g}"


def draw_losses(
    run: Run, options: Namespace, results: Results, chosen: dict[str, float | None], title: str
) -> None:
    """Validation loss and step size on the way, every method at its best rate."""
    per_step = options.batch * options.accumulate * options.context
    for file, column, y_label in (
        ("validation-loss", "validation loss", "validation loss [nats per token]"),
        ("step-size", "step size", "step size"),
    ):
        series = {}
        for name, rate in chosen.items():
            runs = [r["rows"] for r in results[name, rate]]
            shortest = min(runs, key=len)
            first = 0 if column == "validation loss" else 1
            xs = [row["step"] * per_step for row in shortest][first:]
            ys = [[row[column] or 0.0 for row in rows[first : len(shortest)]] for rows in runs]
            series[label(name, rate)] = band(xs, ys)
        path = run.folder / f"{file}.png"
        curves(path, series, "tokens", y_label, title, log_y=True)


def draw_sensitivity(
    run: Run,
    results: Results,
    methods: dict[str, Contender],
    title: str,
    rate: str = "learning rate",
) -> None:
    """Final validation loss against the ``rate``; flat lines where there is none."""
    rates = sorted({rate for _, rate in results if rate is not None}) or [1.0]
    begin = max(r["rows"][0]["validation loss"] for runs in results.values() for r in runs)
    series: dict[str, Curve] = {}
    for name, method in methods.items():
        xs = method.rates or (rates[0], rates[-1])
        runs = [finals(results[name, rate if method.rates else None]) for rate in xs]
        capped = [[min(value, 1.5 * begin) for value in values] for values in runs]
        series[name] = band(xs, list(zip(*capped, strict=True)))
    flat = any(not method.rates for method in methods.values())
    x_label = f"{rate} (flat lines: none)" if flat else rate
    curves(
        run.folder / "sensitivity.png", series, x_label,
        "final validation loss [nats per token]", title, log_x=True, log_y=True,
    )  # fmt: skip
