"""Data cleaning: find the wrong labels of a training set by weighting its samples.

    min_x  mean cross-entropy of  w*(x)  on clean validation images
    w*(x) = argmin_w  mean_i sigmoid(x_i) cross-entropy_i  on training images + ridge / 2 ||w||^2

x holds one logit per training image, y a multinomial logistic regression. A share of the training
labels is replaced by random ones, a tenth of which happen to be right.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bilevel

from .__main__ import penalty, positive
from .compare import Attempt, add_methods, best, best_by_direction, compare, draw, report_grid
from .data import batches, load
from .data.batches import generator
from .data.dataset import Dataset, Part
from .errors import require
from .figures import curves
from .models import Net, Parameters, double, measure, minimize, square
from .run import Run, image_grid, start

SUMMARY = """Learn one weight per training image, many of whose labels are wrong, such that a
logistic regression trained with these weights does well on a few clean images. Reports its test
accuracy and how well the weights find the wrong labels, beside training on all images, on the
truly clean ones, and on the clean validation images alone."""

STEPS = {"digits": 100, "mnist": 100, "fashion-mnist": 100}
SIZES = {"digits": (1300, 100, 397)}  # training, validation, test
MNIST = (5000, 500, 10_000)
PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "paper": {
        **{"data": "mnist", "train_images": 20_000, "validation_images": 5000},
        **{"batch": 64, "steps": 3000, "grid": "large"},
    },
    "quick": {"steps": 20, "grid": "none"},
}
SHOWN = 20  # images with the smallest weights in the picture


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--corruption", type=share, default=0.5, help="share of the labels replaced at random")
    add("--ridge", type=penalty, default=1e-3, help="weight of the penalty on the model, > 0")
    add("--batch", type=positive, default=256, help="images per batch, at both levels")
    add("--train-images", type=positive, metavar="N", help="default: 1300 of digits, else 5000")
    add("--validation-images", type=positive, metavar="N", help="default: 100 of digits, else 500")
    add_methods(parser)


def share(text: str) -> float:
    """A number in [0, 1], as an option's type."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def run(options: Namespace) -> dict[str, Any]:
    require("matplotlib", "drawing figures")  # before any work is lost
    options.steps = options.steps or STEPS[options.data]
    data = read(options)
    run = start(options)
    task = Cleaning(data, options)

    ours, grid = compare(run, options, task.solve, task.measure)
    shown = [*ours, *best_by_direction(grid)]
    chosen = best(grid)
    title = f"data cleaning, {options.data}, {options.corruption:g} of the labels replaced"
    draw(run, shown, title, log_y=False)
    task.picture(run, ours[0], title)
    return run.summarize(
        {
            "data": repr(data),
            "wrong labels": float(task.wrong.double().mean()),
            "best cell of the grid": chosen.name if chosen else None,
            "methods": [a.row() for a in shown],
            "references": task.references(),
            "grid": report_grid(run, grid),
        }
    )


def read(options: Namespace) -> Dataset:
    """The data, of the sizes asked for."""
    train, validation, test = SIZES.get(options.data, MNIST)
    sizes = (options.train_images or train, options.validation_images or validation, test)
    return load(options.data, options.root, options.device, sizes=sizes, download=options.download)


def corrupt(labels: Tensor, part: float, classes: int, seed: int) -> Tensor:
    """The labels, each replaced with probability ``part`` by one drawn from all classes."""
    draw = generator(seed, 4)
    replaced = torch.rand(len(labels), generator=draw) < part
    random = torch.randint(classes, (len(labels),), generator=draw)
    return torch.where(replaced.to(labels.device), random.to(labels), labels)


