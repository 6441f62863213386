"""What a run may have got wrong is told at its end, and a good run says nothing."""

import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

import bilevel
from bilevel import doubts
from bilevel.lag import SOLVED
from bilevel.record import Record
from tests.tables import t

RECORD = Record(
    k=0,
    outer_loss=1.0,
    inner_loss=1.0,
    hypergrad_norm=1.0,
    outer_step=0.1,
    inner_step=0.1,
    outer_trials=2,
    inner_trials=2,
    inner_failures=0,
    residual=0.05,
    lag=0.0,
    hessian_batches=1,
    outer_batches=1,
    gradients=1,
    hessian_products=1,
    loss_evaluations=1,
    seconds=0.1,
)


def records(losses=None, corrects=True, **columns):
    """A history, with these numbers in it."""
    n = 60
    columns = {"outer_loss": [1.0] * n if losses is None else losses, **columns}
    rows = zip(*columns.values(), strict=True)
    return [
        replace(RECORD, k=k, **dict(zip(columns, row, strict=True))) for k, row in enumerate(rows)
    ]


def test_a_run_that_stays_is_told():
    """In words that say what to do."""
    moved = records()
    stayed = [replace(record, outer_step=0.0) for record in moved]
    with pytest.warns(RuntimeWarning, match="x stayed.*35 of 60.*f fell and F rose.*inner_steps"):
        doubts.tell(moved[:25] + stayed[25:], True)
    doubts.tell(moved[:40] + stayed[40:], True)  # less than half: no warning, which is an error


def test_what_no_system_of_is_solved_is_told():
    loose = records(residual=[2.0] * 31 + [0.1] * 29)
    with pytest.warns(RuntimeWarning, match="residual above 1 in 31 of 60.*small penalty"):
        doubts.tell(loose, True)
    stays = [replace(record, outer_step=0.0, outer_trials=0) for record in loose]
    with pytest.warns(RuntimeWarning, match="x stayed.*31 of 60.*above 1.*more products") as told:
        doubts.tell(stays, True)
    assert len(told) == 1
    doubts.tell(records(residual=[2.0] * 30 + [None] * 30), True)


def test_a_run_without_hypergradients_is_told():
    """y in a box, at a maximum of g: |g_yy| and g_yy have nothing in common, and x goes on."""

    def climb(x, y, batches):
        return (y + 0.5 * y.sign()).clamp(-1, 1)

    def solve(steps):
        return bilevel.solve(
            lambda x, y: ((y - x) ** 2).sum() + 0.1 * (x**2).sum(),
            lambda x, y: -(y**2).sum() / 2 + (x * y).sum(),
            *(t([0.3, -0.2]), t([0.1, -0.1])),
            **{"method": bilevel.bisls(inner_solver=climb), "steps": steps},
        )

    with pytest.warns(RuntimeWarning, match="residual above 1 in 20 of 20.*free variables"):
        result = solve(20)
    assert any(record.outer_step for record in result.history)


# -- y away from y*(x) at the end ----------------------------------------------------------------


def test_a_lag_at_the_end_is_told():
    """By more than a tenth of what the run changed f by, and than its own noise."""
    falls = np.linspace(3.0, 1.0, 60).tolist()  # from 2.966 to 1.237: by 1.729

    def tells(lag, corrects=False, residual=0.05):
        history = records(falls, lag=lag, residual=[residual] * 60)
        with pytest.warns(RuntimeWarning, match=r"f is other by about 0\.17.*changed f by 1\.7"):
            doubts.tell(history, corrects)

    tells([0.0] * 45 + [-0.175] * 15)
    tells([0.0] * 45 + [0.175] * 15)
    for silent in ([0.175] * 45 + [0.0] * 15, [0.17] * 60, [None] * 60, [3.0, -2.4] * 30):
        doubts.tell(records(falls, lag=silent), False)
    # where f hardly changed: within its noise, or less than 1 % of it
    noisy = (1 + np.random.default_rng(0).normal(size=60) / 20).tolist()
    doubts.tell(records(noisy, lag=[0.03] * 60), False)
    doubts.tell(records(lag=[0.009] * 60), False)
    with pytest.warns(RuntimeWarning, match="y ended so far"):
        doubts.tell(records(lag=[0.011] * 60), False)
    doubts.tell(records(falls, lag=[0.175] * 60), True)  # which is corrected
    loose = [1.01 * SOLVED] * 60  # and q is no solution
    doubts.tell(records(falls, lag=[0.175] * 60, residual=loose), False)
    doubts.tell(records(falls[:39], lag=[9.0] * 39), False)  # too few to tell


GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(n, 60, generator=GENERATOR, dtype=torch.float64) for n in (30, 200))
W = 2.0 * (torch.arange(60) < 4)
ERROR = torch.randn(30, generator=GENERATOR, dtype=torch.float64)
ERROR[:8] *= 6  # rows that x is to find


def inner(x, y):
    return (x.sigmoid() * (A @ (y - W) - ERROR) ** 2).mean() / 2 + 0.05 * (y**2).sum()


def outer(x, y):
    return (B @ (y - W)).square().mean()


def solve(method, **options):
    x, y = torch.zeros(30, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    return bilevel.solve(
        outer, inner, x, y, **{"method": method, "steps": 60, "inner_steps": 200, **options}
    )


def sgd(weight_decay=0.0, ends=None):
    def made(parameters):
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=weight_decay)
        return (optimizer, LinearLR(optimizer, 1.0, 0.0, ends)) if ends else optimizer

    return bilevel.bisls(inner_solver=made)


