"""An argmin as a differentiable function, by the implicit function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel import require
from bilevel.attention import twice_differentiable
from bilevel.hypergradients import Implicit
from bilevel.layout import leaves, rebuild
from bilevel.linear import LOOSE, ConjugateGradient, Solver, as_number, is_conjugate, watched
from bilevel.require import shown


def implicit(
    inner: Callable[..., Tensor],
    argmin: Callable[..., Any],
    solver: Solver = ConjugateGradient(steps=100, rtol=1e-10),
) -> Callable[..., Any]:
    """``argmin``, made differentiable with respect to its first argument.

    ``y = implicit(inner, argmin)(x, *args)`` runs ``argmin(x, *args)`` by whatever means, and
    ``backward()`` goes through  dy*/dx = -[g_yy]^{-1} g_yx  at its result: the steps of the solver
    are neither recorded nor differentiated.

    Args:
        inner: ``inner(x, y, *args)``, a 0-dim tensor, of which y is a minimiser.
        argmin: ``argmin(x, *args)``, y: a tree of floating tensors.
        solver: of the linear system; see :mod:`bilevel.linear`.

    Returns:
        A function of (x, *args) for x a tree of tensors. It composes with ``torch.func``: ``grad``
        and ``jacrev`` through it, and ``vmap`` where ``argmin`` itself can be mapped.

    Raises:
        TypeError, ValueError: x or the argmin is no tree of floating tensors; an inner loss that
            is no scalar (in ``backward()``); what is no function or solver.
        RuntimeError: it is differentiated forwards (``jacfwd``).

    A system that is left with a relative residual above a tenth, or above one by a solver other
    than conjugate gradients, is told by a ``RuntimeWarning``, but not under ``vmap`` or
    ``torch.compile``. Tensors that ``inner`` and ``argmin`` take from elsewhere, ``args`` among
    them, get no gradient.

    Example:
        >>> import torch, bilevel
        >>> ridge = lambda x, y: ((y - 1) ** 2).sum() / 2 + x.exp() * (y**2).sum() / 2
        >>> y_star = bilevel.implicit(ridge, lambda x: torch.ones(3) / (1 + x.exp()))
        >>> x = torch.tensor(0.0, requires_grad=True)
        >>> y_star(x).sum().backward()  # sum y* = 3 / (1 + e^x)
        >>> float(x.grad)
        -0.75

    Reference: Blondel et al. 2022, eq. (4), for the seam; the rule itself is classical.
    """

    require.function("implicit", "inner", inner, "a function(x, y, ...)")
    require.function("implicit", "argmin", argmin, "a function(x, ...)")
    Implicit(solver)  # says what is no solver

    def differentiable(x: Any, *args: Any) -> Any:
        require.function("implicit", "inner", inner, "a function(x, y, ...)", 2 + len(args))
        require.function("implicit", "argmin", argmin, "a function(x, ...)", 1 + len(args))
        parts = [leaf for _, leaf in _checked(x, "x")]
        structure: list[Any] = []

        def forward(*xs: Tensor) -> tuple[Tensor, ...]:
            y = argmin(rebuild(x, iter(xs)), *args)
            structure[:] = [y]
            return tuple(leaf.detach() for _, leaf in _checked(y, "argmin(x)"))

        def gradient(xs: tuple[Tensor, ...], ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            def loss(ys: tuple[Tensor, ...]) -> Tensor:
                value = inner(rebuild(x, iter(xs)), rebuild(structure[0], iter(ys)), *args)
                return _require_scalar(value)

            return torch.func.grad(loss)(ys)

        ys = _Argmin.apply(forward, gradient, solver, *parts)
        return rebuild(structure[0], iter(ys))

    return differentiable


def _require_scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else shown(value)
        raise TypeError(
            f"inner returned {got}, but must return a floating 0-dim tensor; reduce it with "
            f".mean() or .sum()."
        )
    return value


def _checked(tree: Any, name: str) -> list[tuple[str, Tensor]]:
    found = list(leaves(tree, name))
    if not found:
        raise ValueError(f"{name} = {shown(tree)} holds no tensor; give it one at least.")
    for path, leaf in found:
        if isinstance(leaf, torch.nn.Module):
            raise TypeError(
                f"{path} is the Module {type(leaf).__name__}, but must be a tree of tensors; pass "
                f"dict(module.named_parameters()), and call the Module in inner and argmin by "
                f"torch.func.functional_call(module, {name}, ...)."
            )
        if not isinstance(leaf, Tensor):
            wrong: Any = type(leaf).__name__
        elif leaf.layout != torch.strided:
            wrong = leaf.layout
        elif not leaf.is_floating_point():
            wrong = leaf.dtype
        else:
            continue
        raise TypeError(
            f"{path} is {wrong}, but must be a dense floating tensor to be differentiated; pass "
            f"what is not to be differentiated as a further argument."
        )
    return found


class _Argmin(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(forward: Any, gradient: Any, solver: Any, *xs: Tensor) -> tuple[Tensor, ...]:
        del gradient, solver
        with torch.enable_grad():  # a way to y may take gradients of its own, though none to x
            return forward(*(x.detach() for x in xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.gradient, ctx.solver, *xs = inputs
        ctx.count = len(xs)
        ctx.save_for_backward(*xs, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        xs, ys = saved[: ctx.count], saved[ctx.count :]
        sizes, shapes = [y.numel() for y in ys], [y.shape for y in ys]

        def flat(parts: tuple[Tensor, ...]) -> Tensor:
            return torch.cat([part.reshape(-1) for part in parts])

        def unflat(vector: Tensor) -> tuple[Tensor, ...]:
            parts = vector.split(sizes)
            return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))

        with twice_differentiable():
            pullback = torch.func.vjp(ctx.gradient, xs, ys)[1]
            b = flat(cotangents)
            q, _ = watched(ctx.solver, lambda u, j=0: flat(pullback(unflat(u))[1]), b)
            gxy, gyy = pullback(unflat(q))
            _tell_unsolved(ctx.solver, flat(gyy) - b, b)
            return None, None, None, *(-part for part in gxy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise require.told(
            RuntimeError,
            "implicit is differentiated backwards, from a loss of y* to x, not forwards along a "
            "direction of x; use torch.func.jacrev instead of jacfwd, and jacrev(jacrev(...)) "
            "instead of hessian.",
        )


def _tell_unsolved(solver: Solver, missed: Tensor, b: Tensor) -> None:
    """Warn where the gradient is of a system that was not solved; not under vmap or compile."""
    error, size = (torch.linalg.vector_norm(v.detach()) for v in (missed, b))
    residual = as_number(error / size)
    most = LOOSE if is_conjugate(solver) else 1.0  # where zero were nearer to a solution
    if residual is not None and residual > most:
        warnings.warn(
            f"the linear system in the backward pass of implicit was left with a relative residual "
            f"of {residual:.2g} by {shown(solver)}, so that the gradient may be far off. Is "
            f"argmin(x) where inner has its minimum? If it is, allow more products, such as "
            f"solver=bilevel.ConjugateGradient(steps=300), or add a small penalty on y to inner.",
            RuntimeWarning,
            stacklevel=2,
        )
