"""Problems with exact answers, solvers, hypergradients and methods: a new one is one row here.

The answers come from NumPy's dense linear algebra and share no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import bilevel

# -- trees ----------------------------------------------------------------------------------------


def leaves(tree: Any) -> list[Tensor]:
    """The leaves in order, written anew so as not to test a traversal by itself."""
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in leaves(child)]


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves(tree)])


def like(tree: Any, vector: Any) -> Any:
    """``vector`` (anything NumPy reads) in the structure of ``tree``."""
    rest = iter(np.asarray(vector, dtype=np.float64).reshape(-1).tolist())

    def fill(node: Any) -> Any:
        if isinstance(node, Tensor):
            values = [next(rest) for _ in range(node.numel())]
            return torch.tensor(values, dtype=node.dtype).reshape(node.shape)
        if isinstance(node, dict):
            return {key: fill(child) for key, child in node.items()}
        made = [fill(child) for child in node]
        return type(node)(*made) if hasattr(node, "_fields") else type(node)(made)

    return fill(tree)


def absolute(H, floor=0.0):
    """|H|^{-1}, of eigenvalues no less than ``floor`` of the largest."""
    values, V = np.linalg.eigh(H)
    values = np.abs(values)
    return V @ np.diag(1 / np.maximum(values, floor * values.max())) @ V.T


def relative(found: Any, exact: Any) -> float:
    """Distance of two trees or vectors, relative to the second."""
    found = flat(found).double().numpy() if not isinstance(found, np.ndarray) else found
    exact = flat(exact).double().numpy() if not isinstance(exact, np.ndarray) else exact
    assert found.shape == exact.shape
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class Weights(NamedTuple):
    w: Tensor
    b: Tensor


# -- problems -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A bilevel problem in float64 whose answers are known.

    Attributes:
        outer, inner: the losses, without batches.
        x, y: where a run would start; y is not the inner solution.
        solution: y*(x), NumPy vectors in and out.
        hessian, cross: g_yy and g_yx (rows: y, columns: x) at (x, y*(x)), as NumPy arrays.
        outer_x, outer_y: f_x and f_y at (x, y).
        value: f(x, y).
        optimum: the minimiser of F(x) = f(x, y*(x)), where there is a formula.
    """

    name: str
    outer: Callable[[Any, Any], Tensor]
    inner: Callable[[Any, Any], Tensor]
    x: Any
    y: Any
    solution: Callable[[np.ndarray], np.ndarray]
    hessian: Callable[[np.ndarray], np.ndarray]
    cross: Callable[[np.ndarray], np.ndarray]
    outer_x: Callable[[np.ndarray, np.ndarray], np.ndarray]
    outer_y: Callable[[np.ndarray, np.ndarray], np.ndarray]
    value: Callable[[np.ndarray, np.ndarray], float]
    optimum: np.ndarray | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name

    @cached_property
    def X(self) -> np.ndarray:
        return flat(self.x).numpy()

    @cached_property
    def y_star(self) -> Any:
        """The inner solution at x, in the structure of y."""
        return like(self.y, self.solution(self.X))

    @cached_property
    def Y(self) -> np.ndarray:
        return flat(self.y_star).numpy()

    @cached_property
    def H(self) -> np.ndarray:
        return self.hessian(self.X)

    @cached_property
    def eigenvalues(self) -> np.ndarray:
        return np.linalg.eigvalsh(self.H)

    @property
    def mu(self) -> float:
        return float(self.eigenvalues[0])

    @property
    def L(self) -> float:
        return float(self.eigenvalues[-1])

    @property
    def kappa(self) -> float:
        return self.L / self.mu

    def implicit(self, q: np.ndarray) -> np.ndarray:
        """f_x - g_xy q at the inner solution."""
        return self.outer_x(self.X, self.Y) - self.cross(self.X).T @ q

    @cached_property
    def b(self) -> np.ndarray:
        """f_y at the inner solution: the right side of the linear system."""
        return self.outer_y(self.X, self.Y)

    @cached_property
    def exact(self) -> np.ndarray:
        """dF/dx, by the closed form."""
        return self.implicit(np.linalg.solve(self.H, self.b))

    def F(self, X: np.ndarray) -> float:
        """The value function."""
        return self.value(X, self.solution(X))


