"""Clipped gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bilevel import require
from optim import rules
from optim.base import Optimizer
from optim.rules import Decision, Memory


class ClippedSGD(Optimizer):
    r"""Clipped gradient descent, the tuned rival: two constants to set, no loss needed.

    .. math:: x_{k+1} = x_k - \eta \min\{1, c / \|g_k\|\} g_k

    On (L0, L1)-smooth losses eta = 1/L0 and c = L0/L1 match the Polyak step.

    Args:
        params: parameters or groups of them; a group may have its own ``lr``.
        lr: eta > 0.
        max_norm: c > 0, of the gradient over all groups; inf: plain gradient descent.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: 'Parameter-free Clipped Gradient Descent Meets Polyak' (arXiv 2405.15010), section 2;
    by its proposition 1 the Polyak step is at least a quarter of that one.

    >>> import torch, optim
    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> optimizer = optim.ClippedSGD([x], lr=0.5, max_norm=1.0)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.item(), optimizer.last.active
    (2.5, '')
    """

    _common = ("max_norm",)
    _needs_loss = False

    def __init__(self, params: ParamsT, lr: float, max_norm: float, *, foreach: bool | None = None):
        require.number("ClippedSGD", "lr", lr)  # 0 is for a group alone
        super().__init__(params, foreach, lr=lr, max_norm=max_norm)

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        max_norm = torch.full_like(norm2, self.param_groups[0]["max_norm"])
        return Decision(rules.clip(norm2, max_norm), max_norm, norm2.sqrt(), norm2.sqrt(), 1.0), {}
