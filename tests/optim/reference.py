"""Every rule again, in NumPy, with explicit x, y and z, from the formulas of the papers alone.

Each function takes ``batch(t, x) -> (loss, gradient, target)`` and yields (point of the parameters
after step t, step size). They share nothing with ``optim`` but the formulas.
"""

import math

import numpy as np


def polyak(batch, x, steps, c=1.0, cap=math.inf, floor=0.0):
    for t in range(steps):
        f, g, l = batch(t, x)
        step = min(max(f - l, 0.0) / (c * max(g @ g, floor)), cap)
        x = x - step * g
        yield x, step


def safeguarded_ema(batch, x, steps, rho):
    m = None
    for t in range(steps):
        f, g, l = batch(t, x)
        m = g @ g if m is None else rho * m + (1 - rho) * (g @ g)
        step = max(f - l, 0.0) / max(g @ g, m)
        x = x - step * g
        yield x, step


def spsb(batch, x, steps, max_lr, decay, c):
    for t in range(steps):
        f, g, l = batch(t, x)
        step = min(max(f - l, 0.0) / (c * (g @ g)), max_lr / (t + 1) ** decay)
        x = x - step * g
        yield x, step


def decsps(batch, x, steps, c0, max_lr):
    scaled = c0 * max_lr
    for t in range(steps):
        f, g, l = batch(t, x)
        c = c0 * math.sqrt(t + 1)
        step = min(max(f - l, 0.0) / (g @ g), scaled) / c
        scaled = c * step
        x = x - step * g
        yield x, step


def adasps(batch, x, steps, c):
    total, previous = 0.0, math.inf
    for t in range(steps):
        f, g, l = batch(t, x)
        total += f - l
        c = 1 / math.sqrt(f - l) if c is None else c
        step = min((f - l) / (c * (g @ g)) / math.sqrt(total), previous)
        previous = step
        x = x - step * g
        yield x, step


def clipped(batch, x, steps, lr, max_norm):
    for t in range(steps):
        _, g, _ = batch(t, x)
        step = lr * min(1.0, max_norm / math.sqrt(g @ g))
        x = x - step * g
        yield x, step


def _metric(g, v, t, beta2, eps):
    """(v', D): D is 1 without beta2."""
    if beta2 is None:
        return v, np.ones_like(g)
    v = beta2 * v + (1 - beta2) * g * g
    return v, np.sqrt(v / (1 - beta2 ** (t + 1))) + eps


def iam(batch, x, steps, averaging, max_lr, weight_decay=0.0, beta2=None, eps=1e-8):
    z, v = x.copy(), np.zeros_like(x)
    for t in range(steps):
        lam = t + 1 if averaging == "linear" else averaging
        f, g, l = batch(t, x)
        v, d = _metric(g, v, t, beta2, eps)
        step = min(max(f - l + g @ (z - x), 0.0) / (g @ (g / d)), max_lr)
        z = z - step * (g / d + weight_decay * x)
        x = (lam * x + z) / (1 + lam)
        yield x, step


def schedule_free(
    batch, x, steps, beta=0.9, safeguard=None, max_lr=math.inf, warmup_steps=0, weight_decay=0.0,
    rho=0.99, r=0.0, weight_lr_power=2.0, beta2=None, eps=1e-8, evaluate=False,
):  # fmt: skip
    z, v, m, lr_max, total = x.copy(), np.zeros_like(x), None, 0.0, 0.0
    for t in range(steps):
        y = (1 - beta) * z + beta * x
        f, g, l = batch(t, y)
        v, d = _metric(g, v, t, beta2, eps)
        norm2 = g @ (g / d)
        m = norm2 if m is None else rho * m + (1 - rho) * norm2
        floor = {None: 0.0, "ema": m}.get(safeguard, safeguard)
        step = min(max(f - l + g @ (z - y), 0.0) / max(norm2, floor), max_lr)
        step *= min(1.0, (t + 1) / warmup_steps) if warmup_steps else 1.0
        z = z - step * (g / d + weight_decay * y)
        lr_max = max(lr_max, step)
        w = (t + 1) ** r * lr_max**weight_lr_power
        total += w
        c = w / total if total > 0 else 0.0
        x = (1 - c) * x + c * z
        yield (x if evaluate else (1 - beta) * z + beta * x), step


def _armijo(phi, f, norm2, t, c, shrink):
    for _ in range(40):
        if phi(t) <= f - c * t * norm2 + 8 * np.finfo(float).eps * abs(f):
            return t
        t *= shrink
    return 0.0


def sls(batch, x, steps, max_lr, c, shrink, reset="grow", decay=None, scale=False):
    """``decay``: SLSB; ``scale``: AdaSLS with its c_l, None for the normalised one."""
    last, total, previous = 0.0, 0.0, math.inf
    for k in range(steps):
        f, g, _ = batch(k, x)
        norm2 = g @ g
        start = {"grow": min(max_lr, last / shrink), "last": last, "fixed": max_lr}[reset]
        start = max_lr / (k + 1) ** decay if decay is not None else start or max_lr
        step = _armijo(lambda t: batch(k, x - t * g)[0], f, norm2, start, c, shrink)  # noqa: B023
        last = step or last
        if scale is not False:
            total += step * norm2
            scale = 1 / math.sqrt(total) if scale is None else scale
            previous = step = min(step / (scale * math.sqrt(total)), previous)
        x = x - step * g
        yield x, step
