"""Stochastic line searches: SLS, SLSB, AdaSLS."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bilevel import require
from bilevel.reuse import without_graph
from bilevel.steps import Search, armijo, schedule
from optim import check, rules
from optim.base import Closure, Last, Optimizer, Scalar, _scalar
from optim.blocks import wide
from optim.distributed import Ranks, local, local_gradient, placement
from optim.rules import Memory


class _LineSearch(Optimizer):
    """Armijo search along -g on one batch.

    A method gives the first trial and what is applied of the accepted one. The closure is called
    again for every trial from the state of torch's random generators at its first call, so that
    dropout is one function along the line; the applied point is recomputed as it was tried. Trials
    record no graph, unless the loss takes derivatives itself.
    """

    _memory = {"k": 0.0, "accepted": 0.0}
    _common: tuple[str, ...] = ("max_lr", "c", "shrink", "reset")
    _checks = {"c": check.number("(0, 1)"), "max_lr": check.number("(0, inf)")}
    _last: Last | None = None
    searches = True  # tells :mod:`bilevel.inner_solver` what closure it takes

    @property
    def last(self) -> Last | None:
        """The last search: the numerator is the decrease found, the denominator ||g||^2."""
        return self._last

    def _first_trial(self, s: Memory) -> float:
        o, accepted = self.param_groups[0], float(s["accepted"])
        if accepted == 0 or o["reset"] == "fixed":
            return o["cap"]
        return accepted if o["reset"] == "last" else min(o["cap"], accepted / o["shrink"])

    def _applied(self, found: Search, norm2: float, s: Memory) -> tuple[float, Memory]:
        """The step to take instead of the accepted one, and what to remember."""
        return found.step, {}

    @torch.no_grad()
    def step(
        self,
        closure: Closure | None = None,
        *,
        loss: Scalar | None = None,
        target: Scalar | None = None,
    ) -> Any:
        """Search and step; return the loss before the step.

        Args:
            closure: computes and returns the loss of one batch, and nothing else: it is called for
                every trial point, and ``backward()`` and clearing gradients are done here.
            loss: not possible, a search needs losses at points it has not yet chosen.
            target: ignored: the Armijo test needs no bound.

        Raises:
            ValueError, TypeError: no closure; ``loss`` given; a closure that calls ``backward()``
                itself, or whose loss does not depend on the parameters.
            RuntimeError: sparse gradients.
        """
        name = type(self).__name__
        del target
        if closure is None and loss is None and self._asked_for_state():
            return None
        if closure is None or loss is not None:
            fault = "without a closure" if closure is None else "with loss="
            raise ValueError(
                f"{name}.step() was called {fault}, but a line search evaluates the loss at points "
                "it chooses itself. Call step(closure) with a function that computes and returns "
                "the loss of the batch."
            )
        self._check_closure(closure, "step(closure)")
        self.zero_grad(set_to_none=True)
        params = [p for group in self.param_groups for p in group["params"]]
        rng = _Generators(params)
        with torch.enable_grad():
            value = closure()
            if any(p.grad is not None for p in params):
                raise ValueError(
                    f"the closure given to {name}.step() called backward(). It is called for every "
                    "trial, so it must only compute and return the loss."
                )
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise TypeError(
                    f"the closure given to {name}.step() returned {require.shown(value)}, which "
                    "does not depend on the parameters. Return the loss as a tensor, not "
                    "loss.item()."
                )
            _scalar(value, "loss", value.device)
            value.backward()
        cohorts = self._lay_out()  # refuses sparse gradients
        if cohorts:
            self._search(closure, value.detach(), rng, self._ranks(cohorts))
        return value.detach()

    def _search(self, closure: Closure, loss: Tensor, rng: _Generators, ranks: Ranks) -> None:
        o, line = self.param_groups[0], _Line(self.param_groups)
        home = line.x[0].device
        s = self._remembered(home)
        mean, sums = ranks.reduce(loss.to(home, wide(home)).reshape(()), [line.norm2(ranks)])
        value, norm2 = torch.stack([mean, *sums]).tolist()
        start, tried = self._first_trial(s), []

        def phi(t: float) -> float:
            line.go(t)
            found = torch.as_tensor(self._trial(closure, rng), dtype=wide(home), device=home)
            tried.append(float(ranks.reduce(found.detach().reshape(()), [])[0]))
            return tried[-1]

        if not (math.isfinite(value) and math.isfinite(norm2)) or norm2 == 0:
            reason = "zero gradient" if norm2 == 0 else "not finite"
            self._last = Last(0.0, math.nan, norm2, reason)
            return
        rounding = 8 * torch.finfo(loss.dtype).eps * abs(value)
        step = 0.0
        try:
            found = armijo(phi, value, -norm2, start, c=o["c"], shrink=o["shrink"], slack=rounding)
            step, new = self._applied(found, norm2, s)
        finally:
            line.go(step)
        if ranks.sharded and not found.accepted and len(set(tried)) == 1:
            raise RuntimeError(
                f"{type(self).__name__} found the same loss at {len(tried)} points: fully_shard "
                "keeps the parameters of the outermost module gathered after a loss without "
                "backward(). Call fully_shard(model, reshard_after_forward=True)."
            )
        new["k"] = s["k"] + 1
        if found.accepted:
            new["accepted"] = torch.full_like(s["k"], found.step)
        for name, number in new.items():
            s[name].copy_(number)
        first = "cap" if found.trials == 1 else ""
        active = first if found.accepted else "no step accepted"
        self._last = Last(step, value - found.value, norm2, active)

    def _trial(self, closure: Closure, rng: _Generators) -> Any:
        """The loss, on the random numbers of the first call."""

        def loss() -> Any:
            with rng.replayed():
                return closure()

        return without_graph(self._cache, loss)


class _Line:
    """x(t) = x - t lr g for the parameters that have a gradient."""

    def __init__(self, groups: list[dict[str, Any]]):
        self.params = [p for group in groups for p in group["params"] if p.grad is not None]
        rates = [group["lr"] for group in groups for p in group["params"] if p.grad is not None]
        self.lines = [
            (local(p), local(p).clone(), local_gradient(p), lr)
            for p, lr in zip(self.params, rates, strict=True)
        ]
        self.x = [x for _, x, _, _ in self.lines]

    def norm2(self, ranks: Ranks) -> Tensor:
        """Minus the slope of the loss at t = 0, as far as it lies here."""
        home = self.x[0].device
        parts = [
            lr * ranks.share(placement(p)) * (g.to(wide(home)) ** 2).sum().to(home)
            for p, (_, _, g, lr) in zip(self.params, self.lines, strict=True)
        ]
        return torch.stack(parts).sum()

    def go(self, t: float) -> None:
        for p, x, g, lr in self.lines:
            p.copy_(x)
            if t > 0:
                p.add_(g, alpha=-t * lr)


class _Generators:
    """The state of torch's random generators at one moment."""

    def __init__(self, params: list[Tensor]):
        self.devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(i) for i in self.devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """What runs inside draws the numbers that followed that moment; so it is left, too."""
        torch.set_rng_state(self.cpu)
        for i, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, i)
        yield


