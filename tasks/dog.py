"""DoG, distance over gradients: a rival without a learning rate, for the comparisons only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class DoG(torch.optim.Optimizer):
    r"""SGD whose step is the way gone so far over the gradients seen so far.

    .. math:: \eta_t = \frac{\max\{ r_\epsilon, \max_{i \le t} \|x_i - x_0\| \}}
        {\sqrt{\sum_{i \le t} \|g_i\|^2}}

    with the norms of all parameters together, and 0 until a gradient is not 0. The iterates are
    not averaged. The last step is the ``lr`` of the group.

    Args:
        params: parameters, one group.
        first: r_eps > 0, the length of the first step; None: 1e-6 (1 + ||x_0||).

    Raises:
        ValueError: ``first`` <= 0; several groups.

    Reference: Ivgi, Hinder, Carmon 2023 (arXiv 2302.12022), algorithm 1.
    """

    def __init__(self, params: Iterable[Tensor], first: float | None = None):
        if first is not None and not first > 0:
            raise ValueError(f"first is the length of the first step and must be > 0, not {first}")
        numbers = {"lr": 0.0, "farthest": first, "squares": 0.0}
        super().__init__(params, numbers)
        if len(self.param_groups) > 1:
            raise ValueError("DoG has one step for all parameters: give them in one group")

    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Any = None, target: Any = None) -> Any:
        """Step along ``p.grad``; ``loss`` is only given back, ``target`` ignored."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        params = group["params"]
        starts = [self.state[p].setdefault("start", p.detach().clone()) for p in params]
        gone = norm(p - x for p, x in zip(params, starts, strict=True))
        if group["farthest"] is None:
            group["farthest"] = 1e-6 * (1 + norm(starts))
        group["farthest"] = max(group["farthest"], gone)
        moved = [p for p in params if p.grad is not None]
        group["squares"] += norm(p.grad for p in moved) ** 2
        group["lr"] = group["farthest"] / math.sqrt(group["squares"]) if group["squares"] else 0.0
        for p in moved:
            p.sub_(p.grad, alpha=group["lr"])
        return loss


def norm(tensors: Iterable[Tensor]) -> float:
    """The length of all of them together."""
    lengths = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.stack(lengths).norm().item() if lengths else 0.0
