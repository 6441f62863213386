"""Black-box distillation: a small language model learns with a teacher's loss as its target.

Of the teacher only its loss on each batch is used, as f_B(x*) in the steps of IAM, IAM-Adam
(arXiv 2504.01898) and SF-Adam-SPS+ (arXiv 2511.07767). Against SGD with momentum and Adam, constant
and with warm-up and cosine, and schedule-free AdamW over a grid of step sizes; for ours the grid is
of the cap of the step.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import optim
from bilevel.checkpoint import load as load_checkpoint
from bilevel.checkpoint import save as save_checkpoint

from .__main__ import positive
from .cells import Cells, band, spread
from .cells import add_arguments as add_common
from .data.tokens import Tokens
from .errors import require
from .language_model import (
    Results,
    best,
    compare,
    draw_losses,
    draw_sensitivity,
    finals,
    tables,
)
from .language_models import GPT, gpt_size
from .models import seeded
from .run import Run, curves, start
from .training import (
    DATA as DATA,
)
from .training import (
    PRECISIONS,
    Batch,
    Contender,
    Fit,
    add_text_arguments,
    cosine,
    count_parameters,
    forward_loss,
    from_hub,
    installed,
    linear,
    schedulefree_adamw,
    tokens,
    training_batches,
    validation_batches,
    warmup,
)

SUMMARY = """Train a small language model with the loss of a larger one on each batch as the
target of its Polyak steps: IAM, IAM-Adam and SF-Adam-SPS+ against SGD with momentum, Adam (both
constant and with a schedule) and schedule-free AdamW over a grid of learning rates. By default the
task trains the teacher itself, on the characters of tiny-shakespeare; a teacher of Hugging Face is
named by --teacher."""

PRESETS: dict[str, dict[str, object]] = {
    "default": {"steps": 150},
    "paper": {
        "teacher": "gpt2-medium", "student": "768/4/8", "steps": 251, "context": 512, "batch": 4,
        "accumulate": 2, "precision": "bf16", "checkpoint_every": 50, "repeats": 3,
    },
    "quick": {"steps": 6, "context": 16, "batch": 4, "teacher_steps": 9, "checkpoint_every": 2},
}  # fmt: skip
OWN = "own"
SHARES = (0.1, 0.3, 1.0)  # of the teacher's training, whose teachers are compared
ADAM_RATES = (1e-3, 3e-3, 1e-2)
SGD_RATES = (0.1, 1.0, 3.0, 10.0)


def sgd(parameters: Any, rate: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9, dampening=0.9)


def adam(parameters: Any, rate: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, rate)


METHODS: dict[str, Contender] = {
    "IAM": Contender(
        lambda p, rate, steps: optim.IAM(p, max_lr=rate), (1.0, 9.0, 90.0), oracle=True
    ),
    "IAM-Adam": Contender(
        lambda p, rate, steps: optim.IAMAdam(p, max_lr=10 * rate),  # x moves by a tenth of z
        (*ADAM_RATES, 0.1), oracle=True,
    ),
    "SF-Adam-SPS+": Contender(
        lambda p, rate, steps: optim.ScheduleFreeAdamSPS(
            p, max_lr=rate, warmup_steps=warmup(steps)
        ),
        (*ADAM_RATES, 0.1), oracle=True,
    ),
    "SGD, momentum 0.9": Contender(sgd, SGD_RATES, ours=False),
    "SGD, momentum 0.9, cosine": Contender(sgd, SGD_RATES, cosine, ours=False),
    "Adam": Contender(adam, (*ADAM_RATES, 0.1), ours=False),
    "Adam, cosine": Contender(adam, (*ADAM_RATES, 0.1), cosine, ours=False),
    "schedule-free AdamW": Contender(
        partial(schedulefree_adamw, betas=(0.9, 0.999)), (*ADAM_RATES, 0.1), ours=False,
        package="schedulefree",
    ),
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--teacher", default=OWN, metavar="NAME", help="own: trained by the task; or a model of "
        "Hugging Face, a folder or a name, with its tokenizer")  # fmt: skip
    add("--teacher-size", default="96/2/4", metavar="W/L/H", help="width/layers/heads of the own")
    add("--teacher-steps", type=positive, default=400, help="steps of the own teacher's training")
    add("--student", default="48/2/4", metavar="W/L/H", help="width/layers/heads")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"those to run, of {', '.join(map(repr, METHODS))}")  # fmt: skip
    add_text_arguments(parser)
    add_common(parser, 1, "seeds of every run")


def run(options: Namespace) -> dict[str, Any]:
    require("matplotlib", "drawing figures")
    gpt_size(options.student), gpt_size(options.teacher_size)  # before any work
    own = options.teacher == OWN
    if not own:
        options.tokenizer = options.tokenizer or (None if options.tokens else options.teacher)
        require("transformers", f"the teacher {options.teacher}", extra="language")
    methods, missing = installed({name: METHODS[name] for name in options.methods})
    oracles = {name: method for name, method in methods.items() if method.oracle}
    run = start(options)
    data = tokens(run, options)
    teachers = own_teachers(run, options, data) if own else [hub_teacher(options)]
    validation = validation_batches(data, options)
    qualities = [mean_loss(teacher, validation) for teacher in teachers]

    def fresh(seed: int) -> nn.Module:
        return student(options, data.vocabulary, seed)

    targets = [Teacher(teacher, options.precision) for teacher in teachers]
    total = sum(len(m.rates) for m in methods.values()) + len(oracles) * (len(targets) - 1)
    cells = Cells(run, options.resume, total * options.repeats, options.quiet)
    results = compare(run, options, data, methods, fresh, targets[-1], cells, quality=qualities[-1])
    chosen = {name: best(results, name) for name in methods}
    worse: list[tuple[float, Results]] = []
    for i, target in enumerate(targets[:-1]):
        kept = {n: m._replace(rates=(rate,)) for n, m in oracles.items() if (rate := chosen[n])}
        others = compare(run, options, data, kept, fresh, target, cells, quality=qualities[i])
        worse.append((qualities[i], others))

    title = f"{options.repeats} seed(s): median and range"
    draw_losses(run, options, results, chosen, title)
    draw_sensitivity(run, results, methods, title, "learning rate or cap of the step")
    by_teacher = [*worse, (qualities[-1], results)]
    if len(by_teacher) > 1 and oracles:
        curves(
            run.folder / "teachers.png",
            {
                name: band(
                    [quality for quality, _ in by_teacher],
                    list(zip(*(finals(r[name, chosen[name]]) for _, r in by_teacher), strict=True)),
                )
                for name in oracles
            },
            "teacher's validation loss [nats per token]",
            "student's final validation loss [nats per token]", title,
        )  # fmt: skip
    return run.summarize(
        {
            "data": repr(data),
            "teacher": options.teacher,
            "teacher's validation loss": qualities[-1],
            "parameters of teacher": count_parameters(teachers[-1]),
            "parameters of student": count_parameters(fresh(0)),
            **({"missing": "; ".join(missing)} if missing else {}),
            **tables(results, chosen, "student's validation loss", "learning rate or cap"),
            "with other teachers": [
                {"teacher's loss": quality, "method": name, **spread("loss", finals(runs))}
                for quality, others in worse for (name, _), runs in others.items()
            ],
        }
    )  # fmt: skip


class Teacher:
    """batch -> the teacher's loss on it, without gradients: all that a black box tells."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model, self.autocast = model.eval(), PRECISIONS[precision]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return forward_loss(self.model, batch, self.autocast)


