"""Where neither f nor g has noise: y near y* before every hypergradient, closer systems, and steps
along the direction of L-BFGS where the changes of f and h agree."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import lag, secants
from bilevel.iteration import Iteration
from bilevel.lengths import BUDGET_KEPT, Lengths
from bilevel.linear import CLOSE_HALVINGS, LOOSE, ConjugateGradient, Learned, watched
from bilevel.secants import DOUBT, KEPT, LONGER, PAIRS, TRUSTED, Secants
from tests.tables import t

N = 9
g = torch.Generator().manual_seed(4)
Q, _ = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64))
CURVED = Q @ torch.diag(torch.logspace(0, 2.5, N, dtype=torch.float64)) @ Q.T  # Hessian of F
MIX = torch.randn(N, N, generator=g, dtype=torch.float64) / 3 + torch.eye(N, dtype=torch.float64)
B = torch.randn(N, generator=g, dtype=torch.float64)
ZEROS = torch.zeros(N, dtype=torch.float64)


def quadratic(x: Tensor) -> tuple[Tensor, Tensor]:
    return CURVED @ x - B, x @ CURVED @ x / 2 - B @ x


def walk(steps: int, found: Secants | None = None) -> Secants:
    """Secants of the quadratic along points that no method chose."""
    found = found or Secants()
    draws = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        x = torch.randn(N, generator=draws, dtype=torch.float64)
        found = found.add(x, *quadratic(x))
    return found


def inverse(steps: Tensor, changes: Tensor, H: np.ndarray) -> np.ndarray:
    """H after BFGS updates, the oldest first, as matrices."""
    for s, z in zip(steps.flip(0).numpy(), changes.flip(0).numpy(), strict=True):
        V = np.eye(len(s)) - np.outer(s, z) / (s @ z)
        H = V @ H @ V.T + np.outer(s, s) / (s @ z)
    return H


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_the_direction_is_that_of_bfgs_matrices(pairs):
    A = torch.linspace(0.5, 4, N, dtype=torch.float64)
    found = walk(pairs + 1)
    assert found.steps is not None and found.changes is not None and len(found.steps) == pairs
    s, z = found.steps[0].numpy(), found.changes[0].numpy()
    for scales in (A, torch.ones(N, dtype=torch.float64)):
        D = np.diag(1 / scales.numpy())
        H = inverse(found.steps, found.changes, (s @ z) / (z @ D @ z) * D)
        np.testing.assert_allclose(found.along(B, scales).numpy(), -H @ B.numpy(), rtol=1e-9)
    np.testing.assert_allclose(found.along(found.changes[0]).numpy(), -s, rtol=1e-9)  # Hz = s


def test_the_newest_pairs_are_kept_and_fewer_of_long_vectors(monkeypatch):
    found = walk(PAIRS + 6)
    assert found.steps is not None and found.x is not None and len(found.steps) == PAIRS
    x = found.x + 1
    more = found.add(x, *quadratic(x))
    assert more.steps is not None
    torch.testing.assert_close(more.steps[0], x - found.x)
    torch.testing.assert_close(more.steps[1:], found.steps[:-1])
    monkeypatch.setattr(secants, "ROOM", 3 * N + 1)
    assert walk(9).steps.shape == (3, N)
    monkeypatch.setattr(secants, "ROOM", N - 1)
    none = walk(30)
    assert none.off < TRUSTED and not none.trusted  # no room for a pair


def test_a_change_against_its_step_is_no_pair():
    """F is not convex along it."""
    once = Secants().add(ZEROS, B, t(0.0))
    for h, kept in ((B - 0.1, 0), (B + 0.1, 1), (B, 0)):
        added = once.add(ZEROS + 1, h, t(float((2 * B + h - B).sum() / 2)))
        assert (0 if added.steps is None else len(added.steps)) == kept


def test_how_far_values_and_slopes_disagree():
    """Exactly: 0 on a quadratic, |1/2 - share| across a kink of a straight line."""
    found = walk(4)
    assert found.off == pytest.approx(DOUBT * KEPT**3, rel=1e-6)

    def absolute(x: float) -> tuple[Tensor, Tensor, Tensor]:
        return t([x]), t([1.0 if x > 0 else -1.0]), t(abs(x))

    over = Secants().add(*absolute(-1.0)).add(*absolute(3.0))  # a quarter of it before the kink
    assert over.off == pytest.approx(KEPT * DOUBT + (1 - KEPT) * 0.25)
    wrong = Secants().add(ZEROS, B, t(0.0)).add(ZEROS + 1, B + 1, t(1e6))
    assert wrong.off == pytest.approx(KEPT * DOUBT + (1 - KEPT))  # 1 at most
    straight = Secants().add(ZEROS, B, t(0.0)).add(ZEROS + 1, B, t(1.0))
    assert straight.off == DOUBT  # slopes that are the same say nothing


def test_how_much_longer_a_step_should_have_been():
    """The best one along it, over it: of a quadratic exactly."""
    d = -(CURVED @ ZEROS - B)
    best = float(d @ d / (d @ CURVED @ d))
    start = Secants().add(ZEROS, *quadratic(ZEROS))
    for share, longer in ((0.04, 25.0), (0.061, 1 / 0.061), (0.063, 1.0), (0.5, 1.0), (1.6, 1.0)):
        x = share * best * d
        assert start.add(x, *quadratic(x)).longer == pytest.approx(longer, rel=1e-6)
        assert start._replace(newton=True).add(x, *quadratic(x)).longer == 1.0
    x = 1e-6 * best * d
    assert start.add(x, *quadratic(x)).longer == LONGER
    assert start.add(ZEROS + d, -2 * d, t(-3.0)).longer == LONGER  # F is concave along it
    assert start.longer == 1.0


def test_a_step_that_has_collapsed_comes_back():
    """In a few iterations, not by fifths."""
    states, _ = seen(9)
    state = next(s for s in states if s.lengths.farthest)
    method, problem = bilevel.bisls(), bilevel.Problem(outer, inner)
    tiny = replace(state, outer_last=1e-7 * state.outer_last, secants=Secants())
    for _ in range(8):
        tiny, _ = method.step(problem, tiny, None, 5)
    assert tiny.outer_last > 1e-2 * state.outer_last


@pytest.mark.parametrize("off", [0.0, TRUSTED, 1.01 * TRUSTED, 1.0])
def test_pairs_are_trusted_where_these_agree(off):
    assert walk(2)._replace(off=off).trusted is (off <= TRUSTED)
    assert not Secants(off=off).trusted


def inner(x, y, batch=1.0):
    return batch * (y - MIX @ x).square().sum() / 2


def outer(x, y, batch=1.0):
    z = torch.linalg.solve(MIX, y)
    return batch * (z @ CURVED @ z / 2 - B @ z)


BEST = float(-B @ torch.linalg.solve(CURVED, B) / 2)


def seen(steps=30, f=outer, g=inner, **options):
    """The states of a run, and its result."""
    states = []
    options = {"inner_steps": 5, "callback": lambda s, _: states.append(s)} | options
    return states, bilevel.solve(f, g, ZEROS, ZEROS, steps=steps, **options)


def test_an_ill_conditioned_quadratic_is_solved(monkeypatch):
    """Condition 300; directions of the first order are far from it by then."""
    gap = {}
    for trusted in (TRUSTED, -1.0):
        monkeypatch.setattr(secants, "TRUSTED", trusted)
        states, result = seen(40)
        assert any(state.secants.trusted for state in states) is (trusted > 0)
        gap[trusted] = float(outer(result.x, MIX @ result.x)) - BEST
    assert 0 <= gap[TRUSTED] < 1e-6 * abs(BEST)
    assert gap[-1.0] > 1e3 * gap[TRUSTED]


@pytest.mark.parametrize(
    "options",
    [
        {"inner_data": [t(1.0), t(1.1)]},
        {"outer_data": [t(1.0), t(1.1)]},
        {"project": lambda x: x.clamp(-9, 9)},
        {"method": bilevel.bisls(hypergradient=bilevel.Unrolled())},
        {"method": bilevel.bisls(inner_solver=torch.optim.LBFGS)},
        {"method": bilevel.bisls(response="frozen"), "f": lambda x, y: outer(x, y) + x.sum() ** 2},
        {"method": bilevel.bisls(reset="last")},
        {"warm_start": False},
        {"method": "bisps"},
        {"method": "adam"},
        {"g": lambda x, y: inner(x, y) - 0.6 * y[0] ** 2 + y[0] ** 4 / 9},
        {
            "method": bilevel.bisls(
                hypergradient=bilevel.Implicit(bilevel.ConjugateGradient(1, 0.0, warm_start=False))
            ),
            "g": lambda x, y: inner(x, y) + 9 * (B @ y) ** 2 + 99 * y[3] ** 2,
        },
    ],
    ids=[
        *("inner batches", "outer batches", "a projection", "unrolled", "a solver", "frozen"),
        *("no growth", "afresh", "bisps", "fixed", "concave", "unsolved"),
    ],
)
def test_of_others_nothing_is_remembered(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of runs that this makes hard
        states, _ = seen(15, **options)
    assert not any(state.secants.trusted for state in states)


def test_steps_of_sgd_follow_secants_too():
    states, _ = seen(method="bisls-sgd")
    assert any(state.secants.trusted for state in states)


def test_kinks_are_told(monkeypatch):
    """The largest of some distances: slopes jump, and the pairs are not those of a smooth F."""
    states, _ = seen(60, lambda x, y: (y - B).abs().max())
    assert sum(state.secants.trusted for state in states) < 6
    states, _ = seen(60, lambda x, y: (y - B).pow(4).sum().pow(0.25))
    assert sum(state.secants.trusted for state in states) > 20


def test_a_whole_step_is_tried_first_and_the_length_of_others_stays():
    states, result = seen()
    pairs = [
        (old, new, record)
        for old, new, record in zip(states, states[1:], result.history[1:], strict=False)
        if new.secants.trusted and record.outer_step
    ]
    assert len(pairs) > 10
    for old, new, record in pairs:
        assert record.outer_step == pytest.approx(0.5 ** (record.outer_trials - 1))
        assert new.outer_last == old.outer_last
        assert new.lengths.latest == old.lengths.latest
        assert new.lengths.budget == pytest.approx(BUDGET_KEPT * old.lengths.budget)
    assert Lengths(3.0, 2.0, 1.0, 5.0).passed() == Lengths(3.0, 2.0, BUDGET_KEPT, 5.0)


def test_a_search_that_fails_forgets_them():
    states, _ = seen()
    state = next(s for s in reversed(states) if s.secants.trusted)
    method = bilevel.bisls()
    method = replace(method, outer_rule=replace(method.outer_rule, max_trials=1))
    uphill = state.secants._replace(  # a pair of no use: its direction is a million times too long
        off=0.0, steps=1e6 * state.secants.steps[:1], changes=state.secants.changes[:1]
    )
    far = replace(state, secants=uphill._replace(x=None, h=None))
    after, record = method.step(bilevel.Problem(outer, inner), far, None, 5)
    assert record.failure is not None and after.secants == Secants()
    assert torch.equal(after.vectors[0], far.vectors[0])


def test_systems_are_solved_closer_where_nothing_has_noise():
    close, few = Learned(close=True), Learned(halvings=2)
    assert (close.closer, few.closer, Learned().closer) == (CLOSE_HALVINGS, 2, 0)
    assert Learned(halvings=7, close=True).closer == 7
    H, b = torch.logspace(0, 3, 60, dtype=torch.float64), torch.ones(60, dtype=torch.float64)
    left = []
    for learned in (close, Learned()):
        q, _ = watched(ConjugateGradient(150, "auto"), lambda u, *_: H * u, b, None, learned)
        left.append(float((H * q - b).norm() / b.norm()))
    least = LOOSE * 0.5**CLOSE_HALVINGS
    assert left[0] <= least < left[1] <= LOOSE
    for data, expected in ({}, True), ({"inner_data": [t(1.0), t(1.3)]}, False):
        states, _ = seen(3, **data)
        assert [state.learned.close for state in states] == [expected] * 3


def test_y_is_near_before_the_hypergradient_and_not_moved_after(monkeypatch):
    """Inner steps alone leave y behind; where they do, Newton steps come before, none after."""
    slow = torch.logspace(0, -3, N, dtype=torch.float64)
    calls, inside = [], []
    refreshed, nearer = Iteration._refreshed, lag.corrected

    def watch(self, y, h):
        inside.append(True)
        new = refreshed(self, y, h)
        inside.clear()
        return new

    def correct(oracle, x, y, h, *rest, **options):
        found = nearer(oracle, x, y, h, *rest, **options)
        far = [float((point - MIX @ x).norm()) for point in (y, found[0])]
        calls.append((bool(inside), far[1] / far[0]))
        return found

    monkeypatch.setattr(Iteration, "_refreshed", watch)
    monkeypatch.setattr("bilevel.iteration.corrected", correct)
    f, options = (lambda x, y, *b: outer(x, y)), {"inner_steps": 2}
    states, _ = seen(24, f, lambda x, y: (slow * (y - MIX @ x).square()).sum() / 2, **options)
    first = next(k for k, state in enumerate(states) if state.outer_last)
    assert len(calls) - first >= 2 and all(before for before, _ in calls[first:])
    assert all(closer < 0.1 for before, closer in calls if before)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    _, whole = seen(24)
    seen(15, checkpoint=tmp_path / "c")
    states, resumed = seen(24, checkpoint=tmp_path / "c", resume=True)
    assert torch.equal(whole.x, resumed.x) and torch.equal(whole.y, resumed.y)
    assert states[0].secants.trusted


@pytest.mark.filterwarnings("default")  # the compiler warns of its own parts
def test_a_graph_leaves_such_iterations_alone():
    with pytest.warns(
        RuntimeWarning, match="whole iterations here, because neither loss has noise"
    ):
        _, fast = seen(6, compile=True)
    _, plain = seen(6)
    torch.testing.assert_close(fast.x, plain.x, rtol=1e-6, atol=1e-9)


def test_what_was_seen_of_negative_curvature_fades_without_noise():
    """y may have come to where g is convex; under noise it is known of one batch alone."""
    for data, factor in ({}, 0.8), ({"inner_data": [t(1.0), t(1.3)]}, 1.0):
        states, _ = seen(4, **data)
        method = bilevel.bisls()
        bent = replace(states[-1], learned=states[-1].learned._replace(concave=0.4))
        batches = [t(1.0)] * 2 if data else 2
        more = {"hessian_batches": [t(1.0), t(1.3)]} if data else {}
        after, _ = method.step(bilevel.Problem(outer, inner), bent, None, batches, **more)
        assert after.learned.concave == pytest.approx(0.4 * factor)
        assert after.secants == Secants()
