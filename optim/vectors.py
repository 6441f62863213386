"""The few vector operations of a step: as the papers write them, for the CPU, for accelerators.

All work on lists of tensors with 0-dim tensors as scalars, so that nothing is read back to the
host. ``skip`` is 1 where a loss or a gradient was not finite and 0 otherwise: where it is 1
nothing changes, whatever the gradient holds. :class:`Plain` is the oracle of the other two; it is
also what ``torch.compile`` sees, which fuses plain operations best.
"""

from __future__ import annotations

import torch
from torch import Tensor

Vector = list[Tensor]
FUSED = ("cpu", "cuda")  # devices with torch's fused optimizers


class Plain:
    """One tensor at a time."""

    def dot(self, a: Vector, b: Vector) -> Tensor:
        """<a, b>."""
        return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()

    def dot_difference(self, g: Vector, z: Vector, y: Vector) -> Tensor:
        """<g, z - y>; the difference is taken first, as z and y are close."""
        return self.dot(g, [p - q for p, q in zip(z, y, strict=True)])

    def adam_norm2(self, g: Vector, v: Vector, k: Tensor, beta2: float, eps: float) -> Tensor:
        """<g, D^-1 g> with D of :meth:`adam`; ``v`` is read only."""
        return self.dot(g, self.adam(g, v, k, beta2, eps))

    def adam(self, g: Vector, v: Vector, k: Tensor, beta2: float, eps: float) -> Vector:
        """D^-1 g,  D = diag(sqrt(v' / (1 - beta2^k)) + eps),  v' = beta2 v + (1 - beta2) g^2."""
        second = [beta2 * q + (1 - beta2) * p * p for p, q in zip(g, v, strict=True)]
        return [p / ((q / (1 - beta2**k)).sqrt() + eps) for p, q in zip(g, second, strict=True)]

    def lerp(self, a: Vector, b: Vector, w: Tensor) -> None:
        """a <- a + w (b - a); at w = 1 exactly b."""
        for p, q in zip(a, b, strict=True):
            p.lerp_(q, w)

    def add(self, a: Vector, w: Tensor, b: Vector) -> None:
        """a <- a + w b."""
        for p, q in zip(a, b, strict=True):
            p.addcmul_(q, w)

    def descend(self, z: Vector, g: Vector, step: Tensor, skip: Tensor) -> None:
        """z <- z - step g."""
        for p, q in zip(z, g, strict=True):
            p.copy_(torch.where(skip > 0, p, p - step * q))

    def adam_descend(
        self, z: Vector, g: Vector, v: Vector, k: Tensor, step: Tensor, skip: Tensor,
        beta2: float, eps: float,
    ) -> None:  # fmt: skip
        """z <- z - step D^-1 g  and  v <- v'."""
        self.descend(z, self.adam(g, v, k, beta2, eps), step, skip)
        for p, q in zip(v, g, strict=True):
            p.copy_(torch.where(skip > 0, p, beta2 * p + (1 - beta2) * q * q))


class Fused(Plain):
    """Moves by the kernels of torch's own SGD and Adam.

    One pass each, and their ``found_inf`` is a skip that the host need not know of.
    """

    def descend(self, z: Vector, g: Vector, step: Tensor, skip: Tensor) -> None:
        if z[0].device.type not in FUSED:
            return super().descend(z, g, step, skip)
        torch._fused_sgd_(
            z, g, [], lr=step if step.device.type == "cpu" else step.float(),
            weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=False, grad_scale=None, found_inf=skip.float(),
        )  # fmt: skip

    def adam_descend(
        self, z: Vector, g: Vector, v: Vector, k: Tensor, step: Tensor, skip: Tensor,
        beta2: float, eps: float,
    ) -> None:  # fmt: skip
        if z[0].device.type not in FUSED:
            return super().adam_descend(z, g, v, k, step, skip, beta2, eps)
        torch._fused_adam_(
            z, g, self.momentum(g), v, [], [k.float()] * len(z),
            lr=step if step.device.type == "cpu" else step.float(),
            beta1=0.0, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
            grad_scale=None, found_inf=skip.float(),
        )  # fmt: skip

    def momentum(self, g: Vector) -> Vector:
        """Memory for the momentum; its finite values are multiplied by 0."""
        raise NotImplementedError


class Flat(Fused):
    """For the CPU: flat pieces that fit its cache, one in each list, and memory used again.

    One object serves one step.
    """

    def __init__(self) -> None:
        self.memory: dict[tuple[torch.dtype, int], Tensor] = {}
        self.root: tuple[Tensor, Tensor] | None = None

    def _scratch(self, like: Tensor) -> Tensor:
        key = like.dtype, like.numel()
        if key not in self.memory:
            self.memory[key] = torch.zeros_like(like)
        return self.memory[key]

    def dot(self, a: Vector, b: Vector) -> Tensor:
        return torch.dot(a[0], b[0])

    def dot_difference(self, g: Vector, z: Vector, y: Vector) -> Tensor:
        return torch.dot(g[0], torch.sub(z[0], y[0], out=self._scratch(y[0])))

    def adam_norm2(self, g: Vector, v: Vector, k: Tensor, beta2: float, eps: float) -> Tensor:
        # sqrt(v' / b) + eps = (sqrt(v') + eps sqrt(b)) / sqrt(b): the last division on the sum
        if self.root is None or self.root[0] is not k:
            self.root = k, (1 - beta2**k).sqrt().to(v[0].dtype)
        root = self.root[1]
        d = torch.mul(v[0], beta2, out=self._scratch(v[0]))
        d.addcmul_(g[0], g[0], value=1 - beta2).sqrt_().add_(eps * root)
        return torch.dot(g[0], torch.div(g[0], d, out=d)) * root

    def momentum(self, g: Vector) -> Vector:
        return [self._scratch(g[0])]


class Lists(Fused):
    """For accelerators: one kernel for a whole list, nothing per tensor."""

    def dot(self, a: Vector, b: Vector) -> Tensor:
        # No list kernel sums with signs, but norms do without: sum q = 2 |max(q, 0)|_1 - |q|_1.
        q = torch._foreach_mul(a, b)
        absolute = torch.stack(torch._foreach_norm(q, 1)).sum()
        torch._foreach_clamp_min_(q, 0.0)
        return 2 * torch.stack(torch._foreach_norm(q, 1)).sum() - absolute

    def dot_difference(self, g: Vector, z: Vector, y: Vector) -> Tensor:
        return self.dot(g, list(torch._foreach_sub(z, y)))

    def adam(self, g: Vector, v: Vector, k: Tensor, beta2: float, eps: float) -> Vector:
        d = torch._foreach_mul(v, beta2)
        torch._foreach_addcmul_(d, g, g, value=1 - beta2)
        torch._foreach_div_(d, (1 - beta2**k).to(d[0].dtype))
        torch._foreach_sqrt_(d)
        torch._foreach_add_(d, eps)
        return list(torch._foreach_div(g, d))

    def lerp(self, a: Vector, b: Vector, w: Tensor) -> None:
        b = list(torch._foreach_mul(b, w))
        torch._foreach_mul_(a, 1 - w)  # a + w (b - a) would not be exact at w = 1
        torch._foreach_add_(a, b)

    def add(self, a: Vector, w: Tensor, b: Vector) -> None:
        torch._foreach_add_(a, torch._foreach_mul(b, w))

    def momentum(self, g: Vector) -> Vector:
        return [torch.zeros_like(q) for q in g]
