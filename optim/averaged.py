"""Steps on a base point z while the model lies at an average: what IAM and schedule-free share.

Three points, of which two are stored: z, stepped by the rule; x, an average of the z, which is the
result; and y = (1 - beta) z + beta x, where the gradient is taken. The parameters hold y in train
mode and x in eval mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim.base import Optimizer
from optim.blocks import Block, Group, precise, precise_copy
from optim.distributed import local
from optim.rules import Memory
from optim.vectors import Plain

STORED = 0.3  # below this beta, x = z + (y - z) / beta loses digits (all, at 0), so x is stored


class Averaged(Optimizer):
    r"""Polyak steps of z seen from y, and the average x.

    .. math::
        N_t &= f_t(y_t) - \ell_t + \langle g_t, z_{t-1} - y_t \rangle, \qquad
        z_t = z_{t-1} - \gamma_t (D_t^{-1} g_t + w y_t) \\
        x_{t+1} &= (1 - c_{t+1}) x_t + c_{t+1} z_t, \qquad
        y_{t+1} = (1 - \beta) z_t + \beta x_{t+1}

    with D_t = I, or Adam's metric where the method has a ``beta2`` (arXiv 2511.07767, eq. (3),
    remark 4.1 and algorithm 3). A method gives the rule and the weight c.
    """

    def __init__(self, params: ParamsT, foreach: bool | None, **options: Any):
        super().__init__(params, foreach, **options, train_mode=True)

    def _betas(self, group: Group) -> tuple[float, float | None]:
        """(beta, beta2); beta2 None: the metric is the identity."""
        raise NotImplementedError

    def _average(self, s: Memory, group: Group) -> Tensor:
        """c_{t+1}; ``s`` is already that of step t + 1."""
        raise NotImplementedError

    # -- the two points ----------------------------------------------------------------------------

    @torch.no_grad()
    def train(self) -> None:
        """Parameters <- y, where gradients are taken; call it before training goes on."""
        for group in self.param_groups:
            if not group["train_mode"]:
                self._swap(group, into_y=True)
                group["train_mode"] = True

    @torch.no_grad()
    def eval(self) -> None:
        """Parameters <- x, the result; call it before evaluating or exporting the model."""
        for group in self.param_groups:
            if group["train_mode"]:
                self._swap(group, into_y=False)
                group["train_mode"] = False

    def _written(self, group: Group) -> float:
        """The beta of the y that the parameters hold; a scheduler may have changed it since."""
        beta, _ = self._betas(group)
        return float(group.get("written", beta))

    def _swap(self, group: Group, into_y: bool) -> None:
        beta = self._written(group)
        if into_y:
            group["written"] = beta = self._betas(group)[0]
        for p in group["params"]:
            kept = self.state.get(p)
            if not kept:
                continue
            p, z, x = local(p), local(kept["z"]), kept.get("x")
            if x is not None:
                x = local(x)
                p.copy_(torch.lerp(z, x, beta) if into_y else x)
            elif beta < 1:
                p.lerp_(z, 1 - beta if into_y else 1 - 1 / beta)

    def _check_mode(self) -> None:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() was called in eval mode, where the parameters hold "
                "the average and not the point of the gradient. Call optimizer.train() before the "
                "forward pass of each training phase."
            )
        for group in self.param_groups:
            beta, before = self._betas(group)[0], self._written(group)
            states = map(self.state.get, group["params"])
            if beta < STORED <= before and any(kept and "x" not in kept for kept in states):
                raise ValueError(
                    f"{type(self).__name__}: beta fell from {before:g} to {beta:g} in training (by "
                    f"a scheduler that moves momentum?); below {STORED} the average has to be "
                    f"stored from the start. Keep beta above (OneCycleLR(cycle_momentum=False), or "
                    f"base_momentum={STORED}), or start with one below."
                )

    # -- the step ----------------------------------------------------------------------------------

    def _first(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        beta, beta2 = self._betas(group)

        kept = {"z": precise_copy(p)}
        if beta2 is not None:
            kept["v"] = torch.zeros_like(kept["z"])
        if beta < STORED or precise(p.dtype) != p.dtype:
            kept["x"] = precise_copy(p)
        return kept

    def _measure(self, do: Plain, block: Block) -> tuple[Tensor, ...]:
        y, g = block.read()
        z, group = block.state["z"], block.group
        _, beta2 = self._betas(group)
        if beta2 is None:
            return do.dot(g, g), do.dot_difference(g, z, y)
        norm2 = do.adam_norm2(g, block.state["v"], block.k, beta2, group["eps"])
        return norm2, do.dot_difference(g, z, y), do.dot(g, g)

    def _totals(self, norm2: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        slope, *size2 = others
        # where ||g||^2 overflows, v would be inf for ever: 0 inf = NaN refuses the step
        return (norm2 + 0 * size2[0] if size2 else norm2), slope

    def _weights(self, group: Group, s: Memory, step: Tensor, ok: Tensor) -> Memory:
        beta, before = self._betas(group)[0], self._written(group)
        group["written"] = beta
        c = torch.where(ok, self._average(s, group), 0.0)
        w = {"skip": ~ok, "step": step * group["lr"], "c": c}
        w["decay"] = -(w["step"] * group["weight_decay"]).clamp(max=1.0)
        if beta >= STORED:
            anew = ok | (beta != before)  # y is to be of the new beta, whether or not z has moved
            if STORED <= before < 1:  # or y is x, or x is stored
                w["into_x"] = anew.to(c) * (1 - 1 / before)
            w["from_x"] = torch.where(anew, 1 - beta * (1 - c), 0.0)
        return w

    def _move(self, do: Plain, block: Block, w: Memory) -> None:
        y, g = block.read(again=True)
        z, x, group = block.state["z"], block.state.get("x"), block.group
        beta, beta2 = self._betas(group)
        decay = [p.clone() for p in y] if group["weight_decay"] else None
        if x is None and "into_x" in w:
            do.lerp(y, z, w["into_x"])  # y <- x_t, while z is z_{t-1}
        if decay is not None:
            do.add(z, w["decay"], decay)
        if beta2 is None:
            do.descend(z, g, w["step"], w["skip"])
        else:
            v = block.state["v"]
            do.adam_descend(z, g, v, block.k, w["step"], w["skip"], beta2, group["eps"])
        if x is None:  # y_{t+1} = x_t + (1 - beta (1 - c)) (z_t - x_t)
            do.lerp(y, z, w["from_x"])
        else:
            do.lerp(x, z, w["c"])
            for p, q, r in zip(y, z, x, strict=True):
                torch.lerp(q, r, beta, out=p)
        block.write(y)

    def _reach(self, norm2: Tensor) -> Tensor:
        _, beta2 = self._betas(self.param_groups[0])
        return norm2.sqrt() if beta2 is None else torch.ones_like(norm2)
