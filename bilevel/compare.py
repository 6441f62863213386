"""Whether two evaluations tell the same: at a point where nothing cancels, and but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 0.01  # size of a loss below which differences are rounding as of this one
BESIDE = 8  # times as far as a central difference is long: off the kinks of zeros


def everywhere(like: Tensor) -> Tensor:
    """A vector of length 1 that has every coordinate, of no pattern."""
    v = torch.arange(like.numel(), dtype=torch.float64, device=like.device).square().cos().to(like)
    return v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)


def length(v: Tensor) -> Tensor:
    """Of a central difference from there."""
    step: Tensor = torch.finfo(v.dtype).eps ** (1 / 3) * (1 + torch.linalg.vector_norm(v))
    return step


def beside(v: Tensor) -> Tensor:
    """A point near v where what zeros hide shows: kinks, and differences between rows."""
    return v + BESIDE * length(v) * everywhere(v)


def are_apart(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Whether two numbers, or vectors, of parts of that size differ by more than rounding."""
    most = torch.finfo(b.dtype).eps ** 0.5 * size.clamp_min(SMALL)
    apart = torch.linalg.vector_norm(a - b)
    return bool(apart.isfinite() & (apart > most))
