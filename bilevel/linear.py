"""Solvers of the linear system  g_yy q = b  that stands inside an implicit hypergradient.

A solver is any callable ``solver(product, b, q0) -> q``: ``product(u)`` is g_yy u, ``q0`` a first
guess or None. It may have an attribute ``batches``: how many independent inner batches it wants;
the j-th is reached by ``product(u, j)``. Nothing here looks at the host often, so that a GPU is
not made to wait; the hypergradient itself reports the true residual of whatever comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from bilevel import require
from bilevel.compare import everywhere
from bilevel.distributed import Ranks

Product = Callable[..., Tensor]
Solver = Callable[[Product, Tensor, "Tensor | None"], Tensor]


PRODUCTS = ", which counts products with the Hessian, such as 10"
Concave = float | Tensor  # largest |negative curvature| seen, over the largest curvature
CONCAVE = 1e-4  # of it is more than rounding
FLOOR = 3e-3  # share of the largest curvature that is told from nothing where g is concave, too
LOOSE = 0.1  # relative residual to begin with where it is to be found out
MOST_HALVINGS = 10
CONVEX = 1e-6  # of negative curvature is that of a g which a close solution does not lead off
CLOSE_HALVINGS = 4  # where nothing has noise, of such a g: the least
HELD = 20  # vectors of a Krylov space at most, then


class Learned(NamedTuple):
    """What the systems of a run have taught for the next.

    Attributes:
        concave: largest |negative curvature| of g seen, over its largest curvature; where nothing
            has noise it fades in iterations that meet none.
        halvings: of the relative residual that is enough, for a solver with ``rtol='auto'``.
        lately: as ``concave``, of the systems of one iteration.
        unsolved: iterations in a row that left q farther from solving its system than zero is.
        flattered: iterations in a row in which f was too low, see :func:`bilevel.lag.is_flattered`.
        exact: iterations in a row with a hypergradient of F, see :func:`bilevel.lag.is_exact`.
        close: whether the next system is to be solved closely: nothing has noise, so that this is
            no waste, and no system of the iteration before has met a negative curvature that it
            would be led off by.
    """

    concave: Concave = 0.0
    halvings: int | Tensor = 0
    lately: Concave = 0.0
    unsolved: int = 0
    flattered: int = 0
    exact: int = 0
    close: bool = False

    @property
    def closer(self) -> Any:
        """Halvings of the residual that is enough for the next system."""
        return max(self.halvings, CLOSE_HALVINGS) if self.close else self.halvings

    def judge(self, apart: Any, concave: Any = None) -> Learned:
        """After an iteration in which two estimates of one slope were ``apart``, relative to it;
        NaN where that is not known; ``concave``: what counts, if not all that was seen. Numbers
        or tensors.

        The slope along d is <f_x, d> and either <f_y, w> or <q, -g_yx d>: with the errors of one
        system, or of the other. Where they tell different stories the hypergradient may point
        anywhere; where they agree, a closer solution would be a waste.
        """
        concave = self.concave if concave is None else concave
        solved = concave <= CONCAVE  # otherwise q and w are no solutions
        more = solved & (apart > 0.5) & (self.halvings < MOST_HALVINGS)
        less = solved & (apart < 0.1) & (self.halvings > 0)
        return self._replace(halvings=self.halvings + 1 * more - 1 * less)


UNTAUGHT = Learned()


def watched(
    solver: Solver,
    product: Product,
    b: Tensor,
    q0: Tensor | None = None,
    learned: Learned = UNTAUGHT,
) -> tuple[Tensor, Learned]:
    """What the solver returns, if that can be a solution, and what is known by then, which
    conjugate gradients can tell and use: see :meth:`ConjugateGradient.watched`."""
    if is_conjugate(solver):
        q, concave = solver.watched(product, b, q0, learned)
        before = learned.concave, learned.lately
        most, lately = (_larger(known, concave) for known in before)
        learned = learned._replace(concave=most, lately=lately)
    else:
        q = solver(product, b, q0)
    if not isinstance(q, Tensor) or q.shape != b.shape or q.dtype != b.dtype:
        got = f"{tuple(q.shape)} of {q.dtype}" if isinstance(q, Tensor) else require.shown(q)
        raise require.told(
            TypeError,
            f"the linear solver {require.shown(solver)} returned {got}, but the right side has "
            f"shape {tuple(b.shape)} of {b.dtype}; return a q of that shape and type.",
        )
    return q, learned


def _larger(known: Concave, concave: Concave) -> Concave:
    if isinstance(concave, Tensor):
        return torch.maximum(torch.as_tensor(known).to(concave), concave)
    return max(float(known), concave)


def is_conjugate(solver: Solver) -> TypeGuard[ConjugateGradient]:
    """Whether it is :class:`ConjugateGradient`, and not a subclass with steps of its own."""
    cg = ConjugateGradient
    return isinstance(solver, cg) and type(solver).__call__ is cg.__call__


def curvature(product: Product, b: Tensor, products: int = 8) -> Tensor:
    """A bound, 0-dim, on the |eigenvalues| of g_yy that a series started at ``b`` meets.

    Lanczos from near ``b`` with full orthogonalisation: the largest Ritz value plus the norm of its
    residual. A power iteration alone approaches the largest eigenvalue from below and gives steps
    that are too long; this bound errs to the safe side. Costs ``products`` products at most.
    """
    # a direction that b lacks comes back with rounding, and would grow: look at all of them
    lanczos = Lanczos(product, b / _norm(b) + everywhere(b) / 2)
    for _ in range(min(products, b.numel())):
        lanczos.advance()
    ritz, vectors = lanczos.ritz()
    bounds = ritz.abs() + lanczos.betas[-1] * vectors[-1].abs()
    return bounds.max()


class Lanczos:
    """An orthonormal basis of the Krylov space of g_yy and a vector, reorthogonalised in full, in
    which g_yy is tridiagonal. Holds a vector for each product."""

    def __init__(self, product: Product, start: Tensor) -> None:
        self.product = product
        self.basis = [start / _norm(start)]  # one more than there were products
        self.alphas: list[Tensor] = []
        self.betas: list[Tensor] = []

    def advance(self) -> None:
        v = self.product(self.basis[-1])
        self.alphas.append(torch.dot(self.basis[-1], v))
        noise = 8 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v)
        Q = torch.stack(self.basis)
        for _ in range(2):  # twice is enough, once is not
            v = v - Q.T @ (Q @ v)
        beta = torch.linalg.vector_norm(v)
        # where the Krylov space is exhausted, what is left is rounding without a direction
        self.betas.append(torch.where(beta > noise, beta, 0.0))
        self.basis.append(torch.where(beta > noise, v / _norm(v), 0.0))

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors, in the basis, of the tridiagonal matrix."""
        T = torch.diag(torch.stack(self.alphas))
        if len(self.betas) > 1:
            off = torch.stack(self.betas[:-1])
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        # a product that overflowed must come out as a number, not as an exception from the deep
        wide = torch.promote_types(T.dtype, torch.float32)  # there is none in half precision
        values, vectors = torch.linalg.eigh(torch.nan_to_num(T).to(wide))
        return values.to(T.dtype), vectors.to(T.dtype)


