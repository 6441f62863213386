"""Kinks of g are rounded off where its second derivatives miss what they do, and nowhere else."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel import kinks
from bilevel.noise import Agreement, Noise
from bilevel.problem import Draw, Oracle, Problem
from bilevel.rounded import RULES, Rounded, Seen, rounded
from tests.engine.test_inner_kinks import A_VAL, A, W, hinge, lasso, oracle_of, shrunk
from tests.tables import t

TOLD = "they were rounded off"
EPS = 0.3
g = torch.Generator().manual_seed(3)
Z, B, C = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(3))


def size(z):
    return (z**2 + EPS**2) ** 0.5


def length(z, *dim):
    return ((z**2).sum(*dim) + EPS**2) ** 0.5


def above(a, b):
    return (a + b + size(a - b)) / 2


# a function of z, and the same with sqrt in the place of every |.|
KINKED = {
    "z.abs()": (lambda z: z.abs(), size),
    "torch.abs(z)": (torch.abs, size),
    "torch.abs(input=z)": (lambda z: torch.abs(input=z), size),
    "abs(z)": (abs, size),
    "absolute": (torch.absolute, size),
    "F.relu": (F.relu, lambda z: above(z, 0)),
    "torch.relu": (torch.relu, lambda z: above(z, 0)),
    "nn.ReLU": (nn.ReLU(), lambda z: above(z, 0)),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2), lambda z: 0.2 * z + 0.8 * above(z, 0)),
    "clamp(min)": (lambda z: z.clamp(min=0.1), lambda z: above(z, 0.1)),
    "clamp(max)": (lambda z: z.clamp(max=0.1), lambda z: -above(-z, -0.1)),
    "clamp": (lambda z: torch.clamp(z, -0.2, 0.3), lambda z: -above(-above(z, -0.2), -0.3)),
    "clip": (lambda z: z.clip(B), lambda z: above(z, B)),
    "clamp_min": (lambda z: z.clamp_min(0), lambda z: above(z, 0)),
    "clamp_max": (lambda z: z.clamp_max(0), lambda z: -above(-z, 0)),
    "maximum": (lambda z: torch.maximum(z, B), lambda z: above(z, B)),
    "fmax": (lambda z: torch.fmax(z, B), lambda z: above(z, B)),
    "fmin": (lambda z: torch.fmin(z, B), lambda z: -above(-z, -B)),
    "max(z, b)": (lambda z: torch.max(z, B), lambda z: above(z, B)),
    "minimum": (lambda z: torch.minimum(z, B), lambda z: -above(-z, -B)),
    "min(z, b)": (lambda z: torch.min(z, B), lambda z: -above(-z, -B)),
    "F.l1_loss": (lambda z: F.l1_loss(z, B), lambda z: size(z - B).mean()),
    "nn.L1Loss": (lambda z: nn.L1Loss(reduction="sum")(z, B), lambda z: size(z - B).sum()),
    "l1_loss each": (lambda z: F.l1_loss(z, B, reduction="none"), lambda z: size(z - B)),
    "torch.norm": (lambda z: torch.norm(z, 1), lambda z: size(z).sum()),
    "z.norm": (lambda z: z.norm(p=1), lambda z: size(z).sum()),
    "linalg.norm": (lambda z: torch.linalg.norm(z, ord=1), lambda z: size(z).sum()),
    "vector_norm": (lambda z: torch.linalg.vector_norm(z, 1), lambda z: size(z).sum()),
    "1-norms of rows": (
        lambda z: torch.norm(z.outer(C), 1, dim=1, keepdim=True),
        lambda z: size(z.outer(C)).sum(1, keepdim=True),
    ),
    "z.norm()": (lambda z: z.norm(), length),
    "of no dimension": (lambda z: torch.linalg.vector_norm(z, dim=()), length),
    "Frobenius": (lambda z: torch.linalg.norm(z.outer(C)), lambda z: length(z.outer(C))),
    "of rows": (lambda z: (z.outer(C) - 1).norm(dim=1), lambda z: length(z.outer(C) - 1, 1)),
    "torch.norm of columns": (
        lambda z: torch.norm(z.outer(C) - 1, p=2, dim=(0,)),
        lambda z: length(z.outer(C) - 1, 0),
    ),
    "linalg of rows": (
        lambda z: torch.linalg.norm(z.outer(C) - 1, 2, dim=-1),
        lambda z: length(z.outer(C) - 1, 1),
    ),
    "vector_norm of two": (
        lambda z: torch.linalg.vector_norm((z.outer(C) - 1)[None], dim=(0, 2)),
        lambda z: length(z.outer(C) - 1, 1),
    ),
}


@pytest.mark.parametrize("name", KINKED)
def test_what_a_kink_becomes(name):
    """The formula, its derivatives to second order, and the function itself as eps falls."""
    plain, formula = KINKED[name]

    def value(z, eps=EPS):
        with Rounded([eps] * 2):
            return plain(z)

    torch.testing.assert_close(value(Z), formula(Z), rtol=1e-12, atol=1e-12)
    of_value, of_formula = (
        torch.autograd.functional.hessian(lambda z, f=f: (f(z) * torch.ones(7)).mean(), Z)
        for f in (value, formula)
    )
    torch.testing.assert_close(of_value, of_formula)
    assert of_formula.diagonal().abs().min() > 0
    torch.testing.assert_close(value(Z, 1e-9), plain(Z), rtol=1e-8, atol=1e-8)
    assert torch.equal(value(Z, 0.0), plain(Z))


def test_every_rule_is_tried():
    met = set()

    class Names(Seen):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            met.add(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs)

    for plain, _ in KINKED.values():
        with Names():
            plain(Z)
    assert met >= set(RULES)


@pytest.mark.parametrize(
    "plain",
    [
        lambda z: z.max(),
        lambda z: z.max(0).values,
        lambda z: z.max(dim=0, keepdim=True).values,
        lambda z: z.norm(3),
        lambda z: torch.linalg.norm(z, ord=0),
        lambda z: torch.linalg.norm(z, ord=-1),
        lambda z: torch.clamp(z, 0.0, out=torch.empty(7, dtype=torch.float64)),
        lambda z: torch.linalg.norm(z.outer(C), ord=1),  # the largest of columns
        lambda z: torch.linalg.norm(z.outer(C), 2),  # the largest singular value
        lambda z: torch.linalg.norm(z.outer(C), 2, dim=(0, 1)),
        lambda z: torch.linalg.vector_norm(z, torch.inf),
        lambda z: torch.relu_(z * 2),
        lambda z: nn.ReLU(inplace=True)(z * 2),
        lambda z: z[(z > 0).long().clamp(min=0)],  # an index stays one
        lambda z: torch.complex(z, z).abs(),
        lambda z: F.softplus(z).exp(),
    ],
)
def test_what_is_left_alone(plain):
    with Rounded([EPS] * 3):
        value = plain(Z)
    assert torch.equal(value, plain(Z))


def test_a_sharp_kink_is_the_function_itself():
    """Also its derivative at the kink, and beside infinite bounds."""
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for plain in (torch.relu, lambda z: torch.maximum(z, 0 * z), lambda z: z.clamp(-1e300, 1.0)):
        with Rounded([0.0, 0.0]):
            value = plain(z).sum()
        (found,), (own,) = (torch.autograd.grad(v, z) for v in (value, plain(z).sum()))
        assert torch.equal(found, own)
    with Rounded([0.0, EPS]):
        assert torch.isfinite(Z.clamp(-math.inf, 0.5)).all()


def test_each_kink_has_its_width():
    def loss(z):
        return z.abs().sum() + z.relu().sum() + torch.maximum(z, B).sum()

    found = rounded(loss, [0.0, EPS])(Z)
    assert found == pytest.approx(float(Z.abs().sum() + above(Z, 0).sum() + Z.maximum(B).sum()))
    again = rounded(loss, [0.0, EPS])
    assert again(Z) == again(Z) == found  # a call begins anew
    assert rounded(loss, []) is loss


def test_what_is_seen_is_what_requires_gradients():
    z = Z.clone().requires_grad_()
    with Seen() as seen:
        value = (B.abs() + (2 * z - B).abs() * F.l1_loss(z, C)).clamp(max=1.0)
    none, first, second, third = seen.kinks
    assert none is None and torch.equal(first[:, 0], 2 * Z - B)
    assert torch.equal(second[:, 0], Z - C)
    assert third is not None and not third.requires_grad
    plain = (B.abs() + (2 * Z - B).abs() * F.l1_loss(Z, C)).clamp(max=1.0)
    assert torch.equal(value, plain)


def test_vectors_are_seen_whole():
    z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    with Seen() as seen:
        z.norm(dim=1), z.norm(), z.norm(dim=(2, 0)), torch.norm(z, 1)
    rows, whole, pairs, numbers = (z.detach() for z in seen.kinks)
    assert torch.equal(rows, z.detach().transpose(1, 2)) and whole.shape == (24,)
    assert pairs.shape == (3, 8) and torch.equal(pairs[1, :2], z.detach()[:, 1, 0])
    assert numbers.shape == (2, 3, 4, 1)


# -- where ---------------------------------------------------------------------------------------


def run(*problem, method="bisls-adam", **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = bilevel.solve(*problem, method=method, **options)
    return result, [str(w.message) for w in caught if TOLD in str(w.message)]


@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_a_lasso_is_solved(direction):
    """Its penalty to 2 % of the best F on a grid; one for each feature far below what is left of F
    where kinks stay."""
    outer, inner, x, y = lasso(False)
    result, said = run(outer, inner, x, y, method=f"bisls-{direction}")
    (eps,) = result.state.kinks
    assert f"eps = {eps:.2g}" in said[0] and len(said) == 1
    # halved after 50 iterations
    assert 2 * eps == pytest.approx(kinks.SHARE * float(result.y.abs().mean()), rel=0.2)
    every = torch.linspace(-4, -1, 31, dtype=torch.float64)
    best = min(float(outer(x, shrunk(x))) for x in every)
    assert float(outer(result.x, shrunk(result.x))) < 1.02 * best

    outer, inner, x, y = lasso(False, penalties=12)
    rounds = (replace(bilevel.bisls(direction), rounds=rounds) for rounds in (True, False))
    (free, said), (kept, silent) = (run(outer, inner, x, y, method=method) for method in rounds)
    assert said and not silent and kept.state.kinks == ()
    assert float(outer(free.x, shrunk(free.x))) < 0.8 * float(outer(kept.x, shrunk(kept.x)))


def test_hinges_are_rounded():
    result, said = run(*hinge(False))
    fell = result.history[0].outer_loss - result.history[-1].outer_loss
    assert said and fell > 0.2


@pytest.mark.parametrize("noisy", [False, True])
def test_widths_are_halved_where_g_has_no_noise(noisy, monkeypatch):
    """Batches see few kinks over a narrow width."""
    monkeypatch.setattr(kinks, "EVERY", 10)
    outer, inner, x, y = lasso(False)
    rows = torch.arange(30).repeat(4).view(12, 10)[:, ::2]

    def batch(x, y, rows):
        return (A[rows] @ (y - W) - 1).square().mean() / 2 + (x.exp() * y.abs()).sum()

    widths = []
    options = {"steps": 45, "callback": lambda state, _: widths.append(state.kinks)}
    if noisy:
        run(outer, batch, x, y, inner_data=list(rows), **options)
    else:
        run(outer, inner, x, y, **options)
    found = [eps for eps in widths if eps]
    assert found[0][0] > 0
    assert found[-1][0] == pytest.approx(found[0][0] / (1 if noisy else 2**4))


def test_so_are_those_of_batches():
    """Of which the end of a run of sharp ones tells nothing."""

    def inner(x, y, rows):
        return (A[rows] @ (y - W) - 1).square().mean() / 2 + (x.exp() * y.abs()).sum()

    outer, _, x, y = lasso(False, penalties=12)
    result, said = run(outer, inner, x, y, inner_data=list(torch.arange(30).view(3, 10)))
    assert said and 0 < result.state.kinks[0] < 0.1
    assert float(outer(result.x, shrunk(result.x))) < 0.06  # 0.07 where all kinks stay


def test_a_width_for_each_kink_with_two_sides():
    """A clamp that guards and a kink of x alone stay as they are."""

    def inner(x, y):
        guarded = y.square().sum().clamp(min=1e-8).sqrt()
        fit = (A @ (y - W) - 1).square().mean() / 2 + (x + 4).relu().sum() * 0
        return fit + (x.exp() * y.abs()).sum() + 1e-6 * guarded

    outer, _, x, y = lasso(False)
    result, _ = run(outer, inner, x, y)
    guard, own, eps = result.state.kinks
    assert guard == own == 0.0 and eps > 0
    # and the guard is where the loss comes to it
    swapped, _ = run(outer, lambda x, y: y.abs().sum() * 0 + inner(x, y), x, y)
    assert [w > 0 for w in swapped.state.kinks] == [True, False, False, True]


SMOOTH = {
    "no kink": lambda x, y: (A @ (y - W) - 1).square().mean() + (x.exp() * y.square()).sum(),
    "of x alone": lambda x, y: (y - W).square().sum() + (x.relu() * y.square()).sum(),
    "never passed": lambda x, y: (y - W).square().sum() + (y - 99).abs().sum() + x.sum() * 0,
    "seen": lambda x, y: (y - 1).square().sum() + 1e-3 * (x.exp() * (y - 1).abs()).sum(),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_nothing_is_rounded_where_second_derivatives_tell(name):
    """The same bits, whatever was looked at."""
    outer, _, x, y = lasso(False)
    results = [
        run(outer, SMOOTH[name], x, y + 1, method=replace(bilevel.bisls(), rounds=rounds), steps=25)
        for rounds in (True, False)
    ]
    (looked, said), (plain, _) = results
    assert looked.state.kinks == () and not said
    assert torch.equal(looked.x, plain.x) and torch.equal(looked.y, plain.y)
    if name in ("no kink", "of x alone"):  # without a gradient
        assert looked.history[-1].gradients == plain.history[-1].gradients


def test_a_network_keeps_its_rectifiers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 1)).double()

    def inner(x, y):
        return (y(A).squeeze(1) - A @ W).square().mean() + (x.exp() * y[2].weight.square()).sum()

    def outer(x, y):
        return (y(A_VAL).squeeze(1) - A_VAL @ W).square().mean()

    start = torch.tensor(-3.0, dtype=torch.float64)
    result, said = run(outer, inner, start, net, steps=25)
    assert result.state.learned.concave > 0 and result.state.kinks == () and not said

    def absolute(x, y):  # but not the kinks of its loss
        return (y(A).squeeze(1) - A @ W).abs().mean() + (x.exp() * y[2].weight.square()).sum()

    result, said = run(outer, absolute, start, net, steps=25)
    rectifier, eps = result.state.kinks
    assert rectifier == 0.0 < eps and said


@pytest.mark.parametrize(
    "method",
    [
        bilevel.bisls(hypergradient=bilevel.FiniteDifference(bilevel.ConjugateGradient())),
        bilevel.bisls(hypergradient=bilevel.Unrolled()),
        bilevel.fixed("adam"),
        bilevel.bisps(),
    ],
    ids=["differences", "unrolled", "fixed", "bisps"],
)
def test_methods_that_leave_kinks(method):
    result, said = run(*lasso(False), method=method, steps=25)
    assert result.state.kinks == () and not said


def in_pieces(x, y):
    """Made again on the way back, when no mode is there."""
    return checkpoint(lasso(False)[1], x, y, use_reentrant=False)


def by_rows(x, y):
    return (A @ (y - W) - 1).square().mean() / 2 + torch.func.vmap(torch.abs)(y).sum() * x.exp()


def weighted(x, y):
    """Whose weight torch loses in a mode."""
    fit = (A @ (y - W) - 1).square().mean() / 2
    return fit + x.exp() * F.l1_loss(y, 0 * y, reduction="sum", weight=torch.full_like(y, 2.0))


@pytest.mark.parametrize("inner", [in_pieces, by_rows, weighted])
def test_a_loss_that_does_not_bear_it_keeps_its_kinks(inner):
    outer, _, x, y = lasso(False)
    result, said = run(outer, inner, x[0], y, steps=30)
    assert result.state.kinks == () and not said and result.reason == "all 30 steps were taken"


def test_a_rule_that_fails_ends_nothing(monkeypatch):
    def raises(*args):
        raise TypeError("other arguments")

    monkeypatch.setitem(RULES, "abs", raises)
    result, said = run(*lasso(False), steps=12)
    assert result.state.kinks == () and not said and len(result.history) == 12


def test_a_loss_that_fails_in_a_look_ends_the_run(monkeypatch):
    """As in any other evaluation; before, there is no work to keep."""

    def raises(*args):
        raise MemoryError("no more")

    outer, inner, x, y = lasso(False)
    look = Oracle.look
    for k, at in ((0, 1), (kinks.FIRST, 2)):
        calls = []

        def failing(*args, calls=calls, at=at):
            calls.append(1)
            return (raises if len(calls) == at else look)(*args)

        monkeypatch.setattr(Oracle, "look", failing)
        if k == 0:
            with pytest.raises(MemoryError):
                run(outer, inner, x, y)
        else:
            reason = run(outer, inner, x, y)[0].reason
            assert reason == f"stopped at iteration {k}: MemoryError: no more"


def test_a_run_that_ends_early_says_so():
    def stop(state, record):
        if state.k == 12:
            raise KeyboardInterrupt

    result, said = run(*lasso(False), callback=stop)
    assert "interrupted" in result.reason and result.state.kinks and len(said) == 1


def test_no_look_where_numbers_are_not_sound(monkeypatch):
    looks = []
    monkeypatch.setattr(kinks, "found", lambda *args: looks.append(args))
    outer, inner, x, y = lasso(False)
    for factor, taken in ((1.0, 1), (math.nan, 0)):
        problem = Problem(lambda x, y, factor=factor: factor * outer(x, y), inner)
        method = bilevel.bisls()
        state, record = method.step(problem, method.init(x, y), None, 2)
        assert (record.failure is None) == bool(taken) and state.kinks is None
        assert len(looks) == taken
        looks.clear()


def test_ranks_do_not_look(monkeypatch):
    monkeypatch.setattr(Oracle, "may_round", False)
    result, said = run(*lasso(False), steps=12)
    assert result.state.kinks == () and not said


def test_groups_are_found():
    """A group of features that turns; one that only shrinks has no kink on its way."""

    def inner(x, y):
        return y.square().sum() / 2 + x.sum() * 0 + y.view(2, 2).norm(dim=1).sum()

    turned, shorter = [0.3, 0.4, 2.0, 1.0], [0.6, 0.8, 2.0, 1.0]
    (eps,), _ = look(inner, turned, [-0.03, -0.04, 2.0, 1.0])
    assert eps == pytest.approx(kinks.SHARE * (0.05 + 5**0.5) / 2)
    assert (
        look(lambda x, y: 9 * y.square().sum() + inner(x, y), shorter, [0.3, 0.4, 2.0, 1.0])[0]
        is None
    )


def test_a_look_draws_nothing():
    def inner(x, y):
        noise = 0.01 * torch.rand(12, dtype=torch.float64)
        return (A @ (y - W + noise) - 1).square().mean() / 2 + (x.exp() * y.abs()).sum()

    outer, _, x, y = lasso(False)
    left = []
    for rounds in (True, False):
        method = replace(bilevel.bisls(outer_step=1.0), rounds=rounds)
        torch.manual_seed(0)
        run(outer, inner, x, y, method=method, steps=4, seed=0)
        left.append(float(torch.rand(())))
    assert left[0] == left[1]


def test_a_run_goes_on_rounded(tmp_path):
    path = tmp_path / "c"
    for cut in (2, 8):
        whole, _ = run(*lasso(False), steps=12)
        run(*lasso(False), steps=cut, checkpoint=path)
        rest, _ = run(*lasso(False), steps=12, checkpoint=path, resume=True)
        path.unlink()
        assert rest.state.kinks == whole.state.kinks and whole.state.kinks
        assert torch.equal(rest.x, whole.x) and torch.equal(rest.y, whole.y)


def test_a_graph_is_not_for_rounded_kinks():
    """It is left where they are, which is known before it is made."""

    def inner(x, y, rows):
        return (A[rows] @ (y - W) - 1).square().mean() / 2 + (x.exp() * y.abs()).sum()

    def outer(x, y, rows):
        return (A_VAL[rows] @ (y - W)).square().mean()

    _, _, x, y = lasso(False)
    data = {"inner_data": [torch.arange(30)], "outer_data": list(torch.arange(90).view(3, 30))}
    plain, _ = run(outer, inner, x, y, steps=14, **data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = bilevel.solve(outer, inner, x, y, steps=14, compile=True, **data)
    assert any("has kinks, which are rounded off" in str(w.message) for w in caught)
    assert graph.state.kinks == plain.state.kinks and plain.state.kinks
    torch.testing.assert_close(graph.x, plain.x, rtol=1e-9, atol=1e-9)


# -- looks ---------------------------------------------------------------------------------------


def look(inner, start, end, k=3):
    oracle, x, y = oracle_of(inner, t([0.5]), t(start))
    state = replace(
        bilevel.bisls().init(x, y), k=k, vectors=(oracle.x.flatten(x), oracle.y.flatten(y))
    )
    return kinks.found(oracle, state, t(end), Draw(None)), oracle


def kinked(x, y):
    return y.square().sum() / 2 + x.sum() * 0 + y.abs().sum()


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        ([0.5, 2.0], [-0.1, 2.0], True),  # of a change of 2.6 g_yy sees 0.6
        ([0.5, 2.0], [0.1, 2.0], False),  # no kink passed
        ([2.5, 1.0], [-1.5, 1.0], False),  # 4 of 6
        ([1.1, 1.0], [-0.8, 1.0], True),  # 1.9 of 3.9
        ([1.1, 1.0], [-1.1, 1.0], False),  # 2.2 of 4.2
    ],
)
def test_how_much_second_derivatives_may_miss(start, end, found, monkeypatch):
    monkeypatch.setattr(kinks, "_lowest", lambda pull, y: y)  # no other way
    widths, _ = look(kinked, start, end)
    expected = kinks.SHARE * sum(map(abs, end)) / 2
    assert widths == ((pytest.approx(expected),) if found else None)


def test_where_y_has_hardly_moved_the_way_that_g_yy_says_tells():
    """From y = 1/2 with g_y = y + sign(y) to -1: g_yy misses 2 of 3.5; from 3/2 to -1 2 of 4.5."""
    way = [0.5, 0.5], [0.5, 0.5]
    widths, oracle = look(kinked, *way)
    assert widths == (pytest.approx(kinks.SHARE / 2),)
    # y and two ends, the loss and itself in a mode; gradients of y, an end, and the rounded loss
    cost = oracle.cost
    assert (cost.loss_evaluations, cost.gradients, cost.hessian_products) == (5, 3, 3)
    assert look(kinked, [1.5, 1.5], [1.5, 1.5])[0] is None

    def flat(x, y):  # as far as g_yy says, for ever
        return y.abs().sum() + x.sum() * 0

    assert look(flat, *way)[0] is None


def test_gross_outliers_do_not_count():
    start, end = [0.5, *range(1, 12)], [-0.1, *range(1, 12)]
    for gross, mean in ((12.0, (0.1 + sum(range(1, 12)) + 12) / 13), (1e6, kinks.GROSS * 6)):
        (eps,), _ = look(lambda x, y: 9 * kinked(x, y), [*start, gross], [*end, gross])
        assert eps == pytest.approx(kinks.SHARE * mean)


OWN = {
    "affine": (lambda x, y: kinked(x, y), True),
    "a maximum of lines": (
        lambda x, y: y.square().sum() + 8 * torch.maximum(y, -2 * y).sum(),
        True,
    ),
    "of a sum": (lambda x, y: y.square().sum() + 9 * (y.abs() - 0.3).relu().sum(), True),
    "squared": (lambda x, y: y.square().sum() + 9 * y.relu().square().sum(), False),
    "under a logarithm": (lambda x, y: y.square().sum() + 9 * (1 + y.abs()).log().sum(), False),
    "below weights": (lambda x, y: (y[1] * y[0].relu() - 1).abs() * 9 + y.square().sum(), False),
}


@pytest.mark.parametrize("name", OWN)
def test_kinks_of_the_loss_itself(name):
    """In whose values g is affine: no rectifier below weights, no square."""
    inner, own = OWN[name]
    way = [0.5, 2.0], [-0.01, 2.0]
    found = [look(inner, *way, k=k)[0] for k in (0, 3)]
    if name == "below weights":  # that of the sum is one
        assert found[0] is None and (not found[1] or found[1][0] == 0.0)
    else:
        assert (found[0] is None) == own and bool(found[1]) == own


def test_when_it_is_looked():
    way = [0.5, 2.0], [-0.1, 2.0]
    assert look(kinked, *way, k=0)[0] is None
    assert look(lambda x, y: y.square().sum(), *way, k=0)[0] == ()
    assert look(kinked, *way, k=1)[0] is None and look(kinked, *way, k=2)[0] is None
    smooth = [5.0, 2.0], [4.9, 2.0]

    def seen(x, y):
        return 9 * y.square().sum() + kinked(x, y)

    assert look(seen, *smooth, k=kinks.LAST - 1)[0] is None
    assert look(seen, *smooth, k=kinks.LAST)[0] == ()
    assert look(kinked, *way, k=kinks.LAST)[0]


def test_a_rounded_loss_that_is_not_finite_is_not_taken():
    def inner(x, y):
        size = y.abs()
        apart = (size - torch.where(y > 0, y, -y)).sum()  # 0, unless it is rounded off
        return size.sum() + kinked(x, y) + torch.where(apart == 0, 0.0, math.inf)

    assert look(inner, [0.5, 2.0], [-0.1, 2.0])[0] == ()


def test_kinks_sharpen():
    widths = (0.4, 0.0)
    halved = [k for k in range(3, 1000) if kinks.sharper(widths, k) == (0.2, 0.0)]
    assert halved == [50, 100, 150, 200, 250] and kinks.sharper(widths, 51) == widths
    assert kinks.sharper((), 50) == ()
    outer, inner, x, y = lasso(False)
    before, after = (run(outer, inner, x, y, steps=k)[0].state for k in (50, 51))
    assert after.kinks == (before.kinks[0] / 2,) and before.secants.x is not None
    assert after.secants.x is None and after.outer_last is not None  # little else is forgotten


def test_a_rounded_problem_begins_anew():
    """Steps and averages of the problem with kinks tell nothing of it."""
    seen = []
    outer, inner, x, y = lasso(False, penalties=12)
    run(outer, inner, x, y, steps=20, callback=lambda state, record: seen.append(state))
    k = next(i for i, state in enumerate(seen) if state.kinks)
    assert kinks.FIRST <= k < kinks.LAST and seen[k - 1].kinks is None
    state = seen[k]
    assert state.k == k + 1 and state.cost.gradients > seen[k - 1].cost.gradients
    assert state.outer_last is state.inner_last is state.q is state.moments.m is None
    assert state.lengths.longest == 0.0 and state.seconds > 0
    kept = replace(
        seen[k - 1], solver="theirs", noise=Noise(2, 0.1, 3), agreement=Agreement(2, 0.1, 0.2)
    )
    new = kinks.rounded_off(kept, (0.1,))
    assert (new.solver, new.noise, new.agreement) == (kept.solver, kept.noise, kept.agreement)
    failed = replace(seen[k - 1], failures=4)  # as searches do at kinks: no reason to end
    assert kinks.rounded_off(failed, (eps := 0.1,)).failures == 1
    assert kinks.rounded_off(seen[k - 1], (eps,)).failures == 0


def test_ranks_keep_their_kinks():
    from bilevel.distributed import AveragedOracle

    assert Oracle.may_round and not AveragedOracle.may_round


def test_widths_are_those_of_the_inner_loss_alone():
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return y.abs().sum() + x.abs().sum()

    oracle, x, y = oracle_of(loss, t([0.0]), t([0.0, 0.0]), outer=loss)
    made = Oracle(Problem(loss, loss), oracle.x, oracle.y, [EPS])
    draw = Draw(None)
    assert float(made.value("outer", x, y, draw)) == 0.0
    assert float(made.value("inner", x, y, draw)) == pytest.approx(2 * EPS)
    products = made.record(x, y, draw)
    torch.testing.assert_close(products.product(t([1.0, 2.0])), t([1.0, 2.0]) / EPS)
