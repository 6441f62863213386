"""A run that is stopped, or killed, and resumed equals the uninterrupted run bit for bit."""

import os
import pickle
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from tests.tables import METHODS, NESTED, flat, t


class Killed(Exception):
    """What a signal would do: nothing after it runs."""


def data(generators, workers=0):
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


def sgd_and_schedule(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)


@pytest.mark.parametrize("make", [torch.optim.Adam, sgd_and_schedule])
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
    for a, b, name in (
        (torch.zeros(4, 1).double(), y, "x"),
        (x, {"w": y}, "y"),
        (x.float(), y.float(), "x"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint holds {name} with.*resume with"):
            bilevel.solve(
                outer, inner, a, b, **data(False), method="bisls-sgd", checkpoint=written,
                resume=True,
            )  # fmt: skip


def test_other_data(written):
    x, y = start()
    pairs = list(zip(*data(False).values(), strict=False))
    with pytest.raises(ValueError, match="written with inner_data, outer_data, but data"):
        bilevel.solve(outer, inner, x, y, data=pairs, checkpoint=written, resume=True)
    short = {k: list(v)[:1] + list(v)[:1] for k, v in data(False).items()}
    with pytest.raises(ValueError, match="ended after 2 batches.*resume with"):
        bilevel.solve(outer, inner, x, y, **short, checkpoint=written, resume=True)


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
