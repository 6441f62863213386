"""What y does not enter is done once, and what comes out is the same to the last bit."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel
from bilevel import reuse
from bilevel.reuse import Habit, Keeping, Kept, Reuse


@pytest.fixture
def always(monkeypatch):
    """Results are kept however small the problem."""
    monkeypatch.setattr(reuse, "WORTH", {"cpu": -1})


class Done(TorchDispatchMode):
    """Names of the operations that are done."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def twice(function, x, y, change=lambda: None):
    """Both values of ``function(x, y)`` and the operations of the second evaluation."""
    kept, done = Kept(), Done()
    with kept.apart_from(y):
        first = function(x, y)
    change()
    z = y + 0
    with done, kept.apart_from(z):
        second = function(x, z)
    return first, second, done.names


X, Y = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


def test_features_are_done_once_and_the_head_anew():
    first, second, done = twice(lambda x, y: (x.T.contiguous().tanh().T @ y).sum(), X, Y)
    assert torch.equal(first, second)
    assert "tanh" not in done and "clone" not in done
    assert "mv" in done and "sum" in done


def test_what_y_entered_through_memory_is_done_anew():
    room = torch.zeros(5, dtype=torch.float64)

    def loss(x, y):
        room.copy_(y)
        return (x @ room.exp()).sum()

    kept = Kept()
    with kept.apart_from(Y):
        first = loss(X, Y)
    assert torch.equal(first, loss(X, Y))
    z = 2 * Y
    with kept.apart_from(z):
        second = loss(X, z)
    assert torch.equal(second, loss(X, z)) and kept.hits == 0


def test_what_was_written_into_since_is_done_anew():
    scale = torch.ones(5, dtype=torch.float64)

    def change():
        scale.mul_(3)

    first, second, done = twice(lambda x, y: (x * scale).sum() + 0 * y.sum(), X, Y, change)
    assert torch.allclose(second, 3 * first) and "mul" in done


def test_a_result_that_was_written_into_is_done_anew():
    def loss(x, y):
        return (x * 2).relu_().sub_(1).sum() + 0 * y.sum()

    first, second, done = twice(loss, X, Y)
    assert torch.equal(first, second) and "mul" in done


@pytest.mark.parametrize(
    "drawn",
    [F.dropout, torch.rand_like, lambda x: x * torch.rand(5), lambda x: torch.normal(x, 1.0)],
    ids=["dropout", "rand_like", "rand", "normal"],
)
def test_random_numbers_are_drawn_every_time(drawn):
    first, second, _ = twice(lambda x, y: (drawn(x) @ y).sum(), X, Y)
    assert first != second  # a line search puts the generators back


def test_numbers_of_different_kinds_are_different_operands():
    whole = torch.arange(3)
    factors = iter([2, 2.0])
    first, second, _ = twice(lambda x, y: whole * next(factors), X, Y)
    assert first.dtype == torch.int64 and second.dtype == torch.float32


@pytest.mark.parametrize(
    "views",
    [
        (lambda x: x[:2], lambda x: x[:3]),
        (lambda x: x[:4, :4], lambda x: x[:4, :4].T),
        (lambda x: x[:2], lambda x: x[1:3]),
        (lambda x: x[0], lambda x: x[0].view(torch.int64)),
    ],
    ids=["shape", "stride", "offset", "dtype"],
)
def test_views_of_one_memory_are_different_operands(views):
    turn = iter(views)
    first, second, _ = twice(lambda x, y: next(turn)(x) * 2, X, Y)
    assert torch.equal(first, views[0](X) * 2) and torch.equal(second, views[1](X) * 2)


def test_what_returns_nothing_is_done_every_time():
    rooms = [torch.zeros(3), torch.zeros(3)]
    twice(lambda x, y: torch._foreach_add_(rooms, 1.0), X, Y)
    assert (rooms[0] == 2).all()


def test_memory_that_numpy_writes_is_another_one_every_time():
    numbers = iter([1.0, 2.0])

    def loss(x, y):
        room = torch.empty(5)
        room.numpy()[:] = next(numbers)
        return room.sum()

    first, second, _ = twice(loss, X, Y)
    assert (first, second) == (5, 10)


