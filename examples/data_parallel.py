"""One bilevel problem on several processes: one penalty per feature of a ridge regression.

    python examples/data_parallel.py                                     # one process
    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py   # two, and the same result

Each process reads its own rows; `solve` averages what it computes of them. A DistributedSampler
and a batch size of TOTAL / processes cut every batch of one process in pieces.
"""

import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bilevel

TOTAL = 60  # rows of a batch, over all processes

device = torch.device("cpu")
if "RANK" in os.environ:  # started by torchrun
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank = dist.get_rank() if dist.is_initialized() else 0
size = dist.get_world_size() if dist.is_initialized() else 1

torch.manual_seed(0)  # the data is the same everywhere; the sampler gives each process its rows
truth = torch.cat([torch.ones(5), torch.zeros(15)]).double()


def loader(rows):
    inputs = torch.randn(rows, 20, dtype=torch.float64)
    labels = inputs @ truth + torch.randn(rows)
    data = TensorDataset(inputs, labels)
    return DataLoader(data, TOTAL // size, sampler=DistributedSampler(data, size, rank))


def loss(y, batch):
    inputs, labels = (part.to(device) for part in batch)
    return ((inputs @ y - labels) ** 2).mean()


def inner(x, y, batch):
    return loss(y, batch) + (x.exp() * y**2).sum()


def outer(x, y, batch):
    return loss(y, batch)


start = torch.full((20,), -3.0, dtype=torch.float64, device=device)
result = bilevel.solve(
    outer,
    inner,
    x=start,
    y=torch.zeros_like(start),
    outer_data=loader(600),
    inner_data=loader(120),
    steps=10 if os.environ.get("BILEVEL_TINY") else 100,
    seed=0,
    progress=False,
)

if rank == 0:
    penalties = result.x.exp()
    print(f"{size} processes, {result.reason}")
    print(f"penalty on features that matter: {penalties[:5].median():.10f} (median)")
    print(f"penalty on features that do not: {penalties[5:].median():.10f} (median)")
if dist.is_initialized():
    dist.destroy_process_group()
