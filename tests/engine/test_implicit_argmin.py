"""`implicit`: an argmin that is differentiable, under backward and torch.func."""

import numpy as np
import pytest
import torch

import bilevel
from bilevel import ConjugateGradient, Neumann
from tests.tables import MIXED, NESTED, QUADRATIC, RIDGES, SCALAR, flat, leaves, like, relative, t

SOLVER = ConjugateGradient(200, 0.0)


def argmin_of(case):
    return lambda x: like(case.y, case.solution(flat(x).detach().numpy()))


@pytest.mark.parametrize("case", [*RIDGES, QUADRATIC, NESTED, MIXED, SCALAR], ids=str)
def test_backward_is_the_closed_form(case):
    x = like(case.x, case.X)
    parts = [leaf.requires_grad_() for leaf in leaves(x)]
    y = bilevel.implicit(case.inner, argmin_of(case), SOLVER)(x)
    assert type(y) is type(case.y) and relative([v.detach() for v in leaves(y)], case.Y) < 1e-14
    case.outer(x, y).backward()
    grad = flat([p.grad if p.grad is not None else torch.zeros_like(p) for p in parts])
    assert relative(grad, case.exact) < max(1e-10, 20 * case.kappa * 2.3e-16)


RIDGE = RIDGES[0]
H0 = t(RIDGE.hessian(np.full(12, -np.inf)))  # the Hessian without penalty
R0 = H0 @ t(np.linalg.solve(H0.numpy(), RIDGE.H @ RIDGE.Y))


def solve_ridge(x):
    """The ridge solution as torch operations, so that vmap can map it."""
    return torch.linalg.solve(H0 + torch.diag(x.exp()), R0)


def test_under_func_grad_and_jacrev():
    case = RIDGE
    y_star = bilevel.implicit(case.inner, solve_ridge, SOLVER)
    grad = torch.func.grad(lambda x: case.outer(x, y_star(x)))(case.x)
    assert relative(grad, case.exact) < 1e-10
    jacobian = torch.func.jacrev(y_star)(case.x)
    exact = -np.linalg.solve(case.H, case.cross(case.X))
    assert relative(jacobian, exact.reshape(-1)) < 1e-10
    assert relative(jacobian, torch.func.jacrev(solve_ridge)(case.x)) < 1e-10


def test_second_derivatives():
    """The system is differentiated in turn: its solver may not lose the graph of its numbers."""
    diagonal, b = torch.diag(t(np.arange(1.0, 6.0))), torch.ones(5, dtype=torch.float64)

    def inner(x, y):
        return y @ (diagonal + torch.diag(x.exp())) @ y / 2 - b @ y

    def argmin(x):
        return torch.linalg.solve(diagonal + torch.diag(x.exp()), b)

    def hessian(argmin):
        x = torch.zeros(5, dtype=torch.float64)
        return torch.autograd.functional.hessian(lambda x: argmin(x).sum(), x)

    assert relative(hessian(bilevel.implicit(inner, argmin)), hessian(argmin)) < 1e-6


