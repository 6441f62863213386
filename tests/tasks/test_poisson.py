"""Poisson regression: the problem against NumPy, the oracle, and what its steps must not do."""

import json
import math

import numpy
import pytest
import torch

from tasks import poisson as task
from tasks.__main__ import main, parse
from tasks.data.batches import Batches
from tasks.poisson import METHODS, Regression, poisson_loss, poisson_slope, train

NAME = "poisson"


@pytest.fixture(scope="module")
def problem():
    return Regression.draw(200, 4, seed=1)


def options(*arguments):
    return parse(NAME, task, ["--batch", "10", "--quiet", *arguments])


def by_numpy(w, x, y):
    w, x, y = (numpy.asarray(v) for v in (w, x, y))
    return float(numpy.mean(numpy.exp(x.dot(w)) - y * x.dot(w)))


def test_loss_and_gradient(problem):
    w = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    loss = poisson_loss(w, problem.x, problem.y)
    assert loss.item() == pytest.approx(by_numpy(w.detach(), problem.x, problem.y), rel=1e-13)
    (slope,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(poisson_slope(w.detach(), problem.x, problem.y), slope)


def test_the_best_parameters_are_those_of_newtons_method(problem):
    x, y, w = problem.x.numpy(), problem.y.numpy(), numpy.zeros(5)
    for _ in range(100):
        mean = numpy.exp(x @ w)
        hessian = x.T @ (mean[:, None] * x) / len(y)
        move = numpy.linalg.solve(hessian, x.T @ (mean - y) / len(y))
        w = w - move * min(1.0, 1.0 / numpy.linalg.norm(move))
    numpy.testing.assert_allclose(problem.best.numpy(), w, atol=1e-8)
    assert problem.gap(problem.best) == 0 < problem.gap(torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_sps_star_steps_by_the_batches_own_optimal_value(problem, error):
    opts = options("--steps", "7")
    rows = train(problem, METHODS["SPS*"], None, error, opts, seed=5)["rows"]
    w, gaps = numpy.zeros(5), []
    best, whole = problem.best, by_numpy(problem.best, problem.x, problem.y)
    for x, y in list(Batches(problem.x, problem.y, 10, seed=5))[:8]:
        gaps.append(by_numpy(w, problem.x, problem.y) - whole)
        slope = (numpy.exp(x.numpy() @ w) - y.numpy()) @ x.numpy() / 10
        excess = by_numpy(w, x, y) - by_numpy(best, x, y) - error
        w = w - max(excess, 0.0) / (slope @ slope) * slope
    for row in rows:
        assert row["gap"] == pytest.approx(gaps[row["iteration"]], rel=1e-9)


@pytest.mark.parametrize("name", ["SPS*", "IAM", "IAM, linear averaging", "IAM, capped"])
def test_no_step_moves_away_with_the_exact_oracle(problem, name):
    result = train(problem, METHODS[name], 0.5, 0.0, options("--steps", "150"), seed=2)
    assert result["moved away"] == 0
    assert result["rows"][-1]["gap"] < result["rows"][0]["gap"]


def test_only_values_that_are_too_low_lead_away(problem):
    """A value that is too high leaves w* in the half-space that a step projects on."""
    low, high = (
        train(problem, METHODS["SPS*"], None, error, options("--steps", "100"), seed=2)
        for error in (-0.1, 0.1)
    )
    assert low["moved away"] > 0 == high["moved away"]


def test_divergence_is_infinite(problem):
    rows = train(problem, METHODS["SGD"], 1e3, 0.0, options("--steps", "30"), seed=2)["rows"]
    assert rows[-1] == {"iteration": 30, "gap": math.inf}


def test_a_run(tmp_path):
    folder = tmp_path / "a"
    assert main([NAME, "--preset", "quick", "--quiet", "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "history.csv", "summary.json", "cells.jsonl", "gap.png",
        "sensitivity.png", "wrong-optimum.png",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["method"]: row for row in summary["final gap"]}
    assert list(rows) == list(METHODS)
    assert all(rows[name]["moves away from w*"] == 0 for name in ("SPS*", "IAM"))
    assert rows["SGD"]["step size"] in task.RATES
    grid = summary["final gap over the grid"]
    assert rows["SGD"]["f(w) - f*"] == min(float(row["SGD"]) for row in grid)


def test_too_few_samples_are_refused(tmp_path, capsys):
    arguments = [NAME, "--samples", "5", "--features", "5", "--out", str(tmp_path / "a")]
    assert main(arguments) == 2
    assert "--samples 5 must exceed --features 5" in capsys.readouterr().err