def _apart_from_zero(number: Tensor) -> Tensor:
    """It, or 1 for 0: what a mask leaves out, its derivative would not (0 times NaN)."""
    return torch.where(number == 0, 1.0, number)


def _norm(v: Tensor) -> Tensor:
    """The norm, kept away from zero: dividing a zero vector by it gives zero."""
    return torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)


def as_number(number: Tensor) -> float | None:
    """It, as the host sees it: None under compile and vmap."""
    if torch.compiler.is_compiling():
        return None
    try:
        return float(number)
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Neumann:
    """q = step * sum_{j < terms} (I - step g_yy)^j b.

    The relative residual falls at least like (1 - step mu)^terms with mu the smallest eigenvalue:
    use :class:`ConjugateGradient` for ill-conditioned problems.

    Args:
        terms: terms of the series, >= 1; also the number of Hessian products, the one that
            measures the residual included.
        step: below 2 / (largest eigenvalue), or 'auto': from the curvature of the batch at hand
            (at most 8 further products), which cannot diverge for a positive definite Hessian.

    Reference: Lorraine et al. 2020; estimator A of stocBiO (Ji et al. 2021) on one batch.
    """

    terms: int = 10
    step: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        require.whole("Neumann", "terms", self.terms, hint=PRODUCTS)
        require.step("Neumann", self.step)

    def __call__(self, product: Product, b: Tensor, q0: Tensor | None = None) -> Tensor:
        nu = series_step(self.step, product, b)
        r = b if q0 is None else b - product(q0)
        q = r
        for _ in range(self.terms - 1):
            r = r - nu * product(r)
            q = q + r
        return nu * q if q0 is None else q0 + nu * q


