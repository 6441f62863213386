"""Several processes take the steps of one: real processes, gloo, one start for many cases.

Every case is a function of (rank, size, folder) that runs in each process of a group, and here,
alone, on the concatenated batches. What comes back is compared: ranks with one another bit for
bit, and with the single process to rounding.
"""

import datetime
import math
import os
import pickle
import shutil
import signal
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bilevel
from bilevel import checkpoint, problem
from bilevel.distributed import LostRank
from tests.tables import flat, relative

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="torch.distributed with gloo is not available",
)
TIMEOUT, SHORT = 60, 8  # seconds that ranks wait for each other: two ranks, three
ROWS = 12  # of a concatenated batch: a multiple of 1, 2 and 3

# -- a problem whose shards have little in common ---------------------------------------------


def rows(count, seed):
    rng = torch.Generator().manual_seed(seed)
    A = torch.randn(count, 5, generator=rng, dtype=torch.float64)
    A *= torch.linspace(0.3, 1.5, count, dtype=torch.float64)[:, None]
    return A, A.sum(1) + torch.randn(count, generator=rng, dtype=torch.float64)


def inner(x, y, batch):
    A, a = batch
    return torch.nn.functional.softplus(A @ y - a).mean() + (x.exp() * y**2).sum() / 2


def outer(x, y, batch):
    A, a = batch
    return ((A @ y - a) ** 2).mean() / 2 + 0.05 * (x.sin() * y).sum()


def start():
    return torch.linspace(-1, 0.5, 5, dtype=torch.float64), torch.linspace(
        1, -0.2, 5, dtype=torch.float64
    )


def shards(rank, size, seed, count):
    """This rank's rows of each of ``count`` batches."""
    return [tuple(t[rank::size] for t in rows(ROWS, seed + i)) for i in range(count)]


def go(rank, size, *, losses=(outer, inner), xy=None, **options):
    x, y = start() if xy is None else xy
    data = {"outer_data": shards(rank, size, 10, 3), "inner_data": shards(rank, size, 50, 5)}
    if "data" in options:
        data = {}
    result = bilevel.solve(
        *losses, x, y, **{"steps": 3, "inner_steps": 2, "seed": 3, **data, **options}
    )
    records = [r.asdict() for r in result.history]
    for record in records:
        del record["seconds"]
    values = [list(v.parameters()) if isinstance(v, torch.nn.Module) else v
              for v in (result.x, result.y)]  # fmt: skip
    return {"x": flat(values[0]).detach(), "y": flat(values[1]).detach(),
            "reason": result.reason, "records": records}  # fmt: skip


# -- cases: (rank, size, folder) -> what to compare -------------------------------------------

_I = bilevel.Implicit
HYPERGRADIENTS = {
    "cg": _I(bilevel.ConjugateGradient(steps=3, rtol=0.01)),
    "neumann": _I(bilevel.Neumann(6)),
    "stochastic": _I(bilevel.StochasticNeumann(4)),
    "random length": _I(bilevel.StochasticNeumann(4, form="random")),
    "nystrom": _I(bilevel.Nystrom(3)),
    "identity": _I(bilevel.Identity()),
    "unrolled": bilevel.Unrolled(),
    "recomputed": bilevel.Unrolled(window=2, recompute=True),
    "differences": bilevel.FiniteDifference(bilevel.Neumann(3, step=0.2)),
}
METHODS = {
    "bisls-adam": partial(bilevel.bisls, "adam"),
    "bisls-sgd": partial(bilevel.bisls, "sgd"),
    "bisps": bilevel.bisps,
    "adam": partial(bilevel.fixed, "adam", 0.05, 0.2),
    "sgd": partial(bilevel.fixed, "sgd", 0.05, 0.2),
}
# central differences divide rounding by their eps, 6e-6 here
TOLERANCE = {"differences": 1e-8}


def solved(method, hypergradient, rank, size, folder):
    made = METHODS[method](hypergradient=HYPERGRADIENTS[hypergradient])
    return go(rank, size, method=made)


