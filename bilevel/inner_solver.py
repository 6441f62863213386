"""The user's own way to y, under our hypergradient."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle
from bilevel.randomness import Randomness
from bilevel.require import shown, takes

# whose weight_decay w adds w y to the gradient
COUPLED = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD),
)
OWN = "gradient steps"  # and no solver of the user's


class OptimizerSolver:
    """A torch optimizer that takes the inner steps."""

    def __init__(self, factory: Callable[..., Any], layout: Layout) -> None:
        if layout.module is not None:
            self.parameters = [p for p in layout.module.parameters() if p.requires_grad]
        else:
            zeros = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
            self.parameters = [nn.Parameter(part.clone()) for part in layout.parts(zeros)]
        made = factory(self.parameters)
        self.scheduler: Any
        paired = isinstance(made, tuple) and len(made) == 2
        self.optimizer, self.scheduler = made if paired else (made, None)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"inner_solver returned {shown(made)}; return a torch.optim.Optimizer of the "
                f"parameters that the function is given, or a pair of an optimizer and a "
                f"scheduler. A solver of your own takes (x, y, batches)."
            )
        own = set(map(id, self.parameters))
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not stepped <= own:
            raise ValueError(
                f"inner_solver made an optimizer of {len(stepped - own)} tensors that are not "
                f"among the {len(own)} parameters it was given; pass it those."
            )
        # as ReduceLROnPlateau does
        self.asks_for_loss = self.scheduler is not None and not takes(self.scheduler.step, 0)
        # a line search whose closure is to compute the loss and nothing else
        self.searches = getattr(self.optimizer, "searches", False)

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, draws: Sequence[Draw]) -> Tensor:
        grads = [p.grad for p in self.parameters]  # of a Module, the user's own
        for p in self.parameters:
            p.grad = None
        try:
            return self._run(oracle, x, y, draws)
        finally:
            for p, grad in zip(self.parameters, grads, strict=True):
                p.grad = grad

    def _run(self, oracle: Oracle, x: Tensor, y: Tensor, draws: Sequence[Draw]) -> Tensor:
        with torch.no_grad():
            for p, value in zip(self.parameters, oracle.y.parts(y), strict=True):
                p.copy_(value)
        closure = self._searched if self.searches else self._closure
        for draw in draws:
            loss = self.optimizer.step(closure(oracle, x, draw))
            if self.scheduler is not None:
                self.scheduler.step(*[loss] if self.asks_for_loss else [])
            self.optimizer.zero_grad()
        return _gather(self.parameters, oracle)

    def _closure(self, oracle: Oracle, x: Tensor, draw: Draw) -> Callable[[], Tensor]:
        """The loss where the parameters are, which LBFGS asks for as often as it likes."""

        def loss() -> Tensor:
            value, gy = oracle.inner_gradient(x, _gather(self.parameters, oracle), draw)
            self._set(oracle.y.parts(gy))
            return value

        return loss

    def _searched(self, oracle: Oracle, x: Tensor, draw: Draw) -> Callable[[], Tensor]:
        """The loss as a search asks for it: differentiable first, then without a graph."""
        randomness = Randomness(oracle.y.device)
        after: list[Tensor] = []

        def loss() -> Tensor:
            y = _gather(self.parameters, oracle)
            if torch.is_grad_enabled():
                value, gy = oracle.inner_gradient(x, y, draw)
                after[:] = randomness.state()
                value = value.clone().requires_grad_()
                value.register_hook(lambda _: self._set(oracle.y.parts(gy)))
                return value
            value = oracle.value("inner", x, y, draw)
            randomness.restore(after)  # which the search had set back, as the draw itself does
            return value

        return loss

    def _set(self, gradients: Sequence[Tensor]) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g.clone()

    def tell_decay(self) -> None:
        """Warn of a penalty that the inner loss, and so the hypergradient, knows nothing of."""
        coupled = isinstance(self.optimizer, COUPLED) and not isinstance(
            self.optimizer, torch.optim.AdamW
        )
        decay = max(
            0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0))
            for group in self.optimizer.param_groups
        )
        if coupled and decay > 0:
            warnings.warn(
                f"the optimizer of inner_solver has weight_decay={decay:g}, so that y goes to the "
                f"minimum of another function than the inner loss, of which the hypergradient is; "
                f"leave it out, and add {decay / 2:g} * y.square().sum() to the inner loss.",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def kind(self) -> str:
        """In words."""
        parts = [self.optimizer] if self.scheduler is None else [self.optimizer, self.scheduler]
        return "the optimizer " + " with ".join(type(part).__name__ for part in parts)

    def state_dict(self) -> dict[str, Any]:
        schedule = None if self.scheduler is None else self.scheduler.state_dict()
        optimizer = self.optimizer.state_dict()
        return {"kind": self.kind, "optimizer": optimizer, "scheduler": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def _gather(parameters: Sequence[Tensor], oracle: Oracle) -> Tensor:
    return torch.cat([p.detach().to(oracle.y.dtype).reshape(-1) for p in parameters])


def makes_optimizer(solver: Callable[..., Any]) -> bool:
    """Whether ``solver`` is a factory of one argument, rather than a solver(x, y, batches)."""
    if isinstance(solver, type) and issubclass(solver, torch.optim.Optimizer):
        return True
    if isinstance(solver, partial) and isinstance(solver.func, type):
        return makes_optimizer(solver.func)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        p
        for p in inspect.signature(solver).parameters.values()
        if p.kind in kinds and p.default is inspect.Parameter.empty
    ]
    return len(required) == 1


def kind_of(solver: Callable[..., Any] | None, state: dict[str, Any] | None) -> str | None:
    """What takes the inner steps, in words; None for an optimizer that has not taken any."""
    if solver is None:
        return OWN
    if makes_optimizer(solver):
        return None if state is None else state.get("kind")
    return "a function solver(x, y, batches)"


def refuse_other(
    solver: Callable[..., Any] | None,
    layout: Layout,
    kind: str | None,
    state: dict[str, Any] | None,
) -> None:
    """Refuse to go on from what a solver of another kind left.

    Args:
        layout: of y.   kind: as :func:`kind_of` told of it; None: unknown.   state: of it.

    Raises:
        ValueError: they differ, or the optimizer does not take the state.
    """
    made = None
    if solver is not None and makes_optimizer(solver) and (kind or state):
        made = OptimizerSolver(solver, layout)
    now = kind_of(solver, None) if made is None else made.kind
    if kind is not None and now is not None and kind != now:
        raise ValueError(
            f"the inner steps of the checkpoint were taken by {kind}, but would now be taken by "
            f"{now}; resume with the inner_solver of the interrupted run."
        )
    if made is None or state is None:
        return
    try:
        made.load_state_dict(copy.deepcopy(state))
    except Exception as error:
        raise ValueError(
            f"the optimizer made by inner_solver cannot go on from the checkpoint "
            f"({type(error).__name__}: {error}); resume with the inner_solver of the interrupted "
            f"run."
        ) from error


def run_solver(
    solver: Callable[..., Any],
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    draws: Sequence[Draw],
    state: dict[str, Any] | None,
    tells: bool,
) -> tuple[Tensor, dict[str, Any] | None]:
    """y after the user's solver, and the solver's new state; the old one is not modified.
    ``tells``: whether of what it does otherwise than the hypergradient supposes."""
    if makes_optimizer(solver):
        made = OptimizerSolver(solver, oracle.y)
        if tells:
            made.tell_decay()
        if state is not None:
            made.load_state_dict(copy.deepcopy(state))  # an optimizer steps its state in place
        return made.run(oracle, x, y, draws), made.state_dict()
    X, Y = oracle.x.export(x), oracle.y.export(y)

    def solved() -> Tensor:
        with torch.enable_grad():
            found = solver(X, Y, [draw.batch for draw in draws])
        if found is None and oracle.y.module is not None:
            found = oracle.y.module  # trained in place
        return oracle.y.flatten(found)

    return oracle.agreed("the y of inner_solver", solved), None
