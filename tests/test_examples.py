"""Every example runs, in a process of its own, and comes to what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(name, cwd, *arguments, launcher=("-W", "error")):
    environment = {
        "OMP_NUM_THREADS": "1", **os.environ, "BILEVEL_TINY": "1", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def number(text, pattern):
    found = re.search(pattern + r"\s*(\S+)", text)
    assert found, text
    return float(found[1])


def test_every_example_is_tested():
    tested = {"dataset_distillation.py", "own_losses.py", "own_loop.py", "data_parallel.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested


def test_dataset_distillation_beats_random_images(tmp_path):
    out = run("dataset_distillation.py", tmp_path, "--out", "result")
    assert "models trained from scratch" in out and "written to result" in out
    assert (tmp_path / "result" / "images.png").stat().st_size > 5000
    summary = json.loads((tmp_path / "result" / "summary.json").read_text())
    accuracy = {
        row["trained on"]: row["test accuracy"]
        for row in reversed(summary["models trained from scratch"])
        if row["model"] == "linear, ridge optimum"
    }
    learned, random = accuracy["learned, bisls-adam"], accuracy["random real images"]
    assert random + 0.15 < learned <= accuracy["all training images"]


def test_own_losses_find_the_features_that_matter(tmp_path):
    out = run("own_losses.py", tmp_path)
    before, after = re.search(r"error (\S+) -> (\S+)", out).groups()
    assert float(after) < 0.5 * float(before)
    matter, other = number(out, "that matter:"), number(out, "that do not:")
    assert 100 * matter < other


def test_own_loop_reaches_the_known_solution(tmp_path):
    assert number(run("own_loop.py", tmp_path), "distance") < 1e-5


def test_data_parallel_finds_the_same_on_two_processes(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    alone = run("data_parallel.py", tmp_path)
    two = run("data_parallel.py", tmp_path, launcher=torchrun)
    assert alone.startswith("1 processes, all") and two.startswith("2 processes, all")
    for pattern in ("that matter:", "that do not:"):
        assert abs(number(two, pattern) / number(alone, pattern) - 1) < 1e-6
    assert 10 * number(two, "that matter:") < number(two, "that do not:")
