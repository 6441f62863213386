"""A run that is stopped, or killed, and resumed equals the uninterrupted run bit for bit."""

import os
import pickle
import stat
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import bilevel
import optim
from bilevel import checkpoint
from tests.tables import METHODS, NESTED, flat, t


class Killed(Exception):
    """What a signal would do: nothing after it runs."""


def data(generators, workers=0, stay=False):
    """Shuffling loaders at both levels, whose lengths do not divide the batches of a step."""
    rng = torch.Generator().manual_seed(4)
    loaders = []
    for n, size in ((22, 4), (27, 5)):
        inputs = torch.randn(n, 3, generator=rng, dtype=torch.float64)
        labels = (inputs.sum(1) > 0).long()
        own = torch.Generator().manual_seed(n) if generators else None
        loaders.append(
            DataLoader(
                TensorDataset(inputs, labels),
                size,
                shuffle=True,
                generator=own,
                num_workers=workers,
                persistent_workers=stay,
            )
        )
    return {"outer_data": loaders[0], "inner_data": loaders[1]}


def outer(x, y, batch):
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(inputs @ y, labels)


def inner(x, y, batch):
    inputs, labels = batch
    inputs = torch.nn.functional.dropout(inputs, 0.2)
    return torch.nn.functional.cross_entropy(inputs @ y, labels) + (x.exp() * y**2).sum()


def start():
    return torch.full((3, 1), -3.0, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)


def go(method, generators=False, **options):
    x, y = start()
    return bilevel.solve(
        outer,
        inner,
        x,
        y,
        method=method,
        inner_steps=3,
        **{"steps": 9, "seed": 5, **data(generators), **options},
    )


def numbers(result):
    return [{k: v for k, v in r.asdict().items() if k != "seconds"} for r in result.history]


def equal(a, b):
    assert repr(numbers(a)) == repr(numbers(b))
    assert torch.equal(flat(a.x), flat(b.x)) and torch.equal(flat(a.y), flat(b.y))
    assert a.reason == b.reason


def killed(path, at, method, **options):
    """Interrupted by an exception out of the callback after iteration `at`."""

    def callback(state, record):
        if record.k == at:
            raise Killed

    with pytest.raises(Killed):
        go(method, checkpoint=path, checkpoint_every=2, callback=callback, **options)


ROWS = [name for name in METHODS if name not in ("bisls-adam differences",)]


@pytest.mark.parametrize("name", ROWS)
def test_resumed_equals_uninterrupted(name, tmp_path):
    path = tmp_path / "run.pt"
    whole = go(METHODS[name]())
    torch.manual_seed(999)
    killed(path, 4, METHODS[name]())
    saved = torch.load(path, weights_only=True)
    assert saved["k"] == 4  # the last multiple of checkpoint_every
    torch.manual_seed(12345)  # the state of the generators is that of the file
    equal(go(METHODS[name](), checkpoint=path, resume=True, seed=7), whole)


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("generators", [False, True], ids=["global", "own"])
def test_killed_anywhere(at, generators, tmp_path):
    path = tmp_path / "run.pt"
    whole = go("bisls-sgd", generators)
    killed(path, at, "bisls-sgd", generators=generators)
    equal(go("bisls-sgd", generators, checkpoint=path, resume=True), whole)


@pytest.mark.parametrize("generators", [False, True], ids=["global", "own"])
@pytest.mark.parametrize("at", [1, 6])
def test_loaders_with_workers_that_stay_are_resumed(at, generators, tmp_path):
    """In their first pass and in later ones, with new loaders and with those of before."""
    run = partial(go, "bisls-sgd", checkpoint_every=1)
    whole = run(**data(generators, 1, True))
    loaders, path = data(generators, 1, True), tmp_path / "c"
    run(checkpoint=path, steps=at, **loaders)
    written = path.read_bytes()
    for again in (data(generators, 1, True), loaders):
        path.write_bytes(written)
        equal(run(checkpoint=path, resume=True, **again), whole)


