"""Bugs planted in the engine turn the oracle tests red.

Each row patches one thing and names the check, of those in oracles.py, that must then fail; the
same check passes without the patch.
"""

from contextlib import contextmanager

import pytest
import torch

import bilevel
from bilevel import ConjugateGradient, Implicit, hypergradients, iteration, linear
from bilevel.data import Cycle
from bilevel.problem import Draw, Pullback
from bilevel.rules import Armijo, Move
from tests.engine import oracles
from tests.tables import QUADRATIC, RIDGES, SOLVERS

ROW = {str(s): s for s in SOLVERS}
LOOSE = Implicit(ConjugateGradient(steps=2, rtol=0.0))


def closed_form(name="cg", case=RIDGES[0]):
    return lambda: oracles.closed_form(ROW[name], case)


def residual():
    assert oracles.true_residual(LOOSE, RIDGES[0]) > 1e-2


def slope(method=LOOSE):
    return lambda: oracles.tangent_slope(method, RIDGES[0])


def both(change):
    """Patches (g_xy u, g_yy u), from which gradient and residual are made."""
    original = Pullback.both
    return Pullback, "both", lambda pull, u: change(*original(pull, u))


def solved(change):
    original = ConjugateGradient.watched

    def watched(self, product, b, *rest):
        q, concave = original(self, product, b, *rest)
        return change(q, b), concave

    return ConjugateGradient, "watched", watched


def estimated(change):
    original = Implicit.estimate

    def estimate(self, oracle, x, y, *rest):
        return change(original(self, oracle, x, y, *rest), oracle, x, y, *rest)

    return Implicit, "estimate", estimate


def misreported(h, *rest):
    h.residual = h.residual**2
    return h


def wrong_way(h, *rest):
    """The response follows the tangent backwards."""
    respond = h.respond

    def backwards(d, *first):
        course, y = respond(d, *first), rest[2]

        def follow(t, xt):
            there = course.follow(t, xt)
            return there._replace(y=2 * y - there.y, bent=2 * y - there.bent)

        return course._replace(follow=follow)

    h.respond = backwards
    return h


def wrong_newton(h, *rest):
    newton = h.newton
    h.newton = lambda: (0.9 * newton()[0], h.learned[-1])
    return h


def dropped_direct(h, oracle, x, y, outer, *rest):
    h.grad = h.grad - oracle.outer_gradients(x, y, outer)[1]
    return h


def stale_batch():
    """Second derivatives are of the batch before."""

    def late(cycle, count):
        return [cycle.data[cycle._position - 1]] * count

    return Cycle, "look", late


def carried():
    original = Armijo.__call__

    def call(self, line, k, last):
        move = original(self, line, k, last)
        return move._replace(last=1e-12) if move.failed else move

    return Armijo, "__call__", call


def taken():
    """A failed search takes the last step that it tried."""
    original = Armijo.__call__

    def call(self, line, k, last):
        move = original(self, line, k, last)
        return Move(1e-9, last, move.trials) if move.failed else move

    return Armijo, "__call__", call


def adjoint_not_propagated():
    """Unrolling that forgets I - step g_yy: every step sees f_y."""
    original = Pullback.both
    return Pullback, "both", lambda pull, u: (original(pull, u)[0], torch.zeros_like(u))


def stocbio(self, product, b, q0=None):
    """nu v_Q + sum_{1..Q} v_j, as its published code has it, for nu sum_{0..Q} v_j."""
    v, total = b, 0 * b
    for j in range(self.terms - 1):
        v = v - self.step * product(v, j)
        total = total + v
    return self.step * v + total


BUGS = {
    "factor 2 on the implicit term": (
        lambda: both(lambda gxy, gyy: (2 * gxy, gyy)),
        closed_form(),
    ),
    "factor 2 on the solution": (lambda: solved(lambda q, b: 2 * q), closed_form()),
    "half of the implicit term": (lambda: both(lambda gxy, gyy: (gxy / 2, gyy)), closed_form()),
    "wrong sign": (lambda: both(lambda gxy, gyy: (-gxy, gyy)), closed_form()),
    "dropped cross term": (lambda: both(lambda gxy, gyy: (0 * gxy, gyy)), closed_form()),
    "dropped direct term": (lambda: estimated(dropped_direct), closed_form()),
    "identity in place of the inverse": (lambda: solved(lambda q, b: b), closed_form()),
    "the last step of CG is lost": (
        lambda: solved(lambda q, b: q - 1e-6 * b),
        closed_form(),
    ),
    "one term of the series is missing": (
        lambda: (
            linear.Neumann,
            "__call__",
            lambda self, product, b, q0=None: self.step * (b + 0 * product(b)),
        ),
        closed_form("neumann 1/L"),
    ),
    "the series scaled as in stocBiO": (
        lambda: (linear.StochasticNeumann, "__call__", stocbio),
        closed_form("stochastic neumann, one batch"),
    ),
    "adjoint not propagated": (adjoint_not_propagated, closed_form("unrolled", QUADRATIC)),
    "residual misreported": (lambda: estimated(misreported), residual),
    "residual of another system": (
        lambda: both(lambda gxy, gyy: (gxy, 1.05 * gyy)),
        residual,
    ),
    "tangent of the wrong sign": (lambda: estimated(wrong_way), slope()),
    "tangent of the wrong length": (
        lambda: (
            Pullback,
            "forward",
            (lambda original: lambda pull, d: 1.1 * original(pull, d))(Pullback.forward),
        ),
        slope(),
    ),
    "Newton step of the wrong length": (
        lambda: estimated(wrong_newton),
        oracles.solved_by_newton,
    ),
    "no correction": (
        lambda: (iteration, "corrected", lambda oracle, x, y, h, judge: (y, h.learned[-1])),
        oracles.solved_by_newton,
    ),
    "stale batch": (stale_batch, oracles.fresh_batches),
    "a failed step carried over": (carried, oracles.failed_step_not_carried),
    "a failed step taken": (taken, oracles.failed_step_not_carried),
    "dropout not replayed": (
        lambda: (Draw, "evaluate", lambda self, randomness, function: function()),
        oracles.dropout_replayed,
    ),
    "slope of the unrolled path": (
        lambda: (
            hypergradients.Unrolled,
            "descend",
            (lambda original: lambda self, o, x, y, d: (original(self, o, x, y, d)[0] + 1e-3, []))(
                hypergradients.Unrolled.descend
            ),
        ),
        lambda: oracles.closed_form(ROW["unrolled"], QUADRATIC),
    ),
}


@contextmanager
def planted(bug):
    owner, name, broken = bug()
    original = getattr(owner, name)
    setattr(owner, name, broken)
    try:
        yield
    finally:
        setattr(owner, name, original)


@pytest.mark.parametrize("name", BUGS)
@pytest.mark.filterwarnings("ignore:.*diverges:RuntimeWarning")
def test_planted_bug_is_caught(name):
    bug, check = BUGS[name]
    with planted(bug), pytest.raises(AssertionError):
        check()
    check()


@pytest.mark.parametrize(
    "name", ["factor 2 on the implicit term", "identity in place of the inverse"]
)
def test_the_loss_falls_under_a_wrong_hypergradient(name):
    """Why the oracles are exact: a search hides such a bug, and the loss falls all the same."""
    case = RIDGES[0]
    with planted(BUGS[name][0]):
        method = bilevel.fixed("sgd", 0.1, 0.3)
        result = bilevel.solve(case.outer, case.inner, case.x, case.y, method=method, steps=20)
    assert case.F(result.x.numpy()) < case.F(case.X)
