"""Projections other than onto a box, under directions that are scaled."""

import pytest
import torch

import bilevel
from bilevel.iteration import feasible
from bilevel.layout import Layout
from bilevel.problem import Problem, make_oracle
from tests.tables import t


def simplex(v, total=6.0):
    """The nearest point of {v >= 0, sum v = total} (Held, Wolfe & Crowder 1974)."""
    ordered = v.sort(descending=True).values
    excess = ordered.cumsum(0) - total
    count = torch.arange(1, len(v) + 1, dtype=v.dtype)
    last = int((ordered * count > excess).nonzero()[-1])
    return (v - excess[last] / (last + 1)).clamp_min(0)


def prices(seed):
    """Revenue -x.y at a demand y*(x) = a - x, prices on a simplex; and the optimum, by steps of
    projected gradients of F(x) = -x.(a - x)."""
    a = 1 + 3 * torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.ones(6, dtype=torch.float64)
    for _ in range(2000):
        x = simplex(x - 0.1 * (2 * x - a))
    return a, x


@pytest.mark.parametrize("method", ["bisls-adam", "bisls-sgd"])
@pytest.mark.parametrize("seed", range(4))
def test_a_simplex_is_no_obstacle(seed, method):
    a, optimum = prices(seed)
    seen = []

    def project(v):
        seen.append(float(v.abs().max()))
        return simplex(v)

    start = torch.ones(6, dtype=torch.float64)
    result = bilevel.solve(
        lambda x, y: -(x * y).sum(),
        lambda x, y: ((y - a + x) ** 2).sum() / 2,
        *(start, torch.zeros(6, dtype=torch.float64)),
        **{"project": project, "method": method},
    )

    def F(x):
        return float(-(x * (a - x)).sum())

    share = (F(start) - F(result.x)) / (F(start) - F(optimum))
    assert share == pytest.approx(1, abs=1e-9)
    assert all(record.failure is None for record in result.history)
    assert result.reason == "all 100 steps were taken"
    assert max(seen) < 1e8  # nothing is tried where rounding would rule


def test_a_direction_is_kept_where_it_gains_enough():
    """Free or in a box, which is separable, any scaling is. On a simplex, where it leads sideways:
    a long step along its normal, and along it a thousandth or a half of what descends."""
    x, g = t([1.0, 2.0, 3.0]), t([1.0, -2.0, 1.0])

    def kept(project, d):
        problem = Problem(lambda x, y: y.sum(), lambda x, y: (y - x).sum() ** 2, project)
        oracle = make_oracle(problem, Layout(x, "x"), Layout(x.clone(), "y"))
        found = feasible(oracle, x, g, d, 0.1)
        assert torch.equal(found, d) or torch.allclose(found, -g * d.norm() / g.norm())
        return torch.equal(found, d)

    scaled = -g / t([1.0, 1.0, 0.1])
    for project in (lambda v: v, lambda v: v.clamp(0, 3), simplex):
        assert kept(project, scaled)
    sideways = t([1.0, 0.0, -1.0])  # within the simplex, and level
    assert not kept(simplex, sideways - 1e-3 * g)
    assert kept(simplex, sideways - 0.5 * g)
    assert not kept(simplex, t([-1.0, -1.0, -1.0]) + sideways)