def alone(hypergradient, rank, size, folder):
    method = HYPERGRADIENTS[hypergradient]
    h = bilevel.hypergradient(
        outer,
        inner,
        *start(),
        shards(rank, size, 10, 1)[0],
        method=method,
        inner_batches=shards(rank, size, 50, method.batches),
    )
    # the generator of a loose call is the caller's own; see `seeded` in the workers
    return {"x": h.grad, "y": h.value, "reason": "", "records": [vars(h) | {"grad": 0, "value": 0,
            "residual": None if h.residual is None else float(h.residual)}]}  # fmt: skip


def modules(rank, size, folder):
    """Every rank builds other Modules: the start is that of rank 0, frozen layers included."""
    torch.manual_seed(100 + rank)
    x = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    x[0].requires_grad_(False)
    y = torch.nn.Linear(3, 1).double()

    def g(x, y, batch):
        fit = ((y(x(batch[0])).squeeze(1) - batch[1]) ** 2).mean()
        return fit + 0.1 * sum((p**2).sum() for p in y.parameters())

    def f(x, y, batch):
        return ((y(x(batch[0])).squeeze(1) - batch[1]) ** 2).mean()

    return go(rank, size, losses=(f, g), xy=(x, y))


def sgd_and_schedule(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)


def optimizer(rank, size, folder):
    return go(rank, size, method=bilevel.bisls("sgd", inner_solver=sgd_and_schedule))


def own_solver(rank, size, folder):
    """A function of the user's that averages its own gradients."""

    def solver(x, y, batches):
        for batch in batches:
            y = y.detach().requires_grad_()
            (g,) = torch.autograd.grad(inner(x, y, batch), y)
            if size > 1:
                dist.all_reduce(g)
            y = y - 0.3 * g / size
        return y.detach()

    return go(rank, size, method=bilevel.bisls("sgd", inner_solver=solver))


def careless_solver(rank, size, folder):
    """The same without the average: each rank has another y."""

    def solver(x, y, batches):
        y = y.detach().requires_grad_()
        return (y - 0.3 * torch.autograd.grad(inner(x, y, batches[0]), y)[0]).detach()

    try:
        return go(rank, size, method=bilevel.bisls("sgd", inner_solver=solver))
    except RuntimeError as error:
        return {"error": str(error)}


def projected(rank, size, folder):
    return go(rank, size, project=lambda x: x.clamp(-0.9, 0.2))


def pairs(rank, size, folder):
    data = list(zip(shards(rank, size, 10, 3), shards(rank, size, 50, 3), strict=True))
    return go(rank, size, data=data, warm_start=False)


def to_tolerance(rank, size, folder):
    return go(rank, size, method="bisls-sgd", steps=30, tol=0.2)


def called_back(rank, size, folder):
    """The callback of the last rank alone asks for the end."""
    return go(rank, size, callback=lambda state, record: rank == size - 1 and record.k == 0)


def dropout(rank, size, folder):
    def g(x, y, batch):
        return inner(x, y, (torch.nn.functional.dropout(batch[0], 0.3), batch[1]))

    first = go(rank, size, losses=(outer, g))
    again = go(rank, size, losses=(outer, g))
    assert repr(first) == repr(again)
    masks = torch.rand(3)  # the generators of the ranks are apart
    return first | {"own": masks.tolist()}


