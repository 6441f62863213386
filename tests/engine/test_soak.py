"""A run of any length keeps its records and nothing else."""

import tracemalloc
from pathlib import Path

import pytest

from benchmarks.soak import growth, soak
from tests.tables import METHODS


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.filterwarnings("ignore:y ended so far")  # of bisps, after so few inner steps
@pytest.mark.parametrize("name", ["bisls-adam", "bisps"])
def test_memory_does_not_grow(name):
    tracemalloc.start()
    try:
        first, *_, last = samples = soak(METHODS[name](), 300, 50)[1:]
    finally:
        tracemalloc.stop()
    # of batches that are looked at ahead, as many as the noise asks for; a leak leaves 200 or more
    assert abs(last.tensors - first.tensors) <= 30
    assert growth(samples, "objects") <= 1.2  # the record
    assert growth(samples, "traced") < 1500  # whose numbers are objects as well
