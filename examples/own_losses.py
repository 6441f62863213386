"""Your own two losses, and no learning rate: one penalty per feature of a ridge regression.

Outer: the error on validation data. Inner: the fit to training data under the penalties e^x.
Of the 20 features only the first 5 matter, and the penalties are to find out.
"""

import os

import torch

import bilevel

torch.manual_seed(0)
truth = torch.cat([torch.ones(5), torch.zeros(15)])
A, B = torch.randn(40, 20), torch.randn(200, 20)  # training and validation
a, b = A @ truth + torch.randn(40), B @ truth + torch.randn(200)


def outer(x, y):
    return ((B @ y - b) ** 2).mean()


def inner(x, y):
    return ((A @ y - a) ** 2).mean() + (x.exp() * y**2).sum()


x, y = torch.zeros(20), torch.zeros(20)
steps = 20 if os.environ.get("BILEVEL_TINY") else 200
result = bilevel.solve(outer, inner, x, y, steps=steps, progress=False)

first, last = result.history[0], result.history[-1]
penalties = result.x.exp()
print(f"{result.reason}: validation error {first.outer_loss:.3f} -> {last.outer_loss:.3f}")
print(f"penalty on features that matter: {penalties[:5].median():.4f} (median)")
print(f"penalty on features that do not: {penalties[5:].median():.4f} (median)")