def t(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def ridge(kappa: float, p: int = 12, n: int = 30, seed: int = 0) -> Case:
    """Ridge regression with a log-penalty per feature, on data without any symmetry.

    g = ||A y - a||^2 / 2n + sum_i e^{x_i} y_i^2 / 2,   f = ||C y - c||^2 / 2m + s sum sin(x_i) y_i
    """
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((n, p)))[0]
    V = np.linalg.qr(rng.standard_normal((p, p)))[0]
    spectrum = np.geomspace(1.0, 0.5 / kappa, p)
    A = U @ np.diag(np.sqrt(n * spectrum)) @ V.T
    a = A @ rng.standard_normal(p) + 0.3 * rng.standard_normal(n)
    m = 17
    C, c = rng.standard_normal((m, p)), rng.standard_normal(m)
    x = math.log(0.5 / kappa) + rng.uniform(0.0, 1.0, p)
    s = 0.05
    tA, ta, tC, tc = t(A), t(a), t(C), t(c)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return ((tA @ y - ta) ** 2).sum() / (2 * n) + (x.exp() * y**2).sum() / 2

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return ((tC @ y - tc) ** 2).sum() / (2 * m) + s * (x.sin() * y).sum()

    def hessian(X: np.ndarray) -> np.ndarray:
        return A.T @ A / n + np.diag(np.exp(X))

    def solution(X: np.ndarray) -> np.ndarray:
        return np.linalg.solve(hessian(X), A.T @ a / n)

    return Case(
        f"ridge {kappa:.0e}",
        outer,
        inner,
        t(x),
        t(rng.standard_normal(p)),
        solution,
        hessian,
        lambda X: np.diag(np.exp(X) * solution(X)),
        lambda X, Y: s * np.cos(X) * Y,
        lambda X, Y: C.T @ (C @ Y - c) / m + s * np.sin(X),
        lambda X, Y: float(np.sum((C @ Y - c) ** 2) / (2 * m) + s * np.sum(np.sin(X) * Y)),
    )


def quadratic(name: str, x: Any, y: Any, kappa: float = 20.0, seed: int = 0) -> Case:
    """A random quadratic with cross terms at both levels, in the given trees.

    g = y'Hy/2 - y'(B x + e) + (u'x)^2 / 2,   f = ||P y - r||^2 / 2 + x'Qx/2 + x'S y
    """
    rng = np.random.default_rng(seed)
    n, m = flat(x).numel(), flat(y).numel()
    V = np.linalg.qr(rng.standard_normal((m, m)))[0]
    H = V @ np.diag(np.geomspace(3.0, 3.0 / kappa, m)) @ V.T
    H = (H + H.T) / 2
    B, e, u = rng.standard_normal((m, n)), rng.standard_normal(m), rng.standard_normal(n)
    P, r = rng.standard_normal((m + 2, m)), rng.standard_normal(m + 2)
    G = rng.standard_normal((n, n))
    Q, S = G @ G.T / n + np.eye(n), 0.2 * rng.standard_normal((n, m))
    tH, tB, te, tu, tP, tr, tQ, tS = map(t, (H, B, e, u, P, r, Q, S))

    def inner(x: Any, y: Any) -> Tensor:
        x, y = flat(x), flat(y)
        return y @ tH @ y / 2 - y @ (tB @ x + te) + (tu @ x) ** 2 / 2

    def outer(x: Any, y: Any) -> Tensor:
        x, y = flat(x), flat(y)
        return ((tP @ y - tr) ** 2).sum() / 2 + x @ tQ @ x / 2 + x @ tS @ y

    K, k0 = np.linalg.solve(H, B), np.linalg.solve(H, e)  # y* = K x + k0
    # F is quadratic: F_xx x* = -F_x(0)
    F_xx = K.T @ P.T @ P @ K + Q + S @ K + K.T @ S.T
    F_x0 = K.T @ P.T @ (P @ k0 - r) + S @ k0
    assert np.linalg.eigvalsh(F_xx)[0] > 0.05, "the draw has no minimum; change the seed"
    return Case(
        name,
        outer,
        inner,
        like(x, rng.standard_normal(n)),
        like(y, rng.standard_normal(m)),
        lambda X: K @ X + k0,
        lambda X: H,
        lambda X: -B,
        lambda X, Y: Q @ X + S @ Y,
        lambda X, Y: P.T @ (P @ Y - r) + S.T @ X,
        lambda X, Y: float(np.sum((P @ Y - r) ** 2) / 2 + X @ Q @ X / 2 + X @ S @ Y),
        np.linalg.solve(F_xx, -F_x0),
    )


