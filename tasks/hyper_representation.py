"""Hyper-representation: learn features on which a linear head does well on images it never saw.

    min_x  mean cross-entropy of the head  w*(x)  on validation images
    w*(x) = argmin_w  mean cross-entropy on training images + ridge / 2 ||w||^2

x are the features of LeNet, w the linear layer above them; both levels see minibatches. Whenever
features are measured, the head is solved anew to its optimum: the numbers are those of F(x), not
of a head that happens to lag behind. With ``--data omniglot`` see :mod:`tasks.few_shot`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel

from . import few_shot
from .__main__ import penalty, positive
from .compare import add_methods, best, best_by_direction, compare, draw, report_grid
from .data import Dataset, batches, load
from .data.dataset import Part
from .errors import require
from .few_shot import FewShot
from .models import (
    Net,
    Parameters,
    adam,
    double,
    featured,
    lenet_features,
    measure,
    minimize,
    ridge_loss,
    seeded,
)
from .run import start

SUMMARY = """Learn the features of LeNet such that a ridge-regularised linear head, trained on the
training images, does well on validation images; with omniglot, the features of a convolutional
network for episodes of a few characters each. Compares methods without learning rates with a
grid of hand-tuned steps, in outer iterations, gradients and seconds."""

DATA = ("digits", "mnist", "fashion-mnist", "omniglot")
PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "paper": {"data": "mnist", "steps": 1000, "grid": "large"},
    "quick": {"steps": 20, "grid": "none"},
}
STEPS = {"digits": 50, "mnist": 500, "fashion-mnist": 500, "omniglot": 30}
MARKS = {"digits": 10, "omniglot": 6}  # features are slow to judge
FEATURES = 84


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--ridge",
        type=penalty,
        help="weight of the penalty on the head, > 0 (default: 1e-3, omniglot 0.1)",
    )
    add("--batch", type=positive, default=256, help="images per batch, at both levels")
    add(
        "--head-images",
        type=positive,
        default=10_000,
        metavar="N",
        help="training images on which a head is solved when features are measured, at most",
    )
    add_methods(parser)
    few_shot.add_arguments(parser)
    parser.set_defaults(grid=None)


def run(options: Namespace) -> dict[str, Any]:
    if options.ridge is None:
        options.ridge = 0.1 if options.data == "omniglot" else 1e-3
    if options.grid is None:
        options.grid = "tiny" if options.data == "omniglot" else "small"
    require("matplotlib", "drawing figures")  # before any work is lost
    options.steps = options.steps or STEPS[options.data]
    data = load(options.data, options.root, options.device, download=options.download)
    run = start(options)
    make = FewShot if options.data == "omniglot" else Representation
    task = make(data, options)

    ours, grid = compare(
        run, options, task.solve, lambda x, y: task.measure(x), marks=MARKS.get(options.data, 20)
    )
    tuned = best_by_direction(grid)
    chosen = best(grid)

    draw(run, [*ours, *tuned], f"hyper-representation, {options.data}")
    return run.summarize(
        {
            "data": repr(data),
            "best cell of the grid": chosen.name if chosen else None,
            "methods": [a.row() for a in [*ours, *tuned]],
            "references": [
                {"features": name, **task.measure(features)}
                for name, features in task.references().items()
            ],
            "grid": report_grid(run, grid),
        }
    )


class Representation:
    """The problem: features, head, the two losses, and the measure of features."""

    def __init__(self, data: Dataset, options: Namespace) -> None:
        self.data, self.options = data, options
        weight = torch.zeros(data.classes, FEATURES, device=options.device)
        self.head = {"weight": weight, "bias": weight[:, 0].clone()}

    def begin(self) -> nn.Module:
        """The features at the start, the same for every method."""
        with seeded(self.options.seed, 1):
            features = lenet_features(self.data.shape)
        return features.to(self.options.device)

    def inner(self, x: nn.Module, y: Parameters, batch: Part) -> Tensor:
        images, labels = batch
        return ridge_loss(logits, x(images), labels, self.options.ridge)(y)

    def outer(self, x: nn.Module, y: Parameters, batch: Part) -> Tensor:
        images, labels = batch
        return F.cross_entropy(logits(y, x(images)), labels)

    def solve(self, method: bilevel.Method, **manners: Any) -> bilevel.Result:
        """The features of one method, in ``result.x``."""
        size, seed = self.options.batch, self.options.seed
        return bilevel.solve(
            self.outer,
            self.inner,
            self.begin(),
            self.head,
            outer_data=batches(*self.data.validation, size=size, seed=seed, drop_last=True),
            inner_data=batches(*self.data.train, size=size, seed=seed, drop_last=True),
            method=method,
            inner_steps=self.options.inner_steps,
            **manners,
        )

    def solved_head(self, x: nn.Module) -> Parameters:
        """w*(x): the head's optimum on (at most ``--head-images``) training images."""
        images, labels = (part[: self.options.head_images] for part in self.data.train)
        loss = ridge_loss(logits, featured(x, images), labels, self.options.ridge)
        return minimize(loss, double(self.head), iterations=300)  # where features explode, no more

    def measure(self, x: nn.Module) -> dict[str, float]:
        """What a freshly solved head attains on features x."""
        head = self.solved_head(x)
        out: dict[str, float] = {}
        for name, (images, labels) in (
            ("validation", self.data.validation),
            ("test", self.data.test),
        ):
            loss, accuracy = measure(logits, head, (featured(x, images), labels))
            out |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return out

    def references(self) -> dict[str, nn.Module]:
        """Features to compare with, by name."""
        return {
            "random features": self.begin(),
            "ordinary training on the training images, Adam": self.ordinary(),
        }

    def ordinary(self) -> nn.Module:
        """The features of a LeNet trained in one level, on as many batches as a bilevel run."""
        options = self.options
        net = Net("lenet", self.data.shape, self.data.classes, options.device)
        source = batches(*self.data.train, size=options.batch, seed=options.seed, drop_last=True)
        count = options.steps * (options.inner_steps + 1)

        def loss(parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(net(parameters, images), labels)

        trained = adam(loss, net.start(options.seed, 1), source, count, lr=1e-3)
        features = self.begin()
        features.load_state_dict({key: trained[key] for key in features.state_dict()})
        return features


def logits(head: Parameters, features: Tensor) -> Tensor:
    """The linear head on features, shape (n, FEATURES)."""
    return F.linear(features, head["weight"], head["bias"])
