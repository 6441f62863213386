"""One hypergradient by itself, and a check of every kind against finite differences."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import require
from bilevel.attention import twice_differentiable
from bilevel.distributed import Ranks
from bilevel.hypergradients import (
    HYPERGRADIENTS,
    Estimate,
    FiniteDifference,
    Hypergradient,
    Implicit,
    InnerStep,
    Unrolled,
)
from bilevel.layout import Layout, Variable, tree_map
from bilevel.linear import ConjugateGradient, Identity, Neumann, Nystrom, StochasticNeumann
from bilevel.problem import Cost, Draw, Oracle, Problem, make_oracle
from bilevel.steps import armijo, rounding_of
from bilevel.validate import validated


@dataclass(frozen=True)
class HypergradientValue:
    """A hypergradient at one point.

    Attributes:
        grad: dF/dx, a tree like x (for a Module, a dict of its parameters by name).
        value: f(x, y), 0-dim; after the inner steps where the method takes some of its own.
        residual: ||g_yy q - f_y|| / ||f_y||, the true relative residual of the linear system,
            0-dim; None for methods that solve none.
        gradients, hessian_products: what it cost.
    """

    grad: Any
    value: Tensor
    residual: Tensor | None
    gradients: int
    hessian_products: int


def hypergradient(
    outer: Callable[..., Tensor],
    inner: Callable[..., Tensor],
    x: Variable,
    y: Variable,
    outer_batch: Any = None,
    inner_batch: Any = None,
    method: Hypergradient = Implicit(Neumann(terms=20)),
    *,
    inner_batches: Sequence[Any] | None = None,
) -> HypergradientValue:
    """dF/dx of F(x) = f(x, y*(x)) as seen from the point (x, y).

    Args:
        outer, inner, x, y: as for :func:`bilevel.solve`; nothing is modified.
        outer_batch, inner_batch: batches for the two losses; None: the loss takes none.
        method: :class:`Implicit`, :class:`Unrolled` or :class:`FiniteDifference`.
        inner_batches: independent batches, for ``Implicit(average=...)`` and for the factors of
            :class:`StochasticNeumann`; no more than the method uses.

    On several ranks (see :func:`bilevel.solve`) all must call it, each with its own shards.

    Returns:
        A :class:`HypergradientValue`.

    Raises:
        TypeError, ValueError: a loss that cannot be called or is no finite scalar, a loss that
            does not depend on what it must, variables that cannot be optimised.

    Warns:
        RuntimeWarning: a series left a residual above one; it diverges.

    Example:
        >>> import torch, bilevel
        >>> x, y = torch.tensor(2.0), torch.tensor(6.0)  # y* = 3 x
        >>> h = bilevel.hypergradient(
        ...     lambda x, y: y**2 / 2, lambda x, y: (y - 3 * x) ** 2, x, y,
        ...     method=bilevel.Implicit(bilevel.ConjugateGradient()),
        ... )
        >>> float(h.grad)  # F = 9 x^2 / 2
        18.0

    Reference: Lorraine et al. 2020 for the implicit form; Ji et al. 2021 for its analysis.
    """
    require.made_by("", "method", method, "estimate", "a hypergradient", HYPERGRADIENTS)
    batches: Sequence[Any] = [inner_batch]
    if inner_batches is not None:
        batches = inner_batches
        require.several("", "inner_batches", batches)
        if inner_batch is not None:
            raise ValueError(
                "inner_batch was given together with inner_batches, which replaces it; give one."
            )
        wanted = method.batches
        if wanted != "auto" and len(inner_batches) > wanted:
            raise ValueError(
                f"inner_batches has {len(inner_batches)} batches, of which {method!r} uses "
                f"{wanted}: for the mean of all give bilevel.Implicit(..., average='auto'), or "
                f"leave the others out."
            )
    layouts = Layout(x, "x"), Layout(y, "y")
    oracle = make_oracle(Problem(outer, inner), *layouts)
    X, Y = Ranks(layouts[1].device).start(layouts, (layouts[0].flatten(x), layouts[1].flatten(y)))
    oracle.require_data(outer_batch, batches[0], "{}_batch", "{}_batch=batch")
    with twice_differentiable():
        validated(oracle, X, Y, outer_batch, batches[0], "{}_batch")
        oracle.cost = Cost()
        found = _estimate(oracle, X, Y, outer_batch, batches, method)
    solver = getattr(method, "solver", None)
    series = isinstance(solver, Neumann | StochasticNeumann)
    draws = isinstance(solver, StochasticNeumann) and solver.form == "random"  # one tells nothing
    if series and not draws and found.residual is not None:
        if bool(found.residual > 1):
            warnings.warn(
                f"{solver} diverges here: its relative residual is {float(found.residual):.3g}; "
                f"use step='auto', or ConjugateGradient if the Hessian may be indefinite.",
                RuntimeWarning,
                stacklevel=2,
            )
    grad = tree_map(torch.clone, layouts[0].unflatten(found.grad))
    cost = oracle.cost
    return HypergradientValue(
        grad, found.value, found.residual, cost.gradients, cost.hessian_products
    )


def _estimate(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    outer_batch: Any,
    inner_batches: Sequence[Any],
    method: Hypergradient,
) -> Estimate:
    draws = [Draw(batch) for batch in inner_batches]
    path: list[InnerStep] = []
    if isinstance(method, Unrolled):
        y, path = method.descend(oracle, x, y, draws[0])
    return method.estimate(oracle, x, y, Draw(outer_batch), draws, path, None)


@dataclass(frozen=True)
class CheckRow:
    """One method in a check: relative error against the numeric derivative, residual, cost."""

    method: Hypergradient
    error: float
    residual: float | None
    gradients: int
    hessian_products: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """What :func:`check` found; print it to see the table.

    Attributes:
        rows: one per method.
        inner_gradient: ||g_y|| at the solution of the inner problem that the check computed.
        numeric: derivatives of the solved problem along the directions tried.
    """

    rows: list[CheckRow]
    inner_gradient: float
    numeric: Tensor

    def __str__(self) -> str:
        lines = [
            f"{'method':<58} {'error':>8} {'residual':>8} {'grads':>6} {'products':>8} {'ms':>8}"
        ]
        for row in self.rows:
            residual = "-" if row.residual is None else f"{row.residual:.1e}"
            lines.append(
                f"{row.method!r:<58} {row.error:8.1e} {residual:>8} {row.gradients:6d} "
                f"{row.hessian_products:8d} {1e3 * row.seconds:8.2f}"
            )
        lines.append(
            f"error: against central differences of f(x, y*(x)) along {len(self.numeric)} "
            f"directions; ||g_y|| = {self.inner_gradient:.1e} at y*"
        )
        return "\n".join(lines)


STANDARD: tuple[Hypergradient, ...] = (
    Implicit(ConjugateGradient()),
    Implicit(Neumann(terms=20)),
    Implicit(Nystrom(rank=10)),
    Implicit(Identity()),
    Implicit(StochasticNeumann(terms=20)),
    FiniteDifference(ConjugateGradient()),
    Unrolled(window=20),
)


def check(
    outer: Callable[..., Tensor],
    inner: Callable[..., Tensor],
    x: Variable,
    y: Variable,
    outer_batch: Any = None,
    inner_batch: Any = None,
    methods: Sequence[Hypergradient] = STANDARD,
    directions: int = 3,
    seed: int = 0,
) -> Check:
    """Every hypergradient beside a numeric derivative of the solved problem.

    Solves the inner problem from y by Newton's method, differentiates f(x, y*(x)) by central
    differences along random directions (all coordinates, where x has no more than these), and
    compares. Use float64: in float32 the differences themselves are good to about 1e-3.

    Args:
        outer, inner, x, y, outer_batch, inner_batch: as for :func:`hypergradient`.
        methods: what to compare.
        directions: number of random directions, >= 1.
        seed: of the directions; the global generators are left alone.

    Returns:
        A :class:`Check`, which prints as a table.
    """
    require.whole("", "directions", directions)
    require.whole("", "seed", seed, least=None)
    if not isinstance(methods, list | tuple) or not methods:
        raise TypeError(
            f"methods={require.shown(methods)} is {require.kind(methods)} of no method. Give a "
            f"list such as [bilevel.Implicit(bilevel.Neumann())]."
        )
    for i, method in enumerate(methods):
        name = f"methods[{i}]"
        require.made_by("", name, method, "estimate", "a hypergradient", HYPERGRADIENTS)
    layouts = Layout(x, "x"), Layout(y, "y")
    oracle = make_oracle(Problem(outer, inner), *layouts)
    X, Y = layouts[0].flatten(x), layouts[1].flatten(y)
    generator = torch.Generator().manual_seed(seed)
    oracle.require_data(outer_batch, inner_batch, "{}_batch", "{}_batch=batch")
    devices = [X.device] if X.device.type == "cuda" else []
    with twice_differentiable(), torch.random.fork_rng(devices=devices):
        validated(oracle, X, Y, outer_batch, inner_batch, "{}_batch")
        cpu: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        D = torch.randn(directions, X.numel(), generator=generator, **cpu)
        if X.numel() <= directions:
            D = torch.eye(X.numel(), **cpu)
        D = (D / torch.linalg.vector_norm(D, dim=1, keepdim=True)).to(X)
        outer_draw, inner_draw = Draw(outer_batch), Draw(inner_batch)

        def F(point: Tensor, start: Tensor) -> Tensor:
            return oracle.value(
                "outer", point, minimise(oracle, point, start, inner_draw), outer_draw
            )

        Y = minimise(oracle, X, Y, inner_draw)
        eps = torch.finfo(X.dtype).eps ** (1 / 3) * (1 + float(torch.linalg.vector_norm(X)))
        numeric = torch.stack([(F(X + eps * d, Y) - F(X - eps * d, Y)) / (2 * eps) for d in D])
        rows = []
        for method in methods:
            oracle.cost, begin = Cost(), time.perf_counter()
            found = _estimate(oracle, X, Y, outer_batch, [inner_batch], method)
            seconds = time.perf_counter() - begin
            error = torch.linalg.vector_norm(D @ found.grad - numeric)
            rows.append(
                CheckRow(
                    method,
                    float(error / torch.linalg.vector_norm(numeric)),
                    None if found.residual is None else float(found.residual),
                    oracle.cost.gradients,
                    oracle.cost.hessian_products,
                    seconds,
                )
            )
        left = float(torch.linalg.vector_norm(oracle.inner_gradient(X, Y, inner_draw)[1]))
    return Check(rows, left, numeric)


def minimise(oracle: Oracle, x: Tensor, y: Tensor, draw: Draw, iterations: int = 50) -> Tensor:
    """y*(x) by Newton's method with conjugate gradients and an Armijo search, to rounding."""
    solver = ConjugateGradient(steps=max(200, min(y.numel(), 2000)), rtol=1e-12)
    eps = torch.finfo(y.dtype).eps
    for _ in range(iterations):
        pull = oracle.record(x, y, draw)
        d = -solver(pull.product, pull.gradient, None)
        slope = float(torch.dot(pull.gradient, d))
        if not slope < 0:
            d, slope = -pull.gradient, -float(torch.dot(pull.gradient, pull.gradient))
        value = float(pull.value)
        if -slope <= eps * eps * (1 + abs(value)):
            break

        def phi(t: float, y: Tensor = y, d: Tensor = d) -> float:
            return float(oracle.value("inner", x, y + t * d, draw))

        found = armijo(phi, value, slope, 1.0, c=1e-4, slack=rounding_of(value, y.dtype))
        if not found.accepted:
            break
        y = y + found.step * d
    return y
