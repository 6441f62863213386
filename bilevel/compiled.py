"""The oracle through torch.compile: for small problems, which are bound by dispatch.

Autograd cannot record a second derivative through compiled code, so that here every derivative is
a torch.func transform inside the compiled function. A product linearises anew, which the compiler
mostly fuses away; the numbers agree with the plain oracle to rounding.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vjp

from bilevel.layout import Layout
from bilevel.problem import Draw, Joint, Oracle, Problem, Products

Function = Callable[..., Any]


def compiled(function: Function, **options: Any) -> Function:
    """``torch.compile`` of all of it, for any number of problems in one process.

    By itself the compiler gives a function up after eight problems; torch < 2.13 cannot be told.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = 2**16
    return torch.compile(function, fullgraph=True, **options)


class CompiledOracle(Oracle):
    """:class:`Oracle` with compiled derivatives, kept for as long as the problem and layouts live.

    What cannot be compiled falls back to the plain oracle, with one warning.
    """

    def __init__(self, problem: Problem, x: Layout, y: Layout) -> None:
        super().__init__(problem, x, y)
        self.may_stack = False  # what is compiled is of one batch
        self._functions = _compiled(self, problem, x, y)

    def _run(self, name: str, draw: Draw, level: str, *args: Tensor) -> Any:
        if isinstance(draw, Joint):
            return _mean([self._run(name, d, level, *args) for d in draw.draws])
        return self.replayed(level, draw, self._functions[name], *args, self._batch(level, draw))

    def _try(self, name: str, draw: Draw, level: str, *args: Tensor) -> Any:
        """The compiled function's result, or None after it has failed once."""
        if self._functions.get("failed") or self.problem.habit.recorded:
            return None
        try:
            return self._run(name, draw, level, *args)
        except Exception as error:
            self._functions["failed"] = error
            first = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"the {level} loss cannot be compiled ({type(error).__name__}: {first}); going on "
                f"without compile=True, to the same result.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def value(self, level: str, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        with torch.no_grad():
            found = self._try(level, draw, level, x, y)
        if found is None:
            return super().value(level, x, y, draw)
        self.cost.loss_evaluations += draw.count
        return found

    def outer_gradients(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        found = self._try("outer_gradients", draw, "outer", x, y)
        if found is None:
            return super().outer_gradients(x, y, draw)
        self.cost.gradients += draw.count
        (fx, fy), value = found
        return value, fx, fy

    def inner_gradient(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        found = self._try("inner_gradient", draw, "inner", x, y)
        if found is None:
            return super().inner_gradient(x, y, draw)
        self.cost.gradients += draw.count
        gy, value = found
        return value, gy

    def record(self, x: Tensor, y: Tensor, draw: Draw) -> Products:
        if self._functions.get("failed") is None and not self.problem.habit.recorded:
            products = CompiledProducts(self, x, y, draw)
            if products.compiled:
                return products
        return super().record(x, y, draw)


class CompiledProducts:
    """:class:`Products`, each a compiled function of the point and the vector."""

    def __init__(self, oracle: CompiledOracle, x: Tensor, y: Tensor, draw: Draw) -> None:
        self.value, self.gradient = oracle.inner_gradient(x, y, draw)
        self._apply = partial(self._product, oracle, x, y, draw)
        # every product is compiled here, where a failure can still fall back
        names = ("product", "both", "forward")
        zeros = {"product": y, "both": y, "forward": x}
        ready = oracle._functions.setdefault("ready", set())
        self.compiled = all(
            name in ready
            or oracle._try(name, draw, "inner", x, y, torch.zeros_like(zeros[name])) is not None
            for name in names
        )
        if self.compiled:
            ready.update(names)

    @staticmethod
    def _product(
        oracle: CompiledOracle, x: Tensor, y: Tensor, draw: Draw, name: str, u: Tensor
    ) -> Any:
        oracle.cost.hessian_products += draw.count
        return oracle._run(name, draw, "inner", x, y, u)

    def product(self, u: Tensor) -> Tensor:
        return self._apply("product", u)

    def both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply("both", u)

    def forward(self, d: Tensor) -> Tensor:
        return self._apply("forward", d)


def _mean(results: Sequence[Any]) -> Any:
    """Of results that are tensors, or nests of tuples of them."""
    if isinstance(results[0], tuple):
        return tuple(map(_mean, zip(*results, strict=True)))
    return torch.stack(list(results)).mean(0)


def _compiled(oracle: Oracle, problem: Problem, x: Layout, y: Layout) -> dict[str, Any]:
    """The compiled functions of a problem between two layouts, made once."""
    found = problem.functions.get((x, y))
    if found is None:
        outer, inner = partial(oracle.call, "outer"), partial(oracle.call, "inner")
        functions: dict[str, Function] = {
            "outer": outer,
            "inner": inner,
            "outer_gradients": grad_and_value(outer, argnums=(0, 1)),
            "inner_gradient": grad_and_value(inner, argnums=1),
            **second_derivatives(inner),
        }
        # random numbers as the plain loss draws them: a draw is one function for both
        options = {"fallback_random": True}
        found = {name: compiled(f, options=options) for name, f in functions.items()}
        problem.functions[x, y] = found
    return found


def second_derivatives(inner: Function) -> dict[str, Function]:
    """Products with the second derivatives of ``inner(x, y, batch)``, on flat vectors.

    Each is a function of x, y, a vector and the batch, and linearises anew:

    * 'product': u -> g_yy u, shape of y;
    * 'both': u -> (g_xy u, g_yy u), shapes of x and y;
    * 'forward': d -> g_yx d, shape of y, for a d of the shape of x.
    """

    def gradient(x: Tensor, y: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return torch.func.grad(inner, argnums=1)(x, y, batch)

    def product(x: Tensor, y: Tensor, u: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return vjp(lambda y: gradient(x, y, batch), y)[1](u)[0]

    def both(x: Tensor, y: Tensor, u: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        return vjp(lambda x, y: gradient(x, y, batch), x, y)[1](u)

    def forward(x: Tensor, y: Tensor, d: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return jvp(lambda x: gradient(x, y, batch), (x,), (d,))[1]

    return {"product": product, "both": both, "forward": forward}
