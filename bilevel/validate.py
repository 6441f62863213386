"""The first look at a problem: every misuse that can be seen is told before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bilevel.compare import are_apart, beside, length
from bilevel.layout import Layout, leaves
from bilevel.problem import Draw, Oracle
from bilevel.require import is_told, shown

T = TypeVar("T")

OTHER = 0.02  # share by which a loss may change otherwise than its gradient says
EXACT = 1e-6  # precision, or better, in which that can be told
# what a loss raises that is defined at the start, and not beside it
ELSEWHERE = (ValueError, ArithmeticError, AssertionError, torch.linalg.LinAlgError)


def describe(value: Any) -> str:
    """A batch in words: ``(Tensor(64, 784) float32, Tensor(64) int64)``."""
    if isinstance(value, Tensor) and value.is_nested:  # which may not tell its shape
        return f"nested Tensor of {value.size(0)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"Tensor{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{where}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        parts = ", ".join(describe(v) for v in value[:8]) + (", ..." if len(value) > 8 else "")
        return f"({parts})" if isinstance(value, tuple) else f"[{parts}]"
    return type(value).__name__ if isinstance(value, nn.Module) else shown(value)


def _variable(layout: Layout, tree: bool = False) -> str:
    """x or y in words; ``tree``: a Module as the dict of its parameters."""
    if layout.module is not None and not tree:
        return f"{layout.name} = {type(layout.module).__name__}"
    leaves = zip(layout.paths, layout.shapes, layout.dtypes, strict=True)
    parts = (f"{p} {tuple(s)} {str(d).removeprefix('torch.')}" for p, s, d in leaves)
    return f"{layout.name} = {', '.join(parts)}"


def _enriched(what: str, given: Sequence[str], call: Callable[[], T]) -> T:
    """``call()``, whose exceptions come back with what ``what``, a loss, was given."""
    try:
        return call()
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if is_told(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{what} raised {type(error).__name__}: {error} -- it was called with "
            f"{'; '.join(given)}. Check the shapes, types and devices that it expects."
        ) from error


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether the numbers are the same, of which NaN is one."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _refuse_statistics(
    oracle: Oracle, level: str, x: Tensor, y: Tensor, draw: Draw, given: Sequence[str]
) -> None:
    """Buffers that a loss changes would change at every trial of a line search."""
    held = [
        (f"{layout.name}.{path}{'.' * bool(path)}{name}", module, name, buffer)
        for layout in (oracle.x, oracle.y)
        if layout.module is not None
        for path, module in layout.module.named_modules()
        for name, buffer in module._buffers.items()  # of which some may be None as yet
    ]
    if not held:
        return
    copies = [None if buffer is None else buffer.clone() for *_, buffer in held]
    changed = []
    try:
        _enriched(f"the {level} loss", given, lambda: oracle.value(level, x, y, draw))
    finally:
        with torch.no_grad():
            for (said, module, name, buffer), before in zip(held, copies, strict=True):
                same = getattr(module, name) is buffer
                if same and (buffer is None or before is None or _same(buffer, before)):
                    continue
                changed.append(said)
                if buffer is not None and before is not None:
                    buffer.copy_(before)
                setattr(module, name, buffer)
    if changed:
        raise ValueError(
            f"the {level} loss changes the buffers {', '.join(changed)} (running statistics of a "
            f"normalisation layer?), and every trial of a step would change them again; call "
            f".eval() on that layer, give it track_running_stats=False, or use GroupNorm or "
            f"LayerNorm."
        )


def _compare(
    oracle: Oracle, level: str, x: Tensor, y: Tensor, draw: Draw, known: tuple[Tensor, Tensor]
) -> None:
    """See that searches compare values of the very loss that gradients belong to, which is
    ``known``, with its gradient in y, where both x and y require one: at y = 0 the loss may show
    nothing of its random numbers, but its gradient does."""
    value, gy = known

    def differ() -> bool:
        gradients = oracle.outer_gradients if level == "outer" else oracle.inner_gradient
        again, *_, other = gradients(x, y, draw)
        values = (again, oracle.value(level, x, y, draw))
        # near y*(x) the parts of a gradient cancel, of which the loss tells the size
        size = torch.maximum(torch.linalg.vector_norm(gy), value.abs())
        pairs = [(other, gy, size), *((number, value, value.abs()) for number in values)]
        return any(are_apart(*pair) for pair in pairs)

    if differ():  # it may ask what requires gradients; then it is to be asked so every time
        oracle.problem.habit.recorded = True
        if differ():
            raise ValueError(
                f"the {level} loss differs from one evaluation to the next, of the same x, y and "
                f"batch, so that no two trials of a step can be compared; draw its random numbers "
                f"from torch's global generators, whose state is replayed, not from random, NumPy "
                f"or a torch.Generator of its own; and let it change nothing that it is given or "
                f"remembers."
            )


def _versions(batch: Any) -> list[tuple[str, Tensor, int]]:
    """The tensors of a batch, each with how often it has been changed in place."""
    tensors = [(path, leaf) for path, leaf in leaves(batch, "batch") if isinstance(leaf, Tensor)]
    # those of torch.inference_mode() do not count
    return [(path, leaf, leaf._version) for path, leaf in tensors if not leaf.is_inference()]


def _refuse_changes(level: str, before: list[tuple[str, Tensor, int]]) -> None:
    """A loss that changes its batch in place finds another one at every trial, and so does its
    owner."""
    changed = [path for path, leaf, version in before if leaf._version != version]
    if changed:
        raise ValueError(
            f"the {level} loss changes {', '.join(changed)} in place, which is the data itself, so "
            f"that each evaluation sees another one (it has been changed by now: load it anew); "
            f"write batch = batch / 255 instead of batch /= 255 or batch.div_(255), say."
        )


def _seen(oracle: Oracle, level: str, x: Tensor, y: Tensor, draw: Draw) -> tuple[str, float] | None:
    """How much a loss changes along its gradient in y, or in x, over what the gradient says; None:
    just that.

    The central difference along the gradient, over its square, is 1; where it is another number,
    and the same at half of the distance, it is another function that was differentiated.
    """
    eps = torch.finfo(y.dtype).eps
    if eps > EXACT:
        return None
    lengths = {"y": length(y)}
    y = beside(y)
    if oracle.problem.project is None:  # otherwise x may have to be where it is
        lengths["x"] = length(x)
        x = beside(x)
    gradients = oracle.outer_gradients if level == "outer" else oracle.inner_gradients
    value, gx, gy = gradients(x, y, draw)
    ways = {"y": (torch.zeros_like(x), gy), "x": (gx, torch.zeros_like(y))}

    def said(name: str, t: Tensor, norm: Tensor) -> float:
        dx, dy = (part / norm for part in ways[name])
        there, back = (oracle.value(level, x + s * dx, y + s * dy, draw) for s in (t, -t))
        return float((there - back) / (2 * t * norm))

    for name, t in lengths.items():
        norm = torch.linalg.vector_norm(torch.cat(ways[name]))
        if not (value.isfinite() and norm.isfinite() and norm > 0):
            continue
        t = torch.maximum(t, 1024 * eps * value.abs() / norm)  # far enough for its rounding
        far, near = said(name, t, norm), said(name, t / 2, norm)
        off = abs(near - 1)
        if off > OTHER and abs(far - near) < off / 10:
            return name, near
    return None


def _tell_hidden(oracle: Oracle, level: str, x: Tensor, y: Tensor, draw: Draw) -> None:
    """Warn where a loss does not change as its gradient says, since a part of it is detached."""
    try:
        seen = _seen(oracle, level, x, y, draw)
    except ELSEWHERE:
        return
    if seen is not None:
        name, share = seen
        warnings.warn(
            f"along its gradient in {name} the {level} loss changes {share:.2f} times as much as "
            f"the gradient says: a part of it is hidden from autograd, by detach(), no_grad(), "
            f".data, an argmax or a straight-through estimator? Line searches compare values, and "
            f"find next to no step where these and gradients disagree. Let gradients through all "
            f"of the loss, or fix the steps by method=bilevel.fixed(...).",
            RuntimeWarning,
            stacklevel=4,
        )


class NotFinite(ValueError):
    """A loss that is NaN or inf where a run begins."""


def validated(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    outer_batch: Any,
    inner_batch: Any,
    given: str = "{}_data",
    searches: bool = False,
) -> Tensor:
    """A feasible x, after a few evaluations of both losses and their gradients.

    ``given`` names, for messages, the argument that the batch of a level comes from; ``searches``:
    whether steps are searched, for which a loss has to change as its gradient says.

    Raises:
        TypeError, ValueError: a loss that cannot be called, is not a finite scalar, does not
            depend on what it must, or changes buffers; a projection that gives no such x.
    """
    for name, vector in (("x", x), ("y", y)):
        if not vector.isfinite().all():
            raise ValueError(
                f"{name} holds numbers that are not finite (NaN or inf); choose a finite start."
            )
    if oracle.problem.project is not None:
        free = x
        alone = [f"{_variable(oracle.x, tree=True)}, and nothing else"]
        x = _enriched("project", alone, lambda: oracle.project(free))
        if not x.isfinite().all():
            raise ValueError(
                "project(x) holds numbers that are not finite (NaN or inf), though the x that it "
                "was given is finite; return a feasible x of finite numbers."
            )
    shared = set(map(id, _parameters(oracle.x.module))) & set(map(id, _parameters(oracle.y.module)))
    if shared:
        raise ValueError(
            f"x and y share {len(shared)} parameters, but each parameter can belong to one level "
            f"only; freeze them in one of the two Modules, or copy the Module."
        )
    for level, batch in (("outer", outer_batch), ("inner", inner_batch)):
        draw = Draw(batch)
        said = f"batch = {describe(batch)}"
        if batch is None:
            said = f"no batch, since {given.format(level)} is None"
        called = [_variable(oracle.x), _variable(oracle.y), said]
        before = _versions(batch)
        _refuse_statistics(oracle, level, x, y, draw, called)
        look = partial(oracle.dependence, level, x, y, draw)
        value, gradients = _enriched(f"the {level} loss", called, look)
        _refuse_changes(level, before)
        if not torch.isfinite(value):
            raise NotFinite(
                f"the {level} loss is {float(value)} at the start; choose a start (or a batch) "
                f"where it is finite."
            )
        for name, gradient in zip("xy", gradients, strict=True):
            if gradient is None and not (level == "outer" and name == "x"):
                raise ValueError(
                    f"the {level} loss does not depend on {name}"
                    + (
                        " (y* would be the same for every x)"
                        if (level, name) == ("inner", "x")
                        else ""
                    )
                    + f": no gradient flows back to it; look for detach(), no_grad(), .item() or "
                    f"an argument that {level}(x, y) does not use."
                )
        if searches:
            assert gradients[1] is not None
            _compare(oracle, level, x, y, draw, (value, gradients[1]))
            _tell_hidden(oracle, level, x, y, draw)
    return x


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else [p for p in module.parameters() if p.requires_grad]
