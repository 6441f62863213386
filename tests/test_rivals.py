"""The rival methods against their papers' formulas in NumPy, and against closed forms.

g = y'Hy/2 + x'Cy + e'y and f = (y-t)'P(y-t)/2 + x'Rx/2 + x'Dy + s'x, with every block of its own
shape, so that no transpose, sign or block can stand for another. Batches differ in H, C, e, P, s,
so that a batch used in the wrong place changes the result.
"""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
import torch

from benchmarks.problems import Case, Shuffled
from benchmarks.rivals import RIVALS, Batches, Constants, Sizes, Whole
from bilevel.data import Cycle
from bilevel.layout import Layout
from bilevel.problem import Oracle, Problem

ALPHA, BETA = 0.07, 0.13
TUNED = [name for name, rival in RIVALS.items() if rival.steps]


class Quadratic:
    """Coupled quadratics in NumPy, and the same as a case."""

    def __init__(self, outer: int = 1, inner: int = 1, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)

        def definite(n, low):
            Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
            return Q @ np.diag(np.linspace(low, 1, n)) @ Q.T

        self.H = [definite(4, 0.4) for _ in range(inner)]
        self.C = [0.5 * rng.normal(size=(3, 4)) for _ in range(inner)]
        self.e = [rng.normal(size=4) for _ in range(inner)]
        self.P = [definite(4, 0.3) for _ in range(outer)]
        self.s = [rng.normal(size=3) for _ in range(outer)]
        self.R, self.D, self.t = definite(3, 0.6), 0.2 * rng.normal(size=(3, 4)), rng.normal(size=4)
        self.x, self.y = rng.normal(size=3), rng.normal(size=4)

    def fx(self, x, y, j):
        return self.R @ x + self.D @ y + self.s[j]

    def fy(self, x, y, j):
        return self.P[j] @ (y - self.t) + self.D.T @ x

    def gx(self, x, y, i):
        return self.C[i] @ y

    def gy(self, x, y, i):
        return self.H[i] @ y + self.C[i].T @ x + self.e[i]

    @property
    def case(self) -> Case:
        """Batches are tuples of the blocks that differ."""
        T = torch.from_numpy
        R, D, t = T(self.R), T(self.D), T(self.t)

        def inner(x, y, batch):
            H, C, e = batch
            return y @ H @ y / 2 + x @ C @ y + e @ y

        def outer(x, y, batch):
            P, s = batch
            return (y - t) @ P @ (y - t) / 2 + x @ R @ x / 2 + x @ D @ y + s @ x

        data = {
            "outer_data": [tuple(map(T, b)) for b in zip(self.P, self.s, strict=True)],
            "inner_data": [tuple(map(T, b)) for b in zip(self.H, self.C, self.e, strict=True)],
        }
        return Case(outer, inner, T(self.x), T(self.y), lambda x: self.value(x.numpy()), data)

    def means(self):
        return (np.mean(m, axis=0) for m in (self.H, self.C, self.e, self.P, self.s))

    def response(self):
        """y*(x) = A x + b."""
        H, C, e, _, _ = self.means()
        return -np.linalg.solve(H, C.T), -np.linalg.solve(H, e)

    def value(self, x):
        *_, P, s = self.means()
        A, b = self.response()
        y = A @ x + b
        r = y - self.t
        return float(r @ P @ r / 2 + x @ self.R @ x / 2 + x @ self.D @ y + s @ x)

    def hypergradient(self, x):
        *_, P, s = self.means()
        A, b = self.response()
        y = A @ x + b
        return self.R @ x + self.D @ y + s + A.T @ (P @ (y - self.t) + self.D.T @ x)

    def solution(self):
        """The hypergradient is affine in x."""
        at0 = self.hypergradient(np.zeros(3))
        M = np.stack([self.hypergradient(v) - at0 for v in np.eye(3)], axis=1)
        assert np.linalg.eigvalsh((M + M.T) / 2).min() > 0.1
        return -np.linalg.solve(M, at0)

    def penalised(self, weight):
        """The stationary point in x of min_y f + weight (g - min_z g)."""
        H, C, e, P, s = self.means()
        A, b = self.response()
        K = P + weight * H

        def slope(x):
            y = np.linalg.solve(K, P @ self.t - self.D.T @ x - weight * (C.T @ x + e))
            return self.R @ x + self.D @ y + s + weight * (C @ y - C @ (A @ x + b))

        at0 = slope(np.zeros(3))
        return -np.linalg.solve(np.stack([slope(v) - at0 for v in np.eye(3)], axis=1), at0)


