"""Functions of numbers that serve tensors alike: a formula of them is one for an iteration as it
stands and for that in a graph, where nothing may look at the host."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b; both are computed."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def clamp(value: Any, least: float = -math.inf, most: float = math.inf) -> Any:
    """The number between ``least`` and ``most`` that is nearest to it."""
    if isinstance(value, Tensor):
        return value.clamp(least, most)
    return min(max(value, least), most)


def is_finite(value: Any) -> Any:
    return value.isfinite() if isinstance(value, Tensor) else math.isfinite(value)


def power_of_two(value: Any) -> Any:
    """The one nearest to it, in logarithms."""
    if isinstance(value, Tensor):
        return value.log2().round().exp2()
    return 2.0 ** round(math.log2(value))