class SLS(_LineSearch):
    r"""Stochastic line search: the largest tried step that passes the Armijo test on the batch.

    .. math:: f_k(x_k - \gamma g_k) \le f_k(x_k) - c \gamma \|g_k\|^2

    Converges as fast as deterministic descent where every batch can be fitted exactly, and to a
    neighbourhood where not. Costs about two losses and one gradient per step.

    Args:
        params: parameters or groups of them.
        max_lr: first trial of the first step and cap of all, > 0 and finite.
        c: share of the predicted decrease that is asked for, in (0, 1); 0.5 where convex.
        shrink: factor after a refusal, in (0, 1).
        reset: first trial of a step: "grow": the last accepted step / shrink; "last": the last
            accepted step (cheapest, never grows); "fixed": max_lr.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Layers that count calls (batch norm in training mode) count every trial.

    Reference: Vaswani et al. 2019 (arXiv 1905.09997).

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.SLS([x], max_lr=4.0)
    >>> _ = optimizer.step(lambda: (x**2).sum())
    >>> x.item(), optimizer.last.step      # 4, 2 and 1 are refused, 0.5 is exact
    (0.0, 0.5)
    """

    def __init__(
        self,
        params: ParamsT,
        max_lr: float = 1.0,
        c: float = 0.1,
        shrink: float = 0.5,
        reset: str = "grow",
    ):
        super().__init__(params, None, max_lr=max_lr, c=c, shrink=shrink, reset=reset)


