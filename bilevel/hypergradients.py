"""Estimates of  dF/dx = f_x - g_xy [g_yy]^{-1} f_y,  F(x) = f(x, y*(x)).

Each method estimates the hypergradient and knows the *response* that it differentiates: how y
follows when x moves along a direction. A line search on that very response has the slope that the
hypergradient predicts, so that it cannot fail for want of a descent direction:

* implicit: y(t) = y + t w with  g_yy w = -g_yx d,  the tangent of y*, as far as it can be trusted,
  bent as far as f sees y* bend;
* unrolled: y(t) = the end of the same inner steps, taken at x + t d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bilevel import require
from bilevel.linear import (
    CONCAVE,
    PRODUCTS,
    UNTAUGHT,
    Learned,
    Neumann,
    Solver,
    series_step,
    watched,
)
from bilevel.problem import Draw, Oracle, Products


class Followed(NamedTuple):
    """Where y is once x is x + t d.

    Attributes:
        y: along its tangent, or the steps that lead to it.
        trusted: whether g has gained by it as it should.
        bent: y if it bends with y*, as far as f sees that; y itself where nothing is known of it.
        off: |gain of g by following - its second-order prediction| / prediction, beyond rounding.

    Points have the shape of y; the others are 0-dim, or numbers.
    """

    y: Tensor
    trusted: Tensor | bool
    bent: Tensor
    off: Tensor | float = 0.0


# (t, x + t d) -> y there
Follow = Callable[["float | Tensor", Tensor], Followed]


class Course(NamedTuple):
    """Along a direction d of x: the slope of f(x + t d, y(t)) at t = 0; how far two estimates of
    it are apart, relative to it, NaN where there are not two; and y(t)."""

    slope: Tensor
    apart: Tensor | float
    follow: Follow


# (d, whether it is the first search along it that is followed, by how much g may lose by y's
# following later ones) -> the course of f and y
Respond = Callable[..., Course]


# of a loss, in units of its precision: where a network fits its data, g is 0.01 and logits are 10.
# A short step that is refused for such an error is halved, and so are all that follow
ROUNDING = 512
CLOSE = 0.9  # share by which g may be off along a first step
HYPERGRADIENTS = "a linear solver as bilevel.Implicit(solver), or Unrolled() or FiniteDifference()"


class InnerStep(NamedTuple):
    """One inner step y -> y - size g_y(x, y) on a draw; the graph where it was asked for."""

    y: Tensor
    draw: Draw
    size: float | Tensor
    graph: Products | None


@dataclass
class Estimate:
    """A hypergradient on flat vectors.

    Attributes:
        grad: dF/dx.   direct: its part f_x.   fy: f_y, shape of y; None where it is not told.
        value: f(x, y).   inner_value: g(x, y), None if not evaluated;
            where steps were unrolled, that before the last of them.
        residual: ||g_yy q - f_y|| / ||f_y||, None where no linear system is solved.
        q: solution of that system, to go on from.   respond: see :data:`Respond`.
        lag: <q, g_y>, the change of f on the way from y*(x) to y, to first order; None where y
            has no solution to be behind of.
        newton: () -> s with g_yy s = -g_y, on the way to y*(x), and ``learned``; takes another
            solver, and another point (x, y), too.
        elsewhere: another draw -> <q, g_yy q> there over <q, g_yy q> here, less one; lag there.
        learned: from the systems; the last is what is known, to which that of ``respond`` adds.
    """

    grad: Tensor
    direct: Tensor
    value: Tensor
    inner_value: Tensor | None
    residual: Tensor | None
    q: Tensor | None
    respond: Respond
    lag: Tensor | None = None
    newton: Callable[..., tuple[Tensor, Learned]] | None = None
    elsewhere: Callable[[Draw], tuple[Tensor, Tensor]] | None = None
    learned: list[Learned] = field(default_factory=lambda: [Learned()])
    fy: Tensor | None = None


class Hypergradient(Protocol):
    """What a method needs of a hypergradient: its needs, and the estimate.

    ``keep`` says what is to be kept of each inner step of the window: nothing, its start point,
    or also its graph. ``batches``: independent inner batches wanted beside those of the steps;
    'auto': as many as :class:`bilevel.noise.Noise` says. ``estimate`` is given, of the estimate
    before, ``q`` and what was learned.
    """

    @property
    def keep(self) -> Literal["nothing", "points", "graphs"]: ...
    @property
    def window(self) -> int | None: ...
    @property
    def batches(self) -> int | Literal["auto"]: ...

    def estimate(
        self,
        oracle: Oracle,
        x: Tensor,
        y: Tensor,
        outer: Draw,
        inner: Sequence[Draw],
        path: Sequence[InnerStep],
        q0: Tensor | None,
        learned: Learned = UNTAUGHT,
    ) -> Estimate: ...


@dataclass(frozen=True)
class Implicit:
    """f_x - g_xy q with g_yy q = f_y: the implicit function theorem at the point at hand.

    Right where g_y = 0 and the system is solved; ``lag`` tells about the first, ``residual``
    about the second.

    Args:
        solver: :class:`Neumann`, :class:`StochasticNeumann`, :class:`ConjugateGradient`,
            :class:`Nystrom`, :class:`Identity`, or any ``solver(product, b, q0) -> q``.
        average: number of independent inner batches over which g is averaged before it is
            differentiated, >= 1. Products cost that many, and as many graphs are held; on small
            batches, whose Hessians are far from that of all data, they are worth it. Where there
            are fewer, those. 'auto': all that are given; a method gives 1, 2, 4 or 8 then, see
            :class:`bilevel.noise.Noise`.
    """

    solver: Solver = field(default_factory=Neumann)
    average: int | Literal["auto"] = field(default=1, kw_only=True)

    keep: Literal["nothing"] = field(default="nothing", init=False, repr=False)
    window: None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        examples = "bilevel.ConjugateGradient(), Neumann(), Nystrom(), Identity() or a function"
        what = "a solver(product, b, q0)"
        name = type(self).__name__
        require.made_by(name, "solver", self.solver, "__call__", what, examples)
        if not (isinstance(self.average, str) and self.average == "auto"):
            hint = ", which counts inner batches, such as 2, or 'auto'"
            require.whole(name, "average", self.average, hint=hint)
        if self.average != 1 and getattr(self.solver, "batches", 1) > 1:
            raise ValueError(
                f"{name}(average={self.average!r}) with {self.solver!r}, which asks for a batch of "
                f"its own for each factor: there is nothing to average; leave average out."
            )

    @property
    def batches(self) -> int | Literal["auto"]:
        if self.average == "auto":
            return "auto"
        return max(self.average, getattr(self.solver, "batches", 1))

    def _pullback(self, oracle: Oracle, x: Tensor, y: Tensor, draw: Draw) -> Products:
        return oracle.record(x, y, draw)

    def estimate(
        self,
        oracle: Oracle,
        x: Tensor,
        y: Tensor,
        outer: Draw,
        inner: Sequence[Draw],
        path: Sequence[InnerStep],
        q0: Tensor | None,
        learned: Learned = UNTAUGHT,
    ) -> Estimate:
        del path
        value, fx, fy = oracle.outer_gradients(x, y, outer)
        draw = oracle.joint(inner if self.average == "auto" else inner[: self.average])
        pull = self._pullback(oracle, x, y, draw)
        others: dict[int, Products] = {}

        def product(u: Tensor, j: int = 0) -> Tensor:
            if j % len(inner) == 0:
                return pull.product(u)
            if j not in others:
                others[j] = self._pullback(oracle, x, y, inner[j % len(inner)])
            return others[j].product(u)

        guess = q0 if getattr(self.solver, "warm_start", False) else None
        q, learned = watched(self.solver, product, fy, guess, learned)
        known = [learned]  # not on the estimate: a cycle would keep its graphs until collected
        gxy_q, gyy_q = pull.both(q)
        norm = torch.linalg.vector_norm(fy)
        error = torch.linalg.vector_norm(gyy_q - fy)
        residual = torch.where(norm > 0, error / norm, error)

        fyq, lag = torch.dot(fy, q), torch.dot(q, pull.gradient)

        def respond(d: Tensor, first: bool | Tensor = False, margin: float = 0.0) -> Course:
            c = -pull.forward(d)
            w, now = watched(self.solver, product, c, None, known[-1])
            known.append(now)
            # <f_y, w> and <q, c> are the same number but for the errors of the two solves; the
            # smallest change of w, in the norm of g_yy, that makes them agree lies along q
            fixed, missed = torch.dot(fx, d), torch.dot(q, c) - torch.dot(fy, w)
            apart = missed.abs() / (fixed + torch.dot(q, c)).abs()
            w = w + torch.where(fyq > 0, missed / fyq, 0.0) * q
            drift = torch.dot(pull.gradient, w)  # zero where y solves the inner problem
            half = torch.dot(c, w) / 2
            skew = torch.dot(gyy_q, w) - torch.dot(q, c)  # of <q, g_y> along t, zero if w is exact

            def follow(t: float | Tensor, xt: Tensor) -> Followed:
                # going along the tangent must serve the inner loss better than staying: to first
                # order it gains t^2 w g_yy w / 2; where it loses, y* has turned away from it. A
                # first step, sought over many decades, is to be where this still holds: phi is as
                # straight as the tangent, and far from an x of e^x or of a sigmoid y* is elsewhere
                yt = y + t * w
                moved, gy, stayed = oracle.inner_gradient_beside(xt, yt, y, draw)
                stayed = stayed + t * drift
                rounding = ROUNDING * torch.finfo(y.dtype).eps * stayed.abs()
                # where g overflows it does so from either y, and says nothing
                later = ~first if isinstance(first, Tensor) else not first
                may_lose = rounding + later * margin
                trusted = (moved <= stayed + may_lose) & moved.isfinite()
                said = t * t * half
                off = ((stayed - moved - said).abs() - rounding).clamp_min(0)
                off = off / said.clamp_min(torch.finfo(y.dtype).tiny)
                if first is not False:
                    trusted = trusted & ((off <= CLOSE) | later)
                if now.concave > CONCAVE:  # q tells of no solution
                    return Followed(yt, trusted, yt, off)
                # on the way from y(t) to y* f changes by -<q, g_y> to first order. What of it is
                # not of y, nor of w, is of y*, which bends; the smallest change of y(t), in the
                # norm of g_yy, that makes up for it lies along q
                turn = torch.dot(q, gy) - lag - t * skew
                bent = yt - torch.where(fyq > 0, turn / fyq, 0.0) * q
                return Followed(yt, trusted, bent, off)

            return Course(fixed + torch.dot(fy, w), apart, follow)

        def newton(
            solver: Solver = self.solver, at: tuple[Tensor, Tensor] | None = None
        ) -> tuple[Tensor, Learned]:
            if at is None:
                return watched(solver, product, -pull.gradient, None, known[-1])
            there = self._pullback(oracle, *at, draw)
            return watched(solver, lambda u, *j: there.product(u), -there.gradient, None, known[-1])

        def elsewhere(other: Draw) -> tuple[Tensor, Tensor]:
            there, here = self._pullback(oracle, x, y, other), torch.dot(q, gyy_q)
            excess = torch.dot(q, there.product(q)) / here - 1
            return torch.where(here > 0, excess, torch.nan), torch.dot(q, there.gradient)

        return Estimate(
            grad=fx - gxy_q,
            direct=fx,
            value=value,
            inner_value=pull.value,
            residual=residual,
            q=q,
            respond=respond,
            lag=lag,
            newton=newton,
            elsewhere=elsewhere,
            learned=known,
            fy=fy,
        )


@dataclass(frozen=True)
class FiniteDifference(Implicit):
    """:class:`Implicit` without second derivatives: products are differences of gradients.

    Two gradients a product, for losses that cannot be differentiated twice. The error is that of
    a central difference: about eps^(2/3), so 1e-5 in float32.

    Args:
        solver, average: as for :class:`Implicit`.
        eps: length of the displacement relative to 1 + ||y|| (or ||x||); None: the cube root of
            the machine precision.
    """

    eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None:
            hint = ", a relative displacement, or None for the cube root of the machine precision"
            require.number("FiniteDifference", "eps", self.eps, "(0, 1)", hint)

    def _pullback(self, oracle: Oracle, x: Tensor, y: Tensor, draw: Draw) -> Products:
        eps = self.eps or torch.finfo(y.dtype).eps ** (1 / 3)
        return _Differences(oracle, x, y, draw, eps)


class _Differences:
    """:class:`bilevel.problem.Products` by central differences of g_x and g_y."""

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, draw: Draw, eps: float) -> None:
        self._oracle, self._x, self._y, self._draw, self._eps = oracle, x, y, draw, eps
        self.value, self.gradient = oracle.inner_gradient(x, y, draw)

    def _displacement(self, point: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """h u / |u|, zero where u is, and |u| / 2h."""
        norm = torch.linalg.vector_norm(u)
        h = self._eps * (1 + torch.linalg.vector_norm(point))
        return torch.where(norm > 0, h * (u / norm), 0.0), norm / (2 * h)

    def product(self, u: Tensor) -> Tensor:
        s, scale = self._displacement(self._y, u)
        _, plus = self._oracle.inner_gradient(self._x, self._y + s, self._draw)
        _, minus = self._oracle.inner_gradient(self._x, self._y - s, self._draw)
        return scale * (plus - minus)

    def both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        s, scale = self._displacement(self._y, u)
        _, px, py = self._oracle.inner_gradients(self._x, self._y + s, self._draw)
        _, mx, my = self._oracle.inner_gradients(self._x, self._y - s, self._draw)
        return scale * (px - mx), scale * (py - my)

    def forward(self, d: Tensor) -> Tensor:
        s, scale = self._displacement(self._x, d)
        _, plus = self._oracle.inner_gradient(self._x + s, self._y, self._draw)
        _, minus = self._oracle.inner_gradient(self._x - s, self._y, self._draw)
        return scale * (plus - minus)


@dataclass(frozen=True)
class Unrolled:
    """Reverse mode through the last ``window`` inner steps, their sizes held fixed.

    For inner problems that are not solved, or not convex. Inside a method it goes back through
    the steps that the method took; alone (:func:`bilevel.hypergradient`) it takes ``window``
    gradient steps of its own from y. From the solution, T steps of size s equal the Neumann
    series of T terms with step s.

    Args:
        window: steps to go back through; None: all of them (10 when used alone).
        recompute: keep only the points, and record each step anew on the way back: the memory of
            one step at about 1.3 times the time.
        step: size of the steps when used alone; 'auto' from the curvature at y.

    Reference: Maclaurin et al. 2015; Shaban et al. 2019 for the window.
    """

    window: int | None = None
    recompute: bool = False
    step: float | Literal["auto"] = "auto"

    batches: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.window is not None:
            require.whole("Unrolled", "window", self.window, hint=PRODUCTS)
        require.flag("Unrolled", "recompute", self.recompute)
        require.step("Unrolled", self.step)

    @property
    def keep(self) -> Literal["points", "graphs"]:
        return "points" if self.recompute else "graphs"

    def descend(
        self, oracle: Oracle, x: Tensor, y: Tensor, draw: Draw
    ) -> tuple[Tensor, list[InnerStep]]:
        """``window`` gradient steps from y and their path, for use alone."""
        size: float | Tensor
        if isinstance(self.step, str):
            pull = oracle.record(x, y, draw)
            size = series_step(self.step, pull.product, pull.gradient + torch.ones_like(y))
        else:
            size = self.step
        path = []
        for _ in range(self.window or 10):
            graph = None if self.recompute else oracle.record(x, y, draw)
            gy = oracle.inner_gradient(x, y, draw)[1] if graph is None else graph.gradient
            path.append(InnerStep(y, draw, size, graph))
            y = y - size * gy
        return y, path

    def estimate(
        self,
        oracle: Oracle,
        x: Tensor,
        y: Tensor,
        outer: Draw,
        inner: Sequence[Draw],
        path: Sequence[InnerStep],
        q0: Tensor | None,
        learned: Learned = UNTAUGHT,
    ) -> Estimate:
        del inner, q0, learned
        value, direct, fy = oracle.outer_gradients(x, y, outer)
        grad, adjoint = direct, fy
        inner_value = None
        for y_t, draw, size, graph in reversed(path):
            graph = graph or oracle.record(x, y_t, draw)
            inner_value = graph.value if inner_value is None else inner_value
            gxy, gyy = graph.both(adjoint)
            grad = grad - size * gxy
            adjoint = adjoint - size * gyy

        def respond(d: Tensor, first: bool | Tensor = False, margin: float = 0.0) -> Course:
            del first, margin  # the steps themselves are taken at x(t)

            def replay(t: float | Tensor, xt: Tensor) -> Followed:
                y_t = path[0].y if path else y
                for _, draw, size, _ in path:
                    y_t = y_t - size * oracle.inner_gradient(xt, y_t, draw)[1]
                return Followed(y_t, True, y_t)

            return Course(torch.dot(grad, d), math.nan, replay)

        return Estimate(grad, direct, value, inner_value, None, None, respond, fy=fy)
