"""Every optimizer and setting: a new one is a module, an export and a row here."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import optim
from tests.optim import reference as ref


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        make: the class.
        options: its keyword arguments.
        numpy: the same rule in NumPy, as in :mod:`tests.optim.reference`.
        search: its closure only computes the loss, and it synchronises.
        average: it has train and eval modes.
        oracle: with the exact target it never moves away from a solution of a convex problem.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    numpy: Callable[..., Iterator]
    search: bool = False
    average: bool = False
    oracle: bool = False

    def __call__(self, params, **options):
        return self.make(params, **{**self.options, **options})

    def __str__(self):
        return self.name


def _plain(name, make, numpy, **options):
    return Method(name, make, options, numpy)


def _search(name, make, numpy, **options):
    return Method(name, make, options, numpy, search=True)


def _average(name, make, numpy, oracle=False, **options):
    return Method(name, make, options, numpy, average=True, oracle=oracle)


def _sf(name, oracle=False, **options):
    numpy = partial(ref.schedule_free, **options)
    return _average(f"sf-sps {name}", optim.ScheduleFreeSPS, numpy, oracle, **options)


def _sf_adam(name, beta=0.9, beta2=0.99, **options):
    numpy = partial(ref.schedule_free, beta=beta, beta2=beta2, **options)
    options = {"betas": (beta, beta2), **options}
    return _average(f"sf-adam-sps {name}", optim.ScheduleFreeAdamSPS, numpy, **options)


def _iam(name, averaging, max_lr, oracle=True, **options):
    numpy = partial(ref.iam, averaging=averaging, max_lr=max_lr, **options)
    options = {"averaging": averaging, "max_lr": max_lr, **options}
    return _average(f"iam {name}", optim.IAM, numpy, oracle, **options)


def _iam_adam(name, averaging, max_lr, **options):
    numpy = partial(ref.iam, averaging=averaging, max_lr=max_lr, **options)
    options = {"averaging": averaging, "max_lr": max_lr, **options}
    return _average(f"iam-adam {name}", optim.IAMAdam, numpy, **options)


_SLS = {"c": 0.1, "shrink": 0.5}

METHODS = [
    Method("sps", optim.SPS, {}, ref.polyak, oracle=True),
    Method("sps max", optim.SPS, {"max_lr": 0.05}, partial(ref.polyak, cap=0.05), oracle=True),
    _plain("sps c", optim.SPS, partial(ref.polyak, c=2.0), c=2.0),
    Method("sps+", optim.SPSPlus, {}, ref.polyak, oracle=True),
    Method("sps+ cap", optim.SPSPlus, {"max_lr": 0.05}, partial(ref.polyak, cap=0.05), oracle=True),
    _plain("sps safe", optim.SafeguardedSPS, partial(ref.polyak, floor=9.0), safeguard=9.0),
    _plain("sps ema", optim.SafeguardedSPS, partial(ref.safeguarded_ema, rho=0.9),
           safeguard="ema", rho=0.9),
    _plain("spsb", optim.SPSB, partial(ref.spsb, max_lr=0.5, decay=0.5, c=0.5), max_lr=0.5, c=0.5),
    _plain("decsps", optim.DecSPS, partial(ref.decsps, c0=0.7, max_lr=10.0), c0=0.7),
    _plain("adasps", optim.AdaSPS, partial(ref.adasps, c=None)),
    _plain("adasps c", optim.AdaSPS, partial(ref.adasps, c=0.5), c=0.5),
    _plain("inexact", optim.InexactPolyak, partial(ref.polyak, c=math.sqrt(9)), steps=9),
    _plain("clipped", optim.ClippedSGD, partial(ref.clipped, lr=0.05, max_norm=2.0),
           lr=0.05, max_norm=2.0),
    _iam("9", 9.0, 1.0),
    _iam("cap", 9.0, 0.05),
    _iam("linear", "linear", math.inf),
    _iam("decay", 4.0, 0.05, oracle=False, weight_decay=0.1),
    _iam_adam("9", 9.0, 0.5, beta2=0.99),
    _iam_adam("linear", "linear", 0.1, beta2=0.9, weight_decay=0.1),
    _sf("+", oracle=True),
    _sf("beta 0", oracle=True, beta=0.0),
    _sf("beta 0.2", oracle=True, beta=0.2),
    _sf("beta 0.5", oracle=True, beta=0.5, weight_lr_power=0.0),
    _sf("beta 1", oracle=True, beta=1.0),
    _sf("cap", oracle=True, max_lr=0.05),
    _sf("m", safeguard=9.0),
    _sf("ema", safeguard="ema", rho=0.9),
    _sf("all", beta=0.8, safeguard="ema", rho=0.5, max_lr=0.1, warmup_steps=20,
        weight_decay=0.1, r=1.0, weight_lr_power=1.0),
    _sf("decay beta 0", beta=0.0, max_lr=0.1, weight_decay=0.1),
    _sf_adam("+", warmup_steps=20),
    _sf_adam("beta 0", beta=0.0, max_lr=0.1),
    _sf_adam("m", safeguard=20.0, warmup_steps=20),
    _sf_adam("all", beta=0.8, safeguard="ema", max_lr=0.1, warmup_steps=20, weight_decay=0.1,
             r=1.0, weight_lr_power=1.0),
    _search("sls", optim.SLS, partial(ref.sls, max_lr=1.0, **_SLS)),
    _search("sls last", optim.SLS, partial(ref.sls, max_lr=1.0, reset="last", **_SLS),
            reset="last"),
    _search("sls fixed", optim.SLS, partial(ref.sls, max_lr=1.0, reset="fixed", **_SLS),
            reset="fixed"),
    _search("slsb", optim.SLSB, partial(ref.sls, max_lr=1.0, decay=0.5, **_SLS)),
    _search("adasls", optim.AdaSLS, partial(ref.sls, max_lr=1.0, scale=None, **_SLS)),
    _search("adasls c", optim.AdaSLS, partial(ref.sls, max_lr=1.0, scale=0.5, **_SLS), scale=0.5),
]  # fmt: skip

POLYAK = [m for m in METHODS if not m.search]
AVERAGES = [m for m in METHODS if m.average]
ORACLES = [m for m in METHODS if m.oracle]
ONCE = list({m.make: m for m in reversed(METHODS)}.values())  # one row per class


class LeastSquares:
    """f_t(x) = ||A_t x - b_t||^2 / 2 + o_t with every batch's optimal point and value known.

    All batches share the solution x* but not its value o_t, which is the target and differs from
    0, so that a target that is lost, or halved, shows.
    """

    def __init__(self, shapes=((3,), (2, 2), ()), rows=4, seed=0, noise=0.0):
        self.shapes = shapes
        self.n = sum(math.prod(s) for s in shapes)
        rng = np.random.default_rng(seed)
        self.a = rng.normal(size=(7, rows, self.n)) / math.sqrt(rows)
        self.solution = rng.normal(size=self.n)
        self.b = self.a @ self.solution + noise * rng.normal(size=(7, rows))
        self.offset = rng.normal(size=7)
        self.start = self.solution + rng.normal(size=self.n)

    def batch(self, t, x):
        i = t % len(self.a)
        residual = self.a[i] @ x - self.b[i]
        loss = 0.5 * residual @ residual + self.offset[i]
        return loss, self.a[i].T @ residual, self.target(t)

    def target(self, t):
        """f_t(x*); negative for some t."""
        i = t % len(self.a)
        residual = self.a[i] @ self.solution - self.b[i]
        return 0.5 * residual @ residual + self.offset[i]

    def params(self, dtype=torch.float64):
        """The start, cut into parameters."""
        flat = torch.tensor(self.start, dtype=dtype)
        pieces = flat.split([math.prod(s) for s in self.shapes])
        return [
            torch.nn.Parameter(p.reshape(s).clone())
            for p, s in zip(pieces, self.shapes, strict=True)
        ]

    def loss(self, t, params):
        i = t % len(self.a)
        x = torch.cat([p.reshape(-1).double() for p in params])
        residual = torch.from_numpy(self.a[i]) @ x - torch.from_numpy(self.b[i])
        return 0.5 * residual @ residual + self.offset[i]

    def step(self, optimizer, t, params, **kwargs):
        """One step of any method."""
        if isinstance(optimizer, (optim.SLS, optim.SLSB, optim.AdaSLS)):
            return optimizer.step(lambda: self.loss(t, params), **kwargs)
        optimizer.zero_grad()
        loss = self.loss(t, params)
        loss.backward()
        return optimizer.step(loss=loss, **{"target": self.target(t), **kwargs})


class RandomSteps(LeastSquares):
    """Losses, gradients and targets that do not depend on the point: errors cannot amplify."""

    def __init__(self, steps, seed=0):
        super().__init__(seed=seed)
        rng = np.random.default_rng(seed + 1)
        self.losses = rng.uniform(1, 3, size=steps)
        self.gradients = rng.normal(size=(steps, self.n)) * rng.uniform(0.1, 3, size=(steps, 1))
        self.targets = rng.uniform(-1, 1, size=steps)

    def batch(self, t, x):
        return self.losses[t], self.gradients[t], self.targets[t]

    def step(self, optimizer, t, params, **kwargs):
        pieces = torch.from_numpy(self.gradients[t]).split([p.numel() for p in params])
        for p, g in zip(params, pieces, strict=True):
            p.grad = g.reshape(p.shape).clone()
        return optimizer.step(loss=self.losses[t], **{"target": self.targets[t], **kwargs})


def flat(params):
    """Values of the parameters as one NumPy vector."""
    return torch.cat([p.detach().reshape(-1) for p in params]).numpy().copy()
