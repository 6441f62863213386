"""Replicas (DDP) and shards (FSDP2) take the steps of one process: two real processes, gloo."""

import copy
import datetime
import os
import pickle
import traceback
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import optim
from tests.optim.tables import AVERAGES, ONCE

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="torch.distributed with gloo is not available",
)
STEPS, ROWS = 8, 12
# one setting of every class, and the settings with the most state
METHODS = {str(m): m for m in ONCE} | {str(m): m for m in AVERAGES if m.options.get("weight_decay")}


def batch(step, rank=0, size=1):
    """This rank's rows; the target differs from row to row, and is averaged as the loss is."""
    rng = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, 5, generator=rng, dtype=torch.float64)
    inputs *= torch.linspace(0.2, 2, ROWS, dtype=torch.float64)[:, None]
    outputs = inputs.sin().sum(1, keepdim=True)
    targets = torch.linspace(-0.3, 0.1, ROWS, dtype=torch.float64)
    return tuple(t[rank::size] for t in (inputs, outputs, targets))


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)]
    return torch.nn.Sequential(*layers).double()


def train(network, optimizer, search, rank=0, size=1, steps=range(STEPS)):
    for t in steps:
        inputs, outputs, targets = batch(t, rank, size)

        def loss(inputs=inputs, outputs=outputs):
            return ((network(inputs) - outputs) ** 2).mean() + 0.2

        if search:
            optimizer.step(loss)
            continue
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step(loss=value, target=targets.mean())


def values(parameters):
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return torch.cat([p.detach().reshape(-1) for p in whole]).numpy().copy()


def finish(parameters, optimizer):
    """What was learned: where the two differ, of the average and of the point of the gradient."""
    found = [values(parameters)]
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        found.append(values(parameters))
        optimizer.train()
    last = optimizer.last
    return np.concatenate(found), (last.step, last.numerator, last.denominator)


# -- cases: (method, rank, size) -> what was learned ---------------------------------------------


def alone(method):
    network = model()
    optimizer = method(network.parameters())
    train(network, optimizer, method.search)
    return finish(list(network.parameters()), optimizer)


def replicas(method, rank, size, parallel=True):
    network = torch.nn.parallel.DistributedDataParallel(model())
    optimizer = method(network.parameters())
    if parallel:
        optimizer.data_parallel()
    train(network, optimizer, method.search, rank, size)
    return finish(list(network.parameters()), optimizer)


def shards(method, rank, size, **options):
    from torch.distributed.fsdp import fully_shard

    network = model()
    fully_shard(network, reshard_after_forward=True, **options)
    parameters = list(network.parameters())
    optimizer = method(parameters)
    train(network, optimizer, method.search, rank, size)
    return finish(parameters, optimizer)


def resumed(rank, size):
    """State of the shards, saved and loaded half way."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    method, found = METHODS["iam-adam linear"], []
    for again in (False, True):
        network = fully_shard(model())
        parameters = list(network.parameters())
        optimizer = method(parameters)
        train(network, optimizer, False, rank, size, range(4))
        if again:
            state = copy.deepcopy(optimizer.state_dict())
            assert isinstance(state["state"][0]["z"], DTensor)
            optimizer = method(parameters)
            optimizer.load_state_dict(state)
        train(network, optimizer, False, rank, size, range(4, STEPS))
        found.append(finish(parameters, optimizer)[0])
    return found


def mixed(rank, size):
    """One norm over a shard, a replica on the mesh, and a plain parameter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    full = torch.arange(1.0, 8.0, dtype=torch.float64)
    kinds = [[Shard(0)], [Replicate()], None]
    parameters = []
    for kind in kinds:
        p = full.clone() if kind is None else distribute_tensor(full, mesh, kind)
        parameters.append(torch.nn.Parameter(p))
        parameters[-1].grad = parameters[-1].detach().clone()
    optimizer = optim.SPS(parameters)
    optimizer.step(loss=1.0 + rank)
    return optimizer.last, values(parameters)


