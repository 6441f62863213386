"""Steps that shrink by themselves: DecSPS, AdaSPS, the inexact Polyak step."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim import rules
from optim.base import Optimizer
from optim.blocks import Block, Group, precise_copy
from optim.check import number, optional
from optim.rules import Decision, Memory
from optim.vectors import Plain


class DecSPS(Optimizer):
    r"""Decreasing SPS: steps that never grow, scaled down like 1/sqrt(k).

    .. math:: \gamma_k = \frac{1}{c_k} \min\{ [f_k(x_k) - \ell_k]_+ / \|g_k\|^2, \;
        c_{k-1} \gamma_{k-1} \}, \quad c_k = c_0 \sqrt{k+1}, \quad c_{-1} \gamma_{-1} = c_0 \gamma_b

    Converges to the solution without interpolation, but one small Polyak value binds all later
    steps. A step of zero (zero gradient, loss at or below its bound) binds none, but k counts it;
    of NaN nothing is remembered.

    Args:
        params: parameters or groups of them.
        c0: scale, > 0.
        max_lr: gamma_b > 0, bound of the first step; inf: none.
        lower_bound: l, finite, at most the smallest loss of any batch.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: Orvieto, Lacoste-Julien, Loizou 2022 (arXiv 2205.04583).

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.DecSPS([x])
    >>> (x**2).sum().backward()
    >>> _ = optimizer.step(loss=4.0)
    >>> optimizer.last.step
    0.25
    """

    _memory = {"k": 0.0, "scaled": math.inf}
    _common = ("c0", "max_lr", "lower_bound")

    def __init__(
        self,
        params: ParamsT,
        c0: float = 1.0,
        max_lr: float = 10.0,
        lower_bound: float = 0.0,
        *,
        foreach: bool | None = None,
    ):
        super().__init__(params, foreach, c0=c0, max_lr=max_lr, lower_bound=lower_bound)

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        o = self.param_groups[0]
        return rules.decsps(gap, norm2, s, o["c0"], o["cap"])


class AdaSPS(Optimizer):
    r"""AdaSPS: Polyak steps that shrink with the sum of the gaps seen, and never grow.

    .. math:: \eta_t = \min\{ \frac{[f_t(x_t) - \ell_t]_+}{c \|g_t\|^2}
        \frac{1}{\sqrt{\sum_{s \le t} [f_s(x_s) - \ell_s]_+}}, \; \eta_{t-1} \}

    Adapts between exact and inexact fit without knowing which. A step of zero binds none, but its
    gap is in the sum; of NaN nothing is remembered.

    Args:
        params: parameters or groups of them.
        c: > 0, in units of 1/sqrt(loss); None: 1/sqrt(f_0 - l_0), with which the first step is
            the Polyak step.
        lower_bound: l, finite, at most the smallest loss of any batch.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: Jiang and Stich 2023 (arXiv 2308.06058).

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.AdaSPS([x])
    >>> (x**2).sum().backward()
    >>> _ = optimizer.step(loss=4.0)
    >>> optimizer.last.step
    0.25
    """

    _memory = {"total": 0.0, "first": 0.0, "previous": math.inf}
    _common = ("c", "lower_bound")
    _checks = {"c": optional(number("(0, inf)"))}

    def __init__(
        self,
        params: ParamsT,
        c: float | None = None,
        lower_bound: float = 0.0,
        *,
        foreach: bool | None = None,
    ):
        super().__init__(params, foreach, c=c, lower_bound=lower_bound)

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        return rules.adasps(gap, norm2, s, self.param_groups[0]["c"])


class InexactPolyak(Optimizer):
    r"""Inexact Polyak stepsize: needs a lower bound and the number of steps, nothing else.

    .. math:: \gamma_t = [f(x_t) - \ell^*]_+ / (\sqrt{T} \|g_t\|^2)

    Take :meth:`best`, not the last point: near the optimum the step grows as the gradient
    vanishes, and the last point may be far off. With T = 1 it is the Polyak step.

    Args:
        params: parameters or groups of them.
        steps: T >= 1, the whole number of steps planned.
        lower_bound: l*, finite, at most the smallest loss.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: 'Parameter-free Clipped Gradient Descent Meets Polyak' (arXiv 2405.15010),
    algorithm 1.

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.InexactPolyak([x], steps=4)
    >>> (x**2).sum().backward()
    >>> _ = optimizer.step(loss=4.0)
    >>> x.item(), optimizer.best()[0].item()    # moved on from the best point seen, which was 2
    (1.5, 2.0)
    """

    _memory = {"lowest": math.inf}
    _seen = ("lowest",)
    _common = ("steps", "lower_bound")

    def __init__(
        self,
        params: ParamsT,
        steps: int,
        lower_bound: float = 0.0,
        *,
        foreach: bool | None = None,
    ):
        super().__init__(params, foreach, steps=steps, lower_bound=lower_bound)

    def best(self) -> list[Tensor]:
        """Copies of the parameters, in order, where the loss was lowest above its bound so far.

        The point after the last step has no loss yet and is not among those compared. Before the
        first step all parameters are as they are, later those that never had a gradient.
        """
        return [
            self.state.get(p, {}).get("best", p).detach().to(p.dtype, copy=True)
            for group in self.param_groups
            for p in group["params"]
        ]

    def _first(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        return {"best": precise_copy(p)}

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        decision = rules.capped(gap, math.sqrt(self.param_groups[0]["steps"]) * norm2)
        return decision, {"lowest": torch.minimum(gap, s["lowest"])}

    def _weights(self, group: Group, s: Memory, step: Tensor, ok: Tensor) -> Memory:
        assert self._cache.decision is not None and self._cache.finite is not None
        better = self._cache.finite & (self._cache.decision.numerator == s["lowest"])
        return {**super()._weights(group, s, step, ok), "better": better}

    def _move(self, do: Plain, block: Block, w: Memory) -> None:
        x, _ = block.read(again=True)
        do.lerp(block.state["best"], x, w["better"])
        super()._move(do, block, w)
