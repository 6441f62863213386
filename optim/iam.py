"""IAM: Polyak steps for momentum, as averaging of the iterates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim import rules
from optim.averaged import Averaged
from optim.blocks import Group
from optim.rules import Decision, Memory


class _IterateAveraging(Averaged):
    _memory = {"k": 0.0}
    _common = ("averaging", "max_lr", "lower_bound")

    def _betas(self, group: Group) -> tuple[float, float | None]:
        return 1.0, group.get("beta2")

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        return rules.capped(gap, norm2, self.param_groups[0]["cap"]), {"k": s["k"] + 1}

    def _average(self, s: Memory, group: Group) -> Tensor:
        if group["averaging"] == "linear":
            return 1 / (s["k"] + 1)  # s["k"] is t + 1: x_{t+1} is the mean of z_{-1}, ..., z_t
        return torch.full_like(s["k"], 1 / (1 + group["averaging"]))


class IAM(_IterateAveraging):
    r"""Iterate averaging with the Polyak step: momentum that sets its own step size.

    .. math::
        \eta_t &= [f_t(x_t) - f_t(x^*) + \langle g_t, z_{t-1} - x_t \rangle]_+ / \|g_t\|^2 \\
        z_t &= z_{t-1} - \min\{\eta_t, \gamma_b\} g_t, \qquad
        x_{t+1} = (\lambda x_t + z_t) / (1 + \lambda)

    It is heavy-ball momentum lambda / (1 + lambda), 0.9 by default. With the exact f_t(x*) as
    ``target`` and convex losses z never moves away from x*, for any lambda and sample; with a
    lower bound it converges to a neighbourhood. The parameters hold x in both modes.

    Args:
        params: parameters or groups of them.
        averaging: lambda >= 0, or "linear" for lambda_t = t: the plain mean of all z, with a rate
            for the last iterate.
        max_lr: cap gamma_b > 0 of the step of z, inf: none; x moves 1/(1 + lambda) as far.
        lower_bound: finite; stands in for f_t(x*) where ``step()`` gets no ``target``.
        weight_decay: w >= 0, decoupled, scaled by the step: z -= step w x.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.
        RuntimeError: a step in eval mode.

    Reference: 'Analysis of an Idealized Stochastic Polyak Method and its Application to Black-Box
    Model Distillation' (arXiv 2504.01898); the averaging form is Sebbouh et al. 2021.

    >>> import torch, optim
    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = optim.IAM([x])
    >>> x.abs().sum().backward()
    >>> _ = optimizer.step(loss=1.0, target=0.0)   # z steps to 0, x a tenth of the way
    >>> round(x.item(), 6)
    0.9
    """

    def __init__(
        self,
        params: ParamsT,
        averaging: float | str = 9.0,
        max_lr: float = 1.0,
        *,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ):
        options = {"averaging": averaging, "max_lr": max_lr, "lower_bound": lower_bound}
        super().__init__(params, foreach, **options, weight_decay=weight_decay)


class IAMAdam(_IterateAveraging):
    r"""IAM in Adam's metric; the averaging is the momentum.

    .. math::
        D_t &= \mathrm{diag}(\sqrt{v_t / (1 - \beta_2^t)} + \epsilon), \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \eta_t &= [f_t(x_t) - f_t(x^*) + \langle g_t, z_{t-1} - x_t \rangle]_+
        / \|g_t\|^2_{D_t^{-1}}, \qquad
        z_t = z_{t-1} - \min\{\eta_t, \gamma_b\} D_t^{-1} g_t

    Adam's metric moves, so z may move away from x* now and then. The first step is a step of equal
    length in every coordinate that removes the whole gap of the linear model: without a good
    ``target`` give a ``max_lr`` of the size of an Adam learning rate times 1 + averaging.

    Args:
        params, averaging, max_lr, lower_bound, weight_decay, foreach: as for :class:`IAM`.
        beta2: memory of the squared gradients, in [0, 1).
        eps: > 0, added to the root.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.
        RuntimeError: a step in eval mode.

    Reference: 'Analysis of an Idealized Stochastic Polyak Method and its Application to Black-Box
    Model Distillation' (arXiv 2504.01898).

    >>> import torch, optim
    >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> optimizer = optim.IAMAdam([x])
    >>> loss = x.abs().sum()
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)
    >>> round(optimizer.last.denominator, 6), optimizer.last.active    # the 1-norm of (1, -1)
    (2.0, 'cap')
    """

    def __init__(
        self,
        params: ParamsT,
        averaging: float | str = 9.0,
        max_lr: float = 1.0,
        *,
        beta2: float = 0.999,
        eps: float = 1e-8,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ):
        options = {"averaging": averaging, "max_lr": max_lr, "lower_bound": lower_bound}
        super().__init__(
            params, foreach, **options, weight_decay=weight_decay, beta2=beta2, eps=eps
        )