def gap(problem: Quadratic, x) -> float:
    return problem.value(np.asarray(x)) - problem.value(problem.solution())


# -- the formulas of the papers --------------------------------------------------------------


def single(p, steps, move):
    """SOBA's three directions with v = -q as the paper has it, batch k of each level."""
    x, y, v = p.x, p.y, np.zeros(4)
    J, I = cycle(range(len(p.P))), cycle(range(len(p.H)))
    for k in range(steps):
        j, i = next(J), next(I)
        dy = p.gy(x, y, i)
        dv = p.H[i] @ v + p.fy(x, y, j)
        dx = p.C[i] @ v + p.fx(x, y, j)
        x, y, v = move(k, x, y, v, dx, dy, dv)
    return x


def soba_numpy(p, steps, inner):
    def move(k, x, y, v, dx, dy, dv):
        r, c = BETA / np.sqrt(k + 1), ALPHA / np.sqrt(k + 1)
        return x - c * dx, y - r * dy, v - r * dv

    return single(p, steps, move)


def ma_soba_numpy(p, steps, inner):
    h = np.zeros(3)

    def move(k, x, y, v, dx, dy, dv):
        nonlocal h
        x = x - ALPHA * h
        h = 0.9 * h + 0.1 * dx
        return x, y - BETA * dy, v - BETA * dv

    return single(p, steps, move)


def s_tfbo_numpy(p, steps, inner):
    squares = np.full(3, 0.01**2)

    def move(k, x, y, v, dx, dy, dv):
        squares[:] += [dx @ dx, dy @ dy, dv @ dv]
        a, b, c = np.sqrt(squares)
        return x - dx / (a * max(b, c)), y - dy / b, v - dv / max(b, c)

    return single(p, steps, move)


def stocbio_numpy(p, steps, inner, Q=10):
    x, y = p.x, p.y
    J, I = cycle(range(len(p.P))), cycle(range(len(p.H)))
    for _ in range(steps):
        j = next(J)
        for _ in range(inner):
            y = y - BETA * p.gy(x, y, next(I))
        factors = [np.eye(4) - BETA * p.H[next(I)] for _ in range(Q)]
        v = p.fy(x, y, j)
        # eta sum_{q=-1}^{Q-1} prod_{j=Q-q}^{Q} (I - eta H_j) v, the product built from v outwards
        total, power = v.copy(), np.eye(4)
        for factor in factors:
            power = factor @ power
            total += power @ v
        x = x - ALPHA * (p.fx(x, y, j) - p.C[next(I)] @ (BETA * total))
    return x


def amigo_numpy(p, steps, inner, N=10):
    x, y, z = p.x, p.y, np.zeros(4)
    J, I = cycle(range(len(p.P))), cycle(range(len(p.H)))
    for _ in range(steps):
        j = next(J)
        for _ in range(inner):
            y = y - BETA * p.gy(x, y, next(I))
        u, v = p.fx(x, y, j), p.fy(x, y, j)
        for _ in range(N):
            z = z - BETA * (p.H[next(I)] @ z + v)
        x = x - ALPHA * (u + p.C[next(I)] @ z)
    return x


def f2sa_numpy(p, steps, inner):
    x, y, z = p.x, p.y, p.y
    J, I = cycle(range(len(p.P))), cycle(range(len(p.H)))
    xi = ALPHA / (BETA / 2)  # at the first iteration xi alpha_0 = ALPHA
    for k in range(steps):
        alpha, gamma = BETA / 2 * (k + 1) ** (-5 / 7), BETA * (k + 1) ** (-4 / 7)
        weight = gamma / (2 * alpha)
        for _ in range(inner):
            j, first, second = next(J), next(I), next(I)
            z, y = (
                z - gamma * p.gy(x, z, first),
                y - alpha * (p.fy(x, y, j) + weight * p.gy(x, y, second)),
            )
        j, first, second = next(J), next(I), next(I)
        x = x - xi * alpha * (p.fx(x, y, j) + weight * (p.gx(x, y, second) - p.gx(x, z, first)))
    return x


