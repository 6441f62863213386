"""Comparisons that are interrupted and go on: the same files as without."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
import tasks.compare as compare
import tasks.exact
from tasks.__main__ import main

GRID = ({"adam": (1e-2,), "sgd": (1e-1, 1e60)}, (1.0,))
MEASURES = ("gap", "gradient_norm", "hypergradient_error", "gap at the start", "F*", "error")
MEASURES += ("residual", "condition of F''")
NAMES = ["bisls-adam", "bisps", "adam 0.01/1", "sgd 0.1/1", "sgd 1e+60/1"]
TASK = ["quadratic", "--outer-dim", "3", "--inner-dim", "5", "--samples", "11", "--batch", "9"]
TASK += ["--methods", "bisls-adam", "bisps", "--steps", "12", "--inner-steps", "2"]
TASK += ["--device", "cpu", "--quiet"]


def start(folder, *more):
    return main([*TASK, "--out", str(folder), *more])


def timeless(value):
    """Without seconds; measures without their last digits, which LAPACK leaves to the memory."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in ("seconds", "started")}
        return {k: rounded(v) if k in MEASURES else timeless(v) for k, v in kept.items()}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def rounded(value):
    if value in (None, ""):
        return value
    return f"{float(value):.6g}" if abs(float(value)) > 1e-9 else "tiny"


def contents(folder):
    out = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                out[path.name] = timeless(list(csv.DictReader(file)))
        elif path.suffix == ".json":
            out[path.name] = timeless(json.loads(path.read_text()))
        else:
            out[path.name] = None
    assert {"history.csv", "grid.csv", "summary.json", "config.json"} <= set(out)
    # finite differences, of which rounding is the error; computed without the runs
    del out["summary.json"]["hypergradients at (x, y*(x)) of the start"]
    return out


@pytest.fixture(autouse=True)
def grid(monkeypatch):
    monkeypatch.setitem(compare.GRIDS, "small", GRID)
    monkeypatch.setattr(tasks.exact, "draw", lambda *_, **__: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run writes; one of its cells explodes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.GRIDS, "small", GRID)
        patch.setattr(tasks.exact, "draw", lambda *_, **__: None)
        assert start(folder) == 0
    found = contents(folder)
    assert list(dict.fromkeys(row["run"] for row in found["history.csv"])) == NAMES
    stops = [row["stopped"] for row in found["grid.csv"]]
    assert sum(map(bool, stops)) == 1
    return found


class Killed(Exception):
    pass


def solve_counting(monkeypatch):
    """The names of the attempts that take steps, one for each step."""
    taken, original = [], tasks.compare.bilevel.solve

    def solve(*args, callback=None, **rest):
        def told(state, record):
            taken.append(record.k)
            return callback(state, record)

        return original(*args, callback=told if callback else None, **rest)

    monkeypatch.setattr(tasks.compare.bilevel, "solve", solve)
    return taken


@pytest.mark.parametrize(
    "place, count",
    [
        ("measure", 1),
        ("measure", 5),
        ("measure", 26),
        ("record", 1),
        ("record", 17),
        ("record", 47),
    ],
)
def test_killed_and_resumed(place, count, whole, tmp_path, monkeypatch):
    """Killed at the ``count``-th measure or row; finished steps are not taken again."""
    owner, name = {
        "measure": (tasks.exact, "error"),
        "record": (tasks.run.Run, "record"),
    }[place]
    original, calls = getattr(owner, name), []

    def dying(*args):
        calls.append(args)
        if len(calls) == count:
            raise Killed
        return original(*args)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            start(folder)
    assert not (folder / "summary.json").exists()
    path = folder / "history.csv"
    kept = len(path.read_text().splitlines()) - 1 if path.exists() else 0
    taken = solve_counting(monkeypatch)
    assert start(folder, "--resume") == 0
    assert contents(folder) == whole
    assert len(taken) <= len(whole["history.csv"]) - kept + 2  # since the last checkpoint


def test_an_interrupt_ends_the_comparison(whole, tmp_path, monkeypatch, capsys):
    folder, original, calls = tmp_path / "run", tasks.exact.error, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.exact, "error", interrupted)
        assert start(folder) == 130
    assert f"--resume --out {folder} goes on" in capsys.readouterr().err
    assert len(calls) == 17  # no other method was begun
    assert start(folder, "--resume") == 0
    assert contents(folder) == whole


def test_a_finished_run_is_read(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert start(folder) == 0
    taken = solve_counting(monkeypatch)
    assert start(folder, "--resume") == 0
    assert taken == [] and contents(folder) == whole


def test_what_an_older_run_left_is_not_taken(whole, tmp_path):
    """A run of other options, replaced and interrupted at once: nothing of it is resumed."""
    folder = tmp_path / "run"
    assert start(folder, "--seed", "1") == 0
    old = {path.name: path.read_bytes() for path in (folder / "attempts").iterdir()}
    with pytest.MonkeyPatch.context() as patch:

        def dying(*_):
            raise Killed

        patch.setattr(tasks.exact, "error", dying)
        with pytest.raises(Killed):
            start(folder, "--overwrite")
    assert (folder / "attempts" / "bisps.pt").read_bytes() == old["bisps.pt"]
    assert start(folder, "--resume") == 0
    assert contents(folder) == whole


def test_other_steps_are_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(folder) == 0
    assert start(folder, "--resume", "--steps", "13") == 2
    assert "was to take 12 steps" in capsys.readouterr().err
    assert start(folder, "--resume", "--seed", "1") == 2
    assert "(seed 0 there, 1 now)" in capsys.readouterr().err


KILLED = """
import os, signal, sys
import tasks.compare, tasks.exact
from tasks.__main__ import main
tasks.compare.GRIDS["small"] = {grid!r}
original, calls = tasks.exact.error, []
def error(*args):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
tasks.exact.error = error
tasks.exact.draw = lambda *_, **__: None
main({arguments!r})
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_sigkill(whole, tmp_path):
    folder = tmp_path / "run"
    code = KILLED.format(grid=GRID, arguments=[*TASK, "--out", str(folder)])
    source = str(Path(tasks.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert start(folder, "--resume") == 0
    assert contents(folder) == whole


def parsed(grid):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(["--grid", grid]).grid


def test_a_grid_may_be_the_one_cell_that_a_table_names():
    for name in ("tiny", "medium", "large"):
        found = compare.cells(parsed(name))
        assert [compare.cells(parsed(str(cell))) for cell in found] == [[cell] for cell in found]
    assert compare.cells("sgd 3.5/1e-4") == [compare.Cell("sgd", 3.5, 1e-4)]


@pytest.mark.parametrize(
    "grid", ["huge", "", "adam", "adam 0.1", "adam 1/2/3", "rmsprop 1/1", "sgd -1/1", "sgd 1/nan"]
)
def test_another_grid_is_refused_in_words(grid, capsys):
    with pytest.raises(SystemExit):
        parsed(grid)
    assert "such as 'adam 0.001/0.1'" in " ".join(capsys.readouterr().err.split())
