"""Published bilevel methods in a few lines each, on the oracle that counts for bilevel.solve too.

Each is a generator over flat vectors that yields (x, y) after every outer iteration; letters as in
bilevel.problem, q for the solution of the linear system g_yy q = f_y. Batches are drawn as
they come in turn: the outer one first, then those of the inner steps, then those of the
Hessian products.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bilevel
from benchmarks.problems import Case
from bilevel.data import Cycle
from bilevel.layout import Layout
from bilevel.linear import curvature
from bilevel.problem import Cost, Draw, Oracle, Problem, make_oracle

Iterates = Generator[tuple[Tensor, Tensor], None, str]
Watch = Callable[[int, Any, Cost, float], None]


@dataclass(frozen=True)
class Settings:
    """What a benchmark sets: the inner steps T per outer iteration, alpha, beta."""

    inner_steps: int = 10
    outer_step: float = 0.1
    inner_step: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """The last finite x and y (structures of the case's), what they cost, and why the run ended."""

    x: Any
    y: Any
    cost: Cost
    seconds: float
    reason: str


@dataclass(frozen=True)
class Rival:
    """A method, how to run it, and which of "outer", "inner" are step sizes to be tuned."""

    name: str
    run: Callable[..., Outcome]
    steps: tuple[str, ...]


class Batches:
    """The draws of both levels, in the order of bilevel.solve for the same seed.

    Raises:
        ValueError: the case gives pairs of batches, which these methods have no use for.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        if set(data) - {"outer_data", "inner_data"}:
            raise ValueError(
                f"the case has {sorted(data)}, but the rivals draw the two levels separately; "
                f"give outer_data and inner_data."
            )
        self._data = data
        self._cycles = {name: Cycle(found, name) for name, found in data.items()}

    def _draw(self, name: str) -> Draw:
        return Draw(self._cycles[name].next()) if name in self._cycles else Draw()

    def outer(self) -> Draw:
        return self._draw("outer_data")

    def inner(self) -> Draw:
        return self._draw("inner_data")

    def whole(self, level: str) -> list[Draw]:
        """One pass through the data of a level, kept: the full batch, in parts."""
        return [Draw(batch) for batch in self._data.get(f"{level}_data", [None])]


# -- single loop ---------------------------------------------------------------------------


def _directions(
    oracle: Oracle, data: Batches, x: Tensor, y: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """g_y, g_yy q - f_y and f_x - g_xy q at one point, on one batch of each level."""
    _, fx, fy = oracle.outer_gradients(x, y, data.outer())
    second = oracle.record(x, y, data.inner())
    gxyq, gyyq = second.both(q)
    return second.gradient, gyyq - fy, fx - gxyq


def soba(
    oracle: Oracle, data: Batches, x: Tensor, y: Tensor, s: Settings, decay: float = 0.5
) -> Iterates:
    """SOBA: y, q and x move at once, y and q by beta, x by alpha, both over (k+1)^decay.

    ``decay`` 0.5 is Theorem 2's schedule and that of the experiments; 0 is Theorem 1's, a step
    that is constant within a run. Source: Dagréou et al. 2022 (arXiv 2201.13409), Algorithm 1
    with equation (4); their v is -q.
    """
    q, k = torch.zeros_like(y), 0
    while True:
        scale = (k + 1) ** -decay
        dy, dq, dx = _directions(oracle, data, x, y, q)
        y, q = y - scale * s.inner_step * dy, q - scale * s.inner_step * dq
        x, k = x - scale * s.outer_step * dx, k + 1
        yield x, y


def ma_soba(
    oracle: Oracle, data: Batches, x: Tensor, y: Tensor, s: Settings, weight: float = 0.1
) -> Iterates:
    """MA-SOBA: SOBA whose x moves along h, an average of its directions; constant steps.

    x moves along the h of before this iteration, which starts at zero; then
    h <- (1 - weight) h + weight d. The paper's weight is a multiple of alpha. Neither its values
    nor the order of the two updates were checked against the paper; another order shifts h by one
    iteration.
    Source: Chen, Xiao, Balasubramanian 2023 (arXiv 2306.12067), Algorithm 1.
    """
    q, h = torch.zeros_like(y), torch.zeros_like(x)
    while True:
        dy, dq, dx = _directions(oracle, data, x, y, q)
        x, h = x - s.outer_step * h, (1 - weight) * h + weight * dx
        y, q = y - s.inner_step * dy, q - s.inner_step * dq
        yield x, y


def s_tfbo(
    oracle: Oracle, data: Batches, x: Tensor, y: Tensor, s: Settings, start: float = 0.01
) -> Iterates:
    """S-TFBO: SOBA with each step the inverse of the accumulated norms of the gradients.

    With a, b, c the roots of start^2 plus the sums of ||dx||^2, ||dy||^2, ||dq||^2, the present
    ones included: y moves by 1/b, q by 1/max(b, c), x by 1/(a max(b, c)). Takes no step size;
    the paper analyses full batches, its code uses minibatches. ``start`` stands for its three
    initial values, whose default there is not public.
    Source: Yang et al. 2025 (ICLR, tuning-free bilevel optimization), Algorithm 2.
    """
    del s
    q = torch.zeros_like(y)
    a = b = c = torch.full((), start * start, dtype=y.dtype, device=y.device)
    while True:
        dy, dq, dx = _directions(oracle, data, x, y, q)
        a, b, c = a + dx.dot(dx), b + dy.dot(dy), c + dq.dot(dq)
        slower = torch.maximum(b, c).sqrt()
        y, q, x = y - dy / b.sqrt(), q - dq / slower, x - dx / (a.sqrt() * slower)
        yield x, y


# -- double loop ---------------------------------------------------------------------------


def _descend(oracle: Oracle, data: list[Draw], x: Tensor, y: Tensor, step: float) -> Tensor:
    for draw in data:
        y = y - step * oracle.inner_gradient(x, y, draw)[1]
    return y


def stocbio(
    oracle: Oracle, data: Batches, x: Tensor, y: Tensor, s: Settings, terms: int = 10
) -> Iterates:
    """stocBiO: T steps on y, a Neumann series with a fresh batch per factor, a step on x.

    The series q = beta sum_{j <= terms} prod_{i <= j} (I - beta H_i) f_y takes the inner step as
    its own, as both must be at most 1/L. The paper's batches of the products grow along the
    series; here they are all of the size of the data's batches, as in its own experiments.
    Source: Ji, Yang, Liang 2021 (arXiv 2010.07962), Algorithms 2 and 3; the sum form as printed
    there (the public code scales it differently).
    """
    series = bilevel.StochasticNeumann(terms + 1, s.inner_step)
    while True:
        outer = data.outer()
        y = _descend(oracle, [data.inner() for _ in range(s.inner_steps)], x, y, s.inner_step)
        _, fx, fy = oracle.outer_gradients(x, y, outer)
        # the last batch is that of the cross term, the series' own number 0
        draws = [data.inner() for _ in range(terms + 1)]
        q = series(lambda u, j, x=x, y=y, d=draws: oracle.record(x, y, d[j - 1]).product(u), fy)
        x = x - s.outer_step * (fx - oracle.record(x, y, draws[-1]).both(q)[0])
        yield x, y


def amigo(
    oracle: Oracle, data: Batches, x: Tensor, y: Tensor, s: Settings, linear_steps: int = 10
) -> Iterates:
    """AmIGO: T steps on y, ``linear_steps`` SGD steps on the linear system, a step on x.

    Both inner problems start from their last solutions; the steps on the linear system are
    beta, as in the benchmark of Dagréou et al. Source: Arbel & Mairal 2022 (arXiv 2111.14580),
    Algorithms 1 to 3; their z is -q.
    """
    q = torch.zeros_like(y)
    while True:
        outer = data.outer()
        y = _descend(oracle, [data.inner() for _ in range(s.inner_steps)], x, y, s.inner_step)
        _, fx, fy = oracle.outer_gradients(x, y, outer)
        for _ in range(linear_steps):
            q = q - s.inner_step * (oracle.record(x, y, data.inner()).product(q) - fy)
        x = x - s.outer_step * (fx - oracle.record(x, y, data.inner()).both(q)[0])
        yield x, y


def f2sa(
    oracle: Oracle,
    data: Batches,
    x: Tensor,
    y: Tensor,
    s: Settings,
    penalty: float = 1.0,
    exponents: tuple[float, float] = (5 / 7, 4 / 7),
) -> Iterates:
    """F2SA: first order only, through f + lambda (g - min g) with a growing lambda.

    z follows argmin g by gamma_k = beta (k+1)^-c, y follows argmin f + lambda_k g by
    gamma_k / (2 lambda_k), x moves by alpha (k+1)^-a, and lambda_k = penalty (k+1)^(a-c), with
    (a, c) = ``exponents``: (5/7, 4/7) is the theory's choice under noise at both levels,
    (1/3, 0) without noise; (0, 0) keeps lambda, and with it a bias of order 1/lambda.
    Source: Kwon et al. 2023 (arXiv 2301.10945), Algorithm 1, with the relation
    lambda_k = gamma_k / (2 alpha_k) of its theory; the exponents were not checked against it.
    """
    a, c = exponents
    z, k = y, 0
    while True:
        weight = penalty * (k + 1) ** (a - c)
        gamma = s.inner_step * (k + 1) ** -c
        for _ in range(s.inner_steps):
            outer, first, second = data.outer(), data.inner(), data.inner()
            _, _, fy = oracle.outer_gradients(x, y, outer)
            gz, gy = (oracle.inner_gradient(x, p, d)[1] for p, d in ((z, first), (y, second)))
            z, y = z - gamma * gz, y - gamma / (2 * weight) * (fy + weight * gy)
        outer, first, second = data.outer(), data.inner(), data.inner()
        _, fx, _ = oracle.outer_gradients(x, y, outer)
        gz, gy = (oracle.inner_gradients(x, p, d)[1] for p, d in ((z, first), (y, second)))
        x, k = x - s.outer_step * (k + 1) ** -a * (fx + weight * (gy - gz)), k + 1
        yield x, z


# -- inexact line search -------------------------------------------------------------------


@dataclass(frozen=True)
class Constants:
    """What MAID's bounds need; None: estimated as the run goes, at a cost that is counted.

    Args:
        modulus: mu, of the strong convexity of g in y.   smoothness: of g in y, >= mu.
        coupling: a bound on ||g_xy||.
        outer: Lipschitz constants in y of f_x and f_y.
        second: Lipschitz constants in y of g_xy and g_yy.
    """

    modulus: float | None = None
    smoothness: float | None = None
    coupling: float | None = None
    outer: tuple[float, float] | None = None
    second: tuple[float, float] | None = None


class Sizes(NamedTuple):
    """The constants of g at one x."""

    modulus: float
    smoothness: float
    coupling: float


def _mean(draws: list[Draw], call: Callable[[Draw], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    found = [call(draw) for draw in draws]
    return tuple(sum(parts[1:], parts[0]) / len(draws) for parts in zip(*found, strict=True))


class Spent(Exception):
    """A method has cost what it may."""


class Whole:
    """The losses on all data, and the bounds of MAID on them."""

    def __init__(
        self,
        oracle: Oracle,
        data: Batches,
        known: Constants,
        limit: int,
        budget: float = math.inf,
    ) -> None:
        self._oracle, self._known, self._limit, self._budget = oracle, known, limit, budget
        self._outer, self._inner = data.whole("outer"), data.whole("inner")
        self._seen = {"fx": 0.0, "fy": 0.0, "gxy": 0.0, "gyy": 0.0}

    def outer(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """f, f_x, f_y."""
        return _mean(self._outer, lambda d: self._oracle.outer_gradients(x, y, d))

    def _slope(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        return self._oracle.inner_gradient(x, y, draw)[1:]

    def _products(self, x: Tensor, y: Tensor) -> tuple[Callable[[Tensor], Tensor], ...]:
        records = [self._oracle.record(x, y, draw) for draw in self._inner]

        def mean(name: str, u: Tensor) -> Any:
            found = [getattr(record, name)(u) for record in records]
            if name != "both":
                return sum(found[1:], found[0]) / len(found)
            return tuple(sum(p[1:], p[0]) / len(found) for p in zip(*found, strict=True))

        return partial(mean, "product"), partial(mean, "both"), partial(mean, "forward")

    def sizes(self, x: Tensor, y: Tensor) -> Sizes:
        """Modulus, smoothness and coupling: known, or estimated at (x, y).

        Lanczos bounds the two largest from above. The modulus is a bound from below only where
        eight products resolve the spectrum; it is kept at or above 1e-4 of the smoothness.
        """
        known = self._known
        top, low, size = known.smoothness, known.modulus, known.coupling
        if top is not None and low is not None and size is not None:
            return Sizes(low, top, size)
        product, both, forward = self._products(x, y)
        start = torch.ones_like(y)
        if top is None:
            top = float(curvature(product, start))
        if low is None:
            low = max(top - float(curvature(lambda u: top * u - product(u), start)), 1e-4 * top)
        if size is None:
            size = float(curvature(lambda u: forward(both(u)[0]), start, 4)) ** 0.5
        return Sizes(low, max(top, low), size)

    def solve(self, x: Tensor, y: Tensor, epsilon: float, sizes: Sizes) -> Tensor | None:
        """y with ||g_y|| <= mu epsilon, hence within epsilon of y*(x), by the accelerated
        gradient method; None where that was not reached."""
        root = (sizes.modulus / sizes.smoothness) ** 0.5
        point = y
        for _ in range(self._limit):
            if self._oracle.cost.gradients >= self._budget:
                raise Spent(f"its {self._budget:g} gradients were spent")
            (gy,) = _mean(self._inner, partial(self._slope, x, point))
            norm = float(gy.norm())
            if norm <= sizes.modulus * epsilon:
                return point
            if not norm < float("inf"):
                return None
            new = point - gy / sizes.smoothness
            y, point = new, new + (1 - root) / (1 + root) * (new - y)
        return None

    def gradient(
        self, x: Tensor, y: Tensor, near: Tensor, delta: float, epsilon: float, sizes: Sizes
    ) -> tuple[Tensor, float]:
        """The hypergradient with a linear solve to residual delta, and a bound on its error.

        Where Lipschitz constants are not known, the largest difference quotient between ``y``
        and ``near`` so far stands for them.
        """
        _, fx, fy = self.outer(x, y)
        product, both, _ = self._products(x, y)
        size = float(fy.norm())
        relative = min(delta / size, 0.99) if size > 0 else 0.0
        q = bilevel.ConjugateGradient(self._limit, relative)(product, fy)
        gxyq, gyyq = both(q)
        residual = max(delta, float((gyyq - fy).norm()))
        distance = float((y - near).norm())
        known, seen = self._known, self._seen

        def note(name: str, change: Tensor, scale: float) -> None:
            seen[name] = max(seen[name], float(change.norm()) / scale)

        if known.outer is None and distance > 0:
            _, fx2, fy2 = self.outer(x, near)
            note("fx", fx2 - fx, distance)
            note("fy", fy2 - fy, distance)
        if known.second is None and distance > 0 and float(q.norm()) > 0:
            gxyq2, gyyq2 = self._products(x, near)[1](q)
            note("gxy", gxyq2 - gxyq, distance * float(q.norm()))
            note("gyy", gyyq2 - gyyq, distance * float(q.norm()))
        lfx, lfy = known.outer or (seen["fx"], seen["fy"])
        lgxy, lgyy = known.second or (seen["gxy"], seen["gyy"])
        mu, b = sizes.modulus, sizes.coupling
        rate = lfx + lfy * b / mu + b * size * lgyy / mu**2 + lgxy * size / mu
        bound = rate * epsilon + b * residual / mu + lgxy * lfy / mu * epsilon**2
        return fx - gxyq, bound

    def doubt(self, fy: Tensor, epsilon: float) -> float:
        """How far f(x, y) may be from f(x, y*(x)) for y within epsilon of y*(x)."""
        curved = (self._known.outer or (0.0, self._seen["fy"]))[1]
        return float(fy.norm()) * epsilon + curved / 2 * epsilon**2


def maid(
    oracle: Oracle,
    data: Batches,
    x: Tensor,
    y: Tensor,
    s: Settings,
    constants: Constants | None = None,
    start: float = 0.1,
    accuracy: float = 0.1,
    eta: float = 1e-4,
    backtracks: int = 10,
    limit: int = 2000,
    budget: float = 1e5,
    note: Callable[..., None] | None = None,
) -> Iterates:
    """MAID: backtracking on bounds of f(x, y*(x)), with accuracies that follow from it.

    Takes no step size (``start`` is the first trial) and no minibatches: every evaluation goes
    through one pass of the data, and each of its batches counts. It accepts alpha where
    upper(x - alpha z) <= lower(x) - eta^2 alpha ||z||^2, with ``upper`` and ``lower`` the bounds
    f +- (||f_y|| eps + L eps^2 / 2) of F, and z a hypergradient whose error is proven to be at
    most (1 - eta) ||z||. Trials shrink by 0.9 and start from 10/9 of the last; the accuracies
    eps and delta halve where the bound or the search fails, and grow by 1.05 after a success.
    A search that failed is repeated, one trial longer, at half the accuracies.

    Differences from the paper: f may depend on x itself, which adds the Lipschitz constant of
    f_x to the bound; the constants are estimated where they are not given (the official code
    does so with random perturbations). The numbers and the factor eta^2 are those of the
    official code, and were not checked against the text of the paper.
    Source: Salehi et al. 2025 (arXiv 2308.10098); the bound: Ehrhardt & Roberts 2024.

    Args:
        limit: inner steps of one solve at most.
        budget: gradients at which the run ends, each on one batch.
        note: called with the quantities of every accepted step, by name.
    """
    del s
    whole = Whole(oracle, data, constants or Constants(), limit, budget)
    epsilon = delta = accuracy
    trial, near = start, y
    while True:
        sizes, tries, accepted = whole.sizes(x, y), backtracks, None
        while accepted is None:
            z, bound = None, float("inf")
            while z is None or not bound <= (1 - eta) * float(z.norm()):
                if z is not None:
                    epsilon, delta = epsilon / 2, delta / 2
                solved = whole.solve(x, y, epsilon, sizes)
                if solved is None or epsilon < torch.finfo(y.dtype).tiny:
                    return f"the inner problem could not be solved to {epsilon:.3g}"
                near, y = (y, solved) if not torch.equal(y, solved) else (near, y)
                z, bound = whole.gradient(x, y, near, delta, epsilon, sizes)
                if not torch.isfinite(z).all():
                    return "the hypergradient is not finite"
            value, _, fy = whole.outer(x, y)
            lower = float(value) - whole.doubt(fy, epsilon)
            alpha = trial
            for _ in range(tries):
                there = x - alpha * z
                solved = whole.solve(there, y, epsilon, sizes)
                if solved is not None:
                    value, _, fy = whole.outer(there, solved)
                    upper = float(value) + whole.doubt(fy, epsilon)
                    if upper <= lower - eta**2 * alpha * float(z.dot(z)):
                        accepted = there, solved
                        break
                alpha = 0.9 * alpha
            else:
                epsilon, delta, tries = epsilon / 2, delta / 2, tries + 1
        if note is not None:
            note(x=x, y=y, z=z, bound=bound, epsilon=epsilon, alpha=alpha, there=accepted)
        x, y, near = *accepted, y
        trial, epsilon, delta = 10 / 9 * alpha, 1.05 * epsilon, 1.05 * delta
        yield x, y


# -- running -------------------------------------------------------------------------------


def _run(
    method: Callable[..., Iterates],
    case: Case,
    steps: int = 100,
    inner_steps: int = 10,
    outer_step: float = 0.1,
    inner_step: float = 0.1,
    seed: int = 0,
    watch: Watch | None = None,
    **options: Any,
) -> Outcome:
    """Run a method from the start of a case.

    Args:
        steps: outer iterations. inner_steps: T, where the method has an inner loop.
        outer_step, inner_step: alpha, beta, where the method takes them.
        seed: of torch's generators, as in bilevel.solve.
        watch: called with (k, x, cost, seconds) after every iteration; its time is not counted.
        options: the method's own.

    Numbers that are not finite end the run with a reason and the last finite x.
    """
    torch.manual_seed(seed)
    layouts = Layout(case.x, "x"), Layout(case.y, "y")
    oracle = make_oracle(Problem(case.outer, case.inner), *layouts)
    x, y = layouts[0].flatten(case.x), layouts[1].flatten(case.y)
    settings = Settings(inner_steps, outer_step, inner_step)
    iterates = method(oracle, Batches(case.data), x, y, settings, **options)
    reason, seconds, last = f"all {steps} steps were taken", 0.0, y
    for k in range(steps):
        began = time.perf_counter()
        try:
            new, y = next(iterates)
        except (StopIteration, Spent) as end:
            reason = f"stopped at iteration {k}: {end.args[0]}"
            break
        finally:
            finite = bool(torch.isfinite(y).all())  # waits for the device
            seconds += time.perf_counter() - began
        if not (finite and torch.isfinite(new).all()):
            reason = f"stopped at iteration {k}: {'x' if finite else 'y'} is not finite"
            break
        x, last = new, y
        if watch is not None:
            watch(k, layouts[0].export(x), replace(oracle.cost), seconds)
    return Outcome(layouts[0].export(x), layouts[1].export(last), oracle.cost, seconds, reason)


def _rival(name: str, method: Callable[..., Iterates], *steps: str) -> Rival:
    return Rival(name, partial(_run, method), steps)


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        _rival("soba", soba, "outer", "inner"),
        _rival("stocbio", stocbio, "outer", "inner"),
        _rival("amigo", amigo, "outer", "inner"),
        _rival("ma-soba", ma_soba, "outer", "inner"),
        _rival("f2sa", f2sa, "outer", "inner"),
        _rival("s-tfbo", s_tfbo),
        _rival("maid", maid),
    )
}
