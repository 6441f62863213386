"""Every hypergradient against closed forms, NumPy, `higher` and differences."""

import copy

import higher
import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel
from bilevel import ConjugateGradient, FiniteDifference, Identity, Implicit, Neumann, Unrolled
from tests.engine import oracles
from tests.engine.test_problems import like_of
from tests.tables import (
    CASES,
    CONVERGED,
    CONVERGED_IDS,
    IDENTITY,
    LOOSE,
    MIXED,
    NESTED,
    QUADRATIC,
    RIDGES,
    SCALAR,
    SOLVERS,
    flat,
    leaves,
    relative,
    ridge,
    t,
)

SMOOTH = [RIDGES[0], QUADRATIC, NESTED, MIXED, SCALAR]


def hyper(case, method, y=None):
    y = case.y_star if y is None else y
    return bilevel.hypergradient(case.outer, case.inner, case.x, y, method=method)


@pytest.mark.parametrize(("solver", "case"), CONVERGED, ids=CONVERGED_IDS)
def test_closed_form(solver, case):
    oracles.closed_form(solver, case)


def test_every_row_is_used():
    assert {str(s) for s, _ in CONVERGED} == {str(s) for s in SOLVERS}
    assert {str(c) for _, c in CONVERGED} == {str(c) for c in CASES}


@pytest.mark.parametrize("method", LOOSE, ids=repr)
def test_reported_residual_is_true(method):
    found = [oracles.true_residual(method, case) for case in (RIDGES[0], RIDGES[1])]
    assert max(found) > 1e-3  # not converged, or the test would say little


def test_residual_is_above_one_where_a_step_is_far_too_short_or_wrong():
    case = RIDGES[0]
    assert float(hyper(case, Implicit(lambda product, b, q0: -b)).residual) > 1
    assert float(hyper(case, Implicit(lambda product, b, q0: 0 * b)).residual) == 1


@pytest.mark.parametrize("case", SMOOTH, ids=str)
@pytest.mark.parametrize("method", [Implicit(ConjugateGradient(200, 0.0)), Implicit(Neumann(6))])
def test_structure_types_and_inputs(case, method):
    before = [leaf.clone() for leaf in leaves(case.x) + leaves(case.y_star)]
    h = hyper(case, method)
    assert type(h.grad) is type(case.x)
    shapes = [(leaf.shape, leaf.dtype) for leaf in leaves(h.grad)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in leaves(case.x)]
    assert h.value.shape == () and float(h.value) == pytest.approx(case.value(case.X, case.Y))
    after = leaves(case.x) + leaves(case.y_star)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in after)


def test_value_and_cost():
    """One gradient of f, one recorded pullback; Neumann(terms) costs `terms` products."""
    h = hyper(RIDGES[0], Implicit(Neumann(9, step=0.5)))
    assert (h.gradients, h.hessian_products) == (2, 9)
    h = hyper(RIDGES[0], Implicit(Neumann(9)))
    assert (h.gradients, h.hessian_products) == (2, 17)
    h = hyper(RIDGES[0], Implicit(Identity()))
    assert (h.gradients, h.hessian_products) == (2, 1)
    h = hyper(RIDGES[0], Unrolled(5, step=0.5))
    assert (h.gradients, h.hessian_products) == (6, 5)
    h = hyper(RIDGES[0], Implicit(ConjugateGradient(4, 0.0)))
    assert (h.gradients, h.hessian_products) == (2, 5)
    h = hyper(RIDGES[0], FiniteDifference(Neumann(3, step=0.5)))
    assert (h.gradients, h.hessian_products) == (2 + 3 * 2, 0)