def test_solvers_that_do_not_go_to_the_minimum():
    """Weight decay, of which g knows nothing, and a schedule that ends long before the run."""
    result = solve(sgd())
    assert abs(result.history[-1].lag) < 1e-3 * outer(result.x, result.y)
    with pytest.warns(RuntimeWarning) as told:
        solve(sgd(weight_decay=0.5))
    first, last = (str(warning.message) for warning in told)
    assert "weight_decay=0.5" in first and "add 0.25 * y.square().sum() to the inner" in first
    assert "y ended so far from" in last and "weight_decay" in last
    with pytest.warns(RuntimeWarning, match="y ended so far from.*a scheduler"):
        solve(sgd(ends=200))
    for decoupled in (torch.optim.AdamW, partial(torch.optim.Adafactor, weight_decay=0.1)):
        solve(bilevel.bisls(inner_solver=decoupled), steps=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        solve(sgd(weight_decay=0.5), steps=3, warm_start=False)
    assert len(told) == 1  # and not in each iteration


def test_lag_is_the_change_of_f_on_the_way_from_the_solution():
    """To first order, in closed form: f = c y, g = (y - x)^2 s / 2."""
    c, s = t([1.0, -2.0, 0.5]), t([1.0, 2.0, 3.0])
    zeros = torch.zeros(3, dtype=torch.float64)

    def first(method, start, inner=lambda x, y: (s * (y - x) ** 2).sum() / 2, **options):
        result = bilevel.solve(
            lambda x, y: (c * y).sum() + (x**2).sum(),
            inner,
            *(zeros + 1, start),
            **{"method": method, "steps": 1, "inner_steps": 1, **options},
        )
        return result.history[0]

    def stays(x, y, batches):
        return y

    start = t([0.7, 0.1, -0.4])
    exact = bilevel.Implicit(bilevel.ConjugateGradient(10, 0.0))
    record = first(bilevel.bisls("sgd", inner_solver=stays, hypergradient=exact), start)
    assert record.lag == pytest.approx(float((c * (start - 1)).sum()))
    # of batches the mean of that of the hypergradient and of another, which come after those of y
    mean = bilevel.bisls("sgd", inner_solver=stays, hypergradient=replace(exact, average="auto"))
    batches = [t([0.1, 0.2, 0.3]) * k for k in (1, 5, 2)]
    record = first(mean, start, lambda x, y, b: ((y - x - b) ** 2).sum() / 2, inner_data=batches)
    away = start - 1 - (batches[1] + batches[2]) / 2
    assert record.hessian_batches == 1 and record.lag == pytest.approx(float((c * away).sum()))
    unrolled = bilevel.bisls("sgd", hypergradient=bilevel.Unrolled())
    assert first(unrolled, start).lag is None
    concave = first(
        bilevel.bisls("sgd", inner_solver=stays, hypergradient=exact),
        start,
        lambda x, y: ((y**2 - 1) ** 2 + x * y).sum(),
    )
    assert concave.lag is None


# -- f that rises --------------------------------------------------------------------------------


def test_a_loss_that_rises_is_told():
    noise = np.random.default_rng(0).normal(size=60) / 10
    with pytest.warns(RuntimeWarning, match=r"loss rose, from 2\.\d+ early.*to 2\.\d+ in its last"):
        doubts.tell(records((2 + np.linspace(0, 0.6, 60) + noise).tolist()), True)
    doubts.tell(records((2 - np.linspace(0, 0.6, 60) + noise).tolist()), True)
    with pytest.warns(RuntimeWarning, match="loss rose, from 2.0"):
        doubts.tell(records(np.linspace(2, 2.05, 60).tolist()), True)
    doubts.tell(records([1.0, *np.linspace(1e-9, 2e-9, 59)]), True)  # rounding
    with pytest.warns(RuntimeWarning, match="loss rose, from 2.2"):  # of what did not fail
        failed = records(np.linspace(2, 3, 60).tolist())
        for k in (20, 50):
            failed[k] = replace(failed[k], failure="the outer loss is nan", outer_loss=math.nan)
        doubts.tell(failed, True)
    # from where y has just begun, by 1 % of f, or in a few iterations, it says nothing
    doubts.tell(records([0.1] * 7 + [1.0] * 53), True)
    doubts.tell(records(np.linspace(2, 2.019, 60).tolist()), True)
    doubts.tell(records(np.linspace(2, 3, 36).tolist()), True)


def test_numbers_that_overflow_end_no_run():
    """What a diverged run is told of it must not cost its result."""
    for losses in ([1e308] * 60, [1e308, -1e308] * 30):
        for lag in ([0.0] * 60, losses, [math.inf] * 60, [math.nan] * 60):
            doubts.tell(records(losses, lag=lag), False)


def test_noise_is_no_rise():
    """Of a thousand runs that stand still, none."""
    for seed in range(1000):
        noise = np.random.default_rng(seed).normal(size=60)
        doubts.tell(records((2 + noise).tolist()), True)


@pytest.mark.filterwarnings("ignore:y ended so far")
def test_a_run_that_rises():
    with pytest.warns(RuntimeWarning, match="the outer loss rose.*steps of a fixed size"):
        solve(bilevel.fixed("adam", 0.3, 1.0), steps=40, inner_steps=1)
