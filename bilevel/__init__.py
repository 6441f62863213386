"""Bilevel optimization in PyTorch without learning rates."""

from bilevel.hypergradient import FiniteDifference, Implicit, Unrolled
from bilevel.linear import (
    ConjugateGradient,
    Identity,
    Neumann,
    Nystrom,
    StochasticNeumann,
)
from bilevel.methods import Method, State, bisls, bisps, fixed
from bilevel.problem import Problem
from bilevel.record import Record, Result
from bilevel.solve import solve
