"""Language models, token files, training that goes on bit for bit, and the task."""

import json
import math

import numpy
import pytest
import torch

import tasks.training as training
from bilevel.checkpoint import load as load_checkpoint
from tasks import language_model as task
from tasks.__main__ import main, parse
from tasks.data.tokens import TokenBlocks, map_tokens, unsigned, write_tokens
from tasks.errors import BadData, MissingData
from tasks.language_models import GPT, MODELS, SIZES, Size, gpt_size, next_token_loss
from tasks.models import seeded
from tasks.training import Contender, Fit

NAME = "language-model"
LINE = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINE * 40)
    return str(path)


def tiny(name, vocabulary=11, context=12, dropout=0.0):
    with seeded(3):
        return MODELS[name](Size(2, 2, 8, 12), vocabulary, context, dropout).double()


# -- models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, vocabulary, count",
    [
        ("gpt", "124m", 50257, 124_439_808),
        ("gpt", "355m", 50257, 354_823_168),
        ("lstm", "awd", 10_000, 24_221_600),
        ("t5", "base", 32_128, 247_577_856),
    ],
)
def test_the_papers_models_have_their_number_of_parameters(name, size, vocabulary, count):
    with torch.device("meta"):
        model = MODELS[name](SIZES[name][size], vocabulary, 1024)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_student_of_the_papers():
    with torch.device("meta"):
        model = GPT(gpt_size("768/4/8"), 50257, 1024)
    assert sum(p.numel() for p in model.parameters()) == 67_736_832
    for wrong in ("768/4", "7/4/2", "a/b/c", "0/1/1"):
        with pytest.raises(ValueError, match="width/layers/heads"):
            gpt_size(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_see_no_later_token(name):
    model, tokens = tiny(name), torch.arange(10)[None] % 11
    before = model(tokens)
    half = 10 - before.shape[1]
    assert half == (5 if name == "t5" else 0)
    for changed in range(half, 10):
        other = tokens.clone()
        other[0, changed] = 10
        after = model(other)
        same = changed - half  # predictions before the changed token
        torch.testing.assert_close(after[:, :same], before[:, :same])
        assert not torch.allclose(after[:, same], before[:, same])


def test_t5_reads_its_prefix_in_both_directions():
    model, tokens = tiny("t5"), torch.arange(10)[None]
    before = model(tokens)
    for changed in range(5):
        other = tokens.clone()
        other[0, changed] = 10
        assert not torch.allclose(model(other)[:, 0], before[:, 0])


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_mean_surprise(name):
    model, tokens = tiny(name), torch.randint(11, (2, 9), generator=torch.Generator())
    logits = model(tokens[:, :-1]).detach().numpy()
    n = logits.shape[1]
    p = numpy.exp(logits) / numpy.exp(logits).sum(-1, keepdims=True)
    targets = tokens[:, 1:][:, -n:].numpy()
    expected = -numpy.mean([[numpy.log(p[i, j, targets[i, j]]) for j in range(n)] for i in (0, 1)])
    loss = next_token_loss(model, tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gpt_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=12, n_embd=8, n_layer=2, n_head=2, attn_implementation="eager"
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours = GPT(Size(2, 2, 8, 32), 11, 12).double()
    names = {
        "tokens": "wte", "positions": "wpe", "norm": "ln_f", "blocks": "h",
        "attention_norm": "ln_1", "qkv": "attn.c_attn", "attention_out": "attn.c_proj",
        "inside": "mlp.c_fc", "out": "mlp.c_proj",
    }  # fmt: skip
    state = theirs.transformer.state_dict()
    for key, p in ours.named_parameters():
        parts = [
            "ln_2" if part == "norm" and "blocks" in key else names.get(part, part)
            for part in key.split(".")
        ]
        value = state[".".join(parts)]
        p.data.copy_(value.T if "c_" in ".".join(parts) and value.ndim == 2 else value)
    tokens = torch.arange(12)[None] % 11
    torch.testing.assert_close(ours(tokens), theirs(input_ids=tokens).logits)


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match="13 tokens in a row, and the model's context is 12"):
        tiny("gpt")(torch.zeros(1, 13, dtype=torch.int64))


# -- token files ---------------------------------------------------------------------------


def test_tokens_are_mapped_and_whole(tmp_path):
    train, validation = torch.arange(60_000), torch.arange(100)
    write_tokens(tmp_path, train, validation, 60_000)
    read = numpy.fromfile(tmp_path / "train.bin", dtype=numpy.uint16)
    assert read.tolist() == train.tolist()
    data = map_tokens(tmp_path)
    assert data.vocabulary == 60_000 and unsigned(data.train).equal(train)
    blocks = TokenBlocks(data.train, 10, 4, 0, torch.device("cpu"))
    tokens, targets = next(iter(blocks))
    assert tokens.dtype == torch.int64 and targets.equal(tokens + 1)
    numpy.array([7], dtype=numpy.uint16).tofile(tmp_path / "changed")
    with (tmp_path / "train.bin").open("r+b") as file:  # what is mapped follows the file
        file.write((tmp_path / "changed").read_bytes())
    assert unsigned(data.train[:1]).item() == 7


def test_token_files_that_cannot_be_used(tmp_path):
    with pytest.raises(MissingData, match=r"there is no train\.bin"):
        map_tokens(tmp_path)
    write_tokens(tmp_path, torch.arange(9), torch.arange(9), 9)
    with pytest.raises(BadData, match="has the token 8, and the vocabulary has 5"):
        map_tokens(tmp_path, 5)
    (tmp_path / "validation.bin").write_bytes(b"abc")
    with pytest.raises(BadData, match="has 3 bytes"):
        map_tokens(tmp_path)
    with pytest.raises(BadData, match="does not fit in 16 bits"):
        write_tokens(tmp_path, torch.arange(9), torch.arange(9), 70_000)


# -- training ------------------------------------------------------------------------------


def a_fit(name, folder, steps=12, dropout=0.2, accumulate=2, **options):
    tokens = torch.randint(11, (400,), generator=torch.Generator().manual_seed(0))
    blocks = TokenBlocks(tokens.short(), 8, 2, 5, torch.device("cpu"))
    validation = [next(iter(TokenBlocks(tokens.short(), 8, 2, 9, torch.device("cpu"))))]
    method = task.METHODS[name]
    torch.manual_seed(1)
    return Fit(
        tiny("gpt", dropout=dropout).float(), method, method.rates[0] if method.rates else None,
        blocks, validation, steps, accumulate, checkpoint=folder / "checkpoint.pt", every=5,
        key={"name": name}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", task.METHODS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name):
    package = task.METHODS[name].package
    if package:
        pytest.importorskip(package)
    whole = a_fit(name, tmp_path)
    rows = whole()["rows"]
    killed = a_fit(name, tmp_path)
    step, calls = killed.step, []

    def dies(k, batches):
        if k == 8:
            raise KeyboardInterrupt
        calls.append(k)
        return step(k, batches)

    killed.step = dies
    with pytest.raises(KeyboardInterrupt):
        killed()
    resumed = a_fit(name, tmp_path)
    torch.rand(7)  # generators are those of the checkpoint
    counted, step = [], resumed.step
    resumed.step = lambda k, batches: counted.append(k) or step(k, batches)
    assert resumed(resume=True)["rows"] == rows
    assert counted == list(range(5, 12))  # from the checkpoint, not from the start
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_accumulation_is_the_larger_batch(tmp_path):
    tokens = torch.arange(300) % 11
    made = []
    for size, accumulate in ((4, 1), (2, 2)):
        blocks = TokenBlocks(tokens.short(), 8, size, 5, torch.device("cpu"))
        fit = Fit(
            tiny("gpt"), task.METHODS["SF-Adam-SPS, moving M"], None, blocks, [next(iter(blocks))],
            3, accumulate,
        )  # fmt: skip
        blocks = iter(TokenBlocks(tokens.short(), 8, size, 5, torch.device("cpu")))
        losses = [fit.step(k, blocks) for k in range(3)]
        made.append((losses, list(fit.model.parameters())))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-6)
    for a, b in zip(made[0][1], made[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bf16_is_the_forward_pass_only(tmp_path):
    fit = a_fit("SF-Adam-SPS, moving M", tmp_path, autocast=torch.bfloat16)
    exact = a_fit("SF-Adam-SPS, moving M", tmp_path)
    first, other = fit()["rows"], exact()["rows"]
    assert first[0]["validation loss"] != other[0]["validation loss"]
    assert first[0]["validation loss"] == pytest.approx(other[0]["validation loss"], rel=1e-2)
    assert all(p.dtype == torch.float32 for p in fit.model.parameters())


def test_schedules():
    for schedule, constant in ((training.linear, 0.0), (training.stable, 1.0)):
        values = [schedule(k / 100) for k in range(100)]
        assert values[0] < 0.1 and max(values) <= 1 and values[99] < 0.06
        assert abs(values[50] - values[20]) == pytest.approx(0.3 / 0.95 * (1 - constant))
    values = [training.cosine(k / 100) for k in range(100)]
    assert values[0] < 0.1 and max(values) == values[10] == 1 and values[99] < 0.01
    assert values[55] == pytest.approx(0.5) and values[5] == pytest.approx(0.51)


def test_a_diverged_run_ends_as_infinite(tmp_path):
    fit = a_fit("clipped SGD", tmp_path)
    seen = []

    def loss(batch):
        seen.append(torch.is_grad_enabled())
        return torch.tensor(math.nan, requires_grad=True)

    fit.loss = loss
    assert fit()["rows"][-1]["validation loss"] == math.inf
    # and is not validated once more
    assert seen == [False] * len(fit.validation) + [True] * fit.accumulate


# -- the task ------------------------------------------------------------------------------


def arguments(text, folder):
    return [
        NAME, "--preset", "quick", "--quiet", "--device", "cpu", "--text", text, "--out",
        str(folder),
    ]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_a_run(tmp_path, text, model):
    folder = tmp_path / "a"
    extra = [] if model == "gpt" else ["--methods", "inexact Polyak", "clipped SGD"]
    assert main([*arguments(text, folder), "--model", model, *extra]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "history.csv", "summary.json", "cells.jsonl", "tokens",
        "validation-loss.png", "step-size.png", "sensitivity.png", "model.pt",
    }  # fmt: skip
    kept, lines = load_checkpoint(folder / "model.pt"), (folder / "cells.jsonl").read_text()
    ends = [json.loads(line)[1]["rows"][-1]["validation loss"] for line in lines.splitlines()]
    assert kept["loss"] == min(ends) and len(kept["model"]) > 4
    summary = json.loads((folder / "summary.json").read_text())
    assert all(row["loss"] > 0 for row in summary["validation loss"])
    assert summary["tokens per step"] == 64


def test_a_killed_comparison_writes_the_same(tmp_path, text, monkeypatch):
    chosen = ["--methods", "SF-Adam-SPS, moving M", "clipped SGD", "--dropout", "0.1"]
    assert main([*arguments(text, tmp_path / "whole"), *chosen]) == 0
    step, count = Fit.step, []

    def dies(self, k, batches):
        count.append(k)
        if len(count) == 9 + 3:  # in the third run, after its checkpoint
            raise KeyboardInterrupt
        return step(self, k, batches)

    monkeypatch.setattr(Fit, "step", dies)
    assert main([*arguments(text, tmp_path / "a"), *chosen]) == 130
    monkeypatch.setattr(Fit, "step", step)
    assert main([*arguments(text, tmp_path / "a"), *chosen, "--resume"]) == 0
    for name in ("history.csv", "summary.json", "cells.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "whole" / name).read_text()
    one, other = (load_checkpoint(tmp_path / name / "model.pt") for name in ("a", "whole"))
    assert one["key"] == other["key"] and one["loss"] == other["loss"]
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


def test_a_missing_package_leaves_its_method_out(tmp_path, text, monkeypatch):
    nowhere = Contender(task.METHODS["schedule-free AdamW"].make, (0.1,), package="no_such_package")
    monkeypatch.setitem(task.METHODS, "schedule-free AdamW", nowhere)
    chosen = ["--methods", "schedule-free AdamW", "inexact Polyak"]
    assert main([*arguments(text, tmp_path / "a"), *chosen]) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert "pip install no_such_package" in summary["missing"]
    assert [row["method"] for row in summary["validation loss"]] == ["inexact Polyak"]


def test_mistakes(tmp_path, text, capsys):
    for extra, message in (
        (["--size", "7b"], "the sizes of gpt are small, 124m, 355m"),
        (["--dropout", "1"], "--dropout must be in [0, 1)"),
        (["--tokens", str(tmp_path)], "there is no train.bin"),
    ):
        assert main([*arguments(text, tmp_path / "a"), *extra]) == 2
        assert message in capsys.readouterr().err
    assert main([NAME, "--quiet", "--out", str(tmp_path / "b")]) == 2
    assert "tiny-shakespeare is missing" in capsys.readouterr().err


@pytest.mark.parametrize("preset, size", [("paper", "124m"), ("paper-355m", "355m")])
def test_the_papers_preset(preset, size):
    options = parse(NAME, task, ["--preset", preset])
    assert (options.size, options.steps, options.precision) == (size, 20856, "bf16")
    assert options.batch * options.accumulate * options.context == 480 * 1024
