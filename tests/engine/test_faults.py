"""Faults: the run ends or goes on as docs/faults.md says, and the last good point is kept."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import bilevel
from tests.tables import LOOSE, METHODS, dense, flat, t

STEPS, INNER = 2, 2
X, Y = t([0.5, -1.0]), t([0.0, 2.0])
W = t([1.0, 3.0])
MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4e12 bytes"


def outer(x, y):
    return ((y - 1) ** 2).sum() + 0.1 * (x**2).sum()


def inner(x, y):
    return (W * (y - x.sin()) ** 2).sum() / 2 + 0.05 * (y**4).sum()


class Broken(torch.autograd.Function):
    """A number that is right, with a gradient that is not."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def fail(error):
    def bad(value):
        raise error

    return bad


KINDS = {
    "nan": lambda value: value * math.nan,
    "inf": lambda value: value + math.inf,
    "gradient": Broken.apply,
    "interrupt": fail(KeyboardInterrupt()),
    "no memory": fail(torch.cuda.OutOfMemoryError("CUDA out of memory")),
    "no memory on the CPU": fail(RuntimeError(MEMORY)),
    "MemoryError": fail(MemoryError()),
}


class Faulty:
    """Both losses, of which call number ``at`` of ``level`` goes wrong."""

    def __init__(self, level="", at=-1, bad=None):
        self.level, self.at, self.bad = level, at, bad
        self.calls = {"outer": 0, "inner": 0}

    def __call__(self, level, loss, x, y):
        number = self.calls[level]
        self.calls[level] += 1
        value = loss(x, y)
        return self.bad(value) if (level, number) == (self.level, self.at) else value


def run(method, faulty=None, steps=STEPS, x=X, y=Y, losses=(outer, inner), **options):
    faulty = faulty or Faulty()
    f, g = losses
    return bilevel.solve(
        lambda x, y: faulty("outer", f, x, y),
        lambda x, y: faulty("inner", g, x, y),
        x,
        y,
        method=method,
        steps=steps,
        inner_steps=INNER,
        **options,
    )


OWN = {
    "momentum": lambda: bilevel.bisls(
        "sgd", inner_solver=partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    ),
    "adam, scheduled": lambda: bilevel.fixed("adam", 0.05, inner_solver=scheduled),
}
FEW = bilevel.Implicit(bilevel.StochasticNeumann(3))
ALL = {**METHODS, "bisls-adam stochastic": lambda: bilevel.bisls(hypergradient=FEW), **OWN}


def scheduled(parameters):
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)


def good(name):
    """The undisturbed run, stopped after 0, 1, ... iterations, and its calls of each level."""
    faulty = Faulty()
    run(ALL[name](), faulty)
    return [run(ALL[name](), steps=k) for k in range(STEPS + 1)], faulty.calls


def kept(result, goods):
    """Finite, and, if the run ended early, the point before the iteration that failed."""
    assert flat(result.x).isfinite().all() and flat(result.y).isfinite().all()
    if result.reason == f"all {STEPS} steps were taken":
        assert all(r.failure is None or "outer line search" in r.failure for r in result.history)
        return True
    done = sum(r.failure is None for r in result.history)
    assert f"at iteration {done}" in result.reason, result.reason
    assert torch.equal(result.x, goods[done].x) and torch.equal(result.y, goods[done].y)
    return False


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ALL for kind in ("nan", "gradient")]
    + [(name, "inf") for name in ("bisls-adam", "bisps", "sgd", "momentum")],
)
def test_one_number_that_is_not_finite(name, kind):
    """At every single call of either loss."""
    goods, calls = good(name)
    ended = 0
    for level, count in calls.items():
        for at in range(count):
            faulty = Faulty(level, at, KINDS[kind])
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                result = run(ALL[name](), faulty)
            first = [str(w.message) for w in told if "at the start" in str(w.message)]
            assert len(first) == (at == 0 and kind != "gradient"), first
            ended += not kept(result, goods)
    assert ended  # some are fatal


@pytest.mark.parametrize("name", ALL)
def test_interrupted_at_any_call(name, tmp_path):
    goods, calls = good(name)
    for level, count in calls.items():
        for at in range(count):
            result = run(ALL[name](), Faulty(level, at, KINDS["interrupt"]))
            assert result.reason.startswith("interrupted from the keyboard at iteration ")
            assert not kept(result, goods)


