"""The contest between the defaults and tuned cells is what it says, on a tiny budget."""

import json

import pytest
import torch

import bilevel
from benchmarks import contest, overview, race
from benchmarks.contest import Cell
from benchmarks.kinked import KINKED
from benchmarks.larger import EVERY
from benchmarks.problems import CASES, INNER, STEPS, distillation, outcome, solved
from benchmarks.stumbles import STUMBLES
from benchmarks.unseen import UNSEEN

CASE = "ridge, condition 1e2"


def test_cells_are_read_back():
    cells = [*contest.tuned(), *contest.rivals()]
    assert len(contest.tuned()) == 7 * 7 * 2 * 2 == len(set(contest.tuned()))
    for cell in cells:
        assert str(Cell.parse(str(cell))) == str(cell)
        assert Cell.parse(str(cell)).decay == cell.decay


def test_contest_and_race(monkeypatch, tmp_path, capsys):
    """The best cell on seed 0 is reported, with the mean of the true objectives over the seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "STEPS", 4)
    cells = [Cell("adam", 0.1, 0.1), Cell("sgd", 1e-5, 0.1), Cell("adam", 0.1, 100.0, 0.5)]
    groups = [cells, [Cell("soba", 0.1, 0.1)]]
    with Serial() as pool:
        rows = contest.contest(pool, CASE, 2, groups, 4)
    assert [row["method"] for row in rows] == [*contest.OURS, str(cells[0]), "soba 0.1 0.1"]

    def end(method, seed):
        case = CASES[CASE](seed)
        found = bilevel.solve(
            case.outer, case.inner, case.x, case.y, method=method, steps=4, seed=seed
        )
        return case.objective(found.x)

    for row, make in ((rows[0], lambda: "bisls-adam"), (rows[3], cells[0].fixed)):
        ends = [end(make(), seed) for seed in range(2)]
        assert row["objective"] == pytest.approx(sum(ends) / 2, rel=1e-12)
        assert (row["best seed"], row["worst seed"]) == (min(ends), max(ends))
    assert rows[3]["grid"] == 3 and rows[3]["grid seconds"] >= rows[3]["seconds"]

    contest.write("contest", rows)
    threads = torch.get_num_threads()
    race.main(["--seeds", "1"])
    torch.set_num_threads(threads)
    (row,) = json.loads((tmp_path / "docs/measured/race.json").read_text())["rows"]
    assert row["cell ends at"] == end(cells[0].fixed(), 0)
    assert row["default ends at"] == end("bisls-adam", 0)

    capsys.readouterr()
    overview.main(["--figure", "contest.png"])
    above = 100 * (rows[0]["objective"] / rows[3]["objective"] - 1)
    assert f"| {above:.1f} |" in (said := capsys.readouterr().out)
    assert abs(above) > 1 and f"more than 1 % on {int(above < 0)}, within that on 0" in said
    assert (tmp_path / "contest.png").stat().st_size > 10_000


def test_a_loss_below_zero_is_compared_by_its_size():
    """-0.5 is lower than -0.4 by a quarter of that."""
    of = {"cell": {"objective": -0.4}, "bisls-adam": {"objective": -0.5}}
    assert overview.beside(of, "bisls-adam") == pytest.approx(-25)
    assert overview.beside(of, "bisps") != overview.beside(of, "bisps")  # not run: NaN


class Serial:
    """A pool of no processes, so that what is patched is seen."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, jobs):
        return map(function, jobs)


def test_default_stays_on_its_way_with_batches_of_four():
    """Each can be fitted: with steps for one of them F ended at 1.9, near guessing."""
    found = outcome(distillation(1, 4), "bisls-adam", STEPS, INNER, seed=1)
    assert found["objective"] < 0.4


@pytest.mark.parametrize("name", ["elastic net", "tolls"])
def test_true_objectives_have_the_hypergradients_of_their_losses(name):
    """On the problems without noise, in float64: by differences of the solved problem."""
    case = UNSEEN[name](0)
    g = torch.Generator().manual_seed(1)
    x = case.x + 0.3 * torch.randn(case.x.shape, generator=g, dtype=torch.float64)
    d = torch.randn(x.shape, generator=g, dtype=torch.float64)
    y = solved(lambda y: case.inner(x, y), case.y)
    exact = bilevel.Implicit(bilevel.ConjugateGradient(200, 1e-10))
    h = bilevel.hypergradient(case.outer, case.inner, x, y, method=exact)
    up, down = (case.value(x + t * d, y) for t in (1e-3, -1e-3))
    assert float(h.grad @ d) == pytest.approx((up - down) / 2e-3, rel=1e-3)


@pytest.mark.parametrize("name", [*UNSEEN, *KINKED, *STUMBLES])
def test_problems_that_no_default_was_chosen_on(name):
    case = EVERY[name](0)
    # F need not fall from the first iterations on: y follows by five steps in each
    steps, inner_steps = (100, 10) if name == "more features than rows, batches" else (30, 5)
    result = case.solve("bisls-adam", steps=steps, inner_steps=inner_steps, seed=0)
    assert result.state.k == steps and not any(r.failure for r in result.history)
    assert case.value(result.x, result.y) < case.value(case.x, case.y)
