"""DoG against its formula in NumPy."""

import numpy
import pytest
import torch

from tasks.dog import DoG


def test_the_steps_are_those_of_the_formula():
    """Two tensors, one of which has its first gradient at the third step."""
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(3, 2, generator=g), torch.randn(4, generator=g)]
    params = [p.double().requires_grad_() for p in params]
    optimizer = DoG(params)
    x = numpy.concatenate([p.detach().numpy().ravel() for p in params])
    start, farthest, squares = x.copy(), 1e-6 * (1 + numpy.sqrt((x**2).sum())), 0.0
    for k in range(40):
        grads = [3 * torch.randn(p.shape, generator=g, dtype=torch.float64) + 1 for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        if k < 2:
            grads[1], params[1].grad = torch.zeros(4), None
        optimizer.step()
        slope = numpy.concatenate([grad.numpy().ravel() for grad in grads])
        farthest = max(farthest, numpy.sqrt(((x - start) ** 2).sum()))
        squares += (slope**2).sum()
        x = x - farthest / numpy.sqrt(squares) * slope
        assert optimizer.param_groups[0]["lr"] == pytest.approx(farthest / squares**0.5, rel=1e-12)
        found = numpy.concatenate([p.detach().numpy().ravel() for p in params])
        numpy.testing.assert_allclose(found, x, rtol=1e-12)
    assert farthest > 1e-4  # it has left its first step behind


def test_it_goes_on_from_its_state():
    def made():
        return [torch.ones(2, dtype=torch.float64, requires_grad=True)]

    def step(optimizer, p):
        p.grad = 3 * p.detach() + 1
        optimizer.step()

    (whole,), (half,) = made(), made()
    optimizer, first = DoG([whole], first=0.1), DoG([half], first=0.1)
    for _ in range(4):
        step(optimizer, whole)
    for _ in range(2):
        step(first, half)
    resumed = DoG([half], first=7.0)
    resumed.load_state_dict(first.state_dict())
    for _ in range(2):
        step(resumed, half)
    assert half.equal(whole)


def test_without_a_gradient_it_stays():
    x = torch.ones(2, requires_grad=True)
    optimizer = DoG([x])
    for x.grad in (None, torch.zeros(2)):
        optimizer.step()
        assert x.tolist() == [1.0, 1.0] and optimizer.param_groups[0]["lr"] == 0


def test_mistakes():
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="must be > 0, not 0"):
        DoG([x], first=0.0)
    with pytest.raises(ValueError, match="one group"):
        DoG([{"params": [x]}, {"params": [y]}])