def test_the_average_is_resumed(tmp_path):
    path = tmp_path / "run.pt"
    whole = go("bisls-adam", steps=40)
    killed(path, 23, "bisls-adam", steps=40)
    again = go("bisls-adam", checkpoint=path, resume=True, steps=40)
    equal(again, whole)
    a, b = again.state.average, whole.state.average
    assert a[2:] == b[2:] and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_killed_twice_and_extended(tmp_path):
    path = tmp_path / "run.pt"
    whole = go("bisls-adam", steps=9)
    killed(path, 3, "bisls-adam", steps=9)
    killed(path, 7, "bisls-adam", steps=9, resume=True)
    equal(go("bisls-adam", checkpoint=path, resume=True, steps=9), whole)
    # at the end the file is the end: more steps go on from there
    longer = go("bisls-adam", checkpoint=path, resume=True, steps=12)
    equal(longer, go("bisls-adam", steps=12))
    # and no more steps change nothing
    equal(go("bisls-adam", checkpoint=path, resume=True, steps=12), longer)
    fewer = go("bisls-adam", checkpoint=path, resume=True, steps=2)
    assert torch.equal(fewer.x, longer.x) and len(fewer.history) == 12
    assert fewer.reason.startswith("no step was taken: the checkpoint already has 12 iterations")
    assert "steps = 2" in fewer.reason


def test_a_run_that_ended_by_tol_has_ended(tmp_path):
    path = tmp_path / "c"
    norms = [record.hypergrad_norm for record in go("sgd").history]
    tol = sorted(norms)[1]
    ended = go("sgd", checkpoint=path, tol=tol)
    assert "at most tol" in ended.reason and len(ended.history) < 9
    for _ in range(2):
        equal(go("sgd", checkpoint=path, resume=True, tol=tol), ended)
    equal(go("sgd", checkpoint=path, resume=True), go("sgd"))  # without tol it goes on


def test_numbers_of_numpy_are_written_as_plain_ones(tmp_path):
    method = bilevel.fixed("sgd", np.float32(0.25), np.float64(0.5))
    path = tmp_path / "c"
    killed(path, 4, method, tol=np.float32(1e-9), steps=np.int64(9), seed=np.int32(5))
    again = go(method, checkpoint=path, resume=True)
    plain = go(bilevel.fixed("sgd", 0.25, 0.5))
    assert torch.equal(again.x, plain.x) and torch.equal(again.y, plain.y)
    assert again.reason == plain.reason


def sgd_and_schedule(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)


def sgd_and_plateau(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)


@pytest.mark.parametrize("make", [torch.optim.Adam, sgd_and_schedule, sgd_and_plateau, optim.SLS])
def test_the_optimizer_of_the_inner_level_is_resumed(make, tmp_path):
    method = bilevel.bisls("sgd", inner_solver=make)
    whole = go(method)
    killed(tmp_path / "c", 4, method)
    equal(go(method, checkpoint=tmp_path / "c", resume=True), whole)


def test_modules_are_resumed(tmp_path):
    def build():
        torch.manual_seed(1)
        return torch.nn.Linear(3, 3, bias=False).double(), torch.nn.Linear(3, 2).double()

    def inner(x, y, batch):
        logits = y(torch.nn.functional.dropout(x(batch[0]), 0.1))
        ridge = sum((p**2).sum() for p in y.parameters())
        return torch.nn.functional.cross_entropy(logits, batch[1]) + 0.1 * ridge

    def outer(x, y, batch):
        return torch.nn.functional.cross_entropy(y(x(batch[0])), batch[1])

    def run(**options):
        x, y = build()
        result = bilevel.solve(outer, inner, x, y, steps=6, seed=3, **data(False), **options)
        return result, [p.detach().clone() for m in (x, y) for p in m.parameters()]

    whole, parameters = run()

    def callback(state, record):
        if record.k == 3:
            raise Killed

    with pytest.raises(Killed):
        run(checkpoint=tmp_path / "c", checkpoint_every=3, callback=callback)
    again, resumed = run(checkpoint=tmp_path / "c", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
    assert repr(numbers(whole)) == repr(numbers(again))


def test_a_process_that_is_killed(tmp_path):
    """SIGKILL in the middle of an iteration."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from tests.engine.test_checkpoints import go
        def callback(state, record):
            if record.k == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        go("bisls-adam", checkpoint=sys.argv[1], checkpoint_every=2, callback=callback)
        """
    )
    root = Path(__file__).parents[2]
    path = tmp_path / "c"
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, timeout=120)
    assert done.returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == ["c"]  # no temporary file is left
    torch.set_num_threads(1)
    equal(go("bisls-adam", checkpoint=path, resume=True), go("bisls-adam"))


