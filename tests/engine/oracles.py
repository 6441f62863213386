"""Checks by independent recomputation. Each raises AssertionError when the engine is wrong.

They are functions so that the tests and the planted bugs (test_planted_bugs.py) share them.
"""

from __future__ import annotations

import numpy as np
import torch

import bilevel
from tests.tables import Case, Solver, flat, relative

EPS = np.finfo(np.float64).eps


def closed_form(solver: Solver, case: Case) -> None:
    """A converged hypergradient at the inner solution is the closed form."""
    h = bilevel.hypergradient(case.outer, case.inner, case.x, case.y_star, method=solver.make(case))
    # a dense solve in double precision is itself good to kappa eps only
    assert relative(h.grad, case.exact) < max(solver.tolerance, 20 * case.kappa * EPS)
    if solver.residual:
        assert float(h.residual) < max(solver.tolerance, 20 * case.kappa * EPS)
    else:
        assert h.residual is None


def true_residual(method: bilevel.Implicit, case: Case) -> float:
    """The residual that is reported is that of the q in the gradient, to 1 %.

    q is read back from the gradient: grad = f_x - g_xy q with g_xy of full rank.
    """
    torch.manual_seed(3)
    h = bilevel.hypergradient(case.outer, case.inner, case.x, case.y_star, method=method)
    assert h.residual is not None
    cross = case.cross(case.X).T
    assert cross.shape[0] >= cross.shape[1] or method.solver == bilevel.Identity()
    f_x = case.outer_x(case.X, case.Y)
    q = np.linalg.lstsq(cross, f_x - flat(h.grad).numpy(), rcond=None)[0]
    residual = np.linalg.norm(case.H @ q - case.b) / np.linalg.norm(case.b)
    floor = 1e-5 if isinstance(method, bilevel.FiniteDifference) else 1e-9
    assert abs(float(h.residual) - residual) <= 0.01 * residual + floor
    return residual
