"""Quadratic and ridge problems: the closed forms against solvers and differences of their own."""

import json
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel
import tasks.exact as exact
import tasks.quadratic
import tasks.ridge
from tasks.__main__ import main, parse
from tasks.data.batches import Batches

MAKE = {"quadratic": tasks.quadratic.Quadratic, "ridge": tasks.ridge.Ridge}
SMALL = {
    "quadratic": ("--outer-dim", "3", "--inner-dim", "5", "--samples", "11"),
    "ridge": ("--features", "5", "--samples", "9"),
}


def problem(name, *arguments):
    module = getattr(tasks, name)
    options = parse(name, module, [*SMALL[name], *arguments])
    options.device = torch.device("cpu")
    return MAKE[name](options)


cases = pytest.mark.parametrize(
    "name, arguments",
    [
        ("quadratic", ()),
        ("quadratic", ("--condition", "1e4", "--seed", "1")),
        ("ridge", ()),
        ("ridge", ("--penalty", "one", "--condition", "1e4")),
    ],
)


@pytest.fixture(scope="module")
def made():
    kept = {}

    def get(name, arguments):
        if (name, arguments) not in kept:
            kept[name, arguments] = problem(name, *arguments)
        return kept[name, arguments]

    return get


def somewhere(p):
    """A point without symmetry."""
    return torch.linspace(-1.3, 0.8, len(p.x), dtype=torch.float64).square() - 0.7


def solved(p, x):
    """y*(x), F(x) by NumPy and the losses alone: g is quadratic in y."""
    y = torch.zeros_like(p.y)
    slope = torch.func.grad(p.inner, 1)(x, y, p.inner_rows).numpy()
    hessian = torch.func.jacrev(torch.func.grad(p.inner, 1), 1)(x, y, p.inner_rows).numpy()
    y = torch.from_numpy(np.linalg.solve(hessian, -slope))
    return y, float(p.outer(x, y, p.outer_rows))


@cases
def test_closed_forms(name, arguments, made):
    p = made(name, arguments)
    x = somewhere(p)
    y, value = solved(p, x)
    torch.testing.assert_close(p.solution(x), y, rtol=1e-8, atol=1e-10)
    assert float(p.value(x)) == pytest.approx(value, rel=1e-9)
    eps = 1e-5
    steps = eps * torch.eye(len(x), dtype=torch.float64)
    numeric = [(solved(p, x + e)[1] - solved(p, x - e)[1]) / (2 * eps) for e in steps]
    expected = torch.tensor(numeric, dtype=torch.float64)
    torch.testing.assert_close(p.gradient(x), expected, rtol=1e-6, atol=1e-9 * value)
    gap = float(p.gap(x))
    assert gap == pytest.approx(value - solved(p, p.optimum)[1], rel=1e-6) and gap > 0


@cases
def test_the_optimum_is_stationary_and_least(name, arguments, made):
    p = made(name, arguments)
    start = float(p.gradient(somewhere(p)).norm())
    assert p.gradient(p.optimum).norm() < 1e-8 * max(start, 1)
    found = [
        scipy.optimize.minimize(
            lambda x: solved(p, torch.from_numpy(x))[1],
            begin,
            method="BFGS",
            jac=lambda x: p.gradient(torch.from_numpy(x)).numpy(),
            options={"gtol": 1e-9},
        ).fun
        for begin in (np.zeros(len(p.x)), somewhere(p).numpy() - 3)
    ]
    assert min(found) == pytest.approx(float(p.value(p.optimum)), rel=1e-7)


@cases
def test_the_condition_is_the_one_asked_for(name, arguments, made):
    p = made(name, arguments)
    features = p.inner_rows[0] if name == "ridge" else p.inner_rows[0][:, len(p.x) :]
    moment = features.T @ features / len(features)
    asked = float(arguments[arguments.index("--condition") + 1]) if "1e4" in arguments else 100.0
    assert float(torch.linalg.cond(moment)) == pytest.approx(asked, rel=1e-6)


@cases
def test_the_error_of_a_hypergradient(name, arguments, made):
    """Zero at y*(x) with an exact solve; elsewhere that of the formula at hand."""
    p = made(name, arguments)
    x, solve = somewhere(p), bilevel.Implicit(bilevel.ConjugateGradient(steps=50, rtol=1e-13))
    assert exact.error(p, x, None, solve)["error"] < 1e-6
    y = p.solution(x) + torch.linspace(0.1, 0.5, len(p.y), dtype=torch.float64)
    off = exact.error(p, x, y, solve)["error"]
    hessian = torch.func.jacrev(torch.func.grad(p.inner, 1), 1)(x, y, p.inner_rows)
    cross = torch.func.jacrev(torch.func.grad(p.inner, 1))(x, y, p.inner_rows)
    fx, fy = torch.func.grad(p.outer, (0, 1))(x, y, p.outer_rows)
    h = fx - cross.T @ torch.linalg.solve(hessian, fy)
    true = p.gradient(x)
    assert off == pytest.approx(float((h - true).norm() / true.norm()), rel=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_the_seed_alone_makes_the_problem(name):
    first, again, other = (problem(name, "--seed", seed) for seed in "001")
    for level in ("inner_rows", "outer_rows"):
        for a, b, c in zip(*(getattr(p, level) for p in (first, again, other)), strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("batch", [(), ("--batch", "7")])
def test_a_run_reports_the_gap(name, batch, tmp_path):
    folder = tmp_path / "run"
    arguments = [*SMALL[name], "--preset", "quick", "--quiet", "--methods", "bisls-sgd", *batch]
    assert main([name, *arguments, "--device", "cpu", "--out", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    (row,) = summary["methods"]
    assert row["iterations"] == 20 and row["stopped"] == ""
    assert 0 <= row["gap"] < (2.0 if batch else 0.2) * summary["gap at the start"]
    p = problem(name, *batch)
    if batch:
        feed = {
            "outer_data": Batches(*p.outer_rows, size=7, drop_last=True),
            "inner_data": Batches(*p.inner_rows, size=7, drop_last=True),
        }
    else:
        feed = {}
    level = (lambda loss, _: loss) if batch else (lambda loss, rows: partial(loss, rows=rows))
    f, g = level(p.outer, p.outer_rows), level(p.inner, p.inner_rows)
    again = bilevel.solve(f, g, p.x, p.y, method="bisls-sgd", steps=20, seed=0, **feed)
    assert row["gap"] == pytest.approx(float(p.gap(again.x)), rel=1e-6)
    for picture in ("iterations", "work", "seconds"):
        assert (folder / f"gap-{picture}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("quadratic", "--samples", "5"), "--samples 5 cannot span x and y"),
        (("quadratic", "--condition", "0.5"), "must lie between 1 and 1e13"),
        (("quadratic", "--condition", "steep"), "--condition"),
        (("ridge", "--prior", "0"), "argument --prior: must be a finite number above 0"),
        (("ridge", "--samples", "5"), "5 samples cannot span 20 variables"),
        (("ridge", "--resume"), "--resume without --out"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    if "--resume" in rest:
        rest += SMALL[name]
    assert main([name, *rest]) == 2
    assert message in capsys.readouterr().err