class HubModel(nn.Module):
    """A model of Hugging Face as ``tokens -> logits``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def hub_teacher(options: Namespace) -> nn.Module:
    made = from_hub("AutoModelForCausalLM", options.teacher, f"the teacher {options.teacher}")
    return HubModel(made).to(options.device).requires_grad_(False)


def student(options: Namespace, vocabulary: int, seed: int) -> nn.Module:
    """A new student of the size asked for: GPT-2 of Hugging Face beside a teacher from there."""
    size = gpt_size(options.student)
    with seeded(seed, 1):
        if options.teacher == OWN:
            return GPT(size, vocabulary, options.context).to(options.device)
        hub = require("transformers", "the student", extra="language")
        config = hub.GPT2Config(
            vocab_size=vocabulary, n_positions=max(1024, options.context), n_embd=size.width,
            n_layer=size.layers, n_head=size.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return HubModel(hub.GPT2LMHeadModel(config)).to(options.device)


def own_teachers(run: Run, options: Namespace, data: Tokens) -> list[nn.Module]:
    """Teachers after each of :data:`SHARES` of the training, the best last; kept in a file."""
    size = gpt_size(options.teacher_size)

    def fresh() -> nn.Module:
        with seeded(options.seed, 2):
            return GPT(size, data.vocabulary, options.context).to(options.device)

    path = run.folder / "teacher.pt"
    if not (options.resume and path.exists()):
        adam = Contender(
            lambda p, rate, steps: torch.optim.AdamW(p, rate), schedule=linear, clip=1.0, ours=False
        )
        states = []
        for share in SHARES:  # each to the end of its own schedule
            steps = max(1, math.ceil(share * options.teacher_steps))
            model = fresh()
            Fit(
                model, adam, 3e-3, training_batches(data, options, options.seed + 10_000),
                validation_batches(data, options, 1), steps, options.accumulate,
            )()  # fmt: skip
            states.append(model.state_dict())
        save_checkpoint(path, {"teachers": states})
    models = [fresh() for _ in SHARES]
    for model, state in zip(models, load_checkpoint(path)["teachers"], strict=True):
        model.load_state_dict(state)
    return [model.requires_grad_(False) for model in models]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[Batch]) -> float:
    losses = [forward_loss(model.eval(), batch).item() for batch in batches]
    return sum(losses) / len(losses)
