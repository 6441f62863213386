"""Problems whose inner loss has kinks, absolute values and hinges: as it is, where the method has
to see to them, and rounded off by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Case, Shuffled, solved

EPS = 0.03  # over which a kink is rounded off
SHARP = 1e-3  # over which it is where the objective is computed
# g of x, y, the eps of its kinks, and the rows of its data
Inner = Callable[[Tensor, Tensor, float, Tensor], Tensor]


def length(z: Tensor, eps: float) -> Tensor:
    """|z|, rounded off."""
    return (z.square() + eps**2).sqrt() if eps else z.abs()


def short(z: Tensor, eps: float) -> Tensor:
    """max(z, 0), rounded off."""
    return F.softplus(z / eps) * eps if eps else z.relu()


def posed(
    inner: Inner,
    outer: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    rows: int,
    size: int | None,
) -> Case:
    """Of all rows of the inner data at once, or in batches of ``size``."""
    every = torch.arange(rows)

    def objective(x: Tensor) -> float:
        """f where g is solved whose kinks are all but sharp."""
        x, best = x.double(), y.double()
        for sharper in (0.1, 0.01, SHARP):
            best = solved(lambda y, sharper=sharper: inner(x, y, sharper, every), best)
        return float(outer(x, best))

    if size is None:
        return Case(outer, lambda x, y: inner(x, y, eps, every), x, y, objective)
    data = {"inner_data": Shuffled(every, size=size)}
    return Case(outer, lambda x, y, batch: inner(x, y, eps, *batch), x, y, objective, data)


def lasso(seed: int, eps: float = 0.0, penalties: int = 1, size: int | None = None) -> Case:
    """The penalty of a lasso, or one for each of thirty features, of which five count."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    w = torch.cat([2 * draw(5), torch.zeros(25)])
    A, B = draw(60, 30), draw(200, 30)
    a, b = A @ w + draw(60), B @ w + draw(200)

    def inner(x: Tensor, y: Tensor, eps: float, i: Tensor) -> Tensor:
        r = A[i].to(y) @ y - a[i].to(y)
        return r.square().mean() / 2 + (x.exp() * length(y, eps)).sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (B.to(y) @ y - b.to(y)).square().mean()

    start = torch.full((penalties,), -3.0)
    return posed(inner, outer, start, torch.zeros(30), eps, 60, size)


def groups(seed: int, eps: float = 0.0, size: int | None = None) -> Case:
    """A penalty for each of ten groups of four features, of which three count."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    w = torch.zeros(10, 4)
    w[:3] = 2 * draw(3, 4)
    A, B = draw(60, 40), draw(200, 40)
    a, b = A @ w.flatten() + draw(60), B @ w.flatten() + draw(200)

    def inner(x: Tensor, y: Tensor, eps: float, i: Tensor) -> Tensor:
        r, each = A[i].to(y) @ y - a[i].to(y), y.view(10, 4)
        lengths = (each.square().sum(1) + eps**2).sqrt() if eps else each.norm(dim=1)
        return r.square().mean() / 2 + (x.exp() * lengths).sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (B.to(y) @ y - b.to(y)).square().mean()

    return posed(inner, outer, torch.full((10,), -3.0), torch.zeros(40), eps, 60, size)


def hinges(seed: int, eps: float = 0.0, size: int | None = None) -> Case:
    """A weight for each of eighty examples of a support vector machine, 24 of a wrong label."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    A, B, w = draw(80, 6), draw(300, 6), draw(6)
    a, b = torch.sign(A @ w), torch.sign(B @ w)
    a[:24] *= -1

    def inner(x: Tensor, y: Tensor, eps: float, i: Tensor) -> Tensor:
        lost = short(1 - a[i] * (A[i].to(y) @ y), eps)
        return (x[i].sigmoid() * lost).mean() + 0.01 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-b * (B.to(y) @ y)).mean()

    return posed(inner, outer, torch.zeros(80), torch.zeros(6), eps, 80, size)


def deviations(seed: int, eps: float = 0.0, size: int | None = None) -> Case:
    """A weight for each of sixty absolute errors of a regression, of which twelve are gross."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    A, B, w = draw(60, 8), draw(200, 8), draw(8)
    a, b = A @ w + draw(60), B @ w
    a[:12] += 10

    def inner(x: Tensor, y: Tensor, eps: float, i: Tensor) -> Tensor:
        off = length(A[i].to(y) @ y - a[i].to(y), eps)
        return (x[i].sigmoid() * off).mean() + 1e-3 * y.square().sum()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (B.to(y) @ y - b.to(y)).square().mean()

    return posed(inner, outer, torch.zeros(60), torch.zeros(8), eps, 60, size)


KINDS = {
    "lasso": lasso,
    "lasso, each feature": partial(lasso, penalties=30),
    "lasso, groups": groups,
    "hinges": hinges,
    "absolute deviations": deviations,
}
SHARP_AND_ROUNDED: dict[str, Callable[[int], Case]] = {
    f"{name}{words}": partial(problem, **options)
    for name, problem in KINDS.items()
    for words, options in (
        ("", {}),
        (", rounded", {"eps": EPS}),
        (", batches", {"size": 20}),
        (", rounded, batches", {"eps": EPS, "size": 20}),
    )
}
