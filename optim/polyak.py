"""Polyak steps on the gradient itself: SPS, SPS+, safeguarded SPS, SPSB."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT

from bilevel.steps import schedule
from optim import rules
from optim.base import Optimizer
from optim.rules import Decision, Memory


class SPS(Optimizer):
    r"""Stochastic Polyak step, with a cap SPSmax.

    .. math:: x_{k+1} = x_k - \gamma_k g_k, \quad
        \gamma_k = \min\{ [f_k(x_k) - \ell_k]_+ / (c \|g_k\|^2), \gamma_b \}

    With c >= 1/2 and smooth convex losses it converges to a neighbourhood of the solution whose
    size grows with f_k(x*) - l_k; to the solution itself where every batch is fitted exactly.

    Args:
        params: parameters or groups of them, as for any torch optimizer.
        lower_bound: l, finite, at most the smallest loss of any batch; ``target`` overrides it.
        c: > 0; 1 is the projection, 1/2 twice as far.
        max_lr: gamma_b > 0, in units of a learning rate; inf: no cap.
        foreach: False for the plain version, tensor by tensor.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: Loizou et al. 2021 (arXiv 2002.10542), eqs. (2), (3).

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.SPS([x])
    >>> loss = (x**2).sum()
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)      # halves x on any parabola
    >>> x.item(), optimizer.last.step
    (1.0, 0.25)
    """

    _common = ("lower_bound", "c", "max_lr")

    def __init__(
        self,
        params: ParamsT,
        lower_bound: float = 0.0,
        c: float = 1.0,
        max_lr: float = math.inf,
        *,
        foreach: bool | None = None,
    ):
        super().__init__(params, foreach, lower_bound=lower_bound, c=c, max_lr=max_lr)

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        o = self.param_groups[0]
        return rules.capped(gap, o["c"] * norm2, o["cap"]), {}


class SPSPlus(Optimizer):
    r"""SPS+, also SPS*: the Polyak step with each batch's own optimal value.

    .. math:: \gamma_t = [f_t(x_t) - f_t(x^*)]_+ / \|g_t\|^2

    With the exact f_t(x*) and convex losses no step moves away from x*, whatever the sample, and
    the averaged iterate converges at the best rate without any constant. ``step(target=)`` is
    required: a reference model's loss on the same batch.

    Args:
        params: parameters or groups of them.
        max_lr: cap of the step, > 0; inf: none.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.
        ValueError: a step without ``target``.

    References: Garrigos et al. 2023; 'Analysis of an Idealized Stochastic Polyak Method and its
    Application to Black-Box Model Distillation' (arXiv 2504.01898; SPS*); 'Taking the Road Less
    Scheduled with Adaptive Polyak Steps' (arXiv 2511.07767), section 2.1 (SPS+).

    >>> import torch, optim
    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> optimizer = optim.SPSPlus([x])
    >>> loss = (x - 1).abs().sum() + 5
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss, target=5.0)
    >>> x.item()
    1.0
    """

    _common = ("max_lr",)

    def __init__(self, params: ParamsT, max_lr: float = math.inf, *, foreach: bool | None = None):
        super().__init__(params, foreach, max_lr=max_lr)

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        return rules.capped(gap, norm2, self.param_groups[0]["cap"]), {}


class SafeguardedSPS(Optimizer):
    r"""SPS with a floor under its denominator, so that small gradients make no large steps.

    .. math:: \gamma_t = [f_t(x_t) - \ell_t]_+ / \max\{ \|g_t\|^2, M \}

    It is clipped gradient descent with an adaptive step. Where the losses are not fitted exactly
    it converges to a neighbourhood that shrinks as M grows, and starts slower.

    Args:
        params: parameters or groups of them.
        lower_bound: l, finite, at most the smallest loss of any batch.
        safeguard: M >= 0 in units of a squared gradient norm, or "ema": M_t follows the squared
            norms, M_t = rho M_{t-1} + (1 - rho) ||g_t||^2.
        rho: memory of the moving average, in [0, 1).
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    References: arXiv 2512.02342 (constant M); 'Taking the Road Less Scheduled with Adaptive Polyak
    Steps' (arXiv 2511.07767), section 2.1 and eq. (8) (moving average).

    >>> import torch, optim
    >>> x = torch.tensor([0.5], requires_grad=True)
    >>> optimizer = optim.SafeguardedSPS([x], safeguard=4.0)
    >>> loss = (x**2).sum()
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)
    >>> optimizer.last
    Last(step=0.0625, numerator=0.25, denominator=4.0, active='safeguard')
    """

    _memory = {"m": 0.0}
    _common = ("lower_bound", "safeguard", "rho")

    def __init__(
        self,
        params: ParamsT,
        lower_bound: float = 0.0,
        safeguard: float | str = 1.0,
        *,
        rho: float = 0.99,
        foreach: bool | None = None,
    ):
        options = {"lower_bound": lower_bound, "safeguard": safeguard, "rho": rho}
        super().__init__(params, foreach, **options)

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        o = self.param_groups[0]
        return rules.safeguarded(gap, norm2, s, o["safeguard"], o["rho"])


class SPSB(Optimizer):
    r"""SPS under a bound that decreases on its own, not through the step before.

    .. math:: \gamma_k = \min\{ [f_k(x_k) - \ell_k]_+ / (c \|g_k\|^2), \;
        \gamma_{b,0} / (k+1)^{p} \}

    The bound takes the iterates to the solution itself also where no batch is fitted exactly; once
    it lies under 1/(2cL) the method is SGD with that schedule.

    Args:
        params: parameters or groups of them.
        max_lr: gamma_{b,0} > 0.
        decay: p >= 0; 1/2 for convex and non-convex, 1 for strongly convex losses.
        lower_bound: l, finite, at most the smallest loss of any batch.
        c: scale, > 0.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: Fan et al. 2023, 'BiSLS/SPS' (arXiv 2305.18666): the envelope step of SPSB.

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.SPSB([x], max_lr=0.1)
    >>> for k in range(2):
    ...     _ = optimizer.step(loss=optimizer.zero_grad() or (l := (x**2).sum()).backward() or l)
    >>> round(optimizer.last.step, 6), optimizer.last.active     # 0.1 / sqrt(2)
    (0.070711, 'cap')
    """

    _memory = {"k": 0.0}
    _common = ("lower_bound", "c", "max_lr", "decay")

    def __init__(
        self,
        params: ParamsT,
        max_lr: float = 1.0,
        decay: float = 0.5,
        lower_bound: float = 0.0,
        c: float = 1.0,
        *,
        foreach: bool | None = None,
    ):
        options = {"max_lr": max_lr, "decay": decay, "lower_bound": lower_bound, "c": c}
        super().__init__(params, foreach, **options)

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        o = self.param_groups[0]
        cap = schedule(o["cap"], s["k"], o["decay"])
        return rules.capped(gap, o["c"] * norm2, cap), {"k": s["k"] + 1}
