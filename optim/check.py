"""What options and parameters may be; all of it is told before anything is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import require

Check = Callable[[str, str, Any], None]  # of (class, option, value)


def number(interval: str, hint: str = "") -> Check:
    return partial(_number, interval=interval, hint=hint)


def _number(owner: str, name: str, value: Any, interval: str, hint: str) -> None:
    require.number(owner, name, value, interval, hint)


def optional(check: Check) -> Check:
    return lambda owner, name, value: None if value is None else check(owner, name, value)


def or_word(word: str, interval: str) -> Check:
    """A number, or one word."""

    def check(owner: str, name: str, value: Any) -> None:
        if isinstance(value, str):
            require.choice(owner, name, value, [word])
        else:
            require.number(owner, name, value, interval, f", or {word!r}")

    return check


def count(least: int) -> Check:
    return lambda owner, name, value: require.whole(owner, name, value, least)


def _betas(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        shown = require.shown(value)
        raise TypeError(f"{owner}({name}={shown}) is no pair. Give (0.9, 0.999), for example.")
    require.number(owner, "betas[0]", value[0], "[0, 1]")
    require.number(owner, "betas[1]", value[1], "[0, 1)")


def _reset(owner: str, name: str, value: Any) -> None:
    require.choice(owner, name, value, ("grow", "last", "fixed"))


OPTIONS: dict[str, Check] = {
    "lr": number("[0, inf)"),
    "lower_bound": number("(-inf, inf)"),
    "c": number("(0, inf)"),
    "c0": number("(0, inf)"),
    "max_lr": number("(0, inf]"),
    "max_norm": number("(0, inf]"),
    "decay": number("[0, inf)"),
    "steps": count(1),
    "safeguard": optional(or_word("ema", "[0, inf)")),
    "rho": number("[0, 1)"),
    "averaging": or_word("linear", "[0, inf)"),
    "beta": number("[0, 1]"),
    "beta2": number("[0, 1)"),
    "betas": _betas,
    "eps": number("(0, inf)"),
    "warmup_steps": count(0),
    "weight_decay": number("[0, inf)"),
    "r": number("[0, inf)"),
    "weight_lr_power": number("[0, inf)"),
    "shrink": number("(0, 1)"),
    "reset": _reset,
    "scale": optional(number("(0, inf)")),
    "foreach": optional(require.flag),
}
TORCH = "momentum", "dampening", "nesterov", "amsgrad", "maximize"  # options of its optimizers


def parameters(owner: str, params: Any) -> list[Any]:
    """What an optimizer is to step: a list of tensors, of named ones or of groups."""
    example = "an iterable of tensors or groups, such as model.parameters()"
    if isinstance(params, Tensor | dict | nn.Module | str | type) or not isinstance(
        params, Iterable
    ):
        shown = require.shown(params)
        raise TypeError(f"{owner}(params={shown}) is {require.kind(params)}. Give {example}.")
    found = list(params)
    if not found:
        raise ValueError(f"{owner}(params=[]) has nothing to step. Give {example}.")
    return found


def group(owner: str, given: Any, options: dict[str, Check], defaults: dict[str, Any]) -> None:
    """A group of parameters and its options."""
    if not isinstance(given, dict) or "params" not in given:
        raise TypeError(
            f"{owner} got {require.shown(given)} ({require.kind(given)}) as a group. Give a dict "
            f"such as {{'params': model.parameters()}}."
        )
    for name, value in {**defaults, **given}.items():
        if name not in defaults and name in (*options, *TORCH) and value:  # 0 is kept to anyway
            raise ValueError(
                f"{owner} got a group with {name}={require.shown(value)}, but has no such option "
                "and would ignore it. Leave it out, or take an optimizer that has it."
            )
        if name in options:
            options[name](owner, name, value)
    params = given["params"]
    if not isinstance(params, Tensor):
        params = given["params"] = parameters(owner, params)
    for p in [params] if isinstance(params, Tensor) else params:
        _parameter(owner, p[1] if isinstance(p, tuple) and len(p) == 2 else p)


def _parameter(owner: str, p: Any) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(
            f"{owner} got {require.shown(p)} ({require.kind(p)}) among its parameters. Give "
            f"tensors, such as model.parameters()."
        )
    if p.is_complex():
        raise ValueError(
            f"{owner} got a complex parameter of shape {tuple(p.shape)}, which has no real "
            "inner product with its gradient. Keep torch.view_as_real(p) as the parameter "
            "and call torch.view_as_complex on it in the model."
        )
    if p.layout != torch.strided:
        raise TypeError(f"{owner} got a parameter of {p.layout}. Convert it with .to_dense().")
    if not p.is_floating_point():
        raise TypeError(
            f"{owner} got a parameter of {p.dtype}, which has no gradient. Convert it with "
            f".float(), or leave it out."
        )
    if not (p.is_leaf or p.retains_grad):
        raise ValueError(
            f"{owner} got a tensor of shape {tuple(p.shape)} that was computed from others, so no "
            f"step can change it. Give the tensors it was computed from, or p.detach()."
        )
