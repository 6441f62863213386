"""Your own loop, one step at a time, on a problem whose solution is known.

    min_x  |y - target|^2 / 2 + |x|^2 / 20   with   y = argmin_y  y'Hy / 2 - x'y  =  H^-1 x

so that  x* = (H^-1 H^-1 + I / 10)^-1 H^-1 target.
"""

import os

import torch

import bilevel

torch.set_default_dtype(torch.float64)
H = torch.diag(torch.tensor([0.5, 1.0, 2.0]))
target = torch.tensor([1.0, -2.0, 3.0])

problem = bilevel.Problem(
    outer=lambda x, y: ((y - target) ** 2).sum() / 2 + (x**2).sum() / 20,
    inner=lambda x, y: (y @ H @ y) / 2 - x @ y,
)
method = bilevel.bisls("sgd")
state = method.init(torch.zeros(3), torch.zeros(3))

for k in range(50 if os.environ.get("BILEVEL_TINY") else 100):
    state, record = method.step(problem, state, inner_batches=20)  # the losses take no batch
    if k % 10 == 0:
        print(
            f"{k:3}  F {record.outer_loss:.9f}  |F'| {record.hypergrad_norm:.1e}  "
            f"outer step {record.outer_step:g}"
        )

inverse = H.inverse()
solution = torch.linalg.solve(inverse @ inverse + torch.eye(3) / 10, inverse @ target)
print("x        ", state.x.numpy().round(6))
print("solution ", solution.numpy().round(6))
print(f"distance {torch.dist(state.x, solution):.1e}")
