"""The run folder, its files, figures and the progress bar."""

import csv
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import tasks.run
from tasks.errors import FolderInUse
from tasks.figures import curves, image_grid
from tasks.files import plain, table, write
from tasks.run import Run, commit, default_folder, device, progress, start

CONFIG = {"task": "ridge", "steps": 10, "root": Path("x"), "device": torch.device("cpu"), "a": 0.5}


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_the_folder_says_what_ran(tmp_path):
    run = Run(tmp_path / "deep" / "run", CONFIG)
    run.record({"k": 0, "loss": torch.tensor(0.1, dtype=torch.float64), "residual": None})
    run.record({"k": 1, "loss": 1 / 3})
    assert history(run.folder) == [
        ["k", "loss", "residual"],
        ["0", "0.1", ""],
        ["1", "0.3333333333333333", ""],
    ]
    assert not (run.folder / "summary.json").exists()
    summary = run.summarize({"accuracy": torch.tensor(0.5), "loss": math.nan, "rows": ({"b": 1},)})
    assert summary["accuracy"] == 0.5
    saved = json.loads((run.folder / "summary.json").read_text())
    assert saved == {"accuracy": 0.5, "loss": "nan", "rows": [{"b": 1}]}
    config = json.loads((run.folder / "config.json").read_text())
    assert config["options"] == {
        "task": "ridge", "steps": 10, "root": "x", "device": "cpu", "a": 0.5
    }  # fmt: skip
    environment = config["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"bilevel", "commit", "hardware", "device", "started"} <= set(environment)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json", "history.csv", "summary.json"
    ]  # fmt: skip


def test_rows_reach_the_file_at_once_and_keep_their_columns(tmp_path):
    run = Run(tmp_path, CONFIG)
    run.record({"k": 0})
    assert history(tmp_path) == [["k"], ["0"]]
    with pytest.raises(ValueError, match=r"columns \['k'\], and a row brings \['new'\]"):
        run.record({"k": 1, "new": 2})
    assert history(tmp_path) == [["k"], ["0"]]


def test_results_of_other_options_are_refused(tmp_path):
    Run(tmp_path, CONFIG).record({"k": 0})
    with pytest.raises(FolderInUse, match=r"\(a 0.5 there, 0.25 now\).*--overwrite"):
        Run(tmp_path, {**CONFIG, "a": 0.25})
    assert history(tmp_path) == [["k"], ["0"]]  # untouched
    with pytest.raises(FolderInUse, match="extra None there"):
        Run(tmp_path, {**CONFIG, "extra": 1})


def test_the_same_options_write_the_folder_anew(tmp_path):
    run = Run(tmp_path, CONFIG)
    run.record({"k": 0})
    run.summarize({})
    Run(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_overwrite_replaces_results_and_leaves_other_files(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    Run(tmp_path, CONFIG).record({"k": 0})
    Run(tmp_path, {"other": 1}, overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["options"] == {"other": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "mine.txt"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", '{"their": "own"}', "config.json is of no run"),
        ("config.json", "no json", "config.json is of no run"),
        ("config.json", "[1]", "config.json is of no run"),
        ("history.csv", "a,b", "history.csv belongs to something else"),
        ("summary.json", "{}", "summary.json belongs to something else"),
    ],
)
def test_files_of_somebody_else_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FolderInUse, match=message):
        Run(tmp_path, CONFIG)
    assert (tmp_path / name).read_text() == content


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FolderInUse, match="out is a file"):
        Run(tmp_path / "out", CONFIG)


def test_resume_keeps_the_rows_the_checkpoint_knows(tmp_path):
    run = Run(tmp_path, CONFIG)
    for k in range(3):
        run.record({"k": k, "loss": 0.5 * k})
    with (tmp_path / "history.csv").open("a") as file:
        file.write("3")  # killed while writing
    again = Run(tmp_path, {**CONFIG, "steps": 20}, resume=True)
    assert len(again.rows) == 4
    again.keep(2)
    again.record({"k": 2, "loss": 7.0})
    assert history(tmp_path) == [["k", "loss"], ["0", "0.0"], ["1", "0.5"], ["2", "7.0"]]
    with pytest.raises(ValueError, match="keep 9 rows of 3"):
        again.keep(9)
    again.keep(0)
    assert not (tmp_path / "history.csv").exists()
    with pytest.raises(FolderInUse, match="other options"):
        Run(tmp_path, {**CONFIG, "a": 1.0}, resume=True)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_who_reads_while_a_file_is_written_has_it_whole(tmp_path):
    path = tmp_path / "summary.json"
    write(path, b"old")
    with path.open("rb") as reader:
        write(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_start_takes_the_options_that_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Namespace(task="ridge", out=None, overwrite=False, quiet=True, seed=1)
    run = start(options)
    assert run.folder == options.out and run.folder.parent == Path("runs")
    assert run.folder.name.startswith("ridge-20")
    assert run.config == {"task": "ridge", "seed": 1}
    options.quiet = False  # shown otherwise, the same results
    assert start(options).folder == run.folder


def test_default_folders_never_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = set()
    for _ in range(3):
        folder = default_folder("ridge")
        folder.mkdir(parents=True)
        made.add(folder)
    assert len(made) == 3


def test_commit_is_that_of_the_project_and_of_no_checkout_around(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "run.py").write_text("")
    git("add", "."), git("commit", "-m", "x")
    monkeypatch.setattr(tasks.run, "__file__", str(tmp_path / "tasks" / "run.py"))
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "tasks" / "run.py").write_text("changed")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(tasks.run, "__file__", str(tmp_path / "lib" / "tasks" / "run.py"))
    assert commit() is None