# -- off the solution: the formula at the point at hand -------------------------------------------


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_implicit_formula_away_from_the_solution(case):
    """Implicit is f_x - g_xy H^{-1} f_y with every block at (x, y), not at (x, y*)."""
    X, Y = flat(case.x), flat(case.y)

    def blocks(loss):
        x = [leaf.clone().requires_grad_() for leaf in leaves(case.x)]
        y = [leaf.clone().requires_grad_() for leaf in leaves(case.y)]
        value = loss(like_of(case.x, x), like_of(case.y, y))
        return value, x, y

    value, x, y = blocks(case.outer)
    g = torch.autograd.grad(value, x + y, allow_unused=True)
    fx, fy = flat(g[: len(x)]).numpy(), flat(g[len(x) :]).numpy()
    value, x, y = blocks(case.inner)
    gy = flat(torch.autograd.grad(value, y, create_graph=True))
    rows = [torch.autograd.grad(gy[i], x + y, retain_graph=True) for i in range(len(gy))]
    cross = np.stack([flat(row[: len(x)]).numpy() for row in rows])
    H = np.stack([flat(row[len(x) :]).numpy() for row in rows])
    assert (cross.shape, H.shape) == ((len(Y), len(X)), (len(Y), len(Y)))
    exact = fx - cross.T @ np.linalg.solve(H, fy)
    found = hyper(case, Implicit(ConjugateGradient(300, 0.0)), case.y)
    assert relative(found.grad, exact) < 1e-10
    if case.name.startswith("ridge"):
        assert relative(exact, case.exact) > 0.1


def test_identity_hessian_in_one_step():
    """hypertorch and BOAT return zeros here, betty NaN (their loops lose the last step)."""
    for method in (
        Implicit(ConjugateGradient(steps=1)),
        Implicit(ConjugateGradient(steps=1, rtol=0.0)),
        Implicit(ConjugateGradient(steps=50)),
        Implicit(ConjugateGradient(steps=50, rtol=0.0)),
        Implicit(Identity()),
        Implicit(Neumann(terms=1)),
        Implicit(Neumann(terms=30)),
    ):
        h = hyper(IDENTITY, method)
        assert torch.allclose(h.grad, -torch.arange(5.0, dtype=torch.float64), atol=1e-14)
        assert float(h.residual) < 1e-14


def test_outer_loss_that_ignores_y_here():
    """f_y = 0 at the point: q = 0, no 0/0, and the residual is zero."""
    x, y = torch.tensor(2.0), torch.zeros(3)
    for solver in (ConjugateGradient(), Neumann(), bilevel.Nystrom(2), Identity()):
        h = bilevel.hypergradient(
            lambda x, y: x**2 + (y**2).sum(),
            lambda x, y: (y**2).sum() + (x * y).sum(),
            x,
            y,
            method=Implicit(solver),
        )
        assert float(h.grad) == 4.0 and float(h.residual) == 0.0, solver


# -- finite differences ---------------------------------------------------------------------------


def cubic(x, y):
    """Not quadratic, so that a central difference has an error that falls like eps^2."""
    return (x * y.exp()).sum() + (y**2).sum() + (x.exp() * y**3).sum() / 6


@pytest.mark.parametrize(("eps", "bound"), [(1e-2, 3e-3), (1e-3, 3e-5), (None, 1e-8)])
def test_finite_difference_accuracy(eps, bound):
    x = torch.tensor([0.3, 0.5, 0.1], dtype=torch.float64)
    y = torch.tensor([-0.2, 0.1, -0.3], dtype=torch.float64)
    outer = lambda x, y: ((y - 1) ** 2).sum() + (x * y).sum()  # noqa: E731
    exact = bilevel.hypergradient(outer, cubic, x, y, method=Implicit(ConjugateGradient(9, 0.0)))
    h = bilevel.hypergradient(
        outer, cubic, x, y, method=FiniteDifference(ConjugateGradient(9, 0.0), eps=eps)
    )
    error = relative(h.grad, exact.grad)
    assert error < bound
    if eps is not None:
        assert error > bound / 300  # the displacement asked for was the one taken


