"""Regularization: the tables, the regression solved by Newton, what is reported."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import tasks.regularization as task
from tasks.__main__ import main, parse
from tasks.data.tables import Table, load_table

NAME = "regularization"
TINY = ("--preset", "quick", "--quiet", "--device", "cpu")


def problem(table=None, *arguments):
    options = parse(NAME, task, [*TINY, *arguments])
    options.device = torch.device("cpu")
    return task.Regularization(table or load_table("breast-cancer"), options)


def small():
    """A table without symmetry, of badly scaled features."""
    draw = torch.Generator().manual_seed(3)
    features = torch.randn(60, 4, generator=draw, dtype=torch.float64)
    features *= torch.tensor([1.0, 0.3, 0.1, 2.0])
    labels = torch.where(features @ torch.tensor([1.0, -2, 0, 0.5]).double() > 0.1, 1.0, -1.0)
    labels[::7] *= -1
    parts = [(features[i::3], labels[i::3].double()) for i in range(3)]
    return Table("small", *parts)


def test_breast_cancer():
    table = load_table("breast-cancer")
    assert repr(table) == "Table(breast-cancer: 343/113/113 rows of 31 features)"
    features, labels = table.train
    assert torch.allclose(features[:, :30].mean(0), torch.zeros(30).double(), atol=1e-12)
    assert torch.allclose(features[:, :30].std(0, correction=0), torch.ones(30).double())
    assert (features[:, 30] == 1).all() and set(labels.tolist()) == {-1.0, 1.0}
    rows = torch.cat([part[0] for part in (table.train, table.validation, table.test)])
    assert len(rows.unique(dim=0)) == 569  # no row in two parts
    for part in (table.validation, table.test):
        assert abs(float((part[1] > 0).double().mean()) - 357 / 569) < 0.01  # stratified
    again, other = load_table("breast-cancer"), load_table("breast-cancer", seed=1)
    assert torch.equal(again.train[0], features) and not torch.equal(other.train[0], features)


def test_ijcnn1_like():
    table = load_table("ijcnn1-like", sizes=(4000, 500, 600))
    features, labels = table.train
    assert features.shape == (4000, 22) and len(table.test[1]) == 600
    scales = features.std(0)
    expected = torch.logspace(0, -1.5, 22, dtype=torch.float64)
    assert torch.allclose(scales, expected, rtol=0.1)
    # a third of the features has no part in the labels
    fitted = LogisticRegression(C=1e6, max_iter=5000).fit(
        (features / scales).numpy(), labels.numpy()
    )
    weights = np.abs(fitted.coef_[0])
    assert weights[::3].max() < 0.15 < np.delete(weights, np.arange(0, 22, 3)).mean()
    again = load_table("ijcnn1-like", sizes=(4000, 500, 600))
    assert torch.equal(again.train[0], features) and torch.equal(again.train[1], labels)


def test_ijcnn1_is_read_from_libsvm_files(tmp_path, capsys):
    for name, n in (("ijcnn1", 40), ("ijcnn1.t", 9)):
        lines = [f"{-1 if i % 4 else 1} 1:{i} 22:{i / 7:.17g}" for i in range(n)]
        (tmp_path / name).write_text("\n".join(lines))
    table = load_table("ijcnn1", tmp_path)
    assert repr(table) == "Table(ijcnn1: 28/12/9 rows of 22 features)"
    numbers = torch.cat([table.train[0][:, 0], table.validation[0][:, 0]])
    assert sorted(numbers.tolist()) == list(range(40))
    features, labels = table.test
    assert torch.equal(features[:, 21], features[:, 0] / 7)
    assert (labels == torch.where(features[:, 0] % 4 > 0, -1.0, 1.0)).all()
    (tmp_path / "ijcnn1").write_text("no table")
    assert main([NAME, *TINY, "--data", "ijcnn1", "--root", str(tmp_path)]) == 2
    assert "ijcnn1 is no file of ijcnn1" in capsys.readouterr().err
    (tmp_path / "ijcnn1").unlink()
    assert main([NAME, *TINY, "--data", "ijcnn1", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "looked for ijcnn1 and ijcnn1.t" in error and str(tmp_path) in error
    assert "--data ijcnn1-like" in error


def test_the_regression_is_solved():
    """Against scikit-learn, for one penalty; by its gradient, for any."""
    p = problem()
    features, labels = p.table.train
    x = torch.full_like(p.x, math.log(0.02))
    found = p.solution(x, p.y)
    n = len(labels)
    theirs = LogisticRegression(C=1 / (0.02 * n), fit_intercept=False, tol=1e-10, max_iter=10000)
    theirs.fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(found.numpy(), theirs.coef_[0], rtol=1e-4, atol=1e-6)
    x = torch.linspace(-11, 3, len(x), dtype=torch.float64)
    for begin in (p.y, 30 * torch.ones_like(p.y)):
        w = p.solution(x, begin)
        slope = torch.func.grad(p.inner, 1)(x, w, p.table.train)
        assert slope.abs().max() < 1e-9
    assert math.isnan(p.measure(x * torch.nan, p.y)["validation_loss"])


def test_the_hypergradient_is_that_of_the_solved_regression():
    import bilevel

    p = problem(small())
    x = torch.tensor([-3.0, -1, 0.5, -4], dtype=torch.float64)
    w = p.solution(x, p.y)
    h = bilevel.hypergradient(
        p.outer, p.inner, x, w, p.table.validation, p.table.train,
        method=bilevel.Implicit(bilevel.ConjugateGradient(rtol=1e-12)),
    )  # fmt: skip
    eps = 1e-5 * torch.eye(4, dtype=torch.float64)

    def F(at):
        features, labels = p.table.validation
        margins = labels * (features @ p.solution(at, p.y))
        return float((1 + (-margins).exp()).log().mean())

    numeric = torch.tensor([(F(x + e) - F(x - e)) / 2e-5 for e in eps], dtype=torch.float64)
    torch.testing.assert_close(h.grad, numeric, rtol=1e-5, atol=1e-9)


def test_a_run(tmp_path, monkeypatch):
    """The folder; the numbers are those of x; the test rows have no say."""
    rows = []
    for name in "ab":
        table = load_table("breast-cancer")
        if name == "b":
            table = replace(table, test=(table.test[0], -table.test[1]))
        monkeypatch.setattr(task, "load_table", lambda *_, table=table: table)
        arguments = ["--methods", "bisls-sgd", "--steps", "5", "--out", str(tmp_path / name)]
        assert main([NAME, *TINY, *arguments]) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        rows.append(summary["methods"][0])
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "attempts", "config.json", "history.csv", "summary.json", "penalties.png",
        "validation-loss-iterations.png", "validation-loss-work.png",
        "validation-loss-seconds.png",
    }  # fmt: skip
    a, b = rows
    assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-9)
    assert a["test_accuracy"] + b["test_accuracy"] == pytest.approx(1)
    start, none, one = summary["references"]
    assert a["validation_loss"] < 0.7 * start["validation_loss"]
    assert one["validation_loss"] <= min(start["validation_loss"], none["validation_loss"])


def test_batches(tmp_path):
    arguments = ["--methods", "bisps", "--steps", "3", "--batch", "50"]
    assert main([NAME, *TINY, *arguments, "--out", str(tmp_path / "run")]) == 0
