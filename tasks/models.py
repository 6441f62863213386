"""Models of the tasks as pure functions of their parameters, and how to train them from scratch.

A model here is ``net(parameters, images) -> logits`` with the parameters in a dict, as in
``torch.func``: the losses of a bilevel problem, a reference run and a test all call the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from bilevel.rules import Line

from .data.batches import Epochs, endless, generator

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], Tensor]
Shape = tuple[int, int, int]

CHUNK = 1000  # images at a time where a model is measured, for the memory of its layers


def linear(shape: Shape, classes: int) -> nn.Module:
    """Multinomial logistic regression on the pixels."""
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))


def mlp(shape: Shape, classes: int) -> nn.Module:
    """One hidden layer of 128."""
    channels, height, width = shape
    inputs = channels * height * width
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, classes))


def lenet_features(shape: Shape) -> nn.Sequential:
    """LeNet-5 up to its 84 features; pictures of 8 x 8 get two smaller convolutions."""
    channels, height, width = shape
    if min(height, width) >= 28:
        pad = (32 - height + 1) // 2  # LeNet's own input is 32 x 32
        return nn.Sequential(
            *(nn.Conv2d(channels, 6, 5, padding=pad), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(120, 84), nn.ReLU()),
        )
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * (height // 4) * (width // 4), 84), nn.ReLU()),
    )


def lenet(shape: Shape, classes: int) -> nn.Module:
    """:func:`lenet_features` under a linear layer."""
    return nn.Sequential(*lenet_features(shape), nn.Linear(84, classes))


def convnet(shape: Shape, classes: int, width: int = 32) -> nn.Module:
    """Three blocks of convolution, instance normalisation, ReLU and average pooling."""
    channels, height, side = shape
    blocks: list[nn.Module] = []
    for _ in range(3):
        blocks += [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(width, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
        channels, height, side = width, height // 2, side // 2
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width * height * side, classes))


ARCHITECTURES: dict[str, Callable[[Shape, int], nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "lenet": lenet,
    "convnet": convnet,
}


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """torch's generator of the CPU, seeded by these numbers for the time being."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*seed).initial_seed())
        yield


@dataclass(frozen=True)
class Net:
    """An architecture for images of one shape: a pure function, and its random starts.

    Args:
        name: one of :data:`ARCHITECTURES`.
        shape, classes, device: of the data.
    """

    name: str
    shape: Shape
    classes: int
    device: torch.device

    def __post_init__(self) -> None:
        module = ARCHITECTURES[self.name](self.shape, self.classes).requires_grad_(False)
        object.__setattr__(self, "_module", module.to(self.device))

    def __call__(self, parameters: Parameters, images: Tensor) -> Tensor:
        """Logits, shape (n, classes)."""
        module: nn.Module = self._module  # type: ignore[attr-defined]
        logits: Tensor = functional_call(module, parameters, (images,))
        return logits

    @property
    def convex(self) -> bool:
        """Whether the cross-entropy is convex in the parameters."""
        return self.name == "linear"

    def start(self, *seed: int) -> Parameters:
        """Fresh random parameters that depend on the seed alone, not on the device."""
        with seeded(*seed):
            module = ARCHITECTURES[self.name](self.shape, self.classes)
        return {key: p.detach().to(self.device) for key, p in module.named_parameters()}

    def zeros(self) -> Parameters:
        """Parameters that are all zero."""
        return {key: torch.zeros_like(value) for key, value in self.start(0).items()}


def ridge_loss(
    net: Callable[[Parameters, Tensor], Tensor], images: Tensor, labels: Tensor, ridge: float
) -> Loss:
    """parameters -> mean cross-entropy + ridge / 2 ||parameters||^2.

    Args:
        labels: classes, int64 of shape (n,), or their probabilities, shape (n, classes).
    """
    return lambda parameters: (
        F.cross_entropy(net(parameters, images), labels) + ridge / 2 * square(parameters)
    )


def square(parameters: Parameters) -> Tensor:
    """||parameters||^2."""
    return torch.stack([value.square().sum() for value in parameters.values()]).sum()


def double(parameters: Parameters) -> Parameters:
    return {key: value.double() for key, value in parameters.items()}


# -- training from scratch -----------------------------------------------------------------


def minimize(
    loss: Loss,
    start: Parameters,
    tolerance: float = 1e-7,
    iterations: int = 1000,
    history: int = 100,
) -> Parameters:
    """The minimiser of a convex loss by L-BFGS, to ``tolerance`` in every entry of its gradient.

    To be called in float64: float32 cannot tell so small a gradient from rounding.
    """
    point = {key: value.detach().clone().requires_grad_() for key, value in start.items()}
    optimizer = torch.optim.LBFGS(
        point.values(),
        max_iter=iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimizer.step(closure)
    return {key: value.detach() for key, value in point.items()}


def descend(loss: Loss, start: Parameters, steps: int) -> Parameters:
    """Gradient descent under the line search of BiSLS: the inner steps of a bilevel run."""
    rule, last, point = bilevel.bisls().inner_rule, None, start
    for k in range(steps):
        value, slopes = value_and_gradient(loss, point)

        def along(t: float, point: Parameters = point, slopes: Parameters = slopes) -> Parameters:
            return {key: point[key] - t * slopes[key] for key in point}

        def phi(t: float, along: Callable[[float], Parameters] = along) -> Tensor:
            with torch.no_grad():
                return loss(along(t))

        move = rule(Line(value, -square(slopes), phi), k, last)
        point, last = along(float(move.size)), move.last
    return point


def value_and_gradient(loss: Loss, point: Parameters) -> tuple[Tensor, Parameters]:
    point = {key: value.detach().requires_grad_() for key, value in point.items()}
    value = loss(point)
    gradients = torch.autograd.grad(value, list(point.values()))
    return value.detach(), dict(zip(point, gradients, strict=True))


def adam(
    loss: Callable[..., Tensor], start: Parameters, data: Epochs, steps: int, lr: float
) -> Parameters:
    """Adam on loss(parameters, *batch), its step falling from ``lr`` to zero linearly."""
    point = {key: value.detach().clone().requires_grad_() for key, value in start.items()}
    optimizer = torch.optim.Adam(point.values(), lr=lr)
    for k, batch in enumerate(islice(endless(data), steps)):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        optimizer.zero_grad()
        loss(point, *batch).backward()
        optimizer.step()
    return {key: value.detach() for key, value in point.items()}


# -- measures ------------------------------------------------------------------------------


@torch.no_grad()
def featured(x: nn.Module, images: Tensor) -> Tensor:
    """The features of images, in double precision."""
    return torch.cat([x(part).double() for part in images.split(CHUNK)])


@torch.no_grad()
def measure(
    net: Callable[[Parameters, Tensor], Tensor],
    parameters: Parameters,
    part: tuple[Tensor, Tensor],
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on a part of a data set."""
    total = torch.zeros(2, dtype=torch.float64, device=part[0].device)
    dtype = next(iter(parameters.values())).dtype
    for images, labels in zip(part[0].split(CHUNK), part[1].split(CHUNK), strict=True):
        logits = net(parameters, images.to(dtype))
        right = (logits.argmax(1) == labels).sum()
        total += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right]).double()
    loss, accuracy = (total / len(part[1])).tolist()
    return loss, accuracy