def test_factories_and_lists_of_operands():
    def loss(x, y):
        mask = torch.tril(torch.ones(4, 4, dtype=torch.float64))
        return (torch.cat([mask @ x, x.exp()]) @ y).sum()

    first, second, done = twice(loss, X, Y)
    assert torch.equal(first, second)
    assert not {"ones", "tril", "mm", "exp", "cat"} & set(done)


def test_a_tensor_in_the_place_of_a_freed_one_is_another():
    # what was computed from it is kept, hence it is held, and nothing can lie where it did
    for n in range(50):
        kept = Kept()
        with kept.apart_from(Y):
            first = torch.empty(1000).fill_(n).mul(2)
            second = torch.empty(1000).fill_(n + 1).mul(2)
        assert (first == 2 * n).all() and (second == 2 * n + 2).all()


def test_inside_a_graph_everything_is_done_anew():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)  # the user's own, not x nor y

    def loss(x, y):
        return (x @ w.exp()).sum() * y.sum()

    first, second, done = twice(loss, X, Y)
    assert "exp" in done
    for value in (first, second):
        (gradient,) = torch.autograd.grad(value, w)
        assert torch.allclose(gradient, X.sum(0) * w.exp() * Y.sum())
    kept, again = Kept(), Done()
    with torch.no_grad(), kept.apart_from(Y):
        loss(X, Y)
    with again, kept.apart_from(Y):
        value = loss(X, Y)
    assert "exp" in again.names and value.requires_grad


def test_a_result_that_was_made_a_leaf_is_done_anew():
    def loss(x, y):
        features = x * x
        value = (features @ y).sum()
        features.requires_grad_()
        return value

    first, second, done = twice(loss, X, Y)
    assert torch.equal(first, second) and "mul" in done
    assert not first.requires_grad and not second.requires_grad


def test_running_statistics_are_updated_every_time():
    norm = nn.BatchNorm1d(5, affine=False).double()
    twice(lambda x, y: (norm(x) @ y).sum(), X, Y)
    fresh = nn.BatchNorm1d(5, affine=False).double()
    fresh(X)
    once = fresh.running_mean.clone()
    fresh(X)
    assert not torch.equal(norm.running_mean, once)
    assert torch.equal(norm.running_mean, fresh.running_mean)
    assert norm.num_batches_tracked == 2


def test_a_normalisation_that_does_not_train_is_done_once():
    norm = nn.BatchNorm1d(5, affine=False).double().eval()
    first, second, done = twice(lambda x, y: (norm(x) @ y).sum(), X, Y)
    assert torch.equal(first, second)
    assert not any("batch_norm" in name for name in done)


@pytest.mark.parametrize("kind", ["conjugate", "sparse", "inference", "complex"])
def test_unusual_tensors_are_left_alone(kind):
    if kind == "inference":
        with torch.inference_mode():
            a = torch.randn(4, 5, dtype=torch.float64)
    else:
        a = torch.randn(4, 5, dtype=torch.complex128 if kind != "sparse" else torch.float64)
        a = {"conjugate": torch.conj, "sparse": torch.Tensor.to_sparse}.get(kind, torch.clone)(a)

    def loss(x, y):
        b = a.to_dense() if kind == "sparse" else a
        return (b * 2).abs().sum() + (x @ y).sum()

    first, second, _ = twice(loss, X, Y)
    assert torch.equal(first, second)


# -- whether it pays ----------------------------------------------------------------------


def evaluate(habit, loss, rounds, repeats):
    for _ in range(rounds):
        x, held = X.clone(), Reuse(habit, "inner")
        for _ in range(repeats):
            y = Y.clone()
            assert torch.equal(held.evaluate(x, y, None, lambda x=x, y=y: loss(x, y)), loss(x, y))


def test_small_work_is_not_watched():
    habit = Habit()
    evaluate(habit, lambda x, y: (x @ y).sum(), 1, 1)
    assert habit.keeping["inner"].pays is False


