"""The solvers of the linear system on dense matrices: rates, edge cases, batches."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel import ConjugateGradient, Identity, Implicit, Neumann, Nystrom, StochasticNeumann
from bilevel.linear import FLOOR, Learned, curvature, seen, watched
from tests.tables import CASES, RIDGES, absolute, flat, relative, t


class System:
    """H q = b with a given spectrum, in a rotated basis, that counts its products."""

    def __init__(self, spectrum, seed=0, b=None):
        rng = np.random.default_rng(seed)
        n = len(spectrum)
        V = np.linalg.qr(rng.standard_normal((n, n)))[0]
        H = V @ np.diag(spectrum) @ V.T
        self.V, self.H = V, (H + H.T) / 2
        self.b = rng.standard_normal(n) if b is None else V @ np.asarray(b, dtype=float)
        self.q = np.linalg.solve(self.H, self.b) if np.all(np.array(spectrum) != 0) else None
        self.tH, self.count, self.asked = t(self.H), 0, []

    def product(self, u, j=0):
        self.count += 1
        self.asked.append(j)
        return self.tH @ u

    def solve(self, solver, q0=None):
        return solver(self.product, t(self.b), q0).numpy()

    def residual(self, q):
        return np.linalg.norm(self.H @ q - self.b) / np.linalg.norm(self.b)

    def energy(self, e):
        return math.sqrt(max(0.0, float(e @ self.H @ e)))


def geometric(kappa, n=60):
    return np.geomspace(2.0, 2.0 / kappa, n)


# -- conjugate gradient ---------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [6, 1e2, 1e3, 1e5])
def test_cg_rate(kappa):
    """||e_k||_H <= 2 ((sqrt k - 1) / (sqrt k + 1))^k ||e_0||_H for every k."""
    system = System(geometric(kappa))
    ratio = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    start = system.energy(system.q)
    last = start
    for k in range(1, 60):
        error = system.energy(system.solve(ConjugateGradient(k, 0.0)) - system.q)
        assert error <= 2 * ratio**k * start + 1e-12 * start
        assert error <= last * (1 + 1e-9) + 1e-13 * start  # the energy norm never grows
        last = error


def test_cg_is_optimal_in_the_krylov_space():
    """Step k minimises the energy norm over span{b, Hb, ...}: recomputed by least squares."""
    system = System(geometric(50, 20), seed=3)
    root = np.linalg.cholesky(system.H).T
    K = []
    v = system.b
    for k in range(1, 8):
        K.append(v / np.linalg.norm(v))
        v = system.H @ K[-1]
        basis = np.linalg.qr(np.stack(K, 1))[0]
        best = basis @ np.linalg.lstsq(root @ basis, root @ system.q, rcond=None)[0]
        assert relative(system.solve(ConjugateGradient(k, 0.0)), best) < 1e-10


def test_cg_takes_as_many_products_as_it_needs():
    system = System(geometric(6, 40))
    q = system.solve(ConjugateGradient(200, rtol=1e-6))
    assert system.residual(q) <= 1.0001e-6
    needed, system.count = system.count, 0
    assert needed < 30
    assert system.residual(system.solve(ConjugateGradient(needed - 1, rtol=1e-6))) > 1e-6
    assert system.count == needed - 1


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_cg_ends_after_as_many_steps_as_eigenvalues(distinct):
    system = System(np.repeat(np.arange(1.0, distinct + 1), 6), seed=4)
    assert relative(system.solve(ConjugateGradient(distinct, 0.0)), system.q) < 1e-12
    assert relative(system.solve(ConjugateGradient(500, 0.0)), system.q) < 1e-12
    if distinct > 1:
        assert relative(system.solve(ConjugateGradient(distinct - 1, 0.0)), system.q) > 1e-4


def test_cg_of_zero_is_zero():
    system = System([1.0, 2.0], b=[0.0, 0.0])
    for rtol in (0.0, 1e-6):
        q = system.solve(ConjugateGradient(9, rtol))
        assert not q.any() and system.count == 0


def test_cg_from_the_solution_stays():
    system = System(geometric(100))
    q = system.solve(ConjugateGradient(30, 1e-8), t(system.q))
    assert relative(q, system.q) < 1e-12
    assert system.count == 2  # the residual of the guess, and one step to go on improving it
    q = system.solve(ConjugateGradient(30, 0.0), t(system.q))
    assert relative(q, system.q) < 1e-10


def test_cg_goes_on_from_a_guess():
    system = System(geometric(1e3))
    first = system.solve(ConjugateGradient(15, 0.0))
    cold = system.solve(ConjugateGradient(15, 0.0))
    warm = system.solve(ConjugateGradient(15, 0.0), t(first))
    assert system.energy(warm - system.q) < 0.5 * system.energy(cold - system.q)


@pytest.mark.parametrize("scale", [-1e3, -1.0, 0.0, 1e-3, 1e8])
def test_a_bad_guess_costs_nothing(scale):
    """A guess is scaled along its own ray, so it never is worse than none."""
    system = System(geometric(30), seed=6)
    guess = t(scale * np.random.default_rng(0).standard_normal(60))
    q = system.solve(ConjugateGradient(1, 0.0), guess)
    assert system.energy(q - system.q) <= system.energy(system.q) * (1 + 1e-12)


def test_cg_steps_stop_at_negative_curvature_with_the_last_iterate():
    """The first direction sees 10 > 0, the second a negative curvature: one step is returned."""
    system = System([10.0, -1.0], b=[1.0, 0.5])
    solver, b = ConjugateGradient(1, 0.0), t(system.b)
    one = solver.watched(system.product, b)[0]
    bb, bHb = system.b @ system.b, system.b @ system.H @ system.b
    assert bHb > 0 and np.allclose(one, bb / bHb * system.b, rtol=1e-14)
    enough, state = solver.begin(system.product, b, None, solver.rtol)
    for _ in range(3):
        state = solver.advance(system.product, enough, state)
        assert torch.equal(state[0], one)


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize(
    "spectrum", [[10.0, -1.0], [-2.0, -1.0], [10.0, 3.0, 1e-3, -1.0], [5.0, 1.0, 0.5, -8.0]]
)
def test_cg_of_an_indefinite_hessian_is_its_absolute_value(spectrum, guess):
    """Eigenvalues as they are without their signs, but no less than FLOOR of the largest."""
    system = System(spectrum, b=np.arange(1.0, len(spectrum) + 1))
    q0 = t(np.ones(len(spectrum))) if guess else None
    q, concave = ConjugateGradient(50, 0.0).watched(system.product, t(system.b), q0)
    assert relative(q.numpy(), absolute(system.H, FLOOR) @ system.b) < 1e-10
    assert concave == pytest.approx(-min(spectrum) / max(map(abs, spectrum)), rel=1e-9)
    assert np.allclose(q.numpy(), system.solve(ConjugateGradient(50, 0.0), q0))


def test_what_was_seen_of_concavity_is_the_floor():
    """Once seen, smaller curvatures are not told from nothing, up to FLOOR; before, they are."""
    system = System([1.0, 0.5, 2e-3, 1e-6], b=[1.0, 2.0, 3.0, 4.0])
    solver = ConjugateGradient(50, 0.0)
    for before, floor in ((0.0, 0.0), (1e-5, 0.0), (1e-3, 1e-3), (0.7, FLOOR)):
        known = Learned(before, lately=1e-9)
        q, after = watched(solver, system.product, t(system.b), None, known)
        assert relative(q.numpy(), absolute(system.H, floor) @ system.b) < 1e-8
        assert after == known
    system.count = 0
    solver.watched(system.product, t(system.b), None, Learned(0.7))
    assert system.count == 4  # of them none to find out


def test_absolute_values_are_as_exact_as_asked():
    """Of a positive definite Hessian, rtol bounds the residual, in as many products as by CG."""
    system = System(np.linspace(1, 30, 60), seed=3)
    for rtol in (0.3, 1e-2, 1e-6):
        counts = []
        for before in (0.0, 1e-3):
            system.count = 0
            solver, learned = ConjugateGradient(60, rtol), Learned(before)
            q, _ = solver.watched(system.product, t(system.b), None, learned)
            assert system.residual(q.numpy()) <= rtol
            counts.append(system.count)
        assert counts[0] == counts[1] < 60


def test_cg_tells_how_concave_it_has_seen_the_loss():
    """The lowest Rayleigh quotient of its directions and guess over the largest."""
    system = System([10.0, 3.0, -1.0], b=[1.0, 1.0, 0.5])
    directions = []

    def product(u):
        directions.append(u.numpy())
        return system.product(u)

    for q0 in (None, t(system.V @ [0.0, 0.1, 1.0])):
        solver = ConjugateGradient(8, 0.0)
        enough, state = solver.begin(product, t(system.b), q0, 0.0)
        for _ in range(8):
            state = solver.advance(product, enough, state)
        quotients = [p @ system.H @ p / (p @ p) for p in directions]
        last = next(i for i, k in enumerate(quotients) if k < 0 and (i or q0 is None))
        concave = -min(quotients[: last + 1]) / max(np.abs(quotients[: last + 1]))
        assert concave > 0
        assert float(seen(0.0, *state[5:7])) == pytest.approx(concave, rel=1e-12)
        assert float(seen(0.9, *state[5:7])) == 0.9
        directions.clear()
    convex = ConjugateGradient(50, 0.0).watched(System(geometric(100)).product, t(np.ones(60)))
    assert convex[1] == 0.0


@pytest.mark.parametrize("host", [False, True])
def test_cg_that_meets_a_negative_curvature_returns_the_best_so_far(host):
    """A curvature next to zero takes q far off first: its residual has been smaller."""
    system = System([10.0, 3.0, 1.0, -0.9], b=[3.0, 2.7, 1.6, 0.5])
    solver = ConjugateGradient(8, 0.0)
    enough, state = solver.begin(system.product, t(system.b), None, 0.0)
    norms = [float(state[3])]
    begun = state
    while state[4]:
        last, state = state, solver.advance(system.product, enough, state)
        norms.append(float(state[3]))
    assert float(last[3]) > 2 * min(norms), "the last one is not the best"
    q = solver._on_host(system.product, 0.0, begun)[0] if host else state[0]
    best = ((t(system.b) - system.product(q)) ** 2).sum()
    assert float(best) == pytest.approx(min(norms), rel=1e-8)


def test_cg_on_a_singular_hessian():
    """A right side in the range is solved; one outside stays finite, and its residual tells."""
    spectrum = [4.0, 1.0, 0.5, 0.0, 0.0]
    system = System(spectrum, b=[1.0, -2.0, 3.0, 0.0, 0.0])
    q = system.solve(ConjugateGradient(50, 0.0))
    assert np.allclose(q, np.linalg.pinv(system.H) @ system.b, atol=1e-12)
    system = System(spectrum, b=[1.0, -2.0, 3.0, 0.1, 0.0])
    q = system.solve(ConjugateGradient(200, 0.0))
    assert np.isfinite(q).all() and system.residual(q) > 1e-3


def test_cg_stagnation_ends_the_loop():
    """At kappa 1e9 no residual of 1e-30 can be had: it gives up and returns what it has."""
    system = System(geometric(1e9, 20), seed=2)
    q = system.solve(ConjugateGradient(100_000, 1e-30))
    assert np.isfinite(q).all() and system.residual(q) < 1e-3
    assert system.count < 5_000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cg_survives_a_product_that_is_not_finite(bad):
    q = ConjugateGradient(20)(lambda u: u * bad, t([1.0, 2.0]))
    assert torch.equal(q, t([0.0, 0.0]))


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize(
    "spectrum, b",
    [
        (np.geomspace(1, 300, 12), None),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, -3.0], [1.0, 1.0, 0.1]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([1.0, math.nan], [1.0, 1.0]),
        ([-1.0, -2.0], [1.0, 1.0]),
        ([1.0, 0.01, -0.02], [1.0, 1.0, 1.0]),
    ],
)
def test_cg_with_numbers_of_the_host_is_that_in_tensors(spectrum, b, guess):
    system = System(spectrum, b=b)
    solver = ConjugateGradient(steps=8, rtol=1e-8)
    right, q0 = t(system.b), t(np.arange(1.0, len(spectrum) + 1)) if guess else None
    enough, state = solver.begin(system.product, right, q0, solver.rtol)
    found, top, low = solver._on_host(system.product, float(enough), state)
    system.count = 0
    enough, state = solver.begin(system.product, right, q0, solver.rtol)
    steps = 0
    while steps < solver.steps and state[4]:
        state, steps = solver.advance(system.product, enough, state), steps + 1
    assert system.count == steps + guess
    torch.testing.assert_close(found, state[0], rtol=1e-9, atol=1e-12, equal_nan=True)
    assert (top, low) == pytest.approx(tuple(map(float, state[5:7])), rel=1e-9)


def test_cg_on_a_scalar():
    assert float(ConjugateGradient(10)(lambda u: 4 * u, t([2.0]))) == 0.5


# -- Neumann --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [6, 1e2, 1e3, 1e5])
@pytest.mark.parametrize("terms", [1, 2, 10, 1000])
def test_neumann_is_the_truncated_series(kappa, terms):
    """q = (I - (I - nu H)^terms) H^{-1} b in the eigenbasis, and the proven rate."""
    system = System(geometric(kappa))
    mu, L = 2.0 / kappa, 2.0
    nu = 0.7 / L
    q = system.solve(Neumann(terms, step=nu))
    lam = geometric(kappa)
    series = (1 - (1 - nu * lam) ** terms) / lam
    exact = system.V @ (series * (system.V.T @ system.b))
    assert relative(q, exact) < 1e-10
    assert system.residual(q) <= (1 - nu * mu) ** terms * (1 + 1e-9) + 1e-13
    assert system.count == terms - 1


@pytest.mark.parametrize("kappa", [6, 1e2, 1e3])
def test_neumann_converges(kappa):
    system = System(geometric(kappa, 12))
    q = system.solve(Neumann(math.ceil(30 * kappa), step=1 / 2.0))
    assert relative(q, system.q) < 1e-10


def test_neumann_from_a_guess():
    system = System(geometric(10))
    first = system.solve(Neumann(20, step=0.4))
    more = system.solve(Neumann(15, step=0.4), t(first))
    assert relative(more, system.solve(Neumann(35, step=0.4))) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto_step_is_safe_on_every_problem(case):
    b = t(case.b)
    H = t(case.H)
    bound = float(curvature(lambda u: H @ u, b))
    assert case.L * (1 - 1e-12) <= bound or len(b) > 8
    assert 0.5 * case.L < bound < 2 * case.L
    last = math.inf
    for terms in (1, 2, 5, 20, 100, 400):
        h = bilevel.hypergradient(
            case.outer, case.inner, case.x, case.y_star, method=Implicit(Neumann(terms))
        )
        assert float(h.residual) <= min(1.0, last * (1 + 1e-9))
        last = float(h.residual) + 1e-14


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    power=st.floats(0, 7),
    scale=st.floats(-6, 6),
    seed=st.integers(0, 2**31),
    clustered=st.booleans(),
)
def test_auto_step_never_diverges(n, power, scale, seed, clustered):
    """Random spectra over 14 decades: a longer series never has a larger residual."""
    rng = np.random.default_rng(seed)
    spectrum = 10.0 ** (scale - power * rng.random(n))
    if clustered:
        spectrum = np.where(rng.random(n) < 0.8, spectrum.min(), spectrum)
    system = System(spectrum, seed=seed)
    last = 1.0
    for terms in (1, 3, 10, 100, 1000):
        residual = system.residual(system.solve(Neumann(terms)))
        assert residual <= last * (1 + 1e-9) + 1e-13
        last = residual


@pytest.mark.parametrize("stiff", [3.0, 10.0, 100.0])
@pytest.mark.parametrize("share", [1e-3, 1e-9, 0.0])
def test_auto_step_sees_what_the_right_side_lacks(stiff, share):
    """f_y without a component along the stiffest direction: rounding brings it in, and it grows
    by |1 - nu L| at every term. A step from the Krylov space of f_y alone diverges here."""
    system = System([stiff, *np.geomspace(1.0, 0.1, 19)], b=[share] + [1.0] * 19)
    for terms in (100, 1000):
        q = system.solve(Neumann(terms))
        assert system.residual(q) <= (1 - 0.5 * 0.1 / stiff) ** terms


@pytest.mark.parametrize("seed", range(5))
def test_curvature_at_an_exhausted_space(seed):
    """Few distinct eigenvalues end Lanczos early; what rounding leaves must not count."""
    system = System([3.0] * 10 + [1.0] * 5, seed=seed)
    assert float(curvature(system.product, t(system.b))) == pytest.approx(3.0, rel=1e-10)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        b = torch.randn(30, dtype=dtype)
        assert float(curvature(lambda u: 0.7 * u, b)) == pytest.approx(0.7, rel=tolerance)
    assert float(curvature(lambda u: -5 * u, t([1.0, 3.0]))) == pytest.approx(5)
    assert float(curvature(lambda u: 0 * u, t([1.0, 3.0]))) == 0


def test_a_step_that_is_too_long_warns_and_tells():
    case = RIDGES[0]

    def run(step):
        method = Implicit(Neumann(200, step=step))
        return bilevel.hypergradient(case.outer, case.inner, case.x, case.y_star, method=method)

    assert float(run(1.9 / case.L).residual) < 1  # and no warning, which would be an error
    with pytest.warns(RuntimeWarning, match=r"diverges.*residual.*step='auto'"):
        h = run(2.2 / case.L)
    assert float(h.residual) > 1e3


def test_one_draw_of_random_length_tells_of_no_divergence():
    """Its residual is above one every now and then, at any step."""
    case, residuals = RIDGES[0], []
    torch.manual_seed(0)
    for _ in range(60):
        h = bilevel.hypergradient(
            *(case.outer, case.inner, case.x, case.y_star),
            method=Implicit(StochasticNeumann(10, step=0.5 / case.L, form="random")),
        )
        residuals.append(float(h.residual))
    assert max(residuals) > 1


# -- stochastic Neumann ---------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2, 9])
@pytest.mark.parametrize("step", [0.3, "auto"])
def test_sum_form_on_one_batch_is_neumann(terms, step):
    system = System(geometric(20, 15))
    q = system.solve(StochasticNeumann(terms, step=step))
    if step == "auto":
        step = float(1 / curvature(system.product, t(system.b))) / 2
    assert relative(q, system.solve(Neumann(terms, step=step))) < 1e-13


def test_random_form_is_unbiased():
    """Its mean over the number of factors is the sum form; 4,000 draws meet it."""
    system = System(geometric(4, 6), seed=1)
    solver = StochasticNeumann(5, step=0.4, form="random")
    draws = np.stack([system.solve(solver) for _ in range(4000)])
    mean, error = draws.mean(0), draws.std(0, ddof=1) / math.sqrt(len(draws))
    exact = system.solve(StochasticNeumann(5, step=0.4))
    assert np.all(np.abs(mean - exact) < 4.5 * error + 1e-14)
    assert np.all(error < 0.05 * np.linalg.norm(exact))
    # exactly terms different values, each terms * nu * (I - nu H)^n b
    values = np.unique(np.round(draws, 12), axis=0)
    I = np.eye(6)
    powers = [np.linalg.matrix_power(I - 0.4 * system.H, n) @ system.b for n in range(5)]
    assert len(values) == 5
    for v in powers:
        assert np.min(np.linalg.norm(values - 5 * 0.4 * v, axis=1)) < 1e-10


def test_each_factor_has_a_batch_of_its_own():
    system = System(geometric(4, 6))
    assert StochasticNeumann(7).batches == 7
    system.solve(StochasticNeumann(7, step=0.3))
    assert len(set(system.asked)) == len(system.asked) == 6
    counts = []
    for _ in range(60):
        system.asked.clear()
        system.solve(StochasticNeumann(7, step=0.3, form="random"))
        assert len(set(system.asked)) == len(system.asked)
        counts.append(len(system.asked))
    assert set(counts) == set(range(7))


def stochastic_problem():
    """The inner loss depends on a batch that is a matrix: H_j differs from batch to batch."""
    rng = np.random.default_rng(7)
    roots = [rng.standard_normal((6, 4)) for _ in range(4)]
    seen = []

    def inner(x, y, batch):
        seen.append(batch[0])
        return ((t(roots[batch[0]]) @ y) ** 2).sum() / 12 + (y * y).sum() / 4 - (x * y).sum()

    def outer(x, y):
        return ((y - 1) ** 2).sum() / 2

    H = [r.T @ r / 6 + np.eye(4) / 2 for r in roots]
    return outer, inner, seen, H


def test_a_fresh_batch_per_factor_through_the_public_call():
    outer, inner, seen, H = stochastic_problem()
    x, y = t([0.1, 0.2, 0.3, 0.4]), t([1.0, -1.0, 2.0, 0.5])
    batches = [(j,) for j in range(4)]
    method = Implicit(StochasticNeumann(4, step=0.2))
    h = bilevel.hypergradient(outer, inner, x, y, method=method, inner_batches=batches)
    assert set(seen) == {0, 1, 2, 3}
    b = y.numpy() - 1
    v, q = b, b
    for j in (1, 2, 3):  # the first is that of g_xy
        v = v - 0.2 * H[j] @ v
        q = q + v
    assert relative(h.grad, 0.2 * q) < 1e-12  # g_xy = -I
    one = bilevel.hypergradient(outer, inner, x, y, inner_batch=(0,), method=method)
    assert relative(one.grad, flat(h.grad)) > 1e-2


def test_the_mean_over_all_batches_is_the_series_of_their_mean():
    """g_xy has a batch of its own: c_0 is independent of the factors, so that nothing is biased."""
    batches = [(1.0, 1.0), (3.0, 3.0)]
    method = Implicit(StochasticNeumann(terms=4, step=0.2))
    found = [
        bilevel.hypergradient(
            lambda x, y: y,
            lambda x, y, batch: batch[0] * y**2 / 2 - batch[1] * x * y,
            t(1.0),
            t(0.0),
            method=method,
            inner_batches=list(drawn),
        ).grad
        for drawn in itertools.product(batches, repeat=4)
    ]
    series = 2.0 * 0.2 * sum((1 - 0.2 * 2.0) ** j for j in range(4))
    assert float(sum(found)) / len(found) == pytest.approx(series, rel=1e-13)


def test_a_fresh_batch_per_factor_in_a_run():
    outer, inner, seen, _ = stochastic_problem()
    drawn = []

    class Batches:
        def __iter__(self):
            for j in [0, 1, 2, 3]:
                drawn.append(j)
                yield (j,)

    method = bilevel.fixed("sgd", 0.1, 0.1, Implicit(StochasticNeumann(3, step=0.2)))
    bilevel.solve(outer, inner, torch.zeros(4).double(), torch.zeros(4).double(),
                  inner_data=Batches(), method=method, steps=2, inner_steps=2)  # fmt: skip
    assert len(drawn) == 2 * 2 + 3  # inner steps, and a look at one per factor
    # the first iteration: steps on 0, 1; the Hessian batches are 2, 3, 0: seen once each or more
    assert {2, 3} <= set(seen)


# -- Nystrom and identity -------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [6, 1e3, 1e5])
def test_nystrom_is_exact_at_full_rank(kappa):
    system = System(geometric(kappa, 15))
    for rank in (15, 40):
        system.count = 0
        assert relative(system.solve(Nystrom(rank)), system.q) < 1e-11 * kappa
        assert system.count == 15


def test_nystrom_resolves_low_rank_plus_damping():
    """H of rank 3: with a sketch of rank 4 the damped inverse is exact."""
    system = System([5.0, 3.0, 1.0] + [0.0] * 9, seed=5)
    for damping in (1e-3, 0.1, 2.0):
        exact = np.linalg.solve(system.H + damping * np.eye(12), system.b)
        assert relative(system.solve(Nystrom(4, damping=damping)), exact) < 1e-8


def test_nystrom_full_rank_damping():
    system = System(geometric(30, 9))
    exact = np.linalg.solve(system.H + 0.25 * np.eye(9), system.b)
    assert relative(system.solve(Nystrom(9, damping=0.25)), exact) < 1e-10
    assert relative(exact, system.q) > 0.1


def test_nystrom_improves_with_rank_and_repeats():
    system = System(np.concatenate([[50.0, 30.0, 20.0, 10.0], np.full(20, 0.1)]), seed=8)
    residuals = [system.residual(system.solve(Nystrom(rank))) for rank in (1, 4, 8, 24)]
    assert residuals[-1] < 1e-10 and residuals[-1] < residuals[2] < residuals[0]
    state = torch.get_rng_state()
    a, b = system.solve(Nystrom(5)), system.solve(Nystrom(5))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, system.solve(Nystrom(5, seed=1)))
    assert torch.equal(state, torch.get_rng_state())


def test_nystrom_of_a_zero_hessian_is_finite():
    q = Nystrom(2)(lambda u: 0 * u, t([1.0, 2.0, 3.0]))
    assert torch.isfinite(q).all()


def test_identity_asks_for_no_product():
    system = System([3.0, 1.0], b=[1.0, 2.0])
    assert np.array_equal(system.solve(Identity()), system.b) and system.count == 0


@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(30, 0.0), Neumann(6), Neumann(6, step=0.2), Nystrom(3), Identity()],
    ids=repr,
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_solvers_scale(solver, factor, seed):
    """q(H, c b) = c q(H, b) for c > 0: the solvers see no absolute scale of the loss."""
    system = System(geometric(8, 7), seed=seed)
    q = system.solve(solver)
    system.b = factor * system.b
    assert relative(system.solve(solver), factor * q) < 1e-7


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Neumann(terms=0), ["Neumann(terms=0)", "at least 1"]),
        (lambda: Neumann(terms=-3), ["terms=-3"]),
        (lambda: Neumann(step=0.0), ["step=0.0", "positive", "auto"]),
        (lambda: Neumann(step=-1.0), ["step=-1.0"]),
        (lambda: Neumann(step=math.nan), ["step=nan"]),
        (lambda: Neumann(step="fast"), ["step='fast'", "auto"]),
        (lambda: StochasticNeumann(form="mean"), ["form='mean'", "'sum', 'random'"]),
        (lambda: StochasticNeumann(terms=0), ["StochasticNeumann(terms=0)"]),
        (lambda: ConjugateGradient(steps=0), ["ConjugateGradient(steps=0)"]),
        (lambda: ConjugateGradient(rtol=1.0), ["rtol=1.0", "[0, 1)"]),
        (lambda: ConjugateGradient(rtol=-1e-3), ["rtol=-0.001"]),
        (lambda: Nystrom(rank=0), ["Nystrom(rank=0)"]),
        (lambda: Nystrom(damping=-1.0), ["damping=-1.0", ">= 0"]),
        (lambda: bilevel.FiniteDifference(eps=0.0), ["eps=0.0", "(0, 1)"]),
        (lambda: bilevel.Unrolled(window=0), ["Unrolled(window=0)"]),
        (lambda: bilevel.Unrolled(step=0.0), ["Unrolled(step=0.0)"]),
    ],
)
def test_settings_that_cannot_be(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("terms", [2.5, True])
def test_settings_of_another_kind(terms):
    with pytest.raises(TypeError, match=f"terms={terms}.*whole number"):
        Neumann(terms=terms)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_right_side_that_is_not_finite_has_no_solution(number):
    system = System([1.0, 2.0, 3.0])
    b = t([1.0, number, 0.0])
    for q0 in (None, t([1.0, 1.0, 1.0])):
        assert not ConjugateGradient()(system.product, b, q0).isfinite().all()


def test_nystrom_in_half_precision():
    system = System([1.0, 2.0, 3.0, 4.0])
    H, b = system.tH.bfloat16(), t(system.b).bfloat16()
    q = Nystrom()(lambda u, j=0: H @ u, b)
    assert q.dtype == torch.bfloat16 and relative(q.double(), system.q) < 0.1
