"""How far: every step-size rule as a function of 0-dim tensors, in the letters of its paper.

A rule sees the gap  N = f(y) - l + <g, z - y>  (the loss above its bound, in the linear model at
the base point z; z = y for methods without averaging), the squared norm of the gradient in the
metric of the step, and the numbers it left behind; it returns its decision and those numbers anew.
The zero step of a refused gradient or loss is that of :func:`bilevel.steps.polyak`.

References: SPS arXiv 2002.10542; SPS*, IAM 2504.01898; schedule-free Polyak 2511.07767; SPS safe
2512.02342; DecSPS 2205.04583; AdaSPS 2308.06058; inexact Polyak and clipping 2405.15010.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.steps import polyak

Memory = dict[str, Tensor]


class Decision(NamedTuple):
    """``step`` = scale min{[numerator]_+ / denominator, cap}, in 0-dim tensors."""

    step: Tensor
    numerator: Tensor
    denominator: Tensor
    unguarded: Tensor  # the denominator without its safeguard
    cap: Tensor | float
    scale: Tensor | float = 1.0


def capped(
    gap: Tensor, norm2: Tensor, cap: Tensor | float = math.inf, floor: Tensor | float = 0.0
) -> Decision:
    """min{ [N]_+ / max{||g||^2, floor}, cap },  0 at a zero gradient."""
    denominator = torch.clamp(norm2, min=floor)
    step = polyak(gap, denominator).clamp(max=cap)
    step = torch.where(norm2 > 0, step, torch.zeros_like(step))
    return Decision(step, gap, denominator, norm2, cap)


def safeguarded(
    gap: Tensor,
    norm2: Tensor,
    s: Memory,
    safeguard: float | str | None,
    rho: float,
    cap: float = math.inf,
) -> tuple[Decision, Memory]:
    """min{ [N]_+ / max{||g||^2, M}, cap }: M None for the oracle, a number, or "ema"."""
    if not isinstance(safeguard, str):
        return capped(gap, norm2, cap, safeguard or 0.0), {}
    m = moving_average(s["m"], norm2, rho)
    return capped(gap, norm2, cap, m), {"m": m}


def moving_average(m: Tensor, norm2: Tensor, rho: float) -> Tensor:
    """M' = rho M + (1 - rho) ||g||^2, from the first norm that is not 0 (2511.07767, eq. 8)."""
    return torch.where(m > 0, rho * m + (1 - rho) * norm2, norm2)


def decsps(
    gap: Tensor, norm2: Tensor, s: Memory, c0: float, max_lr: float
) -> tuple[Decision, Memory]:
    """(1/c_k) min{ [f - l]_+ / ||g||^2, c_{k-1} step_{k-1} },  c_k = c0 sqrt(k + 1).

    ``s["scaled"]`` is c_{k-1} step_{k-1}; before the first step it is inf, which stands for
    c0 max_lr. A step of zero does not bind the next, which would be zero, too; k counts it.
    """
    c = c0 * (s["k"] + 1).sqrt()
    scaled = s["scaled"].clamp(max=c0 * max_lr)
    decision = capped(gap, c * norm2, scaled / c)
    scaled = torch.where(decision.step > 0, c * decision.step, scaled)
    return decision, {"k": s["k"] + 1, "scaled": scaled}


def adasps(gap: Tensor, norm2: Tensor, s: Memory, c: float | None) -> tuple[Decision, Memory]:
    """min{ [f - l]_+ / (c ||g||^2 sqrt(sum_s [f_s - l_s]_+)), step_{k-1} }.

    ``c`` None: 1 / sqrt(f_0 - l_0), which makes the first step the Polyak step. A step of zero does
    not bind the next, which would be zero, too; its gap is in the sum.
    """
    total = s["total"] + gap.clamp_min(0)
    first = torch.where(s["first"] > 0, s["first"], total)
    scale = (total / first).sqrt() if c is None else c * total.sqrt()
    scale = torch.where(total > 0, scale, 1.0)  # no gap yet: no step, whatever the scale
    decision = capped(gap, scale * norm2, s["previous"])
    previous = torch.where(decision.step > 0, decision.step, s["previous"])
    return decision, {"total": total, "first": first, "previous": previous}


def adasls(gls: Tensor, norm2: float, s: Memory, c: float | None) -> tuple[Tensor, Memory]:
    """min{ gls_k / (c sqrt(sum_s gls_s ||g_s||^2)), step_{k-1} },  gls an Armijo step.

    ``c`` None: 1 / sqrt(gls_0 ||g_0||^2), which makes the first step the Armijo step. A failed
    search is not remembered.
    """
    total = s["total"] + gls * norm2
    first = torch.where(s["first"] > 0, s["first"], total)
    scale = (total / first).sqrt() if c is None else c * total.sqrt()
    step = torch.where(gls > 0, torch.minimum(gls / scale, s["previous"]), 0.0)
    previous = torch.where(gls > 0, step, s["previous"])
    return step, {"total": total, "first": first, "previous": previous}


def clip(norm2: Tensor, max_norm: Tensor) -> Tensor:
    """min{1, max_norm / ||g||},  0 at a zero gradient (2405.15010, section 2)."""
    return torch.where(norm2 > 0, torch.clamp(max_norm / norm2.sqrt(), max=1.0), 0.0)


def weight(k: Tensor, lr_max: Tensor, r: float, power: float) -> Tensor:
    """w = k^r lr_max^power with the largest step so far, for the average of schedule-free methods.

    With the step itself in place of the largest one, a step of zero has no weight, so the average
    does not move to z, so the gap stays negative, so the step stays zero: a dead-lock.
    """
    return k**r * lr_max**power
