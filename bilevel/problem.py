"""The problem  min_x f(x, y*(x)),  y*(x) = argmin_y g(x, y),  and its derivatives on flat vectors.

Letters, here and everywhere: x, f, alpha are the outer (upper) variable, loss and step;
y, g, beta the inner (lower) ones. g_yy is a Hessian block, g_xy u its product with a vector.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel import require
from bilevel.compare import are_apart, everywhere
from bilevel.layout import Bound, Layout, tree_map
from bilevel.randomness import Randomness
from bilevel.require import shown, told
from bilevel.reuse import Habit, Reuse, without_graph
from bilevel.rounded import rounded
from bilevel.stacked import (
    PATIENCE,
    Largest,
    Outliving,
    few_enough,
    mean_of_each,
    stacked,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Two losses, and the feasible set of x.

    Args:
        outer: ``outer(x, y, batch)`` or ``outer(x, y)``, a 0-dim tensor: f.
        inner: ``inner(x, y, batch)`` or ``inner(x, y)``, a 0-dim tensor: g.
        project: maps x (a Module as a dict of its parameters) to the nearest feasible point;
            applied to every point that is tried. None: all of space.
        compile: evaluate through torch.compile; falls back, with a warning.
    """

    outer: Callable[..., Tensor]
    inner: Callable[..., Tensor]
    project: Callable[[Any], Any] | None = None
    compile: bool = False
    # of each loss: whether it takes a batch, None where it may
    batched: dict[str, bool | None] = field(init=False, repr=False, compare=False)
    habit: Habit = field(default_factory=Habit, init=False, repr=False, compare=False)
    # what torch.compile has made of the losses between two layouts
    functions: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("outer", "inner"):
            function = getattr(self, name)
            if not callable(function) or isinstance(function, type):
                raise TypeError(
                    f"{name} is {shown(function)} ({type(function).__name__}), which is no "
                    f"function; pass one such as lambda x, y: ((x - y) ** 2).sum()."
                )
        if self.project is not None:
            require.function("", "project", self.project, "a function of x that returns an x", 1)
        require.flag("", "compile", self.compile)
        losses = (("outer", self.outer), ("inner", self.inner))
        batched = {level: _takes_batch(loss, level) for level, loss in losses}
        object.__setattr__(self, "batched", batched)


@dataclass
class Cost:
    """Evaluations so far. Every gradient and every loss evaluation is one call of a loss."""

    gradients: int = 0
    hessian_products: int = 0  # products with g_yy; the one that also gives g_xy counts once
    loss_evaluations: int = 0


class Draw:
    """One batch together with the randomness of its first evaluation.

    A loss on a draw is one fixed function: dropout repeats its mask in every later evaluation,
    without which phi(t) and phi(0) of a line search would belong to different functions. The
    global generators advance as if each draw had been evaluated once.
    """

    def __init__(self, batch: Any = None, count: int = 1) -> None:
        self.batch = batch
        self.count = count  # batches that its evaluation counts for
        self._before: list[Tensor] | None = None
        self.random = False  # whether its evaluation draws random numbers

    @property
    def draws(self) -> Sequence[Draw]:
        return (self,)

    def evaluate(self, randomness: Randomness, function: Callable[[], Any]) -> Any:
        if self._before is None:
            before = randomness.state()
            try:
                result = function()
            except BaseException:
                randomness.restore(before)  # as if it had never been tried
                raise
            self._before, after = before, randomness.state()
            self.random = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            return result
        if not self.random:
            return function()
        now = randomness.state()
        randomness.restore(self._before)
        try:
            return function()
        finally:
            randomness.restore(now)


class Stacked(Draw):
    """Several batches as one, see :mod:`bilevel.stacked`: the loss is the mean of theirs."""

    def __init__(self, batches: Any, dims: Any, count: int) -> None:
        super().__init__(batches, count)
        self.dims = dims  # of the leaves that are one for each batch

    @classmethod
    def of(cls, draws: Sequence[Draw]) -> Stacked | None:
        """None where they cannot be stacked."""
        found = stacked([draw.batch for draw in draws])
        return None if found is None else cls(*found, len(draws))