@pytest.mark.parametrize("kind", ["no memory", "no memory on the CPU", "MemoryError"])
@pytest.mark.parametrize("name", ["bisls-adam", "bisps", "bisls-adam unrolled", "momentum"])
def test_out_of_memory_at_any_call(name, kind):
    """After the first iteration the work is kept; before it, the error is the user's to see."""
    goods, calls = good(name)
    early = {level: 0 for level in calls}
    faulty = Faulty()
    run(ALL[name](), faulty, steps=1)
    early.update(faulty.calls)
    for level, count in calls.items():
        for at in range(count):
            faulty = Faulty(level, at, KINDS[kind])
            if at < early[level]:
                with pytest.raises((RuntimeError, MemoryError, ValueError)) as caught:
                    run(ALL[name](), faulty)
                assert "memory" in str(caught.value) or isinstance(caught.value, MemoryError)
                continue
            with pytest.warns(RuntimeWarning, match="the result holds the last good point"):
                result = run(ALL[name](), faulty)
            assert result.reason.startswith("stopped at iteration ")
            assert not kept(result, goods)


def test_a_module_is_left_at_the_last_good_point():
    """Also where an optimizer of the user's own was stepping its parameters."""

    def build():
        torch.manual_seed(0)
        return nn.Linear(2, 1).double()

    inputs = torch.randn(5, 2, dtype=torch.float64)

    def f(x, y):
        return (y(inputs) - 1).square().mean()

    def g(x, y):
        return (y(inputs) - inputs @ x[:, None]).square().mean() + 0.1 * f(x, y)

    for kind in ("interrupt", "no memory", "nan"):
        method = OWN["momentum"]()
        losses = (f, g)
        first, clean = Faulty(), Faulty()
        run(method, first, steps=1, y=build(), losses=losses)
        run(method, clean, y=build(), losses=losses)
        for at in range(first.calls["inner"], clean.calls["inner"]):
            y, reference = build(), build()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                result = run(method, Faulty("inner", at, KINDS[kind]), y=y, losses=losses)
            assert result.y is y
            done = sum(r.failure is None for r in result.history)
            if done == STEPS:
                continue
            run(method, y=reference, steps=done, losses=losses)
            assert all(
                torch.equal(a, b)
                for a, b in zip(y.parameters(), reference.parameters(), strict=True)
            )


@pytest.mark.parametrize("name", ["bisls-adam", "sgd", "momentum"])
@pytest.mark.parametrize("kind", ["nan", "interrupt", "no memory"])
def test_a_y_that_starts_afresh_is_kept_as_well(kind, name, tmp_path):
    """The last good y, rather than the start of the iteration that failed."""
    method, first, fresh = ALL[name](), Faulty(), {"warm_start": False}
    reference = run(method, first, **fresh)
    assert not torch.equal(reference.y, Y)
    for level in ("outer", "inner"):
        faulty = Faulty(level, first.calls[level], KINDS[kind])
        path = tmp_path / level
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = run(method, faulty, steps=5, checkpoint=path, **fresh)
        assert f"at iteration {STEPS}" in result.reason
        assert torch.equal(result.x, reference.x) and torch.equal(result.y, reference.y)
        assert repr(result.state.solver) == repr(reference.state.solver)
        if kind == "nan":
            state = result.state
            assert (state.k, state.failures, len(result.history)) == (STEPS + 1, 0, STEPS + 1)
            assert state.cost.gradients > reference.state.cost.gradients
        assert torch.equal(
            torch.load(path, weights_only=True)["vectors"][1], reference.state.vectors[1]
        )


def test_a_failed_iteration_leaves_the_optimizer_as_it_was():
    """Its momentum would otherwise carry the NaN into every step after."""
    method = OWN["momentum"]()
    clean = Faulty()
    run(method, clean, steps=2)
    faulty = Faulty("inner", clean.calls["inner"], KINDS["nan"])
    result = run(method, faulty, steps=3)
    assert len(result.history) == 3 and result.history[-1].failure
    buffers = result.state.solver["optimizer"]["state"].values()
    assert all(s["momentum_buffer"].isfinite().all() for s in buffers)
    state, record = method.step(bilevel.Problem(outer, inner), result.state, None, INNER)
    assert record.failure is None and flat(state.x).isfinite().all()


