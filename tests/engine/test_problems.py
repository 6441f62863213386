"""The problems are themselves tested: their closed forms against differences and one another."""

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime

from tests.tables import CASES, RIDGES, flat, leaves, like, relative

EVERY = pytest.mark.parametrize("case", CASES, ids=str)


@EVERY
def test_losses_are_those_of_the_formulas(case):
    assert float(case.outer(case.x, case.y_star)) == pytest.approx(
        case.value(case.X, case.Y), rel=1e-12
    )


@EVERY
def test_inner_solution_has_no_gradient(case):
    y = like(case.y, case.Y)
    parts = [leaf.requires_grad_() for leaf in leaves(y)]
    gy = flat(torch.autograd.grad(case.inner(case.x, y), parts))
    start = [leaf.clone().requires_grad_() for leaf in leaves(case.y)]
    gy0 = flat(torch.autograd.grad(case.inner(case.x, like_of(case.y, start)), start))
    assert gy.norm() < 1e-12 * max(1.0, float(gy0.norm()))


def like_of(tree, parts):
    """``parts``, with their graph, in the structure of ``tree``."""
    rest = iter(parts)

    def fill(node):
        if isinstance(node, torch.Tensor):
            return next(rest)
        if isinstance(node, dict):
            return {k: fill(v) for k, v in node.items()}
        made = [fill(v) for v in node]
        return type(node)(*made) if hasattr(node, "_fields") else type(node)(made)

    return fill(tree)


@EVERY
def test_blocks_are_those_of_autograd(case):
    def inner(X, Y):
        return case.inner(_tree(case.x, X), _tree(case.y, Y))

    X, Y = flat(case.x), flat(case.y_star)
    H = torch.autograd.functional.hessian(inner, (X, Y))
    assert np.allclose(H[1][1].numpy(), case.H, rtol=1e-10, atol=1e-12)
    assert np.allclose(H[1][0].numpy(), case.cross(case.X), rtol=1e-10, atol=1e-12)


def _tree(tree, vector):
    parts = vector.split([leaf.numel() for leaf in leaves(tree)])
    shaped = [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves(tree), strict=True)]
    return like_of(tree, shaped)


@EVERY
def test_closed_form_is_the_derivative_of_the_value_function(case):
    """Five-point differences of F, which knows y* alone and nothing of the implicit theorem."""
    numeric = np.zeros_like(case.X)
    for i in range(len(case.X)):
        e = np.zeros_like(case.X)
        e[i] = h = 1e-3
        near = case.F(case.X + e) - case.F(case.X - e)
        far = case.F(case.X + 2 * e) - case.F(case.X - 2 * e)
        numeric[i] = (8 * near - far) / (12 * h)
    assert relative(numeric, case.exact) < 1e-8


@pytest.mark.parametrize("case", [c for c in CASES if c.optimum is not None], ids=str)
def test_optimum(case):
    at, away = (approx_fprime(x, case.F, 1e-7) for x in (case.optimum, case.X))
    assert np.linalg.norm(at) < 1e-6 * np.linalg.norm(away)
    assert case.F(case.optimum) < case.F(case.X)


@pytest.mark.parametrize(("case", "nominal"), list(zip(RIDGES, (6, 1e2, 1e3, 1e5), strict=True)))
def test_condition_numbers(case, nominal):
    assert nominal / 4 < case.kappa < 1.5 * nominal


@EVERY
def test_wrong_hypergradients_are_far(case):
    """The data is asymmetric enough that no common mistake comes near the right answer."""
    q = np.linalg.solve(case.H, case.b)
    wrong = {
        "factor 2": case.implicit(2 * q),
        "sign": case.implicit(-q),
        "no implicit term": case.implicit(0 * q),
        "identity": case.implicit(case.b),
    }
    if case.name == "identity":
        del wrong["identity"]
    for name, grad in wrong.items():
        assert relative(grad, case.exact) > 0.05, name
