"""One problem on one process and on two: throughput; and the time of a collective by its size."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import bilevel
from benchmarks.products import convnet
from benchmarks.report import spread, write

SIZES = (1, 1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22)  # float32 numbers in a collective


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1024, help="rows, over all processes")
    parser.add_argument("--steps", type=int, default=1, help="outer iterations of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["throughput", "collectives"])
    options = parser.parse_args(argv)
    if options.only != "collectives":
        throughput(options)
    if options.only != "throughput":
        collectives(options)


def throughput(options: argparse.Namespace) -> None:
    """Iterations per second; the two take turns, so that a drift of the machine meets both."""
    times: dict[int, list[float]] = {1: [], options.processes: []}
    shares: dict[int, list[float]] = {size: [] for size in times}
    for _ in range(options.repeats):
        for size, found in times.items():
            wall, cpu = start(size, _solve, options.batch, options.steps)
            found.append(wall)
            shares[size].append(cpu / wall)
    rows = []
    for size, found in times.items():
        low, middle, high = spread([options.steps / seconds for seconds in found])
        gain = [a / b for a, b in zip(times[1], found, strict=True)]
        rows.append(
            {"processes": size, "iterations/s": middle, "min": low, "max": high,
             "times one process": statistics.median(gain), "least": min(gain), "most": max(gain),
             # below 1, rank 0 waited: for the other ranks, or because others used its core
             "share of a core": statistics.median(shares[size])}
        )  # fmt: skip
    write("distributed-throughput", rows)


def collectives(options: argparse.Namespace) -> None:
    """Median seconds of an all-reduce by size, and of them latency and bandwidth."""
    found = [start(options.processes, _all_reduce) for _ in range(options.repeats)]
    rows = []
    for i, count in enumerate(SIZES):
        low, middle, high = spread([1e6 * times[i] for times in found])
        rows.append({"float32 numbers": count, "microseconds": middle, "min": low, "max": high})
    write("distributed-collectives", rows)
    hops = 2 * (options.processes - 1)
    alpha = rows[0]["microseconds"] / hops
    volume = 4e-3 * hops / options.processes * (SIZES[-1] - SIZES[0])  # kB sent by a rank
    beta = (rows[-1]["microseconds"] - rows[0]["microseconds"]) / volume
    print(f"alpha {alpha:.3g} microseconds a hop; beta {beta:.3g} microseconds a kB")


def start(size: int, work: Any, *args: Any) -> Any:
    """What ``work`` returns on rank 0 of a new group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (size, folder, work, args), nprocs=size)
        return torch.load(f"{folder}/found")


def _worker(rank: int, size: int, folder: str, work: Any, args: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
    found = work(rank, size, *args)
    if rank == 0:
        torch.save(found, f"{folder}/found")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _solve(rank: int, size: int, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of ``steps`` iterations, each of the same products whatever is found, on the clock
    and of the processor."""
    torch.manual_seed(0)
    images, labels = torch.rand(batch, 1, 28, 28), torch.arange(batch) % 10
    shard = (images[rank::size], labels[rank::size])
    model = convnet()

    def outer(x: torch.Tensor, y: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(y(batch[0]), batch[1])

    def inner(x: torch.Tensor, y: Any, batch: Any) -> torch.Tensor:
        decay = sum((p * p).sum() for p in y.parameters())
        return outer(x, y, batch) + x.exp() * decay

    method = bilevel.fixed("sgd", 1e-3, 1e-2, bilevel.Implicit(bilevel.Neumann(terms=8, step=1e-2)))
    times: list[tuple[float, float]] = []
    bilevel.solve(
        outer,
        inner,
        torch.tensor(-6.0),
        model,
        outer_data=[shard],
        inner_data=[shard],
        method=method,
        steps=steps + 1,  # the first warms up
        inner_steps=8,
        callback=lambda state, record: times.append((time.perf_counter(), time.process_time())),
        progress=False,
    )
    return times[-1][0] - times[0][0], times[-1][1] - times[0][1]


def _all_reduce(rank: int, size: int) -> list[float]:
    found = []
    for count in SIZES:
        numbers, times = torch.ones(count), []
        for _ in range(60 if count < 1 << 19 else 15):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(numbers)
            times.append(time.perf_counter() - begin)
        found.append(statistics.median(times))
    return found