# -- batches --------------------------------------------------------------------------------------


class Loader:
    """Batches of rows (inputs, targets), of which number ``at`` goes through ``bad``."""

    def __init__(self, at, bad):
        self.at, self.bad, self.count = at, bad, 0

    def __iter__(self):
        for _ in range(20):
            self.count += 1
            generator = torch.Generator().manual_seed(self.count)
            batch = torch.randn(4, 2, dtype=torch.float64, generator=generator), torch.ones(4)
            if self.count - 1 == self.at:
                batch = self.bad(batch)
                if batch is StopIteration:
                    self.count = 1000
                    return
            yield batch
            if self.count > 1000:
                return


def batch_outer(x, y, batch):
    inputs, targets = batch
    return (inputs @ y - targets).square().mean()


def batch_inner(x, y, batch):
    inputs, targets = batch
    return (inputs @ y - targets).square().mean() + (x.exp() * y**2).sum()


WRONG = {
    "raises": (fail(OSError("disk on fire")), "OSError: disk on fire"),
    "structure": (lambda b: b[0], "too many values to unpack"),
    "nothing": (lambda b: None, "None as a batch"),
    "a dict": (lambda b: {"inputs": b[0]}, "not enough values"),
    "dtype": (lambda b: (b[0].float(), b[1]), "same dtype"),
    "device": (lambda b: (b[0].to("meta"), b[1].to("meta")), "meta"),
    "shape": (lambda b: (b[0][:, :1], b[1]), "size"),
    "rows": (lambda b: (b[0], b[1][:3]), "size"),
    "empty": (lambda b: (b[0][:0], b[1][:0]), "loss is nan"),
    "NaN": (lambda b: (b[0] * math.nan, b[1]), "loss is nan"),
}


