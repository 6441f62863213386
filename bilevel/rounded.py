"""Losses whose kinks are rounded off: |z| as sqrt(z^2 + eps^2), and so all that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Dims = int | Sequence[int] | None


class Seen(TorchFunctionMode):
    """A mode that leaves kinks as they are.

    Attributes:
        kinks: z of each |z| that a loss comes to, in their order, shape (..., m): of vectors of m
            numbers, or of numbers, m = 1; None where it requires no gradient.
        values: of the function that each belongs to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinks: list[Tensor | None] = []
        self.values: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if rule := _rule(func, args, kwargs):
            with suppress(Exception):  # of other arguments, of which the function itself may tell
                rule(self._size, *args, **kwargs)
        value = func(*args, **kwargs)
        self.values += [value] * (len(self.kinks) - len(self.values))
        return value

    def _size(self, z: Tensor, dims: Sequence[int] = ()) -> None:
        last = range(-len(dims), 0)
        rows = z.detach().movedim(tuple(dims), tuple(last)) if dims else z.detach()[..., None]
        self.kinks.append(rows.flatten(-max(len(dims), 1)) if z.requires_grad else None)


class Rounded(TorchFunctionMode):
    """A mode in which |z| is sqrt(z^2 + eps^2), also the length of vectors z.

    Args:
        widths: eps of each kink, in the order in which a loss comes to them; 0, or none, leaves it
            sharp.
    """

    def __init__(self, widths: Sequence[float]) -> None:
        super().__init__()
        self._widths, self._rounds = iter(widths), False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        value, self._rounds = None, False
        if rule := _rule(func, args, kwargs):
            with suppress(TypeError):  # of arguments that it does not know
                value = rule(self._size, *args, **kwargs)
        return func(*args, **kwargs) if value is None or not self._rounds else value

    def _size(self, z: Tensor, dims: Sequence[int] = ()) -> Tensor | None:
        eps = next(self._widths, 0.0)
        if not eps:
            return None
        self._rounds = True
        square = z.square().sum(tuple(dims), keepdim=True) if dims else z.square()
        return (square + eps**2).sqrt()


def rounded(loss: Callable[..., Tensor], widths: Sequence[float]) -> Callable[..., Tensor]:
    """The loss with its kinks rounded off, see :class:`Rounded`."""
    if not widths:
        return loss

    def evaluate(*args: Any) -> Tensor:
        with Rounded(widths):
            return loss(*args)

    return evaluate


# what takes the place of |z|, of vectors in some dimensions, which are kept; None: nothing does
Size = Callable[..., Tensor | None]


def _above(size: Size, a: Any, b: Any) -> Tensor:
    """max(a, b)."""
    z = size(a - b)
    return torch.clamp(a, min=b) if z is None else (a + b + z) / 2


def _below(size: Size, a: Any, b: Any) -> Tensor:
    """min(a, b)."""
    z = size(a - b)
    return torch.clamp(a, max=b) if z is None else (a + b - z) / 2


def _abs(size: Size, input: Tensor) -> Tensor | None:
    return size(input)


def _relu(size: Size, input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else _above(size, input, 0.0)


def _leaky_relu(
    size: Size, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor | None:
    a = negative_slope
    z = None if inplace else size(input)
    return None if z is None else ((1 + a) * input + (1 - a) * z) / 2


def _maximum(size: Size, input: Tensor, other: Any = None, **others: Any) -> Tensor | None:
    binary = isinstance(other, Tensor) and not others  # not over a dimension
    return _above(size, input, other) if binary else None


def _minimum(size: Size, input: Tensor, other: Any = None, **others: Any) -> Tensor | None:
    binary = isinstance(other, Tensor) and not others
    return _below(size, input, other) if binary else None


def _clamp(size: Size, input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    value = input if min is None else _above(size, input, min)
    return value if max is None else _below(size, value, max)


def _clamp_max(size: Size, input: Tensor, max: Any) -> Tensor:
    return _below(size, input, max)


def _l1_loss(
    size: Size, input: Tensor, target: Tensor, *more: Any, reduction: str = "mean", **others: Any
) -> Tensor | None:
    each = None if _given(more, others) else size(input - target)
    if each is None or reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()


def _norm(
    size: Size,
    input: Tensor,
    p: Any = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    **others: Any,
) -> Tensor | None:
    """A sum of absolute values, or the length of vectors."""
    if p not in (1, 2, "fro") or _given((), others):
        return None
    if dim is None or dim == ():
        dim = range(input.dim())
    several = (dim,) if isinstance(dim, int) else dim
    dims = tuple(d % max(input.dim(), 1) for d in several)
    each = size(input) if p == 1 else size(input, dims)
    if each is None:
        return None
    return each.sum(dims, keepdim=keepdim) if p == 1 or not keepdim else each


def _vector_norm(
    size: Size,
    x: Tensor,
    ord: Any = 2,
    dim: Dims = None,
    keepdim: bool = False,
    **others: Any,
) -> Tensor | None:
    return _norm(size, x, ord, dim, keepdim, **others)


def _linalg_norm(
    size: Size,
    A: Tensor,
    ord: Any = None,
    dim: Dims = None,
    keepdim: bool = False,
    **others: Any,
) -> Tensor | None:
    """Not of matrices, whose norms of these names are others."""
    if isinstance(dim, int):
        dim = (dim,)
    vectors = ord is None or (A.dim() if dim is None else len(dim)) == 1
    p = 2 if ord is None else ord
    return _norm(size, A, p, dim, keepdim, **others) if vectors else None


def _given(args: Sequence[Any], others: dict[str, Any]) -> list[Any]:
    """Arguments that are other than by default."""
    return [
        value for value in (*args, *others.values()) if value is not None and value is not False
    ]


# by the names of torch's functions, however they are called
RULES: dict[str, Callable[..., Tensor | None]] = {
    "abs": _abs,
    "absolute": _abs,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "maximum": _maximum,
    "fmax": _maximum,
    "max": _maximum,
    "minimum": _minimum,
    "fmin": _minimum,
    "min": _minimum,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp_max,
    "l1_loss": _l1_loss,
    "norm": _norm,
    "linalg_norm": _linalg_norm,
    "linalg_vector_norm": _vector_norm,
}


def _rule(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Tensor | None] | None:
    """Of one of torch's functions of real numbers."""
    rule = RULES.get(getattr(func, "__name__", ""))
    if rule is None:
        return None
    first = next(iter((*args, *kwargs.values())), None)
    return rule if isinstance(first, Tensor) and first.is_floating_point() else None
