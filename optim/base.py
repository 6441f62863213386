"""What all methods share: how a step is asked for, measured, decided, taken and remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bilevel import require
from optim import check
from optim.blocks import Block, Cohort, Group, lay_out, wide
from optim.check import Check
from optim.distributed import Ranks, placement
from optim.rules import Decision, Memory
from optim.vectors import Plain

Scalar = float | int | Tensor
Closure = Callable[[], Any]
Self = TypeVar("Self", bound="Optimizer")

LONGEST = 1e18  # a longer step is an overflow, refused as inf would be


class Last(NamedTuple):
    """The last step, on the host.

    Attributes:
        step: its size (times the ``lr`` of the first group, 1 unless a scheduler set it).
        numerator: the linearised gap; negative where the loss was below its bound.
        denominator: squared norm of the gradient with its factors and safeguard.
        active: why the step is not numerator / denominator: "" or some of "not finite",
            "zero gradient", "below bound", "overflow", "safeguard", "cap", "warm-up", joined by
            "+". Searches: "cap" where the first trial was accepted, "no step accepted" where none
            was.
    """

    step: float
    numerator: float
    denominator: float
    active: str


class _Cache:
    """What is no state: found again from it where missing."""

    cohorts: list[Cohort] | None = None
    active: tuple[list[int], bool] | None = None
    decision: Decision | None = None
    finite: Tensor | None = None  # whether the numbers of the decision were
    lr: float = 1.0  # of its first group
    differentiates: bool = False  # whether the closure of a search takes derivatives itself


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose step size is one number for all groups, set by a rule.

    A method gives its rule and, where it keeps vectors, their names and how they move. Measuring
    only reads, deciding is scalar, moving writes: a refused step leaves no trace.
    """

    _vectors: tuple[str, ...] = ()  # kept per parameter
    _memory: dict[str, float] = {}  # numbers kept by the rule, with their first values
    _seen: tuple[str, ...] = ()  # those of them that are kept of refused steps, too, if finite
    _common: tuple[str, ...] = ()  # options that are one for all groups
    _checks: dict[str, Check] = {}  # of options, where not those of :data:`optim.check.OPTIONS`
    _needs_loss = True
    _parallel = False

    def __init__(self, params: ParamsT, foreach: bool | None, **options: Any):
        self._cache = _Cache()
        name = type(self).__name__
        check.OPTIONS["foreach"](name, "foreach", foreach)
        params = check.parameters(name, params)
        super().__init__(params, {"lr": 1.0, **options, "foreach": foreach is not False})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = _Cache()  # after copying, unpickling and loading

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parallel": self._parallel}

    def data_parallel(self: Self) -> Self:
        """Declare the parameters replicas, as under DistributedDataParallel; return self.

        Losses and targets, of each rank's own batch, are then averaged over the default process
        group before each step, as the gradients are: every rank has to step. Alone, nothing
        changes. DTensors (``fully_shard``) need no call. Not saved in ``state_dict()``.
        """
        self._parallel = True
        return self

    def _ranks(self, cohorts: list[Cohort]) -> Ranks:
        return Ranks((cohort.placement for cohort in cohorts), self._parallel)

    @property
    def last(self) -> Last | None:
        """The last step's numbers, None before the first; reading waits for the device."""
        if self._cache.decision is None:
            return None
        step, n, d, unguarded, cap, scale = map(float, self._cache.decision)
        finite = bool(self._cache.finite)
        reasons = {
            "not finite": not finite,
            "zero gradient": unguarded == 0,
            "below bound": n < 0,
            "overflow": finite and step == 0 and n > 0 and unguarded > 0 and n / d > 0,
            "safeguard": d > unguarded,
            "cap": n > cap * d and step > 0,
            "warm-up": scale < 1 and step > 0,
        }
        active = "+".join(word for word, yes in reasons.items() if yes)
        return Last(step * self._cache.lr, n, d, active)

    # -- a method overrides these ------------------------------------------------------------------

    def _rule(self, gap: Tensor, norm2: Tensor, s: Memory) -> tuple[Decision, Memory]:
        """The decision, and what to remember of it; a refused step is not remembered."""
        raise NotImplementedError

    def _measure(self, do: Plain, block: Block) -> tuple[Tensor, ...]:
        """What a block adds to the sums that :meth:`_totals` receives."""
        _, g = block.read()
        return (do.dot(g, g),)

    def _totals(self, norm2: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """||g||^2 and <g, z - y>."""
        return norm2, torch.zeros_like(norm2)

    def _weights(self, group: Group, s: Memory, step: Tensor, ok: Tensor) -> Memory:
        """The scalars of a group's move; ``s`` is already that of the next step."""
        return {"step": step * group["lr"], "skip": ~ok}

    def _move(self, do: Plain, block: Block, w: Memory) -> None:
        """x <- x - step g."""
        x, g = block.read(again=True)
        do.descend(x, g, w["step"], w["skip"])
        block.write(x)

    def _reach(self, norm2: Tensor) -> Tensor:
        """Length of a step of size 1, at most."""
        return norm2.sqrt()

    # -- the step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Closure | None = None,
        *,
        loss: Scalar | None = None,
        target: Scalar | None = None,
    ) -> Any:
        """Take one step; return the loss.

        Args:
            closure: clears gradients, computes the loss, calls ``backward()``, returns the loss.
            loss: instead of a closure, the loss whose gradients are in ``.grad``: of the whole
                batch, unscaled; a number or a tensor of one element.
            target: the optimal value of the batch, or a lower bound of it; overrides
                ``lower_bound``. A number or a tensor of one element, of any sign.

        Raises:
            ValueError: both of ``closure`` and ``loss``, or neither where the rule needs the loss;
                no target where there is no default; a loss or target of more than one element.
            TypeError: a closure that cannot be called; a loss or target that is no number.
            RuntimeError: sparse gradients; a step in eval mode.
        """
        if closure is not None and loss is not None:
            raise ValueError(
                "step() got a closure and loss=, which may disagree. Give one of the two."
            )
        if closure is None and loss is None and self._asked_for_state():
            return None
        self._check_mode()
        if closure is not None:
            self._check_closure(closure, "step(loss=loss), or step(closure)")
            with torch.enable_grad():
                loss = closure()
        if self._needs_loss and loss is None:
            raise ValueError(
                f"{type(self).__name__}.step() got no loss, and its step size depends on it. Call "
                "step(loss=loss) after loss.backward(), or step(closure) with a closure that "
                "returns the loss."
            )
        cohorts = self._lay_out()
        if cohorts:
            self._advance(cohorts, loss, target)
        return loss

    def _advance(self, cohorts: list[Cohort], loss: Scalar | None, target: Scalar | None) -> None:
        blocks = [block for cohort in cohorts for block in cohort.blocks()]
        home = blocks[0].device
        excess = self._excess(loss, target, home)
        s = self._remembered(home)
        ranks = self._ranks(cohorts)
        parts = [self._measure(block.do, block) for block in blocks]
        if ranks.sharded:
            shares = [ranks.share(placement(block.params[0])) for block in blocks]
            parts = [
                tuple(share * t for t in part) for share, part in zip(shares, parts, strict=True)
            ]
        sums = [_total(part, home) for part in zip(*parts, strict=True)]
        excess, sums = ranks.reduce(excess, sums)
        norm2, slope = self._totals(*sums)
        gap = excess + slope
        finite = torch.isfinite(gap) & torch.isfinite(norm2)

        decision, new = self._rule(gap, norm2, s)
        ok = finite & (decision.step * self._reach(norm2) < LONGEST)
        step = torch.where(ok, decision.step, 0.0)
        for name, value in new.items():  # in place: a captured graph knows only addresses
            s[name].copy_(torch.where(finite if name in self._seen else ok, value, s[name]))
        self._cache.decision, self._cache.finite = decision._replace(step=step), finite
        self._cache.lr = self.param_groups[0]["lr"]

        weights: dict[Any, Memory] = {}
        for block in reversed(blocks):  # what was measured last is still in the cache
            key = id(block.group), block.device, block.dtype
            if key not in weights:
                w = self._weights(block.group, s, step, ok)
                weights[key] = {n: t.to(block.device, block.dtype) for n, t in w.items()}
            self._move(block.do, block, weights[key])
        for cohort in cohorts:
            if cohort.step is not None:
                cohort.step.add_(ok.to(cohort.step))

    def _check_mode(self) -> None:
        """Methods with an average refuse to step in eval mode."""

    def _check_closure(self, closure: Any, call: str) -> None:
        """``call``: how to step instead, where the loss stands in the closure's place."""
        if not callable(closure):
            name, what = type(self).__name__, require.kind(closure)
            raise TypeError(
                f"{name}.step() got {require.shown(closure)}, {what}, in the place of the "
                f"closure. Write {call} with a function that returns the loss."
            )
        require.function("step", "closure", closure, "a function that returns the loss", 0)

    def _asked_for_state(self) -> bool:
        """Whether this is no step but a call for the first state, which is then made.

        torch.distributed.checkpoint calls ``step()`` with every lr at 0, and knows no losses.
        """
        if not self._needs_loss or any(group["lr"] != 0 for group in self.param_groups):
            return False
        cohorts = self._lay_out()
        if cohorts:
            self._remembered(cohorts[0].params[0].device)
        return True

    def _fast(self) -> bool:
        return self.param_groups[0]["foreach"] and not torch.compiler.is_compiling()

    def _excess(self, loss: Scalar | None, target: Scalar | None, home: torch.device) -> Tensor:
        """f - l; the loss alone (or 0) where a method has no bound."""
        if not self._needs_loss:
            return _scalar(0.0 if loss is None else loss, "loss", home)
        if target is None:
            target = self.param_groups[0].get("lower_bound")
        if target is None:
            raise ValueError(
                f"{type(self).__name__}.step() got no target, and has no default for it. Pass "
                "target=, the batch's loss at the solution (a teacher's loss, say), or use a "
                "method that takes a lower bound, such as SafeguardedSPS."
            )
        assert loss is not None
        return _scalar(loss, "loss", home) - _scalar(target, "target", home)

    def _remembered(self, home: torch.device) -> Memory:
        if not self._memory:
            return {}
        # in the first group, as torch's tools take every key of the state for a parameter
        s = self.param_groups[0].setdefault("memory", {})
        for name, value in self._memory.items():
            if name not in s:  # (1,): torch.compile loses writes to 0-dim float64 on the CPU
                s[name] = _scalar(value, name, home).view(1)
        return {name: s[name].view(()) for name in self._memory}

    # -- parameters and state ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        name = type(self).__name__
        check.group(name, param_group, {**check.OPTIONS, **self._checks}, self.defaults)
        for key in self._common:
            if param_group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(
                    f"{name} got a group with {key}={param_group[key]!r}, but the step size is one "
                    f"number for all groups ({key}={self.defaults[key]!r}). Give {key} to {name} "
                    "itself; to move one group less, set its 'lr', a factor on the step."
                )
        super().add_param_group(param_group)
        if "max_lr" in self.defaults:  # OneCycleLR writes a max_lr of its own into the groups
            group = self.param_groups[-1]
            group["cap"] = group.pop("max_lr")
        self._cache.cohorts = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state keeps its own dtype: float32 beside bfloat16 parameters.

        Raises:
            ValueError: the state of another kind of optimizer, or of other groups.
        """
        groups, saved = state_dict["param_groups"], state_dict["state"]
        self._check_saved(groups)
        super().load_state_dict(state_dict)
        for name, value in self.param_groups[0].get("memory", {}).items():
            home = self.param_groups[0]["params"][0].device
            self.param_groups[0]["memory"][name] = value.to(home)
        indices = iter([i for group in groups for i in group["params"]])
        counts: dict[Any, Tensor] = {}
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                kept = {
                    n: t.detach().to(p.device, copy=True)
                    for n, t in saved.get(next(indices), {}).items()
                }
                if "step" in kept:  # equal counts are one again, see optim.blocks
                    key = g, p.device, p.dtype, float(kept["step"])
                    kept["step"] = counts.setdefault(key, kept["step"])
                if kept:
                    self.state[p] = kept
        self._cache.cohorts = None

    def _check_saved(self, groups: list[Group]) -> None:
        name, keys = type(self).__name__, {option: option for option in self.defaults}
        if "max_lr" in keys:
            keys["max_lr"] = "cap"
        for group in groups:
            missing = sorted(option for option, key in keys.items() if key not in group)
            if missing:
                raise ValueError(
                    f"{name} got the state of another optimizer: a group of it has no "
                    f"{', '.join(missing)}. Load a state_dict() of {name}, or start without one."
                )

    def _first(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        """The vectors kept for a parameter, at its first gradient."""
        return {}

    def _lay_out(self) -> list[Cohort]:
        active = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} got a sparse gradient for a parameter of shape "
                        f"{tuple(p.shape)}; its norm and average are dense. Use sparse=False in "
                        "the embedding, or give that parameter to torch.optim.SparseAdam."
                    )
                active.append(p)
        ids, fast = [id(p) for p in active], self._fast()
        cohorts = self._cache.cohorts
        if (
            cohorts is None
            or (ids, fast) != self._cache.active
            or not all(c.holds(self.state) for c in cohorts)
        ):
            self._cache.cohorts = cohorts = lay_out(
                self.param_groups, self.state, set(ids), self._first, fast
            )
            self._cache.active = ids, fast
        return cohorts


def _total(parts: tuple[Tensor, ...], home: torch.device) -> Tensor:
    return torch.stack([part.to(home) for part in parts]).sum(dtype=wide(home))


def _scalar(value: Scalar, name: str, home: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        if getattr(value, "shape", None) == ():  # NumPy's
            value = cast(Any, value).item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(
                f"{name}={require.shown(value)} is {require.kind(value)}. Pass a number, or a "
                f"tensor of one element: the number whose gradient was taken."
            )
        return torch.full((), value, dtype=wide(home), device=home)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} is a tensor of {value.dtype}. Pass a real number.")
    if value.numel() != 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but one step has one {name}. Pass its mean or "
            "sum: the number whose gradient was taken."
        )
    return value.detach().to(home, wide(home)).reshape(())
