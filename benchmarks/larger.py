"""Problems of MNIST and Omniglot, for whom they are at hand and has more time; and all problems."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks.kinked import KINKED
from benchmarks.networks import NETWORKS, squares
from benchmarks.problems import (
    CASES,
    HARD,
    Case,
    Shuffled,
    cleaning,
    distillation,
    images_of,
    representation,
)
from benchmarks.rounded import SHARP_AND_ROUNDED
from benchmarks.stumbles import STUMBLES
from benchmarks.unseen import UNSEEN
from tasks.data import Dataset, load
from tasks.few_shot import FewShot
from tasks.models import convnet, descend, seeded


@cache
def characters() -> Dataset:
    return load("omniglot")


def few_shot(seed: int, episodes: int = 4, ways: int = 5, shots: int = 1) -> Case:
    """Features of Omniglot's characters, a head for each episode; new episodes in every iteration,
    y starting afresh: the task of this name."""
    device = torch.device("cpu")
    options = Namespace(
        n_way=ways, k_shot=shots, episodes=episodes, ridge=0.1, seed=seed, device=device
    )
    task = FewShot(characters(), options)

    def objective(x: Any) -> float:
        return task.measure(x)["validation_loss"]

    pairs = {"data": task.feed(), "warm_start": False}
    return Case(task.outer, task.inner, task.begin(), task.heads, objective, pairs)


def convnet_distillation(seed: int, size: int = 128, decay: float = 1e-3) -> Case:
    """Ten learned images of MNIST, and a ConvNet trained on them."""
    train, _ = images_of("mnist")
    with seeded(100):
        module = convnet((1, 28, 28), 10, width=8)
    net = partial(functional_call, module)
    labels = torch.arange(10)

    def inner(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(net(y, (x,)), labels) + decay / 2 * squares(y)

    def outer(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(y, (batch[0].view(-1, 1, 28, 28),)), batch[1])

    def objective(x: Tensor, y: dict[str, Tensor]) -> float:
        y = descend(lambda y: inner(x, y), y, 200)  # Adam would leave for another minimum
        with torch.no_grad():
            return float(outer(x, y, train))

    start = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    data = {"outer_data": Shuffled(*train, size=size)}
    y = {key: p.detach() for key, p in module.named_parameters()}
    return Case(outer, inner, start, y, objective, data, local=True)


LARGER: dict[str, Callable[[int], Case]] = {
    "distillation, MNIST": lambda seed: distillation(seed, name="mnist"),
    "distillation, MNIST, 100 images": lambda seed: distillation(seed, images=100, name="mnist"),
    "distillation into a ConvNet, MNIST": convnet_distillation,
    "hyper-representation, MNIST": lambda seed: representation(seed, name="mnist"),
    "data cleaning, MNIST": lambda seed: cleaning(seed, name="mnist"),
    "data cleaning, MNIST, 90 % wrong": lambda seed: cleaning(seed, corrupted=0.9, name="mnist"),
    "few-shot features, Omniglot": few_shot,
}
EVERY = {
    **CASES,
    **NETWORKS,
    **HARD,
    **LARGER,
    **UNSEEN,
    **KINKED,
    **STUMBLES,
    **SHARP_AND_ROUNDED,
}