def test_finite_difference_in_single_precision():
    case = RIDGES[0]
    x, y = case.x.float(), case.y_star.float()
    rng = torch.Generator().manual_seed(1)
    A, a = torch.randn(20, 12, generator=rng), torch.randn(20, generator=rng)

    def inner(x, y):
        return ((A @ y - a) ** 2).mean() + (x.exp() * y**2).sum()

    def outer(x, y):
        return ((y - 1) ** 2).sum()

    def grad(method):
        return bilevel.hypergradient(outer, inner, x, y, method=method).grad

    exact = grad(Implicit(ConjugateGradient(50)))
    assert relative(grad(FiniteDifference(ConjugateGradient(50))), exact) < 2e-3


# -- unrolling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [RIDGES[0], RIDGES[2], QUADRATIC, NESTED], ids=str)
@pytest.mark.parametrize("terms", [1, 2, 17])
def test_unrolled_from_the_solution_is_the_neumann_series(case, terms):
    step = 0.9 / case.L
    series = hyper(case, Implicit(Neumann(terms, step=step)))
    assert relative(hyper(case, Unrolled(terms, step=step)).grad, flat(series.grad)) < 1e-12


@pytest.mark.parametrize("case", [RIDGES[1], QUADRATIC, MIXED], ids=str)
def test_recomputing_changes_nothing(case):
    stored = hyper(case, Unrolled(13, step=0.5 / case.L), case.y)
    again = hyper(case, Unrolled(13, recompute=True, step=0.5 / case.L), case.y)
    assert all(
        torch.equal(a, b) for a, b in zip(leaves(stored.grad), leaves(again.grad), strict=True)
    )
    assert torch.equal(stored.value, again.value)


def descend(case, steps, size, upto=None):
    """dF/dx through plain SGD, by autograd on one graph; before `upto` x is detached."""
    x = case.x.clone().requires_grad_()
    y = case.y.clone().requires_grad_()
    for k in range(steps):
        if upto is not None and k == upto:
            y = y.detach().requires_grad_()
        (gy,) = torch.autograd.grad(case.inner(x, y), y, create_graph=True)
        y = y - size * gy
    return torch.autograd.grad(case.outer(x, y), x)[0]


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_unrolled_is_autograd_through_the_steps(steps):
    for case in (RIDGES[0], RIDGES[1], QUADRATIC):
        found = hyper(case, Unrolled(steps, step=0.3), case.y)
        assert relative(found.grad, descend(case, steps, 0.3).numpy()) < 1e-12


@pytest.mark.parametrize("window", [1, 3, 9, 20, None])
def test_window_within_a_method(window):
    """The last `window` of the method's own steps; the earlier ones only move y."""
    case, size, taken = RIDGES[0], 0.3, 9
    method = bilevel.fixed("sgd", 1.0, size, Unrolled(window))
    problem = bilevel.Problem(case.outer, case.inner)
    state, record = method.step(problem, method.init(case.x, case.y), None, taken)
    upto = None if window is None or window >= taken else taken - window
    exact = descend(case, taken, size, upto)
    assert relative(case.x - state.x, exact.numpy()) < 1e-12  # outer step of one
    assert record.hypergrad_norm == pytest.approx(float(exact.norm()), rel=1e-12)
    assert record.hessian_products == min(window or taken, taken)
    if upto:
        assert relative(exact, descend(case, taken, size).numpy()) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recompute", [False, True])
def test_unrolled_equals_higher(recompute):
    """An independent library's differentiable SGD, on a small network that is not solved."""
    rng = torch.Generator().manual_seed(5)
    A = torch.randn(8, 3, generator=rng, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 0, 1])
    x = torch.randn(8, generator=rng, dtype=torch.float64)  # log-weights of the examples
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).double()
    cross_entropy = torch.nn.functional.cross_entropy

    def inner(x, net):
        return (x.sigmoid() * cross_entropy(net(A), labels, reduction="none")).mean()

    def outer(x, net):
        return cross_entropy(net(A + 0.1), labels) + 0.01 * (x**2).sum()

    steps, size = 6, 0.7
    xs = x.clone().requires_grad_()
    sgd = torch.optim.SGD(net.parameters(), lr=size)
    with higher.innerloop_ctx(net, sgd) as (copied, differentiable):
        for _ in range(steps):
            differentiable.step(inner(xs, copied))
        (exact,) = torch.autograd.grad(outer(xs, copied), xs)
    before = [p.clone() for p in net.parameters()]
    h = bilevel.hypergradient(
        outer, inner, x, net, method=Unrolled(steps, recompute=recompute, step=size)
    )
    assert relative(h.grad, exact.numpy()) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


