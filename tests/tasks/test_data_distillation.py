"""Data distillation: what is learned, who judges it, and what nobody may look at."""

import csv
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import tasks.compare as compare
import tasks.data_distillation as task
from tasks.__main__ import main, parse
from tasks.data import load
from tasks.models import Net, double, measure, minimize, ridge_loss, square, value_and_gradient

CPU = torch.device("cpu")
TINY = ("--preset", "quick", "--quiet", "--device", "cpu")


def options(*arguments):
    made = parse("data-distillation", task, [*TINY, *arguments])
    made.device, made.inner_steps = CPU, made.inner_steps or 10
    return made


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run with two hand-tuned cells."""
    folder = tmp_path_factory.mktemp("distillation") / "run"
    grid = ({"adam": (1e-2,), "sgd": (1e-1,)}, (1.0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.GRIDS, "small", grid)
        arguments = [*TINY, "--grid", "small", "--repeats", "1", "--out", str(folder)]
        assert main(["data-distillation", *arguments]) == 0
    return folder


def test_the_folder_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json", "history.csv", "summary.json", "grid.csv", "attempts", "learned.pt",
        "images.png",
        "validation-loss-iterations.png", "validation-loss-work.png",
        "validation-loss-seconds.png",
    }  # fmt: skip
    history = rows(finished / "history.csv")
    assert [row["k"] for row in history] == [str(k) for k in range(20)] * 3
    assert dict.fromkeys(row["run"] for row in history) == dict.fromkeys(
        ("bisls-adam", "adam 0.01/1", "sgd 0.1/1")
    )
    config = json.loads((finished / "config.json").read_text())["options"]
    assert config["steps"] == 20 and config["method"] == "bisls-adam"


def test_learned_images_beat_random_ones_by_far(finished):
    table = json.loads((finished / "summary.json").read_text())["models trained from scratch"]
    accuracy = {(row["trained on"].split(" (")[0], row["model"]): row for row in table}
    optimum, fresh = "linear, ridge optimum", "linear, random start, Adam"
    random = accuracy["random real images", optimum]
    assert random["runs"] == 4 and random["images"] == 10 and random["std"] > 0
    for model in (optimum, fresh, "mlp, random start, Adam"):
        learned = accuracy["learned, bisls-adam", model]["test accuracy"]
        assert learned > accuracy["random real images", model]["test accuracy"] + 0.08
    assert accuracy["learned, bisls-adam", optimum]["test accuracy"] > 0.88
    assert accuracy["all training images", optimum]["test accuracy"] > 0.95


def test_what_was_saved_is_what_was_judged(finished):
    saved = torch.load(finished / "learned.pt")
    summary = json.loads((finished / "summary.json").read_text())
    assert saved["images"].shape == (10, 1, 8, 8) and saved["labels"].tolist() == list(range(10))
    data = load("digits")
    problem = task.Distillation(data, options())
    model = problem.train((saved["images"], saved["labels"]), problem.net.zeros())
    loss, _ = measure(problem.net, model, data.validation)
    _, accuracy = measure(problem.net, model, data.test)
    assert loss == pytest.approx(summary["validation loss"], rel=1e-4)
    assert accuracy == summary["models trained from scratch"][0]["test accuracy"]


def test_the_cell_is_chosen_by_validation(finished):
    grid = rows(finished / "grid.csv")
    losses = [float(row["validation_loss"]) for row in grid]
    assert losses == sorted(losses) and len(grid) == 2
    best = f"{grid[0]['direction']} {float(grid[0]['outer step']):g}/1"
    table = json.loads((finished / "summary.json").read_text())["models trained from scratch"]
    assert f"learned, {best} (best of 2)" in {row["trained on"] for row in table}


def test_test_data_have_no_say(tmp_path, monkeypatch):
    """With other test images and labels, the same images are learned and the same cell chosen."""
    data = load("digits")
    learned, validation = [], []
    for name, test in (("a", data.test), ("b", (data.test[0] * 0, data.test[1] * 0))):
        monkeypatch.setattr(task, "load", lambda *_, test=test, **__: replace(data, test=test))
        monkeypatch.setattr(task, "judge", lambda *_: [])
        assert (
            main(["data-distillation", *TINY, "--steps", "3", "--out", str(tmp_path / name)]) == 0
        )
        learned.append(torch.load(tmp_path / name / "learned.pt")["images"])
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        validation.append(summary["validation loss"])
    assert torch.equal(*learned) and validation[0] == validation[1]


def test_the_inner_loss_sees_no_real_data_and_the_outer_one_only_training_data():
    data = load("digits")
    problem = task.Distillation(data, options("--begin", "noise"))
    real = data.train[0].flatten(1)
    assert torch.cdist(problem.x["images"].flatten(1), real).min() > 1
    source = task.Trainings(data.train, problem.starts, 256, seed=0)
    (images, _, _), begin = next(iter(source))
    assert torch.cdist(images.flatten(1), real).min(1).values.max() < 1e-3
    assert set(begin) == set(problem.net.zeros())


def test_random_images_are_of_every_class_and_differ_from_draw_to_draw():
    data = load("digits")
    first, labels = task.real_images(data, 3, 0, 1)
    second, _ = task.real_images(data, 3, 0, 2)
    assert labels.tolist() == [c for c in range(10) for _ in range(3)]
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="--images-per-class 500: there are"):
        task.real_images(data, 500, 0)


def test_the_ridge_optimum_is_one_wherever_it_is_sought():
    data = load("digits")
    net = Net("linear", data.shape, data.classes, CPU)
    images, labels = task.real_images(data, 2, 0)
    loss = ridge_loss(net, images.double(), labels, 1e-3)
    found = [minimize(loss, double(net.start(seed))) for seed in (0, 1)]
    for point in found:
        _, gradient = value_and_gradient(loss, point)
        assert max(g.abs().max() for g in gradient.values()) < 1e-6
    # strong convexity: the distance to the optimum is at most |gradient| / ridge
    apart = square({key: found[0][key] - found[1][key] for key in found[0]}).sqrt()
    assert apart < 2 * 1e-6 * 650**0.5 / 1e-3


def test_labels_are_learned_as_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "ADAM_STEPS", 5)
    folder = tmp_path / "run"
    arguments = [*TINY, "--learn-labels", "--steps", "5", "--repeats", "1"]
    assert main(["data-distillation", *arguments, "--out", str(folder)]) == 0
    labels = torch.load(folder / "learned.pt")["labels"]
    assert labels.shape == (10, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(10))
    assert (labels.argmax(1) == torch.arange(10)).all() and labels.max() < 1


@pytest.mark.parametrize("model", ["lenet", "convnet"])
def test_networks_are_trained_anew_in_every_iteration(model, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "ADAM_STEPS", 5)
    folder = tmp_path / "run"
    arguments = [*TINY, "--model", model, "--steps", "2", "--inner-steps", "4", "--window", "3"]
    arguments += ["--repeats", "1", "--batch", "16"]
    assert main(["data-distillation", *arguments, "--out", str(folder)]) == 0
    history = rows(folder / "history.csv")
    assert [row["failure"] for row in history] == ["", ""]
    problem = task.Distillation(load("digits"), options("--model", model))
    begins = [begin for _, (_, begin) in zip(range(3), task.Trainings(
        problem.data.train, problem.starts, 256, seed=0), strict=False)]  # fmt: skip
    assert len({float(square(begin)) for begin in begins}) == 3
    assert not any(task.Distillation(load("digits"), options()).starts[0]["1.weight"].flatten())


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "much"])
def test_a_ridge_is_a_finite_number_above_0(value, capsys):
    assert main(["data-distillation", f"--ridge={value}"]) == 2
    assert "argument --ridge: " in capsys.readouterr().err


def test_mnist(real_data, tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--data", "mnist", "--root", str(real_data), "--steps", "3"]
    arguments += ["--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "judge", lambda *_: [])
        patch.setattr(task, "load", partial(load, sizes=(1000, 100, 100)))
        assert main(["data-distillation", *arguments, "--out", str(folder)]) == 0
    losses = [float(row["outer_loss"]) for row in rows(folder / "history.csv")]
    assert losses[-1] < losses[0]
    assert torch.load(folder / "learned.pt")["images"].shape == (10, 1, 28, 28)
