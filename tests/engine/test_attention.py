"""The kernels of attention that a process may use are as they were, whoever runs at once."""

import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel
from bilevel.attention import twice_differentiable


def allowed():
    cuda = torch.backends.cuda
    flags = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    return [flag() for flag in (*flags, cuda.cudnn_sdp_enabled)]


MATH = [False, False, True, False]


@pytest.mark.parametrize("kinds", [None, SDPBackend.FLASH_ATTENTION])
def test_threads_that_overlap_put_back_what_the_first_found(kinds):
    """Whichever ends first."""
    inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]
    seen = {}

    def enter(which):
        with twice_differentiable():
            inside.wait()
            leave[which].wait()
            seen[which] = allowed()

    def run():
        before = allowed()
        threads = [threading.Thread(target=enter, args=(i,)) for i in range(2)]
        [thread.start() for thread in threads]
        inside.wait()
        for i, thread in enumerate(threads):
            leave[i].set()
            thread.join()
        assert seen == {0: MATH, 1: MATH}
        assert allowed() == before != MATH

    if kinds is None:
        run()
    else:
        with sdpa_kernel(kinds):
            run()


def test_an_exception_and_nested_runs():
    before = allowed()

    def fails(x, y):
        raise RuntimeError("no")

    with pytest.raises(ValueError):
        bilevel.solve(fails, fails, torch.zeros(2), torch.zeros(2))
    assert allowed() == before

    def nested(state, record):
        with twice_differentiable():
            assert allowed() == MATH
        with twice_differentiable(), twice_differentiable():
            pass

    losses = (lambda x, y: (y - 1).square().sum()), (lambda x, y: (y - x).square().sum())
    bilevel.solve(*losses, torch.zeros(2), torch.zeros(2), steps=2, callback=nested)
    assert allowed() == before
