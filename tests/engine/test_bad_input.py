"""Misuse is told at once: what was asked, why it cannot be, what to do instead."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import bilevel
from tests.tables import t

X, Y = t([0.5, 1.0]), t([0.0, 2.0])


def f(x, y):
    return ((y - 1) ** 2).sum() + 0.1 * (x**2).sum()


def g(x, y):
    return ((y - x.sin()) ** 2).sum()


def fb(x, y, batch):
    return f(x, y) * batch.mean()


def gb(x, y, batch):
    return g(x, y) * batch.mean()


def solve(outer=f, inner=g, x=X, y=Y, **options):
    steps = options.pop("steps", 3)
    return bilevel.solve(outer, inner, x, y, steps=steps, **options)


def never(*args):
    raise AssertionError("work was begun")


ROWS = TensorDataset(torch.ones(6, 2), torch.ones(6))
LOADER = DataLoader(TensorDataset(torch.ones(2, 1)), batch_size=4, drop_last=True)

# name: (call, kind of error, words that must be in its message)
CASES = {
    # losses
    "loss not a scalar": (
        lambda: solve(outer=lambda x, y: (y - 1) ** 2),
        TypeError,
        ["outer loss", "shape (2,)", "0-dim", ".mean()"],
    ),
    "loss of one element": (
        lambda: solve(inner=lambda x, y: g(x, y)[None]),
        TypeError,
        ["inner loss", "shape (1,)", "0-dim"],
    ),
    "loss a number": (
        lambda: solve(outer=lambda x, y: float(f(x, y).detach())),
        TypeError,
        ["outer loss returned", "0-dim tensor"],
    ),
    "loss None": (lambda: solve(inner=lambda x, y: None), TypeError, ["inner loss", "None"]),
    "loss of integers": (
        lambda: solve(outer=lambda x, y: f(x, y).long()),
        TypeError,
        ["outer loss", "int64", "floating"],
    ),
    "outer NaN": (
        lambda: bilevel.hypergradient(lambda x, y: f(x, y) * math.nan, g, X, Y),
        ValueError,
        ["outer loss is nan at the start", "finite"],
    ),
    "inner inf": (
        lambda: bilevel.hypergradient(f, lambda x, y: g(x, y) + math.inf, X, Y),
        ValueError,
        ["inner loss is inf at the start"],
    ),
    "outer without y": (
        lambda: solve(outer=lambda x, y: (x**2).sum()),
        ValueError,
        ["outer loss does not depend on y", "detach()"],
    ),
    "inner without y": (
        lambda: solve(inner=lambda x, y: (x**2).sum()),
        ValueError,
        ["inner loss does not depend on y"],
    ),
    "inner without x": (
        lambda: solve(inner=lambda x, y: (y**2).sum()),
        ValueError,
        ["inner loss does not depend on x", "same for every x"],
    ),
    "detached": (
        lambda: solve(outer=lambda x, y: f(x, y).detach()),
        ValueError,
        ["outer loss does not depend on y", "detach()"],
    ),
    "loss that raises": (
        lambda: solve(outer=lambda x, y: y @ torch.ones(5).double()),
        ValueError,
        [
            "outer loss raised RuntimeError",
            "x (2,) float64",
            "y (2,) float64",
            "outer_data is None",
        ],
    ),
    "loss of one argument": (
        lambda: solve(outer=lambda x: x.sum()),
        TypeError,
        ["outer(x)", "outer(x, y, batch)"],
    ),
    "loss not callable": (lambda: solve(inner=3), TypeError, ["inner is 3", "int", "function"]),
    "project not callable": (
        lambda: solve(project=1.0),
        TypeError,
        ["project=1.0", "function of x"],
    ),
    # variables
    "x of integers": (
        lambda: solve(outer=never, x=torch.tensor([1, 2])),
        TypeError,
        ["x has dtype torch.int64", "no gradient", ".float()"],
    ),
    "a leaf of integers": (
        lambda: solve(outer=never, y={"w": Y, "n": [torch.tensor(3)]}),
        TypeError,
        ["y['n'][0]", "int64"],
    ),
    "x of booleans": (
        lambda: solve(outer=never, x=torch.tensor([True])),
        TypeError,
        ["x has dtype torch.bool"],
    ),
    "x of complex numbers": (
        lambda: solve(outer=never, x=torch.ones(2, dtype=torch.complex128)),
        TypeError,
        ["x has dtype torch.complex128", "torch.view_as_real(x)"],
    ),
    "sparse gradients": (
        lambda: solve(outer=never, y=nn.Sequential(nn.Embedding(3, 2, sparse=True))),
        ValueError,
        ["y is a Module (Sequential)", "Embedding(..., sparse=True) at 0", "leave sparse out"],
    ),
    "rows with a largest norm": (
        lambda: solve(outer=never, x=nn.EmbeddingBag(3, 2, max_norm=1.0)),
        ValueError,
        ["x is a Module (EmbeddingBag)", "max_norm) at its top", "leave max_norm out"],
    ),
    "x a number": (
        lambda: solve(outer=never, x=1.0),
        TypeError,
        ["x is 1.0", "float", "torch.tensor"],
    ),
    "x None": (lambda: solve(outer=never, x=None), TypeError, ["x is None"]),
    "x sparse": (
        lambda: solve(outer=never, x=torch.eye(2).to_sparse()),
        TypeError,
        ["x is a sparse tensor", ".to_dense()"],
    ),
    "x empty": (lambda: solve(outer=never, x={}), ValueError, ["x = {}", "nothing to optimise"]),
    "y of no numbers": (
        lambda: solve(outer=never, y=torch.zeros(0, 3)),
        ValueError,
        ["y =", "no numbers"],
    ),
    "a lazy Module": (
        lambda: solve(x=nn.LazyLinear(2)),
        ValueError,
        ["x is a Module (LazyLinear)", "weight, bias", "call it once"],
    ),
    "a frozen Module": (
        lambda: solve(outer=never, x=nn.Linear(2, 2).requires_grad_(False)),
        ValueError,
        ["x is a Module (Linear)", "requires_grad_(True)"],
    ),
    "a Module without parameters": (
        lambda: solve(outer=never, y=nn.ReLU()),
        ValueError,
        ["y is a Module (ReLU)", "nothing to optimise"],
    ),
    "other dtypes": (
        lambda: solve(outer=never, x=X.float()),
        TypeError,
        ["x is torch.float32 and y torch.float64", ".to(dtype)"],
    ),
    "other devices": (
        lambda: solve(outer=never, x=torch.zeros(2, device="meta", dtype=torch.float64)),
        ValueError,
        ["x is on meta and y on cpu", ".to(device)"],
    ),
    "leaves on several devices": (
        lambda: solve(outer=never, x=[X, torch.zeros(2, device="meta")]),
        ValueError,
        ["x[0] on cpu", "x[1] on meta", ".to(device)"],
    ),
    # data
    "no data for a loss that takes some": (
        lambda: solve(outer=fb),
        TypeError,
        ["outer loss takes a batch", "outer_data is None", "outer_data=[batch]", "outer(x, y)"],
    ),
    "data for a loss that takes none": (
        lambda: solve(outer_data=[t(1.0)]),
        TypeError,
        ["outer loss was given a batch", "takes none", "outer(x, y, batch)"],
    ),
    "empty list": (
        lambda: solve(outer=fb, outer_data=[]),
        ValueError,
        ["outer_data is empty", "at least one"],
    ),
    "empty loader": (
        lambda: solve(inner=gb, inner_data=LOADER),
        ValueError,
        ["inner_data is empty", "drop_last"],
    ),
    "a generator": (
        lambda: solve(inner=gb, inner_data=(t(1.0) for _ in range(9))),
        TypeError,
        ["inner_data is a generator", "only once", "DataLoader"],
    ),
    "one batch": (
        lambda: solve(inner=gb, inner_data=torch.ones(3)),
        TypeError,
        ["inner_data is a Tensor", "one batch", "[batch]"],
    ),
    "a dataset of rows": (
        lambda: solve(outer=never, inner=gb, inner_data=ROWS),
        TypeError,
        ["inner_data is a TensorDataset", "single rows", "DataLoader(dataset, batch_size=...)"],
    ),
    "a part of a dataset": (
        lambda: solve(outer=fb, outer_data=Subset(ROWS, [0, 1])),
        TypeError,
        ["outer_data is a Subset", "single rows", "batch_size=None"],
    ),
    "not iterable": (
        lambda: solve(inner=gb, inner_data=3),
        TypeError,
        ["inner_data is 3", "cannot be iterated over"],
    ),
    "wrong batch structure": (
        lambda: solve(inner=lambda x, y, b: g(x, y) * b[0] @ b[1], inner_data=[(t(1.0),)]),
        (ValueError, TypeError),
        ["inner loss raised IndexError", "batch = (Tensor() float64)"],
    ),
    "batches of another type": (
        lambda: solve(
            inner=lambda x, y, b: ((b @ y - x) ** 2).sum(), inner_data=[torch.ones(2, 2)]
        ),
        ValueError,
        ["inner loss raised RuntimeError", "Tensor(2, 2) float32", "float64"],
    ),
    "data and outer_data": (
        lambda: solve(data=[(1, 2)], outer_data=[1]),
        ValueError,
        ["data was given together", "pairs"],
    ),
    "no pairs": (
        lambda: solve(outer=fb, inner=gb, data=[t(1.0)]),
        ValueError,
        ["pairs (outer_batch, inner_batch)", "Tensor"],
    ),
    # settings
    "unknown method": (
        lambda: solve(outer=never, method="bisls_adam"),
        ValueError,
        ["'bisls_adam'", "did you mean 'bisls-adam'", "'bisps'"],
    ),
    "unknown method, far": (
        lambda: solve(outer=never, method="zzz"),
        ValueError,
        ["'zzz'", "one of 'bisls-adam', 'bisls-sgd', 'bisps', 'adam', 'sgd'"],
    ),
    "method of another kind": (
        lambda: solve(outer=never, method=bilevel.Neumann()),
        TypeError,
        ["Neumann", "bilevel.bisls(...)"],
    ),
    "method as a class": (lambda: solve(outer=never, method=bilevel.bisls), TypeError, ["method="]),
    "negative steps": (
        lambda: solve(outer=never, steps=-1),
        ValueError,
        ["steps=-1", "at least 0"],
    ),
    "steps a float": (lambda: solve(outer=never, steps=2.5), TypeError, ["steps=2.5", "float"]),
    "no inner steps": (
        lambda: solve(outer=never, inner_steps=0),
        ValueError,
        ["inner_steps=0", "at least 1"],
    ),
    "inner steps a bool": (
        lambda: solve(outer=never, inner_steps=True),
        TypeError,
        ["inner_steps"],
    ),
    "steps a bool of NumPy": (
        lambda: solve(outer=never, steps=np.bool_(True)),
        TypeError,
        ["steps=", "whole number"],
    ),
    "steps a float of NumPy": (
        lambda: solve(outer=never, steps=np.float64(3)),
        TypeError,
        ["steps=", "float64", "whole number"],
    ),
    "steps an array": (
        lambda: solve(outer=never, steps=np.array(3)),
        TypeError,
        ["steps=", "ndarray", "whole number"],
    ),
    "steps a tensor": (
        lambda: solve(outer=never, steps=torch.tensor(3)),
        TypeError,
        ["steps=tensor(3)", "Tensor", "whole number"],
    ),
    "too few steps, of NumPy": (
        lambda: solve(outer=never, steps=np.int64(-3)),
        ValueError,
        ["steps=", "-3", "at least 0"],
    ),
    "tol a fraction": (
        lambda: solve(outer=never, tol=Fraction(1, 3)),
        TypeError,
        ["tol=Fraction(1, 3)", "finite number"],
    ),
    "tol a bool of NumPy": (
        lambda: solve(outer=never, tol=np.bool_(True)),
        TypeError,
        ["tol=", "finite number"],
    ),
    "tol NaN of NumPy": (
        lambda: solve(outer=never, tol=np.float32("nan")),
        ValueError,
        ["tol=", "nan"],
    ),
    "checkpoint_every zero": (
        lambda: solve(outer=never, checkpoint_every=0),
        ValueError,
        ["checkpoint_every=0", "at least 1"],
    ),
    "callback not callable": (
        lambda: solve(outer=never, callback=3),
        TypeError,
        ["callback=3", "function(state, record)"],
    ),
    "seed a string": (
        lambda: solve(outer=never, seed="0"),
        TypeError,
        ["seed='0'", "str", "whole number"],
    ),
    "a solver as hypergradient of a method": (
        lambda: bilevel.bisls(hypergradient=bilevel.Neumann()),
        TypeError,
        ["Neumann", "not a hypergradient", "bilevel.Implicit(solver)"],
    ),
    "negative tol": (lambda: solve(outer=never, tol=-1e-3), ValueError, ["tol=-0.001", ">= 0"]),
    "tol NaN": (lambda: solve(outer=never, tol=math.nan), ValueError, ["tol=nan"]),
    # other entries
    "hypergradient with a solver": (
        lambda: bilevel.hypergradient(f, g, X, Y, method=bilevel.Neumann()),
        TypeError,
        ["Neumann", "not a hypergradient", "bilevel.Implicit(solver)"],
    ),
    "hypergradient with a bad loss": (
        lambda: bilevel.hypergradient(lambda x, y: y, g, X, Y),
        TypeError,
        ["outer loss", "0-dim"],
    ),
    "check with no directions": (
        lambda: bilevel.check(f, g, X, Y, directions=0),
        ValueError,
        ["directions=0", "at least 1"],
    ),
    "implicit of integers": (
        lambda: bilevel.implicit(g, lambda x: x)(torch.tensor([1])),
        TypeError,
        ["x is torch.int64", "further argument"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_misuse(name):
    call, kind, words = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_shared_parameters():
    shared = nn.Linear(2, 2)
    x, y = nn.Sequential(shared, nn.Linear(2, 2)), nn.Sequential(shared)
    a = torch.ones(3, 2)
    with pytest.raises(ValueError, match="x and y share 2 parameters.*copy the Module"):
        solve(lambda x, y: y(x(a)).sum(), lambda x, y: (y(x(a)) ** 2).sum(), x, y)


class Pairs(Dataset):
    """Episodes: what data= is for."""

    def __getitem__(self, i):
        if i > 1:
            raise IndexError
        return t(1.0 + i), t(1.0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([t(1.0), t(2.0)])


def test_datasets_of_episodes_and_of_batches():
    solve(fb, gb, data=Pairs())
    batches = DataLoader(TensorDataset(torch.ones(2, 3)), None)
    solve(fb, lambda x, y, b: gb(x, y, b[0]), outer_data=Stream(), inner_data=batches)


def test_project_of_no_finite_numbers():
    with pytest.raises(ValueError, match=r"project\(x\) holds numbers that are not finite.*return"):
        solve(project=lambda x: x * math.nan)


def test_project_that_raises():
    """It is given x, as a tree, and neither y nor a batch."""
    with pytest.raises(ValueError, match="project raised AttributeError") as caught:
        solve(project=lambda x: x.foo)
    assert "called with x = x (2,) float64, and nothing else" in str(caught.value)
    x = nn.Linear(2, 1).double()
    with pytest.raises(TypeError, match="project raised TypeError") as caught:
        solve(lambda x, y: f(x(X), y), lambda x, y: g(x(X), y), x, project=lambda x: x + 1)
    found = str(caught.value)
    assert "with x = x['weight'] (1, 2) float64, x['bias'] (1,) float64, and nothing" in found
    assert "y" not in found.split("called with")[1].split(". Check")[0].replace("nothing", "")


class Masked(nn.Module):
    def __init__(self, changes):
        super().__init__()
        self.changes, self.weight = changes, nn.Parameter(X.clone())
        self.register_buffer("mask", t([1.0, math.nan]))

    def forward(self):
        if self.changes:
            self.mask[0] += 1
        return self.weight


def test_a_buffer_that_holds_nan():
    """It is changed where its other numbers are."""
    result = solve(lambda x, y: f(x, y()), lambda x, y: g(x, y()), y=Masked(False))
    assert result.reason == "all 3 steps were taken"
    with pytest.raises(ValueError, match="outer loss changes the buffers y.mask"):
        solve(lambda x, y: f(x, y()), lambda x, y: g(x, y()), y=Masked(True))


def test_project_of_another_shape():
    with pytest.raises(ValueError, match="a value for x has the structure.*same structure"):
        solve(project=lambda x: x[:1])


def test_misuse_leaves_the_module_as_it_was():
    y = nn.Linear(2, 1).double()
    before = [p.clone() for p in y.parameters()]
    a = torch.ones(3, 2).double()
    with pytest.raises(ValueError):
        solve(lambda x, y: y(a).sum().detach(), lambda x, y: (y(a) - x).pow(2).mean(), X[0], y)
    assert all(torch.equal(p, q) for p, q in zip(before, y.parameters(), strict=True))


# -- what goes wrong midway -----------------------------------------------------------------------


class Explosive(Exception):
    pass


@pytest.mark.parametrize("where", ["outer loss", "inner loss", "data"])
def test_an_exception_midway_keeps_the_work(where, tmp_path):
    """Ends the run with a warning, its reason and the last good point, and the checkpoint."""

    def loss(base, name):
        def call(x, y, batch):
            if name == where and float(batch) == 2:
                raise Explosive("at two")
            return base(x, y) * (1 + 0 * batch)

        return call

    class Data:
        def __iter__(self):
            for j in range(40):
                if where == "data" and j == 12:
                    raise Explosive("at two")
                yield t(2.0 if j == 12 else 1.0)

    options = dict(
        outer=loss(f, "outer loss"),
        inner=loss(g, "inner loss"),
        outer_data=[t(1.0)] * 4 + [t(2.0)],
        inner_data=Data(),
        inner_steps=3,
        method="bisls-sgd",
    )
    path = tmp_path / "c"
    with pytest.warns(RuntimeWarning, match="Explosive: at two.*last good point"):
        result = solve(**options, steps=20, checkpoint=path)
    done = len(result.history)
    assert done == 3  # all of them are looked at ahead
    assert result.reason == f"stopped at iteration {done}: Explosive: at two"
    good = solve(**options, steps=done)
    assert torch.equal(result.x, good.x) and torch.equal(result.y, good.y)
    assert torch.load(path, weights_only=True)["k"] == done


def test_an_exception_in_the_callback_is_the_users():
    with pytest.raises(Explosive):
        solve(callback=lambda s, r: (_ for _ in ()).throw(Explosive()))


def test_an_exception_in_the_first_iteration_is_raised():
    seen = []

    def outer(x, y):
        seen.append(1)
        if len(seen) > 1:  # after the first look
            raise Explosive("second")
        return f(x, y)

    with pytest.raises(Explosive, match="second"):
        solve(outer=outer)


class Running(nn.Module):
    """With a mean that is another tensor after each call, not the same one changed."""

    def __init__(self, mean):
        super().__init__()
        self.weight = nn.Parameter(Y.clone())
        self.inside = nn.Module()
        self.inside.register_buffer("mean", mean)

    def forward(self):
        mean = 0.0 if self.inside.mean is None else self.inside.mean
        self.inside.mean = 0.9 * mean + 0.1 * (self.weight.detach().mean() + 1)
        return self.weight


@pytest.mark.parametrize("mean", [torch.zeros(()), None])
def test_a_buffer_that_is_assigned_anew(mean):
    y = Running(mean)
    with pytest.raises(ValueError, match="inner loss changes the buffers y.inside.mean"):
        solve(inner=lambda x, y: g(x, y()), outer=lambda x, y: f(x, y.weight), y=y)
    assert y.inside.mean is mean and (mean is None or mean == 0)


# -- losses that are not the same twice ----------------------------------------------------------

ZERO = torch.zeros(2, dtype=torch.float64)
MATRIX = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("level", ["outer", "inner"])
@pytest.mark.parametrize("y", [ZERO, Y], ids=["zeros", "others"])
def test_random_numbers_of_another_library(level, y):
    """At y = 0 the loss does not show them, but its gradient does."""
    rng = np.random.default_rng(0)

    def noisy(x, y):
        features = MATRIX + torch.from_numpy(rng.normal(size=(3, 2)))
        return (features @ y - 1).square().mean() + (x.exp() * y**2).sum()

    def shifted(x, y):  # in the value alone
        return g(x, y) + rng.normal()

    for random in (noisy, shifted):
        losses = {"outer": f, "inner": lambda x, y: g(x, y) + x.sum() ** 2} | {level: random}
        with pytest.raises(ValueError, match=f"the {level} loss differs from one eval.*NumPy"):
            solve(**losses, y=y)


def test_sums_in_another_order_are_the_same_loss():
    """As on a GPU: near y*(x) the parts of a gradient cancel, and leave rounding."""
    rng = np.random.default_rng(0)
    A = torch.from_numpy(rng.normal(size=(20000, 20))).float()
    a = A.sum(1) + torch.from_numpy(rng.normal(size=20000)).float()

    def inner(x, y):
        order = rng.permutation(len(A))
        return (A[order] @ y - a[order]).square().sum() + (x.exp() * y**2).sum()

    y = torch.linalg.solve(A.T @ A + torch.eye(20), A.T @ a)
    result = solve(lambda x, y: (A[:99] @ y - a[:99]).square().mean(), inner, torch.zeros(20), y)
    assert len(result.history) == 3


@pytest.mark.parametrize("level", ["outer", "inner"])
@pytest.mark.parametrize("change", [lambda b: b.div_(255.0), lambda b: b.sub_(5).div_(3)])
def test_a_batch_that_a_loss_changes(level, change):
    """What a method of fixed steps would not notice either."""
    batch = {"features": MATRIX.clone(), "rows": [torch.arange(3.0).double()]}

    def changing(x, y, b):
        return (change(b["features"]) @ y - b["rows"][0]).square().mean() + (x.exp() * y**2).sum()

    def fixed(x, y, b):
        return (b["features"] @ y - 1).square().mean() + (x.exp() * y**2).sum()

    losses = {"outer": fixed, "inner": fixed} | {level: changing}
    data = {f"{name}_data": [batch] for name in losses}
    for method in ("bisls-adam", "sgd"):
        words = rf"the {level} loss changes batch\['features'\] in place.*load it anew.*batch / 255"
        with pytest.raises(ValueError, match=words):
            solve(**losses, **data, y=ZERO, method=method)
    with torch.inference_mode():  # such tensors do not count their changes
        held = MATRIX.clone()
    assert len(solve(fb, gb, outer_data=[held], inner_data=[held]).history) == 3


def test_inputs_and_labels_are_one_batch():
    inputs, labels, more = torch.ones(6, 2), torch.ones(6), torch.ones(6, dtype=torch.long)
    for data in ((inputs, labels), [inputs, labels], (labels, more), [inputs, labels, more]):
        with pytest.raises(TypeError, match=r"tensors with as many rows.*pass \[\(inputs, labels"):
            solve(fb, gb, outer_data=data, inner_data=data)
    with pytest.raises(TypeError, match=r"data is a tuple.*pass pairs \(outer_batch, inner_batch"):
        solve(fb, gb, data=(inputs, labels))
    ragged = [torch.ones(6, 2), torch.ones(6, 3), torch.ones(4, 3)]  # of texts, say
    for data in (ragged, (t([1.0]), t([2.0])), [torch.tensor(1.0), torch.tensor(2.0)], [inputs]):
        data = type(data)(part.double() for part in data)
        assert len(solve(fb, gb, outer_data=data, inner_data=data).history) == 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_batches():
    parts = [torch.ones(2, 2).double(), torch.ones(3, 2).double()]

    def mean(batch):
        return torch.stack([part.mean() for part in batch.unbind()]).mean()

    for layout in (torch.strided, torch.jagged):
        data = [torch.nested.nested_tensor(parts, layout=layout)]
        losses = (lambda x, y, b: f(x, y) * mean(b)), (lambda x, y, b: g(x, y) * mean(b))
        assert len(solve(*losses, outer_data=data, inner_data=data).history) == 3
        with pytest.raises(ValueError, match="batch = nested Tensor of 2 float64"):
            solve(lambda x, y, b: b @ y, losses[1], outer_data=data, inner_data=data)