def test_devices():
    assert device("cpu") == torch.device("cpu")
    assert device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device '{wrong}' cannot be used .*choose auto"):
            device(wrong)


def test_progress_is_silent_off_a_terminal(capsys, monkeypatch):
    items = [1, 2, 3]
    assert progress(items, desc="x") is items
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert progress(items, quiet=True) is items
    assert list(progress(items, total=3, desc="working")) == items
    assert "working" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert progress(items) is items


def test_plain_values():
    import numpy as np

    assert plain({1: (torch.tensor([1, 2]), np.float64(0.5), np.arange(2))}) == {
        "1": [[1, 2], 0.5, [0, 1]]
    }
    assert plain(torch.float32) == "torch.float32"
    assert plain([math.inf, -math.inf], finite=True) == ["inf", "-inf"]
    assert plain([math.inf, True, None]) == [math.inf, True, None]


def test_table():
    summary = {
        "steps": 10,
        "test accuracy": 0.94321,
        "residual": None,
        "compared": [{"data": "learned", "accuracy": 0.9}, {"data": "random", "n": 3}],
    }
    assert table(summary).splitlines() == [
        "steps          10",
        "test accuracy  0.9432",
        "residual       -",
        "",
        "compared",
        "  data     accuracy  n",
        "  learned  0.9",
        "  random             3",
    ]
    assert table({}) == ""


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)


def test_curves_can_be_told_apart_in_greyscale(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("tasks.figures._save", lambda figure, path: drawn.append(figure))
    xs = list(range(50))
    curves(
        tmp_path / "a.png",
        {f"method {i}": (xs, torch.tensor([math.nan, 0.0, *xs[2:]])) for i in range(6)},
        "time [s]",
        "loss",
        title="A title",
        log_y=True,
    )
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "time [s]", "loss", "A title"
    )  # fmt: skip
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == [
        "method 0", "method 1"
    ]  # fmt: skip
    lines = axes.get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 6
    assert all(math.isnan(y) for y in lines[0].get_ydata()[:2])


def test_figures_are_written_whole(tmp_path):
    path = curves(tmp_path / "curve.png", {"a": ([0, 1], [1.0, 2.0])}, "k", "loss")
    assert path.read_bytes().startswith(b"\x89PNG") and pixels(path).float().std() > 5
    nothing = curves(
        tmp_path / "nan.png", {"a": ([0, 1], [math.nan, -1.0])}, "k", "loss", log_y=True
    )
    assert nothing.exists()
    images = torch.linspace(0, 1, 3 * 16).reshape(3, 1, 4, 4)
    images[0, 0, 0, 0] = math.nan
    grid = image_grid(tmp_path / "grid.png", images, torch.tensor([0, 1, 2]), "ten", columns=2)
    assert pixels(grid).float().std() > 20
    assert sorted(item.suffix for item in tmp_path.iterdir()) == [".png"] * 3


def test_image_grid_has_labels_and_one_scale(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("tasks.figures._save", lambda figure, path: drawn.append(figure))
    images = torch.stack([torch.zeros(4, 4), torch.full((4, 4), 2.0)])
    image_grid(tmp_path / "a.png", images, ["zero", "one"])
    both = drawn[0].axes[:2]
    assert [axes.get_title() for axes in both] == ["zero", "one"]
    assert {axes.images[0].get_clim() for axes in both} == {(0, 2)}


def test_figures_refuse_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="series is empty"):
        curves(tmp_path / "a.png", {}, "k", "loss")
    with pytest.raises(ValueError, match="'a' has 1 x values and 2 y values"):
        curves(tmp_path / "a.png", {"a": ([0], [1, 2])}, "k", "loss")
    for shape, labels in (((3, 3, 4, 4), "abc"), ((2, 4, 4), "abc"), ((0, 4, 4), "")):
        with pytest.raises(ValueError, match="a picture needs images"):
            image_grid(tmp_path / "a.png", torch.zeros(shape), labels)
