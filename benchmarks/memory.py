"""Peak memory of one hypergradient against the number of inner steps, beside other packages.

Each figure is the growth of the resident set's peak in a process of its own (on a GPU: of the
allocator's peak), for an MLP 784-256-256-10 with a weight per example. Implicit ones stand at the
end of the same inner steps; unrolled ones go back through them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel
from benchmarks import peers
from benchmarks.hypergradients import example, flat
from benchmarks.products import mlp
from benchmarks.report import write
from bilevel.problem import Draw

STEP, PRODUCTS = 1e-2, 10


def ours(kind: str, given: peers.Example, count: int) -> Callable[[], Tensor]:
    oracle, X, Y = flat(given)

    def implicit() -> Tensor:
        y = Y
        for _ in range(count):
            y = y - STEP * oracle.inner_gradient(X, y, Draw())[1]
        solver = bilevel.ConjugateGradient(steps=PRODUCTS, rtol=0.0)
        return bilevel.Implicit(solver).estimate(oracle, X, y, Draw(), [Draw()], [], None).grad

    def unrolled() -> Tensor:
        method = bilevel.Unrolled(window=count, recompute=kind == "recomputed", step=STEP)
        y, path = method.descend(oracle, X, Y, Draw())
        return method.estimate(oracle, X, y, Draw(), [Draw()], path, None).grad

    return implicit if kind == "implicit" else unrolled


def after_steps(
    make: Callable[[peers.Example, int], peers.Call], given: peers.Example, count: int
) -> Callable[[], Tensor]:
    """An implicit peer at the end of ``count`` plain inner steps."""

    def call() -> Tensor:
        ys = given.ys
        for _ in range(count):
            ys = [y.clone().requires_grad_() for y in ys]
            grads = torch.autograd.grad(given.inner(given.x, ys), ys)
            ys = [(y - STEP * g).detach() for y, g in zip(ys, grads, strict=True)]
        return make(peers.Example(given.x, ys, given.inner, given.outer, STEP), PRODUCTS)()

    return call


METHODS: dict[str, Callable[[peers.Example, int], Callable[[], Tensor]]] = {
    "bilevel Implicit": partial(ours, "implicit"),
    "bilevel Unrolled": partial(ours, "unrolled"),
    "bilevel Unrolled(recompute=True)": partial(ours, "recomputed"),
    "higher, unrolled": peers.higher,
    "torchopt solve_cg": partial(after_steps, peers.torchopt_cg),
    "betty cg": partial(after_steps, peers.betty("cg")),
    "boat conjugate_gradient": partial(after_steps, peers.boat_cg),
}


def one(name: str, count: int, examples: int, device: str) -> dict[str, Any]:
    """In a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = example(mlp(), examples, torch.float32, device)
    given.step = STEP
    METHODS[name](given, 1)()  # libraries, workspaces
    call = METHODS[name](given, count)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else peak()
    began = time.perf_counter()
    norm = float(call().norm())
    spent = time.perf_counter() - began
    after = torch.cuda.max_memory_allocated() if cuda else peak()
    return {"MiB": (after - before) / 2**20, "s": spent, "norm": norm}


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="docs/measured")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(one(options.one, options.steps[0], options.examples, options.device)))
        return
    rows = []
    for name in METHODS:
        row: dict[str, Any] = {"method": name}
        note = ""
        for count in options.steps:
            command = [sys.executable, "-m", "benchmarks", "memory", "--one", name]
            command += ["--steps", str(count), "--examples", str(options.examples)]
            command += ["--device", options.device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                found = json.loads(done.stdout.splitlines()[-1])
            else:
                found = {"MiB": "-", "s": "-"}
                note = done.stderr.strip().splitlines()[-1][:100]
                if "No module" in note:
                    note += f": {peers.INSTALL}"
            row |= {f"MiB at {count}": found["MiB"], f"s at {count}": found["s"]}
        rows.append(row | {"note": note})
        write(f"memory-{options.device}", rows, options.out)  # what is finished is kept