# -- a network with Modules at both levels --------------------------------------------------------


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3), torch.nn.Tanh()
        )

    def forward(self, inputs):
        return self.net(inputs)


def network():
    """A two-layer net of features (x) and a linear head (y) that is solved by Newton's method."""
    rng = torch.Generator().manual_seed(8)

    def data(n):
        inputs = torch.randn(n, 4, generator=rng, dtype=torch.float64)
        return inputs, (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] > 1).long()

    (train, labels), (test, targets) = data(30), data(25)
    x, y = Features().double(), torch.nn.Linear(3, 3).double()

    def inner(x, y):
        ridge = sum((p**2).sum() for p in y.parameters())
        return torch.nn.functional.cross_entropy(y(x(train)), labels) + 0.05 * ridge

    def outer(x, y):
        return torch.nn.functional.cross_entropy(y(x(test)), targets)

    return outer, inner, x, y


def solve_head(inner, x, y):
    """y*(x) by scipy, from its own gradient and Hessian: shares nothing with the package."""
    x = copy.deepcopy(x).requires_grad_(False)

    def at(v):
        parts = v.split([p.numel() for p in y.parameters()])
        named = zip(y.named_parameters(), parts, strict=True)
        return {n: p.reshape(q.shape) for (n, q), p in named}

    def g(v):
        return torch.func.functional_call(
            _Bound(inner, x, y), {f"y.{n}": p for n, p in at(v).items()}, ()
        )

    def fun(v):
        return float(g(torch.tensor(v)).detach())

    def jac(v):
        return torch.func.grad(g)(torch.tensor(v)).numpy()

    def hess(v):
        return torch.func.jacrev(torch.func.grad(g))(torch.tensor(v)).numpy()

    start = flat(list(y.parameters())).detach().numpy()
    v = scipy.optimize.minimize(fun, start, jac=jac, hess=hess, method="Newton-CG", tol=1e-10).x
    for _ in range(4):
        v = v - np.linalg.solve(hess(v), jac(v))
    assert np.linalg.norm(jac(v)) < 1e-13
    with torch.no_grad():
        for p, new in zip(y.parameters(), at(torch.tensor(v)).values(), strict=True):
            p.copy_(new)


class _Bound(torch.nn.Module):
    def __init__(self, loss, x, y):
        super().__init__()
        self.loss, self.x, self.y = loss, x, y

    def forward(self):
        return self.loss(self.x, self.y)


def test_network_against_differences_of_the_solved_problem():
    outer, inner, x, y = network()
    solve_head(inner, x, y)
    rng = torch.Generator().manual_seed(2)
    h = bilevel.hypergradient(outer, inner, x, y, method=Implicit(ConjugateGradient(100, 1e-13)))
    assert list(h.grad) == [name for name, _ in x.named_parameters()]
    for _ in range(4):
        d = {n: torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in h.grad.items()}

        def moved(t, d=d):
            with torch.no_grad():
                for n, p in x.named_parameters():
                    p.add_(t * d[n])
            solve_head(inner, x, y)
            value = float(outer(x, y).detach())
            with torch.no_grad():
                for n, p in x.named_parameters():
                    p.sub_(t * d[n])
            return value

        e = 1e-3
        exact = (8 * (moved(e) - moved(-e)) - (moved(2 * e) - moved(-2 * e))) / (12 * e)
        found = sum(float((h.grad[n] * d[n]).sum()) for n in d)
        assert found == pytest.approx(exact, rel=1e-7)
    solve_head(inner, x, y)
    longer = bilevel.hypergradient(outer, inner, x, y, method=Unrolled(600, True, step=2.0))
    assert relative(longer.grad, flat(h.grad).numpy()) < 1e-8