FORMULAS = {
    "soba": soba_numpy,
    "stocbio": stocbio_numpy,
    "amigo": amigo_numpy,
    "ma-soba": ma_soba_numpy,
    "f2sa": f2sa_numpy,
    "s-tfbo": s_tfbo_numpy,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("steps, inner", [(1, 1), (4, 3)])
def test_steps_are_those_of_the_paper(name, steps, inner):
    problem = Quadratic(outer=5, inner=7)
    found = RIVALS[name].run(problem.case, steps, inner, ALPHA, BETA, seed=0)
    expected = FORMULAS[name](problem, steps, inner)
    if not (name == "ma-soba" and steps == 1):  # whose first step is along h = 0
        assert np.abs(expected - problem.x).max() > 1e-3
    np.testing.assert_allclose(found.x.numpy(), expected, rtol=0, atol=1e-12)
    assert found.reason == f"all {steps} steps were taken"


COSTS = {  # gradients and Hessian products of an iteration with T inner steps
    "soba": lambda T: (2, 1),
    "ma-soba": lambda T: (2, 1),
    "s-tfbo": lambda T: (2, 1),
    "stocbio": lambda T: (T + 12, 11),
    "amigo": lambda T: (T + 12, 11),
    "f2sa": lambda T: (3 * T + 3, 0),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_counted(name):
    seen = []

    def watch(k, x, cost, seconds):
        seen.append((k, cost, seconds))

    RIVALS[name].run(Quadratic().case, 3, 4, ALPHA, BETA, seed=0, watch=watch)
    gradients, products = COSTS[name](4)
    for n, (k, cost, seconds) in enumerate(seen):
        assert (k, cost.gradients, cost.hessian_products, cost.loss_evaluations) == (
            n,
            (n + 1) * gradients,
            (n + 1) * products,
            0,
        )
        assert seconds > 0
    assert len(seen) == 3


# -- convergence -----------------------------------------------------------------------------

GOOD = {  # steps, inner steps, alpha, beta, options
    "soba": (300, 1, 0.3, 0.9, {"decay": 0.0}),
    "ma-soba": (350, 1, 0.1, 0.9, {"weight": 0.5}),
    "stocbio": (25, 5, 0.4, 0.9, {"terms": 20}),
    "amigo": (25, 5, 0.4, 0.9, {}),
    "s-tfbo": (300, 1, 0.0, 0.0, {}),
    "maid": (13, 1, 0.0, 0.0, {"start": 0.6}),
}


@pytest.mark.parametrize("name", GOOD)
def test_converges_to_the_known_optimum(name):
    problem = Quadratic()
    *numbers, options = GOOD[name]
    found = RIVALS[name].run(problem.case, *numbers, seed=0, **options)
    assert gap(problem, problem.x) > 0.1
    assert -1e-12 < gap(problem, found.x) < 1e-6


def test_the_bias_of_f2sa_falls_like_one_over_the_penalty():
    problem = Quadratic()
    distances = []
    # the larger the penalty, the more exactly y and z must be known
    for weight, inner in ((1.0, 6), (10.0, 14), (100.0, 24)):
        found = RIVALS["f2sa"].run(
            problem.case, 45, inner, 0.3, 0.9, seed=0, penalty=weight, exponents=(0.0, 0.0)
        )
        np.testing.assert_allclose(found.x.numpy(), problem.penalised(weight), atol=1e-4)
        distances.append(np.linalg.norm(found.x.numpy() - problem.solution()))
    assert distances[1] < distances[0] / 4
    assert distances[2] == pytest.approx(distances[1] / 10, rel=0.15)


def test_a_short_series_biases_stocbio():
    problem = Quadratic()
    short, long = (
        RIVALS["stocbio"].run(problem.case, 20, 5, 0.4, 0.9, seed=0, terms=n) for n in (1, 20)
    )
    assert gap(problem, short.x) > 100 * abs(gap(problem, long.x))


# -- MAID ------------------------------------------------------------------------------------


def constants(problem: Quadratic) -> Constants:
    H, C, _, P, _ = problem.means()
    values = np.linalg.eigvalsh(H)
    norm = lambda M: float(np.linalg.norm(M, 2))  # noqa: E731
    return Constants(values[0], values[-1], norm(C), (norm(problem.D), norm(P)), (0.0, 0.0))


@pytest.mark.parametrize("batches, start", [(1, 0.1), (3, 4.0)])
def test_maid_keeps_its_bounds(batches, start):
    problem = Quadratic(outer=batches, inner=batches)
    notes = []
    found = RIVALS["maid"].run(
        problem.case,
        10,
        seed=0,
        constants=constants(problem),
        start=start,
        accuracy=1.0,
        note=lambda **n: notes.append(n),
    )
    assert len(notes) == 10, found.reason
    A, b = problem.response()
    *_, P, weights = problem.means()
    steep = np.linalg.norm(P, 2)

    def bounds(x, y, epsilon):
        r = y - problem.t
        value = r @ P @ r / 2 + x @ problem.R @ x / 2 + x @ problem.D @ y + weights @ x
        doubt = np.linalg.norm(P @ r + problem.D.T @ x) * epsilon + steep / 2 * epsilon**2
        return value - doubt, value + doubt

    tightest, trial = 0.0, start
    for n in notes:
        x, y, z = (n[name].numpy() for name in "xyz")
        after, y_after = (part.numpy() for part in n["there"])
        error = np.linalg.norm(z - problem.hypergradient(x))
        assert error <= n["bound"] <= (1 - 1e-4) * np.linalg.norm(z)
        tightest = max(tightest, error / n["bound"])
        for point, solution in ((x, y), (after, y_after)):
            assert np.linalg.norm(solution - (A @ point + b)) <= n["epsilon"]
            low, high = bounds(point, solution, n["epsilon"])
            assert low <= problem.value(point) <= high
        np.testing.assert_allclose(after, x - n["alpha"] * z, rtol=0, atol=1e-14)
        decrease = 1e-8 * n["alpha"] * (z @ z)
        assert bounds(after, y_after, n["epsilon"])[1] <= (
            bounds(x, y, n["epsilon"])[0] - decrease + 1e-14
        )
        assert problem.value(after) <= problem.value(x) - decrease
        shrunk = np.log(n["alpha"] / trial) / np.log(0.9)
        assert shrunk == pytest.approx(round(shrunk), abs=1e-9) and shrunk > -0.5
        trial = n["alpha"] * 10 / 9
    assert tightest > 0.01  # the bound is not vacuous
    assert len(notes) == 10 and torch.equal(found.x, notes[-1]["there"][0])
    if start < 1:  # too short: it grows
        assert notes[-1]["alpha"] == pytest.approx(start * (10 / 9) ** 9)
    else:  # too long: it falls at once
        assert notes[0]["alpha"] < start / 2


def test_maid_bound_with_curved_losses():
    """Where g_yy and g_xy change with y, every term of the bound is in use."""
    H = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    C = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6]], dtype=torch.float64)
    t = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def inner(x, y):  # g_yy = H + diag(sech^2 y), g_xy = C diag(cos y)
        return y @ H @ y / 2 + y.cosh().log().sum() + (C.T @ x) @ y.sin()

    def outer(x, y):
        return ((y - t) ** 2).sum() / 2 + (x @ x) / 2

    x = torch.tensor([0.3, -0.2], dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.float64)
    oracle = Oracle(Problem(outer, inner), Layout(x, "x"), Layout(y, "y"))
    norm = float(torch.linalg.matrix_norm(C, 2))
    # g_yy >= 1 - ||C'x||_inf here; |(sech^2)'| <= 0.77 and |sin'| <= 1, |x| <= 0.4
    shift = float((C.T @ x).abs().max())
    sizes = Sizes(1.0 - shift, 5.0 + shift, norm)
    known = Constants(*sizes, outer=(0.0, 1.0), second=(norm, 0.77 + shift))
    whole = Whole(oracle, Batches({}), known, 10_000)
    exact, _ = whole.gradient(x, whole.solve(x, y, 1e-14, sizes), y, 1e-14, 1e-14, sizes)
    errors, bounds = [], []
    for accuracy in (0.5, 0.1, 0.02, 1e-3):
        near = whole.solve(x, y + 1.0, accuracy, sizes)
        z, bound = whole.gradient(x, near, y, accuracy, accuracy, sizes)
        errors.append(float((z - exact).norm()))
        bounds.append(bound)
        assert 0 < errors[-1] <= bound
    assert bounds[-1] < bounds[0] / 100 and errors[-1] < errors[0] / 20

    # the terms, told apart by constants without a common factor
    told = Whole(oracle, Batches({}), Constants(outer=(7.0, 11.0), second=(13.0, 17.0)), 100)
    near, size = y + 0.2, float((y + 0.2 - t).norm())
    _, bound = told.gradient(x, near, y, 0.25, 0.5, Sizes(2.0, 3.0, 5.0))
    rate = 7 + 11 * 5 / 2 + 17 / 2**2 * size * 5 + 13 * size / 2
    assert bound == pytest.approx(rate * 0.5 + 5 / 2 * 0.25 + 13 * 11 / 2 * 0.5**2, rel=1e-12)