def test_large_work_is(monkeypatch):
    A = torch.randn(512, 512, dtype=torch.float64)
    habit = Habit()
    evaluate(habit, lambda x, y: (x @ (A @ A)[:5] @ A[:, :5] @ y).sum(), 3, 2)
    assert habit.keeping["inner"].pays is True


def test_work_that_y_enters_is_not():
    A = torch.randn(512, 512, dtype=torch.float64)
    habit = Habit()
    evaluate(habit, lambda x, y: ((A * y[0]) @ A).sum(), 1, 1)
    assert habit.keeping["inner"].pays is False


def test_functions_evaluated_once_are_watched_ever_less(always):
    held, watched = Reuse(Habit(), "inner"), []
    for _ in range(60):
        x = X.clone()
        held.evaluate(x, Y, None, lambda x=x: (x @ X.T).sum() + Y.sum())
        watched.append(held._kept is not None)
    # 2 rest after three, 4 after four, 8, 16, 32
    assert [n for n, seen in enumerate(watched) if seen] == [0, 1, 2, 5, 10, 19, 36]


def test_it_begins_again_where_functions_come_twice(always):
    """As in the searches after a first look, which evaluates each function once."""
    held, hits = Reuse(Habit(), "inner"), []
    for n in range(40):
        x = X.clone()
        for _ in range(1 if n < 3 else 2):
            held.evaluate(x, Y, None, lambda x=x: (x @ X.T).sum() + Y.sum())
        hits.append(held._kept.hits if held._kept else 0)
    assert hits == [0] * 5 + [2] * 35


def test_results_are_kept_for_one_batch_at_a_time(always):
    held, batches = (
        Reuse(Habit(), "inner"),
        [torch.randn(5, 2, dtype=torch.float64) for _ in range(3)],
    )
    for batch in batches:
        for _ in range(2):
            held.evaluate(X, Y, batch, lambda batch=batch: (X @ batch).sum() * Y.sum())
        assert held._kept.hits == 2 and len(held._kept._results) == 2  # mm, sum


def test_rests_have_an_end():
    keeping = Keeping()
    for _ in range(40):
        keeping.saw(0)
    assert keeping.rests == reuse.MOST_RESTS
    keeping.saw(1)
    assert (keeping.once, keeping.rests) == (0, 0)


def test_levels_keep_apart(always):
    """An outer evaluation between two inner ones takes nothing from these."""
    habit = Habit()
    outer, inner = Reuse(habit, "outer"), Reuse(habit, "inner")
    outer.evaluate(X, Y, None, lambda: (X.tanh() @ Y).sum())
    assert habit.largest is None  # which is of the inner loss
    inner.evaluate(X, Y, None, lambda: (X.sin() @ Y).sum())
    assert habit.largest == X.numel()
    outer.evaluate(X, 2 * Y, None, lambda: (X.tanh() @ Y).sum())
    inner.evaluate(X, 2 * Y, None, lambda: (X.sin() @ Y).sum())
    assert (outer._kept.hits, inner._kept.hits) == (1, 1)
    assert habit.keeping["outer"].proven and habit.keeping["inner"].proven


@pytest.mark.parametrize("level", ["outer", "inner"])
def test_what_draws_at_that_level_is_not_drawn_again(level, always):
    """To see that kept results are right."""
    habit, calls = Habit(random={level}), []
    for held in (Reuse(habit, "outer"), Reuse(habit, "inner")):
        for y in (Y, 2 * Y):
            held.evaluate(X, y, None, lambda y=y: calls.append(0) or (X.tanh() @ y).sum())
    assert len(calls) == 2 + 3


# -- whole runs ----------------------------------------------------------------------------


class Features(nn.Module):
    def __init__(self, inplace, dropout, norm):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8).eval() if norm else nn.Identity(),
            nn.ReLU(inplace),
            nn.Dropout(0.3) if dropout else nn.Identity(),
            nn.Linear(8, 5),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.layers(z)


