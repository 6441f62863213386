"""How long a direction remembers: as steps shrink, and where hypergradients are those of F."""

import math
from dataclasses import replace

import pytest
import torch

import bilevel
from bilevel.lag import SOLVED, is_exact
from bilevel.lengths import EXACT, LONG, SHRUNK, Lengths
from bilevel.linear import CONCAVE, Learned
from tests.tables import t

SCALES = torch.linspace(1, 3, 6, dtype=torch.float64)
MIX = torch.linspace(-1, 1, 24, dtype=torch.float64).mul(3).sin().view(4, 6)
START = torch.zeros(4, dtype=torch.float64)


def inner(x, y, batch=1.0):
    return (SCALES * y * y).sum() / 2 - x @ MIX @ y + 1e-3 * batch * y.sum()


def outer(x, y, batch=1.0):
    return (y.cosh() - y * torch.arange(6) / 5).sum() + batch * (x - 1).square().sum() / 9


# to the end, or slopes of a run that is nearly there are told apart by rounding and by y's lag
CLOSE = bilevel.Implicit(bilevel.ConjugateGradient(20, 1e-10), average="auto")


def memories(steps=14, **options):
    """(beta1 that an iteration's direction was taken with, the state before) of each."""
    states = []
    method = options.pop("method", bilevel.bisls(hypergradient=CLOSE))
    options = {"outer": outer, "inner": inner, "inner_steps": 40} | options
    losses = options.pop("outer"), options.pop("inner")
    bilevel.solve(
        *losses,
        *(START, torch.zeros(6, dtype=torch.float64)),
        **{"method": method, "steps": steps, "callback": lambda s, _: states.append(s), **options},
    )
    start = method.init(START, START)
    pairs = zip([start, *states], states, strict=False)
    # 1 - w falls by beta1, whatever the gradients are
    return [((1 - new.moments.w) / (1 - old.moments.w), old) for old, new in pairs]


def test_memory_grows_as_steps_shrink_and_along_exact_hypergradients():
    for late, beta1 in ((8.0, 0.5), (0.5, 0.75), (0.25, 1 - SHRUNK**-0.25 / 2), (1e-9, 0.789776)):
        lengths = Lengths(8.0, late)
        for number in (lambda n: n, t):
            seen = Lengths(*map(number, lengths))
            assert float(seen.memory(EXACT - 1)) == pytest.approx(beta1, rel=1e-5)
            assert seen.memory(EXACT) == LONG == 0.9


def test_which_hypergradients_are_exact():
    for residual, halvings, behind, exact in (
        (0.0, 0, False, True),
        (SOLVED, 0, False, True),
        (1.01 * SOLVED, 0, False, False),
        (math.nan, 0, False, False),  # of no system
        (0.0, 1, False, False),
        (0.0, 0, True, False),
    ):
        assert is_exact(residual, halvings, behind) is exact


def test_a_direction_remembers_long_once_hypergradients_are_exact():
    seen = memories()
    assert [state.learned.exact for _, state in seen] == list(range(14))
    for beta1, state in seen:
        expected = 1 - state.lengths.share**0.25 / 2
        if state.learned.exact >= EXACT:
            expected = LONG
        assert beta1 == pytest.approx(expected, rel=1e-9)
    assert seen[-1][0] == pytest.approx(LONG)


LAZY = bilevel.Implicit(bilevel.ConjugateGradient(1, 0.0, warm_start=False), average="auto")
TWO = [t(0.5), t(2.0)]


@pytest.mark.parametrize(
    "options",
    [
        {"inner_data": TWO},
        {"outer_data": TWO},
        {"warm_start": False},
        {"inner_solver": torch.optim.LBFGS},
        {"hypergradient": bilevel.Unrolled()},
        {"hypergradient": LAZY},
    ],
    ids=["inner batches", "outer batches", "afresh", "a solver", "unrolled", "unsolved"],
)
def test_of_others_nothing_is_said(options):
    """Noise, a y that lags, a system that is not solved: h is not that of F, or may not be."""
    names = ("inner_solver", "hypergradient")
    settings = {"hypergradient": CLOSE} | {n: options[n] for n in names if n in options}
    rest = {name: value for name, value in options.items() if name not in names}
    seen = memories(method=bilevel.bisls(**settings), **rest)
    assert not any(state.learned.exact >= EXACT for _, state in seen)


def test_one_that_is_not_begins_the_count_anew():
    """Where y may have no solution; the next is counted from 0."""
    method = bilevel.bisls(hypergradient=CLOSE)
    problem = bilevel.Problem(outer, inner)
    state = method.init(START, torch.zeros(6, dtype=torch.float64))
    for _ in range(12):
        state, _ = method.step(problem, state, None, 40)
    assert state.learned.exact >= EXACT
    concave = replace(state, learned=state.learned._replace(concave=2 * CONCAVE))
    after, _ = method.step(problem, concave, None, 40)
    assert after.learned.exact == 0
    solved, _ = method.step(problem, state, None, 40)
    assert solved.learned.exact == state.learned.exact + 1


def test_it_goes_on_where_a_run_is_resumed(tmp_path):
    def solve(steps, **options):
        y, method = torch.zeros(6, dtype=torch.float64), bilevel.bisls(hypergradient=CLOSE)
        options = {"method": method, "steps": steps, "inner_steps": 40} | options
        return bilevel.solve(outer, inner, START, y, **options)

    solve(8, checkpoint=tmp_path / "c")
    resumed = solve(14, checkpoint=tmp_path / "c", resume=True)
    whole = solve(14)
    assert whole.state.learned.exact >= EXACT
    assert resumed.state.learned == whole.state.learned and torch.equal(resumed.x, whole.x)
    assert Learned().exact == 0