def sampled(rank, size, folder, **options):
    """DistributedSampler at both levels: its batches are those of one process, cut in pieces."""
    loaders = []
    for seed, count in ((7, 36), (8, 60)):
        data = TensorDataset(*rows(count, seed))
        sampler = DistributedSampler(data, size, rank, seed=seed)
        loaders.append(DataLoader(data, ROWS // size, sampler=sampler))
    return go(
        rank,
        size,
        outer_data=loaders[0],
        inner_data=loaders[1],
        **{"steps": 7, "method": "bisls-sgd", **options},
    )


def unlike(rank, size, folder):
    """Ranks that have unlike numbers of batches, one of them fewer than are averaged."""
    few = shards(rank, size, 50, 2 + 3 * rank)
    several = bilevel.bisls(hypergradient=_I(bilevel.ConjugateGradient(3, 0.01), average=4))
    found = [go(rank, size, inner_data=few, steps=5, **options)["records"]
             for options in ({}, {"method": several})]  # fmt: skip
    return go(rank, size, inner_data=few[: 1 + rank]) | {"records": found}


def interrupted(rank, size, folder):
    """A run that every rank leaves after 5 iterations; its file is of iteration 4."""

    class Left(Exception):
        pass

    def leave(state, record):
        if record.k == 4:
            raise Left

    try:
        sampled(rank, size, folder, checkpoint=f"{folder}/{size}.pt", checkpoint_every=2,
                callback=leave)  # fmt: skip
    except Left:
        return {}


def resumed(rank, size, folder, of):
    return sampled(rank, size, folder, checkpoint=f"{folder}/{of}.pt", resume=True)


def not_finite(rank, size, folder):
    """NaN on the last rank alone."""
    k = []

    def f(x, y, batch):
        bad = rank == size - 1 and len(k) > 1
        return outer(x, y, batch) * (math.nan if bad else 1)

    return go(rank, size, losses=(f, inner), callback=lambda state, record: k.append(record.k))


def raising(what, rank, size, folder):
    """An exception on the last rank alone, in the loss, in a product, or in reading."""
    k = []

    def fail(where, error):
        if rank == size - 1 and what == where and len(k) > 1:
            raise error

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            fail("backward", MemoryError("no room"))
            return g.clone()

    def g(x, y, batch):
        fail("loss", MemoryError("no room"))
        return inner(x, Checked.apply(y), batch)

    class Reader(list):
        def __iter__(self):
            for batch in super().__iter__():
                fail("reading", OSError("disk on fire"))
                yield batch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return go(
            rank,
            size,
            losses=(outer, g),
            outer_data=Reader(shards(rank, size, 10, 3)),
            callback=lambda state, record: k.append(record.k),
        )


def misused(rank, size, folder):
    """A loss that is wrong everywhere raises what it would raise in one process."""
    try:
        go(rank, size, losses=(lambda x, y, batch: outer(x, y[:3], batch), inner))
    except ValueError as error:
        return {"error": str(error)}


def early(rank, size, folder):
    """A loss that raises on the last rank in the first look."""

    def f(x, y, batch):
        if rank == size - 1:
            raise KeyError("label")
        return outer(x, y, batch)

    try:
        go(rank, size, losses=(f, inner))
    except ValueError as error:
        return {"error": str(error)}


def uneven(rank, size, folder):
    batch = rows(ROWS, 1)
    mine = tuple(t[: ROWS - 4 * rank] for t in batch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = go(rank, size, outer_data=[mine], steps=1)
    return result | {"warned": [str(w.message) for w in seen]}


def parted(rank, size, folder):
    """Ranks that come to different points: one moves its own x behind the engine's back."""

    def meddle(state, record):
        if rank == size - 1 and record.k == 2:
            state.vectors[0][0] += 1e-13

    try:
        go(rank, size, callback=meddle, checkpoint=f"{folder}/parted.pt", checkpoint_every=3)
    except RuntimeError as error:
        return {"error": str(error), "written": os.path.exists(f"{folder}/parted.pt")}


COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "broadcast_object_list", "gather_object")


def counted(rank, size, folder):
    """Collectives of each iteration beside what its record counts."""
    calls, originals = Counter(), {name: getattr(dist, name) for name in COLLECTIVES}
    seen = []

    def wrap(name):
        def call(*args, **options):
            calls[name] += 1
            return originals[name](*args, **options)

        return call

    def note(state, record):
        made = record.gradients + record.hessian_products + record.loss_evaluations
        seen.append((dict(calls), made, record.outer_trials))

    for name in COLLECTIVES:
        setattr(dist, name, wrap(name))
    try:
        one = bilevel.Implicit(bilevel.ConjugateGradient(rtol=0.1))
        method = replace(bilevel.bisls(hypergradient=one), outer_batches=1)
        go(rank, size, callback=note, method=method)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {"seen": seen}


def killed(rank, size, folder):
    """The last rank is killed in the middle of an iteration."""
    calls = Counter()

    def g(x, y, batch):
        calls["g"] += 1
        if rank == size - 1 and calls["g"] == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(x, y, batch)

    return lost(lambda: go(rank, size, losses=(outer, g), steps=9,
            checkpoint=f"{folder}/killed.pt",
                           checkpoint_every=1))  # fmt: skip


def hanging(rank, size, folder):
    """The last rank does not go on."""

    def callback(state, record):
        if rank == size - 1 and record.k == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    return lost(lambda: go(rank, size, callback=callback))


def lost(run):
    begin = time.monotonic()
    try:
        run()
    except LostRank as error:
        return {"error": str(error), "seconds": time.monotonic() - begin}


EQUAL = {f"{m}, {h}": partial(solved, m, h) for m in METHODS for h in HYPERGRADIENTS}
EQUAL |= {f"alone, {h}": partial(alone, h) for h in HYPERGRADIENTS}
EQUAL |= {
    f.__name__: f
    for f in (modules, optimizer, own_solver, projected, pairs, to_tolerance, called_back, sampled)
}
TWO = EQUAL | {
    f.__name__: f
    for f in (careless_solver, dropout, not_finite, misused, early, uneven, unlike, parted, counted,
              interrupted)
}  # fmt: skip
TWO |= {f"raising in {w}": partial(raising, w) for w in ("loss", "backward", "reading")}
TWO |= {"resumed": partial(resumed, of="copy"), "killed": killed}
THREE = {name: EQUAL[name] for name in ("bisls-adam, cg", "sgd, unrolled", "modules", "sampled")}
THREE |= {"resumed": partial(resumed, of=2), "hanging": hanging}


# -- the processes --------------------------------------------------------------------------------


def work(rank, size, folder, names, timeout):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    cases, found = TWO if size == 2 else THREE, {}
    for name in names:
        torch.manual_seed(3)
        if name == "resumed" and size == 2 and rank == 0:  # each resumed run writes its file
            shutil.copyfile(f"{folder}/2.pt", f"{folder}/copy.pt")
            shutil.copyfile(f"{folder}/2.pt", f"{folder}/one.pt")
        try:
            found[name] = cases[name](rank, size, folder)
        except Exception:
            found[name] = {"unexpected": traceback.format_exc()}
        with open(f"{folder}/{size}-{rank}.pickle", "wb") as file:
            pickle.dump(found, file)


def run(size, folder, cases, timeout):
    """What each rank found, by case; the ranks that do not end are killed."""
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=work, args=(rank, size, str(folder), list(cases), timeout))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks[:-1]:  # the last one dies, or hangs, in the last case
        process.join(240)
    for process in ranks:
        process.kill()
        process.join()
    found = []
    for rank in range(size):
        with open(f"{folder}/{size}-{rank}.pickle", "rb") as file:
            found.append(pickle.load(file))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    return run(2, folder, TWO, TIMEOUT)


@pytest.fixture(scope="module")
def three(folder, two):
    return run(3, folder, THREE, SHORT)


def agree(ranks, name):
    """What the ranks found, which they have bit for bit in common."""
    found = [rank[name] for rank in ranks]
    assert "unexpected" not in found[0], found[0]["unexpected"]
    for other in found[1:]:
        assert repr(other["records"]) == repr(found[0]["records"])
        assert other["reason"] == found[0]["reason"]
        assert torch.equal(other["x"], found[0]["x"]) and torch.equal(other["y"], found[0]["y"])
    return found[0]


@pytest.fixture(autouse=True)
def one_process_like_ranks(monkeypatch):
    """Which do not look for kinks: one evaluation of the inner loss in the first iteration."""
    monkeypatch.setattr(problem.Oracle, "may_round", False)


def close(found, single, tolerance=1e-12):
    """The trajectory of one process: numbers to rounding, counts exactly."""
    assert relative(found["x"], single["x"]) <= tolerance
    assert relative(found["y"], single["y"]) <= tolerance
    assert len(found["records"]) == len(single["records"])
    for a, b in zip(found["records"], single["records"], strict=True):
        for key, number in b.items():
            if isinstance(number, float):
                # a residual is a difference, whose rounding is that of its terms
                room = tolerance if key == "residual" else tolerance * abs(number)
                assert abs(a[key] - number) <= room, (key, a[key], number)
            elif key != "method":
                assert a[key] == number, key


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_equal_one_process(name, two, folder):
    torch.manual_seed(3)
    single = EQUAL[name](0, 1, folder)
    found = agree(two, name)
    close(found, single, TOLERANCE.get(name.split(", ")[-1], 1e-12))
    if name != "to_tolerance":  # which prints a norm
        assert found["reason"] == single["reason"]


@pytest.mark.parametrize("name", [n for n in THREE if n in EQUAL])
def test_three_ranks_equal_one_process(name, three, folder):
    torch.manual_seed(3)
    close(agree(three, name), EQUAL[name](0, 1, folder))


def test_ranks_of_unlike_numbers_of_batches_do_as_much_each(two):
    chosen, several = agree(two, "unlike")["records"]
    assert [len(chosen), len(several)] == [5, 5]
    assert [record["hessian_batches"] for record in several] == [4] * 5


def test_ranks_draw_their_own_randomness(two):
    agree(two, "dropout")
    assert two[0]["dropout"]["own"] != two[1]["dropout"]["own"]


def test_resumed_by_as_many_ranks_bit_for_bit(two):
    whole, again = agree(two, "sampled"), agree(two, "resumed")
    assert repr(again["records"]) == repr(whole["records"])
    assert torch.equal(again["x"], whole["x"]) and torch.equal(again["y"], whole["y"])


def test_resumed_by_three_ranks_and_by_one(two, three, folder):
    whole = agree(two, "sampled")
    close(agree(three, "resumed"), whole)
    content = checkpoint.load(folder / "one.pt")
    assert content["k"] == 4 and len(content["others"]) == 1
    close(resumed(0, 1, folder, of="one"), whole)


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(two):
    found = agree(two, "not_finite")
    assert "loss is nan" in found["reason"] and len(found["records"]) == 3
    assert torch.isfinite(found["x"]).all()


@pytest.mark.parametrize("what", ["loss", "backward", "reading"])
def test_an_exception_on_one_rank_ends_all(what, two):
    found = agree(two, f"raising in {what}")
    error = "OSError: disk on fire" if what == "reading" else "MemoryError: no room"
    assert f"on rank 1 of 2: {error}" in found["reason"]
    assert len(found["records"]) == 2


def test_misuse_is_told_by_every_rank(two, folder):
    alone = misused(0, 1, folder)["error"].replace("12", "6")
    for rank in (0, 1):  # the same words, but for the size of the shard
        assert two[rank]["misused"]["error"] == alone
        assert "on rank 1 of 2: KeyError: 'label'" in two[rank]["early"]["error"]


def test_ranks_that_part_are_found(two):
    for rank in (0, 1):
        found = two[rank]["parted"]
        assert "the point (x, y) differs between the 2 ranks" in found["error"]
        assert not found["written"]
        reason = two[rank]["careless_solver"]["error"]
        assert "the y of inner_solver differs between the 2 ranks" in reason


def test_batches_of_different_sizes_are_told(two):
    for rank in (0, 1):
        assert "different sizes" in two[rank]["uneven"]["warned"][0]


def test_collectives_are_those_that_are_documented(two):
    """One for each gradient, product and loss, but for the two of g at an outer trial, which share
    one; one to read; one for the callback."""
    seen = two[0]["counted"]["seen"]
    for k in range(1, len(seen)):
        (before, old, _), (after, new, trials) = seen[k - 1], seen[k]
        assert after["all_reduce"] - before["all_reduce"] == new - old - trials
        assert after["all_gather"] - before["all_gather"] == 2
        assert all(after.get(c, 0) == before.get(c, 0) for c in COLLECTIVES[2:])


def test_a_rank_that_is_killed_or_hangs_is_an_error(two, three, folder):
    assert "killed" not in two[1]
    found = two[0]["killed"]
    assert "lost the others" in found["error"] and found["seconds"] < TIMEOUT
    content = checkpoint.load(folder / "killed.pt")  # and what it had written serves one process
    assert content["k"] > 0
    again = go(0, 1, steps=9, checkpoint=folder / "killed.pt", resume=True)
    close(again, go(0, 1, steps=9), 1e-7)  # nine iterations of the default amplify rounding
    for rank in (0, 1):
        found = three[rank]["hanging"]
        assert "lost the others" in found["error"] and found["seconds"] < SHORT + 10


def test_alone_nothing_is_different():
    state = bilevel.bisls().init(*start())
    oracle = problem.make_oracle(bilevel.Problem(outer, inner), *state.layouts)
    assert type(oracle) is problem.Oracle
