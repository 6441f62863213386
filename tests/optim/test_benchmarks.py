"""The benchmarks of the optimizers run, in the small."""

import json

import numpy
import pytest
import torch

from benchmarks import optimizers, sensitivity, single_level


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


def test_the_solution_and_two_runs_of_the_single_level_benchmark():
    """f* by another solver, the gaps of SPSB and of falling SGD steps in NumPy."""
    scipy = pytest.importorskip("scipy.optimize")
    made = single_level.problem("mixed", 3)
    a = made.a.numpy()
    assert (abs(a).mean((1, 2)) > 3).sum() == 5

    def loss(x, batch=slice(None)):
        margins = a[batch].reshape(-1, 30) @ x
        slope = -(a[batch].reshape(-1, 30) / (1 + numpy.exp(margins))[:, None]).mean(0) + 0.01 * x
        return numpy.logaddexp(0, -margins).mean() + 0.005 * x @ x, slope

    solved = scipy.minimize(loss, numpy.zeros(30), jac=True, options={"gtol": 1e-9})
    assert made.minimum == pytest.approx(solved.fun, abs=1e-12)

    g = torch.Generator().manual_seed(5)
    batches = torch.randint(len(a), (8,), generator=g).tolist()
    for name in ("SPSB", "SGD, 1/sqrt(k+1)"):
        x, gaps = numpy.zeros(30), []
        for k, batch in enumerate(batches):
            f, slope = loss(x, batch)
            x = x - min(f / (slope @ slope) if name == "SPSB" else 9, 3 / (k + 1) ** 0.5) * slope
            gaps.append(loss(x)[0] - solved.fun)
        found = single_level.descend(single_level.METHODS[name], 3.0, made, 5, 8)
        assert found == pytest.approx([gaps[1], gaps[7]], rel=1e-9)


def test_single_level(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    arguments = ["--seeds", "2", "--steps", "8", "4", "--folder", str(tmp_path)]
    arguments += ["--figure", str(tmp_path / "f.png")]
    single_level.main([*arguments, "--methods", "SLSB", "SLS"])
    assert (tmp_path / "f.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "single-level.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 4 and all(0 < gap < 1e3 for r in rows for gap in r["gaps"])
    rows[0]["gap"] = rows[0]["gaps"][0] = 0.625  # shows that this one is not computed again
    (tmp_path / "single-level.json").write_text(json.dumps({"rows": rows}))
    single_level.main([*arguments, "--methods", "SLSB", "SPSB", "--resume"])
    assert "6.2e-01 (" in capsys.readouterr().out.split("set-up")[-1]
    after = json.loads((tmp_path / "single-level.json").read_text())["rows"]
    assert len(after) == 3 * 2 * 4 and after[0]["gap"] == 0.625
