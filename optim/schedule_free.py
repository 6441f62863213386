"""Schedule-free averaging with Polyak steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim import rules
from optim.averaged import Averaged
from optim.blocks import Group
from optim.rules import Decision, Memory


class _ScheduleFree(Averaged):
    _memory = {"k": 0.0, "m": 0.0, "lr_max": 0.0, "weight_sum": 0.0}
    _common = (
        "safeguard", "rho", "lower_bound", "max_lr", "warmup_steps", "r", "weight_lr_power",
    )  # fmt: skip

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        o = self.param_groups[0]
        k = s["k"] + 1
        decision, new = rules.safeguarded(gap, norm2, s, o["safeguard"], o["rho"], o["cap"])
        if o["warmup_steps"]:
            warm = (k / o["warmup_steps"]).clamp(max=1.0)
            decision = decision._replace(step=warm * decision.step, scale=warm)
        lr_max = torch.maximum(s["lr_max"], decision.step * o["lr"])
        weight_sum = s["weight_sum"] + rules.weight(k, lr_max, o["r"], o["weight_lr_power"])
        return decision, {**new, "k": k, "lr_max": lr_max, "weight_sum": weight_sum}

    def _average(self, s: Memory, group: Group) -> Tensor:
        w = rules.weight(s["k"], s["lr_max"], group["r"], group["weight_lr_power"])
        return torch.where(s["weight_sum"] > 0, w / s["weight_sum"], 0.0)


class ScheduleFreeSPS(_ScheduleFree):
    r"""Schedule-free averaging with the Polyak step: SF-SPS+ with an oracle, SF-SPS with a bound.

    .. math::
        y_t &= (1 - \beta) z_{t-1} + \beta x_t \\
        \gamma_t &= [f_t(y_t) - \ell_t + \langle g_t, z_{t-1} - y_t \rangle]_+
        / \max\{\|g_t\|^2, M_t\} \\
        z_t &= z_{t-1} - \gamma_t g_t, \qquad x_{t+1} = (1 - c_{t+1}) x_t + c_{t+1} z_t

    beta = 0 is SPS+ with an averaged result, beta = 1 is IAM. With ``safeguard=None`` and the exact
    f_t(x*) as ``target`` no step of z moves away from the solution of a convex problem, and the
    last x has the best rate, with no horizon and no constant. With a lower bound it converges to a
    neighbourhood of the size of E[f_t(x*) - l_t], smaller for a larger ``safeguard``.

    Args:
        params: parameters or groups of them.
        beta: in [0, 1]; 0.9 is the usual momentum.
        safeguard: None for the plain denominator; M >= 0 in units of a squared gradient norm;
            "ema": M_t = rho M_{t-1} + (1 - rho) ||g_t||^2.
        lower_bound: l, finite, where ``step()`` gets no ``target``.
        max_lr: cap of the step, > 0; inf: none.
        warmup_steps: T_w, a whole number >= 0; the step is scaled by min{1, (t + 1) / T_w}.
        weight_decay: w >= 0, decoupled, at y, scaled by the step: z -= step w y.
        rho: memory of the moving average, in [0, 1).
        r, weight_lr_power: >= 0; the average weighs step t by (t + 1)^r (largest step so
            far)^power; 0 and 0 for the uniform one. No choice of them can dead-lock.
        foreach: False for the plain version.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.
        RuntimeError: a step in eval mode.

    The parameters hold y while training: call ``eval()`` before evaluating or saving the model and
    ``train()`` before going on. Batch-norm statistics are those of y; refresh them in eval mode.

    Reference: 'Taking the Road Less Scheduled with Adaptive Polyak Steps' (arXiv 2511.07767),
    table 2 (SF-SPS+, SF-SPS), eq. (8) (moving M), remark 4.1 (the form without x), theorems 3.1 and
    3.2 (with an oracle, with a bound).

    >>> import torch, optim
    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> optimizer = optim.ScheduleFreeSPS([x], weight_lr_power=0.0)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     loss = (x**2).sum()
    ...     loss.backward()
    ...     _ = optimizer.step(loss=loss)
    >>> optimizer.eval()
    >>> round(x.item(), 5)
    0.93125
    """

    def __init__(
        self,
        params: ParamsT,
        beta: float = 0.9,
        safeguard: float | str | None = None,
        lower_bound: float = 0.0,
        max_lr: float = math.inf,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        *,
        rho: float = 0.99,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
    ):
        options = {
            "safeguard": safeguard, "rho": rho, "lower_bound": lower_bound, "max_lr": max_lr,
            "warmup_steps": warmup_steps, "weight_decay": weight_decay, "r": r,
            "weight_lr_power": weight_lr_power,
        }  # fmt: skip
        super().__init__(params, foreach, beta=beta, **options)

    def _betas(self, group: Group) -> tuple[float, float | None]:
        return group["beta"], None


class ScheduleFreeAdamSPS(_ScheduleFree):
    r"""Schedule-free Adam with the Polyak step: SF-Adam-SPS+ and SF-Adam-SPS.

    :class:`ScheduleFreeSPS` in the metric D_t = diag(sqrt(v_t / (1 - beta2^{t+1})) + eps), with v_t
    the average of g_t^2 including the current one:

    .. math::
        \gamma_t = [f_t(y_t) - \ell_t + \langle g_t, z_{t-1} - y_t \rangle]_+
        / \max\{\|g_t\|^2_{D_t^{-1}}, M_t\}, \qquad z_t = z_{t-1} - \gamma_t D_t^{-1} g_t

    The denominator is about the 1-norm of the gradient, and exactly that in the first step, which
    removes the whole gap of the linear model by equal moves of all coordinates: give
    ``warmup_steps`` (2000 in pre-training) or ``max_lr`` (an Adam learning rate) unless the target
    is close. A constant ``safeguard`` is in units of that 1-norm; "ema" needs no scale.

    Args:
        params: parameters or groups of them.
        betas: (beta in [0, 1], beta2 in [0, 1)).
        safeguard, lower_bound, max_lr, warmup_steps, weight_decay, rho, r, weight_lr_power,
            foreach: as for :class:`ScheduleFreeSPS`, norms in the metric.
        eps: > 0, added to the root.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.
        RuntimeError: a step in eval mode.

    Reference: 'Taking the Road Less Scheduled with Adaptive Polyak Steps' (arXiv 2511.07767),
    algorithm 3 and eq. (8).

    >>> import torch, optim
    >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> optimizer = optim.ScheduleFreeAdamSPS([x], max_lr=0.01)
    >>> loss = x.abs().sum()
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)
    >>> optimizer.eval()
    >>> [round(v, 6) for v in x.tolist()]
    [0.99, -1.99]
    """

    def __init__(
        self,
        params: ParamsT,
        betas: tuple[float, float] = (0.9, 0.999),
        safeguard: float | str | None = None,
        lower_bound: float = 0.0,
        max_lr: float = math.inf,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        *,
        eps: float = 1e-8,
        rho: float = 0.99,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
    ):
        options = {
            "safeguard": safeguard, "rho": rho, "lower_bound": lower_bound, "max_lr": max_lr,
            "warmup_steps": warmup_steps, "weight_decay": weight_decay, "r": r,
            "weight_lr_power": weight_lr_power,
        }  # fmt: skip
        super().__init__(params, foreach, betas=betas, eps=eps, **options)

    def _betas(self, group: Group) -> tuple[float, float | None]:
        return group["betas"]
