"""The benchmarks of the optimizers run, in the small."""

import json

import pytest
import torch

from benchmarks import optimizers, sensitivity


def test_speed(monkeypatch, tmp_path, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(optimizers, "SHAPES", {"1 large": [(30, 20)], "2 small": [(3,)] * 2})
    path = tmp_path / "speed.json"
    optimizers.main(
        ["--rounds", "1", "--threads", str(threads), "--device", "cpu", "--json", str(path)]
    )
    assert "optim.ScheduleFreeAdamSPS" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["2 small"]) >= 9


def test_sensitivity(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sensitivity, "FACTORS", [0.1, 1.0])
    threads = torch.get_num_threads()
    sensitivity.main(["--steps", "2", "--seeds", "1", "--out", str(tmp_path / "s")])
    torch.set_num_threads(threads)
    problems = json.loads((tmp_path / "s.json").read_text())["problems"]
    assert (tmp_path / "s.png").stat().st_size > 10_000
    for problem in problems.values():
        assert problem["reference"] < problem["initial"]
        finals = [runs[1][0] for runs in problem["final"].values()]
        assert all(v < 3 * problem["initial"] for v in finals)