def identity_hessian() -> Case:
    """g = ||y + x||^2 / 2, f = sum j y_j: dF/dx = (0, -1, -2, -3, -4), where others give 0."""
    j = np.arange(5.0)
    tj = t(j)
    return Case(
        "identity",
        lambda x, y: (tj * y).sum() + 0 * x.sum(),
        lambda x, y: ((y + x) ** 2).sum() / 2,
        t([0.3, -1.0, 2.0, 0.7, -0.2]),
        torch.zeros(5, dtype=torch.float64),
        lambda X: -X,
        lambda X: np.eye(5),
        lambda X: np.eye(5),
        lambda X, Y: np.zeros(5),
        lambda X, Y: j,
        lambda X, Y: float(j @ Y),
    )


def scalar() -> Case:
    """g = e^x y^2 / 2 - 3 y, f = (y - 1)^2 / 2 + x^2 / 10 on 0-dim tensors."""
    return Case(
        "scalar",
        lambda x, y: (y - 1) ** 2 / 2 + x**2 / 10,
        lambda x, y: x.exp() * y**2 / 2 - 3 * y,
        t(0.4),
        t(0.0),
        lambda X: 3 * np.exp(-X),
        lambda X: np.diag(np.exp(X)),
        lambda X: np.diag(np.exp(X) * 3 * np.exp(-X)),
        lambda X, Y: X / 5,
        lambda X, Y: Y - 1,
        lambda X, Y: float(((Y - 1) ** 2 / 2 + X**2 / 10)[0]),
    )


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


RIDGES = [ridge(6), ridge(1e2, seed=1), ridge(1e3, seed=2), ridge(1e5, seed=3)]
QUADRATIC = quadratic("quadratic", zeros(4), zeros(7))
NESTED = quadratic(
    "nested",
    {"a": [zeros(2, 3), (zeros(),)], "b": zeros(2)},
    {"layers": ({"w": zeros(3, 2), "b": zeros(2)}, [zeros(1)])},
    seed=1,
)
MIXED = quadratic(
    "mixed shapes",
    [zeros(1, 2, 1), zeros(), zeros(0, 3)],
    Weights(zeros(2, 2), zeros(3)),
    seed=2,
)
CASES = [*RIDGES, QUADRATIC, NESTED, MIXED, identity_hessian(), scalar()]
IDENTITY, SCALAR = CASES[-2:]


# -- hypergradients -------------------------------------------------------------------------------


def dense(product: Callable[..., Tensor], b: Tensor, q0: Tensor | None = None) -> Tensor:
    """A solver of the user's own: the Hessian column by column."""
    H = torch.stack([product(column) for column in torch.eye(len(b), dtype=b.dtype)], dim=1)
    return torch.linalg.solve(H, b)


def _series(case: Case, slack: float = 1.0) -> int:
    """Terms after which (1 - mu / (slack L))^terms < 1e-13."""
    rate = 1 / (slack * case.kappa)
    return 2 if rate >= 1 else math.ceil(math.log(1e-13) / math.log1p(-rate))


def auto_step(case: Case) -> float:
    return 1 / case.L


@dataclass(frozen=True)
class Solver:
    """A hypergradient, set so that it has converged on the case.

    Attributes:
        make: case -> hypergradient.
        tolerance: relative error to be met, times 1 + kappa eps / 1e-10.
        supports: where it can converge at all.
        residual: it solves a linear system, and reports the residual.
    """

    name: str
    make: Callable[[Case], Any]
    tolerance: float = 1e-10
    supports: Callable[[Case], bool] = lambda case: True
    residual: bool = True

    def __str__(self) -> str:
        return self.name


