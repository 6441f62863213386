"""A run of any length keeps its records and nothing else."""

import tracemalloc
from pathlib import Path

import pytest

from benchmarks.soak import growth, soak
from tests.tables import METHODS


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("name", ["bisls-adam", "bisps"])
def test_memory_does_not_grow(name):
    tracemalloc.start()
    try:
        first, *_, last = samples = soak(METHODS[name](), 90, 15)[2:]
    finally:
        tracemalloc.stop()
    assert last.tensors == first.tensors
    assert growth(samples, "objects") <= 1.1  # the record
    assert growth(samples, "traced") < 1500  # whose numbers are objects as well
