"""Bilevel optimization in PyTorch without learning rates."""

from bilevel.api import check, hypergradient
from bilevel.argmin import implicit
from bilevel.hypergradients import FiniteDifference, Implicit, Unrolled
from bilevel.linear import (
    ConjugateGradient,
    Identity,
    Neumann,
    Nystrom,
    StochasticNeumann,
)
from bilevel.loop import solve
from bilevel.method import Method
from bilevel.presets import bisls, bisps, fixed
from bilevel.problem import Problem
from bilevel.record import Record, Result
from bilevel.state import State

__all__ = [
    "ConjugateGradient",
    "FiniteDifference",
    "Identity",
    "Implicit",
    "Method",
    "Neumann",
    "Nystrom",
    "Problem",
    "Record",
    "Result",
    "State",
    "StochasticNeumann",
    "Unrolled",
    "bisls",
    "bisps",
    "check",
    "fixed",
    "hypergradient",
    "implicit",
    "solve",
]
