"""Kinks of g, of an absolute value, a hinge, a rectifier: where they are to be rounded off, and
where y has stopped at one all the same."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import grad

from bilevel.compare import everywhere
from bilevel.distributed import Ranks
from bilevel.hypergradients import FiniteDifference
from bilevel.problem import Draw, Oracle, Products
from bilevel.randomness import all_generators, restore_generators
from bilevel.record import Record
from bilevel.rounded import Seen
from bilevel.rules import Armijo
from bilevel.secants import Secants
from bilevel.state import State

if TYPE_CHECKING:
    from bilevel.method import Method

FIRST = 3  # iteration that looks; before, y is on its way from where it began
LAST = 20  # the last one that does
UNSEEN = 0.5  # share of the change of g_y along y's way that g_yy is not to miss
SHARE = 0.03  # of the mean |z| of a kink, over which it is rounded off
GROSS = 30  # times the median, which the mean is to be at most
EVERY = 50  # iterations, after which that is halved,
MOST = 5  # times at most
FEWEST = 10  # iterations, before which nothing has stopped
SHORTER = 8  # times shorter than the longest are steps that have
FARTHER = 8  # times as far is each look as the one before it
JUMPS = 0.2  # share of itself by which the slope changes where a search notices
SMOOTH = 0.02  # share by which g_yy says that it does where it hardly changes


def found(oracle: Oracle, state: State, y: Tensor, draw: Draw) -> tuple[float, ...] | None:
    """Over which widths the kinks of g are to be rounded off from now on, see
    :class:`bilevel.rounded.Rounded`; (): they are not; None: not known yet.

    Gradient steps stop at a kink, and second derivatives do not see it, so that hypergradients are
    of another problem. Where kinks are passed on the way that the inner steps have come, or as far
    along -g_y as g_yy says that g falls, and g_yy misses half of the change of g_y on it, all those
    that have both sides are rounded off, over ``SHARE`` of their scale. They are those of the loss
    itself: a network may have its rectifiers. A loss that does not bear it keeps its own.

    Args:
        y: the end of the inner steps, at the x of the state.   draw: one of the hypergradient's.
    """
    x, start = state.vectors
    if 0 < state.k < FIRST:
        return None
    here = _own(oracle, x, y, draw)
    if not any(z is not None for z in here):
        return ()
    if state.k == 0:
        return None
    pull = oracle.record(x, y, draw)
    for other in (start, _lowest(pull, y)):
        both = _together(here, _seen(oracle, x, other, draw))
        if any(map(_passed, both)) and _misses(oracle, pull, x, other, y, draw):
            widths = tuple(SHARE * _scale(z[0]) if _two_sided(z) else 0.0 for z in both)
            if any(widths):
                return widths if _bears(oracle, x, other, y, draw, widths) else ()
    return () if state.k >= LAST else None


def sharper(widths: tuple[float, ...], k: int) -> tuple[float, ...]:
    """The widths after iteration k: they are halved now and then, so that the problem comes near
    the one that was given."""
    halved = k % EVERY == 0 and k <= MOST * EVERY
    return tuple(eps / 2 for eps in widths) if halved else widths


def rounded_off(state: State, widths: tuple[float, ...] | None) -> State:
    """The state with these widths: without what belongs to the g before, if that was another."""
    if not widths:
        return replace(state, kinks=widths)
    if state.kinks:  # about the same g
        return replace(state, kinks=widths, secants=Secants())
    fresh = State(state.layouts, state.vectors, kinks=widths, solver=state.solver)
    kept = ("k", "cost", "seconds", "noise", "agreement")
    fresh = replace(fresh, **{name: getattr(state, name) for name in kept})
    return replace(fresh, failures=min(state.failures, 1))  # failed since g had kinks


def _seen(oracle: Oracle, x: Tensor, y: Tensor, draw: Draw) -> list[Tensor | None]:
    """z of each kink."""
    with Seen() as seen, torch.enable_grad():
        oracle.look("inner", x.detach(), y.detach().requires_grad_(), draw)
    return seen.kinks


def _own(oracle: Oracle, x: Tensor, y: Tensor, draw: Draw) -> list[Tensor | None]:
    """The same of the kinks of the loss itself, in whose values it is affine; None of others."""
    y = y.detach().requires_grad_()
    with Seen() as seen, torch.enable_grad():
        loss = oracle.look("inner", x.detach(), y, draw)

    of_y = [value for z, value in zip(seen.kinks, seen.values, strict=True) if z is not None]
    try:
        with oracle.bound(x, y):
            slopes = grad(loss, of_y, create_graph=True, allow_unused=True) if of_y else ()
            own = iter([_is_fixed(slope, y) for slope in slopes])
    except RuntimeError:  # there may be no second derivative
        own = iter([False] * len(of_y))
    return [z if z is not None and next(own) else None for z in seen.kinks]


def _is_fixed(slope: Tensor | None, y: Tensor) -> bool:
    """Whether the derivative of a loss in one of its parts is the same for all y nearby."""
    if slope is None or not slope.requires_grad:
        return slope is not None
    along = everywhere(slope).view_as(slope)
    (bend,) = grad(slope, (y,), along, retain_graph=True, allow_unused=True)
    return bend is None or not bool(bend.any())


def _lowest(pull: Products, y: Tensor) -> Tensor:
    """y - t g_y, to where g is lowest along -g_y if g_yy is right."""
    gy = pull.gradient
    bend = torch.dot(gy, pull.product(gy)).abs()
    return y - torch.where(bend > 0, torch.dot(gy, gy) / bend, 0.0) * gy


def _together(here: list[Tensor | None], there: list[Tensor | None]) -> list[Tensor]:
    """z of each kink at two points, shape (2, ...): of numbers themselves, of vectors the lengths,
    the second one below 0 where they have turned. Nothing of those that y does not enter, or of a
    loss that comes to others there."""

    def both(a: Tensor | None, b: Tensor | None) -> Tensor:
        if a is None or b is None:
            return torch.zeros(2, 0)
        z = torch.stack([a, b])
        if z.shape[-1] == 1:
            return z[..., 0]
        lengths = torch.linalg.vector_norm(z, dim=-1)
        return torch.stack([lengths[0], lengths[1] * (z[0] * z[1]).sum(-1).sign()])

    try:
        return [both(a, b) for a, b in zip(here, there, strict=True)]
    except (ValueError, RuntimeError):
        return []


def _passed(z: Tensor) -> bool:
    return bool(((z[0] > 0) != (z[1] > 0)).any())


def _two_sided(z: Tensor) -> bool:
    return bool((z > 0).any() and (z <= 0).any())


def _scale(z: Tensor) -> float:
    """The mean |z|, of which gross outliers are not to be the most."""
    sizes = z.abs().flatten().double()
    return min(float(sizes.mean()), GROSS * float(sizes[sizes > 0].median()))


def _misses(
    oracle: Oracle, pull: Products, x: Tensor, start: Tensor, y: Tensor, draw: Draw
) -> bool:
    change = pull.gradient - oracle.inner_gradient(x, start, draw)[1]
    missed = change - pull.product(y - start)
    return bool(torch.linalg.vector_norm(missed) > UNSEEN * torch.linalg.vector_norm(change))


def _bears(
    oracle: Oracle, x: Tensor, start: Tensor, y: Tensor, draw: Draw, widths: tuple[float, ...]
) -> bool:
    """Whether the loss is itself where all widths are 0, which it is not if it calls what loses an
    argument on the way through a mode (the weight of F.l1_loss, in torch 2.13), and has second
    derivatives where they are not: one whose graph is made again on the way back has others."""
    sharp, rounded = (
        Oracle(oracle.problem, oracle.x, oracle.y, eps) for eps in ([0.0] * len(widths), widths)
    )
    sharp.cost = rounded.cost = oracle.cost
    try:
        if not torch.equal(*(o.value("inner", x, y, draw) for o in (oracle, sharp))):
            return False
        pull = rounded.record(x, y, draw)
        parts = pull.value.view(1), pull.gradient, *pull.both(y - start)
        return bool(torch.cat(parts).isfinite().all())
    except Exception:
        return False


def tell_rounded(state: State) -> None:
    """Warn where kinks of g were rounded off."""
    if state.kinks:
        widths = ", ".join(f"{eps:.2g}" for eps in sorted(set(state.kinks)) if eps)
        warnings.warn(
            f"the inner loss has kinks that its second derivatives do not see, of an absolute "
            f"value, a hinge or the like, and y stops at them: they were rounded off, |z| as "
            f"sqrt(z**2 + eps**2) with eps = {widths}, and y is the minimum of that. To have other "
            f"eps, round them off in the loss; to leave them, pass "
            f"method=dataclasses.replace(bilevel.bisls(), rounds=False).",
            RuntimeWarning,
            stacklevel=3,
        )


def tell(
    method: Method, oracle: Oracle, state: State, draw: Draw, history: list[Record], ranks: Ranks
) -> None:
    """Warn where inner searches have come to nothing since y is at a kink of g."""
    if state.kinks:
        return
    searches = isinstance(method.inner_rule, Armijo) and method.inner_solver is None
    differentiates = not isinstance(method.hypergradient, FiniteDifference)
    step = state.inner_last
    trained = state.training.last is not None  # by steps of another scale
    if trained or not (searches and differentiates and step and shrank(history)):
        return
    longest = max(record.inner_step for record in history)
    device = state.vectors[1].device
    random = all_generators(device)  # to be left as the run has left them
    try:
        stopped = at_kink(oracle, *state.vectors, draw, step, longest)
    except Exception as error:  # of a loss: nothing that only warns is to end a run
        if ranks.parted(error):
            raise
        return
    finally:
        restore_generators(random, device)
    if stopped:
        warnings.warn(
            f"y stopped at a kink of g: inner steps fell from {longest:.1g} to {step:.1g}, since "
            f"g_y jumps where second derivatives say that it hardly changes. y may be far from its "
            f"minimum, and the hypergradient off. Round the kink off, over a few hundredths of its "
            f"scale: (z**2 + 1e-3).sqrt() for |z|, F.softplus(z, beta=30) for a hinge relu(z); in "
            f"a network, tanh or softplus instead of ReLU, if x gets nowhere.",
            RuntimeWarning,
            stacklevel=3,
        )


def shrank(history: list[Record]) -> bool:
    """Whether the median of the last quarter of the inner steps is ``SHORTER`` times shorter than
    the longest one, in a run of ``FEWEST`` iterations at least."""
    late = sorted(record.inner_step for record in history[3 * len(history) // 4 :])
    longest = max((record.inner_step for record in history), default=0.0)
    return len(history) >= FEWEST and SHORTER * late[len(late) // 2] < longest


def at_kink(oracle: Oracle, x: Tensor, y: Tensor, draw: Draw, step: float, longest: float) -> bool:
    """Whether, along an inner step of a length between these, g_y jumps where g_yy says that it
    hardly changes.

    Where g is smooth, an Armijo step ends about where the slope has changed by its own size, as
    <g_y, g_yy g_y> says; at a kink that says next to nothing. One product, a gradient for each
    eightfold.
    """
    pull = oracle.record(x, y, draw)
    gy = pull.gradient
    slope = torch.dot(gy, gy)
    bend = torch.dot(gy, pull.product(gy)).abs()
    while 0 < step <= longest and step * bend <= SMOOTH * slope:
        there = oracle.inner_gradient(x, y - step * gy, draw)[1]
        if torch.dot(gy, gy - there) >= JUMPS * slope > 0:
            return True
        step *= FARTHER
    return False
