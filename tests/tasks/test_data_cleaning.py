"""Data cleaning: the corruption, the weights, and how they are judged."""

import json
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

import bilevel
import tasks.data_cleaning as task
from tasks.__main__ import main, parse

NAME = "data-cleaning"
TINY = ("--preset", "quick", "--quiet", "--device", "cpu", "--methods", "bisls-adam")


def options(*arguments):
    made = parse(NAME, task, [*TINY, *arguments])
    made.device = torch.device("cpu")
    return made


def problem(*arguments):
    made = options(*arguments)
    return task.Cleaning(task.read(made), made)


def test_labels_are_corrupted_as_asked():
    labels = torch.arange(50_000) % 10
    for share in (0.0, 0.5, 0.9):
        wrong = task.corrupt(labels, share, 10, 0) != labels
        assert float(wrong.double().mean()) == pytest.approx(0.9 * share, abs=0.01)
    first, again, other = (task.corrupt(labels, 0.5, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    counts = torch.bincount(first[first != labels], minlength=10)
    assert counts.min() > 0.9 * counts.max()


def test_sizes():
    data = problem().data
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [1300, 100, 397]
    data = problem("--train-images", "200", "--validation-images", "50").data
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [200, 50, 397]


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_f1(seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(7, (60,), generator=draw).float() / 3  # many ties
    wrong = torch.rand(60, generator=draw) < 0.3
    assert task.auc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))
    pairs = [(a > b) + (a == b) / 2 for a in scores[wrong] for b in scores[~wrong]]
    assert task.auc(scores, wrong) == pytest.approx(float(torch.tensor(pairs).double().mean()))
    assert task.f1(scores > 1, wrong) == pytest.approx(f1_score(wrong, scores > 1))
    nothing = torch.zeros(60, dtype=torch.bool)
    assert task.auc(scores, nothing) != task.auc(scores, nothing) and task.f1(nothing, nothing) == 0


def test_the_hypergradient_of_the_weights():
    """dF/dx_i = -sigmoid'(x_i) / n  <grad of sample i's loss, q>,  by an explicit Hessian."""
    p = problem("--train-images", "40", "--ridge", "0.05")
    images, labels = p.data.train[0].double(), p.labels
    validation = (p.data.validation[0].double(), p.data.validation[1])
    x = torch.linspace(-2, 1.5, 40, dtype=torch.float64)
    y = {key: value.double() + 0.01 for key, value in p.net.zeros().items()}
    p.net._module.double()
    h = bilevel.hypergradient(
        p.outer, p.inner, x, y, validation, (images, torch.arange(40)),
        method=bilevel.Implicit(bilevel.ConjugateGradient(steps=700, rtol=1e-12)),
    )  # fmt: skip
    A = torch.cat([images.flatten(1), torch.ones(40, 1).double()], 1)
    V = torch.cat([validation[0].flatten(1), torch.ones(len(validation[1]), 1).double()], 1)
    W = torch.cat([y["1.weight"], y["1.bias"][:, None]], 1)
    P, Q = (A @ W.T).softmax(1), (V @ W.T).softmax(1)
    one = torch.nn.functional.one_hot
    weights = x.sigmoid()
    H = 0.05 * torch.eye(650, dtype=torch.float64)
    for w, a, q in zip(weights, A, P, strict=True):
        H += w / 40 * torch.kron(torch.diag(q) - q[:, None] * q, a[:, None] * a)
    fy = ((Q - one(validation[1], 10)).T @ V / len(V)).flatten()
    q = torch.linalg.solve(H, fy).view(10, 65)
    slopes = ((P - one(labels, 10)) * (A @ q.T)).sum(1)  # <grad of loss i, q>
    expected = -weights * (1 - weights) / 40 * slopes
    torch.testing.assert_close(h.grad, expected, rtol=1e-7, atol=1e-12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cleaning") / "run"
    assert main([NAME, *TINY, "--out", str(folder)]) == 0
    return folder


def test_the_folder_is_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        "attempts", "config.json", "history.csv", "summary.json", "weights.png",
        "smallest-weights.png", "validation-loss-iterations.png", "validation-loss-work.png",
        "validation-loss-seconds.png",
    }  # fmt: skip


def test_wrong_labels_are_found_and_cleaning_pays(finished):
    summary = json.loads((finished / "summary.json").read_text())
    (ours,) = summary["methods"]
    everything, clean, validation = summary["references"]
    assert summary["wrong labels"] == pytest.approx(0.45, abs=0.04)
    assert ours["auc"] > 0.85 and ours["f1"] > 0.8
    assert ours["test_accuracy"] > everything["test_accuracy"] + 0.02
    assert clean["test_accuracy"] > everything["test_accuracy"] + 0.04
    assert clean["test_accuracy"] > validation["test_accuracy"]


def test_truth_and_test_images_have_no_say(tmp_path, monkeypatch):
    """With other true labels beneath the same given ones, and other test data: the same run."""
    rows = []
    for name in "ab":
        made = options()
        data = task.read(made)
        if name == "b":
            given = task.corrupt(data.train[1], 0.5, 10, 0)
            data = replace(data, train=(data.train[0], given), test=data.validation)
            monkeypatch.setattr(task, "corrupt", lambda labels, *_: labels)
        monkeypatch.setattr(task, "read", lambda _, data=data: data)
        assert main([NAME, *TINY, "--steps", "2", "--out", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "history.csv").read_text().splitlines()
        drop = lines[0].split(",").index("seconds")
        rows.append([[v for i, v in enumerate(r.split(",")) if i != drop] for r in lines])
        monkeypatch.undo()
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--corruption", "1.5"], "must lie between 0 and 1, not 1.5"),
        (["--ridge", "0"], "argument --ridge: must be a finite number above 0"),
        (["--train-images", "5000"], "cannot take parts of 5000"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main([NAME, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_mnist(real_data, tmp_path):
    arguments = ["--data", "mnist", "--root", str(real_data), "--steps", "2", "--ridge", "0.1"]
    arguments += ["--train-images", "300", "--inner-steps", "2", "--out", str(tmp_path / "run")]
    assert main([NAME, *TINY, *arguments]) == 0