# -- check ----------------------------------------------------------------------------------------


def test_check_tells_right_from_wrong():
    wrong = Implicit(lambda product, b, q0: 2 * ConjugateGradient(100, 1e-12)(product, b))
    case = ridge(6, seed=4)
    report = bilevel.check(
        case.outer,
        case.inner,
        case.x,
        case.y,
        methods=[Implicit(ConjugateGradient(100, 1e-12)), Implicit(Identity()), wrong],
        directions=12,
    )
    right, identity, doubled = report.rows
    assert report.inner_gradient < 1e-10
    assert right.error < 1e-7 and right.residual < 1e-11
    assert identity.error > 0.05 and doubled.error > 0.05
    # 12 directions are all coordinates: the numeric derivative is the closed form
    assert relative(report.numeric, case.exact) < 1e-7
    q = np.linalg.solve(case.H, case.b)
    expected = np.linalg.norm(case.implicit(2 * q) - case.exact) / np.linalg.norm(case.exact)
    assert doubled.error == pytest.approx(expected, rel=1e-5)
    assert doubled.residual == pytest.approx(1, rel=1e-8)
    text = str(report)
    assert text.count("\n") == 4 and "Identity()" in text and "residual" in text


@pytest.mark.parametrize("case", [RIDGES[0], QUADRATIC, NESTED, SCALAR], ids=str)
def test_check_directions(case):
    report = bilevel.check(case.outer, case.inner, case.x, case.y, directions=2, seed=5)
    assert len(report.rows) == len(bilevel.api.STANDARD)
    assert report.rows[0].error < 1e-6
    assert len(report.numeric) == min(2, len(case.X))
    again = bilevel.check(case.outer, case.inner, case.x, case.y, directions=2, seed=6)
    if len(case.X) > 2:
        assert not torch.equal(report.numeric, again.numeric)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    bilevel.check(case.outer, case.inner, case.x, case.y, directions=2)
    assert torch.equal(state, torch.get_rng_state())


def test_finite_differences_where_f_does_not_depend_on_y_there():
    x, y = torch.tensor([1.0, 2.0]), torch.full((2,), 1e4)
    h = bilevel.hypergradient(
        lambda x, y: (x**2).sum() + ((y - 1e4) ** 2).sum(),
        lambda x, y: ((y - x) ** 2).sum(),
        *(x, y),
        method=FiniteDifference(),
    )
    assert torch.equal(h.grad, 2 * x)


def test_unrolling_where_g_has_no_curvature():
    x, y = t([1.0, 2.0]), t([0.5, -1.0])
    h = bilevel.hypergradient(
        lambda x, y: (x @ y) ** 2, lambda x, y: 0.0 * (x @ y), x, y, method=Unrolled()
    )
    assert relative(h.grad, 2 * (x @ y) * y) < 1e-15


def test_a_check_leaves_the_generators_alone_whatever_draws():
    case = ridge(6, seed=4)
    state = torch.get_rng_state()
    drawing = Implicit(bilevel.StochasticNeumann(form="random"))
    bilevel.check(case.outer, case.inner, case.x, case.y, methods=[drawing], directions=2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_loss_without_second_derivatives_is_told_and_differences_serve():
    bags = torch.tensor([[0, 1], [2, 3], [4, 0]])
    y = torch.arange(15.0, dtype=torch.float64).view(5, 3) / 10

    def inner(x, y):
        return (
            torch.nn.functional.embedding_bag(bags, y).square().sum()
            + x.exp() * (y - 2).square().sum()
        )

    def outer(x, y):
        return (y - 1).square().sum()

    x = torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="FiniteDifference"):
        bilevel.hypergradient(outer, inner, x, y)
    report = bilevel.check(
        outer,
        lambda x, y: y[bags].mean(1).square().sum() + x.exp() * (y - 2).square().sum(),
        *(x, y),
        methods=[FiniteDifference(ConjugateGradient(50, 1e-12))],
    )
    assert report.rows[0].error < 1e-4