def run(method, inplace=False, dropout=False, norm=False, full=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    data = torch.randn(40, 6, generator=g), torch.randn(40, 3, generator=g)
    torch.manual_seed(seed)
    x, y = Features(inplace, dropout, norm), torch.zeros(5, 3)
    frozen = torch.randn(6, 6, generator=g)

    def outer(x, y, batch):
        return F.mse_loss(x(batch[0] @ frozen) @ y, batch[1])

    def inner(x, y, batch):
        return outer(x, y, batch) + 0.05 * y.square().sum()

    batches = [data] if full else [tuple(t[i::4] for t in data) for i in range(4)]
    result = bilevel.solve(
        outer, inner, x, y, method=method, outer_data=batches, inner_data=batches,
        steps=6, inner_steps=3, seed=seed, progress=False,
    )  # fmt: skip
    history = [{**r.asdict(), "seconds": 0} for r in result.history]
    return history, [t.clone() for t in copy.deepcopy(result.x).state_dict().values()], result.y


@pytest.mark.parametrize(
    "method", ["bisls-adam", "bisls-sgd", "bisps", "adam", bilevel.bisls(response="refine"),
               bilevel.bisls(hypergradient=bilevel.Unrolled())],
    ids=["bisls-adam", "bisls-sgd", "bisps", "adam", "refine", "unrolled"],
)  # fmt: skip
@pytest.mark.parametrize(
    "options",
    [{}, {"inplace": True}, {"dropout": True}, {"norm": True}, {"full": True},
     {"dropout": True, "full": True}],
    ids=str,
)  # fmt: skip
def test_a_run_is_the_same_to_the_last_bit(method, options, monkeypatch):
    plain = run(method, **options)
    hits = {"outer": 0, "inner": 0}
    original = Reuse.evaluate

    def evaluate(self, *args):
        value = original(self, *args)
        hits[self._level] += self._kept is not None and self._kept.hits > 0
        return value

    monkeypatch.setattr(reuse, "WORTH", {"cpu": -1})
    monkeypatch.setattr(Reuse, "evaluate", evaluate)
    kept = run(method, **options)
    assert kept[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], plain[1], strict=True))
    assert torch.equal(kept[2], plain[2])
    if method in ("bisls-adam", "bisls-sgd"):
        assert hits["inner"] > 0
    if method == "bisls-adam" and options == {"full": True}:
        assert hits["outer"] > 0  # of one batch, by the two y of a trial


def through_data(x, y):
    features = x.outer(x)
    features.data.mul_(0.5)  # no version of it changes
    return (features @ y).square().sum()


BUFFER = np.empty(40)


def through_numpy(x, y):
    y = torch.from_numpy(np.sin(y.detach().numpy(), out=BUFFER))  # the memory is always the same
    return x.outer(x).sum() + y.sum()


@pytest.mark.parametrize("loss", [through_data, through_numpy])
def test_memory_that_is_written_unseen_ends_it(loss, always):
    x, y = torch.linspace(-1, 1, 40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    for points in ([y, 2 * y, 3 * y, 4 * y], [y] * 4):
        work = Reuse(Habit(), "inner")
        found = [float(work.evaluate(x, p, None, lambda p=p: loss(x, p))) for p in points]
        assert found == [float(loss(x, p)) for p in points]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_losses_that_take_forward_derivatives():
    """Whose zeros have no memory to be told by: to the same bits as in plain evaluations."""
    xs = torch.linspace(-1, 1, 9, dtype=torch.float64)

    def slope(y):
        return torch.func.jvp(
            lambda z: torch.tanh(z * y[0] + y[1]), (xs,), (torch.ones(9).double(),)
        )[1]

    def solve():
        return bilevel.solve(
            lambda x, y: ((slope(y) - 0.3) ** 2).mean(),
            lambda x, y: ((slope(y) - x) ** 2).mean() + 0.1 * (y**2).sum(),
            *(torch.tensor(0.5).double(), torch.tensor([0.3, 0.1]).double()),
            **{"steps": 6, "inner_steps": 3},
        )

    result = solve()
    assert result.reason == "all 6 steps were taken"
    assert result.history[-1].outer_loss < result.history[0].outer_loss