class Batches(BatchSampler):
    """In an order drawn by a generator of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.generator = torch.Generator().manual_seed(7)

    def __iter__(self):
        batches = list(super().__iter__())
        order = torch.randperm(len(batches), generator=self.generator)
        return iter([batches[i] for i in order])


@pytest.mark.parametrize("kind", [BatchSampler, Batches])
def test_the_generators_of_a_batch_sampler_are_resumed(kind, tmp_path):
    def loaders():
        found = {}
        for name, loader in data(False).items():
            rows = RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(3))
            batches = kind(rows, loader.batch_size, False)
            found[name] = DataLoader(loader.dataset, batch_sampler=batches)
        return found

    path = tmp_path / "c"
    whole = go("bisls-sgd", **loaders())
    killed(path, 6, "bisls-sgd", **loaders())
    equal(go("bisls-sgd", checkpoint=path, resume=True, **loaders()), whole)
    refused(path, ["outer_data has 0 torch.Generator", "holds", "resume with the data"])


@pytest.mark.parametrize("where", ["sampler", "batch_sampler", "the sampler in batch_sampler"])
def test_every_sampler_is_told_the_number_of_the_pass(where):
    from bilevel.data import Cycle

    told = []
    rows = TensorDataset(torch.zeros(4, 1))
    sampler = RandomSampler(rows)
    batches = BatchSampler(sampler, 2, False)
    (batches if where == "batch_sampler" else sampler).set_epoch = told.append
    options = {"sampler": sampler, "batch_size": 2}
    if where != "sampler":
        options = {"batch_sampler": batches}
    Cycle(DataLoader(rows, **options), "data").take(5)
    assert told == [0, 1, 2]


def test_resume_without_a_file_starts(tmp_path):
    fresh = go("bisls-sgd", checkpoint=tmp_path / "new" / "c", resume=True)
    equal(fresh, go("bisls-sgd"))
    assert (tmp_path / "new" / "c").exists()


def test_without_resume_the_file_is_overwritten(tmp_path):
    path = tmp_path / "c"
    killed(path, 4, "bisls-sgd")
    equal(go("bisls-sgd", checkpoint=path), go("bisls-sgd"))


def test_python_and_numpy_generators_are_resumed(tmp_path):
    import random

    import numpy as np

    class Shuffled:
        def __init__(self):
            self.batches = data(False)["outer_data"]

        def __iter__(self):
            items = list(range(4))
            random.shuffle(items)
            return iter([t([random.random() + np.random.rand() + j]) for j in items])

    def run(**options):
        random.seed(3)
        np.random.seed(4)
        return bilevel.solve(
            lambda x, y, b: ((y - b) ** 2).sum(),
            lambda x, y: ((y - x) ** 2).sum() + 0.1 * (y**2).sum(),
            t([0.0]),
            t([0.0]),
            outer_data=Shuffled(),
            steps=6,
            seed=1,
            **options,
        )

    def callback(state, record):
        if record.k == 3:
            raise Killed

    whole = run()
    with pytest.raises(Killed):
        run(checkpoint=tmp_path / "c", checkpoint_every=4, callback=callback)
    assert not (tmp_path / "c").exists()
    with pytest.raises(Killed):
        # a pass of four ends exactly here
        run(checkpoint=tmp_path / "c", checkpoint_every=2, callback=callback)
    equal(run(checkpoint=tmp_path / "c", resume=True), whole)


# -- files that are refused -----------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "c"
    killed(path, 4, "bisls-sgd")
    return path


def refused(path, words, **options):
    with pytest.raises(ValueError) as caught:
        go(options.pop("method", "bisls-sgd"), checkpoint=path, resume=True, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated(written, keep):
    content = written.read_bytes()
    written.write_bytes(content[: int(len(content) * keep) if keep < 1 else keep])
    refused(written, [str(written), "no readable checkpoint", "damaged", "remove it"])


def test_another_version(written):
    content = torch.load(written, weights_only=True)
    for version in (99, None):
        torch.save({**content, "version": version}, written)
        refused(written, [repr(version), "version", "resume with", "remove it"])
    torch.save([1, 2], written)
    refused(written, ["version None"])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["BILEVEL_TEST_MARK"],)


def test_hostile_pickle(written, tmp_path, monkeypatch):
    mark = tmp_path / "executed"
    monkeypatch.setenv("BILEVEL_TEST_MARK", str(mark))
    torch.save({"version": 1, "k": Hostile()}, written)
    refused(written, ["no readable checkpoint"])
    written.write_bytes(pickle.dumps(Hostile()))
    refused(written, ["no readable checkpoint"])
    assert not mark.exists()


def test_other_variables(written):
    x, y = start()
    for a, b, name, words in (
        (torch.zeros(4, 1).double(), y, "x", r"x \(3, 1\) is now x \(4, 1\)"),
        (x.T, y, "x", r"x \(3, 1\) is now x \(1, 3\)"),
        (x, {"w": y}, "y", r"y \(3, 2\) is now y\['w'\] \(3, 2\)"),
        (x, [y, y[0]], "y", r"y \(3, 2\) is now y\[0\] \(3, 2\)"),
        (x.float(), y.float(), "x", "3 of torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"holds {name} with.*{words}.*resume with"):
            bilevel.solve(
                outer, inner, a, b, **data(False), method="bisls-sgd", checkpoint=written,
                resume=True,
            )  # fmt: skip


def test_another_method(written):
    refused(
        written, ["'bisls-sgd'", "'bisls-adam' would go on", "resume with"], method="bisls-adam"
    )


def adam(parameters):
    return torch.optim.Adam(parameters, 0.1)


def two_groups(parameters):
    return torch.optim.Adam([{"params": parameters}, {"params": []}], 0.1)


def shrink(x, y, batches):
    return 0.9 * y


SOLVERS = {
    "gradient steps": None,
    "the optimizer Adam": adam,
    "the optimizer SGD with StepLR": sgd_and_schedule,
    "a function solver(x, y, batches)": shrink,
}


@pytest.mark.parametrize("then", SOLVERS)
def test_another_inner_solver(then, tmp_path):
    path = tmp_path / "c"
    killed(path, 4, bilevel.bisls("sgd", inner_solver=SOLVERS[then]))
    for now in set(SOLVERS) - {then}:
        method = bilevel.bisls("sgd", inner_solver=SOLVERS[now])
        refused(
            path, [f"taken by {then}", f"by {now}", "resume with the inner_solver"], method=method
        )


def test_an_optimizer_of_other_groups(tmp_path):
    killed(tmp_path / "c", 4, bilevel.bisls("sgd", inner_solver=adam))
    method = bilevel.bisls("sgd", inner_solver=two_groups)
    words = ["cannot go on", "parameter groups", "resume with the inner_solver"]
    refused(tmp_path / "c", words, method=method)


def test_other_data(written):
    x, y = start()
    pairs = list(zip(*data(False).values(), strict=False))
    with pytest.raises(ValueError, match="written with inner_data, outer_data, but data"):
        bilevel.solve(
            outer, inner, x, y, data=pairs, method="bisls-sgd", checkpoint=written, resume=True
        )
    lists = {k: list(v) for k, v in data(False).items()}
    fewer = {k: DataLoader(v.dataset, 2 * v.batch_size) for k, v in data(False).items()}
    for other, words in (
        (lists, "outer_data is a list.*keeps its position otherwise.*resume with"),
        (fewer, r"outer_data has \d batches, but had \d when.*resume with"),
    ):
        with pytest.raises(ValueError, match=words):
            bilevel.solve(
                outer, inner, x, y, **other, method="bisls-sgd", checkpoint=written, resume=True
            )


def test_data_that_ends_earlier(tmp_path):
    """Of a length that it does not tell."""

    class Stream:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    batches = [torch.tensor([1.0, 2.0]) * i for i in range(1, 8)]

    def solve(batches, **options):
        return bilevel.solve(
            lambda x, y: (y - 1).square().sum(),
            lambda x, y, b: (y - x * b).square().sum(),
            *(torch.ones(2), torch.zeros(2)),
            **{"inner_data": Stream(batches), "inner_steps": 5, "checkpoint": tmp_path / "c"},
            **{"method": "bisls-sgd", "steps": 1, **options},
        )

    solve(batches)
    with pytest.raises(ValueError, match="ended after 2 batches.*written after 5; resume with"):
        solve(batches[:2], steps=2, resume=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="cannot write a checkpoint to.*choose a folder"):
        go("bisls-sgd", checkpoint=blocked / "c")


def test_resume_needs_a_path():
    with pytest.raises(ValueError, match="resume=True without a checkpoint.*checkpoint="):
        go("bisls-sgd", resume=True)


@pytest.mark.parametrize("error", [OSError(28, "disk full"), RuntimeError("short write")])
def test_a_failed_write_keeps_the_old_file_and_the_run(written, monkeypatch, error):
    before = written.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(RuntimeWarning, match="cannot write a checkpoint.*make room.*goes on"):
        result = go("bisls-sgd", checkpoint=written)
    equal(result, go("bisls-sgd"))
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == ["c"]


FULL = """
import resource, sys, warnings
from tests.engine.test_checkpoints import go
warnings.simplefilter("always")
def callback(state, record):
    if record.k == 5:  # no file may grow beyond half of the checkpoint from here on
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
result = go("bisls-sgd", checkpoint=sys.argv[1], checkpoint_every=2, callback=callback)
print(result.reason, len(result.history))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no resource limits")
def test_a_disk_that_fills_up_midway(tmp_path):
    """The run ends as it would have; the last good checkpoint stays, and resumes to the same."""
    path = tmp_path / "c"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], cwd=Path(__file__).parents[2], timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all 9 steps were taken 9\n"
    assert "cannot write a checkpoint to" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert torch.load(path, weights_only=True)["k"] == 4
    equal(go("bisls-sgd", checkpoint=path, resume=True), go("bisls-sgd"))


