"""Hypergradients of other packages, each called as its own documentation does."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

INSTALL = (
    "python -m pip install --no-deps --ignore-requires-python --target peers "
    "-r benchmarks/requirements.txt; PYTHONPATH=peers python -m benchmarks ..."
)
Call = Callable[[], Tensor]  # the hypergradient


@dataclass
class Example:
    """inner(x, ys) and outer(x, ys) of a tensor x and a list of tensors, with 1/L as the step."""

    x: Tensor
    ys: list[Tensor]
    inner: Callable[[Tensor, list[Tensor]], Tensor]
    outer: Callable[[Tensor, list[Tensor]], Tensor]
    step: float

    def leaves(self) -> tuple[Tensor, list[Tensor]]:
        return self.x.clone().requires_grad_(), [y.clone().requires_grad_() for y in self.ys]


def higher(example: Example, count: int) -> Call:
    """Unrolled through ``count`` steps of its differentiable SGD."""
    package = importlib.import_module("higher")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ys = torch.nn.ParameterList(y.clone() for y in example.ys)

        def forward(self, loss: Callable[..., Tensor], x: Tensor) -> Tensor:
            return loss(x, list(self.ys))

    def call() -> Tensor:
        model, x = Model(), example.x.clone().requires_grad_()
        optimizer = torch.optim.SGD(model.parameters(), lr=example.step)
        with package.innerloop_ctx(model, optimizer) as (copy, differentiable):
            for _ in range(count):
                differentiable.step(copy(example.inner, x))
            return torch.autograd.grad(copy(example.outer, x), x, allow_unused=True)[0]

    return call


def torchopt_cg(example: Example, count: int) -> Call:
    torchopt = importlib.import_module("torchopt")
    solve = torchopt.linear_solve.solve_cg(maxiter=count, atol=0.0, rtol=0.0)
    optimality = torch.func.grad(lambda ys, x: example.inner(x, list(ys)))

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
    def solution(ys: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        return ys

    def call() -> Tensor:
        x, ys = example.leaves()
        found = solution(tuple(y.detach() for y in ys), x)
        return torch.autograd.grad(example.outer(x, list(found)), x)[0]

    return call


def hypergrad(kind: str) -> Callable[[Example, int], Call]:
    def make(example: Example, count: int) -> Call:
        function = getattr(importlib.import_module("hypergrad.approx_hypergrad"), kind)
        scale = 1.0 if kind == "conjugate_gradient" else example.step
        terms = count if kind == "conjugate_gradient" else count - 1

        def call() -> Tensor:
            return function(
                lambda ys, xs: example.inner(xs[0], list(ys)),
                lambda ys, xs: example.outer(xs[0], list(ys)) + 0.0 * xs[0].sum(),
                tuple(example.ys),
                (example.x,),
                terms,
                scale,
            )[0]

        return call

    return make


def betty(kind: str) -> Callable[[Example, int], Call]:
    """Its own routine on what it reads of a Problem."""

    def make(example: Example, count: int) -> Call:
        function = getattr(importlib.import_module(f"betty.hypergradient.{kind}"), kind)
        config = SimpleNamespace(
            cg_iterations=count,
            cg_alpha=1.0,
            neumann_iterations=count - 1,
            neumann_alpha=example.step,
        )

        def call() -> Tensor:
            x, ys = example.leaves()
            vector = torch.autograd.grad(example.outer(x, ys), ys)
            lower = SimpleNamespace(
                paths=[],
                config=config,
                cur_batch=None,
                training_step_exec=lambda batch: example.inner(x, ys),
                trainable_parameters=lambda: ys,
                parameters=lambda: ys,
            )
            upper = SimpleNamespace(trainable_parameters=lambda: [x])
            return function(vector, lower, upper, False)[0]

        return call

    return make


def boat_cg(example: Example, count: int) -> Call:
    function = importlib.import_module("boat_torch.utils.op_utils").conjugate_gradient

    def call() -> Tensor:
        x, ys = example.leaves()

        def descent(params: list[Tensor], loss: Tensor) -> list[Tensor]:
            grads = torch.autograd.grad(loss, params, create_graph=True)
            return [p - example.step * g for p, g in zip(params, grads, strict=True)]

        outer, inner = example.outer(x, ys) + 0.0 * x.sum(), example.inner(x, ys)
        return function(ys, [x], outer, inner, count, descent)[0]

    return call


# name -> (its module, what makes the call)
PEERS: dict[str, tuple[str, Callable[[Example, int], Call]]] = {
    "torchopt solve_cg": ("torchopt", torchopt_cg),
    "betty cg": ("betty", betty("cg")),
    "hypergrad conjugate_gradient": ("hypergrad", hypergrad("conjugate_gradient")),
    "boat conjugate_gradient": ("boat_torch", boat_cg),
    "betty neumann": ("betty", betty("neumann")),
    "hypergrad neumann": ("hypergrad", hypergrad("neumann")),
    "higher, unrolled": ("higher", higher),
}


def calls(example: Example, count: int) -> dict[str, Call | str]:
    """A hypergradient of ``count`` products by each peer, or in words why there is none."""
    found: dict[str, Call | str] = {}
    for name, (package, make) in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old packages, about themselves
                importlib.import_module(package)
            call = _quiet(make(example, count))
            call()
            found[name] = call
        except ImportError as error:
            found[name] = f"not installed ({error}): {INSTALL}"
        except Exception as error:
            found[name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return found


def _quiet(call: Call) -> Call:
    def quiet() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return quiet