@pytest.mark.parametrize("level", ["outer", "inner"])
@pytest.mark.parametrize("name", ["bisls-adam", "bisps", "sgd"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_batch_that_is_wrong(wrong, name, level, tmp_path):
    bad, words = WRONG[wrong]

    def solve(at, steps, **options):
        data = {"outer_data": Loader(-1, None), "inner_data": Loader(-1, None)}
        data[f"{level}_data"] = loaders[at] = Loader(at, bad)
        return bilevel.solve(
            batch_outer, batch_inner, X, Y, **data, method=name, steps=steps, inner_steps=2,
            **options,
        )  # fmt: skip

    path, loaders = tmp_path / "c", {}
    reference = solve(-1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = solve(loaders[-1].count, 5, checkpoint=path)
    assert result.reason.startswith("stopped at iteration 2: ") and words in result.reason
    assert torch.equal(result.x, reference.x) and torch.equal(result.y, reference.y)
    assert torch.equal(
        torch.load(path, weights_only=True)["vectors"][0], reference.state.vectors[0]
    )


class Ending:
    """Four batches in the first pass, fewer in each later one, and at last none."""

    def __init__(self):
        self.left = 4

    def __iter__(self):
        self.left -= 1
        return iter([(torch.eye(2).double(), torch.ones(2))] * max(0, self.left))


def test_data_that_ends_early():
    """A shorter pass is a pass; an empty one ends the run."""
    with pytest.warns(RuntimeWarning, match="last good point"):
        result = bilevel.solve(
            batch_outer, batch_inner, X, Y, outer_data=Ending(), inner_data=Ending(),
            inner_steps=1, steps=9,
        )  # fmt: skip
    assert "is empty: iterating over it gave no batch" in result.reason
    assert flat(result.x).isfinite().all() and len(result.history) == 4


# -- losses without a good answer -----------------------------------------------------------------

LOSSES = {
    "flat": (lambda x, y: (0 * x).sum() + (0 * y).sum() + 3, inner),
    "both flat": (lambda x, y: (0 * y).sum(), lambda x, y: (0 * x).sum() + (0 * y).sum()),
    "f unbounded below": (lambda x, y: x.sum() + y.sum(), inner),
    "f falls without end": (lambda x, y: -x.exp().sum() - (y**2).sum(), inner),
    "g unbounded below": (outer, lambda x, y: (x * y).sum()),
    "g falls without end": (outer, lambda x, y: -(y - x).exp().sum()),
    "f jumps": (lambda x, y: outer(x, y) + torch.floor(3 * x).sum() + (y > 0.3).sum(), inner),
    "g jumps": (outer, lambda x, y: inner(x, y) + (torch.floor(4 * y) + (y > x)).sum()),
    "f is a kink": (lambda x, y: (y - 0.3).abs().sum() + x.abs().sum(), inner),
    "f is infinite beyond a wall": (lambda x, y: outer(x, y) - torch.log(0.6 - x[0]), inner),
    "g singular": (outer, lambda x, y: (y.sum() - x.sum()) ** 2),
    "g zero curvature at 0": (outer, lambda x, y: ((y - x) ** 4).sum()),
    "g indefinite": (outer, lambda x, y: (t([1.0, -1.0]) * (y - x) ** 2).sum()),
    "g negative definite": (outer, lambda x, y: -((y - x) ** 2).sum()),
    "g of huge scale": (outer, lambda x, y: 1e150 * inner(x, y)),
    "g of tiny scale": (outer, lambda x, y: 1e-150 * inner(x, y)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:x stayed where it was")  # where g is singular, by differences
@pytest.mark.filterwarnings("ignore:y ended so far")
@pytest.mark.filterwarnings("ignore:the outer loss rose")
@pytest.mark.filterwarnings("ignore:the linear system of the hypergradient was left")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("losses", LOSSES)
def test_losses_without_a_good_answer(losses, name):
    """The run ends with a reason and at a point that is finite; nothing is raised."""
    f, g = LOSSES[losses]
    start = f(X, Y)
    result = bilevel.solve(f, g, X, Y, method=ALL[name](), steps=40, inner_steps=3)
    assert flat(result.x).isfinite().all() and flat(result.y).isfinite().all()
    assert result.reason.startswith(("all 40 steps", "stopped at iteration "))
    assert result.reason.startswith("all") == (len(result.history) == 40) or "in a row" in (
        result.reason
    )
    if losses == "flat":
        assert torch.equal(result.x, X) and start == result.history[-1].outer_loss


HESSIANS = {
    "zero": [0.0, 0.0],
    "singular": [2.0, 0.0],
    "nearly singular": [2.0, 1e-300],
    "indefinite": [2.0, -1.0],
    "negative": [-2.0, -1.0],
    "huge": [1e200, 1.0],
}
HYPERGRADIENTS = [
    *LOOSE,
    bilevel.Implicit(),
    bilevel.Implicit(bilevel.Neumann(terms=7, step=0.1)),
    bilevel.Implicit(bilevel.Nystrom()),
    bilevel.Implicit(bilevel.ConjugateGradient()),
    bilevel.Unrolled(),
    bilevel.Unrolled(window=3, recompute=True),
]


@pytest.mark.parametrize("method", HYPERGRADIENTS, ids=repr)
@pytest.mark.parametrize("name", HESSIANS)
def test_an_inner_hessian_that_cannot_be_inverted(name, method):
    """Finite, or else the run says so; where the system is not solved, the residual tells."""
    h = t(HESSIANS[name])

    def g(x, y):
        return (h * (y - x) ** 2).sum() / 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = bilevel.hypergradient(outer, g, X, X, method=method)
    if found.residual is not None:
        H = torch.diag(h)
        solvable = float(h.abs().min()) > 0
        exact = 0.2 * X - H.T @ torch.linalg.lstsq(-H, 2 * (X - 1)).solution
        error = (found.grad - exact).norm() / exact.norm()
        small = bool(found.residual <= 1e-6)  # a residual may be NaN
        assert not small or (solvable and bool(error < 1e-4))
    result = bilevel.solve(
        outer, g, X, X, method=bilevel.bisls("sgd", hypergradient=method), steps=5, inner_steps=2
    )
    assert flat(result.x).isfinite().all() and flat(result.y).isfinite().all()
    assert result.reason


def test_a_solver_that_fails_on_a_singular_hessian():
    """An exact solve of one's own raises: told in the first iteration, as it is the user's."""
    with pytest.raises(RuntimeError, match="singular"):
        bilevel.solve(
            outer, lambda x, y: ((y - x)[0] ** 2).sum(), X, Y,
            method=bilevel.bisls(hypergradient=bilevel.Implicit(dense)),
        )  # fmt: skip
