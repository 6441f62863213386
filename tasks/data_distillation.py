"""Data distillation: learn a few images on which a model trains as well as on all of them.

    min_x  mean cross-entropy on real images of the model  w*(x)
    w*(x) = argmin_w  mean cross-entropy on the images x + ridge / 2 ||w||^2

With the linear model w* is unique, and the implicit hypergradient is that of a model trained to
its end. With a network, each outer iteration trains a new one from fresh random parameters, and
the hypergradient goes back through the last ``window`` of its steps; the inner variable is then
the distance from these parameters.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bilevel

from .__main__ import penalty, positive
from .compare import (
    METHODS,
    Attempt,
    Cell,
    attempt,
    best,
    best_by_direction,
    cells,
    draw,
    report_grid,
)
from .compare import add_arguments as add_grid
from .data import Dataset, batches, load
from .data.batches import Batches, generator
from .data.dataset import Part
from .errors import require
from .models import Net, Parameters, adam, descend, double, measure, minimize, ridge_loss
from .run import Run, image_grid, progress, start

SUMMARY = """Learn a few images such that a model trained on them alone does well on real data.
Compares them with random real images, with all of the data, and with the best of a grid of
hand-tuned steps; fresh models of another start, optimizer and architecture are the judges."""

STEPS = {"digits": 100, "mnist": 500, "fashion-mnist": 500}
PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "quick": {"steps": 20, "grid": "none", "repeats": 2},
}
STARTS = 100  # networks that the images are learned for, in turn
ADAM_STEPS = 300  # of the models that judge
HINT = 4.0  # logit of the right class where labels are learned, at the start


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--images-per-class", type=positive, default=1, metavar="N", help="images to learn")
    add("--learn-labels", action="store_true", help="learn soft labels along with the images")
    add("--begin", choices=("real", "noise"), default="real", help="what the images begin as")
    add("--model", choices=("linear", "lenet", "convnet"), default="linear", help="trained inside")
    add("--method", choices=METHODS, default="bisls-adam", help="nothing of it needs tuning")
    add("--ridge", type=penalty, default=1e-3, help="weight of the penalty on the model, > 0")
    add("--batch", type=positive, default=256, help="real images per outer iteration")
    add("--inner-steps", type=positive, help="per outer iteration (default: 10; a network 30)")
    add("--window", type=positive, default=20, help="steps a network's hypergradient goes back")
    add("--repeats", type=positive, default=5, help="fresh models on each set, to judge it")
    add_grid(parser)


def run(options: Namespace) -> dict[str, Any]:
    require("matplotlib", "drawing figures")  # before any work is lost
    options.steps = options.steps or STEPS[options.data]
    options.inner_steps = options.inner_steps or (10 if options.model == "linear" else 30)
    data = load(options.data, options.root, options.device, download=options.download)
    run = start(options)
    task = Distillation(data, options)

    ours = task.learn(run, options.method, METHODS[options.method])
    grid = [
        task.learn(run, str(cell), cell.method, cell)
        for cell in progress(cells(options.grid), desc="grid", quiet=options.quiet)
    ]
    chosen = best(grid)

    sets = {f"learned, {ours.name}": [task.read(ours)]}
    if chosen is not None:
        sets[f"learned, {chosen.name} (best of {len(grid)})"] = [task.read(chosen)]
    sets["random real images"] = [
        real_images(data, options.images_per_class, options.seed, 1 + i)
        for i in range(4 * options.repeats)
    ]
    judged = judge(task, sets)

    task.save(run, ours)
    draw(
        run,
        [ours, *best_by_direction(grid)],
        f"data distillation, {options.data}, {task.count} images",
    )
    return run.summarize(
        {
            "data": repr(data),
            "images learned": task.count,
            "validation loss": ours.final,
            "seconds of learning": ours.marks[-1]["seconds"],
            "reason": ours.result.reason if ours.result else None,
            "models trained from scratch": judged,
            "grid": report_grid(run, grid),
        }
    )


class Distillation:
    """The problem: what is learned, from where, the two losses, and how to train on a result."""

    def __init__(self, data: Dataset, options: Namespace) -> None:
        self.data, self.options = data, options
        self.net = Net(options.model, data.shape, data.classes, options.device)
        images, self.labels = real_images(data, options.images_per_class, options.seed)
        self.count = len(images)
        if options.begin == "noise":
            noise = torch.rand(images.shape, generator=generator(options.seed, 1))
            images = noise.to(images)
        self.x = {"images": images}
        if options.learn_labels:
            self.x["logits"] = HINT * F.one_hot(self.labels, data.classes).to(images.dtype)
        if self.net.convex:
            self.starts = [self.net.zeros()]
        else:
            self.starts = [self.net.start(options.seed, 2, i) for i in range(STARTS)]

    def training_set(self, x: Parameters) -> Part:
        """The images and their labels, which are probabilities where they are learned."""
        return x["images"], x["logits"].softmax(1) if "logits" in x else self.labels

    def inner(self, x: Parameters, y: Parameters, begin: Parameters) -> Tensor:
        loss = ridge_loss(self.net, *self.training_set(x), self.options.ridge)
        return loss({key: begin[key] + y[key] for key in y})

    def outer(
        self, x: Parameters, y: Parameters, batch: tuple[Tensor, Tensor, Parameters]
    ) -> Tensor:
        images, labels, begin = batch
        return F.cross_entropy(self.net({key: begin[key] + y[key] for key in y}, images), labels)

    def learn(
        self,
        run: Run,
        name: str,
        method: Callable[..., bilevel.Method],
        cell: Cell | None = None,
    ) -> Attempt:
        """The images of one method."""
        options = self.options
        unrolled = bilevel.Unrolled(window=options.window)
        made = method() if self.net.convex else method(hypergradient=unrolled)
        train, size, seed = self.data.train, options.batch, options.seed
        data: dict[str, Any] = {"data": Trainings(train, self.starts, size, seed)}
        if self.net.convex:  # y has one solution, wherever it begins
            data = {"outer_data": Placed(train, self.starts, size, seed), "inner_data": self.starts}

        def solve(**manners: Any) -> bilevel.Result:
            return bilevel.solve(
                self.outer,
                self.inner,
                self.x,
                self.net.zeros(),
                method=made,
                inner_steps=options.inner_steps,
                warm_start=self.net.convex,
                **data,
                **manners,
            )

        return attempt(run, name, solve, self.validate, options, cell, 10 if cell is None else 5)

    def train(self, training_set: Part, begin: Parameters) -> Parameters:
        """The model that the problem means, from ``begin``.

        Of the linear model the ridge optimum, wherever it begins; of a network its inner steps.
        """
        images, labels = training_set
        if not self.net.convex:
            loss = ridge_loss(self.net, images, labels, self.options.ridge)
            return descend(loss, begin, self.options.inner_steps)
        if labels.is_floating_point():
            labels = labels.double()
        loss = ridge_loss(self.net, images.double(), labels, self.options.ridge)
        return minimize(loss, double(begin))

    def validate(self, x: Parameters, y: Parameters) -> dict[str, float]:
        """The validation loss of what is trained on x; a unique optimum is sought from y."""
        begins = [y] if self.net.convex else self.starts[:3]
        models = [self.train(self.training_set(x), begin) for begin in begins]
        losses = [measure(self.net, model, self.data.validation)[0] for model in models]
        return {"validation_loss": sum(losses) / len(losses)}

    def read(self, a: Attempt) -> Part:
        assert a.result is not None
        return self.training_set(a.result.x)

    def save(self, run: Run, a: Attempt) -> None:
        """The learned set as tensors and as a picture, above it what it began as."""
        images, labels = self.read(a)
        per_class = self.options.images_per_class
        tensors = {"images": images.cpu(), "labels": labels.cpu()}
        torch.save(tensors, run.folder / "learned.pt")
        rows = min(per_class, 3)  # the first few of each class
        order = torch.arange(self.count).view(-1, per_class)[:, :rows].T.flatten().to(images.device)
        shown = torch.cat([self.x["images"][order], images[order]])
        classes = self.labels[order].tolist()
        image_grid(
            run.folder / "images.png",
            shown,
            [f"{c}, {what}" for what in (self.options.begin, "learned") for c in classes],
            f"{self.options.data}: {self.options.begin} images and what was learned from them",
            columns=self.data.classes,
        )


class Placed(Batches):
    """Real images, labels, and where the model starts."""

    def __init__(self, part: Part, starts: list[Parameters], size: int, seed: int) -> None:
        super().__init__(*part, size=size, seed=seed, drop_last=True)
        self.starts = starts

    def _start(self, epoch: int) -> Callable[[int], Any]:
        batch = super()._start(epoch)

        def placed(position: int) -> Any:
            begin = self.starts[(epoch * len(self) + position) % len(self.starts)]
            return *batch(position), begin

        return placed


class Trainings(Placed):
    """Pairs (outer batch, inner batch): :class:`Placed`; and where the model starts alone."""

    def _start(self, epoch: int) -> Callable[[int], Any]:
        placed = super()._start(epoch)

        def pair(position: int) -> Any:
            batch = placed(position)
            return batch, batch[-1]

        return pair


def real_images(data: Dataset, per_class: int, seed: int, draw: int = 0) -> Part:
    """Random training images, the same number of each class, in the order of the classes."""
    images, labels = data.train
    order = torch.randperm(len(labels), generator=generator(seed, 0, draw)).to(labels.device)
    chosen = []
    for c in range(data.classes):
        members = order[labels[order] == c]
        if len(members) < per_class:
            raise ValueError(
                f"--images-per-class {per_class}: there are {len(members)} training images of "
                f"class {c} in {data.name}"
            )
        chosen.append(members[:per_class])
    index = torch.cat(chosen)
    return images[index], labels[index]


def judge(task: Distillation, sets: Mapping[str, Sequence[Part]]) -> list[dict[str, Any]]:
    """Test accuracy of fresh models on each set, and on all of the training data.

    Models with a random start begin where no learning run began.
    """
    data, net, seed = task.data, task.net, task.options.seed
    small = data.shape[-1] < 28
    name = "mlp" if small or net.name == "lenet" else "lenet"
    other = Net(name, data.shape, data.classes, net.device)

    def as_meant(part: Part, i: int) -> Parameters:
        return task.train(part, net.start(seed, 3, i))

    def by_adam(model: Net) -> Callable[[Part, int], Parameters]:
        return lambda part, i: train_by_adam(model, part, task.options.ridge, (seed, 3, i))

    meant = "ridge optimum" if net.convex else f"{task.options.inner_steps} searched steps"
    trainings = [
        (f"{net.name}, {meant}", net, as_meant),
        (f"{net.name}, random start, Adam", net, by_adam(net)),
        (f"{other.name}, random start, Adam", other, by_adam(other)),
    ]
    rows: list[dict[str, Any]] = []
    for trained_on, parts in {**sets, "all training images": [data.train]}.items():
        for training, model, fit in trainings:
            unique = net.convex and fit is as_meant  # nothing random but the set
            runs = range(len(parts) if unique else task.options.repeats)
            fitted = (fit(parts[i % len(parts)], i) for i in runs)
            scores = [measure(model, parameters, data.test)[1] for parameters in fitted]
            rows.append(
                {
                    "trained on": trained_on,
                    "images": len(parts[0][1]),
                    "model": training,
                    "test accuracy": statistics.fmean(scores),
                    "std": statistics.stdev(scores) if len(scores) > 1 else None,
                    "runs": len(scores),
                }
            )
    return rows


def train_by_adam(net: Net, part: Part, ridge: float, seed: tuple[int, ...]) -> Parameters:
    """A model from a random start by ``ADAM_STEPS`` of Adam on minibatches of at most 256."""
    source = batches(*part, size=256, seed=seed[-1], drop_last=True)

    def loss(parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
        return ridge_loss(net, images, labels, ridge)(parameters)

    return adam(loss, net.start(*seed), source, ADAM_STEPS, lr=0.1 if net.convex else 5e-3)
