"""What an argument may be. Each check tells what was given, why it cannot be, what to give.

Wrong kinds are a TypeError, wrong values of the right kind a ValueError.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, TypeVar

E = TypeVar("E", bound=Exception)

WORDS = {
    "(0, inf)": "a positive, finite number",
    "(0, inf]": "a positive number",
    "[0, inf)": "a finite number >= 0",
    "(-inf, inf)": "a finite number",
}


def shown(value: Any) -> str:
    """The value in at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the value's own repr is broken
        text = "?"
    return text if len(text) <= 80 else text[:77] + "..."


def kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def told(kind: Callable[[str], E], message: str) -> E:
    """An error whose message says all, so that nobody adds to it."""
    error = kind(message)
    error.told = True  # type: ignore[attr-defined]
    return error


def is_told(error: Exception) -> bool:
    return getattr(error, "told", False)


def _said(owner: str, name: str, value: Any) -> str:
    return f"{owner}({name}={shown(value)})" if owner else f"{name}={shown(value)}"


def _wrong_kind(owner: str, name: str, value: Any, wanted: str) -> TypeError:
    return TypeError(f"{_said(owner, name, value)} is {kind(value)}. Give {wanted}.")


def whole(owner: str, name: str, value: Any, least: int | None = 1, hint: str = "") -> None:
    """A whole number of at least ``least``, and of 64 bits at most; no bool."""
    wanted = "a whole number" + ("" if least is None else f" of at least {least}") + hint
    # an array or a tensor of one number has __index__ too, and a NumPy integer a dtype
    counts = hasattr(value, "__index__") and not isinstance(value, type | bool)
    if not counts or (hasattr(value, "dtype") and not isinstance(value, Integral)):
        raise _wrong_kind(owner, name, value, wanted)
    if not (-(2**63) if least is None else least) <= operator.index(value) < 2**63:
        raise ValueError(f"{_said(owner, name, value)} is out of range. Give {wanted}.")


def number(owner: str, name: str, value: Any, interval: str = "(0, inf)", hint: str = "") -> None:
    """A real number in ``interval``, such as "(0, 1]"; NaN lies in none; no bool."""
    wanted = WORDS.get(interval, f"a number in {interval}") + hint
    # a fraction cannot be multiplied with a tensor
    real = isinstance(value, Real) and not isinstance(value, bool | Fraction)
    if not real:
        raise _wrong_kind(owner, name, value, wanted)
    low, high = map(float, interval[1:-1].split(", "))
    above = low < value or (interval[0] == "[" and low == value)
    if not (above and (value < high or (interval[-1] == "]" and value == high))):
        raise ValueError(f"{_said(owner, name, value)} is out of range. Give {wanted}.")


def flag(owner: str, name: str, value: Any) -> None:
    """True or False, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise _wrong_kind(owner, name, value, "True or False")


def choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    listed = ", ".join(map(repr, choices))
    if not isinstance(value, str):
        raise _wrong_kind(owner, name, value, f"one of {listed}")
    if value not in choices:
        near = difflib.get_close_matches(value.lower(), choices, n=2, cutoff=0.4)
        meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        said = _said(owner, name, value)
        raise ValueError(f"{said} is not known{meant}. Give one of {listed}.")


def step(owner: str, value: Any) -> None:
    """Of a series: a number, or 'auto'."""
    if isinstance(value, str):
        choice(owner, "step", value, ["auto"])
    else:
        number(owner, "step", value, hint=", below 2 / (largest eigenvalue of g_yy), or 'auto'")


def function(
    owner: str,
    name: str,
    value: Any,
    example: str,
    count: int | None = None,
    classes: bool = False,
) -> None:
    """Something that can be called, with ``count`` arguments; ``example`` shows how it looks.
    A class can be called, but is hardly meant unless ``classes``."""
    if not callable(value) or (isinstance(value, type) and not classes):
        raise TypeError(
            f"{_said(owner, name, value)} is {kind(value)}, which is no function. Give {example}."
        )
    if count is not None and not takes(value, count):
        raise TypeError(
            f"{_said(owner, name, value)} cannot be called with {count} "
            f"argument{'s' if count > 1 else ''}. Give {example}."
        )


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with ``count`` positional arguments, as far as can be seen."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def path(name: str, value: Any) -> None:
    """Of a file."""
    if not isinstance(value, str | os.PathLike):
        raise _wrong_kind("", name, value, "the path of a file, such as 'runs/checkpoint.pt'")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text or os.path.isdir(text):
        raise ValueError(
            f"{_said('', name, value)} cannot be the path of a file. Give one such as "
            f"'runs/checkpoint.pt'."
        )


def made_by(owner: str, name: str, value: Any, attribute: str, what: str, examples: str) -> None:
    """An object (no class) with a method, such as a hypergradient with ``estimate``."""
    if isinstance(value, type) or not callable(getattr(value, attribute, None)):
        called = f"; call it: {value.__name__}()" if isinstance(value, type) else ""
        raise TypeError(
            f"{_said(owner, name, value)} is {kind(value)}, not {what}{called}. Give {examples}."
        )


def instance(owner: str, name: str, value: Any, wanted: type, example: str) -> None:
    if not isinstance(value, wanted):
        raise _wrong_kind(owner, name, value, example)


def pair(owner: str, name: str, value: Any, example: str) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise _wrong_kind(owner, name, value, f"a pair, such as {example}")


def several(owner: str, name: str, value: Any) -> None:
    """A list or tuple of batches, of one at least."""
    if not isinstance(value, list | tuple):
        raise _wrong_kind(owner, name, value, "a list of batches, such as [batch]")
    if not value:
        raise ValueError(f"{_said(owner, name, value)} is empty. Give one batch at least.")