def series_step(step: float | str, product: Product, b: Tensor) -> Tensor | float:
    """The step, or the reciprocal of :func:`curvature` where it is 'auto'; 1 of none."""
    if not isinstance(step, str):
        return step
    bound = curvature(product, b)
    return torch.where(bound > 0, 1 / bound, torch.ones_like(bound))


@dataclass(frozen=True)
class StochasticNeumann:
    """The Neumann series with an independent inner batch for each factor.

    * ``form='sum'``:  step * sum_{j < terms} prod_{i <= j} (I - step H_i) b; low variance.
    * ``form='random'``:  terms * step * prod_{i <= n} (I - step H_i) b with n uniform on
      0 ... terms-1: unbiased for the same truncated series at half the products, but a single
      draw has a relative deviation of about one. Not for searched steps, whose test needs a
      meaningful predicted decrease.

    Too few terms for the condition number leave a hypergradient whose sign cannot be trusted; the
    residual, measured on the first batch, tells.

    Args:
        terms: length of the series, >= 1, and number of independent batches.
        step: as for :class:`Neumann`; 'auto' uses 1 / (twice the curvature of the first batch),
            since the other batches may be sharper.
        form: 'sum' or 'random'.

    Reference: Ji et al. 2021 (stocBiO, sum form); Ghadimi & Wang 2018 and Chen et al. 2021
    (ALSET) for the random-length form, which the analysis of BiSPS uses (arXiv 2305.18666).
    """

    terms: int = 10
    step: float | Literal["auto"] = "auto"
    form: Literal["sum", "random"] = "sum"

    def __post_init__(self) -> None:
        require.whole("StochasticNeumann", "terms", self.terms, hint=PRODUCTS)
        require.step("StochasticNeumann", self.step)
        require.choice("StochasticNeumann", "form", self.form, ("sum", "random"))

    @property
    def batches(self) -> int:
        return self.terms

    def __call__(self, product: Product, b: Tensor, q0: Tensor | None = None) -> Tensor:
        del q0  # the factors differ from call to call, so there is no system to go on solving
        nu = series_step(self.step, product, b)
        if self.step == "auto":
            nu = nu / 2
        if self.form == "random":
            n = Ranks(b.device).first(lambda: int(torch.randint(self.terms, (), device="cpu")))
            for j in range(1, n + 1):  # the first batch is that of g_xy
                b = b - nu * product(b, j)
            return self.terms * nu * b
        q = b
        for j in range(1, self.terms):
            b = b - nu * product(b, j)
            q = q + b
        return nu * q


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradient on g_yy itself: at most ``steps`` products.

    The error in the norm of g_yy falls at least like 2 ((sqrt k - 1)/(sqrt k + 1))^steps, with k
    the condition number. It stops, with the last iterate, at a relative residual of ``rtol``, at
    a zero residual, at a direction of no curvature, and where a step is below rounding; with the
    best one at a direction of negative curvature.

    A g_yy with negative eigenvalues, as of a network on its way, has no argmin to differentiate,
    and steps of 1 / (curvature) end in nonsense where the curvature passes through zero. There
    q = |g_yy|^{-1} b instead, its eigenvalues no less than 0.003 of the largest: by the
    method of Lanczos, with as many products, but 20 where ``rtol`` is 'auto', and a vector held for
    each.

    Args:
        steps: products at most, >= 1.
        rtol: relative residual that is enough after the first step, in [0, 1). 'auto': a tenth,
            which a method halves and doubles from one iteration to the next, down to 1e-4, as
            :meth:`Learned.judge` says, where g has no batches, or but one for ``average='auto'``;
            0.006 to begin with where f and g have no noise.
        warm_start: go on from the solution of the previous iteration where a method has one.

    Reference: Hestenes & Stiefel 1952; Pedregosa 2016 for its use here; Dauphin et al. 2014
    (saddle-free Newton) for the absolute value.
    """

    steps: int = 20
    rtol: float | Literal["auto"] = 1e-6
    warm_start: bool = True

    def __post_init__(self) -> None:
        require.whole("ConjugateGradient", "steps", self.steps, hint=PRODUCTS)
        if not (isinstance(self.rtol, str) and self.rtol == "auto"):
            hint = ", a relative residual, of which 0 takes every step, or 'auto'"
            require.number("ConjugateGradient", "rtol", self.rtol, "[0, 1)", hint)
        require.flag("ConjugateGradient", "warm_start", self.warm_start)

    def __call__(self, product: Product, b: Tensor, q0: Tensor | None = None) -> Tensor:
        return self.watched(product, b, q0)[0]

    def watched(
        self,
        product: Product,
        b: Tensor,
        q0: Tensor | None = None,
        learned: Learned = UNTAUGHT,
    ) -> tuple[Tensor, Concave]:
        """The solution, and how concave g was seen to be.

        Args:
            learned: before; where g is known to be concave no products are lost on finding out.

        Returns:
            q, and the largest |negative curvature| seen over the largest curvature.
        """
        if learned.concave <= CONCAVE:
            q, found = self._steps(product, b, q0, learned)
            if isinstance(found, Tensor):
                number = None if found.requires_grad else as_number(found)
                if number is None:
                    return q, found
                found = number
            if found <= CONCAVE:
                return q, found
        return self._absolute(product, b, learned)

    def enough(self, halvings: Any) -> Any:
        """The relative residual that is enough, of so many halvings: a number or a tensor."""
        return LOOSE * 0.5**halvings if self.rtol == "auto" else self.rtol

    def _steps(
        self, product: Product, b: Tensor, q0: Tensor | None, learned: Learned
    ) -> tuple[Tensor, Concave]:
        enough, state = self.begin(product, b, q0, self.enough(learned.closer))
        on_host = b.device.type == "cpu" and not enough.requires_grad
        number = as_number(enough) if on_host else None
        if number is not None:
            found = self._on_host(product, number, state)
            if found is not None:
                q, top, low = found
                return q, -low / top if top > 0 else 0.0
        for i in range(self.steps):
            # a look at the host stops early; on a GPU it would stall the queue at every step
            if i % 5 == 4 and as_number(state[4]) == 0:
                break
            state = self.advance(product, enough, state)
        return state[0], seen(0.0, *state[5:7])

    def _absolute(self, product: Product, b: Tensor, learned: Learned) -> tuple[Tensor, float]:
        """|g_yy|^{-1} b in the Krylov space, where |g_yy| has eigenvalues of a floor at least."""
        concave = 0.0
        rtol = self.enough(learned.halvings)
        lanczos = Lanczos(product, b)
        few = 1 if b.device.type == "cpu" else 5
        most = min(self.steps, HELD) if self.rtol == "auto" else self.steps
        products = min(most, b.numel())
        z = b.new_zeros(1)
        for i in range(1, products + 1):
            lanczos.advance()
            if i % few and i < products:
                continue
            ritz, vectors = lanczos.ritz()
            top, low = float(ritz.abs().max()), float(ritz[0])
            concave = max(0.0, -low / top) if top > 0 else concave
            known = max(concave, float(learned.concave))
            floor = max(min(known, FLOOR) * top, torch.finfo(b.dtype).tiny)
            z = vectors @ (vectors[0] / ritz.abs().clamp_min(floor))
            # where g_yy is positive definite after all, this is the relative residual
            if float(lanczos.betas[-1] * z[-1].abs()) <= rtol:
                break
        q = torch.linalg.vector_norm(b) * (torch.stack(lanczos.basis[: len(z)]).T @ z)
        return q, concave

    def begin(
        self, product: Product, b: Tensor, q0: Tensor | None, rtol: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The squared residual that is enough, and the state of the steps: (q, residual, direction,
        squared norm of the residual, whether to go on, largest |curvature| seen, lowest, the q of
        the least residual, that one squared)."""
        if q0 is None:
            q, r, low = torch.zeros_like(b), b, b.new_zeros(())
        else:
            # the guess along its own ray: the best multiple of q0 never is worse than zero
            Hq = product(q0)
            curved = torch.dot(q0, Hq)
            scale = torch.where(curved > 0, torch.dot(q0, b) / _apart_from_zero(curved), 0.0)
            q, r = scale * q0, b - scale * Hq
            low = torch.where(curved < 0, curved / _apart_from_zero(torch.dot(q0, q0)), 0.0)
        rr = torch.dot(r, r)
        q = q + 0 * rr  # NaN where b is: not a system that is solved at once
        # even a good guess takes one step, so that over the iterations of a method q converges
        return rtol**2 * torch.dot(b, b), (q, r, r, rr, rr > 0, -low, low, q, rr)

    def advance(
        self, product: Product, enough: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """One step, at the cost of one product; none where there is no going on. Where that is for
        a negative curvature, which q may have come near by long steps, the best q so far."""
        q, r, p, rr, active, top, low, best, least = state
        eps = torch.finfo(q.dtype).eps
        Hp = product(p)
        pHp, pp = torch.dot(p, Hp), torch.dot(p, p)
        bent = torch.where(active & torch.isfinite(pHp), pHp / _apart_from_zero(pp), 0.0)
        top, low = torch.maximum(top, bent.abs()), torch.minimum(low, bent)
        q = torch.where(bent < 0, best, q)
        active = active & (bent > eps * eps)
        a = torch.where(active, rr / _apart_from_zero(pHp), 0.0)
        q = q + a * p
        r = r - torch.where(active, a * Hp, 0.0)
        new = torch.dot(r, r)
        better = active & (new < least)
        best, least = torch.where(better, q, best), torch.where(better, new, least)
        moved = a * a * pp > eps * eps * torch.dot(q, q)
        active = active & (new > enough) & moved
        p = r + torch.where(active, new / _apart_from_zero(rr), 0.0) * p
        return q, r, p, new, active, top, low, best, least

    def _on_host(
        self, product: Product, enough: float, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, float, float] | None:
        """:meth:`advance` with Python's numbers: on the CPU its small tensors cost what a product
        of a small problem does. q, and the largest |curvature| and the lowest; None where the
        product itself is to be differentiated, whose graph numbers would lose."""
        q, r, p = state[:3]
        rr, low = float(state[3]), float(state[6])
        top, eps = -low, torch.finfo(q.dtype).eps
        best, least = q, rr
        for _ in range(self.steps if rr > 0 else 0):
            Hp = product(p)
            if Hp.requires_grad:
                return None
            pHp, pp = float(torch.dot(p, Hp)), float(torch.dot(p, p))
            if math.isfinite(pHp) and pp > 0:
                top, low = max(top, abs(pHp / pp)), min(low, pHp / pp)
            if not eps * eps * pp < pHp < math.inf:
                q = best if pHp < 0 and pp > 0 else q
                break
            a = rr / pHp  # below 1 / eps^2, as |p| >= |r|: alpha= takes what float32 can hold
            q, r = torch.add(q, p, alpha=a), torch.sub(r, Hp, alpha=a)
            new = float(torch.dot(r, r))
            if new < least:
                best, least = q, new
            if not (new > enough and a * a * pp > eps * eps * float(torch.dot(q, q))):
                break
            p, rr = r + new / rr * p, new  # this ratio has no such bound
        return q, top, low


def seen(concave: Concave, top: Tensor, low: Tensor) -> Tensor:
    """``concave`` with the largest |curvature| and the lowest one that a system has shown."""
    share = torch.where(top > 0, -low / top, 0.0)
    return torch.maximum(torch.as_tensor(concave, dtype=top.dtype, device=top.device), share)


@dataclass(frozen=True)
class Nystrom:
    """(U S U^T + damping I)^{-1} b with a rank-``rank`` Nystrom approximation of g_yy.

    Costs ``rank`` products that do not depend on one another, whatever the condition number.

    Args:
        rank: size of the sketch, >= 1; capped at the number of parameters, where it is exact.
        damping: >= 0; None: the smallest eigenvalue that the sketch resolved (zero at full rank).
        seed: of the Gaussian sketch, which never touches the global generator.

    Reference: Hataya & Yamada 2023; Frangella, Tropp & Udell 2023 for the stable form.
    """

    rank: int = 10
    damping: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require.whole("Nystrom", "rank", self.rank, hint=PRODUCTS)
        if self.damping is not None:
            hint = ", which is added to the eigenvalues of g_yy, or None to have it chosen"
            require.number("Nystrom", "damping", self.damping, "[0, inf)", hint)
        require.whole("Nystrom", "seed", self.seed, least=None)

    def __call__(self, product: Product, b: Tensor, q0: Tensor | None = None) -> Tensor:
        del q0
        n, rank, dtype = b.numel(), min(self.rank, b.numel()), b.dtype
        b = b.to(torch.promote_types(dtype, torch.float32))  # decompositions have no half types
        # drawn on the CPU so that every device sees the same sketch
        generator = torch.Generator().manual_seed(self.seed)
        omega = torch.randn(n, rank, generator=generator, dtype=torch.float64, device="cpu")
        omega = torch.linalg.qr(omega).Q.to(b)
        Y = torch.stack([product(column.to(dtype)) for column in omega.T], dim=1).to(b)
        shift = torch.finfo(b.dtype).eps * torch.linalg.matrix_norm(Y)  # keeps the core definite
        core = omega.T @ Y + shift * (omega.T @ omega)
        values, vectors = torch.linalg.eigh(torch.nan_to_num((core + core.T) / 2))
        keep = values > shift
        root = torch.where(keep, values.clamp_min(shift).rsqrt(), 0.0)
        U, s, _ = torch.linalg.svd(
            torch.nan_to_num((Y + shift * omega) @ vectors) * root, full_matrices=False
        )
        lam = (s * s - shift).clamp_min(0)
        if self.damping is not None:
            rho = torch.as_tensor(self.damping, dtype=b.dtype, device=b.device)
        else:
            rho = lam[-1] if rank < n else torch.zeros_like(lam[-1])
        z = U.T @ b
        inside = torch.where(lam + rho > 0, z / (lam + rho), 0.0)
        if rank == n:
            return (U @ inside).to(dtype)
        return (U @ inside + torch.where(rho > 0, (b - U @ z) / rho, 0.0)).to(dtype)


@dataclass(frozen=True)
class Identity:
    """q = b: the inverse Hessian replaced by the identity, at no product.

    Right only where g_yy = I; cheap, and biased everywhere else (see the residual).

    Reference: Luketina et al. 2016 (T1-T2).
    """

    def __call__(self, product: Product, b: Tensor, q0: Tensor | None = None) -> Tensor:
        del product, q0
        return b
