"""The benchmarks of speed run, in the small."""

import json
import sys

import pytest
import torch
from torch import nn

from benchmarks import growth, hypergradients, memory, peers, report, reuse, small


def rows(path):
    return json.loads(path.read_text())["rows"]


def test_hypergradients(monkeypatch, tmp_path):
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 3))  # noqa: E731
    monkeypatch.setattr(hypergradients, "MODELS", {"tiny": model})
    labels = torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, *a, **o: labels(min(high, 3), *a, **o))
    options = ["--examples", "6", "--products", "5", "--repeats", "1", "--device", "cpu"]
    hypergradients.main([*options, "--out", str(tmp_path)])
    found = {row["method"]: row for row in rows(tmp_path / "hypergradients-cpu.json")}
    assert found["bilevel ConjugateGradient"]["error"] < 1e-2
    close = {name: row for name, row in found.items() if name.endswith("products")}
    assert len(close) == 1
    assert all(row["error"] <= found["bilevel Neumann"]["error"] for row in close.values())
    assert set(peers.PEERS) < set(found)
    for name in peers.PEERS:  # measured, or how to install it
        assert found[name]["error"] != "-" or found[name]["note"]


@pytest.mark.parametrize("given", [["--out", "{}"], ["--out={}"]])
def test_what_is_kept_does_not_say_where_it_was_written(given, monkeypatch, tmp_path):
    out = [argument.format(tmp_path) for argument in given]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "growth", "--repeats", "2", *out])
    report.write("found", [{"ms": 1.0}], str(tmp_path))
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["arguments"] == ["growth", "--repeats", "2"]


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    example = hypergradients.example(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 4, torch.float32
    )
    monkeypatch.setattr(peers, "PEERS", {"absent": ("no_such_package", peers.higher)})
    assert "pip install" in peers.calls(example, 2)["absent"]


def test_small(monkeypatch, tmp_path):
    """Without the graph, whose compiler takes its time and has tests of its own."""
    solve = small.bilevel.solve
    monkeypatch.setattr(
        small.bilevel, "solve", lambda *a, compile=False, **o: solve(*a, **o, progress=False)
    )
    small.main(["--steps", "4", "--repeats", "1", "--out", str(tmp_path)])
    assert {row["how"] for row in rows(tmp_path / "small.json")} >= {"eager", "compile=True"}


def test_memory(tmp_path):
    found = memory.one("bilevel Unrolled", 3, 4, "cpu")
    again = memory.one("bilevel Unrolled(recompute=True)", 3, 4, "cpu")
    assert found["norm"] == pytest.approx(again["norm"], rel=1e-5) and found["MiB"] >= 0


def test_growth(monkeypatch, tmp_path):
    per_iteration = growth.per_iteration
    monkeypatch.setattr(
        growth, "per_iteration", lambda *a, **o: per_iteration(*a, **(o | {"compile": False}))
    )
    options = ["--repeats", "1", "--iterations", "10", "--largest", "3"]
    growth.main([*options, "--out", str(tmp_path)])
    found = rows(tmp_path / "growth.json")
    assert {row["at"] for row in found if row["what"] == "parameters"} == {100, 1000}
    assert all(row["ms"] > 0 for row in found)


def test_reuse(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    reuse.main(["--sides", "8", "--batch", "8", "--repeats", "1", "--device", "cpu"])
    found = rows(next(tmp_path.rglob("reuse-cpu.json")))
    assert [row["pays"] for row in found] == ["False", "False"]  # far too small
    assert all(row["times faster"] > 0 for row in found)
