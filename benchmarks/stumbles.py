"""Small problems that the default stumbled on when it met them, in float64 but for the words and
the noise inside a loss. Most led to a change of it since; on some it is still behind,
docs/evidence.md says why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Case, Shuffled, distillation, solved


def _normal(seed: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return g, partial(torch.randn, generator=g, dtype=torch.float64)


def evidence(seed: int) -> Case:
    """Length scales, amplitude and noise of a Gaussian process by its marginal likelihood, where y
    are the weights of the data."""
    _, draw = _normal(seed)
    points = draw(60, 5)
    targets = torch.sin(2 * points[:, 0]) + 0.5 * points[:, 1] + 0.3 * draw(60)

    def kernel(x: dict[str, Tensor]) -> Tensor:
        scaled = points / x["scales"].exp()
        distances = (scaled[:, None] - scaled[None]).square().sum(2)
        noise = x["noise"].exp() * torch.eye(60, dtype=torch.float64)
        return x["amplitude"].exp() * (-distances / 2).exp() + noise

    def inner(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (y @ kernel(x) @ y / 2 - y @ targets) / 60

    def outer(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (targets @ y + torch.linalg.slogdet(kernel(x))[1]) / 120

    def objective(x: dict[str, Tensor]) -> float:
        return float(outer(x, torch.linalg.solve(kernel(x), targets)))

    zero = torch.zeros((), dtype=torch.float64)
    x = {"scales": torch.zeros(5, dtype=torch.float64), "amplitude": zero, "noise": zero.clone()}
    return Case(outer, inner, x, torch.zeros(60, dtype=torch.float64), objective)


def prices(seed: int) -> Case:
    """Prices for a follower whose program has logarithmic barriers: y > 0, sum y < 3."""
    g, _ = _normal(seed)
    wants = -1 - torch.rand(12, generator=g, dtype=torch.float64)
    tires = 0.5 + torch.rand(12, generator=g, dtype=torch.float64)
    start = torch.full((12,), 0.1, dtype=torch.float64)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        cost = (wants + x) @ y + (tires * y.square()).sum() / 2
        return cost - 0.03 * y.log().sum() - 0.03 * (3 - y.sum()).log()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return -(x @ y) + 1e-3 * x.square().sum()

    def objective(x: Tensor) -> float:
        y, value = start, inner(x, start)
        for _ in range(200):  # Newton's method inside of the barriers
            left = 3 - y.sum()
            gradient = wants + x + tires * y - 0.03 / y + 0.03 / left
            s = -torch.linalg.solve(torch.diag(tires + 0.03 / y**2) + 0.03 / left**2, gradient)
            t = 1.0
            while t > 1e-12 and not inner(x, y + t * s) <= value + 1e-4 * t * (gradient @ s):
                t /= 2
            y = y + t * s
            value = inner(x, y)
            if gradient.norm() < 1e-10:
                break
        return float(outer(x, y))

    return Case(outer, inner, torch.full((12,), 0.1, dtype=torch.float64), start, objective)


def risk(seed: int) -> Case:
    """How much a portfolio is to fear its variance, for most return per deviation later."""
    _, draw = _normal(seed)
    mixing, mean = draw(20, 20) / 20**0.5, 0.05 * draw(20) + 0.03
    past, future = (0.2 * (draw(n, 20) @ mixing.T) + mean for n in (60, 200))
    covariance, returns = torch.cov(past.T), past.mean(0)
    zeros = torch.zeros(20, dtype=torch.float64)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        w = y.softmax(0)
        return x.exp() / 2 * (w @ covariance @ w) - returns @ w + 1e-4 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        earned = future @ y.softmax(0)
        return -earned.mean() / earned.std()

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), zeros)))

    return Case(outer, inner, torch.tensor(3.0, dtype=torch.float64), zeros, objective)


def afresh(seed: int) -> Case:
    """A penalty per feature of a logistic regression that starts afresh in every iteration, and
    that ten steps do not solve."""
    _, draw = _normal(seed)
    w = draw(30) * (torch.arange(30) % 4 == 0)
    A, B = draw(80, 30), draw(200, 30)
    a, b = (A @ w + draw(80) > 0).double(), (B @ w + draw(200) > 0).double()
    zeros = torch.zeros(30, dtype=torch.float64)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        fit = F.binary_cross_entropy_with_logits(A @ y, a)
        return fit + (x.exp() * y.square()).sum() / 2

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(B @ y, b)

    def objective(x: Tensor) -> float:
        return float(outer(x, solved(lambda y: inner(x, y), zeros)))

    x = torch.full((30,), -3.0, dtype=torch.float64)
    return Case(outer, inner, x, zeros, objective, {"warm_start": False})


def frequencies(seed: int) -> Case:
    """Twenty frequencies of a signal that is linear in its amplitudes; F has many valleys."""
    g, draw = _normal(seed)
    seen = torch.rand(60, 1, generator=g, dtype=torch.float64)
    held = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]

    def signal(t: Tensor) -> Tensor:
        return torch.sin(9 * t) + 0.5 * torch.sin(23 * t + 1)

    a, b = (signal(seen) + 0.1 * draw(60, 1))[:, 0], signal(held)[:, 0]

    def waves(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.cos(t * x), torch.sin(t * x)], 1)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (waves(x, seen) @ y - a).square().mean() / 2 + 5e-4 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (waves(x, held) @ y - b).square().mean()

    def objective(x: Tensor) -> float:
        A = waves(x, seen)
        H = A.T @ A / 60 + 1e-3 * torch.eye(40, dtype=torch.float64)
        return float(outer(x, torch.linalg.solve(H, A.T @ a / 60)))

    return Case(outer, inner, 10 * draw(20), torch.zeros(40, dtype=torch.float64), objective)


def augmentation(seed: int) -> Case:
    """How much noise to put on each feature of a regression; the loss draws it itself."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    w = draw(12) * (torch.arange(12) < 4)
    A, B = draw(50, 12), draw(200, 12)
    a, b = A @ w + draw(50), B @ w + draw(200)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        noisy = A + x.exp() * torch.randn(50, 12)
        return (noisy @ y - a).square().mean() / 2 + 0.005 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (B @ y - b).square().mean()

    def objective(x: Tensor) -> float:
        H = A.T @ A / 50 + torch.diag((2 * x).exp() + 0.01)
        return float(outer(x, torch.linalg.solve(H, A.T @ a / 50)))

    return Case(outer, inner, torch.full((12,), -1.0), torch.zeros(12), objective)