def test_a_read_only_folder(tmp_path):
    """Found before any work; root may write anywhere, so /proc stands in for it."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    place = folder if not os.access(folder, os.W_OK) else Path("/proc/self")

    def never(*args):
        raise AssertionError("work was begun")

    with pytest.raises(OSError, match="cannot write a checkpoint to.*choose a folder"):
        bilevel.solve(never, never, *start(), **data(False), checkpoint=place / "c")


def test_stateful_loader():
    """Data with state_dict and load_state_dict keeps its own position."""
    from bilevel.data import Cycle

    class Loader:
        at = 0

        def __iter__(self):
            while self.at < 5:
                self.at += 1
                yield self.at
            self.at = 0

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    cycle = Cycle(Loader(), "data")
    cycle.take(8)
    saved = cycle.state_dict()
    again = Cycle(Loader(), "data")
    again.load_state_dict(saved)
    assert cycle.take(7) == again.take(7) == [4, 5, 1, 2, 3, 4, 5]


class Stateful(list):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("kind", ["stateful", "workers that stay"])
def test_one_object_at_both_levels(kind, tmp_path):
    """Fine where no position is asked for."""
    loader = data(False, 1, True)["inner_data"]
    if kind == "stateful":
        loader = Stateful(data(False)["inner_data"])
    run = partial(go, "bisls-sgd", steps=2, outer_data=loader, inner_data=loader)
    with pytest.raises(ValueError, match="outer_data and inner_data are the same.*make one for"):
        run(checkpoint=tmp_path / "c")
    assert not any(tmp_path.iterdir())
    assert run().reason == "all 2 steps were taken"
    same = data(False)["inner_data"]  # which keeps none
    path = tmp_path / "c"
    run = partial(go, "bisls-sgd", outer_data=same, inner_data=same)
    run(steps=4, checkpoint=path)
    equal(run(checkpoint=path, resume=True), run())


def test_nested_trees_are_resumed(tmp_path):
    case = NESTED
    run = partial(bilevel.solve, case.outer, case.inner, case.x, case.y, steps=5)
    path = tmp_path / "c"
    run(checkpoint=path, steps=3)
    again = run(checkpoint=path, resume=True)
    assert type(again.x) is dict and torch.equal(flat(again.x), flat(run().x))


def test_the_file_of_another_run_is_kept(written):
    before = written.read_bytes()
    go("bisls-sgd", checkpoint=written)
    assert written.with_name("c.old").read_bytes() == before
    assert written.read_bytes() != before


@pytest.mark.parametrize("links", [True, False])
def test_the_file_is_there_while_it_is_kept(links, tmp_path, monkeypatch):
    path, old = tmp_path / "c", tmp_path / "c.old"
    checkpoint.save(path, {"a": 1})
    moved, replace = [], os.replace

    def fail(*args):
        raise OSError("no links here")

    def spy(source, target):
        if len(moved) == 3:
            raise OSError("the disk is gone")
        replace(source, target)
        moved.append((Path(target).name, checkpoint.load(path)["a"]))

    monkeypatch.setattr(os, "replace", spy)
    if not links:
        monkeypatch.setattr(os, "link", fail)
    checkpoint.save(path, {"a": 2}, keep=True)
    assert moved == [("c.old", 1), ("c", 2)]
    with pytest.raises(OSError, match="the disk is gone.*is still there"):
        checkpoint.save(path, {"a": 3}, keep=True)
    assert checkpoint.load(path)["a"] == checkpoint.load(old)["a"] == 2
    monkeypatch.undo()
    checkpoint.save(path, {"a": 4}, keep=True)  # also where both names are of one file
    assert (checkpoint.load(path)["a"], checkpoint.load(old)["a"]) == (4, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.old"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_file_has_the_rights_of_any_other(umask, tmp_path):
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path / "c", {"a": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o666 & ~umask


def test_what_the_first_batch_decided_is_resumed(tmp_path):
    """Whether g_yy is had as a matrix: not with batches as large as the first."""

    def rows(n):
        g = torch.Generator().manual_seed(n)
        return torch.randn(n, 60, generator=g), torch.randn(n, generator=g)

    data, (V, v) = [rows(700), rows(701), rows(40)], rows(50)
    W = torch.randn(60, 60, generator=torch.Generator().manual_seed(0)) / 8

    def solve(steps, resume):
        return bilevel.solve(
            lambda x, y: ((torch.tanh(V * x) @ W @ y - v) ** 2).mean(),
            lambda x, y, b: ((torch.tanh(b[0] * x) @ W @ y - b[1]) ** 2).mean() + 0.05 * y @ y,
            *(torch.full((60,), 0.3), torch.zeros(60)),
            inner_data=data,
            steps=steps,
            inner_steps=1,
            method=bilevel.bisls(hypergradient=bilevel.Implicit(bilevel.ConjugateGradient(30))),
            checkpoint=tmp_path / "run.pt",
            resume=resume,
        )

    whole = solve(6, False)
    solve(1, False)  # the next batch is the small one
    assert torch.equal(solve(6, True).x, whole.x)