class SLSB(_LineSearch):
    r"""SLS under a bound that decreases on its own: the search starts at max_lr / (k + 1)^decay.

    .. math:: \gamma_k = \max\{\gamma_{b,k} \omega^j :
        f_k(x_k - \gamma g_k) \le f_k(x_k) - c \gamma \|g_k\|^2\}, \quad
        \gamma_{b,k} = \gamma_{b,0} / (k + 1)^p

    Converges without interpolation; once the bound lies under 2 (1 - c) / L every first trial is
    accepted and the method is SGD with that schedule.

    Args:
        params: parameters or groups of them.
        max_lr: gamma_{b,0} > 0, finite.
        decay: p >= 0; 1/2 for convex and non-convex, 1 for strongly convex losses.
        c: share of the predicted decrease that is asked for, in (0, 1).
        shrink: omega, factor after a refusal, in (0, 1).

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: Fan et al. 2023, 'BiSLS/SPS' (arXiv 2305.18666): the envelope step of SLSB.

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.SLSB([x], max_lr=0.1)
    >>> for _ in range(4):
    ...     _ = optimizer.step(lambda: (x**2).sum())
    >>> optimizer.last.step            # 0.1 / sqrt(4)
    0.05
    """

    _common = ("max_lr", "c", "shrink", "decay")

    def __init__(
        self,
        params: ParamsT,
        max_lr: float = 1.0,
        decay: float = 0.5,
        c: float = 0.1,
        shrink: float = 0.5,
    ):
        super().__init__(params, None, max_lr=max_lr, c=c, shrink=shrink, decay=decay)

    def _first_trial(self, s: Memory) -> float:
        o = self.param_groups[0]
        return float(schedule(o["cap"], s["k"], o["decay"]))


class AdaSLS(_LineSearch):
    r"""AdaSLS: Armijo steps that shrink with the decrease predicted so far, and never grow.

    .. math:: \eta_t = \min\Big\{ \frac{\gamma_t}
        {c_l \sqrt{\sum_{s \le t} \gamma_s \|g_s\|^2}}, \; \eta_{t-1} \Big\}, \qquad
        \gamma_t \text{ as in SLS}

    Args:
        params, max_lr, c, shrink, reset: as for :class:`SLS`.
        scale: c_l > 0; None: 1 / sqrt(gamma_0 ||g_0||^2), with which the first step is the
            accepted one.

    Raises:
        TypeError, ValueError: an option of another type or out of its range; no parameters.

    Reference: Jiang and Stich 2023 (arXiv 2308.06058).

    >>> import torch, optim
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = optim.AdaSLS([x])
    >>> _ = optimizer.step(lambda: (x**2).sum())
    >>> optimizer.last.step
    0.5
    """

    _memory = {**_LineSearch._memory, "total": 0.0, "first": 0.0, "previous": math.inf}
    _common = (*_LineSearch._common, "scale")

    def __init__(
        self,
        params: ParamsT,
        max_lr: float = 1.0,
        c: float = 0.1,
        shrink: float = 0.5,
        scale: float | None = None,
        reset: str = "grow",
    ):
        super().__init__(params, None, max_lr=max_lr, c=c, shrink=shrink, reset=reset, scale=scale)

    def _applied(self, found: Search, norm2: float, s: Memory) -> tuple[float, Memory]:
        gls = torch.full_like(s["k"], found.step)
        step, new = rules.adasls(gls, norm2, s, self.param_groups[0]["scale"])
        return float(step), new
