"""Checks by independent recomputation. Each raises AssertionError when the engine is wrong.

They are functions so that the tests and the planted bugs (test_planted_bugs.py) share them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

import bilevel
from bilevel import ConjugateGradient, Implicit, Problem
from bilevel.layout import Layout
from bilevel.problem import Draw, Oracle
from tests.tables import QUADRATIC, RIDGES, Case, Solver, flat, relative, ridge

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


def tangent_slope(method, case: Case) -> None:
    """The slope is d/dt f(x + t d, y(t)) at 0, and phi(0) = f(x, y).

    Off the inner solution, along a random direction and along -h.
    """
    oracle = Oracle(Problem(case.outer, case.inner), Layout(case.x, "x"), Layout(case.y, "y"))
    X, Y = flat(case.x), flat(case.y)
    path = []
    if isinstance(method, bilevel.Unrolled):
        Y, path = method.descend(oracle, X, Y, Draw())
    h = method.estimate(oracle, X, Y, Draw(), [Draw()], path, None)
    assert float(h.value) == float(oracle.value("outer", X, Y, Draw()))
    rng = torch.Generator().manual_seed(9)
    scale = 1e-3 * float(torch.linalg.vector_norm(X) / torch.linalg.vector_norm(h.grad))
    for d in (-scale * h.grad, 1e-3 * torch.randn(len(X), generator=rng, dtype=X.dtype)):
        slope, _, follow = h.respond(d)

        def phis(t: float, d=d, follow=follow) -> torch.Tensor:
            y, trusted, bent, _ = follow(t, X + t * d)
            assert bool(trusted)
            return torch.stack([oracle.value("outer", X + t * d, at, Draw()) for at in (y, bent)])

        near, far = phis(1.0) - phis(-1.0), phis(2.0) - phis(-2.0)
        size = abs(float(slope)) + 1e-3 * float(
            torch.linalg.vector_norm(d) * torch.linalg.vector_norm(h.grad)
        )
        for numeric in ((8 * near - far) / 12).tolist():
            assert abs(float(slope) - numeric) < 1e-6 * size
            # the hypergradient predicts it, whatever the errors of the linear solves
            assert abs(float(torch.dot(h.grad, d)) - numeric) < 1e-6 * size


def failed_step_not_carried() -> None:
    """A search that fails moves neither x nor the step to start from, and is counted."""
    case = RIDGES[0]

    def outer(x, y, broken):
        value = case.outer(x, y)
        # trials, which are evaluated without gradients, are not finite on a broken batch
        return value * math.nan if broken and not torch.is_grad_enabled() else value

    method = bilevel.bisls("sgd")
    problem = Problem(outer, case.inner)
    state = method.init(case.x, case.y)
    state, _ = method.step(problem, state, False, 5)  # in which x may wait for y
    for _ in range(3):
        state, record = method.step(problem, state, False, 5)
        assert record.failure is None and record.outer_step > 0
    assert state.outer_last == record.outer_step
    failed, broken = method.step(problem, state, True, 5)
    assert broken.failure is not None and "no acceptable step" in broken.failure
    assert broken.outer_step == 0.0 and broken.outer_trials > 30
    assert torch.equal(flat(failed.x), flat(state.x))
    assert failed.outer_last == state.outer_last
    assert failed.failures == 1 and failed.k == state.k + 1
    after, record = method.step(problem, failed, False, 5)
    assert record.failure is None and after.failures == 0
    assert record.outer_trials <= 4
    assert record.outer_step >= state.outer_last / 4


def solved_by_newton() -> None:
    """Where g is quadratic and g_xy constant, tangent and correction end on y*(x) at once."""
    method = bilevel.bisls("sgd", hypergradient=Implicit(ConjugateGradient(200, 0.0)))
    for inner_steps in (1, 5):
        far = 10 * flat(QUADRATIC.y)  # behind by more than the step gains, after any steps here
        # where x has not moved yet it would wait
        state = replace(method.init(QUADRATIC.x, far), k=1, outer_last=1e-6)
        problem = Problem(QUADRATIC.outer, QUADRATIC.inner)
        state, record = method.step(problem, state, None, inner_steps)
        assert record.outer_step > 0
        solution = QUADRATIC.solution(flat(state.x).numpy())
        assert np.abs(flat(state.y).numpy() - solution).max() < 1e-9 * np.abs(solution).max()


def fresh_batches() -> None:
    """The hypergradient of an iteration is that of its own batches, by the closed form.

    Every batch is another ridge problem, so a hypergradient on an earlier batch is far off.
    """
    cases = {j: ridge(6, p=5, n=12, seed=20 + j) for j in range(6)}

    def inner(x, y, j):
        return cases[j].inner(x, y)

    def outer(x, y, j):
        return cases[j].outer(x, y)

    method = bilevel.fixed("sgd", 0.1, 0.2, bilevel.Implicit(bilevel.ConjugateGradient(50, 0.0)))
    points: list[tuple[np.ndarray, np.ndarray]] = []
    x = cases[0].x
    result = bilevel.solve(
        outer,
        inner,
        x,
        cases[0].y,
        outer_data=[0, 1, 2],
        inner_data=[3, 4, 5, 0],
        method=method,
        steps=4,
        inner_steps=2,
        callback=lambda s, r: points.append((s.x.numpy(), s.y.numpy())),
    )
    assert len(result.history) == 4
    x = x.numpy()
    for k, (new, y) in enumerate(points):
        up, low = cases[k % 3], cases[[3, 4, 5, 0][(2 * k + 2) % 4]]
        cross = np.diag(np.exp(x) * y)
        h = up.outer_x(x, y) - cross @ np.linalg.solve(low.hessian(x), up.outer_y(x, y))
        assert relative(x - new, 0.1 * h) < 1e-9
        x = new


def dropout_replayed() -> None:
    """phi(0), evaluated again, is phi(0); and a search under dropout meets one function.

    The outer loss has dropout 0.5: with a new mask at each trial the values spread by tens of
    per cent, and an accepted step would not be a decrease under the mask of phi(0).
    """
    drop = torch.nn.Dropout(0.5)
    case = ridge(6, p=12, n=30)
    masks: dict[tuple[float, ...], int] = {}

    def outer(x, y):
        mask = drop(torch.ones(12, dtype=torch.float64))
        masks[tuple(mask.tolist())] = masks.get(tuple(mask.tolist()), 0) + 1
        return case.outer(x, mask * y)

    method = bilevel.bisls("sgd")
    state = method.init(case.x, case.y)
    problem = Problem(outer, case.inner)
    for k in range(4):
        masks.clear()
        state, record = method.step(problem, state, None, 5)
        assert record.failure is None
        # once it is known that f draws, one draw more judges those that it is the mean of
        assert len(masks) == record.outer_batches + (k > 0), k
        # a trial whose tangent is refused is not evaluated; the average of the iterates is, too
        each = 1 + 2 * record.outer_trials + (k > 0)
        assert 2 * record.outer_batches <= sum(masks.values()) <= record.outer_batches * each + 1, k

    oracle = Oracle(problem, Layout(case.x, "x"), Layout(case.y, "y"))
    draw, X, Y = Draw(), flat(case.x), flat(case.y)
    values = {float(oracle.value("outer", X, Y, draw)) for _ in range(5)}
    value, _, _ = oracle.outer_gradients(X, Y, draw)
    assert values == {float(value)}
