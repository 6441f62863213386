"""Distillation: the teacher's loss as the target, the students, and models of Hugging Face."""

import importlib.util
import json

import numpy
import pytest
import torch

from tasks import model_distillation as task
from tasks.__main__ import main, parse
from tasks.data.tokens import TokenBlocks
from tasks.errors import MissingPackage
from tasks.language_models import GPT, Size
from tasks.model_distillation import METHODS, OWN, Teacher, student
from tasks.models import seeded
from tasks.training import Fit, forward_loss

NAME = "model-distillation"
LINE = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"
ORACLES = [name for name, method in METHODS.items() if method.oracle]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINE * 40)
    return str(path)


def arguments(text, folder, *more):
    return [
        NAME, "--preset", "quick", "--quiet", "--device", "cpu", "--text", text, "--student",
        "8/1/2", "--teacher-size", "16/1/2", "--out", str(folder), *more,
    ]  # fmt: skip


def gpt(width, seed, dropout=0.0):
    with seeded(seed):
        return GPT(Size(1, 2, width, 4 * width), 11, 12, dropout)


def batches(size=2):
    tokens = torch.randint(11, (400,), generator=torch.Generator().manual_seed(0))
    return TokenBlocks(tokens.short(), 8, size, 5, torch.device("cpu"))


def test_the_teachers_loss_is_its_mean_surprise_without_dropout():
    model = gpt(8, 1, dropout=0.5)
    tokens, targets = next(iter(batches()))
    value = Teacher(model, "float32")((tokens, targets))
    assert not value.requires_grad and not model.training
    logits = model.eval()(tokens).detach().double().numpy()
    p = numpy.exp(logits) / numpy.exp(logits).sum(-1, keepdims=True)
    chosen = numpy.take_along_axis(p, targets.numpy()[..., None], axis=-1)
    assert value.item() == pytest.approx(-numpy.log(chosen).mean(), rel=1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_the_target_of_a_step_is_that_of_its_own_batches(name):
    """The first numerator is the student's loss minus the teacher's, both on the same batches."""
    teacher, data = Teacher(gpt(16, 1), "float32"), batches()
    pupil = gpt(8, 2)
    fit = Fit(pupil, METHODS[name], 0.01, data, [next(iter(batches()))], 3, 2, teacher)
    seen = [batch for _, batch in zip(range(2), batches(), strict=False)]
    with torch.no_grad():
        gap = sum(forward_loss(pupil, b) - forward_loss(teacher.model, b) for b in seen) / 2
    fit.step(0, iter(batches()))
    assert fit.optimizer.last.numerator == pytest.approx(gap.item(), rel=1e-5)


@pytest.mark.parametrize("name", ORACLES)
def test_a_student_as_good_as_its_teacher_stays(name):
    model, before = gpt(8, 1), gpt(8, 1)
    fit = Fit(model, METHODS[name], 0.01, batches(), [next(iter(batches()))], 3, 1,
              Teacher(before, "float32"))  # fmt: skip
    fit()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert p.equal(q)


def test_students_depend_on_the_seed_alone():
    options = parse(NAME, task, ["--student", "8/1/2"])
    options.device = torch.device("cpu")
    torch.rand(3)
    first, same, other = (student(options, 11, seed).state_dict() for seed in (1, 1, 2))
    assert all(first[key].equal(same[key]) for key in first)
    assert not first["tokens.weight"].equal(other["tokens.weight"])


def test_a_run(tmp_path, text):
    folder = tmp_path / "a"
    assert main(arguments(text, folder)) == 0
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "history.csv", "summary.json", "cells.jsonl", "tokens", "teacher.pt",
        "validation-loss.png", "step-size.png", "sensitivity.png", "teachers.png", "model.pt",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    installed = importlib.util.find_spec("schedulefree") is not None
    expected = [name for name in METHODS if installed or name != "schedule-free AdamW"]
    assert [row["method"] for row in summary["student's validation loss"]] == expected
    assert installed or "schedulefree" in summary["missing"]
    others = summary["with other teachers"]
    assert {row["method"] for row in others} == set(ORACLES) and len(others) == 2 * len(ORACLES)
    assert min(row["teacher's loss"] for row in others) > summary["teacher's validation loss"]


def test_a_killed_comparison_writes_the_same(tmp_path, text, monkeypatch):
    chosen = ["--methods", "IAM-Adam", "SGD, momentum 0.9"]
    assert main(arguments(text, tmp_path / "whole", *chosen)) == 0
    call, count = Teacher.__call__, []

    def dies(self, batch):
        count.append(batch)
        if len(count) == 10:
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(Teacher, "__call__", dies)
    assert main(arguments(text, tmp_path / "a", *chosen)) == 130
    monkeypatch.setattr(Teacher, "__call__", call)
    assert main(arguments(text, tmp_path / "a", *chosen, "--resume")) == 0
    for name in ("history.csv", "summary.json", "cells.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_without_transformers_a_sentence_says_what_to_install(tmp_path, text, capsys, monkeypatch):
    def absent(module, purpose, extra="tasks"):
        if module == "transformers":
            raise MissingPackage(f"{purpose} needs {module}: pip install 'bilevel[{extra}]'")

    monkeypatch.setattr(task, "require", absent)
    assert main(arguments(text, tmp_path / "a", "--teacher", "gpt2-medium")) == 2
    assert "pip install 'bilevel[language]'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("option", ["--student", "--teacher-size"])
def test_a_wrong_size_is_told_before_any_work(tmp_path, text, capsys, option):
    assert main(arguments(text, tmp_path / "a", option, "7/1/2")) == 2
    assert "'7/1/2' is no size" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_papers_preset():
    options = parse(NAME, task, ["--preset", "paper"])
    assert (options.teacher, options.student) == ("gpt2-medium", "768/4/8")
    assert options.batch * options.accumulate * options.context == 4096


def test_a_teacher_of_hugging_face(tmp_path, text, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=80, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "teacher")
    folder = tmp_path / "tokens"
    from tasks.data.tokens import write_tokens

    write_tokens(folder, torch.arange(3000) % 80, torch.arange(400) % 80, 80)
    hub = ["--teacher", str(tmp_path / "teacher"), "--tokens", str(folder)]
    assert main(arguments(text, tmp_path / "a", *hub, "--methods", "IAM", "Adam")) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["with other teachers"] == []
    wrong = ["--teacher", str(tmp_path / "nowhere"), "--tokens", str(folder)]
    assert main(arguments(text, tmp_path / "b", *wrong)) == 2
    assert "neither a folder here nor reachable on the hub" in capsys.readouterr().err


def test_the_students_size_in_transformers():
    pytest.importorskip("transformers")
    options = parse(NAME, task, ["--preset", "paper"])
    assert options.teacher != OWN
    with torch.device("meta"):
        options.device = torch.device("meta")
        made = student(options, 50257, 0)
    assert sum(p.numel() for p in made.parameters()) == 67_736_832