def test_maid_estimates_what_it_is_not_told():
    problem = Quadratic()
    told, guessed = (
        RIVALS["maid"].run(problem.case, 12, seed=0, **options)
        for options in ({"constants": constants(problem)}, {})
    )
    assert max(gap(problem, told.x), gap(problem, guessed.x)) < 0.01 * gap(problem, problem.x)
    assert guessed.cost.hessian_products > told.cost.hessian_products
    case = problem.case
    oracle = Oracle(Problem(case.outer, case.inner), Layout(case.x, "x"), Layout(case.y, "y"))
    sizes = Whole(oracle, Batches(case.data), Constants(), 10).sizes(case.x, case.y)
    exact = constants(problem)
    assert sizes.modulus == pytest.approx(exact.modulus, rel=1e-6)
    assert sizes.smoothness == pytest.approx(exact.smoothness, rel=1e-6)
    assert sizes.coupling == pytest.approx(exact.coupling, rel=1e-6)


def test_maid_says_when_it_cannot_go_on():
    problem = Quadratic()
    found = RIVALS["maid"].run(problem.case, 50, seed=0, limit=2)
    assert "could not be solved" in found.reason
    assert torch.equal(found.x, torch.from_numpy(problem.x)) or gap(problem, found.x) > 0


def test_maid_ends_when_its_budget_is_spent():
    problem = Quadratic()
    found = RIVALS["maid"].run(problem.case, 50, seed=0, budget=100)
    assert "its 100 gradients were spent" in found.reason
    assert 100 <= found.cost.gradients < 120
    assert gap(problem, found.x) < gap(problem, problem.case.x)


