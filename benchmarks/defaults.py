"""Why the defaults are what they are: each choice beside its alternatives."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import bilevel
from benchmarks.larger import EVERY
from benchmarks.problems import INNER, STEPS, Case, distillation, outcome, representation
from benchmarks.report import write
from bilevel.hypergradients import Course, Estimate, Followed, Implicit
from bilevel.linear import UNTAUGHT, Product
from bilevel.method import Method
from bilevel.presets import DEFAULT, SEARCHED_ADAM
from bilevel.rules import Adam, Armijo, Fixed

# a default must not fail where batches are small, which is where most alternatives do
PROBLEMS: dict[str, Callable[[int], Case]] = {
    **EVERY,
    "distillation, batch 8": lambda seed: distillation(seed, 8),
    "distillation, batch 16": lambda seed: distillation(seed, 16),
    "hyper-representation, batch 16": lambda seed: representation(seed, 16),
}
SHOWN = ["ridge, condition 1e4", "distillation, batch 64", "distillation, batch 16"]
SHOWN += ["hyper-representation"]


class Convex(bilevel.ConjugateGradient):
    """As if g_yy were positive definite: what there is before a direction of negative curvature."""

    def __call__(self, product: Product, b: Tensor, q0: Tensor | None = None) -> Tensor:
        return self._steps(product, b, q0, UNTAUGHT)[0]


def cg(steps: int, rtol: float | Literal["auto"]) -> bilevel.Implicit:
    return bilevel.Implicit(bilevel.ConjugateGradient(steps, rtol), average="auto")


@dataclass(frozen=True)
class Following(Implicit):
    """The default's hypergradient, where a search takes y for straight, or goes on from where it
    is bent."""

    field: Literal["y", "bent"] = "y"

    def estimate(self, *args: Any) -> Estimate:
        h = super().estimate(*args)
        respond = h.respond

        def followed(d: Tensor, *first: Any) -> Course:
            course = respond(d, *first)

            def follow(t: float | Tensor, xt: Tensor) -> Followed:
                there = course.follow(t, xt)
                only = getattr(there, self.field)
                return there._replace(y=only, bent=only)

            return course._replace(follow=follow)

        h.respond = followed
        return h


class Strict(Implicit):
    """The default's hypergradient, where following x may cost g nothing."""

    def estimate(self, *args: Any) -> Estimate:
        h = super().estimate(*args)
        respond = h.respond
        h.respond = lambda d, first=False, margin=0.0: respond(d, first)
        return h


class Grounded(Method):
    """Without leaps over kinks."""

    def may_leap(self, state: bilevel.State) -> bool:
        return False


class Going(Method):
    """Whose x goes on while systems are left unsolved."""

    def may_stay(self, state: bilevel.State) -> bool:
        return False


