"""Misuse of every public argument, drawn at random: what was asked, why not, what instead.

BILEVEL_MISUSES=N draws about N of them instead of 1,000.
"""

import inspect
import math
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import bilevel
import optim
from tests.tables import t

ROOTS = [str(Path(package.__file__).parent) for package in (bilevel, optim)]
ADVICE = re.compile(
    r"\b(give|pass|use|choose|write|convert|move|return|reduce|leave|look for|call|freeze|keep"
    r"|compute|wrap|check the shapes)\b",
    re.IGNORECASE,
)
CALLS = []  # of the losses


def f(x, y):
    CALLS.append("f")
    return ((y - 1) ** 2).sum() + 0.1 * (x**2).sum()


def g(x, y):
    CALLS.append("g")
    return ((y - x.sin()) ** 2).sum()


def fb(x, y, batch):
    return f(x, y) * batch


def gb(x, y, batch):
    return g(x, y) * batch


X, Y = t([0.5, 1.0]), t([0.0, 2.0])
ONE = t(1.0)


def solve(outer=f, inner=g, x=X, y=Y, **options):
    return bilevel.solve(outer, inner, x, y, **{"steps": 2, "inner_steps": 2, **options})


# -- values that are not what is asked for --------------------------------------------------------


def of_type(dtype):
    return st.sampled_from([(), (1,), (2,), (2, 2)]).map(lambda s: torch.ones(s, dtype=dtype))


KINDS: dict[str, st.SearchStrategy] = {
    "none": st.none(),
    "string": st.text(max_size=8),
    "bytes": st.binary(max_size=4),
    "bool": st.booleans(),
    "int": st.integers(-(2**70), 2**70),
    "float": st.floats(),
    "complex": st.complex_numbers(),
    "list": st.lists(st.integers(), max_size=3),
    "tuple": st.tuples(st.floats(), st.text(max_size=3)),
    "dict": st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    "set": st.frozensets(st.integers(), max_size=2),
    "tensor": st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]).flatmap(
        of_type
    ),
    "array": st.integers(0, 3).map(np.ones),
    "class": st.sampled_from([bilevel.Neumann, bilevel.Unrolled, nn.Linear, optim.SPS, float]),
    "function": st.just(f),
    "module": st.just(nn.Tanh()),
    "object": st.builds(object),
}


def no(*kinds: str) -> st.SearchStrategy:
    """Any kind but these."""
    return st.one_of([values for kind, values in KINDS.items() if kind not in kinds])


def no_count(least: int = 1) -> st.SearchStrategy:
    return no("int") | st.integers(max_value=least - 1) | st.integers(min_value=2**63)