def stale(rank, size):
    """A search on a model that stays gathered is told, not stuck for ever."""
    from torch.distributed.fsdp import fully_shard

    network = fully_shard(model())
    try:
        train(network, optim.SLS(list(network.parameters())), True, rank, size)
    except RuntimeError as error:
        return str(error)


def counted(rank, size):
    """Collectives of the optimizer in one step of replicas and of shards."""
    from torch.distributed.fsdp import fully_shard

    calls, original, found = Counter(), dist.all_reduce, []

    def call(*args, **options):
        calls["all_reduce"] += 1
        return original(*args, **options)

    dist.all_reduce = call
    try:
        for network, parallel in (
            (torch.nn.parallel.DistributedDataParallel(model()), True),
            (torch.nn.parallel.DistributedDataParallel(model()), False),
            (fully_shard(model()), False),
        ):
            calls.clear()
            optimizer = optim.SPS(list(network.parameters()))
            if parallel:
                optimizer.data_parallel()
            train(network, optimizer, False, rank, size, range(1))
            found.append(calls["all_reduce"])
    finally:
        dist.all_reduce = original
    return found


def copied(rank, size):
    """A copy, and what comes back from a pickle, still average."""
    optimizer = optim.SPS(model().parameters()).data_parallel()
    copies = (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))
    found = []
    for each in copies:
        for p in each.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        each.step(loss=1.0 + rank)
        found.append(each.last.numerator)
    return found


def work(rank, size, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's own, about its own sharding
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {}
    for name, method in METHODS.items():
        for kind in (replicas, shards):
            found[f"{kind.__name__} {name}"] = attempt(kind, method, rank, size)
    found["silent"] = attempt(replicas, METHODS["sps"], rank, size, False)
    for case in (resumed, mixed, stale, counted, copied):
        found[case.__name__] = attempt(case, rank, size)
    with open(f"{folder}/{rank}.pickle", "wb") as file:
        pickle.dump(found, file)
    dist.destroy_process_group()
    os._exit(0)  # torch aborts now and then where an interpreter ends that has had a group


def attempt(case, *args):
    try:
        return case(*args)
    except Exception:
        return traceback.format_exc()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (2, str(folder)), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["replicas", "shards"])
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one_process(kind, name, two):
    found = [rank[f"{kind} {name}"] for rank in two]
    assert not isinstance(found[0], str), found[0]
    (learned, last), (other, _) = found
    assert np.array_equal(learned, other)
    single, step = alone(METHODS[name])
    np.testing.assert_allclose(learned, single, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(last, step, rtol=1e-11)


def test_replicas_part_where_their_losses_are_not_averaged(two):
    learned, other = (rank["silent"][0] for rank in two)
    assert np.abs(learned - other).max() > 1e-3


def test_shards_are_resumed_bit_for_bit(two):
    for rank in two:
        assert np.array_equal(*rank["resumed"])


def test_every_parameter_counts_once_in_the_norm(two):
    squares = float(sum(n * n for n in range(1, 8)))
    for rank in two:
        last, learned = rank["mixed"]
        assert last.numerator == 1.5
        np.testing.assert_allclose(last.denominator, 3 * squares, rtol=1e-14)
        full = np.arange(1.0, 8.0) * (1 - last.step)
        np.testing.assert_allclose(learned, np.tile(full, 3), rtol=1e-14)


def test_a_search_on_gathered_shards_is_refused(two):
    for rank in two:
        assert "reshard_after_forward=True" in rank["stale"]


def test_one_collective_a_step(two):
    assert two[0]["counted"] == [1, 0, 1]


def test_copies_go_on_averaging(two):
    for rank in two:
        assert rank["copied"] == [1.5, 1.5]


def test_alone_nothing_is_asked_of_torch_distributed():
    assert not dist.is_initialized()
    method = METHODS["sps"]
    network = model()
    optimizer = method(network.parameters()).data_parallel()
    train(network, optimizer, False)
    found = finish(list(network.parameters()), optimizer)[0]
    assert np.array_equal(found, alone(method)[0])
