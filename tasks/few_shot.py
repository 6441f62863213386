"""Few-shot features: hyper-representation on episodes of a few classes each.

    min_x  mean over episodes of the cross-entropy of the head  w*(x)  on the query images
    w*(x) = argmin_w  mean cross-entropy on the support images + ridge / 2 ||w||^2

Every outer iteration draws new episodes, whose heads start at zero: nothing is warm. Test episodes
are of characters that no training saw.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel

from .__main__ import positive
from .data import Dataset, batches, episodes
from .data.dataset import Part
from .models import Parameters, adam, double, featured, minimize, seeded, square

WIDTH = 32  # channels, and features: four poolings leave one pixel of 28 x 28
JUDGES = {"validation": 60, "test": 100}  # episodes
QUERIES = 5  # images of each class
ORDINARY = 128  # images per batch of the ordinary training


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("episodes, of omniglot alone").add_argument
    add("--n-way", type=positive, default=5, metavar="N", help="classes of an episode")
    add("--k-shot", type=positive, default=1, metavar="K", help="support images of each class")
    add("--episodes", type=positive, default=4, metavar="E", help="per outer iteration")


def features_net() -> nn.Sequential:
    """Four blocks of convolution, group normalisation, ReLU and pooling; 28 x 28 to 32 features."""
    blocks: list[nn.Module] = []
    for channels in (1, WIDTH, WIDTH, WIDTH):
        blocks += [
            *(nn.Conv2d(channels, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH)),
            *(nn.ReLU(), nn.MaxPool2d(2)),
        ]
    return nn.Sequential(*blocks, nn.Flatten())


class FewShot:
    """The problem: features, a head per episode, the two losses, and the measure of features."""

    def __init__(self, data: Dataset, options: Namespace) -> None:
        self.data, self.options = data, options
        shape = (options.episodes, options.n_way)
        weight = torch.zeros(*shape, WIDTH, device=options.device)
        self.heads = {"weight": weight, "bias": weight[:, :, 0].clone()}
        self.judges = {  # of positions, which any features can be looked up by
            name: self._positions(getattr(data, name), number) for name, number in JUDGES.items()
        }

    def _positions(self, part: Part, number: int) -> tuple[Part, Part]:
        places = torch.arange(len(part[1]), device=part[1].device)
        options = self.options
        shots = options.n_way, options.k_shot, QUERIES
        drawn = Groups(number, places, part[1], *shots, seed=0, per_epoch=number)
        support, query = next(iter(drawn))
        return support, query

    def begin(self) -> nn.Module:
        """The features at the start, the same for every method."""
        with seeded(self.options.seed, 1):
            features = features_net()
        return features.to(self.options.device)

    def inner(self, x: nn.Module, y: Parameters, support: Part) -> Tensor:
        """The sum over the episodes, each of which is then a problem of its own."""
        images, labels = support
        features = x(images.flatten(0, 1)).unflatten(0, labels.shape)
        return self.head_loss(y, features, labels)

    def head_loss(self, y: Parameters, features: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(logits(y, features).flatten(0, 1), labels.flatten())
        return len(labels) * each + self.options.ridge / 2 * square(y)

    def outer(self, x: nn.Module, y: Parameters, query: Part) -> Tensor:
        images, labels = query
        features = x(images.flatten(0, 1)).unflatten(0, labels.shape)
        return F.cross_entropy(logits(y, features).flatten(0, 1), labels.flatten())

    def feed(self) -> Groups:
        """Query and support images of training episodes, several to an outer iteration."""
        options = self.options
        return Groups(
            options.episodes,
            *self.data.train,
            options.n_way,
            options.k_shot,
            QUERIES,
            seed=options.seed,
            per_epoch=100 * options.episodes,
            outer_first=True,
        )

    def solve(self, method: bilevel.Method, **manners: Any) -> bilevel.Result:
        """The features of one method, in ``result.x``."""
        return bilevel.solve(
            self.outer,
            self.inner,
            self.begin(),
            self.heads,
            data=self.feed(),
            method=method,
            inner_steps=self.options.inner_steps,
            warm_start=False,
            **manners,
        )

    def measure(self, x: nn.Module) -> dict[str, float]:
        """What freshly solved heads attain on episodes of other characters, with the half width
        of the 95 % confidence interval of the accuracy."""
        out: dict[str, float] = {}
        for name, judge in self.judges.items():
            features = featured(x, getattr(self.data, name)[0])
            support, query = ((features[places], labels) for places, labels in judge)
            loss, right = self.judge(support, query)
            out[f"{name}_loss"], out[f"{name}_accuracy"] = loss, float(right.mean())
            out[f"{name}_interval"] = 1.96 * float(right.std()) / len(right) ** 0.5
        return out

    def judge(self, support: Part, query: Part) -> tuple[float, Tensor]:
        """Mean cross-entropy on the queries, and each episode's accuracy, of the optimal heads."""
        episodes, ways = len(support[1]), self.options.n_way
        zeros = {
            "weight": torch.zeros(episodes, ways, WIDTH, dtype=torch.float64),
            "bias": torch.zeros(episodes, ways, dtype=torch.float64),
        }
        start = {key: value.to(support[0].device) for key, value in double(zeros).items()}
        # features that exploded have no head: no more than these iterations
        heads = minimize(lambda y: self.head_loss(y, *support), start, 1e-3, 200, history=10)
        scores = logits(heads, query[0])
        loss = F.cross_entropy(scores.flatten(0, 1), query[1].flatten())
        return float(loss), (scores.argmax(2) == query[1]).double().mean(1)

    def references(self) -> dict[str, nn.Module]:
        """Features to compare with, by name."""
        return {
            "random features": self.begin(),
            "ordinary training to tell all training characters apart, Adam": self.ordinary(),
        }

    def ordinary(self) -> nn.Module:
        """The features below a classifier of all training characters; as many batches as a run."""
        images, labels = self.data.train
        present, classes = labels.unique(return_inverse=True)
        with seeded(self.options.seed, 1):
            net = nn.Sequential(features_net(), nn.Linear(WIDTH, len(present)))
        net = net.to(self.options.device)
        source = batches(images, classes, size=ORDINARY, seed=self.options.seed, drop_last=True)

        def loss(parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, parameters, images), labels)

        count = self.options.steps * (self.options.inner_steps + 1)
        begin = {key: value.detach() for key, value in net.named_parameters()}
        net.load_state_dict(adam(loss, begin, source, count, lr=3e-3))
        features = net[0]
        assert isinstance(features, nn.Module)
        return features


class Groups(episodes):
    """Several episodes at once: images of shape (size, n, ...), labels of shape (size, n)."""

    def __init__(self, size: int, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.size = size

    def __len__(self) -> int:
        return self.per_epoch // self.size

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "size": self.size}

    def _start(self, epoch: int) -> Callable[[int], Any]:
        episode = super()._start(epoch)

        def group(position: int) -> Any:
            drawn = [episode(self.size * position + i) for i in range(self.size)]
            first, second = zip(*drawn, strict=True)
            return tuple(
                tuple(torch.stack(parts) for parts in zip(*level, strict=True))
                for level in (first, second)
            )

        return group


def logits(heads: Parameters, features: Tensor) -> Tensor:
    """Linear heads (E, ways, features) on features (E, n, features): (E, n, ways)."""
    return features @ heads["weight"].mT + heads["bias"][:, None]