def no_number(interval: str) -> st.SearchStrategy:
    """No float in the interval; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(", "))
    wrong = [st.sampled_from([math.nan, -math.inf])]
    if low > -math.inf:
        wrong.append(st.floats(max_value=low, exclude_max=interval[0] == "[", allow_nan=False))
    if high < math.inf:
        wrong.append(st.floats(min_value=high, exclude_min=interval[-1] == "]", allow_nan=False))
    elif interval[-1] == ")":
        wrong.append(st.just(math.inf))
    return no("int", "float") | st.one_of(wrong)


def misspelt(names) -> st.SearchStrategy:
    """Strings near the names, and others."""
    names = sorted(names)

    def mistake(name: str, at: int, letter: str) -> str:
        at %= len(name)
        return name[:at] + letter + name[at + 1 :]

    near = st.builds(mistake, st.sampled_from(names), st.integers(0, 20), st.text(max_size=2))
    return (near | st.text(max_size=6)).filter(lambda word: word not in names)


def no_choice(names) -> st.SearchStrategy:
    return no("string") | misspelt(names)


def arity(*counts: int) -> st.SearchStrategy:
    """Functions of any other number of arguments."""
    makes = [lambda: f(X, Y), lambda a: a, lambda a, b: a, lambda a, b, c: a, lambda a, b, c, d: a]
    return st.sampled_from([make for n, make in enumerate(makes) if n not in counts])


def no_function(*counts: int) -> st.SearchStrategy:
    return no("function", "module", "none") | (arity(*counts) if counts else st.nothing())


NO_STEP = no("int", "float", "string") | no_number("(0, inf)").filter(
    lambda v: not isinstance(v, str)
) | misspelt(["auto"])  # fmt: skip

LEAVES = st.one_of(
    KINDS["none"], KINDS["string"], KINDS["int"], KINDS["float"], KINDS["complex"],
    KINDS["bool"], KINDS["class"], KINDS["function"], KINDS["array"], KINDS["object"],
    of_type(torch.int64), of_type(torch.bool), of_type(torch.complex64),
    st.just(torch.eye(2).to_sparse()),
)  # fmt: skip
NO_VARIABLE = st.one_of(
    LEAVES,
    LEAVES.map(lambda leaf: [X, leaf]),
    LEAVES.map(lambda leaf: {"w": X, "deep": (X, [leaf])}),
    st.sampled_from([[], {}, (), [[], {}], torch.zeros(0), [torch.zeros(0, 3)]]),
    st.sampled_from([nn.Tanh(), nn.Linear(2, 2).requires_grad_(False), nn.Linear]),
    st.sampled_from([torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), nn.Linear(2, 1)]),
    st.sampled_from([torch.zeros(2, device="meta").double(), [X, torch.zeros(1, device="meta")]]),
    st.tuples(st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(-9, 9)).map(t),
)


def no_scalar(value, x, y):
    """What a loss returns instead of a 0-dim tensor of x and y, or raises."""
    if isinstance(value, BaseException):
        raise value
    return value(f(x, y)) if callable(value) and not isinstance(value, type) else value


RETURNS = st.one_of(
    no("function", "module", "tensor", "class"),
    KINDS["tensor"].map(lambda v: lambda loss: v),  # depends on nothing
    st.integers(1, 3).map(lambda n: lambda loss: loss.expand(n)),
    st.sampled_from(
        [
            lambda loss: loss.detach(),
            lambda loss: loss.item(),
            lambda loss: loss.long(),
            lambda loss: loss.to(torch.complex64),
            lambda loss: (loss,),
            lambda loss: {"loss": loss},
            lambda loss: loss[None],
            lambda loss: loss.detach().numpy(),
            lambda loss: loss > 0,
            lambda loss: loss.to("meta"),
            lambda loss: loss * math.nan,
            lambda loss: loss - math.inf,
            lambda loss: loss / torch.zeros(()),
            lambda loss: loss @ loss,
            lambda loss: loss.mean(3),
            lambda loss: loss.item().real().x,
        ]
    ),
    st.builds(
        lambda kind, words: kind(words),
        st.sampled_from([RuntimeError, IndexError, KeyError, AttributeError, OSError, TypeError]),
        st.text(max_size=9),
    ),
)


def with_loss(call: Callable, level: str, value: Any):
    loss = partial(no_scalar, value)
    return call(**{level: lambda x, y: loss(x, y)})


class Bare:
    """Neither __iter__ nor __getitem__."""


NO_DATA = st.one_of(
    KINDS["int"], KINDS["float"], KINDS["bool"], KINDS["string"], KINDS["bytes"], KINDS["dict"],
    KINDS["class"], KINDS["function"], KINDS["object"], KINDS["tensor"], KINDS["array"],
    st.integers(0, 5).map(lambda n: (ONE for _ in range(n))),
    st.integers(0, 5).map(lambda n: iter([ONE] * n)),
    st.sampled_from([[], (), range(0), [None], (None,), Bare(), map(abs, [1])]),
)  # fmt: skip
NO_PAIR = st.one_of(
    no("tuple", "list"), st.lists(st.just(ONE), max_size=1), st.lists(st.just(ONE), min_size=3)
)
HYPERGRADIENT = no("none") | st.sampled_from(
    [bilevel.Neumann(), bilevel.Identity(), bilevel.Implicit, bilevel.FiniteDifference]
)
FOUND = (
    no("tensor") | st.integers(0, 5).filter(lambda n: n != 2).map(torch.ones) | st.just(X.long())
)


# -- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Row:
    """A misuse: ``call(value)`` must be refused for every value, naming ``words``.

    ``works``: whether a loss may have been called before.
    """

    argument: str
    values: st.SearchStrategy
    call: Callable[[Any], Any]
    words: tuple[str, ...]
    works: bool = False

    def __repr__(self):
        return f"{self.argument} {self.words}"


def row(argument, values, call, *words, works=False):
    return Row(argument, values, call, words or (argument.rsplit(".", 1)[-1],), works)


def option(owner: str, make: Callable, **values: st.SearchStrategy) -> list[Row]:
    return [
        row(f"{owner}.{name}", bad, lambda v, name=name: make(**{name: v}))
        for name, bad in values.items()
    ]


def with_batch(**data):
    return solve(outer=fb, inner=gb, **{"outer_data": [ONE], "inner_data": [ONE], **data})


SETTINGS = [
    *option(
        "solve",
        solve,
        steps=no_count(0),
        inner_steps=no_count(),
        checkpoint_every=no_count(),
        warm_start=no("bool"),
        resume=no("bool"),
        compile=no("bool"),
        progress=no("bool", "none"),
        tol=no_number("[0, inf)").filter(lambda v: v is not None),
        seed=no("int", "none") | st.integers(min_value=2**63) | st.integers(max_value=-(2**64)),
        callback=no_function(2),
        project=no_function(1),
        method=no_choice(["bisls-adam", "bisls-sgd", "bisps", "adam", "sgd"])
        | st.sampled_from([bilevel.Implicit(), bilevel.bisls, torch.optim.SGD]),
        checkpoint=no("none", "string") | st.sampled_from(["", ".", "/", "a\0b"]),
    ),
    row("solve.resume", st.just(True), lambda v: solve(resume=v), "resume", "checkpoint"),
    row(
        "solve.callback",
        no("none", "bool", "function", "module", "class").filter(
            lambda v: getattr(v, "dtype", None) not in (torch.bool,)
        ),
        lambda v: solve(callback=lambda s, r: v),
        "callback returned",
        works=True,
    ),
    row(
        "solve.project",
        FOUND,
        lambda v: solve(project=lambda x: v),
        "x",
        works=True,
    ),
    row(
        "solve.project",
        st.sampled_from([lambda x: x @ X[:1], lambda x: x.no, lambda x: x[7], lambda x: 1 / 0]),
        lambda v: solve(project=v),
        "project",
        works=True,
    ),
    *[
        Row(f"Problem.{r.argument[6:]}", r.values, r.call, r.words, r.works)
        for r in option(
            "solve",
            lambda **o: bilevel.Problem(**{"outer": f, "inner": g, **o}),
            outer=no_function() | KINDS["none"],
            inner=no_function() | KINDS["none"],
            project=no_function(1),
            compile=no("bool"),
        )
    ],
]
DATA = [
    *option("solve", with_batch, outer_data=NO_DATA, inner_data=NO_DATA),
    row("solve.outer_data", st.none(), lambda v: with_batch(outer_data=v), "outer_data is None"),
    row("solve.inner_data", st.none(), lambda v: with_batch(inner_data=v), "inner_data is None"),
    row("solve.outer_data", KINDS["list"].filter(bool), lambda v: solve(outer_data=v),
        "takes none"),
    row("solve.inner_data", KINDS["list"].filter(bool), lambda v: solve(inner_data=v), "takes none",
        works=True),
    row("solve.data", NO_DATA, lambda v: solve(fb, gb, data=v), "data"),
    row("solve.data", NO_PAIR, lambda v: solve(fb, gb, data=[v, v]), "data gave"),
    row("solve.data", st.sampled_from(["outer_data", "inner_data"]),
        lambda v: solve(fb, gb, data=[(ONE, ONE)], **{v: [ONE]}), "data was given together"),
    row("solve.outer_data", st.sampled_from([t([[1.0]]), (ONE,), {"a": ONE}, "b", [ONE, ONE]]),
        lambda v: with_batch(outer_data=[v, v]), "outer loss", works=True),
]  # fmt: skip


def entries(name: str, call: Callable) -> list[Row]:
    """What solve, hypergradient and check have in common."""
    found = []
    for variable in "xy":
        found.append(
            row(f"{name}.{variable}", NO_VARIABLE, lambda v, k=variable: call(**{k: v}), works=True)
        )
    for level in ("outer", "inner"):
        found += [
            row(f"{name}.{level}", no_function() | arity(2, 3),
                lambda v, k=level: call(**{k: v})),
            row(f"{name}.{level}", RETURNS, partial(with_loss, call, level), f"the {level} loss",
                works=True),
        ]  # fmt: skip
    return found


def hypergradient(outer=f, inner=g, x=X, y=Y, **options):
    return bilevel.hypergradient(outer, inner, x, y, **options)


def check(outer=f, inner=g, x=X, y=Y, **options):
    return bilevel.check(outer, inner, x, y, **options)


ENTRIES = entries("solve", solve)
OTHERS = [
    *entries("hypergradient", hypergradient),
    *entries("check", check),
    row("hypergradient.method", HYPERGRADIENT | st.none(), lambda v: hypergradient(method=v)),
    row("hypergradient.inner_batches", no("none", "list", "tuple") | st.just([]),
        lambda v: hypergradient(inner=gb, inner_batches=v)),
    row("hypergradient.inner_batch", KINDS["list"],
        lambda v: hypergradient(inner=gb, inner_batch=v, inner_batches=[ONE]), "inner_batches"),
    row("hypergradient.outer_batch", st.none(), lambda v: hypergradient(outer=fb, outer_batch=v),
        "outer_batch is None"),
    row("hypergradient.inner_batch", st.none(), lambda v: hypergradient(inner=gb, inner_batch=v),
        "inner_batch is None"),
    row("hypergradient.outer_batch", KINDS["list"], lambda v: hypergradient(outer_batch=v),
        "takes none"),
    row("hypergradient.inner_batches", FOUND.filter(lambda v: v is not None),
        lambda v: hypergradient(
            method=bilevel.Implicit(lambda product, b, q0: v)), "solver", works=True),
    row("check.methods", no() | HYPERGRADIENT.map(lambda v: [bilevel.Implicit(), v]),
        lambda v: check(methods=v)),
    row("check.directions", no_count(), lambda v: check(directions=v)),
    row("check.seed", no("int"), lambda v: check(seed=v)),
    row("check.outer_batch", st.none(), lambda v: check(outer=fb, outer_batch=v),
        "outer_batch is None"),
    row("check.inner_batch", st.none(), lambda v: check(inner=gb, inner_batch=v),
        "inner_batch is None"),
]  # fmt: skip

LEAF = X.clone().requires_grad_()


def backward(inner=g, argmin=lambda x: x.sin(), solver=None, x=LEAF, args=()):
    options = {} if solver is None else {"solver": solver}
    y = bilevel.implicit(inner, argmin, **options)(x, *args)
    y.sum().backward()


IMPLICIT = [
    row("implicit.inner", no_function() | arity(2) | KINDS["none"], lambda v: backward(inner=v)),
    row("implicit.argmin", no_function() | arity(1) | KINDS["none"], lambda v: backward(argmin=v)),
    row("implicit.solver", no("function", "module", "none"), lambda v: backward(solver=v)),
    row("implicit.solver", FOUND, lambda v: backward(solver=lambda p, b, q0: v), works=True),
    row("implicit.inner", RETURNS.filter(lambda v: v is None or isinstance(v, str | float | dict)),
        lambda v: backward(inner=lambda x, y: v), "inner returned"),
    row("implicit.inner", st.integers(1, 3),
        lambda v: backward(inner=lambda x, y: g(x, y).expand(v)), "inner returned", works=True),
    row("implicit.argmin", LEAVES.filter(lambda v: not isinstance(v, torch.Tensor)),
        lambda v: backward(argmin=lambda x: v), "argmin(x)"),
    row("implicit.argmin", LEAVES, lambda v: backward(x=v), "x"),
    row("implicit.argmin", st.lists(KINDS["int"], min_size=1),
        lambda v: backward(args=tuple(v)), "inner"),
]  # fmt: skip

SOLVER = no("function", "module")
SOLVERS = [
    *option("Neumann", bilevel.Neumann, terms=no_count(), step=NO_STEP),
    *option("StochasticNeumann", bilevel.StochasticNeumann, terms=no_count(), step=NO_STEP,
            form=no_choice(["sum", "random"])),
    *option("ConjugateGradient", bilevel.ConjugateGradient, steps=no_count(),
            rtol=no_number("[0, 1)"), warm_start=no("bool")),
    *option("Nystrom", bilevel.Nystrom, rank=no_count(), seed=no("int"),
            damping=no_number("[0, inf)").filter(lambda v: v is not None)),
    *option("Implicit", bilevel.Implicit, solver=SOLVER, average=no_count()),
    *option("FiniteDifference", bilevel.FiniteDifference, solver=SOLVER, average=no_count(),
            eps=no_number("(0, 1)").filter(lambda v: v is not None)),
    *option("Unrolled", bilevel.Unrolled, window=no_count().filter(lambda v: v is not None),
            recompute=no("bool"), step=NO_STEP),
]  # fmt: skip

POSITIVE = no_number("(0, inf)")
CEILING = POSITIVE.filter(lambda v: v is not None)
INNER_SOLVER = no_function(1, 3).filter(lambda v: not isinstance(v, type))


def stepped(**options):
    method = bilevel.bisls()
    arguments = {"problem": bilevel.Problem(f, g), "state": method.init(X, Y), **options}
    return method.step(**arguments)


def solved_by(inner_solver):
    return solve(method=bilevel.bisls(inner_solver=inner_solver))


METHODS = [
    *option("bisls", bilevel.bisls, direction=no_choice(["adam", "sgd"]), outer_step=POSITIVE,
            inner_step=POSITIVE, slack=no_number("[0, inf)"),
            reset=no_choice(["grow", "last", "fixed"]), hypergradient=HYPERGRADIENT,
            response=no_choice(["tangent", "refine", "frozen"]), inner_solver=INNER_SOLVER),
    *option("bisps", bilevel.bisps, max_outer_step=CEILING, max_inner_step=CEILING,
            min_outer_step=no("none"), hypergradient=HYPERGRADIENT, c=POSITIVE,
            outer_lower_bound=no_number("(-inf, inf)"), inner_solver=INNER_SOLVER,
            inner_lower_bound=no_number("(-inf, inf)")),
    row("bisps.min_outer_step", no_number("[0, 1]").filter(lambda v: v is not None),
        lambda v: bilevel.bisps(1.0, 1.0, v)),
    *option("fixed", bilevel.fixed, direction=no_choice(["adam", "sgd"]), outer_step=POSITIVE,
            inner_step=POSITIVE, hypergradient=HYPERGRADIENT, decay=no_number("[0, inf)"),
            inner_solver=INNER_SOLVER),
    *option("Method", partial(replace, bilevel.bisls()), name=no("string"),
            hypergradient=HYPERGRADIENT, direction=no_function(3), outer_rule=no(),
            inner_rule=no(), response=no_choice(["tangent", "refine", "frozen"]),
            inner_solver=INNER_SOLVER, averages=no("bool"), corrects=no("bool"), fresh=no("bool"),
            rounds=no("bool"),
            outer_batches=no_count(), training=no("none")),
    *option("Method.step", stepped, problem=no(), state=no(),
            inner_batches=no("int", "list", "tuple") | st.integers(max_value=0) | st.just([]),
            hessian_batches=no("none", "list", "tuple") | st.just([]),
            more_outer_batches=no("none", "list", "tuple")),
    row("Method.step.outer_batch", st.none(),
        lambda v: stepped(problem=bilevel.Problem(fb, g), outer_batch=v)),
    row("Method.step.inner_batches", st.integers(1, 9),
        lambda v: stepped(problem=bilevel.Problem(f, gb), inner_batches=v), "inner_batch"),
    *[row(f"Method.init.{k}", LEAVES | st.just([]),
          lambda v, k=k: bilevel.bisls().init(**{"x": X, "y": Y, k: v}), k) for k in "xy"],
    row("Method.init.x", NO_VARIABLE, lambda v: solve(x=v), works=True),
    row("bisls.inner_solver", no("function", "module", "none"),
        lambda v: solved_by(lambda parameters: v), "inner_solver returned", works=True),
    row("bisls.inner_solver", FOUND, lambda v: solved_by(lambda x, y, batches: v), "y",
        works=True),
    row("bisls.inner_solver", st.floats(1e-3, 1),
        lambda v: solved_by(lambda ps: torch.optim.SGD([X.clone().requires_grad_()], lr=v)),
        "inner_solver", works=True),
    row("bisls.inner_solver", st.just(torch.optim.SGD),
        lambda v: bilevel.bisls(hypergradient=bilevel.Unrolled(), inner_solver=v)),
]  # fmt: skip

# -- optim ----------------------------------------------------------------------------------------

RULES = {name: made for name, made in vars(optim).items() if inspect.isclass(made)}
del RULES["Last"]
SEARCHES = {"SLS", "SLSB", "AdaSLS"}
NEEDED = {"InexactPolyak": {"steps": 9}, "ClippedSGD": {"lr": 0.1, "max_norm": 1.0}}
SHARE = no_number("(0, 1)")
NO_OPTION: dict[str, st.SearchStrategy] = {
    **dict.fromkeys(("lower_bound",), no_number("(-inf, inf)")),
    **dict.fromkeys(("c", "c0", "eps", "lr"), POSITIVE),
    **dict.fromkeys(("max_lr", "max_norm"), no_number("(0, inf]")),
    **dict.fromkeys(("decay", "weight_decay", "r", "weight_lr_power"), no_number("[0, inf)")),
    **dict.fromkeys(("rho", "beta2"), no_number("[0, 1)")),
    "beta": no_number("[0, 1]"),
    "betas": no("tuple", "list")
    | st.sampled_from([(0.9,), (0.9, 1.0), (1.1, 0.9), (0.9, math.nan), (0.9, "a"), (0.9,) * 3]),
    "steps": no_count(),
    "warmup_steps": no_count(0),
    "safeguard": no_number("[0, inf)").filter(lambda v: v is not None and not isinstance(v, str))
    | misspelt(["ema"]),
    "averaging": no_number("[0, inf)").filter(lambda v: not isinstance(v, str))
    | misspelt(["linear"]),
    "shrink": SHARE,
    "reset": no_choice(["grow", "last", "fixed"]),
    "scale": POSITIVE.filter(lambda v: v is not None),
    "foreach": no("bool", "none"),
    "params": no("function", "tuple", "list", "set", "dict")
    | LEAVES.map(lambda leaf: [nn.Parameter(X.clone()), leaf])
    | LEAVES.map(lambda leaf: [{"params": [leaf]}])
    | st.sampled_from([[], (), {}, [{}], [{"lr": 1.0}], [{"params": []}], [X.clone(), "b"]])
    | st.just([X.clone().requires_grad_() * 2]),
}


def rule(name: str, **options: Any) -> Any:
    params = options.pop("params", None)
    if params is None:
        params = [nn.Parameter(X.clone())]
    return RULES[name](params, **{**NEEDED.get(name, {}), **options})


def no_option(name: str, key: str) -> st.SearchStrategy:
    if key == "c" and name in SEARCHES:
        return SHARE
    if key == "c" and name == "AdaSPS":
        return POSITIVE.filter(lambda v: v is not None)
    return NO_OPTION[key].filter(lambda v: v is not None) if key == "params" else NO_OPTION[key]


def group(name: str, **given: Any) -> None:
    optimizer = rule(name)
    try:
        optimizer.add_param_group({"params": [nn.Parameter(X.clone())], **given})
    finally:
        assert len(optimizer.param_groups) == 1  # nothing half done


OPTIM = [
    row(f"{name}.{key}", no_option(name, key), lambda v, n=name, k=key: rule(n, **{k: v}),
        *([name] if key == "params" else []))
    for name, made in RULES.items()
    for key in inspect.signature(made).parameters
]  # fmt: skip
GROUPS = [
    *[
        row(f"{name}.add_param_group", no("dict") | st.sampled_from([{}, {"lr": 1.0}]),
            lambda v, n=name: rule(n).add_param_group(v), name)
        for name in RULES
    ],
    *[
        row(f"{name}.add_param_group", no_number("[0, inf)"),
            lambda v, n=name: group(n, lr=v), "lr")
        for name in RULES
    ],
    *[
        row(f"{name}.add_param_group", LEAVES, lambda v, n=name: group(n, params=[v]), name)
        for name in RULES
    ],
]  # fmt: skip


def take(name: str, **options: Any) -> Any:
    optimizer = rule(name)
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    try:
        return optimizer.step(**options)
    finally:
        assert torch.equal(p, X)  # a refused call has moved nothing


NO_LOSS = no("int", "float", "none", "array", "tensor") | st.one_of(
    [st.integers(2, 3).map(torch.ones), of_type(torch.complex64), of_type(torch.bool)]
)
NO_VALUE = no("tensor", "function", "module", "class", "object", "array")
STEP = []
for name in RULES:
    if name in SEARCHES:
        STEP += [
            row(f"{name}.step.closure", no_function(0) | st.none(),
                lambda v, n=name: take(n, closure=v), "closure"),
            row(f"{name}.step.closure", NO_VALUE, lambda v, n=name: take(n, closure=lambda: v),
                "closure"),
            row(f"{name}.step.closure", st.integers(2, 3),
                lambda v, n=name: take(n, closure=lambda: torch.ones(v, requires_grad=True)),
                "loss"),
            row(f"{name}.step.loss", KINDS["float"],
                lambda v, n=name: take(n, closure=lambda: v, loss=v), "loss"),
        ]  # fmt: skip
        continue
    STEP += [
        row(f"{name}.step.closure", no_function(0), lambda v, n=name: take(n, closure=v)),
        row(f"{name}.step.closure", NO_LOSS,
            lambda v, n=name: take(n, closure=lambda: v, target=0.0), "loss"),
        row(f"{name}.step.loss", NO_LOSS, lambda v, n=name: take(n, loss=v, target=0.0)),
        row(f"{name}.step.loss", KINDS["float"],
            lambda v, n=name: take(n, closure=lambda: v, loss=v), "loss="),
    ]  # fmt: skip
    if name != "ClippedSGD":
        STEP += [
            row(f"{name}.step.target", NO_LOSS, lambda v, n=name: take(n, loss=1.0, target=v)),
            row(f"{name}.step.loss", st.none(), lambda v, n=name: take(n, loss=v, target=0.0)),
        ]

AREAS = {
    "settings": SETTINGS, "data": DATA, "variables and losses": ENTRIES, "other entries": OTHERS,
    "implicit": IMPLICIT, "solvers": SOLVERS, "methods": METHODS, "optim": OPTIM,
    "groups": GROUPS, "step": STEP,
}  # fmt: skip
EXAMPLES = max(1, int(os.environ.get("BILEVEL_MISUSES", 1000)) // len(AREAS))


def refused(case: Row, value: Any) -> None:
    CALLS.clear()
    try:
        case.call(value)
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        assert type(error) in (ValueError, TypeError), repr(error)
        frames = traceback.extract_tb(error.__traceback__)
        assert any(frames[-1].filename.startswith(root) for root in ROOTS), frames[-1]
        missing = [word for word in case.words if word not in message]
        assert not missing and ADVICE.search(message), message
    else:
        raise AssertionError("accepted")
    assert case.works or not CALLS, "a loss was called first"


@pytest.mark.parametrize("area", AREAS)
def test_misuse_is_refused_in_words(area):
    seen = []

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 100,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.data())
    def one(data):
        case = data.draw(st.sampled_from(AREAS[area]).map(lambda row: row), label="row")
        value = data.draw(case.values, label=case.argument)
        seen.append(case.argument)
        refused(case, value)

    one()
    assert len(seen) >= EXAMPLES


def test_every_argument_is_misused():
    """A new argument needs a row."""
    wanted = set()
    made_by_the_package = {"State", "Record", "Result"}
    for name in set(bilevel.__all__) - made_by_the_package:
        wanted |= {f"{name}.{p}" for p in inspect.signature(getattr(bilevel, name)).parameters}
    for name in ("step", "init"):
        found = inspect.signature(getattr(bilevel.Method, name)).parameters
        wanted |= {f"Method.{name}.{p}" for p in found if p != "self"}
    wanted |= {f"{n}.{p}" for n, made in RULES.items() for p in inspect.signature(made).parameters}
    given = {case.argument for rows in AREAS.values() for case in rows}
    assert wanted <= given, wanted - given


def test_names_that_do_not_exist():
    for call in (solve, bilevel.bisls, bilevel.bisps, bilevel.fixed, bilevel.Neumann, rule):
        arguments = ("SPS",) if call is rule else ()
        with pytest.raises(TypeError, match="unexpected keyword argument 'stepss'"):
            call(*arguments, stepss=3)
