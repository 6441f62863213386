"""The few vector operations of a step, twice: as the papers write them, and fast.

Both classes work on lists of tensors with 0-dim tensors as scalars, so that nothing is read back to
the host. ``ok`` is 1 where the step may be taken and 0 where a loss or a gradient was not finite:
then nothing changes, whatever the gradient holds. :class:`Plain` is the oracle of :class:`Fast`; it
is also what ``torch.compile`` sees, which fuses plain operations best.
"""

from __future__ import annotations

import torch
from torch import Tensor

Vector = list[Tensor]


class Plain:
    """One tensor at a time."""

    @staticmethod
    def dot(a: Vector, b: Vector) -> Tensor:
        """<a, b>."""
        return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()

    @staticmethod
    def adam_norm2(g: Vector, v: Vector, k: Tensor, beta2: float, eps: float) -> Tensor:
        """<g, D^-1 g> with the metric of :func:`adam`; ``v`` is read only."""
        return Plain.dot(g, Plain.adam(g, v, k, beta2, eps))

    @staticmethod
    def adam(g: Vector, v: Vector, k: Tensor, beta2: float, eps: float) -> Vector:
        """D^-1 g,  D = diag(sqrt(v' / (1 - beta2^k)) + eps),  v' = beta2 v + (1 - beta2) g^2."""
        second = [beta2 * q + (1 - beta2) * p * p for p, q in zip(g, v, strict=True)]
        return [p / ((q / (1 - beta2**k)).sqrt() + eps) for p, q in zip(g, second, strict=True)]

    @staticmethod
    def lerp(a: Vector, b: Vector, w: Tensor) -> None:
        """a <- a + w (b - a)."""
        for p, q in zip(a, b, strict=True):
            p.lerp_(q, w)

    @staticmethod
    def add(a: Vector, w: Tensor, b: Vector) -> None:
        """a <- a + w b."""
        for p, q in zip(a, b, strict=True):
            p.addcmul_(q, w)

    @staticmethod
    def descend(z: Vector, g: Vector, step: Tensor, ok: Tensor) -> None:
        """z <- z - step g."""
        for p, q in zip(z, g, strict=True):
            p.copy_(torch.where(ok > 0, p - step * q, p))

    @staticmethod
    def adam_descend(
        z: Vector,
        g: Vector,
        v: Vector,
        k: Tensor,
        step: Tensor,
        ok: Tensor,
        beta2: float,
        eps: float,
    ) -> None:
        """z <- z - step D^-1 g  and  v <- v'."""
        Plain.descend(z, Plain.adam(g, v, k, beta2, eps), step, ok)
        for p, q in zip(v, g, strict=True):
            p.copy_(torch.where(ok > 0, beta2 * p + (1 - beta2) * q * q, p))


class Fast(Plain):
    """List kernels; on the CPU every list is one flat piece that stays in the cache."""

    @staticmethod
    def dot(a: Vector, b: Vector) -> Tensor:
        if a[0].device.type == "cpu":
            return torch.stack([torch.dot(p, q) for p, q in zip(a, b, strict=True)]).sum()
        # No list kernel sums with signs, but norms do without: sum q = 2 |max(q, 0)|_1 - |q|_1.
        q = torch._foreach_mul(a, b)
        absolute = torch.stack(torch._foreach_norm(q, 1)).sum()
        torch._foreach_clamp_min_(q, 0.0)
        return 2 * torch.stack(torch._foreach_norm(q, 1)).sum() - absolute

    @staticmethod
    def adam_norm2(g: Vector, v: Vector, k: Tensor, beta2: float, eps: float) -> Tensor:
        # sqrt(v' / b) + eps = (sqrt(v') + eps sqrt(b)) / sqrt(b): the last division on the sum
        root = (1 - beta2**k).sqrt().to(v[0].dtype)
        d = torch._foreach_mul(v, beta2)
        torch._foreach_addcmul_(d, g, g, value=1 - beta2)
        torch._foreach_sqrt_(d)
        torch._foreach_add_(d, eps * root, alpha=1)  # without alpha it would read the scalar
        return Fast.dot(g, list(torch._foreach_div(g, d))) * root

    @staticmethod
    def lerp(a: Vector, b: Vector, w: Tensor) -> None:
        if a[0].device.type == "cpu":
            return Plain.lerp(a, b, w)
        d = torch._foreach_sub(b, a)
        torch._foreach_mul_(d, w)
        torch._foreach_add_(a, d)

    @staticmethod
    def add(a: Vector, w: Tensor, b: Vector) -> None:
        if a[0].device.type == "cpu":
            return Plain.add(a, w, b)
        torch._foreach_add_(a, torch._foreach_mul(b, w))

    @staticmethod
    def descend(z: Vector, g: Vector, step: Tensor, ok: Tensor) -> None:
        del ok  # the step is 0 then, and 0 times what nan_to_num leaves is 0
        Fast.add(z, -step, [torch.nan_to_num(q, 0.0, 0.0, 0.0) for q in g])

    @staticmethod
    def adam_descend(
        z: Vector,
        g: Vector,
        v: Vector,
        k: Tensor,
        step: Tensor,
        ok: Tensor,
        beta2: float,
        eps: float,
    ) -> None:
        if z[0].device.type not in ("cpu", "cuda"):
            return Plain.adam_descend(z, g, v, k, step, ok, beta2, eps)
        # torch's own Adam kernel without its momentum is this very update in one pass, and its
        # ``found_inf`` is a skip that the host need not know of.
        momentum = list(torch._foreach_mul(v, 0.0))
        torch._fused_adam_(
            z, g, momentum, v, [], [k.float()] * len(z),
            lr=step if step.device.type == "cpu" else step.float(),
            beta1=0.0, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
            grad_scale=None, found_inf=1 - ok.float(),
        )  # fmt: skip
