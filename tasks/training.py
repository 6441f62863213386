"""Training of one language model by one optimizer, that an interruption does not change."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilevel.checkpoint import load as load_checkpoint
from bilevel.checkpoint import save as save_checkpoint
from bilevel.randomness import all_generators, restore_generators

from .__main__ import positive
from .cells import Result, milestones
from .data import load_text
from .data.batches import Epochs, endless
from .data.text import SHAKESPEARE
from .data.tokens import TokenBlocks, Tokens, map_tokens, write_text, write_tokens
from .errors import MissingData, first_line, require
from .language_models import next_token_loss
from .run import Run

Batch = tuple[Tensor, Tensor]


class Contender(NamedTuple):
    """An optimizer as it is used.

    Attributes:
        make: (parameters, rate, steps) -> optimizer; rate is None where ``rates`` is empty.
        rates: learning rates or caps that are tried.
        schedule: factor on the learning rate at a share of the run in [0, 1).
        clip: largest norm of the gradient; None: not clipped.
        ours: whether ``step`` takes loss= and target=.
        oracle: whether the target is the teacher's loss.
        package: what it needs to be installed.
    """

    make: Callable[[list[nn.Parameter], Any, int], Any]
    rates: tuple[float, ...] = ()
    schedule: Callable[[float], float] | None = None
    clip: float | None = None
    ours: bool = True
    oracle: bool = False
    package: str | None = None


WARMUP = 0.05  # share of a run


def linear(share: float) -> float:
    """Warm-up, then linearly to zero."""
    return min((share + 1e-3) / WARMUP, (1 - share) / (1 - WARMUP))


def stable(share: float) -> float:
    """Warm-up, constant, and linearly to zero in the last fifth."""
    return min((share + 1e-3) / WARMUP, 1.0, (1 - share) / 0.2)


def cosine(share: float) -> float:
    """Warm-up over a tenth of the run, then half a cosine down to zero."""
    return min((share + 1e-3) / 0.1, (1 + math.cos(math.pi * (share - 0.1) / 0.9)) / 2)


def warmup(steps: int) -> int:
    """Steps of warm-up, for optimizers that do it themselves."""
    return max(1, round(WARMUP * steps))


@dataclass
class Fit:
    """One training run.

    Attributes:
        data: batches (tokens, targets), each of one accumulation step.
        validation: the batches that it is measured on.
        teacher: batch -> its target, for an oracle.
        autocast: dtype of the forward pass; None: that of the parameters.
        checkpoint: file that an interrupted run goes on from; None: none is written.
        every: steps between checkpoints.
    """

    model: nn.Module
    method: Contender
    rate: float | None
    data: Epochs
    validation: list[Batch]
    steps: int
    accumulate: int = 1
    teacher: Callable[[Batch], Tensor] | None = None
    autocast: torch.dtype | None = None
    checkpoint: Path | None = None
    every: int = 100
    key: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.method.make(parameters, self.rate, self.steps)
        self.base = [group.get("lr", 1.0) for group in self.optimizer.param_groups]

    def __call__(self, resume: bool = False) -> Result:
        """Train; the rows of the history. With ``resume`` go on from the checkpoint of this key."""
        done, rows, losses = 0, [], []
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            saved = load_checkpoint(self.checkpoint)
            if saved["key"] == self.key:
                done, rows, losses = saved["done"], saved["rows"], saved["losses"]
                self.restore(saved)
        batches = endless(self.data)
        ticks = {round(i * self.steps / 10) for i in range(1, 11)} | set(milestones(self.steps, 4))
        self.model.train()
        self._mode("train")
        while done < self.steps:
            if done == 0:
                rows.append(self.row(0, [], self.validated()))
            losses.append(self.step(done, batches))
            done += 1
            if not math.isfinite(losses[-1]):
                rows.append(self.row(self.steps, [], math.inf))
                break
            if done in ticks:
                rows.append(self.row(done, losses, self.validated()))
                losses = []
            if self.checkpoint is not None and done % self.every == 0 and done < self.steps:
                self.save(done, rows, losses)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return {"rows": rows}

    def step(self, k: int, batches: Iterator[Batch]) -> float:
        """One step on ``accumulate`` batches; the loss of all of them."""
        method, optimizer = self.method, self.optimizer
        if method.schedule is not None:
            for group, base in zip(optimizer.param_groups, self.base, strict=True):
                group["lr"] = base * method.schedule(k / self.steps)
        optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        target = torch.zeros((), device=self.device) if method.oracle else None
        for _ in range(self.accumulate):
            batch = next(batches)
            loss = self.loss(batch) / self.accumulate
            loss.backward()
            total += loss.detach()
            if target is not None:
                assert self.teacher is not None
                target += self.teacher(batch) / self.accumulate
        if method.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), method.clip)
        if method.ours:
            optimizer.step(loss=total, target=target)
        else:
            optimizer.step()
        return total.item()

    def loss(self, batch: Batch) -> Tensor:
        return forward_loss(self.model, batch, self.autocast)

    def validated(self) -> float:
        """The mean validation loss."""
        self.model.eval()
        self._mode("eval")
        with torch.no_grad():
            values = [self.loss(batch).item() for batch in self.validation]
        self._mode("train")
        self.model.train()
        return sum(values) / len(values)

    def row(self, done: int, losses: list[float], validation: float) -> dict[str, Any]:
        """The mean training loss since the last row, the validation loss, the size of a step."""
        last = self.optimizer.last if self.method.ours else None
        return {
            "step": done,
            "training loss": sum(losses) / len(losses) if losses else None,
            "validation loss": validation,
            "step size": last.step if last else self.optimizer.param_groups[0].get("lr"),
        }

    def _mode(self, name: str) -> None:
        """``train`` or ``eval`` of optimizers whose result is an average."""
        getattr(self.optimizer, name, lambda: None)()

    def save(self, done: int, rows: list[dict[str, Any]], losses: list[float]) -> None:
        assert self.checkpoint is not None
        save_checkpoint(
            self.checkpoint,
            {
                "key": self.key, "done": done, "rows": rows, "losses": losses,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "data": self.data.state_dict(),
                "generators": all_generators(self.device),
            },
        )  # fmt: skip

    def keep_best(self, path: Path, loss: float) -> None:
        """Write the weights to ``path``, with their validation loss and key, if no lower one is
        there."""
        if not loss < (load_checkpoint(path)["loss"] if path.exists() else math.inf):
            return
        self._mode("eval")  # of an average, the weights that were validated
        save_checkpoint(path, {"loss": loss, "key": self.key, "model": self.model.state_dict()})

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.data.load_state_dict(saved["data"])
        restore_generators(saved["generators"], self.device)


def forward_loss(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> Tensor:
    """:func:`next_token_loss`, the forward pass in another dtype where ``autocast`` names one."""
    with torch.autocast(batch[0].device.type, autocast, enabled=autocast is not None):
        return next_token_loss(model, *batch)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def installed(methods: dict[str, Contender]) -> tuple[dict[str, Contender], list[str]]:
    """Those whose package is installed, and a sentence for each of the others."""
    kept, missing = {}, []
    for name, method in methods.items():
        try:
            if method.package is not None:
                require(method.package, name)
            kept[name] = method
        except ImportError:
            missing.append(f"{name} is left out: pip install {method.package} to have it")
    return kept, missing


def schedulefree_adamw(parameters: Any, rate: float, steps: int, **options: Any) -> Any:
    made = require("schedulefree", "schedule-free AdamW").AdamWScheduleFree
    return made(parameters, lr=rate, warmup_steps=warmup(steps), **options)


# -- the text ------------------------------------------------------------------------------------


def add_text_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", metavar="FILE", help="a text file in place of --data, a tenth for validation")
    add("--tokens", metavar="FOLDER", help="train.bin and validation.bin in place of a text")
    add("--vocabulary", type=positive, metavar="N", help="of --tokens (default: its meta.json)")
    add("--tokenizer", metavar="NAME", help="of Hugging Face, a folder or a name (default: "
        "one token per character)")  # fmt: skip
    add("--context", type=positive, default=32, help="tokens in a row")
    add("--batch", type=positive, default=8, help="rows of tokens in a batch")
    add("--accumulate", type=positive, default=1, help="batches per step")
    add("--precision", choices=("float32", "bf16"), default="float32", help="of the forward pass")
    add("--checkpoint-every", type=positive, default=100, metavar="N", help="steps")


def tokens(run: Run, options: Namespace) -> Tokens:
    """The tokens that the options ask for; those of a text are written to the run folder.

    Raises:
        MissingData, BadData: what is missing or wrong, and where it was looked for.
    """
    if options.tokens:
        return map_tokens(options.tokens, options.vocabulary)
    folder = run.folder / "tokens"
    text = load_text(options.text or options.data, options.root)
    if options.tokenizer is None:
        write_text(folder, text)
    else:
        encode = from_hub("AutoTokenizer", options.tokenizer, "tokenizing the text")
        train, validation = (
            torch.tensor(encode(text.decode(part), verbose=False)["input_ids"])
            for part in (text.train, text.validation)
        )
        write_tokens(folder, train, validation, len(encode))
    return map_tokens(folder)


def from_hub(kind: str, name: str, purpose: str, **options: Any) -> Any:
    """``transformers.<kind>.from_pretrained(name)``, or a sentence that says what is missing."""
    made = getattr(require("transformers", purpose, extra="language"), kind)
    try:
        return made.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise MissingData(
            f"{name} is neither a folder here nor reachable on the hub ({first_line(error)}): "
            f"save it where there is a network with {kind}.from_pretrained({name!r})"
            f".save_pretrained(FOLDER), and name that folder"
        ) from error


def validation_batches(data: Tokens, options: Namespace, count: int = 8) -> list[Batch]:
    """The same ``count`` batches for every run, or as many as there are."""
    size = min(options.batch, (len(data.validation) - options.context) // options.context)
    blocks = TokenBlocks(data.validation, options.context, max(1, size), 0, options.device)
    return [batch for _, batch in zip(range(count), blocks, strict=False)]


def training_batches(data: Tokens, options: Namespace, seed: int) -> TokenBlocks:
    return TokenBlocks(data.train, options.context, options.batch, seed, options.device)


PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
DATA = (SHAKESPEARE,)
