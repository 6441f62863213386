"""Checks of options: what was given, why it cannot be, what to give."""

from __future__ import annotations


def above(name: str, value: float, low: float) -> None:
    """``value`` > ``low``; NaN is refused as well."""
    if not value > low:
        raise ValueError(
            f"{name}={value!r} is not above {low}, so no step could be taken. Give {name} > {low}."
        )


def at_least(name: str, value: float, low: float) -> None:
    """``value`` >= ``low``."""
    if not value >= low:
        raise ValueError(
            f"{name}={value!r} is below {low}, where it means nothing. Give {name} >= {low}."
        )


def between(name: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """``value`` in [low, high), or in [low, high] where ``closed``."""
    if not (low <= value < high or (closed and value == high)):
        end = "]" if closed else ")"
        raise ValueError(
            f"{name}={value!r} is a weight outside [{low}, {high}{end}. Give one in that interval."
        )


def safeguard_option(safeguard: float | str | None, rho: float) -> None:
    """A safeguard is None, a number >= 0 or "ema"."""
    if isinstance(safeguard, str):
        if safeguard != "ema":
            raise ValueError(
                f"safeguard={safeguard!r} is no safeguard. Give a number >= 0, or 'ema' for the "
                "moving average of the squared gradient norm."
            )
    elif safeguard is not None:
        at_least("safeguard", safeguard, 0)
    between("rho", rho, 0, 1)