def variants() -> dict[str, Method]:
    """The default of BiSLS-Adam with one thing changed at a time."""
    default = bilevel.bisls("adam")
    searched, inner = default.outer_rule, default.inner_rule
    assert isinstance(searched, Armijo) and isinstance(inner, Armijo)

    def armijo(**changes: Any) -> Method:
        return replace(default, outer_rule=replace(searched, **changes))

    def following(field: Literal["y", "bent"]) -> Implicit:
        assert isinstance(default.hypergradient, Implicit)
        return Following(default.hypergradient.solver, average="auto", field=field)

    def adam(**changes: Any) -> Method:
        return replace(default, direction=replace(SEARCHED_ADAM, **changes))

    return {
        "bisls-adam": default,
        "bisls-sgd": bilevel.bisls("sgd"),
        "bisps": bilevel.bisps(),
        "response frozen": bilevel.bisls("adam", response="frozen"),
        "response refine": bilevel.bisls("adam", response="refine"),
        "response refine, slack 0.01": bilevel.bisls("adam", slack=0.01, response="refine"),
        "y straight": replace(default, hypergradient=following("y")),
        "y bent": replace(default, hypergradient=following("bent")),
        "g may lose nothing": replace(
            default, hypergradient=Strict(DEFAULT.solver, average="auto")
        ),
        "kinks kept": replace(default, rounds=False),
        "no leaps": Grounded(**vars(default)),
        "x never stays": Going(**vars(default)),
        "1 outer batch": replace(default, outer_batches=1),
        "8 outer batches": replace(default, outer_batches=8),
        "c = 0.1": armijo(c=0.1),
        "c = 0.3": armijo(c=0.3),
        "c = 0.5": armijo(c=0.5),
        "c = 2/3": armijo(c=2 / 3),
        "inner c = 0.5": replace(default, inner_rule=replace(inner, c=0.5)),
        "inner c = 0.9": replace(default, inner_rule=replace(inner, c=0.9)),
        "slack 0.01": armijo(slack=0.01),
        "inner steps fixed at 0.3": replace(default, inner_rule=Fixed(0.3)),
        "retain 0": armijo(retain=0.0),
        "retain 1/2": armijo(retain=0.5),
        "growth 2": replace(armijo(growth=2.0), inner_rule=replace(inner, growth=2.0)),
        "no average": replace(default, averages=False),
        "no correction": replace(default, corrects=False),
        "reset last": armijo(reset="last"),
        "reset fixed": armijo(reset="fixed"),
        "start 1e-4": bilevel.bisls("adam", 1e-4, 1e-4),
        "start 1e4": bilevel.bisls("adam", 1e4, 1e4),
        "20 products": bilevel.bisls("adam", hypergradient=cg(20, "auto")),
        "CG rtol 0.1": bilevel.bisls("adam", hypergradient=cg(20, 0.1)),
        "CG rtol 1e-3, 50 steps": bilevel.bisls("adam", hypergradient=cg(50, 1e-3)),
        "CG rtol 1e-4, 100 steps": bilevel.bisls("adam", hypergradient=cg(100, 1e-4)),
        "CG rtol 0.3": bilevel.bisls("adam", hypergradient=cg(20, 0.3)),
        "CG 3 steps": bilevel.bisls("adam", hypergradient=cg(3, 0.1)),
        "Neumann 10 terms": bilevel.bisls(
            "adam", hypergradient=bilevel.Implicit(bilevel.Neumann(10), average="auto")
        ),
        "CG as if convex": bilevel.bisls(
            "adam", hypergradient=bilevel.Implicit(Convex(20, 0.1), average="auto")
        ),
        "unrolled": bilevel.bisls("adam", hypergradient=bilevel.Unrolled()),
        "1 Hessian batch": bilevel.bisls("adam", hypergradient=replace(DEFAULT, average=1)),
        "2 Hessian batches": bilevel.bisls("adam", hypergradient=replace(DEFAULT, average=2)),
        "4 Hessian batches": bilevel.bisls("adam", hypergradient=replace(DEFAULT, average=4)),
        "beta1 = 0": adam(beta1=0.0),
        "beta1 = 0.5": adam(beta1=0.5),
        "beta1 = 0.9": adam(beta1=0.9),
        "eps = 1e-8": adam(eps=1e-8),
        "not normalised": adam(normalised=False, eps=1e-8),
        "plain Adam, beta1 = 0.9": replace(default, direction=Adam(descends=True)),
    }


def run(job: tuple[str, str, int]) -> dict[str, float]:
    """One run of a named method on a named case."""
    case, name, seed = job
    torch.set_num_threads(1)
    return outcome(PROBLEMS[case](seed), variants()[name], STEPS, INNER, seed)


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
    parser.add_argument("--cases", nargs="*", default=SHOWN, choices=PROBLEMS, metavar="CASE")
    parser.add_argument("--variants", nargs="*", default=list(variants()))
    parser.add_argument("--name", default="defaults", help="of the file that is written")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    jobs = [
        (case, name, seed)
        for case in options.cases
        for name in options.variants
        for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        found = list(pool.map(run, jobs))
    write(
        options.name,
        [
            summary(*jobs[i][:2], found[i : i + options.seeds])
            for i in range(0, len(jobs), options.seeds)
        ],
    )
