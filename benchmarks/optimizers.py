"""Time of one optimizer step, side by side in one run: ``python -m benchmarks optimizers``.

Each optimizer gets the same parameters and gradients; the rounds take them in turn, so that other
load on the machine hits all alike. Reported: the median over the rounds, in milliseconds, and as a
multiple of schedulefree's AdamW. Packages that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import optim
from benchmarks.report import installed

SHAPES = {
    "1 large": [(4096, 2048)],
    "100 medium": [(256, 256)] * 100,
    "1000 small": [(32, 32)] * 1000,
}
REFERENCE = "schedulefree AdamW (foreach)"
Step = Callable[[], Any]


def contestants(params: Callable[[], list[torch.nn.Parameter]]) -> dict[str, Step]:
    """One step of every optimizer, on parameters of its own."""
    device = params()[0].device
    loss = torch.tensor(3.0, device=device)

    def ours(make: Callable[..., Any], **options: Any) -> Step:
        optimizer = make(params(), **options)
        return lambda: optimizer.step(loss=loss, target=0.0)

    steps = {
        "torch AdamW (foreach)": torch.optim.AdamW(params(), foreach=True).step,
        "torch AdamW (fused)": torch.optim.AdamW(params(), fused=True).step,
        "torch SGD (foreach)": torch.optim.SGD(params(), lr=1e-3, foreach=True).step,
        "optim.ScheduleFreeAdamSPS": ours(optim.ScheduleFreeAdamSPS, max_lr=1e-3),
        "optim.IAMAdam": ours(optim.IAMAdam, max_lr=1e-3),
        "optim.ScheduleFreeSPS": ours(optim.ScheduleFreeSPS),
        "optim.IAM": ours(optim.IAM),
        "optim.SafeguardedSPS": ours(optim.SafeguardedSPS),
        "optim.SPS": ours(optim.SPS),
    }
    if package := installed("schedulefree"):
        optimizer = package.AdamWScheduleFree(params())
        optimizer.train()
        steps = {REFERENCE: optimizer.step, **steps}
    if package := installed("sps_safe"):
        safe, average = package.SPS_safe(params()), package.IMA_SPS_safe(params())
        steps["sps-safe SPS_safe"] = lambda: safe.step(loss=loss)
        steps["sps-safe IMA_SPS_safe"] = lambda: average.step(loss=loss)
    if package := installed("momo"):
        momo, adam = package.Momo(params()), package.MomoAdam(params())
        steps["momo-opt Momo"] = lambda: momo.step(loss=loss)
        steps["momo-opt MomoAdam"] = lambda: adam.step(loss=loss)
    return steps


def measure(
    shapes: list[tuple[int, ...]], rounds: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """(median, smallest) milliseconds of a step of each contestant."""

    def params() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
        for p in made:
            p.grad = 1e-2 * torch.randn(p.shape, generator=generator).to(device)
        return made

    steps = contestants(params)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds + 3):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if k >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks optimizers", description="Time of one optimizer step."
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each optimizer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="a file for the numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {args.threads} threads, {platform.machine()}")
    results = {name: measure(shapes, args.rounds, device) for name, shapes in SHAPES.items()}
    print(f"{'median ms (x reference)':34}" + "".join(f"{name:>22}" for name in SHAPES))
    for name in results["1 large"]:
        cells = []
        for result in results.values():
            median, _ = result[name]
            reference, _ = result.get(REFERENCE, (float("nan"), 0.0))
            cells.append(f"{median:12.2f} ({median / reference:5.2f}x)")
        print(f"{name:34}" + "".join(f"{cell:>22}" for cell in cells))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"threads": args.threads, "torch": torch.__version__, **results}, file)


if __name__ == "__main__":
    main()
