"""Episodes of characters: what an episode holds, the two losses, and how features are judged."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tasks.few_shot as few_shot
import tasks.hyper_representation as task
from tasks.__main__ import main, parse
from tasks.data import load
from tasks.models import featured, value_and_gradient

NAME = "hyper-representation"
ARGUMENTS = ("--data", "omniglot", "--n-way", "3", "--k-shot", "2", "--episodes", "2")
ARGUMENTS += ("--preset", "quick", "--quiet", "--device", "cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """30 characters of 8 drawings each: bars of a slope of their own, shifted."""
    folder = tmp_path_factory.mktemp("characters")
    draw = torch.Generator().manual_seed(0)
    for c in range(30):
        place = folder / "alphabet" / f"character{c:02}"
        place.mkdir(parents=True)
        for i in range(8):
            rows, columns = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
            shift = int(torch.randint(-3, 4, (1,), generator=draw))
            angle = torch.tensor(3.14 * c / 30)
            far = (rows - 14 + shift) * angle.cos() + (columns - 14) * angle.sin()
            pixels = torch.where(far.abs() < 2, 0, 255).to(torch.uint8)
            image = Image.frombytes("L", (28, 28), bytes(pixels.flatten().tolist()))
            image.save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def problem(root):
    options = parse(NAME, task, [*ARGUMENTS, "--ridge", "0.1", "--root", str(root)])
    options.device = torch.device("cpu")
    return few_shot.FewShot(load("omniglot", root), options)


def test_support_and_query_are_disjoint_and_of_the_same_classes(problem):
    images, labels = problem.data.train
    drawn = few_shot.Groups(2, torch.arange(len(labels)), labels, 3, 2, 5, seed=1, per_epoch=6)
    assert len(drawn) == 3
    groups = list(drawn)
    for support, query in groups:
        assert support[0].shape == (2, 6) and query[0].shape == (2, 15)
        for places, ways, others, their in zip(*support, *query, strict=True):
            assert not set(places.tolist()) & set(others.tolist())
            classes = [labels[places[ways == way]].unique().tolist() for way in range(3)]
            assert classes == [labels[others[their == way]].unique().tolist() for way in range(3)]
            assert len({c for (c,) in classes}) == 3
    again = few_shot.Groups(2, torch.arange(len(labels)), labels, 3, 2, 5, seed=1, per_epoch=6)
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(groups, again, strict=True))


def test_judges_see_characters_that_no_training_sees(problem):
    parts = [set(part[1].tolist()) for part in (problem.data.train, problem.data.validation)]
    parts.append(set(problem.data.test[1].tolist()))
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    for name, number in few_shot.JUDGES.items():
        (places, labels), _ = problem.judges[name]
        assert places.shape == labels.shape == (number, 6)
        assert int(places.max()) < len(getattr(problem.data, name)[1])


def test_each_head_has_a_problem_of_its_own(problem):
    """The joint inner loss is the sum of ridge regressions of one episode each."""
    x = problem.begin()
    source = few_shot.Groups(2, *problem.data.train, 3, 2, 5, seed=0, per_epoch=2)
    (images, labels), query = next(iter(source))
    y = {key: torch.randn_like(value) for key, value in problem.heads.items()}
    expected, outer = 0.0, 0.0
    for e in range(2):
        w, b = y["weight"][e], y["bias"][e]
        expected += F.cross_entropy(x(images[e]) @ w.T + b, labels[e])
        expected += 0.05 * (w.square().sum() + b.square().sum())
        outer += F.cross_entropy(x(query[0][e]) @ w.T + b, query[1][e]) / 2
    torch.testing.assert_close(problem.inner(x, y, (images, labels)), expected)
    torch.testing.assert_close(problem.outer(x, y, query), outer)


def test_the_judge_solves_the_heads(problem):
    x = problem.begin()
    features = featured(x, problem.data.test[0])
    (places, labels), (asked, true) = problem.judges["test"]
    support, query = (features[places], labels), (features[asked], true)
    loss, right = problem.judge(support, query)
    # one episode by itself, by Newton's method
    weight = torch.zeros(3, few_shot.WIDTH + 1, dtype=torch.float64)
    A = torch.cat([support[0][4], torch.ones(6, 1).double()], 1)

    def g(flat):
        scores = A @ flat.view(3, -1).T
        return F.cross_entropy(scores, labels[4]) + 0.05 * flat.square().sum()

    flat = weight.flatten()
    for _ in range(30):
        _, slope = value_and_gradient(lambda at: g(at["w"]), {"w": flat})
        hessian = torch.autograd.functional.hessian(g, flat)
        flat = flat - torch.linalg.solve(hessian, slope["w"])
    Q = torch.cat([query[0][4], torch.ones(15, 1).double()], 1)
    hits = ((Q @ flat.view(3, -1).T).argmax(1) == true[4]).double().mean()
    assert float(right[4]) == pytest.approx(float(hits), abs=1 / 15)
    measured = problem.measure(x)
    assert measured["test_accuracy"] == pytest.approx(float(right.mean()))
    assert measured["test_loss"] == pytest.approx(loss)
    spread = (right - right.mean()).square().sum() / (len(right) - 1)
    expected = 1.96 * float((spread / len(right)).sqrt())
    assert measured["test_interval"] == pytest.approx(expected)


def test_features_are_learned(root, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--methods", "bisls-adam", "--steps", "8", "--root", str(root)]
    assert main([NAME, *ARGUMENTS, *arguments, "--out", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    (ours,), (random, ordinary) = summary["methods"], summary["references"]
    assert ours["validation_loss"] < random["validation_loss"] - 0.05
    assert 0 < ours["test_interval"] < 0.1 and ordinary["test_accuracy"] > 1 / 3


def test_too_few_images_are_told(root, capsys):
    assert main([NAME, *ARGUMENTS, "--root", str(root), "--k-shot", "4"]) == 2
    assert "an episode takes k_shot + queries = 4 + 5" in capsys.readouterr().err
