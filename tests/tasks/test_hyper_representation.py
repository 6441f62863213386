"""Hyper-representation: what is learned, how it is measured, and what nobody may look at."""

import csv
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import tasks.compare as compare
import tasks.hyper_representation as task
from tasks.__main__ import main, parse
from tasks.data import load
from tasks.models import featured, ridge_loss, value_and_gradient

NAME = "hyper-representation"
TINY = ("--preset", "quick", "--quiet", "--device", "cpu", "--batch", "64")


def options(*arguments):
    made = parse(NAME, task, [*TINY, "--ridge", "1e-3", *arguments])
    made.device = torch.device("cpu")
    return made


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run of two methods and two cells, of which one explodes."""
    folder = tmp_path_factory.mktemp("representation") / "run"
    grid = ({"adam": (1e-2,), "sgd": (1e6,)}, (1.0,))
    arguments = ["--methods", "bisls-adam", "bisps", "--grid", "small", "--steps", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.GRIDS, "small", grid)
        assert main([NAME, *TINY, *arguments, "--out", str(folder)]) == 0
    return folder


def test_the_folder_is_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        "attempts", "config.json", "history.csv", "summary.json", "grid.csv",
        "validation-loss-iterations.png", "validation-loss-work.png",
        "validation-loss-seconds.png",
    }  # fmt: skip
    history = rows(finished / "history.csv")
    assert {row["run"] for row in history} == {"bisls-adam", "bisps", "adam 0.01/1", "sgd 1e+06/1"}
    assert [row["k"] for row in history if row["run"] == "bisps"] == [str(k) for k in range(10)]
    assert sum(bool(row["validation_loss"]) for row in history if row["run"] == "bisps") == 10


def test_features_are_learned(finished):
    summary = json.loads((finished / "summary.json").read_text())
    ours = {row["method"]: row for row in summary["methods"]}
    random, ordinary = summary["references"]
    assert ours["bisls-adam"]["validation_loss"] < random["validation_loss"] - 0.5
    assert ours["bisls-adam"]["test_accuracy"] > random["test_accuracy"] + 0.1
    assert ordinary["test_accuracy"] > random["test_accuracy"]
    row = ours["bisls-adam"]
    assert row["work"] == pytest.approx(
        row["gradients"] + row["hessian_products"] + row["loss_evaluations"] / 3
    )


def test_the_cell_is_chosen_by_validation_and_an_exploding_one_is_told(finished):
    summary = json.loads((finished / "summary.json").read_text())
    grid = rows(finished / "grid.csv")
    losses = [float(row["validation_loss"]) for row in grid]
    assert len(grid) == 2 and losses == sorted(losses)
    best = f"{grid[0]['direction']} {float(grid[0]['outer step']):g}/1"
    assert summary["best cell of the grid"] == best
    assert next(row for row in grid if row["direction"] == "sgd")["stopped"].startswith("stopped")


def test_selection_reads_validation_alone():
    made = []
    for name, validation, test in (("a", 0.2, 0.9), ("b", 0.1, 0.1), ("c", float("nan"), 1.0)):
        cell = compare.Cell("sgd", 1.0, 1.0)
        mark = {"validation_loss": validation, "test_accuracy": test}
        made.append(compare.Attempt(name, cell, marks=[mark]))
    assert compare.best(made).name == "b"
    assert compare.best(made[2:]).final == float("inf")
    assert compare.best([]) is None


def test_test_data_have_no_say(tmp_path, monkeypatch):
    data, learned = load("digits"), []
    for name, test in (("a", data.test), ("b", (data.test[0] * 0, data.test[1] * 0))):
        changed = replace(data, test=test)
        monkeypatch.setattr(task, "load", lambda *_, changed=changed, **__: changed)
        arguments = [
            *TINY,
            "--methods",
            "bisls-adam",
            "--steps",
            "2",
            "--out",
            str(tmp_path / name),
        ]
        assert main([NAME, *arguments]) == 0
        learned.append(rows(tmp_path / name / "history.csv"))
    for a, b in zip(*learned, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_features_are_measured_with_the_optimal_head_on_training_images():
    problem = task.Representation(load("digits"), options())
    x = problem.begin()
    head = problem.solved_head(x)
    images, labels = problem.data.train
    _, gradient = value_and_gradient(
        ridge_loss(task.logits, featured(x, images), labels, 1e-3), head
    )
    assert max(g.abs().max() for g in gradient.values()) < 1e-6
    few = task.Representation(problem.data, options("--head-images", "50")).solved_head(x)
    assert not torch.allclose(few["weight"], head["weight"])


def test_every_method_starts_at_the_same_features():
    problem = task.Representation(load("digits"), options())
    for a, b in zip(problem.begin().parameters(), problem.begin().parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def test_mnist(real_data, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "load", partial(load, sizes=(500, 100, 100)))
    arguments = [*TINY, "--data", "mnist", "--root", str(real_data), "--steps", "1"]
    arguments += ["--methods", "bisls-adam", "--inner-steps", "2"]
    assert main([NAME, *arguments, "--out", str(tmp_path / "run")]) == 0
    (row,) = rows(tmp_path / "run" / "history.csv")
    assert float(row["outer_loss"]) > 0 and not row["failure"]
