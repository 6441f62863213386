"""Hypergradients by themselves: one call, a check against finite differences, a differentiable
argmin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.hypergradient import FiniteDifference, Hypergradient, Implicit, Unrolled
from bilevel.layout import Layout, Variable, leaves, rebuild
from bilevel.linear import ConjugateGradient, Identity, Neumann, Nystrom, Solver
from bilevel.problem import Cost, Draw, Oracle, Problem
from bilevel.steps import armijo
from bilevel.validate import validated