def up_to(kappa: float) -> Callable[[Case], bool]:
    return lambda case: case.kappa < kappa


_I = bilevel.Implicit
SOLVERS = [
    Solver("cg", lambda c: _I(bilevel.ConjugateGradient(steps=40 * len(c.Y), rtol=0.0))),
    Solver("cg rtol", lambda c: _I(bilevel.ConjugateGradient(steps=40 * len(c.Y), rtol=1e-13))),
    Solver("neumann auto", lambda c: _I(bilevel.Neumann(_series(c, 1.5))), supports=up_to(2e2)),
    Solver(
        "neumann 1/L",
        lambda c: _I(bilevel.Neumann(_series(c), step=auto_step(c))),
        supports=up_to(2e2),
    ),
    Solver(
        "stochastic neumann, one batch",
        lambda c: _I(bilevel.StochasticNeumann(_series(c), step=auto_step(c))),
        supports=up_to(2e2),
    ),
    Solver("nystrom, full rank", lambda c: _I(bilevel.Nystrom(rank=len(c.Y)))),
    Solver("own solver", lambda c: _I(dense)),
    Solver("identity", lambda c: _I(bilevel.Identity()), supports=lambda c: c.name == "identity"),
    Solver(
        "finite difference",
        lambda c: bilevel.FiniteDifference(
            bilevel.ConjugateGradient(steps=40 * len(c.Y), rtol=1e-9)
        ),
        tolerance=3e-7,
        supports=up_to(2e2),
    ),
    Solver(
        "unrolled",
        lambda c: bilevel.Unrolled(_series(c), step=auto_step(c)),
        supports=up_to(50),
        residual=False,
    ),
    Solver(
        "unrolled, recomputed",
        lambda c: bilevel.Unrolled(_series(c), True, step=auto_step(c)),
        supports=up_to(50),
        residual=False,
    ),
]
CONVERGED = [(s, c) for s in SOLVERS for c in CASES if s.supports(c)]
CONVERGED_IDS = [f"{s}-{c}" for s, c in CONVERGED]

# not converged on purpose: what they report must be true all the same
LOOSE = [
    _I(bilevel.ConjugateGradient(steps=2, rtol=0.0)),
    _I(bilevel.ConjugateGradient(rtol=0.1)),
    _I(bilevel.Neumann(terms=1)),
    _I(bilevel.Neumann(terms=7)),
    _I(bilevel.StochasticNeumann(terms=5)),
    _I(bilevel.StochasticNeumann(terms=5, form="random")),
    _I(bilevel.Nystrom(rank=2)),
    _I(bilevel.Nystrom(rank=3, damping=0.1)),
    _I(bilevel.Identity()),
    bilevel.FiniteDifference(bilevel.Neumann(terms=7)),
]


# -- methods --------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], bilevel.Method]] = {
    "bisls-adam": lambda: bilevel.bisls("adam"),
    "bisls-sgd": lambda: bilevel.bisls("sgd"),
    "bisls-sgd last": lambda: bilevel.bisls("sgd", reset="last"),
    "bisls-sgd fixed": lambda: bilevel.bisls("sgd", reset="fixed"),
    "bisls-adam unrolled": lambda: bilevel.bisls(hypergradient=bilevel.Unrolled()),
    "bisls-adam stochastic": lambda: bilevel.bisls(
        hypergradient=bilevel.Implicit(bilevel.StochasticNeumann(40))
    ),
    "bisls-adam differences": lambda: bilevel.bisls(
        hypergradient=bilevel.FiniteDifference(bilevel.ConjugateGradient())
    ),
    "bisps": lambda: bilevel.bisps(),
    "bisps bounded": lambda: bilevel.bisps(0.5, 0.3, 1e-3),
    "adam": lambda: bilevel.fixed("adam", 0.05, 0.2),
    "sgd": lambda: bilevel.fixed("sgd", 0.05, 0.2),
    "sgd unrolled": lambda: bilevel.fixed(
        "sgd", 0.05, 0.2, bilevel.Unrolled(window=3, recompute=True)
    ),
}