class Cleaning:
    """The problem: corrupted labels, the two losses, and the measure of weights."""

    def __init__(self, data: Dataset, options: Namespace) -> None:
        self.data, self.options = data, options
        self.net = Net("linear", data.shape, data.classes, options.device)
        images, truth = data.train
        self.labels = corrupt(truth, options.corruption, data.classes, options.seed)
        self.wrong = self.labels != truth
        self.x = torch.zeros_like(images[:, 0, 0, 0])
        self.train = (images, torch.arange(len(truth), device=truth.device))

    def weighted(self, weights: Tensor, y: Parameters, images: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(self.net(y, images), labels, reduction="none")
        return (weights * losses).mean() + self.options.ridge / 2 * square(y)

    def inner(self, x: Tensor, y: Parameters, batch: Part) -> Tensor:
        images, index = batch
        return self.weighted(x[index].sigmoid(), y, images, self.labels[index])

    def outer(self, x: Tensor, y: Parameters, batch: Part) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(y, images), labels)

    def solve(self, method: bilevel.Method, **manners: Any) -> bilevel.Result:
        size, seed = self.options.batch, self.options.seed
        return bilevel.solve(
            self.outer,
            self.inner,
            self.x,
            self.net.zeros(),
            outer_data=batches(*self.data.validation, size=size, seed=seed, drop_last=True),
            inner_data=batches(*self.train, size=size, seed=seed, drop_last=True),
            method=method,
            inner_steps=self.options.inner_steps,
            **manners,
        )

    def fit(self, weights: Tensor, begin: Parameters, part: Part) -> dict[str, float]:
        """What the regression attains that is trained on a part with these weights."""
        images, labels = part[0].double(), part[1]
        model = minimize(
            lambda y: self.weighted(weights.double(), y, images, labels), double(begin), 1e-5
        )
        out: dict[str, float] = {}
        for name, judge in (("validation", self.data.validation), ("test", self.data.test)):
            loss, accuracy = measure(self.net, model, judge)
            out |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return out

    def measure(self, x: Tensor, y: Parameters) -> dict[str, float]:
        """The regression solved with the weights, and the wrong labels that they find."""
        images = self.data.train[0]
        found = {"auc": auc(-x, self.wrong), "f1": f1(x < 0, self.wrong)}
        return {**self.fit(x.sigmoid(), y, (images, self.labels)), **found}

    def references(self) -> list[dict[str, Any]]:
        images, zeros = self.data.train[0], self.net.zeros()
        ones = torch.ones_like(self.x)
        validation = self.data.validation
        trainings = {
            "all training images, equal weights": (ones, (images, self.labels)),
            "the truly clean ones alone (oracle)": ((~self.wrong).to(ones), (images, self.labels)),
            "the clean validation images alone": (
                torch.ones_like(validation[0][:, 0, 0, 0]),
                validation,
            ),
        }
        return [
            {"trained on": name, **self.fit(weights, zeros, part)}
            for name, (weights, part) in trainings.items()
        ]

    def picture(self, run: Run, a: Attempt, title: str) -> None:
        """The weights of wrong and right labels, and the images with the smallest ones."""
        assert a.result is not None
        weights = a.result.x.sigmoid().cpu()
        wrong = self.wrong.cpu()
        series = {}
        for name, part in (("right label", weights[~wrong]), ("wrong label", weights[wrong])):
            places = torch.linspace(0, 1, len(part)).tolist()
            series[name] = (places, part.sort().values.tolist())
        series = {name: pair for name, pair in series.items() if len(pair[0])}
        what = ("share of the images with a weight of at most y", "weight")
        curves(run.folder / "weights.png", series, *what, f"{title}: {a.name}")
        order = weights.argsort()[:SHOWN].to(self.wrong.device)
        images, truth = (part[order] for part in self.data.train)
        pairs = zip(self.labels[order].tolist(), truth.tolist(), strict=True)
        image_grid(
            run.folder / "smallest-weights.png",
            images,
            [f"{label}, is {true}" for label, true in pairs],
            f"{self.data.name}: labels trusted least by {a.name}, and true ones",
        )


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive has a higher score than a negative, ties by half; nan without both."""
    values, place = scores.double().unique(return_inverse=True)
    counts = torch.bincount(place, minlength=len(values)).double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # mean rank of the ties, from 1
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def f1(found: Tensor, positive: Tensor) -> float:
    """2 x hits / (found + positive); 0 where both are empty."""
    hits, both = int((found & positive).sum()), int(found.sum() + positive.sum())
    return 2 * hits / both if both else 0.0