def test_a_way_to_y_that_takes_gradients_of_its_own():
    """As any loop of training does; none of them reach x."""

    def trained(x):
        y = torch.zeros(12, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([y], max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

        def closure():
            optimizer.zero_grad()
            loss = RIDGE.inner(x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
        return y

    x = RIDGE.x.clone().requires_grad_()
    y = bilevel.implicit(RIDGE.inner, trained, SOLVER)(x)
    assert x.grad is None
    RIDGE.outer(x, y).backward()
    assert relative(x.grad, RIDGE.exact) < 1e-6


def test_under_vmap():
    case = RIDGE
    y_star = bilevel.implicit(case.inner, solve_ridge, SOLVER)
    xs = torch.stack([case.x, case.x + 0.3, 0.5 * case.x])
    grads = torch.func.vmap(torch.func.grad(lambda x: case.outer(x, y_star(x))))(xs)
    for x, grad in zip(xs, grads, strict=True):
        one = torch.func.grad(lambda x: case.outer(x, y_star(x)))(x)
        assert relative(grad, one) < 1e-9
    assert relative(grads[1], grads[0]) > 1e-3


def test_gradcheck():
    torch.autograd.gradcheck(
        bilevel.implicit(RIDGE.inner, solve_ridge, SOLVER),
        (RIDGE.x.clone().requires_grad_(),),
        rtol=1e-6,
    )


def test_further_arguments_reach_both_functions():
    def inner(x, y, shift, power):
        return ((y - shift * x**power) ** 2).sum()

    y_star = bilevel.implicit(inner, lambda x, shift, power: shift * x**power, SOLVER)
    x = t([1.0, 2.0]).requires_grad_()
    y_star(x, 3.0, 2).sum().backward()
    assert torch.allclose(x.grad, 6 * x.detach())


def test_the_solver_is_that_given():
    case, step = RIDGE, 0.4
    x = case.x.clone().requires_grad_()
    y = bilevel.implicit(case.inner, argmin_of(case), Neumann(4, step=step))(x)
    case.outer(x, y).backward()
    h = bilevel.hypergradient(
        case.outer, case.inner, case.x, case.y_star,
        method=bilevel.Implicit(Neumann(4, step=step)),
    )  # fmt: skip
    assert relative(x.grad, flat(h.grad)) < 1e-12
    assert relative(x.grad, case.exact) > 1e-2


def test_attention_in_the_inner_loss():
    """Whose fused kernels have no second derivative."""
    k = torch.randn(1, 1, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def inner(x, y):
        mixed = torch.nn.functional.scaled_dot_product_attention(k, k, k)
        return ((y - x * mixed) ** 2).sum() + torch.nn.functional.scaled_dot_product_attention(
            0.01 * y, 0.01 * y, 0.01 * y
        ).square().sum()

    def argmin(x):
        y = torch.zeros_like(k).requires_grad_()
        optimizer = torch.optim.LBFGS([y], max_iter=200, tolerance_grad=1e-13, tolerance_change=0)

        def closure():
            optimizer.zero_grad()
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                value = inner(x.detach(), y)
                value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        return y.detach()

    def F(x):
        return (bilevel.implicit(inner, argmin, SOLVER)(x) ** 2).sum()

    x = t(1.5).requires_grad_()
    F(x).backward()
    numeric = (F(t(1.5 + 1e-4)) - F(t(1.5 - 1e-4))) / 2e-4
    assert relative(x.grad, numeric) < 1e-6


def unsolved(scales, solver):
    """How far the gradient of sum y* is off, where the system has such eigenvalues."""
    scales = t(scales)
    x = torch.ones(len(scales), dtype=torch.float64, requires_grad=True)
    y = bilevel.implicit(
        lambda x, y: (scales * y * y / 2 - x * y).sum(), lambda x: x / scales, solver
    )
    y(x).sum().backward()
    return relative(x.grad, 1 / scales)


def test_a_system_that_is_not_solved_is_told():
    steep = np.geomspace(1.0, 1e-5, 40)
    few, enough = ConjugateGradient(5), ConjugateGradient(400)
    with pytest.warns(RuntimeWarning, match=r"residual of 3.1 by Conj.*steps=5.*steps=300"):
        assert unsolved(steep, few) > 0.5
    with pytest.warns(RuntimeWarning, match=r"residual of 0\.[2-9]"):
        unsolved(np.geomspace(1.0, 0.02, 40), few)
    assert unsolved(steep, enough) < 1e-6  # a warning is an error here
    # a series is known to be short; but not one that is farther from a solution than zero
    assert unsolved(steep, Neumann(5)) > 0.5
    with pytest.warns(RuntimeWarning, match="residual of 9.*products"):
        unsolved(np.ones(4), lambda product, b, q0: 10 * b)


def test_second_derivatives_where_a_system_is_solved_at_once():
    """The residual is zero, and so are numbers that steps are divided by."""

    def inner(x, y):
        return ((y - 1) ** 2).sum() / 2 + x.exp() * (y**2).sum() / 2

    def argmin(x):
        return torch.ones(3, dtype=torch.float64) / (1 + x.exp())

    def hessian(argmin):
        return torch.func.jacrev(torch.func.jacrev(lambda x: argmin(x).sum()))(t(0.3))

    y_star = bilevel.implicit(inner, argmin)
    assert float(hessian(y_star)) == pytest.approx(float(hessian(argmin)), rel=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # by torch's own forward mode
def test_forwards_is_refused_in_words():
    y_star = bilevel.implicit(RIDGE.inner, solve_ridge, SOLVER)
    with pytest.raises(RuntimeError, match="use torch.func.jacrev instead of jacfwd"):
        torch.func.jacfwd(y_star)(RIDGE.x)


def test_a_module_is_passed_as_its_parameters():
    module = torch.nn.Linear(2, 1)
    y_star = bilevel.implicit(lambda x, y: (y**2).sum(), lambda x: torch.zeros(1), SOLVER)
    with pytest.raises(TypeError, match=r"x is the Module Linear.*dict\(module.named_parameters"):
        y_star(module)