class Joint(Draw):
    """Several draws as one: the loss is the mean of theirs."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        super().__init__(count=len(draws))
        self._draws = draws
        # what it is computed on, :class:`Stacked` or these; None: not known yet
        self.parts: Sequence[Draw] | None = None

    @property
    def draws(self) -> Sequence[Draw]:
        return self._draws


class _Pair(nn.Module):
    """x and y, of which at least one is a Module, so that one functional_call binds both."""

    def __init__(self, x: Layout, y: Layout) -> None:
        super().__init__()
        if x.module is not None:
            self.x = x.module
        if y.module is not None:
            self.y = y.module

    def forward(
        self, loss: Callable[..., Tensor], x: Any, y: Any, batch: tuple[Any, ...]
    ) -> Tensor:
        return loss(getattr(self, "x", x), getattr(self, "y", y), *batch)


class Oracle:
    """A problem on flat vectors: values, gradients and recorded second derivatives, counted.

    Gradients use autograd rather than torch.func: one recorded graph serves the products with
    g_yy alone (which need not reach back to x) and the cross term, custom functions and
    checkpointing inside a loss work, and a small problem pays half the dispatch.

    Args:
        x, y: the variables.   widths: over which kinks of g are rounded off, see
            :mod:`bilevel.kinks`.
    """

    may_round = True  # whether kinks of g may be

    def __init__(
        self, problem: Problem, x: Layout, y: Layout, widths: Sequence[float] = ()
    ) -> None:
        if x.device != y.device:
            raise ValueError(
                f"x is on {x.device} and y on {y.device}, but both enter one loss; "
                f"move one of them with .to(device)."
            )
        if y.device.type == "meta":
            raise ValueError(
                "x and y are on meta, where tensors hold no numbers; move them to the CPU or a GPU."
            )
        if y.device.type == "mps":
            raise ValueError(
                "x and y are on mps, which has no float64, and steps are compared in it; move them "
                "to the CPU or a GPU that has."
            )
        if torch.is_autocast_enabled(y.device.type):
            raise ValueError(
                "this was called in torch.autocast, where the vectors of the linear systems would "
                "lose half their digits; enter it inside the losses instead."
            )
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "this was called in torch.inference_mode(), where there are no gradients; leave it."
            )
        if x.dtype != y.dtype:
            raise TypeError(
                f"x is {x.dtype} and y {y.dtype}, but products mix the two; "
                f"convert one of them with .to(dtype)."
            )
        self.problem, self.x, self.y = problem, x, y
        self._losses = {"outer": problem.outer, "inner": rounded(problem.inner, widths)}
        self.cost = Cost()
        self._reuse = {level: Reuse(problem.habit, level) for level in ("outer", "inner")}
        self._randomness = Randomness(y.device)
        self.may_stack = True  # inner batches that are averaged, where the loss bears it
        self._pair = _Pair(x, y) if x.module is not None or y.module is not None else None

    # -- the losses ------------------------------------------------------------------------

    def require_data(
        self,
        outer: Any,
        inner: Any,
        given: str = "{}_data",
        instead: str = "{}_data=[batch] or a DataLoader",
    ) -> None:
        """Refuse a loss that takes a batch where it is given None."""
        for level, data in (("outer", outer), ("inner", inner)):
            if data is None and self.problem.batched[level]:
                raise TypeError(
                    f"the {level} loss takes a batch, but {given.format(level)} is None; pass "
                    f"{instead.format(level)}, or write {level}(x, y)."
                )

    def _batch(self, level: str, draw: Draw) -> tuple[Any, ...]:
        takes = self.problem.batched[level]
        if draw.batch is not None and takes is False:
            raise told(
                TypeError,
                f"the {level} loss was given a batch, but takes none; write {level}(x, y, batch), "
                f"or pass no data for it.",
            )
        return (draw.batch,) if takes or (takes is None and draw.batch is not None) else ()

    def call(self, level: str, x: Tensor, y: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """The loss as a pure function of two vectors and a batch."""
        loss = self._losses[level]
        if self._pair is not None and torch.compiler.is_compiling():
            return self._call_in_graph(loss, x, y, batch)
        with self.bound(x, y):
            X = self.x.unflatten(x) if self.x.module is None else self.x.module
            Y = self.y.unflatten(y) if self.y.module is None else self.y.module
            return loss(X, Y, *batch)

    def _call_in_graph(
        self, loss: Callable[..., Tensor], x: Tensor, y: Tensor, batch: tuple[Any, ...]
    ) -> Tensor:
        """By the only exchange of parameters that the compiler can follow."""
        assert self._pair is not None
        X, Y = self.x.unflatten(x), self.y.unflatten(y)
        parameters = {
            f"{name}.{key}": part
            for name, layout, value in (("x", self.x, X), ("y", self.y, Y))
            if layout.module is not None
            for key, part in value.items()
        }
        return functional_call(self._pair, parameters, (loss, X, Y, batch))

    def bound(self, x: Tensor, y: Tensor) -> AbstractContextManager[Any]:
        """Modules hold this point: while derivatives are taken as well, on the way to which a loss
        that is checkpointed calls them again."""
        if self._pair is None:
            return nullcontext()
        with torch.enable_grad():  # what is done again is to save what was saved before
            return Bound([*self.x.placed(x), *self.y.placed(y)])

    def replayed(self, level: str, draw: Draw, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, of a loss, with the randomness of the draw."""
        value = draw.evaluate(self._randomness, lambda: function(*args))
        if draw.random:
            self.problem.habit.random.add(level)
        return value

    def look(self, level: str, x: Tensor, y: Tensor, draw: Draw) -> Any:
        """What the loss returns on one batch, evaluated anew."""
        self.cost.loss_evaluations += 1
        return self.replayed(level, draw, self.call, level, x, y, self._batch(level, draw))

    def _loss(self, level: str, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        if isinstance(draw, Joint):
            return self._on_parts(level, x, y, draw, partial(self._mean_loss, level, x, y))
        batch = self._batch(level, draw)
        loss: Callable[[], Tensor]
        if isinstance(draw, Stacked):
            each = partial(self._of_one, level, x, y)
            loss = partial(mean_of_each, each, draw.batch, draw.dims)
        else:
            loss = partial(self.call, level, x, y, batch)
        if x.requires_grad:
            value = self.replayed(level, draw, loss)
        else:
            evaluate = self._reuse[level].evaluate
            value = self.replayed(level, draw, evaluate, x, y, draw.batch, loss)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise told(
                TypeError,
                f"the {level} loss returned {got}, but must return a 0-dim tensor; "
                f"reduce it with .mean() or .sum().",
            )
        if value.device != y.device:
            raise told(
                ValueError,
                f"the {level} loss returned a tensor on {value.device}, but x and y are on "
                f"{y.device}; move it there with .to(device).",
            )
        if not value.is_floating_point():
            raise told(
                TypeError,
                f"the {level} loss returned a tensor of {value.dtype}, but must return a "
                f"floating one; compute it from x and y with differentiable functions.",
            )
        return value

    def _of_one(self, level: str, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return self.call(level, x, y, (batch,))

    def _mean_loss(self, level: str, x: Tensor, y: Tensor, draws: Sequence[Draw]) -> Tensor:
        return torch.stack([self._loss(level, x, y, draw) for draw in draws]).mean()

    def _on_parts(
        self,
        level: str,
        x: Tensor,
        y: Tensor,
        draw: Draw,
        function: Callable[[Sequence[Draw]], T],
    ) -> T:
        """``function`` of what the loss is the mean of on a draw: of several batches each, which
        take the dispatch of one; of single ones where the loss does not bear that. So of the inner
        loss, for its products: a value alone takes as long by vmap as of eight batches."""
        if not isinstance(draw, Joint):
            return function([draw])
        if draw.parts is None:
            draw.parts = draw.draws if level == "outer" else self._stacked(x, y, draw.draws)
        if draw.parts is draw.draws:
            return function(draw.draws)
        before = dict(vars(self.cost))
        try:
            return function(draw.parts)
        except Exception:  # what it asks for may depend on x and y; what is wrong, one batch tells
            self.problem.habit.stacks[draw.count] = 1
            draw.parts = draw.draws
            vars(self.cost).update(before)  # others hold it
            return function(draw.draws)

    def _stacked(self, x: Tensor, y: Tensor, draws: Sequence[Draw]) -> Sequence[Draw]:
        habit, m = self.problem.habit, len(draws)
        early = self.cost.hessian_products < PATIENCE
        if early or not self.may_stack or "inner" in habit.random:
            return draws
        if m not in habit.stacks:
            whole = Stacked.of(draws)
            if whole is None:
                return draws
            habit.stacks[m] = self._as_one(x, y, whole, draws)
        size = habit.stacks[m]
        if size == 1:
            return draws
        groups = [Stacked.of(draws[i : i + size]) for i in range(0, m, size)]
        found = [group for group in groups if group is not None]
        return found if len(found) == len(groups) else draws

    def _as_one(self, x: Tensor, y: Tensor, whole: Stacked, draws: Sequence[Draw]) -> int:
        """How many of the batches are to be evaluated as one: so many that it is faster; 1 where
        the loss does not bear it."""
        cost, self.cost = self.cost, Cost()  # a first look, no work of the run
        x, y = x.detach(), y.detach()

        def value(draw: Draw) -> None:
            with torch.enable_grad():  # there may be hooks where there is a graph
                self._loss("inner", x.clone().requires_grad_(), y.clone().requires_grad_(), draw)

        def derivatives(draw: Draw) -> Tensor:
            loss, gx, gy = self.inner_gradients(x, y, draw)
            pull = self.record(x, y, draw)
            u, d = everywhere(y), everywhere(x)
            return torch.cat([loss.view(1), gx, gy, *pull.both(u), pull.forward(d)])

        try:
            # plainly first: what it keeps of that, anyone can use
            with Outliving() as outliving, Largest(draws[0].batch) as of_one:
                value(draws[0])
            if outliving.any or draws[0].random:
                return 1
            with Largest(whole.batch) as of_all:
                value(whole)
            each = torch.stack([derivatives(draw) for draw in draws])
            # exact by its making; but a rule of some operation may be wrong, or there may be none
            # for its second derivative
            found, mean = derivatives(whole), each.mean(0)
            same = torch.equal(found.isfinite(), mean.isfinite())
            if not same or are_apart(found, mean, each.norm(dim=1).max()):
                return 1
        except Exception:
            return 1
        finally:
            self.cost = cost
        return few_enough(len(draws), of_all.entries, of_one.entries, y.device)

    def distinct(self, draws: Sequence[Draw]) -> Sequence[Draw]:
        """Of a batch that comes more than once, the first draw; all where g is another in each."""
        if "inner" in self.problem.habit.random:
            return draws
        seen: dict[int, Draw] = {}
        for draw in draws:
            seen.setdefault(id(draw.batch), draw)
        return list(seen.values())

    def joint(self, draws: Sequence[Draw]) -> Draw:
        """The distinct ones of the draws as one."""
        draws = self.distinct(draws)
        return Joint(draws) if len(draws) > 1 else draws[0]

    def value(self, level: str, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        """The loss, without a graph; where it takes derivatives itself, with those of its own."""
        self.cost.loss_evaluations += draw.count
        if self.problem.habit.recorded:
            with torch.enable_grad():
                x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
                return self._loss(level, x, y, draw).detach()
        loss = partial(self._loss, level, x, y, draw)
        return without_graph(self.problem.habit, loss).detach()

    def dependence(
        self, level: str, x: Tensor, y: Tensor, draw: Draw
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """The loss and its gradients, None in what does not enter it."""
        self.cost.gradients += draw.count
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            with self.bound(x, y):
                value = self._loss(level, x, y, draw)
                if not value.requires_grad:
                    return value, (None, None)
                gx, gy = torch.autograd.grad(value, (x, y), allow_unused=True)
        return value.detach(), (gx, gy)

    def outer_gradients(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """f, f_x, f_y."""
        self.cost.gradients += draw.count
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            with self.bound(x, y):
                value = self._loss("outer", x, y, draw)
                fx, fy = _gradients(value, (x, y))
        return value.detach(), fx, fy

    def inner_gradient(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """g, g_y."""
        self.cost.gradients += draw.count
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            if self.problem.habit.recorded:
                x = x.detach().requires_grad_()
            with self.bound(x, y):
                value = self._loss("inner", x, y, draw)
                (gy,) = _gradients(value, (y,))
        return value.detach(), gy

    def inner_gradient_beside(
        self, x: Tensor, y: Tensor, other: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g and g_y, and g at another y; what y does not enter is done once a draw."""

        def on(parts: Sequence[Draw]) -> list[tuple[Tensor, Tensor, Tensor]]:
            # each part's two evaluations one after the other
            return [
                (*self.inner_gradient(x, y, d), self.value("inner", x, other, d)) for d in parts
            ]

        each = self._on_parts("inner", x, y, draw, on)
        if len(each) == 1:
            return each[0]
        value, gy, there = (torch.stack(parts).mean(0) for parts in zip(*each, strict=True))
        return value, gy, there

    def inner_gradients(self, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """g, g_x, g_y."""
        self.cost.gradients += draw.count
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            with self.bound(x, y):
                value = self._loss("inner", x, y, draw)
                gx, gy = _gradients(value, (x, y))
        return value.detach(), gx, gy

    def record(self, x: Tensor, y: Tensor, draw: Draw) -> Products:
        """g and g_y with the graph of g_y kept, from which every product comes."""
        return Pullback(self, x, y, draw)

    def project(self, x: Tensor) -> Tensor:
        if self.problem.project is None:
            return x
        with torch.no_grad():
            return self.x.flatten(self.problem.project(tree_map(torch.clone, self.x.unflatten(x))))

    def agreed(self, what: str, function: Callable[[], Tensor]) -> Tensor:
        """``function()``, computed by the user's own code: the same on all ranks, of which there
        is one here."""
        del what
        return function()


class Products(Protocol):
    """Second derivatives of g at one point on one draw.

    Attributes:
        value: g, 0-dim.   gradient: g_y, shape of y.
    """

    value: Tensor
    gradient: Tensor

    def product(self, u: Tensor) -> Tensor: ...  # g_yy u
    def both(self, u: Tensor) -> tuple[Tensor, Tensor]: ...  # g_xy u, g_yy u
    def forward(self, d: Tensor) -> Tensor: ...  # g_yx d


ROWS = 64  # of a Hessian that may be had as a matrix
ENTRIES = 2**15  # of the largest tensor of a loss that is small


def is_small(habit: Habit, y: Tensor) -> bool:
    """Whether the Hessian as a matrix costs but a few of its products."""
    return y.numel() <= ROWS and habit.largest is not None and habit.largest <= ENTRIES


class Pullback:
    """:class:`Products` from one recorded graph of g_y: each costs about one gradient.

    Where y is small and so is all else, that is the time of its dispatch, and the Hessian itself,
    its rows in one pass, that of a few products: it is computed once products exceed an eighth of
    its rows.
    """

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, draw: Draw) -> None:
        self._cost, self._count = oracle.cost, draw.count
        self._habit, self._products = oracle.problem.habit, 0
        self._hessian: Tensor | None = None
        self._cost.gradients += draw.count
        with torch.enable_grad():
            self._x, self._y = x.detach().requires_grad_(), y.detach().requires_grad_()
            self._bound = oracle.bound(self._x, self._y)
            with self._bound:
                value = oracle._loss("inner", self._x, self._y, draw)
                (self._gy,) = _gradients(value, (self._y,), create_graph=True)
        self._value = value
        self.value, self.gradient = value.detach(), self._gy.detach()

    def product(self, u: Tensor) -> Tensor:
        """g_yy u, shape of y."""
        self._cost.hessian_products += self._count
        self._products += 1
        many = 8 * self._products > u.numel()
        if many and self._hessian is None and is_small(self._habit, self._y):
            self._hessian = self._rows()
        if self._hessian is not None:
            return self._hessian @ u
        return self._back(self._gy, (self._y,), u)[0]

    def _back(
        self, output: Tensor, inputs: tuple[Tensor, ...], seed: Tensor | None, **options: bool
    ) -> tuple[Tensor, ...]:
        with self._bound:
            return _gradients(output, inputs, seed, retain_graph=True, **options)

    def _rows(self) -> Tensor | None:
        """g_yy, or None where its rows cannot be had in one pass."""
        unit = torch.eye(self._y.numel(), dtype=self._y.dtype, device=self._y.device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that are done row by row
                rows = self._back(self._gy, (self._y,), unit, is_grads_batched=True)
        except RuntimeError:  # as from an autograd.Function without a rule for it
            self._habit.largest = None
            return None
        return rows[0].expand_as(unit)

    def both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """g_xy u, shape of x, and g_yy u, shape of y, in one pass."""
        self._cost.hessian_products += self._count
        gxy, gyy = self._back(self._gy, (self._x, self._y), u)
        return gxy, gyy

    def forward(self, d: Tensor) -> Tensor:
        """g_yx d, shape of y: the change of g_y along a direction d of x.

        The pass back to x is linear in u, so the gradient of <g_xy u, d> with respect to u is
        g_yx d at any u: a forward derivative from two backward passes, without the operators
        that lack a forward mode.
        """
        self._cost.hessian_products += self._count
        with torch.enable_grad():
            u = torch.zeros_like(self._gy, requires_grad=True)
            (gxy,) = self._back(self._gy, (self._x,), u, create_graph=True)
            try:
                return self._back(gxy, (u,), d)[0]
            except RuntimeError as error:
                if "must be contiguous" not in str(error):
                    raise
            # a fourth pass through F.cross_entropy of transposed scores is beyond torch (2.13); the
            # gradient of <g_x, d> is the same where second derivatives are symmetric
            (gx,) = self._back(self._value, (self._x,), None, create_graph=True)
            return self._back(gx, (self._y,), d)[0]


def _gradients(
    output: Tensor, inputs: tuple[Tensor, ...], seed: Tensor | None = None, **options: bool
) -> tuple[Tensor, ...]:
    """torch.autograd.grad with zeros where an input does not enter."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(i) for i in inputs)
    try:
        found = torch.autograd.grad(output, inputs, seed, allow_unused=True, **options)
    except RuntimeError as error:  # NotImplementedError is one
        if not any(words in str(error) for words in ("is not implemented", "differentiate twice")):
            raise
        raise told(
            type(error),
            f"{error} -- the inner loss cannot be differentiated twice; use "
            f"hypergradient=bilevel.FiniteDifference(), which needs its gradients alone.",
        ) from error
    return tuple(
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)
    )


def _takes_batch(loss: Callable[..., Any], level: str) -> bool | None:
    """Whether the loss takes a third argument: True, False, or None where it may."""
    able = [require.takes(loss, 2), require.takes(loss, 3)]
    if able == [False, False]:
        raise TypeError(
            f"{level}{inspect.signature(loss)} cannot be called as {level}(x, y) nor as "
            f"{level}(x, y, batch); write the loss as a function of these arguments."
        )
    return None if able == [True, True] else able[1]


def make_oracle(problem: Problem, x: Layout, y: Layout, widths: Sequence[float] = ()) -> Oracle:
    """The oracle that the problem asks for: plain, or through torch.compile where g is not rounded
    off; averaged over the ranks where a process group with more than one is initialised."""
    if problem.compile and not widths:
        from bilevel.compiled import CompiledOracle  # torch.compile is slow to import

        made: Oracle = CompiledOracle(problem, x, y)
    else:
        made = Oracle(problem, x, y, widths)
    from bilevel.distributed import AveragedOracle, Ranks  # which builds on this module

    if Ranks(y.device).size == 1:
        return made
    # losses may speak to each other, and must be called as often on all ranks
    made.may_stack = False
    return AveragedOracle(made)