# -- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TUNED)
def test_divergence_ends_a_run_with_a_reason(name):
    problem = Quadratic()
    found = RIVALS[name].run(problem.case, 400, 2, 1e8, 1e8, seed=0)
    assert "is not finite" in found.reason
    assert torch.isfinite(found.x).all()


def test_batches_come_in_their_turn():
    n, size, T, extra = 40, 8, 3, 5
    data = {
        "outer_data": Shuffled(torch.arange(n), size=size),
        "inner_data": Shuffled(torch.arange(n) + n, size=size),
    }
    torch.manual_seed(11)
    cycles = [Cycle(found, name) for name, found in data.items()]
    expected = []
    for _ in range(6):
        expected += cycles[0].take(1) + cycles[1].take(T + extra)
    seen = []

    def outer(x, y, batch):
        seen.append(batch)
        return (x @ x + y @ y) / 2 + 0 * batch[0].sum()

    def inner(x, y, batch):
        seen.append(batch)
        return (x - y) @ (x - y) / 2 + 0 * batch[0].sum()

    start = torch.ones(2, dtype=torch.float64)
    case = Case(outer, inner, start, start.clone(), lambda x: 0.0, data)
    RIVALS["amigo"].run(case, 6, T, 0.1, 0.1, seed=11, linear_steps=extra - 1)
    # the outer batch is drawn first and used after the inner steps
    per = 1 + T + extra
    for k in range(6):
        ours = seen[k * per : (k + 1) * per]
        order = [T, *range(T), *range(T + 1, per)]
        for i, batch in zip(order, expected[k * per : (k + 1) * per], strict=True):
            assert torch.equal(ours[i][0], batch[0])


def test_trees_come_back_as_trees_and_the_case_is_not_touched():
    problem = Quadratic()
    flat = problem.case
    x = {"a": flat.x[:1].clone(), "b": [flat.x[1:].clone()]}

    def joined(loss):
        return lambda x, y, batch: loss(torch.cat([x["a"], x["b"][0]]), y, batch)

    case = Case(joined(flat.outer), joined(flat.inner), x, flat.y, flat.objective, flat.data)
    for name in ("soba", "maid"):
        expected = RIVALS[name].run(flat, 3, 2, ALPHA, BETA, seed=0)
        found = RIVALS[name].run(case, 3, 2, ALPHA, BETA, seed=0)
        assert torch.equal(torch.cat([found.x["a"], found.x["b"][0]]), expected.x)
        assert found.cost == expected.cost
    assert torch.equal(torch.cat([x["a"], x["b"][0]]), flat.x)


def test_pairs_of_batches_are_refused():
    case = Quadratic().case
    with pytest.raises(ValueError, match="give outer_data and inner_data"):
        RIVALS["soba"].run(
            Case(case.outer, case.inner, case.x, case.y, case.objective, {"data": []})
        )