def input_noise(seed: int) -> Case:
    """How much noise to put on each input of a classifier in three classes, which the inner loss
    draws itself, on batches of 30 of 60 rows. y is solved for 200 draws of it, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    w = draw(20, 3) * (torch.arange(20) < 6)[:, None]
    A, B, noise = draw(60, 20), draw(300, 20), draw(200, 60, 20)
    a, b = ((rows @ w + 0.5 * draw(len(rows), 3)).argmax(1) for rows in (A, B))

    def inner(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy = batch[0] + x.exp() * torch.randn_like(batch[0])
        return F.cross_entropy(noisy @ y, batch[1]) + 0.005 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(B.to(y) @ y, b)

    def objective(x: Tensor) -> float:
        noisy, classes = (A + x.double().exp() * noise).flatten(0, 1), a.repeat(200)

        def mean(y: Tensor) -> Tensor:
            return F.cross_entropy(noisy @ y, classes) + 0.005 * y.square().sum()

        y = solved(mean, torch.zeros(20, 3, dtype=torch.float64))
        return float(outer(x, y))

    data = {"inner_data": Shuffled(A.float(), a, size=30)}
    return Case(outer, inner, torch.full((20,), -2.0), torch.zeros(20, 3), objective, data)


def wide(seed: int, size: int | None = None) -> Case:
    """A penalty per feature of a regression on 200 features, of 40 rows alone; batches of so many
    at both levels, or none."""
    _, draw = _normal(seed)
    scale = 1 / torch.arange(1, 201, dtype=torch.float64)
    A, B, w = draw(40, 200) * scale, draw(60, 200) * scale, 0.1 * draw(200) / scale
    a, b = A @ w + 0.3 * draw(40), B @ w

    def error(y: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        return (rows[0] @ y - rows[1]).square().mean() / 2

    def inner(x: Tensor, y: Tensor, rows: tuple[Tensor, Tensor] = (A, a)) -> Tensor:
        return error(y, rows) + (x.exp() * y.square()).sum() / 2

    def outer(x: Tensor, y: Tensor, rows: tuple[Tensor, Tensor] = (B, b)) -> Tensor:
        return error(y, rows)

    def objective(x: Tensor) -> float:
        loose = x.neg().exp()  # y = loose A^T u, which no penalty is too small for
        u = torch.linalg.solve((A * loose) @ A.T + 40 * torch.eye(40, dtype=torch.float64), a)
        return float(outer(x, loose * (A.T @ u)))

    x = torch.full((200,), -5.0, dtype=torch.float64)
    data = {}
    if size is not None:
        data = {
            "outer_data": Shuffled(B, b, size=size),
            "inner_data": Shuffled(A, a, size=size),
        }
    return Case(outer, inner, x, torch.zeros(200, dtype=torch.float64), objective, data)


def words(seed: int) -> Case:
    """A penalty per word of a classifier of 150 short texts in four classes; most words are
    rare."""
    g = torch.Generator().manual_seed(seed)
    often = 1 / torch.arange(1, 401)
    topics = F.normalize(often * (0.4 * torch.randn(4, 400, generator=g)).exp(), p=1, dim=1)
    classes = torch.arange(300) % 4
    counts = torch.poisson(60 * topics[classes], generator=g).log1p()
    (A, B), (a, b) = (3 * F.normalize(counts, dim=1)).split(150), classes.split(150)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(A @ y, a) + (x.exp()[:, None] * y.square()).sum() / 2

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(B @ y, b)

    def objective(x: Tensor) -> float:
        loose = (x.double() / -2).exp()  # y = loose z: in z no penalty is too small to be seen
        seen, held = A.double() * loose, B.double() * loose

        def scaled(z: Tensor) -> Tensor:
            return F.cross_entropy(seen @ z, a) + z.square().sum() / 2

        z = torch.zeros(400, 4, dtype=torch.float64)
        for _ in range(3):
            z = solved(scaled, z)
        return float(F.cross_entropy(held @ z, b))

    return Case(outer, inner, torch.full((400,), -5.0), torch.zeros(400, 4), objective)


def posterior(seed: int) -> Case:
    """Means and deviations of ten weights by the evidence lower bound, for which f draws a sample;
    four more weights are y."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    w, A = draw(10), draw(80, 10)
    U, v = draw(80, 4), draw(4)
    a = A @ w + U @ v + 0.3 * draw(80)

    def inner(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (U @ y + A @ x["mean"] - a).square().mean() / 2 + 0.01 * y.square().sum()

    def outer(x: dict[str, Tensor], y: Tensor) -> Tensor:
        z = x["mean"] + x["log"].exp() * torch.randn(10)
        return ((A @ z + U @ y - a).square().sum() + z.square().sum()) / 2 - x["log"].sum()

    def objective(x: dict[str, Tensor]) -> float:
        left = a - A @ x["mean"]
        y = torch.linalg.solve(U.T @ U / 80 + 0.02 * torch.eye(4), U.T @ left / 80)
        spread = (2 * x["log"]).exp() @ (A.square().sum(0) + 1)
        fit = (left - U @ y).square().sum() + x["mean"].square().sum()
        return float((fit + spread) / 2 - x["log"].sum())

    x = {"mean": torch.zeros(10), "log": torch.zeros(10)}
    return Case(outer, inner, x, torch.zeros(4), objective)


def own_batches(seed: int) -> Case:
    """Ten learned images of digits; f draws its sixteen rows itself."""
    case = distillation(seed)
    (images, labels), size = case.data["outer_data"].tensors, 16

    def outer(x: Tensor, y: Tensor) -> Tensor:
        rows = torch.randint(len(images), (size,))
        value: Tensor = case.outer(x, y, (images[rows], labels[rows]))
        return value

    return Case(outer, case.inner, case.x, case.y, case.objective)


def saddle(seed: int) -> Case:
    """A product of factors that begin almost at zero, where gradients are, too."""
    _, draw = _normal(seed)
    target = draw(10, 3) @ draw(3, 10) / 2
    x = {"left": 1e-4 * draw(10, 3), "right": 1e-4 * draw(10, 3)}

    def inner(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (y - x["left"] @ x["right"].T).square().sum() / 2

    def outer(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (y - target).square().mean() + 1e-3 * sum(p.square().sum() for p in x.values())

    def objective(x: dict[str, Tensor]) -> float:
        return float(outer(x, x["left"] @ x["right"].T))

    return Case(outer, inner, x, torch.zeros_like(target), objective)


def flat_penalty(seed: int) -> Case:
    """The one log penalty of a ridge, from e^-14, where nothing depends on it."""
    _, draw = _normal(seed)
    w, A, B = draw(30) / 3, draw(40, 30), draw(300, 30)
    a, b = A @ w + draw(40), B @ w + draw(300)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (A @ y - a).square().mean() / 2 + x.exp() * y.square().sum() / 2

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (B @ y - b).square().mean()

    def objective(x: Tensor) -> float:
        H = A.T @ A / 40 + x.exp() * torch.eye(30, dtype=torch.float64)
        return float(outer(x, torch.linalg.solve(H, A.T @ a / 40)))

    start = torch.tensor(-14.0, dtype=torch.float64)
    return Case(outer, inner, start, torch.zeros(30, dtype=torch.float64), objective)


def layers(seed: int) -> Case:
    """Features of two layers for a ridge regression, all data at once."""
    _, draw = _normal(seed)

    def truth(Z: Tensor) -> Tensor:
        return torch.sin(2 * Z[:, 0]) + Z[:, 1] * Z[:, 2] - Z[:, 3].abs()

    A, B = draw(100, 6), draw(200, 6)
    a, b = truth(A) + 0.1 * draw(100), truth(B)
    x = {"first": draw(6, 16) / 6**0.5, "second": draw(16, 10) / 4}

    def features(x: dict[str, Tensor], Z: Tensor) -> Tensor:
        return ((Z @ x["first"]).tanh() @ x["second"]).tanh()

    def inner(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (features(x, A) @ y - a).square().mean() / 2 + 0.0025 * y.square().sum()

    def outer(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (features(x, B) @ y - b).square().mean()

    def objective(x: dict[str, Tensor]) -> float:
        U = features(x, A)
        H = U.T @ U / 100 + 0.005 * torch.eye(10, dtype=torch.float64)
        return float(outer(x, torch.linalg.solve(H, U.T @ a / 100)))

    return Case(outer, inner, x, torch.zeros(10, dtype=torch.float64), objective)


STUMBLES: dict[str, Callable[[int], Case]] = {
    "evidence of a Gaussian process": evidence,
    "prices": prices,
    "risk of a portfolio": risk,
    "penalties, y afresh": afresh,
    "frequencies": frequencies,
    "augmentation": augmentation,
    "noise on inputs": input_noise,
    "more features than rows": wide,
    "more features than rows, batches": partial(wide, size=20),
    "penalties of words": words,
    "posterior": posterior,
    "own batches": own_batches,
    "saddle": saddle,
    "flat penalty": flat_penalty,
    "features of two layers": layers,
}
