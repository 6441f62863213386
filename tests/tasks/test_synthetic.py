"""The (L0, L1)-smooth function: its closed forms, and runs against plain arithmetic."""

import json
import math

import pytest
import torch

import optim
from tasks import synthetic as task
from tasks.__main__ import main
from tasks.synthetic import METHODS, Quartic, Setting, descent, draw_starts, search

NAME = "synthetic"


@pytest.mark.parametrize("L1", task.SHARPNESS)
def test_the_derivative_and_the_smoothness(L1):
    f = Quartic(L1)
    x = torch.linspace(-7, 7, 41, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f.gap(x).sum(), x, create_graph=True)
    torch.testing.assert_close(f.slope(x), slope)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert bool((curvature <= f.L0 + L1 * slope.abs()).all())
    assert f.gap(torch.tensor(2.0)).item() == pytest.approx(L1**2 * 16 / 72 + 1)


def by_hand(name, L1, lr, norm, x, steps, minimum):
    """The gaps, with Python's numbers and the papers' formulas alone."""
    gaps, dec, total, previous = [], math.inf, 0.0, math.inf
    first, farthest, squares = x, 1e-6 * (1 + abs(x)), 0.0
    for t in range(steps + 1):
        gap, g = L1**2 * x**4 / 72 + x**2 / 4, L1**2 * x**3 / 18 + x / 2
        gaps.append(gap)
        loss = gap + minimum
        total += loss
        if name in ("gradient descent", "clipped GD"):
            step = lr * min(1.0, norm / abs(g))
        elif name == "Polyak":
            step = gap / g**2
        elif name == "inexact Polyak":
            step = loss / (math.sqrt(steps) * g**2)
        elif name == "DecSPS":  # gamma_b = 10, c_0 = 1
            dec = min(loss / g**2, 10.0 if t == 0 else dec)
            step = dec / math.sqrt(t + 1)
        elif name == "DoG":
            farthest, squares = max(farthest, abs(x - first)), squares + g**2
            step = farthest / math.sqrt(squares)
        else:
            step = min(loss / g**2 * math.sqrt((gaps[0] + minimum) / total), previous)
            previous = step
        x -= step * g
    return gaps


@pytest.mark.parametrize("name", METHODS)
def test_runs_agree_with_plain_arithmetic(name):
    setting = Setting(1e-3, math.inf if name == "gradient descent" else 10.0)
    made = descent(METHODS[name], 10.0, setting, 5.0, 30, 1.0)["rows"]
    gaps = by_hand(name, 10.0, *setting, 5.0, 30, 1.0)
    for row in made:
        assert row["gap"] == pytest.approx(gaps[row["iteration"]], rel=1e-9)
        assert row["best gap"] == min(r["gap"] for r in made[: made.index(row) + 1]) or (
            row["best gap"] == pytest.approx(min(gaps[: row["iteration"] + 1]), rel=1e-9)
        )


def test_close_is_counted_in_iterations():
    result = descent(METHODS["Polyak"], 1.0, Setting(), 5.0, 40, 1.0)
    gaps = by_hand("Polyak", 1.0, 0, 0, 5.0, 40, 1.0)
    assert result["iterations"] == next(t for t, gap in enumerate(gaps) if gap <= task.CLOSE)
    far = descent(METHODS["gradient descent"], 1.0, Setting(1e-8, math.inf), 5.0, 5, 1.0)
    assert far["iterations"] is None
    lost = descent(METHODS["gradient descent"], 10.0, Setting(1.0, math.inf), 5.0, 50, 1.0)
    assert lost["rows"][-1]["gap"] > 1e30


def test_the_best_point_is_the_one_of_the_optimizer():
    x = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    f, optimizer, seen = Quartic(10.0), None, []
    optimizer = optim.InexactPolyak([x], steps=50)
    for _ in range(50):
        with torch.no_grad():
            x.grad, gap = f.slope(x), f.gap(x)
        seen.append(gap.item())
        optimizer.step(loss=gap + 1.0)
    assert f.gap(optimizer.best()[0]).item() == min(seen)


def test_the_search_is_that_of_single_runs():
    grid = [Setting(lr, norm) for lr in (1e-1, 1e-2, 1e-4, 1.0) for norm in (1.0, 20.0, math.inf)]
    starts = [5.0, 3.3]
    for L1 in (1.0, 10.0):

        def final(setting, L1=L1):
            runs = [descent(METHODS["clipped GD"], L1, setting, x, 40, 1.0) for x in starts]
            gaps = [r["rows"][-1]["gap"] for r in runs]
            late = [math.inf if r["iterations"] is None else r["iterations"] for r in runs]
            gaps = [max(g, task.SOLVED) if math.isfinite(g) else math.inf for g in gaps]
            return max(gaps), max(late)

        found = search(grid, L1, starts, 40)
        assert final(found) == pytest.approx(min(map(final, grid)))


def test_starts():
    starts = draw_starts(5.0, 5, 3)
    assert starts[0] == 5.0 and len(set(starts)) == 5
    assert all(2.5 <= x <= 10 for x in starts)
    assert draw_starts(5.0, 3, 3) == starts[:3]


def test_a_run(tmp_path, capsys):
    arguments = [NAME, "--preset", "quick", "--device", "cpu", "--out", str(tmp_path / "a")]
    assert main([*arguments, "--repeats", "2"]) == 0
    assert "written to" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {
        "config.json", "history.csv", "summary.json", "table.csv", "gap.png", "cells.jsonl"
    }  # fmt: skip
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    rows = {(r["method"], r["L1"]): r for r in summary["gaps at the end"]}
    assert len(rows) == 28
    polyak = [rows["Polyak", L1]["iterations to 0.01"] for L1 in task.SHARPNESS]
    assert polyak == sorted(polyak) and polyak[-1] < 25
    grown = {r["method"]: r["best gap, times per decade"] for r in summary["from L1 = 10 to 1000"]}
    assert grown["DecSPS"] > 10 > 2 > grown["Polyak"]


def test_an_interrupted_comparison_goes_on(tmp_path):
    base = [NAME, "--preset", "quick", "--device", "cpu", "--quiet", "--steps", "20"]
    assert main([*base, "--out", str(tmp_path / "whole")]) == 0
    assert main([*base, "--out", str(tmp_path / "a")]) == 0
    kept = tmp_path / "a" / "cells.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:10]) + lines[10][:30])  # killed while it wrote a line
    marked = json.loads(lines[0])
    marked[1]["iterations"] = 12345.0  # shows that this one is not computed again
    kept.write_text(kept.read_text().replace(lines[0], json.dumps(marked) + "\n"))
    assert main([*base, "--out", str(tmp_path / "a"), "--resume"]) == 0
    assert (tmp_path / "a" / "history.csv").read_text() == (
        tmp_path / "whole" / "history.csv"
    ).read_text()
    assert len(kept.read_text().splitlines()) == len(lines)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["gaps at the end"][0]["iterations to 0.01"] == 12345.0


@pytest.mark.parametrize(
    "arguments, message", [(["--minimum", "-1"], "--minimum"), (["--start", "0"], "--start")]
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert main([NAME, *arguments, "--out", str(tmp_path / "a")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
